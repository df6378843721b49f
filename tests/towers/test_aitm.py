"""AITM: what a task takes from the one before it, and whom its loss writes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from tower_kit import EXACT, biased, gradients, relu_layers

from unbraid.encoders.table import Views
from unbraid.layers import task_key
from unbraid.towers.aitm import AITM, Transfer
from unbraid.towers.mlp import SharedBottom

pytestmark = pytest.mark.usefixtures("float64")

SMALL = {"bottom": (16, 9), "tower": (5,)}
TASKS = ("shown", "click", "buy")
VIEWS = Views(width=3, std=1.0, lazy_rows=-1)


def tower_of(tasks=TASKS, **config):
    """A tower on one view of width 7, with biases."""
    return biased(AITM(**{**SMALL, **config}).build(tasks, ("shared",), (7,)))


def linear(module, x):
    return torch.einsum("bi,oi->bo", x, module.weight) + module.bias


def reference(tower, tasks, x):
    """AITM in plain arithmetic on a tower's own weights; a softmax over two is a logistic function of a difference."""
    maps, states, weights, found, h = tower.transfer, {}, [], [], None
    for task in tasks:
        q = relu_layers(tower.bottoms[task_key(task)], x)
        found.append(q)
        if h is None:
            h = q
        else:
            p = linear(tower.links[task_key(task)], h)
            score = [(linear(maps.key, u) * linear(maps.query, u)).sum(1) / math.sqrt(q.shape[1]) for u in (p, q)]
            weights.append(1 / (1 + torch.exp(score[1] - score[0])))
            a = weights[-1].unsqueeze(1)
            h = a * linear(maps.value, p) + (1 - a) * linear(maps.value, q)
        states[task] = relu_layers(tower.towers[task_key(task)], h)
    return states, weights, sum(found) / len(found)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("config", [{}, {"tower": ()}, {"bottom": (6,), "tower": (4, 3)}, {"bottom": ()}])
def test_value_and_gradient(n, config):
    tasks = TASKS[:n]
    tower, x = tower_of(tasks, **config), torch.randn(13, 7, requires_grad=True)
    scale, leaves = torch.randn(13, 1), [x, *tower.parameters()]

    def gradient(states, trunk):
        loss = sum((states[task].sin() * scale * (k + 1)).sum() for k, task in enumerate(tasks)) + trunk.cos().sum()
        return torch.autograd.grad(loss, leaves)

    out, (states, weights, trunk) = tower([x]), reference(tower, tasks, x)
    torch.testing.assert_close(out.tasks, states, **EXACT)
    assert list(out.extras) == list(tower.gives) == [f"aitm.transfer.{task}" for task in tasks[1:]]
    torch.testing.assert_close(list(out.extras.values()), weights, **EXACT)
    torch.testing.assert_close(out.trunk, trunk, **EXACT)
    assert tower.widths == {task: states[task].shape[1] for task in tasks}
    for mine, theirs in zip(gradient(out.tasks, out.trunk), gradient(states, trunk), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_transfer_by_hand():
    """Identity maps in 4 dimensions: scores are squared lengths over 2."""
    transfer = Transfer(4)
    for part in (transfer.key, transfer.query, transfer.value):
        nn.init.eye_(part.weight)
        nn.init.zeros_(part.bias)
    h, weight = transfer(torch.tensor([[2.0, 0, 0, 0]]), torch.tensor([[0.0, 1, 1, 0]]))
    a = math.exp(2) / (math.exp(2) + math.exp(1))  # 4 / 2 and 2 / 2
    torch.testing.assert_close(weight, torch.tensor([a]), **EXACT)
    torch.testing.assert_close(h, torch.tensor([[2 * a, 1 - a, 1 - a, 0]]), **EXACT)


def test_one_task_is_a_plain_mlp():
    tower, x = tower_of(("buy",)), torch.randn(13, 7)
    plain = SharedBottom(**SMALL).build(("buy",), ("shared",), (7,))
    plain.bottom.load_state_dict(tower.bottoms[task_key("buy")].state_dict())
    plain.towers.load_state_dict(tower.towers.state_dict())
    got, want = tower([x]), plain([x])
    assert torch.equal(got.tasks["buy"], want.tasks["buy"]) and torch.equal(got.trunk, want.trunk)
    assert sum(p.numel() for p in tower.parameters()) == sum(p.numel() for p in plain.parameters())


def test_without_scores_a_task_takes_half():
    tower, x = tower_of(tower=()), torch.randn(13, 7)
    with torch.no_grad():
        tower.transfer.query.weight.zero_()
        tower.transfer.query.bias.zero_()
    out = tower([x])
    q = [tower.bottoms[task_key(task)](x) for task in TASKS]
    h = q[0]
    for task, own in zip(TASKS[1:], q[1:], strict=True):
        assert (out.extras[f"aitm.transfer.{task}"] == 0.5).all()
        h = tower.transfer.value((tower.links[task_key(task)](h) + own) / 2)
        torch.testing.assert_close(out.tasks[task], h, **EXACT)


def test_the_order_is_that_of_the_tasks():
    forward, backward, x = tower_of(), tower_of(TASKS[::-1]), torch.randn(13, 7)
    assert list(forward([x]).extras) == ["aitm.transfer.click", "aitm.transfer.buy"]
    assert list(backward([x]).extras) == ["aitm.transfer.click", "aitm.transfer.shown"]
    before = {tower: tower([x]).tasks for tower in (forward, backward)}
    for tower in (forward, backward):
        with torch.no_grad():
            tower.bottoms[task_key("click")][0].weight.mul_(1.5)
    moved = {tower: [t for t in TASKS if not torch.equal(before[tower][t], tower([x]).tasks[t])] for tower in before}
    assert moved == {forward: ["click", "buy"], backward: ["shown", "click"]}


@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_loss_writes_what_stands_before_it_and_nothing_behind(net, sizes, ids, i):
    model = biased(net(AITM(**SMALL), VIEWS, TASKS, sizes))
    grads, tower = gradients(model, model.losses(ids)[TASKS[i]]), model.tower
    for k, task in enumerate(TASKS):
        reached = {
            tower.bottoms[task_key(task)]: k <= i,
            tower.towers[task_key(task)]: k == i,
            model.heads[f"task/{task}"]: k == i,
        }
        if k > 0:
            reached[tower.links[task_key(task)]] = k <= i
        for part, wanted in reached.items():
            assert all((grads[p] is not None and bool(grads[p].any())) == wanted for p in part.parameters()), task
            assert wanted or all(grads[p] is None for p in part.parameters()), task
    assert all((grads[p] is not None) == (i > 0) for p in tower.transfer.parameters())
    assert all(grads[model.table("shared", field)].any() for field in sizes)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_parameter_trains(net, sizes, ids, n):
    model = biased(net(AITM(**SMALL), VIEWS, TASKS[:n], sizes))
    grads = gradients(model, sum(model.losses(ids).values()))
    for name, parameter in model.named_parameters():
        assert grads[parameter] is not None and grads[parameter].any(), name


def test_several_views_are_read_side_by_side():
    one, two = tower_of(), AITM(**SMALL).build(TASKS, ("view0", "view1"), (3, 4))
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 7)
    for task, hidden in one([x]).tasks.items():
        assert torch.equal(two([x[:, :3], x[:, 3:]]).tasks[task], hidden)


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("views", [(*TASKS, "shared"), TASKS, ()])
def test_reads_no_views_of_tasks(views):
    with pytest.raises(ValueError) as error:
        AITM().build(TASKS, views, (4,) * len(views))
    assert str(error.value) == (
        f"Tower `aitm` reads one view, or several that belong to no task. Found views {views}. "
        "Set model.tables.kind to `shared` or `several`."
    )


def test_dropout_is_in_bottoms_and_towers():
    tower = tower_of(dropout=0.5)
    for network in (tower.bottoms[task_key("shown")], tower.towers[task_key("buy")]):
        assert any(isinstance(part, nn.Dropout) and part.p == 0.5 for part in network)
