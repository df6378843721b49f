"""Small logs that every test file can train on, and nobody's cache but the test's own."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import polars as pl
import pytest
import torch
from browserkit import chromium
from toylog import make_log

from unbraid.data.declaration import Data
from unbraid.data.encode import encode
from unbraid.data.table import Encoded

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_disks() -> Iterator[None]:
    """Syncing is about machines that stop, which no test does; that it is asked for in order, test_store sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def float64() -> Iterator[None]:
    """Exact things are checked in double precision, from a fixed seed."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def log() -> pl.DataFrame:
    return make_log()


@pytest.fixture
def encoded_of(log: pl.DataFrame) -> Callable[[Data], Encoded]:
    """Encode a declaration of the toy log."""
    return lambda data: Encoded(encode(data, tables={"log": log}))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium, or a skip."""
    with chromium() as started:
        yield started


def pytest_collection_finish() -> None:
    """What is loaded now stays: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
