"""The joint update against plain torch loops, on a small model with a table per task and a shared one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_kit import EXACT, TASKS, Small, V, assert_equal, batches, losses_of, train, weights_of
from pydantic import TypeAdapter, ValidationError
from torch import nn

from unbraid import store
from unbraid.encoders.table import Table, Tables, Views
from unbraid.optim.joint import Joint, JointUpdate, row_gradients
from unbraid.slots import Update
from unbraid.types import Lookup, Output


def build(config: Joint, model: Small, steps: int = 100, **more: Any) -> JointUpdate:
    return config.build(model, steps=steps, weights=more.pop("weights", {}), **more)


# ------------------------------------------------------------------------------------------------------------ the sum
@pytest.mark.parametrize("reference", ["Adam", "AdamW"])
def test_dense_parameters_take_torchs_step(reference: str) -> None:
    """Tables are their own group: other step size, other decay."""
    decayed = reference == "AdamW"
    config = Joint(lr=0.03, betas=(0.8, 0.9), eps=1e-4, table_lr=0.01)
    if decayed:
        config = replace(config, weight_decay=0.1, table_weight_decay=0.2)
    mine, theirs = Small(lazy=False), Small(lazy=False)
    update = build(config, mine, weights={"click": 0.5})
    layers = [p for name, p in theirs.named_parameters() if not name.startswith("views")]
    groups = [{"params": layers}, {"params": list(theirs.views.parameters()), "lr": 0.01}]
    if decayed:
        groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.2
    optimizer = getattr(torch.optim, reference)(groups, lr=0.03, betas=(0.8, 0.9), eps=1e-4, fused=True)
    for ids in batches(40):
        output = mine(ids)
        update(losses_of(output), output)
        optimizer.zero_grad()
        other = losses_of(theirs(ids))
        (0.5 * other["click"] + other["like"]).backward()
        optimizer.step()
    for name, value in weights_of(theirs).items():
        assert torch.equal(mine.get_parameter(name), value), name


def test_lazy_tables_take_sparse_adams_step() -> None:
    """Rows of a table that a loss reaches, against SparseAdam fed with autograd's dense gradient at the rows read."""
    mine, theirs = Small(lazy=True), Small(lazy=False)
    update = build(Joint(lr=0.02, table_lr=0.05, eps=1e-4), mine)
    tables = list(theirs.views.parameters())
    layers = [p for name, p in theirs.named_parameters() if not name.startswith("views")]
    sparse, dense = torch.optim.SparseAdam(tables, lr=0.05, eps=1e-4), torch.optim.Adam(layers, lr=0.02, eps=1e-4)
    for number, ids in enumerate(batches(40)):
        tasks = TASKS if number % 3 else ("like",)
        train(mine, update, [ids], tasks)
        for parameter in theirs.parameters():
            parameter.grad = None
        sum(losses_of(theirs(ids), tasks).values()).backward()  # type: ignore[union-attr]
        rows = ids.unique()
        for table in tables:
            if table.grad is not None:
                values = table.grad[rows]
                table.grad = torch.sparse_coo_tensor(
                    rows.unsqueeze(0), values, table.shape, check_invariants=True
                ).coalesce()
        sparse.step()
        dense.step()
    for name, value in weights_of(theirs).items():
        torch.testing.assert_close(mine.get_parameter(name).detach(), value, **EXACT)


def test_weights_by_objective_then_task_then_one() -> None:
    update = build(Joint(), Small(True), weights={"click": 2.0, "click@tv": 3.0, "like": 0.0})
    objectives = {"click": 1.0, "click@tv": 10.0, "click@pc": 100.0, "share": 1000.0, "like@tv": math.nan}
    total = update.total({name: torch.tensor(value) for name, value in objectives.items()})
    assert total is not None and float(total) == 2 + 30 + 200 + 1000
    assert update.total({"like": torch.tensor(1.0)}) is None


@pytest.mark.parametrize("decay", ["catch_up", "touched"])
def test_the_forward_pass_sees_a_lazy_table_as_if_it_were_dense(decay: Any) -> None:
    """Without gradients but with decay: equal with `catch_up`, and not with `touched`."""
    config = Joint(table_lr=0.5, table_weight_decay=0.2, decay=decay, learning_rate="linear")
    lazy, dense = Small(lazy=True), Small(lazy=False)
    updates = [build(config, lazy, steps=30), build(config, dense, steps=30)]
    equal = True
    for ids in batches(20):
        outputs = [lazy(ids), dense(ids)]
        for mine, theirs in zip(*(output.lookups for output in outputs), strict=True):
            equal = equal and torch.allclose(mine.vectors, theirs.vectors, **EXACT)
        for update, output in zip(updates, outputs, strict=True):
            update({task: 0 * loss for task, loss in losses_of(output).items()}, output)
    assert equal == (decay == "catch_up")


# -------------------------------------------------------------------------------------------------------- what is still
@pytest.mark.parametrize("how", ["absent", "weight 0"])
@pytest.mark.parametrize("decay", ["catch_up", "touched"])
@pytest.mark.parametrize("lazy", [True, False])
def test_an_absent_task_moves_nothing_of_its_own(lazy: bool, decay: Any, how: str) -> None:
    """After 20 mixed steps, weight decay on: weights and optimiser state of `like`'s table, layer and head, bitwise."""
    model = Small(lazy)
    config = Joint(lr=0.05, weight_decay=0.1, table_weight_decay=0.1, decay=decay, clip_norm=1.0)
    update = build(config, model)
    for number, ids in enumerate(batches(20)):
        train(model, update, [ids], (TASKS, ("click",), ("like",))[number % 3])
    update.settle()
    before, state = weights_of(model), copy.deepcopy(update.state_dict())
    if how == "absent":
        train(model, update, batches(5, seed=1), ("click",))
    else:
        update.weights["like"] = 0.0
        train(model, update, batches(5, seed=1))
    update.settle()
    after, later = weights_of(model), update.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) == ("like" in name), name
    for part in ("dense", "rows"):
        for name, value in state[part].items():
            if "like" in name:
                assert_equal(later[part][name], value, name)
            else:
                assert later[part][name]["step"] != value["step"]
    assert any("like" in name for name in state["rows" if lazy else "dense"])


@pytest.mark.parametrize("lazy", [True, False])
def test_no_losses_move_nothing_but_the_learning_rate(lazy: bool, recwarn: pytest.WarningsRecorder) -> None:
    model = Small(lazy)
    update = build(Joint(weight_decay=0.1, table_weight_decay=0.1, learning_rate="linear"), model, steps=10)
    before = weights_of(model)
    update({}, model(batches(1)[0]))
    assert_equal(weights_of(model), before)
    assert update.state_dict() == {"kind": "joint", "step": 1, "dense": {}, "rows": {}}
    assert [group["lr"] for group in update.dense.param_groups] == [pytest.approx(9e-4, rel=1e-12)] * 2
    assert not recwarn.list


def test_gradients_of_an_earlier_user_are_forgotten() -> None:
    mine, clean = Small(True), Small(True)
    for model in (mine, clean):
        update = build(Joint(), model)
        output = model(batches(1)[0])
        if model is mine:
            sum(losses_of(output).values()).backward(retain_graph=True)  # type: ignore[union-attr]
        update(losses_of(output, ("click",)), output)
    assert_equal(weights_of(mine), weights_of(clean))


def test_frozen_parameters_and_tables_stay() -> None:
    model = Small(True)
    frozen = [model.tables["shared/item/value"].weight, model.heads["like"].weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    update, before = build(Joint(lr=0.1), model), weights_of(model)
    train(model, update, batches(3))
    still = {name for name, value in weights_of(model).items() if torch.equal(value, before[name])}
    assert still == {"views.tables.shared/item/value.weight", "heads.like.weight"}


# ----------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("norm", [1e-2, 1e6])
def test_clipping_is_clip_grad_norm_over_layers_and_rows_together(norm: float) -> None:
    model = Small(True)
    update = build(Joint(clip_norm=norm), model)
    output = model(batches(1)[0])
    update.begin(output)
    sum(losses_of(output).values()).backward()  # type: ignore[union-attr]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    grads += [lookup.vectors.grad for lookup in output.lookups]
    twins = [nn.Parameter(torch.empty_like(grad)) for grad in grads]
    for twin, grad in zip(twins, grads, strict=True):
        twin.grad = grad.clone()
    together = torch.cat([grad.flatten() for grad in grads])
    total = torch.nn.utils.clip_grad_norm_(twins, norm)
    update.apply(output)
    assert update.grad_norm is not None
    torch.testing.assert_close(update.grad_norm, together.norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(update.grad_norm, total, rtol=1e-12, atol=0)
    for twin, grad in zip(twins, grads, strict=True):  # clipped in place
        torch.testing.assert_close(grad, twin.grad, **EXACT)
    name, ids, vectors = output.lookups[-1]
    torch.testing.assert_close(update.state_dict()["rows"][name]["mean"][ids], 0.1 * vectors.grad, **EXACT)


def test_the_update_says_whether_it_reads_lookups_of_dense_tables() -> None:
    class Reads(JointUpdate):
        reads_dense_lookups = True

    model = Small(lazy=False)
    Reads(Joint(), model, 1, {})
    assert all(table.wanted for table in model.tables.values())
    Joint().build(model, steps=1, weights={})
    assert not any(table.wanted for table in model.tables.values()), "the next update's wish replaces it"


def test_a_table_read_in_two_lookups_gets_the_sum() -> None:
    leaves = [torch.zeros(len(ids), 2, requires_grad=True) for ids in ([1, 4], [0, 4, 5])]
    lookups = [Lookup("t", torch.tensor([1, 4]), leaves[0]), Lookup("t", torch.tensor([0, 4, 5]), leaves[1])]
    leaves[0].grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    leaves[1].grad = torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    ids, grad = row_gradients([*lookups, Lookup("other", torch.tensor([0]), torch.zeros(1, 2))], {"t"})["t"]
    assert ids.tolist() == [0, 1, 4, 5]
    assert grad.tolist() == [[10, 20], [1, 2], [33, 44], [50, 60]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_objective_and_step_and_moves_nothing(bad: float) -> None:
    model = Small(True)
    update = build(Joint(), model)
    train(model, update, batches(2))
    update.settle()
    before, state = weights_of(model), copy.deepcopy(update.state_dict())
    output = model(batches(1)[0])
    losses = losses_of(output)
    with pytest.raises(FloatingPointError, match=f"Loss of `like` is {bad} at step 2"):
        update({**losses, "like": losses["like"] * bad}, output)
    assert_equal(weights_of(model), before)
    assert_equal(update.state_dict(), state)


# ------------------------------------------------------------------------------------------------------- learning rates
def torch_schedule(kind: str, steps: int, warmup: int, final: float) -> Callable[[torch.optim.Optimizer], Any]:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        at = torch.optim.lr_scheduler
        lr, rest = optimizer.param_groups[0]["lr"], steps - warmup
        main = {
            "constant": lambda: at.ConstantLR(optimizer, factor=1.0),
            "linear": lambda: at.LinearLR(optimizer, 1.0, final, total_iters=rest),
            "cosine": lambda: at.CosineAnnealingLR(optimizer, T_max=rest, eta_min=final * lr),
        }
        if not warmup:
            return main[kind]()
        warm = at.LinearLR(optimizer, 1 / (warmup + 1), 1.0, total_iters=warmup)
        return at.SequentialLR(optimizer, [warm, main[kind]()], milestones=[warmup])

    return make


@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_step_sizes_are_those_of_torchs_schedulers(kind: Any, warmup: int) -> None:
    config = Joint(lr=0.2, table_lr=0.05, learning_rate=kind, warmup_steps=warmup, final_factor=0.1)
    model = Small(True)
    update = build(config, model, steps=25)
    twins = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr) for lr in (0.2, 0.05)]
    schedules = [torch_schedule(kind, 25, warmup, 0.1)(twin) for twin in twins]
    for batch in batches(25):
        expected = [twin.param_groups[0]["lr"] for twin in twins]
        found = [update.dense.param_groups[0]["lr"], update.rows.param_groups[0]["lr"]]
        assert found == pytest.approx(expected, rel=1e-12)
        assert update.dense.param_groups[1]["lr"] == found[1]
        train(model, update, [batch])
        for twin, schedule in zip(twins, schedules, strict=True):
            twin.step()
            schedule.step()
    last = 0.2 * (1.0 if kind == "constant" else 0.1)
    assert update.dense.param_groups[0]["lr"] == pytest.approx(last, rel=1e-12)
    assert config.factor(1000, 25) == pytest.approx(last / 0.2, rel=1e-12)  # a run that goes on stays there


# --------------------------------------------------------------------------------------------------------------- states
@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("decay", ["catch_up", "touched"])
@pytest.mark.parametrize("lazy", [True, False])
def test_resume_is_bit_equal(lazy: bool, decay: Any, file: bool, tmp_path: Path) -> None:
    """Without settling first: what rows owe is part of the state."""
    config = Joint(
        lr=0.05, weight_decay=0.1, table_weight_decay=0.1, decay=decay, clip_norm=0.5, learning_rate="cosine",
        warmup_steps=5,
    )  # fmt: skip
    whole, half, resumed = Small(lazy), Small(lazy), Small(lazy)
    ids = batches(40)
    straight = build(config, whole, steps=40)
    train(whole, straight, ids)
    first = build(config, half, steps=40)
    train(half, first, ids[:20])
    state = {"model": half.state_dict(), "update": first.state_dict()}
    if file:
        store.save(tmp_path / "state", state)
        state = store.load(tmp_path / "state")
    again = build(config, resumed, steps=40)
    again.load_state_dict(state["update"])
    resumed.load_state_dict(state["model"])
    train(half, first, ids[20:])  # must not reach the resumed run through shared tensors
    train(resumed, again, ids[20:])
    assert_equal(again.state_dict(), straight.state_dict())
    assert_equal(weights_of(resumed), weights_of(whole))
    assert not lazy or decay == "touched" or "last" in again.state_dict()["rows"]["shared/item/value"]
    again.settle(), straight.settle()
    assert_equal(weights_of(resumed), weights_of(whole))


def test_state_is_keyed_by_parameter_name_and_survives_freezing() -> None:
    model = Small(True)
    update = build(Joint(), model)
    train(model, update, batches(2))
    state = update.state_dict()
    assert set(state["dense"]) == {name for name, _ in model.named_parameters() if not name.startswith("views")}
    assert set(state["rows"]) == set(model.tables)
    model.layers.requires_grad_(False)
    model.tables["like/item/value"].weight.requires_grad_(False)
    later = build(Joint(), model)
    later.load_state_dict(state)
    assert set(later.state_dict()["dense"]) == {name for name in state["dense"] if name.startswith("heads")}
    assert set(later.state_dict()["rows"]) == {"click/item/value", "shared/item/value"}
    name = "heads.like.bias"
    assert_equal(later.state_dict()["dense"][name], state["dense"][name])


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, "Parameter `lr` should be finite and not negative. Found -1.0."),
        ({"clip_norm": math.nan}, "Parameter `clip_norm` should be finite and not negative. Found nan."),
        ({"table_lr": -0.5}, "Parameter `table_lr` should be finite and not negative. Found -0.5."),
        ({"warmup_steps": -1}, "Parameter `warmup_steps` should be finite and not negative. Found -1."),
        ({"betas": (0.9, 1.0)}, "Parameter `betas` should be in [0, 1). Found (0.9, 1.0)."),
        ({"final_factor": 1.5}, "Parameter `final_factor` should be in [0, 1]. Found 1.5."),
    ],
)
def test_config_errors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Joint(**wrong)
    assert str(error.value) == message


def test_a_misspelt_key_of_a_run_file_is_an_error() -> None:
    adapter = TypeAdapter(Joint)
    assert adapter.validate_python({"lr": 0.1, "learning_rate": "cosine"}) == Joint(lr=0.1, learning_rate="cosine")
    with pytest.raises(ValidationError, match="extra_forbidden|Unexpected keyword"):
        adapter.validate_python({"learning_rates": "cosine"})


def test_weight_errors() -> None:
    model, permitted = Small(True), ("click@tv", "like")
    build(Joint(), model, weights={"click": 1.0, "click@tv": 1.0, "like": 0.0}, objectives=permitted)
    message = r"\['share'\] match no objective. Permitted are \['click', 'click@tv', 'like'\]"
    with pytest.raises(ValueError, match=message):
        build(Joint(), model, weights={"share": 1.0}, objectives=permitted)
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"Weight of `click` should be finite and not negative. Found {wrong}"):
            build(Joint(), model, weights={"click": wrong})


def test_state_errors() -> None:
    model = Small(True)
    update = build(Joint(), model)
    train(model, update, batches(2))
    state = update.state_dict()
    with pytest.raises(ValueError, match="that of update `joint`. Found `adatask`"):
        update.load_state_dict({**state, "kind": "adatask"})
    with pytest.raises(ValueError, match=r"parameters that this model does not have: \['tower'\]"):
        update.load_state_dict({**state, "dense": {**state["dense"], "tower": {}}})
    with pytest.raises(ValueError, match=r"parameters that this model does not have: \['x/y/value'\]"):
        update.load_state_dict({**state, "rows": {**state["rows"], "x/y/value": {}}})
    wrong = {**state["dense"], "heads.like.bias": state["dense"]["heads.like.weight"]}
    with pytest.raises(ValueError, match=r"`heads.like.bias` should have shape \(1,\). Found \(1, 3\)"):
        update.load_state_dict({**state, "dense": wrong})


def test_a_model_of_tables_alone_and_one_without_tables() -> None:
    """Either optimiser may be empty; and the update is one."""

    class Bare(nn.Module):
        def __init__(self, lazy: bool) -> None:
            super().__init__()
            self.tables_: Tables = Views(lazy_rows=0 if lazy else -1, width=2).build((), {"item": V})

        @property
        def tables(self) -> dict[str, Table]:
            return dict(self.tables_.tables.items())  # type: ignore[arg-type]

    for lazy in (True, False):
        model = Bare(lazy)
        update: Update = Joint(clip_norm=1.0).build(model, steps=1, weights={})
        before = model.tables["shared/item/value"].weight.detach().clone()
        read, lookups = model.tables_({"item": [torch.arange(4)]})
        hidden = read["shared", "item", "value"][0].gather()
        update({"click": hidden.sum()}, Output({}, {}, hidden, {}, lookups))
        moved = (model.tables["shared/item/value"].weight != before).any(1)
        assert moved.nonzero().squeeze(1).tolist() == [0, 1, 2, 3]
