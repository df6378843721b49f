"""The nouns of the library: a schema, a batch of rows and what a model says about it.

Everything else imports from here and this file imports only NumPy and torch; what acts on the nouns is in `unbraid.slots`.
Shapes use these letters: B rows, N packed values (events or bag members of all rows end to end), T tasks, K classes, D vector
width, H hidden width, U distinct ids.

Ids: every vocabulary reserves row 0 for *unknown* (never seen in training, or below ``min_count``) and row 1 for
*missing* (null); known values start at 2.  The same holds for domains.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

UNKNOWN, MISSING, FIRST_VALUE = 0, 1, 2
NO_DOMAIN = "all"  # the one domain of a log without domains
GAP = "gap"  # an event field that needs no column: bucketed seconds between an event and the row
POSITION = "position"  # another: 1 for the newest event of a history, 2 for the one before it, ...
BUILT_IN = (GAP, POSITION)
EXACT = ".exact"  # suffix of a number's unrounded value among a batch's features; no feature's name has a dot
Array = np.ndarray  # of any type and shape; docstrings give both
# Nested dicts, lists, tuples of tensors, arrays, numbers, text and None: what `unbraid.store` writes.
State = dict[str, Any]
Losses = Mapping[str, Tensor]  # objective (a task, a domain, or "task@domain") -> scalar
FORBID: dict[str, Any] = {"extra": "forbid"}  # pydantic reads it: a misspelt key in a run file is an error


# ---------------------------------------------------------------------------------------------------- what columns mean
@dataclass(frozen=True)
class Feature:
    """One input column.

    Args:
        name: the feature's name, unique in a schema.
        kind: ``id`` (a category of any type), ``number``, ``vector`` (a list of numbers of one length), ``bag`` (a list of
            ids of any length), ``image`` (a picture: the path of its file, or its bytes) or ``text``.
        column: the column, or an SQL expression over columns (``hourmin / 100``); empty means ``name``.
        vocabulary: features and event fields of one vocabulary share tables; empty means ``name``.
        min_count: values rarer than this in the training split become *unknown*; 0: all are hashed, and none is counted.
        buckets: hash unknown values into this many extra rows instead of row 0.
        pooling: how a bag becomes one vector.
        separator: split a text column into a bag at this string.
        transform: applied to a number before it is standardised (``log1p`` keeps the sign).
        nan: what a NaN in a number means.  A null is always *missing*; a NaN is an error unless this says ``missing``.
        template: what a text is put into, at its one ``{}``, before it is read; empty: nothing.

    Raises:
        ValueError: ``template`` is not for a text, or has no place or several for it.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    name: str
    kind: Literal["id", "number", "vector", "bag", "image", "text"] = "id"
    column: str = ""
    vocabulary: str = ""
    min_count: int = 1
    buckets: int = 0
    pooling: Literal["mean", "sum", "attention"] = "mean"
    separator: str = ""
    transform: Literal["none", "log1p"] = "none"
    nan: Literal["error", "missing"] = "error"
    template: str = ""

    def __post_init__(self) -> None:
        if self.template and (self.kind != "text" or self.template.count("{}") != 1):
            raise ValueError(
                f"Feature `{self.name}`: `template` is for kind `text` and holds {{}} once, where the text goes. Found kind "
                f"`{self.kind}`, template {self.template!r}."
            )

    @property
    def source(self) -> str:
        """The column or expression that is read."""
        return self.column or self.name

    @property
    def vocab(self) -> str:
        """Name of the vocabulary."""
        return self.vocabulary or self.name

    @property
    def has_content(self) -> bool:
        """Is it a picture or a text, which a backbone makes a vector of?"""
        return self.kind in ("image", "text")


@dataclass(frozen=True)
class Transform:
    """How a picture becomes the numbers that a backbone reads.

    Args:
        size: side of the square that the backbone sees, in pixels.
        resize: the shorter side before the centre is cut out; 0: ``size``.
        mode: ``RGB``, three channels, or ``L``, one of grey; pictures of other modes are converted.
        mean, std: per channel, of values in [0, 1], for ``(value - mean) / std``.
        interpolation: of the resizing.
        augment: ``none``, the centre; ``weak``, a random crop and a random flip; ``strong``, RandAugment on top.
        flip: may a changed picture be mirrored?  Digits and letters should not.
    """

    size: int = 224
    resize: int = 0
    mode: Literal["RGB", "L"] = "RGB"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    augment: Literal["none", "weak", "strong"] = "none"
    flip: bool = True

    @property
    def random(self) -> bool:
        """Does a picture look different every time?"""
        return self.augment != "none"


@dataclass(frozen=True)
class Field:
    """One id that every event carries (the item, its author, what the user did).  ``vocabulary`` as in `Feature`."""

    __pydantic_config__: ClassVar[dict] = FORBID
    name: str
    vocabulary: str = ""
    min_count: int = 1
    buckets: int = 0

    @property
    def vocab(self) -> str:
        """Name of the vocabulary."""
        return self.vocabulary or self.name


@dataclass(frozen=True)
class History:
    """A filtered view of the event table: the last ``length`` events of the row's user strictly before its time.

    Args:
        name: unique among features and histories.
        fields: the event fields that are read; ``gap`` is the bucketed time between the event and the row, ``position``
            the event's rank counted back from the row (1 is the newest).
        where: SQL over the event fields' *values* before encoding (``action = 'like'``); empty keeps every event.
        length: at most so many events, the newest.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    name: str
    fields: tuple[str, ...]
    where: str = ""
    length: int = 50


@dataclass(frozen=True)
class Task:
    """One label column.

    Args:
        name: the task's name.
        column: the label column or SQL expression; empty means ``name``.  A null is *unobserved*, never 0.
        kind: ``binary`` (0 or 1), ``multiclass`` (any values, the classes seen in training) or ``real``.
        given: observed only where this binary task is observed and 1 (conversion after click).
        role: metrics of ``auxiliary`` tasks are printed and never select a model.
        weight: weight of the task's loss.
        sampling_rate: which share of this binary task's negatives the log kept: a constant in (0, 1] or a column.  The
            loss then adds ``-log(rate)`` to the logit, so that the model itself stays calibrated to the full log
            (odds of a log that kept a share r of the negatives are 1/r times the true odds).
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    name: str
    column: str = ""
    kind: Literal["binary", "multiclass", "real"] = "binary"
    given: str = ""
    role: Literal["target", "auxiliary"] = "target"
    weight: float = 1.0
    sampling_rate: float | str = 1.0

    @property
    def source(self) -> str:
        """The column or expression that is read."""
        return self.column or self.name


@dataclass(frozen=True)
class Schema:
    """What the columns mean and what training data taught about them.  Saved with every model.

    Args:
        sizes: vocabulary -> number of rows of its tables (unknown and missing included).
        widths: vector feature -> D.
        numbers: number feature -> (mean, standard deviation) in the training split, after its transform.
        quantiles: number feature -> 256 of its values there at evenly spaced ranks, from the least to the greatest.
        whole: number feature -> are all its values there whole, and at most 2^53 from 0?
        domains: names of the domain codes, ``domains[0]`` unknown, ``domains[1]`` missing.
        classes: multiclass task -> its classes as text, in code order.
    """

    features: tuple[Feature, ...]
    tasks: tuple[Task, ...]
    histories: tuple[History, ...] = ()
    fields: tuple[Field, ...] = ()
    domains: tuple[str, ...] = ("(unknown)", "(missing)")
    sizes: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    numbers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    quantiles: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    whole: Mapping[str, bool] = field(default_factory=dict)

    def task(self, name: str) -> Task:
        """The task of that name.  Raises ValueError that lists the names."""
        known = {task.name: task for task in self.tasks}
        if name not in known:
            raise ValueError(f"There is no task `{name}`. Tasks: {', '.join(known)}.")
        return known[name]

    def field_vocabulary(self, name: str) -> str:
        """Vocabulary of an event field (``gap`` and ``position`` have their own)."""
        return name if name in BUILT_IN else {f.name: f.vocab for f in self.fields}[name]

    def outputs(self, task: Task) -> int:
        """How many logits a task has: K for multiclass, else 1."""
        return len(self.classes[task.name]) if task.kind == "multiclass" else 1


# ------------------------------------------------------------------------------------------------------ batches of rows
class Ragged:
    """Packed lists of B rows: no padding is stored or computed.

    Args:
        values: name -> (N,) values of all rows end to end.
        offsets: (B + 1,) int64; row i owns ``values[name][offsets[i]:offsets[i + 1]]``.
    """

    def __init__(self, values: Mapping[str, Tensor], offsets: Tensor) -> None:
        self.values, self.offsets = dict(values), offsets

    @cached_property
    def lengths(self) -> Tensor:
        """(B,) number of values of each row."""
        return self.offsets[1:] - self.offsets[:-1]

    @cached_property
    def rows(self) -> Tensor:
        """(N,) the row that each value belongs to."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.offsets.device), self.lengths)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def select(self, rows: Tensor) -> Ragged:
        """The lists of the given rows ((n,) int64 or (B,) bool), packed anew."""
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        lengths = self.lengths[rows]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        start = torch.repeat_interleave(self.offsets[rows] - offsets[:-1], lengths)
        take = torch.arange(len(start), device=start.device) + start
        return Ragged({name: value[take] for name, value in self.values.items()}, offsets)

    @staticmethod
    def join(parts: Sequence[Ragged]) -> Ragged:
        """The lists of all parts, one part after the other."""
        lengths = torch.cat([part.lengths for part in parts])
        values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
        return Ragged(values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))

    def to(self, device: torch.device | str) -> Ragged:
        """A copy on another device."""
        return Ragged({name: value.to(device) for name, value in self.values.items()}, self.offsets.to(device))


class Shared:
    """One list that all B rows have, such as the history of the user whose candidates they are: n values instead of B times n.

    It is no `Ragged`: what does not know it fails.  `unbraid.model.Model` gives it to encoders that know it and repeats it for
    all others.  It is for serving: no gradient passes through it.

    Args:
        values: name -> (n,) values; rows: B.
        memo: what encoders computed of the values and may read again.  Who makes lists of the same values for several batches
            of one model gives them one memo.
    """

    def __init__(self, values: Mapping[str, Tensor], rows: int, memo: dict[Any, Any] | None = None) -> None:
        self.values, self.rows, self.memo = dict(values), rows, {} if memo is None else memo

    @property
    def length(self) -> int:
        """n, how many values there are."""
        return len(next(iter(self.values.values()))) if self.values else 0

    def __len__(self) -> int:
        return self.rows

    def one(self) -> Ragged:
        """The list alone."""
        device = next((value.device for value in self.values.values()), None)
        return Ragged(self.values, torch.arange(2, device=device) * self.length)

    def repeated(self) -> Ragged:
        """The same list B times."""
        offsets = torch.arange(self.rows + 1, device=self.one().offsets.device) * self.length
        return Ragged({name: value.repeat(self.rows) for name, value in self.values.items()}, offsets)

    def select(self, rows: Tensor) -> Shared:
        """The list of some rows ((k,) int64 or (B,) bool)."""
        return Shared(self.values, int(rows.sum()) if rows.dtype == torch.bool else len(rows), self.memo)

    def to(self, device: torch.device | str) -> Shared:
        """A copy on another device; the memo stays if it is the same one."""
        values = {name: value.to(device) for name, value in self.values.items()}
        return Shared(values, self.rows, self.memo if all(values[n] is v for n, v in self.values.items()) else None)


@dataclass(frozen=True)
class Batch:
    """B rows of the table; domains, labelled and unlabelled rows live together.

    Args:
        features: name -> (B,) int64 ids; (B, 2) numbers (standardised value, missing 0/1), and ``NAME.exact`` -> (B, 1)
            float64 (the value itself after its transform, 0 where missing); (B, D) vectors; `Ragged`
            bags (one value name: the feature's) and histories (one value name per event field), or `Shared` histories.
        labels: task -> (B,) float32, or int64 for multiclass; anything where unobserved.
        observed: task -> (B,) bool.
        domain: (B,) int64 codes into ``schema.domains``.
        weight: (B,) float32 or None.
        row: (B,) int64, stable index of the row in the encoded table.
        view: (B,) int8, 0 plain or weak and 1 strong; rows of view 1 are unobserved and never count in metrics.
        pair: (B,) int64, position of the other view in this batch, -1 if none.
        meta: user (0: none), time, request (negative: none), exposure, ``sampling_rate.TASK`` ...: for metrics, schedules and
            weights, never for the model.
    """

    # Or, where they are served, Shared: nothing that trains or analyses need know.
    features: Mapping[str, Tensor | Ragged]
    labels: Mapping[str, Tensor]
    observed: Mapping[str, Tensor]
    domain: Tensor
    weight: Tensor | None
    row: Tensor
    view: Tensor
    pair: Tensor
    meta: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row)

    @property
    def whole(self) -> Batch:
        """The batch that these rows are of: itself, unless several processes train on it together (without features then)."""
        return self

    def select(self, rows: Tensor) -> Batch:
        """The given rows ((n,) int64 or (B,) bool).  Raises ValueError if it splits a pair of views."""
        index = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        place = torch.full((len(self),), -1, dtype=torch.int64, device=index.device)
        place[index] = torch.arange(len(index), device=index.device)
        pair = self.pair[index]
        moved = torch.where(pair >= 0, place[pair.clamp(min=0)], pair)
        if bool(((pair >= 0) & (moved < 0)).any()):
            raise ValueError("select() would keep one view of a row and drop the other. Select both rows of each pair.")

        def pick(value: Any) -> Any:
            return value.select(index) if isinstance(value, Ragged | Shared) else value[index]

        changed: dict[str, Any] = {"pair": moved, "weight": None if self.weight is None else self.weight[index]}
        for part in fields(self):
            if part.name not in changed:
                value = getattr(self, part.name)
                several = isinstance(value, Mapping)
                changed[part.name] = {k: pick(v) for k, v in value.items()} if several else pick(value)
        return replace(self, **changed)

    @staticmethod
    def join(parts: Sequence[Batch]) -> Batch:
        """The rows of all parts, one part after the other; a pair of views points to the same rows as before."""
        starts = [0, *itertools.accumulate(len(part) for part in parts)]

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], Mapping):
                return {key: _cat([value[key] for value in values]) for key in values[0]}
            return None if values[0] is None else _cat(values)

        moved = [
            torch.where(part.pair >= 0, part.pair + start, part.pair)
            for part, start in zip(parts, starts, strict=False)
        ]
        return Batch(**{part.name: joined(part.name) for part in fields(Batch)} | {"pair": torch.cat(moved)})

    def unlabelled(self) -> Batch:
        """The same rows as if no label of theirs were known."""
        return replace(self, observed={task: torch.zeros_like(known) for task, known in self.observed.items()})

    def to(self, device: torch.device | str) -> Batch:
        """A copy on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {k: v.to(device) for k, v in value.items()}
            return None if value is None else value.to(device)

        return replace(self, **{part.name: move(getattr(self, part.name)) for part in fields(self)})


def _cat(values: list[Any]) -> Any:
    values = [value.repeated() if isinstance(value, Shared) else value for value in values]
    return Ragged.join(values) if isinstance(values[0], Ragged) else torch.cat(values)


# -------------------------------------------------------------------------------------------- what a model says about it
class Lookup(NamedTuple):
    """The distinct rows of one table that a batch read: ``vectors`` (U, D) are where per-task gradients are taken."""

    table: str
    ids: Tensor
    vectors: Tensor


class WithTrunk:
    """``trunk`` from ``shared``: a tensor, or what makes it, called when somebody reads it for the first time."""

    shared: Tensor | Callable[[], Tensor]

    @cached_property
    def trunk(self) -> Tensor:
        """(B, H) shared representation."""
        return self.shared if isinstance(self.shared, Tensor) else self.shared()


@dataclass(frozen=True)
class Output(WithTrunk):
    """What a model says about a batch.

    Args:
        logits: task -> (B,) or, for multiclass, (B, K).  A real-valued task's logit is its prediction.
        hidden: task -> (B, H) before its head.
        shared: the (B, H) shared representation or what computes it; read it as ``trunk``.
        extras: ``"slot.name"`` -> gates, attention, second heads.
        lookups: table rows read while gradients were on.  Those of a dense table may be absent unless the update wants
            them (``unbraid.optim.joint.JointUpdate.reads_dense_lookups``).
    """

    logits: Mapping[str, Tensor]
    hidden: Mapping[str, Tensor]
    shared: Tensor | Callable[[], Tensor]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    lookups: tuple[Lookup, ...] = ()


class Rows:
    """Vectors of N table reads, kept as the U distinct rows and an index: gathered only when someone needs all N.

    Args:
        vectors: (U, D) rows of a table (a gradient leaf while training, the whole table otherwise).
        index: (N,) int64 into ``vectors``.
        like: reads of another table's rows by the same index; its ordering is then found once.
    """

    def __init__(self, vectors: Tensor, index: Tensor, like: Rows | None = None) -> None:
        self.vectors, self.index, self.like = vectors, index, like

    @cached_property
    def by_vector(self) -> tuple[Tensor, Tensor]:
        """The reads ordered by vector (N,) and where each vector's begin (U + 1,)."""
        if self.like is not None:
            return self.like.by_vector
        order = torch.sort(self.index.int(), stable=True)[1]  # a radix sort, twice as fast as that of int64
        counts = torch.bincount(self.index, minlength=len(self.vectors))
        return order, nn.functional.pad(counts.cumsum(0), (1, 0))

    def select(self, reads: Tensor) -> Rows:
        """The given reads ((n,) int64) of the same vectors."""
        return Rows(self.vectors, self.index.index_select(0, reads))

    def gather(self) -> Tensor:
        """(N, D) one vector per read."""
        return nn.functional.embedding(self.index, self.vectors)

    def pool(self, offsets: Tensor, mode: str = "mean") -> Tensor:
        """(B, D) mean or sum over each row's values; an empty row gives 0.  The (N, D) vectors are never formed."""
        return nn.functional.embedding_bag(self.index, self.vectors, offsets, mode=mode, include_last_offset=True)


@dataclass(frozen=True)
class Scores:
    """Predictions and truth of N rows as NumPy arrays (what metrics, calibrators and `compare` read).

    Args:
        logits: task -> (N,) or (N, K).
        hidden: task -> (N, H); empty unless asked for.
        labels: task -> (N,); observed: task -> (N,) bool.
        domain: (N,) codes; domains: their names.
        weight: (N,) or None; group: (N,) users (without them requests, or rows); row: (N,) stable row index.
        meta: request, time, ``sampling_rate.TASK`` ...
    """

    logits: Mapping[str, Any]
    hidden: Mapping[str, Any]
    labels: Mapping[str, Any]
    observed: Mapping[str, Any]
    domain: Any
    weight: Any
    group: Any
    row: Any
    domains: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One measured fact about a trained model, with how to read it and what would help."""

    name: str
    values: Mapping[str, Any]
    unit: str = ""
    reading: str = ""
    reference: str = ""
    remedy: str = ""
