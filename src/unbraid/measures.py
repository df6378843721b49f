"""Each metric of one slice of rows, as a function of sums over users (`unbraid.bootstrap`).

Definitions that vary between libraries are stated at `unbraid.evaluate.evaluate`; how AUC becomes such a function, at that
module's head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unbraid.bootstrap import Metric, Table, metric_of, ratio_of
from unbraid.types import Array

BINS = 15  # of ECE: the number in Guo et al. (2017), which most papers keep
NAMES = {
    "binary": ("auc", "gauc", "logloss", "calibration", "ece", "ece_mass", "accuracy"),
    "multiclass": ("accuracy", "logloss", "ece"),
    "real": ("rmse", "mae"),
}
RANKING = ("ndcg", "recall")  # at each cut-off, of binary tasks of a log with requests
LEAST = 10  # a binary metric that rests on fewer positives or negatives is withheld


@dataclass(frozen=True)
class TaskRows:
    """Rows that count for one task.  Those of a binary task stand in ascending order of their logit.

    Args:
        z: (n,) or (n, K) logits; y: (n,) labels; w: (n,) weights, 1/rate included.
        user: (n,) dense codes; domain: (n,) codes; request: (n,) dense codes of (user, request), -1 none, or None.
        sampled: were negatives sampled?
    """

    z: Array
    y: Array
    w: Array
    user: Array
    domain: Array
    request: Array | None
    sampled: bool

    def take(self, index: Array) -> TaskRows:
        """The rows at an ascending index."""
        request = None if self.request is None else self.request[index]
        z, y, w, user, domain = (part[index] for part in (self.z, self.y, self.w, self.user, self.domain))
        return TaskRows(z, y, w, user, domain, request, self.sampled)


def measure_slice(rows: TaskRows, kind: str, at: Sequence[int]) -> Table:
    """All metrics of one slice."""
    users, user = dense_codes(rows.user)
    if kind == "binary":
        metrics = _binary(rows, user, len(users), at)
    else:
        metrics = (_multiclass if kind == "multiclass" else _real)(rows, user, len(users))
    return Table(users, metrics)


def _binary(rows: TaskRows, user: Array, users: int, at: Sequence[int]) -> dict[str, Metric | str]:
    names = [*NAMES["binary"]]
    if rows.request is not None:
        names += [f"{name}@{k}" for name in RANKING for k in at]
    if why := _few(int(rows.y.sum()), len(rows.y)):
        return dict.fromkeys(names, why)
    y, w, z = rows.y, rows.w, rows.z.astype(float)
    total = np.bincount(user, w, users)
    tail = np.exp(-np.abs(z))
    loss = w * (np.log1p(tail) + np.where(y, np.maximum(-z, 0), np.maximum(z, 0)))  # softplus without overflow
    p = np.where(z >= 0, 1, tail) / (1 + tail)
    positive, right = np.where(y, w, 0.0), np.where((z >= 0) == y, w, 0.0)
    metrics: dict[str, Metric | str] = {
        "auc": _auc(rows, user, users),
        "gauc": _gauc(rows, user, users, total),
        "logloss": metric_of(ratio_of, np.bincount(user, loss, users), total),
        "calibration": metric_of(ratio_of, np.bincount(user, w * p, users), np.bincount(user, positive, users)),
        "ece": _ece(p, w * (p - y), user, users, total),
        "ece_mass": _ece(mid_ranks(w, run_starts(rows.z)) / w.sum(), w * (p - y), user, users, total),
        "accuracy": metric_of(ratio_of, np.bincount(user, right, users), total),
    }
    return metrics if rows.request is None else metrics | _ranking(rows, user, users, at)


def _multiclass(rows: TaskRows, user: Array, users: int) -> dict[str, Metric | str]:
    if not len(rows.y):
        return dict.fromkeys(NAMES["multiclass"], "no observed rows")
    z, w, total = rows.z.astype(float), rows.w, np.bincount(user, rows.w, users)
    z -= z.max(1, keepdims=True)
    norm = np.exp(z).sum(1)
    right = z.argmax(1) == rows.y
    loss = np.log(norm) - np.take_along_axis(z, rows.y[:, None], 1)[:, 0]
    return {
        "accuracy": metric_of(ratio_of, np.bincount(user, w * right, users), total),
        "logloss": metric_of(ratio_of, np.bincount(user, w * loss, users), total),
        "ece": _ece(1 / norm, w * (1 / norm - right), user, users, total),
    }


def _real(rows: TaskRows, user: Array, users: int) -> dict[str, Metric | str]:
    if not len(rows.y):
        return dict.fromkeys(NAMES["real"], "no observed rows")
    error, total = rows.z.astype(float) - rows.y, np.bincount(user, rows.w, users)
    return {
        "rmse": metric_of(_root, np.bincount(user, rows.w * error**2, users), total),
        "mae": metric_of(ratio_of, np.bincount(user, rows.w * np.abs(error), users), total),
    }


def _few(positives: int, rows: int, of: str = "") -> str:
    """The reason to withhold a metric that rests on these rows, or an empty string."""
    if not rows:
        return f"no observed rows{of}"
    if min(positives, rows - positives) >= LEAST:
        return ""
    return f"{positives:,} positives and {rows - positives:,} negatives{of}; at least {LEAST} of each are needed"


def _root(t: Array) -> Array:
    return np.sqrt(t[0] / t[1])


def _gaps(t: Array) -> Array:
    return np.abs(t[:-1]).sum(0) / t[-1]


def _ece(place: Array, gap: Array, user: Array, users: int, total: Array) -> Metric:
    """From what bins are of, p or its rank, in [0, 1] (n,), and the weighted p - y (n,).

    A user's gaps of one bin add up, the bins' absolute gaps do not.
    """
    cell = user * BINS + np.minimum((place * BINS).astype(np.int64), BINS - 1)
    return metric_of(_gaps, np.bincount(cell, gap, users * BINS).reshape(users, BINS), total)


def _auc(rows: TaskRows, user: Array, users: int) -> Metric:
    """The linearised AUC of the module docstring; at weights of one it is the AUC itself."""
    positive, negative = np.where(rows.y, rows.w, 0.0), np.where(rows.y, 0.0, rows.w)
    changes, up, down = run_starts(rows.z), positive.sum(), negative.sum()
    above = positive * mid_ranks(negative, changes) / down
    under = negative * (1 - mid_ranks(positive, changes) / up)
    value = above.sum() / up

    def linear(t: Array) -> Array:
        return np.clip(t[0] / t[1] + t[2] / t[3] - value, 0, 1)

    return metric_of(linear, *(np.bincount(user, column, users) for column in (above, positive, under, negative)))


def _gauc(rows: TaskRows, user: Array, users: int, total: Array) -> Metric | str:
    """Each user's own AUC, weighted by all the user's rows (as defined in arXiv 2308.13537, section 5)."""
    n = len(user)
    order = np.sort(user * n + np.arange(n)) % n  # by user, then score; sorting keys beats a stable argsort
    user, y, w = user[order], rows.y[order], rows.w[order]
    positive, negative = np.where(y, w, 0.0), np.where(y, 0.0, w)
    first = run_starts(user)
    wins = np.bincount(user, positive * mid_ranks(negative, first | run_starts(rows.z[order])), users)
    up, down = np.bincount(user, positive, users), np.bincount(user, negative, users)
    before = np.cumsum(down) - down  # negatives of earlier users, which `mid_ranks` has counted too
    positives, count = np.bincount(user, y, users), np.bincount(user, minlength=users)
    both = (positives > 0) & (positives < count)
    if why := _few(int(positives[both].sum()), int(count[both].sum()), " in users with both classes"):
        return why
    own = np.divide(wins - up * before, up * down, out=np.zeros(users), where=both)
    return metric_of(ratio_of, own * total, np.where(both, total, 0.0))


def _ranking(rows: TaskRows, user: Array, users: int, at: Sequence[int]) -> dict[str, Metric | str]:
    """NDCG and recall, from rows in order of (request, descending score)."""
    assert rows.request is not None
    names = [f"{name}@{k}" for name in ("ndcg", "recall") for k in at]
    if rows.sampled:
        return dict.fromkeys(names, "negatives were sampled, so the ranks in the full request are not known")
    has = np.flatnonzero(rows.request >= 0)[::-1]  # reversed: descending score
    ids, request = dense_codes(rows.request[has])
    n, m = len(has), len(ids)
    order = np.sort(request * n + np.arange(n)) % n if n else request
    row, request = has[order], request[order]
    y, first = rows.y[row], run_starts(request)
    size, positives = np.bincount(request, minlength=m), np.bincount(request, y, m)
    useful = positives > 0
    if why := _few(int(y.sum()), int(size[useful].sum()), " in requests with a positive"):
        return dict.fromkeys(names, why)
    place = np.arange(n) - np.repeat(np.flatnonzero(first), size)
    gain = _mean_of_run(y, first | run_starts(rows.z[row]))
    weight = np.where(useful, np.bincount(request, rows.w[row], m) / size, 0.0)
    owner = user[row][first]
    count = np.bincount(owner, weight, users)
    metrics: dict[str, Metric | str] = {}
    for k in at:
        discount = 1 / np.log2(np.arange(2, k + 2))
        top = np.flatnonzero(place < k)
        best = np.cumsum(discount)[np.clip(positives.astype(np.int64), 1, k) - 1]
        dcg = np.bincount(request[top], gain[top] * discount[place[top]], m) / best
        recall = np.bincount(request[top], gain[top], m) / np.maximum(positives, 1)
        for name, value in (("ndcg", dcg), ("recall", recall)):
            metrics[f"{name}@{k}"] = metric_of(ratio_of, np.bincount(owner, weight * value, users), count)
    return {name: metrics[name] for name in names}


# -------------------------------------------------------------------------------------------------------------- arrays
def ascending_order(score: Array) -> Array:
    """(N,) argsort.  A float32 and its row number fit one 64-bit key, and sorting keys is faster than `np.argsort`."""
    n = len(score)
    if score.dtype != np.float32 or n >= 2**32:
        return np.argsort(score, kind="stable")
    bits = np.ascontiguousarray(score).view(np.int32)
    key = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64)  # integers in the order of the floats
    key <<= 32
    key |= np.arange(n)
    key.sort()
    key &= 0xFFFFFFFF
    return key


def dense_codes(codes: Array) -> tuple[Array, Array]:
    """Sorted distinct values (U,) and the index (N,) of each code among them."""
    small = len(codes) > 0 and codes.dtype.kind in "iu" and codes.min() >= 0 and codes.max() < 4 * len(codes)
    if not small:
        values, index = np.unique(codes, return_inverse=True)
        return values, index.reshape(-1)
    seen = np.zeros(int(codes.max()) + 1, bool)  # no sort: a table of what occurs
    seen[codes] = True
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[codes]


def run_starts(values: Array) -> Array:
    """(n,) True at the first row of each run of equal values."""
    first = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return first


def mid_ranks(weight: Array, first: Array) -> Array:
    """(n,) weight of the rows before a row's run, plus half of the run's: a mid-rank.  ``first`` starts the runs."""
    upto = np.concatenate(([0.0], np.cumsum(weight)))
    if first.all():
        return (upto[1:] + upto[:-1]) / 2
    edges = np.append(np.flatnonzero(first), len(weight))
    return np.repeat((upto[edges[1:]] + upto[edges[:-1]]) / 2, np.diff(edges))


def _mean_of_run(y: Array, first: Array) -> Array:
    """(n,) mean of ``y`` in a row's run."""
    starts = np.flatnonzero(first)
    size = np.diff(np.append(starts, len(y)))
    return np.repeat(np.add.reduceat(y.astype(float), starts) / size, size)
