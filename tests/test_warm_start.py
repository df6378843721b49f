"""What a warm start reads; what it copies is tested with runs that go on (`test_continue.py`)."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid.bundle import Bundle, build
from unbraid.job import train
from unbraid.warm_start import warm_start

ROWS, WIDTH = 400_000, 32
MB = ROWS * WIDTH * 4 / 1e6


def hashed() -> Bundle:
    """A bundle with one large table, most of whose rows no value has: `item` is hashed."""
    data = make_data()
    features = tuple(replace(f, min_count=0, buckets=ROWS) if f.name == "item" else f for f in data.features)
    fields = tuple(replace(f, min_count=0, buckets=ROWS) if f.name == "item" else f for f in data.fields)
    run = make_run(data=replace(data, features=features, fields=fields))
    model = replace(run.model, tables=replace(run.model.tables, width=WIDTH, lazy_rows=1000))
    run = replace(run, model=model, training=replace(run.training, steps=2))
    return train(run, tables={"log": make_log()}, report=False, baseline=False).bundle


def own_memory() -> float:
    """MB of this process that no file stands for."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of memory")
def test_a_bundle_to_start_from_is_not_read_whole(tmp_path: Path) -> None:
    made = hashed()
    made.save(tmp_path / "old")
    began = own_memory()
    mapped = Bundle.load(tmp_path / "old", mapped=True)
    taken = own_memory() - began
    whole = Bundle.load(tmp_path / "old")
    assert taken < MB / 4 and own_memory() - began - taken > MB / 2, "against a bundle that predicts"

    starts = []
    for old in (mapped, whole):
        model = build(made.run, made.fitted.schema)
        counts = warm_start(model, made.fitted, old)
        assert counts["rows new"] == 0 and counts["tensors new"] == 0
        starts.append(copy.deepcopy(model.state_dict()))
    saved = made.model.state_dict()
    for name, value in starts[0].items():
        assert torch.equal(value, starts[1][name]) and torch.equal(value, saved[name]), name
