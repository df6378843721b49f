"""Dynamic weight average: a loss that falls more slowly than the others weighs more.

Paper: Shikun Liu, Edward Johns, Andrew J. Davison: *End-to-End Multi-Task Learning with Attention*.  CVPR 2019,
https://arxiv.org/abs/1803.10704.

Idea.  Compare each loss's mean over the last epoch e - 1 with that over the one before::

    r_k = Lbar_k(e - 1) / Lbar_k(e - 2),     w = K softmax(r / T),     loss = sum_k w_k L_k

w is 1 in the first two epochs.

How this differs.  `DWA.factor` "one" leaves the factor K out and starts from 1 / K, as the Transfer-Learning-Library's code
does.  A mean is over the batches that had the task; a task that an epoch did not have keeps its two means, and one that has
no two means yet counts with r = 1.  Weights change at the ends of epochs alone.  Where training reads no epochs (a stream, one
epoch or less), set `DWA.epoch_steps`: with one epoch all weights stay 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unbraid.optim.weighted import Setting
from unbraid.types import FORBID, Losses, Output, State

BIBTEX = """
@inproceedings{liu2019mtan,
  title     = {End-to-End Multi-Task Learning with Attention},
  author    = {Liu, Shikun and Johns, Edward and Davison, Andrew J.},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2019},
  note      = {arXiv:1803.10704},
}
"""


@dataclass(frozen=True)
class DWA:
    """Dynamic weight average.

    Args:
        temperature: T; larger makes weights more equal.
        factor: weights sum to K (``tasks``) or to 1 (``one``).
        epoch_steps: steps that count as an epoch; 0 means one pass over the training rows.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["dwa"] = field(default="dwa", kw_only=True)
    temperature: float = 2.0
    factor: Literal["tasks", "one"] = "tasks"
    epoch_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"Parameter `temperature` should be positive. Found {self.temperature}.")
        if self.epoch_steps < 0:
            raise ValueError(f"Parameter `epoch_steps` should not be negative. Found {self.epoch_steps}.")

    def bind(self, setting: Setting) -> BoundDWA:
        """The weighting of one training.  Raises ValueError if nobody says how long an epoch is."""
        return BoundDWA(self, setting.epoch(self.epoch_steps))


@dataclass
class BoundDWA:
    """See `DWA`.

    Attributes:
        sums: objective -> sum of its losses in this epoch and over how many batches.
        means: objective -> its means in the last epochs that had it, two at most.
        weights: objective -> its weight, of those with a mean.
        done: steps of this epoch.
    """

    config: DWA
    epoch: int
    sums: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    means: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    done: int = 0

    def prepare(self, losses: Losses, output: Output) -> None:
        """Nothing to look at."""

    def total(self, losses: Losses) -> Tensor:
        """sum_k w_k L_k."""
        first = 1.0 if self.config.factor == "tasks" else 1.0 / len({*self.sums, *self.weights, *losses})
        return torch.stack([loss * self.weights.get(name, first) for name, loss in losses.items()]).sum()

    def move(self, losses: Losses) -> None:
        """Add to the means; at the end of an epoch, new weights."""
        for name, loss in losses.items():
            found, count = self.sums.get(name, (torch.zeros((), dtype=torch.float64), 0))
            self.sums[name] = found.to(loss.device) + loss.detach().double(), count + 1
        self.done += 1
        if self.done >= self.epoch:
            self._end()

    def _end(self) -> None:
        for name, (found, count) in self.sums.items():
            self.means[name] = [*self.means.get(name, []), float(found) / count][-2:]
        self.sums, self.done = {}, 0
        rates = {name: _rate(means) for name, means in self.means.items()}
        top = max(rates.values())
        shares = {name: math.exp((rate - top) / self.config.temperature) for name, rate in rates.items()}
        size = len(rates) if self.config.factor == "tasks" else 1
        self.weights = {name: size * share / sum(shares.values()) for name, share in shares.items()}

    def told(self) -> Mapping[str, float]:
        """objective -> its weight."""
        first = 1.0 if self.config.factor == "tasks" else 1.0 / max(len(self.sums), 1)
        return self.weights or {name: first for name in self.sums}

    def state_dict(self) -> State:
        """Sums, means, weights and the place in the epoch."""
        return {
            "sums": {name: [found, count] for name, (found, count) in self.sums.items()},
            "means": {name: list(means) for name, means in self.means.items()},
            "weights": dict(self.weights),
            "done": self.done,
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""
        self.sums = {name: (found.clone(), count) for name, (found, count) in state["sums"].items()}
        self.means = {name: list(means) for name, means in state["means"].items()}
        self.weights, self.done = dict(state["weights"]), state["done"]


def _rate(means: list[float]) -> float:
    """How much of a loss is left after an epoch; 1 where two means are missing or the first is 0."""
    return means[1] / means[0] if len(means) == 2 and means[0] else 1.0
