"""Batch normalisation over the rows of all processes is that of one process: values, gradients, running statistics."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parallel import table
from together_kit import together
from torch import Tensor, nn

from unbraid import parallel
from unbraid.normalise import over_processes

SHAPES = {"rows": (7, 3), "pictures": (7, 3, 2, 2), "fewer than processes": (2, 3), "one": (1, 3)}


def model(name: str, momentum: float | None) -> nn.Module:
    torch.manual_seed(3)
    norm: Any = nn.BatchNorm2d if name == "pictures" else nn.BatchNorm1d
    made = nn.Sequential(norm(3, momentum=momentum), nn.Tanh(), norm(3, momentum=momentum, affine=False)).double()
    nn.init.normal_(made[0].weight)
    nn.init.normal_(made[0].bias)
    return made


def numbers(name: str) -> Tensor:
    return 100 + torch.randn(SHAPES[name], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(made: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The gradients of a loss that looks at every row, after two passes that moved the running statistics."""
    x = x.requires_grad_()
    for _ in range(2):
        y = made(x)
    (y * weights).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        **{n: p.grad for n, p in made.named_parameters()},
        **dict(made.named_buffers()),
    }  # type: ignore[dict-item]


def weights_of(x: Tensor) -> Tensor:
    return torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_it_is_that_of_one_process(momentum: float | None, tmp_path: Path) -> None:
    names = ["rows", "pictures", "fewer than processes"]
    found = together(3, tmp_path, _shared, names, momentum)
    for name in names:
        x = numbers(name)
        whole = step(model(name, momentum), x, weights_of(x))
        count = len(x)
        for key, value in whole.items():
            parts = [each[name][key] for each in found]
            if key in ("x", "y"):
                real = [part for place, part in enumerate(parts) if count * place // 3 < count * (place + 1) // 3]
                torch.testing.assert_close(torch.cat(real), value, rtol=0, atol=1e-9)
            elif key in dict(model(name, momentum).named_buffers()):
                assert all(torch.equal(part, parts[0]) for part in parts)
                torch.testing.assert_close(parts[0], value, rtol=0, atol=1e-9)
            else:
                torch.testing.assert_close(sum(parts), value, rtol=0, atol=1e-9)


def test_one_row_is_normalised_by_the_running_statistics(tmp_path: Path) -> None:
    for found in together(2, tmp_path, _shared, ["one"], 0.1):
        assert torch.equal(found["one"]["0.running_mean"], torch.zeros(3, dtype=torch.float64))
        expected = model("one", 0.1).eval()(numbers("one"))
        torch.testing.assert_close(found["one"]["y"], expected.detach(), rtol=0, atol=1e-12)


def _shared(names: list[str], momentum: float | None) -> dict[str, Any]:
    found = {}
    for name in names:
        x, made = numbers(name), model(name, momentum)
        own = parallel.share(len(x))
        spare = own.start == own.stop
        batch = parallel.join(parallel.mine(lambda rows, _: table(rows), torch.arange(len(x)).numpy()))
        parallel.note(batch)
        assert parallel.counts() == (0 if spare else 1)
        own = slice(0, 1) if spare else own
        weights = weights_of(x)[own] * (0 if spare else 1)  # what a spare row says is dropped
        with over_processes(made):
            found[name] = step(made, x[own].clone(), weights)
            assert "forward" in vars(made[0])
        assert "forward" not in vars(made[0])
        copy.deepcopy(made)
        parallel.note(replace(table(torch.arange(3).numpy())))
    return found
