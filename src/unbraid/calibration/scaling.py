"""Temperature, vector and matrix scaling: a small linear map of the logits, fitted to labelled rows of the source.

Papers: Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017
(https://arxiv.org/abs/1706.04599); for a binary task with slope and intercept it is Platt, "Probabilistic outputs for support
vector machines", Advances in Large Margin Classifiers, 1999.

All minimise the cross-entropy of ``softmax(W z + b)`` on rows that did not train the model:

    temperature   W = I / T, b = 0       vector   W diagonal       matrix   W full

A temperature never changes which class is largest.  Of a binary task it is ``sigmoid(z / T)``; with ``intercept`` it is
``sigmoid(a z + b)``, after which the mean prediction equals the mean label, and without it need not.

How this differs: the optimum of a convex problem, by a root of its derivative, Newton's method or L-BFGS, where the papers'
codes take a fixed number of gradient steps (5,000 of SGD in TransCal's baselines).  Row weights and sampled negatives count.
``penalty`` is ours: on few rows the K^2 numbers of the matrix fit noise.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import scipy

from unbraid.calibration.labelled import Labelled, kind_of, labelled
from unbraid.calibration.maps import Affine, Calibration, Linear
from unbraid.types import FORBID, Scores, Task

BIBTEX = """@inproceedings{guo2017calibration,
  title = {On Calibration of Modern Neural Networks},
  author = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {Proceedings of the 34th International Conference on Machine Learning},
  year = {2017}
}
"""

Array = np.ndarray
TEMPERATURES = (0.01, 100.0)
ROWS_PER_NUMBER = 10  # fewer rows per fitted number are said, a rule of thumb of logistic regression


@dataclass(frozen=True)
class Temperature:
    """One temperature for all logits.  ``intercept``: of a binary task, slope and intercept instead."""

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["temperature"] = field(default="temperature", kw_only=True)
    keeps_argmax: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False
    intercept: bool = False

    def fit(
        self, task: Task, held_out: Scores, target: Scores | None = None, train: Scores | None = None
    ) -> Calibration:
        """See `unbraid.slots.Calibrator`; reads ``held_out`` alone."""
        rows = labelled(held_out, task)
        if self.intercept:
            kind_of(task, ("binary",), "`intercept` is for binary tasks; `vector` has one per class.")
            slope, intercept = logistic_fit(rows)
            return Calibration(Affine(slope, intercept), {"slope": slope, "intercept": intercept})
        temperature, notes = fit_temperature(rows)
        return Calibration(Affine(1 / temperature), {"temperature": temperature}, notes)


def fit_temperature(rows: Labelled) -> tuple[float, tuple[str, ...]]:
    """The temperature of least weighted cross-entropy inside `TEMPERATURES`, and what to say when it is an end of them.

    The cross-entropy is convex in a = 1/T, so its derivative ``mean w (E_p[z] - z_y)`` has one root.
    """
    z, y, w = rows
    right = z * y if z.ndim == 1 else np.take_along_axis(z, y[:, None], 1)[:, 0]

    def derivative(a: float) -> float:
        expected = scipy.special.expit(a * z) * z if z.ndim == 1 else (scipy.special.softmax(a * z, axis=1) * z).sum(1)
        return float(np.average(expected - right, weights=w))

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if derivative(low) >= 0:
        return TEMPERATURES[1], (
            "the logits do not tell the labels of the held-out rows: the temperature is at its bound",
        )
    if derivative(high) <= 0:
        return TEMPERATURES[0], ("the held-out rows are predicted without a mistake: the temperature is at its bound",)
    return 1 / scipy.optimize.brentq(derivative, low, high, xtol=1e-14, rtol=1e-14), ()


def logistic_fit(rows: Labelled) -> tuple[float, float]:
    """Slope and intercept of ``P(y = 1) = sigmoid(a z + b)`` by maximum likelihood.

    Raises ValueError where the likelihood has no maximum (labels that one logit separates) or the slope is not positive.
    """
    from sklearn.linear_model import LogisticRegression

    z, y, w = rows
    if z[y == 0].max() <= z[y == 1].min():
        raise ValueError(
            f"Slope and intercept have no best value: among these {len(y):,} rows with {int(y.sum()):,} positives one logit "
            "separates the labels. Use more rows, or a temperature alone."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            fitted = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12, max_iter=200)
            fitted.fit(z[:, None], y, sample_weight=w / w.mean())
        except Warning as warning:
            raise ValueError(f"Slope and intercept of {len(y):,} rows did not converge: {warning}.") from None
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if not slope > 0:
        raise ValueError(
            f"On the held-out rows higher logits mean fewer positives (slope {slope:.3g}): no calibration mends that model."
        )
    return slope, intercept


@dataclass(frozen=True)
class _PerClass:
    """What vector and matrix scaling share.  ``penalty``: of the squared distance of W from I and of b from 0."""

    __pydantic_config__: ClassVar[dict] = FORBID
    keeps_argmax: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    full: ClassVar[bool] = False
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.penalty < np.inf:
            raise ValueError(f"Parameter `penalty` should be finite and not negative. Found {self.penalty}.")

    def fit(
        self, task: Task, held_out: Scores, target: Scores | None = None, train: Scores | None = None
    ) -> Calibration:
        """See `unbraid.slots.Calibrator`; reads ``held_out`` alone."""
        kind_of(task, ("multiclass",), "Of a binary task it is `temperature` with `intercept`.")
        rows = labelled(held_out, task)
        classes = rows.logits.shape[1]
        unit = np.eye(classes) if self.full else np.ones(classes)
        found = scipy.optimize.minimize(_cross_entropy, np.append(unit.ravel(), np.zeros(classes)), (rows, unit, self.penalty),
                         method="L-BFGS-B", jac=True,
                         options={"maxiter": 5000, "maxfun": 50_000, "ftol": 1e-15, "gtol": 1e-9})  # fmt: skip
        weight, bias = found.x[:-classes].reshape(unit.shape), found.x[-classes:]
        notes = []
        if np.abs(found.x).max() >= 1e3:
            notes.append("values run off: the rows are too few; set `penalty`")
        elif not self.penalty and len(rows.labels) < ROWS_PER_NUMBER * len(found.x):
            few = f"{len(rows.labels):,} held-out rows for {len(found.x):,} numbers"
            notes.append(f"{few}: set `penalty`, or take one temperature")
        new = Linear(weight if self.full else np.diag(weight), bias)
        return Calibration(new, {"loss": float(found.fun)}, tuple(notes))


def _cross_entropy(x: Array, rows: Labelled, unit: Array, penalty: float) -> tuple[float, Array]:
    """Mean cross-entropy with its penalty at ``x`` = (W, b) in one row, and its gradient."""
    z, y, w = rows
    w = w / w.sum()
    weight, bias = x[: unit.size].reshape(unit.shape), x[unit.size :]
    log_p = scipy.special.log_softmax((z @ weight.T if unit.ndim == 2 else z * weight) + bias, axis=1)
    gap = np.exp(log_p)
    gap[np.arange(len(y)), y] -= 1
    gap *= w[:, None]
    slope = (gap.T @ z if unit.ndim == 2 else (gap * z).sum(0)) + 2 * penalty * (weight - unit)
    value = -w @ np.take_along_axis(log_p, y[:, None], 1)[:, 0] + penalty * (((weight - unit) ** 2).sum() + bias @ bias)
    return float(value), np.append(slope.ravel(), gap.sum(0) + 2 * penalty * bias)


@dataclass(frozen=True)
class Vector(_PerClass):
    """A factor and an offset per class."""

    kind: Literal["vector"] = field(default="vector", kw_only=True)


@dataclass(frozen=True)
class Matrix(_PerClass):
    """A full matrix and an offset per class."""

    full: ClassVar[bool] = True
    kind: Literal["matrix"] = field(default="matrix", kw_only=True)
