"""TWIN and its variants against loops over events in float64: projections, four tables, hard search."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from history_kit import FIELDS, LENGTHS, Case, Choose, D, agree, events_of
from torch import Tensor, nn
from toylog import make_data, make_log, make_run

from unbraid.bundle import Bundle
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.searched import newest
from unbraid.encoders.table import Views
from unbraid.encoders.twin import TWIN, HardTWINHistory, TWINHistory
from unbraid.job import train
from unbraid.losses.history import HistoryLoss
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.stem import STEM
from unbraid.types import MISSING, UNKNOWN, History, Ragged, Rows

ONE = ("value",) * 4  # of keys, queries, values, the row's own
FOUR = ("event_key", "query", "event_value", "value")


def maps_of(case: Case) -> Any:
    weights = {name: x for name, x in case.module.named_parameters() if name.startswith("maps.")}

    def maps(side: str, name: str, x: Tensor) -> Tensor:
        weight = weights.get(f"maps.{side}/{name}.weight")
        return x if weight is None else torch.einsum("od,nd->no", weight, x)

    return maps


def by_category(case: Case) -> Choose:
    config = case.config

    def choose(row: int, events: list[int], scores: list[float]) -> list[int]:
        asked = case.ids[config.category][row].item()
        same = [e for e in events if asked > 1 and case.index[config.category][e].item() == asked]
        others = [e for e in events if e not in same]
        kept = same[max(0, len(same) - config.keep) :]
        missing = config.keep - len(kept) if config.fill else 0
        return sorted(kept + (others[-missing:] if missing else []))

    return choose


CONFIGS = [
    TWIN(keep=3, projections=projections, tables=tables, target_aware=aware, pooled=pooled, auxiliary=auxiliary, **hard)  # type: ignore[arg-type]
    for projections in (False, True)
    for tables in ("shared", "four")
    for aware, pooled in ((True, True), (True, False), (False, True))
    for auxiliary in ((), (5,))
    for hard in ({}, {"search": "hard", "category": "brand"}, {"search": "hard", "category": "item", "fill": True})
]


def compare(case: Case) -> None:
    roles = FOUR if case.config.tables == "four" else ONE
    choose = by_category(case) if case.config.search == "hard" else None
    # all events of one category: its part of the score is the same for all, and a softmax does not see it
    ends = ("event_key/brand", "query/brand", "key/brand.weight", "query/brand.weight")
    alike = case.config.search == "hard" and not case.config.fill
    free = frozenset(name for name in case.leaves if alike and name.endswith(ends))
    agree(case, case.reference(*roles, choose=choose, maps=maps_of(case)), roles, free)


# ------------------------------------------------------------------------------------------------------------ the formulas
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_is_the_loop_over_events(config: TWIN) -> None:
    case = Case(config, lengths=[*LENGTHS, 12, 12])
    compare(case)
    case.module.eval()
    compare(case)


@pytest.mark.parametrize("targets", [("brand",), ("item", "brand"), ()])
@pytest.mark.parametrize("scale", ["parts", "whole"])
@pytest.mark.parametrize("tables", ["shared", "four"])
def test_fields_that_the_row_has_not_have_learned_queries(targets: Any, scale: str, tables: str) -> None:
    compare(Case(TWIN(keep=2, projections=True, scale=scale, tables=tables, auxiliary=(4,)), targets))  # type: ignore[arg-type]


def test_every_side_and_field_has_a_map_and_no_bias() -> None:
    case = Case(TWIN(projections=True))
    both = [f"{side}/{name}" for side in ("key", "value") for name in FIELDS]
    mine = [f"{side}/{name}" for side in ("query", "own") for name in ("item", "brand")]
    assert set(case.module.maps) == {*both, *mine}
    assert all(m.bias is None and m.weight.shape == (D, D) for m in case.module.maps.values())
    assert not [n for n in Case(TWIN(projections=True, target_aware=False)).module.maps if n.startswith("own/")]
    second = Case(TWIN(projections=True, target_aware=False, auxiliary=(4,))).module
    assert {"own/item", "own/brand"} <= set(second.maps), "second heads read the row's own"
    assert not Case(TWIN()).module.maps


def test_with_unit_maps_projections_do_nothing() -> None:
    plain, mapped = Case(TWIN(keep=3, auxiliary=(4,))), Case(TWIN(keep=3, auxiliary=(4,), projections=True))
    for of in mapped.module.maps.values():
        nn.init.eye_(of.weight)
    mapped.module.load_state_dict(plain.module.state_dict(), strict=False)
    mapped.tables, mapped.rows = plain.tables, plain.rows
    got, want = mapped(), plain()
    assert all(torch.equal(x, want[name]) for name, x in got.items())


def test_projections_are_of_distinct_vectors_not_of_events() -> None:
    """Nothing as large as the events' vectors is made, nor kept for the backward pass."""
    events, width, distinct = 5_000, 16, 10
    module = TWIN(keep=3, projections=True, auxiliary=(4,)).build({"item": width}, {"item": width}, {"value": width})
    read = Rows(torch.randn(distinct, width, requires_grad=True), torch.randint(0, distinct, (events,)))
    target = {"value": {"item": torch.randn(2, width)}, "id": {}}
    largest: list[int] = []

    def pack(x: Tensor) -> Tensor:
        largest.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module({"value": {"item": read}}, Ragged({}, torch.tensor([0, 4_000, events])), target)
    assert largest and max(largest) <= events
    keys = module.keys({"value": {"item": read}})["item"]
    assert keys.vectors.shape == (distinct, width) and keys.index is read.index
    assert keys.by_vector[0] is read.by_vector[0], "the order of the reads is found once"


@pytest.mark.parametrize("tables", ["shared", "four"])
def test_a_table_for_each_of_four_sides(tables: str) -> None:
    """Which tables the weights and which the sums reach."""
    case = Case(TWIN(keep=3, tables=tables))  # type: ignore[arg-type]
    reached: dict[str, set[str]] = {}
    for what, out in (("sum", case()["item"]), ("product", case()["item.product"])):
        found = torch.autograd.grad(out.square().sum(), list(case.leaves.values()), allow_unused=True)
        named = zip(case.leaves, found, strict=True)
        reached[what] = {
            "/".join(n.split("/")[:2])
            for n, g in named
            if g is not None and g.any() and n.startswith(("table/", "row/"))
        }
    if tables == "four":
        assert reached["sum"] == {"table/event_key", "row/query", "table/event_value"}
        assert reached["product"] == reached["sum"] | {"row/value"}
    else:
        assert reached["sum"] == reached["product"] == {"table/value", "row/value"}


# ------------------------------------------------------------------------------------------------------------- hard search
def test_the_newest_marked_events() -> None:
    lists = Ragged({}, torch.tensor([0, 5, 5, 7, 11]))
    marked = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1]).bool()
    for keep, fill, want in (
        (2, False, [2, 3, 9, 10]),
        (2, True, [2, 3, 5, 6, 9, 10]),
        (3, True, [0, 2, 3, 5, 6, 8, 9, 10]),
        (4, True, [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (9, False, [0, 2, 3, 7, 8, 9, 10]),
        (9, True, list(range(11))),
    ):
        kept = newest(marked, lists, keep, fill=fill)
        assert kept.index.tolist() == want
        sizes = [sum(a <= i < b for i in want) for a, b in ((0, 5), (5, 5), (5, 7), (7, 11))]
        assert kept.lists.lengths.tolist() == sizes and kept.everything == (len(want) == 11)
    for fill in (False, True):
        assert newest(
            torch.zeros(0).bool(), Ragged({}, torch.tensor([0, 0, 0])), 3, fill=fill
        ).lists.lengths.tolist() == [0, 0]


def test_only_events_of_the_category_are_attended_to() -> None:
    case = Case(TWIN(keep=4, search="hard", category="brand"))
    case.ids["brand"][2] = 9  # nobody's
    out = case()
    assert not out["item"][2].any() and not out["item.product"][2].any()
    filled = Case(TWIN(keep=4, search="hard", category="brand", fill=True))
    filled.ids["brand"][2] = 9
    events, history, target = filled.inputs()
    kept = filled.module.find(filled.module.parts(events, target), history, target)
    assert kept.index[kept.lists.rows == 2].tolist() == [8, 9, 10, 11], "the newest four of 3 to 11"


@pytest.mark.parametrize("code", [UNKNOWN, MISSING])
def test_an_unknown_category_equals_none(code: int) -> None:
    case = Case(TWIN(keep=4, search="hard", category="brand"))
    case.index["brand"].fill_(code)
    case.ids["brand"].fill_(code)
    assert not any(x.any() for x in case().values())


def test_hard_search_reads_ids_and_no_scores() -> None:
    """Hard search by the category is soft search where the category decides all, as far as there are enough events."""
    case = Case(TWIN(keep=3, search="hard", category="brand"))
    events, history, target = case.inputs()
    before = case.module.find([], history, target).index
    with torch.no_grad():
        for of in case.tables["value"].values():
            of.normal_()
    assert torch.equal(case.module.find([], history, target).index, before)


def test_keeping_all_of_hard_search_is_soft_search() -> None:
    soft, hard = Case(TWIN(keep=20)), Case(TWIN(keep=20, search="hard", category="brand", fill=True))
    hard.module.load_state_dict(soft.module.state_dict())
    got, want = hard(), soft()
    assert isinstance(hard.module, HardTWINHistory) and not isinstance(soft.module, HardTWINHistory)
    for name, x in got.items():
        assert torch.equal(x, want[name])


# -------------------------------------------------------------------------------------------------------------- in a model
def data_of(tmp_path: Any) -> Any:
    histories = (
        History("seen", fields=("item", "shop", "clicked", "position"), length=12),
        History("liked", fields=("item", "shop", "gap"), where="clicked = 1", length=6),
    )
    return make_data(histories=histories, cache=f"{tmp_path}/cache")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return Encoded(encode(data_of(tmp_path_factory.mktemp("twin")), tables={"log": make_log()}))


VARIANTS = [
    TWIN(keep=3, tables=tables, projections=projections, auxiliary=(4,), **hard)  # type: ignore[arg-type]
    for tables in ("shared", "four")
    for projections in (False, True)
    for hard in ({}, {"search": "hard", "category": "shop"}, {"search": "hard", "category": "shop", "fill": True})
]


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["shared", "per_task"])
def test_variants_run_in_a_model_and_every_table_learns(encoded: Encoded, config: TWIN, kind: str) -> None:
    torch.manual_seed(0)
    views, tower = Views(kind=kind, width=4, std=0.5), SharedBottom() if kind == "shared" else STEM()  # type: ignore[arg-type]
    model, batch = Model(encoded.schema, tower, views, history=config), encoded.batch(np.arange(100, 200))
    out = model(batch)
    logits = [*out.logits.values(), *(out.extras[f"history.{task}"] for task in out.logits)]
    found = torch.autograd.grad(sum(x.square().sum() for x in logits), [x.vectors for x in out.lookups])  # type: ignore[arg-type]
    assert {x.table for x in out.lookups} == set(model.tables)
    assert all(g.abs().max() > 0 for g in found)
    model.eval()
    with torch.no_grad():
        served, some = model(batch), model(batch.select(torch.tensor([7, 3])))
    for task, logits_of in served.logits.items():
        torch.testing.assert_close(some.logits[task], logits_of[[7, 3]], rtol=1e-5, atol=1e-6)


def test_the_tables_of_four_sides_in_a_model(encoded: Encoded) -> None:
    model = Model(encoded.schema, SharedBottom(), Views(width=4), history=TWIN(tables="four"))
    names = {name.removeprefix("shared/") for name in model.tables}
    events = {
        f"{field}/{role}"
        for field in ("item", "shop", "clicked", "position", "gap")
        for role in ("event_key", "event_value")
    }
    row = {f"{field}/{role}" for field in ("item", "shop") for role in ("value", "query")}
    assert names == events | row | {"tags/value"}
    reads = {reader: set(roles) for reader, (_, roles) in model._reads.items()}
    assert reads["item"] == {"value", "query"} and reads["seen.item"] == {"event_key", "event_value"}
    pointers = [t.weight.data_ptr() for t in model.tables.values()]
    assert len(set(pointers)) == len(pointers)


def test_one_table_serves_all(encoded: Encoded) -> None:
    model = Model(encoded.schema, SharedBottom(), Views(width=4), history=TWIN())
    assert all(name.endswith("/value") for name in model.tables)


@pytest.mark.parametrize("config", [VARIANTS[-1], VARIANTS[3]], ids=str)
def test_it_trains_and_survives_a_bundle(config: TWIN, tmp_path: Any) -> None:
    base = make_run()
    model = base.model.__class__(history=config, tables=Views(width=4))
    run = make_run(data=data_of(tmp_path), model=model, losses=(Supervised(), HistoryLoss()))
    result = train(run, tables={"log": make_log()}, baseline=False)
    result.bundle.save(tmp_path / "bundle")
    saved = Bundle.load(tmp_path / "bundle").model
    assert [m for m in saved.modules() if isinstance(m, TWINHistory)]
    for name, x in result.bundle.model.state_dict().items():
        assert torch.equal(x, saved.state_dict()[name]), name


# ----------------------------------------------------------------------------------------------------------------- errors
def test_what_is_not_a_configuration() -> None:
    for change, message in (
        ({"search": "both"}, r"Parameter `search` should be one of \('soft', 'hard'\). Found `both`."),
        ({"tables": "two"}, r"Parameter `tables` should be one of \('shared', 'four'\). Found `two`."),
        ({"search": "hard"}, "Search `hard` needs `category`, an event field."),
        ({"category": "shop"}, "`category` belongs to search `hard`. Found search `soft`, category `shop`."),
        ({"fill": True}, "Parameter `fill` belongs to search `hard`. Found search `soft`."),
        ({"keep": 0}, "Parameter `keep` should be positive. Found 0."),
    ):
        with pytest.raises(ValueError, match=message):
            TWIN(**change)  # type: ignore[arg-type]


def test_a_category_that_is_no_field_is_an_error(encoded: Encoded) -> None:
    with pytest.raises(ValueError, match=r"`category` .* Found `colour`; a history with fields \['item', 'shop'"):
        Model(encoded.schema, SharedBottom(), Views(width=4), history=TWIN(search="hard", category="colour"))
    with pytest.raises(ValueError, match=r"Found `action`; a history with fields \['item', 'action'\] has \['item'\]"):
        TWIN(search="hard", category="action").build(
            {"item": D, "action": D}, {"item": D}, {"value": D}
        )  # not of the row


def test_a_field_may_have_any_name() -> None:
    names = ("a.b", "keys", "type")
    config = TWIN(projections=True)
    module = config.build(dict.fromkeys(names, D), dict.fromkeys(names, D), {"value": D})
    events = {"value": {n: Rows(torch.randn(3, D), torch.tensor([0, 2])) for n in names}}
    target = {"value": {n: torch.randn(1, D) for n in names}, "id": {}}
    out = module(events, Ragged({}, torch.tensor([0, 2])), target)
    assert set(out) == set(itertools.chain(names, (f"{n}.product" for n in names)))
    assert events_of(torch.tensor([0, 2])) == [[0, 1]]
