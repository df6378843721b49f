"""Soft neighbourhood density (SND): a model is good where target rows have many neighbours that are predicted alike.

Paper: "Tune it the Right Way: Unsupervised Validation of Domain Adaptation via Soft Neighborhood Density", Saito, Kim, Teterwak,
Sclaroff, Darrell, Saenko, ICCV 2021, https://arxiv.org/abs/2108.10860.

Idea: predictions of a class that was carried over lie close together.  With p_i the probabilities of target row i, scaled to
length 1, and temperature t::

    S_ij = softmax over j != i of (p_i . p_j / t)          D = mean_i H(S_i)          higher is better

D is largest, log(n - 1), where every row has all others as neighbours: **a collapse to one class scores best**, so read it with
predicted rates beside it (`unbraid.analysis.confusion`).

How this differs: the code gives i itself a similarity of -1, here it is left out; at t = .05 the difference is below 1e-8.
More rows than ``rows`` are thinned out evenly, the same ones at every look, since D grows with their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import scipy

from unbraid.selection.rows import Array, OnTarget, log_probabilities
from unbraid.slots import Judged
from unbraid.types import FORBID, Schema, Scores, Task

BIBTEX = """
@inproceedings{saito2021snd,
  title     = {Tune it the Right Way: Unsupervised Validation of Domain Adaptation via Soft Neighborhood Density},
  author    = {Saito, Kuniaki and Kim, Donghyun and Teterwak, Piotr and Sclaroff, Stan and Darrell, Trevor and Saenko, Kate},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2021},
  eprint    = {2108.10860},
  archiveprefix = {arXiv},
}
"""

BLOCK = 1024  # rows whose neighbours are looked at at once


@dataclass(frozen=True)
class SND(OnTarget):
    """The density of target rows' predictions.

    Args:
        domains, tasks: see `OnTarget`.
        temperature: t; rows: at most so many target rows are compared with each other.

    Raises:
        ValueError: a temperature that is not positive and finite, or fewer than three rows.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    lower_is_better: ClassVar[bool] = False
    kind: Literal["snd"] = field(default="snd", kw_only=True)
    temperature: float = 0.05
    rows: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"Parameter `temperature` should be positive and finite. Found {self.temperature}.")
        if self.rows < 3:
            raise ValueError(f"Parameter `rows` should be at least 3. Found {self.rows}.")

    def __call__(self, scores: Scores, schema: Schema) -> Judged:
        """See `unbraid.slots.Selection`."""

        def judge(task: Task) -> float:
            rows = self.target(task, scores)
            rows = rows[np.arange(min(len(rows), self.rows)) * len(rows) // min(len(rows), self.rows)]
            return density(np.exp(log_probabilities(np.asarray(scores.logits[task.name])[rows])), self.temperature)

        return self.mean(schema, judge)


def density(p: Array, temperature: float) -> float:
    """D of the module docstring, from (n, C) probabilities of at least two rows."""
    unit = p / np.linalg.norm(p, axis=1, keepdims=True)
    total = 0.0
    for start in range(0, len(unit), BLOCK):
        part = unit[start : start + BLOCK]
        similar = part @ unit.T / temperature
        own = np.arange(len(part))
        similar[own, start + own] = -np.inf
        log_s = scipy.special.log_softmax(similar, axis=1)
        log_s[own, start + own] = 0.0  # weight 0
        s = np.exp(log_s)
        s[own, start + own] = 0.0
        total -= float((s * log_s).sum())
    return total / len(unit)
