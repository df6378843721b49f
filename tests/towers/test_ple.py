"""PLE: who reads whom, who writes whom, at any depth, on one view and on one per task."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch
from torch import nn
from tower_kit import (
    EXACT,
    NAMES,
    PER_TASK,
    SHARED,
    SMALL,
    biased,
    common,
    force,
    gate_of,
    gradients,
    owned,
    parts,
    relu_layers,
    tasks_by_layers,
)

from unbraid.layers import task_key
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.ple import PLE
from unbraid.towers.single_task import SingleTask

pytestmark = pytest.mark.usefixtures("float64")

both_views = pytest.mark.parametrize("views", [PER_TASK, SHARED], ids=lambda views: views.kind)
both_reads = pytest.mark.parametrize("reads", ["shared", "all"])


def tower_of(own=True, tasks=NAMES, width=7, **config):
    """A tower alone, with biases."""
    views = (*tasks, "shared") if own else ("shared",)
    return biased(PLE(**{**SMALL, **config}).build(tasks, views, (width,) * len(views)))


# ------------------------------------------------------------------------------------------------------------- backward
@tasks_by_layers
def test_the_papers_shared_gate_lets_a_loss_write_others_below_the_last_layer(net, sizes, ids, tasks, layers):
    model = biased(net(PLE(layers=layers, shared_reads="all", **SMALL), PER_TASK, tasks, sizes))
    for task in tasks:
        grads = gradients(model, model.losses(ids)[task])
        for other in set(tasks) - {task}:
            # A gate's mixture is heard by others one layer later than an expert.
            reached = {f"experts {i}" for i in range(layers - 1)} | {f"gate {i}" for i in range(layers - 2)}
            reached |= {"tables", "interaction"} if layers > 1 else set()
            for name, group in parts(model, other).items():
                assert all((grads[p] is not None and bool(grads[p].any())) == (name in reached) for p in group), name


@both_views
@both_reads
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_absent_task_stays_put_under_adam_with_momentum_and_decay(net, sizes, ids, layers, views, reads):
    model = net(PLE(layers=layers, shared_reads=reads, **SMALL), views, NAMES, sizes)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    reach = {task: {p for p, g in gradients(model, model.losses(ids)[task]).items() if g is not None} for task in NAMES}
    own = reach["b"] - reach["a"] - reach["c"]
    assert own == {p for p in owned(model, "b") if p not in reach["a"]}
    assert {*parts(model, "b")["tower"], *parts(model, "b")[f"gate {layers - 1}"]} < own

    def step(loss):
        gradients(model, loss)
        optimiser.step()
        return {p: (p.detach().clone(), copy.deepcopy(optimiser.state[p])) for p in model.parameters()}

    before = step(sum(model.losses(ids).values()))
    losses = model.losses(ids)
    after = step(losses["a"] + losses["c"])
    for parameter in own:
        assert torch.equal(before[parameter][0], after[parameter][0])
        for name, value in before[parameter][1].items():
            assert torch.equal(value, after[parameter][1][name])
    assert not any(torch.equal(before[p][0], after[p][0]) for p in owned(model, "a") + common(model))


@tasks_by_layers
@both_views
@both_reads
def test_every_parameter_trains(net, sizes, ids, tasks, layers, views, reads):
    model = biased(net(PLE(layers=layers, shared_reads=reads, **SMALL), views, tasks, sizes))
    grads = gradients(model, sum(model.losses(ids).values()))
    for name, parameter in model.named_parameters():
        assert grads[parameter] is not None and grads[parameter].any(), name
    assert [layer.shared_gate is None for layer in model.tower.layers] == [False] * (layers - 1) + [True]


# -------------------------------------------------------------------------------------------------------------- forward
@pytest.mark.parametrize("layers", [1, 2, 3])
@both_reads
def test_a_task_does_not_read_the_views_of_others(layers, reads):
    tower, views = tower_of(layers=layers, shared_reads=reads), [torch.randn(13, 7) for _ in range(4)]
    before = tower(views).tasks
    for k, moved in enumerate(NAMES):
        after = tower([x + 0.5 * (i == k) for i, x in enumerate(views)]).tasks
        for task in NAMES:
            heard = task == moved or (reads == "all" and layers > 1)
            assert torch.equal(before[task], after[task]) != heard, (moved, task)
    after = tower([*views[:-1], views[-1] + 0.5]).tasks
    assert not any(torch.equal(before[task], after[task]) for task in NAMES)


@tasks_by_layers
@both_views
def test_gates_are_a_distribution_over_own_and_shared_experts(net, sizes, ids, tasks, layers, views):
    model = biased(net(PLE(layers=layers, shared_experts=3, task_experts=2, **SMALL), views, tasks, sizes))
    out = model.out(ids)
    assert list(out.extras) == list(model.tower.gives) == [f"ple.gate.{task}" for task in tasks]
    for gate in out.extras.values():
        assert gate.shape == (64, 5) and (gate >= 0).all()
        torch.testing.assert_close(gate.sum(1), torch.ones(64), **EXACT)
    assert model.tower.widths == dict.fromkeys(tasks, 8)
    assert out.trunk.shape == (64, 12) and len(model.tower.layers[-1].shared_experts) == 3
    if layers == 1:
        mean = sum(expert(model.hidden(ids)[-1]) for expert in model.tower.layers[0].shared_experts) / 3
        torch.testing.assert_close(out.trunk, mean, **EXACT)


def test_one_task_pools_its_own_and_the_shared_experts(net, sizes, ids):
    model = net(PLE(shared_experts=2, task_experts=3, **SMALL), PER_TASK, ("a",), sizes)
    assert model.out(ids).extras["ple.gate.a"].shape == (64, 5)
    assert all(grad is not None for grad in gradients(model, model.losses(ids)["a"]).values())


def test_several_views_are_read_side_by_side():
    config, x = PLE(layers=2, **SMALL), torch.randn(4, 8)
    one = config.build(NAMES, ("shared",), (8,))
    two = config.build(NAMES, ("view0", "view1"), (3, 5))
    two.load_state_dict(one.state_dict())
    for task, hidden in one([x]).tasks.items():
        assert torch.equal(two([x[:, :3], x[:, 3:]]).tasks[task], hidden)


# --------------------------------------------------------------------------------------------------------------- limits
def bottom_of(tower, expert, task):
    """Shared-Bottom of one task with an expert of a tower as its bottom."""
    module = SharedBottom(bottom=SMALL["expert"], tower=SMALL["tower"]).build((task,), ("shared",), (7,))
    module.bottom.load_state_dict(expert.state_dict())
    module.towers[task_key(task)].load_state_dict(tower.towers[task_key(task)].state_dict())
    return module


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("k", [0, 1, 2])
def test_one_hot_gate_is_one_expert(own, k, column):
    task, tower = NAMES[k], tower_of(own, task_experts=2)
    views = [torch.randn(13, 7) for _ in range(4 if own else 1)]
    (layer,) = tower.layers
    force(layer.gates[task_key(task)], column)
    expert = [*layer.task_experts[task_key(task)], *layer.shared_experts][column]
    x = views[k] if own and column < 2 else views[-1]
    assert torch.equal(tower(views).tasks[task], bottom_of(tower, expert, task)([x]).tasks[task])


def test_gates_on_own_experts_leave_single_task_networks():
    tower, views = tower_of(), [torch.randn(13, 7) for _ in range(4)]
    single = SingleTask(bottom=SMALL["expert"], tower=SMALL["tower"]).build(NAMES, NAMES, (7,) * 3)
    for task in NAMES:
        force(tower.layers[0].gates[task_key(task)], 0)
        single.bottoms[task_key(task)].load_state_dict(tower.layers[0].task_experts[task_key(task)][0].state_dict())
    single.towers.load_state_dict(tower.towers.state_dict())
    got, want = tower(views), single(views[:-1])
    assert all(torch.equal(got.tasks[task], want.tasks[task]) for task in NAMES)


# --------------------------------------------------------------------------------------------------------------- parity
def test_one_layer_is_cgc():
    """Customized gate control, row by row and expert by expert, for two experts per task and three shared ones."""
    tower = tower_of(own=False, task_experts=2, shared_experts=3)
    x, (layer,) = torch.randn(5, 7), tower.layers
    out = tower([x])
    for task in NAMES:
        experts = [*layer.task_experts[task_key(task)], *layer.shared_experts]
        logit = layer.gates[task_key(task)][-1]
        for row in range(5):
            scores = [(logit.weight[n] @ x[row] + logit.bias[n]).exp() for n in range(5)]
            z = sum(s / sum(scores) * relu_layers(e, x[row : row + 1]) for s, e in zip(scores, experts, strict=True))
            torch.testing.assert_close(
                out.tasks[task][row : row + 1], relu_layers(tower.towers[task_key(task)], z), **EXACT
            )


def mixed(network, query, pool):
    """A gate on a query and what it makes of a pool."""
    gate = gate_of(network, query)
    return torch.einsum("bn,nbd->bd", gate, torch.stack(pool)), gate


def reference(tower, tasks, states, shared, reads):
    """PLE in plain arithmetic on a tower's own weights."""
    for i, layer in enumerate(tower.layers):
        own = {t: [relu_layers(e, states[t]) for e in layer.task_experts[task_key(t)]] for t in tasks}
        pool = [relu_layers(e, shared) for e in layer.shared_experts]
        both = {t: mixed(layer.gates[task_key(t)], states[t], own[t] + pool) for t in tasks}
        states, gates = {t: z for t, (z, _) in both.items()}, [g for _, g in both.values()]
        if i < len(tower.layers) - 1:
            heard = list(chain(*own.values())) if reads == "all" else []
            shared, _ = mixed(layer.shared_gate, shared, heard + pool)
    return {t: relu_layers(tower.towers[task_key(t)], states[t]) for t in tasks}, gates, sum(pool) / len(pool)


@tasks_by_layers
@both_reads
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("config", [{}, {"task_experts": 2, "shared_experts": 1, "gate": (4,), "tower": ()}])
def test_value_and_gradient(tasks, layers, reads, own, config):
    tower = tower_of(own, tasks, layers=layers, shared_reads=reads, **config)
    views = [torch.randn(13, 7, requires_grad=True) for _ in range(len(tasks) + 1 if own else 1)]
    scale, leaves = torch.randn(13, 1), [*views, *tower.parameters()]

    def gradient(states, trunk):
        loss = sum((states[task].sin() * scale * (k + 1)).sum() for k, task in enumerate(tasks)) + trunk.cos().sum()
        return torch.autograd.grad(loss, leaves)

    out = tower(views)
    by_task = dict(zip(tasks, views if own else views * len(tasks), strict=False))
    states, gates, trunk = reference(tower, tasks, by_task, views[-1], reads)
    torch.testing.assert_close(out.tasks, states, **EXACT)
    torch.testing.assert_close(list(out.extras.values()), gates, **EXACT)
    torch.testing.assert_close(out.trunk, trunk, **EXACT)
    for mine, theirs in zip(gradient(out.tasks, out.trunk), gradient(states, trunk), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("views", [("a", "b"), ("shared", "a", "b"), ("b", "a", "shared"), ("a", "shared"), ()])
def test_refuses_other_views(views):
    with pytest.raises(ValueError) as error:
        PLE().build(("a", "b"), views, (4,) * len(views))
    assert str(error.value) == (
        "Tower `ple` reads one view per task and a shared one, ('a', 'b', 'shared'), or views that belong to no task. "
        f"Found views {views}. Set model.tables.kind to `per_task`, `shared` or `several`."
    )


def test_refuses_unequal_widths():
    with pytest.raises(ValueError) as error:
        PLE().build(("a", "b"), ("a", "b", "shared"), (4, 4, 8))
    assert str(error.value) == (
        "Tower `ple` has experts of one size, so all views need one width. "
        "Found {'a': 4, 'b': 4, 'shared': 8}. Set model.tables.kind to `per_task`."
    )


def test_refuses_other_readings_and_dropout_of_one():
    with pytest.raises(ValueError) as error:
        PLE(shared_reads="none")
    assert str(error.value) == "Parameter `shared_reads` should be `shared` or `all`. Found `none`."
    with pytest.raises(ValueError) as error:
        PLE(dropout=1.0)
    assert str(error.value) == "Parameter `dropout` should be in [0, 1). Found 1.0."


def test_misspelt_key_is_refused():
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(PLE)
    assert adapter.validate_python({"layers": 2, "shared_reads": "all"}) == PLE(layers=2, shared_reads="all")
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python({"shared_read": "all"})


def test_dropout_is_in_experts_gates_and_towers():
    tower = tower_of(dropout=0.5, gate=(4,))
    (layer,) = tower.layers
    networks = [layer.task_experts[task_key("a")][0], layer.shared_experts[1], layer.gates[task_key("b")]]
    for network in (*networks, tower.towers[task_key("c")]):
        assert any(isinstance(part, nn.Dropout) and part.p == 0.5 for part in network)
