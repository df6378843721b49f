"""Do embedding tables use their width?  Information abundance of every table, and of what cross layers make of it.

Papers: Xingzhuo Guo, Junwei Pan, Ximei Wang, Baixu Chen, Jie Jiang, Mingsheng Long: *On the Embedding Collapse when Scaling up
Recommendation Models*.  ICML 2024, https://arxiv.org/abs/2310.04400.  Junwei Pan et al.: *Ads Recommendation in a Collapsed
and Entangled World*.  KDD 2024, https://arxiv.org/abs/2403.00793.

Idea.  A product of two fields pulls each vector along its partner's.  A partner of few values spans few directions, and so
pulls others into few directions, however wide the table: then more width buys nothing.  Singular values show it.

Equations.  E (V, D) is a table, s_1 >= s_2 >= ... are its singular values::

    IA(E)     = sum of s / s_1                             1 (one direction) .. min(V, D) (all alike)
    random    = IA of a matrix of independent normal numbers of the same shape
    projected = IA(E_i W_(i->j)^T)                         W_(i->j) (D_j, D_i), the block of the first cross layer's matrix
                                                           that multiplies field j by field i

IA does not change with the scale of E, a rotation of its columns or the order of its rows.  It grows with V and D for a matrix
that knows nothing, too: 4.7 for 10 x 10 and 9.9 for 100,000 x 10, so each table is compared with a random one of its shape.

How this differs.  Written from memory and descriptions of the papers.  The random matrices are ours; so is that rows which no
given batch reads do not count: they still are as they were drawn, and look like a random matrix.  The authors' tool divides every
row by its norm first, the definition does not: ``normalise``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.analysis.plots import INK, figure, finish
from unbraid.interactions.cross import CrossModule
from unbraid.layers import require_positive
from unbraid.model import Model, view_key
from unbraid.types import FIRST_VALUE, Array, Batch, Finding, Ragged, Schema

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURED = (
    "Measured on the bundled log (docs/tencent.md, three seeds): several narrow sets had a higher mean AUC than one wide set, "
    "none of the differences passed the adjustment, and their tables side by side were not less collapsed."
)
REMEDY = {  # has the model several sets of tables?
    False: "Several narrow sets of tables, each with its own interaction (views of kind `several`), for one wide set. "
    + MEASURED,
    True: f"The model has several sets of tables already: smaller widths use more of each. {MEASURED}",
}
CHUNK = 65_536  # rows that are held in double precision at a time


# ------------------------------------------------------------------------------------------------------------ the numbers
def gram(matrix: Tensor, rows: Tensor | None = None, *, normalise: bool = False) -> Tensor:
    """(D, D) E^T E in double precision, of the given rows (n,) of a (V, D) matrix, all if None.

    Args:
        normalise: divide every row by its norm first; a row of zeros stays.
    """
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for at in range(0, len(matrix) if rows is None else len(rows), CHUNK):
        part = matrix[at : at + CHUNK] if rows is None else matrix[rows[at : at + CHUNK].to(matrix.device)]
        part = part.detach().cpu().double()
        part = nn.functional.normalize(part, dim=1, eps=1e-300) if normalise else part
        total += part.T @ part
    return total


def spectrum(product: Tensor, rows: int) -> Array:
    """Singular values, largest first, of a matrix of so many rows from its (D, D) `gram`: min(rows, D) of them.

    Roots of a rounded product: those below about 1e-8 of the largest are noise of that size.
    """
    values = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().flip(0)
    return values[: min(rows, len(values))].numpy()


def abundance(values: Array) -> float:
    """Information abundance of singular values: their sum by the largest.  NaN if all are 0."""
    return float(values.sum() / values.max()) if values.any() else float("nan")


def random_abundance(rows: int, width: int, seed: int, *, normalise: bool = False) -> float:
    """Information abundance of a drawn (rows, width) matrix of independent standard normal numbers."""
    return abundance(random_spectrum(rows, width, seed, normalise=normalise))


def random_spectrum(rows: int, width: int, seed: int, *, normalise: bool = False) -> Array:
    """Singular values, largest first, of a drawn (rows, width) matrix of independent standard normal numbers.

    Without ``normalise`` the matrix itself is never drawn: its singular values have the law of those of a triangular one,
    chi-distributed on the diagonal and normal below it (Bartlett 1933).
    """
    rng = np.random.default_rng([seed, rows, width])
    if normalise:
        parts = (rng.standard_normal((min(CHUNK, rows - at), width)) for at in range(0, rows, CHUNK))
        total = torch.zeros(width, width, dtype=torch.float64)
        for part in parts:
            total += gram(torch.from_numpy(part), normalise=True)
        return spectrum(total, rows)
    few, many = sorted((rows, width))
    drawn = np.tril(rng.standard_normal((few, few)), -1) + np.diag(np.sqrt(rng.chisquare(many - np.arange(few))))
    return np.asarray(np.linalg.svd(drawn, compute_uv=False))


# -------------------------------------------------------------------------------------------------------------- the probe
@dataclass(frozen=True)
class Collapse:
    """Information abundance of a model's tables.  Call it with batches of *training* rows: all, or many of them.

    Args:
        normalise: divide every row by its norm first, so that rows which were read more often, and are longer, weigh no more.
        least: a row of a table counts if the batches read it so many times.
        seeds: of the random matrices that each table is compared with.
    """

    normalise: bool = False
    least: int = 1
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def __post_init__(self) -> None:
        require_positive(least=self.least)
        if not self.seeds:
            raise ValueError("Parameter `seeds` should not be empty.")

    def __call__(self, model: nn.Module, schema: Schema, batches: Iterable[Batch]) -> Finding:
        """The finding.

        ``values``: ``tables``, by ``view/vocabulary``: ``rows`` n that count of ``size``, ``width`` D, ``spectrum`` s / s_1
        (min(n, D),), ``abundance``, ``random`` (S,), and ``relative``, abundance by the mean of random; ``projected``, by view
        (or expert) whose interaction is `cross`: ``fields`` (F names, ids and bags, largest abundance first), their
        ``abundance`` (F,) and ``grid`` (F, F), row i and column j for field i times W_(i->j); ``skipped``: table -> why.

        Tables are those of features and events that the view itself reads; an encoder's further ones are not measured.
        """
        built = cast(Model, model)
        keep = {name: _counting(count, self.least) for name, count in self._reads(built, schema, batches).items()}
        tables: dict[str, dict[str, Any]] = {}
        skipped: dict[str, str] = {}
        grams: dict[str, Tensor] = {}
        for view in built.embeddings.widths:
            for vocabulary, rows in keep.items():
                table = built.tables.get(built.embeddings.key(view, vocabulary, "value"))
                if table is None:
                    continue
                name, n = f"{view}/{vocabulary}", len(rows)
                product = gram(table.weight, rows, normalise=self.normalise)
                if n < 2 or not product.any():
                    skipped[name] = "all its vectors are zero" if n > 1 else f"{n} of its rows count; 2 are needed"
                    continue
                grams[name] = product
                tables[name] = {"rows": n, "size": len(table.weight), **self._measured(product, n)}
        projected = {
            name: _projected(module, schema, view, tables, grams)
            for name, view in built.experts.items()
            if isinstance(module := built.interactions[view_key(name)], CrossModule)
        }
        values = {"tables": tables, "projected": projected, "skipped": skipped, "normalise": self.normalise}
        return Finding(
            "collapse", values, unit="information abundance", reading=_reading(values),
            reference="Guo et al., ICML 2024, arXiv 2310.04400; Pan et al., KDD 2024, arXiv 2403.00793",
            remedy=REMEDY[len(built.embeddings.widths) > 1],
        )  # fmt: skip

    @staticmethod
    def _reads(model: Model, schema: Schema, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """vocabulary -> (V,) how often each row was read by features, and by events where they read the view's tables."""
        of_features = {f.name: f.vocab for f in schema.features if f.kind in ("id", "bag")}
        sizes = model.embeddings.sizes
        counts = {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes.items()}

        def count(vocabulary: str, ids: Tensor) -> None:
            counts[vocabulary] += torch.bincount(ids.cpu(), minlength=sizes[vocabulary])

        for batch in batches:
            for name, vocabulary in of_features.items():
                value = batch.features[name]
                count(vocabulary, value.values[name] if isinstance(value, Ragged) else value)
            for history in schema.histories:
                packed = cast(Ragged, batch.features[history.name])
                for name in history.fields:
                    vocabulary, roles = model._reads[f"{history.name}.{name}"]
                    if "value" in roles:
                        count(vocabulary, packed.values[name])
        return counts

    def _measured(self, product: Tensor, rows: int) -> dict[str, Any]:
        values, width = spectrum(product, rows), len(product)
        random = np.array([random_abundance(rows, width, seed, normalise=self.normalise) for seed in self.seeds])
        found = abundance(values)
        return {
            "width": width, "spectrum": values / values[0], "abundance": found, "random": random,
            "relative": found / float(random.mean()),
        }  # fmt: skip


def _counting(counts: Tensor, least: int) -> Tensor:
    """(n,) the known values that were read so many times: *unknown* and *missing* are not among them."""
    rows = (counts >= least).nonzero().squeeze(1)
    return rows[rows >= FIRST_VALUE]


def _matrix(layer: nn.Module) -> Tensor:
    """(d, d) the matrix of a cross layer, full or of low rank."""
    if isinstance(layer, nn.Linear):
        return layer.weight.detach().cpu().double()
    first, last = (cast(nn.Linear, part).weight.detach().cpu().double() for part in cast(nn.Sequential, layer))
    return last @ first


def _projected(
    module: CrossModule, schema: Schema, view: str, tables: Mapping[str, Any], grams: Mapping[str, Tensor]
) -> dict[str, Any]:
    """See `Collapse.__call__`."""
    names = {f.name: f"{view}/{f.vocab}" for f in schema.features if f.kind in ("id", "bag")}
    fields = [name for name, table in names.items() if table in tables]
    fields.sort(key=lambda name: -tables[names[name]]["abundance"])
    parts = dict(zip(module.widths, torch.arange(module.width).split(list(module.widths.values())), strict=True))
    matrix, grid = _matrix(module.layers[0]), np.full((len(fields), len(fields)), np.nan)
    for i, source in enumerate(fields):
        for j, partner in enumerate(fields):
            block = matrix[parts[partner]][:, parts[source]]
            product = block @ grams[names[source]] @ block.T
            grid[i, j] = abundance(spectrum(product, tables[names[source]]["rows"]))
    found = np.array([tables[names[name]]["abundance"] for name in fields])
    return {"fields": fields, "abundance": found, "grid": grid}


def _reading(values: Mapping[str, Any]) -> str:
    """The finding in words."""
    tables: Mapping[str, Mapping[str, Any]] = values["tables"]
    if not tables:
        return "No table has two rows that count."
    name = min(tables, key=lambda table: tables[table]["relative"])
    low, half = tables[name], sum(table["relative"] < 0.5 for table in tables.values())
    return (
        f"{half} of {len(tables)} tables have less than half of the information abundance of a random matrix of their shape. "
        f"Lowest by that measure: `{name}`, {low['abundance']:.2f} where a random one has {low['random'].mean():.2f} "
        f"({low['rows']:,} rows, width {low['width']})."
    )


# --------------------------------------------------------------------------------------------------------------- the plot
def plot(finding: Finding, path: str | Path | None = None, most: int = 20) -> Figure:
    """Spectra, abundance beside that of random matrices, and projections where the interaction is `cross`.

    Args:
        most: so many tables, those with the most rows that count.

    Raises:
        ValueError: no table was measured.
    """
    tables: Mapping[str, Mapping[str, Any]] = finding.values["tables"]
    if not tables:
        raise ValueError(f"There is nothing to plot: {finding.reading}")
    shown = sorted(tables, key=lambda name: -tables[name]["rows"])[:most]
    grids = [(name, found) for name, found in finding.values["projected"].items() if found["fields"]]
    titles = [f"{name} ({tables[name]['rows']:,})" for name in shown]
    longest = max(map(len, [*titles, *(name for _, found in grids for name in found["fields"])]))
    width = 4.0 + 0.09 * longest  # room for names, which are not cut
    most_fields = max((len(found["fields"]) for _, found in grids), default=0)
    height = max(4.6, 0.28 * max(len(shown), most_fields) + 1.9 + 0.08 * longest * bool(grids))
    drawn, axes = figure(width * (2 + len(grids)), height, 2 + len(grids))
    _draw_spectra(axes[0], [tables[name] for name in shown])
    place = np.arange(len(shown))
    axes[1].barh(place, [tables[name]["abundance"] for name in shown], color=INK["blue"], label="table")
    axes[1].plot([tables[name]["random"].mean() for name in shown], place, "|", color=INK["orange"], markersize=12,
                 markeredgewidth=2, label="random, same shape")  # fmt: skip
    axes[1].set_yticks(place, titles, fontsize=8)
    axes[1].invert_yaxis()
    axes[1].set_xlabel("information abundance")
    shown_as = axes[1].get_legend_handles_labels()  # below the panels, and so off the bars
    drawn.legend(*shown_as, loc="outside lower center", ncols=2, frameon=False)
    for axis, (name, found) in zip(axes[2:], grids, strict=True):
        _draw_grid(axis, name, found)
    lines = "rows at unit length" if finding.values["normalise"] else "rows as they are"
    drawn.suptitle(f"Information abundance of {len(shown)} of {len(tables)} tables ({lines})", fontsize=11)
    return finish(drawn, path)


def _draw_spectra(axis: Any, tables: Sequence[Mapping[str, Any]]) -> None:
    for n, table in enumerate(tables):
        values = table["spectrum"]
        axis.plot(np.arange(1, len(values) + 1), values, color=INK["blue"], alpha=1 - 0.8 * n / len(tables))
    axis.set_xlabel("k (darker: tables with more rows)")
    axis.set_ylabel("k-th singular value / the largest")
    axis.set_ylim(0, 1.02)


def _draw_grid(axis: Any, name: str, found: Mapping[str, Any]) -> None:
    place = range(len(found["fields"]))
    image = axis.imshow(found["grid"], aspect="auto", cmap="viridis", vmin=1)
    axis.figure.colorbar(image, ax=axis, label="information abundance")
    axis.set_xticks(place, found["fields"], rotation=90, fontsize=7)
    axis.set_yticks(place, found["fields"], fontsize=7)
    axis.set_xlabel("projected for field j")
    axis.set_ylabel("field i, largest abundance first")
    axis.set_title(f"first cross layer of {name}", fontsize=9)
