"""Optimisers that move only the table rows that a batch read: Adam, RMSprop and AdaGrad.

At step t of a table, for the distinct rows r that the batch read, with gradient g (per table, t counts its own steps):

    w[r] <- d[r] w[r] + change
    Adam      m[r] <- m[r] + (1 - b1) (g - m[r])        v[r] <- v[r] + (1 - b2) (g^2 - v[r])
              change = -lr sqrt(1 - b2^t) / (1 - b1^t) * m[r] / (sqrt(v[r]) + eps)
    RMSprop   v[r] <- v[r] + (1 - alpha) (g^2 - v[r])   change = -lr g / (sqrt(v[r]) + eps)
    AdaGrad   v[r] <- v[r] + g^2                        change = -lr g / (sqrt(v[r]) + eps)

Without weight decay (d = 1) the first is ``torch.optim.SparseAdam``, operation for operation, eps included: it is added
before the bias correction, whereas ``torch.optim.Adam`` adds it after.  It is faster, because it gathers and writes
rows instead of adding sparse tensors.  The others are ``torch.optim.RMSprop`` and ``torch.optim.Adagrad`` at those rows: a row
that is not read forgets nothing.

Weight decay is decoupled (Loshchilov and Hutter, *Decoupled weight decay regularization*, ICLR 2019,
https://arxiv.org/abs/1711.05101): dense AdamW multiplies all rows by 1 - lr * wd at every step.  ``touched`` multiplies
the rows read by the step, once.  ``catch_up`` multiplies by what a row has missed, too: a table keeps the clock
c = sum over its steps of log(1 - lr_s wd), each row the clock at its last touch, and d[r] = exp(c - c_last[r]).  A row
is brought up to date when it is next read (`RowOptimizer.watch`), so that the forward pass sees what dense decay would show
it, and `RowOptimizer.settle` brings all rows up to date, before evaluation or saving.

What is a step of a table: one in which it has a gradient.  A table without one keeps its clock, its step count, its
moments and its settled weights bit for bit, so that a batch without observed rows of a task moves nothing of that task.
Its stored rows may still be paid decay that they owe from earlier steps, if the batch read them; to compare tables
bitwise, `settle` first.

Several changes of one table in one step (`RowOptimizer.move`: one per task) add up and share one decay.  Moments are kept in
float32 for weights of half precision.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from unbraid.types import State

Decay = Literal["catch_up", "touched"]


class LazyTable(Protocol):
    """What `RowOptimizer.watch` needs of a table."""

    weight: nn.Parameter
    before_read: Callable[[Tensor], None] | None


class _CatchUp:
    """The hook that a watched table calls before it reads rows."""

    def __init__(self, rows: RowOptimizer, name: str) -> None:
        self.rows, self.name = rows, name

    def __call__(self, ids: Tensor) -> None:
        self.rows.catch_up(self.name, ids)

    def __reduce__(self) -> tuple[type, tuple]:
        # A copied or pickled table holds None here: its weights are another parameter, not this optimiser's.
        return type(None), ()


class RowOptimizer(torch.optim.Optimizer, ABC):
    """An optimiser whose weights and state move only at the rows read by a batch; the module's docstring has the equations.

    A subclass defines `change`.

    Args:
        tables: name -> (V, D) weight.
        decay: which rows a step decays, ``catch_up`` (in effect all) or ``touched`` (those it reads).
        lr: step size; read from ``param_groups`` at each step, so that ``torch.optim.lr_scheduler`` drives it.
        weight_decay: decoupled weight decay per step.
        more: further numbers of the subclass, kept in ``param_groups``.

    Raises:
        ValueError: a value is out of its range.
    """

    moments: tuple[str, ...] = ()  # names of the (V, D) tensors that a table's state holds

    def __init__(
        self, tables: Mapping[str, nn.Parameter], decay: Decay = "catch_up", *, lr: float = 1e-3,
        weight_decay: float = 0.0, **more: Any,
    ) -> None:  # fmt: skip
        for name, value in {"lr": lr, "weight_decay": weight_decay, **more}.items():
            if name in ("lr", "eps", "weight_decay") and not 0 <= value < math.inf:
                raise ValueError(f"Parameter `{name}` should be finite and not negative. Found {value}.")
        if decay not in ("catch_up", "touched"):
            raise ValueError(f"Parameter `decay` should be `catch_up` or `touched`. Found `{decay}`.")
        self.tables, self.decay = dict(tables), decay
        defaults = {"lr": lr, "weight_decay": weight_decay, **more}
        super().__init__([{"params": list(self.tables.values())}], defaults)

    @abstractmethod
    def change(self, name: str, ids: Tensor, grad: Tensor, lr: float) -> Tensor:
        """Move a table's moments at the given rows and return (U, D) what to add to the rows.

        Args:
            name: the table; ids: distinct (U,); grad: (U, D); lr: step size of this change.
        """

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
        lr = self.param_groups[0]["lr"]
        for name, (ids, grad) in lookups.items():
            if name not in self.tables:
                raise KeyError(f"No table `{name}`. Found {sorted(self.tables)}.")
            if grad is not None:
                expected = (len(ids), self.tables[name].shape[1])
                if grad.shape != expected:
                    found = tuple(grad.shape)
                    raise ValueError(f"Gradient of table `{name}` should have shape {expected}. Found {found}.")
                self.move(name, ids, (self.change(name, ids, one, lr) for one in (grad,)))

    @torch.no_grad()
    def move(self, name: str, ids: Tensor, changes: Iterable[Tensor]) -> None:
        """One step of a table: decay once, then add (U, D) changes to the distinct rows (U,)."""
        weight = self.tables[name]
        rows = weight.index_select(0, ids).to(precise(weight.dtype))
        self._decay(weight, rows, ids)
        for change in changes:
            rows.add_(change)
        weight.index_copy_(0, ids, rows.to(weight.dtype))

    def start(self, name: str, step: int = 0) -> dict[str, Any]:
        """A table's state, made at its first gradient: a table that never trains costs nothing.

        Args:
            step: steps that a state made now counts as done.
        """
        weight = self.tables[name]
        state = self.state[weight]
        if "step" not in state:
            state["step"] = step
            for moment in self.moments:
                state[moment] = torch.zeros_like(weight, dtype=precise(weight.dtype))
        return state

    def _moved(self, name: str, grad: Tensor) -> tuple[dict[str, Any], Tensor]:
        """The table's state, one step on, and the gradient in its precision."""
        state = self.start(name)
        state["step"] += 1
        return state, grad.to(precise(grad.dtype))

    def _decay(self, weight: nn.Parameter, rows: Tensor, ids: Tensor) -> None:
        """Decay the gathered ``rows`` (U, D) of a table in place, for this step and, to catch up, those they missed."""
        group = self.param_groups[0]
        rate = group["lr"] * group["weight_decay"]
        if not rate < 1:
            raise ValueError(f"`lr` * `weight_decay` should be below 1. Found {group['lr']} * {group['weight_decay']}.")
        if self.decay == "touched":
            if rate:
                rows.mul_(1 - rate)
            return
        if "last" not in self.state.get(weight, ()):
            if not rate:
                return
            # float64: its error stays near 1e-16 over a whole run, while float32 would lose the small rates it sums
            last = torch.zeros(len(weight), dtype=torch.float64, device=rows.device)
            self.state[weight].update(clock=0.0, last=last)
        state = self.state[weight]
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
        """Table -> ``step``, its moments (V, D) and, where decay catches up, ``clock`` and ``last`` (V,).

        The tensors are the live ones; a table that had no gradient yet is absent.
        """
        return {name: dict(self.state[weight]) for name, weight in self.tables.items() if self.state.get(weight)}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`; the tensors are copied.  Step sizes and decay stay this optimiser's own.

        Raises:
            ValueError: the state holds a table that is not here, or one of another shape.
        """
        for name, value in state.items():
            if name not in self.tables:
                raise ValueError(f"The state holds table `{name}`, which is not one of {sorted(self.tables)}.")
            if missing := sorted({*self.moments} - {*value}) if "step" in value else []:
                raise ValueError(f"State of table `{name}` should hold {missing}. Found {sorted(value)}.")
            for moment in {*self.moments} & {*value}:
                if value[moment].shape != self.tables[name].shape:
                    found, expected = tuple(value[moment].shape), tuple(self.tables[name].shape)
                    raise ValueError(f"State of table `{name}` should have shape {expected}. Found {found}.")
        self.state.clear()
        for name, value in state.items():
            device = self.tables[name].device
            self.state[self.tables[name]] = {
                key: part.to(device, copy=True) if isinstance(part, Tensor) else part for key, part in value.items()
            }


class RowAdam(RowOptimizer):
    """Adam of table rows.

    Args:
        tables, lr, weight_decay, decay: as in `RowOptimizer`.
        betas: decay rates of the two moments.
        eps: added to sqrt(v).
    """

    moments = ("mean", "square")

    def __init__(
        self, tables: Mapping[str, nn.Parameter], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, decay: Decay = "catch_up",
    ) -> None:  # fmt: skip
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Parameter `betas` should be in [0, 1). Found {betas}.")
        super().__init__(tables, decay, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)

    @torch.no_grad()
    def change(self, name: str, ids: Tensor, grad: Tensor, lr: float) -> Tensor:
        """See `RowOptimizer.change`."""
        state, grad = self._moved(name, grad)
        (beta1, beta2), step = self.param_groups[0]["betas"], state["step"]
        mean, square = state["mean"].index_select(0, ids), state["square"].index_select(0, ids)
        mean.add_(grad.sub(mean).mul_(1 - beta1))
        square.add_(grad.square().sub_(square).mul_(1 - beta2))
        state["mean"].index_copy_(0, ids, mean)
        state["square"].index_copy_(0, ids, square)
        size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return mean.div_(square.sqrt_().add_(self.param_groups[0]["eps"])).mul_(-size)


class RowRMSprop(RowOptimizer):
    """RMSprop of table rows.

    Args:
        tables, lr, weight_decay, decay: as in `RowOptimizer`.
        alpha: decay rate of the squares' average.
        eps: added to its root.
    """

    moments = ("square",)

    def __init__(
        self, tables: Mapping[str, nn.Parameter], lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8,
        weight_decay: float = 0.0, decay: Decay = "catch_up",
    ) -> None:  # fmt: skip
        if not 0 <= alpha < 1:
            raise ValueError(f"Parameter `alpha` should be in [0, 1). Found {alpha}.")
        super().__init__(tables, decay, lr=lr, weight_decay=weight_decay, alpha=alpha, eps=eps)

    @torch.no_grad()
    def change(self, name: str, ids: Tensor, grad: Tensor, lr: float) -> Tensor:
        """See `RowOptimizer.change`."""
        state, grad = self._moved(name, grad)
        square = state["square"].index_select(0, ids)
        square.add_(self._towards(grad, square))
        state["square"].index_copy_(0, ids, square)
        return grad.div(square.sqrt_().add_(self.param_groups[0]["eps"])).mul_(-lr)

    def _towards(self, grad: Tensor, square: Tensor) -> Tensor:
        """What is added to the squares."""
        return grad.square().sub_(square).mul_(1 - self.param_groups[0]["alpha"])


class RowAdagrad(RowRMSprop):
    """AdaGrad of table rows: `RowRMSprop` with a sum of squares instead of their average.

    Args:
        tables, lr, weight_decay, decay: as in `RowOptimizer`.
        eps: added to the root of the sum.
    """

    def __init__(
        self, tables: Mapping[str, nn.Parameter], lr: float = 1e-2, eps: float = 1e-10, weight_decay: float = 0.0,
        decay: Decay = "catch_up",
    ) -> None:  # fmt: skip
        super().__init__(tables, lr, 0.0, eps, weight_decay, decay)

    def _towards(self, grad: Tensor, square: Tensor) -> Tensor:
        return grad.square()


def precise(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what moments and sums of weights are kept in."""
    return torch.promote_types(dtype, torch.float32)


def _owed(state: Mapping[str, Any], ids: Tensor | None = None) -> Tensor:
    """(U, 1) float64 factors that bring rows (all without ``ids``) up to date."""
    last = state["last"] if ids is None else state["last"].index_select(0, ids)
    return torch.exp(state["clock"] - last).unsqueeze(1)
