"""Deep embedded validation (DEV): importance-weighted validation with a control variate.

Paper: "Towards Accurate Model Selection in Deep Unsupervised Domain Adaptation", You, Wang, Long, Jordan, ICML 2019.

Idea: the weighted loss w l of `unbraid.selection.iwv` varies most where weights do.  E[w] = 1 is known, so w is a control
variate::

    R = mean(w l) + eta mean(w) - eta          eta = -Cov(w l, w) / Var(w)          lower is better

whose variance is the smallest among all eta.

How this differs: the paper fits w on training rows, here it is cross-fitted on the validation split, as in
`unbraid.selection.iwv`; R can be negative, as there.  Where all weights are equal eta is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from unbraid.selection.iwv import IWV
from unbraid.selection.rows import Array
from unbraid.types import FORBID

BIBTEX = """
@inproceedings{you2019dev,
  title     = {Towards Accurate Model Selection in Deep Unsupervised Domain Adaptation},
  author    = {You, Kaichao and Wang, Ximei and Long, Mingsheng and Jordan, Michael I.},
  booktitle = {Proceedings of the 36th International Conference on Machine Learning},
  series    = {Proceedings of Machine Learning Research},
  volume    = {97},
  pages     = {7124--7133},
  year      = {2019},
}
"""


@dataclass(frozen=True)
class DEV(IWV):
    """The weighted mean loss with a control variate.

    Args:
        domains, tasks: see `OnTarget`; loss: see `IWV`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["dev"] = field(default="dev", kw_only=True)  # type: ignore[assignment]

    def risk(self, w: Array, losses: Array) -> float:
        """The estimate, from (n,) weights and losses."""
        spread = float(w.var(ddof=1))
        eta = -float(np.cov(w * losses, w, ddof=1)[0, 1]) / spread if spread > 0 else 0.0
        return float((w * losses).mean() + eta * w.mean() - eta)
