"""The search: candidates of a space are trained and judged on the validation split, the best is written as a run file.

The test split is not read before the search is over, and then only if asked for: the run as it is and the best are trained with
seeds that no trial had, and compared in pairs (`unbraid.compare`).  The best of many validation values is better than it will be
on other rows, since it is partly the luckiest; the paired difference on the test split is not chosen by its value.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from unbraid import config, store
from unbraid.adapters.frames import in_polars
from unbraid.compare import compare, metrics_of, try_to_build
from unbraid.data.source import Tables
from unbraid.preflight import JobError
from unbraid.report import tuning
from unbraid.run_folder import clear
from unbraid.train import Watcher
from unbraid.tune import space as spaces
from unbraid.tune.space import Drawn, Space
from unbraid.tune.study import FILE, FILES, LOCK, PRUNERS, Study, alone
from unbraid.tune.trial import Objective, Outcome, Trainer, measured

ASIS, TEST = "as_it_is", "test"
WRITES = (*FILES, LOCK, "best.toml", "tune.json", "report.md", "report.html")
PATIENCE = 5  # trials that may fail before one does not


def tune(
    run: config.Run, out: str | Path, *, trials: int = 20, space: Space | None = None, metric: str = "", seeds: int = 1,
    pruner: str = "median", jobs: int = 1, seed: int | None = None, test: int = 0, resume: bool = False, overwrite: bool = False,
    tables: Tables | None = None, watcher: Watcher | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Search, and write ``best.toml``, ``tune.json``, ``report.md`` and, with the extra `report`, ``report.html``.

    Args:
        run: what is varied; out: the folder, which also gets ``study.db``.
        trials: how many in all, those of an interrupted search included.
        space: what varies; None: `unbraid.tune.space.default`.
        metric: the objective on the validation split, as ``training.metric`` (which it is if empty); seeds: trainings of a trial.
        pruner: ``median``, ``hyperband`` or ``none``: when a trial is stopped at a look at the validation split.
        jobs: trials at once, each in a process and with one thread of its own.
        seed: of the draws; None: the run's.
        test: seeds with which the run as it is and the best are compared on the test split at the end; 0: not at all.
        resume: continue the search in ``out``; overwrite: delete it first.
        tables: tables in memory by name.

    Returns:
        What ``tune.json`` holds (docs/tuning.md).

    Raises:
        JobError: the run cannot be trained or judged, each trial fails, or the folder is in the way; RunError: the space.
    """
    out, watcher = Path(out), watcher or Watcher()
    space = spaces.default(run) if space is None else space
    objective = Objective.of(run, metric, seeds)
    _check(run, space, trials, jobs, pruner, test)
    pruner, why = _pruner(space, pruner)
    _require_free(out, resume, overwrite)
    tables = in_polars(tables)
    try_to_build(run, tables, watcher)  # what all trials read is encoded here
    about: dict[str, Any] = {
        "run": config.dumps(run), "space": {d.key: d.plain() for d in space}, "objective": objective.name(run),
        "seeds": seeds, "pruner": pruner, "seed": run.seed if seed is None else seed,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        if overwrite:
            _delete(out)
        first = {d.key: own for d in space if (own := d.own(run)) is not None}
        whole = len(first) == len(space)
        study = Study(
            out, space, about, falls=objective.falls(run), seed=about["seed"], pruner=pruner, first=first if whole else None
        )  # fmt: skip
        for note in (why, "" if whole else _not_in(space, first)):
            if note:
                watcher.note(f"! {note}")
        with contextlib.closing(study):
            _Search(run, objective, study, out, trials, jobs, tables, watcher).go()
            found = _found(run, objective, study, about)
        found["test"] = _tested(out / TEST, found["best"])
        _write(out, found, watcher)
        if test:
            found["test"] = _test(run, space, found["best"], objective, test, out / TEST, tables, watcher)
            _write(out, found, watcher)
    return found


# -------------------------------------------------------------------------------------------------------------- before
def _check(run: config.Run, space: Space, trials: int, jobs: int, pruner: str, test: int) -> None:
    if not space:
        raise JobError("There is nothing to tune: the space has no key.")
    if trials < 1 or jobs < 1 or test < 0:
        raise JobError(
            f"--trials and --jobs should be at least 1, --test at least 0. Found {trials}, {jobs} and {test}."
        )
    if pruner not in PRUNERS:
        raise JobError(f"--pruner should be one of {', '.join(PRUNERS)}. Found {pruner}.")
    if jobs > 1 and getattr(run.schedule, "jobs", 1) > 1:
        raise JobError(
            "--jobs trains several trials at once, so that none can have processes of its own: set `schedule.jobs` to 1."
        )


def _pruner(space: Space, pruner: str) -> tuple[str, str]:
    """The pruner, and why it is another than the one that was asked for."""
    if pruner == "none" or not any(dimension.key.partition(".")[0] == "schedule" for dimension in space):
        return pruner, ""
    return "none", "no trial is pruned: trials of different schedules look at different models"


def _not_in(space: Space, first: Mapping[str, Drawn]) -> str:
    without = ", ".join(dimension.key for dimension in space if dimension.key not in first)
    return f"the run as it is is no trial: what varies has not its own {without}"


def _require_free(out: Path, resume: bool, overwrite: bool) -> None:
    """Raises JobError when the folder is in the way, or not the one to resume."""
    if resume and overwrite:
        raise JobError("--resume keeps what is there and --overwrite does not. Give one of them.")
    if out.exists() and not out.is_dir():
        raise JobError(f"{out} is a file. Choose another --out.")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    if other := sorted(name for name in there - {*WRITES, TEST} if ".unbraid-" not in name):
        raise JobError(f"{out} holds {', '.join(other[:5])}, which no search wrote. Choose another --out.")
    if resume and FILE not in there:
        raise JobError(f"There is nothing to resume in {out}: it holds no {FILE}.")
    if FILE in there and not (resume or overwrite):
        raise JobError(
            f"{out} holds a search. Continue it with --resume, delete it with --overwrite, or choose another --out."
        )


# --------------------------------------------------------------------------------------------------------------- trials
class _Search:
    """Trains trials until there are enough, in this process or in several."""

    def __init__(
        self, run: config.Run, objective: Objective, study: Study, out: Path, trials: int, jobs: int, tables: Tables | None,
        watcher: Watcher,
    ) -> None:  # fmt: skip
        self.run, self.objective, self.study, self.out = run, objective, study, out
        self.trials, self.jobs, self.tables, self.watcher = trials, jobs, tables, watcher

    def go(self) -> None:
        """Train what is left.  Raises JobError if trials fail and none does not."""
        self.watcher.stage("trials", len(self.study.ended), self.trials)
        if self._left():
            self.watcher.note(LINE.format("trial", self.objective.name(self.run), "best", "seconds", "values"))
            self._here() if self.jobs == 1 else self._apart()
        self._require_one(len(self.study.ended))
        self.write_best()  # a kill may have come between a better trial and this

    def _left(self) -> int:
        return self.trials - len(self.study.ended) - len(self.study.running)

    def _next(self) -> tuple[int, config.Run] | None:
        """A candidate to train; None if the study had the same one before, or it does not make a run: then it has ended."""
        number, drawn = self.study.ask()
        if (twin := self.study.twin(drawn)) is not None:
            self._ended(
                number,
                Outcome("complete", tuple(twin.user_attrs["outcome"]["values"]), error=f"as trial {twin.number}"),
            )
            return None
        try:
            return number, spaces.candidate(self.run, self.study.space, drawn)
        except config.RunError as error:
            self._ended(number, Outcome("failed", error=f"RunError: {error}"))
            return None

    def _here(self) -> None:
        """One after the other, in this process."""
        while self._left() > 0:
            if (given := self._next()) is None:
                continue
            number, run = given
            if run.training.threads:
                torch.set_num_threads(run.training.threads)
            ask = functools.partial(self.study.prune, number)
            self._ended(number, measured(run, self.objective, self.tables, ask))

    def _apart(self) -> None:
        """Several at once, each in a process of its own; one that dies costs its trial."""
        idle, busy = list[Trainer](), dict[Connection, Trainer]()
        try:
            while self._left() > 0 or busy:
                while self._left() > 0 and len(busy) < self.jobs:
                    if (given := self._next()) is not None:
                        trainer = idle.pop() if idle else Trainer()
                        trainer.give_trial(*given, self.objective, self.tables)
                        busy[trainer.pipe] = trainer
                for pipe in wait(list(busy)):
                    trainer = busy[pipe]  # type: ignore[index]
                    if self._hear(trainer):
                        del busy[trainer.pipe]
                        if trainer.process.is_alive():
                            idle.append(trainer)
        finally:
            for trainer in (*idle, *busy.values()):
                trainer.end()

    def _hear(self, trainer: Trainer) -> bool:
        """Act on a message.  Returns whether the trial has ended."""
        try:
            what, value = trainer.hear()
        except ChildProcessError as error:
            trainer.end()
            self._ended(trainer.place, Outcome("failed", error=str(error)))
            return True
        if what == "look":
            trainer.reply(self.study.prune(trainer.place, *value))
            return False
        self._ended(trainer.place, value)
        return True

    def _ended(self, number: int, outcome: Outcome) -> None:
        """Note and say how a trial ended; write the best run's file if it is the best."""
        drawn = dict(self.study.running[number].params)
        self.study.tell(number, outcome)
        best, done = self.study.best, self.study.ended
        shown = f"{outcome.value:.5f}" if outcome.state == "complete" else outcome.state
        values = spaces.said(drawn, self.study.space) + (
            f"   ({outcome.error.splitlines()[0]})" if outcome.error else ""
        )
        top = "-" if best is None else f"{best.value:.5f}"
        self.watcher.note(LINE.format(number, shown, top, f"{outcome.seconds:.1f}", values))
        self.watcher.stage("trials", len(done), self.trials)
        if best is not None and best.number == number:
            self.write_best()
        if best is None and len(done) >= PATIENCE:
            self._require_one(len(done))

    def _require_one(self, count: int) -> None:
        """Raise JobError unless a trial is complete."""
        if self.study.best is None:
            error = next((line["error"] for line in self.study.table() if line["error"]), "none had a reason")
            raise JobError(f"Each of {count} trials failed. The first: {error}")

    def write_best(self) -> None:
        """``best.toml``: the run with what the best trial changes, ready to train."""
        best = self.study.best
        assert best is not None
        found = spaces.candidate(self.run, self.study.space, best.params)
        what = f"{self.objective.name(self.run)} {best.value:.5f} on the validation split"
        head = f"# Found by `unbraid tune`: trial {best.number}, {what}."
        named = replace(found, name=f"{found.name}-tuned")
        store.write_text(self.out / "best.toml", f"{head}\n{config.dumps(named)}")


LINE = "{:>5}  {:>10}  {:>10}  {:>7}  {}"


# ---------------------------------------------------------------------------------------------------------------- after
def _found(run: config.Run, objective: Objective, study: Study, about: Mapping[str, Any]) -> dict[str, Any]:
    """What ``tune.json`` holds, but for the test."""
    lines, best = study.table(), study.best
    assert best is not None
    return {
        "run": run.name, **{key: about[key] for key in ("objective", "seeds", "pruner", "seed", "space")},
        "lower_is_better": objective.falls(run),
        "oracle": run.selection is not None and run.selection.oracle and not objective.metric,
        "own": {d.key: d.value(own) if (own := d.own(run)) is not None else spaces.present(run, d.key) for d in study.space},
        "as_it_is": next((line["value"] for line in lines if line["as_it_is"]), None),
        "best": next(line for line in lines if line["number"] == best.number),
        "importances": study.importances(), "trials": lines, "test": None,
    }  # fmt: skip


def _named(best: Mapping[str, Any]) -> str:
    return f"trial-{best['number']}"


def _tested(folder: Path, best: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier call found on the test split for the same trial."""
    path = folder / "compare.json"
    found = json.loads(path.read_text()) if path.exists() else {"cost": {}}
    return found if _named(best) in found["cost"] else None


def _test(
    run: config.Run, space: Space, best: Mapping[str, Any], objective: Objective, seeds: int, folder: Path,
    tables: Tables | None, watcher: Watcher,
) -> dict[str, Any]:  # fmt: skip
    """Compare the run as it is and the best on the test split, with seeds that no trial trained with."""
    name = _named(best)
    if earlier := sorted(path.name for path in folder.glob("trial-*") if path.name != name):
        watcher.note(f"! the test split has been looked at before, for {', '.join(earlier)}")
    fresh = replace(run, seed=run.seed + objective.seeds)
    runs = [replace(fresh, name=ASIS), replace(spaces.candidate(fresh, space, best["drawn"]), name=name)]
    metric = objective.metric.rpartition(".")[2]
    if not all(metric in metrics_of(run.data, task) for task in run.data.tasks):
        metric = ""  # of each task its own
    return compare(
        runs, folder, seeds=seeds, against=ASIS, metric=metric, any_budget=True, resume=True, tables=tables, watcher=watcher
    )  # fmt: skip


def _write(out: Path, found: Mapping[str, Any], watcher: Watcher) -> None:
    store.write_text(out / "tune.json", json.dumps(found, indent=1))
    store.write_text(out / "report.md", tuning.markdown(found))
    try:
        store.write_text(out / "report.html", tuning.html(found))
    except ImportError as error:
        watcher.note(f"no report.html: {error}")


def _delete(out: Path) -> None:
    """Delete a search, but for its lock.  Raises JobError where a bundle of its test holds anything that no run wrote."""
    for folder in (out / TEST).glob("*/seed-*"):
        clear(folder)
        folder.rmdir()
        with contextlib.suppress(OSError):  # not empty yet
            folder.parent.rmdir()
    for name in (*(name for name in WRITES if name != LOCK), f"{TEST}/compare.json", f"{TEST}/compare.md"):
        (out / name).unlink(missing_ok=True)
