"""Uniform average: the plain mean of the weights at every so many steps of the training's last part.

Paper: "Averaging Weights Leads to Wider Optima and Better Generalization" (SWA), Izmailov, Podoprikhin, Garipov, Vetrov,
Wilson, UAI 2018, https://arxiv.org/abs/1803.05407.

Idea: late in a training the weights walk around a flat region, and their mean lies further inside it.  With n the
number of means taken so far::

    mean = mean + (theta_t - mean) / (n + 1)        every ``every`` steps from the share ``start`` of the steps on

How this differs: the paper's constant or cyclical learning rate is the update's own business (`learning_rate` of ``update``);
until the mean begins it is the last weights, so that a look at the validation split then sees these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from unbraid.layers import require_positive
from unbraid.optim.averaging import Average

BIBTEX = """
@inproceedings{izmailov2018swa,
  title     = {Averaging Weights Leads to Wider Optima and Better Generalization},
  author    = {Izmailov, Pavel and Podoprikhin, Dmitrii and Garipov, Timur and Vetrov, Dmitry and Wilson, Andrew Gordon},
  booktitle = {Proceedings of the Conference on Uncertainty in Artificial Intelligence (UAI)},
  year      = {2018},
  eprint    = {1803.05407},
  archiveprefix = {arXiv},
}
"""


@dataclass(frozen=True)
class UniformAverage(Average):
    """The plain mean of some of the weights.

    Args:
        precision: of the accumulators.
        start: share of the training's steps before the first weights that count; 0: the weights at the start count.
        every: steps between weights that count.

    Raises:
        ValueError: ``start`` is not in [0, 1), or ``every`` is not positive.
    """

    looks: ClassVar[bool] = True
    kind: Literal["uniform"] = field(default="uniform", kw_only=True)
    start: float = 0.75
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise ValueError(f"Parameter `start` should be in [0, 1). Found {self.start}.")
        require_positive(every=self.every)

    def shares(self, steps: int) -> np.ndarray:
        """See `Average.shares`."""
        first = round(self.start * steps)
        found = np.zeros(steps + 1)
        found[: first + 1] = 1
        taken = np.arange(first, steps + 1, self.every)
        found[taken] = 1 / np.arange(1, len(taken) + 1)
        return found
