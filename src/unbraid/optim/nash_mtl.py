"""Nash-MTL: the gradients bargain about the step.

Paper: Aviv Navon, Aviv Shamsian, Idan Achituve, Haggai Maron, Kenji Kawaguchi, Gal Chechik, Ethan Fetaya: *Multi-Task Learning
as a Bargaining Game*.  ICML 2022, https://arxiv.org/abs/2202.01017.

Idea.  A task gains <g_k, d> from a step d; the bargaining solution maximises the product of all gains.  With G = J J^T::

    d = sum_k a_k g_k,     a > 0,     G a = 1 / a  (elementwise)

so each task's share a_k <g_k, d> of the step is the same, whatever the sizes of the gradients.  Orthogonal gradients get
a_k = 1 / |g_k|.

How this differs.  The released code approximates a by a sequence of convex programs and carries it over from step to step.
G a = 1 / a is where f(a) = a^T G a / 2 - sum log a is least, which is strictly convex and self-concordant: Newton's damped steps
solve it to machine precision, without a state and without a solver's package.  As in that code the step's norm is cut to
`NashMTL.max_norm` and weights can be kept for several steps.  Where gradients cancel exactly (a Pareto-stationary point) there
is no solution; a ridge of 1e-12 makes one, in whose direction they cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unbraid.optim.aggregated import Rule, View
from unbraid.optim.weighted import Setting
from unbraid.types import FORBID, State

BIBTEX = """
@inproceedings{navon2022nash,
  title     = {Multi-Task Learning as a Bargaining Game},
  author    = {Navon, Aviv and Shamsian, Aviv and Achituve, Idan and Maron, Haggai and Kawaguchi, Kenji and Chechik, Gal and
               Fetaya, Ethan},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2022},
  note      = {arXiv:2202.01017},
}
"""


@dataclass(frozen=True)
class NashMTL:
    """The Nash bargaining solution.

    Args:
        max_norm: the combined gradient's norm is cut to this; 0: it is not.
        every: steps between two solutions; between them weights stay, unless a batch has other objectives.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["nash_mtl"] = field(default="nash_mtl", kw_only=True)
    max_norm: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.max_norm < math.inf:
            raise ValueError(f"Parameter `max_norm` should be finite and not negative. Found {self.max_norm}.")
        if self.every < 1:
            raise ValueError(f"Parameter `every` should be at least 1. Found {self.every}.")

    def bind(self, setting: Setting) -> BoundNashMTL:
        """The rule of one training."""
        return BoundNashMTL(self)


@dataclass
class BoundNashMTL(Rule):
    """See `NashMTL`.

    Attributes:
        kept: objective -> weight of the last solution; age: steps since it was found.
    """

    config: NashMTL
    kept: dict[str, float] = field(default_factory=dict)
    age: int = 0

    def weights(self, view: View) -> Tensor:
        """a, cut to the norm."""
        if self.age % self.config.every == 0 or set(view.names) != self.kept.keys():
            self.kept, self.age = dict(zip(view.names, bargain(view.gramian).tolist(), strict=True)), 0
        self.age += 1
        a = torch.tensor([self.kept[name] for name in view.names], dtype=torch.float64)
        norm = float((a @ view.gramian @ a).clamp(min=0).sqrt())
        return a * (self.config.max_norm / norm) if norm > self.config.max_norm > 0 else a

    def state_dict(self) -> State:
        """The last solution."""
        return {"kept": dict(self.kept), "age": self.age}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""
        self.kept, self.age = dict(state["kept"]), state["age"]


def bargain(gramian: Tensor, ridge: float = 1e-12, steps: int = 200) -> Tensor:
    """(K,) a > 0 with G a = 1 / a; an objective without a gradient gets 0.

    Raises:
        FloatingPointError: no solution was found.
    """
    live = gramian.diagonal() > 0
    weights = torch.zeros(len(gramian), dtype=torch.float64)
    if not live.any():
        return weights
    norms = gramian.diagonal()[live].sqrt()
    cosines = gramian[live][:, live] / norms.outer(norms) + ridge * torch.eye(int(live.sum()), dtype=torch.float64)
    b, last = torch.ones_like(norms), math.inf  # a_k |g_k|: C b = 1 / b with the cosines C
    for _ in range(steps):
        slope = cosines @ b - 1 / b
        change = torch.linalg.solve(cosines + torch.diag(1 / b.square()), slope)
        decrement = float((slope @ change).clamp(min=0).sqrt())
        if last < 0.01 and decrement >= last:  # it fell quadratically until only rounding was left
            weights[live] = b / norms
            return weights
        # damped far from the solution (no step can then leave b > 0), full steps near it
        b, last = b - change / (1 + decrement) if decrement > 0.25 else b - change, decrement
    raise FloatingPointError("The bargaining solution was not found. Are gradients finite?")
