"""GwPFM: against a loop over pairs of fields, FM and FFM as its limits, where each part goes, errors."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from pairs_kit import EVEN, EXACT, brought, same, view_of
from toylog import make_run

from unbraid import config
from unbraid.interactions.fm import FM
from unbraid.interactions.gwpfm import GwPFM

pytestmark = pytest.mark.usefixtures("float64")

WIDTHS = {"user": 6, "price": 2, "item": 6, "shop": 6, "hour": 6}
GROUPS = {"who": ("user", "price"), "what": ("shop", "item")}  # and `hour`, alone in the rest


def by_pairs(module, view):
    """The sum's terms, one pair of fields at a time: (group, group) -> (B, k)."""
    names, e = list(view), dict(zip(view, brought(module, view), strict=True))
    group = {name: g for g, fields in module.groups.items() for name in fields}
    order = list(module.groups)

    def part(name, g):
        at = order.index(g) * module.k
        return e[name][:, at : at + module.k]

    terms = {pair: 0.0 for pair in module.pairs}
    weights = dict(zip(module.pairs, module.weights, strict=True))
    for i, j in combinations(names, 2):
        key = tuple(sorted((group[i], group[j]), key=order.index))
        terms[key] = terms[key] + weights[key] * part(i, group[j]) * part(j, group[i])
    return terms


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("pooled", ["vector", "scalar", "pairs"])
@pytest.mark.parametrize("groups", [GROUPS, {}, {"x": ("hour", "user")}, {n: (n,) for n in ("item", "hour")}])
def test_value_and_gradient(groups, pooled, flat):
    module, view = GwPFM(groups=groups, pooled=pooled, flat=flat).build(WIDTHS), view_of(WIDTHS, grads=True)
    module.weights.data.normal_()

    def reference():
        terms = by_pairs(module, view)
        out = torch.cat(list(terms.values()), 1) if pooled == "pairs" else sum(terms.values())
        out = out.sum(1, keepdim=True) if pooled == "scalar" else out
        return torch.cat([out, *view.values()], 1) if flat else out

    same(module, view, reference)


def test_groups_pairs_and_shapes():
    module = GwPFM(groups=GROUPS, pooled="pairs", flat=False).build(WIDTHS)
    assert module.groups == {**GROUPS, "": ("hour",)} and module.k == 2
    assert list(module.groups) == ["what", "who", ""], "by name, and the rest at last"
    whole = [("what", "what"), ("what", "who"), ("what", ""), ("who", "who"), ("who", "")]
    assert module.pairs == whole, "a group of one field has no pair with itself"
    assert module.width == 10 and module.weights.tolist() == [1] * 5
    assert GwPFM(groups=GROUPS, flat=False).build(WIDTHS).width == 2
    everything = GwPFM(groups={"a": ("user", "item"), "b": ("price", "shop", "hour")}).build(WIDTHS)
    assert list(everything.groups) == ["a", "b"] and everything.k == 3


@pytest.mark.parametrize("pooled", ["vector", "pairs"])
def test_equal_groups_are_equal_models_in_any_order(pooled):
    one, other = GwPFM(groups=GROUPS, pooled=pooled), GwPFM(groups=dict(reversed(GROUPS.items())), pooled=pooled)
    assert one == other and list(one.groups) != list(other.groups)
    mine, theirs, view = one.build(WIDTHS), other.build(WIDTHS), view_of(WIDTHS)
    mine.weights.data.normal_()
    theirs.load_state_dict(mine.state_dict())
    assert torch.equal(mine(view), theirs(view))


def test_one_group_is_fm():
    view = view_of(EVEN)
    for pooled in ("vector", "scalar"):
        torch.testing.assert_close(GwPFM(pooled=pooled).build(EVEN)(view), FM(pooled=pooled).build(EVEN)(view), **EXACT)


def test_as_many_groups_as_fields_is_ffm():
    widths = dict.fromkeys("abcde", 10)
    view = view_of(widths)
    module = GwPFM(groups={n.upper(): (n,) for n in "cadbe"}, pooled="scalar", flat=False).build(widths)
    sub = {(i, j): view[i][:, 2 * g : 2 * g + 2] for i in widths for g, j in enumerate("abcde")}
    ffm = sum((sub[i, j] * sub[j, i]).sum(1, keepdim=True) for i, j in combinations(widths, 2))
    torch.testing.assert_close(module(view), ffm, **EXACT)
    assert module.weights.shape == (10,)


def test_a_part_hears_only_of_its_partner_group():
    module, view = GwPFM(groups=GROUPS, flat=False, pooled="pairs").build(WIDTHS), view_of(WIDTHS, grads=True)
    for pair, mine in ((("what", "who"), [0, 1]), (("who", "who"), [2, 3]), (("who", ""), [4, 5])):
        out = module(view).view(7, 5, 2)[:, module.pairs.index(pair)]
        (grad,) = torch.autograd.grad(out.sum(), view["user"])
        assert sorted(set(grad.nonzero()[:, 1].tolist())) == mine


def test_refuses():
    with pytest.raises(ValueError) as error:
        GwPFM(groups={"a": ("user", "colour"), "b": ("size",)}).build(WIDTHS)
    assert str(error.value) == "`groups` names colour, size. Fields of the view: user, price, item, shop, hour."
    with pytest.raises(ValueError, match="Found several times: user."):
        GwPFM(groups={"a": ("user", "shop"), "b": ("user",)})
    with pytest.raises(ValueError, match="should have a name and a field. Found \\['a'\\]"):
        GwPFM(groups={"a": ()})
    with pytest.raises(ValueError, match="should have a name and a field. Found \\[''\\]"):
        GwPFM(groups={"": ("user",)})
    with pytest.raises(ValueError) as error:
        GwPFM(groups=GROUPS, width=8).build(WIDTHS)
    assert "divisible by 3 (groups, one of them for the fields that no group names). Found 8." in str(error.value)
    with pytest.raises(ValueError, match="divisible by 2 \\(groups\\). Found 7."):
        GwPFM(groups={"a": ("user", "price"), "b": ("item", "shop", "hour")}, width=7).build(WIDTHS)


def test_groups_in_a_run_file():
    text = 'model.interaction={kind="gwpfm", groups={who=["shop"], what=["item", "seen.item"]}, pooled="pairs"}'
    run = config.override(make_run(), [text])
    assert run.model.interaction == GwPFM(groups={"who": ("shop",), "what": ("item", "seen.item")}, pooled="pairs")
    assert config.from_dict(config.to_dict(run)) == run
