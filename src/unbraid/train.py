"""The one loop, and the session that a schedule drives it through.

A batch goes through the model, terms make losses by objective, the update changes parameters, callbacks look on.  Methods
are terms, updates, towers and schedules; nothing here knows their names.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unbraid import store
from unbraid.data.table import Encoded, steps_per_epoch
from unbraid.evaluate import evaluate, lower_is_better
from unbraid.types import FORBID, Batch, Schema, Scores, State, Term, Update

Callback = Callable[[int, Batch, Mapping[str, Tensor]], bool]  # (steps done, batch, losses) -> stop?


@dataclass(frozen=True)
class Training:
    """How long, how fast, and when to look.

    Args:
        batch_size: rows per step; epochs: passes over the training rows; steps: instead of epochs, when above 0.
        evaluate_every: steps between evaluations on the validation split; 0 is once per epoch.
        metric: what early stopping and the kept weights go by: a metric averaged over target tasks (``auc``,
            ``logloss``, ``rmse`` ...), or ``TASK.metric``.
        patience: stop after so many evaluations without a better value; the best weights are kept.  0: train to the end
            and keep the last weights.
        checkpoint_seconds, checkpoint_steps: write a checkpoint so often (0: not by that measure).
        device: where to train; ``auto`` is CUDA when there is one.
        threads: of torch on the CPU; 0 leaves its own choice.  Small models gain little from a second thread, and on a
            machine whose cores are busy two threads can be ten times slower than one.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    batch_size: int = 4096
    epochs: float = 1.0
    steps: int = 0
    evaluate_every: int = 0
    metric: str = "auc"
    patience: int = 0
    checkpoint_seconds: float = 60.0
    checkpoint_steps: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Parameter `{name}` should be positive. Found {getattr(self, name)}.")
        for name in ("steps", "evaluate_every", "patience", "checkpoint_seconds", "checkpoint_steps", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"Parameter `{name}` should not be negative. Found {getattr(self, name)}.")

    def total_steps(self, rows: int) -> int:
        """Training steps for so many training rows."""
        return self.steps or max(1, round(self.epochs * steps_per_epoch(rows, self.batch_size)))


def fit(
    model: nn.Module, batches: Iterator[Batch], terms: Sequence[Term], update: Update, *,
    steps: int, start: int = 0, callbacks: Sequence[Callback] = (),
) -> int:  # fmt: skip
    """Train from step ``start`` until ``steps`` steps are done or a callback says stop.  Returns the steps done."""
    model.train()
    for step in range(start, steps):
        batch = next(batches)
        output = model(batch, step)
        losses: dict[str, Tensor] = {}
        for term in terms:
            for objective, loss in term(output, batch, step).items():
                losses[objective] = losses[objective] + loss if objective in losses else loss
        update(losses, output)
        stop = [callback(step + 1, batch, losses) for callback in callbacks]
        if any(stop):
            return step + 1
    return steps


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[Batch], schema: Schema, *, hidden: bool = False, device: str = "cpu"
) -> Scores:
    """The model's logits on some batches, with what metrics need.

    Args:
        hidden: keep each task's (N, H) hidden vectors, too.
    """
    was_training = model.training
    model.eval()
    parts: list[dict[str, Any]] = []
    for batch in batches:
        output = model(batch.to(device))
        parts.append({
            "logits": {k: v.float().cpu().numpy() for k, v in output.logits.items()},
            "hidden": {k: v.cpu().numpy() for k, v in output.hidden.items()} if hidden else {},
            "labels": {k: v.numpy() for k, v in batch.labels.items()},
            "observed": {k: v.numpy() for k, v in batch.observed.items()},
            "meta": {k: v.numpy() for k, v in batch.meta.items()},
            "domain": batch.domain.numpy(), "row": batch.row.numpy(),
            "weight": None if batch.weight is None else batch.weight.numpy(),
        })  # fmt: skip
    model.train(was_training)
    if not parts:
        raise ValueError("There are no rows to predict.")
    joined = {key: _join([part[key] for part in parts]) for key in parts[0]}
    meta = joined.pop("meta")
    group = meta.pop("user", None)
    if group is None:  # requests nest in users, so without these each request is one, and every other row
        group = joined["row"]
        if "request" in meta:
            group = np.where(meta["request"] >= 0, meta["request"], -1 - group)
    return Scores(group=group, meta=meta, domains=schema.domains, **joined)


def _join(parts: list[Any]) -> Any:
    if parts[0] is None:
        return None
    if isinstance(parts[0], dict):
        return {key: _join([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------------------ the session
class Watcher:
    """Someone who is told what happens (the command line's progress bar).  This one says nothing."""

    def stage(self, what: str, done: int, total: int) -> None:
        """A piece of work outside training."""

    def step(self, done: int, total: int, rows_per_second: float, losses: Mapping[str, float]) -> None:
        """Some training steps are done."""

    def evaluated(self, step: int, metric: str, value: float | None, best: bool, values: Mapping[str, Any]) -> None:
        """The validation split was evaluated."""

    def note(self, text: str) -> None:
        """Anything else."""


@dataclass
class Local:
    """The session on one machine: what a schedule may use (see `unbraid.types.Session`).

    Every call of ``fit`` has a number; with ``folder``, each writes checkpoints and its result there, so that a schedule
    that is run again with ``resume`` passes its finished calls and continues the one that was interrupted, bit-equal.
    """

    data: Encoded
    terms: Sequence[Term]
    update: Any
    training: Training
    weights: Mapping[str, float]
    seed: int
    folder: Path | None = None
    resume: bool = False
    device: str = "cpu"
    watcher: Watcher = field(default_factory=Watcher)
    seconds: float = 0.0  # of training in all processes, evaluation apart
    steps: int = 0  # done
    calls: int = 0
    record: Mapping[str, Any] | None = None  # what the schedule kept
    _cache: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self.data.schema

    def rows(self, split: str) -> np.ndarray:
        """Ascending row numbers of ``train``, ``valid`` or ``train+valid``; the test split is refused."""
        if split not in ("train", "valid", "train+valid"):
            raise ValueError(f"A session reads `train` and `valid` only. Found `{split}`.")
        if split not in self._cache:
            self._cache[split] = np.sort(np.concatenate([self.data.split(part) for part in split.split("+")]))
        return self._cache[split]

    def times(self, rows: np.ndarray) -> tuple[np.ndarray, float]:
        """(n,) int64 times of rows in the log's own unit since 1970 in UTC, and how many of these units make a second.

        Raises:
            ValueError: the log has no time.
        """
        if "time" not in self.data.columns:
            raise ValueError("The schedule needs the time of each row: set `data.time`.")
        return self.data.columns["time"][rows].astype(np.int64), float(self.data.about["per_second"])

    def steps_of(self, rows: int, epochs: int) -> int:
        """Steps in which ``fit`` with ``stream`` reads so many rows ``epochs`` times, each row as often."""
        return epochs * steps_per_epoch(rows, self.training.batch_size, whole=True)

    def keep(self, record: Mapping[str, Any]) -> None:
        """What the schedule found on its way (plain values), for ``metrics.json``."""
        self.record = record

    def score(self, model: nn.Module, split: str = "valid", rows: np.ndarray | None = None) -> Scores:
        """Predictions on a split, or on some of its rows (row numbers)."""
        allowed = self.rows(split)
        chosen = allowed if rows is None else _inside(np.unique(rows), allowed)
        batches = self.data.in_order(chosen, 4 * self.training.batch_size)
        return predict(model, batches, self.data.schema, device=self.device)

    def fork(self, model: nn.Module, state: State) -> tuple[nn.Module, State]:
        """Independent copies."""
        return copy.deepcopy(model), copy.deepcopy(state)

    def checkpoint(self, tag: str, state: State, *, done: bool = False) -> None:
        """Keep a schedule's own state under a tag.

        Args:
            done: the state holds all that the calls of ``fit`` so far made.  Their own checkpoints are removed, and
                `restore` counts calls, steps and seconds on from here.
        """
        if self.folder is None:
            return
        counts = {"calls": self.calls, "steps": self.steps, "seconds": self.seconds} if done else None
        store.save(self.folder / f"schedule-{tag}.safetensors", {"state": state, "counts": counts})
        for call in range(self.calls if done else 0):
            (self.folder / f"fit-{call}.safetensors").unlink(missing_ok=True)

    def restore(self, tag: str) -> State | None:
        """The state kept under a tag, when resuming."""
        path = self.folder / f"schedule-{tag}.safetensors" if self.folder is not None else None
        if not self.resume or path is None or not path.exists():
            return None
        found = store.load(path)
        if found["counts"] is not None:
            self.calls, self.steps, self.seconds = (found["counts"][name] for name in ("calls", "steps", "seconds"))
        return found["state"]

    def fit(
        self, model: nn.Module, steps: int, *, weights: Mapping[str, float] | None = None, rows: np.ndarray | None = None,
        trainable: Callable[[str], bool] | None = None, update_state: State | None = None, seed: int | None = None,
        stream: bool = False, total: int = 0,
    ) -> tuple[nn.Module, State]:  # fmt: skip
        """Train the model in place.

        Args:
            steps: optimiser steps; weights: objective -> weight instead of the run's; rows: row numbers instead of all
                training rows; trainable: parameter name -> does it train; update_state: what an earlier call returned.
            stream: no row is left out of a pass for want of a full batch (`steps_of`), and the validation split is
                not looked at: no early stopping, no log.
            total: steps of all calls that hand on their state, for the learning rate; 0: ``steps``.

        Returns:
            The model and the update's state.

        Raises:
            ValueError: ``rows`` has a row of the test split, or none.
        """
        if rows is not None and not 0 < len(rows) == len(_inside(rows, self.rows("train+valid"))):
            raise ValueError("A session trains on rows of the training and validation splits. Found others, or none.")
        call, self.calls = self.calls, self.calls + 1
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable is None or trainable(name))
        update = self.update.build(
            model, steps=total or steps, weights=self.weights if weights is None else weights,
            objectives=self._objectives(),
        )  # fmt: skip
        if update_state is not None:
            update.load_state_dict(update_state)
        one = _OneFit(
            self, call, model, update, steps, self.rows("train") if rows is None else rows, self._seed(seed, call),
            stream,
        )  # fmt: skip
        one.run()
        return model, update.state_dict()

    def _objectives(self) -> list[str]:
        """All that a loss may be called: tasks, domains, tasks in domains."""
        tasks, domains = [t.name for t in self.data.schema.tasks], self.data.schema.domains
        return [*tasks, *domains, *(f"{t}@{d}" for t in tasks for d in domains)]

    def _seed(self, seed: int | None, call: int) -> int:
        return int(np.random.SeedSequence([self.seed if seed is None else seed, call]).generate_state(1)[0])


class _OneFit:
    """One call of `Local.fit`: evaluation, early stopping, checkpoints and their resumption around `fit`."""

    def __init__(
        self, session: Local, call: int, model: nn.Module, update: Update, steps: int, rows: np.ndarray, seed: int,
        stream: bool = False,
    ) -> None:  # fmt: skip
        self.session, self.call, self.model, self.update, self.stream = session, call, model, update, stream
        self.steps, self.rows, self.seed, training = steps, rows, seed, session.training
        self.every = training.evaluate_every or steps_per_epoch(len(rows), training.batch_size)
        self.best: dict[str, Any] = {"value": None, "step": 0, "misses": 0}
        self.best_weights: dict[str, Tensor] | None = None
        self.saved_at = self.told_at = time.monotonic()
        self.told_step = 0
        self.seconds, self.began, self.looked = 0.0, time.monotonic(), 0.0  # of earlier processes; of evaluation

    # ---------------------------------------------------------------------------------------------------------- the call
    def run(self) -> None:
        """Train, from the start or from where an earlier process was."""
        torch.manual_seed(self.seed)
        start, finished = self._resume()
        if finished:
            return
        session = self.session
        batches = session.data.shuffled(self.rows, session.training.batch_size, self.seed, start, self.stream)
        moved = (batch.to(session.device) for batch in batches)
        self.told_step, self.began = start, time.monotonic()
        session.watcher.stage("training", start, self.steps)
        done = start
        try:
            if not self._out_of_patience():  # else the process died between its last look and its end
                done = fit(
                    self.model, moved, session.terms, self.update, steps=self.steps, start=start,
                    callbacks=(self._tell, self._look, self._keep),
                )  # fmt: skip
        finally:
            batches.close()  # type: ignore[attr-defined]
        self._add_up(self._spent(), done)
        self.update.settle()
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        self._save(done, finished=True)

    def _tell(self, done: int, batch: Batch, losses: Mapping[str, Tensor]) -> bool:
        now = time.monotonic()
        if now - self.told_at > 0.2 or done == self.steps:
            speed = (done - self.told_step) * len(batch) / max(now - self.told_at, 1e-9)
            self.session.watcher.step(done, self.steps, speed, {k: float(v.detach()) for k, v in losses.items()})
            self.told_at, self.told_step = now, done
        return False

    def _look(self, done: int, batch: Batch, losses: Mapping[str, Tensor]) -> bool:
        """Evaluate when it is time; stop when patience is over."""
        training = self.session.training
        if self.stream or done % self.every and done != self.steps:
            return False
        began = time.monotonic()
        self.update.settle()
        metrics = evaluate(self.session.score(self.model), self.session.data.schema, replicates=0)
        value, falls = selected(metrics, training.metric, self.session.data.schema)
        record = {
            "call": self.call,
            "step": done,
            "losses": {k: float(v.detach()) for k, v in losses.items()},
            "valid": metrics,
        }
        old = self.best["value"]
        better = value is not None and (old is None or (value < old if falls else value > old))
        if better:
            self.best = {"value": value, "step": done, "misses": 0}
            if training.patience:
                self.best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        else:
            self.best["misses"] += 1
        self._log(record)
        self.session.watcher.evaluated(done, training.metric, value, better, metrics)
        self.told_at, self.told_step = time.monotonic(), done  # rows/s are of training
        self.looked += self.told_at - began
        return self._out_of_patience()

    def _out_of_patience(self) -> bool:
        patience = self.session.training.patience
        return bool(patience) and self.best["misses"] >= patience

    # ------------------------------------------------------------------------------------------------------- checkpoints
    def _keep(self, done: int, batch: Batch, losses: Mapping[str, Tensor]) -> bool:
        training, now = self.session.training, time.monotonic()
        by_time = training.checkpoint_seconds and now - self.saved_at >= training.checkpoint_seconds
        by_steps = training.checkpoint_steps and done % training.checkpoint_steps == 0
        if (by_time or by_steps) and done < self.steps:
            self._save(done, finished=False)
            self.saved_at = time.monotonic()
        return False

    def _add_up(self, seconds: float, steps: int) -> None:
        self.session.seconds += seconds
        self.session.steps += steps

    def _spent(self) -> float:
        """Seconds of training so far, those of earlier processes included and evaluation left out."""
        return self.seconds + time.monotonic() - self.began - self.looked

    def _path(self) -> Path | None:
        folder = self.session.folder
        return None if folder is None else folder / f"fit-{self.call}.safetensors"

    def _save(self, done: int, finished: bool) -> None:
        path = self._path()
        if path is None:
            return
        state: State = {
            "step": done,
            "finished": finished,
            "model": self.model.state_dict(),
            "update": self.update.state_dict(),
        }
        state |= {"rng": _random_state(), "best": self.best, "seconds": self._spent()}
        if not finished:
            state["best_weights"] = self.best_weights
        store.save(path, state)

    def _resume(self) -> tuple[int, bool]:
        """Load the call's checkpoint, if there is one to resume.  Returns (steps done, finished)."""
        path = self._path()
        if path is None or not self.session.resume or not path.exists():
            return 0, False
        state = store.load(path)
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state["update"])
        self.best, self.best_weights = state["best"], state.get("best_weights")
        self.seconds = state["seconds"]
        _set_random_state(state["rng"])
        self.session.watcher.note(f"resumed at step {state['step']:,} of {self.steps:,}")
        self._cut_log(state["step"])
        if state["finished"]:
            self._add_up(self.seconds, state["step"])
        return state["step"], state["finished"]

    def _log(self, record: Mapping[str, Any]) -> None:
        if self.session.folder is not None:
            with (self.session.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _cut_log(self, step: int) -> None:
        """Drop what the interrupted process logged after its last checkpoint: it is done, and logged, again."""
        assert self.session.folder is not None
        path = self.session.folder / "log.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the process died in the middle of a line
                if (record["call"], record["step"]) <= (self.call, step):
                    kept.append(line + "\n")
            store.write_text(path, "".join(kept))


def _inside(rows: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Those of the rows that are among ``allowed``, which is ascending."""
    place = np.searchsorted(allowed, rows).clip(max=max(len(allowed) - 1, 0))
    return rows[allowed[place] == rows] if len(allowed) else rows[:0]


def _random_state() -> State:
    state: State = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: State) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def selected(metrics: Mapping[str, Any], metric: str, schema: Schema) -> tuple[float | None, bool]:
    """The value that selection goes by, and whether lower is better.

    ``auc`` averages over the target tasks that have it (a task too small to judge has none); ``click.auc`` is one task's.

    Raises:
        ValueError: no task has such a metric.
    """
    task, _, name = metric.rpartition(".")
    names = [task] if task else [t.name for t in schema.tasks if t.role == "target"]
    found = [metrics[n][name] for n in names if n in metrics and name in metrics[n]]
    if not found:
        have = {n: sorted(k for k, v in metrics[n].items() if isinstance(v, dict) and "value" in v) for n in metrics}
        raise ValueError(f"`training.metric` is `{metric}`, which no task has. Metrics: {have}.")
    values = [f["value"] for f in found if f["value"] is not None]
    return (sum(values) / len(values) if values else None), lower_is_better(name)
