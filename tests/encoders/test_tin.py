"""TIN against its formulas written out event by event, values and gradients in float64; times, search, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_packed import LENGTHS, packed, pieces
from torch import Tensor
from toylog import make_data, make_log

from unbraid.data.encode import encode
from unbraid.data.fit import GAP_BUCKETS
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.encoders.tin import GAP_CODES, TIN
from unbraid.model import Model
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.single_task import SingleTask
from unbraid.towers.stem import STEM
from unbraid.types import FIRST_VALUE, Feature, Field, History, Ragged, Rows, Schema, Task

D = {"action": 3, "item": 4, "brand": 4, "gap": 2, "position": 2}


class Case:
    """A history with item and brand, which the row has, too, and others which it has not."""

    def __init__(
        self,
        config: TIN,
        fields: Sequence[str] = ("action", "item", "brand"),
        targets: Sequence[str] = ("item", "brand"),
    ) -> None:
        torch.manual_seed(0)
        _, ids, history = packed()
        self.config, self.fields = config, fields
        self.tables = {name: self.leaf(40, D[name]) for name in fields}
        self.index = {name: (ids + i) % 7 for i, name in enumerate(fields)}
        self.ranks = torch.cat([torch.arange(n, 0, -1) for n in LENGTHS])
        if "gap" in fields:
            self.index["gap"] = torch.tensor([33, 20, 2, 0, 5, 4, 4, 3, 1, 30, 9])
        if "position" in fields:
            self.index["position"] = self.ranks + FIRST_VALUE - 1
        self.history = Ragged(self.index, history.offsets)
        self.query = {name: self.leaf(len(LENGTHS), D[name]) for name in targets}
        self.module = config.build({n: D[n] for n in fields}, {n: D[n] for n in targets}).double()
        with torch.no_grad():
            self.module.times.normal_()

    @staticmethod
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    @property
    def leaves(self) -> dict[str, Tensor]:
        tables = {f"table.{name}": x for name, x in self.tables.items()}
        return tables | {f"query.{n}": x for n, x in self.query.items()} | {"times": self.module.times}

    @property
    def inputs(self) -> tuple[Any, Any, Any]:
        events = {"value": {name: Rows(table, self.index[name]) for name, table in self.tables.items()}}
        return events, self.history, {"value": self.query}

    def __call__(self) -> dict[str, Tensor]:
        return self.module(*self.inputs)

    def times(self) -> Tensor:
        """(N,) rows of p: the row itself 0, ranks 1, 2, ...; buckets moved by one."""
        return self.index["gap"] + 1 if self.config.time == "gap" else self.ranks.clamp(max=self.config.positions)

    def reference(self) -> dict[str, Tensor]:
        """(N, D) values, row by row."""
        names = [n for n in self.query]
        e = torch.cat([self.tables[n][self.index[n]] for n in names], 1) + self.module.times[self.times()]
        v = torch.cat([self.query[n] for n in names], 1) + self.module.times[0]
        out: dict[str, list[Tensor]] = {}
        for row, part in enumerate(pieces(self.history)):
            s = (e[part] * v[row]).sum(1) / e.shape[1] ** 0.5
            order = torch.arange(part.start, part.stop)
            if self.config.keep and len(s):
                best = s.topk(min(self.config.keep, len(s))).indices
                order, s = order[best], s[best]
            alpha = s.exp() / s.exp().sum()
            u = (alpha.unsqueeze(1) * e[order]).sum(0)
            product = (alpha.unsqueeze(1) * (e[order] * v[row])).sum(0)
            at = 0
            for name in names:
                own = slice(at, at := at + D[name])
                out.setdefault(f"{name}.product", []).append(product[own])
                if self.config.pooled:
                    out.setdefault(name, []).append(u[own])
                    out.setdefault(f"{name}.target", []).append(v[row, own])
            for name in self.fields:
                if name not in (*names, self.config.time):
                    vectors = self.tables[name][self.index[name][order]]
                    out.setdefault(name, []).append((alpha.unsqueeze(1) * vectors).sum(0))
        return {name: torch.stack(rows) for name, rows in out.items()}


def agree(case: Case, dead: Sequence[str] = ()) -> None:
    """Outputs and all gradients."""
    want, got = case.reference(), case()
    assert list(got) == list(case.module.widths) and set(got) == set(want)
    flow = {name: torch.randn_like(x) for name, x in want.items()}
    for name, x in want.items():
        assert got[name].shape == (len(LENGTHS), case.module.widths[name])
        torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-10)
    mine, theirs = (
        torch.autograd.grad(sum((out[n] * flow[n]).sum() for n in flow), list(case.leaves.values()), allow_unused=True)  # type: ignore[union-attr]
        for out in (got, want)
    )
    for name, a, b in zip(case.leaves, mine, theirs, strict=True):
        if name in dead:
            assert a is None and b is None
        else:
            assert bool(b.abs().max() > 0), name
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------------------ the formulas
@pytest.mark.parametrize("keep", [0, 2, 5])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("positions", [1, 3, 430])
def test_it_is_the_formula_with_ranks(positions: int, pooled: bool, keep: int) -> None:
    agree(Case(TIN(positions=positions, pooled=pooled, keep=keep)))


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("pooled", [False, True])
def test_it_is_the_formula_with_gaps(pooled: bool, keep: int) -> None:
    case = Case(TIN(time="gap", pooled=pooled, keep=keep), ("item", "gap", "action", "brand"))
    assert case.module.times.shape == (1 + GAP_CODES, 8) and "gap" not in case.module.widths
    agree(case, dead=["table.gap"])


@pytest.mark.parametrize("targets", [("item",), ("brand",), ("brand", "item")])
def test_fields_that_the_row_has_not_share_the_weights(targets: tuple[str, ...]) -> None:
    case = Case(TIN(), ("item", "action", "brand"), targets)
    assert set(case.module.widths) == {f"{n}.product" for n in targets} | {"action", "brand", "item"} - set(targets)
    agree(case)
    assert Case(TIN(), targets=("brand", "item")).module.times.shape[1] == 8


def test_a_gap_is_an_ordinary_field_where_ranks_are_the_time() -> None:
    agree(Case(TIN(), ("item", "gap", "brand")))


def test_ranks_are_those_of_the_field_position_where_there_is_one() -> None:
    case = Case(TIN(positions=4), ("item", "position", "brand"))
    assert "position" not in case.module.widths
    agree(case, dead=["table.position"])
    one = case()["item.product"]
    without = Case(TIN(positions=4), ("item", "brand"))
    without.tables, without.index["brand"] = {n: case.tables[n] for n in ("item", "brand")}, case.index["brand"]
    without.module.load_state_dict(case.module.state_dict())
    without.query = case.query
    torch.testing.assert_close(without()["item.product"], one, rtol=0, atol=1e-12)
    case.index["position"] = case.index["position"].flip(0)  # hypothetical events, as of an analysis
    case.history = Ragged(case.index, case.history.offsets)
    assert not torch.allclose(case()["item.product"], one)
    assert case.module.read_times(case.history).index.tolist() == (case.index["position"] - 1).clamp(max=4).tolist()


def test_by_hand() -> None:
    module = TIN(pooled=True).build({"item": 1}, {"item": 1}).double()
    with torch.no_grad():
        module.times[:3] = torch.tensor([[0.5], [1.0], [-2.0]])  # of the row, of rank 1, of rank 2
    events = {"value": {"item": Rows(torch.tensor([[3.0], [4.0]]).double(), torch.tensor([0, 1]))}}
    out = module(events, Ragged({}, torch.tensor([0, 2])), {"value": {"item": torch.tensor([[0.5]]).double()}})
    a, b = 3.0 - 2.0, 4.0 + 1.0  # the first event is the older one; v~ = 1
    u = (a * np.exp(a) + b * np.exp(b)) / (np.exp(a) + np.exp(b))
    assert [out[n].item() for n in ("item", "item.target", "item.product")] == pytest.approx([u, 1.0, u])


def test_without_times_attention_is_that_of_values() -> None:
    case = Case(TIN())
    with torch.no_grad():
        case.module.times.zero_()
    got = case()
    e = torch.cat([case.tables[n][case.index[n]] for n in ("item", "brand")], 1)
    v = torch.cat([case.query[n] for n in ("item", "brand")], 1)
    for row, part in enumerate(pieces(case.history)):
        u = ((e[part] @ v[row]) / 8**0.5).softmax(0) @ e[part] * v[row]
        torch.testing.assert_close(torch.cat([got["item.product"][row], got["brand.product"][row]]), u)


def test_events_equal_to_the_row_have_equal_weights() -> None:
    module = TIN().build({"item": 4}, {"item": 4}).double()
    table = torch.randn(1, 4).double()
    with torch.no_grad():
        module.times.copy_(module.times[0].expand_as(module.times))
    out = module(
        {"value": {"item": Rows(table, torch.zeros(5, dtype=torch.int64))}}, Ragged({}, torch.tensor([0, 5])),
        {"value": {"item": table}},
    )  # fmt: skip
    torch.testing.assert_close(out["item.product"], (table + module.times[0]) ** 2)


# ------------------------------------------------------------------------------------------------------------ its scores
def test_scores_by_field_add_up() -> None:
    case = Case(TIN(), ("item", "action", "brand"))
    parts = [case.module.scores(*case.inputs, fields=[name]) for name in ("item", "brand", "position")]
    e = {n: case.tables[n][case.index[n]] for n in ("item", "brand")}
    v = case.query["item"] + case.module.times[0, :4]
    torch.testing.assert_close(parts[0], (e["item"] * v[case.history.rows]).sum(1) / 8**0.5)
    torch.testing.assert_close(case.module.scores(*case.inputs), sum(parts[1:], parts[0]))
    assert not case.module.scores(*case.inputs, fields=["action"]).any()
    assert bool(parts[2].any())


def test_what_is_not_kept_has_no_gradient() -> None:
    case = Case(TIN(keep=2))
    case.index["item"] = torch.arange(len(case.ranks))
    case.history = Ragged(case.index, case.history.offsets)
    kept: set[int] = set()
    scores = case.module.scores(*case.inputs)
    for part in pieces(case.history):
        found = scores[part].topk(min(2, part.stop - part.start)).indices + part.start
        kept |= set(found.tolist())
    (grad,) = torch.autograd.grad(sum(x.sum() for x in case().values()), case.tables["item"])  # type: ignore[union-attr]
    assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == kept
    assert len(kept) == sum(min(2, n) for n in LENGTHS)


def test_a_row_reaches_its_own_events_only_and_empty_ones_give_zeros() -> None:
    case = Case(TIN(pooled=True))
    out = case()
    for name in ("item", "item.product", "action"):
        assert not out[name][[1, 4]].any() and out[name][[0, 2, 3, 5]].any(1).all()
    case.index["item"] = torch.arange(len(case.ranks))
    case.history = Ragged(case.index, case.history.offsets)
    (grad,) = torch.autograd.grad(case()["item.product"][3].sum(), case.tables["item"])
    assert grad.abs().sum(1).nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("keep", [0, 2])
def test_no_events_at_all(keep: int) -> None:
    case = Case(TIN(keep=keep))
    case.index = {name: ids[:0] for name, ids in case.index.items()}
    case.history = Ragged(case.index, torch.zeros(len(LENGTHS) + 1, dtype=torch.int64))
    out = case()
    assert all(x.shape == (len(LENGTHS), case.module.widths[n]) and not x.any() for n, x in out.items())
    sum(x.sum() for x in out.values()).backward()  # type: ignore[union-attr]
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in case.leaves.values())


@pytest.mark.parametrize("keep", [0, 2])
def test_a_history_without_a_common_field_is_a_mean(keep: int) -> None:
    case = Case(TIN(keep=keep), ("item", "action"), ())
    out = case()
    assert case.module.widths == {"item": 4, "action": 3} and not case.module.times.numel()
    for name in ("item", "action"):
        x = case.tables[name][case.index[name]]
        newest = [x[part][-keep:] for part in pieces(case.history)]
        want = torch.stack([v.mean(0) if len(v) else v.sum(0) for v in newest])
        torch.testing.assert_close(out[name], want)
    assert case.module.scores(*case.inputs).tolist() == [0.0] * len(case.ranks)


def test_a_history_of_times_alone_is_their_mean() -> None:
    for time in ("position", "gap"):
        assert TIN(time=time).build({time: 2}, {}).widths == {time: 2}  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- in a model
@pytest.mark.parametrize("kind", ["shared", "per_task", "separate", "several"])
@pytest.mark.parametrize("time", ["position", "gap"])
def test_in_a_model_rows_are_independent(kind: str, time: str, tmp_path: Path) -> None:
    histories = tuple(
        History(n, fields=(*f, "gap"), length=9) for n, f in {"seen": ("item", "clicked"), "x": ("shop",)}.items()
    )
    encoded = Encoded(encode(make_data(histories=histories, cache=f"{tmp_path}/c"), tables={"log": make_log(rows=200)}))
    views = Views(kind=kind, width=4, widths=(4, 6) if kind == "several" else ())  # type: ignore[arg-type]
    tower = SharedBottom() if kind in ("shared", "several") else STEM()
    if kind == "separate":
        tower = SingleTask()
    model = Model(encoded.schema, tower, views, history=TIN(time=time, pooled=True)).double().eval()  # type: ignore[arg-type]
    batch = encoded.batch(np.arange(100, 130))
    features = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.features.items()}
    batch = dataclasses.replace(batch, features=features)
    whole = model(batch)
    for task, logits in whole.logits.items():
        some = model(batch.select(torch.tensor([3, 20, 7]))).logits[task]
        torch.testing.assert_close(some, logits[[3, 20, 7]], rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------- errors
def test_what_is_not_a_configuration() -> None:
    with pytest.raises(ValueError, match="Parameter `positions` should be positive. Found 0."):
        TIN(positions=0)
    with pytest.raises(ValueError, match="Parameter `time` should be `position` or `gap`. Found `hour`."):
        TIN(time="hour")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Parameter `keep` should not be negative. Found -1."):
        TIN(keep=-1)
    with pytest.raises(
        ValueError, match=r"needs the field `gap` in every history. Found a history with fields \['item'\]"
    ):
        TIN(time="gap").build({"item": 4}, {"item": 4})


def test_without_any_target_it_is_refused() -> None:
    schema = Schema(
        (Feature("price", kind="number"),), (Task("a"),), histories=(History("h", ("item",)),), fields=(Field("item"),),
        sizes={"item": 5},
    )  # fmt: skip
    with pytest.raises(ValueError, match="`tin` needs a history with an event field"):
        Model(schema, SharedBottom(), history=TIN())


def test_gaps_have_as_many_codes_as_the_data_give() -> None:
    assert GAP_CODES == GAP_BUCKETS
