"""Repeated exposures count less: a row's weight falls with how often its user has been shown its item before.

Paper: "Ads Recommendation in a Collapsed and Entangled World", Pan, Xue, Wang, Yu, Liu, Quan, Qiu, Liu, Xiao, Jiang, KDD 2024,
https://arxiv.org/abs/2403.00793, weights samples by exposure count and corrects the bias that this brings.  Its formulas were
not at hand: **the idea is the paper's, the design below is ours**.

Idea: the tenth time that a user sees the same item says less that is new than the first.  With k earlier exposures
(`Batch.meta` ``exposure``, 0 first; ``data.exposure`` says of what)::

    w(k) = max(least, (1 + k)^-gamma)               negatives, and all rows of tasks that are not binary
    w+(k) = max(least, (1 + k)^-positive_gamma)     positives, where it is given; else w(k)

An objective is the mean ``sum w l / sum w`` over its rows in the batch: weights are divided by *their mean over the rows that
the objective counts*, as row weights are.

**Weights that differ by class move the rate.**  A place where the odds of a positive are o has odds ``o w+(k) / w(k)`` in the
weighted log.  So labels are compared at ``logit + log(w+(k) / w(k))``: the shift is in the loss and nowhere else, and the
logit itself stays calibrated to the log as it is, as with sampled negatives (`unbraid.losses.supervised`).  Predictions need no
correction, nor the exposure.  Weights of one curve for both classes shift nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from unbraid.types import FORBID

BIBTEX = """
@inproceedings{pan2024ads,
  title     = {Ads Recommendation in a Collapsed and Entangled World},
  author    = {Pan, Junwei and Xue, Wei and Wang, Ximei and Yu, Haibin and Liu, Xun and Quan, Shijie and Qiu, Xueming and
               Liu, Dapeng and Xiao, Lei and Jiang, Jie},
  booktitle = {Proceedings of the 30th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year      = {2024},
  eprint    = {2403.00793},
  archiveprefix = {arXiv},
}
"""


@dataclass(frozen=True)
class Exposure:
    """Weights of rows by the number of earlier exposures.

    Args:
        gamma: how fast the weight falls; 0: not at all.
        least: the smallest weight.
        positive_gamma: ``gamma`` of positives of binary tasks; None: the same.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    gamma: float = 0.5
    least: float = 0.1
    positive_gamma: float | None = None

    def __post_init__(self) -> None:
        for name in ("gamma", "positive_gamma"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"Parameter `{name}` should be finite and not negative. Found {value}.")
        if not 0 < self.least <= 1:
            raise ValueError(f"Parameter `least` should be above 0 and at most 1. Found {self.least}.")

    def weights(self, earlier: Tensor, positive: Tensor) -> Tensor:
        """(n,) float64 weights before they are divided by their mean.

        Args:
            earlier: (n,) int64 number of earlier exposures; positive: (n,) bool, is it a positive of a binary task.
        """
        return torch.where(positive, self._logarithm(earlier, True), self._logarithm(earlier, False)).exp()

    def shift(self, earlier: Tensor) -> Tensor:
        """(n,) float64: what to add to a binary task's logit in the loss, log(w+ / w)."""
        return self._logarithm(earlier, True) - self._logarithm(earlier, False)

    def _logarithm(self, earlier: Tensor, positive: bool) -> Tensor:
        gamma = self.positive_gamma if positive and self.positive_gamma is not None else self.gamma
        return (-gamma * earlier.double().log1p()).clamp(min=math.log(self.least))
