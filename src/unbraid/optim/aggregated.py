"""One Adam step on a combination of the objectives' gradients: the frame of all gradient balancers.

Every step takes each objective's own gradient (`unbraid.optim.per_task`).  On parameters that several objectives share, the
rows of dense and lazy tables among them, an *aggregator* makes one gradient of the K; a parameter that is one objective's own
gets that objective's gradient.  The weight that a run gives a task multiplies its gradient before the aggregator sees it.

Most aggregators are functions of the Gramian G = J J^T (K, K) of the Jacobian J (K, n) of shared parameters: they give one
weight per objective, and the combination w^T J is made leaf by leaf.  So J is never copied, and memory is that of K gradients
of what the batch read.  Two need J itself, (K, n) once more.

An aggregator is a small dataclass with ``kind`` and a method ``bind(setting)``; what that returns is a `Rule`.  It sees the
objectives that the batch has, in alphabetical order, so that the order of tasks changes nothing.  With one objective nothing
is shared, and the update is `unbraid.optim.joint`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.optim.joint import Joint
from unbraid.optim.per_task import Gradients, PerTask
from unbraid.optim.weighted import Setting
from unbraid.slots import Course
from unbraid.types import Losses, Output, State


@dataclass(frozen=True)
class View:
    """What a rule sees of a step.

    Args:
        names: the K objectives of the batch, in alphabetical order.
        gramian: (K, K) float64 on the CPU, inner products of their gradients on shared parameters.
        losses: (K,) float64 on the CPU.
        jacobian: gives (K, n), the gradients themselves.
        seed: two numbers that are this step's own, for what is drawn.
    """

    names: tuple[str, ...]
    gramian: Tensor
    losses: Tensor
    jacobian: Callable[[], Tensor]
    seed: tuple[int, int]

    @property
    def norms(self) -> Tensor:
        """(K,) the gradients' norms."""
        return self.gramian.diagonal().clamp(min=0).sqrt()

    def cosines(self, of: Tensor) -> Tensor:
        """(K,) cosines of the gradients with a combination ``of`` (K,) of them; 0 where one of the two is 0."""
        size = self.norms * (of @ self.gramian @ of).clamp(min=0).sqrt()
        return torch.where(size > 0, self.gramian @ of / size, 0.0)


class Rule:
    """A bound aggregator.

    Attributes:
        weighs_own: do its weights multiply the gradients of parameters that are one objective's own, too?  So it is for a
            method that weighs losses.
    """

    weighs_own: ClassVar[bool] = False

    def weights(self, view: View) -> Tensor:
        """(K,) float64 weights.  An objective of weight 0 moves nothing that no other objective of the batch reaches."""
        raise NotImplementedError

    def vector(self, view: View) -> Tensor | None:
        """(n,) the combination itself, for a rule that is no weighted sum; None: `weights` says it."""
        return None

    def told(self) -> Mapping[str, float]:
        """objective -> its weight now, of a rule that keeps weights; else the update tells those of the last step."""
        return {}

    def state_dict(self) -> State:
        """What the rule keeps from step to step."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""


class AggregatedUpdate(PerTask):
    """The update of `unbraid.optim.per_task` with a `Rule` on shared parameters.

    Attributes:
        rule: the bound aggregator.
        last: objective -> its weight in the last batch that had it.
    """

    reads_dense_lookups = True

    def __init__(
        self, config: Joint, model: nn.Module, steps: int, weights: Mapping[str, float],
        objectives: Collection[str] | None = None, course: Course | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, model, steps, weights, objectives)
        self.last: dict[str, float] = {}
        self.losses: dict[str, Tensor] = {}
        self.seed = (course or Course()).seed
        known = None if objectives is None else tuple(objectives)
        self.rule: Rule = config.aggregator.bind(Setting(config, steps, course or Course(), self, known))  # type: ignore[attr-defined]

    def gradients(self, losses: Losses, output: Output) -> Gradients:
        """As `PerTask.gradients`; the losses' values are kept for the rule."""
        self.losses = {name: loss.detach() * self.weight(name) for name, loss in losses.items()}
        return super().gradients(losses, output)

    def combine(self, grads: Gradients) -> Mapping[str, Tensor]:
        """leaf -> gradient."""
        shared = self.shared(grads)
        if not grads.of or not shared:
            return super().combine(grads)
        names = tuple(sorted(grads.of))
        view = View(
            names, self._gramian(grads, names, shared), torch.stack([self.losses[name] for name in names]).double().cpu(),
            lambda: self._jacobian(grads, names, shared), (self.seed, self.step),
        )  # fmt: skip
        vector = self.rule.vector(view)
        if vector is not None:
            return {**self.own(grads), **self._split(grads, vector, shared)}
        weights = dict(zip(names, self._checked(self.rule.weights(view), names), strict=True))
        self.last |= weights
        given = {name: self.weight(name) * weight for name, weight in weights.items() if weight != 0}
        combined = {leaf: _combined(grads, leaf, given) for leaf in shared if set(grads.reaching(leaf)) & given.keys()}
        if not self.rule.weighs_own:
            return {**self.own(grads), **combined}
        own = {leaf: grads.reaching(leaf)[0] for leaf in self.own(grads)}
        return {**{leaf: grads.of[o][leaf] * given[o] for leaf, o in own.items() if o in given}, **combined}

    def _gramian(self, grads: Gradients, names: tuple[str, ...], shared: list[str]) -> Tensor:
        """(K, K) inner products of the weighted gradients over the shared leaves, summed leaf by leaf."""
        total: Tensor | None = None
        for leaf in shared:
            reaching = [name for name in names if leaf in grads.of[name]]
            rows = torch.stack([grads.of[name][leaf].flatten() * self.weight(name) for name in reaching])
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            at = torch.tensor([names.index(name) for name in reaching], device=rows.device)
            if total is None:
                total = rows.new_zeros(len(names), len(names), dtype=torch.float64)
            total[at.unsqueeze(1), at] += (rows @ rows.T).double()
        assert total is not None
        return total.cpu()

    def _jacobian(self, grads: Gradients, names: tuple[str, ...], shared: list[str]) -> Tensor:
        """(K, n) weighted gradients, rows in the order of the names."""
        place = list(grads.of)
        weights = torch.tensor([self.weight(name) for name in names], dtype=torch.float64)
        matrix = grads.matrix(shared)
        matrix = matrix[torch.tensor([place.index(name) for name in names], device=matrix.device)]
        return matrix * weights.to(matrix).unsqueeze(1)

    def _split(self, grads: Gradients, vector: Tensor, shared: list[str]) -> dict[str, Tensor]:
        if not torch.isfinite(vector).all():
            raise FloatingPointError(f"The combined gradient at step {self.step} is not finite.")
        return grads.split(vector, shared)

    def _checked(self, weights: Tensor, names: tuple[str, ...]) -> list[float]:
        if not torch.isfinite(weights).all():
            found = dict(zip(names, weights.tolist(), strict=True))
            raise FloatingPointError(f"Weights of the gradients at step {self.step} are not finite: {found}.")
        return weights.tolist()

    def told(self) -> Mapping[str, float]:
        """objective -> its weight: the rule's own, else that of the last batch that had it."""
        return self.rule.told() or dict(self.last)

    def state_dict(self) -> State:
        """As `PerTask.state_dict`, with the last weights and the rule's own state."""
        config: Any = self.config
        own = {"kind": config.aggregator.kind, "state": self.rule.state_dict(), "last": dict(self.last)}
        return {**super().state_dict(), "aggregator": own}

    def load_state_dict(self, state: State) -> None:
        """As `PerTask.load_state_dict`; the state of another aggregator is an error, too."""
        config: Any = self.config
        found = state.get("aggregator", {}).get("kind")
        if state.get("kind") == self.config.kind and found != config.aggregator.kind:
            raise ValueError(f"The state should be that of aggregator `{config.aggregator.kind}`. Found `{found}`.")
        super().load_state_dict(state)
        self.rule.load_state_dict(state["aggregator"]["state"])
        self.last = dict(state["aggregator"]["last"])


def _combined(grads: Gradients, leaf: str, weights: Mapping[str, float]) -> Tensor:
    """Sum of weight times gradient over the objectives with a weight that reach a leaf."""
    found = [grads.of[name][leaf] * weights[name] for name in grads.reaching(leaf) if name in weights]
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def levelled(gramian: Tensor) -> tuple[Tensor, float]:
    """The Gramian over its mean diagonal, and that mean (1 where it is 0).

    Solvers compare it with absolute tolerances, and gradients of rare tasks can have norms far below 1.
    """
    scale = float(gramian.diagonal().mean())
    return (gramian / scale, scale) if scale > 0 else (gramian, 1.0)


def generator(view: View) -> np.random.Generator:
    """Draws of one step: a function of the seed and the step's number, so that a run resumes bit-equal."""
    return np.random.default_rng(view.seed)
