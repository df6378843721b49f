"""Metrics of every task in every domain, each with an interval from a bootstrap over users.

A metric here is a small function of *sums over users*: per user a few numbers are added up once, and a bootstrap
replicate weights the users, adds up again and applies the same function.  20M rows and 500 replicates therefore cost
one matrix product of (users, sums) with (users, replicates), not 500 evaluations.  The draws are those of
`unbraid.bootstrap`, the metrics those of `unbraid.measures`.

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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unbraid.bootstrap import Drawn, Table, drawn_of, metric_of, percentile_interval, ratio_of, totals_of
from unbraid.measures import TaskRows, ascending_order, dense_codes, measure_slice, mid_ranks, run_starts
from unbraid.types import FIRST_VALUE, NO_DOMAIN, Array, Schema, Scores, Task

Metrics = dict[str, Any]


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
        numbers = {name: percentile_interval(drawn, confidence) for name, drawn in found.metrics.items()}
        entry = {**numbers, "rows": found.rows, "positives": found.positives}
        if domain:
            report[task]["domains"][domain] = entry
        else:
            report[task] = {**entry, "domains": {}}
    return report


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
    everyone, user = dense_codes(np.asarray(scores.group))
    asked = scores.meta.get("request")
    request = None if asked is None else request_codes(asked, user)
    names = tuple(scores.domains or schema.domains)
    found: dict[tuple[str, str], Slice] = {}
    for task in schema.tasks:
        if task.name not in scores.logits:
            continue
        rows = _rows(scores, task, user, request)
        parts = [("", rows), *_by_domain(rows, names)]
        tables = [measure_slice(part, task.kind, at) for _, part in parts]
        totals = totals_of(tables, len(everyone), replicates, seed)
        for (domain, part), table, total in zip(parts, tables, totals, strict=True):
            positives = int(part.y.sum()) if task.kind == "binary" else None
            found[task.name, domain] = Slice(drawn_of(table, total), len(part.y), positives)
    return found


def auc(score: Array, label: Array, weight: Array | None = None) -> float:
    """Probability that a positive row scores above a negative one, a tie counting half; NaN if a class is absent.

    Args:
        score: (N,) any increasing function of the prediction.
        label: (N,) 0 or 1; weight: (N,) or None.
    """
    order = ascending_order(np.asarray(score))
    y = np.asarray(label)[order].astype(bool)
    w = np.ones(len(y)) if weight is None else np.asarray(weight, float)[order]
    positive, negative = np.where(y, w, 0.0), np.where(y, 0.0, w)
    with np.errstate(invalid="ignore"):
        return float(
            positive @ mid_ranks(negative, run_starts(np.asarray(score)[order])) / positive.sum() / negative.sum()
        )


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
    users, own = dense_codes(np.asarray(user))
    size = np.bincount(own, minlength=len(users)).astype(float)
    metrics = {name: metric_of(ratio_of, np.bincount(own, each, len(users)), size) for name, each in columns.items()}
    table = Table(np.arange(len(users)), metrics)
    (totals,) = totals_of([table], len(users), replicates, seed)
    return {name: percentile_interval(drawn, confidence) for name, drawn in drawn_of(table, totals).items()}


# ----------------------------------------------------------------------------------------------------------------- rows


def _rows(scores: Scores, task: Task, user: Array, request: Array | None) -> TaskRows:
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
        order = ascending_order(z)
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
    return TaskRows(z, y, w, user[index], domain, None if request is None else request[index], sampled)


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
    values, code = dense_codes(request)
    pair = code if user is None else dense_codes(dense_codes(np.asarray(user))[1] * max(len(values), 1) + code)[1]
    return np.where(request >= 0, pair, -1)


def _by_domain(rows: TaskRows, names: Sequence[str]) -> Iterator[tuple[str, TaskRows]]:
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
