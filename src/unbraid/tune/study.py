"""The study on disk: which candidates were tried, how they ended, which is next.

Optuna (Akiba et al., KDD 2019, https://arxiv.org/abs/1907.10902) draws candidates by its tree-structured Parzen estimator and
keeps them in SQLite.  One process alone, the search's, writes the database, whatever the number of processes that train: its
transactions are whole or not there, and nothing waits for a lock.  A journal file would be the choice where many processes
write; killed in the middle of a line it is damaged.  A lock that ends with its process keeps a second search out of the folder,
so that a trial that is *running* when a search begins is one that was killed: it is closed, and its candidate is tried again.

Each draw has a seed of its own, made of the search's and of how many trials there were before, so that a search in one process
that is interrupted and resumed goes the way of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unbraid.compat import optional
from unbraid.preflight import JobError
from unbraid.tune.space import Drawn, Space
from unbraid.tune.trial import Outcome

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

FILE, LOCK, NAME = "study.db", "study.lock", "unbraid"
FILES = (FILE, f"{FILE}-journal", f"{FILE}-wal", f"{FILE}-shm")
PRUNERS = ("median", "hyperband", "none")
LEAST = 10  # finished trials that importances need
SEARCH, OUTCOME, AS_IT_IS = "search", "outcome", "as it is"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other searches out of a folder; the lock goes with the process, however it ends.  Raises JobError."""
    import fcntl

    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JobError(
                f"Another `unbraid tune` is searching in {folder}. Wait for it, or choose another --out."
            ) from None
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's lines and warnings: what a user should know is said by the search."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


class _Connection(sqlite3.Connection):
    """A write-ahead log, which waits less for the disk: a killed process loses nothing, a power cut the last trials perhaps."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


class Study:
    """Asks for candidates, and is told how they ended.

    Args:
        folder: where `FILE` lies or will; space: what varies.
        about: what makes the search what it is, as plain values; one that is resumed must have the same.
        falls: is a smaller objective better?  seed: of the draws; pruner: one of `PRUNERS`.
        first: what is to be tried first, the run as it is, if the space has it.

    Raises:
        JobError: the study there is of another search, or is no study.
        ImportError: Optuna is missing.
    """

    def __init__(
        self, folder: Path, space: Space, about: Mapping[str, Any], *, falls: bool, seed: int, pruner: str = "median",
        first: Mapping[str, Drawn] | None = None,
    ) -> None:  # fmt: skip
        optuna = optional("optuna", "tune", "`unbraid tune`")
        self.space, self.seed, self.falls = space, seed, falls
        self.path = folder / FILE
        self.running: dict[int, Trial] = {}
        # two looks before a median counts: the first one favours whoever starts fast
        pruners = {"median": partial(optuna.pruners.MedianPruner, n_warmup_steps=2), "hyperband": optuna.pruners.HyperbandPruner,
                   "none": optuna.pruners.NopPruner}  # fmt: skip
        with _quiet():
            try:
                self.storage = optuna.storages.RDBStorage(
                    f"sqlite:///{self.path.absolute()}", engine_kwargs={"connect_args": {"factory": _Connection}}
                )
                self.study = optuna.create_study(
                    storage=self.storage, study_name=NAME, load_if_exists=True, pruner=pruners[pruner](),
                    direction="minimize" if falls else "maximize",
                )  # fmt: skip
            except Exception as error:
                raise JobError(f"{self.path} cannot be read as a study: {str(error).splitlines()[0]}") from error
            self._begin(about, first)

    def _begin(self, about: Mapping[str, Any], first: Mapping[str, Drawn] | None) -> None:
        """Note what is searched, or see that it is the same; close what an earlier process left running."""
        kept, about = self.study.user_attrs.get(SEARCH), json.loads(json.dumps(about))
        if kept is not None and kept != about:
            differ = [name for name in about if kept.get(name) != about[name]]
            raise JobError(
                f"{self.path} is of another search: {', '.join(differ)} not the same. "
                "Give the same ones, or choose another --out."
            )
        if kept is None:  # new, or killed before it had begun
            if first is not None:
                self.study.enqueue_trial(dict(first), user_attrs={AS_IT_IS: True}, skip_if_exists=True)
            self.study.set_user_attr(SEARCH, about)
        for trial in self._trials():
            if trial.state.name == "RUNNING":
                attributes = {AS_IT_IS: True} if AS_IT_IS in trial.user_attrs else {}
                if trial.params:  # queued before it is closed: killed between the two, it is tried twice and never lost
                    self.study.enqueue_trial(trial.params, user_attrs=attributes, skip_if_exists=False)
                self.study.tell(trial.number, state=_state("failed"))

    def close(self) -> None:
        """Close the database."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    @property
    def ended(self) -> list[FrozenTrial]:
        """Trials that have an outcome; those that were killed have none."""
        return [trial for trial in self._trials() if OUTCOME in trial.user_attrs and trial.state.is_finished()]

    @property
    def best(self) -> FrozenTrial | None:
        """The complete trial with the best value; of equal ones the first."""
        done = [trial for trial in self.ended if trial.state.name == "COMPLETE"]
        sign = 1 if self.falls else -1
        return min(done, key=lambda trial: (sign * trial.value, trial.number), default=None)  # type: ignore[operator]

    def ask(self) -> tuple[int, dict[str, Drawn]]:
        """The number of the next trial, and its candidate."""
        import optuna

        seeds = [self.seed, len(self.ended) + len(self.running)]
        with _quiet():
            self.study.sampler = optuna.samplers.TPESampler(
                seed=int(np.random.SeedSequence(seeds).generate_state(1)[0])
            )
            trial = self.study.ask({dimension.key: dimension.distribution() for dimension in self.space})
        self.running[trial.number] = trial
        return trial.number, dict(trial.params)

    def twin(self, drawn: Mapping[str, Drawn]) -> FrozenTrial | None:
        """A complete trial of the same candidate."""
        return next((t for t in self.ended if t.state.name == "COMPLETE" and t.params == drawn), None)

    def prune(self, number: int, look: int, value: float) -> bool:
        """Note the objective at a look.  Returns whether the trial is not worth its time."""
        with _quiet():
            self.running[number].report(value, look)
            return self.running[number].should_prune()

    def tell(self, number: int, outcome: Outcome) -> None:
        """Note how a trial ended."""
        with _quiet():
            trial = self.running.pop(number)
            trial.set_user_attr(OUTCOME, dataclasses.asdict(outcome))
            self.study.tell(trial, outcome.value if outcome.state == "complete" else None, _state(outcome.state))

    def table(self) -> list[dict[str, Any]]:
        """Trials that have ended, in the order of their numbers, as plain values."""
        found = []
        for trial in self.ended:
            params = {d.key: d.value(trial.params[d.key]) for d in self.space}
            outcome = trial.user_attrs[OUTCOME]
            value = trial.value if outcome["state"] == "complete" else None
            line = {"number": trial.number, "state": outcome["state"], "value": value, "values": outcome["values"]}
            line |= {
                "params": params,
                "drawn": dict(trial.params),
                "seconds": outcome["seconds"],
                "looks": outcome["looks"],
            }
            found.append({**line, "error": outcome["error"], "as_it_is": AS_IT_IS in trial.user_attrs})
        return found

    def importances(self) -> dict[str, float]:
        """Key -> its share in telling good complete trials from others (PED-ANOVA), largest first; of fewer than `LEAST` none."""
        import optuna

        done = [trial for trial in self.ended if trial.state.name == "COMPLETE"]
        varied = [d.key for d in self.space if len({trial.params[d.key] for trial in done}) > 1]
        if len(done) < LEAST or not varied or len({trial.value for trial in done}) == 1:
            return {}
        with _quiet():
            return dict(optuna.importance.get_param_importances(self.study, params=varied))


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[name]
