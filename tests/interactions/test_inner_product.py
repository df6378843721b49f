"""Inner products of all pairs: by hand, against a loop, their order."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from pairs_kit import EVEN, EXACT, MIXED, brought, same, view_of

from unbraid.interactions.fm import FM
from unbraid.interactions.inner_product import InnerProduct

pytestmark = pytest.mark.usefixtures("float64")


def test_by_hand():
    view = {"a": torch.tensor([[1.0, 2]]), "b": torch.tensor([[3.0, 4]]), "c": torch.tensor([[5.0, 6]])}
    module = InnerProduct().build(dict.fromkeys(view, 2))
    assert module(view).tolist() == [[11, 17, 39, 1, 2, 3, 4, 5, 6]] and list(module.parameters()) == []
    assert InnerProduct(flat=False).build(dict.fromkeys(view, 2)).width == 3


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("widths", [EVEN, MIXED])
def test_value_and_gradient(widths, flat):
    module, view = InnerProduct(flat=flat).build(widths), view_of(widths, grads=True)

    def reference():
        e = brought(module, view)
        products = [(e[i] * e[j]).sum(1, keepdim=True) for i, j in combinations(range(5), 2)]
        return torch.cat([*products, *(view.values() if flat else ())], 1)

    same(module, view, reference)


def test_their_sum_is_fm():
    view = view_of(EVEN)
    pairs = InnerProduct(flat=False).build(EVEN)(view)
    assert pairs.shape == (7, 10)
    torch.testing.assert_close(pairs.sum(1, keepdim=True), FM(pooled="scalar", flat=False).build(EVEN)(view), **EXACT)
