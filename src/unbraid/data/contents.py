"""Pictures and texts of an encoded table: the distinct ones of each feature, numbered; rows hold numbers.

A picture that a column of paths names stays where it is: the table keeps its path, its size and time of change, and a hash of
its bytes.  One that comes as bytes is copied once, as it is compressed.  Nothing is kept decoded.  Hashes (`Contents.digests`)
are those of the files as they are now: one whose size or time differs from what was noted is read again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import polars as pl
import torch
from torch import Tensor

from unbraid.data.images import opened, pixels
from unbraid.data.source import DataError
from unbraid.types import Feature, Transform

FOLDER = "contents"
DIGEST = 16  # bytes of a hash
SHOWN = 5  # missing files that a message names


def digest_of(raw: bytes) -> bytes:
    """What names a picture's or a text's bytes."""
    return hashlib.blake2b(raw, digest_size=DIGEST).digest()


@cache
def _threads() -> ThreadPoolExecutor:
    """Threads that read and decode: Pillow lets others run meanwhile."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="unbraid-pictures")


# -------------------------------------------------------------------------------------------------------------- writing
class Writer:
    """Numbers the distinct contents of one feature, chunk by chunk.

    Args:
        folder: the encoded table's; feature: of kind ``image`` or ``text``; root: the folder that paths are relative to.
    """

    def __init__(self, folder: Path, place: int, feature: Feature, root: Path) -> None:
        self.path, self.feature, self.root = folder / FOLDER / f"{place:03d}.parquet", feature, root
        self.known: dict[Any, int] = {}
        self.counts: list[int] = []  # rows of each
        self.lengths: list[int] = []  # of bytes
        self.nulls, self.bytes = 0, False
        self.path.parent.mkdir(exist_ok=True)
        self.path.with_suffix(".bin").unlink(missing_ok=True)  # of an interrupted encode

    def codes(self, column: pl.Series) -> np.ndarray:
        """(n,) int32 number of each row's content, in the order in which they first occur."""
        self.nulls += column.null_count()
        if self.feature.kind == "text":
            return self._numbered(_in_template(column, self.feature.template))
        if column.dtype != pl.Binary:
            return self._numbered(column.fill_null("").to_list())
        self.bytes = True
        raw = [value or b"" for value in column.to_list()]
        names, before = [digest_of(value) for value in raw], len(self.known)
        codes = self._numbered(names)
        with self.path.with_suffix(".bin").open("ab") as file:
            for value, code in zip(raw, codes, strict=True):
                if code == before:
                    file.write(value)
                    self.lengths.append(len(value))
                    before += 1
        return codes

    def _numbered(self, keys: Sequence[Any]) -> np.ndarray:
        codes = np.fromiter((self.known.setdefault(key, len(self.known)) for key in keys), np.int32, len(keys))
        self.counts += [0] * (len(self.known) - len(self.counts))
        for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
            self.counts[code] += int(count)
        return codes

    def finish(self, progress: Callable[[str, int, int], None]) -> None:
        """Write what there is.

        Raises:
            DataError: rows have no picture, or files of pictures are not there: how many, and the first names.
        """
        if self.feature.kind == "text":
            texts = list(self.known)
            digests = [digest_of(text.encode()) for text in texts]
            pl.DataFrame({"name": texts, "digest": digests}, schema=TEXTS).write_parquet(self.path)
            return
        if self.nulls:
            column = self.feature.source
            raise DataError(
                f"Feature `{self.feature.name}`: {self.nulls:,} rows have no picture (null). Leave them out: data.keep = "
                f'"{column} IS NOT NULL".'
            )
        self._finish_bytes() if self.bytes else self._finish_files(progress)

    def _finish_bytes(self) -> None:
        starts = np.cumsum([0, *self.lengths[:-1]])
        frame = {
            "name": [""] * len(self.known),
            "size": self.lengths,
            "time": starts.tolist(),
            "digest": list(self.known),
        }
        pl.DataFrame(frame, schema=FILES).write_parquet(self.path)

    def _finish_files(self, progress: Callable[[str, int, int], None]) -> None:
        names, what = list(self.known), f"reading the files of {self.feature.name}"
        found: list[_File | None] = []
        for at in range(0, len(names), 1_000):
            progress(what, at, len(names))
            found += _threads().map(lambda name: _File.of(self.root / name), names[at : at + 1_000])
        if missing := [code for code, file in enumerate(found) if file is None]:
            raise DataError(missing_files(self.feature.name, names, missing, self.counts, self.root))
        frame = pl.DataFrame(
            [(name, *file) for name, file in zip(names, found, strict=True) if file], FILES, orient="row"
        )
        frame.write_parquet(self.path)


FILES: Any = {"name": pl.String, "size": pl.Int64, "time": pl.Int64, "digest": pl.Binary}
TEXTS: Any = {"name": pl.String, "digest": pl.Binary}


class _File(NamedTuple):
    """A file as it was noted."""

    size: int
    time: int  # of change, ns
    digest: bytes

    @classmethod
    def of(cls, path: Path) -> _File | None:
        """None: there is no such file."""
        try:
            about = path.stat()
            return cls(about.st_size, about.st_mtime_ns, digest_of(path.read_bytes()))
        except OSError:
            return None


def missing_files(name: str, paths: Sequence[str], missing: Sequence[int], counts: Sequence[int], root: Path) -> str:
    """What to say of pictures that are not there."""
    rows = sum(counts[code] for code in missing)
    first = ", ".join(paths[code] for code in missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
    return (
        f"Feature `{name}`: {len(missing):,} of {len(paths):,} files cannot be read, of {rows:,} rows: {first}. They were looked "
        f"for in {root}: paths are absolute, or relative to `data.folder` (of rows that a command reads: to `--folder`)."
    )


def _in_template(column: pl.Series, template: str) -> list[str]:
    """The texts, each in the template; a null is the empty text, without it."""
    texts = column.to_list()
    if not template:
        return [text or "" for text in texts]
    before, after = template.split("{}")
    return ["" if text is None else f"{before}{text}{after}" for text in texts]


# -------------------------------------------------------------------------------------------------------------- reading
class Contents:
    """The distinct pictures or texts of one feature.

    Args:
        folder: the encoded table's; place: the feature's among the schema's; root: the folder that paths are relative to.
    """

    def __init__(self, folder: Path, place: int, feature: Feature, root: Path) -> None:
        path = folder / FOLDER / f"{place:03d}.parquet"
        try:
            frame = pl.read_parquet(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}. Delete {folder}; it is made again.") from error
        self.feature, self.root = feature, root
        self.names: list[str] = frame["name"].to_list()
        self._noted = frame.rows()
        blob = path.with_suffix(".bin")
        self._blob = np.memmap(blob, dtype=np.uint8, mode="r") if blob.exists() and blob.stat().st_size else None

    def __len__(self) -> int:
        return len(self.names)

    def digests(self) -> list[bytes]:
        """What names each content's bytes as they are now."""
        if self.feature.kind == "text" or self._blob is not None:
            return [noted[-1] for noted in self._noted]
        return list(_threads().map(self._digest, range(len(self))))

    def _digest(self, code: int) -> bytes:
        name, size, time, noted = self._noted[code]
        try:
            about = (self.root / name).stat()
        except OSError:
            return digest_of(self.raw(code)[0])  # which says what is missing
        same = about.st_size == size and about.st_mtime_ns == time
        return noted if same else digest_of(self.raw(code)[0])

    def raw(self, code: int) -> tuple[bytes, str]:
        """A picture's bytes and what to call it.  Raises DataError when its file is gone."""
        name, size, start, _ = self._noted[code]
        if self._blob is not None:
            return self._blob[start : start + size].tobytes(), f"Feature `{self.feature.name}`: picture {code:,}"
        path = self.root / name
        try:
            return path.read_bytes(), str(path)
        except OSError as error:
            raise DataError(f"Picture {path} cannot be read any more: {error.strerror}.") from error

    def pictures(
        self, codes: np.ndarray, transform: Transform, rows: np.ndarray | None = None, seed: int = 0, step: int = 0
    ) -> Tensor:
        """(n, C, size, size) float32.

        Args:
            codes: (n,) numbers of pictures; transform: how they are seen; rows: (n,) the rows that they belong to, by which,
                with seed and step, a random transform draws.

        Raises:
            DataError: a file is gone, or holds no whole picture: its name.
        """
        salt = crc32(self.feature.name.encode())

        def one(place: int) -> np.ndarray:
            raw, name = self.raw(int(codes[place]))
            image = opened(raw, name, transform.mode)
            row = int(codes[place] if rows is None else rows[place])
            return pixels(
                image, transform, np.random.default_rng([seed, step, row, salt]) if transform.random else None
            )

        if not len(codes):
            return torch.zeros(0, len(transform.mean), transform.size, transform.size)
        return torch.from_numpy(np.stack(list(_threads().map(one, range(len(codes))))))
