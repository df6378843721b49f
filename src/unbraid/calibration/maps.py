"""What a fitted calibrator is: a map from logits to calibrated logits, with the numbers and warnings of its fit.

Logits stay logits, so that metrics, tables and rankings read a calibrated model as they read any other: the probabilities
are the sigmoid (binary) or softmax (multiclass) of what the map returns.  A map has no parameters left to fit and knows
nothing of the method that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy

from unbraid.types import State

Array = np.ndarray


@dataclass(frozen=True)
class Affine:
    """``slope * z + intercept`` for logits (N,) or (N, K): a temperature is the slope 1/T."""

    slope: float
    intercept: float = 0.0

    def __call__(self, logits: Array) -> Array:
        """Of one shape with ``logits``."""
        return self.slope * np.asarray(logits, np.float64) + self.intercept


@dataclass(frozen=True)
class Linear:
    """``z @ weight.T + bias`` for logits (N, K)."""

    weight: Array
    bias: Array

    def __call__(self, logits: Array) -> Array:
        """(N, K)."""
        return np.asarray(logits, np.float64) @ self.weight.T + self.bias


@dataclass(frozen=True)
class Curves:
    """One curve per class of its probability by its score; a binary task has one, of the logit.

    A binary score is the logit.  The score of class k is its log-odds against all others, ``log p_k / (1 - p_k)``; the K
    curves' values are divided by their sum.

    Args:
        scores: for each curve (M,) ascending places; values: for each (M,) probabilities inside (0, 1).
        smooth: straight lines between places, or steps: a score has the value of the last place that is not above it.
    """

    scores: tuple[Array, ...]
    values: tuple[Array, ...]
    smooth: bool

    def __call__(self, logits: Array) -> Array:
        """Of one shape with ``logits``."""
        if len(self.scores) == 1:
            return scipy.special.logit(self._curve(0, np.asarray(logits, np.float64)))
        columns = against_others(logits)
        p = np.stack([self._curve(k, columns[:, k]) for k in range(len(self.scores))], 1)
        return np.log(p / p.sum(1, keepdims=True))

    def _curve(self, k: int, score: Array) -> Array:
        places, values = self.scores[k], self.values[k]
        if self.smooth:
            return np.interp(score, places, values)
        return values[np.clip(np.searchsorted(places, score, side="right") - 1, 0, None)]


def against_others(logits: Array) -> Array:
    """(N, K) logits -> (N, K) log-odds of each class against all others, without overflow."""
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
    with np.errstate(divide="ignore"):
        return log_p - np.log(np.maximum(-np.expm1(log_p), np.finfo(np.float64).tiny))


def confidence(logits: Array) -> Array:
    """(N, K) logits -> (N,) the largest probability."""
    return scipy.special.softmax(np.asarray(logits, np.float64), axis=1).max(1)


Map = Affine | Linear | Curves
_MAPS: Mapping[str, Callable[..., Any]] = {"affine": Affine, "linear": Linear, "curves": Curves}


@dataclass(frozen=True)
class Calibration:
    """A fitted calibrator of one task.

    Args:
        map: logits -> calibrated logits.
        numbers: what the fit found (a temperature, the mean weight, ...), by the name that tables print.
        warnings: what speaks against it.
    """

    map: Map
    numbers: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __call__(self, logits: Array) -> Array:
        """(N,) or (N, K) logits -> calibrated logits of the same shape, float64."""
        return self.map(logits)

    def state_dict(self) -> State:
        """For `unbraid.store`."""
        name = type(self.map).__name__.lower()
        return {"map": name, **vars(self.map), "numbers": dict(self.numbers), "warnings": self.warnings}

    @classmethod
    def load(cls, state: State) -> Calibration:
        """From `state_dict`.  Raises ValueError for a map that this version does not know."""
        state = dict(state)
        name, numbers, warnings = (state.pop(key, None) for key in ("map", "numbers", "warnings"))
        if name not in _MAPS:
            raise ValueError(f"A calibrator should hold one of the maps {', '.join(_MAPS)}. Found {name}.")
        return cls(_MAPS[name](**state), numbers or {}, tuple(warnings or ()))
