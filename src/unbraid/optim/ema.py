"""Exponential moving average of the weights: a mean that forgets.

Papers: "Acceleration of Stochastic Approximation by Averaging", Polyak, Juditsky, SIAM Journal on Control and Optimization
30(4), 1992, https://doi.org/10.1137/0330046, for means of iterates; "Mean teachers are better role models: Weight-averaged
consistency targets improve semi-supervised deep learning results", Tarvainen, Valpola, NeurIPS 2017,
https://arxiv.org/abs/1703.01780, for the exponential form with a rising decay.

Idea: single steps are noisy, and the mean of the last 1 / (1 - d) of them is less so::

    mean_t = d_t mean_{t-1} + (1 - d_t) theta_t           d_t = min(d, t / (t + 1)), or d at once

While t / (t + 1) is below d, this is the plain mean of all weights so far, the start included.

How this differs: it does not teach anything, as the mean teacher does; the validation split is looked at by the averages, so
that early stopping and the kept weights go by what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from unbraid.optim.averaging import Average

BIBTEX = """
@article{polyak1992averaging,
  title   = {Acceleration of Stochastic Approximation by Averaging},
  author  = {Polyak, Boris T. and Juditsky, Anatoli B.},
  journal = {SIAM Journal on Control and Optimization},
  volume  = {30},
  number  = {4},
  pages   = {838--855},
  year    = {1992},
}

@inproceedings{tarvainen2017mean,
  title     = {Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep
               learning results},
  author    = {Tarvainen, Antti and Valpola, Harri},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  volume    = {30},
  year      = {2017},
  eprint    = {1703.01780},
  archiveprefix = {arXiv},
}
"""


@dataclass(frozen=True)
class EMA(Average):
    """The exponential moving average.

    Args:
        precision: of the accumulators.
        decay: d, the share of the mean that a step keeps.
        warmup: let the decay rise from the plain mean's to d.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """

    looks: ClassVar[bool] = True
    kind: Literal["ema"] = field(default="ema", kw_only=True)
    decay: float = 0.999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"Parameter `decay` should be in [0, 1). Found {self.decay}.")

    def shares(self, steps: int) -> np.ndarray:
        """See `Average.shares`."""
        least = 1 / np.arange(1, steps + 2)
        found = np.maximum(1 - self.decay, least) if self.warmup else np.full(steps + 1, 1 - self.decay)
        found[0] = 1
        return found
