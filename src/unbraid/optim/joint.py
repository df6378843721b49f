"""The plain update: one Adam step on the weighted sum of all losses.

    total = sum over objectives o of w_o L_o,    w_o = weights[o], else the weight of o's task for "task@domain", else 1

Dense parameters take ``torch.optim.Adam``'s step, or ``AdamW``'s with weight decay (Kingma and Ba, ICLR 2015,
https://arxiv.org/abs/1412.6980; Loshchilov and Hutter, ICLR 2019, https://arxiv.org/abs/1711.05101), fused where torch
can; rows of lazy tables take `unbraid.optim.rows.RowAdam`'s.  Every other update is compared with this one.

An objective that is absent from the losses, or whose weight is 0, is left out of the sum rather than multiplied by 0:
a gradient of zeros would still move its own parameters, by their momentum and weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from unbraid import parallel, sharding
from unbraid.optim.rows import Decay, LazyTable, RowAdam
from unbraid.slots import Course
from unbraid.types import FORBID, Lookup, Losses, Output, State

BIBTEX = """
@inproceedings{kingma2015adam,
  title     = {Adam: A Method for Stochastic Optimization},
  author    = {Kingma, Diederik P. and Ba, Jimmy},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2015},
  eprint    = {1412.6980},
  archiveprefix = {arXiv},
}
"""


@dataclass(frozen=True)
class Joint:
    """Config of the joint update.

    Args:
        lr: step size of the dense layers; betas, eps: Adam's, of everything.
        weight_decay: decoupled weight decay of the dense layers.
        table_lr: step size of the embedding tables, dense or lazy; None means ``lr``.
        table_weight_decay: decoupled weight decay of the tables.
        decay: which rows of a lazy table a step decays: all, as in a dense table (``catch_up``: applied when a row is
            next read), or only those it reads (``touched``).
        clip_norm: scale all gradients down to this global norm, that of the rows read included; 0 is off.
        learning_rate: how step sizes go from their value to ``final_factor`` times it over the run after the warm-up:
            ``constant`` (not at all), ``linear`` or ``cosine``.
        warmup_steps: step k < warmup_steps has (k + 1) / (warmup_steps + 1) of the step size.
        final_factor: share of the step size that is left at the end of the run.

    Raises:
        ValueError: a value is out of its range.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["joint"] = field(default="joint", kw_only=True)
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    table_lr: float | None = None
    table_weight_decay: float = 0.0
    decay: Decay = "catch_up"
    clip_norm: float = 0.0
    learning_rate: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        names = ("lr", "eps", "weight_decay", "table_lr", "table_weight_decay", "clip_norm", "warmup_steps")
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"Parameter `{name}` should be finite and not negative. Found {value}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Parameter `betas` should be in [0, 1). Found {self.betas}.")
        if not 0 <= self.final_factor <= 1:
            raise ValueError(f"Parameter `final_factor` should be in [0, 1]. Found {self.final_factor}.")

    def factor(self, step: int, steps: int) -> float:
        """Which share of the step size step number ``step`` (from 0) of a run of ``steps`` has."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = min((step - self.warmup_steps) / max(steps - self.warmup_steps, 1), 1.0)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.learning_rate]
        return self.final_factor + (1 - self.final_factor) * left

    def build(
        self, model: nn.Module, *, steps: int, weights: Mapping[str, float], objectives: Collection[str] | None = None,
        course: Course | None = None,
    ) -> JointUpdate:  # fmt: skip
        """The update of a model.

        Args:
            model: has ``tables``, a mapping from the names in its lookups to `unbraid.encoders.table.Table`.
                Parameters that do not require gradients now are not trained.
            steps: length of the run, for the learning rate.
            weights: objective or task -> weight of its loss.
            objectives: all that the losses may name; a weight of anything else is then an error.
            course: what else a kind of update may need to know; this one needs nothing.

        Raises:
            ValueError: a weight is negative or not finite, or matches no objective.
        """
        return JointUpdate(self, model, steps, weights, objectives)


class JointUpdate:
    """One Adam step on the weighted sum of the losses (an `unbraid.slots.Update`).

    A subclass that combines gradients in another way fills ``.grad`` of dense parameters and looked-up rows between
    `begin` and `apply`.

    Attributes:
        reads_dense_lookups: must `Output.lookups` hold the rows of dense tables, too?  This class reads those of lazy
            ones alone, and a dense table's lookup costs the forward pass something.
        dense: optimiser of the layers (group 0) and of the dense tables (group 1).
        rows: optimiser of the lazy tables; of those that are divided over processes, of this one's rows, by their places among
            them.
        divided: table -> this process's rows, of those that are divided.
        step: calls so far.
        grad_norm: global norm of the gradients before clipping, of the last step; None while ``clip_norm`` is 0.
    """

    reads_dense_lookups: ClassVar[bool] = False

    def __init__(
        self, config: Joint, model: nn.Module, steps: int, weights: Mapping[str, float],
        objectives: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        _check_weights(weights, objectives)
        self.config, self.weights, self.step, self.grad_norm = config, dict(weights), 0, cast(Tensor | None, None)
        tables = cast(Mapping[str, Any], model.tables)
        for table in tables.values():
            table.wanted = self.reads_dense_lookups
        trained = {name: table for name, table in tables.items() if table.weight.requires_grad}
        lazy = {name: table for name, table in trained.items() if table.lazy}
        self.known = {*tables, *(name for name, _ in model.named_parameters())}
        self.names, self.dense = _dense(config, model, trained, lazy)
        self.rows = _rows(config, lazy)
        self.divided = {name: table.weight for name, table in lazy.items() if isinstance(table.weight, sharding.Part)}
        self.schedules = [_schedule(config, optimizer, steps) for optimizer in (self.dense, self.rows)]

    def __call__(self, losses: Losses, output: Output) -> None:
        """Move the model by its losses.

        Without losses (no objective had an observed row) no parameter and no optimiser state moves, and yet the step
        counts for the learning rate, so that a run's length is its number of steps.

        Raises:
            FloatingPointError: a loss is not finite.  No parameter has moved.
        """
        self.begin(output)
        total = self.total(losses)
        if total is not None:
            total.backward()
            self.check(losses, total)
        self.apply(output)

    def begin(self, output: Output) -> None:
        """Forget all gradients."""
        self.dense.zero_grad(set_to_none=True)
        for lookup in output.lookups:
            if lookup.table in self.rows.tables:
                lookup.vectors.grad = None

    def weight(self, objective: str) -> float:
        """Weight of an objective: its own, else that of its task, else 1."""
        return self.weights.get(objective, self.weights.get(objective.partition("@")[0], 1.0))

    def total(self, losses: Losses) -> Tensor | None:
        """Weighted sum of the losses; None when no objective is left."""
        parts = [loss * self.weight(objective) for objective, loss in losses.items() if self.weight(objective) != 0]
        return torch.stack(parts).sum() if parts else None

    def check(self, losses: Losses, total: Tensor) -> None:
        """Raise FloatingPointError unless the total, and so every loss in it, is finite: one device wait for all.

        Called between the backward pass and the step, so that a GPU works while this waits.
        """
        if not torch.isfinite(total):
            found = {name: float(loss.detach()) for name, loss in losses.items() if self.weight(name) != 0}
            broken = [f"`{name}` is {value}" for name, value in found.items() if not math.isfinite(value)]
            what = ", ".join(broken) or f"all objectives together is {float(total.detach())}"
            raise FloatingPointError(
                f"Loss of {what} at step {self.step}. Lower `lr`, set `clip_norm` or look for extreme inputs or labels."
            )

    def apply(self, output: Output) -> None:
        """Clip the gradients that are there, step both optimisers and the learning rate."""
        rows = row_gradients(output.lookups, self.rows.tables)
        if parallel.world() > 1:
            named = self.named_dense()
            grads, rows = self.summed({name: p.grad for name, p in named.items()}, rows, output.lookups)
            for name, parameter in named.items():
                parameter.grad = grads.get(name)
        self.move(rows)

    def named_dense(self) -> dict[str, Tensor]:
        """Name -> trained dense parameter."""
        return dict(zip(self.names, (p for group in self.dense.param_groups for p in group["params"]), strict=True))

    def summed(
        self, dense: Mapping[str, Tensor | None], rows: Mapping[str, tuple[Tensor, Tensor]], lookups: Iterable[Lookup]
    ) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Sums over all processes of gradients of dense parameters by name, and of lazy tables' rows.

        Args:
            rows: table -> distinct ids (U,) and gradient (U, D); lookups: all that the forward pass read.

        Returns:
            Both, as `move` takes them.
        """
        tables = {name: weight for name, weight in self.rows.tables.items() if name not in self.divided}
        ids = self.read_anywhere(lookups, tables)
        named = self.named_dense()
        like = {
            **named,
            **{name: tables[name].new_empty(len(each), tables[name].shape[1]) for name, each in ids.items()},
        }
        own = {name: spread(*rows[name], ids[name]) for name in rows if name in ids}
        found = parallel.total({**dense, **own}, like)
        summed = {name: (ids[name], found[name]) for name in ids if name in found}
        if self.divided:
            read, grads = ({name: pair[i] for name, pair in rows.items() if name in self.divided} for i in (0, 1))
            places, sums = sharding.to_owners(self.divided, read, grads, {name: name for name in self.divided})
            summed |= {name: (places[name], grad) for name, grad in sums.items()}
        return {name: grad for name, grad in found.items() if name in named}, summed

    def read_anywhere(self, lookups: Iterable[Lookup], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Table -> ascending ids (G,) that any process read, of some tables (-> their weights).

        Decay that rows of lazy tables owe is paid on all processes: whoever read a row has paid it, and replicas stay equal bit
        for bit.  (Of divided tables, it was paid when the row was read.)
        """
        read: dict[str, list[Tensor]] = {name: [] for name in tables}
        for name, ids, _ in lookups:
            if name in read:
                read[name].append(ids)
        none = torch.zeros(0, dtype=torch.int64)
        found = parallel.union({
            name: torch.cat(parts) if parts else none.to(tables[name].device) for name, parts in read.items()
        })  # fmt: skip
        for name in found:
            if name in self.rows.tables and name not in self.divided:
                self.rows.catch_up(name, found[name])
        return found

    def move(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """`apply` with the gradients of lazy tables given: table -> distinct ids (U,) and gradient (U, D).

        Of a divided table they are places among this process's rows, and the gradients there.
        """
        if self.config.clip_norm > 0:
            grads = [p.grad for group in self.dense.param_groups for p in group["params"] if p.grad is not None]
            grads += [grad for name, (_, grad) in rows.items() if name not in self.divided]
            self.grad_norm = clip(
                grads, self.config.clip_norm, [g for name, (_, g) in rows.items() if name in self.divided]
            )
        self.dense.step()
        self.rows.step(rows)
        for schedule in self.schedules:
            schedule.step()
        self.step += 1

    def settle(self) -> None:
        """Bring lazily decayed rows up to date, before they are evaluated or saved."""
        self.rows.settle()

    def state_dict(self) -> State:
        """Calls so far (which give the step sizes), Adam's state by parameter name and `RowAdam.state_dict`.

        The tensors are the live ones.
        """
        packed = self.dense.state_dict()["state"]
        return {
            "kind": self.config.kind,
            "step": self.step,
            "dense": {self.names[index]: dict(value) for index, value in packed.items()},
            "rows": self.rows.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`; the tensors are copied.  Step sizes, decay and weights stay those of this config.

        State of parameters that this model has and does not train now is dropped.

        Raises:
            ValueError: the state is that of another kind of update, or of another model.
        """
        if state.get("kind") != self.config.kind:
            raise ValueError(f"The state should be that of update `{self.config.kind}`. Found `{state.get('kind')}`.")
        if unknown := sorted({*state["dense"], *state["rows"]} - self.known):
            raise ValueError(f"The state holds parameters that this model does not have: {unknown[:5]}.")
        kept = {i: state["dense"][name] for i, name in enumerate(self.names) if name in state["dense"]}
        params = [p for group in self.dense.param_groups for p in group["params"]]
        for index, value in kept.items():
            if value["exp_avg"].shape != params[index].shape:
                found, expected = tuple(value["exp_avg"].shape), tuple(params[index].shape)
                raise ValueError(f"State of `{self.names[index]}` should have shape {expected}. Found {found}.")
        self.rows.load_state_dict({name: value for name, value in state["rows"].items() if name in self.rows.tables})
        copies = {i: {key: part.clone() for key, part in value.items()} for i, value in kept.items()}
        self.dense.load_state_dict({"state": copies, "param_groups": self.dense.state_dict()["param_groups"]})
        self.seek(state["step"])

    def seek(self, step: int) -> None:
        """Set the number of steps done, which the step sizes go by."""
        self.step = step
        for schedule in self.schedules:
            _move(schedule, step)


def row_gradients(lookups: Iterable[Lookup], tables: Collection[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Table -> distinct ids (U,) and gradient (U, D) of its rows, for those of ``tables`` that have a gradient.

    A table that a forward pass read in several lookups gets the sum of their gradients.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, ids, vectors in lookups:
        if name in tables and vectors.grad is not None:
            found.setdefault(name, []).append((ids, vectors.grad))
    return {name: parts[0] if len(parts) == 1 else _merged(parts) for name, parts in found.items()}


def spread(ids: Tensor, grad: Tensor, every: Tensor) -> Tensor:
    """(G, D) gradient at the ascending ids ``every`` (G,), of one at some of them (U,); 0 elsewhere."""
    return grad.new_zeros(len(every), grad.shape[1]).index_copy_(0, torch.searchsorted(every, ids), grad)


def _merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ids, place = torch.unique(torch.cat([ids for ids, _ in parts]), return_inverse=True)
    grads = torch.cat([grad for _, grad in parts])
    return ids, grads.new_zeros(len(ids), grads.shape[1]).index_add_(0, place, grads)


def clip(grads: list[Tensor], norm: float, own: Sequence[Tensor] = ()) -> Tensor:
    """Scale gradients in place as ``torch.nn.utils.clip_grad_norm_`` does; returns their global norm before it.

    Args:
        own: those of which every process has its rows.
    """
    found = sharding.total_norm(grads, own)
    if grads or own:
        # 1e-6 and the clamp are torch's; no branch on the norm, so a GPU need not wait
        scale = (norm / (found + 1e-6)).clamp(max=1.0)
        for grad in (*grads, *own):
            grad.mul_(scale.to(grad.device))
    return found


def _check_weights(weights: Mapping[str, float], objectives: Collection[str] | None) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"Weight of `{name}` should be finite and not negative. Found {weight}.")
    if objectives is not None:
        known = set(objectives) | {objective.partition("@")[0] for objective in objectives}
        if unknown := sorted(set(weights) - known):
            raise ValueError(f"Weights of {unknown} match no objective. Permitted are {sorted(known)}.")


def _dense(
    config: Joint, model: nn.Module, trained: Mapping[str, Any], lazy: Mapping[str, Any],
) -> tuple[list[str], torch.optim.Optimizer]:  # fmt: skip
    """Names of the dense parameters in the optimiser's order, and the optimiser."""
    rows = {id(table.weight) for table in lazy.values()}
    tables = {id(table.weight) for table in trained.values()} - rows
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in rows]
    layers, dense = ([(n, p) for n, p in named if (id(p) in tables) == inside] for inside in (False, True))
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in layers], "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for _, p in dense], "lr": _table_lr(config), "weight_decay": config.table_weight_decay},
    ]
    # torch has the fused kernel on these devices; AdamW without decay is Adam
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for _, p in named)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    return [name for name, _ in (*layers, *dense)], optimizer


def _rows(config: Joint, lazy: Mapping[str, LazyTable]) -> RowAdam:
    weights = {name: table.weight for name, table in lazy.items()}
    rows = RowAdam(weights, _table_lr(config), config.betas, config.eps, config.table_weight_decay, config.decay)
    rows.watch(lazy)
    return rows


def _table_lr(config: Joint) -> float:
    return config.lr if config.table_lr is None else config.table_lr


def _schedule(config: Joint, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """One closed form in the step for all groups: a sum of torch's schedulers would need one final value per group
    (``CosineAnnealingLR.eta_min`` is absolute), drift by rounding, and carry its own state into every checkpoint."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.factor(step, steps))


def _move(schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Set a schedule, and the step sizes of its optimiser, to a step."""
    schedule.last_epoch = step
    for group, factor in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(step)
