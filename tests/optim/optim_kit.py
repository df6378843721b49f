"""A small model with a table per task and a shared one, and what tests of updates do with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unbraid.encoders.table import Table, Tables, Views
from unbraid.slots import Update
from unbraid.types import Output

V, TASKS = 31, ("click", "like")
EXACT = {"rtol": 0.0, "atol": 1e-12}


class Small(nn.Module):
    """Per task: its own and the shared table of one vocabulary, a layer and a head."""

    def __init__(self, lazy: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        views = Views(kind="per_task", width=4, std=1.0, lazy_rows=0 if lazy else -1)
        self.views: Tables = views.build(TASKS, {"item": V})
        self.layers = nn.ModuleDict({task: nn.Linear(8, 3) for task in TASKS})
        self.heads = nn.ModuleDict({task: nn.Linear(3, 1) for task in TASKS})
        self.double()

    @property
    def tables(self) -> dict[str, Table]:
        return dict(self.views.tables.items())  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Output:
        read, lookups = self.views({"item": [ids]})
        vectors = {view: read[view, "item", "value"][0].gather() for view in (*TASKS, "shared")}
        hidden = {t: torch.tanh(self.layers[t](torch.cat([vectors[t], vectors["shared"]], 1))) for t in TASKS}
        logits = {task: self.heads[task](hidden[task]).squeeze(1) for task in TASKS}
        return Output(logits, hidden, vectors["shared"], {}, lookups)


def batches(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (7,), generator=generator) for _ in range(count)]


def losses_of(output: Output, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
    return {task: (output.logits[task] - 1).square().mean() for task in tasks}


def train(model: Small, update: Update, ids: list[Tensor], tasks: tuple[str, ...] = TASKS) -> None:
    for batch in ids:
        output = model(batch)
        update(losses_of(output, tasks), output)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_equal(found: Any, expected: Any, path: str = "") -> None:
    """Nested states, bit for bit."""
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_equal(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path
