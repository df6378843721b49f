"""WiSE-FT: a point on the line from the weights before fine-tuning to those after it.

Paper: "Robust fine-tuning of zero-shot models", Wortsman, Ilharco, Kim, Li, Kornblith, Roelofs, Gontijo-Lopes, Hajishirzi,
Farhadi, Namkoong, Schmidt, CVPR 2022, https://arxiv.org/abs/2109.01903.

Idea: fine-tuning gains on the data it sees and loses elsewhere; between both ends there are weights that have most of both::

    theta = (1 - alpha) theta_0 + alpha theta_N

As an average it has the share alpha at the last step and 0 before, so it costs one copy and nothing per step.

How this differs: theta_0 is what each call of ``fit`` begins with, heads included; the paper starts its head from the
zero-shot classifier, which is what `unbraid.class_head` does with projections of equal widths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from unbraid.optim.averaging import Average

BIBTEX = """
@inproceedings{wortsman2022robust,
  title     = {Robust fine-tuning of zero-shot models},
  author    = {Wortsman, Mitchell and Ilharco, Gabriel and Kim, Jong Wook and Li, Mike and Kornblith, Simon and
               Roelofs, Rebecca and Gontijo-Lopes, Raphael and Hajishirzi, Hannaneh and Farhadi, Ali and Namkoong, Hongseok and
               Schmidt, Ludwig},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022},
  eprint    = {2109.01903},
  archiveprefix = {arXiv},
}
"""


@dataclass(frozen=True)
class WiSEFT(Average):
    """Interpolation of the weights at the start and at the end.

    Args:
        precision: of the accumulators.
        alpha: share of the weights at the end.

    Raises:
        ValueError: ``alpha`` is not in [0, 1].
    """

    kind: Literal["wise_ft"] = field(default="wise_ft", kw_only=True)
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"Parameter `alpha` should be in [0, 1]. Found {self.alpha}.")

    def shares(self, steps: int) -> np.ndarray:
        """See `Average.shares`."""
        found = np.zeros(steps + 1)
        found[0], found[-1] = 1, self.alpha
        return found
