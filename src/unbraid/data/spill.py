"""Sorting more records than memory holds: sorted runs on disk, merged window by window.

A run is a row of Arrow files, each a sorted block.  A merge holds a block of every run, and all records of one value of the
first key: a user's events, say.  Peak memory is some five times the limit, whatever the number of records.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unbraid.data.ahead import ahead
from unbraid.store import Journal, sync

WINDOW = 1 << 17  # records, or more where a group is larger
BINS = 1 << 12
AHEAD = 4  # this part of the limit is read before it is needed
RUNS = 32  # so many are merged at once; a block is this part of the limit
Fold = Callable[[pl.DataFrame], pl.DataFrame]


@dataclass(frozen=True)
class Room:
    """Where encoding may spill, and how much it may hold.

    Args:
        folder: for sorted runs, on the disk of the encoded table.
        limit: bytes that one sorter holds; peak memory is some five times that, beside the program.
        journal: what an interrupted encode had done.
    """

    folder: Path
    limit: int
    journal: Journal = field(default_factory=Journal)

    def sorter(
        self, name: str, *keys: str, share: int = 1, fold: Fold | None = None, runs: Sequence[list[str]] = ()
    ) -> Sorter:  # fmt: skip
        """One with a folder of its own; ``share``: of so many that are filled together; the rest as of `Sorter`."""
        return Sorter(self.folder / name, keys, max(self.limit // share, 1), fold, runs)


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """What the system said of a file that Polars writes (the disk is full) as `OSError`."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:  # either, and neither with a number
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


class Sorter:
    """Records in the order of their keys; equal ones in the order in which they were added.

    Args:
        folder: where runs go, made when there is one.
        keys: columns, the first deciding first, without nulls.  One of text is the only one.  Runs are sorted by the first
            alone, the rest within each window, where it is in the processor's cache: a coarse first key of 16 bits makes a run
            for the price of reading it.
        limit: bytes that are held before a run is written.
        fold: makes one record of those with the same key, in any grouping: sums of counts.
        runs: of an earlier sorter with this folder, as its `runs` say: its records come first.
    """

    def __init__(
        self, folder: Path, keys: Sequence[str], limit: int, fold: Fold | None = None, runs: Sequence[list[str]] = ()
    ) -> None:
        self.folder, self.keys, self.limit, self.fold = folder, list(keys), limit, fold
        self.runs = [list(run) for run in runs]
        self.held: list[pl.DataFrame] = []
        self.records = 0  # that were added here
        self._stale: list[str] = []
        self._bytes = self._folded = 0.0

    def add(self, frame: pl.DataFrame) -> bool:
        """Add records.  True when all there are went to disk: time to note how far it is."""
        if not len(frame):
            return False
        self.held.append(frame)
        self.records += len(frame)
        self._bytes += frame.estimated_size()
        # what folding leaves may be little: few values of many records
        if self.fold and self._bytes - self._folded > max(self._folded, self.limit // 4):
            self.held = [self.fold(pl.concat(self.held))]
            self._bytes = self._folded = self.held[0].estimated_size()
        if self._bytes <= self.limit:
            return False
        self.spill()
        return True

    def spill(self) -> None:
        """Write what is held as a run."""
        if not self.held:
            return
        for name in self._stale:
            (self.folder / name).unlink()
        self._stale = []
        first = self.keys[:1]
        self.runs.append(
            self._write(ahead(lambda parts: self._joined(parts, first), self._held_parts(), self.limit // AHEAD))
        )
        if len(self.runs) > RUNS:
            old, self.runs = self.runs, [self._write(ahead(self._joined, self._merged(), self.limit // AHEAD))]
            self._stale = [name for run in old for name in run]  # a journal may still name them

    def windows(self, function: Callable[[pl.DataFrame], Any] = lambda window: window) -> Iterator[Any]:
        """All records in order, in frames that hold whole groups of the first key.  Raises OSError when the disk is full.

        Args:
            function: what is given of each frame, computed in threads (`unbraid.data.ahead`).
        """
        yield from ahead(lambda parts: function(self._joined(parts)), self._parts(), self.limit // AHEAD)

    def _parts(self) -> Iterator[list[pl.DataFrame]]:
        """Of each window the frames that make it, not in order."""
        if self.runs:
            self.spill()
            return self._merged()
        return self._held_parts()

    def _held_parts(self) -> Iterator[list[pl.DataFrame]]:
        """The same of what is held, which is forgotten: slices of frames that are sorted by the first key, one by one."""
        held, self.held, self._bytes, self._folded = self.held, [], 0.0, 0.0
        if len(self.keys) == 1:
            return iter([held] if held else [])
        held.reverse()
        frames = (held.pop() for _ in range(len(held)))  # no two copies of all
        first = self.keys[:1]
        return _slices(list(ahead(lambda frame: self._sorted(frame, first), frames, self.limit // AHEAD)), self.keys[0])

    def close(self) -> None:
        """Remove the runs."""
        self.held, self.runs = [], []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sorted(self, frame: pl.DataFrame, keys: list[str]) -> pl.DataFrame:
        if frame.width == 1 or self.fold:
            return frame.sort(keys)
        order = np.lexsort([frame[key].to_numpy() for key in reversed(keys)])  # faster than Polars on several keys
        return frame[order]

    def _write(self, frames: Any) -> list[str]:
        """Write sorted frames as blocks of one run; their names."""
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = [int(path.stem) for path in self.folder.glob("*.arrow")]
        start = max(taken, default=-1) + 1
        names: list[str] = []
        for frame in frames:
            rows = max(1, int(len(frame) * self.limit / RUNS / max(1, frame.estimated_size())))
            for block in frame.iter_slices(rows):
                names.append(f"{start + len(names):08d}.arrow")
                with os_errors():
                    block.write_ipc(self.folder / names[-1])
                sync(self.folder / names[-1])
        return names

    def _merged(self) -> Iterator[list[pl.DataFrame]]:
        runs = [_Run(self.folder, names, self.keys[0]) for names in self.runs]
        while runs:
            unfinished = [run for run in runs if run.names]
            if not unfinished:
                yield [run.block for run in runs]
                return
            pivot = min(run.last for run in unfinished)  # below it nothing is to come
            parts = [part for run in runs if len(part := run.below(pivot))]
            for run in unfinished:
                if run.last == pivot:
                    run.extend()
            runs = [run for run in runs if len(run.block)]
            if parts:
                yield parts

    def _joined(self, parts: Sequence[pl.DataFrame], keys: list[str] | None = None) -> pl.DataFrame:
        whole = pl.concat(parts)
        return self._sorted(self.fold(whole) if self.fold else whole, keys or self.keys)


def _slices(frames: list[pl.DataFrame], key: str) -> Iterator[list[pl.DataFrame]]:
    """Of sorted frames the slices that make a window, of some `WINDOW` records, with whole groups of the key."""
    step = max(WINDOW // 16, 1)
    seen = pl.concat([frame[key].gather_every(step) for frame in frames]).sort() if frames else pl.Series()
    bounds = seen.gather_every(16)[1:].unique(maintain_order=True)  # before the first of them is a window, too
    ends = [[0, *frame[key].search_sorted(bounds, side="left").to_list(), len(frame)] for frame in frames]
    for place in range(len(bounds) + 1 if frames else 0):
        found = [frame[end[place] : end[place + 1]] for frame, end in zip(frames, ends, strict=True)]
        if parts := [part for part in found if len(part)]:
            yield parts


class _Run:
    """The head of a run, while it is merged."""

    def __init__(self, folder: Path, names: Sequence[str], key: str) -> None:
        self.folder, self.names, self.key = folder, list(names), key
        self.block = pl.read_ipc(folder / self.names.pop(0))

    @property
    def last(self) -> Any:
        return self.block[self.key][-1]

    def below(self, pivot: Any) -> pl.DataFrame:
        """Take the records whose key is below a value."""
        end = self.block[self.key].search_sorted(pivot, side="left")
        taken, self.block = self.block[:end], self.block[end:]
        return taken

    def extend(self) -> None:
        """Append the next block."""
        self.block = pl.concat([self.block, pl.read_ipc(self.folder / self.names.pop(0))], rechunk=True)


def add_up(frame: pl.DataFrame) -> pl.DataFrame:
    """A fold: (value, count), the counts of a value added."""
    return frame.group_by("value").agg(pl.col("count").sum())


def highest(frame: pl.DataFrame) -> pl.DataFrame:
    """A fold: (value, count), the highest count of a value."""
    return frame.group_by("value").agg(pl.col("count").max())


def bins(key: np.ndarray, end: int = 0) -> np.ndarray:
    """(n,) int16 in the order of a key: of 64-bit hashes, or of numbers from 0 to before ``end``."""
    return (key.astype(np.int64) * BINS // end if end else key >> key.dtype.type(64 - BINS.bit_length() + 1)).astype(
        np.int16
    )


def pieces(column: np.ndarray, rows: int = 1 << 20) -> Iterator[np.ndarray]:
    """A mapped column, some rows at a time, read and not mapped: pages of a map would count as memory of the process."""
    if not isinstance(column, np.memmap) or column.filename is None:
        yield from (column[at : at + rows] for at in range(0, len(column), rows))
        return
    for at in range(0, len(column), rows):
        yield np.fromfile(column.filename, column.dtype, min(rows, len(column) - at), offset=at * column.itemsize)
