"""Data whose truth is known: each set plants one phenomenon, so that a method that claims to mend it can be checked."""

from __future__ import annotations

import numpy as np
import polars as pl

SHARES = {"train": 60, "valid": 15, "test": 20}  # of 95


def split_column(rows: int) -> list[str]:
    """``train``, ``valid`` and ``test`` for rows in random order, 60 : 15 : 20 by count."""
    train, valid = (round(rows * SHARES[name] / sum(SHARES.values())) for name in ("train", "valid"))
    return ["train"] * train + ["valid"] * valid + ["test"] * (rows - train - valid)


def opposed_tastes(
    users: int = 400, items: int = 400, rank: int = 4, rho: float = 0.0, rows: int = 95_000, seed: int = 0
) -> pl.DataFrame:
    """Two tasks for which the same user wants different items: what one shared vector per id cannot say.

    Item factors v are common, and each task has its own user factors, correlated by ``rho``::

        v, a, n ~ Normal(0, 1)^rank      b = rho a + sqrt(1 - rho^2) n
        label_a ~ Bernoulli(sigmoid(1.2 <a, v> - 0.5))       label_b ~ Bernoulli(sigmoid(1.2 <b, v> - 1.5))

    Args:
        users, items: how many of each; rank: length of their factors.
        rho: 1 gives both tasks the same tastes, 0 unrelated, -1 opposite ones.
        rows: how many distinct (user, item) pairs are drawn.
        seed: fixes everything.

    Returns:
        ``user``, ``item``, ``label_a``, ``label_b`` (integers) and ``split``, in random order within each split.

    Raises:
        ValueError: ``rho`` is outside [-1, 1], or there are not so many pairs.
    """
    if not -1 <= rho <= 1:
        raise ValueError(f"Parameter `rho` should be in [-1, 1]. Found {rho}.")
    if not 0 < rows <= users * items:
        raise ValueError(f"Parameter `rows` should be between 1 and users * items = {users * items}. Found {rows}.")
    random = np.random.default_rng(seed)
    factors, taste_a, noise = (random.standard_normal((n, rank)) for n in (items, users, users))
    taste_b = rho * taste_a + np.sqrt(1 - rho**2) * noise
    user, item = np.divmod(random.permutation(users * items)[:rows], items)

    def label(taste: np.ndarray, bias: float) -> np.ndarray:
        logit = 1.2 * (taste[user] * factors[item]).sum(axis=1) + bias
        drawn: np.ndarray = random.random(rows) < 1 / (1 + np.exp(-logit))
        return drawn.astype(np.int64)

    labels = {"label_a": label(taste_a, -0.5), "label_b": label(taste_b, -1.5)}
    return pl.DataFrame({"user": user, "item": item, **labels, "split": split_column(rows)})
