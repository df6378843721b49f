"""Columns of an encoded table while they are written: on disk, where an interrupted encode finds them again, or in memory."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from unbraid.store import sync


class Columns:
    """Binary columns of one folder, appended chunk by chunk and described in ``columns.json`` at the end.

    Args:
        about: what `state` said: files are cut to what there was then, and go on from there.
    """

    def __init__(self, folder: Path, about: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.folder, self.about = folder, {name: dict(one) for name, one in (about or {}).items()}
        self.files: dict[str, IO[bytes]] = {}
        kept = {one["file"] for one in self.about.values()}
        self.count = 1 + max((int(name.removesuffix(".bin")) for name in kept), default=-1)
        for path in folder.glob("*.bin"):
            if path.name not in kept:
                path.unlink()
        for name, one in self.about.items():
            self.files[name] = (folder / one["file"]).open("r+b")
            self.files[name].truncate(math.prod(one["shape"]) * np.dtype(one["dtype"]).itemsize)
            self.files[name].seek(0, 2)

    def state(self) -> dict[str, dict[str, Any]]:
        """What is on disk, and stays there whatever happens."""
        for name, file in self.files.items():
            file.flush()
            sync(self.folder / self.about[name]["file"])
        return {name: dict(one) | {"shape": list(one["shape"])} for name, one in self.about.items()}

    def append(self, name: str, values: np.ndarray) -> None:
        """Append (n, ...) values.  Raises OSError when the disk is full."""
        values = np.ascontiguousarray(values)
        if name not in self.files:
            place, self.count = f"{self.count:03d}.bin", self.count + 1
            self.files[name] = (self.folder / place).open("wb")
            self.about[name] = {"file": place, "dtype": str(values.dtype), "shape": [0, *values.shape[1:]]}
        if self.about[name]["dtype"] != str(values.dtype):
            raise AssertionError(f"{name}: {values.dtype} after {self.about[name]['dtype']}")
        self.files[name].write(values.data if values.size else b"")
        self.about[name]["shape"][0] += len(values)

    def read(self, name: str) -> np.ndarray:
        """Map a column that is written so far."""
        self.files[name].flush()
        about = self.about[name]
        return np.memmap(self.folder / about["file"], dtype=about["dtype"], mode="r", shape=tuple(about["shape"]))

    def drop(self, name: str) -> None:
        """Remove a column."""
        self.files.pop(name).close()
        (self.folder / self.about.pop(name)["file"]).unlink()

    def describe(self, **extra: Any) -> None:
        """Flush, and say what there is."""
        for file in self.files.values():
            file.flush()
        (self.folder / "columns.json").write_text(json.dumps({"columns": self.about, **extra}))

    def close(self) -> None:
        """Close the files, whatever state they are in."""
        for file in self.files.values():
            with contextlib.suppress(OSError):  # of an error that was raised already
                file.close()


class InMemory:
    """The same columns as arrays."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Append (n, ...) values."""
        self.arrays[name] = np.concatenate([self.arrays[name], values]) if name in self.arrays else values
