"""Adam that moves only the table rows that a batch read.

At step t of a table, for the distinct rows r that the batch read, with gradient g (per table, t counts its own steps):

    m[r] <- m[r] + (1 - b1) (g - m[r])          v[r] <- v[r] + (1 - b2) (g^2 - v[r])
    w[r] <- d[r] w[r] - lr sqrt(1 - b2^t) / (1 - b1^t) * m[r] / (sqrt(v[r]) + eps)

Without weight decay (d = 1) this is ``torch.optim.SparseAdam``, operation for operation, eps included: it is added
before the bias correction, whereas ``torch.optim.Adam`` adds it after.  It is faster, because it gathers and writes
rows instead of adding sparse tensors.

Weight decay is decoupled (Loshchilov and Hutter, *Decoupled weight decay regularization*, ICLR 2019,
https://arxiv.org/abs/1711.05101): dense AdamW multiplies all rows by 1 - lr * wd at every step.  ``touched`` multiplies
the rows read by the step, once.  ``catch_up`` multiplies by what a row has missed, too: a table keeps the clock
c = sum over its steps of log(1 - lr_s wd), each row the clock at its last touch, and d[r] = exp(c - c_last[r]).  A row
is brought up to date when it is next read (`RowAdam.watch`), so that the forward pass sees what dense decay would show
it, and `RowAdam.settle` brings all rows up to date, before evaluation or saving.

What is a step of a table: one in which it has a gradient.  A table without one keeps its clock, its step count, its
moments and its settled weights bit for bit, so that a batch without observed rows of a task moves nothing of that task.
Its stored rows may still be paid decay that they owe from earlier steps, if the batch read them; to compare tables
bitwise, `settle` first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from unbraid.types import State

Decay = Literal["catch_up", "touched"]


class LazyTable(Protocol):
    """What `RowAdam.watch` needs of a table."""

    weight: nn.Parameter
    before_read: Callable[[Tensor], None] | None


class _CatchUp:
    """The hook that a watched table calls before it reads rows."""

    def __init__(self, rows: RowAdam, name: str) -> None:
        self.rows, self.name = rows, name

    def __call__(self, ids: Tensor) -> None:
        self.rows.catch_up(self.name, ids)

    def __reduce__(self) -> tuple[type, tuple]:
        # A copied or pickled table holds None here: its weights are another parameter, not this optimiser's.
        return type(None), ()


class RowAdam(torch.optim.Optimizer):
    """Adam whose weights and state move only at the rows read by a batch; the module's docstring has the equations.

    Args:
        tables: name -> (V, D) weight.
        lr: step size; read from ``param_groups`` at each step, so that ``torch.optim.lr_scheduler`` drives it.
        betas: decay rates of the two moments.
        eps: added to sqrt(v).
        weight_decay: decoupled weight decay per step.
        decay: which rows a step decays, ``catch_up`` (in effect all) or ``touched`` (those it reads).

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self, tables: Mapping[str, nn.Parameter], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, decay: Decay = "catch_up",
    ) -> None:  # fmt: skip
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"Parameter `{name}` should be finite and not negative. Found {value}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Parameter `betas` should be in [0, 1). Found {betas}.")
        if decay not in ("catch_up", "touched"):
            raise ValueError(f"Parameter `decay` should be `catch_up` or `touched`. Found `{decay}`.")
        self.tables, self.decay = dict(tables), decay
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([{"params": list(self.tables.values())}], defaults)

    def watch(self, tables: Mapping[str, LazyTable]) -> None:
        """Bring rows of these tables up to date whenever they are read, if this optimiser's decay needs it.

        Replaces the hook that an earlier optimiser set.
        """
        lags = self.decay == "catch_up" and self.param_groups[0]["weight_decay"] > 0
        for name, table in tables.items():
            table.before_read = _CatchUp(self, name) if lags else None

    @torch.no_grad()
    def step(self, lookups: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:  # type: ignore[override]
        """Move the rows that a batch read.

        Args:
            lookups: table -> distinct ids (U,) and gradient (U, D).  A table that is absent, or whose gradient is None,
                is left as it is; a gradient of no rows (U = 0) counts as a step, as in SparseAdam.  That the ids are
                distinct is not checked.

        Raises:
            KeyError: no such table.
            ValueError: the gradient's shape is not (U, D), or lr * weight_decay is not below 1.
        """
        for name, (ids, grad) in lookups.items():
            if name not in self.tables:
                raise KeyError(f"No table `{name}`. Found {sorted(self.tables)}.")
            if grad is not None:
                self._step(name, ids, grad)

    def _step(self, name: str, ids: Tensor, grad: Tensor) -> None:
        weight, group = self.tables[name], self.param_groups[0]
        if grad.shape != (len(ids), weight.shape[1]):
            expected = (len(ids), weight.shape[1])
            raise ValueError(f"Gradient of table `{name}` should have shape {expected}. Found {tuple(grad.shape)}.")
        rows, state = weight.index_select(0, ids), self._state(weight)
        self._decay(rows, ids, state, group)
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"]
        mean, square = state["mean"].index_select(0, ids), state["square"].index_select(0, ids)
        mean.add_(grad.sub(mean).mul_(1 - beta1))
        square.add_(grad.square().sub_(square).mul_(1 - beta2))
        state["mean"].index_copy_(0, ids, mean)
        state["square"].index_copy_(0, ids, square)
        size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        rows.add_(mean.div_(square.sqrt_().add_(group["eps"])).mul_(-size))
        weight.index_copy_(0, ids, rows)

    def _state(self, weight: nn.Parameter) -> dict[str, Any]:
        """State of one table, made at its first gradient: a table that never trains costs nothing."""
        state = self.state[weight]
        if not state:
            state.update(step=0, clock=0.0, mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        return state

    def _decay(self, rows: Tensor, ids: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Decay the gathered ``rows`` (U, D) of a table in place, for this step and, to catch up, those they missed."""
        rate = group["lr"] * group["weight_decay"]
        if not rate < 1:
            raise ValueError(f"`lr` * `weight_decay` should be below 1. Found {group['lr']} * {group['weight_decay']}.")
        if self.decay == "touched":
            if rate:
                rows.mul_(1 - rate)
            return
        if "last" not in state:
            if not rate:
                return
            # float64: its error stays near 1e-16 over a whole run, while float32 would lose the small rates it sums
            state["last"] = torch.zeros(len(state["mean"]), dtype=torch.float64, device=rows.device)
        state["clock"] += math.log1p(-rate)
        rows.mul_(_owed(state, ids).to(rows.dtype))
        state["last"].index_fill_(0, ids, state["clock"])

    @torch.no_grad()
    def catch_up(self, name: str, ids: Tensor) -> None:
        """Apply the decay that the given distinct rows (U,) of a table missed."""
        weight = self.tables[name]
        if "last" in self.state.get(weight, ()):
            state = self.state[weight]
            weight.index_copy_(0, ids, weight.index_select(0, ids).mul_(_owed(state, ids).to(weight.dtype)))
            state["last"].index_fill_(0, ids, state["clock"])

    @torch.no_grad()
    def settle(self) -> None:
        """Apply the decay that any row of any table missed.  Doing it twice changes nothing."""
        for weight in self.tables.values():
            if "last" in self.state.get(weight, ()):
                state = self.state[weight]
                weight.mul_(_owed(state).to(weight.dtype))
                state["last"].fill_(state["clock"])

    def state_dict(self) -> State:
        """Table -> its moments ``mean`` and ``square`` (V, D), ``step``, ``clock`` and, to catch up, ``last`` (V,).

        The tensors are the live ones; a table that had no gradient yet is absent.
        """
        return {name: dict(self.state[weight]) for name, weight in self.tables.items() if weight in self.state}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`; the tensors are copied.  Step sizes and decay stay this optimiser's own.

        Raises:
            ValueError: the state holds a table that is not here, or one of another shape.
        """
        for name, value in state.items():
            if name not in self.tables:
                raise ValueError(f"The state holds table `{name}`, which is not one of {sorted(self.tables)}.")
            if value["mean"].shape != self.tables[name].shape:
                found, expected = tuple(value["mean"].shape), tuple(self.tables[name].shape)
                raise ValueError(f"State of table `{name}` should have shape {expected}. Found {found}.")
        self.state.clear()
        for name, value in state.items():
            device = self.tables[name].device
            self.state[self.tables[name]] = {
                key: part.to(device, copy=True) if isinstance(part, Tensor) else part for key, part in value.items()
            }


def _owed(state: Mapping[str, Any], ids: Tensor | None = None) -> Tensor:
    """(U, 1) float64 factors that bring rows (all without ``ids``) up to date."""
    last = state["last"] if ids is None else state["last"].index_select(0, ids)
    return torch.exp(state["clock"] - last).unsqueeze(1)
