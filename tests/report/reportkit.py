"""A report with everything in it: metrics of made scores by `evaluate`, findings of every grade, each kind of plot."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
from toylog import make_run

from unbraid import config
from unbraid.compare import tabulate, with_means
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, Proof, Remedy, Report, Spent
from unbraid.diagnosis.plots import Bars, Heat, Histogram, Lines, Plot, Reliability, histogram
from unbraid.evaluate import Metrics, evaluate, replicate
from unbraid.types import Schema, Scores, Task

TASKS = ("click", "like", "long_view")
SITES = ("home", "search", "mail", "tablet")
HOSTILE = "<script>alert('x')</script>"


def scores_of(strength: float, tasks: tuple[str, ...], sites: tuple[str, ...], noise: int = 0) -> tuple[Scores, Schema]:
    """Scores of 900 rows of 60 users; ``strength``: how much they know; ``noise``: seed of what they do not."""
    rng, rows = np.random.default_rng(0), 900
    truth = {task: rng.normal(size=rows) - 0.5 * i for i, task in enumerate(tasks)}
    labels = {task: (rng.random(rows) < 1 / (1 + np.exp(-2 * z))).astype(float) for task, z in truth.items()}
    share = np.arange(len(sites), 0, -1) / sum(range(len(sites) + 1))
    guess = np.random.default_rng(noise + 1)
    scores = Scores(
        logits={task: strength * z + guess.normal(size=rows) for task, z in truth.items()},
        hidden={}, labels=labels, observed={task: rng.random(rows) < 0.9 for task in tasks},
        domain=rng.choice(len(sites), rows, p=share) + 2, weight=None, group=rng.integers(0, 60, rows), row=np.arange(rows),
    )  # fmt: skip
    return scores, Schema((), tuple(map(Task, tasks)), domains=("(unknown)", "(missing)", *sites))


@functools.cache
def metrics(strength: float, tasks: tuple[str, ...] = TASKS, sites: tuple[str, ...] = SITES) -> Metrics:
    """`evaluate` of such scores."""
    return evaluate(*scores_of(strength, tasks, sites), replicates=50)


@functools.cache
def comparison(tasks: tuple[str, ...] = TASKS, runs: tuple[str, ...] = ("toy", "uw", "worse")) -> Metrics:
    """What `unbraid.compare.compare` returns, of such scores: the second run knows more, the third less than the first."""
    strengths = dict(zip(runs, (0.8, 1.3, 0.4), strict=True))
    found = {
        name: [replicate(*scores_of(each, tasks, SITES, 10 * seed), replicates=60) for seed in range(3)]
        for name, each in strengths.items()
    }
    cost = {"configurations": 1, "steps": 200.0, "seconds": 11.2, "parameters": {"tables": 5632, "dense": 9864}}
    budget = {"batch_size": 64, "steps": 200, "epochs": 0}
    return {
        "reference": runs[0], "seeds": 3, "replicates": 60, "budget": dict.fromkeys(runs, budget),
        "cost": dict.fromkeys(runs, cost), "oracle": [], **tabulate(with_means(found), runs[0]),
    }  # fmt: skip


def plots() -> dict[str, Plot]:
    """One of each kind."""
    rng = np.random.default_rng(1)
    rank = np.arange(1, 17)
    angles = np.array([[1.0, -0.42, 0.10], [-0.42, 1.0, 0.31], [0.10, 0.31, 1.0]])
    p = np.linspace(0.05, 0.95, 10)
    return {
        "lines": Lines(
            "Spectrum of the item table", "rank", "singular value (relative)",
            {"before": (rank, 1 / rank), "after": (rank, 1 / rank**2)},
            low={"after": 0.8 / rank**2}, high={"after": 1.2 / rank**2}, reference=0.05, log_y=True,
        ),
        "bars": Bars(
            "What training together did", "difference in AUC", TASKS, (0.011, -0.024, None), low=(0.004, -0.036, None),
            high=(0.018, -0.012, None), x="task", note="Of like it took.",
        ),
        "heat": Heat(
            "Cosines of the tasks' gradients", "task", "other task", "cosine", TASKS, TASKS, angles, scale="diverging", centre=0,
        ),
        "histogram": histogram(
            "Lengths of histories", "events", {"train": rng.poisson(8, 500), "test": rng.poisson(6, 300)}, bins=12,
            marks={"limit": 10},
        ),
        "reliability": Reliability(
            "Predicted and happened", {"click": p}, {"click": p**1.4}, {"click": np.arange(10) * 9 + 4},
            low={"click": np.maximum(p**1.4 - 0.05, 0)}, high={"click": np.minimum(p**1.4 + 0.05, 1)},
        ),
    }  # fmt: skip


def gaps() -> tuple[Plot, ...]:
    """Plots of which nothing is known."""
    return (
        Lines("No line", "step", "loss", {"a": ((1, 2), (None, None))}), Bars("No bar", "gain", ("a",), (None,)),
        Heat("No map", "task", "layer", "share", ("a",), ("b",), ((None,),)),
        Histogram("No counts", "events", (0, 1), {"a": (0,)}, log_y=True),
        Reliability("No bins", {"a": (None,)}, {"a": (None,)}, {"a": (0,)}),
    )  # fmt: skip


def curve() -> tuple[dict[str, Any], ...]:
    """Lines of a training log."""
    steps = range(20, 201, 20)
    return tuple(
        {
            "call": 0, "step": step, "losses": {task: 0.69 * np.exp(-step / 300) + 0.02 * i for i, task in enumerate(TASKS)},
            "valid": {
                task: {"auc": {"value": 0.5 + 0.2 * (1 - np.exp(-step / 80)) - 0.03 * i, "low": None, "high": None}, "rows": 9,
                       "positives": 4, "domains": {}}
                for i, task in enumerate(TASKS)
            },
        }
        for step in steps
    )  # fmt: skip


def make_report(**changes: Any) -> Report:
    """Three findings, two of them with remedies and one proved; two values as usual."""
    run, shown = make_run(), plots()
    weighed = replace(run, name="uw", update=config.Weighted(lr=0.01))
    smaller = replace(run, name="half_rate", update=replace(run.update, lr=0.005))
    conflict = Diagnosis(
        "conflict", "click and like", 0.42, 0.05, 0.3, "The gradients of click and like point apart in 42 % of the steps.",
        unit="share of steps", low=0.36, high=0.48, paper="Yu et al., NeurIPS 2020, arXiv 2001.06782", page="analyses.md",
        remedies=(
            Remedy("uw", "Weigh each task's loss by its uncertainty, so that the louder one does not decide alone.", "update",
                   weighed, measure=Measure("like", "auc"), page="methods/uw.md"),
            Remedy("half_rate", "Halve the learning rate, so that steps undo each other less.", "update.lr", smaller),
        ),
        evidence={"plots": (shown["heat"], shown["bars"]), "steps": 40},
    )  # fmt: skip
    calibration = Diagnosis(
        "calibration", "click", 0.13, 0.02, 0.2, "Probabilities of click are off by 13 points on average.",
        low=0.1, high=0.16, page="calibration.md", because="conflict: click and like",
        evidence={"plots": (shown["reliability"],)},
        remedies=(
            Remedy("calibrate", "Fit a temperature on held-out rows.", command="unbraid calibrate runs/toy --out runs/calm"),
        ),
    )  # fmt: skip
    collapse = Diagnosis(
        "collapse", "table item", 0.35, 0.3, 0.6, "The table of item uses 35 % fewer dimensions than it has.",
        evidence={"plots": (shown["lines"],)},
    )  # fmt: skip
    length = Diagnosis(
        "history length", "seen", 0.1, 0.3, 0.6, "Few histories are cut off.", evidence={"plots": (shown["histogram"],)}
    )
    overfit = Diagnosis("overfit", "like", 0.04, 0.03, 0.1, "Validation is as good as training.", low=0.01, high=0.07)
    proof = Proof(
        "conflict", "click and like", "uw", Measure("like", "auc"), 0.611, 0.634, 0.023, 0.009, 0.037, 0.004, 3, True, True,
        Spent(200, 11.2), Spent(600, 35.1),
    )  # fmt: skip
    report = Report(
        title="toy", facts={"data": "log, 600 rows", "steps": "200", "seconds": "11", "versions": "torch 2.13.0"},
        tasks={"click": "binary, target", "like": "binary, target", "long_view": "binary, auxiliary"},
        metrics=metrics(1.0), baseline=metrics(0.4), curve=curve(),
        diagnoses=(conflict, calibration, collapse, overfit, length), skipped={"attention": "no history encoder scores events"},
        failed={"leak": "KeyError: 'time'"}, proofs=(proof,), toml=config.dumps(run),
    )  # fmt: skip
    return replace(report, **changes)


def hostile() -> Report:
    """A report whose every name is an attack on the page."""
    report, shown = make_report(), Bars(HOSTILE, HOSTILE, (HOSTILE,), (0.1,), x=HOSTILE, note=HOSTILE)
    found = replace(
        report.diagnoses[0], name=HOSTILE, where=HOSTILE, reading=HOSTILE, unit=HOSTILE, paper=HOSTILE, because=HOSTILE,
        page=f'"{HOSTILE}', evidence={"plots": (shown,)},
        remedies=(Remedy(HOSTILE, HOSTILE, command=HOSTILE, page="javascript:alert(1)"),),
    )  # fmt: skip
    line = {"step": 1, "losses": {HOSTILE: 0.5}}
    names = {HOSTILE: HOSTILE}
    return replace(
        report, title=HOSTILE, diagnoses=(found,), curve=(line, {**line, "step": 2}), facts=names, skipped=names, failed=names,
        tasks=names, metrics=metrics(1.0, (HOSTILE,), (HOSTILE, "x")), baseline=metrics(0.4, (HOSTILE,), (HOSTILE, "x")),
    )  # fmt: skip
