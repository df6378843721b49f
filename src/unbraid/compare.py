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

p-values are adjusted by Holm (Scandinavian Journal of Statistics 1979) over everything that a reader scans for a finding:
all runs and tasks of the main table, and, apart from these, all runs, tasks and domains.  Intervals are not adjusted.

A comparison is fair if every method had the same trials and budget: one configuration per run, the same seeds, the same
`unbraid.train.Training`.  What a run cost (steps until early stopping, seconds, parameters) is reported beside.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unbraid import config, store
from unbraid.data.encode import encode
from unbraid.data.source import Tables
from unbraid.data.table import Encoded
from unbraid.evaluate import Array, Drawn, Slice, lead_metric, lower_is_better, replicate
from unbraid.job import JobError, baseline_scores, default_baseline, train
from unbraid.render import render_comparison
from unbraid.train import Watcher
from unbraid.types import Schema, Scores

BASELINE = "target_encoding"
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
        resume: keep what is finished in ``out`` and continue the rest; overwrite: delete what is in ``out`` first.
        tables: tables in memory by name.

    Returns:
        What ``compare.json`` holds (see docs/comparing.md).

    Raises:
        JobError: runs that cannot be compared, or a folder that is in the way; the message says what to do.
    """
    out, watcher = Path(out), watcher or Watcher()
    check(runs, seeds, against, any_budget)
    _prepare(out, resume, overwrite)
    found: dict[str, list[Slices]] = {run.name: [] for run in runs}
    costs: dict[str, list[dict[str, Any]]] = {run.name: [] for run in runs}
    first: Scores | None = None
    for number, (seed, run) in enumerate((seed, run) for seed in range(seeds) for run in runs):
        watcher.note(f"[{number + 1}/{seeds * len(runs)}] run `{run.name}`, seed {run.seed + seed}")
        scores, cost = _trial(
            dataclasses.replace(run, seed=run.seed + seed), out / run.name / f"seed-{run.seed + seed}", tables, watcher
        )
        schema = _schema(out / run.name / f"seed-{run.seed + seed}")
        if first is None:
            first = scores
            check_metric(schema, metric)
        same_rows(first, scores, runs[0].name, run.name)
        found[run.name].append(replicate(scores, schema, replicates=replicates))
        costs[run.name].append(cost)
    assert first is not None
    watcher.stage("comparing", 0, 0)
    if default := (runs[0].baseline or default_baseline(runs[0])):
        encoded = Encoded(encode(runs[0].data, tables=tables))
        found[BASELINE] = [replicate(baseline_scores(runs[0], encoded, first), encoded.schema, replicates=replicates)]
        costs[BASELINE] = []
    else:
        watcher.note(f"no {BASELINE}: it needs an id feature, a user or a domain, found {default}")
        if against == BASELINE:
            raise JobError(f"The reference cannot be `{BASELINE}`: there is none for these data.")
    comparison = {
        "reference": against or runs[0].name, "seeds": seeds, "replicates": replicates,
        "budget": {run.name: {key: getattr(run.training, key) for key in SAME_BUDGET} for run in runs},
        "cost": {name: _cost(each) for name, each in costs.items()},
        **tabulate(found, against or runs[0].name, metric),
    }  # fmt: skip
    store.write_text(out / "compare.json", json.dumps(comparison, indent=1))
    store.write_text(out / "compare.md", render_comparison(comparison))
    return comparison


# -------------------------------------------------------------------------------------------------------------- before
def check(runs: Sequence[config.Run], seeds: int, against: str, any_budget: bool) -> None:
    """Raise JobError unless the runs can be told apart and compared."""
    names = [run.name for run in runs]
    if not runs or seeds < 1:
        raise JobError(f"A comparison needs at least one run and one seed. Found {len(runs)} and {seeds}.")
    if twice := sorted({n for n in [*names, BASELINE] if [*names, BASELINE].count(n) > 1}):
        raise JobError(f"Each run needs a `name` of its own (`{BASELINE}` is taken). Found twice: {', '.join(twice)}.")
    if against and against not in (*names, BASELINE):
        raise JobError(f"--against should be one of {', '.join([*names, BASELINE])}. Found {against}.")
    for run in runs[1:]:
        data = _unequal(runs[0].data, run.data, SAME_DATA)
        ours, theirs = ({t.name: t for t in r.data.tasks} for r in (runs[0], run))
        data += [f"task {n}: {ours[n]} / {theirs[n]}" for n in ours if n in theirs and ours[n] != theirs[n]]
        if data or not set(ours) & set(theirs):
            why = "; ".join(data) or f"tasks {list(ours)} / {list(theirs)}"
            raise JobError(f"Runs `{runs[0].name}` and `{run.name}` have other test rows or labels: {why}.")
        if (budget := _unequal(runs[0].training, run.training, SAME_BUDGET)) and not any_budget:
            raise JobError(
                f"Runs `{runs[0].name}` and `{run.name}` have other training budgets: {'; '.join(budget)}. "
                "Make them equal, or allow it with --any-budget; the table then says so."
            )


def _unequal(one: Any, other: Any, keys: Sequence[str]) -> list[str]:
    return [f"{k}: {getattr(one, k)} / {getattr(other, k)}" for k in keys if getattr(one, k) != getattr(other, k)]


def check_metric(schema: Schema, metric: str) -> None:
    """Raise JobError unless some task has the metric and it has a direction."""
    have = {"binary": "auc gauc logloss ece accuracy", "multiclass": "accuracy logloss ece", "real": "rmse mae"}
    allowed = sorted({name for task in schema.tasks for name in have[task.kind].split()})
    if metric and metric not in allowed and "@" not in metric:
        raise JobError(f"--metric should be one of {', '.join(allowed)} (or ndcg@5 ...). Found {metric}.")


def _prepare(out: Path, resume: bool, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise JobError(f"{out} is a file. Choose another --out.")
    if not (out.exists() and any(out.iterdir())):
        return
    if not any(out.glob("*/seed-*/run.toml")):
        raise JobError(f"{out} is not empty and holds no comparison. Choose another --out.")
    if overwrite:
        shutil.rmtree(out)
    elif not resume:
        raise JobError(
            f"{out} holds a comparison. Continue it with --resume, delete it with --overwrite, or choose another --out."
        )


def same_rows(first: Scores, other: Scores, name: str, other_name: str) -> None:
    """Raise JobError unless two runs predicted the same test rows with the same labels."""
    pairs: list[tuple[str, Any, Any]] = [(k, getattr(first, k), getattr(other, k)) for k in ("row", "group", "weight")]
    for task in set(first.labels) & set(other.labels):
        known = first.observed[task]
        pairs += [(f"observed {task}", known, other.observed[task])]
        pairs += [(f"label {task}", first.labels[task][known], other.labels[task][known])]
    if wrong := [what for what, a, b in pairs if not np.array_equal(a, b)]:
        raise JobError(f"Test rows of runs `{name}` and `{other_name}` differ in: {', '.join(wrong)}.")


# --------------------------------------------------------------------------------------------------------------- trials
def _trial(run: config.Run, folder: Path, tables: Tables | None, watcher: Watcher) -> tuple[Scores, dict[str, Any]]:
    """Train one run with one seed, or find it trained; its test scores and its cost."""
    path = folder / "scores.safetensors"
    metrics = train(
        run, folder, tables=tables, resume=(folder / "run.toml").exists(), baseline=False, keep_scores=True, watcher=watcher
    ).metrics  # fmt: skip
    cost = {"seconds": metrics["seconds"]["train"], "steps": metrics["steps"], "parameters": metrics["parameters"]}
    return Scores(**store.load(path)), cost


def _schema(folder: Path) -> Schema:
    from unbraid.data.fitted import Fitted

    return Fitted.load(folder).schema


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
        ``values``: task -> domain (``""``: all) -> run -> metric -> mean, sd, seeds; ``differences``: a list.
    """
    values: dict[str, Any] = {}
    differences: list[dict[str, Any]] = []
    for name, trials in found.items():
        for (task, domain), cell in trials[0].items():
            seeds = {m: [trial[task, domain].metrics[m].value for trial in trials] for m in cell.metrics}
            at = values.setdefault(task, {}).setdefault(
                domain, {"rows": cell.rows, "positives": cell.positives, "runs": {}}
            )
            at["runs"][name] = {m: _spread(each) for m, each in seeds.items()}
            theirs = found[reference][0].get((task, domain))
            chosen = metric or lead_metric(cell.metrics)
            if name == reference or theirs is None or chosen not in cell.metrics:
                continue
            ours = [trial[task, domain].metrics[chosen] for trial in trials]
            base = [trial[task, domain].metrics[chosen] for trial in found[reference]]
            entry = {"task": task, "domain": domain, "run": name, "metric": chosen}
            differences.append({**entry, **difference(ours, base)})
    for whole in (True, False):
        family = [d for d in differences if (d["domain"] == "") == whole and d["p"] is not None]
        for each, adjusted in zip(family, holm([d["p"] for d in family]), strict=True):
            each["holm"] = adjusted
            each["verdict"] = verdict(each)
    return {"values": values, "differences": differences}


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
