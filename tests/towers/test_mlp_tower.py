"""Shared-Bottom, and the dense building blocks that all towers share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unbraid.encoders.table import Views
from unbraid.layers import initialise, mlp, mlp_width, task_key
from unbraid.slots import TowerOutput
from unbraid.towers.aitm import AITM
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.single_task import SingleTask

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def reference(x, weights):
    """ReLU after every layer, written without torch's layers."""
    for weight, bias in weights:
        x = torch.einsum("bi,oi->bo", x, weight) + bias
        x = x * (x > 0)
    return x


def copies(module):
    """Detached weights and biases of the Linears of a module, in order."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return [(m.weight.detach().clone().requires_grad_(), m.bias.detach().clone().requires_grad_()) for m in linears]


@pytest.mark.parametrize("tower", [(), (4,), (4, 3)])
@pytest.mark.parametrize("bottom", [(8, 5), (6,)])
def test_value_and_gradient(bottom, tower):
    tasks = ("a", "b", "c")
    module = SharedBottom(bottom=bottom, tower=tower).build(tasks, ("shared",), (7,))  # torch's own, non-zero biases
    x = torch.randn(11, 7, requires_grad=True)
    out = module([x])
    scale = {task: torch.randn(11, module.widths[task]) for task in tasks}
    sum((out.tasks[task] * scale[task]).sum() for task in tasks).backward()

    x2, shared = x.detach().clone().requires_grad_(), copies(module.bottom)
    own = {task: copies(module.towers[task_key(task)]) for task in tasks}
    h = reference(x2, shared)
    expected = {task: reference(h, own[task]) for task in tasks}
    sum((expected[task] * scale[task]).sum() for task in tasks).backward()
    torch.testing.assert_close(out.trunk, h, **EXACT)
    torch.testing.assert_close(out.tasks, expected, **EXACT)
    torch.testing.assert_close(x.grad, x2.grad, **EXACT)
    flat = [w for pair in shared + [p for task in tasks for p in own[task]] for w in pair]
    for got, want in zip(module.parameters(), flat, strict=True):
        torch.testing.assert_close(got.grad, want.grad, **EXACT)
        assert want.grad.abs().sum() > 0


def test_without_tower_the_state_is_the_trunk():
    module = SharedBottom(bottom=(6,), tower=()).build(("a", "b"), ("shared",), (5,))
    out = module([torch.randn(3, 5)])
    assert isinstance(out, TowerOutput) and out.extras == {}
    assert out.tasks["a"] is out.trunk and out.tasks["b"] is out.trunk
    assert module.widths == {"a": 6, "b": 6}
    assert SharedBottom(bottom=(), tower=()).build(("a",), ("shared",), (5,)).widths == {"a": 5}


def test_absent_task_gets_no_gradient(net, sizes, ids):
    model = net(SharedBottom(bottom=(8,), tower=(4,)), Views(width=3, lazy_rows=-1), ("a", "b"), sizes)
    model.losses(ids)["b"].backward()
    absent = {*model.tower.towers[task_key("a")].parameters(), *model.heads["task/a"].parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (parameter in absent), name


@pytest.mark.parametrize("views", [("a", "b", "shared"), ("a", "b"), ()])
def test_reads_no_views_of_tasks(views):
    with pytest.raises(ValueError) as error:
        SharedBottom().build(("a", "b"), views, (4,) * len(views))
    assert str(error.value) == (
        f"Tower `shared_bottom` reads one view, or several that belong to no task. Found views {views}. "
        "Set model.tables.kind to `shared` or `several`."
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bottom", (8, 0), "Parameter `bottom` should be positive. Found (8, 0)."),
        ("tower", (-1,), "Parameter `tower` should be positive. Found (-1,)."),
        ("dropout", 1.0, "Parameter `dropout` should be in [0, 1). Found 1.0."),
        ("dropout", -0.1, "Parameter `dropout` should be in [0, 1). Found -0.1."),
    ],
)
@pytest.mark.parametrize("tower", [SharedBottom, AITM, SingleTask])
def test_refuses(tower, name, value, message):
    with pytest.raises(ValueError) as error:
        tower(**{name: value})
    assert str(error.value) == message


def test_misspelt_key_is_refused():
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(SharedBottom)
    assert adapter.validate_python({"bottom": [8, 4]}) == SharedBottom(bottom=(8, 4))
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python({"botom": [8, 4]})


def test_mlp_layers():
    def kinds(module):
        return [type(part).__name__ for part in module]

    x = torch.randn(4, 5)
    assert mlp(5, ())(x) is x and mlp_width(5, ()) == 5
    assert kinds(mlp(5, (3, 2))) == ["Linear", "ReLU", "Linear", "ReLU"]
    assert kinds(mlp(5, (3, 2), dropout=0.2)) == ["Linear", "ReLU", "Dropout"] * 2
    assert mlp(5, (3, 2))(x).shape == (4, mlp_width(5, (3, 2))) == (4, 2)


def test_dropout_only_while_training():
    module = SharedBottom(bottom=(64,), tower=(), dropout=0.5).build(("a",), ("shared",), (8,))
    x = torch.randn(32, 8)
    kept = module([x]).trunk
    plain = module.eval()([x]).trunk
    assert not torch.equal(kept, plain)
    positive = (kept > 0) & (plain > 0)
    torch.testing.assert_close(kept[positive], 2 * plain[positive], **EXACT)
    assert torch.equal(plain, module([x]).trunk)


def test_initialise_is_xavier_normal_with_zero_bias():
    module = nn.Sequential(nn.Linear(6, 5), nn.ModuleList([nn.Linear(5, 4, bias=False)]), nn.Embedding(3, 2))
    embedding = module[2].weight.detach().clone()
    torch.manual_seed(3)
    assert initialise(module) is module
    torch.manual_seed(3)
    for linear, std in ((module[0], (2 / 11) ** 0.5), (module[1][0], (2 / 9) ** 0.5)):
        torch.testing.assert_close(linear.weight.detach(), torch.empty_like(linear.weight).normal_(0, std), **EXACT)
    assert not module[0].bias.any()
    assert torch.equal(module[2].weight, embedding)


@pytest.mark.parametrize("task", ["keys", "type", "click.v2", "values", "training"])
def test_any_task_name(task):
    module = SharedBottom(bottom=(4,), tower=(3,)).build((task, "other"), ("shared",), (5,))
    assert set(module([torch.randn(2, 5)]).tasks) == {task, "other"}
