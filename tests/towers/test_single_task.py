"""Single task: T networks that share nothing are T models of one task."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from tower_kit import EXACT, biased, gradients, relu_layers
from toylog import make_data, make_log

from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.interactions.cross import Cross
from unbraid.interactions.flat import Flat
from unbraid.layers import task_key
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.single_task import SingleTask
from unbraid.types import Task

SMALL = {"bottom": (16, 9), "tower": (5,)}
TASKS = ("a", "b", "c")
SEPARATE = Views(kind="separate", width=3, std=1.0, lazy_rows=-1)


def tower_of(tasks=TASKS, **config):
    """A tower on one view of width 7 per task, with biases."""
    return biased(SingleTask(**{**SMALL, **config}).build(tasks, tasks, (7,) * len(tasks)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("config", [{}, {"tower": ()}, {"bottom": ()}, {"bottom": (6,), "tower": (4, 3)}])
def test_value_and_gradient(n, config):
    tasks = TASKS[:n]
    tower, views = tower_of(tasks, **config), [torch.randn(13, 7, requires_grad=True) for _ in tasks]
    scale, leaves = torch.randn(13, 1), [*views, *tower.parameters()]

    def gradient(states, trunk):
        loss = sum((states[task].sin() * scale * (k + 1)).sum() for k, task in enumerate(tasks)) + trunk.cos().sum()
        return torch.autograd.grad(loss, leaves)

    out = tower(views)
    found = [relu_layers(tower.bottoms[task_key(t)], x) for t, x in zip(tasks, views, strict=True)]
    states = {t: relu_layers(tower.towers[task_key(t)], h) for t, h in zip(tasks, found, strict=True)}
    trunk = sum(found) / n
    torch.testing.assert_close(out.tasks, states, **EXACT)
    torch.testing.assert_close(out.trunk, trunk, **EXACT)
    assert out.extras == {} and tower.widths == {task: states[task].shape[1] for task in tasks}
    for mine, theirs in zip(gradient(out.tasks, out.trunk), gradient(states, trunk), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.usefixtures("float64")
def test_every_parameter_has_exactly_one_task(net, sizes, ids):
    model = biased(net(SingleTask(**SMALL), SEPARATE, TASKS, sizes))
    reached = []
    for task in TASKS:
        grads = gradients(model, model.losses(ids)[task])
        assert all(grads[model.table(task, field)].any() for field in sizes)
        reached += [p for p, grad in grads.items() if grad is not None]
        assert all(grad.any() for grad in grads.values() if grad is not None)
    assert len(reached) == len(set(reached)) and set(reached) == set(model.parameters())
    assert sum(p.numel() for p in model.tables.parameters()) == (9 + 7) * 3 * len(TASKS)


@pytest.mark.usefixtures("float64")
def test_a_view_moves_its_own_task_only():
    tower, views = tower_of(), [torch.randn(13, 7) for _ in TASKS]
    before = tower(views).tasks
    for k, moved in enumerate(TASKS):
        after = tower([x + 0.5 * (i == k) for i, x in enumerate(views)]).tasks
        assert [task for task in TASKS if not torch.equal(before[task], after[task])] == [moved]


# ------------------------------------------------------------------------------------------------------- T runs in one
@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    tasks = (Task("click"), Task("buy", weight=2.0), Task("spend", kind="real"), Task("size", kind="multiclass"))
    data = make_data(tasks=tasks, cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data, tables={"log": make_log(rows=400)}))


def batches(encoded):
    """20 batches; every task is absent from some, and the second from all of the first four."""
    names = [task.name for task in encoded.schema.tasks]
    for at in range(20):
        batch = encoded.batch(np.arange(12 * at, 12 * at + 24))
        absent = [names[1]] if at < 4 else names[at % 4 :: 3] if at % 5 == 0 else []
        observed = {t: o & (t not in absent) for t, o in batch.observed.items()}
        yield dataclasses.replace(batch, observed=observed)


def trained(model, encoded, update):
    """The model after 20 steps of the joint update, and its logits on other rows."""
    term = Supervised().bind(model.schema)
    step = update.build(model, steps=20, weights={task.name: task.weight for task in model.schema.tasks})
    for at, batch in enumerate(batches(encoded)):
        output = model(batch)
        step(term(output, batch, at), output)
    step.settle()
    with torch.no_grad():
        return model.eval()(encoded.batch(np.arange(300, 380))).logits


def renamed(name, task):
    """The name of a one-task model's parameter in the model of all tasks."""
    for old, new in (("tables.shared/", f"tables.{task}/"), ("view/shared.", f"view/{task}.")):
        name = name.replace(old, new)
    return name.replace("tower.bottom.", f"tower.bottoms.{task_key(task)}.").replace("bags.shared/", f"bags.{task}/")


def pairs(encoded, lazy_rows, interaction, update):
    """task -> (weights, logits) of all tasks in one model, and of the task alone, from the same first weights."""
    torch.manual_seed(1)
    views = {"width": 4, "lazy_rows": lazy_rows}
    together = Model(encoded.schema, SingleTask(**SMALL), Views(kind="separate", **views), interaction)
    start = {name: value.clone() for name, value in together.state_dict().items()}
    logits, found = trained(together, encoded, update), {}
    seen = set()
    for task in encoded.schema.tasks:
        schema = dataclasses.replace(encoded.schema, tasks=(task,))
        alone = Model(schema, SharedBottom(**SMALL), Views(**views), interaction)
        names = {name: renamed(name, task.name) for name in alone.state_dict()}
        alone.load_state_dict({name: start[there] for name, there in names.items()})
        mine = trained(alone, encoded, update)[task.name]
        theirs = together.state_dict()
        weights = [(value, theirs[names[name]]) for name, value in alone.state_dict().items()]
        found[task.name] = [*weights, (mine, logits[task.name])]
        seen |= set(names.values())
        assert not all(torch.equal(start[names[name]], value) for name, value in alone.state_dict().items())
    assert seen == set(start), "every parameter belongs to one of the models"
    return found


@pytest.mark.parametrize("lazy_rows", [0, -1])
@pytest.mark.parametrize(
    ("interaction", "update"),
    [
        (Flat(), Joint(lr=0.01)),
        (Cross(), Joint(lr=0.01, weight_decay=0.1, table_weight_decay=0.1, learning_rate="cosine", warmup_steps=3)),
        (Flat(), Joint(lr=0.01, table_weight_decay=0.1, decay="touched")),
    ],
)
def test_is_bit_for_bit_one_model_per_task(encoded, lazy_rows, interaction, update):
    for task, compared in pairs(encoded, lazy_rows, interaction, update).items():
        assert all(torch.equal(alone, together) for alone, together in compared), task


def test_clipping_by_a_global_norm_ties_the_tasks_together(encoded):
    for compared in pairs(encoded, -1, Flat(), Joint(lr=0.01, clip_norm=0.1)).values():
        assert not torch.equal(*compared[-1])


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("views", "widths"),
    [
        (("a", "b", "shared"), (4, 4, 4)),
        (("shared",), (4,)),
        (("b", "a"), (4, 4)),
        (("view0", "view1"), (4, 4)),
        (("a", "b"), (4, 5)),
    ],
)
def test_refuses_other_views(views, widths):
    with pytest.raises(ValueError) as error:
        SingleTask().build(("a", "b"), views, widths)
    assert str(error.value) == (
        "Tower `single_task` reads one view per task, ('a', 'b'), all of one width, and no shared one. "
        f"Found {dict(zip(views, widths, strict=True))}. Set model.tables.kind to `separate`."
    )


def test_dropout_is_in_bottoms_and_towers():
    tower = tower_of(dropout=0.5)
    for network in (tower.bottoms[task_key("a")], tower.towers[task_key("c")]):
        assert any(isinstance(part, nn.Dropout) and part.p == 0.5 for part in network)
