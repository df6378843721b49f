"""Plots of the collapse check: spectra beside random ones, and what cross layers leave of each field."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from healthkit import make_case, make_run, make_table

from unbraid.analysis.collapse import abundance, random_abundance, random_spectrum
from unbraid.diagnosis.case import Case
from unbraid.diagnosis.collapse import MOST_FIELDS, MOST_LINES, Collapse, projections, spectra
from unbraid.diagnosis.plots import Heat, Lines
from unbraid.interactions.cross import Cross
from unbraid.types import Feature


def wide_table() -> pl.DataFrame:
    """`make_table` with a second id of many values."""
    table = make_table(2000)
    return table.with_columns(place=pl.Series(np.random.default_rng(5).integers(0, 50, len(table))))


@pytest.fixture(scope="module")
def case() -> Case:
    run = make_run(features=(Feature("item"), Feature("place"), Feature("x", kind="number")))
    tables = replace(run.model.tables, width=8)
    return make_case(wide_table(), replace(run, model=replace(run.model, interaction=Cross(layers=1), tables=tables)))


def test_a_random_spectrum_is_that_of_drawn_matrices() -> None:
    rows, width = 60, 5
    ours = np.mean([random_spectrum(rows, width, seed) for seed in range(400)], 0)
    rng = np.random.default_rng(0)
    drawn = np.mean([np.linalg.svd(rng.standard_normal((rows, width)), compute_uv=False) for _ in range(400)], 0)
    assert np.allclose(ours, drawn, rtol=0.02)
    assert random_abundance(rows, width, 3) == abundance(random_spectrum(rows, width, 3))


def test_spectra_are_those_of_the_rows_that_are_read_on_a_logarithmic_axis(case: Case) -> None:
    found = Collapse()(case)
    lines = next(plot for plot in found[0].evidence["plots"] if isinstance(plot, Lines))
    assert lines.log_y
    table = case.model.tables[case.model.embeddings.key("shared", "place", "value")].weight.detach().double()
    seen = np.unique(np.concatenate([batch.features["place"].numpy() for batch in case.batches("train")]))
    values = torch.linalg.svdvals(table[seen[seen >= 2]]).numpy()
    assert np.allclose(lines.series["shared/place"][1], values / values[0], rtol=1e-6)
    random = lines.series[f"random {(seen >= 2).sum()} x 8"][1]
    assert random[0] == 1 and all(a >= b > 0 for a, b in zip(random, random[1:], strict=False))


def test_one_random_line_per_shape_and_only_the_worst_tables() -> None:
    tables = {
        f"t{i}": {"rows": 40 + 10 * (i == 3), "width": 4, "spectrum": np.array([1, 0.5, 0.2, 0.1])} for i in range(4)
    }
    assert list(spectra(tables).series) == ["t0", "t1", "t2", "t3", "random 40 x 4", "random 50 x 4"]
    assert MOST_LINES == 4


def test_what_is_left_after_projection_is_by_the_field_s_own_abundance(case: Case) -> None:
    heat = next(plot for plot in Collapse()(case)[0].evidence["plots"] if isinstance(plot, Heat))
    assert heat.title == "After projection for a partner: shared" and heat.centre == 1
    (module,) = case.model.interactions.values()
    matrix, at = module.layers[0].weight.detach().double(), {name: i for i, name in enumerate(heat.rows)}
    across = {name: i for i, name in enumerate(heat.columns)}
    assert set(at) == set(across) == {"item", "place"}
    tables = {
        name: case.model.tables[case.model.embeddings.key("shared", name, "value")].weight.detach().double()
        for name in at
    }
    seen = {name: torch.cat([b.features[name] for b in case.batches("train")]).unique() for name in at}
    rows = {name: tables[name][seen[name][seen[name] >= 2]] for name in at}
    starts = dict(zip(module.widths, np.cumsum([0, *module.widths.values()]), strict=False))
    for source in at:
        for partner in at:
            block = matrix[starts[partner] : starts[partner] + 8, starts[source] : starts[source] + 8]
            left = abundance(torch.linalg.svdvals(rows[source] @ block.T).numpy())
            own = abundance(torch.linalg.svdvals(rows[source]).numpy())
            assert heat.values[at[source]][across[partner]] == pytest.approx(left / own, rel=1e-6)


def test_without_cross_layers_there_is_no_map() -> None:
    assert not [p for p in Collapse()(make_case(wide_table()))[0].evidence["plots"] if isinstance(p, Heat)]


def test_of_many_fields_the_judged_ones_of_least_abundance_and_the_worst_partners_are_shown() -> None:
    fields = [f"f{i}" for i in range(MOST_FIELDS + 5)]  # as the probe has them: largest abundance first
    grid = np.tile(np.arange(len(fields), 0, -1.0), (len(fields), 1))  # the last partner leaves least
    found = {"fields": fields, "abundance": np.full(len(fields), 2.0), "grid": grid}
    heat = projections("v", found, fields[:-1])
    assert heat is not None and heat.rows == tuple(fields[4:-1]) and heat.columns == tuple(fields[:4:-1])
    assert heat.values[0][:2] == (0.5, 1.0)
    assert projections("v", found, ()) is None
