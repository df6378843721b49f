"""Check: are rows there twice, within the training split or in two splits?

Two rows are copies if user, time, domain, all features as the model reads them (numbers exactly, lists of ids in any order,
pictures and texts by their bytes) and all labels are equal; of test rows labels are not read.  A copy among the training rows
counts double; one in two splits makes validation and test metrics tell what the model remembers.

    value    share of the split's rows that equal an earlier training row (of training rows: an earlier one of their own)

What looks alike need not be a copy:

- Rows with an id that the vocabulary does not know are left out: two unknown ids are equal to the model and not in the log.
- Rows equal but for their time are repeats (a user sees an item again), counted beside and never held against the log.
- Without a time, and without a number that is not whole, a vector, a picture or a text, equal rows can be two events or two
  people.  `usual` and `severe` are then higher (`alike`).
- A split by time puts no two rows of one time into two splits, so that only training rows are looked at.

Sampling rows would part copies from each other.  Users are drawn instead (without users, times or keys) by a hash, with all
their rows in all splits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import polars as pl

from unbraid.data.contents import Contents
from unbraid.data.vocabulary import stable_hash
from unbraid.diagnosis.case import Case, interval
from unbraid.diagnosis.diagnosis import Diagnosis, NotApplicable, Remedy
from unbraid.diagnosis.plots import Bars
from unbraid.diagnosis.unseen import places_of_bags, unknown
from unbraid.types import Feature

Array = np.ndarray

SPLITS = ("train", "valid", "test")
WORDS = {"train": "training rows", "valid": "validation rows", "test": "test rows"}


@dataclass(frozen=True)
class Copies:
    """Rows that are there twice, and rows of validation and test that training has seen.

    Args:
        copies, leaked: usual and severe of training rows, and of validation and test rows; alike: of all, where equal rows may be
            no copies.
        least: rows of a split that can be compared.
    """

    name: ClassVar[str] = "duplicates"
    title: ClassVar[str] = "Are rows there twice, and has training seen rows that it is judged by?"
    page: ClassVar[str] = "diagnosis.md#duplicates"
    copies: tuple[float, float] = (0.01, 0.2)
    leaked: tuple[float, float] = (0.005, 0.1)
    alike: tuple[float, float] = (0.05, 0.6)
    least: int = 50

    def __call__(self, case: Case) -> list[Diagnosis]:
        """Worst first.  Raises NotApplicable where too few rows can be compared."""
        rows = drawn(case)
        known = {split: rows[split][comparable(case, rows[split])] for split in SPLITS}
        if len(known["train"]) < self.least:
            found = f"{len(known['train']):,} of {len(rows['train']):,} training rows"
            raise NotApplicable(f"fewer than {self.least} training rows have all ids in the vocabulary ({found})")
        splits = ("train",) if case.run.data.split.kind == "time" else SPLITS
        counts = [count(case, known, split) for split in splits if len(known[split]) >= self.least]
        plot = shares(counts)
        made = [self._diagnosis(case, each, (plot,)) for each in counts]
        return sorted(made, key=lambda one: (-one.severity, -one.value))

    def _diagnosis(self, case: Case, each: Count, plots: tuple[Bars, ...]) -> Diagnosis:
        levels = (self.copies if each.split == "train" else self.leaked) if tells_apart(case) else self.alike
        n, of = each.copies, "an earlier row" if each.split == "train" else "a training row"
        what = "in user, features and labels" if each.split != "test" else "in user and features"
        reading = f"{n:,} of {each.rows:,} {WORDS[each.split]} ({each.value:.2%}) equal {of} {what}"
        harm = {
            "train": "they count double in the losses",
            "valid": "validation metrics, and what was chosen by them, are too good",
            "test": "test metrics are too good",
        }[each.split]
        doubt = "" if tells_apart(case) else "; without a time some of them may be two events that look alike"
        return Diagnosis(
            self.name, WORDS[each.split], each.value, *levels,
            f"{reading}: {harm}{doubt}." if each.low > levels[0] else f"{reading}.",
            unit="share of rows", low=each.low, high=each.high, remedies=(_remedy(case),) if n else (), page=self.page,
            evidence={
                "copies": n, "rows": each.rows, "equal but for their time": each.repeats,
                "examples": each.examples, "plots": plots,
            },
        )  # fmt: skip


def _remedy(case: Case) -> Remedy:
    data = case.run.data
    if not data.drop_duplicates:
        text = "Drop rows that equal an earlier row in every column of the table. Metrics are of other rows afterwards."
        run = replace(case.run, name=f"{case.run.name}_drop_duplicates", data=replace(data, drop_duplicates=True))
        return Remedy("drop_duplicates", text, slot="data.drop_duplicates", run=run, page="run-file.md")
    text = (
        "`data.drop_duplicates` is on, so these differ in a column that the model does not read: find it by the example rows, "
        "and drop them where the table is made, or by `data.keep`."
    )
    return Remedy("look", text, slot="data.keep", page="run-file.md")


# ------------------------------------------------------------------------------------------------------------------ counts
class Count(NamedTuple):
    """What was found in one split.  ``examples``: (row, the earlier row), numbers in the encoded table."""

    split: str
    rows: int
    copies: int
    value: float
    low: float
    high: float
    repeats: float
    examples: tuple[tuple[int, int], ...]


def count(case: Case, rows: dict[str, Array], split: str) -> Count:
    """Compare the rows of a split with the training rows, or these with each other."""
    own, seen = rows[split], rows["train"]
    first = earlier(keys(case, own, split != "test"), None if split == "train" else keys(case, seen, split != "test"))
    again = first
    if "time" in case.encoded.columns:
        timeless = [keys(case, each, split != "test", time=False) for each in (own, seen)]
        again = earlier(timeless[0], None if split == "train" else timeless[1])
    copy = first >= 0
    user = np.asarray(case.encoded.columns["user"][own]) if "user" in case.encoded.columns else own
    low, high = interval(float(copy.mean()), copy + 0.0, user)
    at = np.flatnonzero(copy)[:5]
    examples = tuple((int(own[i]), int(seen[first[i]])) for i in at)
    repeats = float((again >= 0).mean() - copy.mean())
    return Count(split, len(own), int(copy.sum()), float(copy.mean()), max(0.0, low), min(1.0, high), repeats, examples)


def earlier(own: Array, seen: Array | None) -> Array:
    """(n,) index of the first equal key among ``seen`` (m,), -1 if there is none; None: among earlier ones of its own."""
    values, first = np.unique(own if seen is None else seen, return_index=True)
    if not len(values):
        return np.full(len(own), -1)
    place = np.searchsorted(values, own).clip(max=len(values) - 1)
    found = np.where(values[place] == own, first[place], -1)
    return np.where(found == np.arange(len(own)), -1, found) if seen is None else found


def keys(case: Case, rows: Array, labels: bool, time: bool = True) -> Array:
    """(n,) uint64 hash of what makes rows copies.  Two of a million different rows collide once in 40 million logs."""
    columns, frame = case.encoded.columns, dict[str, pl.Series]()
    for name in ("user", "domain", *(["time"] if time else [])):
        if name in columns:
            frame[name] = pl.Series(columns[name][rows])
    for feature in case.schema.features:
        frame[f"feature.{feature.name}"] = _values(case, feature, rows)
    for task in case.schema.tasks if labels else ():
        frame[f"label.{task.name}"] = pl.Series(columns[f"label.{task.name}"][rows])
    return pl.DataFrame(frame).hash_rows(0).to_numpy()


def _values(case: Case, feature: Feature, rows: Array) -> pl.Series:
    """(n,) what the model reads of a feature, in a form that can be compared."""
    column = case.encoded.columns[f"feature.{feature.name}"]
    if feature.kind == "bag":
        at, owner, size = places_of_bags(case, feature, rows)
        with np.errstate(over="ignore"):  # a sum of hashes is the same in any order
            hashed = stable_hash(pl.Series(np.asarray(column[at]).astype(np.int64)))
            total = np.zeros(len(rows), np.uint64)
            np.add.at(total, owner, hashed)
            return pl.Series(total + size.astype(np.uint64))
    if feature.has_content:
        return pl.Series(_digests(case.encoded.contents[feature.name])[column[rows]])
    return pl.Series(np.asarray(column[rows]) + 0)  # makes -0.0 0.0


@lru_cache(maxsize=4)
def _digests(contents: Contents) -> Array:
    """(M,) uint64 of each content's bytes: every file is looked at, so once is enough."""
    return np.array([int.from_bytes(each[:8], "little") for each in contents.digests()], np.uint64)


# --------------------------------------------------------------------------------------------------------------- which rows
def drawn(case: Case) -> dict[str, Array]:
    """split -> (n,) ascending row numbers of all rows of some users: all, if no split has more than ``case.rows`` rows."""
    rows = {split: case.encoded.split(split) for split in SPLITS}
    share = case.rows / max(1, *map(len, rows.values()))
    if share >= 1:
        return rows
    by = case.encoded.columns.get("user", case.encoded.columns.get("time"))
    found = {}
    for split, own in rows.items():
        # without users and times, rows are drawn by all that test rows may be compared in
        asked = keys(case, own, labels=False).view(np.int64) if by is None else np.asarray(by[own])
        hashed = stable_hash(pl.Series(asked.astype(np.int64)), seed=case.seed)
        found[split] = own[hashed < np.uint64(share * 2**64)]
    return found


def comparable(case: Case, rows: Array) -> Array:
    """(n,) rows whose ids are all known, as far as the vocabularies go."""
    good = np.full(len(rows), True)
    for feature in (f for f in case.schema.features if f.kind in ("id", "bag")):
        column = case.encoded.columns[f"feature.{feature.name}"]
        if feature.kind == "id":
            good &= ~unknown(case, feature, column[rows])
        else:
            at, owner, _ = places_of_bags(case, feature, rows)
            good[owner[unknown(case, feature, column[at])]] = False
    return good


def tells_apart(case: Case) -> bool:
    """Can two different events hardly be equal?"""
    numbers = [f for f in case.schema.features if f.kind == "number" and f.transform == "none"]
    exact = [
        f for f in numbers if not case.schema.whole.get(f.name, True)
    ]  # a logarithm of a whole number is not whole
    rich = [f for f in case.schema.features if f.has_content or f.kind == "vector"]
    return "time" in case.encoded.columns or bool(exact or rich)


def shares(counts: list[Count]) -> Bars:
    """Copies by split."""
    return Bars(
        "Rows that training has, too", "share of rows", tuple(WORDS[each.split] for each in counts),
        tuple(each.value for each in counts), tuple(each.low for each in counts), tuple(each.high for each in counts), x="split",
        note="Of training rows: those that equal an earlier one.",
    )  # fmt: skip
