"""Concatenation."""

from __future__ import annotations

import pytest
import torch

from unbraid.interactions.flat import Flat


def test_concatenates_in_the_order_it_was_built_with():
    module = Flat().build({"user": 2, "price": 1, "item": 3})
    assert module.width == 6 and list(module.parameters()) == []
    user, price, item = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0], [6]]), torch.arange(6.0).view(2, 3)
    out = module({"item": item, "other": torch.zeros(2, 9), "price": price, "user": user})
    assert out.tolist() == [[1, 2, 5, 0, 1, 2], [3, 4, 6, 3, 4, 5]]


def test_gradient_reaches_each_field():
    module = Flat().build({"a": 2, "b": 1})
    view = {"b": torch.randn(3, 1, requires_grad=True), "a": torch.randn(3, 2, requires_grad=True)}
    (module(view) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert view["a"].grad.tolist() == [[1, 2]] * 3 and view["b"].grad.tolist() == [[3]] * 3


def test_missing_field_and_no_field():
    with pytest.raises(KeyError, match="b"):
        Flat().build({"a": 1, "b": 1})({"a": torch.zeros(2, 1)})
    with pytest.raises(ValueError) as error:
        Flat().build({})
    assert str(error.value) == "Interaction `flat` needs at least one field. Found none."


def test_misspelt_key_is_refused():
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(Flat)
    assert adapter.validate_python({"kind": "flat"}) == Flat()
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python({"knd": "flat"})
