"""ARML: weights with which the auxiliary gradients add up to the target's.

Paper: Baifeng Shi, Judy Hoffman, Kate Saenko, Trevor Darrell, Huijuan Xu: *Auxiliary Task Reweighting for Minimum-data Learning*.
NeurIPS 2020, https://arxiv.org/abs/2010.08244.

Idea.  Auxiliary tasks that are weighted well are a stand-in for the target's data: make their gradient look like the target's::

    one step a batch down   |g_tgt - sum_k w_k g_k|^2   in w          w starts at 1, the target's stays 1
    d = g_tgt + sum_k w_k g_k

How this differs.  This is the surrogate in the code released with ForkMerge (Jiang et al., NeurIPS 2023): no constraint on w.
The original, from memory, takes the expectation over perturbed parameters and keeps the sum of w; that is not offered.  Ours:
Adam for w, a floor, several targets as one by the sum of their gradients, and that w multiplies the gradient of the auxiliary
task's own parameters, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unbraid.optim.aggregated import Rule, View, levelled
from unbraid.optim.weighted import Learned, Setting
from unbraid.types import FORBID, State

BIBTEX = """
@inproceedings{shi2020arml,
  title     = {Auxiliary Task Reweighting for Minimum-data Learning},
  author    = {Shi, Baifeng and Hoffman, Judy and Saenko, Kate and Darrell, Trevor and Xu, Huijuan},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2020},
  note      = {arXiv:2010.08244},
}
"""


@dataclass(frozen=True)
class ARML:
    """ARML's surrogate.

    Args:
        targets: objectives or tasks; empty means the tasks of role ``target``.
        lr: step size of the weights (Adam); None means that of the layers.
        floor: no weight falls below it.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["arml"] = field(default="arml", kw_only=True)
    targets: tuple[str, ...] = ()
    lr: float | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise ValueError(f"Parameter `lr` should be finite and not negative. Found {self.lr}.")
        if not self.floor <= 1:
            raise ValueError(f"Parameter `floor` should be at most 1, where weights begin. Found {self.floor}.")

    def bind(self, setting: Setting) -> BoundARML:
        """The rule of one training.  Raises ValueError if no objective is a target."""
        setting.require_targets(self.targets)
        return BoundARML(self, setting, Learned(setting, self.lr, 1.0, self.floor))


@dataclass
class BoundARML(Rule):
    """See `ARML`."""

    weighs_own: ClassVar[bool] = True
    config: ARML
    setting: Setting
    numbers: Learned

    def weights(self, view: View) -> Tensor:
        """1 for targets, w for others, before w moves."""
        target = self.setting.mark(self.config.targets, view.names)
        others = {name: view.losses[at] for at, name in enumerate(view.names) if not target[at]}
        used = torch.ones(len(view.names), dtype=torch.float64)
        if others:
            used[target == 0] = self.numbers.of(others).detach()
        if others and target.any():
            left = levelled(view.gramian)[0] @ (target - used * (1 - target))  # <g_tgt - sum_k w_k g_k, g_j>
            self.numbers.step(dict(zip(others, -2 * left[target == 0], strict=True)))
        return used

    def told(self) -> Mapping[str, float]:
        """objective -> its weight, of the auxiliary ones."""
        return self.numbers.told()

    def state_dict(self) -> State:
        """See `unbraid.optim.weighted.Learned`."""
        return self.numbers.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""
        self.numbers.load_state_dict(state)
