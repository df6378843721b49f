"""The session that a schedule trains through: which rows it may see, calls of ``fit``, looks, what it keeps."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbraid import parallel, sharded_files, sharding, store
from unbraid.data.mix import Of, Parts, batches
from unbraid.data.table import Encoded, Read, order, prefetch, steps_per_epoch
from unbraid.optim.averaging import Average
from unbraid.slots import Augmentation, Course, Look, Selection, Term
from unbraid.train.call import Call
from unbraid.train.checkpoints import copies
from unbraid.train.draws import Sample
from unbraid.train.groups import Groups, join_logs
from unbraid.train.loop import losses_of
from unbraid.train.options import Training
from unbraid.train.rehearsal import Rehearse, shares
from unbraid.train.scoring import predict, shared_scores
from unbraid.train.watcher import Watcher
from unbraid.types import NO_DOMAIN, Batch, Schema, Scores, State


@dataclass
class Local:
    """The session on one machine: what a schedule may use (see `unbraid.slots.Session`).

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
    tables: Mapping[str, int] = field(default_factory=dict)  # that are divided over processes (`sharded_files.sizes`)
    _cache: dict[str, np.ndarray] = field(default_factory=dict)
    log_name: str = "log.jsonl"  # where the log goes in the folder
    _workers: Any = None  # processes of `fit_apart`
    _groups: Groups | None = None  # of several that train together

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
        if len(inside(rows, self.rows("train+valid"))) != len(rows):
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

    def training_batches(
        self, rows: np.ndarray, seed: int, start: int = 0, *, parts: Parts | None = None, sample: Sample | None = None,
        stream: bool = False, read: Read | None = None,
    ) -> Iterator[Batch]:  # fmt: skip
        """The endless training batches of some rows from step ``start`` on, on the CPU, in the run's views.

        Args:
            seed: of the order; parts: of `parts`, where batches are made of several; sample, stream, read: as of `begin`.
        """
        size, read = self.training.batch_size, read or self.data.batch
        view = None if self.augment is None else self.augment.bind(self.data)
        of: Of = "unlabelled" if self.augment is None else self.augment.of
        if parts is not None:
            return prefetch(batches(parts.order(seed, start), read, seed, start, view, of))
        numbers = order(rows, size, seed, start, stream) if sample is None else sample.order(size, start)
        if view is None:
            return shares(numbers, read)
        return prefetch(batches(((part, part[:0]) for part in numbers), read, seed, start, view, of))

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
            with (self.folder / self.log_name).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def cut_log(self, call: int | str, step: int) -> None:
        """Drop what an interrupted process logged of a call after a step: it is done, and logged, again."""
        path = None if self.folder is None else self.folder / self.log_name
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
        if len(inside(rows, self.rows("train+valid"))) != len(rows):
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
        chosen = allowed if rows is None else inside(np.unique(rows), allowed)

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
        if self.folder is None or (parallel.rank() and not self.tables):
            return
        counts = {"calls": self.calls, "steps": self.steps, "seconds": self.seconds} if done else None
        path = self.folder / f"schedule-{tag}.safetensors"
        sharded_files.save(path, {"state": state, "counts": counts}, self.tables)
        for call in range(self.calls if done and not parallel.rank() else 0):
            sharded_files.remove(self.folder / f"fit-{call}.safetensors")

    def restore(self, tag: str) -> State | None:
        """The state kept under a tag, when resuming."""
        path = self.folder / f"schedule-{tag}.safetensors" if self.folder is not None else None
        if not self.resume or path is None or not path.exists():
            return None
        found = sharded_files.load(path)
        if found["counts"] is not None:
            self.calls, self.steps, self.seconds = (found["counts"][name] for name in ("calls", "steps", "seconds"))
        return found["state"]

    def fit(self, model: nn.Module, steps: int, **how: Any) -> tuple[nn.Module, State]:
        """Train the model in place.

        Args:
            steps: optimiser steps; how: as of `begin`.

        Returns:
            The model and the update's state.

        Raises:
            ValueError: as of `begin`.
        """
        one = self.begin(model, steps, **how)
        one.run()
        return model, one.update.state_dict()

    def begin(
        self, model: nn.Module, steps: int, *, weights: Mapping[str, float] | None = None, rows: np.ndarray | None = None,
        trainable: Callable[[str], bool] | None = None, update_state: State | None = None,
        seed: int | Sequence[int] | None = None, stream: bool = False, total: int = 0, start: int = 0,
        look: Look | None = None, sample: Mapping[str, float] | None = None, read: Read | None = None,
    ) -> Call:  # fmt: skip
        """`fit` before its first step: what takes the steps is the call's ``run``, or another library's loop.

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

        Raises:
            ValueError: ``rows`` has a row of the test split, or none; ``sample`` has an objective that is none, or has no row.
        """
        if rows is not None and not 0 < len(rows) == len(inside(rows, self.rows("train+valid"))):
            raise ValueError("A session trains on rows of the training and validation splits. Found others, or none.")
        call, self.calls = self.calls, self.calls + 1
        if parallel.world() > 1:
            require_one_process(model.train())
            sharding.same_start(model)
        self.tables = {**self.tables, **sharded_files.sizes(model)}
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
        drawn = None if sample is None else Sample(sample, self._rows_of(sample, chosen), steps, own_seed)
        if self.training.mix is not None and (stream or drawn is not None):
            raise ValueError(
                "`training.mix` makes batches of its own, and so does the schedule. Leave one of them out."
            )
        before = start if update_state is None else update_state.get("step", 0)
        length = (before, total or steps)
        return Call(self, call, model, update, steps, chosen, own_seed, stream, rehearse, look, drawn, read, length)

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
                bit for bit.  The model, the terms and the arguments must then be picklable.  Of several processes that train
                together, so many groups have a call each (`unbraid.train.groups`).

        Yields:
            The trained weights and the update's state of each call, in order.  The model itself ends as it began.

        Raises:
            ChildProcessError: a process ended unexpectedly.
            ValueError: something cannot be pickled; beside these, what `fit` raises.
        """
        if jobs > 1 and parallel.world() > 1:
            if self._groups is None:
                self._groups = Groups(jobs)
            yield from self._groups.fit_apart(self, model, steps, [{**common, **call} for call in calls])
            return
        if parallel.rank() == 0:
            join_logs(self.folder)  # of an interrupted process that trained in groups
        if jobs > 1 and len(calls) > 1:
            from unbraid.workers import Workers

            if self._workers is None:
                self._workers = Workers()
            yield from self._workers.fit_apart(self, model, steps, [{**common, **call} for call in calls], jobs)
            return
        begun = copies(model)
        try:
            for call in calls:
                model.load_state_dict(begun)
                _, state = self.fit(model, steps, **common, **call)
                yield copies(model), state
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


def require_one_process(model: nn.Module) -> None:
    """Raises ValueError if a part of a model in training mode sees more rows than its own, and so must see all of a batch."""
    for name, part in model.named_modules():
        if why := getattr(part, "one_process", ""):
            raise ValueError(
                f"`{name}` ({type(part).__name__}) trains in one process only: {why}, and each of {parallel.world()} processes "
                "sees a part. Choose a variant without it (docs/distributed.md has a table), or train in one process."
            )


def inside(rows: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Those of the rows that are among ``allowed``, which is ascending."""
    place = np.searchsorted(allowed, rows).clip(max=max(len(allowed) - 1, 0))
    return rows[allowed[place] == rows] if len(allowed) else rows[:0]
