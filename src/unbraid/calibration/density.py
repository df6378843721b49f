"""How much likelier each source row is in the target: the density ratio w(x) = q(x) / p(x), by telling the two apart.

A logistic regression on features learns P(source | x) from source rows (label 1) and target rows (label 0).  With even prior
odds, Bayes' rule gives ``w(x) = P(target | x) / P(source | x)`` (Sugiyama, Suzuki and Kanamori, *Density Ratio Estimation in
Machine Learning*, 2012).  The mean of w over source rows estimates 1, and the mean of w times a loss over source rows
estimates the mean loss over target rows, as far as the source covers the target at all.

Prior odds are made even in one of two ways.  ``weight`` (the default) lets the rows of the smaller side weigh more, so that
both sides have the total of the larger one.  ``resample`` draws the smaller side with replacement up to the size of the
larger one, as the code of TransCal does; ``weight`` is its expectation, without its noise and without a dependence on the
order of the rows.

*Support shift.*  Where the source never goes there is nothing to weight, and no estimate from weights is worth anything.  It
shows: the mean of w leaves 1, or a handful of rows carry all the weight.  `Support` measures both.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np

Array = np.ndarray
MEAN_RANGE = (0.5, 2.0)  # a mean weight outside is no estimate of 1
LEAST_SHARE = 0.05  # of the rows, that the effective sample size should not fall below
LARGEST = 50.0  # |log w|: beyond it (5e21) sums of squares would lose everything else


@dataclass(frozen=True)
class DensityRatio:
    """A fitted ratio: ``log w(x) = -(x @ coefficient + intercept)``.

    Args:
        coefficient: (D,) of the log-odds that a row is of the source; intercept: of the same.
    """

    coefficient: Array
    intercept: float

    def __call__(self, features: Array) -> Array:
        """(N, D) features -> (N,) w = q(x) / p(x), positive.  Raises ValueError for features of another width."""
        x = _features(features, "The features to weight")
        if x.shape[1] != len(self.coefficient):
            raise ValueError(f"The ratio was fitted on {len(self.coefficient)} features. Found {x.shape[1]}.")
        return np.exp(np.clip(-(x @ self.coefficient + self.intercept), -LARGEST, LARGEST))


def density_ratio(
    source: Array, target: Array, *, balance: Literal["weight", "resample"] = "weight", seed: int = 0, strength: float = 1.0
) -> DensityRatio:  # fmt: skip
    """The ratio of target to source density, from features of both.

    Args:
        source: (N, D) features of source rows; target: (M, D) of target rows, from the same model.
        balance: how a smaller side is made to count as much as the larger (module docstring).
        seed: of the draws of ``resample``; ``weight`` has none.
        strength: inverse of the L2 penalty on the coefficients (scikit-learn's ``C``).

    Raises:
        ValueError: an empty side, widths that differ, values that are not finite, a parameter out of range.
    """
    from sklearn.linear_model import LogisticRegression

    if balance not in ("weight", "resample"):
        raise ValueError(f"Parameter `balance` should be weight or resample. Found {balance}.")
    if not 0 < strength < float("inf"):
        raise ValueError(f"Parameter `strength` should be positive and finite. Found {strength}.")
    source, target = _features(source, "Source features"), _features(target, "Target features")
    if source.shape[1] != target.shape[1]:
        raise ValueError(
            f"Source rows have {source.shape[1]} features and target rows {target.shape[1]}. Both should be from one model."
        )
    larger = max(len(source), len(target))
    if balance == "resample":
        draw = np.random.default_rng(seed)
        source, target = (
            side if len(side) == larger else side[draw.integers(0, len(side), larger)] for side in (source, target)
        )
    x, sides = np.concatenate([source, target]), (len(source), len(target))
    label = np.repeat([1, 0], sides)
    weight = np.repeat([larger / size for size in sides], sides)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fit that did not converge is no fit
        try:  # Newton's method: the default solver's objective, to full precision in a few steps
            fitted = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10, max_iter=200)
            fitted.fit(x, label, sample_weight=weight)
        except Warning as warning:
            raise ValueError(
                f"The regression of source against target did not converge ({warning}). Features may be of very different "
                "scales: standardise them, or lower `strength`."
            ) from None
    return DensityRatio(fitted.coef_[0].astype(np.float64), float(fitted.intercept_[0]))


def _features(features: Array, what: str) -> Array:
    """(N, D) float64.  Raises ValueError."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{what} should be an array of rows and features, neither empty. Found shape {x.shape}.")
    if bad := int((~np.isfinite(x)).any(1).sum()):
        raise ValueError(f"{what} should be finite. Found {bad:,} rows of {len(x):,} that are not.")
    return x


@dataclass(frozen=True)
class Support:
    """How well source rows cover the target, from their weights.

    Args:
        rows: how many rows were weighted; mean: of the weights, near 1 where the ratio is right.
        effective: (sum w)^2 / sum w^2, how many rows of equal weight would say as much; largest: the largest weight.
    """

    rows: int
    mean: float
    effective: float
    largest: float

    @classmethod
    def of(cls, weights: Array) -> Support:
        """From (N,) weights.  Raises ValueError when there are none, or one is negative or not finite."""
        w = np.asarray(weights, np.float64)
        if w.ndim != 1 or not len(w) or not (np.isfinite(w) & (w >= 0)).all() or not w.any():
            raise ValueError("Weights should be at least one finite number of 0 or more, not all 0. Found others.")
        return cls(len(w), float(w.mean()), float(w.sum() ** 2 / (w**2).sum()), float(w.max()))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against any estimate that these weights make; empty if nothing does."""
        found = []
        low, high = MEAN_RANGE
        if not low <= self.mean <= high:
            found.append(
                f"the mean weight is {self.mean:.3g}, not near 1 ({low:g} to {high:g}): the target has rows the like of "
                "which the source does not have"
            )
        if self.effective < LEAST_SHARE * self.rows:
            found.append(
                f"{self.rows:,} source rows are worth {self.effective:,.1f} (below {LEAST_SHARE:.0%}): a few rows decide the "
                "estimate"
            )
        return tuple(found)
