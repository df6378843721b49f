"""Layers of experts of tasks' own and shared ones, PLE's and STEM's: a task's loss writes its own parts and the shared."""

from __future__ import annotations

import pytest
import torch
from tower_kit import EXACT, NAMES, PER_TASK, SHARED, SMALL, biased, common, gradients, owned, parts, tasks_by_layers

from unbraid.encoders.table import Views
from unbraid.towers.ple import PLE
from unbraid.towers.stem import STEM

pytestmark = pytest.mark.usefixtures("float64")

members = pytest.mark.parametrize("member", [PLE, STEM])
on_views = pytest.mark.parametrize(
    ("member", "views"), [(PLE, PER_TASK), (PLE, SHARED), (STEM, PER_TASK)], ids=["PLE", "PLE-shared", "STEM"]
)


@tasks_by_layers
@on_views
@pytest.mark.parametrize("config", [{}, {"task_experts": 2, "gate": (4,)}])
def test_a_loss_writes_its_own_and_the_shared_parts_only(net, sizes, ids, tasks, layers, member, views, config):
    model = biased(net(member(layers=layers, **SMALL, **config), views, tasks, sizes))
    for task in tasks:
        grads = gradients(model, model.losses(ids)[task])
        for other in set(tasks) - {task}:
            assert all(grads[p] is None for p in owned(model, other)), f"{task} wrote {other}"
        for name, group in parts(model, task).items():
            assert all(grads[p] is not None and grads[p].any() for p in group), f"{task} does not reach its {name}"
        assert all(grads[p] is not None and grads[p].any() for p in common(model))
        assert all(grads[model.table("shared", field)].any() for field in sizes)


@tasks_by_layers
@members
def test_summed_loss_gives_a_task_the_gradient_of_its_own(net, sizes, ids, tasks, layers, member):
    model = biased(net(member(layers=layers, **SMALL), PER_TASK, tasks, sizes))
    together = gradients(model, sum(model.losses(ids).values()))
    for task in tasks:
        alone = gradients(model, model.losses(ids)[task])
        for parameter in owned(model, task):
            torch.testing.assert_close(together[parameter], alone[parameter], **EXACT)


@pytest.mark.parametrize("layers", [1, 2])
@members
def test_lazy_tables_of_other_tasks_get_no_gradient(net, sizes, ids, layers, member):
    views = Views(kind="per_task", width=3, std=1.0, lazy_rows=0)
    model = net(member(layers=layers, **SMALL), views, NAMES, sizes)
    model.losses(ids)["b"].backward()
    assert {lookup.table.split("/")[0] for lookup in model.lookups} == {*NAMES, "shared"}
    for lookup in model.lookups:
        assert (lookup.vectors.grad is not None) == (lookup.table.split("/")[0] in ("b", "shared")), lookup.table
