"""Several runs, several seeds, one table: is a difference more than chance?

All runs predict the same test rows, so they are compared in pairs: the reference's value is subtracted seed by seed and
bootstrap replicate by replicate, and what both share (easy users, hard users) cancels.  With d_s the difference at seed
s of K and d_s^r the same with the users of replicate r (`unbraid.evaluate.replicate`: whole users, Poisson weights)::

    difference      mean_s d_s
    test noise      sd over r of mean_s d_s^r                        other users might have come
    training noise  sd over s of d_s / sqrt(K)                       other seeds might have been drawn
    both            var over r of mean of d_s^r over K - 1 seeds drawn with replacement for replicate r
    interaction     mean over s of var over r of (d_s^r - mean_s d_s^r), / (K - 1)
    s.e.^2          max(test noise^2, both - 2 interaction)

*Both* resamples users and seeds together.  Drawing K - 1 of K seeds makes the variance over seeds s^2/K, without bias
(Rao and Wu, JASA 1988); drawing K would give (K - 1)/K of that, a third too little at K = 3.  Resampling two crossed
factors counts what belongs to a user *and* a seed (a seed errs on some users) three times instead of once (Owen, "The
pigeonhole bootstrap", Annals of Applied Statistics 2007); that is subtracted.  Few seeds leave their spread uncertain, so
interval and p-value are Student's t with Satterthwaite's degrees of freedom (Biometrics 1946)::

    df = (K - 1) max(1, s.e. / training noise)^4

Measured on simulated scores of equal models (300 users, five amounts of training noise, 800 comparisons each): p < .05 in
1 to 5 % with K = 5, 2 to 6 % with K = 3 and 2 to 11 % with K = 2, whose spread two numbers cannot tell; the s.e. is .9
to 1.2 times the true one.  With the normal law instead of Student's it is up to 24 %, without the subtraction the s.e. is
up to 1.75 times too large.  Three seeds are the least to rely on.

Where all runs have the same tasks with the same metric, its mean over tasks is compared as well, replicate by replicate.

p-values are adjusted by Holm (Scandinavian Journal of Statistics 1979) over everything that a reader scans for a finding:
all runs and tasks of the main table, apart from these all runs' means over tasks, and all runs, tasks and domains.
Intervals are not adjusted.

A comparison is fair if every method had the same trials and budget: one configuration per run, the same seeds, the same
`unbraid.train.Training`.  What a run cost (steps until early stopping, seconds, parameters) is reported beside.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unbraid import config, store
from unbraid.adapters.frames import in_polars
from unbraid.bootstrap import Drawn
from unbraid.bundle import BundleError, build
from unbraid.data.declaration import Data
from unbraid.data.encode import encode, fingerprint
from unbraid.data.fitted import Fitted
from unbraid.data.source import Tables
from unbraid.data.table import Encoded
from unbraid.evaluate import Slice, lead_metric, lower_is_better, replicate
from unbraid.job import baseline_scores, default_baseline, train
from unbraid.preflight import JobError, bound_terms, check_labels
from unbraid.render import render_comparison
from unbraid.train import Watcher
from unbraid.types import Array, Scores, Task

BASELINE = "target_encoding"
MEAN = "mean of tasks"
TAKEN = (BASELINE, "compare.json", "compare.md")  # not for a run's name
SAME_DATA = (
    "folder",
    "rows",
    "keep",
    "drop_duplicates",
    "user",
    "time",
    "time_unit",
    "domain",
    "weight",
    "split",
    "negatives",
)
SAME_BUDGET = ("batch_size", "epochs", "steps", "evaluate_every", "metric", "patience")
LEVEL = 0.05  # a difference is called one when its adjusted p-value is below

Slices = Mapping[tuple[str, str], Slice]


def compare(
    runs: Sequence[config.Run], out: str | Path, *, seeds: int = 3, against: str = "", metric: str = "", replicates: int = 1000,
    any_budget: bool = False, resume: bool = False, overwrite: bool = False, tables: Tables | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train every run with every seed, compare their test metrics, write ``compare.json`` and ``compare.md``.

    Args:
        runs: at least one; the names tell them apart.
        out: the folder; ``NAME/seed-S`` in it are bundles.
        seeds: K; each run trains with its own ``seed``, seed + 1, ...
        against: name of the reference, ``target_encoding`` included; empty is the first run.
        metric: what differences are of; empty is AUC, accuracy or RMSE, as a task is binary, multiclass or real.
        replicates: bootstrap replicates.
        any_budget: let runs differ in their training budget.
        resume: keep what is finished in ``out`` and continue the rest; overwrite: train all of it again.
        tables: tables in memory by name.

    Returns:
        What ``compare.json`` holds (see docs/comparing.md).

    Raises:
        JobError: runs that cannot be compared, or a folder that is in the way; the message says what to do.
    """
    out, watcher, tables = Path(out), watcher or Watcher(), in_polars(tables)
    if resume and overwrite:
        raise JobError("--resume keeps what is finished and --overwrite does not. Give one of them.")
    check(runs, seeds, against, metric, any_budget)
    trials = [dataclasses.replace(run, seed=run.seed + number) for number in range(seeds) for run in runs]
    folders = [out / run.name / f"seed-{run.seed}" for run in trials]
    _prepare(out, folders, resume or overwrite)
    for run in runs:
        try_to_build(run, tables, watcher)
    found: dict[str, list[Slices]] = {run.name: [] for run in runs}
    costs: dict[str, list[dict[str, Any]]] = {run.name: [] for run in runs}
    first: dict[str, Scores] = {}
    for number, (run, folder) in enumerate(zip(trials, folders, strict=True)):
        watcher.note(f"[{number + 1}/{len(trials)}] run `{run.name}`, seed {run.seed}")
        scores, cost = _trial(run, folder, tables, overwrite, watcher)
        first.setdefault(run.name, scores)
        same_rows(first[runs[0].name], scores, runs[0].name, run.name)
        found[run.name].append(replicate(scores, Fitted.load(folder).schema, replicates=replicates))
        costs[run.name].append(cost)
    watcher.stage("comparing", 0, 0)
    if (floor := _with_baseline(runs)) is not None:
        encoded = Encoded(encode(floor.data, tables=tables))
        scores = baseline_scores(floor, encoded, first[floor.name])
        found[BASELINE], costs[BASELINE] = [replicate(scores, encoded.schema, replicates=replicates)], []
    else:
        watcher.note(f"no {BASELINE}: no run has an id feature, a user or a domain")
    comparison = {
        "reference": against or runs[0].name, "seeds": seeds, "replicates": replicates,
        "budget": {run.name: budget_of(run) for run in runs},
        "cost": {name: _cost(each) for name, each in costs.items()},
        "oracle": [run.name for run in runs if run.selection is not None and run.selection.oracle],
        **tabulate(with_means(found, metric), against or runs[0].name, metric),
    }  # fmt: skip
    store.write_text(out / "compare.json", json.dumps(comparison, indent=1))
    store.write_text(out / "compare.md", render_comparison(comparison))
    return comparison


def _with_baseline(runs: Sequence[config.Run]) -> config.Run | None:
    return next((run for run in runs if run.baseline or default_baseline(run)), None)


# -------------------------------------------------------------------------------------------------------------- before
def check(runs: Sequence[config.Run], seeds: int, against: str, metric: str, any_budget: bool) -> None:
    """Raise JobError unless the runs can be told apart and compared."""
    names = [run.name for run in runs]
    if not runs or seeds < 1:
        raise JobError(f"A comparison needs at least one run and one seed. Found {len(runs)} and {seeds}.")
    if taken := sorted({n for n in [*names, *TAKEN] if [*names, *TAKEN].count(n) > 1}):
        raise JobError(
            f"Each run needs a `name` of its own, and none of {', '.join(TAKEN)}. Found: {', '.join(taken)}."
        )
    if against and against not in (*names, BASELINE):
        raise JobError(f"--against should be one of {', '.join([*names, BASELINE])}. Found {against}.")
    if against == BASELINE and _with_baseline(runs) is None:
        raise JobError(f"There is no {BASELINE} to compare with: no run has an id feature, a user or a domain.")
    allowed = sorted({name for run in runs for task in run.data.tasks for name in metrics_of(run.data, task)})
    if metric and metric not in allowed:
        raise JobError(f"--metric should be one of {', '.join(allowed)}. Found {metric}.")
    for run in runs[1:]:
        here, there = _labels(runs[0]), _labels(run)
        data = _unequal(vars(runs[0].data), vars(run.data), SAME_DATA)
        data += [f"task {n}, {text}" for n in here if n in there for text in _unequal(here[n], there[n], list(here[n]))]
        if data or not set(here) & set(there):
            why = "; ".join(data) or f"tasks {list(here)} / {list(there)}"
            raise JobError(f"Runs `{runs[0].name}` and `{run.name}` have other test rows or labels: {why}.")
        here_too, there_too = budget_of(runs[0]), budget_of(run)
        absent = dict.fromkeys([*here_too, *there_too], "not read")
        budget = _unequal(absent | here_too, absent | there_too, list(absent))
        if budget and not any_budget:
            raise JobError(
                f"Runs `{runs[0].name}` and `{run.name}` have other training budgets: {'; '.join(budget)}. "
                "Make them equal, or allow it with --any-budget; the table then says so."
            )


def budget_of(run: config.Run) -> dict[str, Any]:
    """What decides how long a run trains: keys of `training` that its schedule reads, and the schedule's own."""
    schedule = run.schedule
    found = {key: getattr(run.training, key) for key in SAME_BUDGET if key not in getattr(schedule, "unread", ())}
    if run.selection is not None:
        found["selection"] = run.selection.kind
    return found | {f"schedule.{key}": getattr(schedule, key) for key in getattr(schedule, "budget", ())}


def metrics_of(data: Data, task: Task) -> list[str]:
    """The metrics of a task that have a better side."""
    ranks = [f"{name}@{k}" for name in ("ndcg", "recall") for k in (5, 10)] if data.request else []
    binary = ["auc", "gauc", "logloss", "ece", "accuracy", *ranks]
    return {"binary": binary, "multiclass": ["accuracy", "logloss", "ece"], "real": ["rmse", "mae"]}[task.kind]


def _labels(run: config.Run) -> dict[str, dict[str, Any]]:
    """Task -> what decides which labels it has."""
    keys = ("kind", "source", "given", "sampling_rate")
    return {task.name: {key: getattr(task, key) for key in keys} for task in run.data.tasks}


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [f"{k}: {one[k]} / {other[k]}" for k in keys if one[k] != other[k]]


def _prepare(out: Path, folders: Sequence[Path], again: bool) -> None:
    if out.exists() and not out.is_dir():
        raise JobError(f"{out} is a file. Choose another --out.")
    if not again and (old := [folder for folder in folders if folder.exists()]):
        raise JobError(
            f"{out} holds trainings of this comparison ({old[0].relative_to(out)}, ...). Keep them and continue with --resume, "
            "train them again with --overwrite, or choose another --out."
        )


def try_to_build(run: config.Run, tables: Tables | None, watcher: Watcher) -> None:
    """What does not fit together is said before anything trains, with the run's name."""
    if run.init:
        return  # its vocabularies grow from a bundle's
    try:
        encoded = Encoded(encode(run.data, tables=tables, progress=watcher.stage))
        check_labels(bound_terms(run, encoded.schema, build(run, encoded.schema)), encoded, run.training.mix)
    except (ValueError, JobError) as error:
        raise JobError(f"Run `{run.name}`: {error}") from error


def same_rows(first: Scores, other: Scores, name: str, other_name: str) -> None:
    """Raise JobError unless two runs predicted the same test rows with the same labels."""
    wrong = [k for k in ("row", "group", "weight") if not np.array_equal(getattr(first, k), getattr(other, k))]
    for task in () if wrong else set(first.labels) & set(other.labels):
        known = first.observed[task]
        if not np.array_equal(known, other.observed[task]):
            wrong.append(f"observed {task}")
        elif not np.array_equal(first.labels[task][known], other.labels[task][known]):
            wrong.append(f"label {task}")
    if wrong:
        raise JobError(f"Test rows of runs `{name}` and `{other_name}` differ in: {', '.join(wrong)}.")


# --------------------------------------------------------------------------------------------------------------- trials
def _trial(
    run: config.Run, folder: Path, tables: Tables | None, overwrite: bool, watcher: Watcher
) -> tuple[Scores, dict[str, Any]]:  # fmt: skip
    """Train one run with one seed, or find it trained; its test scores and its cost."""
    resume = not overwrite and (folder / "run.toml").exists()
    remedy = f"Delete {folder} and continue with --resume, or train all of it again with --overwrite."
    try:
        metrics = train(
            run, folder, tables=tables, resume=resume, overwrite=overwrite, baseline=False, keep_scores=True, watcher=watcher
        ).metrics  # fmt: skip
        cost = {"seconds": metrics["seconds"]["train"], "steps": metrics["steps"], "parameters": metrics["parameters"]}
    except (BundleError, KeyError, json.JSONDecodeError) as error:
        raise JobError(f"{folder} is not whole: {error}. {remedy}") from error
    try:
        scores = Scores(**store.load(folder / "scores.safetensors"))
    except (OSError, ValueError) as error:
        raise JobError(f"{folder} has no test scores: {error} {remedy}") from error
    if not run.init and metrics["data"] != fingerprint(run.data, Path(), tables):
        raise JobError(f"{folder} was trained on other data: the files have changed since, or were touched. {remedy}")
    return scores, cost


def _cost(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean steps and seconds of a run's seeds, and its parameters.  The baseline has none of these."""
    if not trials:
        return {}
    means = {key: float(np.mean([trial[key] for trial in trials])) for key in ("steps", "seconds")}
    return {"configurations": 1, **means, "parameters": trials[0]["parameters"]}


# ----------------------------------------------------------------------------------------------------------- statistics
def tabulate(found: Mapping[str, Sequence[Slices]], reference: str, metric: str = "") -> dict[str, Any]:
    """Values of every run and metric, and differences from the reference.

    Args:
        found: run -> the slices of each seed (`unbraid.evaluate.replicate`, same users and seed of the bootstrap).

    Returns:
        ``values``: task -> domain (``""``: all) -> rows, positives, the metric that is compared (``""``: the task has not
        the one asked for), a ``why`` if it is withheld, and ``runs``: run -> metric -> mean, sd, seeds;
        ``differences``: a list.
    """
    values: dict[str, Any] = {}
    differences: list[dict[str, Any]] = []
    for name, trials in found.items():
        for (task, domain), cell in trials[0].items():
            seeds = {m: [trial[task, domain].metrics[m].value for trial in trials] for m in cell.metrics}
            chosen = metric or lead_metric(cell.metrics)
            about = {"rows": cell.rows, "positives": cell.positives, "metric": chosen if chosen in cell.metrics else ""}
            at = values.setdefault(task, {}).setdefault(domain, {**about, "why": "", "runs": {}})
            at["runs"][name] = {m: _spread(each) for m, each in seeds.items()}
            if chosen not in cell.metrics:
                continue
            at["why"] = at["why"] or cell.metrics[chosen].why
            if name == reference or (task, domain) not in found[reference][0]:
                continue
            ours = [trial[task, domain].metrics[chosen] for trial in trials]
            base = [trial[task, domain].metrics[chosen] for trial in found[reference]]
            entry = {"task": task, "domain": domain, "run": name, "metric": chosen}
            differences.append({**entry, **difference(ours, base)})
    for kind in ((MEAN, True), ("", True), ("", False)):
        family = [d for d in differences if _family(d) == kind and d["p"] is not None]
        for each, adjusted in zip(family, holm([d["p"] for d in family]), strict=True):
            each["holm"] = adjusted
            each["verdict"] = verdict(each)
    return {"values": values, "differences": differences}


def _family(entry: Mapping[str, Any]) -> tuple[str, bool]:
    return (MEAN if entry["task"] == MEAN else "", entry["domain"] == "")


def with_means(found: Mapping[str, Sequence[Slices]], metric: str = "") -> dict[str, list[Slices]]:
    """The same and, as one more task, the mean over tasks of the metric that is compared.

    There is none if some run has other tasks or a single one, or if tasks differ in their metric.
    """
    every = [slices for trials in found.values() for slices in trials]
    tasks = [[task for task, domain in slices if not domain] for slices in every]
    lead = {
        metric or lead_metric(cell.metrics) for slices in every for (_, domain), cell in slices.items() if not domain
    }
    if len(tasks[0]) < 2 or any(set(other) != set(tasks[0]) for other in tasks) or len(lead) > 1:
        return {name: list(trials) for name, trials in found.items()}
    return {name: [_with_mean(slices, tasks[0], *lead) for slices in trials] for name, trials in found.items()}


def _with_mean(slices: Slices, tasks: Sequence[str], metric: str) -> Slices:
    cells = [slices[task, ""] for task in tasks]
    if any(metric not in cell.metrics for cell in cells):
        return slices
    each = [cell.metrics[metric] for cell in cells]
    values = [one.value for one in each if one.value is not None]
    why = next((f"{task}: {one.why}" for task, one in zip(tasks, each, strict=True) if one.value is None), "")
    mean = Drawn(None if why else float(np.mean(values)), np.mean([one.draws for one in each], axis=0), why)
    return {**slices, (MEAN, ""): Slice({metric: mean}, max(cell.rows for cell in cells), None)}


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [v for v in values if v is not None]
    mean = float(np.mean(known)) if len(known) == len(values) else None
    sd = float(np.std(known, ddof=1)) if mean is not None and len(known) > 1 else None
    return {"mean": mean, "sd": sd, "seeds": list(values)}


def difference(
    ours: Sequence[Drawn], theirs: Sequence[Drawn], confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """The module docstring's quantities for one metric of one slice; nulls, with a ``why``, where there is none.

    Args:
        ours, theirs: one per seed, in the same order; a method without randomness has one, which is paired with all.
    """
    empty = dict.fromkeys(
        ("value", "low", "high", "se", "test_noise", "training_noise", "df", "p", "holm", "detectable")
    )
    if missing := [d for d in (*ours, *theirs) if d.value is None]:
        return {**empty, "verdict": "", "why": missing[0].why}
    k = max(len(ours), len(theirs))
    each = np.array([o.value for o in ours], float) - np.array([t.value for t in theirs], float)
    value = float(each.mean())
    if missing := [d for d in (*ours, *theirs) if not np.isfinite(d.draws).any()]:
        return {**empty, "value": value, "verdict": "", "why": missing[0].why or "no replicates"}
    draws = np.stack([o.draws for o in ours]) - np.stack([t.draws for t in theirs])  # (K, R)
    draws = draws[:, np.isfinite(draws).all(0)]
    test = float(draws.mean(0).std(ddof=1))
    training = float(each.std(ddof=1) / np.sqrt(k)) if k > 1 else None
    error = test
    if k > 1:
        picks = np.random.default_rng(seed).integers(0, k, (k - 1, draws.shape[1]))
        both = np.take_along_axis(draws, picks, 0).mean(0).var(ddof=1)
        interaction = (draws - draws.mean(0)).var(1, ddof=1).mean() / (k - 1)
        error = float(np.sqrt(max(test**2, both - 2 * interaction)))
    freedom = (k - 1) * max(1.0, error / training) ** 4 if training else np.inf
    return {
        **_student(value, error, freedom, confidence), "test_noise": test, "training_noise": training,
        "holm": None, "verdict": "", "why": "" if k > 1 else "one seed: training noise is not known and not in the interval",
    }  # fmt: skip


def _student(value: float, error: float, freedom: float, confidence: float) -> dict[str, Any]:
    """Interval, p-value and the difference that would be found four times in five.  Equal predictions have p = 1."""
    from scipy.stats import norm, t  # type: ignore[import-untyped]

    law = t(freedom) if np.isfinite(freedom) else norm

    half = float(law.ppf((1 + confidence) / 2)) * error
    p = float(2 * law.sf(abs(value) / error)) if error else float(value == 0)
    return {
        "value": value, "low": value - half, "high": value + half, "se": error,
        "df": float(freedom) if np.isfinite(freedom) else None, "p": p,
        "detectable": half + float(law.ppf(0.8)) * error,
    }  # fmt: skip


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: adjusted p-values in the given order."""
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    adjusted: Array = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def verdict(found: Mapping[str, Any]) -> str:
    """``better``, ``worse`` or ``none found``."""
    if found["holm"] >= LEVEL:
        return "none found"
    return "better" if (found["value"] > 0) != lower_is_better(found["metric"]) else "worse"
