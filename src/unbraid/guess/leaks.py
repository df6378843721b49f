"""How much one column tells about a label."""

from __future__ import annotations

import numpy as np
import polars as pl

SURE = 0.95  # a single column that ranks a label so well is taken for an outcome
SUSPECT = 0.85  # one that is worth a word
ROWS = 50_000  # that are looked at
TOGETHER = 0.9  # of the rows that lack the label or the column lack both
FEW = 20  # rows of a class, below which nothing is said


def single_auc(values: pl.Series, yes: np.ndarray, number: bool) -> float:
    """How well one column ranks a label, from 0.5 to 1.

    Args:
        values: (n,) of any flat type; yes: (n,) bool.
        number: rank by the value (nulls below all); else by the label's mean per value, learnt on every other row and
            measured on the rest, so that rare values cannot tell their own label.
    """
    if number:
        score = values.cast(pl.Float64).fill_nan(None)
        low = float(score.min() or 0.0) - 1.0  # type: ignore[arg-type]
        found = _auc(score.fill_null(low).to_numpy(), yes)
        return max(found, 1.0 - found)
    frame = pl.DataFrame({"v": values, "y": yes.astype(float)})
    learn, measure = frame.gather_every(2), frame.gather_every(2, 1)
    means = learn.group_by("v").agg(m=(pl.col("y").sum() + yes.mean()) / (pl.len() + 1))
    scored = measure.join(means, on="v", how="left", nulls_equal=True, maintain_order="left")
    return _auc(scored["m"].fill_null(float(yes.mean())).to_numpy(), scored["y"].to_numpy() > 0)


def _auc(score: np.ndarray, yes: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counted half; 0.5 if there is only one class."""
    positives, negatives = int(yes.sum()), int((~yes).sum())
    if not positives or not negatives:
        return 0.5
    ranks = pl.Series(score).rank("average").to_numpy()
    return float((ranks[yes].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def rank_correlation(a: pl.Series, b: pl.Series) -> float:
    """Spearman's, over rows where both are known."""
    frame = pl.DataFrame({"a": a.cast(pl.Float64), "b": b.cast(pl.Float64)}).drop_nulls()
    return float(frame.select(pl.corr("a", "b", method="spearman")).item() or 0.0)


def tells(values: pl.Series, yes: pl.Series, number: bool) -> tuple[float, float]:
    """(AUC of the column, AUC of whether it is filled) for a yes or no; 0.5 where a class has too few rows.

    Args:
        values, yes: (n,), rows whose label is known; number: as of `single_auc`.
    """
    step = -(-len(values) // ROWS) or 1
    values, y = values.gather_every(step), yes.gather_every(step).to_numpy()
    if min(y.sum(), (~y).sum()) < FEW:
        return 0.5, 0.5
    return single_auc(values, y, number), single_auc(values.is_not_null(), y, True)


def together(values: pl.Series, known: pl.Series) -> bool:
    """Is a column missing where the label is, and hardly elsewhere?  ``known``: (n,) rows with a label."""
    both, either = int((values.is_null() & ~known).sum()), int((values.is_null() | ~known).sum())
    return both >= FEW and both >= TOGETHER * either


def follows_item(values: pl.Series, items: pl.Series) -> bool:
    """Is a column rather the item's than the row's?  Then it would stay behind where a negative gets another item."""
    frame = pl.DataFrame({"v": values, "i": items}).drop_nulls()
    seen = frame.group_by("i").agg(n=pl.len(), top=pl.col("v").unique_counts().max()).filter(pl.col("n") > 1)
    if not len(seen):
        return False
    alike = (frame["v"].value_counts(sort=True)["count"][0] - 1) / max(len(frame) - 1, 1)
    same, pairs = int(seen["top"].sum()) - len(seen), int(seen["n"].sum()) - len(seen)
    return same / pairs > alike + 0.1
