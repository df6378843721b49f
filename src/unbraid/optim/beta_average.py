"""Beta moving average: a mean of all weights along the training that leans on its two ends.

Paper: "CLIPood: Generalizing CLIP to Out-of-Distributions", Shu, Guo, Wu, Wang, Wang, Long, ICML 2023,
https://arxiv.org/abs/2302.00864.

Idea: the start of a fine-tuning knows what is general and its end knows the task; a mean with high weights on both keeps
both.  With N steps, theta_0 the weights at the start and f the density of the Beta distribution with both parameters beta::

    a_t = f((t + 0.5) / (N + 1); beta, beta)        t = 0..N
    theta = sum_t a_t theta_t / sum_t a_t

beta < 1 gives a U (the paper's .5 and .1), 1 the plain mean of all steps, above 1 a bell.  The halves keep t away from the
density's poles.  On this grid a beta near 0 is *not* the mean of the two ends: a_t goes to c / (x_t (1 - x_t)).

How this differs:

- The weights are needed in advance, so N is the number of steps of the call of ``fit``, and early stopping is refused: the mean
  up to some earlier step is a mean, and not this one.
- The code keeps model and mean in half precision, where small steps round to nothing.  Here accumulators are float64
  (`unbraid.optim.averaging`), and parity with the code is not sought.
- The code averages parameters and leaves buffers; running statistics of normalisations are measured anew here.
- Shares a_t / (a_0 + ... + a_t) are computed from logarithms: a large beta has ends whose density is no positive number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from unbraid.optim.averaging import Average

BIBTEX = """
@inproceedings{shu2023clipood,
  title     = {{CLIPood}: Generalizing {CLIP} to Out-of-Distributions},
  author    = {Shu, Yang and Guo, Xingzhuo and Wu, Jialong and Wang, Ximei and Wang, Jianmin and Long, Mingsheng},
  booktitle = {Proceedings of the 40th International Conference on Machine Learning},
  series    = {Proceedings of Machine Learning Research},
  volume    = {202},
  pages     = {31716--31731},
  year      = {2023},
  eprint    = {2302.00864},
  archiveprefix = {arXiv},
}
"""


@dataclass(frozen=True)
class BetaAverage(Average):
    """The mean of all weights under the density of a symmetric Beta distribution.

    Args:
        precision: of the accumulators.
        beta: both parameters of the distribution.

    Raises:
        ValueError: ``beta`` is not positive and finite.
    """

    kind: Literal["beta"] = field(default="beta", kw_only=True)
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"Parameter `beta` should be positive and finite. Found {self.beta}.")

    def weights(self, steps: int) -> np.ndarray:
        """(steps + 1,) the densities a_t."""
        return np.exp(self._logs(steps))

    def shares(self, steps: int) -> np.ndarray:
        """See `Average.shares`."""
        logs = self._logs(steps)
        return np.exp(logs - np.logaddexp.accumulate(logs))

    def _logs(self, steps: int) -> np.ndarray:
        x = (np.arange(steps + 1) + 0.5) / (steps + 1)
        scale = 2 * math.lgamma(self.beta) - math.lgamma(2 * self.beta)
        return (self.beta - 1) * (np.log(x) + np.log1p(-x)) - scale
