"""MGDA: the shortest vector among the convex combinations of the gradients.

Paper: Ozan Sener, Vladlen Koltun: *Multi-Task Learning as Multi-Objective Optimization*.  NeurIPS 2018,
https://arxiv.org/abs/1810.04650.

Idea.  Minus that vector is a direction in which every task's loss falls, and it is 0 exactly where there is none (a
Pareto-stationary point)::

    a = argmin over the simplex of |sum_k a_k g_k|^2,        d = sum_k a_k g_k

How this differs.  The released code takes steps of Frank-Wolfe, which zigzag; here one call of SciPy's non-negative least squares
is exact: with G = R^T R, the w >= 0 where |R w|^2 + (1 - sum w)^2 is least is a multiple of a, since for w = t a the least value
over t grows with |R a|.  (Frank-Wolfe as in TorchJD agrees, which is tested.)  Gradients may be normalised while a is sought, by
their norm, their loss or both; a is then applied to the gradients as they are, which is from memory of that code.  It also keeps
two tasks' weights between .001 and .999; that is left out.
"""

from __future__ import annotations

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
@inproceedings{sener2018mgda,
  title     = {Multi-Task Learning as Multi-Objective Optimization},
  author    = {Sener, Ozan and Koltun, Vladlen},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2018},
  note      = {arXiv:1810.04650},
}
"""


@dataclass(frozen=True)
class MGDA:
    """The multiple-gradient descent algorithm.

    Args:
        normalise: what gradients are divided by while a is sought: nothing, their norm (``l2``), their loss (``loss``), or
            both (``loss+``).
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["mgda"] = field(default="mgda", kw_only=True)
    normalise: Literal["none", "l2", "loss", "loss+"] = "none"

    def bind(self, setting: Setting) -> BoundMGDA:
        """The rule of one training."""
        return BoundMGDA(self)


@dataclass
class BoundMGDA(Rule):
    """See `MGDA`."""

    config: MGDA

    def weights(self, view: View) -> Tensor:
        """a, of the gradients over their scales."""
        scale = torch.ones(len(view.names), dtype=torch.float64)
        if self.config.normalise in ("l2", "loss+"):
            scale = scale * view.norms
        if self.config.normalise in ("loss", "loss+"):
            scale = scale * view.losses.abs()
        scale = torch.where(scale > 0, scale, 1.0)
        return shortest(view.gramian / scale.outer(scale))


def shortest(gramian: Tensor) -> Tensor:
    """(K,) the point a of the simplex where a^T G a is least."""
    values, vectors = np.linalg.eigh(levelled(gramian)[0].numpy())
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    ones = np.ones(len(root))
    w = scipy.optimize.nnls(np.vstack([root, ones]), np.append(0 * ones, 1.0))[0]
    return torch.from_numpy(w / w.sum())
