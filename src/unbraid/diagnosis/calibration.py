"""Check: do predicted probabilities come true on validation rows, and are the test rows of another kind?

Three numbers, each 0 where all is well, with 95 % intervals over users (delta method on sums per user).  With predictions p
(the model's, or after the bundle's calibrators), labels y and row weights w, of a multiclass task p the largest probability
and y whether that class is right:

    ratio   |log2(sum w p / sum w y)|           1 is a factor of two, in either direction; per task and per task in a domain
    slope   |log2 a|, a of P(y = 1) = sigmoid(a z + b) fitted to the logits z; per binary task.  a < 1: predictions lie too far
            from the mean, a > 1: too close to it (Cox, "Two further applications of a model for binary regression",
            Biometrika 1958).  A ratio of 1 can hide it: errors of both signs cancel.
    shift   1 - (mean w)^2 / mean w^2, with w the density ratio of test to validation rows by the task's hidden vector
            (`unbraid.calibration.density`, as TransCal takes it): the share of the validation rows that says nothing of the test
            rows.  Also of each domain that has test rows and no validation label.  No label is read.  Left out with few rows for
            many hidden units, and where the regression does not converge.

A domain whose interval holds the ratio of the whole task is explained by that.  A cell needs `LEAST` positives, negatives and
users.  Many domains are looked at, so the intervals of a task's domains hold together (Bonferroni).  Bins of the reliability
diagram hold equally many rows, since those of a rare label are all near 0.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import log
from statistics import NormalDist
from typing import Any, ClassVar, NamedTuple

import numpy as np
from scipy.special import expit

from unbraid.bundle import EVALUATION_ROWS, trained_splits
from unbraid.calibrate import chosen
from unbraid.calibration.density import LEAST_SHARE, Support, density_ratio
from unbraid.calibration.labelled import Labelled, labelled
from unbraid.calibration.maps import confidence
from unbraid.calibration.scaling import logistic_fit
from unbraid.diagnosis.case import Case, interval, unlabelled
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, NotApplicable, Remedy
from unbraid.diagnosis.plots import Bars, Reliability
from unbraid.evaluate import replicate
from unbraid.measures import LEAST
from unbraid.train import predict
from unbraid.types import FIRST_VALUE, NO_DOMAIN, Scores, Task

Array = np.ndarray
Estimate = tuple[float, float, float]  # value, and the ends of its interval

SHIFT_ROWS = 4_000  # of each side, of which hidden vectors are compared
ROWS_PER_NUMBER = 10  # fewer rows per hidden unit: the ratio would tell noise apart
BINS = 10
MOST = 20
GUO = "Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599"
COX = "Cox, Biometrika 1958"
TRANSCAL = "Wang et al., NeurIPS 2020, https://arxiv.org/abs/2007.08259"


@dataclass(frozen=True)
class Calibrated:
    """Predicted probabilities against what happened, per target task and domain.

    Args:
        ratio, slope, shift: usual and severe: a tenth and a factor of two; a quarter and a factor of two; half of the rows, and
            all but `unbraid.calibration.density.LEAST_SHARE`.
    """

    name: ClassVar[str] = "calibration"
    title: ClassVar[str] = "Do predicted probabilities come true, and can that be expected of the test rows?"
    page: ClassVar[str] = "diagnosis.md#calibration"
    ratio: tuple[float, float] = (log(1.1) / log(2), 1.0)
    slope: tuple[float, float] = (log(1.25) / log(2), 1.0)
    shift: tuple[float, float] = (0.5, 1 - LEAST_SHARE)

    def __call__(self, case: Case) -> list[Diagnosis]:
        """Worst first.  Raises NotApplicable: see the messages."""
        tasks = [task for task in case.targets if task.kind != "real"]
        if not tasks:
            raise NotApplicable("no target task is binary or multiclass, and a number has no probability")
        if "valid" in trained_splits(case.run):
            why = "and the model is surer of rows that it was trained on than of new ones"
            raise NotApplicable(f"schedule `{case.run.schedule.kind}` trains on the validation rows, {why}")
        if not len(case.sample("valid")):
            raise NotApplicable("the validation split is empty")
        kept = case.bundle.calibrators
        scores = kept.apply(case.valid) if kept else case.valid
        metrics = replicate(scores, case.schema, at=(), replicates=0)
        found: list[Diagnosis] = []
        for task in tasks:
            cells = list(cells_of(scores, task))
            found += self._ratios(cells, metrics) + self._slopes(cells)
        found += self._shifts(case, tasks)
        if not found:
            raise NotApplicable(f"no target task has {LEAST} positives, negatives and users on the validation rows")
        return sorted(found, key=lambda one: (-one.severity, -one.value))[:MOST]

    # ---------------------------------------------------------------------------------------------------------- the ratio
    def _ratios(self, cells: list[Cell], metrics: Any) -> list[Diagnosis]:
        domains = sum(bool(cell.domain) for cell in cells)
        ends = [widened(log_ratio(cell), domains if cell.domain else 1) for cell in cells]
        overview = (_overview(cells, ends),) if domains else ()
        found = [
            self._ratio(cell, each, metrics, () if cell.domain else overview)
            for cell, each in zip(cells, ends, strict=True)
        ]
        if cells and not cells[0].domain and found[0].severity > 0:  # what is wrong everywhere is no matter of a domain
            (value, *_), whole = ends[0], f"{self.name}: {found[0].where}"
            found[1:] = [
                replace(one, because=whole) if one.severity > 0 and low <= value <= high else one
                for one, (_, low, high) in zip(found[1:], ends[1:], strict=True)
            ]
        return found

    def _ratio(self, cell: Cell, ends: Estimate, metrics: Any, overview: tuple[Bars, ...]) -> Diagnosis:
        value, low, high = away_from_0(ends)
        sums, what = ("labels", "Predictions") if cell.task.kind == "binary" else ("right classes", "Confidences")
        factor, least, most = (2.0**each for each in ends)
        side = "too high" if factor > 1 else "too low"
        own = metrics[cell.task.name, cell.domain].metrics
        errors = {name: own[name].value for name in ("ece", "ece_mass") if name in own}
        reading = f"{what} of {cell.where} add up to {factor:.2f} times the {sums} ({least:.2f} to {most:.2f})"
        return Diagnosis(
            self.name, cell.where, value, *self.ratio, f"{reading}: {side}." if low > 0 else f"{reading}.",
            unit="|log2 of predicted / happened|", low=low, high=high, remedies=(_remedy(cell),), paper=GUO, page=self.page,
            evidence={
                "ratio": factor, "rows": len(cell.y), "positives": int(cell.y.sum()), **errors,
                "plots": (reliability(cell), *overview),
            },
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------- the slope
    def _slopes(self, cells: list[Cell]) -> list[Diagnosis]:
        found = []
        for cell in cells:
            if cell.domain or cell.task.kind != "binary" or (ends := log_slope(cell)) is None:
                continue
            (value, low, high), slope = away_from_0(ends), 2.0 ** ends[0]
            how = "too far from the mean: too sure" if slope < 1 else "too close to the mean: too timid"
            within = f"{2.0 ** ends[1]:.2f} to {2.0 ** ends[2]:.2f}"
            reading = f"Logits of {cell.where} should be {slope:.2f} times as large ({within})"
            found.append(Diagnosis(
                self.name, f"{cell.where}, slope", value, *self.slope,
                f"{reading}; predictions lie {how}." if low > 0 else f"{reading}.",
                unit="|log2 of slope|", low=low, high=high, remedies=(_remedy(cell),), paper=COX, page=self.page,
                evidence={"slope": slope, "rows": len(cell.y), "plots": (reliability(cell),)},
            ))  # fmt: skip
        return found

    # ---------------------------------------------------------------------------------------------------------- the shift
    def _shifts(self, case: Case, tasks: list[Task]) -> list[Diagnosis]:
        if not len(case.sample("test")):
            return []
        held, test = (_hidden(case, split) for split in ("valid", "test"))
        found = []
        for task in (task for task in tasks if not task.given):  # of which test rows it is asked of needs labels
            source = np.asarray(held.observed[task.name], bool)
            domains = [""] if source.any() else []
            for code, domain in enumerate(test.domains[FIRST_VALUE:] if domains else (), FIRST_VALUE):
                if domain != NO_DOMAIN and not (source & (held.domain == code)).any():
                    domains.append(domain)
            for domain in domains:
                rows = test.domain == test.domains.index(domain) if domain else np.full(len(test.row), True)
                vectors = held.hidden[task.name][source], test.hidden[task.name][rows]
                if min(map(len, vectors)) < ROWS_PER_NUMBER * vectors[0].shape[1]:
                    continue
                with suppress(ValueError):  # the regression does not converge: there is no ratio to judge by
                    weights = density_ratio(*vectors)(vectors[0])
                    found.append(self._shift(task, domain, weights, np.asarray(held.group)[source], int(rows.sum())))
        return found

    def _shift(self, task: Task, domain: str, weights: Array, users: Array, test: int) -> Diagnosis:
        support, (value, low, high) = Support.of(weights), lost(weights, users)
        where = f"{task.name}, test rows" + (f" of domain {domain}" if domain else "")
        told = f"{support.rows:,} validation rows are worth {support.effective:,.0f} on {where}"
        doubts = f": {'; '.join(support.warnings)}" if support.warnings else f"; the mean weight is {support.mean:.2f}"
        return Diagnosis(
            self.name, where, value, *self.shift, f"{told}{doubts}.", unit="share of validation rows that do not count", low=low,
            high=high, remedies=(_remedy_of_shift(task, domain, support),), paper=TRANSCAL, page=self.page,
            evidence={"mean weight": support.mean, "effective rows": support.effective, "largest weight": support.largest,
                      "rows": support.rows, "test rows": test},
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ cells
class Cell(NamedTuple):
    """Validation rows of one task, in one domain or (``""``) in all: (n,) predictions, what happened, weights, users, and
    (n,) or (n, K) logits."""

    task: Task
    domain: str
    p: Array
    y: Array
    w: Array
    group: Array
    z: Array

    @property
    def where(self) -> str:
        """What it is, in words."""
        return self.task.name + (f", domain {self.domain}" if self.domain else "")


def cells_of(scores: Scores, task: Task) -> Iterator[Cell]:
    """All rows of the task, then those of each domain, as far as there are enough."""
    known = np.asarray(scores.observed[task.name], bool)
    known = known if scores.weight is None else known & (np.asarray(scores.weight) > 0)
    domain = np.asarray(scores.domain)
    parts = [("", known)]
    if tuple(scores.domains[FIRST_VALUE:]) != (NO_DOMAIN,):
        parts += [(scores.domains[code], known & (domain == code)) for code in np.unique(domain[known])]
    for name, rows in parts:
        group = np.asarray(scores.group)[rows]
        if len(np.unique(group)) < LEAST:
            continue
        try:
            z, label, w = labelled(chosen(scores, rows, ""), task)
        except ValueError:  # labels are all equal
            continue
        binary = task.kind == "binary"
        y = label if binary else (z.argmax(1) == label) + 0.0
        if min(y.sum(), len(y) - y.sum()) >= LEAST:
            yield Cell(task, name, expit(z) if binary else confidence(z), y, w, group, z)


def _hidden(case: Case, split: str) -> Scores:
    """Predictions with hidden vectors of at most `SHIFT_ROWS` rows of the sample."""
    rows = case.sample(split)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), SHIFT_ROWS)).astype(np.int64)]
    batches = case.encoded.in_order(rows, min(EVALUATION_ROWS, case.encoded.most))
    hide = unlabelled if split == "test" else lambda batch: batch
    return predict(case.model, (hide(batch) for batch in batches), case.schema, hidden=True)


# ---------------------------------------------------------------------------------------------------------------- numbers
def log_ratio(cell: Cell) -> Estimate:
    """log2 of sum(w p) / sum(w y), and its interval."""
    over, under = float(cell.w @ cell.p), float(cell.w @ cell.y)
    value = float(np.log2(over / under))
    parts = len(cell.y) * cell.w * (cell.p / over - cell.y / under) / log(2)
    return (value, *interval(value, parts, cell.group))


def log_slope(cell: Cell) -> Estimate | None:
    """log2 of the slope of a logistic regression on the logit, and its interval; None where it is no number.

    The interval is that of an M-estimator whose scores add up within users (Liang and Zeger, 1986).
    """
    try:
        slope, intercept = logistic_fit(Labelled(cell.z, cell.y, cell.w))
    except ValueError:  # labels that one logit separates, or an order that is upside down: nothing to calibrate
        return None
    x, p = np.stack([cell.z, np.ones(len(cell.z))], 1), expit(slope * cell.z + intercept)
    bread = np.linalg.inv((x * (cell.w * p * (1 - p))[:, None]).T @ x)
    parts = len(p) * cell.w * (cell.y - p) * (x @ bread[0])
    value = float(np.log2(slope))
    return (value, *interval(value, parts / (slope * log(2)), cell.group))


def lost(weights: Array, users: Array) -> Estimate:
    """1 - effective rows / rows of (n,) weights, and its interval."""
    first, second = float(weights.mean()), float((weights**2).mean())
    value = 1 - first**2 / second
    parts = first**2 * (weights**2 - second) / second**2 - 2 * first * (weights - first) / second
    low, high = interval(value, parts, users)
    return value, max(0.0, low), min(1.0, high)


def widened(found: Estimate, together: int) -> Estimate:
    """The interval such that all of so many hold together with 95 %."""
    value, low, high = found
    factor = NormalDist().inv_cdf(1 - 0.025 / max(1, together)) / NormalDist().inv_cdf(0.975)
    return value, value + factor * (low - value), value + factor * (high - value)


def away_from_0(found: Estimate) -> Estimate:
    """The same of the absolute value."""
    value, low, high = found
    return abs(value), 0.0 if low <= 0 <= high else min(abs(low), abs(high)), max(abs(low), abs(high))


# --------------------------------------------------------------------------------------------------------------- evidence
def reliability(cell: Cell, bins: int = BINS) -> Reliability:
    """Predicted against happened in bins of equally many rows; equal predictions share one."""
    edges = np.unique(np.quantile(cell.p, np.arange(1, bins) / bins))
    place = np.searchsorted(edges, cell.p, side="right")
    columns = [_bin(cell, place == each) for each in np.unique(place)]
    predicted, happened, count, low, high = ({cell.where: part} for part in zip(*columns, strict=True))
    kind = "share of positives" if cell.task.kind == "binary" else "share of right classes"
    note = "Below the diagonal predictions are too high, above it too low."
    return Reliability(f"What came true of {cell.where}", predicted, happened, count, low, high, y=kind, note=note)


def _bin(cell: Cell, rows: Array) -> tuple[float, float, int, float | None, float | None]:
    p, y, w = cell.p[rows], cell.y[rows], cell.w[rows]
    share = float(w @ y / w.sum())
    if len(y) < 2:
        return float(p.mean()), share, len(y), None, None
    low, high = interval(share, len(y) * w * (y - share) / w.sum(), cell.group[rows])
    return float(np.clip(w @ p / w.sum(), 0, 1)), min(share, 1.0), len(y), max(0.0, low), min(1.0, high)


def _overview(cells: list[Cell], ends: list[Estimate]) -> Bars:
    values, low, high = zip(*ends, strict=True)
    names = tuple(cell.domain or "all" for cell in cells)
    title, note = (
        f"Predicted over happened, {cells[0].task.name}",
        "0 is right, 1 twice too high, -1 half of what it should be.",
    )
    return Bars(title, "log2 of the ratio", names, values, low, high, reference=0.0, x="domain", note=note)


# --------------------------------------------------------------------------------------------------------------- remedies
def _remedy(cell: Cell) -> Remedy:
    method, named, metric = "temperature", "a temperature", "ece"
    if cell.task.kind == "binary":
        method, named, metric = f"{method} --set intercept=true", "slope and intercept", "ece_mass"
    return Remedy(
        "calibrate", f"Calibrate {cell.where} after training: {named} from the validation rows; the model stays as it is.",
        command=_command(method, cell.task.name, cell.domain), measure=Measure(cell.task.name, metric, cell.domain),
        page="calibration.md",
    )  # fmt: skip


def _remedy_of_shift(task: Task, domain: str, support: Support) -> Remedy:
    if support.warnings:
        text = "Weights cannot bridge this: label some rows of the target (FILE) and calibrate on them."
        command = _command("temperature", task.name, domain) + " --held-out FILE"
        return Remedy("label", text, command=command, page="calibration.md#numbers-and-warnings")
    text = "Calibrate for the test rows without their labels: validation rows are weighted to look like them."
    return Remedy("transcal", text, command=_command("transcal", task.name, domain), page="methods/transcal.md")


def _command(method: str, task: str, domain: str) -> str:
    aimed = f" --domain {shlex.quote(domain)}" if domain else ""
    return f"unbraid calibrate BUNDLE --method {method} --task {shlex.quote(task)}{aimed}"
