"""The encoded table: memory-mapped columns, batches by vectorised gathers, in an order that can be resumed anywhere."""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbraid.data.contents import Contents
from unbraid.data.declaration import SPLITS
from unbraid.data.events import gather
from unbraid.data.fitted import Fitted
from unbraid.data.source import DataError
from unbraid.store import within
from unbraid.types import EXACT, FIRST_VALUE, Batch, Ragged, Schema, Transform

Read = Callable[[np.ndarray], Batch]  # row numbers (n,) -> their batch


class Encoded:
    """An encoded folder, opened.

    Args:
        folder: what `unbraid.data.encode.encode` returned.  Raises DataError when it is not whole.
        fitted: of a folder without it, of rows to predict.
    """

    def __init__(self, folder: Path, fitted: Fitted | None = None) -> None:
        try:
            about = json.loads((folder / "columns.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} is not an encoded table: {error}. Delete it; it is made again.") from error
        self.folder = folder
        columns = {name: self._open(name, c) for name, c in about["columns"].items()}
        self._hold(columns, fitted or Fitted.load(folder), about)

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray], fitted: Fitted, about: Mapping[str, Any], folder: Path) -> Encoded:
        """The table of columns in memory.

        Args:
            about: ``rows``, ``per_second`` and ``root``, as ``columns.json`` has them.
            folder: of the contents of pictures and texts; without any, it is not read.
        """
        encoded = cls.__new__(cls)
        encoded.folder = folder
        encoded._hold(columns, fitted, about)
        return encoded

    def _hold(self, columns: Mapping[str, np.ndarray], fitted: Fitted, about: Mapping[str, Any]) -> None:
        self.fitted, self.about = fitted, about
        self.schema: Schema = fitted.schema
        self.columns: dict[str, np.ndarray] = dict(columns)
        self.rows: int = about["rows"]
        # a bag's offsets are kept as lengths on disk (4 bytes a row) and summed once here
        self.offsets = {
            f.name: np.concatenate([[0], np.cumsum(self.columns[f"length.{f.name}"], dtype=np.int64)])
            for f in self.schema.features
            if f.kind == "bag"
        }
        self.contents = {
            f.name: Contents(self.folder, place, f, Path(about["root"]))
            for place, f in enumerate(self.schema.features)
            if f.has_content
        }
        self.readers: dict[str, Callable[[np.ndarray], Tensor]] = {}  # picture or text feature -> what reads its rows
        self.most = 2**31  # rows of a batch that is read in order: less where these are pictures
        self.transforms: dict[str, Transform] = {}  # picture feature -> how the model's backbone sees it

    def _open(self, name: str, about: dict) -> np.ndarray:
        try:
            path, shape, dtype = within(self.folder, about["file"]), tuple(about["shape"]), np.dtype(about["dtype"])
            if dtype.hasobject or not all(isinstance(n, int) and n >= 0 for n in shape):
                raise ValueError(f"{dtype} of shape {shape} is no column")
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(f"{self.folder}, column `{name}`: {error}. Delete the folder; it is made again.") from error
        need = math.prod(shape) * dtype.itemsize
        found = path.stat().st_size if path.exists() else 0
        if found != need or not path.exists():
            raise DataError(
                f"{path} (column `{name}`) should have {need:,} bytes. Found {found:,}. Delete {self.folder}; "
                "it is made again."
            )
        if not need:
            return np.zeros(shape, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)

    def split(self, name: str) -> np.ndarray:
        """(n,) row numbers of a split; ``all`` for every row."""
        if name == "all" or "split" not in self.columns:
            return np.arange(self.rows)
        return np.flatnonzero(self.columns["split"] == SPLITS.index(name))

    # ------------------------------------------------------------------------------------------------------- one batch
    def batch(self, rows: np.ndarray, features: Mapping[str, Any] | None = None) -> Batch:
        """The given rows ((n,) int64) as a batch; ``features``: what to give in the place of the table's."""
        columns, n = self.columns, len(rows)
        labels, observed = self.labels(rows)
        domain = columns["domain"][rows].astype(np.int64) if "domain" in columns else np.full(n, FIRST_VALUE)
        meta: dict[str, Tensor] = {
            name: _tensor(columns[name][rows]) for name in ("user", "time", "request") if name in columns
        }
        if "exposure" in columns:
            meta["exposure"] = _tensor(columns["exposure"][rows].astype(np.int64))
        for task in self.schema.tasks:
            if f"rate.{task.name}" in columns:
                meta[f"sampling_rate.{task.name}"] = _tensor(columns[f"rate.{task.name}"][rows])
            elif isinstance(task.sampling_rate, float | int) and task.sampling_rate != 1.0:
                meta[f"sampling_rate.{task.name}"] = torch.full((n,), float(task.sampling_rate))
        return Batch(
            features=self.inputs(rows) | self.histories(rows) if features is None else features,
            labels=labels,
            observed=observed,
            domain=_tensor(domain),
            weight=_tensor(columns["weight"][rows]) if "weight" in columns else None,
            row=_tensor(rows.astype(np.int64)),
            view=torch.zeros(n, dtype=torch.int8),
            pair=torch.full((n,), -1),
            meta=meta,
        )

    def inputs(self, rows: np.ndarray) -> dict[str, Tensor | Ragged]:
        """The features of some rows, without their histories."""
        out: dict[str, Tensor | Ragged] = {}
        for f in self.schema.features:
            column = self.columns[f"feature.{f.name}"]
            if f.kind == "id":
                out[f.name] = _tensor(column[rows].astype(np.int64))
            elif f.kind == "vector":
                out[f.name] = _tensor(column[rows])
            elif f.has_content:
                if f.name not in self.readers:
                    raise DataError(
                        f"Feature `{f.name}` is of kind `{f.kind}`, and no backbone reads it: set `model.{f.kind}s`."
                    )
                out[f.name] = self.readers[f.name](rows)
            elif f.kind == "number":
                mean, std = self.schema.numbers[f.name]
                exact = column[rows]
                value = ((exact.astype(np.float64) - mean) / std).astype(np.float32)  # near values stay apart
                missing = np.isnan(value)
                out[f.name + EXACT] = _tensor(np.where(missing, 0.0, exact)[:, None])
                out[f.name] = _tensor(
                    np.stack([np.where(missing, np.float32(0), value), missing.astype(np.float32)], 1)
                )
            else:
                starts, stops = self.offsets[f.name][rows], self.offsets[f.name][rows + 1]
                offsets = np.concatenate([[0], np.cumsum(stops - starts)])
                at = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], stops - starts)
                out[f.name] = Ragged({f.name: _tensor(column[at].astype(np.int64))}, _tensor(offsets))
        return out

    def histories(self, rows: np.ndarray) -> dict[str, Tensor | Ragged]:
        """The histories of some rows."""
        out: dict[str, Tensor | Ragged] = {}
        for history in self.schema.histories:
            values, offsets = gather(self.columns, history.name, history.fields, rows, self.about["per_second"])
            out[history.name] = Ragged({k: _tensor(v) for k, v in values.items()}, _tensor(offsets))
        return out

    def pictures(
        self, rows: np.ndarray, transform: Transform, seed: int = 0, step: int = 0, feature: str = ""
    ) -> Tensor:
        """(n, C, size, size) float32 pictures of the given rows ((n,) int64), of any thread.

        Args:
            transform: how they are seen; what a random one draws is a function of seed, step and row.
            feature: whose pictures; empty: of the only feature that has any.

        Raises:
            ValueError: there is no such feature, or several and none is named; DataError: a file is no whole picture.
        """
        names = [name for name in self.contents if self.contents[name].feature.kind == "image"]
        if not (feature in names or (not feature and len(names) == 1)):
            raise ValueError(f"`feature` should name one of the pictures, {names}. Found `{feature}`.")
        name = feature or names[0]
        return self.contents[name].pictures(self.columns[f"feature.{name}"][rows], transform, rows, seed, step)

    def labels(self, rows: np.ndarray) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """task -> (n,) labels, and which of them are observed."""
        labels, observed = {}, {}
        for task in self.schema.tasks:
            if f"label.{task.name}" not in self.columns:  # rows to predict
                labels[task.name] = torch.zeros(
                    len(rows), dtype=torch.int64 if task.kind == "multiclass" else torch.float32
                )
                observed[task.name] = torch.zeros(len(rows), dtype=torch.bool)
                continue
            stored = self.columns[f"label.{task.name}"][rows]
            known = ~np.isnan(stored) if task.kind == "real" else stored >= 0
            clean = np.where(known, stored, 0).astype(np.int64 if task.kind == "multiclass" else np.float32)
            labels[task.name], observed[task.name] = _tensor(clean), _tensor(known)
        for task in self.schema.tasks:  # parents stand before their children, so a chain is masked link by link
            if task.given:
                observed[task.name] = observed[task.name] & observed[task.given] & (labels[task.given] == 1)
        return labels, observed

    def orphans(self, rows: np.ndarray) -> dict[str, tuple[int, int]]:
        """Rows that contradict ``given``, of a log with labels.

        Args:
            rows: (n,) int64 row numbers.

        Returns:
            Binary task with ``given`` -> (rows where its label is 1 although a task that it depends on is known to be 0,
            rows where its label is 1).  A row whose chain ends in an unobserved label before any 0 is no contradiction.
        """
        labels, observed = self.labels(rows)
        failed: dict[str, np.ndarray] = {}
        found = {}
        for task in (t for t in self.schema.tasks if t.kind == "binary"):
            failed[task.name] = (observed[task.name] & (labels[task.name] == 0)).numpy()
            if task.given:
                positive = self.columns[f"label.{task.name}"][rows] == 1  # as stored: `labels` hides it under a 0
                found[task.name] = int((positive & failed[task.given]).sum()), int(positive.sum())
                failed[task.name] |= failed[task.given]
        return found

    # -------------------------------------------------------------------------------------------------------- in order
    def in_order(self, rows: np.ndarray, size: int, read: Read | None = None) -> Iterator[Batch]:
        """The rows in batches of at most ``size``, first to last.

        Args:
            read: what makes a batch of row numbers, in the place of `batch`.
        """
        read, size = read or self.batch, min(size, self.most)
        return prefetch(read(rows[at : at + size]) for at in range(0, len(rows), size))

    def shuffled(
        self, rows: np.ndarray, size: int, seed: int, start: int = 0, whole: bool = False, read: Read | None = None
    ) -> Iterator[Batch]:  # fmt: skip
        """Endless training batches from step ``start`` on.

        The order of an epoch is a function of (seed, epoch), so that any step can be reached directly.  The rows that
        do not fill a last batch are left out of that epoch (others in each), unless there is only one batch.  With
        ``whole`` none is: an epoch is cut into batches of nearly one size, at most ``size``.  ``read`` as in `in_order`.
        """
        read = read or self.batch
        return prefetch(read(part) for part in order(rows, size, seed, start, whole))


def steps_per_epoch(rows: int, size: int, whole: bool = False) -> int:
    """Number of training batches in an epoch."""
    return max(1, -(-rows // size) if whole else rows // size)


def order(
    rows: np.ndarray, size: int, seed: int, start: int = 0, whole: bool = False
) -> Iterator[np.ndarray]:  # fmt: skip
    """Row numbers of the training batches from step ``start`` on, without end."""
    per_epoch = steps_per_epoch(len(rows), size, whole)
    epoch, at = divmod(start, per_epoch)
    ends = np.arange(per_epoch + 1) * len(rows) // per_epoch if whole else np.arange(per_epoch + 1) * size
    while True:
        shuffled = np.random.default_rng([seed, epoch]).permutation(rows)
        for step in range(at, per_epoch):
            yield shuffled[ends[step] : ends[step + 1]]
        epoch, at = epoch + 1, 0


def prefetch(batches: Iterator[Batch], depth: int = 3) -> Iterator[Batch]:
    """The same batches, made ahead in a background thread.  Its errors are raised here; closing it stops the thread."""
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:
            put(error)

    worker = threading.Thread(target=work, daemon=True, name="unbraid-prefetch")
    worker.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        while not ready.empty():  # nobody waits for room any more
            ready.get_nowait()
        if threading.current_thread() is not worker:  # a generator that nobody closed may be collected in any thread
            worker.join()  # a thread that still computes when the interpreter ends can abort the process


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
