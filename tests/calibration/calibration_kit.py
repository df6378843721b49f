"""Scores made by hand, and worlds in which source and target differ in a known way."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit, softmax

from unbraid.types import Scores, Task

Array = np.ndarray
MULTI, BINARY, REAL = Task("t", kind="multiclass"), Task("t"), Task("t", kind="real")


def scores(
    logits: Any, labels: Any, hidden: Any = None, *, observed: Any = None, weight: Any = None, **meta: Any
) -> Scores:
    """Rows of one task named t, in one domain."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    n = len(labels)
    known = np.ones(n, bool) if observed is None else np.asarray(observed)
    features = {} if hidden is None else {"t": np.asarray(hidden)}
    return Scores(
        {"t": logits},
        features,
        {"t": labels},
        {"t": known},
        np.full(n, 2),
        weight,
        np.arange(n),
        np.arange(n),
        meta=meta,
    )


def drawn(rng: np.random.Generator, p: Array) -> Array:
    """(N, K) probabilities -> (N,) classes."""
    return (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)


def shifted_world(seed: int, sizes: tuple[int, int, int] = (2000, 1000, 2000)) -> tuple[Scores, Scores, Scores]:
    """Four classes whose labels are the noisier the further right a row is; the target is shifted right by 1.

    Returns train, held-out and target rows; the model's logits are three times the best ones of the left.
    """
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(5, 4))

    def side(n: int, shift: float) -> Scores:
        x = rng.normal(size=(n, 5))
        x[:, 0] += shift
        heat = 1 + 2.5 * expit(2 * (x[:, 0] - 0.5))
        return scores(3 * x @ mix, drawn(rng, softmax(x @ mix / heat[:, None], axis=1)), x)

    return side(sizes[0], 0), side(sizes[1], 0), side(sizes[2], 1)


def rare_world(seed: int, sizes: tuple[int, int, int]) -> tuple[Scores, Scores, Scores]:
    """Rare positives (1.8 % of the source, 4.2 % of the target): the model sees a third of what the shifted feature does."""
    rng = np.random.default_rng(seed)

    def side(n: int, shift: float) -> Scores:
        x = rng.normal(size=(n, 4))
        x[:, 0] += shift
        label = (rng.random(n) < expit(-4.9 + 1.2 * x[:, 0] + 0.7 * x[:, 1])) + 0.0
        return scores(-4.35 + 0.4 * x[:, 0] + 0.7 * x[:, 1], label, x)

    return side(sizes[0], 0), side(sizes[1], 0), side(sizes[2], 0.8)
