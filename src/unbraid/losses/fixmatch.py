"""FixMatch: the answer for a weakly changed row is the label of the same row under a strong change.

Paper: "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", Sohn, Berthelot, Li, Zhang, Carlini,
Cubuk, Kurakin, Zhang, Raffel, NeurIPS 2020, https://arxiv.org/abs/2001.07685.

Idea: pseudo-labels (`unbraid.losses.pseudo_label`) teach a model what it says already.  Asked about an easy view and taught on
a hard one, it learns that the change does not matter.  The equations are those of `unbraid.losses.self_training`.

How this differs:

- Views are whatever the run's ``augment`` makes of a row; the paper's are of pictures.
- A batch in which nothing is believed has no such objective, where the paper's loss is 0: gradients of zeros would still move
  parameters by their momentum.
- Any number of tasks, binary ones as two classes; the loss is the sum over tasks of their weight times theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from unbraid.losses.self_training import SelfTraining

BIBTEX = """
@inproceedings{sohn2020fixmatch,
  title     = {FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence},
  author    = {Sohn, Kihyuk and Berthelot, David and Li, Chun-Liang and Zhang, Zizhao and Carlini, Nicholas and
               Cubuk, Ekin D. and Kurakin, Alex and Zhang, Han and Raffel, Colin},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {33},
  year      = {2020},
  note      = {arXiv:2001.07685},
}
"""


@dataclass(frozen=True)
class FixMatch(SelfTraining):
    """Self-training with a weak view that asks and a strong one that learns."""

    kind: Literal["fixmatch"] = field(default="fixmatch", kw_only=True)
