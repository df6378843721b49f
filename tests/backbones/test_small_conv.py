"""The small network from scratch: value and gradient against plain convolutions, rows apart, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unbraid.backbones.small_conv import SmallConv

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def reference(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Two stages and a linear layer, each written out."""
    for place in (0, 4):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), weights[f"layers.{place}.weight"], weights[f"layers.{place}.bias"])
        batch, channels, height, width = x.shape
        groups = x.reshape(batch, 8, -1)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = groups.reshape(batch, channels, height, width) * weights[f"layers.{place + 1}.weight"][:, None, None]
        x = (x + weights[f"layers.{place + 1}.bias"][:, None, None]).clamp(min=0)
        height, width = height // 2, width // 2
        x = x[:, :, : 2 * height, : 2 * width].reshape(batch, channels, height, 2, width, 2).mean((3, 5))
    return (x.reshape(len(x), -1) @ weights["layers.9.weight"].T + weights["layers.9.bias"]).clamp(min=0)


@pytest.mark.parametrize(("colour", "size"), [(True, 8), (False, 11)])
def test_value_and_gradient_against_a_reference(colour: bool, size: int) -> None:
    torch.manual_seed(0)
    network = SmallConv(channels=(8, 16), width=6, size=size, colour=colour).build().double()
    for parameter in network.parameters():
        parameter.data.normal_(0.0, 0.3)
    weights = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    pictures = torch.randn(5, 3 if colour else 1, size, size, dtype=torch.float64)
    ours, theirs = network(pictures), reference(pictures, weights)
    torch.testing.assert_close(ours, theirs, **EXACT)
    into = torch.randn_like(ours)
    (ours * into).sum().backward()
    (theirs * into).sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, **EXACT, msg=name)


def test_rows_do_not_see_each_other() -> None:
    network = SmallConv().build()
    pictures = torch.randn(6, 3, 28, 28)
    alone = torch.cat([network(one[None]) for one in pictures])
    torch.testing.assert_close(network(pictures), alone, rtol=1e-5, atol=1e-6)
    assert network.width == 128 and network.transform.size == 28 and not network.transform.flip
    assert SmallConv(colour=False).build().transform.mode == "L"


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"`channels` should hold multiples of 8. Found \[12\]"):
        SmallConv(channels=(12,))
    with pytest.raises(ValueError, match="3 stages halve a side of 7 to nothing"):
        SmallConv(channels=(8, 8, 8), size=7)
    with pytest.raises(ValueError, match="`width` should be positive"):
        SmallConv(width=0)
