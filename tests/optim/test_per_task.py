"""Gradients per objective against autograd, and the sum of them against the joint update."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from optim_kit import EXACT, TASKS, Small, assert_equal, batches, losses_of, train, weights_of

from unbraid import store
from unbraid.optim.joint import Joint
from unbraid.optim.per_task import Gradients, PerTask
from unbraid.types import Lookup, Output

SHARED, OWN = "shared/item/value", "click/item/value"


class Dense(PerTask):
    reads_dense_lookups = True


def make(model: Small, config: Joint | None = None, cls: type[PerTask] = PerTask, **weights: float) -> PerTask:
    return cls(config or Joint(), model, 100, weights)


# ------------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("cls", [PerTask, Dense])
@pytest.mark.parametrize("lazy", [True, False])
def test_every_objectives_gradient_is_autograds(lazy: bool, cls: type[PerTask]) -> None:
    model, ids = Small(lazy), batches(1)[0]
    update = make(model, cls=cls)
    output = model(ids)
    found = update.gradients(losses_of(output), output)
    by_rows = lazy or cls is Dense
    assert set(found.ids) == (set(model.tables) if by_rows else set())
    for task in TASKS:
        twin = Small(False)
        losses_of(twin(ids))[task].backward()
        expected = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        for leaf, grad in found.of[task].items():
            name = f"views.tables.{leaf}.weight" if by_rows and leaf in model.tables else leaf
            rows = found.ids.get(leaf, slice(None))
            torch.testing.assert_close(grad, expected.pop(name)[rows], **EXACT)
        assert not expected, "every gradient should have been found"


def test_leaves_are_shared_once_two_objectives_reached_them() -> None:
    model = Small(True)
    update = make(model)
    for tasks, shared in ((("click",), []), (("like",), [SHARED]), (("click",), [SHARED])):
        output = model(batches(1)[0])
        grads = update.gradients(losses_of(output, tasks), output)
        update.note(grads)
        assert update.shared(grads) == shared
        assert set(update.own(grads)) | set(shared) == set(grads.leaves())
    assert update.reached[SHARED] == ["click", "like"] and update.reached[OWN] == ["click"]


def test_matrix_and_split_are_inverse_and_fill_with_zeros() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.tensor([7.0, 8.0])
    grads = Gradients({"x": {"a": a}, "y": {"a": -a, "b": b}}, {})
    matrix = grads.matrix(["b", "a"])
    assert matrix.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5], [7, 8, 0, -1, -2, -3, -4, -5]]
    assert_equal(grads.split(matrix[1], ["b", "a"]), {"b": b, "a": -a})
    assert grads.leaves() == ["a", "b"] and grads.reaching("b") == ["y"]
    assert grads.weighted("a", {"x": 2.0, "y": 0.5}).tolist() == (1.5 * a).tolist()


def test_a_table_read_in_several_lookups_gets_the_sum() -> None:
    model = Small(True)
    update = make(model)
    leaves = [torch.ones(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lookups = tuple(Lookup(SHARED, torch.tensor(i), x) for i, x in zip(([1, 4], [0, 4]), leaves, strict=True))
    output = Output({}, {}, leaves[0], {}, lookups)
    losses = {"click": leaves[0].sum() + 2 * leaves[1].sum(), "like": 3 * leaves[1].sum()}
    grads = update.gradients(losses, output)
    assert grads.ids[SHARED].tolist() == [0, 1, 4]
    assert grads.of["click"][SHARED][:, 0].tolist() == [2, 1, 3]
    assert grads.of["like"][SHARED][:, 0].tolist() == [3, 0, 3]


def test_gradients_have_the_layout_of_their_leaves() -> None:
    """A fused optimiser would read a transposed or expanded gradient as if it were not."""
    model = Small(True)
    update, output = make(model), model(batches(1)[0])
    weight = model.layers["click"].weight
    loss = (weight.t() * torch.arange(24.0).view(8, 3)).sum() + model.layers["like"].bias.sum()
    found = update.gradients({"click": loss}, output).of["click"]
    assert found["layers.click.weight"].tolist() == torch.arange(24.0).view(8, 3).t().tolist()
    assert all(found[name].is_contiguous() for name in ("layers.click.weight", "layers.like.bias"))


def test_weight_0_and_a_frozen_task_take_no_part() -> None:
    model = Small(True)
    for part in (model.layers["like"], model.heads["like"]):
        part.requires_grad_(False)
    update = make(model, click=0.0)
    output = model(batches(1)[0])
    losses = losses_of(output) | {"constant": torch.tensor(1.0)}
    parts = {name: loss for name, loss in losses.items() if update.weight(name) != 0}
    grads = update.gradients(parts, output)
    assert set(grads.of) == {"like", "constant"} and not grads.of["constant"]
    assert set(grads.of["like"]) == {"like/item/value", SHARED}
    before, output = weights_of(model), model(batches(1)[0])
    update(losses_of(output), output)
    moved = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert moved == {f"views.tables.{table}.weight" for table in ("like/item/value", SHARED)}


def test_the_loss_scale_leaves_gradients_as_they_are() -> None:
    model, ids = Small(True), batches(1)[0]
    plain, scaled = make(model), make(model)
    scaled.loss_scale = 1024.0
    found = [update.gradients(losses_of(out), out) for update in (plain, scaled) for out in [model(ids)]]
    assert_equal(dict(found[1].of), dict(found[0].of))


# ---------------------------------------------------------------------------------------------------------- the sum of them
@pytest.mark.parametrize("cls", [PerTask, Dense])
@pytest.mark.parametrize("lazy", [True, False])
def test_the_weighted_sum_is_the_joint_update(lazy: bool, cls: type[PerTask]) -> None:
    config = Joint(lr=0.03, weight_decay=0.1, table_weight_decay=0.1, clip_norm=0.5, learning_rate="cosine", eps=1e-4)
    models = [Small(lazy), Small(lazy)]
    updates = [make(models[0], config, cls, click=0.3), config.build(models[1], steps=100, weights={"click": 0.3})]
    for number, ids in enumerate(batches(30)):
        for model, update in zip(models, updates, strict=True):
            model_tasks = (TASKS, ("click",), ("like",), ())[number % 4]
            for table in model.tables.values():
                table.wanted = update.reads_dense_lookups
            train(model, update, [ids], model_tasks)
    for update in updates:
        update.settle()
    for name, value in weights_of(models[1]).items():
        torch.testing.assert_close(models[0].get_parameter(name).detach(), value, **EXACT)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_moves_nothing(bad: float) -> None:
    model = Small(True)
    update = make(model)
    train(model, update, batches(1), ("click",))
    before, state = weights_of(model), copy.deepcopy(update.state_dict())
    output = model(batches(1)[0])
    losses = losses_of(output)
    with pytest.raises(FloatingPointError, match=f"Loss of `like` is {bad} at step 1"):
        update({**losses, "like": losses["like"] * bad}, output)
    assert_equal(weights_of(model), before)
    assert_equal(update.state_dict(), state)


@pytest.mark.parametrize("lazy", [True, False])
def test_resume_is_bit_equal(lazy: bool, tmp_path: Path) -> None:
    config = replace(Joint(), lr=0.05, weight_decay=0.1, table_weight_decay=0.1, clip_norm=0.5, learning_rate="cosine")
    whole, half = Small(lazy), Small(lazy)
    straight, first = make(whole, config), make(half, config)
    tasks = [(TASKS, ("click",), ("like",))[i % 3] for i in range(1, 21)]
    for ids, present in zip(batches(20), tasks, strict=True):
        train(whole, straight, [ids], present)
    for ids, present in zip(batches(20)[:1], tasks[:1], strict=True):
        train(half, first, [ids], present)
    store.save(tmp_path / "state", {"model": half.state_dict(), "update": first.state_dict()})
    state, resumed = store.load(tmp_path / "state"), Small(lazy)
    again = make(resumed, config)
    again.load_state_dict(state["update"])
    assert again.reached == first.reached
    resumed.load_state_dict(state["model"])
    for ids, present in zip(batches(20)[1:], tasks[1:], strict=True):
        train(resumed, again, [ids], present)
    assert_equal(weights_of(resumed), weights_of(whole))
    assert_equal(again.state_dict(), straight.state_dict())


def test_reached_leaves_that_are_not_trained_are_dropped() -> None:
    model = Small(True)
    update = make(model)
    train(model, update, batches(1))
    state = update.state_dict()
    model.layers.requires_grad_(False)
    later = make(model)
    later.load_state_dict(state)
    assert set(later.reached) == {leaf for leaf in update.reached if not leaf.startswith("layers")}
