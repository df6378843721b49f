"""Which columns are labels, and as what kind of task: given ones, or guessed ones with what else they could be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from unbraid.data.declaration import SPLITS
from unbraid.data.pictures import WORDS
from unbraid.guess.columns import Column, mean
from unbraid.guess.words import (
    ABSENT,
    ACTIONS,
    AGAINST,
    AMOUNTS,
    FEEDBACK,
    FLAGS,
    LABELS,
    NO,
    OUTCOMES,
    PEOPLE,
    RATINGS,
    WANTED,
    YES,
    sql_name,
    sql_text,
)

CLASSES = 50  # a guessed label has at most so many
LEVELS = 21  # of ratings: 0, 0.5, .., 10
ENOUGH = 100  # rows of each answer that a flag needs to be a task of its own
TASKS = 4  # flags that become tasks by themselves
SHARE = 0.8  # a rating is good from this share of the way up: 4 of 5, 8 of 10
OTHERS = 5  # that are named
NEGATIVES = 4  # per row of a log without labels


@dataclass(frozen=True)
class Label:
    """One task.

    Args:
        name, kind: of the task; source: the column, or SQL; why: for the comment; columns: that it reads.
    """

    name: str
    kind: str
    source: str
    why: str
    columns: tuple[str, ...]

    def values(self, frame: pl.DataFrame) -> pl.Series:
        """(n,) what is to be predicted; null where it is not known."""
        expr = pl.col(self.source) if self.source in frame.columns else pl.sql_expr(self.source)
        return frame.select(expr.alias(self.name))[self.name]


@dataclass(frozen=True)
class Labels:
    """The tasks, and what they could be instead.

    Args:
        others: labels that are not taken; negatives: the rows are positives alone; rank: of the way in which they were found, 0
            for the surest.
    """

    tasks: tuple[Label, ...]
    others: tuple[Label, ...] = ()
    negatives: bool = False
    rank: int = 0


def label_of(c: Column) -> Label:
    """A given column as a label.  Raises ValueError for one that teaches nothing."""
    values, n = c.values, c.distinct
    nans = values.is_nan().sum() if c.dtype.is_float() else 0
    if nans:
        raise ValueError(f"Label `{c.name}`: {nans:,} values are NaN. Write nulls for labels that are not known.")
    if n < 2 or c.nested or c.dtype.is_temporal():
        found = "lists" if c.nested else str(c.dtype) if n > 1 else f"{n} distinct value(s)"
        raise ValueError(f"Label `{c.name}` should have two values or more, of numbers or words. Found {found}.")
    missing = values.null_count() / len(values)
    note = f"; {missing:.1%} are null, that is unobserved" if missing else ""
    if c.flag:
        return Label(c.name, "binary", c.source, f"0 or 1, {mean(values.cast(pl.Float64)):.2%} are 1{note}", (c.name,))
    if answers := _two(c):
        return _yes_or_no(c, *answers, note)
    if not c.dtype.is_numeric() or (_whole(values) and values.n_unique() <= 20):
        return Label(c.name, "multiclass", c.name, f"{n} classes{note}", (c.name,))
    also = f"; {c.note}" if c.note else ""
    return Label(c.name, "real", c.source, f"numbers, {n:,} distinct{note}{also}", (c.name,))


def _whole(values: pl.Series) -> bool:
    known = values.drop_nulls()
    return known.dtype.is_integer() or (known.dtype.is_float() and bool((known == known.round()).all()))


def _two(c: Column) -> tuple[str | float, str | float] | None:
    """(no, yes) of a column of two answers, besides words for a missing one; the yes is named so, larger, or rarer."""
    known = c.values.drop_nulls()
    if c.dtype.is_numeric():
        found = sorted(known.unique().to_list()) if c.distinct == 2 else []
        return (found[0], found[1]) if len(found) == 2 and _whole(known) else None
    if c.dtype not in (pl.String, pl.Categorical, pl.Enum) or c.distinct > 5:
        return None
    counts = known.cast(pl.String).value_counts(sort=True).rows()
    if len(counts) > 2:  # NA among yes and no
        counts = [(v, n) for v, n in counts if v.strip().lower() not in ABSENT]
    if len(counts) != 2:
        return None
    (often, _), (rare, _) = counts
    for yes, no in ((often, rare), (rare, often)):
        if yes.strip().lower().rstrip(".") in YES or no.strip().lower().rstrip(".") in NO:
            return no, yes
        if ">" in yes and "<" in no:
            return no, yes
    return often, rare


def _yes_or_no(c: Column, no: str | float, yes: str | float, note: str) -> Label:
    name, numbers = c.source if c.sql else sql_name(c.name), not isinstance(yes, str)
    on, off = (f"{v:g}" if numbers else sql_text(str(v)) for v in (yes, no))
    values = c.values if numbers else c.values.cast(pl.String)
    absent = values.null_count() < len(values) and c.distinct > 2
    sql = f"CASE {name} WHEN {on} THEN 1 WHEN {off} THEN 0 END" if absent else f"{name} = {on}"
    share = mean((values.filter(values.is_in([yes, no])) == yes).cast(pl.Float64))
    return Label(
        c.name, "binary", sql, f"two answers; 1 is {yes!r}, {share:.2%} of them, and 0 is {no!r}{note}", (c.name,)
    )


# ------------------------------------------------------------------------------------------------------------- guessing
def guess(columns: Mapping[str, Column], user: str, item: str) -> Labels | None:
    """The labels of a table that names none, or None.

    In this order: columns called label, target or y; binary ones named like feedback; a rating; what was done; outcomes of
    other kinds; a log of users and items, whose rows are positives; the last column, as many data sets have it; an amount.

    Args:
        columns: of the table of the rows, in its order; user, item: their columns, or "".
    """
    free = [c for c in columns.values() if c.name not in (user, item) and _can_be(c)]
    ways = (_named, _flags, _rated, _acted, _outcome, _positives, _last_classes, _named_amount, _last)
    found = [replace(labels, rank=rank) for rank, way in enumerate(ways) if (labels := way(free, user, item))]
    if not found:
        return None
    first = found[0]
    sure = first.rank < ways.index(_positives)  # then the weak ways are no alternative
    seen = {label.name: label for label in first.others}
    for labels in found[1:]:
        if not labels.negatives and (not sure or labels.rank <= ways.index(_outcome)):
            for label in (*labels.tasks, *labels.others):
                seen.setdefault(label.name, label)
    tasks = {(label.name, label.columns) for label in first.tasks}
    others = [
        o for o in seen.values() if all(o.name != name and (o.columns != c or o.kind == "real") for name, c in tasks)
    ]
    return replace(first, others=tuple(others[:OTHERS]))


def _can_be(c: Column) -> bool:
    return not (
        c.nested or c.dtype.is_temporal() or c.form or c.distinct < 2 or c.names_rows and not c.dtype.is_float()
        or c.words == ["domain"] or _says_split(c)
    )  # fmt: skip


def _says_split(c: Column) -> bool:
    """Does it say train, valid and test, in some words for them?"""
    few = c.dtype == pl.String and c.distinct <= len(SPLITS)
    return few and {str(value).strip().lower() for value in c.values.drop_nulls().unique()} <= set(WORDS)


def _small(c: Column) -> bool:
    """Few classes, each with some rows, or a flag."""
    return c.distinct <= CLASSES and c.rows >= 10 * c.distinct and (not c.dtype.is_float() or _whole(c.values))


def _binary(c: Column) -> bool:
    return c.flag or _two(c) is not None


def _why(label: Label, text: str) -> Label:
    return replace(label, why=f"{text}: {label.why}")


def _named(free: Sequence[Column], user: str, item: str) -> Labels | None:
    names = {"".join(c.words) for c in free}
    mine = [c for c in free if "".join(c.words) in LABELS and (_small(c) or c.dtype.is_numeric())]
    axes, ends = {"x", "z"} & names, (free[0], free[-1]) if free else ()
    mine = [c for c in mine if not (c.words == ["y"] and axes) and (c.words != ["class"] or c in ends)]
    mine += [c for c in free if c.words[-1:] and c.words[-1] in {"label", "target"} and c not in mine and _small(c)]
    return Labels((_why(label_of(mine[0]), "named like a label"),), tuple(map(label_of, mine[1:]))) if mine else None


def _answers(c: Column) -> int:
    """Rows of the rarer answer."""
    counts = c.values.drop_nulls().value_counts()["count"].sort(descending=True)
    return int(counts[1]) * max(c.rows // max(len(c.values), 1), 1) if len(counts) > 1 else 0


def _flags(free: Sequence[Column], user: str, item: str) -> Labels | None:
    flags = [c for c in free if _binary(c) and c.named(FEEDBACK) and not ({"label", "target"} & set(c.words[-1:]))]
    flags.sort(key=lambda c: c.named(AGAINST))  # what is liked comes first: histories are of it
    most = sorted(flags, key=_answers, reverse=True)[:TASKS]
    enough = [c for c in flags if c in most and _answers(c) >= ENOUGH] or flags[:1]
    others = [_why(label_of(c), "named like feedback") for c in flags if c not in enough]
    return Labels(tuple(_why(label_of(c), "named like feedback") for c in enough), tuple(others)) if flags else None


def good_from(values: pl.Series) -> float:
    """The rating from which on it is good: 4 of 5, 8 of 10; the middle where nearly all ratings would be on one side."""
    levels = values.drop_nulls().unique().sort().to_list()
    top = float(levels[-1])
    at = next(float(v) for v in levels if float(v) >= SHARE * top)
    if 0.05 <= mean((values >= at).cast(pl.Float64)) <= 0.95:
        return at
    middle = float(values.drop_nulls().sort()[len(values.drop_nulls()) // 2])
    return middle if middle > float(levels[0]) else float(levels[1])


def _rated(free: Sequence[Column], user: str, item: str) -> Labels | None:
    named = [c for c in free if c.named(RATINGS) and c.dtype.is_numeric()]
    levels = [c for c in named if 3 <= c.values.drop_nulls().n_unique() <= LEVELS]
    rated = [c for c in levels if c.named(RATINGS - {"score", "overall"}) or user or item]
    if not rated:
        finer = [c for c in named if c.named(RATINGS - {"score", "overall"}) and c.distinct > LEVELS]
        return Labels((_why(label_of(finer[0]), "a rating"),)) if finer else None
    c = rated[0]
    at = good_from(c.values)
    name = c.source if c.sql else sql_name(c.name)
    share, top = mean((c.values >= at).cast(pl.Float64)), float(c.values.max())  # type: ignore[arg-type]
    why = f"`{c.name}` is a rating up to {top:g}: good is {at:g} or more, {share:.2%} of the rows"
    number = Label(
        c.name, "real", c.source, "or the rating itself, as a number, beside or instead of `liked`", (c.name,)
    )
    more = tuple(_why(label_of(other), "another rating") for other in rated[1:])
    return Labels((Label("liked", "binary", f"{name} >= {at:g}", why, (c.name,)),), (number, *more))


def _acted(free: Sequence[Column], user: str, item: str) -> Labels | None:
    """A column that says what was done: a task for each action that is wanted, among all rows."""
    if not item:
        return None
    for c in free:
        if c.named(ACTIONS) and c.dtype == pl.String and 2 <= c.distinct <= 12:
            counts = c.values.drop_nulls().value_counts(sort=True).rows()
            wanted = [(v, n) for v, n in counts[1:] if any(w in v.lower().replace(" ", "_") for w in WANTED)]
            tasks = [
                Label(v.strip().lower().replace(" ", "_"), "binary", f"{sql_name(c.name)} = {sql_text(v)}",
                      f"`{c.name}` says what was done: {n / len(c.values):.2%} of the rows are {v!r}", (c.name,))
                for v, n in wanted
            ]  # fmt: skip
            if tasks:
                return Labels(tuple(tasks[:TASKS]), tuple(tasks[TASKS:]))
    return None


def _outcome(free: Sequence[Column], user: str, item: str) -> Labels | None:
    mine = [c for c in free if c.named(OUTCOMES) and _binary(c)]
    mine += [c for c in free if c.named(OUTCOMES) and c not in mine and _small(c) and c.distinct <= 20]
    if not mine:
        return None
    first, *rest = (_why(label_of(c), "named like an outcome") for c in mine)
    return Labels((first,), tuple(rest))


def _positives(free: Sequence[Column], user: str, item: str) -> Labels | None:
    """Rows that only say that a user and an item met."""
    if not (user and item):
        return None
    why = f"no column is a label: each row is a 1, and {NEGATIVES} copies with other items are 0s (`data.negatives`)"
    return Labels((Label("label", "binary", "label", why, ()),), negatives=True)


def _last_classes(free: Sequence[Column], user: str, item: str) -> Labels | None:
    """The last column, if it has classes; else the last of two answers that is not about a person."""
    small = [c for c in free if _small(c) and (_binary(c) or c.distinct <= 20)]
    flags = [c for c in small if _binary(c) and not c.named(FLAGS | PEOPLE)]
    last = free[-1] if free and free[-1] in small and not free[-1].named(PEOPLE) else None
    chosen = last or (flags[-1] if flags and not free[-1].dtype.is_float() else None)
    if chosen is None:
        return None
    place = "the last column" if chosen is free[-1] else "the last column of two answers"
    others = dict.fromkeys(c for c in (free[0], *reversed(flags)) if c is not chosen and _binary(c))
    return Labels(
        (_why(label_of(chosen), f"no column is named like a label; this is {place}"),), tuple(map(label_of, others))
    )


def _numbers(free: Sequence[Column]) -> list[Column]:
    return [c for c in free if c.dtype.is_numeric() and not _binary(c) and c.distinct > 10]


def _named_amount(free: Sequence[Column], user: str, item: str) -> Labels | None:
    named = [c for c in _numbers(free) if c.named(AMOUNTS)]
    if not named:
        return None
    return Labels((_why(label_of(named[-1]), "named like an amount"),), tuple(map(label_of, named[-2::-1])))


def _last(free: Sequence[Column], user: str, item: str) -> Labels | None:
    numbers = _numbers(free)
    why = "no column is named like a label; this is the last number"
    return Labels((_why(label_of(numbers[-1]), why),), tuple(map(label_of, numbers[-2:-4:-1]))) if numbers else None
