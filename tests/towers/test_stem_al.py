"""STEM-AL: main tasks read auxiliary ones, and no loss writes another task's parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tower_kit import EXACT, biased, force, gate_of, gradients, relu_layers
from toylog import make_data, make_log, make_run

from unbraid.bundle import build
from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.layers import task_key
from unbraid.towers.single_task import SingleTask
from unbraid.towers.stem_al import STEMAL
from unbraid.types import Task

SMALL = {"expert": (9, 6), "tower": (5,)}
TASKS = ("a", "b", "c", "d")
SEPARATE = Views(kind="separate", width=3, std=1.0, lazy_rows=-1)


def tower_of(main=("b", "d"), tasks=TASKS, **config):
    """A tower on one view of width 7 per task, with biases."""
    return biased(STEMAL(main=main, **{**SMALL, **config}).build(tasks, tasks, (7,) * len(tasks)))


def of_task(model, task):
    """Every parameter of one task: table, interaction, expert, gate, tower, head."""
    marks = (f"tables.{task}/", f"view/{task}.", f"task/{task}.")
    return [p for name, p in model.named_parameters() if any(mark in name for mark in marks)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("gate", [(), (4,)])
def test_a_loss_writes_its_own_parts_and_nothing_else(net, sizes, ids, gate):
    model = biased(net(STEMAL(main=("b", "d"), gate=gate, **SMALL), SEPARATE, TASKS, sizes))
    assert sum(len(of_task(model, task)) for task in TASKS) == len(list(model.parameters()))
    for task in TASKS:
        grads = gradients(model, model.losses(ids)[task])
        for other in TASKS:
            mine = [grads[p] for p in of_task(model, other)]
            if other == task:
                assert all(grad is not None and grad.any() for grad in mine)
            else:
                assert all(grad is None for grad in mine), f"{task} wrote {other}"


@pytest.mark.usefixtures("float64")
def test_who_reads_whom():
    tower, views = tower_of(), [torch.randn(13, 7) for _ in TASKS]
    before = tower(views).tasks
    moves = {}
    for k, moved in enumerate(TASKS):
        after = tower([x + 0.5 * (i == k) for i, x in enumerate(views)]).tasks
        moves[moved] = [task for task in TASKS if not torch.equal(before[task], after[task])]
    assert moves == {"a": ["a", "b", "d"], "b": ["b"], "c": ["b", "c", "d"], "d": ["d"]}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("config", [{}, {"tower": (), "gate": (4,)}])
@pytest.mark.parametrize("main", [("b", "d"), ("a",), TASKS])
def test_value_and_gradient(main, config):
    tower, views = tower_of(main, **config), [torch.randn(13, 7, requires_grad=True) for _ in TASKS]
    scale, leaves = torch.randn(13, 1), [*views, *tower.parameters()]
    out = tower(views)
    got = torch.autograd.grad(sum((out.tasks[t].sin() * scale * (k + 1)).sum() for k, t in enumerate(TASKS)), leaves)

    found = {t: relu_layers(tower.experts[task_key(t)], x) for t, x in zip(TASKS, views, strict=True)}
    numbers = {t: torch.tensor(e.tolist()) for t, e in found.items()}  # what others may read of a task: no gradient
    auxiliary, states = [t for t in TASKS if t not in main], {}
    for k, task in enumerate(TASKS):
        z = found[task]
        if task in main and auxiliary:
            gate = gate_of(tower.gates[task_key(task)], views[k])
            torch.testing.assert_close(out.extras[f"stem_al.gate.{task}"], gate, **EXACT)
            pool = torch.stack([found[task], *(numbers[other] for other in auxiliary)], 1)
            z = torch.einsum("bn,bnd->bd", gate, pool)
        states[task] = relu_layers(tower.towers[task_key(task)], z)
    torch.testing.assert_close(out.tasks, states, **EXACT)
    torch.testing.assert_close(out.trunk, sum(found.values()) / 4, **EXACT)
    assert len(out.extras) == len(tower.gives) == (len(main) if auxiliary else 0)
    want = torch.autograd.grad(sum((states[t].sin() * scale * (k + 1)).sum() for k, t in enumerate(TASKS)), leaves)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("own", [True, False])
def test_without_listening_it_is_single_task(own):
    """A gate that is one-hot on the own expert, and no auxiliary task at all."""
    tower = tower_of(("b",) if own else TASKS)
    if own:
        force(tower.gates[task_key("b")], 0)
    else:
        assert not len(tower.gates)
    single = SingleTask(bottom=SMALL["expert"], tower=SMALL["tower"]).build(TASKS, TASKS, (7,) * 4)
    state = {n.replace("experts.", "bottoms."): v for n, v in tower.state_dict().items() if not n.startswith("gates.")}
    single.load_state_dict(state)
    views = [torch.randn(13, 7) for _ in TASKS]
    torch.testing.assert_close(tower(views).tasks, single(views).tasks, **EXACT)


@pytest.mark.parametrize(
    ("main", "gates"), [((), ("buy",)), (("click",), ("click",)), (("buy", "click"), ("click", "buy"))]
)
def test_main_tasks_are_those_of_role_target_unless_named(tmp_path, main, gates):
    tasks = (Task("click", role="auxiliary"), Task("buy"), Task("spend", kind="real", role="auxiliary"))
    schema = Encoded(encode(make_data(tasks=tasks, cache=str(tmp_path)), tables={"log": make_log(rows=300)})).schema
    run = make_run(model=ModelChoice(tower=STEMAL(main=main), tables=Views(kind="separate", width=4)))
    model = build(dataclasses.replace(run, data=make_data(tasks=tasks)), schema)
    assert model.gives == {f"stem_al.gate.{task}" for task in gates}
    assert model.tower.auxiliary == tuple(t.name for t in tasks if t.name not in gates)


@pytest.mark.parametrize(
    ("views", "widths"),
    [(("a", "b", "shared"), (4, 4, 4)), (("shared",), (4,)), (("b", "a"), (4, 4)), (("a", "b"), (4, 5))],
)
def test_refuses_other_views(views, widths):
    with pytest.raises(ValueError) as error:
        STEMAL().build(("a", "b"), views, widths)
    assert str(error.value) == (
        "Tower `stem_al` reads one view per task, ('a', 'b'), all of one width, and no shared one. "
        f"Found {dict(zip(views, widths, strict=True))}. Set model.tables.kind to `separate`, and "
        "model.tables.widths and model.experts to [], which go with other views."
    )


def test_refuses_other_names():
    with pytest.raises(ValueError) as error:
        STEMAL(main=("a", "x")).build(("a", "b"), ("a", "b"), (4, 4))
    assert str(error.value) == "Parameter `main` should name some of ('a', 'b'). Found ['x']."
    with pytest.raises(ValueError, match="`expert` should be positive"):
        STEMAL(expert=(0,))
    with pytest.raises(ValueError, match="`dropout` should be in"):
        STEMAL(dropout=1.0)
