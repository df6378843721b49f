"""One Adam step on a weighted sum of the losses whose weights follow the losses: the frame of all loss weightings.

A *weighting* is a small dataclass with ``kind`` and a method ``bind(setting)``; what that returns is a `Weighting`: it makes
the sum, and moves its own weights once a step.  The weight that a run gives a task multiplies the task's loss before any
weighting sees it.  An objective that a batch does not have leaves its own weight and statistics as they are.

While no more than one objective was ever seen there is nothing to balance, and the update is `unbraid.optim.joint`'s.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unbraid.optim.joint import Joint, JointUpdate
from unbraid.slots import Course
from unbraid.types import Losses, Output, State


@dataclass(frozen=True)
class Setting:
    """What a weighting may know.

    Args:
        config: step size, betas and the learning-rate schedule of the model's own parameters.
        steps: length of the run.
        course: the training around it.
        update: the update that it works for.
        objectives: all that the losses may name; None: unknown.
    """

    config: Joint
    steps: int
    course: Course
    update: JointUpdate
    objectives: tuple[str, ...] | None = None

    @property
    def factor(self) -> float:
        """Which share of a step size the current step has."""
        return self.config.factor(self.update.step, self.steps)

    def epoch(self, asked: int) -> int:
        """Steps of an epoch: those asked for, else the training's.  Raises ValueError if nobody says."""
        if not (asked or self.course.per_epoch):
            raise ValueError("Nobody says how long an epoch is. Set `epoch_steps` of the weighting.")
        return asked or self.course.per_epoch

    def require_targets(self, asked: Collection[str]) -> None:
        """Raise ValueError unless the targets asked for exist, or some task has the role ``target``."""
        known = {*(self.objectives or ()), *(o.partition("@")[0] for o in self.objectives or ())}
        if self.objectives is not None and (unknown := sorted(set(asked) - known)):
            raise ValueError(
                f"Parameter `targets` should name objectives or tasks among {sorted(known)}. Found {unknown}."
            )
        if not asked and not self.course.targets:
            raise ValueError("No task has the role `target`. Set `targets`, or the role of a task.")

    def mark(self, asked: Collection[str], names: Sequence[str]) -> Tensor:
        """(K,) float64, 1 for the targets among some objectives and 0 for the others."""
        chosen = self.targets(asked, names)
        return torch.tensor([float(name in chosen) for name in names], dtype=torch.float64)

    def targets(self, asked: Collection[str], losses: Collection[str]) -> list[str]:
        """The target objectives among some: those asked for by name, else those whose task has the role ``target``.

        Raises:
            ValueError: an objective is a domain, which has no role, and nobody asked for targets by name.
        """
        wanted, tasks = set(asked or self.course.targets), self.course.tasks
        if not asked and tasks and (others := [o for o in losses if o.partition("@")[0] not in tasks]):
            raise ValueError(
                f"Objectives {others} are no tasks and have no role. Set `targets` to name those that count."
            )
        return [o for o in losses if o in wanted or o.partition("@")[0] in wanted]


class Weighting(Protocol):
    """A bound weighting."""

    def prepare(self, losses: Losses, output: Output) -> None:
        """Look at a step's losses before their sum is made; nothing may move yet."""

    def total(self, losses: Losses) -> Tensor:
        """The scalar to differentiate."""

    def move(self, losses: Losses) -> None:
        """Move weights and statistics of the objectives in ``losses``, which are finite and differentiated; once a step, also
        without losses."""

    def told(self) -> Mapping[str, float]:
        """objective -> the weight of its loss now."""

    def state_dict(self) -> State:
        """All that a resumed training needs of the weights."""

    def load_state_dict(self, state: State) -> None:
        """Go on from what `state_dict` gave."""


class WeightedUpdate(JointUpdate):
    """The joint update with a `Weighting` in the place of fixed weights.

    Attributes:
        weighting: the bound weighting.
        seen: the objectives that some batch had, in the order of appearance.
    """

    def __init__(
        self, config: Joint, model: nn.Module, steps: int, weights: Mapping[str, float],
        objectives: Collection[str] | None = None, course: Course | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, model, steps, weights, objectives)
        self.seen: list[str] = []
        known = None if objectives is None else tuple(objectives)
        setting = Setting(config, steps, course or Course(), self, known)
        self.weighting: Weighting = config.weighting.bind(setting)  # type: ignore[attr-defined]

    def __call__(self, losses: Losses, output: Output) -> None:
        """As `JointUpdate.__call__`.

        Raises:
            FloatingPointError: a loss is not finite.  Neither a parameter nor a weight has moved.
        """
        self.begin(output)
        kept = {name: loss * self.weight(name) for name, loss in losses.items() if self.weight(name) != 0}
        alone = len({*self.seen, *kept}) == 1
        if kept:
            if not alone:
                self.weighting.prepare(kept, output)
            total = torch.stack(list(kept.values())).sum() if alone else self.weighting.total(kept)
            total.backward()
            self.check(losses, total)
            self.seen += [name for name in kept if name not in self.seen]
        self.weighting.move(kept)
        self.apply(output)

    def told(self) -> Mapping[str, float]:
        """objective -> the weight of its loss now."""
        return {name: 1.0 for name in self.seen} if len(self.seen) < 2 else self.weighting.told()

    def state_dict(self) -> State:
        """As `JointUpdate.state_dict`, with the objectives seen and the weighting's own state."""
        config: Any = self.config
        own = {"kind": config.weighting.kind, "state": self.weighting.state_dict()}
        return super().state_dict() | {"seen": list(self.seen), "weighting": own}

    def load_state_dict(self, state: State) -> None:
        """As `JointUpdate.load_state_dict`; the state of another weighting is an error, too."""
        config: Any = self.config
        found = state.get("weighting", {}).get("kind")
        if state.get("kind") == self.config.kind and found != config.weighting.kind:
            raise ValueError(f"The state should be that of weighting `{config.weighting.kind}`. Found `{found}`.")
        super().load_state_dict(state)
        self.seen = list(state["seen"])
        self.weighting.load_state_dict(state["weighting"]["state"])


@dataclass
class Learned:
    """One learned number per objective, each with Adam's own state, made when its objective is first seen.

    Args:
        setting: gives betas and eps, and how the step size goes over the run.
        lr: step size; None: the layers'.
        start: the first value; low, high: bounds that every step is cut to.
    """

    setting: Setting
    lr: float | None
    start: float
    low: float = -math.inf
    high: float = math.inf
    numbers: dict[str, nn.Parameter] = field(default_factory=dict)
    adam: dict[str, torch.optim.Adam] = field(default_factory=dict)

    def of(self, losses: Losses) -> Tensor:
        """(K,) the numbers of the given objectives, differentiable."""
        for name, loss in losses.items():
            if name not in self.numbers:
                self._make(name, torch.full((), self.start, dtype=loss.dtype, device=loss.device))
        return torch.stack([self.numbers[name] for name in losses])

    def step(self, grads: Mapping[str, Tensor] | None = None) -> None:
        """An Adam step of the numbers that have a gradient: those given here, else what a backward pass left in them."""
        lr = self.setting.config.lr if self.lr is None else self.lr
        for name, number in self.numbers.items():
            if grads is not None:
                number.grad = grads[name].to(number) if name in grads else None
            if number.grad is not None:
                (group,) = self.adam[name].param_groups
                group["lr"] = lr * self.setting.factor
                self.adam[name].step()
                number.grad = None
                with torch.no_grad():
                    number.clamp_(self.low, self.high)

    def told(self) -> dict[str, float]:
        """objective -> its number."""
        return {name: float(number.detach()) for name, number in self.numbers.items()}

    def state_dict(self) -> State:
        """objective -> its number and Adam's state of it.  The tensors are the live ones."""
        return {
            name: {"number": number.detach(), "adam": dict(self.adam[name].state.get(number, {}))}
            for name, number in self.numbers.items()
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`; the tensors are copied."""
        self.numbers.clear()
        self.adam.clear()
        for name, value in state.items():
            self._make(name, value["number"].clone())
            if value["adam"]:
                packed = self.adam[name].state_dict()
                copies = {key: part.clone() for key, part in value["adam"].items()}
                self.adam[name].load_state_dict({"state": {0: copies}, "param_groups": packed["param_groups"]})

    def _make(self, name: str, value: Tensor) -> None:
        config = self.setting.config
        self.numbers[name] = nn.Parameter(value)
        self.adam[name] = torch.optim.Adam([self.numbers[name]], config.lr, config.betas, config.eps)
