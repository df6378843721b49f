"""The benchmark of transfer learning's parts: both sides compute the same, and it prints what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_benchmarks import load

from unbraid.bundle import build
from unbraid.data.encode import encode
from unbraid.data.features import attach
from unbraid.data.table import Encoded

pytest.importorskip("PIL", reason="Pillow is not installed")


def test_epochs_with_and_without_the_cache_have_the_same_losses(tmp_path: Path) -> None:
    bench = load("transfer_speed")
    run = bench.pictures(tmp_path, 14)
    data = Encoded(encode(run.data))
    model = build(run, data.schema)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    attach(data, model)
    remembered = bench.epoch(model, data)
    model.load_state_dict(start)
    attach(data, model, augment=type("Views", (), {"reads_pictures": True}))
    assert data.batch(data.split("train")).features["picture"].dim() == 4
    assert bench.epoch(model, data) == remembered and len(remembered) == 1
    assert not torch.equal(
        model.state_dict()["heads.task/label.linears.0.weight"], start["heads.task/label.linears.0.weight"]
    )


@pytest.mark.slow
def test_the_second_epoch_on_pictures_is_fifty_times_faster() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "transfer_speed.py"
    command = [sys.executable, str(script), "--quick", "--only", "feature_cache"]
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(shown.splitlines()[-1])
    assert found["benchmark"] == "transfer_speed" and found["ratios"]["feature_cache"] >= 50
