"""Was it that?  The remedies are trained beside the run itself, with the same seeds, and compared in pairs.

A remedy is one configuration that was named before it was trained, so nothing is selected on the test rows.  Remedies may train
longer than the run (a schedule of several branches does), so a proof holds what both took.  Everything that one call tries is one
family of hypotheses, whatever its metric: p-values of the paired differences (`unbraid.compare`) are adjusted by Holm over all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unbraid.compare import LEVEL, compare, holm
from unbraid.config import Run
from unbraid.data.source import Tables
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, Proof, Remedy, Report, Spent
from unbraid.evaluate import lower_is_better
from unbraid.train import Watcher

ASIS = "as_it_is"
MOST, EACH = 3, 1

Tried = tuple[str, Measure]  # name of a training, and what it is to better


def prove(
    report: Report, run: Run, out: str | Path, *, seeds: int = 3, most: int = MOST, each: int = EACH, resume: bool = False,
    tables: Tables | None = None, watcher: Watcher | None = None,
) -> Report:  # fmt: skip
    """Train the run and its first remedies, and add to the report which of them held.

    Args:
        run: the diagnosed one; out: a folder for the trainings, with a table per metric (``compare-METRIC.json`` and ``.md``).
        seeds: of every run; most: diagnoses whose remedies are tried, worst first; each: remedies of one diagnosis.
        resume: keep those that are finished in ``out``; tables: in-memory tables by name.

    A run that several diagnoses ask for is trained once.

    Raises:
        JobError: as `unbraid.compare.compare`.
        ValueError: there is no remedy to train.
    """
    chosen = remedies(report, most, each)
    if not chosen:
        raise ValueError("No finding has a remedy that can be trained.")
    runs, names = trainings(run, chosen)
    made: dict[str, dict[str, Any]] = {}
    for metric in dict.fromkeys(measure.metric for _, _, measure in chosen):
        made[metric] = compare(
            list(runs.values()), out, seeds=seeds, against=ASIS, metric=metric, any_budget=True, resume=resume or bool(made),
            tables=tables, watcher=watcher,
        )  # fmt: skip
        for kind in ("json", "md"):
            (Path(out) / f"compare.{kind}").replace(Path(out) / f"compare-{metric}.{kind}")
    tried = {(name, measure): made[measure.metric] for name, (_, _, measure) in zip(names, chosen, strict=True)}
    found = adjusted({key: difference(table, *key) for key, table in tried.items()})
    proofs = [
        _proof(made[measure.metric], found[name, measure], diagnosis, remedy.name, name, measure, seeds)
        for name, (diagnosis, remedy, measure) in zip(names, chosen, strict=True)
    ]
    return dataclasses.replace(report, proofs=(*report.proofs, *proofs))


def remedies(report: Report, most: int = MOST, each: int = EACH) -> list[tuple[Diagnosis, Remedy, Measure]]:
    """The first remedies that can be trained and measured, of the worst diagnoses that no other one explains."""
    able = [
        (d, [(d, r, r.measure) for r in d.remedies if r.run is not None and r.measure is not None])
        for d in report.found if not d.because
    ]  # fmt: skip
    return [one for _, own in [pair for pair in able if pair[1]][:most] for one in own[:each]]


def trainings(run: Run, chosen: Sequence[tuple[Diagnosis, Remedy, Measure]]) -> tuple[dict[str, Run], list[str]]:
    """The run and the remedies' runs by name, each once, and which of them each remedy is.

    Target encoding is of the columns that a run has, since a remedy may leave one of them out.
    """
    runs = {ASIS: dataclasses.replace(run, name=ASIS, baseline=())}
    names = []
    for _, remedy, _ in chosen:
        assert remedy.run is not None
        known = (n for n, r in runs.items() if n != ASIS and r == dataclasses.replace(remedy.run, name=n, baseline=()))
        name = next(known, "")
        if not name:
            name = next(
                n for n in (remedy.name, *(f"{remedy.name}-{i}" for i in range(2, len(runs) + 2))) if n not in runs
            )
            runs[name] = dataclasses.replace(remedy.run, name=name, baseline=())
        names.append(name)
    return runs, names


def difference(table: Mapping[str, Any], name: str, measure: Measure) -> dict[str, Any]:
    """The paired difference of a training from the run as it is; nulls where the measure is of no test row."""
    here = (name, measure.task, measure.domain)
    found = (d for d in table["differences"] if (d["run"], d["task"], d["domain"]) == here)
    return next(found, dict.fromkeys(("value", "low", "high", "p")))


def adjusted(found: Mapping[Tried, dict[str, Any]]) -> dict[Tried, dict[str, Any]]:
    """The differences with ``holm``: their p-values, adjusted over all of them that have one."""
    known = [key for key, d in found.items() if d["p"] is not None]
    values = dict(zip(known, holm([found[key]["p"] for key in known]), strict=True))
    return {key: {**d, "holm": values.get(key)} for key, d in found.items()}


def _proof(
    table: Mapping[str, Any], d: Mapping[str, Any], diagnosis: Diagnosis, remedy: str, name: str, measure: Measure, seeds: int
) -> Proof:  # fmt: skip
    cell = table["values"].get(measure.task, {}).get(measure.domain, {"runs": {}})["runs"]
    before, after = (cell.get(run, {}).get(measure.metric, {"mean": None})["mean"] for run in (ASIS, name))
    spent = [Spent(table["cost"][run]["steps"], table["cost"][run]["seconds"]) for run in (ASIS, name)]
    better = d["value"] is not None and (d["value"] < 0 if lower_is_better(measure.metric) else d["value"] > 0)
    held = better and d["holm"] is not None and d["holm"] < LEVEL
    return Proof(
        diagnosis.name, diagnosis.where, remedy, measure, before, after, d["value"], d["low"], d["high"], d["holm"], seeds,
        better, held, *spent,
    )  # fmt: skip
