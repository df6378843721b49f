"""Do the vectors that a tower reads separate the labels, before any layer helps?

Paper: Ningya Feng, Junwei Pan, Jialong Wu, Baixu Chen, Ximei Wang, Qian Li, Xian Hu, Jie Jiang, Mingsheng Long:
*Long-Sequence Recommendation Models Need Decoupled Embeddings*.  ICLR 2025, https://arxiv.org/abs/2410.02604.

Idea.  Cut the space of vectors into k clusters, without looking at labels.  The more a row's cluster tells about its label,
the better the representation separates them; the number of clusters says how finely one has to look.

Equations.  With n_cy rows of cluster c and label y among n::

    MI(k)  = sum over c, y of n_cy / n log2(n_cy n / (n_c n_y))                              bits, at most H(label)
    NMI(k) = MI(k) / ((H(cluster) + H(label)) / 2)                                           0..1

MI grows with k even for vectors that know nothing, by about (k - 1)(classes - 1) / (2 n ln 2) bits, so that of the same
clusters with shuffled labels is measured beside it (``chance``).  NMI grows by chance, too, and also depends on k through
the clusters' own entropy: it compares models at one k, not numbers of clusters.

How this differs.  The authors' figures show NMI under an axis that says mutual information; here both are given, in their own
units.  Chance, the limit on k (a tenth of the rows) and ``standardise`` are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from torch import nn

from unbraid.analysis.correlation import information, labelled
from unbraid.analysis.plots import INK, at_rest, device_of, figure, finish
from unbraid.layers import require_positive
from unbraid.types import Array, Batch, Finding, Schema

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Discriminability:
    """What clusters of the tower's input tell about a task's label.  Call it with batches of *test* rows.

    Args:
        task: binary or multiclass; rows where it is observed count.
        clusters: the numbers of clusters k.  A k above a tenth of the rows is skipped.
        seeds: of the clustering (and of the shuffled labels): one measurement each.
        view: the vectors of this view; None means those of all views, end to end.
        standardise: give every dimension unit variance first, so that numbers and given vectors do not outvote embeddings.
    """

    task: str
    clusters: tuple[int, ...] = (2, 5, 10, 20, 30, 50, 100, 200, 300, 500, 700, 1000)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    view: str | None = None
    standardise: bool = False

    def __post_init__(self) -> None:
        require_positive(clusters=self.clusters)
        if not self.clusters or not self.seeds:
            raise ValueError("Parameters `clusters` and `seeds` should not be empty.")

    def __call__(self, model: nn.Module, schema: Schema, batches: Iterable[Batch]) -> Finding:
        """The finding.

        ``values``: ``clusters`` (C,), those of the settings that were measured; ``bits`` and ``nmi``, and both with shuffled
        labels, ``chance`` and ``chance_nmi``: (C, S), a column per seed; ``entropy``, of the label in bits; ``rows``,
        ``width``; ``skipped``: k -> why.

        Raises:
            ValueError: a real-valued task; no view of that name.
        """
        if schema.task(self.task).kind == "real":
            raise ValueError(f"Task `{self.task}` should be binary or multiclass. Found real.")
        vectors, label = self._read(model, batches)
        rows, classes = len(label), int(label.max(initial=0)) + 1
        if self.standardise and rows:
            vectors = (vectors - vectors.mean(0)) / np.maximum(vectors.std(0), 1e-12)
        fitting = [k for k in self.clusters if 10 * k <= rows]
        skipped = {k: f"{k:,} clusters of {rows:,} rows; each needs 10" for k in self.clusters if k not in fitting}
        found = np.zeros((4, len(fitting), len(self.seeds)))
        for i, k in enumerate(fitting):
            for j, seed in enumerate(self.seeds):
                cluster = MiniBatchKMeans(k, random_state=seed, n_init=1).fit(vectors).labels_
                shuffled = np.random.default_rng([seed, k]).permutation(label)
                found[:, i, j] = *_told(cluster, label, k, classes), *_told(cluster, shuffled, k, classes)
        bits, nmi, chance, chance_nmi = found
        entropy = float(_entropy(np.bincount(label, minlength=classes)))
        values = {"task": self.task, "clusters": np.array(fitting, np.int64), "bits": bits, "nmi": nmi, "chance": chance,
                  "chance_nmi": chance_nmi, "entropy": entropy, "rows": rows, "width": vectors.shape[1],
                  "skipped": skipped}  # fmt: skip
        return Finding(
            "discriminability", values, unit="bits", reading=_reading(values),
            reference="Feng et al., ICLR 2025, arXiv 2410.02604: discriminability of representations (its plots are of NMI)",
            remedy="Tables of their own for attention and representation; a product of history and target in the tower's input.",
        )  # fmt: skip

    def _read(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[Array, Array]:
        """(n, width) vectors and (n,) int64 labels of the rows that count."""
        vectors, labels = [np.zeros((0, 0), np.float32)], [np.zeros(0, np.int64)]
        with at_rest(model):
            for batch in batches:
                views: Mapping[str, Any] = model.views(batch.to(device_of(model)))  # type: ignore[operator]
                if self.view is not None and self.view not in views:
                    raise ValueError(f"There is no view `{self.view}`. Views: {', '.join(views)}.")
                chosen = views.values() if self.view is None else (views[self.view],)
                keep = labelled(batch, self.task)
                vectors.append(np.concatenate([v.float().cpu().numpy() for v in chosen], 1)[keep])
                labels.append(batch.labels[self.task].cpu().numpy()[keep].astype(np.int64))
        return np.concatenate(vectors[1:] or vectors), np.concatenate(labels)


def _told(cluster: Array, label: Array, k: int, classes: int) -> tuple[float, float]:
    """Mutual information in bits, and NMI."""
    joint = np.bincount(cluster.astype(np.int64) * classes + label, minlength=k * classes).reshape(k, classes)
    bits, mean = float(information(joint)), float(_entropy(joint.sum(0)) + _entropy(joint.sum(1))) / 2
    return bits, bits / mean if mean > 0 else 0.0


def _entropy(counts: Array) -> Array:
    """Bits: what a variable tells about itself."""
    return information(np.diag(counts))


def _reading(values: Mapping[str, Any]) -> str:
    """The finding in words: at the number of clusters where most is told beyond chance."""
    if not len(values["clusters"]):
        return f"{values['rows']:,} rows are too few for any of the numbers of clusters."
    bits, chance, nmi = (values[name].mean(1) for name in ("bits", "chance", "nmi"))
    best = int(np.argmax(bits - chance))
    return (
        f"{values['clusters'][best]:,} clusters of the {values['width']:,} numbers that the tower reads tell {bits[best]:.4f} "
        f"bits about `{values['task']}`, of the {values['entropy']:.3f} that its label has ({values['rows']:,} rows; shuffled "
        f"labels: {chance[best]:.4f}; NMI {nmi[best]:.4f})."
    )


def plot(finding: Finding, path: str | Path | None = None) -> Figure:
    """MI and NMI over the number of clusters.  Raises ValueError where nothing was measured."""
    values: Mapping[str, Any] = finding.values
    k = values["clusters"]
    if not len(k):
        raise ValueError(f"There is nothing to plot: {finding.reading}")
    drawn, axes = figure(9.6, 4.2, 2)
    seeds = values["bits"].shape[1]
    band = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    for axis, name, label, colour in (
        (axes[0], "bits", "tower's input", "blue"),
        (axes[0], "chance", "shuffled labels", "grey"),
        (axes[1], "nmi", "tower's input", "blue"),
        (axes[1], "chance_nmi", "shuffled labels", "grey"),
    ):
        curve = values[name]
        axis.plot(
            k, curve.mean(1), "--" if name.startswith("chance") else "-o", color=INK[colour], label=label, markersize=4
        )
        axis.fill_between(k, curve.min(1), curve.max(1), color=INK[colour], alpha=0.2, linewidth=0)
    shown = [int(n) for n in k] if len(k) <= 6 else [int(n) for n in k[::-1][::2]]
    for axis, unit in (
        (axes[0], f"mutual information with {values['task']} (bits)"),
        (axes[1], "normalised mutual information (NMI, 0..1)"),
    ):
        axis.set_xscale("log")
        axis.set_xticks(shown, [f"{n:,}" for n in shown])
        axis.minorticks_off()
        axis.set_xlabel("number of clusters")
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
    axes[0].legend(title=band, frameon=False)
    best = int(np.argmax((values["bits"] - values["chance"]).mean(1)))
    drawn.suptitle(
        f"Clusters of the tower's input tell {values['bits'][best].mean():.4f} of {values['entropy']:.3f} bits about "
        f"{values['task']} (k = {k[best]:,}; {values['rows']:,} rows)",
        fontsize=11,
    )
    return finish(drawn, path)
