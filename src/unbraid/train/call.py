"""One call of a session's ``fit``: looks at the validation split, patience, averaged weights, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from unbraid import parallel, sharded_files, sharding
from unbraid.data.table import Read, steps_per_epoch
from unbraid.evaluate import evaluate
from unbraid.normalise import over_processes
from unbraid.optim.averaging import Running, remeasure
from unbraid.slots import Look, Term, Update
from unbraid.train.checkpoints import copies, random_state, set_random_state
from unbraid.train.dense import dense
from unbraid.train.draws import Sample
from unbraid.train.loop import fit
from unbraid.train.rehearsal import Rehearse
from unbraid.train.scoring import check_metric, selected
from unbraid.types import Batch, Losses, Output, State

if TYPE_CHECKING:
    from unbraid.train.session import Local


class Call:
    """One call of `Local.fit`: evaluation, early stopping, checkpoints and their resumption around `fit`."""

    def __init__(
        self, session: Local, call: int, model: nn.Module, update: Update, steps: int, rows: np.ndarray, seed: int,
        stream: bool = False, rehearse: Rehearse | None = None, look: Look | None = None, sample: Sample | None = None,
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
        batches, terms = self._batches(start), self.terms()
        moved = self._joined(batches, start)
        if self.rehearse is not None:
            moved = self.rehearse.watch(moved, start, terms, self.read)
        self.told_step, self.began = start, time.monotonic()
        session.watcher.begins(self.call, session.steps)
        session.watcher.stage("training", start, self.steps)
        done = start
        try:
            if not self._out_of_patience():  # else the process died between its last look and its end
                with over_processes(self.model), dense(self.model, session.training):
                    done = fit(
                        self.model, moved, terms, self.step, steps=self.steps, start=start,
                        callbacks=(self._tell, self._look, self._keep),
                    )  # fmt: skip
        finally:
            batches.close()  # type: ignore[attr-defined]
            if self.rehearse is not None:
                self.rehearse.close()
        self._add_up(self._spent(), done)
        self.end()
        self._save(done, finished=True)
        self._remember()

    def terms(self) -> list[Term]:
        """The losses of this call; those with a memory begin with what an earlier process remembered."""
        terms = [
            term.over(*self.length) if hasattr(term, "over") else term for term in self.session._terms_for(self.model)
        ]
        terms = [term.fresh(*self._known()) if hasattr(term, "fresh") else term for term in terms]
        self.memories = [term for term in terms if hasattr(term, "fresh")]
        for term, state in zip(self.memories, self.remembered, strict=bool(self.remembered)):
            term.load_state_dict(state)
        return terms if self.sample is None else [self.sample.restrict(term) for term in terms]

    def end(self) -> None:
        """Leave the model with the weights that the training keeps: the last, the best look's, or their mean."""
        self.update.settle()
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        elif self.average is not None:
            with over_processes(self.model):
                self._write_average(self.average)

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

    def step(self, losses: Losses, output: Output) -> None:
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
        weights = copies(self.model)
        self._write_average(self.average)
        return weights

    def _batches(self, start: int) -> Iterator[Batch]:
        """The training batches from step ``start`` on, on the CPU."""
        return self.session.training_batches(
            self.rows, self.seed, start, parts=self.parts, sample=self.sample, stream=self.stream, read=self.read
        )

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
                self.best_weights = copies(self.model)
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
        by_time = bool(training.checkpoint_seconds) and now - self.saved_at >= training.checkpoint_seconds
        if (
            self.session.tables and training.checkpoint_seconds
        ):  # all write: their clocks must not decide for themselves
            (by_time,) = sharding.any_of([by_time])
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
        if path is None or (parallel.rank() and not self.session.tables):
            return
        self.session.watcher.saving()
        state: State = {
            "step": done,
            "finished": finished,
            "model": self.model.state_dict(),
            "update": self.update.state_dict(),
        }
        state |= {"rng": random_state(), "best": self.best, "seconds": self._spent()}
        if not finished:
            state["best_weights"] = self.best_weights
            state["average"] = None if self.average is None else self.average.state_dict()
            state["memories"] = [term.state_dict() for term in self.memories]
        sharded_files.save(path, state, self.session.tables)

    def _resume(self) -> tuple[int, bool]:
        """Load the call's checkpoint, if there is one to resume.  Returns (steps done, finished)."""
        path = self._path()
        if path is None or not self.session.resume:
            return 0, False
        if not path.exists():
            self.session.cut_log(self.call, 0)
            return 0, False
        state = sharded_files.load(path)
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state["update"])
        self.best, self.best_weights = state["best"], state.get("best_weights")
        self.remembered = state.get("memories", [])
        if self.average is not None and not state["finished"]:
            self.average.load_state_dict(state["average"])
        self.seconds = state["seconds"]
        set_random_state(state["rng"])
        parallel.wait()
        self.session.watcher.note(f"resumed at step {state['step']:,} of {self.steps:,}")
        self.session.cut_log(self.call, state["step"])
        if state["finished"]:
            self._add_up(self.seconds, state["step"])
        return state["step"], state["finished"]
