"""MMoE."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unbraid.encoders.table import Views
from unbraid.layers import task_key
from unbraid.towers.experts import MMoE, mix
from unbraid.towers.mlp import SharedBottom

EXACT = {"rtol": 1e-10, "atol": 1e-10}
TASKS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def float64():
    """Everything here is exact, so it is checked in double precision, from a fixed seed."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def build(**config):
    """A tower on one view of width 7, with the non-zero biases that torch draws by itself."""
    return MMoE(**{"experts": 3, "expert": (8, 5), "tower": (4,), **config}).build(TASKS, ("shared",), (7,))


def force(gate, column):
    """Make a gate one-hot: all its weight on one member of the pool."""
    last = gate[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(-1e4)[column] = 0.0


class Reference:
    """MMoE in plain arithmetic on copies of a tower's weights."""

    def __init__(self, module):
        def copies(part):
            linears = [m for m in part.modules() if isinstance(m, nn.Linear)]
            return [
                [m.weight.detach().clone().requires_grad_(), m.bias.detach().clone().requires_grad_()] for m in linears
            ]

        self.experts = [copies(expert) for expert in module.experts]
        self.gates = [copies(module.gates[task_key(task)]) for task in TASKS]
        self.towers = [copies(module.towers[task_key(task)]) for task in TASKS]

    @staticmethod
    def relu_layers(x, layers):
        for weight, bias in layers:
            x = x @ weight.T + bias
            x = x * (x > 0)
        return x

    def __call__(self, x):
        experts = torch.stack([self.relu_layers(x, e) for e in self.experts])  # (n, B, D)
        gates, states = [], []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            *lower, (weight, bias) = gate
            odds = torch.exp(self.relu_layers(x, lower) @ weight.T + bias)
            gates.append(odds / odds.sum(1, keepdim=True))
            states.append(self.relu_layers(torch.einsum("bn,nbd->bd", gates[-1], experts), tower))
        return states, gates, experts.sum(0) / len(experts)

    def parameters(self):
        return [w for group in (self.experts, self.gates, self.towers) for part in group for pair in part for w in pair]


@pytest.mark.parametrize(
    "config", [{}, {"gate": (6,)}, {"experts": 1}, {"tower": ()}, {"expert": (4,), "tower": (3, 2)}]
)
def test_value_and_gradient(config):
    module, x = build(**config), torch.randn(13, 7, requires_grad=True)
    scale = torch.randn(13)
    out = module([x])
    (sum(((out.tasks[task].sin()).sum(1) * scale * (k + 1)).sum() for k, task in enumerate(TASKS))).backward()

    reference, x2 = Reference(module), x.detach().clone().requires_grad_()
    states, gates, trunk = reference(x2)
    sum(((z.sin()).sum(1) * scale * (k + 1)).sum() for k, z in enumerate(states)).backward()
    torch.testing.assert_close(list(out.tasks.values()), states, **EXACT)
    torch.testing.assert_close(out.trunk, trunk, **EXACT)
    assert list(out.extras) == [f"mmoe.gate.{task}" for task in TASKS]
    torch.testing.assert_close(list(out.extras.values()), gates, **EXACT)
    torch.testing.assert_close(x.grad, x2.grad, **EXACT)
    for got, want in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, **EXACT)


def test_widths():
    assert build().widths == dict.fromkeys(TASKS, 4)
    assert build(tower=()).widths == dict.fromkeys(TASKS, 5)


def test_gates_sum_to_one():
    gates = build(gate=(6,))([10 * torch.randn(13, 7)]).extras
    for gate in gates.values():
        assert gate.shape == (13, 3) and (gate >= 0).all()
        torch.testing.assert_close(gate.sum(1), torch.ones(13), **EXACT)
    assert not torch.equal(gates["mmoe.gate.a"], gates["mmoe.gate.b"])


def test_tied_gates_are_one_gate_for_all():
    module, x = build(tower=()), torch.randn(13, 7)
    assert not torch.equal(module([x]).tasks["a"], module([x]).tasks["b"])
    for task in TASKS[1:]:
        module.gates[task_key(task)].load_state_dict(module.gates[task_key("a")].state_dict())
    out = module([x])
    assert torch.equal(out.tasks["a"], out.tasks["b"]) and torch.equal(out.tasks["a"], out.tasks["c"])


@pytest.mark.parametrize("column", [0, 1, 2])
def test_one_hot_gate_is_shared_bottom(column):
    module, x = build(), torch.randn(13, 7)
    for gate in module.gates.values():
        force(gate, column)
    bottom = SharedBottom(bottom=(8, 5), tower=(4,)).build(TASKS, ("shared",), (7,))
    bottom.bottom.load_state_dict(module.experts[column].state_dict())
    bottom.towers.load_state_dict(module.towers.state_dict())
    got, want = module([x]), bottom([x])
    for task in TASKS:
        assert torch.equal(got.tasks[task], want.tasks[task])
        assert got.extras[f"mmoe.gate.{task}"][:, column].eq(1).all()


def test_mix():
    gate, pool = torch.tensor([[0.25, 0.75], [1.0, 0.0]]), [torch.tensor([[4.0], [2.0]]), torch.tensor([[8.0], [6.0]])]
    assert mix(gate, pool).tolist() == [[7.0], [2.0]]


def test_absent_task_gets_no_gradient(net, sizes, ids):
    model = net(MMoE(experts=3, expert=(8, 5), tower=(4,)), Views(width=3, lazy_rows=-1), TASKS, sizes)
    model.losses(ids)["b"].backward()
    for name, parameter in model.named_parameters():
        foreign = any(f"task/{task}" in name for task in ("a", "c"))
        assert (parameter.grad is None) == foreign, name


@pytest.mark.parametrize("views", [("a", "b", "c", "shared"), ()])
def test_reads_no_views_of_tasks(views):
    with pytest.raises(ValueError) as error:
        MMoE().build(TASKS, views, (4,) * len(views))
    assert str(error.value) == (
        f"Tower `mmoe` reads one view, or several that belong to no task. Found views {views}. "
        "Set model.tables.kind to `shared` or `several`."
    )


def test_several_views_are_read_side_by_side():
    torch.manual_seed(0)
    one = MMoE(experts=2, expert=(6,), tower=(3,)).build(TASKS, ("shared",), (8,))
    two = MMoE(experts=2, expert=(6,), tower=(3,)).build(TASKS, ("view0", "view1"), (3, 5))
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 8)
    for task, hidden in one([x]).tasks.items():
        assert torch.equal(two([x[:, :3], x[:, 3:]]).tasks[task], hidden)


@pytest.mark.parametrize(("name", "value"), [("experts", 0), ("expert", (4, 0)), ("gate", (0,)), ("tower", (-2,))])
def test_refuses(name, value):
    with pytest.raises(ValueError) as error:
        MMoE(**{name: value})
    assert str(error.value) == f"Parameter `{name}` should be positive. Found {value}."


def test_misspelt_key_is_refused():
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(MMoE)
    assert adapter.validate_python({"experts": 4}) == MMoE(experts=4)
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python({"expertz": 4})
