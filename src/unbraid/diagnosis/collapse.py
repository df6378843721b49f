"""Do tables use their width?  The measure of `unbraid.analysis.collapse`, with levels.

    value = 1 - information abundance of a table / that of a random table of its shape        0 .. 1 - 1/width

Tables with fewer than twice as many rows as columns are not judged: they span few directions whatever they learn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np

from unbraid.analysis.collapse import Collapse as Probe
from unbraid.analysis.collapse import random_spectrum
from unbraid.diagnosis.case import Case
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, NotApplicable, Remedy
from unbraid.diagnosis.plots import Bars, Heat, Lines
from unbraid.encoders.table import Views
from unbraid.model import Model
from unbraid.towers.multi_embedding import MultiEmbedding

PAGE = "analyses.md#do-tables-use-their-width"
MOST_BARS, MOST_LINES, MOST_FIELDS = 20, 4, 12  # tables, tables and fields that one plot shows


@dataclass(frozen=True)
class Collapse:
    """See the module's docstring.  ``usual``, ``severe``: shares of a random table's information abundance that are lost."""

    name: ClassVar[str] = "collapse"
    title: ClassVar[str] = "Do tables use their width?"
    page: ClassVar[str] = PAGE
    usual: float = 0.37
    severe: float = 0.47

    def __call__(self, case: Case) -> list[Diagnosis]:
        """A diagnosis of the worst table, which says how many others there are.

        Raises:
            NotApplicable: there is no table that is large enough.
        """
        if not hasattr(cast(Model, case.model), "embeddings"):
            raise NotApplicable("the trained module has no tables of its own")
        found = Probe(normalise=False)(case.model, case.schema, case.batches("train")).values
        tables = {n: t for n, t in found["tables"].items() if t["rows"] >= 2 * t["width"] and t["width"] > 1}
        if not tables:
            raise NotApplicable("no table has twice as many rows as columns that were read")
        order = sorted(tables, key=lambda name: tables[name]["relative"])
        shown = order[:MOST_BARS]
        large = {name.partition("/")[2] for name in tables}  # view/vocabulary
        judged = {feature.name for feature in case.schema.features if feature.vocab in large}
        plots = (
            Bars(
                "Information abundance against a random table", "share of a random table's",
                tuple(shown), tuple(float(tables[name]["relative"]) for name in shown), reference=1.0, x="table",
            ),
            spectra({name: tables[name] for name in order[:MOST_LINES]}),
            *filter(None, (projections(view, each, judged) for view, each in found["projected"].items())),
        )  # fmt: skip
        more = sum(1 - float(tables[name]["relative"]) > self.usual for name in order[1:])
        return [self._of(case, order[0], tables[order[0]], plots, more)]

    def _of(self, case: Case, name: str, table: dict[str, Any], plots: tuple[Any, ...], more: int) -> Diagnosis:
        spread = np.std(table["abundance"] / np.asarray(table["random"]))
        value = 1 - float(table["relative"])
        target = next(iter(case.targets))
        measure = Measure.of(case.schema, target.name)
        run, width = case.run, case.run.model.tables.width
        remedies: tuple[Remedy, ...] = ()
        if run.model.tables.kind == "shared" and not run.model.experts and width >= 4:
            tower = run.model.tower
            several = Views(kind="several", widths=(width // 2, width // 2), std=run.model.tables.std)
            parts = {key: getattr(tower, key) for key in ("tower", "dropout") if hasattr(tower, key)}
            expert = tuple(getattr(tower, "bottom", ())) or (64, 32)
            built = MultiEmbedding(expert=expert, **parts)
            remedies = (
                Remedy(
                    "multi_embedding", "Several narrower sets of tables, each with an interaction of its own.", "model.tables",
                    replace(run, name=f"{run.name}_multi_embedding", model=replace(run.model, tables=several, tower=built)),
                    measure=measure, page="methods/multi_embedding.md",
                ),
            )  # fmt: skip
        return Diagnosis(
            "collapse", name, value, self.usual, self.severe,
            f"Table `{name}`, {table['width']} wide, has the information abundance of {1 - value:.0%} of a random table: "
            f"{table['abundance']:.1f} of its directions carry what it says"
            + (f"; {more} other tables lack more than is usual" if more else ""),
            "share lost", value - 2 * float(spread), value + 2 * float(spread), remedies=remedies,
            paper="https://arxiv.org/abs/2310.04400", page=PAGE, evidence={"plots": plots},
        )  # fmt: skip


def spectra(tables: Mapping[str, Mapping[str, Any]]) -> Lines:
    """Singular values of tables, and of a random table of each one's shape (of one, where shapes are alike)."""
    series: dict[str, tuple[Any, Any]] = {}
    for name, table in tables.items():
        values = table["spectrum"]
        series[name] = (range(1, 1 + len(values)), values)
    for rows, width in dict.fromkeys((table["rows"], table["width"]) for table in tables.values()):
        drawn = random_spectrum(rows, width, 0)
        series[f"random {rows:,} x {width}"] = (range(1, 1 + len(drawn)), drawn / drawn[0])
    note = "The tables farthest below a random one; the steeper, the fewer directions are used."
    return Lines("Spectra", "rank of the singular value", "value by the largest", series, log_y=True, note=note)


def projections(view: str, found: Mapping[str, Any], judged: Collection[str]) -> Heat | None:
    """How much of a field's abundance is left for each partner, after the first cross layer's block for the two.

    Rows are the judged fields of least abundance, columns the partners that leave least on average; None without any.
    """
    rows = [i for i, name in enumerate(found["fields"]) if name in judged][-MOST_FIELDS:]  # largest abundance first
    if not rows:
        return None
    share = (found["grid"] / np.asarray(found["abundance"])[:, None])[rows]
    columns = np.argsort(share.mean(0), kind="stable")[:MOST_FIELDS]
    return Heat(
        f"After projection for a partner: {view}", "partner", "field", "abundance by the field's own",
        tuple(found["fields"][i] for i in rows), tuple(found["fields"][j] for j in columns),
        tuple(map(tuple, share[:, columns])), scale="diverging", centre=1.0,
        note="Below 1: what the cross layer reads spans fewer directions.",
    )  # fmt: skip
