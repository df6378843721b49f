"""Auto-lambda: loss weights that lower the target's validation loss after the next step.

Paper: Shikun Liu, Stephen James, Andrew J. Davison, Edward Johns: *Auto-Lambda: Disentangling Dynamic Task Relationships*.
TMLR 2022, https://arxiv.org/abs/2202.03091.

Idea.  Two levels: the model descends the weighted training loss, and the weights descend the target's validation loss that one
step of the model would lead to::

    theta'(w) = theta - a grad sum_k w_k L_k(theta),        w <- w - (step) grad_w  L_val(theta'(w))

    d L_val / d w_k = -<a v, grad L_k(theta)>
                    ~ -(L_k(theta + e a v) - L_k(theta - e a v)) / (2 e),   v = grad L_val(theta'),   e = radius / |a v|

Per step: one backward pass for the look-ahead, one forward and backward pass of a validation batch, two forward passes of the
training batch again, and then the step with the new weights.

How this differs.  The two levels and the finite difference are the paper's; the constants (start .1, Adam with 1e-4, radius .01)
are from memory and unverified.  The look-ahead is plain gradient descent with the layers' step size (`AutoLambda.ahead`), the
tables' for rows, whatever optimiser moves the model.  Weights are kept at or above `AutoLambda.floor`.  A training batch without
a task leaves its weight alone; a validation batch without a target leaves all.  Parameters are changed in place for the three
extra passes and put back bit for bit; dropout draws the same numbers in both passes of the difference.

The validation split is then used for training, so early stopping and model selection by it are optimistic; the test split is not
reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from unbraid import parallel, sharding
from unbraid.optim.joint import JointUpdate
from unbraid.optim.weighted import Learned, Setting
from unbraid.slots import Rehearsal
from unbraid.types import FORBID, Lookup, Losses, Output, State

BIBTEX = """
@article{liu2022autolambda,
  title   = {Auto-Lambda: Disentangling Dynamic Task Relationships},
  author  = {Liu, Shikun and James, Stephen and Davison, Andrew J. and Johns, Edward},
  journal = {Transactions on Machine Learning Research},
  year    = {2022},
  note    = {arXiv:2202.03091},
}
"""


@dataclass(frozen=True)
class AutoLambda:
    """Weights learned on the validation split.

    Args:
        targets: objectives or tasks whose validation loss counts; empty means the tasks of role ``target``.
        lr: step size of the weights (Adam).
        start: first value of every weight.
        floor: no weight falls below it.
        radius: how far the two ends of the finite difference are from theta.
        ahead: step size of the look-ahead; None means that of the layers and, for rows, of the tables.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["auto_lambda"] = field(default="auto_lambda", kw_only=True)
    targets: tuple[str, ...] = ()
    lr: float = 1e-4
    start: float = 0.1
    floor: float = 0.0
    radius: float = 0.01
    ahead: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "start", "radius", "ahead"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Parameter `{name}` should be positive. Found {value}.")
        if not 0 <= self.floor <= self.start:
            raise ValueError(f"Parameter `floor` should be in [0, start]. Found {self.floor}.")

    def bind(self, setting: Setting) -> BoundAutoLambda:
        """The weighting of one training.  Raises ValueError if no objective is a target."""
        setting.require_targets(self.targets)
        return BoundAutoLambda(self, setting, Learned(setting, self.lr, self.start, self.floor))


@dataclass
class BoundAutoLambda:
    """See `AutoLambda`."""

    config: AutoLambda
    setting: Setting
    numbers: Learned

    def prepare(self, losses: Losses, output: Output) -> None:
        """Find d L_val / d w_k of this step and move the weights.  The model is as before when it returns.

        Raises:
            ValueError: there is no validation split to learn on.
            FloatingPointError: a loss of the training or the validation batch is not finite.
        """
        update, rehearse = self.setting.update, self.setting.course.rehearse
        if rehearse is None:
            raise ValueError("Weighting `auto_lambda` needs validation batches, which only a session gives.")
        total = self.total(losses)
        update.check(losses, total)
        leaves = Leaves(update, self.config.ahead)
        try:
            leaves.shift(leaves.gradient(total, output, keep=True), -1.0)
            v = self._validation_gradient(rehearse, leaves)
            leaves.put_back()
            if v is not None:
                self.numbers.step(self._slopes(rehearse, leaves, v, losses))
        finally:
            leaves.put_back()

    def _validation_gradient(self, rehearse: Rehearsal, leaves: Leaves) -> list[Part] | None:
        """v, by the model as it is; None where the validation batch has no target."""
        update = self.setting.update
        found, output = rehearse.valid(update.step)
        names = [name for name in self.setting.targets(self.config.targets, found) if update.weight(name) != 0]
        if not names:
            return None
        value = torch.stack([found[name] * update.weight(name) for name in names]).sum()
        update.check({name: found[name] for name in names}, value)
        return leaves.gradient(value, output)

    def _slopes(self, rehearse: Rehearsal, leaves: Leaves, v: list[Part], losses: Losses) -> dict[str, Tensor]:
        """objective -> -(L(theta + e a v) - L(theta - e a v)) / (2 e)."""
        apart = [isinstance(part.weight, sharding.Part) for part in v]
        grads = [(part.grad * part.lr).double() for part in v]
        norm = sharding.total_norm(
            *([g for g, other in zip(grads, apart, strict=True) if other is own] for own in (False, True))
        )
        e = self.config.radius / float(norm) if norm > 0 else 0.0
        if e == 0:
            return {}
        ends = []
        for sign in (e, -e):
            leaves.shift(v, sign)
            again, _ = rehearse.again()
            leaves.put_back()
            ends.append({name: again[name].detach() * self.setting.update.weight(name) for name in losses})
        return {name: (ends[1][name] - ends[0][name]) / (2 * e) for name in losses}

    def total(self, losses: Losses) -> Tensor:
        """sum_k w_k L_k."""
        return (self.numbers.of(losses).detach() * torch.stack(list(losses.values()))).sum()

    def move(self, losses: Losses) -> None:
        """Nothing is left to move."""

    def told(self) -> Mapping[str, float]:
        """objective -> its weight."""
        return self.numbers.told()

    def state_dict(self) -> State:
        """See `unbraid.optim.weighted.Learned`."""
        return self.numbers.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""
        self.numbers.load_state_dict(state)


class Part(NamedTuple):
    """A trained weight, or rows of it (``ids``, distinct), its gradient and its step size."""

    weight: Tensor
    ids: Tensor | None
    grad: Tensor
    lr: float


class Leaves:
    """The trained parameters of an update, that can be shifted and put back.

    All goes through ``.data``: a graph that was made before the shift may be differentiated after the return.

    Args:
        ahead: step size of all; None: those of the update now.
    """

    def __init__(self, update: JointUpdate, ahead: float | None) -> None:
        self.update = update
        self.saved: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.dense = [
            (p, group["lr"] if ahead is None else ahead) for group in update.dense.param_groups for p in group["params"]
        ]
        self.lr = update.rows.param_groups[0]["lr"] if ahead is None else ahead

    def gradient(self, loss: Tensor, output: Output, keep: bool = False) -> list[Part]:
        """The gradient of a loss at the parameters that it reaches; ``keep`` its graph."""
        rows = [lookup for lookup in output.lookups if lookup.table in self.update.rows.tables]
        places: list[tuple[Tensor, Tensor | None, float]] = [(p, None, lr) for p, lr in self.dense]
        places += [(self.update.rows.tables[name], ids, self.lr) for name, ids, _ in rows]
        leaves = [*(p for p, _ in self.dense), *(lookup.vectors for lookup in rows)]
        grads = torch.autograd.grad(loss, leaves, retain_graph=keep, allow_unused=True)
        if parallel.world() > 1:
            return self._summed(grads, rows)
        return [Part(w, ids, g, lr) for (w, ids, lr), g in zip(places, grads, strict=True) if g is not None]

    def _summed(self, grads: Sequence[Tensor | None], rows: Sequence[Lookup]) -> list[Part]:
        """The sums of all processes' gradients."""
        named = self.update.named_dense()
        of_rows = {
            read.table: (read.ids, g) for read, g in zip(rows, grads[len(named) :], strict=True) if g is not None
        }
        dense, summed = self.update.summed(dict(zip(named, grads, strict=False)), of_rows, rows)
        steps = {name: lr for name, (_, lr) in zip(named, self.dense, strict=True)}
        found = [Part(named[name], None, grad, steps[name]) for name, grad in dense.items()]
        return found + [Part(self.update.rows.tables[n], ids, g, self.lr) for n, (ids, g) in summed.items()]

    def shift(self, parts: list[Part], size: float) -> None:
        """Add size * step size * gradient."""
        for weight, ids, grad, lr in parts:
            old = weight.data.clone() if ids is None else weight.data.index_select(0, ids)
            self.saved.append((weight, ids, old))
            if ids is None:
                weight.data.add_(grad, alpha=size * lr)
            else:
                weight.data.index_copy_(0, ids, old.add(grad, alpha=size * lr))

    def put_back(self) -> None:
        """Undo all shifts, bit for bit."""
        while self.saved:
            weight, ids, old = self.saved.pop()
            if ids is None:
                weight.data.copy_(old)
            else:
                weight.data.index_copy_(0, ids, old)
