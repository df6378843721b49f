"""Can a table keep two tastes apart?  Distances of users and items that one task wants far and another near.

Paper: Liangcai Su, Junwei Pan, Ximei Wang, Xi Xiao, Shijie Quan, Xihua Chen, Jie Jiang: *STEM: Unleashing the Power of
Embeddings for Multi-task Recommendation*.  AAAI 2024, https://arxiv.org/abs/2308.13537.  The recipe is that of the authors'
notebook RecScope, of which we have a description.

Idea.  Trained on one task alone, a table puts a user near some items and far from others.  Pairs that one task puts far and
another near are in *conflict*: a table that both tasks share has one distance for them, so it can only put them in the middle,
and neither taste is kept.  Tables per task can put them on both sides.

Equations.  u, v are the vectors of a pair of a user and an item, both read more often in training than 60 % of their kind; A
and B are the tables of single-task training, q_x a quantile over the pairs, n their number::

    d(table)  = ||u - v||_2
    conflict  = {d(A) > q_.6(A)  and  d(B) <= q_.4(B)}     and its mirror, with A and B exchanged
    rank      = (place of d among all pairs' - 1/2) / n    0 .. 1, equal distances share the mean of their places
    entanglement = 1 - |mean rank in the first task's table - mean rank in the second's|     over the pairs in conflict
    agreement = rank correlation of d in the task's table and in its single-task table

Both conflict sets count by their pairs.  A shared table has 1 by construction.  Independent single-task tables have 0.4 (ranks
of 0.8 and 0.2); 0 is the end where few pairs conflict, and these all the way.

How this differs.  Quantiles, bins and the set are the notebook's; ranks, the scalar, agreement and intervals are ours.  *Near*
means *liked* only where a network makes it so: products of user and item may, and layers above them may turn the sign round.
So agreement is told beside the scalar: near 0, the model's distances are no taste of that task's, and its entanglement is void.
Intervals draw users anew and leave the set and the ranks as they are; as the difference of ranks counts by its size, noise makes
the replicates a little smaller than the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from unbraid.analysis.plots import INK, figure, finish
from unbraid.layers import require_positive
from unbraid.model import Model
from unbraid.types import FIRST_VALUE, Array, Batch, Feature, Finding, Schema

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK = 65_536  # pairs whose vectors are held in double precision at a time


@dataclass(frozen=True)
class Frequent:
    """Whose pairs count: ascending codes of users (U,) and of items (I,)."""

    users: Array
    items: Array


@dataclass(frozen=True)
class Entanglement:
    """Distances of pairs in conflict.  `count` the training rows, then call it with models and held-out rows.

    Args:
        first, second: the two tasks.
        user, item: id features.
        frequent: a user (an item) counts if training read it more often than this share of all users (items) that it read.
        near, far: quantiles of the single-task distances up to which a pair is near, and above which it is far.
        bins: of the histograms.
        replicates, seed, confidence: of the bootstrap over users.

    Raises:
        ValueError: a value is out of its range.
    """

    first: str
    second: str
    user: str = "user"
    item: str = "item"
    frequent: float = 0.6
    near: float = 0.4
    far: float = 0.6
    bins: int = 39
    replicates: int = 500
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise ValueError(f"Parameters `first` and `second` should be two tasks. Found `{self.first}` twice.")
        if self.user == self.item:
            raise ValueError(f"Parameters `user` and `item` should be two features. Found `{self.user}` twice.")
        require_positive(bins=self.bins, replicates=self.replicates)
        if not 0 <= self.frequent < 1:
            raise ValueError(f"Parameter `frequent` should be in [0, 1). Found {self.frequent}.")
        if not 0 < self.near <= self.far < 1:
            raise ValueError(f"Parameters should be 0 < `near` <= `far` < 1. Found {self.near} and {self.far}.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"Parameter `confidence` should lie between 0 and 1. Found {self.confidence}.")

    # ---------------------------------------------------------------------------------------------------- whose pairs count
    def count(self, schema: Schema, batches: Iterable[Batch]) -> Frequent:
        """The frequent users and items of batches of *training* rows.

        Raises:
            ValueError: no such task or id feature, or no row with a known user and item.
        """
        features = self._features(schema)
        counts = [np.zeros(schema.sizes[f.vocab], np.int64) for f in features]
        for batch in batches:
            for total, ids in zip(counts, self._pairs(batch), strict=True):
                total += np.bincount(ids, minlength=len(total))
        found = []
        for feature, total in zip(features, counts, strict=True):
            codes = np.flatnonzero(total[FIRST_VALUE:]) + FIRST_VALUE  # unknown and missing are nobody
            if not len(codes):
                raise ValueError(f"No training row has a known `{feature.name}`.")
            found.append(codes[total[codes] > np.quantile(total[codes], self.frequent)])
        return Frequent(*found)

    def _features(self, schema: Schema) -> list[Feature]:
        for task in (self.first, self.second):
            schema.task(task)
        ids = {f.name: f for f in schema.features if f.kind == "id"}
        for role, name in (("user", self.user), ("item", self.item)):
            if name not in ids:
                raise ValueError(f"Parameter `{role}` should be an id feature among {list(ids)}. Found `{name}`.")
        return [ids[self.user], ids[self.item]]

    def _pairs(self, batch: Batch) -> list[Array]:
        """(n,) codes of the users and of the items of a batch's plain rows."""
        plain = batch.view == 0
        features: Mapping[str, Any] = batch.features
        return [features[name][plain].cpu().numpy() for name in (self.user, self.item)]

    # --------------------------------------------------------------------------------------------------------- the measure
    def __call__(
        self, frequent: Frequent, models: Mapping[str, nn.Module], schema: Schema, batches: Iterable[Batch], *, against: str
    ) -> Finding:  # fmt: skip
        """The finding.

        ``values``: ``tasks`` and ``sets`` (2 names each), ``against``, ``pairs`` n that count, ``left_out`` rows of others,
        ``sizes`` (2,) pairs in each conflict set; ``tables``, by ``model/view``: ``edges`` (bins + 1,), ``counts`` (bins,) of all
        pairs and ``conflict`` (2, bins) of each set, ``rank`` (2,) mean rank of each set; ``models``: model -> ``views`` (2 names
        of views), ``entanglement``, ``low``, ``high``, ``by_set`` (2,), ``agreement`` (2,) of each task.
        What has no pair is NaN.

        Args:
            models: name -> a model of this schema; ``against`` names the single-task one, which has a table for each task.  A
                task reads the view of its name where there is one, else the last.  The single-task model should be drawn from
                another seed than the others: tables that began alike and hardly moved agree without having learned anything.
            batches: of held-out rows; their labels are not read.

        Raises:
            ValueError: ``against`` is not a model with a view per task, a model has other tables, or fewer than two pairs count.
        """
        self._features(schema)
        built = {name: self._own(name, model, schema) for name, model in models.items()}
        views = {name: self._views(model) for name, model in built.items()}
        if views.get(against) != (self.first, self.second):
            raise ValueError(
                f"`against` should name a single-task model, one of {list(models)} with tables of `{self.first}` and of "
                f"`{self.second}`. Found `{against}`, whose tasks read {views.get(against, 'nothing')}. Train one with tower "
                "`single_task` and tables of kind `separate`."
            )
        user, item, left_out = self._kept(frequent, batches)
        if len(user) < 2:
            raise ValueError(
                f"{len(user)} rows have a frequent user and a frequent item; 2 are needed. Give more rows, or lower `frequent` "
                f"({self.frequent:g})."
            )
        distances = {
            f"{name}/{view}": _distances(self._tables(model, view, schema), user, item)
            for name, model in built.items()
            for view in model.embeddings.widths
        }
        alone = [distances[f"{against}/{task}"] for task in (self.first, self.second)]
        sets = self._conflicts(*alone)
        ranks = {name: (rankdata(d) - 0.5) / len(d) for name, d in distances.items()}
        tables = {name: self._of_table(d, ranks[name], sets) for name, d in distances.items()}
        _, who = np.unique(user, return_inverse=True)
        values = {
            "tasks": (self.first, self.second), "against": against, "pairs": len(user), "left_out": left_out,
            "sets": (f"{self.first} far, {self.second} near", f"{self.second} far, {self.first} near"),
            "sizes": sets.sum(1), "tables": tables,
            "models": {
                name: self._of_model(name, read, ranks, sets, who, against) for name, read in views.items()
            },
        }  # fmt: skip
        return Finding(
            "entanglement", values, unit="1 - difference of mean ranks", reading=_reading(values),
            remedy="Tables of their own for each task, such as `stem`.",
            reference="Su et al., AAAI 2024, arXiv 2308.13537: distances of users and items in conflict",
        )  # fmt: skip

    def _own(self, name: str, model: nn.Module, schema: Schema) -> Model:
        """The model.  Raises ValueError if it is none of ours, or of another schema."""
        if not isinstance(model, Model):
            raise ValueError(
                f"Model `{name}` should be one model with tables (`unbraid.model.Model`). Found `{type(model).__name__}`, which "
                "a schedule made of several: give these one by one."
            )
        for feature in self._features(schema):
            size = model.embeddings.sizes.get(feature.vocab)
            if size != schema.sizes[feature.vocab]:
                raise ValueError(
                    f"Model `{name}` has {size or 'no'} rows for `{feature.name}`, and the schema {schema.sizes[feature.vocab]}: "
                    "its codes mean something else. Encode the data by the vocabularies that it was trained with (`fitted`)."
                )
        return model

    def _views(self, model: Model) -> tuple[str, str]:
        """Of which view each task reads the tables."""
        names = list(model.embeddings.widths)
        first, second = (task if task in names else names[-1] for task in (self.first, self.second))
        return first, second

    def _kept(self, frequent: Frequent, batches: Iterable[Batch]) -> tuple[Array, Array, int]:
        """(n,) users and (n,) items of the pairs that count, one per row, and how many rows do not."""
        users, items, left_out = [], [], 0
        for batch in batches:
            user, item = self._pairs(batch)
            keep = np.isin(user, frequent.users) & np.isin(item, frequent.items)
            users.append(user[keep])
            items.append(item[keep])
            left_out += int((~keep).sum())
        none = np.empty(0, np.int64)
        return np.concatenate([none, *users]), np.concatenate([none, *items]), left_out

    def _tables(self, model: Model, view: str, schema: Schema) -> list[Tensor]:
        """(V, D) of the users and (W, D) of the items."""
        keys = [model.embeddings.key(view, feature.vocab, "value") for feature in self._features(schema)]
        return [model.tables[key].weight.detach().cpu() for key in keys]

    def _conflicts(self, first: Array, second: Array) -> Array:
        """(2, n) bool: the pairs that are far for the first task and near for the second, and the other way round."""
        far = [d > np.quantile(d, self.far) for d in (first, second)]
        near = [d <= np.quantile(d, self.near) for d in (first, second)]
        return np.stack([far[0] & near[1], far[1] & near[0]])

    def _of_table(self, distance: Array, rank: Array, sets: Array) -> dict[str, Any]:
        edges = np.histogram_bin_edges(distance, self.bins)
        return {
            "edges": edges, "counts": np.histogram(distance, edges)[0],
            "conflict": np.stack([np.histogram(distance[mine], edges)[0] for mine in sets]),
            "rank": np.array([rank[mine].mean() if mine.any() else np.nan for mine in sets]),
        }  # fmt: skip

    def _of_model(
        self, name: str, views: tuple[str, str], ranks: Mapping[str, Array], sets: Array, who: Array, against: str
    ) -> dict[str, Any]:  # fmt: skip
        own = [ranks[f"{name}/{view}"] for view in views]
        alone = [ranks[f"{against}/{task}"] for task in (self.first, self.second)]
        users = int(who.max()) + 1
        apart = own[0] - own[1]
        parts = [np.bincount(who[mine], weights, users) for mine in sets for weights in (apart[mine], None)]
        sums = np.stack(parts, 1)  # (U, 4): difference of ranks and pairs of the one set, and of the other
        rng = np.random.default_rng(self.seed)
        draws = np.array([_entangled(rng.poisson(1.0, users) @ sums) for _ in range(self.replicates)])
        draws = draws[np.isfinite(draws)]
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(draws, [tail, 1 - tail]) if len(draws) else (np.nan, np.nan)
        total = sums.sum(0)
        return {
            "views": views, "entanglement": _entangled(total), "low": float(low), "high": float(high),
            "by_set": np.array([_entangled(total[:2]), _entangled(total[2:])]),
            "agreement": np.array([_correlation(mine, other) for mine, other in zip(own, alone, strict=True)]),
        }  # fmt: skip


def _entangled(sums: Array) -> float:
    """1 - mean over pairs of their set's |mean difference|, from (difference, pairs) of each set; NaN without a pair."""
    pairs = sums[1::2].sum()
    return float(1 - np.abs(sums[::2]).sum() / pairs) if pairs else float("nan")


def _correlation(one: Array, other: Array) -> float:
    """Correlation of ranks; NaN where all are equal."""
    return float(np.corrcoef(one, other)[0, 1]) if one.std() > 0 and other.std() > 0 else float("nan")


def _distances(tables: Sequence[Tensor], user: Array, item: Array) -> Array:
    """(n,) Euclidean distances of pairs of rows of two tables (V, D) and (W, D)."""
    users, items = tables
    found = [
        torch.linalg.vector_norm(users[user[at : at + CHUNK]].double() - items[item[at : at + CHUNK]].double(), dim=1)
        for at in range(0, len(user), CHUNK)
    ]
    return torch.cat(found).numpy()


def _reading(values: Mapping[str, Any]) -> str:
    """The finding in words."""
    sizes, pairs = values["sizes"], values["pairs"]
    shares = " and ".join(f"{size / pairs:.1%} `{name}`" for size, name in zip(sizes, values["sets"], strict=True))
    said = f"Of {pairs:,} pairs of frequent users and items, single-task training puts {shares}."
    if not sizes.sum():
        return f"{said} No pair is in conflict."
    models = [
        f"`{name}` {of['entanglement']:.2f} (agreement {of['agreement'][0]:.2f} and {of['agreement'][1]:.2f})"
        for name, of in values["models"].items()
    ]
    return f"{said} Entanglement of these: {', '.join(models)}."


# --------------------------------------------------------------------------------------------------------------- the plot
def plot(finding: Finding, path: str | Path | None = None, most: int = 12) -> Figure:
    """Histograms of the distances in every table, a panel each, with the pairs in conflict on a scale of their own.

    Args:
        most: so many tables, in order.
    """
    values: Mapping[str, Any] = finding.values
    names: Sequence[str] = list(values["tables"])[:most]
    drawn, axes = figure(3.4 * len(names) + 1, 3.6, len(names))
    for axis, name in zip(axes, names, strict=True):
        table = values["tables"][name]
        edges = table["edges"]
        axis.stairs(table["counts"] / max(table["counts"].sum(), 1), edges, fill=True, color=INK["grey"], alpha=0.35,
                    label="all pairs")  # fmt: skip
        for counts, label, colour in zip(table["conflict"], values["sets"], ("orange", "blue"), strict=True):
            axis.stairs(counts / max(counts.sum(), 1), edges, color=INK[colour], linewidth=1.6, label=label)
        axis.set_title(f"{name}: mean ranks {table['rank'][0]:.2f}, {table['rank'][1]:.2f}", fontsize=9)
        axis.set_xlabel("distance of user and item")
    axes[0].set_ylabel("share of the pairs")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return finish(drawn, path)
