"""A small model around a tower: real tables, a flat interaction per view, one head per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toylog import make_data, make_log

from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.interactions.flat import Flat
from unbraid.layers import initialise
from unbraid.slots import TowerOutput
from unbraid.types import Lookup


class Net(nn.Module):
    """ids -> tables -> a Linear per view (so that a view's interaction has parameters) -> tower -> heads."""

    def __init__(
        self, tower: Any, views: Views, tasks: Sequence[str], sizes: Mapping[str, int], linear: bool = True
    ) -> None:
        super().__init__()
        self.tasks, self.names = tuple(tasks), views.names(tasks)
        self.tables = views.build(tasks, sizes)
        self.flats = nn.ModuleList(Flat().build(dict.fromkeys(sizes, self.tables.widths[name])) for name in self.names)
        widths = [int(flat.width) for flat in self.flats]
        self.views = nn.ModuleDict(
            {
                f"view/{name}": nn.Linear(w, w) if linear else nn.Identity()
                for name, w in zip(self.names, widths, strict=True)
            }
        )
        self.tower = tower.build(tasks, self.names, widths)
        self.heads = nn.ModuleDict({f"task/{task}": nn.Linear(self.tower.widths[task], 1) for task in tasks})
        self.lookups: tuple[Lookup, ...] = ()
        initialise(self)

    def hidden(self, ids: Mapping[str, Tensor]) -> list[Tensor]:
        """What the tower reads: (B, width) per view."""
        read, self.lookups = self.tables({field: [value] for field, value in ids.items()})
        fields = [{f: read[name, f, "value"][0].gather() for f in ids} for name in self.names]
        flat = [flat(view) for flat, view in zip(self.flats, fields, strict=True)]
        return [self.views[f"view/{name}"](x) for name, x in zip(self.names, flat, strict=True)]

    def out(self, ids: Mapping[str, Tensor]) -> TowerOutput:
        """What the tower gives."""
        result: TowerOutput = self.tower(self.hidden(ids))
        return result

    def forward(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """task -> (B,) logits."""
        states = self.out(ids).tasks
        return {task: self.heads[f"task/{task}"](states[task]).squeeze(1) for task in self.tasks}

    def losses(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """task -> a smooth scalar that every row moves."""
        return {task: torch.nn.functional.softplus(z * (k + 1)).mean() for k, (task, z) in enumerate(self(ids).items())}

    def table(self, view: str, field: str) -> nn.Parameter:
        """Weight of one table."""
        weight: nn.Parameter = self.tables.tables[self.tables.key(view, field, "value")].weight
        return weight


@pytest.fixture
def net() -> type[Net]:
    """The class, so that a test builds as many as it needs."""
    return Net


@pytest.fixture
def sizes() -> dict[str, int]:
    """Field -> rows of its tables."""
    return {"user": 9, "item": 7}


@pytest.fixture
def ids(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """64 rows that read every row of every table."""
    random = torch.Generator().manual_seed(5)
    return {
        name: torch.cat([torch.arange(n), torch.randint(n, (64 - n,), generator=random)]) for name, n in sizes.items()
    }


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    """The toy log."""
    data = make_data(cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data, tables={"log": make_log(rows=400)}))
