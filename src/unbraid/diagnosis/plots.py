"""What a check may show of its evidence: five kinds of plots, as plain numbers.  Nothing is drawn here.

A check puts them into `unbraid.diagnosis.diagnosis.Diagnosis.evidence` under ``plots``::

    evidence={"plots": (Bars("What training together did", "difference in AUC", ("click", "like"), (0.01, -0.02)),)}

and `unbraid.report` draws them, with their numbers as a table.  A plot holds at most `MOST` marks, however much it is made
of: a longer series keeps the lowest and the highest value of each stretch, a larger map the means of its blocks, and of many
bars the farthest from the reference are kept.  Arrays and tensors become tuples of floats, so that a plot can be compared and
written down; None and numbers that are not finite are gaps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

MOST = 2000  # marks of one plot: more cannot be told apart on a screen, and an SVG of more is slow
MOST_BARS = 60  # that still can be read one below the other
MOST_LINES = 20  # that still can be told apart

Numbers = tuple[float | None, ...]


@dataclass(frozen=True)
class Lines:
    """Curves over a common axis: losses over steps, a spectrum over ranks, weights over rounds.

    Args:
        title: what it shows, a few words; x, y: titles of the axes, with units in brackets.
        series: name -> (abscissas, ordinates), of equal length, at least one point; abscissas are finite.
        low, high: name -> ordinates of a band around the series of that name, as long as it.
        reference: an ordinate to hold the curves against, such as chance.
        log_x, log_y: logarithmic axes; what is not above 0 is then a gap.
        steps: a value holds until the next abscissa (weights that a schedule sets).
        note: what to see, one sentence.
    """

    kind: ClassVar[str] = "lines"
    title: str
    x: str
    y: str
    series: Mapping[str, tuple[Numbers, Numbers]]
    low: Mapping[str, Numbers] = field(default_factory=dict)
    high: Mapping[str, Numbers] = field(default_factory=dict)
    reference: float | None = None
    log_x: bool = False
    log_y: bool = False
    steps: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if not self.series or set(self.low) != set(self.high) or not set(self.low) <= set(self.series):
            raise _error(self, "`series` should have at least one line, and `low` and `high` bands of the same of them")
        if len(self.series) > MOST_LINES:
            _set(self, "note", f"{self.note} The first {MOST_LINES} of {len(self.series):,} lines.".strip())
        shown = list(self.series)[:MOST_LINES]
        lines = {str(name): tuple(map(numbers, self.series[name])) for name in shown}
        bands = {str(name): (numbers(self.low[name]), numbers(self.high[name])) for name in shown if name in self.low}
        for name, (x, y, *more) in {n: lines[n] + bands.get(n, ()) for n in lines}.items():
            if not x or None in x or any(len(each) != len(x) for each in (y, *more)):
                raise _error(self, f"line `{name}`: abscissas should be finite, one or more, and as many as ordinates")
        most = MOST // len(lines)
        kept = {name: _kept(y, most, self.log_y) for name, (_, y) in lines.items()}
        _set(self, "series", {n: (_at(x, kept[n]), _gaps(_at(y, kept[n]), self.log_y)) for n, (x, y) in lines.items()})
        for i, part in enumerate(("low", "high")):
            _set(self, part, {n: _gaps(_at(both[i], kept[n]), self.log_y) for n, both in bands.items()})


@dataclass(frozen=True)
class Bars:
    """One value per name, with its interval where there is one: gains of tasks, shares of domains.

    Args:
        title: what it shows; y: title of the values' axis, with the unit in brackets; names, values: of the bars.
        low, high: ends of the intervals, empty if there are none; None where one bar has none.
        reference: where bars start, such as 0 for a gain or .5 for an AUC.
        x: what the names are, such as ``task``; note: what to see, one sentence.
    """

    kind: ClassVar[str] = "bars"
    title: str
    y: str
    names: tuple[str, ...]
    values: Numbers
    low: Numbers = ()
    high: Numbers = ()
    reference: float = 0.0
    x: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        names, values, low, high = (
            texts(self.names),
            numbers(self.values),
            numbers(self.low),
            numbers(self.high),
        )
        if not names or len(values) != len(names) or len(low) != len(high) or len(low) not in (0, len(names)):
            raise _error(self, "`values` should be as many as `names`, at least one; `low` and `high` as many or empty")
        if repeated := _repeated(names):
            raise _error(self, f"names of bars should differ. Found twice: {repeated}")
        if len(names) > MOST_BARS:
            far = [0.0 if value is None else abs(value - self.reference) for value in values]
            keep = sorted(sorted(range(len(far)), key=lambda i: -far[i])[:MOST_BARS])
            shown = f"The {MOST_BARS} of {len(names):,} that lie farthest from {self.reference:g}."
            _set(self, "note", f"{self.note} {shown}".strip())
            names = tuple(names[i] for i in keep)
            values, low, high = (_at(part, keep) if part else part for part in (values, low, high))
        for part, found in (("names", names), ("values", values), ("low", low), ("high", high)):
            _set(self, part, found)


@dataclass(frozen=True)
class Heat:
    """A map: conflicts of tasks, shares of tasks in sites, attention of positions.

    Args:
        title: what it shows; x, y: what columns and rows are; value: title of the colour's scale, with the unit in brackets.
        rows, columns: their names; values: one tuple per row.
        scale: ``diverging``: two colours that meet at ``centre``; ``sequential``: from ``centre`` (None: the lowest) upwards.
        note: what to see, one sentence.
    """

    kind: ClassVar[str] = "heat"
    title: str
    x: str
    y: str
    value: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[Numbers, ...]
    scale: Literal["diverging", "sequential"] = "sequential"
    centre: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        rows, columns, values = texts(self.rows), texts(self.columns), tuple(map(numbers, self.values))
        if not rows or not columns or [len(row) for row in values] != [len(columns)] * len(rows):
            raise _error(self, f"`values` should be {len(rows)} rows of {len(columns)} numbers, at least one of each")
        if repeated := _repeated(rows) or _repeated(columns):
            raise _error(self, f"names of rows should differ, and so should those of columns. Found twice: {repeated}")
        if self.scale not in ("diverging", "sequential"):
            raise _error(self, f"`scale` should be diverging or sequential. Found {self.scale!r}")
        if self.scale == "diverging" and self.centre is None:
            raise _error(self, "a diverging scale needs its `centre`")
        if len(rows) * len(columns) > MOST:
            found = f"Means of blocks of a map of {len(rows):,} x {len(columns):,}."
            _set(self, "note", f"{self.note} {found}".strip())
            rows, columns, values = _blocks(rows, columns, values)
        for part, found in (("rows", rows), ("columns", columns), ("values", values)):  # type: ignore[assignment]
            _set(self, part, found)


@dataclass(frozen=True)
class Histogram:
    """How values are spread, counted in bins; `histogram` counts them.

    Args:
        title: what it shows; x: what is counted, with the unit in brackets; y: title of the counts' axis.
        edges: (B + 1,) increasing ends of the bins; counts: name -> (B,) counts or shares, at least 0.
        marks: name -> an abscissa to mark, such as chance; log_y: counts on a logarithmic axis; note: what to see, one sentence.
    """

    kind: ClassVar[str] = "histogram"
    title: str
    x: str
    edges: Numbers
    counts: Mapping[str, Numbers]
    y: str = "rows"
    marks: Mapping[str, float] = field(default_factory=dict)
    log_y: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        edges, counts = numbers(self.edges), {str(name): numbers(each) for name, each in self.counts.items()}
        known = [edge for edge in edges if edge is not None]
        if len(known) != len(edges) or len(edges) < 2 or any(a >= b for a, b in zip(known, known[1:], strict=False)):
            raise _error(self, "`edges` should increase, and be two or more")
        for name, each in counts.items():
            if len(each) != len(edges) - 1 or any(count is None or count < 0 for count in each):
                raise _error(self, f"`counts` of `{name}` should be {len(edges) - 1} numbers of at least 0")
        if not counts or len(counts) * (len(edges) - 1) > MOST:
            raise _error(self, f"`counts` should have one or more names, and at most {MOST} bins in all")
        for part, found in (
            ("edges", edges),
            ("counts", counts),
            ("marks", {str(k): float(v) for k, v in self.marks.items()}),
        ):
            _set(self, part, found)


@dataclass(frozen=True)
class Reliability:
    """Predicted probability against what happened, in bins; a calibrated model lies on the diagonal.

    Args:
        title: what it shows; predicted: name -> (B,) mean probability of each bin, in [0, 1]; happened: name -> (B,) share of
            positives (or of right classes); counts: name -> (B,) rows of the bin.
        low, high: name -> (B,) ends of the shares' intervals, empty if there are none.
        x, y: titles of the axes; note: what to see, one sentence.
    """

    kind: ClassVar[str] = "reliability"
    title: str
    predicted: Mapping[str, Numbers]
    happened: Mapping[str, Numbers]
    counts: Mapping[str, Numbers]
    low: Mapping[str, Numbers] = field(default_factory=dict)
    high: Mapping[str, Numbers] = field(default_factory=dict)
    x: str = "predicted probability"
    y: str = "share of positives"
    note: str = ""

    def __post_init__(self) -> None:
        whole = {p: {str(n): numbers(v) for n, v in getattr(self, p).items()} for p in RELIABILITY}
        names = set(whole["predicted"])
        bands = set(whole["low"]) | set(whole["high"])
        if not names or any(set(whole[part]) != names for part in ("happened", "counts")) or not bands <= names:
            raise _error(self, "`predicted`, `happened` and `counts` should have the same names, one or more")
        if set(whole["low"]) != set(whole["high"]):
            raise _error(self, "`low` and `high` should have the same names")
        for name, each in whole["predicted"].items():
            if any(len(whole[part][name]) != len(each) for part in RELIABILITY if name in whole[part]):
                raise _error(self, f"`{name}` should have as many numbers in each part")
            if any(p is not None and not 0 <= p <= 1 for part in RELIABILITY[:2] for p in whole[part][name]):
                raise _error(self, f"probabilities and shares of `{name}` should lie in [0, 1]")
        if sum(map(len, whole["predicted"].values())) > MOST:
            raise _error(self, f"there should be at most {MOST} bins in all")
        for part, found in whole.items():
            _set(self, part, found)


RELIABILITY = ("predicted", "happened", "counts", "low", "high")
Plot = Lines | Bars | Heat | Histogram | Reliability
KINDS: dict[str, type[Plot]] = {each.kind: each for each in (Lines, Bars, Heat, Histogram, Reliability)}


def histogram(
    title: str, x: str, values: Mapping[str, Iterable[float]], *, bins: int = 40, shares: bool = False, **more: Any
) -> Histogram:  # fmt: skip
    """Count finite values of each name in ``bins`` bins of equal width over the range of all.

    Args:
        values: name -> any number of values; those that are not finite are not counted.
        shares: divide by each name's number of values, to compare names of unequal size.
        more: arguments of `Histogram`.
    """
    arrays = {name: np.asarray(_plain(each), float).ravel() for name, each in values.items()}
    arrays = {name: each[np.isfinite(each)] for name, each in arrays.items()}
    every = np.concatenate(list(arrays.values())) if arrays else np.empty(0)
    if not len(every):
        raise ValueError(f"Histogram `{title}` should have at least one finite value. Found none.")
    edges = np.histogram_bin_edges(every, bins)
    counts = {
        name: np.histogram(each, edges)[0] / (max(len(each), 1) if shares else 1) for name, each in arrays.items()
    }
    return Histogram(title, x, numbers(edges), {n: numbers(c) for n, c in counts.items()}, **more)


# ----------------------------------------------------------------------------------------------------------- plain form
def to_plain(plot: Plot) -> dict[str, Any]:
    """The plot as plain values that JSON can hold, with its ``kind``."""
    return {"kind": plot.kind, **asdict(plot)}


def from_plain(found: Mapping[str, Any]) -> Plot:
    """`to_plain` backwards.  Raises ValueError for a kind or a key that is not known."""
    rest = dict(found)
    kind = rest.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"A plot's kind should be one of {', '.join(KINDS)}. Found {kind!r}.")
    try:
        return KINDS[kind](**rest)
    except TypeError as error:
        raise ValueError(f"A plot of kind {kind}: {error}.") from error


# -------------------------------------------------------------------------------------------------------------- numbers
def numbers(found: Iterable[Any]) -> Numbers:
    """A sequence, array or tensor as floats; None where it is not finite."""
    every = (None if each is None else float(each) for each in _plain(found))
    return tuple(None if each is None or not math.isfinite(each) else each for each in every)


def texts(found: Iterable[Any]) -> tuple[str, ...]:
    """Names as texts."""
    return tuple(map(str, found))


def _repeated(names: Sequence[str]) -> str:
    """A name that stands there twice, "" if none does: two marks would lie on each other."""
    seen: set[str] = set()
    return next((name or "(no name)" for name in names if name in seen or seen.add(name)), "")  # type: ignore[func-returns-value]


def _plain(found: Any) -> Any:
    return found.tolist() if hasattr(found, "tolist") else list(found)


def _set(plot: Any, part: str, value: Any) -> None:
    object.__setattr__(plot, part, value)  # the plot is frozen for everyone else


def _error(plot: Any, text: str) -> ValueError:
    return ValueError(f"{type(plot).__name__} `{plot.title}`: {text}.")


def _at(values: Numbers, index: Sequence[int]) -> Numbers:
    return tuple(values[i] for i in index)


def _gaps(values: Numbers, log: bool) -> Numbers:
    return tuple(None if log and v is not None and v <= 0 else v for v in values)


def _kept(y: Numbers, most: int, log: bool) -> list[int]:
    """Positions to keep of a series: all of up to ``most``, else first, last, lowest and highest of each stretch."""
    if len(y) <= most:
        return list(range(len(y)))
    value = np.array([math.nan if v is None or (log and v <= 0) else v for v in y])
    keep = {0, len(y) - 1}
    for part in np.array_split(np.arange(len(y)), max(1, (most - 2) // 2)):
        known = part[np.isfinite(value[part])]
        keep |= {int(known[value[known].argmin()]), int(known[value[known].argmax()])} if len(known) else {int(part[0])}
    return sorted(keep)


def _blocks(
    rows: tuple[str, ...], columns: tuple[str, ...], values: tuple[Numbers, ...]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Numbers, ...]]:
    """Means over blocks, so that at most `MOST` are left; a block is named by its first and its last."""
    down, right = len(rows), len(columns)
    while down * right > MOST:
        down, right = (max(1, down // 2), right) if down >= right else (down, max(1, right // 2))
    table = np.array([[math.nan if v is None else v for v in row] for row in values])
    y, x = np.array_split(np.arange(len(rows)), down), np.array_split(np.arange(len(columns)), right)
    means = tuple(tuple(_mean(table[np.ix_(a, b)]) for b in x) for a in y)
    return tuple(_span(rows, part) for part in y), tuple(_span(columns, part) for part in x), means


def _mean(block: np.ndarray) -> float | None:
    known = block[np.isfinite(block)]
    return float(known.mean()) if known.size else None


def _span(names: Sequence[str], part: np.ndarray) -> str:
    first, last = names[part[0]], names[part[-1]]
    return first if len(part) == 1 else f"{first} … {last}"
