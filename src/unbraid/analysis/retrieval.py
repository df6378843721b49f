"""Does attention put the events that go with the label first?  NDCG of its ranking against counted mutual information.

Paper: Ningya Feng, Junwei Pan, Jialong Wu, Baixu Chen, Ximei Wang, Qian Li, Xian Hu, Jie Jiang, Mingsheng Long:
*Long-Sequence Recommendation Models Need Decoupled Embeddings*.  ICLR 2025, https://arxiv.org/abs/2410.02604.

Idea.  `unbraid.analysis.correlation.Truth` says how many bits an event of value b at position p tells about the label of a
row with target a.  An ideal search of a test row's history returns the events with the most bits; attention's own order,
from value and position alone, is held against it.

Equations.  For a row with events ranked r = 1, 2, ... by score, MI(r) the bits of the event ranked r, and K = ``at``::

    gain(k)  = sum over r <= k of MI(r) / log2(r + 1)
    curve(k) = gain(k) / ideal gain(K),  k = 1..K;  NDCG@K = curve(K)
    hits     = events among the first K that have at least the bits of the ideal order's K-th

The curve's other points divide by the *whole* ideal gain, too: they rise from 0 and are no NDCG@k.  A row counts if its
target has ``rows`` training rows and at most ``unsupported`` of its events lack ``support`` training rows of either label.

How this differs.  Rows that the training data cannot judge are left out as in the authors' code.  Equal scores give the
mean over all their orders, where the code takes what its sort gives: a score that ignores position says nothing about
order within a category.  A random order (exact, not drawn) and the newest first stand beside, on the same rows, and
intervals come from a bootstrap over users; the paper has neither.  The truth is taken as it is: that it was estimated from
a finite log is in no interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from unbraid.analysis.correlation import Truth, ranks, score_fields
from unbraid.analysis.plots import INK, at_rest, device_of, figure, finish
from unbraid.evaluate import user_means
from unbraid.layers import require_positive
from unbraid.types import Array, Batch, Finding, Ragged, Schema

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDERS = ("learned", "newest", "random")


@dataclass(frozen=True)
class Retrieval:
    """How well attention ranks the events of test rows.  Call it with batches of *test* rows.

    Args:
        truth: what `unbraid.analysis.correlation.Correlation.count` counted over training rows.
        rows: a row counts if its target has at least so many labelled training rows,
        support, unsupported: and at most ``unsupported`` events whose x_p or x_n is below ``support``,
        events: and at least so many events.  (One event has one order.)
        at: K.
        fields: event fields that the score may read; None means the counted one and, if the history has it, ``position``.
        view: whose attention, in a model of several views.
        replicates, seed, confidence: of the bootstrap over users.
    """

    truth: Truth
    rows: int = 700
    support: int = 50
    unsupported: int = 20
    events: int = 2
    at: int = 20
    fields: tuple[str, ...] | None = None
    view: str | None = None
    replicates: int = 500
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        require_positive(rows=self.rows, support=self.support, events=self.events, at=self.at)
        if self.unsupported < 0 or not 0 < self.confidence < 1:
            raise ValueError(
                "Parameters `unsupported` and `confidence` should be at least 0 and in (0, 1). "
                f"Found {self.unsupported} and {self.confidence}."
            )

    def __call__(self, model: nn.Module, schema: Schema, batches: Iterable[Batch]) -> Finding:
        """The finding.

        ``values``: for each order (``learned``, ``newest``, ``random``) a curve (K,) with ``ORDER_low`` and ``ORDER_high``;
        ``confidence`` of these; ``ORDER_ndcg`` and ``ORDER_hits`` as ``[value, low, high]``; ``learned_minus_newest`` and
        ``learned_minus_random``, paired differences of NDCG, likewise; ``rows``, ``users`` and ``seen``: rows that count,
        their users, all rows; ``left_out``: reason -> rows.  No row that counts: ``rows`` 0, ``why``, and none of the others.
        """
        fields = score_fields(schema, self.truth, self.fields)
        left_out = dict.fromkeys(
            ("target is rare", "few events", "events are unsupported", "no event is informative"), 0
        )
        parts, seen = [], 0
        with at_rest(model):
            for batch in batches:
                seen += len(batch)
                parts.append(self._measure(model, batch, fields, left_out))
        values: dict[str, Any] = {
            "task": self.truth.task, "at": self.at, "confidence": self.confidence, "seen": seen, "left_out": left_out,
        }  # fmt: skip
        count = sum(len(part["user"]) for part in parts)
        if not count:
            why = f"none of {seen:,} rows counts: " + ", ".join(f"{n:,} {name}" for name, n in left_out.items() if n)
            return self._finding({**values, "rows": 0, "users": 0, "why": why}, f"No NDCG: {why}.")
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        user = joined.pop("user")
        users = len(np.unique(user))
        values |= {"rows": count, "users": users, "why": "", **self._summary(joined, user)}
        ndcg, ahead = values["learned_ndcg"], values["learned_minus_newest"]
        return self._finding(
            values,
            f"Over {count:,} rows ({count / seen:.0%} of {seen:,}) of {users:,} users, attention's ranking of the history has "
            f"NDCG@{self.at} {_span(ndcg)}: "
            f"the newest first has {_span(values['newest_ndcg'])}, a random order {_span(values['random_ndcg'])}. Attention "
            f"minus newest first: {_span(ahead, sign=True)}.",
        )

    def _finding(self, values: Mapping[str, Any], reading: str) -> Finding:
        return Finding(
            "retrieval", values, unit=f"NDCG@{self.at}", reading=reading,
            reference="Feng et al., ICLR 2025, arXiv 2410.02604: retrieval against target-aware correlation",
            remedy="Tables of their own for attention; the event field `position`, where the history does not have it.",
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------- a batch
    def _measure(
        self, model: nn.Module, batch: Batch, fields: tuple[str, ...], left_out: dict[str, int]
    ) -> dict[str, Array]:
        """Per row that counts: ``user``, and for each order its curve (n, K) and ``hits_ORDER``."""
        packed, target = batch.features[self.truth.history], batch.features[self.truth.feature]
        assert isinstance(packed, Ragged) and not isinstance(target, Ragged)
        kept, bits = self._judged(packed, target.cpu().numpy(), batch.view.cpu().numpy() == 0, left_out)
        packed = packed.select(kept)
        device = device_of(model)
        ids = {n: x[kept].to(device) for n, x in batch.features.items() if isinstance(x, Tensor) and x.dim() == 1}
        scores: Any = model.event_scores(  # type: ignore[operator]
            self.truth.history, packed.to(device), ids, view=self.view, fields=fields
        )
        newest = -ranks(packed).astype(float)
        learned, row = scores.double().cpu().numpy(), packed.rows.cpu().numpy()
        ideal, bound = self._ideal(bits, row, len(kept))
        owner = batch.meta.get("user", batch.row)[kept]
        found: dict[str, Array] = {"user": owner.cpu().numpy()}
        for name, score in zip(ORDERS, (learned, newest, np.zeros(len(bits))), strict=True):
            gain, hit = self._first(score, row, len(kept), bits, bits >= bound[row])
            found[name] = np.cumsum(gain / _discount(self.at), 1) / ideal[:, None]
            found[f"hits_{name}"] = hit.sum(1)
        return found

    def _judged(self, packed: Ragged, a: Array, plain: Array, left_out: dict[str, int]) -> tuple[Any, Array]:
        """Rows of a batch that count ((n,) int64 tensor), and the bits of their events; counts the others by reason."""
        lengths, row, p = packed.lengths.cpu().numpy(), packed.rows.cpu().numpy(), ranks(packed)
        b = packed.values[self.truth.field].cpu().numpy()
        t_p, t_n = self.truth.rows(a)
        frequent = t_p + t_n >= self.rows
        x_p, x_n = self.truth.support(a[row], b, p)
        thin = np.bincount(row, np.minimum(x_p, x_n) < self.support, len(a)) > self.unsupported
        bits = self.truth.bits(a[row], b, p) * frequent[row]
        silent = np.bincount(row, bits, len(a)) <= 0
        keep = plain
        for name, bad in zip(left_out, (~frequent, lengths < self.events, thin, silent), strict=True):
            left_out[name] += int((keep & bad).sum())
            keep = keep & ~bad
        return packed.offsets.new_tensor(np.flatnonzero(keep)), bits[keep[row]]

    def _ideal(self, bits: Array, row: Array, n: int) -> tuple[Array, Array]:
        """(n,) ideal gain@K, and the bits of the last event in the ideal first K."""
        (best,) = self._first(bits, row, n, bits)
        start, size = np.searchsorted(row, np.arange(n)), np.bincount(row, minlength=n)
        last = start + np.minimum(size, self.at) - 1
        return (best / _discount(self.at)).sum(1), bits[np.lexsort((-bits, row))][last]

    def _first(self, score: Array, row: Array, n: int, *values: Array) -> list[Array]:
        """Each (N,) value at the first K ranks of its row, (n, K) and 0 where the row ends: means over equal scores."""
        order = np.lexsort((-score, row))
        start = np.searchsorted(row, np.arange(n))
        place = np.arange(len(row)) - start[row]
        near, score = place < self.at, score[order]
        new = (row[1:] != row[:-1]) | (score[1:] != score[:-1])
        run = np.cumsum(np.concatenate([[False], new])) if len(row) else row
        found = []
        for value in values:
            ranked = np.zeros((n, self.at))
            if len(value):
                mean = np.bincount(run, value[order]) / np.bincount(run)
                ranked[row[near], place[near]] = mean[run[near]]
            found.append(ranked)
        return found

    # -------------------------------------------------------------------------------------------------------- over users
    def _summary(self, found: Mapping[str, Array], user: Array) -> dict[str, Any]:
        """Means over rows, with intervals from one bootstrap over users: differences are paired."""
        columns = {f"{name}@{k}": found[name][:, k] for name in ORDERS for k in range(self.at)}
        columns |= {f"{name}_hits": found[f"hits_{name}"] for name in ORDERS}
        for other in ORDERS[1:]:
            columns[f"learned_minus_{other}"] = found["learned"][:, -1] - found[other][:, -1]
        means = user_means(columns, user, replicates=self.replicates, seed=self.seed, confidence=self.confidence)
        spans = {name: [mean["value"], mean["low"], mean["high"]] for name, mean in means.items()}
        values: dict[str, Any] = {name: span for name, span in spans.items() if "@" not in name}
        for name in ORDERS:
            curve = np.array([spans[f"{name}@{k}"] for k in range(self.at)], float)  # None becomes NaN
            values |= {name: curve[:, 0], f"{name}_low": curve[:, 1], f"{name}_high": curve[:, 2]}
            values[f"{name}_ndcg"] = spans[f"{name}@{self.at - 1}"]
        return values


def _discount(at: int) -> Array:
    """(K,) log2(r + 1) for r = 1..K."""
    return np.log2(np.arange(2, at + 2))


def _span(found: list[float | None], sign: bool = False) -> str:
    """``value [low, high]``."""
    texts = ["none" if x is None else f"{x:{'+' if sign else ''}.3f}" for x in found]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def plot(finding: Finding, path: str | Path | None = None) -> Figure:
    """The curves of the three orders.  Raises ValueError where no row counted."""
    values: Mapping[str, Any] = finding.values
    if values["why"]:
        raise ValueError(f"There is nothing to plot: {values['why']}.")
    drawn, (axis,) = figure(7.2, 4.8)
    k = np.arange(1, values["at"] + 1)
    styles = {"learned": ("attention", "blue", "-"), "newest": ("newest first", "orange", "--"),
              "random": ("random order", "grey", ":")}  # fmt: skip
    for name, (label, colour, line) in styles.items():
        axis.plot(
            k, values[name], line, color=INK[colour], label=f"{label}: {values[f'{name}_ndcg'][0]:.3f}", linewidth=2
        )
        axis.fill_between(k, values[f"{name}_low"], values[f"{name}_high"], color=INK[colour], alpha=0.18, linewidth=0)
    axis.plot(k[-1], 1, "D", color="black", markersize=5, clip_on=False, label="ideal order: 1")
    axis.set_xticks(k if len(k) <= 10 else k[k % 5 == 0])
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("k, events of the history kept by the ranking")
    axis.set_ylabel(f"discounted gain of the first k\n/ ideal gain of {values['at']}")
    shade = "" if np.isnan(values["learned_low"]).all() else f"\nshaded: {values['confidence']:.0%} intervals"
    title = f"NDCG@{values['at']} (the last point){shade}"
    axis.legend(title=title, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8, title_fontsize=8)
    axis.set_title(
        f"What ranking the history finds ({values['task']}): NDCG@{values['at']} {values['learned_ndcg'][0]:.3f},\n"
        f"newest first {values['newest_ndcg'][0]:.3f}; {values['rows']:,} rows of {values['users']:,} users",
        fontsize=10,
    )
    return finish(drawn, path)
