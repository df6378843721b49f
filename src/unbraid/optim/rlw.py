"""Random loss weighting: weights drawn anew at every step.

Paper: Baijiong Lin, Feiyang Ye, Yu Zhang, Ivor W. Tsang: *Reasonable Effectiveness of Random Weighting: A Litmus Test for
Multi-Task Learning*.  TMLR 2022, https://arxiv.org/abs/2111.10603.

Idea.  A control for all that learn weights: if random ones do as well, the learning did nothing.

    w = softmax(z),   z_k ~ N(0, 1) anew at every step,   loss = sum_k w_k L_k

The definition is from memory of the paper, not checked against it.

How this differs.  The softmax is over the objectives that the batch has.  z_k is a function of (seed, step, the objective's
name): neither the order of the tasks nor an interruption changes a draw.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from unbraid.optim.weighted import Setting
from unbraid.types import FORBID, Losses, Output, State

BIBTEX = """
@article{lin2022rlw,
  title   = {Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning},
  author  = {Lin, Baijiong and Ye, Feiyang and Zhang, Yu and Tsang, Ivor W.},
  journal = {Transactions on Machine Learning Research},
  year    = {2022},
  note    = {arXiv:2111.10603},
}
"""


@dataclass(frozen=True)
class RLW:
    """Random loss weighting."""

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["rlw"] = field(default="rlw", kw_only=True)

    def bind(self, setting: Setting) -> BoundRLW:
        """The weighting of one training."""
        return BoundRLW(setting)


@dataclass
class BoundRLW:
    """See `RLW`."""

    setting: Setting
    last: dict[str, float] = field(default_factory=dict)

    def prepare(self, losses: Losses, output: Output) -> None:
        """Nothing to look at."""

    def total(self, losses: Losses) -> Tensor:
        """sum_k w_k L_k."""
        weights = self._draw(losses)
        return torch.stack([losses[name] * weight for name, weight in weights.items()]).sum()

    def move(self, losses: Losses) -> None:
        """Keep the step's weights to be told."""
        self.last |= self._draw(losses)

    def told(self) -> Mapping[str, float]:
        """objective -> its weight in the last batch that had it."""
        return dict(self.last)

    def state_dict(self) -> State:
        """The weights to be told; the draws need no state."""
        return {"last": dict(self.last)}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""
        self.last = dict(state["last"])

    def _draw(self, losses: Losses) -> dict[str, float]:
        at = (self.setting.course.seed, self.setting.update.step)
        z = np.array([np.random.default_rng([*at, zlib.crc32(name.encode())]).normal() for name in losses])
        shares = np.exp(z) / np.exp(z).sum()
        return dict(zip(losses, shares.tolist(), strict=True))
