"""What happens in a training, written to TensorBoard or MLflow by their own libraries: ``unbraid train --track KIND=ADDRESS``.

A `Tracker` is a `unbraid.train.Watcher` around another one.  It makes points (name, step, value) of what it is told and hands
them to its stores in batches: every few seconds, after each evaluation, and before a checkpoint is written, so that a resumed
training finds in the store whatever it will not do again.  What the interrupted process wrote beyond its last checkpoint is
done again bit-equal, and left out then: a name has each step once.

A step is counted over the whole run: the calls of ``fit`` that a schedule makes follow one another.  The extra ``track``
installs both libraries; they are imported when asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from unbraid import config, store
from unbraid.compat import optional
from unbraid.evaluate import metric_names
from unbraid.train import Watcher

FILE = "track.json"  # in the bundle's folder: KIND=ADDRESS -> the entry there, for --resume
FEW_DOMAINS = 20  # more would fill a board with curves that nobody looks at
SECONDS, POINTS = 5.0, 1000  # how long, and how many, points wait
Steps = Mapping[str, set[int]]  # name -> steps that a store has already


@dataclass(frozen=True)
class Point:
    """A value at a step; ``at`` in seconds since 1970."""

    name: str
    step: int
    value: float
    at: float


@dataclass(frozen=True)
class Entry:
    """What a store is told of a run: its name, its run file as TOML, and single values of it."""

    name: str
    text: str
    params: Mapping[str, str]

    @classmethod
    def of(cls, run: config.Run) -> Entry:
        """Every value of the run, defaults included; of ``data``, which may have hundreds of columns, what is set."""
        plain = {**config.to_dict(run), "data": config.to_dict(run, defaults=False)["data"]}
        return cls(f"{run.name}-seed-{run.seed}", config.dumps(run), dict(_flat(plain, "")))


class Store(Protocol):
    """Where points go.  Raises whatever its library does."""

    kind: ClassVar[str]

    def __init__(self, address: str) -> None:
        """Raises ImportError without the library, ValueError for what is no address of this kind."""

    def begin(self, entry: Entry, key: str | None) -> tuple[str, Steps]:
        """Continue the entry of this key, else begin one.  Returns its key, and what it has already."""

    def write(self, points: Sequence[Point]) -> None:
        """Add points; they are safe from the end of this process when it returns."""

    def close(self, status: str) -> None:
        """``FINISHED``, ``FAILED`` or ``KILLED``."""


# ----------------------------------------------------------------------------------------------------------- the stores
class TensorBoard:
    """A folder of event files per run, in the folder that ``tensorboard --logdir`` is given."""

    kind: ClassVar[str] = "tensorboard"

    def __init__(self, address: str) -> None:
        if "://" in address:
            raise ValueError(f"TensorBoard reads a folder, such as runs/tensorboard. Found {address}.")
        optional("tensorboard", "track", "Tracking with TensorBoard")
        self.folder = Path(address)
        self.writer: Any = None

    def begin(self, entry: Entry, key: str | None) -> tuple[str, Steps]:
        """See `Store`.  The key is the name of the run's folder."""
        from torch.utils.tensorboard import SummaryWriter

        there = key is not None and (self.folder / key).is_dir()
        folder = self.folder / str(key) if there else _new_folder(self.folder, entry.name)
        has = _events(folder) if there else {}
        self.writer = SummaryWriter(str(folder))
        if not there:
            self.writer.add_text("run", f"```toml\n{entry.text}```", 0)
        return folder.name, has

    def write(self, points: Sequence[Point]) -> None:
        """See `Store`.  Values are kept in single precision."""
        for point in points:
            self.writer.add_scalar(point.name, point.value, point.step, walltime=point.at)
        self.writer.flush()

    def close(self, status: str) -> None:
        """See `Store`; TensorBoard has no status."""
        if self.writer is not None:
            self.writer.close()


def _new_folder(parent: Path, name: str) -> Path:
    """``parent/name``, or with a number behind it if that is taken."""
    for number in range(1, 10_000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        if not parent.is_dir():
            break  # a file, which no number helps
    raise ValueError(f"{parent} is no folder that a run can be added to.")


def _events(folder: Path) -> Steps:
    """The steps of each name in a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    found.Reload()
    return {name: {event.step for event in found.Scalars(name)} for name in found.Tags()["scalars"]}


class MLflow:
    """A run in an experiment of an MLflow server or database (a tracking URI)."""

    kind: ClassVar[str] = "mlflow"

    def __init__(self, address: str) -> None:
        for name, value in (
            ("MLFLOW_DISABLE_TELEMETRY", "true"),  # this library reports to nobody, and should not through another
            ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"),  # its 7 hold a training up for minutes
            ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
        ):
            os.environ.setdefault(name, value)
        database = address.startswith("sqlite:")
        for library in ("mlflow", *(("sqlalchemy", "alembic") if database else ())):
            optional(library, "track", f"Tracking with MLflow{' in a database' if database else ''}")
        self.address, self.run = address, ""
        self.client: Any = None
        self.file = Path(address.partition(":///")[2]) if database else None

    def begin(self, entry: Entry, key: str | None) -> tuple[str, Steps]:
        """See `Store`.  The key is MLflow's id of the run."""
        from mlflow import MlflowClient

        if self.file is not None:
            self.file.absolute().parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=self.address)
        if key is not None and self._active(key):
            self.run = key
            self.client.update_run(key, status="RUNNING")
            names = self.client.get_run(key).data.metrics
            return key, {name: {one.step for one in self.client.get_metric_history(key, name)} for name in names}
        self.run = self.client.create_run(self._experiment(), run_name=entry.name).info.run_id
        self._describe(entry)
        return self.run, {}

    def _active(self, key: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(key).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _experiment(self) -> str:
        """The id of the experiment that ``MLFLOW_EXPERIMENT_NAME`` names, or of ``unbraid``."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "unbraid")
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        # beside the database; MLflow's own choice is the working directory
        place = None if self.file is None else (self.file.absolute().parent / "mlartifacts").as_uri()
        return self.client.create_experiment(name, artifact_location=place)

    def _describe(self, entry: Entry) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in entry.params.items()]
        for start in range(0, len(params), 100):  # as many as a request may have
            self.client.log_batch(self.run, params=params[start : start + 100], synchronous=True)
        self.client.log_text(self.run, entry.text, "run.toml")

    def write(self, points: Sequence[Point]) -> None:
        """See `Store`."""
        from mlflow.entities import Metric

        for start in range(0, len(points), POINTS):  # as many as a request may have
            part = [Metric(p.name, p.value, int(1000 * p.at), p.step) for p in points[start : start + POINTS]]
            self.client.log_batch(self.run, metrics=part, synchronous=True)

    def close(self, status: str) -> None:
        """See `Store`."""
        if self.run:
            self.client.set_terminated(self.run, status)


STORES: dict[str, type[Store]] = {kind.kind: kind for kind in (TensorBoard, MLflow)}


def stores_of(specs: Sequence[str]) -> dict[str, Store]:
    """``KIND=ADDRESS`` -> its store, not yet opened.

    Raises:
        ValueError: no such kind, no address, or one twice; ImportError: its library is missing.
    """
    found: dict[str, Store] = {}
    for spec in specs:
        kind, _, address = spec.partition("=")
        if kind not in STORES or not address:
            raise ValueError(
                f"--track {spec} should be KIND=ADDRESS with a kind among {', '.join(STORES)}, such as "
                "tensorboard=runs/tensorboard or mlflow=sqlite:///runs/mlflow.db."
            )
        if spec in found:
            raise ValueError(f"--track {spec} is given twice.")
        found[spec] = STORES[kind](address)
    return found


# ---------------------------------------------------------------------------------------------------------- the watcher
class Tracker(Watcher):
    """Passes on what it is told, and writes it to stores while its context is open.

    A store that fails is left out from then on, with one note, and the training goes on.

    Args:
        inner: the watcher that is told first; specs: ``KIND=ADDRESS`` each; every: losses of steps 1, 1 + every, ...
        run: what trains; folder: of the bundle, where `FILE` is kept; resume: continue the entries that `FILE` names.

    Raises:
        ValueError, ImportError: as `stores_of`.
    """

    def __init__(
        self, inner: Watcher, specs: Sequence[str], every: int, run: config.Run, folder: Path | None, resume: bool
    ) -> None:  # fmt: skip
        if every < 1:
            raise ValueError(f"--track-every should be at least 1. Found {every}.")
        self.inner, self.every, self.run, self.folder = inner, every, run, folder
        self.stores = stores_of(specs)
        path = None if folder is None else folder / FILE
        self.keys = json.loads(path.read_text()) if resume and path is not None and path.exists() else {}
        self.has: dict[str, Steps] = {}
        self.waiting: list[tuple[str, int, Tensor | float, float]] = []
        self.before, self.flushed = 0, time.monotonic()
        self.clock: float | None = None  # when the last step was done; None: something else was done since
        self.timed: list[float] = []  # seconds of the steps since the last point

    def __enter__(self) -> Tracker:
        """Open the stores.  Raises ValueError where one cannot be."""
        entry = Entry.of(self.run)
        for spec, one in self.stores.items():
            try:
                key, self.has[spec] = one.begin(entry, self.keys.get(spec))
            except Exception as error:
                self._close("FAILED")
                raise ValueError(f"--track {spec} cannot be written to: {error}") from error
            if self.keys.get(spec, key) != key:
                self.note(
                    f"! {spec} no longer has {self.keys[spec]}, which the interrupted run wrote; this is a new one"
                )
            self.keys[spec] = key
            self.note(f"tracked: {spec} {key}")
        if self.folder is not None and self.stores:
            store.write_text(self.folder / FILE, json.dumps(self.keys, indent=2) + "\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._flush()
        self._close("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    # ------------------------------------------------------------------------------------------------- what it is told
    def stage(self, what: str, done: int, total: int) -> None:
        """Pass on."""
        self.inner.stage(what, done, total)

    def step(self, done: int, total: int, rows_per_second: float, losses: Mapping[str, float]) -> None:
        """Pass on."""
        self.inner.step(done, total, rows_per_second, losses)

    def note(self, text: str) -> None:
        """Pass on."""
        self.inner.note(text)

    def begins(self, call: int, before: int) -> None:
        """Steps are counted from those before this call on."""
        self.inner.begins(call, before)
        self.before, self.clock, self.timed = before, None, []

    def trained(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Keep the losses of a step and the mean seconds of the steps since the last one that was kept."""
        self.inner.trained(step, losses)
        now, at, step = time.monotonic(), time.time(), self.before + step
        if self.clock is not None:
            self.timed.append(now - self.clock)
        self.clock = now
        if (step - 1) % self.every:
            return
        # a copy, since an update may write into what a loss is a view of; read later, since reading waits for the device
        self.waiting += [(loss_name(name), step, loss.detach().clone(), at) for name, loss in losses.items()]
        if self.timed:
            self.waiting.append(("time/step", step, sum(self.timed) / len(self.timed), at))
            self.timed = []
        if now - self.flushed > SECONDS or len(self.waiting) > POINTS:
            self._flush()

    def evaluated(self, step: int, metric: str, value: float | None, best: bool, values: Mapping[str, Any]) -> None:
        """Write the validation metrics."""
        self.inner.evaluated(step, metric, value, best, values)
        found = {f"selection/{_part(metric)}": value, **numbers("valid", values)}
        self._add(self.before + step, found)
        self._flush()

    def saving(self) -> None:
        """Write what waits: the checkpoint will say that it is done."""
        self.inner.saving()
        self._flush()
        self.clock = None

    def measured(self, metrics: Mapping[str, Any]) -> None:
        """Write the test metrics with their intervals, the baseline's, and the seconds of training."""
        self.inner.measured(metrics)
        found = numbers("test", metrics["test"])
        for name, values in metrics.get("baseline", {}).items():
            found |= numbers(_part(name), values)
        self._add(metrics["steps"], {**found, "time/training": metrics["seconds"]["train"]})
        self._flush()

    # -------------------------------------------------------------------------------------------------------- writing
    def _add(self, step: int, found: Mapping[str, float | None]) -> None:
        at = time.time()
        self.waiting += [(name, step, value, at) for name, value in found.items() if value is not None]

    def _flush(self) -> None:
        points = [Point(name, step, float(value), at) for name, step, value, at in self.waiting]
        self.waiting = []
        if points:
            self._each(lambda spec, one: one.write(list(_new(points, self.has[spec]))))
        self.flushed = time.monotonic()
        self.clock = None if self.clock is None else self.flushed  # a step's time is its own

    def _close(self, status: str) -> None:
        self._each(lambda spec, one: one.close(status))
        self.stores = {}

    def _each(self, do: Callable[[str, Store], None]) -> None:
        """Do something with every store, and go on without those that fail."""
        for spec, one in list(self.stores.items()):
            try:
                do(spec, one)
            except Exception as error:
                del self.stores[spec]
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                self.note(f"! {spec} failed and is written to no more, the training goes on: {what}")


def _new(points: Iterable[Point], has: Steps) -> Iterator[Point]:
    """The points that a store does not have."""
    return (point for point in points if point.step not in has.get(point.name, ()))


# -------------------------------------------------------------------------------------------------------------- names
def loss_name(objective: str) -> str:
    """``loss/OBJECTIVE``; of a task in a domain ``loss_domains/TASK/DOMAIN``."""
    task, at, domain = objective.partition("@")
    return f"loss_domains/{_part(task)}/{_part(domain)}" if at else f"loss/{_part(task)}"


def numbers(group: str, metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """``GROUP/TASK/METRIC``, with ``_low`` and ``_high`` where there is an interval, of what `evaluate` returns.

    With at most `FEW_DOMAINS` domains that have rows also ``GROUP_domains/TASK/DOMAIN/METRIC``.
    """
    found: dict[str, float | None] = {}
    for task, whole in metrics.items():
        found |= _slice(f"{group}/{_part(task)}", whole)
        domains = {name: part for name, part in whole["domains"].items() if part["rows"]}
        if len(domains) <= FEW_DOMAINS:
            for name, part in domains.items():
                found |= _slice(f"{group}_domains/{_part(task)}/{_part(name)}", part)
    return found


def _slice(prefix: str, part: dict[str, Any]) -> dict[str, float | None]:
    ends = {"value": "", "low": "_low", "high": "_high"}
    return {f"{prefix}/{_part(name)}{end}": part[name][key] for name in metric_names(part) for key, end in ends.items()}


def _part(name: str) -> str:
    """A part of a name in letters that MLflow takes: ``@`` is ``_at_``, another character its code, as in ``_2f_``."""
    plain = re.sub(r"[^\w.\- ]", lambda found: f"_{ord(found[0]):x}_", name.replace("@", "_at_"))
    return plain if plain.strip(". ") else f"_{plain}_"  # a path may not go through "", "." or ".."


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """``a.b.c`` -> text, for every value in nested tables; an item of a list goes by its ``name``, as in ``--set``."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(item.get("name", place)): item for place, item in enumerate(value)}
    if not isinstance(value, dict):
        yield path, value if isinstance(value, str) else json.dumps(value, default=str)
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{path}.{_part(key)}" if path else _part(key))
