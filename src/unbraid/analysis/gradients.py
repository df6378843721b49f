"""Do attention and representation fight over a shared embedding table?  Both gradients, while TWIN trains.

Paper: Ningya Feng, Junwei Pan, Jialong Wu, Baixu Chen, Ximei Wang, Qian Li, Xian Hu, Jie Jiang, Mingsheng Long:
*Long-Sequence Recommendation Models Need Decoupled Embeddings*.  ICLR 2025, https://arxiv.org/abs/2410.02604.

Idea.  In TWIN one table finds and weighs events and represents them, and backpropagation hands out the sum of both gradients.
Give the model two tables that start equal, as DARE has; after each backward pass read both gradients, put their sum into the
place of each, and step.  An optimiser that works entry by entry moves both alike: the two tables stay equal to the bit
(checked at every step), the model is TWIN at every step, and each gradient was seen alone.

Equations.  For the row c of a vocabulary's table at one step, a_c the gradient through attention and r_c the other one::

    norms       = mean of |a_c| over rows where it is not 0, and the same of |r_c|
    domination  = mean over steps of |r|'s / mean over steps of |a|'s
    cosine      = mean of <a_c, r_c> / (|a_c| |r_c|) over rows where neither is 0
    conflicting = share of steps with cosine < 0
    ratio_c     = share of steps with <a_c, r_c> < 0 among those where it is not 0

How this differs.  The paper shows the table of categories; here every vocabulary of the histories is measured.  Rows *unknown*
and *missing* are trained and not counted.  What reads the representation's table includes the row's own feature vectors, which
the layers above read: so it does in TWIN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.analysis.plots import INK, device_of, figure, finish
from unbraid.bundle import build
from unbraid.config import Run
from unbraid.encoders.dare import DARE
from unbraid.encoders.searched import Searching
from unbraid.encoders.table import Table
from unbraid.layers import require_positive
from unbraid.model import Model
from unbraid.optim.joint import Joint, JointUpdate, clip
from unbraid.preflight import bound_terms
from unbraid.train import fit
from unbraid.types import FIRST_VALUE, Array, Batch, Finding, Output, Schema

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 20  # of the plot's histograms


# ------------------------------------------------------------------------------------------------------------- the numbers
class Gradients:
    """What one table's two gradients were, step by step.

    Args:
        size: rows of the table, *unknown* and *missing* included.
    """

    def __init__(self, size: int) -> None:
        self.norms: list[tuple[float, float]] = []
        self.cosines: list[float] = []
        self.negative, self.counted = np.zeros(size, np.int64), np.zeros(size, np.int64)

    def add(self, attention: Tensor | None, representation: Tensor | None) -> None:
        """One step's gradients, (V, D) each; None is 0 everywhere."""
        given = [g for g in (attention, representation) if g is not None]
        if not given:
            self._keep((np.nan, np.nan), np.nan)
            return
        a, r = (torch.zeros_like(given[0]) if g is None else g for g in (attention, representation))
        read = ((a != 0) | (r != 0)).any(1).nonzero().squeeze(1)
        read = read[read >= FIRST_VALUE]
        a, r = a[read].double(), r[read].double()
        sizes = a.norm(dim=1), r.norm(dim=1)
        product, both = (a * r).sum(1), (sizes[0] > 0) & (sizes[1] > 0)
        self._keep(
            tuple(_mean(size[size > 0]) for size in sizes),  # type: ignore[arg-type]
            _mean(product[both] / (sizes[0] * sizes[1])[both]),
        )
        rows, sign = read.cpu().numpy(), product.sign().cpu().numpy()
        self.negative[rows] += sign < 0  # the rows are distinct
        self.counted[rows] += sign != 0

    def _keep(self, norms: tuple[float, float], cosine: float) -> None:
        self.norms.append(norms)
        self.cosines.append(cosine)

    def numbers(self) -> dict[str, Any]:
        """See `GradientProbe.__call__`."""
        norms, cosines = np.array(self.norms, float).reshape(-1, 2), np.array(self.cosines, float)
        attention, representation = (
            float(_finite(column).mean()) if len(_finite(column)) else 0.0 for column in norms.T
        )
        seen = _finite(cosines)
        rows = np.flatnonzero(self.counted)
        ratio = self.negative[rows] / self.counted[rows]
        return {
            "norms": norms, "attention": attention, "representation": representation,
            "domination": representation / attention if attention else None,
            "cosines": cosines, "conflicting": float((seen < 0).mean()) if len(seen) else None,
            "rows": rows, "ratio": ratio, "steps": self.counted[rows],
            "above_half": float((ratio > 0.5).mean()) if len(rows) else None,
        }  # fmt: skip


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else np.nan


def _finite(values: Array) -> Array:
    return values[np.isfinite(values)]


# ---------------------------------------------------------------------------------------------------------------- the twin
def twin(run: Run, schema: Schema) -> Model:
    """The run's TWIN, with a second copy of every table that attention reads: `Model` with equal ``attention`` tables.

    Raises:
        ValueError: the run's history encoder is not TWIN or DARE, or a TWIN that is not one of shared tables alone.
    """
    history: Any = run.model.history
    if history.kind not in ("dare", "twin"):
        raise ValueError(f"The run's history encoder should be `dare` or `twin`. Found `{history.kind}`.")
    common = {part.name for part in fields(Searching)}
    plain = type(history)()
    own = [part.name for part in fields(history) if part.name not in {*common, "kind"}]
    changed = [name for name in own if getattr(history, name) != getattr(plain, name)]
    if history.kind == "twin" and changed:
        raise ValueError(f"The probe has plain TWIN only. Leave out the encoder's settings: {', '.join(changed)}.")
    dare = DARE(**{name: getattr(history, name) for name in common}, attention="per_view")
    choice = replace(run.model, history=dare, tables=replace(run.model.tables, lazy_rows=-1))
    model = build(replace(run, model=choice), schema)
    with torch.no_grad():
        for value, attention in pairs(model).values():
            attention.weight.copy_(value.weight)
    return model


def pairs(model: Model) -> dict[str, tuple[Table, Table]]:
    """``view/vocabulary`` -> its table of values and its table of attention, of the vocabularies that have both."""
    found = {}
    for key, table in model.tables.items():
        name, _, role = key.rpartition("/")
        if role == "attention":
            found[name] = (model.tables[f"{name}/value"], table)
    return found


@dataclass(frozen=True)
class GradientProbe:
    """Trains the run's TWIN from the start and looks at both gradients.  Call it with batches of *training* rows.

    The run says what is trained: its data's schema, model (of history ``twin`` or ``dare``, whose attention tables get the
    values' width), losses, seed, and its update's step sizes.  All of that is the first steps of that run, but that the
    learning rate does not fall and that every table is dense: a lazy table would be the same to Adam, except for rows that
    a step does not read.

    Args:
        run: see above.
        field: the event field (a category) that the reading and the plot are about.
        steps: how many, at most.
        view: whose tables, in a model of several views; None means the last (the shared one, if there is one).
    """

    run: Run
    field: str
    steps: int = 100
    view: str | None = None

    def __post_init__(self) -> None:
        require_positive(steps=self.steps)
        if type(self.run.update) is not Joint:
            raise ValueError(
                f"The run's update should be `joint`, the sum of all losses. Found `{self.run.update.kind}`."
            )

    def __call__(self, model: nn.Module | None, schema: Schema, batches: Iterable[Batch]) -> Finding:
        """The finding.  ``model`` says the device alone and is not changed: what is trained is drawn anew.

        ``values``: ``losses`` (S,); ``shown``, the name of the field's table; ``tables``: name (``view/vocabulary``) ->
        ``norms`` (S, 2) of attention and representation; ``attention`` and ``representation``, their means over steps, and
        ``domination``, the second by the first; ``cosines`` (S,) and ``conflicting``; ``rows`` (n,), the ids whose gradients
        met at least once, with ``ratio`` and ``steps`` (n,), conflicting and counted; ``above_half``, the share of ids with
        a ratio above 0.5.  What a step does not have is NaN, what no step has is None.

        Raises:
            ValueError: a history encoder that is neither TWIN nor DARE; no such field or view; no batch.
            JobError: the run's losses do not fit the schema.
            RuntimeError: the two tables came apart; what was measured would not be TWIN.
            FloatingPointError: a loss is not finite.
        """
        twins = twin(self.run, schema).to("cpu" if model is None else device_of(model))
        shown = self._shown(twins, schema)
        losses, found = self._train(twins, schema, batches)
        tables = {name: each.numbers() for name, each in found.items()}
        values = {"field": self.field, "shown": shown, "losses": losses, "tables": tables}
        return Finding(
            "gradients", values, unit="norm and cosine of gradients", reading=_reading(tables[shown], self.field, len(losses)),
            reference="Feng et al., ICLR 2025, arXiv 2410.02604: domination and conflict of gradients",
            remedy="Tables of their own for attention: the history encoder `dare`.",
        )  # fmt: skip

    def _shown(self, twins: Model, schema: Schema) -> str:
        """Name of the field's table."""
        names = [name for history in schema.histories for name in history.fields]
        if self.field not in names:
            raise ValueError(
                f"There is no event field `{self.field}` in a history. Found {', '.join(dict.fromkeys(names))}."
            )
        views = list(twins.embeddings.widths)
        if self.view not in (None, *views):
            raise ValueError(f"There is no view `{self.view}`. Views: {', '.join(views)}.")
        return f"{self.view or views[-1]}/{schema.field_vocabulary(self.field)}"

    def _train(self, twins: Model, schema: Schema, batches: Iterable[Batch]) -> tuple[Array, dict[str, Gradients]]:
        """(S,) weighted sums of the losses, and both gradients of each pair of tables."""
        update = _Tied(self.run.update, twins, self.steps, {task.name: task.weight for task in schema.tasks})
        device, losses = device_of(twins), cast(list[float], [])

        def keep(done: int, batch: Batch, parts: Mapping[str, Tensor]) -> bool:
            total = update.total(parts)
            losses.append(np.nan if total is None else float(total.detach()))
            return False

        moved = (batch.to(device) for batch in batches)
        with suppress(StopIteration):  # fewer batches than steps
            fit(twins, moved, bound_terms(self.run, schema, twins), update, steps=self.steps, callbacks=(keep,))
        if not losses:
            raise ValueError("There is no batch to train on.")
        return np.array(losses), update.found


class _Tied(JointUpdate):
    """The update of TWIN on its twin: pairs of tables get the sum of their gradients, which are kept."""

    def __init__(self, config: Joint, twins: Model, steps: int, weights: Mapping[str, float]) -> None:
        super().__init__(replace(config, learning_rate="constant", clip_norm=0.0), twins, steps, weights)
        self.norm, self.both = config.clip_norm, pairs(twins)
        self.found = {name: Gradients(len(value.weight)) for name, (value, _) in self.both.items()}
        second = {id(attention.weight) for _, attention in self.both.values()}
        self.once = [p for p in twins.parameters() if id(p) not in second]  # what TWIN has

    def apply(self, output: Output) -> None:
        """Keep both gradients, put their sum in the place of each, step, compare the tables."""
        for name, (value, attention) in self.both.items():
            self.found[name].add(attention.weight.grad, value.weight.grad)
            value.weight.grad = _sum(value.weight.grad, attention.weight.grad)
        if self.norm > 0:  # here, not in `super`: a shared table counts once
            clip([p.grad for p in self.once if p.grad is not None], self.norm)
        for value, attention in self.both.values():
            attention.weight.grad = None if value.weight.grad is None else value.weight.grad.clone()
        super().apply(output)
        _check_equal(self.both, self.step)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """None only if both are: a gradient of zeros would move a table by its momentum."""
    return one if other is None else other if one is None else one + other


def _check_equal(both: Mapping[str, tuple[Table, Table]], step: int) -> None:
    for name, (value, attention) in both.items():
        if not torch.equal(value.weight, attention.weight):
            count = int((value.weight != attention.weight).any(1).sum())
            raise RuntimeError(
                f"Tables `{name}` of attention and representation differ in {count:,} rows after step {step}. They got the "
                "same gradients, so the optimiser does not treat equal entries alike. What was measured is not TWIN."
            )


def _reading(numbers: Mapping[str, Any], field: str, steps: int) -> str:
    """The finding in words."""
    if numbers["conflicting"] is None:
        return f"In {steps:,} steps no row of the table of `{field}` had a gradient from attention and one from representation."
    return (
        f"Over {steps:,} steps, gradients of the table of `{field}` from representation are {numbers['domination']:,.1f} times "
        f"as long as those from attention; they point apart in {numbers['conflicting']:.1%} of the steps, and for "
        f"{numbers['above_half']:.1%} of {len(numbers['rows']):,} values in more than half of theirs."
    )


def plot(finding: Finding, path: str | Path | None = None, table: str | None = None) -> Figure:
    """Norms by step, the steps' cosines and the values' shares of conflict; of ``table``, the field's if None.

    Raises ValueError where no row had both gradients, and for a table that was not measured.
    """
    values: Mapping[str, Any] = finding.values
    name = table or values["shown"]
    if name not in values["tables"]:
        raise ValueError(f"There is no table `{name}`. Tables: {', '.join(values['tables'])}.")
    found = values["tables"][name]
    if found["conflicting"] is None:
        raise ValueError(f"There is nothing to plot: no row of table `{name}` had both gradients.")
    drawn, axes = figure(12.6, 4.0, 3)
    steps = np.arange(1, len(found["norms"]) + 1)
    for column, what, colour, line in ((1, "representation", "blue", "-"), (0, "attention", "orange", "--")):
        axes[0].plot(steps, found["norms"][:, column], line, color=INK[colour], label=f"{what}: mean {found[what]:.2g}")
    axes[0].set_yscale("log")
    axes[0].set_xlabel("training step")
    axes[0].set_ylabel("mean norm of rows with a gradient")
    axes[0].set_title(f"Domination: representation's {found['domination']:,.1f} times as long", fontsize=10)
    axes[0].legend(frameon=False)
    _histogram(axes[1], _finite(found["cosines"]), (-1, 1), 0.0, "mean cosine of a step", "steps")
    axes[1].set_title(f"Conflict: below 0 in {found['conflicting']:.1%} of steps", fontsize=10)
    ratio = np.where(found["ratio"] == 0.5, np.nextafter(0.5, 0), found["ratio"])  # one half is not above one half
    _histogram(axes[2], ratio, (0, 1), 0.5, "share of a value's steps that conflict", "values")
    axes[2].set_title(f"Above one half: {found['above_half']:.1%} of {len(found['ratio']):,} values", fontsize=10)
    drawn.suptitle(f"Gradients of one table from attention and from representation: {name}")
    return finish(drawn, path)


def _histogram(axis: Any, values: Array, span: Sequence[float], middle: float, what: str, unit: str) -> None:
    """Counts of values, those on the conflicting side in another colour (cosines below, ratios above the middle)."""
    edges = np.linspace(span[0], span[1], BINS + 1)
    counts, _ = np.histogram(values, edges)
    apart = edges[:-1] < middle if middle == 0 else edges[:-1] >= middle
    axis.bar(edges[:-1], counts, np.diff(edges), align="edge", edgecolor="white",
             color=[INK["orange"] if bad else INK["grey"] for bad in apart])  # fmt: skip
    axis.axvline(middle, color="black", linewidth=0.8)
    axis.set_xlim(*span)
    axis.set_xticks(np.linspace(span[0], span[1], 5))
    axis.set_xlabel(f"{what} (orange: conflict)")
    axis.set_ylabel(f"number of {unit}")
