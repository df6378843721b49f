"""The one loop, and the session that a schedule drives it through.

A batch goes through the model, terms make losses by objective, the update changes parameters, callbacks look on.  Methods
are terms, updates, towers and schedules; nothing here knows their names.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unbraid import parallel, store
from unbraid.data.mix import Mix, Of, Parts, batches
from unbraid.data.table import Encoded, Read, order, prefetch, steps_per_epoch
from unbraid.evaluate import NAMES, RANKING, evaluate, lower_is_better
from unbraid.normalise import over_processes
from unbraid.optim.averaging import Average, Running, remeasure
from unbraid.types import (
    FORBID,
    NO_DOMAIN,
    Augmentation,
    Batch,
    Course,
    Look,
    Losses,
    Output,
    Schema,
    Scores,
    Selection,
    State,
    Term,
    Update,
)

Callback = Callable[[int, Batch, Mapping[str, Tensor]], bool]  # (steps done, batch, losses) -> stop?


@dataclass(frozen=True)
class Training:
    """How long, how fast, and when to look.

    Args:
        batch_size: rows per step; epochs: passes over the training rows; steps: instead of epochs, when above 0.
        evaluate_every: steps between evaluations on the validation split; 0 is once per epoch.
        metric: what early stopping and the kept weights go by, without a ``selection``: a metric averaged over target tasks
            (``auc``, ``logloss``, ``rmse`` ...), or ``TASK.metric``.
        patience: stop after so many evaluations without a better value; the best weights are kept.  0: train to the end
            and keep the last weights.
        checkpoint_seconds, checkpoint_steps: write a checkpoint so often (0: not by that measure).
        mix: rows with and without labels in fixed numbers per batch (`unbraid.data.mix.Mix`); ``batch_size`` counts those with
            a label, and an epoch is one pass over these.  None: all training rows as they come.
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
    mix: Mix | None = None
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
    model: nn.Module, batches: Iterator[Batch], terms: Sequence[Term], update: Callable[[Losses, Output], None], *,
    steps: int, start: int = 0, callbacks: Sequence[Callback] = (),
) -> int:  # fmt: skip
    """Train from step ``start`` until ``steps`` steps are done or a callback says stop.  Returns the steps done."""
    model.train()
    for step in range(start, steps):
        batch = next(batches)
        losses, output = losses_of(model, batch, terms, step)
        update(losses, output)
        stop = [callback(step + 1, batch, losses) for callback in callbacks]
        if any(stop):
            return step + 1
    return steps


def losses_of(
    model: nn.Module, batch: Batch, terms: Sequence[Term], step: int
) -> tuple[dict[str, Tensor], Output]:  # fmt: skip
    """Losses of a batch by objective, and what the model said about it; of a batch that processes share, about the own rows."""
    parallel.note(batch)
    output = model(batch, step)
    said, whole = parallel.said(output, batch, getattr(model, "constants", ()))
    losses: dict[str, Tensor] = {}
    for term in terms:
        for objective, loss in term(said, whole, step).items():
            losses[objective] = losses[objective] + loss if objective in losses else loss
    return losses, output


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
    found = scores_of(model, batches, schema, hidden=hidden, device=device)
    model.train(was_training)
    return found


@torch.no_grad()
def scores_of(
    model: nn.Module, batches: Iterable[Batch], schema: Schema, *, hidden: bool = False, device: str = "cpu"
) -> Scores:
    """As `predict`, of a model that is in evaluation mode: to say so again takes longer than a small batch."""
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


def shared_scores(score: Callable[[np.ndarray], Scores], rows: np.ndarray) -> Scores:
    """The scores of rows, of which every process computes a part; all processes get all."""
    if parallel.world() == 1 or len(rows) < parallel.world():
        return score(rows)
    parts = parallel.gather(score(rows[parallel.share(len(rows))]))
    names = [part.name for part in fields(Scores) if part.name != "domains"]
    return replace(parts[0], **{name: _join([getattr(part, name) for part in parts]) for name in names})


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

    def begins(self, call: int, before: int) -> None:
        """What follows is of this call of ``fit``; so many steps are those of calls before it."""

    def trained(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """A step of the call is done (not told of calls in processes of their own).  Reading a loss waits for the device."""

    def saving(self) -> None:
        """A checkpoint is about to be written."""

    def measured(self, metrics: Mapping[str, Any]) -> None:
        """The run is finished: what ``metrics.json`` holds."""

    def evaluated(self, step: int, metric: str, value: float | None, best: bool, values: Mapping[str, Any]) -> None:
        """The validation split was evaluated; ``best``: so far, and its weights are kept."""

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
    told: Mapping[str, float] = field(default_factory=dict)  # the last update's own weights, where it has some
    augment: Augmentation | None = None  # views of training rows
    average: Average | None = None  # of the weights of each call
    selection: Selection | None = None  # what judges at the looks, in the place of the metric
    best: Mapping[str, Any] = field(default_factory=dict)  # the last call's best look: value, step
    _cache: dict[str, np.ndarray] = field(default_factory=dict)
    _workers: Any = None  # processes of `fit_apart`

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self.data.schema

    @property
    def metric(self) -> str:
        """What the run selects by."""
        return self.training.metric

    @property
    def look(self) -> Look:
        """How the run looks at the validation split, unless a call says otherwise."""
        chooses = self.training.patience > 0 or self.selection is not None
        return Look(patience=self.training.patience, keep_best=chooses)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names that the run's losses can have on the training rows: tasks, domains, or tasks in domains."""
        tasks, names = [task.name for task in self.schema.tasks], list[str]()
        codes = self.column("domain", self.rows("train"))
        domains = [self.schema.domains[code] for code in np.unique(codes)] if codes is not None else [NO_DOMAIN]
        pairs = [f"{task}@{domain}" for task in tasks for domain in domains]
        for term in self.terms:
            by = {"task": tasks, "domain": domains, "task@domain": pairs}[getattr(term, "by", "task")]
            names += getattr(term, "objectives", by)
        return tuple(dict.fromkeys(names))

    def column(self, name: str, rows: np.ndarray) -> np.ndarray | None:
        """(n,) what is known of each row beside features and labels (``user``, ``domain``, ``time``, ``request``).

        None if the log has no such column.  Raises ValueError for a row of the test split.
        """
        if len(_inside(rows, self.rows("train+valid"))) != len(rows):
            raise ValueError("A session reads rows of the training and validation splits. Found others.")
        return np.asarray(self.data.columns[name][rows]) if name in self.data.columns else None

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

    def parts(self, rows: np.ndarray) -> Parts | None:
        """What batches of training rows are made of; None: they are taken as they come.  Raises ValueError as `Mix.parts`."""
        if self.training.mix is None:
            return None
        _, observed = self.data.labels(rows)
        labelled = torch.stack(list(observed.values())).any(0).numpy()
        return self.training.mix.parts(rows, labelled, self.column("domain", rows), self.training.batch_size)

    def total_steps(self) -> int:
        """Steps of the run's training."""
        rows = self.rows("train")
        parts = self.parts(rows)
        return self.training.total_steps(len(rows) if parts is None else parts.rows)

    def keep(self, record: Mapping[str, Any]) -> None:
        """What the schedule found on its way (plain values), for ``metrics.json``.

        Of its ``rounds``, if it has some with ``weights``, the log has a line each.
        """
        self.record = record
        rounds = [line for line in record.get("rounds", ()) if "weights" in line]
        if rounds:
            self.cut_log("schedule", -1)  # of an interrupted process that came as far as this
        for line in rounds:
            self.log({"call": "schedule", "step": line["step"], "weights": dict(line["weights"])})

    def tell(self, text: str) -> None:
        """A line for who watches the run."""
        self.watcher.note(text)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write a line of ``log.jsonl``."""
        if self.folder is not None and parallel.rank() == 0:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    def cut_log(self, call: int | str, step: int) -> None:
        """Drop what an interrupted process logged of a call after a step: it is done, and logged, again."""
        path = None if self.folder is None else self.folder / "log.jsonl"
        if path is None or parallel.rank() or not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the process died in the middle of a line
            if record["call"] != call or record["step"] <= step:
                kept.append(line + "\n")
        store.write_text(path, "".join(kept))

    def close(self) -> None:
        """End the processes of `fit_apart`, if there are any."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def batch(self, rows: np.ndarray, features: Mapping[str, Any] | None = None) -> Batch:
        """Rows as a batch on the CPU; ``features``: what to give in the place of the table's (nothing is read for them).

        Raises:
            ValueError: a row of the test split.
        """
        if len(_inside(rows, self.rows("train+valid"))) != len(rows):
            raise ValueError("A session reads rows of the training and validation splits. Found others.")
        return self.data.batch(rows, features)

    def batches(self, rows: np.ndarray) -> Iterator[Batch]:
        """Rows (as `batch`) in order, in batches of the training's size on the session's device."""
        for batch in self.data.in_order(rows, self.training.batch_size, self.batch):
            yield batch.to(self.device)

    def reads(self, rows: np.ndarray, steps: int, seed: Sequence[int], stream: bool = False) -> np.ndarray:
        """Ascending: those of the rows that `fit` with these arguments reads."""
        parts = order(rows, self.training.batch_size, self._seed(seed, 0), whole=stream)
        per_epoch = steps_per_epoch(len(rows), self.training.batch_size, whole=stream)
        if stream and steps >= per_epoch:
            return np.sort(rows)
        return np.unique(np.concatenate([rows[:0], *itertools.islice(parts, steps)]))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """The run's weighted loss of rows as one batch, a scalar to differentiate; None if no label is known."""
        losses, _ = losses_of(model, batch, self._terms_for(model), 0)
        weights = {name: self.weights.get(name, self.weights.get(name.partition("@")[0], 1.0)) for name in losses}
        parts = [loss * weights[name] for name, loss in losses.items() if weights[name] != 0]
        return torch.stack(parts).sum() if parts else None

    def charge(self, seconds: float) -> None:
        """Count time that a schedule spent on training outside `fit`."""
        self.seconds += seconds

    def _terms_for(self, model: nn.Module) -> list[Term]:
        """The terms, without those that read an extra that this module does not give: they train what it does not hold."""
        gives = getattr(model, "gives", None)
        return [term for term in self.terms if gives is None or set(getattr(term, "needs", ())) <= set(gives)]

    def score(
        self, model: nn.Module, split: str = "valid", rows: np.ndarray | None = None, read: Read | None = None,
        hidden: bool = False,
    ) -> Scores:  # fmt: skip
        """Predictions on a split, or on some of its rows (row numbers); ``read`` as in `fit`, ``hidden`` as in `predict`."""
        allowed = self.rows(split)
        chosen = allowed if rows is None else _inside(np.unique(rows), allowed)

        def score(part: np.ndarray) -> Scores:
            batches = self.data.in_order(part, 4 * self.training.batch_size, read)
            return predict(model, batches, self.data.schema, hidden=hidden, device=self.device)

        return shared_scores(score, chosen)

    def fork(self, model: nn.Module, state: State) -> tuple[nn.Module, State]:
        """Independent copies."""
        return copy.deepcopy(model), copy.deepcopy(state)

    def checkpoint(self, tag: str, state: State, *, done: bool = False) -> None:
        """Keep a schedule's own state under a tag.

        Args:
            done: the state holds all that the calls of ``fit`` so far made.  Their own checkpoints are removed, and
                `restore` counts calls, steps and seconds on from here.
        """
        parallel.wait()  # nobody reads any more what is replaced or removed here
        if self.folder is None or parallel.rank():
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
        trainable: Callable[[str], bool] | None = None, update_state: State | None = None,
        seed: int | Sequence[int] | None = None, stream: bool = False, total: int = 0, start: int = 0,
        look: Look | None = None, sample: Mapping[str, float] | None = None, read: Read | None = None,
    ) -> tuple[nn.Module, State]:  # fmt: skip
        """Train the model in place.

        Args:
            steps: optimiser steps; weights: objective -> weight instead of the run's; rows: row numbers instead of all
                training rows; trainable: parameter name -> does it train; update_state: what an earlier call returned.
            stream: no row is left out of a pass for want of a full batch (`steps_of`), and the validation split is
                not looked at: no early stopping, no log.
            seed: numbers that make this call's seed together with the run's, whichever call it is; one number: instead of
                the run's, with the call's number; None: the run's and the call's number.
            total: steps of all calls that hand on their state, for the learning rate; 0: ``steps``.
            start: steps before this call, for the learning rate, where no ``update_state`` says it.
            look: how to look at the validation split, where not as ``training`` says.
            sample: objective -> chance.  Each step draws one objective: its loss alone counts, and the batch holds rows of
                its domain alone, if it is one of a domain.
            read: what makes a training batch of row numbers, in the place of `batch`: other features or weights of the
                same rows.

        Losses that read an extra which the model does not give (`Output.extras`, its attribute ``gives``) are left out.

        Returns:
            The model and the update's state.

        Raises:
            ValueError: ``rows`` has a row of the test split, or none; ``sample`` has an objective that is none, or has no row.
        """
        if rows is not None and not 0 < len(rows) == len(_inside(rows, self.rows("train+valid"))):
            raise ValueError("A session trains on rows of the training and validation splits. Found others, or none.")
        call, self.calls = self.calls, self.calls + 1
        if parallel.world() > 1:
            require_one_process(model.train())
            parallel.same_start(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable is None or trainable(name))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("No parameter of the model trains. Give it a layer or a table that does.")
        chosen, own_seed = self.rows("train") if rows is None else rows, self._seed(seed, call)
        rehearse = Rehearse(self, model, own_seed)
        update = self.update.build(
            model, steps=total or steps, weights=self.weights if weights is None else weights,
            objectives=self._objectives(), course=self._course(len(chosen), stream, own_seed, rehearse),
        )  # fmt: skip
        if update_state is not None:
            update.load_state_dict(update_state)
        elif start:
            update.seek(start)
        drawn = None if sample is None else _Sample(sample, self._rows_of(sample, chosen), steps, own_seed)
        if self.training.mix is not None and (stream or drawn is not None):
            raise ValueError(
                "`training.mix` makes batches of its own, and so does the schedule. Leave one of them out."
            )
        before = start if update_state is None else update_state.get("step", 0)
        length = (before, total or steps)
        one = _OneFit(self, call, model, update, steps, chosen, own_seed, stream, rehearse, look, drawn, read, length)
        one.run()
        return model, update.state_dict()

    def _objectives(self) -> list[str]:
        """All that a loss may be called: tasks, domains, tasks in domains, what terms call theirs."""
        tasks, domains = [t.name for t in self.data.schema.tasks], self.data.schema.domains
        own = [name for term in self.terms for name in getattr(term, "objectives", ())]
        return [*dict.fromkeys((*tasks, *domains, *(f"{t}@{d}" for t in tasks for d in domains), *own))]

    def _course(self, rows: int, stream: bool, seed: int, rehearse: Rehearse) -> Course:
        targets = tuple(task.name for task in self.schema.tasks if task.role == "target")
        tasks = tuple(task.name for task in self.schema.tasks)
        return Course(steps_per_epoch(rows, self.training.batch_size, whole=stream), seed, targets, tasks, rehearse)

    def fit_apart(
        self, model: nn.Module, steps: int, calls: Sequence[Mapping[str, Any]], *, jobs: int = 1, **common: Any
    ) -> Iterator[tuple[State, State]]:  # fmt: skip
        """Several calls of `fit` that all begin with the model's present weights and do not depend on each other.

        Args:
            calls: arguments of each call that the others do not share; common: those that they share.
            jobs: how many run at once, each in a process of its own when there are several; the results are the same
                bit for bit.  The model, the terms and the arguments must then be picklable.

        Yields:
            The trained weights and the update's state of each call, in order.  The model itself ends as it began.

        Raises:
            What `fit` raises; ChildProcessError when a process ends unexpectedly; ValueError when something cannot be pickled.
        """
        if jobs > 1 and parallel.world() > 1:
            raise ValueError(
                f"Several processes train this run together, and `schedule.jobs` {jobs} would start more. Set it to 1."
            )
        if jobs > 1 and len(calls) > 1:
            from unbraid.workers import Workers

            if self._workers is None:
                self._workers = Workers()
            yield from self._workers.fit_apart(self, model, steps, [{**common, **call} for call in calls], jobs)
            return
        begun = _copies(model)
        try:
            for call in calls:
                model.load_state_dict(begun)
                _, state = self.fit(model, steps, **common, **call)
                yield _copies(model), state
        finally:
            model.load_state_dict(begun)

    def _rows_of(self, objectives: Iterable[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Objective -> those of the rows that its loss can count: those of its domain, else all.  Raises ValueError."""
        tasks, found = {task.name for task in self.schema.tasks}, {}
        for name in objectives:
            task, _, domain = name.partition("@")
            domain = domain or ("" if task in tasks else task)
            if domain and domain not in self.schema.domains:
                raise ValueError(f"`{name}` is no objective. Permitted are {list(self.objectives)}.")
            codes = self.column("domain", rows) if domain else None
            found[name] = rows if codes is None else rows[codes == self.schema.domains.index(domain)]
            if not len(found[name]):
                raise ValueError(f"Objective `{name}` has no row to train on.")
        return found

    def _seed(self, seed: int | Sequence[int] | None, call: int) -> int:
        numbers = [self.seed, *seed] if isinstance(seed, Sequence) else [self.seed if seed is None else seed, call]
        return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class _Sample:
    """One objective per step (`Local.fit` with ``sample``): which, its rows, and its loss alone.

    Args:
        chances: objective -> weight of being drawn; rows: objective -> the rows to draw from.
    """

    def __init__(self, chances: Mapping[str, float], rows: Mapping[str, np.ndarray], steps: int, seed: int) -> None:
        self.names, self.rows, self.seed = list(chances), rows, seed
        shares = np.array([chances[name] for name in self.names], float)
        self.picks = np.random.default_rng([seed, 1]).choice(len(shares), steps, p=shares / shares.sum())

    def order(self, size: int, start: int) -> Iterator[np.ndarray]:
        """Row numbers of the batches from step ``start`` on: each objective goes through its own rows in an order of its own."""
        before = np.bincount(self.picks[:start], minlength=len(self.names))
        seeds = np.random.SeedSequence([self.seed, 2]).generate_state(len(self.names))
        parts = [order(self.rows[n], size, int(s), int(b)) for n, s, b in zip(self.names, seeds, before, strict=True)]
        return (next(parts[pick]) for pick in self.picks[start:])

    def restrict(self, term: Term) -> Term:
        """The term with the losses of each step's objective alone."""
        return _Restricted(self, term)


@dataclass(frozen=True)
class _Restricted:
    sample: _Sample
    term: Term

    @property
    def needs(self) -> tuple[str, ...]:
        return self.term.needs

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        name = self.sample.names[self.sample.picks[step]]
        losses = self.term(output, batch, step)
        return {
            objective: loss for objective, loss in losses.items() if name in (objective, objective.partition("@")[0])
        }


class Rehearse:
    """More forward passes of a session's model: an `unbraid.types.Rehearsal`."""

    def __init__(self, session: Local, model: nn.Module, seed: int) -> None:
        self.session, self.model, self.seed = session, model, seed
        self.now: tuple[Batch, int] | None = None  # the current training batch and its step
        self.batches: Iterator[Batch] | None = None  # of the validation split
        self.at = 0  # the step that the next of them belongs to
        self.terms: Sequence[Term] = session.terms
        self.read: Read | None = None

    def watch(
        self, batches: Iterator[Batch], start: int, terms: Sequence[Term], read: Read | None
    ) -> Iterator[Batch]:  # fmt: skip
        """The training batches of steps ``start`` and on; the last one that was given out is the current one.

        Args:
            terms: those of this training; read: what makes its batches, None: the session's data.
        """
        self.terms, self.read = terms, read
        for step, batch in enumerate(batches, start):
            self.now = batch, step
            yield batch

    def again(self) -> tuple[Losses, Output]:
        """See `unbraid.types.Rehearsal`."""
        assert self.now is not None
        return self._losses(*self.now, draw=0)

    def valid(self, step: int) -> tuple[Losses, Output]:
        """See `unbraid.types.Rehearsal`.  Raises ValueError when the validation split has no rows."""
        if self.batches is None or self.at != step:
            self.close()
            rows, size = self.session.rows("valid"), self.session.training.batch_size
            if not len(rows):
                raise ValueError("The update learns weights on the validation split, which has no rows.")
            self.at, read = step, self.read or self.session.data.batch
            self.batches = shares(order(rows, size, self.seed, step), read)
        self.at += 1
        return self._losses(parallel.join(next(self.batches)).to(self.session.device), step, draw=1)

    def close(self) -> None:
        """Stop reading ahead."""
        if self.batches is not None:
            self.batches.close()  # type: ignore[attr-defined]
            self.batches = None

    def _losses(self, batch: Batch, step: int, draw: int) -> tuple[Losses, Output]:
        """A pass in training mode.  Through ``.data``, buffers change without a backward pass that read them being told."""
        before = {name: value.clone() for name, value in self.model.named_buffers()}
        cuda = [torch.cuda.current_device()] if self.session.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=cuda):
            # processes read other rows, and draw other numbers for them
            numbers = [self.seed, step, draw, *([parallel.rank()] if parallel.rank() else [])]
            torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
            found = losses_of(self.model, batch, self.terms, step)
        for name, value in self.model.named_buffers():
            value.data.copy_(before[name])
        return found


class _OneFit:
    """One call of `Local.fit`: evaluation, early stopping, checkpoints and their resumption around `fit`."""

    def __init__(
        self, session: Local, call: int, model: nn.Module, update: Update, steps: int, rows: np.ndarray, seed: int,
        stream: bool = False, rehearse: Rehearse | None = None, look: Look | None = None, sample: _Sample | None = None,
        read: Read | None = None, length: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.session, self.call, self.model, self.update, self.stream = session, call, model, update, stream
        self.rehearse, self.sample, self.read, self.length = rehearse, sample, read, length or (0, steps)
        self.parts = None if stream or sample is not None else session.parts(rows)
        self.look = look or replace(session.look, every=-1 if stream else 0)
        self.steps, self.rows, self.seed, training = steps, rows, seed, session.training
        length_of = len(rows) if self.parts is None else self.parts.rows
        self.every = self.look.every or training.evaluate_every or steps_per_epoch(length_of, training.batch_size)
        if self.every > 0 and (metric := self.look.metric or ("" if session.selection else training.metric)):
            check_metric(metric, session.data.schema, self.look.tasks)
        self.best: dict[str, Any] = {"value": None, "step": 0, "misses": 0}
        self.best_weights: dict[str, Tensor] | None = None
        self.average = self._averaging()
        self.memories: list[Any] = []  # terms that remember something between steps
        self.remembered: list[State] = []  # what they did in an earlier process
        self.saved_at = self.told_at = time.monotonic()
        self.told_step = 0
        self.seconds, self.began, self.looked = 0.0, time.monotonic(), 0.0  # of earlier processes; of evaluation

    # ---------------------------------------------------------------------------------------------------------- the call
    def run(self) -> None:
        """Train, from the start or from where an earlier process was."""
        torch.manual_seed(self.seed)
        start, finished = self._resume()
        if finished:
            self._remember()
            return
        session = self.session
        batches = self._batches(start)
        terms = [term.over(*self.length) if hasattr(term, "over") else term for term in session._terms_for(self.model)]
        terms = [term.fresh(*self._known()) if hasattr(term, "fresh") else term for term in terms]
        self.memories = [term for term in terms if hasattr(term, "fresh")]
        for term, state in zip(self.memories, self.remembered, strict=bool(self.remembered)):
            term.load_state_dict(state)
        terms = terms if self.sample is None else [self.sample.restrict(term) for term in terms]
        moved = self._joined(batches, start)
        if self.rehearse is not None:
            moved = self.rehearse.watch(moved, start, terms, self.read)
        self.told_step, self.began = start, time.monotonic()
        session.watcher.begins(self.call, session.steps)
        session.watcher.stage("training", start, self.steps)
        done = start
        try:
            if not self._out_of_patience():  # else the process died between its last look and its end
                with over_processes(self.model):
                    done = fit(
                        self.model, moved, terms, self._step, steps=self.steps, start=start,
                        callbacks=(self._tell, self._look, self._keep),
                    )  # fmt: skip
        finally:
            batches.close()  # type: ignore[attr-defined]
            if self.rehearse is not None:
                self.rehearse.close()
        self._add_up(self._spent(), done)
        self.update.settle()
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        elif self.average is not None:
            with over_processes(self.model):
                self._write_average(self.average)
        self._save(done, finished=True)
        self._remember()

    # ------------------------------------------------------------------------------------------------- averaged weights
    def _averaging(self) -> Running | None:
        """The mean of the weights that this call keeps.  Raises ValueError if what it selects by is no mean."""
        average = self.session.average
        if average is not None and not average.looks and (self.look.patience or self.look.keep_best):
            fix = "Set `patience` to 0" if self.look.patience else "Leave out what chooses a look (`selection`)"
            raise ValueError(
                "The run's `average` is made at the end of a training, and this one keeps the weights of its best look at the "
                f"validation split. {fix}, or use an average that looks are taken by (docs/methods/averages.md)."
            )
        return None if average is None else average.begin(self.model, self.steps)

    def _step(self, losses: Losses, output: Output) -> None:
        """The update, and the mean of the weights after it."""
        if self.average is not None:
            self.average.before(parallel.read_by_any(output.lookups))
        self.update(losses, output)
        if self.average is not None:
            self.average.after(self.update.settle)

    def _write_average(self, average: Running) -> None:
        average.write()
        rows = len(self.rows) if self.parts is None else self.parts.rows
        count = min(steps_per_epoch(rows, self.session.training.batch_size), self.steps)
        remeasure(self.model, self._batches_to_measure, count)

    def _batches_to_measure(self) -> Iterator[Batch]:
        given = self._batches(0)
        try:
            yield from self._joined(given, 0)
        finally:
            given.close()  # type: ignore[attr-defined]

    def _before_look(self) -> dict[str, Tensor] | None:
        """Put the mean in the weights' place, if the run looks by it.  Returns the weights."""
        if self.average is None or self.session.average is None or not self.session.average.looks:
            return None
        weights = _copies(self.model)
        self._write_average(self.average)
        return weights

    def _batches(self, start: int) -> Iterator[Batch]:
        """The training batches from step ``start`` on, on the CPU."""
        data, size, augment = self.session.data, self.session.training.batch_size, self.session.augment
        read = self.read or data.batch
        view = None if augment is None else augment.bind(data)
        of: Of = "unlabelled" if augment is None else augment.of
        if self.parts is not None:
            return prefetch(batches(self.parts.order(self.seed, start), read, self.seed, start, view, of))
        if self.sample is None:
            rows = order(self.rows, size, self.seed, start, self.stream)
        else:
            rows = self.sample.order(size, start)
        if view is None:
            return shares(rows, read)
        return prefetch(batches(((part, part[:0]) for part in rows), read, self.seed, start, view, of))

    def _joined(self, batches: Iterator[Batch], start: int) -> Iterator[Batch]:
        """The batches on the session's device, with what losses need of other processes' rows.

        Several processes draw what they draw (dropout) by the step and their number, so that a training continues on any number
        of them.
        """
        for step, batch in enumerate(batches, start):
            if parallel.world() > 1:
                numbers = np.random.SeedSequence([self.seed, step, parallel.rank(), 5])
                torch.manual_seed(int(numbers.generate_state(1)[0]))
            found = parallel.join(batch).to(self.session.device)
            parallel.note(found)
            yield found

    def _known(self) -> tuple[np.ndarray, dict[str, Tensor], dict[str, Tensor]]:
        """The rows, their labels, and which of these every batch with the row knows."""
        rows, mix = np.sort(self.rows), self.session.training.mix
        labels, observed = self.session.data.labels(rows)
        if self.parts is not None and self.parts.unlabelled and mix is not None and mix.pool == "all":
            observed = {task: torch.zeros_like(known) for task, known in observed.items()}
        return rows, labels, observed

    def _tell(self, done: int, batch: Batch, losses: Mapping[str, Tensor]) -> bool:
        self.session.watcher.trained(done, losses)
        now = time.monotonic()
        if now - self.told_at > 0.2 or done == self.steps:
            speed = (done - self.told_step) * len(batch.whole) / max(now - self.told_at, 1e-9)
            self.session.watcher.step(done, self.steps, speed, {k: float(v.detach()) for k, v in losses.items()})
            self.told_at, self.told_step = now, done
        return False

    def _look(self, done: int, batch: Batch, losses: Mapping[str, Tensor]) -> bool:
        """Evaluate when it is time; stop when patience is over."""
        if self.every < 0 or done % self.every and done != self.steps:
            return False
        began = time.monotonic()
        self.update.settle()
        weights = self._before_look()
        selection = None if self.look.metric else self.session.selection
        wants: dict[str, Any] = {"hidden": True} if selection is not None and selection.reads_hidden else {}
        scores = self.session.score(self.model, "valid", self.look.rows, **wants, **self._reading())
        metrics = evaluate(scores, self.session.data.schema, replicates=0)
        record = {
            "call": self.call,
            "step": done,
            "losses": {k: float(v.detach()) for k, v in losses.items()},
            "valid": metrics,
        }
        if selection is None:
            metric = self.look.metric or self.session.training.metric
            value, falls = selected(metrics, metric, self.session.data.schema, self.look.tasks)
        else:
            judged = selection(scores, self.session.data.schema)
            metric, value, falls = selection.kind, judged.value, selection.lower_is_better
            record["selection"] = {"kind": metric, **vars(judged)}
        old = self.best["value"]
        better = value is not None and (old is None or (value < old if falls else value > old))
        if better:
            self.best = {"value": value, "step": done, "misses": 0}
            if self.look.keep_best:
                self.best_weights = _copies(self.model)
        else:
            self.best["misses"] += 1
        if weights is not None:
            self.model.load_state_dict(weights)
        if hasattr(self.update, "told"):
            record["update"] = dict(self.update.told())
        self.session.log(record)
        self.session.watcher.evaluated(done, metric, value, better and self.look.keep_best, metrics)
        self.told_at, self.told_step = time.monotonic(), done  # rows/s are of training
        self.looked += self.told_at - began
        return self._out_of_patience()

    def _reading(self) -> dict[str, Any]:
        return {} if self.look.read is None else {"read": self.look.read}

    def _remember(self) -> None:
        self.session.best = {key: self.best[key] for key in ("value", "step")}
        self.session.told = dict(self.update.told()) if hasattr(self.update, "told") else {}

    def _out_of_patience(self) -> bool:
        return bool(self.look.patience) and self.best["misses"] >= self.look.patience

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
        if path is None or parallel.rank():
            return
        self.session.watcher.saving()
        state: State = {
            "step": done,
            "finished": finished,
            "model": self.model.state_dict(),
            "update": self.update.state_dict(),
        }
        state |= {"rng": _random_state(), "best": self.best, "seconds": self._spent()}
        if not finished:
            state["best_weights"] = self.best_weights
            state["average"] = None if self.average is None else self.average.state_dict()
            state["memories"] = [term.state_dict() for term in self.memories]
        store.save(path, state)

    def _resume(self) -> tuple[int, bool]:
        """Load the call's checkpoint, if there is one to resume.  Returns (steps done, finished)."""
        path = self._path()
        if path is None or not self.session.resume:
            return 0, False
        if not path.exists():
            self.session.cut_log(self.call, 0)
            return 0, False
        state = store.load(path)
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state["update"])
        self.best, self.best_weights = state["best"], state.get("best_weights")
        self.remembered = state.get("memories", [])
        if self.average is not None and not state["finished"]:
            self.average.load_state_dict(state["average"])
        self.seconds = state["seconds"]
        _set_random_state(state["rng"])
        parallel.wait()
        self.session.watcher.note(f"resumed at step {state['step']:,} of {self.steps:,}")
        self.session.cut_log(self.call, state["step"])
        if state["finished"]:
            self._add_up(self.seconds, state["step"])
        return state["step"], state["finished"]


def shares(rows: Iterable[np.ndarray], read: Read) -> Iterator[Batch]:
    """This process's rows of the batches of these row numbers, made ahead."""
    return prefetch(parallel.mine(lambda part, _: read(part), each) for each in rows)


def require_one_process(model: nn.Module) -> None:
    """Raises ValueError if a part of a model in training mode sees more rows than its own, and so must see all of a batch."""
    for name, part in model.named_modules():
        if why := getattr(part, "one_process", ""):
            raise ValueError(
                f"`{name}` ({type(part).__name__}) trains in one process only: {why}, and each of {parallel.world()} processes "
                "sees a part. Choose a variant without it (docs/distributed.md has a table), or train in one process."
            )


def _copies(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights and buffers, apart from it."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


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


def check_metric(metric: str, schema: Schema, tasks: Sequence[str] = (), key: str = "training.metric") -> None:
    """Raises ValueError, before a step is taken, for a metric that none of the tasks of `selected` can have."""
    task, _, name = metric.rpartition(".")
    names = [task] if task else list(tasks) or [t.name for t in schema.tasks if t.role == "target"]
    have = {t.name: sorted(NAMES[t.kind]) for t in schema.tasks}
    ranks = name.partition("@")[0] in RANKING  # whether there are requests to rank in, the first look will tell
    if not any(name in have[n] or (ranks and schema.task(n).kind == "binary") for n in names if n in have):
        raise ValueError(f"`{key}` is `{metric}`, which no task has. Metrics: {have}.")


def selected(
    metrics: Mapping[str, Any], metric: str, schema: Schema, tasks: Sequence[str] = (), key: str = "training.metric"
) -> tuple[float | None, bool]:  # fmt: skip
    """The value that selection goes by, and whether lower is better.

    ``auc`` averages over the target tasks (or ``tasks``) that have it (a task too small to judge has none); ``click.auc`` is
    one task's.  ``key`` is what the user set it by.

    Raises:
        ValueError: no task has such a metric.
    """
    task, _, name = metric.rpartition(".")
    names = [task] if task else list(tasks) or [t.name for t in schema.tasks if t.role == "target"]
    found = [metrics[n][name] for n in names if n in metrics and name in metrics[n]]
    if not found:
        have = {n: sorted(k for k, v in metrics[n].items() if isinstance(v, dict) and "value" in v) for n in metrics}
        raise ValueError(f"`{key}` is `{metric}`, which no task has. Metrics: {have}.")
    values = [f["value"] for f in found if f["value"] is not None]
    return (sum(values) / len(values) if values else None), lower_is_better(name)
