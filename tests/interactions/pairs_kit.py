"""Fields of one width and of others, and a parity check of value and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

EXACT = {"rtol": 1e-10, "atol": 1e-10}
EVEN = {"user": 4, "item": 4, "shop": 4, "hour": 4, "seen.item": 4}
MIXED = {"user": 4, "price": 2, "item": 4, "picture": 5, "shop": 4}


def view_of(widths: dict[str, int], rows: int = 7, grads: bool = False) -> dict[str, Tensor]:
    """Random fields (rows, D) in double precision."""
    return {name: torch.randn(rows, d, dtype=torch.float64, requires_grad=grads) for name, d in widths.items()}


def brought(module: Any, view: dict[str, Tensor]) -> list[Tensor]:
    """The fields at one width, by plain products with the module's maps."""
    maps = iter(module.maps)
    return [x if x.shape[1] == module.common else x @ next(maps).weight.T for x in view.values()]


def same(module: nn.Module, view: dict[str, Tensor], reference: Callable[[], Tensor]) -> None:
    """Value, and gradient of everything, of a nonlinear function of the result."""
    leaves = [*view.values(), *module.parameters()]
    got, want = module(view), reference()
    assert got.shape == (len(got), module.width)
    torch.testing.assert_close(got, want, **EXACT)
    scale = torch.randn_like(want)
    mine = torch.autograd.grad((got.sin() * scale).sum(), leaves)
    theirs = torch.autograd.grad((want.sin() * scale).sum(), leaves)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
        assert b.any()
