"""MMoE, and OMoE: the same with one gate for all tasks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from tower_kit import EXACT, force

from unbraid.encoders.table import Views
from unbraid.layers import task_key
from unbraid.towers.experts import MMoE, OMoE, mix
from unbraid.towers.mlp import SharedBottom

pytestmark = pytest.mark.usefixtures("float64")

TASKS = ("a", "b", "c")


both = pytest.mark.parametrize("kind", [MMoE, OMoE])


def build(kind=MMoE, **config):
    """A tower on one view of width 7, with the non-zero biases that torch draws by itself."""
    return kind(**{"experts": 3, "expert": (8, 5), "tower": (4,), **config}).build(TASKS, ("shared",), (7,))


class Reference:
    """Either in plain arithmetic on copies of a tower's weights."""

    def __init__(self, module):
        def copies(part):
            linears = [m for m in part.modules() if isinstance(m, nn.Linear)]
            return [
                [m.weight.detach().clone().requires_grad_(), m.bias.detach().clone().requires_grad_()] for m in linears
            ]

        self.experts = [copies(expert) for expert in module.experts]
        self.gates = [copies(gate) for gate in module.gates.values()]
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
        for k, tower in enumerate(self.towers):
            *lower, (weight, bias) = self.gates[k if len(self.gates) == len(TASKS) else 0]
            odds = torch.exp(self.relu_layers(x, lower) @ weight.T + bias)
            gates.append(odds / odds.sum(1, keepdim=True))
            states.append(self.relu_layers(torch.einsum("bn,nbd->bd", gates[-1], experts), tower))
        return states, gates, experts.sum(0) / len(experts)

    def parameters(self):
        return [w for group in (self.experts, self.gates, self.towers) for part in group for pair in part for w in pair]


@both
@pytest.mark.parametrize(
    "config", [{}, {"gate": (6,)}, {"experts": 1}, {"tower": ()}, {"expert": (4,), "tower": (3, 2)}]
)
def test_value_and_gradient(kind, config):
    module, x = build(kind, **config), torch.randn(13, 7, requires_grad=True)
    scale = torch.randn(13)
    out = module([x])
    (sum(((out.tasks[task].sin()).sum(1) * scale * (k + 1)).sum() for k, task in enumerate(TASKS))).backward()

    reference, x2 = Reference(module), x.detach().clone().requires_grad_()
    states, gates, trunk = reference(x2)
    sum(((z.sin()).sum(1) * scale * (k + 1)).sum() for k, z in enumerate(states)).backward()
    torch.testing.assert_close(list(out.tasks.values()), states, **EXACT)
    torch.testing.assert_close(out.trunk, trunk, **EXACT)
    names = [f"mmoe.gate.{task}" for task in TASKS] if kind is MMoE else ["omoe.gate"]
    assert list(out.extras) == list(module.gives) == names
    torch.testing.assert_close(list(out.extras.values()), gates[: len(names)], **EXACT)
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


def test_all_towers_of_omoe_read_one_mixture():
    module, x = build(OMoE, tower=()), torch.randn(13, 7)
    out = module([x])
    assert out.tasks["a"] is out.tasks["b"] and out.tasks["a"] is out.tasks["c"]
    towers = build(OMoE)
    assert len(towers.gates) == 1 and len(towers.towers) == 3
    states = towers([x]).tasks
    assert not torch.equal(states["a"], states["b"]) and not torch.equal(states["b"], states["c"])


@pytest.mark.parametrize("config", [{}, {"gate": (6,)}])
def test_mmoe_with_tied_gates_is_omoe(config):
    tied, one, x = build(**config), build(OMoE, **config), torch.randn(13, 7)
    one.experts.load_state_dict(tied.experts.state_dict())
    one.towers.load_state_dict(tied.towers.state_dict())
    for gate in tied.gates.values():
        gate.load_state_dict(one.gates["shared"].state_dict())
    got, want = one([x]), tied([x])
    for task in TASKS:
        assert torch.equal(got.tasks[task], want.tasks[task])
        assert torch.equal(got.extras["omoe.gate"], want.extras[f"mmoe.gate.{task}"])
    for out in (got, want):
        sum((z.sin() * (k + 1)).sum() for k, z in enumerate(out.tasks.values())).backward()
    for mine, *theirs in zip(
        one.gates["shared"].parameters(), *(g.parameters() for g in tied.gates.values()), strict=True
    ):
        torch.testing.assert_close(mine.grad, sum(p.grad for p in theirs), **EXACT)
    for mine, theirs in zip(one.experts.parameters(), tied.experts.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **EXACT)


@both
@pytest.mark.parametrize("column", [0, 1, 2])
def test_one_hot_gate_is_shared_bottom(kind, column):
    module, x = build(kind), torch.randn(13, 7)
    for gate in module.gates.values():
        force(gate, column)
    bottom = SharedBottom(bottom=(8, 5), tower=(4,)).build(TASKS, ("shared",), (7,))
    bottom.bottom.load_state_dict(module.experts[column].state_dict())
    bottom.towers.load_state_dict(module.towers.state_dict())
    got, want = module([x]), bottom([x])
    for task in TASKS:
        assert torch.equal(got.tasks[task], want.tasks[task])
    assert all(gate[:, column].eq(1).all() for gate in got.extras.values())


def test_mix():
    gate, pool = torch.tensor([[0.25, 0.75], [1.0, 0.0]]), [torch.tensor([[4.0], [2.0]]), torch.tensor([[8.0], [6.0]])]
    assert mix(gate, pool).tolist() == [[7.0], [2.0]]


@both
def test_absent_task_gets_no_gradient(kind, net, sizes, ids):
    model = net(kind(experts=3, expert=(8, 5), tower=(4,)), Views(width=3, lazy_rows=-1), TASKS, sizes)
    model.losses(ids)["b"].backward()
    for name, parameter in model.named_parameters():
        foreign = any(f"task/{task}" in name for task in ("a", "c"))
        assert (parameter.grad is None) == foreign, name


@both
@pytest.mark.parametrize("views", [("a", "b", "c", "shared"), ("a", "b", "c"), ()])
def test_reads_no_views_of_tasks(kind, views):
    with pytest.raises(ValueError) as error:
        kind().build(TASKS, views, (4,) * len(views))
    assert str(error.value) == (
        f"Tower `{kind().kind}` reads one view, or several that belong to no task. Found views {views}. "
        "Set model.tables.kind to `shared` or `several`."
    )


@both
def test_several_views_are_read_side_by_side(kind):
    torch.manual_seed(0)
    one = kind(experts=2, expert=(6,), tower=(3,)).build(TASKS, ("shared",), (8,))
    two = kind(experts=2, expert=(6,), tower=(3,)).build(TASKS, ("view0", "view1"), (3, 5))
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 8)
    for task, hidden in one([x]).tasks.items():
        assert torch.equal(two([x[:, :3], x[:, 3:]]).tasks[task], hidden)


@both
@pytest.mark.parametrize(("name", "value"), [("experts", 0), ("expert", (4, 0)), ("gate", (0,)), ("tower", (-2,))])
def test_refuses(kind, name, value):
    with pytest.raises(ValueError) as error:
        kind(**{name: value})
    assert str(error.value) == f"Parameter `{name}` should be positive. Found {value}."


@both
def test_refuses_dropout_of_one(kind):
    with pytest.raises(ValueError) as error:
        kind(dropout=1.0)
    assert str(error.value) == "Parameter `dropout` should be in [0, 1). Found 1.0."


@both
def test_misspelt_key_is_refused(kind):
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(kind)
    assert adapter.validate_python({"experts": 4}) == kind(experts=4)
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python({"expertz": 4})
