"""What tests of towers share: networks that are alive everywhere, one-hot gates, whose parameters are whose."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import nn

from unbraid.encoders.table import Views
from unbraid.layers import task_key

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SMALL = {"expert": (16, 12), "tower": (8,)}
PER_TASK = Views(kind="per_task", width=3, std=1.0, lazy_rows=-1)
SHARED = Views(kind="shared", width=3, std=1.0, lazy_rows=-1)
NAMES = ("a", "b", "c")
tasks_by_layers = pytest.mark.parametrize(("tasks", "layers"), [(NAMES[:n], d) for n in (2, 3) for d in (1, 2, 3)])


def biased(model):
    """Positive biases everywhere: a forgotten one shows, and no layer is dead for every row."""
    for part in model.modules():
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.uniform_(part.bias, 0.05, 0.4)
    return model


def force(gate, column):
    """Make a gate one-hot: all its weight on one member of the pool."""
    with torch.no_grad():
        gate[-1].weight.zero_()
        gate[-1].bias.fill_(-1e4)[column] = 0.0


def gradients(model, loss):
    """parameter -> gradient of a loss, None where it does not reach."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {p: p.grad for p in model.parameters()}


def parts(model, task):
    """Everything that belongs to one task of a net with layers of experts: name -> parameters, empty groups left out."""
    tower, key = model.tower, task_key(task)
    groups = {"tower": tower.towers[key].parameters(), "head": model.heads[f"task/{task}"].parameters()}
    if f"view/{task}" in model.views:
        groups["tables"] = [model.table(task, field) for field in ("user", "item")]
        groups["interaction"] = model.views[f"view/{task}"].parameters()
    for i, layer in enumerate(tower.layers):
        if key in layer.task_experts:
            groups[f"experts {i}"] = layer.task_experts[key].parameters()
        if key in layer.gates:
            groups[f"gate {i}"] = layer.gates[key].parameters()
    return {name: list(group) for name, group in groups.items()}


def owned(model, task):
    """The same as one list."""
    return list(chain(*parts(model, task).values()))


def common(model):
    """Every parameter that belongs to no task."""
    private = {p for task in model.tasks for p in owned(model, task)}
    return [p for p in model.parameters() if p not in private]


def relu_layers(network, x):
    """Linear and ReLU for every Linear of a network, in plain arithmetic on its own weights."""
    for linear in [m for m in network.modules() if isinstance(m, nn.Linear)]:
        x = torch.einsum("bi,oi->bo", x, linear.weight) + linear.bias
        x = x * (x > 0)
    return x


def gate_of(network, x):
    """The softmax of a gate: ReLU layers below, a Linear on top."""
    *lower, last = [m for m in network.modules() if isinstance(m, nn.Linear)]
    odds = torch.exp(relu_layers(nn.Sequential(*lower), x) @ last.weight.T + last.bias)
    return odds / odds.sum(1, keepdim=True)
