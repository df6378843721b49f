"""What a check says: one measured number, held against what is usual, with the remedies and what they were worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from unbraid.evaluate import lead_metric
from unbraid.measures import NAMES

if TYPE_CHECKING:
    from unbraid.config import Run
    from unbraid.data.declaration import Data
    from unbraid.types import Schema

Grade = Literal["none", "mild", "moderate", "severe"]


@dataclass(frozen=True)
class Measure:
    """Which number of a run on its test rows a remedy is to better.

    Args:
        task: a task's name; domain: one value of the domain column, "" for all rows; metric: as in `unbraid.evaluate`.
    """

    task: str
    metric: str
    domain: str = ""

    @classmethod
    def of(cls, known: Schema | Data, task: str) -> Measure:
        """The metric that a task is judged by (AUC, accuracy or RMSE, by its kind), of all rows."""
        kinds = {each.name: each.kind for each in known.tasks}
        return cls(task, lead_metric(NAMES[kinds[task]]))


@dataclass(frozen=True)
class Remedy:
    """One change that should help.

    Args:
        name: of the run that has it, a few letters; text: one sentence: what changes, and why that helps.
        slot: the key of the run file that changes, such as ``update`` or ``data.features``.
        run: ready to train, equal to the diagnosed one but for ``slot``; None where no training is asked for.
        command: what to type instead, where ``run`` is None.
        measure: what should be better afterwards.
        page: of the method, relative to ``docs``.
        toml: the run as a file's text, where ``run`` is not at hand (a report that was read from JSON).
    """

    name: str
    text: str
    slot: str = ""
    run: Run | None = None
    command: str = ""
    measure: Measure | None = None
    page: str = ""
    toml: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """One number, larger is worse, and how it is to be read.

    Args:
        name: of the check; where: what it was measured on (a task, a column, a table, a domain), in words.
        value: the number; low, high: ends of its 95 % interval, None where there is none; unit: of the three.
        usual: at or below this there is nothing to say; severe: from here on it is severe.
        reading: one sentence for someone who knows the data and not the method.
        because: name and place of the diagnosis that explains this one, "" if none does: it is then ranked below that.
        subject: the column or the task that it is about, by which an explanation is found; empty: ``where``.
        remedies: best first; paper: where the measure comes from; page: of the docs, relative to ``docs``, with its anchor.
        evidence: plain values by name; ``plots``: a sequence of `unbraid.diagnosis.plots`, which reports draw.
    """

    name: str
    where: str
    value: float
    usual: float
    severe: float
    reading: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    because: str = ""
    subject: str = ""
    remedies: tuple[Remedy, ...] = ()
    paper: str = ""
    page: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.usual < self.severe:
            raise ValueError(f"`{self.name}`: `usual` should be below `severe`. Found {self.usual} and {self.severe}.")

    @property
    def severity(self) -> float:
        """0 where the interval reaches down to what is usual, 1 where all of it is severe, and so on in proportion."""
        sure = self.value if self.low is None else min(self.value, self.low)
        return max(0.0, (sure - self.usual) / (self.severe - self.usual))

    @property
    def grade(self) -> Grade:
        """``severe`` from a severity of 1, ``moderate`` from 1/2, ``mild`` above 0."""
        return next((g for g, least in GRADES if self.severity >= least and self.severity > 0), "none")


GRADES: tuple[tuple[Grade, float], ...] = (("severe", 1.0), ("moderate", 0.5), ("mild", 0.0))


class NotApplicable(ValueError):
    """A check has nothing to look at here; the message says why."""


@dataclass(frozen=True)
class Spent:
    """What one training took, means over seeds: steps, and seconds in all its processes, evaluation apart."""

    steps: float
    seconds: float


@dataclass(frozen=True)
class Proof:
    """What a remedy was worth when it was trained: the paired difference from the diagnosed run, and what both took.

    Args:
        of, where: name and place of the diagnosis; remedy: its name; measure: what was compared, on the test rows.
        before, after: means over seeds; difference: after - before, in the metric's unit; low, high: its 95 % interval; None
            where the metric is undefined.
        p: of the difference, adjusted (Holm) over everything that was tried together; seeds: how many of each.
        better: whether the difference is in the metric's good direction; held: better, and p < .05.
        spent_before, spent_after: by the run as it is and with the remedy, which may train longer.
    """

    of: str
    where: str
    remedy: str
    measure: Measure
    before: float | None
    after: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    better: bool
    held: bool
    spent_before: Spent
    spent_after: Spent


@dataclass(frozen=True)
class Report:
    """Everything that is known of one trained run; `unbraid.report` renders it.

    Args:
        title: the run's name; facts: what was read, as text by name (data, rows, sample, steps, seconds, versions).
        tasks: task name -> kind and role, in words; metrics, baseline: as in a bundle's ``metrics.json``: of the test rows.
        curve: one mapping per line of the training log (``step``, losses and validation metrics by name).
        diagnoses: worst first, those of grade ``none`` among them at the end.
        skipped: check -> why it had nothing to look at; failed: check -> what it died of.
        proofs: of remedies that were trained.
        toml: the diagnosed run as a file's text, against which remedies show what they change.
    """

    title: str
    facts: Mapping[str, str]
    tasks: Mapping[str, str]
    metrics: Mapping[str, Any]
    baseline: Mapping[str, Any]
    curve: tuple[Mapping[str, Any], ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    proofs: tuple[Proof, ...] = ()
    toml: str = ""

    @property
    def found(self) -> tuple[Diagnosis, ...]:
        """The diagnoses that say something, worst first."""
        return tuple(d for d in self.diagnoses if d.grade != "none")
