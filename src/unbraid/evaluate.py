"""Metrics of every task in every domain, each with an interval from a bootstrap over users.

A metric here is a small function of *sums over users*: per user a few numbers are added up once, and a bootstrap
replicate weights the users, adds up again and applies the same function.  20M rows and 500 replicates therefore cost
one matrix product of (users, sums) with (users, replicates), not 500 evaluations.

* Rows of one user are not independent, so users are drawn, not rows (Field and Welsh, 2007).  A user is drawn
  Poisson(1) times instead of multinomially (Chamandy et al., 2012): users become independent and are drawn in blocks.
* Log-loss, calibration, accuracy, MAE and RMSE are ratios of sums (RMSE its root), gAUC is a ratio once each user's own
  AUC is known, and ECE needs one sum per bin.  NDCG and recall are averages over requests, which nest in users.  All
  these replicates are exact.  Bins of equal weight stay those of the whole sample.
* AUC is a ratio of sums over *pairs* of rows, and the pairs of two users are weighted by the product of their draws.
  It is replaced by its two-sample linearisation (Hajek projection; DeLong et al., 1988): with V(i) the share of
  negatives below positive i and V(j) the share of positives above negative j,
  ``AUC* = mean*_pos V(i) + mean*_neg V(j) - AUC``, a function of four sums per user.  What is dropped is the product of
  the two samples' fluctuations, of order 1/users where the interval's width is of order 1/sqrt(users); an exact
  replicate would read all rows again.
* ECE adds absolute values, so resampling inflates it: its interval can lie above the value.

Definitions that vary between libraries are stated at `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, factorial
from typing import Any, NamedTuple

import numpy as np

from unbraid.types import FIRST_VALUE, NO_DOMAIN, Schema, Scores, Task

Array = np.ndarray
Metrics = dict[str, Any]

BINS = 15  # of ECE: the number in Guo et al. (2017), which most papers keep
NAMES = {
    "binary": ("auc", "gauc", "logloss", "calibration", "ece", "ece_mass", "accuracy"),
    "multiclass": ("accuracy", "logloss", "ece"),
    "real": ("rmse", "mae"),
}
RANKING = ("ndcg", "recall")  # at each cut-off, of binary tasks of a log with requests
LEAST = 10  # a binary metric that rests on fewer positives or negatives is withheld
BLOCK = 1024  # users drawn at once: with 500 replicates 2 MB of float32, which stays in the cache


# --------------------------------------------------------------------------------------------------------------- public
def evaluate(
    scores: Scores, schema: Schema, *, at: Sequence[int] = (5, 10), replicates: int = 500, seed: int = 0,
    confidence: float = 0.95,
) -> Metrics:  # fmt: skip
    """Metrics of each task, overall and per domain, with bootstrap intervals over users.

    Only observed rows of positive weight count, and a weight of 2 counts like two equal rows (except in NDCG and
    recall).  Where ``scores.meta`` has ``sampling_rate.TASK``, the share of negatives that the log kept, each row of
    label 0 weighs 1/rate times as much: the metrics then estimate those of the full log, to which the model is
    calibrated.

    * binary: ``auc`` (Mann-Whitney, a tie counts half); ``gauc`` (mean of the users' own AUCs, weighted by all rows of
      the user, over users with both classes); ``logloss`` (nats, from logits); ``calibration`` (sum of predictions /
      sum of labels); ``ece`` (15 bins of equal width, closed on the left, of the probability of label 1); ``accuracy``
      (the prediction is 1 from p = 0.5 on); ``ece_mass`` (15 bins of equal weight in the order of p, equal p in one bin: where
      few rows are positive nearly all of them are in the first bin of equal width).
    * with ``meta["request"]`` (negative: no request) also ``ndcg@K`` and ``recall@K`` for K in ``at``: means over the
      requests with at least one positive, each weighted by the mean weight of its rows; gain is 0 or 1; recall divides
      by all positives of the request.  Ties in the score give the expected value over random orders (McSherry and
      Najork, 2008).  A request's rows of different users are different requests.  They are withheld where negatives
      were sampled, since a sampled request does not show the ranks of the full one (Krichene and Rendle, 2020).
    * multiclass: ``accuracy``, ``logloss``, ``ece`` (of the confidence in the top class).  real: ``rmse``, ``mae``.

    Args:
        scores: N rows; ``group`` (N,) are the users.  Of a log without users they are its requests (a row of no request is
            alone): requests are then what is drawn, and what ``gauc`` averages over.
        schema: the tasks (in its order; those without logits are skipped) and the names of the domains.
        at: cut-offs of NDCG and recall.
        replicates: bootstrap replicates; 0 gives no intervals.
        seed: same seed and users, same draws: in every task, domain and model scored on these rows.
        confidence: coverage of the percentile interval, in (0, 1).

    Returns:
        ``{task: {metric: {"value", "low", "high"}, ..., "rows", "positives", "domains": {name: {the same}}}}``.  A
        metric that is undefined, or a binary one that rests on fewer than 10 positives or 10 negatives, is null with a
        ``why``.  ``positives`` (unweighted) is None for multiclass and real tasks.  Domains *unknown* and *missing* are
        listed only if they have rows.

    Raises:
        ValueError: logits that are not finite, labels outside the task's, a weight or rate out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"Parameter `confidence` should lie between 0 and 1. Found {confidence}.")
    slices = replicate(scores, schema, at=at, replicates=replicates, seed=seed)
    report: Metrics = {}
    for (task, domain), found in slices.items():
        numbers = {name: _interval(drawn, confidence) for name, drawn in found.metrics.items()}
        entry = {**numbers, "rows": found.rows, "positives": found.positives}
        if domain:
            report[task]["domains"][domain] = entry
        else:
            report[task] = {**entry, "domains": {}}
    return report


@dataclass(frozen=True)
class Drawn:
    """One metric of one slice: its value (None if withheld, with a ``why``) and (R,) its bootstrap replicates.

    A replicate in which the metric is undefined (a class was not drawn) is NaN; without users to draw there are none.
    """

    value: float | None
    draws: Array
    why: str = ""


@dataclass(frozen=True)
class Slice:
    """Metrics of one task in one domain, or in all; ``positives`` is None for multiclass and real tasks."""

    metrics: dict[str, Drawn]
    rows: int
    positives: int | None


def replicate(
    scores: Scores, schema: Schema, *, at: Sequence[int] = (5, 10), replicates: int = 500, seed: int = 0
) -> dict[tuple[str, str], Slice]:
    """(task, domain) -> every metric with its bootstrap replicates; domain ``""`` is the whole task, and comes first.

    Arguments and errors as `evaluate`, whose intervals are made of these.  Replicate r draws the same users in every
    slice, and in every call on scores of the same users with the same seed: differences between models are paired.
    """
    if replicates < 0 or any(k < 1 for k in at):
        raise ValueError(f"`replicates` should be 0 or more and `at` positive. Found {replicates} and {tuple(at)}.")
    everyone, user = _dense(np.asarray(scores.group))
    asked = scores.meta.get("request")
    request = None if asked is None else request_codes(asked, user)
    names = tuple(scores.domains or schema.domains)
    found: dict[tuple[str, str], Slice] = {}
    for task in schema.tasks:
        if task.name not in scores.logits:
            continue
        rows = _rows(scores, task, user, request)
        parts = [("", rows), *_by_domain(rows, names)]
        tables = [_measure(part, task.kind, at) for _, part in parts]
        totals = _totals(tables, len(everyone), replicates, seed)
        for (domain, part), table, total in zip(parts, tables, totals, strict=True):
            positives = int(part.y.sum()) if task.kind == "binary" else None
            found[task.name, domain] = Slice(_drawn(table, total), len(part.y), positives)
    return found


def auc(score: Array, label: Array, weight: Array | None = None) -> float:
    """Probability that a positive row scores above a negative one, a tie counting half; NaN if a class is absent.

    Args:
        score: (N,) any increasing function of the prediction.
        label: (N,) 0 or 1; weight: (N,) or None.
    """
    order = _ascending(np.asarray(score))
    y = np.asarray(label)[order].astype(bool)
    w = np.ones(len(y)) if weight is None else np.asarray(weight, float)[order]
    positive, negative = np.where(y, w, 0.0), np.where(y, 0.0, w)
    with np.errstate(invalid="ignore"):
        return float(positive @ _below(negative, _changes(np.asarray(score)[order])) / positive.sum() / negative.sum())


def user_means(
    columns: Mapping[str, Array], user: Array, *, replicates: int = 500, seed: int = 0, confidence: float = 0.95
) -> Metrics:
    """Mean of each (n,) column over its rows, with a percentile interval from one bootstrap over users.

    Args:
        columns: name -> (n,) finite numbers; user: (n,) the row's user, any numbers.
        replicates, seed, confidence: as in `evaluate`.  All columns share the draws, so that a column of differences is
            compared in pairs.

    Returns:
        ``{name: {"value", "low", "high"}}``; without an interval (one user, no replicates) also ``why``.
    """
    users, own = _dense(np.asarray(user))
    size = np.bincount(own, minlength=len(users)).astype(float)
    metrics = {name: _metric(_ratio, np.bincount(own, each, len(users)), size) for name, each in columns.items()}
    table = _Table(np.arange(len(users)), metrics)
    (totals,) = _totals([table], len(users), replicates, seed)
    return {name: _interval(drawn, confidence) for name, drawn in _drawn(table, totals).items()}


# ----------------------------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True)
class _Rows:
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

    def take(self, index: Array) -> _Rows:
        """The rows at an ascending index."""
        request = None if self.request is None else self.request[index]
        z, y, w, user, domain = (part[index] for part in (self.z, self.y, self.w, self.user, self.domain))
        return _Rows(z, y, w, user, domain, request, self.sampled)


def _rows(scores: Scores, task: Task, user: Array, request: Array | None) -> _Rows:
    """Collect, check and (binary) sort the rows of a task; sorting once serves every domain."""
    keep = np.asarray(scores.observed[task.name], bool)
    if scores.weight is not None:
        weight = np.asarray(scores.weight, float)
        if not (np.isfinite(weight) & (weight >= 0)).all():
            raise ValueError("Weights should be finite and at least 0. Found others.")
        keep = keep & (weight > 0)
    index = np.flatnonzero(keep)
    z = np.asarray(scores.logits[task.name])[index]
    if (bad := int((~np.isfinite(z)).sum())) > 0:
        raise ValueError(f"Logits of task `{task.name}` should be finite. Found {bad} that are not.")
    if task.kind == "binary":
        order = _ascending(z)
        index, z = index[order], z[order]
    y = _labels(np.asarray(scores.labels[task.name])[index], task, z)
    w = np.ones(len(index)) if scores.weight is None else weight[index]
    rate = scores.meta.get(f"sampling_rate.{task.name}") if task.kind == "binary" else None
    sampled = False
    if rate is not None:
        kept = np.asarray(rate, float)[index]
        if not ((kept > 0) & (kept <= 1)).all():
            raise ValueError(f"Sampling rates of task `{task.name}` should lie in (0, 1]. Found others.")
        w, sampled = np.where(y, w, w / kept), bool((kept < 1).any())
    domain = np.asarray(scores.domain)[index]
    return _Rows(z, y, w, user[index], domain, None if request is None else request[index], sampled)


def _labels(y: Array, task: Task, z: Array) -> Array:
    """(n,) labels as bool, int64 or float64; raises ValueError for a value that the task does not know."""
    if task.kind == "real":
        good, y = np.isfinite(y), y.astype(float)
    else:
        classes = 2 if task.kind == "binary" else z.shape[1]
        whole = y.astype(np.int64)
        good = (whole == y) & (whole >= 0) & (whole < classes)
        y = whole.astype(bool) if task.kind == "binary" else whole
    if not good.all():
        raise ValueError(f"{int((~good).sum())} observed labels of task `{task.name}` are no {task.kind} label.")
    return y


def request_codes(request: Array, user: Array | None) -> Array:
    """(N,) dense codes of (user, request), so that requests nest in users; -1 where ``request`` is negative: there is none.

    Args:
        request: (N,) any numbers; user: (N,) any numbers, or None: all rows are one user's.
    """
    request = np.asarray(request)
    values, code = _dense(request)
    pair = code if user is None else _dense(_dense(np.asarray(user))[1] * max(len(values), 1) + code)[1]
    return np.where(request >= 0, pair, -1)


def _by_domain(rows: _Rows, names: Sequence[str]) -> Iterator[tuple[str, _Rows]]:
    """The rows of each domain, in the order of its code; none where the log has no domains."""
    if tuple(names[FIRST_VALUE:]) == (NO_DOMAIN,):
        return
    counts = np.bincount(rows.domain, minlength=len(names))
    if len(counts) > len(names):
        raise ValueError(f"Domain codes should be below {len(names)}, the number of names. Found {len(counts) - 1}.")
    short = rows.domain.astype(np.int16) if len(names) < 2**15 else rows.domain
    order, ends = np.argsort(short, kind="stable"), np.cumsum(counts)  # 16 bits: a radix sort; stable: ascending rows
    for code, name in enumerate(names):
        if counts[code] or code >= FIRST_VALUE:
            yield name, rows.take(order[ends[code] - counts[code] : ends[code]])


def _ascending(score: Array) -> Array:
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


def _dense(codes: Array) -> tuple[Array, Array]:
    """Sorted distinct values (U,) and the index (N,) of each code among them."""
    small = len(codes) > 0 and codes.dtype.kind in "iu" and codes.min() >= 0 and codes.max() < 4 * len(codes)
    if not small:
        values, index = np.unique(codes, return_inverse=True)
        return values, index.reshape(-1)
    seen = np.zeros(int(codes.max()) + 1, bool)  # no sort: a table of what occurs
    seen[codes] = True
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[codes]


# -------------------------------------------------------------------------------------------------------------- metrics
class _Metric(NamedTuple):
    """A metric as a function of sums: ``of`` maps totals (m, R) to values (R,); ``sums`` (U, m) adds up per user."""

    value: float
    sums: Array
    of: Callable[[Array], Array]


class _Table(NamedTuple):
    """Metrics of one slice; a reason in place of one that is withheld.  ``users`` (U,) own the rows of the sums."""

    users: Array
    metrics: Mapping[str, _Metric | str]


def _metric(of: Callable[[Array], Array], *columns: Array) -> _Metric:
    """From per-user columns (U,) or (U, m).  The sums of a replicate need no more than float32; the value does."""
    sums = np.column_stack(columns)
    return _Metric(float(of(sums.sum(0)[:, None])[0]), sums.astype(np.float32), of)


def _ratio(t: Array) -> Array:
    return t[0] / t[1]


def _root(t: Array) -> Array:
    return np.sqrt(t[0] / t[1])


def _gaps(t: Array) -> Array:
    return np.abs(t[:-1]).sum(0) / t[-1]


def _measure(rows: _Rows, kind: str, at: Sequence[int]) -> _Table:
    """All metrics of one slice."""
    users, user = _dense(rows.user)
    if kind == "binary":
        metrics = _binary(rows, user, len(users), at)
    else:
        metrics = (_multiclass if kind == "multiclass" else _real)(rows, user, len(users))
    return _Table(users, metrics)


def _binary(rows: _Rows, user: Array, users: int, at: Sequence[int]) -> dict[str, _Metric | str]:
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
    metrics: dict[str, _Metric | str] = {
        "auc": _auc(rows, user, users),
        "gauc": _gauc(rows, user, users, total),
        "logloss": _metric(_ratio, np.bincount(user, loss, users), total),
        "calibration": _metric(_ratio, np.bincount(user, w * p, users), np.bincount(user, positive, users)),
        "ece": _ece(p, w * (p - y), user, users, total),
        "ece_mass": _ece(_below(w, _changes(rows.z)) / w.sum(), w * (p - y), user, users, total),
        "accuracy": _metric(_ratio, np.bincount(user, right, users), total),
    }
    return metrics if rows.request is None else metrics | _ranking(rows, user, users, at)


def _multiclass(rows: _Rows, user: Array, users: int) -> dict[str, _Metric | str]:
    if not len(rows.y):
        return dict.fromkeys(NAMES["multiclass"], "no observed rows")
    z, w, total = rows.z.astype(float), rows.w, np.bincount(user, rows.w, users)
    z -= z.max(1, keepdims=True)
    norm = np.exp(z).sum(1)
    right = z.argmax(1) == rows.y
    loss = np.log(norm) - np.take_along_axis(z, rows.y[:, None], 1)[:, 0]
    return {
        "accuracy": _metric(_ratio, np.bincount(user, w * right, users), total),
        "logloss": _metric(_ratio, np.bincount(user, w * loss, users), total),
        "ece": _ece(1 / norm, w * (1 / norm - right), user, users, total),
    }


def _real(rows: _Rows, user: Array, users: int) -> dict[str, _Metric | str]:
    if not len(rows.y):
        return dict.fromkeys(NAMES["real"], "no observed rows")
    error, total = rows.z.astype(float) - rows.y, np.bincount(user, rows.w, users)
    return {
        "rmse": _metric(_root, np.bincount(user, rows.w * error**2, users), total),
        "mae": _metric(_ratio, np.bincount(user, rows.w * np.abs(error), users), total),
    }


def _few(positives: int, rows: int, of: str = "") -> str:
    """The reason to withhold a metric that rests on these rows, or an empty string."""
    if not rows:
        return f"no observed rows{of}"
    if min(positives, rows - positives) >= LEAST:
        return ""
    return f"{positives:,} positives and {rows - positives:,} negatives{of}; at least {LEAST} of each are needed"


def _ece(place: Array, gap: Array, user: Array, users: int, total: Array) -> _Metric:
    """From what bins are of, p or its rank, in [0, 1] (n,), and the weighted p - y (n,).

    A user's gaps of one bin add up, the bins' absolute gaps do not.
    """
    cell = user * BINS + np.minimum((place * BINS).astype(np.int64), BINS - 1)
    return _metric(_gaps, np.bincount(cell, gap, users * BINS).reshape(users, BINS), total)


def _auc(rows: _Rows, user: Array, users: int) -> _Metric:
    """The linearised AUC of the module docstring; at weights of one it is the AUC itself."""
    positive, negative = np.where(rows.y, rows.w, 0.0), np.where(rows.y, 0.0, rows.w)
    changes, up, down = _changes(rows.z), positive.sum(), negative.sum()
    above = positive * _below(negative, changes) / down
    under = negative * (1 - _below(positive, changes) / up)
    value = above.sum() / up

    def linear(t: Array) -> Array:
        return np.clip(t[0] / t[1] + t[2] / t[3] - value, 0, 1)

    return _metric(linear, *(np.bincount(user, column, users) for column in (above, positive, under, negative)))


def _gauc(rows: _Rows, user: Array, users: int, total: Array) -> _Metric | str:
    """Each user's own AUC, weighted by all the user's rows (as defined in arXiv 2308.13537, section 5)."""
    n = len(user)
    order = np.sort(user * n + np.arange(n)) % n  # by user, then score; sorting keys beats a stable argsort
    user, y, w = user[order], rows.y[order], rows.w[order]
    positive, negative = np.where(y, w, 0.0), np.where(y, 0.0, w)
    first = _changes(user)
    wins = np.bincount(user, positive * _below(negative, first | _changes(rows.z[order])), users)
    up, down = np.bincount(user, positive, users), np.bincount(user, negative, users)
    before = np.cumsum(down) - down  # negatives of earlier users, which `_below` has counted too
    positives, count = np.bincount(user, y, users), np.bincount(user, minlength=users)
    both = (positives > 0) & (positives < count)
    if why := _few(int(positives[both].sum()), int(count[both].sum()), " in users with both classes"):
        return why
    own = np.divide(wins - up * before, up * down, out=np.zeros(users), where=both)
    return _metric(_ratio, own * total, np.where(both, total, 0.0))


def _ranking(rows: _Rows, user: Array, users: int, at: Sequence[int]) -> dict[str, _Metric | str]:
    """NDCG and recall, from rows in order of (request, descending score)."""
    assert rows.request is not None
    names = [f"{name}@{k}" for name in ("ndcg", "recall") for k in at]
    if rows.sampled:
        return dict.fromkeys(names, "negatives were sampled, so the ranks in the full request are not known")
    has = np.flatnonzero(rows.request >= 0)[::-1]  # reversed: descending score
    ids, request = _dense(rows.request[has])
    n, m = len(has), len(ids)
    order = np.sort(request * n + np.arange(n)) % n if n else request
    row, request = has[order], request[order]
    y, first = rows.y[row], _changes(request)
    size, positives = np.bincount(request, minlength=m), np.bincount(request, y, m)
    useful = positives > 0
    if why := _few(int(y.sum()), int(size[useful].sum()), " in requests with a positive"):
        return dict.fromkeys(names, why)
    place = np.arange(n) - np.repeat(np.flatnonzero(first), size)
    gain = _mean_of_run(y, first | _changes(rows.z[row]))
    weight = np.where(useful, np.bincount(request, rows.w[row], m) / size, 0.0)
    owner = user[row][first]
    count = np.bincount(owner, weight, users)
    metrics: dict[str, _Metric | str] = {}
    for k in at:
        discount = 1 / np.log2(np.arange(2, k + 2))
        top = np.flatnonzero(place < k)
        best = np.cumsum(discount)[np.clip(positives.astype(np.int64), 1, k) - 1]
        dcg = np.bincount(request[top], gain[top] * discount[place[top]], m) / best
        recall = np.bincount(request[top], gain[top], m) / np.maximum(positives, 1)
        for name, value in (("ndcg", dcg), ("recall", recall)):
            metrics[f"{name}@{k}"] = _metric(_ratio, np.bincount(owner, weight * value, users), count)
    return {name: metrics[name] for name in names}


def _changes(values: Array) -> Array:
    """(n,) True at the first row of each run of equal values."""
    first = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return first


def _below(weight: Array, first: Array) -> Array:
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


# ------------------------------------------------------------------------------------------------------------ bootstrap
def _poisson_table() -> Array:
    """(65536,) float32: Poisson(1) quantiles, so that 16 random bits become a draw.

    Probabilities are rounded to 1/65536: mean and variance are off by less than 1e-4, which no interval shows.
    """
    below = np.cumsum([exp(-1) / factorial(k) for k in range(9)])
    ends = np.round(65536 * np.append(below[:-1], 1)).astype(np.int64)
    return np.repeat(np.arange(9, dtype=np.float32), np.diff(ends, prepend=0))


_POISSON = _poisson_table()


def _draws(seed: int, block: int, users: int, replicates: int) -> Array:
    """(users, replicates) float32: how often each user of a block is drawn.  Fewer users get the same first rows."""
    stream = np.random.SFC64(np.random.SeedSequence((seed, block)))
    bits = stream.random_raw(-(-users * replicates // 4)).view(np.uint16)
    return _POISSON[bits[: users * replicates]].reshape(users, replicates)


def _totals(tables: Sequence[_Table], users: int, replicates: int, seed: int) -> list[Array]:
    """Per table (m, replicates): the sums of all its metrics, side by side, in every replicate."""
    sums = [_side_by_side(table) for table in tables]
    totals = [np.zeros((each.shape[1], replicates)) for each in sums]
    if not replicates:
        return totals
    for start in range(0, users, BLOCK):
        stop = min(start + BLOCK, users)
        draws = _draws(seed, start // BLOCK, stop - start, replicates)
        for table, own, total in zip(tables, sums, totals, strict=True):
            low, high = np.searchsorted(table.users, (start, stop))
            if low < high and own.shape[1]:
                whole = high - low == stop - start
                total += own[low:high].T @ (draws if whole else draws[table.users[low:high] - start])
    return totals


def _side_by_side(table: _Table) -> Array:
    columns = [metric.sums for metric in table.metrics.values() if isinstance(metric, _Metric)]
    return np.hstack([np.zeros((len(table.users), 0), np.float32), *columns])


def _drawn(table: _Table, totals: Array) -> dict[str, Drawn]:
    """Values and replicates of one slice's metrics."""
    found, at = {}, 0
    for name, metric in table.metrics.items():
        if isinstance(metric, str):
            found[name] = Drawn(None, np.full(totals.shape[1], np.nan), metric)
            continue
        width = metric.sums.shape[1]
        if len(table.users) < 2:
            found[name] = Drawn(metric.value, np.zeros(0), "one user: an interval over users is not possible")
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                draws = metric.of(totals[at : at + width])
            found[name] = Drawn(metric.value, np.where(np.isfinite(draws), draws, np.nan))
        at += width
    return found


def _interval(drawn: Drawn, confidence: float) -> Metrics:
    """Percentile interval; undefined replicates are left out."""
    draws = drawn.draws[np.isfinite(drawn.draws)]
    if not len(draws):
        return {"value": drawn.value, "low": None, "high": None, "why": drawn.why or "no replicates"}
    low, high = np.quantile(draws, ((1 - confidence) / 2, (1 + confidence) / 2))
    return {"value": drawn.value, "low": float(low), "high": float(high)}


def summary(metrics: Metrics) -> list[dict[str, Any]]:
    """Flat rows of `evaluate`'s numbers: task, domain ("": all), rows, positives, METRIC, METRIC_low, METRIC_high."""
    flat = []
    for task, whole in metrics.items():
        for domain, found in {"": whole, **whole["domains"]}.items():
            row = {"task": task, "domain": domain, "rows": found["rows"], "positives": found["positives"]}
            for name in metric_names(found):
                value = found[name]
                row |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            flat.append(row)
    return flat


def lead_metric(found: Iterable[str]) -> str:
    """The metric that a task is judged by: AUC, else accuracy, else RMSE."""
    return next(name for name in ("auc", "accuracy", "rmse") if name in set(found))


def lower_is_better(metric: str) -> bool:
    """Is a smaller value of this metric the better one?"""
    return metric in ("logloss", "rmse", "mae", "ece", "ece_mass")


def metric_names(found: Metrics) -> list[str]:
    """Names of the metrics in one slice of `evaluate`'s numbers."""
    return [name for name, value in found.items() if isinstance(value, dict) and "value" in value]
