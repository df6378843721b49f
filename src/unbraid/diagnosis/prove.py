"""Was it that?  The remedies are trained beside the run itself, with the same seeds, and compared in pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from unbraid.compare import compare
from unbraid.config import Run
from unbraid.data.source import Tables
from unbraid.diagnosis.diagnosis import Diagnosis, Proof, Remedy, Report
from unbraid.evaluate import lower_is_better
from unbraid.train import Watcher

ASIS = "as_it_is"


def prove(
    report: Report, run: Run, out: str | Path, *, seeds: int = 3, most: int = 3, each: int = 1, resume: bool = False,
    tables: Tables | None = None, watcher: Watcher | None = None,
) -> Report:  # fmt: skip
    """Train the run and its first remedies, and add to the report which of them held.

    Args:
        run: the diagnosed one; out: a folder for the trainings; resume: keep those that are finished in it.
        seeds: of every run; most: diagnoses whose remedies are tried, worst first; each: remedies of one diagnosis.

    Differences are of the test rows, paired by user and seed (`unbraid.compare`); p-values are adjusted over all remedies of one
    measure.  A remedy is one configuration that was named before it was trained, so that nothing is selected on the test rows.

    Raises:
        JobError: as `unbraid.compare.compare`.
        ValueError: there is no remedy to train.
    """
    chosen = remedies(report, most, each)
    if not chosen:
        raise ValueError("No diagnosis has a remedy that can be trained.")
    found: list[Proof] = []
    by_metric: dict[str, list[tuple[Diagnosis, Remedy]]] = {}
    for diagnosis, remedy in chosen:
        assert remedy.measure is not None
        by_metric.setdefault(remedy.measure.metric, []).append((diagnosis, remedy))
    for metric, group in by_metric.items():
        runs = {ASIS: dataclasses.replace(run, name=ASIS)}
        for _, remedy in group:
            assert remedy.run is not None
            runs[remedy.name] = dataclasses.replace(remedy.run, name=remedy.name, baseline=())
        runs[ASIS] = dataclasses.replace(runs[ASIS], baseline=())
        table = compare(
            list(runs.values()), Path(out) / metric, seeds=seeds, against=ASIS, metric=metric, any_budget=True, resume=resume,
            tables=tables, watcher=watcher,
        )  # fmt: skip
        for diagnosis, remedy in group:
            found.append(_proof(table, diagnosis, remedy, seeds))
    return dataclasses.replace(report, proofs=(*report.proofs, *found))


def remedies(report: Report, most: int, each: int) -> list[tuple[Diagnosis, Remedy]]:
    """The first remedies that can be trained and measured, of the worst diagnoses, no run twice."""
    out: list[tuple[Diagnosis, Remedy]] = []
    names = set[str]()
    diagnoses = [d for d in report.found if not d.because and any(r.run is not None for r in d.remedies)]
    for diagnosis in diagnoses[:most]:
        able: Sequence[Remedy] = [r for r in diagnosis.remedies if r.run is not None and r.measure is not None]
        for remedy in able[:each]:
            if remedy.name not in names:
                names.add(remedy.name)
                out.append((diagnosis, remedy))
    return out


def _proof(table: dict, diagnosis: Diagnosis, remedy: Remedy, seeds: int) -> Proof:
    measure = remedy.measure
    assert measure is not None
    cell = table["values"][measure.task][measure.domain]["runs"]
    before, after = (cell[name][measure.metric]["mean"] for name in (ASIS, remedy.name))
    d = next(
        each
        for each in table["differences"]
        if (each["run"], each["task"], each["domain"]) == (remedy.name, measure.task, measure.domain)
    )
    better = d["value"] is not None and (d["value"] < 0 if lower_is_better(measure.metric) else d["value"] > 0)
    held = better and d["holm"] is not None and d["holm"] < 0.05
    return Proof(
        f"{diagnosis.name}: {diagnosis.where}", remedy.name, measure, before, after, d["value"], d["low"], d["high"],
        d["holm"], seeds, better, held,
    )  # fmt: skip
