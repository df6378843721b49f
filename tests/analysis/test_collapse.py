"""Information abundance: known values, invariances, random matrices, which rows count, projections, the figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid.analysis import collapse
from unbraid.analysis.collapse import Collapse, abundance, gram, plot, random_abundance, spectrum
from unbraid.bundle import build
from unbraid.config import Expert, ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.dare import DARE
from unbraid.encoders.pooling import Mean
from unbraid.encoders.table import Views
from unbraid.encoders.twin import TWIN
from unbraid.interactions.cross import Cross
from unbraid.interactions.fm import FM
from unbraid.model import Model
from unbraid.types import FIRST_VALUE, Feature, Ragged, Schema


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    data = make_data(cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data, tables={"log": make_log(rows=400)}))


def model_of(encoded: Encoded, **choice: Any) -> Model:
    tables = choice.pop("tables", Views(width=4))
    return build(make_run(model=ModelChoice(tables=tables, **choice)), encoded.schema)


def train_batches(encoded: Encoded, size: int = 64) -> list[Any]:
    return list(encoded.in_order(encoded.split("train"), size))


def of(matrix: torch.Tensor, **settings: Any) -> float:
    return abundance(spectrum(gram(matrix, **settings), len(matrix)))


def exactly(matrix: torch.Tensor) -> float:
    values = torch.linalg.svdvals(matrix.double())
    return float(values.sum() / values[0])


# ------------------------------------------------------------------------------------------------------------ the numbers
def test_known_values() -> None:
    assert of(torch.eye(4)) == pytest.approx(4, abs=1e-12)
    assert of(torch.diag(torch.tensor([4.0, 2, 1, 1]))) == pytest.approx(2, abs=1e-12)
    one = torch.outer(torch.arange(1.0, 8), torch.tensor([3.0, -1, 2]))
    assert of(one.double()) == pytest.approx(1, abs=1e-6)
    assert np.isnan(of(torch.zeros(3, 2)))
    assert spectrum(gram(torch.randn(3, 5)), 3).shape == (3,) and spectrum(gram(torch.randn(7, 5)), 7).shape == (5,)


@pytest.mark.parametrize(
    ("shape", "mean", "one"),  # means over 300 drawn matrices, and a single one
    [((10, 10), 4.72, 4.54), ((100, 10), 7.84, 7.29), ((1000, 10), 9.22, 9.28), ((1000, 64), 51.1, 50.9)],
)
def test_random_matrices(shape: tuple[int, int], mean: float, one: float) -> None:
    drawn = np.array([random_abundance(*shape, seed) for seed in range(200)])
    torch.manual_seed(0)
    real = np.array([of(torch.randn(*shape, dtype=torch.float64)) for _ in range(200)])
    error = np.sqrt(drawn.var() / 200 + real.var() / 200)
    assert abs(drawn.mean() - real.mean()) < 4 * error and 0.7 < drawn.std() / real.std() < 1.4
    assert drawn.mean() == pytest.approx(mean, rel=0.02) and abs(drawn.mean() - one) < 3 * drawn.std()
    turned = [random_abundance(*reversed(shape), seed) for seed in range(200)]
    assert abs(np.mean(turned) - real.mean()) < 4 * error


def test_a_large_random_matrix_and_one_of_unit_rows() -> None:
    assert np.mean([random_abundance(100_000, 10, seed) for seed in range(20)]) == pytest.approx(9.92, abs=0.02)
    assert random_abundance(10, 1, 0) == random_abundance(10, 1, 0, normalise=True) == pytest.approx(1)
    torch.manual_seed(0)
    for shape in ((50, 4), (3, 8)):
        drawn = np.array([random_abundance(*shape, seed, normalise=True) for seed in range(300)])
        real = np.array([exactly(torch.nn.functional.normalize(torch.randn(*shape).double())) for _ in range(300)])
        assert abs(drawn.mean() - real.mean()) < 4 * np.sqrt(drawn.var() / 300 + real.var() / 300)
    plain = np.mean([random_abundance(50, 4, seed) for seed in range(300)])
    unit = np.mean([random_abundance(50, 4, seed, normalise=True) for seed in range(300)])
    assert unit > plain + 0.02, "unit rows are more alike"


def test_it_does_not_change_with_scale_rotation_or_order() -> None:
    torch.manual_seed(1)
    e = torch.randn(60, 6, dtype=torch.float64) * torch.tensor([5.0, 3, 2, 1, 0.1, 0.01])
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    for other in (e * 1e-3, e @ turn, e[torch.randperm(60)]):
        assert of(other) == pytest.approx(exactly(e), rel=1e-9)
    assert abs(of(e * torch.tensor([2.0, 1, 1, 1, 1, 1])) - of(e)) > 0.1


def test_the_gram_matrix_is_exact_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    e = torch.randn(200, 12)
    low = torch.randn(200, 3).double() @ torch.randn(3, 12).double()
    for chunk in (collapse.CHUNK, 7):
        monkeypatch.setattr(collapse, "CHUNK", chunk)
        assert of(e) == pytest.approx(exactly(e), rel=1e-12)
        assert of(low) == pytest.approx(exactly(low), abs=1e-6)
        rows = torch.tensor([3, 5, 8, 13, 21, 34, 55, 89, 144])
        torch.testing.assert_close(gram(e, rows), e[rows].double().T @ e[rows].double(), rtol=1e-12, atol=1e-12)
    graded = e.double() * torch.logspace(0, -6, 12).double()  # what is far below the first hardly counts
    assert of(graded) == pytest.approx(exactly(graded), rel=1e-7)


def test_normalised_rows_forget_their_length() -> None:
    torch.manual_seed(3)
    e = torch.randn(40, 5, dtype=torch.float64)
    longer = e * torch.rand(40, 1, dtype=torch.float64) ** 4
    assert of(longer, normalise=True) == pytest.approx(of(e, normalise=True), rel=1e-10)
    assert abs(of(longer) - of(e)) > 0.1
    tiny = torch.cat([e * 1e-30, torch.zeros(3, 5)])
    assert of(tiny, normalise=True) == pytest.approx(of(e, normalise=True), rel=1e-10)


# --------------------------------------------------------------------------------------------------------- which rows count
def by_hand(schema: Schema, batches: list[Any], events: bool = True) -> dict[str, list[int]]:
    """How often each row was read, one id at a time."""
    counts = {name: [0] * size for name, size in schema.sizes.items()}
    for batch in batches:
        for f in schema.features:
            value = batch.features[f.name]
            if f.kind in ("id", "bag"):
                ids = value.values[f.name] if isinstance(value, Ragged) else value
                for i in ids.tolist():
                    counts[f.vocab][i] += 1
        for history in schema.histories if events else ():
            for name in history.fields:
                for i in batch.features[history.name].values[name].tolist():
                    counts[schema.field_vocabulary(name)][i] += 1
    return counts


@pytest.mark.parametrize("least", [1, 5])
def test_rows_that_were_not_read_do_not_count(encoded: Encoded, least: int) -> None:
    model, batches = model_of(encoded), train_batches(encoded)[:2]
    counts = by_hand(encoded.schema, batches)
    rows = {name: [i for i, n in enumerate(c) if n >= least and i >= FIRST_VALUE] for name, c in counts.items()}
    assert any(0 < len(rows[name]) < len(c) - FIRST_VALUE for name, c in counts.items())
    probe = Collapse(least=least, seeds=(0, 1))
    values = probe(model, encoded.schema, iter(batches)).values
    with torch.no_grad():
        for name, table in model.tables.items():  # what does not count may be anything
            others = [i for i in range(len(table.weight)) if i not in rows[name.split("/")[1]]]
            table.weight[others] = 1e6
    assert probe(model, encoded.schema, iter(batches)).values["tables"].keys() == values["tables"].keys()
    for name, found in probe(model, encoded.schema, iter(batches)).values["tables"].items():
        mine = rows[name.split("/")[1]]
        weight = model.tables[f"{name}/value"].weight.detach()
        assert (found["rows"], found["size"], found["width"]) == (len(mine), len(weight), 4)
        assert found["abundance"] == pytest.approx(exactly(weight[mine]), rel=1e-9)
        assert found["abundance"] == values["tables"][name]["abundance"]
        s = torch.linalg.svdvals(weight[mine].double()).numpy()
        assert np.allclose(found["spectrum"], s / s[0]) and len(found["spectrum"]) == min(len(mine), 4)
        assert found["random"].tolist() == [random_abundance(len(mine), 4, seed) for seed in (0, 1)]
        assert found["relative"] == pytest.approx(found["abundance"] / found["random"].mean())


def test_an_untrained_model_is_a_random_one_and_a_collapsed_table_is_found(encoded: Encoded) -> None:
    model = model_of(encoded, tables=Views(width=8))
    batches = train_batches(encoded)
    values = Collapse()(model, encoded.schema, batches).values
    assert all(0.7 < table["relative"] < 1.4 for table in values["tables"].values()) and not values["projected"]
    with torch.no_grad():
        weight = model.tables["shared/item/value"].weight
        weight.copy_(torch.outer(torch.randn(len(weight)), torch.randn(8)))
    found = Collapse()(model, encoded.schema, batches)
    rows = found.values["tables"]["shared/item"]["rows"]
    assert found.values["tables"]["shared/item"]["abundance"] == pytest.approx(1, abs=1e-3)
    assert f"1 of {len(values['tables'])} tables" in found.reading
    assert "`shared/item`, 1.00 where a random one has" in found.reading and f"({rows} rows, width 8)" in found.reading
    one = Collapse(normalise=True)(model, encoded.schema, batches).values["tables"]["shared/item"]
    assert one["abundance"] == pytest.approx(1, abs=1e-3)
    assert one["random"].tolist() == [random_abundance(rows, 8, seed, normalise=True) for seed in range(5)]


def test_the_lowest_is_the_lowest_of_its_shape(encoded: Encoded) -> None:
    model = model_of(encoded, tables=Views(width=8))
    with torch.no_grad():
        weight = model.tables[
            "shared/item/value"
        ].weight  # three equal directions: more than a table of two rows can have
        weight.copy_(torch.linalg.qr(torch.randn(len(weight), 3))[0] @ torch.eye(3, 8))
    found = Collapse()(model, encoded.schema, train_batches(encoded))
    tables = found.values["tables"]
    assert tables["shared/clicked"]["abundance"] < 2 < tables["shared/item"]["abundance"]
    assert found.reading.startswith("0 of") and "Lowest by that measure: `shared/item`" in found.reading


def test_unknown_and_missing_do_not_count(encoded: Encoded) -> None:
    (batch, *_), model = train_batches(encoded), model_of(encoded)
    ids = torch.arange(len(batch)) % 5  # 0 and 1, and three values
    histories = {
        h.name: batch.features[h.name].select(torch.zeros(0, dtype=torch.int64)) for h in encoded.schema.histories
    }
    read = replace(batch, features={**batch.features, **histories, "item": ids})
    assert Collapse()(model, encoded.schema, [read]).values["tables"]["shared/item"]["rows"] == 3


def test_tables_without_two_rows_are_skipped(encoded: Encoded) -> None:
    model, batches = model_of(encoded), train_batches(encoded)
    with torch.no_grad():
        model.tables["shared/shop/value"].weight.zero_()
    values = Collapse()(model, encoded.schema, batches).values
    assert values["skipped"] == {"shared/shop": "all its vectors are zero"} and "shared/shop" not in values["tables"]
    none = Collapse()(model, encoded.schema, [])
    assert not none.values["tables"] and none.reading == "No table has two rows that count."
    assert none.values["skipped"]["shared/item"] == "0 of its rows count; 2 are needed"
    with pytest.raises(ValueError, match="No table has two rows"):
        plot(none)


def test_events_count_where_they_read_the_views_own_tables(encoded: Encoded) -> None:
    batches = train_batches(encoded, 8)[-2:]
    both, alone = (by_hand(encoded.schema, batches, events)["item"] for events in (True, False))
    assert sum(n > 0 for n in both) > sum(n > 0 for n in alone) > 3
    for history, events in ((TWIN(), True), (DARE(), True), (TWIN(tables="four"), False)):
        model = model_of(encoded, history=history)
        counts = by_hand(encoded.schema, batches, events)
        tables = Collapse()(model, encoded.schema, batches).values["tables"]
        assert tables["shared/item"]["rows"] == sum(n > 0 for n in counts["item"][FIRST_VALUE:]), history
        assert all(name.count("/") == 1 for name in tables)


def test_events_of_a_history_with_an_encoder_of_its_own_count(encoded: Encoded) -> None:
    batches = train_batches(encoded, 8)[-2:]
    model = model_of(encoded, history=TWIN(tables="four"), history_of={"liked": Mean()})
    read = {i for batch in batches for i in batch.features["item"].tolist()}
    liked = {i for batch in batches for i in batch.features["liked"].values["item"].tolist()}
    rows = Collapse()(model, encoded.schema, batches).values["tables"]["shared/item"]["rows"]
    assert rows == sum(i >= FIRST_VALUE for i in read | liked) > sum(i >= FIRST_VALUE for i in read)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="least"):
        Collapse(least=0)
    with pytest.raises(ValueError, match="seeds"):
        Collapse(seeds=())


# ------------------------------------------------------------------------------------------------------------- projections
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("rank", [0, 5])
def test_projections_by_the_blocks_of_the_first_cross_layer(encoded: Encoded, rank: int, normalise: bool) -> None:
    model = model_of(encoded, interaction=Cross(layers=2, rank=rank), tables=Views(kind="several", widths=(4, 6)))
    batches = train_batches(encoded)
    values = Collapse(normalise=normalise)(model, encoded.schema, batches).values
    assert list(values["projected"]) == ["view0", "view1"]
    counts = by_hand(encoded.schema, batches)
    rows = {name: [i for i, c in enumerate(cs) if c and i >= FIRST_VALUE] for name, cs in counts.items()}
    for (view, found), width in zip(values["projected"].items(), (4, 6), strict=True):
        module = model.interactions[f"view/{view}"]
        layer = module.layers[0]
        whole = layer[1].weight @ layer[0].weight if rank else layer.weight
        assert set(found["fields"]) == {"item", "shop", "tags"}
        order = [values["tables"][f"{view}/{name}"]["abundance"] for name in found["fields"]]
        assert order == sorted(order, reverse=True) == found["abundance"].tolist()
        start = {name: sum(list(module.widths.values())[:n]) for n, name in enumerate(module.fields)}
        for i, source in enumerate(found["fields"]):
            e = model.tables[f"{view}/{source}/value"].weight[rows[source]].double()
            e = e / e.norm(dim=1, keepdim=True) if normalise else e
            for j, partner in enumerate(found["fields"]):
                to, of_ = slice(start[partner], start[partner] + width), slice(start[source], start[source] + width)
                want = exactly((e @ whole[to, of_].double().T).detach())
                assert found["grid"][i, j] == pytest.approx(want, rel=1e-5)


def test_every_expert_with_cross_layers_is_projected(encoded: Encoded) -> None:
    experts = tuple(
        Expert(view=v, interaction=i) for v, i in ((1, Cross()), (0, FM()), (0, Cross()), (0, Cross(rank=2)))
    )
    tables = Views(kind="several", widths=(4, 6))
    model, batches = model_of(encoded, experts=experts, tables=tables), train_batches(encoded)
    values = Collapse()(model, encoded.schema, batches).values
    assert list(values["projected"]) == ["view1.cross", "view0.cross", "view0.cross.2"]
    one, first, second = values["projected"].values()
    assert first["abundance"].tolist() == second["abundance"].tolist() != one["abundance"].tolist()
    assert (second["grid"] < 2 + 1e-6).all() and (first["grid"] > 2).any()


def test_a_block_of_rank_one_leaves_one_direction(encoded: Encoded) -> None:
    model = model_of(encoded, interaction=Cross())
    module = model.interactions["view/shared"]
    names = list(module.widths)
    a, b = (sum(list(module.widths.values())[: names.index(n)]) for n in ("item", "shop"))
    with torch.no_grad():
        module.layers[0].weight[b : b + 4, a : a + 4] = torch.outer(torch.randn(4), torch.randn(4))
    found = Collapse()(model, encoded.schema, train_batches(encoded)).values["projected"]["shared"]
    at = (found["fields"].index("item"), found["fields"].index("shop"))
    assert found["grid"][at] == pytest.approx(1, abs=1e-3) and found["grid"][at[::-1]] > 1.2


def test_two_features_of_one_vocabulary_have_one_table(encoded: Encoded, tmp_path: Path) -> None:
    features = (Feature("item"), Feature("again", column="item", vocabulary="item"), Feature("shop"))
    data = make_data(features=features, cache=str(tmp_path))
    other = Encoded(encode(data, tables={"log": make_log(rows=400)}))
    run = make_run(data=data, model=ModelChoice(interaction=Cross(), tables=Views(width=4)))
    values = Collapse()(build(run, other.schema), other.schema, train_batches(other)).values
    assert sorted(values["projected"]["shared"]["fields"]) == ["again", "item", "shop"]
    assert set(values["tables"]) >= {"shared/item", "shared/shop"} and "shared/again" not in values["tables"]


# --------------------------------------------------------------------------------------------------------------- the plot
def test_the_plot_is_written(encoded: Encoded, tmp_path: Path) -> None:
    model = model_of(encoded, interaction=Cross())
    found = Collapse()(model, encoded.schema, train_batches(encoded))
    drawn = plot(found, tmp_path / "collapse.png")
    assert (tmp_path / "collapse.png").stat().st_size > 5000
    spectra, bars, grid, _ = drawn.axes
    tables = sorted(found.values["tables"].values(), key=lambda t: -t["rows"])
    assert np.allclose(spectra.lines[0].get_ydata(), tables[0]["spectrum"]) and len(spectra.lines) == len(tables)
    assert [bar.get_width() for bar in bars.patches] == [table["abundance"] for table in tables]
    assert np.allclose(bars.lines[0].get_xdata(), [table["random"].mean() for table in tables])
    assert np.allclose(grid.images[0].get_array(), found.values["projected"]["shared"]["grid"])
    assert "tables (rows as they are)" in drawn.get_suptitle()
    unit = replace(found, values={**found.values, "normalise": True, "projected": {}})
    assert len(plot(unit, most=2).axes) == 2 and "2 of" in plot(unit, most=2).get_suptitle()
    assert len(plot(unit, most=2).axes[0].lines) == 2 and "unit length" in plot(unit).get_suptitle()
