"""Pseudo-labels: a model's own confident answers are the labels of rows that have none.

Paper: "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", Dong-Hyun Lee,
ICML 2013 workshop on Challenges in Representation Learning.

Idea: what the network answers for a row without a label becomes that row's label in the same step.  It can only sharpen what the
network believes already, so that a threshold keeps it from its guesses.  The equations are those of
`unbraid.losses.self_training` with A = a: one view asks and learns, and no augmentation is needed.

How this differs: labels are made anew in every step, by the model in training mode; rows below the threshold are left out, where
the paper takes all and lets the weight of the loss grow from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from unbraid.losses.self_training import SelfTraining, Views

BIBTEX = """
@inproceedings{lee2013pseudolabel,
  title     = {Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks},
  author    = {Lee, Dong-Hyun},
  booktitle = {ICML 2013 Workshop on Challenges in Representation Learning},
  year      = {2013},
}
"""


@dataclass(frozen=True)
class PseudoLabel(SelfTraining):
    """Self-training on the same view."""

    views: ClassVar[Views] = "none"
    kind: Literal["pseudo_label"] = field(default="pseudo_label", kw_only=True)
