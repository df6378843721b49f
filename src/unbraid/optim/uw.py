"""Uncertainty weighting: every loss is divided by a learned variance.

Paper: Alex Kendall, Yarin Gal, Roberto Cipolla: *Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
Semantics*.  CVPR 2018, https://arxiv.org/abs/1705.07115.

Idea.  Take each task's loss for the negative log-likelihood of a noise whose size is not known, and learn the size with the
model.  With s_k = log sigma_k^2::

    loss = sum_k  L_k / (2 exp(s_k)) + s_k / 2

For a fixed model the best s_k is log L_k, so that every task weighs 1 / (2 L_k): a loss is measured in its own size.

How this differs.  As in the code that was released with ForkMerge (Jiang et al., NeurIPS 2023), s_k starts at -0.5 and has the
model's optimiser; the factor 1/2 stands before classification losses, too.  Ours: the bound on \\|s_k\\|, without which a loss
near 0 grows its weight without end, an own step size if wanted, no weight decay, and an s_k of its own Adam state, so that a
batch without a task leaves it alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unbraid.optim.weighted import Learned, Setting
from unbraid.types import FORBID, Losses, Output, State

BIBTEX = """
@inproceedings{kendall2018multi,
  title     = {Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics},
  author    = {Kendall, Alex and Gal, Yarin and Cipolla, Roberto},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2018},
  note      = {arXiv:1705.07115},
}
"""


@dataclass(frozen=True)
class UW:
    """Uncertainty weighting.

    Args:
        start: first value of every s_k.
        lr: step size of s_k; None means that of the layers.
        limit: s_k is kept in [-limit, limit].
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["uw"] = field(default="uw", kw_only=True)
    start: float = -0.5
    lr: float | None = None
    limit: float = 10.0

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise ValueError(f"Parameter `lr` should be finite and not negative. Found {self.lr}.")
        if not abs(self.start) <= self.limit < math.inf:
            raise ValueError(f"Parameter `start` should be within `limit`. Found {self.start}, {self.limit}.")

    def bind(self, setting: Setting) -> BoundUW:
        """The weighting of one training."""
        return BoundUW(Learned(setting, self.lr, self.start, -self.limit, self.limit))


@dataclass
class BoundUW:
    """See `UW`."""

    logs: Learned  # of the variances

    def prepare(self, losses: Losses, output: Output) -> None:
        """Nothing to look at."""

    def total(self, losses: Losses) -> Tensor:
        """sum_k L_k / (2 exp(s_k)) + s_k / 2."""
        logs = self.logs.of(losses)
        return (torch.stack(list(losses.values())) * (-logs).exp() / 2 + logs / 2).sum()

    def move(self, losses: Losses) -> None:
        """One step of the s_k that the sum has given a gradient."""
        self.logs.step()

    def told(self) -> Mapping[str, float]:
        """objective -> 1 / (2 exp(s_k))."""
        return {name: math.exp(-value) / 2 for name, value in self.logs.told().items()}

    def state_dict(self) -> State:
        """See `unbraid.optim.weighted.Learned`."""
        return self.logs.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""
        self.logs.load_state_dict(state)
