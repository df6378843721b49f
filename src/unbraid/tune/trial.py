"""One trial: train a candidate, judge it on the validation split, stop it early if it is not worth its time.

A trial writes nothing: a killed one leaves no file behind, and a pruned one has none to remove.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from unbraid import config, job, parallel
from unbraid.bundle import trained_splits
from unbraid.data.source import Tables
from unbraid.evaluate import evaluate, lower_is_better
from unbraid.train import Watcher
from unbraid.train.scoring import check_metric, selected
from unbraid.types import Schema
from unbraid.workers import Worker

Ask = Callable[[int, float], bool]  # (number of the look, from 1; the objective there) -> is the trial to be pruned?
KEY = "--metric"


class Pruned(Exception):
    """The trial is not worth its time."""


@dataclass(frozen=True)
class Objective:
    """What a search is for, on the validation split.

    Args:
        metric: as ``training.metric``: of the target tasks that have it their mean, or ``TASK.metric``; empty: the value of the
            run's ``selection``.
        seeds: trainings of a trial: with the run's seed, seed + 1, ...  The objective is their mean.
    """

    metric: str
    seeds: int = 1

    @classmethod
    def of(cls, run: config.Run, metric: str = "", seeds: int = 1) -> Objective:
        """The objective that was asked for, else what the run selects by.

        Raises:
            JobError: no task has the metric, it has no better side, or the validation split is trained on or not to be judged by.
        """
        if seeds < 1:
            raise job.JobError(f"--seeds should be at least 1. Found {seeds}.")
        if "valid" in trained_splits(run):
            raise job.JobError(
                f"Schedule `{run.schedule.kind}` trains on the validation rows, which a search has to judge by. Tune the run "
                "with schedule `one_stage`, and use what it finds."
            )
        if run.selection is not None and not metric:
            return cls("", seeds)
        metric = metric or run.training.metric
        if metric.rpartition(".")[2] == "calibration":
            raise job.JobError(f"{KEY} should be a metric with a better side. Found `{metric}`, which is best at 1.")
        try:
            check_metric(metric, _schema(run), key=KEY)
        except ValueError as error:
            raise job.JobError(str(error)) from error
        return cls(metric, seeds)

    def name(self, run: config.Run) -> str:
        """What it is called."""
        return self.metric or f"selection {getattr(run.selection, 'kind', '')}"

    def falls(self, run: config.Run) -> bool:
        """Is a smaller value the better one?"""
        if self.metric or run.selection is None:
            return lower_is_better(self.metric.rpartition(".")[2])
        return run.selection.lower_is_better

    def judge(self, run: config.Run, judged: float | None, metrics: Mapping[str, Any]) -> float | None:
        """The value, from that of the run's own selection and from metrics of the validation split."""
        if not self.metric:
            return judged
        return selected(metrics, self.metric, _schema(run), key=KEY)[0]


def _schema(run: config.Run) -> Schema:
    """As much as choosing a metric reads."""
    return Schema(run.data.features, run.data.tasks)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: ``complete``, ``pruned`` or ``failed``; values of its seeds; its time and looks; what went wrong."""

    state: str
    values: tuple[float, ...] = ()
    seconds: float = 0.0
    looks: tuple[float, ...] = field(default=())
    error: str = ""

    @property
    def value(self) -> float | None:
        """The mean over seeds."""
        return float(np.mean(self.values)) if self.values else None


class _Looks(Watcher):
    """Hears of the looks at the validation split of the first seed's training, and stops it when told to."""

    def __init__(self, run: config.Run, objective: Objective, ask: Ask | None) -> None:
        self.run, self.objective, self.ask, self.found = run, objective, ask, list[float]()
        self.steps = 0  # of the call of ``fit`` that is going on

    def stage(self, what: str, done: int, total: int) -> None:
        """See how long the training will be."""
        self.steps = total if what == "training" else self.steps

    def evaluated(self, step: int, metric: str, value: float | None, best: bool, values: Mapping[str, Any]) -> None:
        """Pass the objective on.  Raises Pruned, but not at the last look, when all is done."""
        found = self.objective.judge(self.run, value, values)
        if self.ask is None or found is None:
            return
        self.found.append(found)
        if self.ask(len(self.found), found) and step < self.steps:
            raise Pruned


def measured(run: config.Run, objective: Objective, tables: Tables | None, ask: Ask) -> Outcome:
    """Train a candidate with every seed.  Whatever goes wrong is in the outcome, since other candidates may do."""
    began, values, looks = time.monotonic(), list[float](), list[float]()

    def ended(state: str, error: str = "") -> Outcome:
        return Outcome(state, tuple(values), round(time.monotonic() - began, 2), tuple(looks), error)

    try:
        for number in range(objective.seeds):
            watcher = _Looks(run, objective, None if number else ask)
            looks = looks if number else watcher.found
            values.append(_value(replace(run, seed=run.seed + number), objective, tables, watcher))
        return ended("complete")
    except Pruned:
        return ended("pruned")
    except (EOFError, BrokenPipeError):  # the process that asked is gone
        raise
    except Exception as error:
        values.clear()
        return ended("failed", f"{type(error).__name__}: {error}")


def _value(run: config.Run, objective: Objective, tables: Tables | None, watcher: Watcher) -> float:
    """The objective of one training."""
    with parallel.together(run.training.device) as device:
        encoded, model, session = job.learn(run, None, device=device, tables=tables, watcher=watcher)
    metrics: dict[str, Any] = {}
    if objective.metric:
        metrics = evaluate(session.score(model, "valid"), encoded.schema, replicates=0)
    value = objective.judge(run, session.best.get("value"), metrics)
    if value is None:
        name = objective.metric.rpartition(".")[2]
        why = [f"{task}: {found[name]['why']}" for task, found in metrics.items() if found.get(name, {}).get("why")]
        raise job.JobError(
            f"`{objective.name(run)}` has no value on the validation split ({'; '.join(why) or 'no look had one'})."
        )
    if not np.isfinite(value):
        raise job.JobError(f"`{objective.name(run)}` is {value} on the validation split.")
    return value


# ----------------------------------------------------------------------------------------------------- in a process apart
class Trainer(Worker):
    """A process that trains trials, one thread each."""

    name = "unbraid-tune"

    def give_trial(self, number: int, run: config.Run, objective: Objective, tables: Tables | None) -> None:
        """Hand over a candidate.  The answers are messages ``look`` (to be replied to by `reply`) and ``done``."""
        self.give(number, pickle.dumps((run, objective, tables), protocol=pickle.HIGHEST_PROTOCOL))

    def reply(self, prune: bool) -> None:
        """Answer a look."""
        with contextlib.suppress(OSError):  # a process that is gone is noticed when it is listened to
            self.pipe.send(prune)

    def lost(self, ending: str) -> str:
        """What to say of a process that is gone."""
        return f"The process of trial {self.place} ended by {ending}. With fewer --jobs each has more memory."

    @staticmethod
    def work(pipe: Connection, settings: tuple[int, torch.dtype, bool]) -> None:
        """Train trials until there are no more."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first ends the others
        torch.set_num_threads(1)

        def ask(look: int, value: float) -> bool:
            pipe.send(("look", (look, value)))
            return bool(pipe.recv())

        with contextlib.suppress(EOFError, OSError):  # the first process is gone
            while True:
                run, objective, tables = pickle.loads(pipe.recv_bytes())
                one = replace(run, training=replace(run.training, threads=1))
                pipe.send(("done", measured(one, objective, tables, ask)))
