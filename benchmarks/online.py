"""The bundled log as a stream of days: a model that goes on learning against its copy that stopped.

Each day is predicted before it is trained on, once.  The live model has by then been trained on every earlier day; the frozen
copy on the first day, or on the first week, and never again.  Days begin by the log's local time; its first period, the
evening before the first day, has 70 rows and counts with it.  All but the last four hours are streamed; those are the test split.

    python benchmarks/online.py [--seeds 3] [--quick]

Prints AUC and PCOC of clicks per day, mean over seeds and their standard deviation; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unbraid import recipes
from unbraid.data.declaration import Split
from unbraid.job import train
from unbraid.schedules.online import Online
from unbraid.train import Training

SPLIT = Split(kind="time", valid_from="2022-05-08T00:00+08:00", test_from="2022-05-08T20:00+08:00")
FIRST = {"first day": 2, "first week": 8}  # name -> periods; the first one has 70 rows
TASK = "click"


def streamed(first: int, seed: int, batch: int) -> dict[str, Any]:
    """What one run found: its record and the seconds of training."""
    run = recipes.shared_bottom()
    run = replace(
        run, seed=seed, data=replace(run.data, split=SPLIT),
        schedule=Online(offset=8.0, first=first, first_epochs=2),
        training=Training(batch_size=batch, threads=1),
    )  # fmt: skip
    metrics = train(run, baseline=False).metrics
    return {**metrics["schedule"], "training": metrics["seconds"]["train"]}


def cells(runs: Sequence[dict[str, Any]], day: int, metric: str) -> dict[str, np.ndarray]:
    """Values of all seeds: live, frozen, and their difference."""
    found = {side: np.array([run["periods"][day][side][TASK][metric] for run in runs]) for side in ("live", "frozen")}
    return {**found, "difference": found["live"] - found["frozen"]}


def text(values: np.ndarray, sign: str = "") -> str:
    """Mean and standard deviation."""
    spread = f" ({values.std(ddof=1):.4f})" if len(values) > 1 else ""
    return f"{values.mean():{sign}.4f}{spread}"


def show(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Print a table; returns the means."""
    print(f"\n## Frozen after the {name}, {len(runs)} seeds: mean (deviation)\n")
    print("| day | rows | clicks | AUC, live | AUC, frozen | difference | PCOC, live | PCOC, frozen |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    days = range(len(runs[0]["periods"]))
    for day in days:
        line = runs[0]["periods"][day]
        auc, pcoc = cells(runs, day, "auc"), cells(runs, day, "pcoc")
        shown = [
            text(auc["live"]),
            text(auc["frozen"]),
            text(auc["difference"], "+"),
            text(pcoc["live"]),
            text(pcoc["frozen"]),
        ]
        print(
            "| "
            + " | ".join([line["begin"], f"{line['rows']:,}", f"{line['live'][TASK]['positives']:,}", *shown])
            + " |"
        )
    mean: dict[str, Any] = {}
    for metric in ("auc", "pcoc"):
        of = {k: np.mean([cells(runs, day, metric)[k] for day in days], 0) for k in ("live", "frozen", "difference")}
        mean[metric] = {k: round(float(v.mean()), 5) for k, v in of.items()}
        if metric == "auc":
            print(
                f"\nMean over days: AUC {text(of['live'])} live, {text(of['frozen'])} frozen, {text(of['difference'], '+')}."
            )
    far = {
        side: float(np.mean([abs(cells(runs, d, "pcoc")[side] - 1).mean() for d in days]))
        for side in ("live", "frozen")
    }
    spent = {what: float(np.mean([r["seconds"][what] for r in runs])) for what in ("live", "frozen")}
    training = float(np.mean([r["training"] for r in runs]))
    print(f"Mean |PCOC - 1|: {far['live']:.4f} live, {far['frozen']:.4f} frozen. Seconds a run: {training:.1f} training, "
          f"{spent['live']:.1f} scoring, {spent['frozen']:.1f} scoring with the frozen copy.")  # fmt: skip
    return {**mean, "distance": {k: round(v, 5) for k, v in far.items()}}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, large batches: does it run")
    args = parser.parse_args()
    seeds, batch = (1, 4096) if args.quick else (args.seeds, 256)
    found = {}
    for name, first in FIRST.items():
        found[name] = show(name, [streamed(first, seed, batch) for seed in range(seeds)])
    print(json.dumps({"benchmark": "online", "seeds": seeds, "quick": args.quick, **found}))


if __name__ == "__main__":
    main()
