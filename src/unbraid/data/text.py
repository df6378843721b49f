"""Tables of text: each column's type is decided from all of its values, and an id is what is written, never a number.

An id column (whatever a run reads as an id, a bag, a user, a domain, a request, a class or the key of a join) stays text, so
that ``12e84091``, ``007`` and numbers of any length are themselves.  It becomes whole numbers only where every value is written
as a whole number of 64 bits is, ``7`` and not ``007``: then it has the values that a Parquet column of integers has.  Of the
other columns those are numbers whose values all are.  Empty fields are missing, quoted or not.

Files compressed by gzip or Zstandard are read as they are; Polars unpacks them piece by piece, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unbraid.data.dictionary import Dictionary, pieces
from unbraid.data.vocabulary import stable_hash

SEPARATORS = {".csv": ",", ".tsv": "\t"}  # what stands between columns, by what a file is called
COMPRESSED = (".gz", ".zst")


class DataError(ValueError):
    """The data are not what the run says.  The message names the file, the column, the number of rows and the fix."""


@dataclass(frozen=True)
class Reads:
    """How columns are read, by their names, in every table of text that has them.

    Args:
        ids: as ids; texts: as text, whatever is written (bags with a separator); numbers: as numbers, which win over ids.
        known: (column, type) of ids that a model knows already, for rows to predict: Int64, Float64 or String.
    """

    ids: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()
    known: tuple[tuple[str, Any], ...] = ()

    def given(self, known: Mapping[str, Any]) -> Reads:
        """The same, for rows to predict."""
        return replace(self, known=tuple(sorted(known.items(), key=lambda item: item[0])))


def suffixes(path: str | Path) -> tuple[str, str]:
    """What a file is and how it is compressed, by its name: ``(".csv", ".gz")`` of ``log.csv.gz``."""
    path = Path(path)
    if path.suffix not in COMPRESSED:
        return path.suffix, ""
    return Path(path.stem).suffix, path.suffix


def stem(path: str | Path) -> str:
    """A file's name without these: ``log`` of ``log.csv.gz``."""
    return Path(path).name.removesuffix("".join(suffixes(path)))


def first_lines(path: Path, count: int) -> list[str]:
    """The first lines of a file of text, compressed or not; what is not UTF-8 is replaced.  Raises DataError: it is cut short."""
    plan = pl.scan_csv(
        path, glob=False, has_header=False, separator="\x01", quote_char=None, infer_schema=False, n_rows=count,
        encoding="utf8-lossy", truncate_ragged_lines=True, raise_if_empty=False,
    )  # fmt: skip
    try:
        frame = plan.collect(engine="streaming")
    except OSError as error:
        raise DataError(_damaged(path, error)) from error
    return [line or "" for line in frame.to_series().to_list()] if frame.width else []


def plan_text(
    files: Sequence[Path], reads: Reads, *, separator: str = ",", names: Sequence[str] = (), header: bool = True,
    file: str = "",
) -> pl.LazyFrame:  # fmt: skip
    """A lazy plan over files of text of one layout, after a pass that decides the types of their columns.

    Args:
        names: of the columns, where the files have no header; file: name of a column to add with each row's file.

    Raises:
        DataError: a line with more values than there are columns, a value that is no number in a column that is read as one
            (where others are), text that is not UTF-8, a compressed file that is cut short.
    """
    stamps = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    layout = separator, tuple(names), header
    kinds = _kinds(stamps, layout, reads)
    plan = _plain(files, layout, file)
    known = {name for name, _ in reads.known} - reads.numbers
    return plan.with_columns(_cast(name, kind, name in known) for name, kind in kinds.items())


def _plain(files: Iterable[Path], layout: tuple[str, tuple[str, ...], bool], file: str = "") -> pl.LazyFrame:
    """All columns as text."""
    separator, names, header = layout
    return pl.scan_csv(
        list(files), glob=False, separator=separator, has_header=header, new_columns=list(names) or None,
        infer_schema=False, include_file_paths=file or None,
    )  # fmt: skip


@lru_cache(maxsize=64)  # a run makes the plan of a table several times
def _kinds(stamps: tuple[tuple[Path, int, int], ...], layout: Any, reads: Reads) -> dict[str, Any]:
    """Column -> type.  ``stamps``: files with their size and time of change, which the answer depends on."""
    files = [path for path, _, _ in stamps]
    try:
        plan = _plain(files, layout)
        names = plan.collect_schema().names()
        facts = plan.select(**{f"{i}.{k}": v for i, n in enumerate(names) for k, v in _facts(n).items()})
        found = facts.collect(engine="streaming").row(0, named=True)
    except (pl.exceptions.PolarsError, OSError) as error:  # OSError: of a compressed file that is cut short
        raise DataError(_unreadable(files, layout, error)) from error
    kinds = {}
    for i, name in enumerate(names):
        fact = {key: found[f"{i}.{key}"] for key in ("known", "exact", "whole", "number", "flag", "long")}
        kinds[name] = _kind(name, fact, reads)
        if kinds[name] == pl.String and name in reads.numbers and fact["number"]:
            raise DataError(_no_number(name, files, layout, fact["known"], fact["known"] - fact["number"]))
    return kinds


def _text(name: str) -> pl.Expr:
    """A column's text, null where it is empty."""
    return pl.when(pl.col(name) != "").then(pl.col(name))


def _is_number(text: pl.Expr) -> pl.Expr:
    """Whether it is a finite number, or written as infinity or NaN: ``12e84091`` is beyond all numbers."""
    number = text.cast(pl.Float64, strict=False)
    return (number.is_finite() | (number.is_not_null() & text.str.contains("(?i)^[+-]?(inf|nan)"))).fill_null(False)


def _facts(name: str) -> dict[str, pl.Expr]:
    """How many values there are, and how many are what: see `_kind`."""
    text, bare = _text(name), _text(name).str.strip_chars()
    whole = bare.cast(pl.Int64, strict=False)
    return {
        "known": text.count(),
        "exact": (whole.cast(pl.String) == text).sum(),  # 7, and not 007 or +7
        "whole": whole.count(),
        "number": _is_number(bare).sum(),
        "flag": text.is_in(["true", "false"]).sum(),
        "long": (bare.str.contains(r"^[+-]?\d+$") & whole.is_null()).sum(),  # whole, and beyond 64 bits
    }


def _kind(name: str, fact: Mapping[str, int], reads: Reads) -> Any:
    """The type of a column."""
    count = fact["known"]
    flag = pl.Boolean if count and fact["flag"] == count else pl.String
    number = pl.Int64 if fact["whole"] == count else pl.Float64 if fact["number"] == count else flag
    known = dict(reads.known).get(name)
    if name in reads.numbers:
        return pl.Float64 if not count or (number == pl.Int64 and known == pl.Float64) else number
    if name in reads.texts or not count:
        return pl.String
    if known is not None:
        if known == pl.Float64:  # text would match nothing, which who encodes it says
            return known if fact["number"] == count else pl.String
        return flag if known == pl.Int64 and flag == pl.Boolean else known
    if name in reads.ids:
        return pl.Int64 if fact["exact"] == count else flag
    return pl.String if fact["long"] else number


def _cast(name: str, kind: Any, known: bool) -> pl.Expr:
    """A column as its type.  Of a known Int64 column, what is no whole number becomes a number that stands for it."""
    text = _text(name)
    if kind == pl.String:
        return text.alias(name)
    if kind == pl.Boolean:
        return (text == "true").alias(name)
    if not (known and kind == pl.Int64):
        return text.str.strip_chars().cast(kind).alias(name)
    return _number_of(text).alias(name)


def _stand_in(values: pl.Series) -> pl.Series:
    """(n,) Int64 from a hash: for texts among numbers, that nobody knows."""
    return pl.Series(values.name, stable_hash(values).view(np.int64))


def whole_numbers(values: pl.Series) -> pl.Series:
    """Texts as the whole numbers that they are, with numbers that stand for the others; as they are if none is one."""
    found = pl.select(_number_of(pl.lit(values))).to_series()
    return found.rename(values.name) if (values == found.cast(pl.String)).any() else values


def holds_whole_numbers(values: pl.Series | Dictionary) -> bool:
    """Whether any of these is text that is a whole number: so that integers may be among them."""
    return values.dtype == pl.String and any(whole_numbers(piece).dtype == pl.Int64 for piece in pieces(values))


def _number_of(text: pl.Expr) -> pl.Expr:
    """Int64 of texts, and numbers that stand for those that are none."""
    number = text.cast(pl.Int64, strict=False)
    other = text.map_batches(_stand_in, return_dtype=pl.Int64, is_elementwise=True)
    return pl.when(number.cast(pl.String) == text).then(number).when(text.is_not_null()).then(other)


# ----------------------------------------------------------------------------------------------------- what to say of it
def _first(name: str, files: Sequence[Path], layout: Any) -> tuple[Path, int, str]:
    """File, line and value of the first that is no number."""
    wrong = _text(name).is_not_null() & ~_is_number(_text(name).str.strip_chars())
    for path in files:
        lines = _plain([path], layout).select(pl.row_index("line") + 1 + layout[2], name).filter(wrong)
        if len(found := lines.head(1).collect(engine="streaming")):
            return path, *found.row(0)
    raise AssertionError(f"{name}: a value was no number and is not found")


def _no_number(name: str, files: Sequence[Path], layout: Any, count: int, wrong: int) -> str:
    path, line, value = _first(name, files, layout)
    shown = value if len(value) <= 40 else value[:37] + "..."
    quoted = name if name.isidentifier() else f'"{name}"'
    return (
        f"{path}: column `{name}` is read as a number, and `{shown}` in line {line:,} is none ({wrong:,} of {count:,} values "
        f"are not). Mend or empty them in the file; or read them as missing, with `TRY_CAST({quoted} AS DOUBLE)` in the place "
        f"of `{name}` in the run file; or read the column as an id."
    )


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} cannot be read ({path.stat().st_size:,} bytes): {error}. Write the file again."


def _unreadable(files: Sequence[Path], layout: Any, error: Exception) -> str:
    """Which file cannot be read as text, and why."""
    path = next((path for path in files if not _reads(path, layout)), None)
    if path is not None and isinstance(error, OSError):
        return _damaged(path, error)
    if path is None:
        names = "; ".join(f"{p.name}: {', '.join(_plain([p], layout).collect_schema().names()[:8])}" for p in files[:3])
        return f"Text files of one table cannot be read as declared: their columns differ ({names})."
    columns = len(_plain([path], layout).collect_schema().names())
    if "more fields" in str(error):
        return (
            f"{path} cannot be read as declared: a line has more values than the {columns} columns. Put quotes around values "
            f"that hold the separator {layout[0]!r}, or declare another in `data.text`."
        )
    if "utf" in str(error).lower():
        return f"{path} cannot be read as declared: it is not UTF-8 text. Convert it, such as by `iconv -t UTF-8`."
    return f"{path} cannot be read as declared: {str(error).splitlines()[0]}."


def _reads(path: Path, layout: Any) -> bool:
    try:
        _plain([path], layout).select(pl.all().count()).collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError):
        return False
    return True
