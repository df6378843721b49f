"""IMTL-L: learned scales that make all losses equally large.

Paper: Liyang Liu, Yi Li, Zhanghui Kuang, Jing-Hao Xue, Yimin Chen, Wenming Yang, Qingmin Liao, Wayne Zhang: *Towards Impartial
Multi-task Learning*.  ICLR 2021, https://openreview.net/forum?id=IMPnRXEWpvr.

Idea.  Replace every loss by ``exp(s_k) L_k - s_k`` with a learned s_k that starts at 0.  For a fixed model exp(s_k) L_k is 1 at
the best s_k: the scaled losses, and not the losses, are equal.

    loss = sum_k (exp(s_k) L_k - s_k)

How this differs.  The formula and its start are those of the code that was released with ForkMerge (Jiang et al., NeurIPS
2023), where the gradients' balancing IMTL-G follows; here IMTL-G is an aggregator of its own and not run behind.  The bound on
\\|s_k\\|, the step size and Adam's state per task are ours, as in `unbraid.optim.uw`, whose s_k is minus this one's.
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
@inproceedings{liu2021imtl,
  title     = {Towards Impartial Multi-task Learning},
  author    = {Liu, Liyang and Li, Yi and Kuang, Zhanghui and Xue, Jing-Hao and Chen, Yimin and Yang, Wenming and
               Liao, Qingmin and Zhang, Wayne},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2021},
}
"""


@dataclass(frozen=True)
class IMTLL:
    """The loss balance of IMTL.

    Args:
        lr: step size of s_k; None means that of the layers.
        limit: s_k is kept in [-limit, limit].
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["imtl_l"] = field(default="imtl_l", kw_only=True)
    lr: float | None = None
    limit: float = 10.0

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise ValueError(f"Parameter `lr` should be finite and not negative. Found {self.lr}.")
        if not 0 < self.limit < math.inf:
            raise ValueError(f"Parameter `limit` should be positive. Found {self.limit}.")

    def bind(self, setting: Setting) -> BoundIMTLL:
        """The weighting of one training."""
        return BoundIMTLL(Learned(setting, self.lr, 0.0, -self.limit, self.limit))


@dataclass
class BoundIMTLL:
    """See `IMTLL`."""

    logs: Learned  # of the scales

    def prepare(self, losses: Losses, output: Output) -> None:
        """Nothing to look at."""

    def total(self, losses: Losses) -> Tensor:
        """sum_k (exp(s_k) L_k - s_k)."""
        logs = self.logs.of(losses)
        return (torch.stack(list(losses.values())) * logs.exp() - logs).sum()

    def move(self, losses: Losses) -> None:
        """One step of the s_k that the sum has given a gradient."""
        self.logs.step()

    def told(self) -> Mapping[str, float]:
        """objective -> exp(s_k)."""
        return {name: math.exp(value) for name, value in self.logs.told().items()}

    def state_dict(self) -> State:
        """See `unbraid.optim.weighted.Learned`."""
        return self.logs.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""
        self.logs.load_state_dict(state)
