"""FM and FwFM: by hand, against loops over pairs, their limits, the toy of a partner of two values, the common width."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from pairs_kit import EVEN, EXACT, MIXED, brought, same, view_of
from torch import nn
from toylog import make_run

from unbraid import config
from unbraid.analysis.collapse import abundance, gram, spectrum
from unbraid.interactions.flat import Flat
from unbraid.interactions.fm import FM, FwFM
from unbraid.interactions.gwpfm import GwPFM
from unbraid.interactions.inner_product import InnerProduct
from unbraid.interactions.pairs import common_width

pytestmark = pytest.mark.usefixtures("float64")

ALL = [FM, FwFM, GwPFM, InnerProduct]


# ------------------------------------------------------------------------------------------------------------- the sums
def test_by_hand():
    view = {"a": torch.tensor([[1.0, 2]]), "b": torch.tensor([[3.0, 4]]), "c": torch.tensor([[5.0, 6]])}
    # a*b = (3, 8), a*c = (5, 12), b*c = (15, 24)
    plain = FM(flat=False).build(dict.fromkeys(view, 2))
    assert plain(view).tolist() == [[23, 44]] and list(plain.parameters()) == []
    assert FM(flat=False, pooled="scalar").build(dict.fromkeys(view, 2))(view).tolist() == [[67]]
    weighted = FwFM(flat=False).build(dict.fromkeys(view, 2))
    weighted.weights.data = torch.tensor([1.0, 10, 100])
    assert weighted(view).tolist() == [[3 + 50 + 1500, 8 + 120 + 2400]]
    assert FM().build(dict.fromkeys(view, 2))(view).tolist() == [[23, 44, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("pooled", ["vector", "scalar"])
@pytest.mark.parametrize("widths", [EVEN, MIXED])
@pytest.mark.parametrize("cls", [FM, FwFM])
def test_value_and_gradient(cls, widths, pooled, flat):
    module, view = cls(pooled=pooled, flat=flat).build(widths), view_of(widths, grads=True)
    weights = iter([1.0] * 10)
    if cls is FwFM:
        module.weights.data.normal_()
        weights = iter(module.weights)

    def reference():
        e = brought(module, view)
        total = sum(next(weights) * e[i] * e[j] for i, j in combinations(range(len(e)), 2))
        total = total.sum(1, keepdim=True) if pooled == "scalar" else total
        return torch.cat([total, *view.values()], 1) if flat else total

    same(module, view, reference)


def test_weights_of_one_make_fwfm_fm_and_each_weight_belongs_to_its_pair():
    view = view_of(EVEN)
    module = FwFM().build(EVEN)
    torch.testing.assert_close(module(view), FM().build(EVEN)(view), **EXACT)
    for n, (i, j) in enumerate(combinations(EVEN, 2)):
        module.weights.data = nn.functional.one_hot(torch.tensor(n), 10).double()
        torch.testing.assert_close(module(view)[:, :4], view[i] * view[j], **EXACT)


def test_a_fields_gradient_is_the_sum_of_its_partners():
    view = view_of(EVEN, grads=True)
    FM(pooled="scalar", flat=False).build(EVEN)(view).sum().backward()
    torch.testing.assert_close(view["item"].grad, sum(x for n, x in view.items() if n != "item").detach(), **EXACT)


# ------------------------------------------------------------------------------------------------------ what all share
def test_the_common_width():
    assert common_width({"a": 16, "b": 8, "c": 16}) == 16
    assert common_width({"a": 768, "b": 8}) == 8  # the smallest of equally frequent ones
    assert common_width({"a": 2, "b": 2, "c": 2, "id": 16, "vector": 5, "other": 16}) == 16
    assert common_width({"seen.count": 1, "b": 1, "c": 2, "id": 3}) == 3
    assert common_width({"a": 2, "b": 2}) == 2


@pytest.mark.parametrize("cls", ALL)
def test_fields_of_other_widths_pass_a_map_without_bias(cls):
    module = cls().build(MIXED)
    assert module.common == 4 and [m.weight.shape for m in module.maps] == [(4, 2), (4, 5)]
    assert all(m.bias is None for m in module.maps)
    wide = cls(width=6).build(MIXED)
    assert wide.common == 6 and [m.weight.shape for m in wide.maps] == [(6, d) for d in MIXED.values()]
    assert not len(cls().build(EVEN).maps)


@pytest.mark.parametrize("cls", ALL)
def test_single_precision_fields_enter_a_double_model(cls):
    widths = {"user": 4, "item": 4, "seen.count": 1}
    view = view_of(widths)
    module, view["seen.count"] = cls().build(widths), view["seen.count"].float()
    out = module(view)
    assert out.dtype == torch.float64 and torch.equal(out, module({name: x.double() for name, x in view.items()}))


@pytest.mark.parametrize("cls", ALL)
def test_reads_its_fields_by_name_and_puts_them_behind_as_they_are(cls):
    module, view = cls().build(MIXED), view_of(MIXED)
    turned = {"other": torch.zeros(7, 9), **dict(reversed(list(view.items())))}
    out = module(view)
    assert torch.equal(module(turned), out)
    assert torch.equal(out[:, -19:], Flat().build(MIXED)(view))
    alone = cls(flat=False).build(MIXED)
    alone.load_state_dict(module.state_dict())
    assert torch.equal(out[:, :-19], alone(view)) and alone.width == module.width - 19 > 0
    with pytest.raises(KeyError, match="price"):
        module({name: x for name, x in view.items() if name != "price"})


@pytest.mark.parametrize("cls", ALL)
def test_refuses(cls):
    for widths in ({}, {"a": 4}):
        with pytest.raises(ValueError) as error:
            cls().build(widths)
        assert str(error.value) == f"Interaction `{cls().kind}` needs at least two fields. Found {len(widths)}."
    with pytest.raises(ValueError, match="Parameter `width` should not be negative. Found -1."):
        cls(width=-1)


def test_in_a_run_file():
    run = config.override(make_run(), ["model.interaction.kind=fwfm", "model.interaction.pooled=scalar"])
    assert run.model.interaction == FwFM(pooled="scalar")
    with pytest.raises(config.RunError, match="Allowed: width, flat, kind, pooled"):
        config.override(run, ["model.interaction.depth=4"])
    with pytest.raises(config.RunError, match="pooled"):
        config.override(run, ["model.interaction.pooled=mean"])


# ---------------------------------------------------------------------------------------------------------- toy collapse
def test_a_partner_of_two_values_keeps_a_field_in_two_directions():
    """After one step from zero, every vector is a sum of its partners' vectors: rank 2, whatever the width."""
    big, two = torch.zeros(50, 8, requires_grad=True), torch.randn(2, 8)
    module = FM(pooled="scalar", flat=False).build({"big": 8, "two": 8})
    rows, partner, label = torch.arange(200) % 50, torch.randint(0, 2, (200,)), torch.randint(0, 2, (200,)).double()
    logit = module({"big": big[rows], "two": two[partner]}).squeeze(1)
    nn.functional.binary_cross_entropy_with_logits(logit, label, reduction="sum").backward()
    stepped = (big - 0.1 * big.grad).detach()
    assert (stepped.norm(dim=1) > 0).sum() > 40
    assert int(torch.linalg.matrix_rank(stepped)) == 2
    assert abundance(spectrum(gram(stepped), 50)) < 2 + 1e-6 < abundance(spectrum(gram(torch.randn(50, 8)), 50)) - 2
    inside = stepped @ torch.linalg.pinv(two) @ two
    torch.testing.assert_close(inside, stepped, **EXACT)
