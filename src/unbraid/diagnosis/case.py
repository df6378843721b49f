"""What a check looks at: a trained bundle, the data that it was trained on, and a sample of its rows."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from unbraid.bootstrap import Drawn
from unbraid.bundle import EVALUATION_ROWS, Bundle
from unbraid.config import Run
from unbraid.data.encode import cache_folder, encode, fingerprint
from unbraid.data.features import attach
from unbraid.data.source import Tables
from unbraid.data.table import Encoded
from unbraid.diagnosis.diagnosis import NotApplicable
from unbraid.evaluate import lead_metric, lower_is_better, replicate
from unbraid.layers import device_of
from unbraid.preflight import bound_terms
from unbraid.train import Local, Watcher, predict
from unbraid.types import Batch, Schema, Scores, Task

REPLICATES = 300
WORTH_PROCESSES = 20.0  # seconds of training; a new process imports torch for some seconds


@dataclass(frozen=True)
class Case:
    """A trained run under examination.  Nothing in it reads a label of the test split.

    Args:
        bundle: the trained artefact; encoded: its data, encoded by its own vocabularies.
        rows: a check looks at no more than so many rows of a split, drawn once from ``seed``.
        steps: a check that trains (a copy) does so for no more steps.
        tables: in-memory tables by name, if the run has some; base: the folder that its tables are relative to.
        jobs: short trainings that run at once, each in a process, where that is faster; the results are the same.
    """

    bundle: Bundle
    encoded: Encoded
    rows: int = 20_000
    steps: int = 60
    seed: int = 0
    tables: Tables | None = None
    base: Path = Path()
    watcher: Watcher = field(default_factory=Watcher)
    jobs: int = 1

    @classmethod
    def of(
        cls, bundle: Bundle, *, rows: int = 20_000, steps: int = 60, seed: int = 0, tables: Tables | None = None,
        watcher: Watcher | None = None, jobs: int = 1,
    ) -> Case:  # fmt: skip
        """The case of a bundle, whose data are encoded if they are not yet.  Raises DataError as `unbraid.data.encode.encode`."""
        watcher = watcher or Watcher()
        data, base = bundle.run.data, Path()
        left = cache_folder(data) / str(
            bundle.metrics.get("data")
        )  # as training encoded them, if nothing has changed since
        if left.name != fingerprint(data, base, tables) or not (left / "columns.json").exists():
            left = encode(data, base, tables=tables, fitted=bundle.fitted, progress=watcher.stage)
        encoded = Encoded(left)
        attach(encoded, bundle.model, progress=watcher.stage, device=str(device_of(bundle.model)))
        return cls(bundle, encoded, rows, steps, seed, tables, watcher=watcher, jobs=jobs)

    # ------------------------------------------------------------------------------------------------------- what there is
    @property
    def run(self) -> Run:
        """The run that was trained."""
        return self.bundle.run

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self.encoded.schema

    @property
    def model(self) -> nn.Module:
        """The trained model; a check that trains takes a copy."""
        return self.bundle.model

    @property
    def targets(self) -> list[Task]:
        """Tasks that the run is judged by."""
        return [task for task in self.schema.tasks if task.role == "target"]

    # ---------------------------------------------------------------------------------------------------------- the sample
    @cached_property
    def _sampled(self) -> Mapping[str, np.ndarray]:
        found = {}
        for place, split in enumerate(("train", "valid", "test")):
            rows = self.encoded.split(split)
            if len(rows) > self.rows:
                rows = np.sort(np.random.default_rng([self.seed, place]).choice(rows, self.rows, replace=False))
            found[split] = rows
        return found

    def sample(self, split: str) -> np.ndarray:
        """(n,) ascending row numbers of the sample of ``train``, ``valid`` or ``test``."""
        return self._sampled[split]

    def batches(self, split: str, size: int = 4096) -> Iterator[Batch]:
        """The sample of a split in batches, in order.

        Of ``test`` no label is known: they are not there to be looked at.
        """
        for batch in self.encoded.in_order(self.sample(split), min(size, self.encoded.most)):
            yield unlabelled(batch) if split == "test" else batch

    def column(self, name: str, split: str) -> np.ndarray | None:
        """(n,) what is known of each row of the sample beside features and labels (``user``, ``domain``, ``time``)."""
        return np.asarray(self.encoded.columns[name][self.sample(split)]) if name in self.encoded.columns else None

    @cached_property
    def valid(self) -> Scores:
        """The model's predictions of the sample of the validation split, with labels."""
        return predict(self.model, self.batches("valid", EVALUATION_ROWS), self.schema)

    @cached_property
    def target(self) -> Scores:
        """The model's predictions of the sample of the test split; none of its labels is known."""
        return predict(self.model, self.batches("test", EVALUATION_ROWS), self.schema)

    # ------------------------------------------------------------------------------------------------------------ training
    def session(self) -> Local:
        """A session for short trainings of copies, by ``fit(..., stream=True)``: the run's losses and update, no file."""
        run = self.run
        return Local(
            self.encoded, bound_terms(run, self.schema, copy.deepcopy(self.model)), run.update, run.training,  # type: ignore[arg-type]
            {task.name: task.weight for task in self.schema.tasks}, run.seed, device=str(device_of(self.model)),
            augment=run.augment,
        )  # fmt: skip

    def branches(
        self, weights: Sequence[Mapping[str, float]], names: Sequence[str]
    ) -> list[dict[str, tuple[str, Drawn]]]:
        """The leading metrics (`leads`) of copies that train on from the trained weights, each with its weights of tasks.

        All see the same batches.  The first trains here; if the others would take long, they do so in ``jobs`` processes.
        """
        model, found = copy.deepcopy(self.model), list[dict[str, tuple[str, Drawn]]]()
        with contextlib.closing(self.session()) as session:
            started = time.perf_counter()
            rest = len(weights) - 1
            for calls, jobs in ((weights[:1], 1), (weights[1:], self.jobs)):
                given = [{"weights": each, "seed": (self.seed,), "stream": True} for each in calls]
                jobs = jobs if rest * (time.perf_counter() - started) > WORTH_PROCESSES else 1
                for trained, _ in session.fit_apart(model, self.steps, given, jobs=jobs):
                    self.watcher.stage(names[len(found)], len(found) + 1, len(weights))
                    copied = copy.deepcopy(self.model)
                    copied.load_state_dict(trained)
                    found.append(self.leads(predict(copied, self.batches("valid"), self.schema)))
        return found

    # ---------------------------------------------------------------------------------------------------------- statistics
    def leads(self, scores: Scores) -> dict[str, tuple[str, Drawn]]:
        """Task -> its leading metric and that metric's replicates, over users, for `paired`."""
        found = replicate(scores, self.schema, replicates=REPLICATES, seed=self.seed)
        whole = {task: each.metrics for (task, domain), each in found.items() if not domain}
        return {task: (lead_metric(metrics), metrics[lead_metric(metrics)]) for task, metrics in whole.items()}


def paired(
    before: tuple[str, Drawn] | None, after: tuple[str, Drawn] | None
) -> tuple[float, float, float] | None:  # fmt: skip
    """By how much ``after`` is better, with its paired 95 % interval; None if undefined.  Both: (metric, replicates), same rows.

    AUC and accuracy are as they are, of RMSE the relative decrease.
    """
    if before is None or after is None or before[1].value is None or after[1].value is None:
        return None
    (name, old), (_, new) = before, after
    assert old.value is not None and new.value is not None
    sign = -1 if lower_is_better(name) else 1
    scale = old.value if lower_is_better(name) else 1.0
    draws = sign * (new.draws - old.draws) / scale
    draws = draws[np.isfinite(draws)]
    if len(draws) < 2:
        return None
    low, high = np.quantile(draws, (0.025, 0.975))
    return sign * (new.value - old.value) / scale, float(low), float(high)


def unlabelled(batch: Batch) -> Batch:
    """The same rows without their labels: all unobserved, and 0."""
    return dataclasses.replace(
        batch,
        labels={name: label.new_zeros(label.shape) for name, label in batch.labels.items()},
        observed={name: known.new_zeros(known.shape) for name, known in batch.observed.items()},
    )


def interval(value: float, parts: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean of rows ``parts`` (n,), whose rows of one group (a user) are not independent."""
    if len(parts) < 2:
        raise NotApplicable("fewer than two rows")
    _, inverse = np.unique(groups, return_inverse=True)
    sums = np.bincount(inverse, parts - parts.mean())
    error = float(np.sqrt((sums**2).sum())) / len(parts)
    return value - 1.96 * error, value + 1.96 * error


def names_of(values: Sequence[str], most: int = 3) -> str:
    """A few names in backquotes, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"


def without_feature(run: Run, name: str) -> Run | None:
    """The run without one feature, also in its baseline; None if it has no other."""
    kept = tuple(feature for feature in run.data.features if feature.name != name)
    if not kept or len(kept) == len(run.data.features):
        return None
    baseline = tuple(column for column in run.baseline if column != name)
    data = dataclasses.replace(run.data, features=kept)
    return dataclasses.replace(run, name=f"{run.name}_without_{name}", data=data, baseline=baseline)
