"""Check: how many rows hold ids that training never saw, and does the model lean on them?

Per id and bag feature, of validation and of test rows (no label is read):

    unseen   mean over rows of [the id is not in the vocabulary]; of a bag the share of its ids that are not (an empty bag: 0)

with a 95 % interval over users.  Not in the vocabulary is what the training split has fewer than `min_count` times.  High in
test and low in validation: values drift.  High in both: values are too new or too rare for a table of one vector each.

What it costs is not known without the values.  What can be measured is how far the model's logits move when values that it
*does* know are hidden, on validation rows (on training rows if these hold next to none that it knows):

    reliance   mean |z(hidden) - z| / sd(z), the largest over target tasks

A feature on which the model does not lean (below `LEANS`) is never more than mild: its `severe` is out of reach (`aloof`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from unbraid.bundle import EVALUATION_ROWS
from unbraid.config import Run
from unbraid.diagnosis.case import Case, interval, without_feature
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, NotApplicable, Remedy
from unbraid.diagnosis.plots import Bars
from unbraid.train import predict
from unbraid.types import FIRST_VALUE, UNKNOWN, Batch, Feature, Ragged

Array = np.ndarray
Estimate = tuple[float, float, float]  # value, and the ends of its interval

LEANS = 0.1  # of a logit's standard deviation
HIDDEN_ROWS = 2_000  # in which values are hidden
LEAST_KNOWN = 100  # rows with known values, to hide them in
HARDLY = 0.8  # of test rows: with more that are unseen, a feature can be left out
UNTRAINED = 0.001  # of training rows: with fewer that are unknown, the row for unknown ids has learned nothing
MOST = 20
SPLITS = {"train": "training", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Unseen:
    """Ids of test rows that training never saw.

    Args:
        usual, severe: shares of test rows; aloof: `severe` of a feature that the model does not lean on: all rows unseen are then
            just below moderate.
    """

    name: ClassVar[str] = "unseen"
    title: ClassVar[str] = "How many test rows hold ids that training never saw?"
    page: ClassVar[str] = "diagnosis.md#unseen-values"
    usual: float = 0.05
    severe: float = 0.8
    aloof: float = 2.0

    def __call__(self, case: Case) -> list[Diagnosis]:
        """Worst first.  Raises NotApplicable: there is no id, or no test row."""
        features = [f for f in case.schema.features if f.kind in ("id", "bag")]
        if not features or not len(case.sample("test")):
            raise NotApplicable("there is no feature of kind `id` or `bag`, or no test row")
        found = [
            Found(f, {split: share(case, f, split) for split in SPLITS if len(case.sample(split))}) for f in features
        ]
        found = sorted(found, key=lambda each: -each.value)[:MOST]
        found = [each for each in found if each.value > 0] or found[:1]
        made = [self._diagnosis(case, each, (_plot(found),) * (not place)) for place, each in enumerate(found)]
        return sorted(made, key=lambda one: (-one.severity, -one.value))

    def _diagnosis(self, case: Case, found: Found, plots: tuple[Bars, ...]) -> Diagnosis:
        value, low, high = found.shares["test"]
        much = low > self.usual
        leans = reliance(case, found.feature) if much else None
        severe = self.severe if leans is not None and leans >= LEANS else self.aloof
        return Diagnosis(
            self.name, found.feature.name, value, self.usual, severe, _reading(case, found, leans, much),
            unit="share of test rows", low=low, high=high, remedies=tuple(_remedies(case, found)) if much else (), page=self.page,
            evidence={
                **{f"unseen in {SPLITS[split]} rows": each[0] for split, each in found.shares.items()},
                "reliance": leans, "values known": known_values(case, found.feature), "plots": plots,
            },
        )  # fmt: skip


class Found(NamedTuple):
    """A feature and, by split, its share of unseen values."""

    feature: Feature
    shares: dict[str, Estimate]

    @property
    def value(self) -> float:
        """Of test rows."""
        return self.shares["test"][0]

    @property
    def drifts(self) -> bool:
        """Is it surely more in test than in validation rows, and half as much again?"""
        if "valid" not in self.shares:
            return False
        (test, low, _), (valid, _, high) = self.shares["test"], self.shares["valid"]
        return low > high and test > 1.5 * valid


# ------------------------------------------------------------------------------------------------------------------ shares
def share(case: Case, feature: Feature, split: str) -> Estimate:
    """Mean over the sample of a split, and its interval over users."""
    rows = case.sample(split)
    parts = unseen(case, feature, rows)
    users = case.column("user", split)
    low, high = interval(float(parts.mean()), parts, rows if users is None else users)
    return float(parts.mean()), max(0.0, low), min(1.0, high)


def unseen(case: Case, feature: Feature, rows: Array) -> Array:
    """(n,) is the row's id unknown to the vocabulary; of a bag, the share of its ids."""
    column = case.encoded.columns[f"feature.{feature.name}"]
    if feature.kind == "id":
        return unknown(case, feature, column[rows]) + 0.0
    at, owner, size = places_of_bags(case, feature, rows)
    hits = np.bincount(owner, unknown(case, feature, column[at]), len(rows))
    return hits / np.maximum(size, 1)


def known_values(case: Case, feature: Feature) -> int:
    """How many values the feature's vocabulary holds."""
    return len(case.bundle.fitted.vocabularies[feature.vocab].values)


def unknown(case: Case, feature: Feature, codes: Array) -> Array:
    """(N,) codes of values that the vocabulary does not hold: row 0, and hash buckets."""
    return np.asarray((codes == UNKNOWN) | (codes >= FIRST_VALUE + known_values(case, feature)))


def places_of_bags(case: Case, feature: Feature, rows: Array) -> tuple[Array, Array, Array]:
    """(N,) places of the rows' ids in a bag's column, (N,) whose they are, and (n,) how many each row has."""
    starts, stops = (case.encoded.offsets[feature.name][rows + end] for end in (0, 1))
    size = stops - starts
    owner = np.repeat(np.arange(len(rows)), size)
    return np.arange(len(owner)) + np.repeat(starts - (np.cumsum(size) - size), size), owner, size


# ---------------------------------------------------------------------------------------------------------------- reliance
def reliance(case: Case, feature: Feature) -> float | None:
    """How far logits move when values that the model knows are hidden; None where it knows next to none."""
    for split in ("valid", "train"):  # where no validation row has a known value, training rows do
        rows = case.sample(split)
        rows = rows[unseen(case, feature, rows) == 0][:HIDDEN_ROWS] if len(rows) else rows
        if len(rows) >= LEAST_KNOWN:
            break
    else:
        return None
    seen, hidden = (predict(case.model, _batches(case, rows, name), case.schema).logits for name in ("", feature.name))
    moved = []
    for task in case.targets:
        before = np.asarray(seen[task.name], np.float64)
        spread = float(before.std(0).mean())
        if spread > 0:
            moved.append(float(np.abs(hidden[task.name] - before).mean()) / spread)
    return max(moved, default=None)


def _batches(case: Case, rows: Array, hide: str) -> Iterator[Batch]:
    """The rows, with every id of one feature unknown."""
    for batch in case.encoded.in_order(rows, min(EVALUATION_ROWS, case.encoded.most)):
        if hide:
            values = batch.features[hide]
            none = (
                Ragged({name: torch.zeros_like(ids) for name, ids in values.values.items()}, values.offsets)
                if isinstance(values, Ragged)
                else torch.zeros_like(values)
            )
            batch = replace(batch, features={**batch.features, hide: none})
        yield batch


# ------------------------------------------------------------------------------------------------------- words and remedies
def _reading(case: Case, found: Found, leans: float | None, much: bool) -> str:
    of = {split: f"{each[0]:.1%} of {SPLITS[split]} rows" for split, each in found.shares.items()}
    what = "of the ids, a row's share averaged over rows," if found.feature.kind == "bag" else "the value"
    said = f"`{found.feature.name}`: in {of.pop('test')} {what} training never saw"
    train = of.pop("train", "")
    said += f" (in {', '.join(of.values())})" if of else ""
    if not much:
        return f"{said}."
    said += ": values drift" if found.drifts else ": they are new or rare in every split"
    if leans is not None:
        said += f"; hiding those it knows moves the logits by {leans:.2f} of their spread"
    if _untrained(case, found):
        said += "; no training row had an unknown one, so the vector for them has learned nothing"
    elif train:
        said += f"; training had unknown ones in {train}"
    return f"{said}."


def _untrained(case: Case, found: Found) -> bool:
    train = found.shares.get("train", (1.0, 1.0, 1.0))[0]
    return train < UNTRAINED and not case.run.model.tables.unknown_rate


def _remedies(case: Case, found: Found) -> Iterator[Remedy]:
    name, run = found.feature.name, case.run
    lead = case.targets[0] if case.targets else None
    measure = Measure.of(case.schema, lead.name) if lead else None
    others = tuple(each for each in run.data.features if each.name != name)
    if found.value >= HARDLY and others:
        text = f"Leave `{name}` out: next to no row that is predicted has a value that training saw."
        changed = without_feature(run, name)
        yield Remedy(f"without_{name}", text, "data.features", changed, measure=measure, page="run-file.md")
    if not found.feature.buckets:
        size = 2 ** int(np.clip(np.log2(max(1, known_values(case, found.feature)) / 8), 4, 14))
        text = (
            f"Give unknown values of `{name}` {size:,} vectors by hash instead of one, and let values that training saw once "
            "teach them (`min_count`)."
        )
        changed = with_buckets(run, name, size)
        yield Remedy(f"buckets_{name}", text, "data.features", changed, measure=measure, page="run-file.md")
    if _untrained(case, found):
        tables = replace(run.model.tables, unknown_rate=0.05)
        text = "Read one id of twenty as unknown while training, so that the vector for unknown ids learns from them."
        changed = replace(run, name=f"{run.name}_unknown_rate", model=replace(run.model, tables=tables))
        yield Remedy("unknown_rate", text, "model.tables.unknown_rate", changed, measure=measure, page="run-file.md")


def with_buckets(run: Run, name: str, size: int) -> Run:
    """The run with hash buckets for a feature, which rows with rare values train: without such rows nothing would."""
    features = tuple(
        replace(each, buckets=size, min_count=max(2, each.min_count)) if each.name == name else each
        for each in run.data.features
    )
    return replace(run, name=f"{run.name}_buckets_{name}", data=replace(run.data, features=features))


def _plot(found: list[Found]) -> Bars:
    shown = [
        (f"{each.feature.name}, {SPLITS[split]}", *ends) for each in found[:8] for split, ends in each.shares.items()
    ]
    names, value, low, high = zip(*shown, strict=True)
    note = "Values that are not in the vocabulary, of the features that have most in the test rows."
    return Bars(
        "Values that training never saw", "share of rows", names, value, low, high, x="feature and rows", note=note
    )
