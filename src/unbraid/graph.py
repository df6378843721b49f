"""A trained model as a function from named tensors to probabilities, of steps that do not depend on what is in the tensors.

That is what graph formats hold: `unbraid.export` writes it.  Its inputs are an encoded batch (`unbraid.types.Batch`) taken apart:

====================  ============================================  ================================================
input                 of                                            what
====================  ============================================  ================================================
``NAME``              a feature of kind ``id``                      (rows,) int64 codes
``NAME``              a feature of kind ``number``                  (rows, 2) float32: standardised value, is missing
``NAME.exact``        the same, where its encoder reads it          (rows, 1) float64: the value after its transform
``NAME``              a feature of kind ``vector``                  (rows, D) float32
``NAME.values``       a feature of kind ``bag``                     (values,) int64 codes of all rows end to end
``NAME.lengths``      the same                                      (rows,) int64, how many are whose
``NAME.values.FIELD`` a history, for each of its event fields       (events,) int64 codes of all rows end to end
``NAME.lengths``      the same                                      (rows,) int64
``row.domain``        where the model tells domains apart           (rows,) int64 codes
====================  ============================================  ================================================

Lists stay packed, as everywhere in the library: padding would be computed, and a padded history of the longest user is paid by
all others.  They come with lengths and not with offsets, since their first dimension is then that of all other inputs: a graph
needs two free sizes, rows and values, and no relation between them.

Calibrators are part of the graph: all maps that there are (`unbraid.calibration.maps`) are made of sums and comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.calibration.kept import Calibrators
from unbraid.calibration.maps import Affine, Curves, Linear
from unbraid.encoders.packed import Listed
from unbraid.types import EXACT, FIRST_VALUE, Batch, Ragged, Schema

DOMAIN = "row.domain"  # no feature and no history has a dot in its name, and these have other parts
PREDICTED = "predicted_"  # before a task's name: its output, as the command line calls the column


@dataclass(frozen=True)
class Input:
    """One input of the graph.

    Args:
        name: see the module's docstring; dtype: of NumPy.
        first: what its first dimension counts: ``rows``, or the values of a list, ``NAME.values``.
        rest: its further dimensions.
        codes: for ids how many there are, else 0.
        optional: left out of the graph if nothing reads it.
    """

    name: str
    dtype: str
    first: str = "rows"
    rest: tuple[int, ...] = ()
    codes: int = 0
    optional: bool = False


def inputs_of(schema: Schema) -> list[Input]:
    """All inputs that a model of this schema may have."""
    found: list[Input] = []
    for f in schema.features:
        if f.kind == "id":
            found.append(Input(f.name, "int64", codes=schema.sizes[f.vocab]))
        elif f.kind == "number":
            found += [Input(f.name, "float32", rest=(2,)), Input(f.name + EXACT, "float64", rest=(1,), optional=True)]
        elif f.kind == "vector":
            found.append(Input(f.name, "float32", rest=(schema.widths[f.name],)))
        elif f.kind == "bag":
            values = f"{f.name}.values"
            found += [Input(values, "int64", values, codes=schema.sizes[f.vocab]), Input(f"{f.name}.lengths", "int64")]
    for history in schema.histories:
        values = f"{history.name}.values"
        for name in history.fields:
            size = schema.sizes[schema.field_vocabulary(name)]
            found.append(Input(f"{values}.{name}", "int64", values, codes=size))
        found.append(Input(f"{history.name}.lengths", "int64"))
    return [*found, Input(DOMAIN, "int64", codes=len(schema.domains), optional=True)]


def taken_apart(batch: Batch, schema: Schema) -> dict[str, Tensor]:
    """All inputs of an encoded batch."""
    bags = {f.name for f in schema.features if f.kind == "bag"}
    found: dict[str, Tensor] = {DOMAIN: batch.domain}
    for name, value in batch.features.items():
        if isinstance(value, Ragged):
            parts = value.values.items()
            found |= {f"{name}.values" if name in bags else f"{name}.values.{part}": codes for part, codes in parts}
            found[f"{name}.lengths"] = value.lengths
        elif isinstance(value, Tensor):
            found[name] = value
    return found


def drawn(inputs: list[Input], rows: int, longest: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of no log: valid codes, normal numbers, lists of up to ``longest`` values."""
    draw = torch.Generator().manual_seed(seed)
    lengths = {
        each.first: torch.randint(longest + 1, (rows,), generator=draw) for each in inputs if each.first != "rows"
    }
    found = {}
    for each in inputs:
        count = rows if each.first == "rows" else int(lengths[each.first].sum())
        if each.name.endswith(".lengths"):
            found[each.name] = lengths[each.name.removesuffix("lengths") + "values"]
        elif each.codes:
            found[each.name] = torch.randint(each.codes, (count,), generator=draw)
        else:
            dtype = getattr(torch, each.dtype)
            found[each.name] = torch.randn(count, *each.rest, generator=draw, dtype=torch.float64).to(dtype)
    for each in inputs:
        if each.name + EXACT in found or each.rest == (2,):  # whether a number is missing is 0 or 1
            found[each.name][:, 1] = (found[each.name][:, 1] > 1).float()
    return found


class Graph(nn.Module):
    """Inputs -> ``predicted_TASK`` -> (rows,) probabilities, (rows, K) of a multiclass task, (rows,) values of a real one.

    Args:
        model: a trained one, whose module holds the weights; schema: what it reads and predicts.
        calibrators: of the bundle, or None.
    """

    def __init__(self, model: nn.Module, schema: Schema, calibrators: Calibrators | None = None) -> None:
        super().__init__()
        self.model, self.schema, self.calibrators = model.eval(), schema, calibrators

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class' docstring."""
        batch = self.batch(inputs)
        logits = self.model(batch).logits
        found = {}
        for task in self.schema.tasks:
            z = self._calibrated(task.name, logits[task.name], batch.domain)
            if task.kind == "binary":
                z = z.sigmoid()
            elif task.kind == "multiclass":
                z = z.softmax(1)
            found[PREDICTED + task.name] = z.float()
        return found

    def batch(self, inputs: Mapping[str, Tensor], lists: Callable[..., Ragged] = Listed.end_to_end) -> Batch:
        """What the model reads, put together again; ``lists``: (values, lengths) -> a list feature."""
        features: dict[str, Any] = {}
        for f in self.schema.features:
            if f.kind == "bag":
                features[f.name] = lists({f.name: inputs[f"{f.name}.values"]}, inputs[f"{f.name}.lengths"])
            else:
                features[f.name] = inputs[f.name]
            if f.name + EXACT in inputs:
                features[f.name + EXACT] = inputs[f.name + EXACT]
        for history in self.schema.histories:
            values = {name: inputs[f"{history.name}.values.{name}"] for name in history.fields}
            features[history.name] = lists(values, inputs[f"{history.name}.lengths"])
        rows = torch.arange(next(inputs[each.name].shape[0] for each in inputs_of(self.schema) if each.first == "rows"))
        return Batch(
            features=features,
            labels={task.name: torch.zeros_like(rows) for task in self.schema.tasks},
            observed={task.name: torch.zeros_like(rows, dtype=torch.bool) for task in self.schema.tasks},
            domain=inputs.get(DOMAIN, torch.full_like(rows, FIRST_VALUE)),
            weight=None, row=rows, view=torch.zeros_like(rows, dtype=torch.int8), pair=torch.full_like(rows, -1),
        )  # fmt: skip

    def _calibrated(self, task: str, logits: Tensor, domain: Tensor) -> Tensor:
        """As `unbraid.calibration.kept.Calibrators.logits`."""
        kept = [one for one in self.calibrators.kept if one.task == task] if self.calibrators is not None else []
        found = logits
        for one in sorted(kept, key=lambda one: bool(one.domain)):
            new = mapped(one.calibration.map, logits.double())
            if one.domain:
                mine = (domain == self.schema.domains.index(one.domain)).view(-1, *[1] * (new.dim() - 1))
                new = torch.where(mine, new, found.double())
            found = new
        return found


def mapped(by: Affine | Linear | Curves, z: Tensor) -> Tensor:
    """The map of calibrated logits on tensors: (N,) or (N, K) float64, of one shape."""
    if isinstance(by, Affine):
        return by.slope * z + by.intercept
    if isinstance(by, Linear):
        return z @ torch.tensor(by.weight).T + torch.tensor(by.bias)
    if len(by.scores) == 1:
        p = _curve(by, 0, z)
        return p.log() - (1 - p).log()
    log_p = z.log_softmax(1)
    against = log_p - (1 - log_p.exp()).clamp(min=torch.finfo(torch.float64).tiny).log()
    p = torch.stack([_curve(by, k, against[:, k]) for k in range(len(by.scores))], 1)
    return (p / p.sum(1, keepdim=True)).log()


def _curve(by: Curves, k: int, score: Tensor) -> Tensor:
    """(N,) values of one curve."""
    places, values = (torch.tensor(of[k], dtype=torch.float64) for of in (by.scores, by.values))
    last = len(places) - 1
    above = (places <= score.unsqueeze(1)).sum(1)
    low = (above - 1).clamp(0, last)
    if not by.smooth:
        return values[low]
    high = above.clamp(0, last)
    width = torch.where(high > low, places[high] - places[low], 1.0)
    share = ((score - places[low]) / width).clamp(0, 1)
    return values[low] + (values[high] - values[low]) * torch.where(high > low, share, 0.0)
