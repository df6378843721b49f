"""Conflict-averse gradient descent: the step near the mean gradient that is best for the task it serves worst.

Paper: Bo Liu, Xingchao Liu, Xiaojie Jin, Peter Stone, Qiang Liu: *Conflict-Averse Gradient Descent for Multi-task Learning*.
NeurIPS 2021, https://arxiv.org/abs/2110.14048.

Idea.  With g0 the mean of the gradients::

    max over d of  min_k <g_k, d>     such that |d - g0| <= c |g0|

whose dual is over the simplex, and needs the Gramian alone::

    w = argmin <g_w, g0> + c |g0| |g_w|,   g_w = sum_k w_k g_k,        d = g0 + c |g0| g_w / |g_w|

c = 0 is the mean.

How this differs.  The dual is solved by SciPy's SLSQP, as in the released code, on the Gramian over its mean diagonal and with
the exact slope.  TorchJD has it through cvxpy, whose every call makes a problem anew; both agree, which is tested.  The released
code divides d by 1 + c^2: `CAGrad.rescale`.  Where g_w = 0 the direction is not defined and d is g0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import scipy
import torch
from torch import Tensor

from unbraid.optim.aggregated import Rule, View, levelled
from unbraid.optim.weighted import Setting
from unbraid.types import FORBID

BIBTEX = """
@inproceedings{liu2021cagrad,
  title     = {Conflict-Averse Gradient Descent for Multi-task Learning},
  author    = {Liu, Bo and Liu, Xingchao and Jin, Xiaojie and Stone, Peter and Liu, Qiang},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2021},
  note      = {arXiv:2110.14048},
}
"""


@dataclass(frozen=True)
class CAGrad:
    """Conflict-averse gradient descent.

    Args:
        c: how far the step may be from the mean gradient, in its norm.
        rescale: divide the step by 1 + c^2.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["cagrad"] = field(default="cagrad", kw_only=True)
    c: float = 0.5
    rescale: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.c < math.inf:
            raise ValueError(f"Parameter `c` should be finite and not negative. Found {self.c}.")

    def bind(self, setting: Setting) -> BoundCAGrad:
        """The rule of one training."""
        return BoundCAGrad(self)


@dataclass
class BoundCAGrad(Rule):
    """See `CAGrad`."""

    config: CAGrad

    def weights(self, view: View) -> Tensor:
        """1 / K + c |g0| w_k / |g_w|."""
        count = len(view.names)
        if count == 1:
            return torch.ones(1, dtype=torch.float64)
        gramian = levelled(view.gramian)[0].numpy()
        radius = self.config.c * math.sqrt(max(gramian.mean(), 0.0))
        weights = np.full(count, 1 / count)
        if radius > 0:
            w = dual(gramian, radius)
            norm = math.sqrt(max(w @ gramian @ w, 0.0))
            weights += radius * w / norm if norm > 1e-8 else 0.0
        return torch.from_numpy(weights / (1 + self.config.c**2) if self.config.rescale else weights)


def dual(gramian: np.ndarray, radius: float) -> np.ndarray:
    """(K,) the point of the simplex where <g_w, g0> + radius |g_w| is least."""
    count, mean = len(gramian), gramian.mean(0)

    def value(w: np.ndarray) -> tuple[float, np.ndarray]:
        product = gramian @ w
        norm = math.sqrt(max(w @ product, 1e-16))
        return float(w @ mean + radius * norm), mean + radius * product / norm

    found = scipy.optimize.minimize(
        value, np.full(count, 1 / count), jac=True, method="SLSQP", bounds=[(0, 1)] * count, tol=1e-12,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
    )  # fmt: skip
    w = found.x.clip(min=0)
    return w / w.sum()
