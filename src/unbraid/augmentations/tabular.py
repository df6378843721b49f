"""Views of a table's rows: features that go missing, histories cut short, noise.

Self-training compares what a model says of a row with what it says of the same row under a strong change, as pictures are
turned and cut.  A table's row has no such change that everyone agrees on.  The ones here imitate what happens to real rows:
a value that was not logged, a user of whom less is known yet, a measurement with noise.

- *Missing*: each feature of each row, with a chance of its own, becomes what a null is: the id *missing*, a missing
  number, an empty bag, a vector of zeros.  Dropping features is known from VIME ("VIME: Extending the Success of Self-
  and Semi-supervised Learning to Tabular Domain", Yoon, Zhang, Jordon, van der Schaar, NeurIPS 2020), which draws
  other rows' values in their place; a null is simpler and cannot make a row of two rows.
- *History*: a row keeps a newest part of each history, whose share is drawn between the given one and 1 and whose length is
  rounded up: what would have been known of the user if the log had begun later.
- *Noise*: normal, on numbers in standard deviations of the training split (missing ones stay missing) and on vectors in
  their own unit.  *Values*: each element of a vector becomes 0 with this chance.

Numbers read through encoders that use the unrounded value (`Batch` features ``NAME.exact``) get their noise there, too, and
which numbers are whole no longer holds for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unbraid import parallel
from unbraid.types import EXACT, FORBID, MISSING, Batch, Feature, Ragged, Schema


@dataclass(frozen=True)
class Change:
    """What one view does to a row.

    Args:
        features: chance of each feature to be missing; history: least share of each history that stays, in (0, 1];
        noise: standard deviation of what is added to numbers and vectors; values: chance of a vector's element to be 0.

    Raises:
        ValueError: a chance is not in [0, 1), a share not in (0, 1], or the noise is negative.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    features: float = 0.0
    history: float = 1.0
    noise: float = 0.0
    values: float = 0.0

    def __post_init__(self) -> None:
        for name in ("features", "values"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Parameter `{name}` should be in [0, 1). Found {getattr(self, name)}.")
        if not 0 < self.history <= 1:
            raise ValueError(f"Parameter `history` should be in (0, 1]. Found {self.history}.")
        if not self.noise >= 0:
            raise ValueError(f"Parameter `noise` should not be negative. Found {self.noise}.")


@dataclass(frozen=True)
class Tabular:
    """Views by missing features, shorter histories and noise.

    Args:
        weak, strong: what each view changes; of: which rows get a strong view beside the weak one: those without a label in the
            batch, or all.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["tabular"] = field(default="tabular", kw_only=True)
    weak: Change = Change()
    strong: Change = Change(features=0.2, history=0.5)
    of: Literal["unlabelled", "all"] = "unlabelled"

    def bind(self, data: Any) -> Callable[[Batch, bool, int], Batch]:
        """See `unbraid.slots.Augmentation`."""
        schema: Schema = data.schema

        def view(batch: Batch, strong: bool, seed: int) -> Batch:
            # processes see other rows, whose changes should not be alike
            draw = torch.Generator().manual_seed(seed + parallel.rank())
            return changed(batch, self.strong if strong else self.weak, schema, draw)

        return view


def changed(batch: Batch, change: Change, schema: Schema, generator: torch.Generator) -> Batch:
    """The batch (on the CPU) as one view shows it."""
    features = dict(batch.features)
    for f in schema.features:
        features |= _feature(f, features, change, schema, generator)
    if change.history < 1:
        for history in schema.histories:
            packed = features[history.name]
            assert isinstance(packed, Ragged)
            features[history.name] = newest(packed, change.history, generator)
    return Batch(**{**vars(batch), "features": features})


def _feature(
    f: Feature, features: dict[str, Tensor | Ragged], change: Change, schema: Schema, generator: torch.Generator
) -> dict[str, Tensor | Ragged]:
    """A feature's changed entries among a batch's features."""
    value = features[f.name]
    gone = torch.rand(len(value), generator=generator) < change.features
    if isinstance(value, Ragged):
        return {f.name: _emptied(value, gone)}
    if f.kind == "id":
        return {f.name: torch.where(gone, MISSING, value)}
    if f.kind == "number":
        return _number(f, value, features[f.name + EXACT], gone, change.noise, schema, generator)  # type: ignore[arg-type]
    if f.kind != "vector":  # views of pictures are another member's
        return {}
    if change.noise:
        value = value + change.noise * torch.randn(value.shape, generator=generator)
    if change.values:
        value = value * (torch.rand(value.shape, generator=generator) >= change.values)
    return {f.name: value.masked_fill(gone[:, None], 0.0)}


def _number(
    f: Feature, value: Tensor, exact: Tensor, gone: Tensor, noise: float, schema: Schema, generator: torch.Generator
) -> dict[str, Tensor | Ragged]:
    """(B, 2) standardised value and missing, and the (B, 1) unrounded value."""
    missing = gone | (value[:, 1] > 0)
    moved = noise * torch.randn(len(value), generator=generator) if noise else torch.zeros(len(value))
    shown = torch.where(missing, 0.0, value[:, 0] + moved)
    plain = exact[:, 0] + moved.double() * schema.numbers[f.name][1]
    return {
        f.name: torch.stack([shown, missing.to(value.dtype)], 1),
        f.name + EXACT: torch.where(missing, 0.0, plain)[:, None],
    }


def _emptied(packed: Ragged, gone: Tensor) -> Ragged:
    """The lists, those of ``gone`` rows empty."""
    keep = ~gone[packed.rows]
    lengths = packed.lengths.masked_fill(gone, 0)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Ragged({name: values[keep] for name, values in packed.values.items()}, offsets)


def newest(packed: Ragged, least: float, generator: torch.Generator) -> Ragged:
    """Of each list a last part, whose share of the list is uniform between ``least`` and 1 and whose length is rounded up."""
    share = least + (1 - least) * torch.rand(len(packed), generator=generator)
    lengths = (packed.lengths * share).ceil().long()
    place = torch.arange(len(packed.rows)) - packed.offsets[:-1][packed.rows]
    keep = place >= (packed.lengths - lengths)[packed.rows]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Ragged({name: values[keep] for name, values in packed.values.items()}, offsets)
