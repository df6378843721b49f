"""Check: which tasks, domains and tasks in a domain have too few validation rows to be judged?

    half     half the width of the 95 % bootstrap interval over users of the leading metric on the validation split: of AUC or
             accuracy as it is, of RMSE divided by it

What differs between two models by less than that is hardly seen in such a cell.  The sample may be a part of the split: widths
shrink with the root of the number of rows, so that of the sample is multiplied by sqrt(rows of the sample / rows of the split).
Where the sample has too few of a class for an AUC and the split would have enough, m of them, the width is that of the
Mann-Whitney statistic of a score that says nothing, 1.96 / sqrt(12 m).

There is one diagnosis per task, one for its domains (the widest counts), and one for all domains in which no task can be
measured.  A cell that cannot be (fewer than `LEAST` positives or negatives, one user) has no width; it counts as `severe`, or
as the widest that was measured.  Domains have a `severe` of their own, since a run is seldom judged by one of them.  Cells
without any label, in training and validation, are named beside, and mild at most: withheld labels are often meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar

import numpy as np

from unbraid.diagnosis.case import REPLICATES, Case
from unbraid.diagnosis.diagnosis import Diagnosis, NotApplicable, Remedy
from unbraid.diagnosis.plots import Bars, Heat
from unbraid.evaluate import Slice, lead_metric, lower_is_better, replicate
from unbraid.measures import LEAST
from unbraid.render import metric_name
from unbraid.types import FIRST_VALUE

Array = np.ndarray
Pair = tuple[str, str]  # task, domain ("": all)

MOST = 20
CHUNK = 1_000_000  # rows whose labels are counted at once


@dataclass(frozen=True)
class Small:
    """Cells that are too small to judge.

    Args:
        usual, severe: half widths; domain_severe: `severe` of a task in its domains.
    """

    name: ClassVar[str] = "small"
    title: ClassVar[str] = "Are there tasks or domains with too few rows to be judged?"
    page: ClassVar[str] = "diagnosis.md#too-small-to-judge"
    usual: float = 0.05
    severe: float = 0.15
    domain_severe: float = 0.3

    def __call__(self, case: Case) -> list[Diagnosis]:
        """Worst first.  Raises NotApplicable without validation rows."""
        rows = case.sample("valid")
        if not len(rows):
            raise NotApplicable("the validation split is empty")
        targets = {task.name for task in case.targets}
        slices = replicate(case.valid, case.schema, at=(), replicates=REPLICATES, seed=case.seed)
        slices = {pair: found for pair, found in slices.items() if pair[0] in targets}
        scale = sqrt(len(rows) / len(case.encoded.split("valid")))
        widths = {pair: half_width(found, scale) for pair, found in slices.items()}
        labels = labels_of(case)
        empty = [pair for pair in widths if not labels[pair]]
        known = {pair: half for pair, half in widths.items() if half is not None}
        lost = {pair: slices[pair] for pair in widths if pair not in known and pair not in empty}
        dark = [d for d in dict.fromkeys(d for _, d in lost) if d and all((task, d) in lost for task in targets)]
        found = self._dark(dark, lost) + self._empty(empty, len(widths))
        for task in sorted(targets):
            own = {p: h for p, h in widths.items() if p[0] == task and p[1] not in dark and p not in empty}
            for part in ({p: h for p, h in own.items() if not p[1]}, {p: h for p, h in own.items() if p[1]}):
                found += [self._task(task, part, slices)] if part else []
        found.sort(key=lambda one: (-one.severity, -one.value, one.where))
        if known:  # one picture is enough for all
            found[0] = replace(found[0], evidence={**found[0].evidence, "plots": (picture(widths),)})
        return found[:MOST]

    def _task(self, task: str, cells: Mapping[Pair, float | None], slices: Mapping[Pair, Slice]) -> Diagnosis:
        """Of the whole task, or of its domains."""
        inside = any(domain for _, domain in cells)
        known = {pair: half for pair, half in cells.items() if half is not None}
        lost = [pair for pair in cells if pair not in known]
        wide = sorted(known, key=lambda pair: -known[pair])
        wide = [pair for place, pair in enumerate(wide) if not place or known[pair] > self.usual]
        value = max([known[pair] for pair in wide[:1]] + [self.severe] * bool(lost))
        metric = metric_name(lead_metric(slices[next(iter(cells))].metrics))
        said = [f"is known to {few([told(pair, known[pair], slices[pair]) for pair in wide])}"] if wide else []
        why = few([f"{'domain ' * inside}{domain or task} ({_why(slices[task, domain])})" for _, domain in lost])
        said += [f"cannot be measured of {why}"] if lost else []
        return Diagnosis(
            self.name, f"{task}, domains" if inside else task, value, self.usual, self.domain_severe if inside else self.severe,
            f"{metric} of {task} {' and '.join(said)}.", unit=f"half width of the interval of {metric}",
            remedies=(_remedy(inside),) if value > self.usual else (), page=self.page,
            evidence={"half widths": {words(pair): half for pair, half in cells.items()}},
        )  # fmt: skip

    def _dark(self, domains: Sequence[str], lost: Mapping[Pair, Slice]) -> list[Diagnosis]:
        """Of domains in which no task can be measured."""
        if not domains:
            return []
        rows = {domain: max(found.rows for (_, own), found in lost.items() if own == domain) for domain in domains}
        where = f"domain{'s' * (len(domains) > 1)} {few(domains, ', ')}"
        said = few([f"{domain}: {n:,} rows" for domain, n in rows.items()], ", ")
        return [Diagnosis(
            self.name, where, self.severe, self.usual, self.domain_severe,
            f"Nothing can be measured of {where} on the validation rows ({said}).", unit="half width of the interval, at least",
            remedies=(_remedy(True),), page=self.page, evidence={"rows": rows},
        )]  # fmt: skip

    def _empty(self, cells: list[Pair], of: int) -> list[Diagnosis]:
        if not cells:
            return []
        named = [words(pair) for pair in cells]
        has = "has" if len(named) == 1 else "have"
        reading = f"{few(named)} {has} no label, neither in training nor in validation rows."
        text = (
            "If labels are missing by accident, mend the table. If not: what is predicted there can be adapted and chosen "
            "without labels, and not judged."
        )
        return [Diagnosis(
            self.name, "cells without a label", float(len(cells)), 0.0, 2.0 * of + 1, reading, unit="cells",
            remedies=(Remedy("adapt", text, page="adaptation.md"),), page=self.page, evidence={"cells": named},
        )]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ numbers
def half_width(found: Slice, scale: float = 1.0) -> float | None:
    """Half the width of the interval of a slice's leading metric, times ``scale``; None where it has none.

    Args:
        scale: sqrt(rows of the sample / rows of the split), at most 1.
    """
    metric = lead_metric(found.metrics)
    value, draws = found.metrics[metric].value, found.metrics[metric].draws
    draws = draws[np.isfinite(draws)]
    if value is None and scale < 1 and found.positives is not None:
        rarer = min(found.positives, found.rows - found.positives) / scale**2
        return 1.96 / sqrt(12 * rarer) if rarer >= LEAST else None
    if value is None or len(draws) < 2:
        return None
    low, high = np.quantile(draws, (0.025, 0.975))
    half = float(high - low) / 2 * scale
    return half if not lower_is_better(metric) else half / value if value else None


def labels_of(case: Case) -> dict[Pair, int]:
    """(task, domain) -> labels that are known in the training and validation splits, all rows read; 0 where there are none."""
    names, encoded = case.schema.domains, case.encoded
    counts = {task.name: np.zeros(max(len(names), FIRST_VALUE + 1), np.int64) for task in case.schema.tasks}
    rows = np.concatenate([encoded.split("train"), encoded.split("valid")])
    for at in range(0, len(rows), CHUNK):
        part = rows[at : at + CHUNK]
        one = np.full(len(part), FIRST_VALUE)
        domain = np.asarray(encoded.columns["domain"][part]) if "domain" in encoded.columns else one
        for task, known in encoded.labels(part)[1].items():
            counts[task] += np.bincount(domain[known.numpy()], minlength=len(counts[task]))
    found = {(task, ""): int(each.sum()) for task, each in counts.items()}
    return found | {(task, name): int(counts[task][code]) for task in counts for code, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------------- words and evidence
def words(pair: Pair) -> str:
    """``click, domain 3``."""
    return pair[0] + (f", domain {pair[1]}" if pair[1] else "")


def told(pair: Pair, half: float, found: Slice) -> str:
    """``+/- 0.056 in domain 0 (1,176 rows, 116 positives)``."""
    exact = f"{half:.1%} of its value" if lower_is_better(lead_metric(found.metrics)) else f"{half:.3f}"
    positives = "" if found.positives is None else f", {found.positives:,} positives"
    return f"+/- {exact}{f' in domain {pair[1]}' if pair[1] else ''} ({found.rows:,} rows{positives})"


def few(texts: Sequence[str], between: str = "; ", most: int = 5) -> str:
    """The first texts, and how many more there are."""
    return between.join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def _why(found: Slice) -> str:
    drawn = found.metrics[lead_metric(found.metrics)]
    return drawn.why.removesuffix(f"; at least {LEAST} of each are needed") or "no interval"


def _remedy(inside: bool) -> Remedy:
    if inside:
        text = (
            "Judge it together with others: merge small domains by an expression in `data.domain`, take a longer validation "
            "window (`data.split`), or count only differences larger than this."
        )
        return Remedy("merge", text, slot="data.domain", page="run-file.md")
    text = "Take more rows: a longer log, or a longer validation window (`data.split`). Count only differences larger than this."
    return Remedy("more", text, slot="data.split", page="run-file.md")


def picture(widths: Mapping[Pair, float | None]) -> Heat | Bars:
    """All half widths; gaps where there is none."""
    tasks, domains = (list(dict.fromkeys(part)) for part in zip(*widths, strict=True))
    title, unit = "How exactly each cell is known", "half width of the interval"
    if len(domains) == 1:
        return Bars(title, unit, tuple(tasks), tuple(widths[task, ""] for task in tasks), x="task")
    values = tuple(tuple(widths.get((task, domain)) for domain in domains) for task in tasks)
    note = "A gap has too few positives, negatives or users for any number."
    columns = tuple(domain or "all" for domain in domains)
    return Heat(title, "domain", "task", unit, tuple(tasks), columns, values, centre=0.0, note=note)
