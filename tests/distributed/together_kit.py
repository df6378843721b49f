"""Trainings that one process and several processes do alike, and what starts several."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.multiprocessing as mp
from picturekit import array, as_bytes
from toylog import make_log

from unbraid import parallel, sharded_files, sharding
from unbraid.bundle import build
from unbraid.config import Run
from unbraid.data.encode import encode
from unbraid.data.features import attach
from unbraid.data.table import Encoded
from unbraid.preflight import bound_terms
from unbraid.train import Local, Watcher
from unbraid.types import Batch


@functools.cache
def uneven_log(rows: int = 600, pictures: bool = False) -> pl.DataFrame:
    """The toy log, with labels of ``buy`` on few rows; with a small picture on each, if asked."""
    hidden = np.random.default_rng(7).random(rows) < 0.6
    log = make_log(rows).with_columns(buy=pl.when(pl.Series(hidden)).then(None).otherwise(pl.col("buy")))
    if pictures:
        log = log.with_columns(picture=pl.Series([as_bytes(array(i % 50, i % 3, (12, 12))) for i in range(rows)]))
    return log


class Losses(Watcher):
    """Keeps the losses of every step, of all calls one after the other, and the looks."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.looks: list[float | None] = []

    def trained(self, step: int, losses: Mapping[str, torch.Tensor]) -> None:
        self.steps.append({name: float(loss.detach()) for name, loss in losses.items()})

    def evaluated(self, step: int, metric: str, value: float | None, best: bool, values: Mapping[str, Any]) -> None:
        self.looks.append(value)


@dataclass
class Trained:
    """What became of a training.  ``refused``: why there was none."""

    losses: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    looks: list[float | None] = field(default_factory=list)
    refused: str = ""


def double(batch: Batch) -> Batch:
    """With numbers in double precision."""

    def move(value: Any) -> Any:
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    return replace(batch, features={name: move(value) for name, value in batch.features.items()})


class Doubled(Encoded):
    """An encoded table whose batches are in double precision."""

    def batch(self, rows: np.ndarray, features: Mapping[str, Any] | None = None) -> Batch:
        return double(super().batch(rows, features))

    def pictures(self, *args: Any, **options: Any) -> torch.Tensor:
        return super().pictures(*args, **options).double()


def trained(
    run: Run, folder: Path | None = None, resume: bool = False, precise: bool = True, watcher: Losses | None = None
) -> Trained:
    """The run's schedule on the toy log, by however many processes there are, in double precision."""
    pictures = any(feature.kind == "image" for feature in run.data.features)
    place = encode(run.data, tables={"log": uneven_log(pictures=pictures)})
    encoded = (Doubled if precise else Encoded)(place)
    model = build(run, encoded.schema)
    attach(encoded, model, augment=run.augment)
    terms = bound_terms(run, encoded.schema, model)
    watcher = watcher or Losses()
    weights = {task.name: task.weight for task in encoded.schema.tasks}
    session = Local(
        encoded, terms, run.update, run.training, weights, run.seed, folder, resume, "cpu", watcher, augment=run.augment,
        average=run.average, selection=run.selection,
    )  # fmt: skip
    session.tables = sharded_files.sizes(model)
    try:
        found = run.schedule(session, model.double() if precise else model, session.total_steps())
    except ValueError as error:
        return Trained(refused=str(error))
    return Trained(watcher.steps, whole(found), watcher.looks)


def with_divided(run: Run) -> Run:
    """The run with every lazy table divided over the processes."""
    return replace(run, model=replace(run.model, tables=replace(run.model.tables, shard_mb=1e-9)))


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights and buffers, with all rows of its tables, wherever they are."""
    found = dict(model.state_dict())
    for name in sharding.parts(model):
        found[name] = torch.cat(parallel.gather(found[name]))
    return found


# -------------------------------------------------------------------------------------------------------- several processes
def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _enter(rank: int, world: int, port: int, folder: str, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), UNBRAID_CACHE=f"{folder}/cache{rank}")  # fmt: skip
    with parallel.together("cpu"):
        assert parallel.world() == world and parallel.rank() == rank
        torch.save(work(*arguments), f"{folder}/found{rank}")
        parallel.wait()


def together(world: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work``, a function of a module, returns in each of so many processes.

    They are forks of a server that has imported all and run nothing: threads, which a fork loses, are not there yet.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["unbraid.job", "torch.multiprocessing"])
    mp.start_processes(
        _enter, (world, free_port(), str(folder), work, arguments), nprocs=world, start_method="forkserver"
    )  # fmt: skip
    return [torch.load(folder / f"found{rank}", weights_only=False) for rank in range(world)]


def all_of(runs: Mapping[str, Run], precise: bool = True) -> dict[str, Trained]:
    """`trained` of several runs."""
    return {name: trained(run, precise=precise) for name, run in runs.items()}


def gap(one: Trained, other: Trained) -> float:
    """The largest difference of a loss of any step; infinite where steps or objectives differ."""
    if [set(step) for step in one.losses] != [set(step) for step in other.losses]:
        return float("inf")
    return max(abs(a[name] - b[name]) for a, b in zip(one.losses, other.losses, strict=True) for name in a)


def apart(one: Trained, other: Trained) -> float:
    """The largest difference of a weight."""
    assert one.weights.keys() == other.weights.keys()
    gaps = [
        (value.double() - other.weights[name].double()).abs() for name, value in one.weights.items() if value.numel()
    ]
    return max(float(each.max()) for each in gaps)
