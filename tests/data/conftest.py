"""Helpers of the tests of the data layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from unbraid.data.declaration import Data
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.types import Batch, Ragged


@pytest.fixture
def opened(tmp_path: Any) -> Callable[..., Encoded]:
    """Encode tables in memory into the test's own cache, and open the result."""

    def run(data: Data, options: dict[str, Any] | None = None, /, **tables: pl.DataFrame) -> Encoded:
        return Encoded(encode(data, tmp_path, tables=tables, **(options or {})))

    return run


@pytest.fixture
def arrays() -> Callable[[Batch], dict[str, np.ndarray]]:
    """Everything in a batch as flat arrays, so that two batches can be compared bit by bit."""

    def run(batch: Batch) -> dict[str, np.ndarray]:
        out = {name: getattr(batch, name).numpy() for name in ("domain", "row", "view", "pair")}
        out |= {"weight": np.zeros(0) if batch.weight is None else batch.weight.numpy()}
        for part in ("features", "labels", "observed", "meta"):
            for name, value in getattr(batch, part).items():
                if isinstance(value, Ragged):
                    out[f"{part}.{name}.offsets"] = value.offsets.numpy()
                    out |= {f"{part}.{name}.{k}": v.numpy() for k, v in value.values.items()}
                else:
                    out[f"{part}.{name}"] = value.numpy()
        return out

    return run
