"""Dictionaries on disk: the values of a large vocabulary, mapped into memory and not held by any process.

Their pages belong to the system's cache: all processes of a machine share them, and it takes them back when it needs room.
Plain files, little-endian, since Polars copies what it reads of an Arrow file.  In the order of the values:

- numbers: ``NAME.bin``, 8 bytes each;
- texts: ``NAME.bin``, their UTF-8 end to end and 8 zero bytes; ``NAME.ends.bin``, int64, where each of them ends.

Numbers are found by bisection.  Texts are by their hashes, `text_hash`: ``NAME.hashes.bin`` has them in order, uint64, and
``NAME.places.bin`` the place of each one's text, uint32.  What is found is compared with what was asked, so that two texts of one
hash are two.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

LARGE = 1 << 20  # values; vocabularies up to so many are Parquet on disk, and in memory
PIECE = 1 << 18  # values that are read or written at once
BLOCK = 1 << 22  # elements that are copied at once
PARTS = 7  # bits of a hash: texts are sorted by their hashes in so many parts, each in memory
WORD = 8  # bytes of a text that are looked at at once
NUMBERS = {"Int64": "<i8", "Float64": "<f8"}
TEXTS = {"": "u1", ".ends": "<i8", ".hashes": "<u8", ".places": "<u4"}  # file -> type
HASHED = np.dtype([("hash", "<u8"), ("place", "<u4")])


class Dictionary:
    """Sorted values without nulls in files, read like a series of them.

    Args:
        path: of ``NAME.bin``; kind: Int64, Float64 or String.

    Raises:
        OSError, ValueError: files are missing, or do not belong together.
    """

    def __init__(self, path: Path, kind: Any) -> None:
        self.path, self.dtype = path, kind
        forms = TEXTS if kind == pl.String else {"": NUMBERS[str(kind)]}
        # plain views: a memmap's own methods make every slice slower
        self.arrays = {part: np.memmap(_file(path, part), form, "r").view(np.ndarray) for part, form in forms.items()}
        self.data, self.ends = self.arrays[""], self.arrays.get(".ends")
        if self.ends is not None:
            lengths = {len(array) for part, array in self.arrays.items() if part}
            if len(lengths) > 1 or self.ends[-1] + WORD != len(self.data):
                raise ValueError(f"{path} and the files beside it are of different lengths")

    def __reduce__(self) -> Any:
        return Dictionary, (self.path, self.dtype)  # another process maps the files, too

    def __len__(self) -> int:
        return len(self.data if self.ends is None else self.ends)

    @cached_property
    def digest(self) -> str:
        """A hash of the values."""
        found = hashlib.sha256(str(len(self)).encode())
        for array in (self.data, self.ends):
            for start in range(0, 0 if array is None else len(array), BLOCK):
                found.update(array[start : start + BLOCK].data)  # type: ignore[index]
        return found.hexdigest()

    def __getitem__(self, place: int) -> Any:
        return self.piece(place, place + 1)[0]

    def piece(self, start: int, end: int) -> pl.Series:
        """The values from one place to before another."""
        if self.ends is None:
            return pl.Series("value", self.data[start:end])
        starts, lengths = self._bounds(np.arange(start, end))
        text = self.data[starts[0] : starts[-1] + lengths[-1]].tobytes()
        at, length = (pl.lit(pl.Series(x)) for x in (starts - starts[0], lengths))
        return pl.select(pl.lit(text, dtype=pl.Binary).bin.slice(at, length).cast(pl.String).alias("value")).to_series()

    def find(self, column: pl.Series) -> np.ndarray:
        """(n,) places of a column's values, which are of the same type; -1 of one that is not here, and of a null."""
        missing = column.is_null().to_numpy() if column.null_count() else None
        known = column if missing is None else column.fill_null("" if self.ends is not None else 0)
        found = self._find_numbers(known.to_numpy()) if self.ends is None else self._find_texts(known)
        if missing is not None:
            found[missing] = -1
        return found

    def _find_numbers(self, asked: np.ndarray) -> np.ndarray:
        order = np.argsort(asked)  # in order, the search stays in the processor's cache
        place = np.empty(len(asked), dtype=np.int64)
        place[order] = np.searchsorted(self.data, asked[order]).clip(max=len(self) - 1)
        return np.where(self.data[place] == asked, place, -1)

    def _find_texts(self, asked: pl.Series) -> np.ndarray:
        found = np.full(len(asked), -1, dtype=np.int64)
        text, starts, lengths = packed(asked)
        wanted = text_hash(text, starts, lengths)
        rest = np.argsort(wanted)
        hashes, places = self.arrays[".hashes"], self.arrays[".places"]
        at = np.searchsorted(hashes, wanted[rest])
        while len(rest):  # again where several texts have one hash
            there = hashes[at.clip(max=len(self) - 1)] == wanted[rest]
            there &= at < len(self)
            rest, at = rest[there], at[there]
            place = places[at].astype(np.int64)
            own, length = self._bounds(place)
            same = _same(self.data, own, length, text, starts[rest], lengths[rest])
            found[rest[same]] = place[same]
            rest, at = rest[~same], at[~same] + 1
        return found

    def _bounds(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where texts start, and their lengths in bytes."""
        assert self.ends is not None
        starts = np.where(places > 0, self.ends[places - 1], 0)
        return starts, self.ends[places] - starts


def _file(path: Path, part: str) -> Path:
    """One of the files of a dictionary."""
    return path.with_suffix(part + path.suffix)


# ----------------------------------------------------------------------------------------------------------------- texts
def packed(texts: pl.Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts without nulls: their UTF-8 end to end and 8 zero bytes, (n,) where each starts, (n,) lengths in bytes."""
    lengths = texts.str.len_bytes().to_numpy().astype(np.int64)
    text = (texts.str.join("").item() + "\0" * WORD).encode()
    return np.frombuffer(text, np.uint8), np.cumsum(lengths) - lengths, lengths


def _words(text: np.ndarray, at: np.ndarray, left: np.ndarray) -> np.ndarray:
    """(n,) 8 bytes from places of a packed text as numbers; those after the first ``left`` (n,), 1 or more, are zeros."""
    every = np.ndarray((len(text) - WORD + 1,), "<u8", text, strides=(1,))
    unused = (8 * (WORD - left.clip(max=WORD))).astype(np.uint64)
    return every[at].astype(np.uint64) & (~np.uint64(0) >> unused)


def text_hash(text: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n,) uint64 of `packed` texts; it is on disk and never changes."""
    found = (lengths.astype(np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
    rest, done = np.flatnonzero(lengths > 0), 0
    while len(rest):
        x = found[rest] ^ _words(text, starts[rest] + done, lengths[rest] - done)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found[rest] = x ^ (x >> np.uint64(31))
        done += WORD
        rest = rest[lengths[rest] > done]
    return found


def _same(
    one: np.ndarray, one_starts: np.ndarray, one_lengths: np.ndarray, two: np.ndarray, starts: np.ndarray,
    lengths: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """(n,) whether texts of two packed texts are the same."""
    same = one_lengths == lengths
    rest, done = np.flatnonzero(same & (lengths > 0)), 0
    while len(rest):
        left = lengths[rest] - done
        equal = _words(one, one_starts[rest] + done, left) == _words(two, starts[rest] + done, left)
        same[rest[~equal]] = False
        done += WORD
        rest = rest[equal & (left > WORD)]
    return same


# --------------------------------------------------------------------------------------------------------------- writing
def pieces(values: pl.Series | Dictionary) -> Iterator[pl.Series]:
    """The values in their order, some at a time."""
    for start in range(0, len(values), PIECE):
        end = min(start + PIECE, len(values))
        yield values.piece(start, end) if isinstance(values, Dictionary) else values[start:end]


def write(path: Path, kind: Any, parts: Iterable[pl.Series]) -> Dictionary:
    """Write values, at least one, that come in their order and without nulls; a piece at a time is in memory.

    Raises:
        OSError: the disk is full.
    """
    every = (piece for part in parts for piece in pieces(part))
    if kind == pl.String:
        _write_texts(path, every)
        return Dictionary(path, kind)
    with path.open("wb") as file:
        for piece in every:
            file.write(piece.to_numpy().astype(NUMBERS[str(kind)]).data)
    return Dictionary(path, kind)


def _write_texts(path: Path, every: Iterable[pl.Series]) -> None:
    """Write texts and what finds them."""
    count = end = 0
    scattered = _file(path, ".unsorted")
    shutil.rmtree(scattered, ignore_errors=True)  # of an interrupted process
    scattered.mkdir()
    with path.open("wb") as file, _file(path, ".ends").open("wb") as ends:
        for piece in every:
            text, starts, lengths = packed(piece)
            file.write(text[:-WORD].data)
            ends.write((end + starts + lengths).astype("<i8").data)
            hashed = np.empty(len(piece), HASHED)
            hashed["hash"], hashed["place"] = text_hash(text, starts, lengths), count + np.arange(len(piece))
            _scatter(scattered, hashed)
            count, end = count + len(piece), end + len(text) - WORD
        file.write(bytes(WORD))
    with _file(path, ".hashes").open("wb") as hashes, _file(path, ".places").open("wb") as places:
        for part in sorted(scattered.iterdir()):
            found = np.fromfile(part, HASHED)
            found = found[np.argsort(found["hash"], kind="stable")]
            hashes.write(found["hash"].tobytes())
            places.write(found["place"].tobytes())
    shutil.rmtree(scattered)


def _scatter(folder: Path, hashed: np.ndarray) -> None:
    """Append hashes and places to the files of their first bits."""
    part = (hashed["hash"] >> np.uint64(64 - PARTS)).astype(np.int64)
    hashed = hashed[np.argsort(part, kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=1 << PARTS))])
    for name in range(1 << PARTS):
        with (folder / f"{name:03d}").open("ab") as file:
            file.write(hashed[bounds[name] : bounds[name + 1]].tobytes())


def copy(values: Dictionary, path: Path) -> Dictionary:
    """The same files elsewhere, from what is mapped: the files may have another name by now, or none."""
    for part, array in values.arrays.items():
        with _file(path, part).open("wb") as file:
            for start in range(0, len(array), BLOCK):
                file.write(array[start : start + BLOCK].data)
    return Dictionary(path, values.dtype)
