"""Gradient cosine similarity: an auxiliary task helps only while its gradient points the target's way.

Paper: Yunshu Du, Wojciech M. Czarnecki, Siddhant M. Jayakumar, Mehrdad Farajtabar, Razvan Pascanu, Balaji Lakshminarayanan:
*Adapting Auxiliary Losses Using Gradient Similarity*.  2018, https://arxiv.org/abs/1812.02224.

Idea.  On shared parameters, with the target's gradient g_tgt::

    d = g_tgt + sum_k 1[cos(g_k, g_tgt) > 0] g_k             (weighted: max(0, cos) instead of the indicator)

How this differs.  Several targets count as one, by the sum of their gradients.  In a batch that no target has a row of, the
auxiliary tasks move no shared parameter: there is nothing to compare them with.  An auxiliary task's own parameters get its
gradient in any case; where tables of an auxiliary task and of no target are shared among auxiliary tasks, they move only with
those that help.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unbraid.optim.aggregated import Rule, View
from unbraid.optim.weighted import Setting
from unbraid.types import FORBID

BIBTEX = """
@article{du2018adapting,
  title   = {Adapting Auxiliary Losses Using Gradient Similarity},
  author  = {Du, Yunshu and Czarnecki, Wojciech M. and Jayakumar, Siddhant M. and Farajtabar, Mehrdad and Pascanu, Razvan and
             Lakshminarayanan, Balaji},
  journal = {arXiv preprint arXiv:1812.02224},
  year    = {2018},
}
"""


@dataclass(frozen=True)
class GCS:
    """Gradient cosine similarity.

    Args:
        targets: objectives or tasks; empty means the tasks of role ``target``.
        weighted: weigh auxiliary gradients by their cosine.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["gcs"] = field(default="gcs", kw_only=True)
    targets: tuple[str, ...] = ()
    weighted: bool = False

    def bind(self, setting: Setting) -> BoundGCS:
        """The rule of one training.  Raises ValueError if no objective is a target."""
        setting.require_targets(self.targets)
        return BoundGCS(self, setting)


@dataclass
class BoundGCS(Rule):
    """See `GCS`."""

    config: GCS
    setting: Setting

    def weights(self, view: View) -> Tensor:
        """1 for targets, the indicator or the cosine for others."""
        target = self.setting.mark(self.config.targets, view.names)
        cosines = view.cosines(target)
        helps = cosines.clamp(min=0) if self.config.weighted else (cosines > 0).double()
        return torch.where(target > 0, 1.0, helps)
