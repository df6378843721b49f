"""Gradient vaccine: gradients that are less alike than usual are turned towards each other.

Paper: Zirui Wang, Yulia Tsvetkov, Orhan Firat, Yuan Cao: *Gradient Vaccine: Investigating and Improving Multi-task Optimization
in Massively Multilingual Models*.  ICLR 2021, https://arxiv.org/abs/2010.05874.

Idea.  PCGrad acts where two gradients conflict, that is below a cosine of 0.  Here the threshold is what their cosine usually is,
an average p_ij that follows it.  For each i, h = g_i; over the others j in random order, c = cos(h, g_j)::

    if c < p_ij:   h <- h + w g_j,     w = |h| (p_ij sqrt(1 - c^2) - c sqrt(1 - p_ij^2)) / (|g_j| sqrt(1 - p_ij^2))
    p_ij <- (1 - beta) p_ij + beta c               d = sum_i h_i

after which cos(h, g_j) is p_ij.  p starts at 0: the first step is PCGrad's.

How this differs.  p_ij moves whenever the pair is met, as in the code released with ForkMerge (Jiang et al., NeurIPS 2023), whose
beta 0.5 is the default; the paper's is 0.01, from memory.  p belongs to two objectives by name: those that a batch does not have
keep theirs.  All is computed from the Gramian; the order of a step is drawn from (seed, step).  One p per pair over all shared
parameters; the paper also has one per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unbraid.optim.aggregated import Rule, View, generator, levelled
from unbraid.optim.weighted import Setting
from unbraid.types import FORBID, State

BIBTEX = """
@inproceedings{wang2021gradvac,
  title     = {Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models},
  author    = {Wang, Zirui and Tsvetkov, Yulia and Firat, Orhan and Cao, Yuan},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2021},
  note      = {arXiv:2010.05874},
}
"""
LEAST = 1e-8  # sine of the usual angle: for gradients that are always parallel


@dataclass(frozen=True)
class GradVac:
    """Gradient vaccine.

    Args:
        beta: how fast the usual cosine of a pair follows the one that is met.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["gradvac"] = field(default="gradvac", kw_only=True)
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"Parameter `beta` should be in [0, 1]. Found {self.beta}.")

    def bind(self, setting: Setting) -> BoundGradVac:
        """The rule of one training."""
        return BoundGradVac(self)


@dataclass
class BoundGradVac(Rule):
    """See `GradVac`.

    Attributes:
        usual: objective i -> objective j -> p_ij.
    """

    config: GradVac
    usual: dict[str, dict[str, float]] = field(default_factory=dict)

    def weights(self, view: View) -> Tensor:
        """Sum over i of the coefficients of h_i."""
        gramian, _ = levelled(view.gramian)
        draw, count = generator(view), len(view.names)
        total = torch.zeros(count, dtype=torch.float64)
        for i in range(count):
            h = torch.zeros(count, dtype=torch.float64)
            h[i] = 1.0
            usual = self.usual.setdefault(view.names[i], {})
            for j in (j for j in draw.permutation(count).tolist() if j != i):
                p = usual.get(view.names[j], 0.0)
                norm, other = _root(h @ gramian @ h), _root(gramian[j, j])
                if norm * other == 0:
                    continue  # there is no angle to a gradient of 0
                c = max(-1.0, min(1.0, float(gramian[j] @ h) / (norm * other)))
                if c < p:
                    sine, target = _root(1 - c * c), max(_root(1 - p * p), LEAST)
                    h[j] += norm * (p * sine - c * target) / (other * target)
                usual[view.names[j]] = (1 - self.config.beta) * p + self.config.beta * c
            total += h
        return total

    def state_dict(self) -> State:
        """The usual cosines."""
        return {"usual": {i: dict(row) for i, row in self.usual.items()}}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""
        self.usual = {i: dict(row) for i, row in state["usual"].items()}


def _root(value: Tensor | float) -> float:
    return max(float(value), 0.0) ** 0.5
