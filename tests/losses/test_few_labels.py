"""A table with few labels from the command line: train, kill, resume, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from few_labels_kit import Dies, same
from typer.testing import CliRunner

from unbraid import config, store
from unbraid.augmentations.tabular import Change, Tabular
from unbraid.cli.main import app
from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Split
from unbraid.data.mix import Mix
from unbraid.job import train
from unbraid.losses.dst import DST, DSTHeads
from unbraid.losses.fixmatch import FixMatch
from unbraid.losses.flexmatch import FlexMatch
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Feature, Task

LOSSES = {
    "supervised": (), "fixmatch": (FixMatch(threshold=0.8),), "flexmatch": (FlexMatch(threshold=0.8),),
    "dst": (DST(rule="flexmatch", threshold=0.8, time=10),),
}  # fmt: skip


def write(folder: Path, name: str) -> Path:
    """A run file on three clouds in four dimensions, of which every twentieth training row has a label that is read."""
    if not (folder / "clouds.parquet").exists():
        rng = np.random.default_rng(0)
        cloud = rng.integers(0, 3, 600)
        x = np.eye(4)[cloud] * 2 + rng.normal(size=(600, 4)) * 0.7
        part = np.array(["train"] * 300 + ["valid"] * 100 + ["test"] * 200)
        columns = {"x": x.tolist(), "cloud": [f"c{c}" for c in cloud], "part": part, "n": np.arange(600)}
        pl.DataFrame(columns).write_parquet(folder / "clouds.parquet")
    data = Data(
        folder=str(folder), rows="clouds.parquet", withhold="n % 20 <> 0 AND part = 'train'",
        features=(Feature("x", kind="vector"),), tasks=(Task("cloud", kind="multiclass"),),
        split=Split(kind="column", column="part"),
    )  # fmt: skip
    heads: tuple[Any, ...] = (DSTHeads((8,)),) if name == "dst" else ()
    run = Run(
        data=data, name=name, model=ModelChoice(tower=SharedBottom(bottom=(16,), tower=(8,)), extra_heads=heads),
        losses=(Supervised(), *LOSSES[name]), update=Joint(lr=0.01),
        augment=Tabular(weak=Change(noise=0.05), strong=Change(noise=0.3, values=0.1)),
        training=Training(batch_size=8, steps=14, evaluate_every=7, checkpoint_steps=5, checkpoint_seconds=0,
                          metric="accuracy", mix=Mix(unlabelled=32)),
    )  # fmt: skip
    path = folder / f"{name}.toml"
    path.write_text(config.dumps(run))
    return path


def ok(*words: Any) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", ["flexmatch", "dst"])
def test_a_killed_run_is_resumed_from_the_command_line(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name)
    ok("train", path, "--out", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config.load(path), tmp_path / "killed", watcher=Dies())
    assert (tmp_path / "killed" / "fit-0.safetensors").exists()
    out = ok("train", path, "--out", tmp_path / "killed", "--resume")
    assert "resumed at step 10 of 14" in out
    whole, again = (store.load(tmp_path / folder / "weights.safetensors") for folder in ("whole", "killed"))
    assert same(flat(whole), flat(again))
    metrics = [json.loads((tmp_path / folder / "metrics.json").read_text())["test"] for folder in ("whole", "killed")]
    assert metrics[0] == metrics[1]


def flat(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a nested state by their path."""
    if not isinstance(value, dict):
        return {path: value} if torch.is_tensor(value) else {}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}/{key}").items()}


@pytest.mark.slow
def test_runs_are_compared(tmp_path: Path) -> None:
    paths = [write(tmp_path, name) for name in LOSSES]
    out = ok("compare", *paths, "--seeds", 2, "--out", tmp_path / "all")
    assert all(name in out for name in LOSSES) and "Equal budget" in out
    found = json.loads((tmp_path / "all" / "compare.json").read_text())
    assert found and all((tmp_path / "all" / name / "seed-0" / "weights.safetensors").exists() for name in LOSSES)


def test_a_run_without_a_hidden_label_is_refused_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "fixmatch")
    result = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "x"), "--set", "data.withhold="])
    assert result.exit_code == 2
    words = " ".join(result.stderr.split())
    assert "without labels in every batch" in words or "no training row lacks one" in words
    assert not (tmp_path / "x" / "weights.safetensors").exists()
