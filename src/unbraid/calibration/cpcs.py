"""CPCS, calibrated prediction under covariate shift: a temperature of least importance-weighted Brier score.

Paper: Park, Bastani, Weimer and Lee, "Calibrated prediction with covariate shift via unsupervised domain adaptation",
AISTATS 2020 (https://arxiv.org/abs/2003.00343); as TransCal's code has it among its baselines.

    T = argmin mean_i w_i |softmax(z_i / T) - onehot(y_i)|^2         over held-out source rows, w = q / p by `density`

How this differs: the paper bounds the weights and learns features that source and target share; here the model is frozen.  Of a
binary task it is the slope of ``sigmoid(a z)``, with ``intercept`` slope and intercept, of least weighted squared error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import scipy

from unbraid.calibration.labelled import Labelled, importance, kind_of
from unbraid.calibration.maps import Affine, Calibration
from unbraid.calibration.scaling import TEMPERATURES, logistic_fit
from unbraid.types import FORBID, Scores, Task

BIBTEX = """@inproceedings{park2020calibrated,
  title = {Calibrated Prediction with Covariate Shift via Unsupervised Domain Adaptation},
  author = {Park, Sangdon and Bastani, Osbert and Weimer, James and Lee, Insup},
  booktitle = {Proceedings of the 23rd International Conference on Artificial Intelligence and Statistics},
  year = {2020}
}
"""

Array = np.ndarray


@dataclass(frozen=True)
class CPCS:
    """Temperature (binary with ``intercept``: slope and intercept) of least weighted Brier score.

    Args:
        balance, seed: of the density ratio, see `unbraid.calibration.density.density_ratio`.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["cpcs"] = field(default="cpcs", kw_only=True)
    keeps_argmax: ClassVar[bool] = True
    needs_target: ClassVar[bool] = True
    intercept: bool = False
    balance: Literal["weight", "resample"] = "weight"
    seed: int = 0

    def fit(
        self, task: Task, held_out: Scores, target: Scores | None = None, train: Scores | None = None
    ) -> Calibration:
        """See `unbraid.slots.Calibrator`."""
        rows, w, support = importance(task, held_out, target, train, self.balance, self.seed)
        numbers = {"mean weight": support.mean, "effective rows": support.effective}
        if self.intercept:
            kind_of(task, ("binary",), "`intercept` is for binary tasks.")
            slope, intercept = weighted_brier_fit(rows, w)
            found = {"slope": slope, "intercept": intercept}
            return Calibration(Affine(slope, intercept), found | numbers, support.warnings)
        temperature = brier_temperature(rows, w)
        return Calibration(Affine(1 / temperature), {"temperature": temperature} | numbers, support.warnings)


def brier(rows: Labelled, w: Array, temperature: float) -> float:
    """Mean weighted Brier score (summed over classes) at a temperature."""
    if rows.logits.ndim == 1:
        return float((w * 2 * (scipy.special.expit(rows.logits / temperature) - rows.labels) ** 2).mean())
    gap = scipy.special.softmax(rows.logits / temperature, axis=1)
    gap[np.arange(len(gap)), rows.labels] -= 1
    return float((w * (gap**2).sum(1)).mean())


def brier_temperature(rows: Labelled, w: Array) -> float:
    """The best temperature: a grid over its logarithm (the score has several valleys), then a search in the best cell."""
    grid = np.log(np.geomspace(*TEMPERATURES, 61))
    best = int(np.argmin([brier(rows, w, float(np.exp(t))) for t in grid]))
    cell = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = scipy.optimize.minimize_scalar(
        lambda t: brier(rows, w, float(np.exp(t))), bounds=cell, method="bounded", options={"xatol": 1e-9}
    )
    return float(np.exp(found.x))


def weighted_brier_fit(rows: Labelled, w: Array) -> tuple[float, float]:
    """Slope and intercept of least weighted squared error, from those of the source's likelihood."""
    z, y, _ = rows
    start = logistic_fit(rows)

    def loss(x: Array) -> tuple[float, Array]:
        slope = np.exp(x[0])
        p = scipy.special.expit(slope * z + x[1])
        gap = 2 * w * (p - y) * p * (1 - p)
        return float((w * (p - y) ** 2).mean()), np.array([(gap * z).mean() * slope, gap.mean()])

    found = scipy.optimize.minimize(
        loss, [np.log(start[0]), start[1]], jac=True, method="BFGS", options={"gtol": 1e-10}
    )
    return float(np.exp(found.x[0])), float(found.x[1])
