"""Cross layers: by hand, against plain arithmetic, at their limits, and the degree of what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toylog import make_run

from unbraid import config
from unbraid.interactions.cross import Cross

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"rtol": 1e-10, "atol": 1e-10}
FIELDS = {"user": 3, "price": 1, "item": 2}


def view_of(x):
    """Fields whose concatenation is x (B, 6)."""
    return dict(zip(FIELDS, x.split(list(FIELDS.values()), dim=1), strict=True))


def test_by_hand():
    module = Cross(layers=2).build({"a": 1, "b": 1})
    for layer in module.layers:
        layer.weight.data = torch.tensor([[1.0, 2], [0, 1]])
        layer.bias.data = torch.tensor([1.0, -1])
    view = {"a": torch.tensor([[2.0]]), "b": torch.tensor([[3.0]])}
    # W x + b = (9, 2), so x_1 = (2, 3) * (9, 2) + (2, 3); then W x_1 + b = (39, 8)
    assert module(view).tolist() == [[98, 33]]
    module.layers = module.layers[:1]
    assert module(view).tolist() == [[20, 9]]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_value_and_gradient(layers, rank):
    module, x = Cross(layers=layers, rank=rank).build(FIELDS), torch.randn(11, 6, requires_grad=True)
    assert module.width == 6 and len(module.layers) == layers
    leaves, scale = [x, *module.parameters()], torch.randn(11, 6)
    y = x
    for layer in module.layers:
        first, last = (layer[0], layer[1]) if rank else (None, layer)
        inner = y if first is None else torch.einsum("bi,ri->br", y, first.weight)
        y = x * (torch.einsum("br,or->bo", inner, last.weight) + last.bias) + y
    got = module(view_of(x))
    torch.testing.assert_close(got, y, **EXACT)
    mine = torch.autograd.grad((got.sin() * scale).sum(), leaves)
    theirs = torch.autograd.grad((y.sin() * scale).sum(), leaves)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
        assert b.any()


@pytest.mark.parametrize("rank", [0, 2])
def test_zero_weights_are_the_identity(rank):
    module, x = Cross(layers=3, rank=rank).build(FIELDS), torch.randn(5, 6)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(module(view_of(x)), x)


def test_of_full_rank_the_product_is_the_matrix():
    full, low, x = Cross().build(FIELDS), Cross(rank=6).build(FIELDS), torch.randn(5, 6)
    for layer, (v, u) in zip(full.layers, low.layers, strict=True):
        layer.weight.data, layer.bias.data = u.weight.data @ v.weight.data, u.bias.data
    torch.testing.assert_close(low(view_of(x)), full(view_of(x)), **EXACT)


@pytest.mark.parametrize(("rank", "count"), [(0, 2 * (36 + 6)), (2, 2 * (2 * 6 + 6 * 2 + 6))])
def test_number_of_parameters(rank, count):
    module = Cross(rank=rank).build(FIELDS)
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_each_layer_adds_one_degree(layers):
    """Along a ray the result is a polynomial: differences vanish beyond its degree, layers + 1, and not before."""
    module, x = Cross(layers=layers).build(FIELDS), torch.randn(4, 6)
    values = torch.stack([module(view_of(t * x)) for t in range(layers + 3)])
    differences = values.diff(n=layers + 1, dim=0)
    assert differences.abs().max() > 1e-2
    torch.testing.assert_close(differences.diff(dim=0), torch.zeros(1, 4, 6), rtol=0, atol=1e-9)


def test_reads_its_fields_by_name_and_in_its_own_order():
    module, x = Cross().build(FIELDS), torch.randn(5, 6)
    view = view_of(x)
    turned = {"other": torch.zeros(5, 9), **dict(reversed(list(view.items())))}
    assert torch.equal(module(turned), module(view))
    with pytest.raises(KeyError, match="item"):
        module({"user": view["user"], "price": view["price"]})


def test_refuses():
    with pytest.raises(ValueError) as error:
        Cross().build({})
    assert str(error.value) == "Interaction `cross` needs at least one field. Found none."
    with pytest.raises(ValueError) as error:
        Cross(layers=0)
    assert str(error.value) == "Parameter `layers` should be positive. Found 0."
    with pytest.raises(ValueError) as error:
        Cross(rank=-1)
    assert str(error.value) == "Parameter `rank` should not be negative. Found -1."


def test_in_a_run_file_the_slot_needs_a_kind():
    run = config.override(make_run(), ["model.interaction.kind=cross", "model.interaction.rank=4"])
    assert run.model.interaction == Cross(rank=4)
    with pytest.raises(
        config.RunError, match="unknown key `model.interaction.ranks`. Did you mean `rank`. Allowed: kind, layers, rank"
    ):
        config.override(run, ["model.interaction.ranks=4"])
    with pytest.raises(config.RunError, match="`model.interaction` has no `kind`. Allowed: flat, cross"):
        config.from_dict({**config.to_dict(run), "model": {"interaction": {"rank": 3}}})


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(ValueError, match="`rank` should be at most the width of a view, 5 here. Found 6."):
        Cross(rank=6).build({"a": 2, "b": 3})
