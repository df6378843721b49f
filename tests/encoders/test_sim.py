"""SIM against loops over events in float64: both searches, heads, second heads and who trains which table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from history_kit import FIELDS, VALUES, Case, D, events_of
from torch import Tensor
from toylog import make_data, make_log, make_run

from unbraid.bundle import Bundle
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.sim import SIM
from unbraid.encoders.table import Views
from unbraid.job import train
from unbraid.losses.history import HistoryLoss
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.single_task import SingleTask
from unbraid.towers.stem import STEM
from unbraid.types import MISSING, UNKNOWN, Feature, Field, History, Ragged, Schema, Task


def kept_of(case: Case, role: str) -> list[list[int]]:
    """The events of each row that the search should keep."""
    config, out = case.config, []
    for row, events in enumerate(events_of(case.history.offsets)):
        if config.search == "hard":
            asked = int(case.ids[config.category][row])
            out.append([e for e in events if int(case.index[config.category][e]) == asked >= 2][-config.keep :])
        elif not case.targets:
            out.append(events[-config.keep :])
        else:
            scores = {e: relevance(case, role, row, e).item() for e in events}
            out.append(sorted(sorted(events, key=lambda e, s=scores: (-s[e], -e))[: config.keep]))
    return out


def relevance(case: Case, role: str, row: int, event: int) -> Tensor:
    parts = [(case.tables[role][n][case.index[n][event]] * case.rows[role][n][row]).sum() for n in case.targets]
    return sum(parts, torch.zeros(()).double())


def reference(case: Case) -> dict[str, Tensor]:
    """Multi-head attention on projected keys, row by row, then the second heads' softmax over all events."""
    config, module = case.config, case.module
    role = "search" if config.auxiliary else "value"
    vectors = torch.cat([case.tables["value"][n][case.index[n]] for n in FIELDS], 1)
    out: dict[str, list[Tensor]] = {}
    for row, events in enumerate(kept_of(case, role)):
        query = module.bias
        if case.targets:
            query = query + module.queries.weight @ torch.cat([case.rows["value"][n][row] for n in case.targets])
        found: dict[str, list[Tensor]] = {n: [] for n in module.widths}
        for head in range(config.heads):
            own = slice(head * config.head_width, (head + 1) * config.head_width)
            keys = vectors[events] @ module.keys.weight[own].T
            weights = ((keys @ query[own]) / config.head_width**0.5).softmax(0)
            pooled = (weights.unsqueeze(1) * vectors[events]).sum(0).split(D)
            for name, u in zip(FIELDS, pooled, strict=True):
                found[name].append(u)
                if config.target_aware and name in case.targets:
                    found[f"{name}.product"].append(u * case.rows["value"][name][row])
        for name, heads in found.items():
            out.setdefault(name, []).append(torch.cat(heads))
    if config.auxiliary and module.training:
        for row, events in enumerate(events_of(case.history.offsets)):
            s = [relevance(case, "search", row, e) for e in events]
            weights = torch.stack(s).softmax(0) if s else torch.zeros(0).double()
            for name in case.targets:
                values = case.tables["search"][name][case.index[name][events]]
                out.setdefault(f"all.{name}", []).append((weights.unsqueeze(1) * values).sum(0))
                out.setdefault(f"own.{name}", []).append(case.rows["search"][name][row])
    return {name: torch.stack(rows) for name, rows in out.items()}


def agree(case: Case) -> None:
    """Outputs and all gradients."""
    want, got = reference(case), case()
    assert set(got) == set(want)
    assert {n: x.shape[1] for n, x in got.items()} == {
        **case.module.widths,
        **(case.module.second if case.module.training else {}),
    }
    flow = {name: torch.randn_like(x) for name, x in want.items()}
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    leaves = case.leaves
    mine, theirs = (
        torch.autograd.grad(sum((out[n] * flow[n]).sum() for n in flow), list(leaves.values()), allow_unused=True)  # type: ignore[union-attr]
        for out in (got, want)
    )
    for (name, x), a, b in zip(leaves.items(), mine, theirs, strict=True):
        a, b = (torch.zeros_like(x) if grad is None else grad for grad in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


CONFIGS = [
    SIM(keep=3, heads=2, head_width=3, target_aware=True),
    SIM(keep=3, heads=1, head_width=5),
    SIM(keep=100, heads=3, head_width=2),
    SIM(keep=3, heads=2, head_width=3, auxiliary=(4,)),
    SIM(keep=3, heads=2, head_width=3, auxiliary=(4,), search_width=2, target_aware=True),
    SIM(search="hard", category="brand", keep=1, heads=2, head_width=3, target_aware=True),
    SIM(search="hard", category="item", keep=3, heads=2, head_width=3),
]


# ------------------------------------------------------------------------------------------------------------ the formulas
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_is_attention_to_what_the_search_keeps(config: SIM, training: bool) -> None:
    case = Case(config)
    if config.search == "hard":
        case.index[config.category] = case.index[config.category] % 3
        case.history = Ragged(case.index, case.history.offsets)
        case.ids[config.category] = torch.tensor([2, 2, 2, 1, 0, 2, 2, 2])
    case.module.train(training)
    agree(case)


@pytest.mark.parametrize("targets", [("item",), ("brand", "item"), ()])
@pytest.mark.parametrize("auxiliary", [(), (4,)])
def test_fields_that_the_row_has_not_are_keys_and_values_only(
    targets: Sequence[str], auxiliary: tuple[int, ...]
) -> None:
    case = Case(SIM(keep=3, heads=2, head_width=3, auxiliary=auxiliary), targets)
    assert set(case.module.second) == ({f"{w}.{n}" for w in ("all", "own") for n in targets} if auxiliary else set())
    agree(case)
    before = case()["item"]
    case.tables["value"]["position"].data += (
        torch.randn(1, D).double() * torch.arange(len(case.tables["value"]["position"]))[:, None]
    )
    assert not torch.allclose(case()["item"], before), "time is in the keys"


def test_hard_search_by_hand() -> None:
    module = SIM(search="hard", category="c", keep=2, heads=1, head_width=1).build({"c": 1}, {"c": 1}, {"value": 1})
    ids = torch.tensor([5, 3, 5, 5, 4, 3, UNKNOWN, MISSING])
    history = Ragged({"c": ids}, torch.tensor([0, 5, 6, 7, 8, 8]))
    target = {"id": {"c": torch.tensor([5, 5, UNKNOWN, MISSING, 5])}}
    kept = module.find({}, history, target)
    assert kept.index.tolist() == [2, 3] and kept.lists.offsets.tolist() == [0, 2, 2, 2, 2, 2]


def test_rows_without_a_kept_event_are_zeros() -> None:
    case = Case(SIM(search="hard", category="brand", keep=3, target_aware=True))
    case.ids["brand"] = torch.full_like(case.ids["brand"], VALUES + 5)
    assert all(not x.any() for x in case().values())
    case = Case(SIM(keep=3, auxiliary=(4,)))
    empty = torch.tensor(case.lengths) == 0
    assert all(not x[empty].any() for n, x in case().items() if not n.startswith("own."))


def test_no_events_at_all() -> None:
    for config in CONFIGS:
        case = Case(config)
        index = {name: ids[:0] for name, ids in case.index.items()}
        out = case(index, Ragged(index, torch.zeros(len(case.lengths) + 1, dtype=torch.int64)))
        assert all(not x.any() for n, x in out.items() if not n.startswith("own."))


def test_scores_are_the_searchs_by_field() -> None:
    case = Case(SIM(auxiliary=(4,), search_width=3))
    rows = torch.repeat_interleave(torch.arange(len(case.lengths)), torch.tensor(case.lengths))
    each = [case.module.scores(*case.inputs(), fields=[n]) for n in ("item", "brand")]
    want = torch.stack([relevance(case, "search", int(r), i) for i, r in enumerate(rows)])
    torch.testing.assert_close(each[0] + each[1], want)
    torch.testing.assert_close(case.module.scores(*case.inputs()), want)
    assert not case.module.scores(*case.inputs(), fields=["position"]).any()


# ------------------------------------------------------------------------------------------------- who trains which table
def reached(case: Case, names: Sequence[str]) -> set[str]:
    out, leaves = case(), case.leaves
    grads = torch.autograd.grad(sum(out[n].sum() for n in names), list(leaves.values()), allow_unused=True)  # type: ignore[union-attr]
    return {name for name, grad in zip(leaves, grads, strict=True) if grad is not None and grad.any()}


def test_search_vectors_learn_from_second_heads_alone_and_the_others_from_the_tasks_alone() -> None:
    case = Case(SIM(keep=3, auxiliary=(4,), target_aware=True))
    second = reached(case, list(case.module.second))
    assert second == {f"{side}/search/{n}" for side in ("table", "row") for n in ("item", "brand")}
    main = reached(case, list(case.module.widths))
    assert main == {name for name in case.leaves if "/search/" not in name}


def test_second_heads_reach_every_event_and_the_tasks_those_kept() -> None:
    case = Case(SIM(keep=1, auxiliary=(4,)))
    case.index = {**case.index, "item": torch.arange(sum(case.lengths))}
    for role in case.tables:
        case.tables[role]["item"] = torch.randn(sum(case.lengths), D).double().requires_grad_()
    out = case()
    (grad,) = torch.autograd.grad(out["all.item"].square().sum(), case.tables["search"]["item"], retain_graph=True)
    assert bool(grad.any(1).all())
    (grad,) = torch.autograd.grad(out["item"].square().sum(), case.tables["value"]["item"])
    assert int(grad.any(1).sum()) == sum(n > 0 for n in case.lengths)


@pytest.mark.parametrize("kind", ["shared", "per_task", "separate", "several"])
def test_in_a_model_losses_are_apart_and_rows_independent(kind: str, tmp_path: Path) -> None:
    histories = (
        History("seen", ("item", "shop", "gap", "position"), length=9),
        History("acts", ("clicked",), length=4),
    )
    encoded = Encoded(encode(make_data(histories=histories, cache=f"{tmp_path}/c"), tables={"log": make_log(rows=200)}))
    tower = {"separate": SingleTask(), "per_task": STEM()}.get(kind, SharedBottom())
    views = Views(kind=kind, width=4, widths=(4, 6) if kind == "several" else (), lazy_rows=-1)  # type: ignore[arg-type]
    model = Model(encoded.schema, tower, views, history=SIM(keep=2, auxiliary=(4,), search_width=3)).double()
    search = {name for name, table in model.tables.items() if name.endswith("/search")}
    own = {name.partition("/")[0] for name in search}
    assert own == (set(model.embeddings.widths) if kind == "separate" else {"every"})
    batch = encoded.batch(np.arange(100, 140))
    features = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.features.items()}
    batch = dataclasses.replace(batch, features=features)
    names = dict(model.named_parameters())
    of_search = {n for n in names if "/search." in n}
    main = torch.autograd.grad(
        sum(x.sum() for x in model(batch).logits.values()), list(names.values()), allow_unused=True
    )  # type: ignore[union-attr]
    assert len(of_search) >= 2
    assert not of_search & {n for n, grad in zip(names, main, strict=True) if grad is not None}
    extras = model(batch).extras
    second = sum(x.sum() for n, x in extras.items() if n.startswith("history."))
    grads = torch.autograd.grad(second, list(names.values()), allow_unused=True)  # type: ignore[arg-type]
    hit = {n for n, grad in zip(names, grads, strict=True) if grad is not None and grad.any()}
    assert {n for n in hit if not n.startswith("second.")} == {n for n in of_search if "/item/" in n or "/shop/" in n}
    model.eval()
    whole = model(batch)
    for task, logits in whole.logits.items():
        some = model(batch.select(torch.tensor([3, 30, 7]))).logits[task]
        torch.testing.assert_close(some, logits[[3, 30, 7]], rtol=0, atol=1e-12)


def test_it_trains_and_survives_a_bundle(tmp_path: Path) -> None:
    model = dataclasses.replace(make_run().model, history=SIM(keep=3, auxiliary=(8,)), tables=Views(width=4))
    run = make_run(model=model, losses=(Supervised(), HistoryLoss()))
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, steps=12, evaluate_every=12))
    result = train(run, tables={"log": make_log()}, baseline=False)
    result.bundle.save(tmp_path / "bundle")
    saved = Bundle.load(tmp_path / "bundle").model.state_dict()
    assert all(torch.equal(x, saved[name]) for name, x in result.bundle.model.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------- errors
def test_what_is_not_a_configuration() -> None:
    for wrong, message in (
        ({"keep": 0}, "Parameter `keep` should be positive. Found 0."),
        ({"heads": 0}, "Parameter `heads` should be positive. Found 0."),
        ({"head_width": 0}, "Parameter `head_width` should be positive. Found 0."),
        ({"auxiliary": (0,)}, r"Parameter `auxiliary` should be positive. Found \(0,\)."),
        ({"search": "x"}, r"Parameter `search` should be one of \('soft', 'hard'\). Found `x`."),
        ({"precision": "x"}, r"Parameter `precision` should be one of .* Found `x`."),
        (
            {"search": "hard"},
            "Search `hard` needs `category`, an event field.",
        ),
        ({"category": "c"}, "Found search `soft`, category `c`."),
        (
            {"search": "hard", "category": "c", "auxiliary": (4,)},
            r"`auxiliary` should be empty for search `hard`.*\(4,\)",
        ),
        ({"search_width": 4}, "Parameter `search_width` .* Found 4"),
        ({"search_width": -1, "auxiliary": (4,)}, "Parameter `search_width` .* Found -1"),
    ):
        with pytest.raises(ValueError, match=message):
            SIM(**wrong)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"`category` of history encoder `sim` .*Found `shop`; .*\['item'\] has \['item'\]"
    ):
        SIM(search="hard", category="shop").build({"item": 4}, {"item": 4}, {"value": 4})


def test_without_any_target_it_is_refused() -> None:
    schema = Schema(
        (Feature("price", kind="number"),), (Task("a"),), histories=(History("h", ("item",)),), fields=(Field("item"),),
        sizes={"item": 5},
    )  # fmt: skip
    with pytest.raises(ValueError, match="`sim` needs a history with an event field"):
        Model(schema, SharedBottom(), history=SIM())
