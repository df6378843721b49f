"""What does it cost to keep tasks from hurting each other?  Ratios of training times to the joint update's.

Every case trains the MMoE of `train_speed` (400,000 rows, eight id columns, two or four tasks, batches of 4,096) by the joint
update and by another method, with the same encoded rows, lazy tables and row optimiser.  Encoding lies outside the timing.
Rounds of both sides alternate in one process, so that other work on the machine hits both; each case has a process of its own.

    python benchmarks/interference_cost.py [--quick] [--threads 1] [--only adatask_2tasks_cost ...] [--profile adatask]

| ratio | above | below |
|---|---|---|
| ``adatask_2tasks_cost`` | a step of AdaTask, two tasks | a step of the joint update |
| ``adatask_4tasks_cost`` | the same with four tasks | the same with four tasks |
| ``forkmerge_cost_per_branch`` | ForkMerge with two branches, searches included | two joint trainings of as many steps |
| ``dtrain_cost`` | a training by D-Train, eight domains, validation included | a joint one of as many steps, a head per domain |
| ``dtrain_each_cost`` | the same, each domain with all steps of phase 3 | the same |

Ratios are medians over pairs of rounds of the process's CPU time (prefetch thread included: both sides use the same batches);
``NAME.wall`` is by the clock.  ``joint_2tasks_rows`` is the joint side's rows per CPU-second, to hold against `train_speed`'s.
``--profile`` prints where the steps of one update spend their time.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import train_speed
from train_speed import BATCH, Ours, Round, our_mmoe, timed

from unbraid.data.table import Encoded
from unbraid.heads import Heads
from unbraid.losses.supervised import Supervised
from unbraid.optim.adatask import AdaTask
from unbraid.optim.joint import Joint
from unbraid.schedules.d_train import DTrain
from unbraid.schedules.fork_merge import ForkMerge
from unbraid.schedules.one_stage import OneStage
from unbraid.train import Local, Training

TASKS = ("click", "buy", "like", "share")
Figures = dict[str, Any]


def encoded(folder: Path, quick: bool, tasks: int) -> Encoded:
    """The log of `train_speed` with as many planted tasks."""
    train_speed.TASKS = TASKS[:tasks]
    return train_speed.encoded(40_000 if quick else 400_000, folder)


def side(data: Encoded, config: Joint) -> Ours:
    """MMoE with lazy tables, trained by an update."""
    torch.manual_seed(0)
    model = our_mmoe(data.schema, lazy=True)
    ours = Ours(model, data)
    ours.update = config.build(model, steps=1, weights={})
    return ours


def alternate(below: Any, above: Any, steps: int, pairs: int) -> Figures:
    """Median ratio of the times of two sides over alternating rounds, and rows per second of each."""
    for one in (below, above):  # moments are made, pages touched
        one.train(3)
        one.settle()
    found: list[tuple[Round, Round]] = []
    for number in range(pairs):
        order = (below, above) if number % 2 else (above, below)
        rounds = dict(zip(map(id, order), [timed(one, steps) for one in order], strict=True))
        found.append((rounds[id(below)], rounds[id(above)]))
    figures: Figures = {}
    for clock in ("cpu", "wall"):
        times = [(getattr(a, clock), getattr(b, clock)) for a, b in found]
        figures[clock] = {
            "joint": round(steps * BATCH / statistics.median(a for a, _ in times)),
            "other": round(steps * BATCH / statistics.median(b for _, b in times)),
            "ratio": round(statistics.median(b / a for a, b in times), 3),
        }
    return figures


def adatask(folder: Path, quick: bool, tasks: int) -> Figures:
    """A step of AdaTask over a joint step."""
    data = encoded(folder, quick, tasks)
    return alternate(side(data, Joint()), side(data, AdaTask()), *((4, 3) if quick else (8, 9)))


class Whole:
    """Whole trainings by a schedule, from the same weights, with what they judge on the way (2,000 validation rows)."""

    def __init__(self, data: Encoded, schedule: Any, heads: Heads | None = None) -> None:
        torch.manual_seed(0)
        self.data, self.schedule, self.model = data, schedule, our_mmoe(data.schema, lazy=True, heads=heads)

    def train(self, steps: int) -> None:
        """Train a copy of the model."""
        terms = [Supervised().bind(self.data.schema)]
        session = Local(self.data, terms, Joint(), Training(batch_size=BATCH), {}, seed=0)
        self.schedule(session, copy.deepcopy(self.model), steps)

    def settle(self) -> None:
        """Nothing: a schedule does it itself."""


def per_branch(folder: Path, quick: bool) -> Figures:
    """Two branches in four rounds, all six mixtures searched, over two joint trainings.

    As many validation rows are searched in all as half of the rows that a branch trains on.
    """
    data = encoded(folder, quick, 2)
    merged = ForkMerge(targets=("click",), branches="two", rounds=4, metric="logloss")
    figures = alternate(Whole(data, OneStage()), Whole(data, merged), *((4, 2) if quick else (24, 5)))
    for row in figures.values():
        row["ratio"] = round(row["ratio"] / 2, 3)
    return figures


def phases(folder: Path, quick: bool, **options: Any) -> Figures:
    """D-Train over the eight values of the smallest column, over a shared bottom with a head per domain, of as many steps."""
    train_speed.TASKS = TASKS[:2]
    data = train_speed.encoded(40_000 if quick else 400_000, folder, domain="os")
    heads = Heads(by="domain")
    joint, ours = Whole(data, OneStage(), heads), Whole(data, DTrain(**options), heads)
    return alternate(joint, ours, *((4, 2) if quick else (48, 5)))


# name -> (cache, quick) -> {"cpu": {"joint", "other", "ratio"}, "wall": the same}
CASES: dict[str, Callable[[Path, bool], Figures]] = {
    "adatask_2tasks_cost": lambda folder, quick: adatask(folder, quick, 2),
    "adatask_4tasks_cost": lambda folder, quick: adatask(folder, quick, 4),
    "forkmerge_cost_per_branch": per_branch,
    "dtrain_cost": phases,
    "dtrain_each_cost": lambda folder, quick: phases(folder, quick, tune="each"),
}


def profile(name: str, folder: Path, quick: bool) -> None:
    """Print where the steps of an update spend their time."""
    config = {"joint": Joint(), "adatask": AdaTask()}[name]
    one = side(encoded(folder, quick, 2), config)
    one.train(3)
    began = time.process_time()
    with torch.profiler.profile() as found:
        one.train(8)
    print(f"{name}: {1000 * (time.process_time() - began) / 8:.0f} ms of CPU per step, profiler included")
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def apart(name: str, threads: int, folder: Path, quick: bool) -> Figures:
    """One case in a process of its own."""
    command = [sys.executable, __file__, "--cache", str(folder), "--threads", str(threads), "--case", name]
    done = subprocess.run([*command, *(["--quick"] if quick else [])], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows and steps: does it run")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--cache", default="", help="keep the encoded log here")
    parser.add_argument("--profile", choices=["joint", "adatask"])
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios: dict[str, float] = {}
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.cache or scratch)
        if args.profile:
            profile(args.profile, folder, args.quick)
            return
        if args.case:
            print(json.dumps(CASES[args.case](folder, args.quick)))
            return
        print(f"load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print(f"{'case':<26} {'clock':>5} {'joint rows/s':>13} {'other rows/s':>13} {'cost':>7}")
        for name in args.only:
            figures[name] = found = apart(name, args.threads, folder, args.quick)
            ratios[name], ratios[f"{name}.wall"] = found["cpu"]["ratio"], found["wall"]["ratio"]
            for clock, row in found.items():
                line = f"{name:<26} {clock:>5} {row['joint']:>13,} {row['other']:>13,} {row['ratio']:>7.3f}"
                print(line, flush=True)
    if "adatask_2tasks_cost" in figures:
        ratios["joint_2tasks_rows"] = figures["adatask_2tasks_cost"]["cpu"]["joint"]
    print(json.dumps({"benchmark": "interference_cost", "ratios": ratios, "figures": figures}))


if __name__ == "__main__":
    main()
