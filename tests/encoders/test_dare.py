"""DARE against loops over events in float64, and the exact properties of two tables instead of one."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from history_kit import FIELDS, LENGTHS, Case, D, agree, events_of
from torch import Tensor, nn
from toylog import make_data, make_log

from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders import packed, search, searched
from unbraid.encoders.dare import DARE
from unbraid.encoders.packed import segment_softmax
from unbraid.encoders.searched import SearchedHistory, Sides
from unbraid.encoders.table import Views
from unbraid.encoders.twin import TWIN
from unbraid.model import Model
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.single_task import SingleTask
from unbraid.towers.stem import STEM
from unbraid.types import Batch, Feature, Field, History, Ragged, Rows, Schema, Task

ROLES = ("attention", "attention", "value", "value")  # of keys, queries, values, the row's own

CONFIGS = [
    DARE(keep=3, scale=scale, attention_width=width, target_aware=aware, pooled=pooled, auxiliary=auxiliary)  # type: ignore[arg-type]
    for scale in ("parts", "whole")
    for width in (0, 3)
    for aware, pooled in ((True, True), (True, False), (False, True))
    for auxiliary in ((), (5,))
]


# ------------------------------------------------------------------------------------------------------------ the formulas
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_is_the_loop_over_events(config: DARE) -> None:
    case = Case(config)
    agree(case, case.reference(*ROLES), ROLES)
    case.module.eval()
    agree(case, case.reference(*ROLES), ROLES)


@pytest.mark.parametrize("keep", [1, 2, 8, 9, 100])
def test_any_number_of_events_may_be_kept(keep: int) -> None:
    case = Case(DARE(keep=keep, auxiliary=(5,)))
    agree(case, case.reference(*ROLES), ROLES)


@pytest.mark.parametrize("targets", [("brand",), ("item",), ()])
@pytest.mark.parametrize("scale", ["parts", "whole"])
@pytest.mark.parametrize("aware", [(True, True), (True, False), (False, True)])
def test_fields_that_the_row_has_not_have_learned_queries(targets: tuple[str, ...], scale: str, aware: Any) -> None:
    config = DARE(keep=2, scale=scale, target_aware=aware[0], pooled=aware[1], auxiliary=(5,))  # type: ignore[arg-type]
    case = Case(config, targets)
    assert set(case.module.queries) == {f"field/{n}" for n in set(FIELDS) - set(targets)}
    agree(case, case.reference(*ROLES), ROLES)
    if not targets:
        assert set(case.module.widths) == set(FIELDS), "without a product there is the sum"


def test_the_score_by_hand() -> None:
    """q = (1, 0, 2, 0 | 1, 1), a = (1, 1, 1, 0 | 2, 0), four semantic and two temporal entries."""
    q = {"item": torch.tensor([[1.0, 0.0]]), "category": torch.tensor([[2.0, 0.0]])}
    a = {"item": [[1.0, 1.0]], "category": [[1.0, 0.0]], "position": [[2.0, 0.0]]}
    events = {"attention": {n: Rows(torch.tensor(x), torch.tensor([0])) for n, x in a.items()}}
    one = Ragged({}, torch.tensor([0, 1]))
    for scale, want in (("parts", 3 / 2 + 2 / 2**0.5), ("whole", 5 / 6**0.5)):
        config = DARE(scale=scale)  # type: ignore[arg-type]
        module = config.build(dict.fromkeys(a, 9), dict.fromkeys(q, 9), {"attention": 2, "value": 9})
        nn.init.ones_(module.queries["field/position"])
        assert module.scores(events, one, {"attention": q}).item() == pytest.approx(want)
    assert 3 / 2 + 2 / 2**0.5 == pytest.approx(2.91421, abs=1e-5)
    assert module.scores(events, one, {"attention": q}, fields=("position",)).item() == pytest.approx(2 / 6**0.5)


# -------------------------------------------------------------------------------------------------- who reaches which table
def grads(case: Case, out: dict[str, Tensor], prefix: str) -> dict[str, Tensor | None]:
    names = [n for n in case.leaves if n.startswith(prefix)]
    total = sum(x.square().sum() for x in out.values())
    found = torch.autograd.grad(total, [case.leaves[n] for n in names], retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("auxiliary", [(), (5,)])
def test_attention_learns_through_weights_alone_and_values_without_them(
    auxiliary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(DARE(keep=3, attention_width=3, auxiliary=auxiliary))
    whole = {prefix: grads(case, case(), prefix) for prefix in ("table/attention", "table/value", "row/value")}
    assert all(g is not None and g.abs().max() > 0 for found in whole.values() for g in found.values())
    monkeypatch.setattr(searched, "segment_softmax", lambda scores, lists: segment_softmax(scores, lists).detach())
    for prefix in ("table/value", "row/value"):
        for name, grad in grads(case, case(), prefix).items():
            torch.testing.assert_close(grad, whole[prefix][name], rtol=0, atol=1e-12)
    for prefix in ("table/attention", "row/attention"):
        assert all(g is None or not g.any() for g in grads(case, case(), prefix).values())


def test_with_detached_values_attention_learns_the_same() -> None:
    case = Case(DARE(keep=3, auxiliary=(5,)))
    whole = grads(case, case(), "table/attention")
    for of in (case.tables["value"], case.rows["value"]):
        for x in of.values():
            x.requires_grad_(False)
    for name, grad in grads(case, case(), "table/attention").items():
        assert grad is not None
        torch.testing.assert_close(grad, whole[name], rtol=0, atol=1e-12)


def apart(config: Any, lengths: list[int] = LENGTHS) -> Case:
    """Every event reads a row of its own of `item`, so that each event's gradient is seen."""
    case = Case(config, lengths=lengths)
    case.index["item"] = torch.arange(sum(lengths))
    for role, width in case.widths.items():
        case.tables[role]["item"] = torch.randn(sum(lengths), width, dtype=torch.float64, requires_grad=True)
    return case


def kept_of(case: Case) -> Tensor:
    events, history, target = case.inputs()
    return case.module.find(case.module.parts(events, target), history, target).index


def test_an_event_that_is_not_kept_learns_from_second_heads_alone() -> None:
    case = apart(DARE(keep=3, auxiliary=(5,)))
    left = torch.ones(sum(LENGTHS), dtype=torch.bool)
    left[kept_of(case)] = False
    assert 0 < int(left.sum()) < len(left)
    out = case()
    main = {name: out[name] for name in case.module.widths}
    for role in ("attention", "value"):
        (grad,) = grads(case, main, f"table/{role}/item").values()
        assert grad is not None and not grad[left].any() and bool(grad.any())
        (grad,) = grads(case, out, f"table/{role}/item").values()
        assert grad is not None and bool(grad[left].any(1).all())


def test_scores_below_the_threshold_do_not_matter() -> None:
    case = apart(DARE(keep=3))
    out, kept = case(), kept_of(case)
    with torch.no_grad():
        for event in set(range(sum(LENGTHS))) - set(kept.tolist()):
            row = int(case.history.rows[event])
            case.tables["attention"]["item"][event] -= case.rows["attention"]["item"][row]
    assert torch.equal(kept_of(case), kept)
    assert all(torch.equal(x, out[name]) for name, x in case().items())


# ------------------------------------------------------------------------------------------------------------------ limits
def test_keeping_all_is_full_attention() -> None:
    case = Case(DARE(keep=max(LENGTHS), auxiliary=(5,)))
    out = case()
    for name in case.module.widths:
        torch.testing.assert_close(out[name], out[f"all.{name}"], rtol=0, atol=1e-12)


def test_keeping_one_is_its_vector() -> None:
    case = Case(DARE(keep=1))
    events, history, target = case.inputs()
    scores = case.module.scores(events, history, target)
    out = case()
    for row, of in enumerate(events_of(history.offsets)):
        for name in FIELDS if of else ():
            best = of[int(scores[of].argmax())]
            torch.testing.assert_close(out[name][row], case.tables["value"][name][case.index[name][best]])


def test_the_product_of_the_sum_is_the_sum_of_products() -> None:
    case = Case(DARE(keep=3))
    out = case()
    for name in case.targets:
        torch.testing.assert_close(out[f"{name}.product"], out[name] * case.rows["value"][name], rtol=0, atol=1e-12)


def test_a_row_without_events_has_zeros_and_other_rows_do_not_matter() -> None:
    case = Case(DARE(keep=3))
    out = case()
    for row, n in enumerate(LENGTHS):
        some = case.history.select(torch.tensor([row]))
        events = {role: {f: Rows(x, some.values[f]) for f, x in of.items()} for role, of in case.tables.items()}
        target = {role: {f: x[row : row + 1] for f, x in of.items()} for role, of in case.rows.items()}
        alone = case.module(events, some, target)
        for name, x in out.items():
            torch.testing.assert_close(alone[name], x[row : row + 1], rtol=0, atol=1e-12)
            assert n or not x[row].any()


def test_time_is_in_the_codes_and_not_in_the_order() -> None:
    case = Case(DARE(keep=3, auxiliary=(5,)))
    out = case()
    order = torch.cat([torch.tensor(e).flip(0) for e in events_of(case.history.offsets) if e])
    flipped = {name: ids[order] for name, ids in case.index.items()}
    for name, x in case(flipped).items():
        torch.testing.assert_close(x, out[name], rtol=0, atol=1e-12)
    moved = case({**flipped, "position": case.index["position"]})
    assert (moved["item"][2] - out["item"][2]).abs().max() > 1e-3
    torch.testing.assert_close(moved["item"][3], out["item"][3])  # a single event is where it was


def relevance(module: Any, role_key: str, role_query: str, tables: dict[str, Tensor], a: int, b: int) -> float:
    """The semantic part of the score of an event of value b for a row of value a, in both fields."""
    events = {role_key: {n: Rows(tables[role_key], torch.tensor([b])) for n in FIELDS}}
    target = {role_query: {n: tables[role_query][[a]] for n in ("item", "brand")}}
    return module.scores(events, Ragged({}, torch.tensor([0, 1])), target, fields=("item", "brand")).item()


def test_relevance_is_symmetric_unless_sides_have_tables_of_their_own() -> None:
    torch.manual_seed(0)
    widths, targets = dict.fromkeys(FIELDS, D), dict.fromkeys(("item", "brand"), D)
    for config, key, query in ((DARE(), "attention", "attention"), (TWIN(tables="four"), "event_key", "query")):
        module = config.build(widths, targets, dict.fromkeys(config.roles, D))  # type: ignore[attr-defined]
        tables = {role: torch.randn(6, D) for role in config.roles}  # type: ignore[attr-defined]
        pairs = list(itertools.combinations(range(6), 2))
        apart = [
            abs(relevance(module, key, query, tables, a, b) - relevance(module, key, query, tables, b, a))
            for a, b in pairs
        ]
        assert (max(apart) < 1e-6) == (key == query) and (min(apart) > 1e-3) == (key != query)


def test_tied_tables_stay_tied_and_train_as_one() -> None:
    """Two copies of one table that both get the sum of their gradients are TWIN, to the bit, at every step."""
    one = Case(TWIN(keep=3), seed=3)
    two = Case(DARE(keep=3), seed=3)
    two.module.load_state_dict(one.module.state_dict())
    shared = {
        **{f"t/{n}": one.tables["value"][n] for n in FIELDS},
        **{f"r/{n}": x for n, x in one.rows["value"].items()},
    }
    pairs = {}
    for name, x in shared.items():
        kind, field = name.split("/")
        of = two.tables if kind == "t" else two.rows
        for role in ("attention", "value"):
            of[role][field] = x.detach().clone().requires_grad_()
        pairs[name] = (of["attention"][field], of["value"][field])
    first = torch.optim.Adam([*shared.values(), *one.module.parameters()], lr=0.05)
    second = torch.optim.Adam([*itertools.chain(*pairs.values()), *two.module.parameters()], lr=0.05)
    flow = {name: torch.randn_like(x) for name, x in one().items()}
    for _ in range(50):
        losses = []
        for case, adam in ((one, first), (two, second)):
            adam.zero_grad()
            loss = sum((x * flow[name]).sum() for name, x in case().items()) + sum(  # type: ignore[union-attr]
                x.square().sum() for x in case().values()
            )
            loss.backward()  # type: ignore[union-attr]
            losses.append(loss.item())  # type: ignore[union-attr]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        for a, b in pairs.values():
            assert a.grad is not None and b.grad is not None and not torch.equal(a.grad, b.grad)
            a.grad = b.grad = a.grad + b.grad
        first.step()
        second.step()
        assert all(torch.equal(a, b) for a, b in pairs.values())


# -------------------------------------------------------------------------------------------------------------------- cost
@pytest.mark.parametrize("way", ["pairs", "product"])
def test_a_search_costs_width_times_events(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply-adds of the products that score events, whichever way they are made."""
    spent: list[int] = []

    def counted(vectors: Tensor, index: Tensor, query: Tensor, lists: Ragged) -> Tensor:
        spent.append(len(index) * vectors.shape[1])
        return plain(vectors, index, query, lists)

    def counted_mm(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        spent.append(a.shape[0] * a.shape[1] * b.shape[1])
        return mm(a, b, out=out)

    plain, mm = packed.products, torch.mm
    monkeypatch.setattr(packed, "products", counted)
    monkeypatch.setattr(torch, "mm", counted_mm)
    monkeypatch.setattr(search, "way_of", lambda *sizes, integers: way)
    lengths, keep = [50, 0, 70, 80], 5
    wide, cost = 8, {}
    for width in (8, 4, 2):
        config = DARE(keep=keep, attention_width=width, target_aware=False)
        module = config.build({"item": wide}, {"item": wide}, {"attention": width, "value": wide}).eval()
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        index = torch.arange(sum(lengths))
        events = {
            "attention": {"item": Rows(torch.randn(200, width), index)},
            "value": {"item": Rows(torch.randn(200, wide), index)},
        }
        target = {"attention": {"item": torch.randn(4, width)}, "value": {"item": torch.randn(4, wide)}}
        spent.clear()
        module(events, Ragged({}, offsets), target)
        kept = sum(min(n, keep) for n in lengths)
        scored = sum(lengths) if way == "pairs" else 4 * 200
        assert sum(spent) == width * (scored + kept)
        cost[width] = sum(spent)
    assert cost[8] == 2 * cost[4] == 4 * cost[2]


def test_a_screened_search_costs_width_times_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of integers of all vectors, exact ones of the few events that these do not rule out and of the kept."""
    integers: list[int] = []
    exact: list[int] = []

    def counted(vectors: Tensor, index: Tensor, query: Tensor, lists: Ragged) -> Tensor:
        exact.append(len(index) * vectors.shape[1])
        return plain(vectors, index, query, lists)

    def counted_int(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        integers.append(a.shape[0] * a.shape[1] * b.shape[1])
        return int_mm(a, b, out=out)

    plain, int_mm = packed.products, torch._int_mm
    monkeypatch.setattr(packed, "products", counted)
    monkeypatch.setattr(torch, "_int_mm", counted_int)
    monkeypatch.setattr(search, "has_integers", lambda: True)
    monkeypatch.setattr(search, "way_of", lambda *sizes, integers: "screen")
    monkeypatch.setattr(torch, "mm", None)  # nothing multiplies all vectors as floats
    lengths, keep, vectors = [3_000, 0, 5_000, 4_000], 5, 600
    for width in (16, 8, 4):
        config = DARE(keep=keep, attention_width=width, target_aware=False)
        module = config.build({"item": 16}, {"item": 16}, {"attention": width, "value": 16}).eval()
        g = torch.Generator().manual_seed(width)
        index = torch.randint(0, vectors, (sum(lengths),), generator=g)
        events = {
            role: {"item": Rows(torch.randn(vectors, d, generator=g), index)}
            for role, d in (("attention", width), ("value", 16))
        }
        target = {role: {"item": torch.randn(4, d, generator=g)} for role, d in (("attention", width), ("value", 16))}
        integers.clear(), exact.clear()
        module(events, Ragged({}, torch.tensor([0, *lengths]).cumsum(0)), target)
        assert sum(integers) == width * len(lengths) * vectors
        kept = 3 * keep
        again = sum(exact) / width - kept
        assert again == int(again) and kept <= again < 0.1 * sum(lengths)


# -------------------------------------------------------------------------------------------------------------- in a model
@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    data = make_data(
        histories=(
            History("seen", fields=("item", "shop", "clicked", "position"), length=12),
            History("liked", fields=("item", "gap"), where="clicked = 1", length=6),
            History("did", fields=("clicked",), length=6),
        ),
        cache=str(tmp_path_factory.mktemp("cache")),
    )
    return Encoded(encode(data, tables={"log": make_log()}))


VIEWS = {
    "shared": (Views(width=4), SharedBottom()),
    "per_task": (Views(kind="per_task", width=4), STEM()),
    "separate": (Views(kind="separate", width=4), SingleTask()),
    "several": (Views(kind="several", widths=(3, 6)), SharedBottom()),
}


def model_of(encoded: Encoded, config: Any, kind: str) -> Model:
    torch.manual_seed(1)
    views, tower = VIEWS[kind]
    return Model(encoded.schema, tower, views, history=config)


def batch_of(encoded: Encoded) -> Batch:
    return encoded.batch(np.arange(100, 160))


@pytest.mark.parametrize("kind", list(VIEWS))
@pytest.mark.parametrize("attention", ["shared", "per_view"])
def test_tables_are_disjoint_and_as_many_as_asked_for(encoded: Encoded, kind: str, attention: str) -> None:
    model = model_of(encoded, DARE(attention=attention, attention_width=2), kind)  # type: ignore[arg-type]
    of = {role: {n: t for n, t in model.tables.items() if n.endswith(f"/{role}")} for role in ("attention", "value")}
    assert set(model.tables) == set(of["attention"]) | set(of["value"])
    pointers = {role: {t.weight.data_ptr() for t in tables.values()} for role, tables in of.items()}
    assert not pointers["attention"] & pointers["value"]
    assert all(len(pointers[role]) == len(of[role]) for role in of), "every table has a memory of its own"
    views = len(model.embeddings.widths)
    copies = 1 if attention == "shared" and kind != "separate" else views
    read = {v for v, roles in model._reads.values() if "attention" in roles}
    assert read == {"item", "shop", "clicked", "position", "gap"}
    assert len(of["attention"]) == copies * len(read)
    assert all(t.weight.shape[1] == 2 for t in of["attention"].values())
    twin = model_of(encoded, TWIN(), kind)
    assert {name.removesuffix("value") for name in twin.tables} == {name.removesuffix("value") for name in of["value"]}
    batch, out = batch_of(encoded), model(batch_of(encoded))
    assert len(batch) == 60
    reached = torch.autograd.grad(sum(x.square().sum() for x in out.logits.values()), [x.vectors for x in out.lookups])  # type: ignore[arg-type]
    by_table = {x.table: g for x, g in zip(out.lookups, reached, strict=True)}
    assert set(of["attention"]) <= set(by_table) and all(g.abs().max() > 0 for g in by_table.values())


@pytest.mark.parametrize("kind", list(VIEWS))
@pytest.mark.parametrize("auxiliary", [(), (5,)])
@pytest.mark.parametrize("training", [True, False])
def test_with_equal_tables_it_is_twin_bit_for_bit(encoded: Encoded, kind: str, auxiliary: Any, training: bool) -> None:
    same = {"keep": 3, "auxiliary": auxiliary}
    twin, dare = model_of(encoded, TWIN(**same), kind), model_of(encoded, DARE(attention="per_view", **same), kind)
    state = twin.state_dict()
    copies = {
        n: n.replace("/attention.weight", "/value.weight") for n in dare.state_dict() if n.endswith("/attention.weight")
    }
    dare.load_state_dict(state | {name: state[of] for name, of in copies.items()})
    batch = batch_of(encoded)
    one, two = (model.train(training)(batch) for model in (twin, dare))
    assert all(torch.equal(x, two.logits[task]) for task, x in one.logits.items())
    extras = {f"history.{task}" for task in one.logits} if auxiliary and training else set()
    assert {n for n in one.extras if n.startswith("history.")} == extras
    assert all(torch.equal(one.extras[name], two.extras[name]) for name in extras)
    with torch.no_grad():  # as it is served: tables come whole
        served = [model.eval().views(batch) for model in (twin, dare)]
    assert all(torch.equal(x, served[1][view]) for view, x in served[0].items())
    with torch.no_grad():
        next(t for n, t in dare.tables.items() if n.endswith("item/attention")).weight.normal_()
    assert any(not torch.equal(x, dare(batch).logits[task]) for task, x in twin.eval()(batch).logits.items())


@pytest.mark.parametrize("kind", ["per_task", "several"])
def test_with_one_attention_table_all_views_weigh_events_alike(encoded: Encoded, kind: str) -> None:
    batch = batch_of(encoded)
    history = batch.features["seen"]
    assert isinstance(history, Ragged)
    for attention in ("shared", "per_view"):
        model = model_of(encoded, DARE(attention=attention), kind)  # type: ignore[arg-type]
        for name, part in model.histories.named_parameters():
            assert ".queries." in name
            nn.init.ones_(part)
        scores = [
            model.event_scores("seen", history, {n: batch.features[n] for n in ("item", "shop")}, view=view)  # type: ignore[misc]
            for view in model.embeddings.widths
        ]
        assert all(torch.equal(scores[0], s) == (attention == "shared") for s in scores[1:])


def test_second_heads_are_for_training(encoded: Encoded) -> None:
    model, batch = model_of(encoded, DARE(keep=3, auxiliary=(6,)), "per_task"), batch_of(encoded)
    assert {"history.click", "history.buy"} <= model.gives
    assert set(model(batch).extras) >= {"history.click", "history.buy"}
    assert not [n for n in model.eval()(batch).extras if n.startswith("history.")]


# ----------------------------------------------------------------------------------------------------------------- errors
def test_what_is_not_a_configuration() -> None:
    for change, message in (
        ({"keep": 0}, "Parameter `keep` should be positive. Found 0."),
        ({"auxiliary": (4, 0)}, r"Parameter `auxiliary` should be positive. Found \(4, 0\)."),
        ({"attention_width": -1}, "Parameter `attention_width` should not be negative. Found -1."),
        ({"attention": "both"}, "Parameter `attention` should be `shared` or `per_view`. Found `both`."),
        ({"scale": "none"}, r"Parameter `scale` should be one of \('parts', 'whole'\). Found `none`."),
        ({"precision": "int8"}, r"Parameter `precision` should be one of .* Found `int8`."),
        ({"target_aware": False, "pooled": False}, "One of `pooled` and `target_aware` should be true. Found neither."),
    ):
        with pytest.raises(ValueError, match=message):
            DARE(**change)  # type: ignore[arg-type]
        assert dataclasses.is_dataclass(DARE)


def test_without_any_target_it_is_refused() -> None:
    schema = Schema(
        (Feature("price", kind="number"),), (Task("a"),), histories=(History("h", ("item",)),), fields=(Field("item"),),
        sizes={"item": 5},
    )  # fmt: skip
    for config in (DARE(), TWIN()):
        with pytest.raises(ValueError, match=f"`{config.kind}` needs a history with an event field"):
            Model(schema, SharedBottom(), history=config)


def test_a_width_per_field_is_possible() -> None:
    """Without a width for keys, each field's keys are as wide as its values."""
    module = SearchedHistory(DARE(), {"item": 4, "position": 2}, {"item": 4}, Sides("attention", "attention"))
    assert module.scales == {"item": 0.5, "position": pytest.approx(2**-0.5)} and module.queries[
        "field/position"
    ].shape == (2,)


def test_a_field_may_be_called_like_an_attribute_of_a_dictionary() -> None:
    module = DARE().build({"item": 4, "type": 4, "keys": 4}, {"item": 4}, {"value": 4, "attention": 4})
    assert set(module.queries) == {"field/type", "field/keys"}
