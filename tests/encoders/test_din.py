"""DIN against the concatenated form written out event by event, values and gradients in float64; Dice's statistics."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from test_packed import LENGTHS, packed, pieces
from torch import Tensor, nn
from toylog import make_data, make_log, make_run

from unbraid.bundle import Bundle
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders import packed as primitives
from unbraid.encoders.din import DIN, DINHistory, _Gated, _Moments
from unbraid.encoders.table import Views
from unbraid.job import train
from unbraid.model import Model
from unbraid.towers.mlp import SharedBottom
from unbraid.types import Feature, Field, History, Ragged, Rows, Schema, Task

D = 4


class Case:
    """A history with the fields item and brand, which the row has, too, and action, which it has not."""

    def __init__(self, config: DIN, targets: Sequence[str] = ("item", "brand"), seed: int = 0) -> None:
        torch.manual_seed(seed)
        _, ids, self.history = packed(seed)
        self.tables = {name: self.leaf(7, D) for name in ("action", "item", "brand")}
        self.index = {name: (ids + i) % 7 for i, name in enumerate(self.tables)}
        self.query = {name: self.leaf(len(LENGTHS), D) for name in targets}
        self.module = config.build(dict.fromkeys(self.tables, D), dict.fromkeys(targets, D)).double()
        for dice in self.module.dice:
            nn.init.normal_(dice.alpha)
            dice.mean.normal_()
            dice.variance.uniform_(0.5, 2)

    @staticmethod
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    @property
    def leaves(self) -> dict[str, Tensor]:
        tables = {f"table.{name}": x for name, x in self.tables.items()}
        return tables | {f"query.{n}": x for n, x in self.query.items()} | dict(self.module.named_parameters())

    def __call__(self, index: Mapping[str, Tensor] | None = None, history: Ragged | None = None) -> dict[str, Tensor]:
        index = self.index if index is None else index
        events = {"value": {name: Rows(table, index[name]) for name, table in self.tables.items()}}
        return self.module(events, self.history if history is None else history, {"value": self.query})

    def reference(self, statistics: Callable[[int, Tensor], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The paper's formulas on [q, e, q - e, q * e, rest]; ``statistics``: (layer, (N, H)) -> mean and variance."""
        rows = [i for i, n in enumerate(LENGTHS) for _ in range(n)]
        vectors = {name: table[self.index[name]] for name, table in self.tables.items()}
        own = [name for name in self.tables if name not in self.query]
        q = torch.cat([x[rows] for x in self.query.values()] or [torch.zeros(len(rows), 0).double()], 1)
        e = torch.cat([vectors[n] for n in self.query] or [torch.zeros(len(rows), 0).double()], 1)
        x = torch.cat([q, e, q - e, q * e, *(vectors[n] for n in own)], 1)
        for depth, layer in enumerate(self.module.layers):
            s = x @ layer.weight.T + layer.bias
            if len(self.module.dice):
                mean, variance = statistics(depth, s)
                p = 1 / (1 + torch.exp(-(s - mean) / (variance + 1e-8) ** 0.5))
                s = p * s + (1 - p) * self.module.dice[depth].alpha * s
            x = s if len(self.module.dice) else torch.where(s > 0, s, 0.0)
        weights = (x @ self.module.score.weight.T).squeeze(1)
        if self.module.score.bias is not None:
            weights = weights + self.module.score.bias
        parts = [weights[part] for part in pieces(self.history)]
        parts = [w.softmax(0) if self.module.softmax else w for w in parts]
        return {
            name: torch.stack([w @ v[part] for w, part in zip(parts, pieces(self.history), strict=True)])
            for name, v in vectors.items()
        }


def of_batch(depth: int, s: Tensor) -> tuple[Tensor, Tensor]:
    mean = s.mean(0)
    return mean, ((s - mean) ** 2).mean(0)


def agree(case: Case, statistics: Callable[[int, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Outputs and all gradients."""
    want, got = case.reference(statistics), case()
    assert set(got) == set(want)
    flow = {name: torch.randn_like(x) for name, x in want.items()}
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-10)
    leaves = case.leaves
    mine, theirs = (
        torch.autograd.grad(sum((out[n] * flow[n]).sum() for n in flow), list(leaves.values()))  # type: ignore[union-attr]
        for out in (got, want)
    )
    for name, a, b in zip(leaves, mine, theirs, strict=True):
        assert bool(b.abs().max() > 0) or "query" in name, name
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


CONFIGS = [
    DIN(hidden=hidden, activation=activation, softmax=softmax)  # type: ignore[arg-type]
    for hidden in ((6,), (6, 5), (5, 6, 3))
    for activation in ("relu", "dice")
    for softmax in (False, True)
]


# ------------------------------------------------------------------------------------------------------------ the formulas
@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_training_is_the_concatenated_form(config: DIN, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(primitives.PIECE_VALUES, "cpu", size)
    agree(Case(config), of_batch)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.activation == "dice"], ids=str)
def test_evaluation_reads_the_running_statistics(config: DIN) -> None:
    case = Case(config)
    case.module.eval()
    before = copy.deepcopy(case.module.state_dict())
    agree(case, lambda depth, s: (case.module.dice[depth].mean, case.module.dice[depth].variance))
    assert all(torch.equal(x, before[name]) for name, x in case.module.state_dict().items())


@pytest.mark.parametrize("targets", [("item",), ("brand", "item"), ()])
@pytest.mark.parametrize("activation", ["relu", "dice"])
def test_fields_that_the_row_has_not_are_plain_inputs(activation: str, targets: tuple[str, ...]) -> None:
    case = Case(DIN(hidden=(6,), activation=activation), targets)  # type: ignore[arg-type]
    assert case.module.layers[0].in_features == 3 * D + 3 * D * len(targets)
    agree(case, of_batch)
    if not targets:
        one = case()["item"]
        case.tables["action"].data += 1
        assert not torch.equal(one, case()["item"]), "the events alone make the weights"


def test_one_field_comes_without_a_copy_of_its_own() -> None:
    module = DIN(hidden=(3,), activation="relu").build({"item": D}, {"item": D}).double()
    table, ids, history = packed()
    query = Case.leaf(len(LENGTHS), D)
    got = module({"value": {"item": Rows(table, ids)}}, history, {"value": {"item": query}})["item"]
    q, e = query[history.rows], table[ids]
    w = module.score(module.layers[0](torch.cat([q, e, q - e, q * e], 1)).relu())
    torch.testing.assert_close(got, torch.stack([(w * e)[part].sum(0) for part in pieces(history)]), rtol=0, atol=1e-12)


def test_the_formulas_by_hand() -> None:
    module = DIN(hidden=(1,), activation="relu").build({"item": 1}, {"item": 1})
    with torch.no_grad():
        module.layers[0].weight.copy_(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))  # of q, e, q - e, q * e
        module.layers[0].bias.fill_(0.5)
        module.score.weight.fill_(2.0)
        module.score.bias.fill_(3.0)
    events = {"value": {"item": Rows(torch.tensor([[2.0], [-1.0]]), torch.tensor([0, 1]))}}
    got = module(events, Ragged({}, torch.tensor([0, 2])), {"value": {"item": torch.tensor([[3.0]])}})["item"]
    first = 2 * (3 + 20 + 100 * 1 + 1000 * 6 + 0.5) + 3
    second = 2 * max(0, 3 - 10 + 100 * 4 - 1000 * 3 + 0.5) + 3
    assert got.tolist() == [[pytest.approx(first * 2 + second * -1)]]


def test_events_of_one_kind_add_up_and_softmax_averages_them() -> None:
    table = torch.randn(3, D)
    query = torch.randn(1, D).expand(3, D)
    index, offsets = torch.tensor([1, 1, 1, 1, 1, 1]), torch.tensor([0, 1, 3, 6])
    for softmax, times in ((False, [1.0, 2.0, 3.0]), (True, [1.0, 1.0, 1.0])):
        module = DIN(hidden=(4,), softmax=softmax).build({"item": D}, {"item": D}).eval()
        out = module({"value": {"item": Rows(table, index)}}, Ragged({}, offsets), {"value": {"item": query}})["item"]
        torch.testing.assert_close(out, out[:1] * torch.tensor(times).unsqueeze(1))
        assert not softmax or torch.allclose(out[0], table[1])


def test_dice_with_slope_one_is_linear_and_far_from_the_mean_a_relu() -> None:
    case = Case(DIN(hidden=(6,), softmax=False))
    with torch.no_grad():
        case.module.dice[0].alpha.fill_(1.0)
    straight = case()
    linear = case.module.layers[0]
    weight = case.module.score.weight @ linear.weight
    x = {n: t[case.index[n]] for n, t in case.tables.items()}
    q = torch.cat([case.query[n][case.history.rows] for n in ("item", "brand")], 1)
    e = torch.cat([x["item"], x["brand"]], 1)
    scores = torch.cat([q, e, q - e, q * e, x["action"]], 1) @ weight.T
    scores = scores + case.module.score.weight @ linear.bias + case.module.score.bias
    want = torch.stack([(scores * x["item"])[part].sum(0) for part in pieces(case.history)])
    torch.testing.assert_close(straight["item"], want, rtol=0, atol=1e-10)

    relu = Case(DIN(hidden=(6,), activation="relu"))
    case.module.eval()
    case.module.load_state_dict(relu.module.state_dict(), strict=False)
    with torch.no_grad():
        case.module.dice[0].alpha.zero_()
        case.module.dice[0].mean.zero_()
        case.module.dice[0].variance.fill_(0.0)  # a hard corner at 0, but for EPSILON
    torch.testing.assert_close(case()["item"], relu()["item"], rtol=0, atol=2e-3)


def test_the_steps_have_the_gradients_of_their_values() -> None:
    torch.manual_seed(0)
    x, a, b, c, bias = (Case.leaf(*shape) for shape in ((5, 3), (2, 3), (2, 3), (2, 3), (2,)))
    assert torch.autograd.gradcheck(_Gated.apply, (x, a, b, c, bias))
    p = x.sigmoid()
    torch.testing.assert_close(_Gated.apply(x, a, b, c, bias), x @ a.T + (x * p) @ b.T + p @ c.T + bias)
    assert torch.autograd.gradcheck(lambda x: _Moments.apply(x)[:, 1:], (x,))
    centred = x - x.mean(0)
    want = torch.cat([torch.tensor([5.0]), x.sum(0), (centred.T @ centred).flatten()]).unsqueeze(0)
    torch.testing.assert_close(_Moments.apply(x), want)


def test_what_it_starts_from() -> None:
    module = DIN(hidden=(6, 5)).build({"item": D}, {"item": D})
    for dice, width in zip(module.dice, (6, 5), strict=True):
        assert torch.equal(dice.alpha, torch.zeros(width)) and dice.alpha.requires_grad
    assert module.score.bias is not None
    assert DIN(softmax=True).build({"item": D}, {"item": D}).score.bias is None, "a softmax has no use for it"
    assert not DIN(activation="relu").build({"item": D}, {"item": D}).dice


# -------------------------------------------------------------------------------------------------------- what Dice keeps
def test_running_statistics_are_the_mean_of_the_first_batches_then_move_by_a_tenth() -> None:
    case = Case(DIN(hidden=(6,)))
    dice = case.module.dice[0]
    for table in case.tables.values():
        table.requires_grad_(False)
    seen: list[tuple[Tensor, Tensor]] = []
    for batch in range(13):
        for table in case.tables.values():
            table.normal_(0.3, 1 + batch)
        before = dice.mean.clone()
        case()
        case.reference(lambda depth, s: seen.append(of_batch(depth, s)) or seen[-1])  # type: ignore[func-returns-value]
        if batch < 10:
            for found, i in ((dice.mean, 0), (dice.variance, 1)):
                torch.testing.assert_close(found, torch.stack([pair[i] for pair in seen]).mean(0), rtol=1e-10, atol=0)
        else:
            torch.testing.assert_close(dice.mean, 0.9 * before + 0.1 * seen[-1][0], rtol=1e-10, atol=1e-12)
    assert dice.batches.item() == 13 and not dice.mean.requires_grad


@pytest.mark.parametrize("events", [0, 1])
@pytest.mark.parametrize("hidden", [(6,), (6, 5)])
def test_too_few_events_for_a_variance_read_the_running_one_and_leave_it(events: int, hidden: tuple[int, ...]) -> None:
    case = Case(DIN(hidden=hidden))
    before = copy.deepcopy(case.module.state_dict())
    index = {name: ids[:events] for name, ids in case.index.items()}
    history = Ragged({}, torch.tensor([0] * 3 + [events] * 4))
    training = case(index, history)
    assert all(torch.equal(x, before[name]) for name, x in case.module.state_dict().items())
    case.module.eval()
    for name, x in case(index, history).items():
        assert torch.equal(x, training[name]) and x.shape == (len(LENGTHS), D)
        assert training[name].requires_grad == bool(events), "without an event nothing takes part in the step"
        assert bool((x[[0, 1, 3, 4, 5]] == 0).all()) and bool(x[2].any()) == bool(events)
    if events:
        sum(training.values()).sum().backward()  # type: ignore[union-attr]
        assert all(torch.isfinite(x.grad).all() for x in case.leaves.values())  # type: ignore[arg-type]


def test_equal_events_have_no_variance_and_finite_gradients() -> None:
    case = Case(DIN(hidden=(6,)))
    case.module.float()
    table, ids = torch.randn(1, D, requires_grad=True), torch.zeros(5, dtype=torch.int64)
    tables = {"value": {name: Rows(table, ids) for name in case.tables}}
    query = {name: torch.ones(1, D) for name in case.query}
    out = case.module(tables, Ragged({}, torch.tensor([0, 5])), {"value": query})["item"]
    out.sum().backward()
    assert torch.isfinite(out).all() and table.grad is not None and torch.isfinite(table.grad).all()
    assert float(table.grad.abs().max()) < 1e3


def test_a_unit_without_variance_on_inputs_with_much_of_it_stays_finite() -> None:
    """In float32 its variance, a small difference of large products, could come out below 0."""
    torch.manual_seed(0)
    module = DIN(hidden=(256,)).build({"item": D}, {"item": D})
    direction = torch.randn(D)
    with torch.no_grad():
        weight = torch.randn(256, 4, D)
        weight -= (weight @ direction / (direction @ direction)).unsqueeze(2) * direction  # at right angles to it
        module.layers[0].weight.copy_(weight.flatten(1))
    table = (torch.randn(40, 1) * 1e3 * direction).requires_grad_()
    events = {"value": {"item": Rows(table, torch.arange(40))}}
    out = module(events, Ragged({}, torch.tensor([0, 40])), {"value": {"item": torch.zeros(1, D)}})["item"]
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(module.dice[0].variance).all()
    assert bool((module.dice[0].variance >= 0).all())


def test_the_statistics_are_those_of_the_events_not_of_pieces_or_rows() -> None:
    """A mean far from 0 and pieces that differ: merging must not lose it, in float32 either."""
    case = Case(DIN(hidden=(6,)))
    for name, table in case.tables.items():
        table.data += 30.0 if name == "item" else -20.0
    statistics: list[tuple[Tensor, Tensor]] = []
    case.reference(lambda depth, s: statistics.append(of_batch(depth, s)) or statistics[0])  # type: ignore[func-returns-value]
    single = copy.deepcopy(case)
    single.module.float()
    single.tables = {name: x.detach().float() for name, x in case.tables.items()}
    single.query = {name: x.detach().float() for name, x in case.query.items()}
    single()
    torch.testing.assert_close(single.module.dice[0].mean.double(), statistics[0][0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(single.module.dice[0].variance.double(), statistics[0][1], rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- who reaches whom
@pytest.mark.parametrize(
    "config", [DIN(hidden=(6,), activation="relu"), DIN(hidden=(6, 5), activation="relu", softmax=True)]
)
def test_a_row_reaches_its_own_events_and_query_only(config: DIN) -> None:
    case = Case(config)
    case.index = {name: torch.arange(sum(LENGTHS)) % 7 for name in case.index}
    case.index["item"] = torch.tensor([0, 1, 2, 3, 4, 4, 4, 4, 4, 5, 6])
    out = case()["brand"]
    (grad,) = torch.autograd.grad(out[3].sum(), case.tables["item"], retain_graph=True)
    assert grad.abs().sum(1).gt(0).tolist() == [False] * 4 + [True] + [False] * 2
    (grad,) = torch.autograd.grad(out[3].sum(), case.query["item"])
    assert grad.abs().sum(1).gt(0).tolist() == [False] * 3 + [True] + [False] * 2


def test_with_dice_training_rows_see_each_other_and_in_evaluation_they_do_not() -> None:
    case = Case(DIN(hidden=(6,)))
    for training in (True, False):
        case.module.train(training)
        (grad,) = torch.autograd.grad(case()["item"][3].sum(), case.query["item"])
        assert bool(grad[0].any()) == training


def test_the_order_of_events_and_rows_does_not_matter() -> None:
    case = Case(DIN(hidden=(6,), softmax=True))
    out = case()["item"]
    flipped = {n: torch.cat([ids[part].flip(0) for part in pieces(case.history)]) for n, ids in case.index.items()}
    torch.testing.assert_close(case(flipped)["item"], out, rtol=0, atol=1e-12)


def test_what_does_not_train_gets_no_gradient_and_changes_nobody_elses() -> None:
    case = Case(DIN(hidden=(6,)))
    whole = dict(zip(case.leaves, torch.autograd.grad(case()["item"].sum(), list(case.leaves.values())), strict=True))
    frozen = {"layers.0.weight", "dice.0.alpha", "table.brand", "query.item"}
    for name, leaf in case.leaves.items():
        leaf.requires_grad_(name not in frozen)
    case()["item"].sum().backward()
    for name, leaf in case.leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, whole[name], rtol=0, atol=1e-12)


def test_the_graph_can_be_walked_twice_but_not_differentiated_twice() -> None:
    case = Case(DIN(hidden=(6,)))
    out = case()["item"].sum()
    leaves = list(case.leaves.values())
    one, two = torch.autograd.grad(out, leaves, retain_graph=True), torch.autograd.grad(out, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(x.sum() for x in two).backward()  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------------- the K best
def scores_of(case: Case, statistics: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
    """(N,) scores, event by event, undivided."""
    rows = case.history.rows
    vectors = {name: table[case.index[name]] for name, table in case.tables.items()}
    q = torch.cat([x[rows] for x in case.query.values()], 1)
    e = torch.cat([vectors[n] for n in case.query], 1)
    x = torch.cat([q, e, q - e, q * e, *(vectors[n] for n in case.tables if n not in case.query)], 1)
    for depth, layer in enumerate(case.module.layers):
        x = layer(x)
        if statistics:
            mean, variance = statistics[depth]
            p = ((x - mean) / (variance + 1e-8).sqrt()).sigmoid()
            x = p * x + (1 - p) * case.module.dice[depth].alpha * x
        else:
            x = x.relu()
    return case.module.score(x).squeeze(1)


def best_of(
    case: Case, keep: int, statistics: Sequence[tuple[Tensor, Tensor]] = (), divisor: int = 1
) -> dict[str, Tensor]:
    """Outputs of the K best events of each row."""
    scores = scores_of(case, statistics) / divisor
    out: dict[str, list[Tensor]] = {name: [] for name in case.tables}
    for part in pieces(case.history):
        kept = scores[part].topk(min(keep, part.stop - part.start)).indices + part.start
        weights = scores[kept].softmax(0) if case.module.softmax else scores[kept]
        for name, table in case.tables.items():
            out[name].append(weights @ table[case.index[name][kept]])
    return {name: torch.stack(rows) for name, rows in out.items()}


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "dice"])
@pytest.mark.parametrize(
    ("keep", "softmax", "scale"), [(1, False, False), (2, True, True), (4, False, True), (9, True, False)]
)
def test_the_k_best_are_scored_again_with_gradients(
    keep: int, softmax: bool, scale: bool, activation: str, training: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(primitives.PIECE_VALUES, "cpu", size)
    case = Case(DIN(hidden=(6, 5), activation=activation, softmax=softmax, keep=keep, scale=scale))  # type: ignore[arg-type]
    case.module.train(training)
    statistics: list[tuple[Tensor, Tensor]] = []  # of all events, as constants
    if activation == "dice" and not training:
        statistics = [(dice.mean, dice.variance) for dice in case.module.dice]
    elif activation == "dice":
        case.reference(lambda d, s: statistics.append(tuple(x.detach() for x in of_batch(d, s))) or statistics[-1])  # type: ignore[func-returns-value,arg-type]
    divisor = 2 * D if scale else 1
    want, got = best_of(case, keep, statistics, divisor), case()
    flow = {name: torch.randn_like(x) for name, x in want.items()}
    leaves = case.leaves
    mine, theirs = (
        torch.autograd.grad(sum((out[n] * flow[n]).sum() for n in flow), list(leaves.values()))  # type: ignore[union-attr]
        for out in (got, want)
    )
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-10)
    for name, a, b in zip(leaves, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_an_event_that_is_not_kept_has_no_gradient() -> None:
    case = Case(DIN(hidden=(6,), keep=2))
    case.tables["item"] = Case.leaf(sum(LENGTHS), D)
    case.index["item"] = torch.arange(sum(LENGTHS))
    (grad,) = torch.autograd.grad(case()["item"].square().sum(), case.tables["item"])
    assert int(grad.any(1).sum()) == sum(min(2, n) for n in LENGTHS)


@pytest.mark.parametrize("activation", ["relu", "dice"])
def test_with_room_for_all_it_is_the_plain_form(activation: str) -> None:
    """Values; gradients too, but for Dice's statistics."""
    plain, keeping = (Case(DIN(hidden=(6, 5), activation=activation, keep=k)) for k in (0, 5))  # type: ignore[arg-type]
    for name, x in plain().items():
        torch.testing.assert_close(keeping()[name], x)
    if activation == "relu":
        for a, b in zip(plain.leaves.values(), keeping.leaves.values(), strict=True):
            (one,) = torch.autograd.grad(plain()["item"].sum(), a, allow_unused=True)
            (two,) = torch.autograd.grad(keeping()["item"].sum(), b, allow_unused=True)
            assert (one is None) == (two is None) and (one is None or torch.allclose(one, two))


def test_a_batch_is_noted_once_whatever_is_kept() -> None:
    plain, keeping = (Case(DIN(hidden=(6, 5), keep=k)) for k in (0, 2))
    for case in (plain, keeping):
        case()
    for a, b in zip(plain.module.dice, keeping.module.dice, strict=True):
        assert a.batches.item() == b.batches.item() == 1
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a.variance, b.variance, rtol=1e-10, atol=1e-12)
        assert not b.mean.requires_grad
    keeping.module.eval()
    before = copy.deepcopy(keeping.module.state_dict())
    keeping()
    assert all(torch.equal(x, before[name]) for name, x in keeping.module.state_dict().items())


@pytest.mark.parametrize("events", [0, 1])
def test_a_search_of_too_few_events(events: int) -> None:
    case = Case(DIN(hidden=(6,), keep=1))
    index = {name: ids[:events] for name, ids in case.index.items()}
    out = case(index, Ragged({}, torch.tensor([0] * 3 + [events] * 4)))["item"]
    assert not out[[0, 1, 3, 4, 5]].any() and bool(out[2].any()) == bool(events)
    assert not case.module.dice[0].batches


def test_scale_without_a_compared_field_is_that_of_the_events() -> None:
    plain, scaled = (Case(DIN(hidden=(6,), activation="relu", scale=s), ()) for s in (False, True))
    torch.testing.assert_close(scaled()["item"] * 3 * D, plain()["item"])


# -------------------------------------------------------------------------------------------------------------- in a model
def test_every_parameter_and_buffer_survives_a_bundle(tmp_path: Path) -> None:
    run = make_run(model=dataclasses.replace(make_run().model, history=DIN(hidden=(8,)), tables=Views(width=4)))
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, steps=12, evaluate_every=12))
    result = train(run, tables={"log": make_log()}, baseline=False)
    result.bundle.save(tmp_path / "bundle")
    saved = Bundle.load(tmp_path / "bundle").model
    for history in [m for m in saved.modules() if isinstance(m, DINHistory)]:
        assert int(history.dice[0].batches) == 12 and not bool((history.dice[0].variance == 1).any())
    for name, x in result.bundle.model.state_dict().items():
        assert torch.equal(x, saved.state_dict()[name]), name


def test_it_learns_what_only_the_predicted_item_tells() -> None:
    """Planted: the label is whether the row's item is among its events; a mean pools that away, weights need q."""
    torch.manual_seed(0)
    items, rows, length = 20, 512, 6
    table = nn.Parameter(torch.randn(items, 8) * 0.5)
    module = DIN(hidden=(16,)).build({"item": 8}, {"item": 8})
    head = nn.Linear(16, 1)
    adam = torch.optim.Adam([table, *module.parameters(), *head.parameters()], lr=1e-2)
    generator = torch.Generator().manual_seed(1)

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        events = torch.randint(0, items, (rows, length), generator=generator)
        asked = torch.randint(0, items, (rows,), generator=generator)
        asked = torch.where(torch.rand(rows, generator=generator) < 0.4, events[:, 0], asked)
        return events.flatten(), asked, (events == asked.unsqueeze(1)).any(1).float()

    def logits(events: Tensor, asked: Tensor) -> Tensor:
        q = table[asked]
        history = Ragged({}, torch.arange(0, rows * length + 1, length))
        past = module({"value": {"item": Rows(table, events)}}, history, {"value": {"item": q}})["item"]
        return head(torch.cat([past, past * q], 1)).squeeze(1)

    for _ in range(250):
        events, asked, label = draw()
        adam.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits(events, asked), label).backward()
        adam.step()
    module.eval()
    events, asked, label = draw()
    right = (logits(events, asked) > 0).float().eq(label).float().mean()
    assert float(right) > 0.9


def test_rows_of_a_batch_and_rows_alone_agree_in_a_model(tmp_path: Path) -> None:
    data = make_data(cache=f"{tmp_path}/cache")
    encoded = Encoded(encode(data, tables={"log": make_log(rows=200)}))
    model = Model(encoded.schema, SharedBottom(), Views(width=4), history=DIN(hidden=(8, 4))).double()
    batch = encoded.batch(np.arange(100, 140))
    features = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.features.items()}
    batch = dataclasses.replace(batch, features=features)
    model(batch)  # sets the running statistics
    model.eval()
    whole = model(batch)
    for task, logits in whole.logits.items():
        some = model(batch.select(torch.tensor([3, 30, 7]))).logits[task]
        torch.testing.assert_close(some, logits[[3, 30, 7]], rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------- errors
def test_what_is_not_a_configuration() -> None:
    with pytest.raises(ValueError, match=r"Parameter `hidden` should be positive. Found \(8, 0\)."):
        DIN(hidden=(8, 0))
    with pytest.raises(ValueError, match=r"Parameter `hidden` should have at least one layer. Found \(\)."):
        DIN(hidden=())
    with pytest.raises(ValueError, match="Parameter `activation` should be `relu` or `dice`. Found `tanh`."):
        DIN(activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Parameter `keep` should not be negative. Found -1."):
        DIN(keep=-1)


def test_without_any_target_it_is_refused() -> None:
    schema = Schema(
        (Feature("price", kind="number"),), (Task("a"),), histories=(History("h", ("item",)),), fields=(Field("item"),),
        sizes={"item": 5},
    )  # fmt: skip
    with pytest.raises(ValueError, match="`din` needs a history with an event field"):
        Model(schema, SharedBottom(), history=DIN())
