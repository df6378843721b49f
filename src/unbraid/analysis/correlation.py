"""Which past events go with the label, and does attention know: mutual information by value and position.

Paper: Ningya Feng, Junwei Pan, Jialong Wu, Baixu Chen, Ximei Wang, Qian Li, Xian Hu, Jie Jiang, Mingsheng Long:
*Long-Sequence Recommendation Models Need Decoupled Embeddings*.  ICLR 2025, https://arxiv.org/abs/2410.02604.

Idea.  A row is about a target value a (the category of its item), and its history has a value b at position p (1 is the
newest event).  Over the training rows with target a, how much does "value b stands at position p" tell about the label?
That is counted, no model is asked, so it can judge what a model attends to.

Equations.  Among the t_p positive and t_n negative rows with target a, x_p and x_n have b at position p; s = t_p + t_n::

    MI(a, b, p) = sum over x, y in {0, 1} of n_xy / s log2(n_xy s / (n_x n_y))                                      bits
    n_11 = x_p, n_10 = x_n, n_01 = t_p - x_p, n_00 = t_n - x_n          n_x, n_y: their sums, 0 log 0 = 0

    learned(b, p) = softmax over all cells of the model's attention score of an event with b at p, scaled to [0, 1]

The finding is Spearman's rank correlation of the two grids, over cells with x_p and x_n of at least ``least``.

How this differs.  The authors put 1e-5 where x_p or x_n is 0 (``zero = "paper"``); the default is the exact limit.  Their
counts are dictionaries filled row by row; here they are sorted keys, and memory is O(distinct cells).  The rank correlation
is ours: the paper shows the grids.  Unknown and missing values are no categories and are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from unbraid.analysis.plots import at_rest, device_of, figure, finish, shortened
from unbraid.layers import require_positive
from unbraid.types import FIRST_VALUE, MISSING, POSITION, Array, Batch, Finding, Ragged, Schema

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = 1e-5  # what the authors put in the place of a zero count
PENDING = 2**20  # distinct keys that wait, at least, before they are merged: 16 MB


# ------------------------------------------------------------------------------------------------------------ the truth
def information(joint: Array) -> Array:
    """Mutual information in bits of two discrete variables.

    Args:
        joint: (..., X, Y) counts of their values together, at least 0.

    Returns:
        (...); a table without counts gives 0.
    """
    joint = np.asarray(joint, float)
    whole = joint.sum((-2, -1), keepdims=True)
    apart = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    ratio = np.divide(joint * whole, apart, out=np.ones_like(joint), where=joint > 0)
    share = np.divide(joint, whole, out=np.zeros_like(joint), where=whole > 0)
    return np.maximum((share * np.log2(ratio)).sum((-2, -1)), 0.0)  # rounding can give -1e-17


@dataclass(frozen=True)
class Truth:
    """What was counted.

    Args:
        task, history, field, feature: what of; the target is the row's ``feature``, the behaviour the events' ``field``.
        positions: P, the largest position that was counted.
        totals: (A, 2) rows of label 0 and 1 with each target value.
        cells: (n,) int64, sorted: ``(a A + b) P + p - 1`` of every (a, b, p) that occurred.
        counts: (n, 2) rows of label 0 and 1 in each.
        zero: what a zero count means.
    """

    task: str
    history: str
    field: str
    feature: str
    positions: int
    totals: Array
    cells: Array
    counts: Array
    zero: Literal["exact", "paper"] = "exact"

    def rows(self, a: Any) -> tuple[Array, Array]:
        """t_p and t_n of targets ``a`` (any shape)."""
        a = np.asarray(a)
        known = (a >= 0) & (a < len(self.totals))
        found = np.where(known[..., None], self.totals[np.where(known, a, 0)], 0)
        return found[..., 1], found[..., 0]

    def support(self, a: Any, b: Any, p: Any) -> tuple[Array, Array]:
        """x_p and x_n of target, behaviour and position (shapes that broadcast); 0 for what did not occur."""
        a, b, p = np.broadcast_arrays(*(np.asarray(part, np.int64) for part in (a, b, p)))
        size = len(self.totals)
        inside = (a >= 0) & (a < size) & (b >= 0) & (b < size) & (p >= 1) & (p <= self.positions)
        if not len(self.cells):
            return np.zeros(a.shape, np.int64), np.zeros(a.shape, np.int64)
        cell = np.where(inside, (a * size + b) * self.positions + p - 1, -1)
        place = np.searchsorted(self.cells, cell).clip(max=len(self.cells) - 1)
        found = np.where((self.cells[place] == cell)[..., None], self.counts[place], 0)
        return found[..., 1], found[..., 0]

    def bits(self, a: Any, b: Any, p: Any) -> Array:
        """MI in bits of target, behaviour and position (shapes that broadcast); 0 for a target without rows."""
        (t_p, t_n), (x_p, x_n) = self.rows(a), self.support(a, b, p)
        if self.zero == "paper":
            x_p, x_n = (np.where(x == 0, np.minimum(SMALL, t), x) for x, t in ((x_p, t_p), (x_n, t_n)))
        joint = np.stack(np.broadcast_arrays(x_p, x_n, t_p - x_p, t_n - x_n), -1)
        return information(joint.reshape(*joint.shape[:-1], 2, 2))

    def grid(self, a: int, behaviours: Any, positions: Any) -> Array:
        """(behaviours, positions) MI in bits for one target."""
        return self.bits(a, np.asarray(behaviours)[:, None], np.asarray(positions)[None])

    def behaviours(self, a: int, positions: int | None = None) -> tuple[Array, Array]:
        """Values that stood at positions up to ``positions`` (all) in rows of target ``a``, and how often: frequent first."""
        width = len(self.totals) * self.positions
        low, high = np.searchsorted(self.cells, (a * width, (a + 1) * width))
        b, p = np.divmod(self.cells[low:high] - a * width, self.positions)
        near = p < (positions or self.positions)
        often = np.bincount(b[near], self.counts[low:high].sum(1)[near], len(self.totals)).astype(np.int64)
        order = np.argsort(-often, kind="stable")
        order = order[: int((often > 0).sum())]
        return order, often[order]

    @cached_property
    def targets(self) -> Array:
        """Target values that have rows, the most frequent first."""
        often = self.totals.sum(1)
        return np.argsort(-often, kind="stable")[: int((often > 0).sum())]


class _Counter:
    """How often each int64 key came, as sorted distinct keys: nothing is allocated for what never comes."""

    def __init__(self) -> None:
        self.keys, self.counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.waiting: list[tuple[Array, Array]] = []

    def add(self, keys: Array) -> None:
        """Count (n,) keys.  What waits is merged when there is more of it than of what is merged: O(n log n) in all."""
        self.waiting.append(np.unique(keys, return_counts=True))
        if sum(len(part) for part, _ in self.waiting) > max(PENDING, len(self.keys)):
            self.merge()

    def merge(self) -> None:
        """Bring all into ``keys`` and ``counts``."""
        keys = np.concatenate([self.keys, *(part for part, _ in self.waiting)])
        counts = np.concatenate([self.counts, *(part for _, part in self.waiting)])
        self.keys, place = np.unique(keys, return_inverse=True)
        self.counts = np.bincount(place.reshape(-1), counts, len(self.keys)).astype(np.int64)  # exact below 2**53
        self.waiting = []


def ranks(lists: Ragged) -> Array:
    """(N,) position of each packed event: 1 for the last (newest) of its row."""
    lengths, ends = lists.lengths.cpu().numpy(), lists.offsets[1:].cpu().numpy()
    return np.repeat(ends, lengths) - np.arange(lengths.sum())


def labelled(batch: Batch, task: str) -> Array:
    """(B,) bool: plain rows whose label is observed."""
    return (batch.observed[task] & (batch.view == 0)).cpu().numpy()


def most_frequent(batches: Iterable[Batch], task: str, feature: str, n: int) -> tuple[int, ...]:
    """The ``n`` values of a row feature that most rows with an observed label have: targets to restrict a count to."""
    counter = _Counter()
    for batch in batches:
        values = batch.features[feature].cpu().numpy()[labelled(batch, task)]  # type: ignore[union-attr]
        counter.add(values[values >= FIRST_VALUE])
    counter.merge()
    return tuple(counter.keys[np.argsort(-counter.counts, kind="stable")[:n]].tolist())


# ------------------------------------------------------------------------------------------------------------ the probe
@dataclass(frozen=True)
class Correlation:
    """Counted and learned relevance of events, side by side.  Call it with batches of *training* rows.

    Args:
        task: a binary task; history, field: whose events' value (a category).
        feature: the row feature that is the target; empty means the id feature of the field's vocabulary.
        positions: count positions up to this, at most the history's length (None).
        targets: count only these target ids (`most_frequent`); empty means all.
        target: id of the target whose grids are compared; None means the one with the most rows.
        behaviours, newest: size of the grids: the most frequent behaviours of that target, and the newest positions.
        least: a cell is compared if so many positive and so many negative rows have it.
        zero: ``exact``, or ``paper``: a zero count of rows that have the event is 1e-5.
        fields: event fields that the score may read; None means ``field`` and, where the history has it, ``position``.
        view: whose attention, in a model of several views.
    """

    task: str
    history: str
    field: str
    feature: str = ""
    positions: int | None = None
    targets: tuple[int, ...] = ()
    target: int | None = None
    behaviours: int = 20
    newest: int = 20
    least: int = 50
    zero: Literal["exact", "paper"] = "exact"
    fields: tuple[str, ...] | None = None
    view: str | None = None

    def __post_init__(self) -> None:
        require_positive(behaviours=self.behaviours, newest=self.newest, least=self.least)
        require_positive(positions=() if self.positions is None else self.positions)

    def count(self, schema: Schema, batches: Iterable[Batch]) -> Truth:
        """Count over batches of training rows.

        Raises:
            ValueError: the task is not binary, or history, field and feature do not fit together.
        """
        feature, positions = self._resolve(schema)
        size = schema.sizes[schema.field_vocabulary(self.field)]
        if 2.0 * size**2 * positions >= 2**63:
            raise ValueError(f"{size:,} values at {positions} positions are more cells than 64 bits number.")
        totals, counter = np.zeros((size, 2), np.int64), _Counter()
        wanted = np.ones(size, bool)
        wanted[:FIRST_VALUE] = False
        if self.targets:
            wanted &= np.isin(np.arange(size), self.targets)
        for batch in batches:
            a = batch.features[feature].cpu().numpy()  # type: ignore[union-attr]
            label = batch.labels[self.task].cpu().numpy() == 1
            keep = labelled(batch, self.task) & wanted[a]
            np.add.at(totals, (a[keep], label[keep].astype(np.int64)), 1)
            packed = batch.features[self.history]
            assert isinstance(packed, Ragged)
            row, b, p = packed.rows.cpu().numpy(), packed.values[self.field].cpu().numpy(), ranks(packed)
            use = keep[row] & (b >= FIRST_VALUE) & (p <= positions)
            row, b, p = row[use], b[use], p[use]
            counter.add(2 * ((a[row] * size + b) * positions + p - 1) + label[row])
        counter.merge()
        cells, place = np.unique(counter.keys >> 1, return_inverse=True)
        counts = np.zeros((len(cells), 2), np.int64)
        counts[place.reshape(-1), counter.keys & 1] = counter.counts
        names = self.task, self.history, self.field, feature
        return Truth(*names, positions, totals, cells, counts, self.zero)

    def _resolve(self, schema: Schema) -> tuple[str, int]:
        """The target's feature and P."""
        if schema.task(self.task).kind != "binary":
            raise ValueError(f"Task `{self.task}` should be binary. Found {schema.task(self.task).kind}.")
        history = {h.name: h for h in schema.histories}.get(self.history)
        if history is None or self.field not in history.fields:
            found = "; ".join(f"{h.name}: {', '.join(h.fields)}" for h in schema.histories)
            raise ValueError(f"There is no event field `{self.field}` in a history `{self.history}`. Found {found}.")
        vocabulary = schema.field_vocabulary(self.field)
        fitting = [f.name for f in schema.features if f.kind == "id" and f.vocab == vocabulary]
        if (self.feature or None) not in (None, *fitting) or not fitting:
            raise ValueError(
                f"The target should be an id feature with vocabulary `{vocabulary}`, which event field `{self.field}` has. "
                f"Found `{self.feature}`; fitting are: {', '.join(fitting) or 'none'}."
            )
        return self.feature or fitting[0], min(self.positions or history.length, history.length)

    def __call__(self, model: nn.Module, schema: Schema, batches: Iterable[Batch]) -> Finding:
        """Count, then `compare`."""
        return self.compare(model, schema, self.count(schema, batches))

    def compare(self, model: nn.Module, schema: Schema, truth: Truth) -> Finding:
        """The finding about one target.

        ``values``: ``target``; ``rows`` and ``positives`` of it; ``behaviours`` (R,) and ``positions`` (C,) of the grids;
        ``truth`` (bits), ``learned`` (in [0, 1]), ``scores`` (as the model gives them) and ``supported`` (bool), all
        (R, C); ``cells``, how many are supported; ``spearman``, None with a ``why`` where it is undefined.

        Raises:
            ValueError: no row has the target.
        """
        target = int(truth.targets[0]) if self.target is None and len(truth.targets) else self.target
        t_p, t_n = (int(n) for n in truth.rows(-1 if target is None else target))
        if target is None or not t_p + t_n:
            raise ValueError(f"No row with an observed label of `{self.task}` has target {target}. Choose another one.")
        behaviours = truth.behaviours(target, self.newest)[0][: self.behaviours]
        positions = np.arange(1, min(self.newest, truth.positions) + 1)
        fields = score_fields(schema, truth, self.fields)
        scores = score_grid(model, schema, truth, target, behaviours, positions, fields, self.view)
        bits = truth.grid(target, behaviours, positions)
        x_p, x_n = truth.support(target, behaviours[:, None], positions[None])
        supported = (x_p >= self.least) & (x_n >= self.least)
        spearman, why = _spearman(scores[supported], bits[supported])
        about = f"target {target} of `{truth.feature}` ({t_p + t_n:,} rows, {t_p:,} positive)"
        cells = f"{int(supported.sum()):,} of {supported.size:,} cells with {self.least} rows of each label"
        if why:
            reading = f"For {about} attention cannot be compared with the counts over {cells}: {why}."
        else:
            reading = (
                f"For {about} attention orders {cells} like their mutual information with `{self.task}` to a rank "
                f"correlation of {spearman:.2f} (1: the same order, 0: none)."
            )
        values = {"task": truth.task, "feature": truth.feature, "field": truth.field, "target": target,
                  "rows": t_p + t_n, "positives": t_p, "behaviours": behaviours, "positions": positions,
                  "truth": bits, "learned": _scaled(scores), "scores": scores, "supported": supported,
                  "cells": int(supported.sum()), "least": self.least, "spearman": spearman, "why": why}  # fmt: skip
        return Finding(
            "correlation", values, unit="rank correlation", reading=reading,
            reference="Feng et al., ICLR 2025, arXiv 2410.02604: target-aware correlation of events",
            remedy="Tables of their own for attention; the event field `position`, where the history does not have it.",
        )  # fmt: skip


def score_fields(schema: Schema, truth: Truth, fields: Collection[str] | None) -> tuple[str, ...]:
    """The event fields that a score may read: the given ones, else the counted one and the position if there is one."""
    if fields is not None:
        return tuple(fields)
    return (truth.field, POSITION) if POSITION in event_fields(schema, truth) else (truth.field,)


def event_fields(schema: Schema, truth: Truth) -> tuple[str, ...]:
    """All fields of the history that was counted."""
    return next(history.fields for history in schema.histories if history.name == truth.history)


def score_grid(
    model: nn.Module, schema: Schema, truth: Truth, target: int, behaviours: Array, positions: Array,
    fields: Collection[str], view: str | None = None,
) -> Array:  # fmt: skip
    """(behaviours, positions) attention scores of events that exist nowhere, for one target: one call of the model.

    Whatever else events and rows have is *missing*; scores from ``fields`` alone do not read it.
    """
    shape, device = (len(behaviours), len(positions)), device_of(model)
    cells = {truth.field: np.asarray(behaviours)[:, None], POSITION: np.asarray(positions)[None] + FIRST_VALUE - 1}
    ids = {name: cells.get(name, np.array(MISSING)) for name in event_fields(schema, truth)}
    values = {name: torch.tensor(np.broadcast_to(x, shape).reshape(-1), device=device) for name, x in ids.items()}
    events = Ragged(values, torch.tensor([0, shape[0] * shape[1]], device=device))
    own = schema.field_vocabulary(truth.field)
    row = {
        f.name: torch.tensor([target if f.vocab == own else MISSING], device=device)
        for f in schema.features
        if f.kind == "id"
    }
    with at_rest(model):
        scores: Any = model.event_scores(truth.history, events, row, view=view, fields=fields)  # type: ignore[operator]
    return scores.double().cpu().numpy().reshape(shape)


def _scaled(scores: Array) -> Array:
    """Softmax over all cells, scaled to [0, 1]; equal scores give 0."""
    if not scores.size:
        return scores
    raised = np.exp(scores - scores.max())
    raised /= raised.sum()
    span = raised.max() - raised.min()
    return (raised - raised.min()) / span if span > 0 else np.zeros_like(raised)


def _spearman(one: Array, other: Array) -> tuple[float | None, str]:
    """Spearman's rank correlation, or why there is none."""
    if len(one) < 3:
        return None, f"{len(one)} cells have enough rows; at least 3 are needed"
    for name, values in (("attention scores", one), ("mutual information", other)):
        if not np.ptp(values) > 0:
            return None, f"the {name} of all cells are equal"
    return float(spearmanr(one, other).statistic), ""


def plot(finding: Finding, path: str | Path | None = None, names: Callable[[int], str] = str) -> Figure:
    """The counted and the learned grid as heat maps.  ``names``: what a behaviour's id is called; long ones are shortened."""
    values: Mapping[str, Any] = finding.values
    rows, columns = values["truth"].shape
    own = [shortened(names(int(b))) + (" = target" if b == values["target"] else "") for b in values["behaviours"]]
    wide = 0.06 * max(map(len, own), default=0)
    drawn, axes = figure(wide + max(8.0, 4.0 + 0.36 * columns), max(4.4, 2.4 + 0.27 * rows), 2)
    counted = np.ma.masked_where(~values["supported"], values["truth"])
    cold = f"\ngrey: fewer than {values['least']} rows of a label"
    for axis, grid, title, unit in (
        (axes[0], counted, f"Counted{cold}", f"mutual information with {values['task']} (bits)"),
        (axes[1], values["learned"], "Learned", "attention (softmax over all\ncells, scaled to 0..1)"),
    ):
        axis.set_facecolor("#d9d9d9")
        image = axis.imshow(grid, aspect="auto", cmap="cividis", interpolation="nearest")
        drawn.colorbar(image, ax=axis, label=unit)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("position in the history\n(1 = newest event)")
        step = max(1, columns // 10)
        axis.set_xticks(np.arange(0, columns, step), [str(p) for p in values["positions"][::step]])
        axis.set_yticks(np.arange(rows), own if axis is axes[0] else [], fontsize=8)
    axes[0].set_ylabel(f"{values['field']} of the event")
    measured = f"rank correlation {values['spearman']:.2f}" if not values["why"] else "no rank correlation"
    drawn.suptitle(
        f"Relevance of events for {values['feature']} {shortened(names(values['target']))}:\n"
        f"{measured} over {values['cells']:,} cells",
        fontsize=11,
    )
    return finish(drawn, path)
