"""Class confusion above its floor, predicted rates, and how MCC invents positives of a rare task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from unbraid.analysis.confusion import ALL, confusion, rates
from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Split
from unbraid.data.encode import encode
from unbraid.data.mix import Mix
from unbraid.data.table import Encoded
from unbraid.job import train
from unbraid.losses.mcc import MCC
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training, predict
from unbraid.types import Feature, Schema, Scores, Task

SCHEMA = Schema(
    (), (Task("click"), Task("size", kind="multiclass"), Task("spend", kind="real")),
    domains=("(unknown)", "(missing)", "a", "b"), classes={"size": ("L", "M", "S")},
)  # fmt: skip


def scores_of(click: Any, size: Any) -> Scores:
    n = len(click)
    logits = {"click": np.asarray(click, np.float32), "size": np.asarray(size, np.float32), "spend": np.zeros(n)}
    none = {name: np.zeros(n) for name in logits}
    return Scores(logits, {}, none, {k: v.astype(bool) for k, v in none.items()}, np.arange(n) % 2 + 2, None, np.arange(n),
                  np.arange(n), SCHEMA.domains)  # fmt: skip


def test_confusion_and_floor() -> None:
    sure = 1000 * np.eye(3)
    found = confusion(scores_of([0, 0, 0, 0], sure[[0, 0, 1, 2]]), SCHEMA).values
    assert set(found) == {"click", "size"} and set(found["size"]) == {ALL, "a", "b"}
    assert found["click"][ALL] == {
        "rows": 4,
        "confusion": pytest.approx(0.5),
        "floor": 0.0,
        "above_floor": pytest.approx(0.5),
    }
    assert found["size"][ALL]["above_floor"] == pytest.approx(0, abs=1e-12)
    inside = found["size"]["a"]  # rows 0 and 2, of two classes
    assert inside["rows"] == 2 and inside["floor"] == pytest.approx(1 / 3) == pytest.approx(inside["confusion"])


def test_rates() -> None:
    before, after = (
        scores_of([-2.0, -2.0, 2.0, 0.0], np.zeros((4, 3))),
        scores_of([-2.0, 3.0, 2.0, 3.0], np.zeros((4, 3))),
    )
    found = rates(before, after, SCHEMA).values
    p = 1 / (1 + np.exp([2.0, 2.0, -2.0, 0.0]))
    q = 1 / (1 + np.exp([2.0, -3.0, -2.0, -3.0]))
    assert set(found) == {"click"}
    cell = found["click"][ALL]
    assert cell["before"] == pytest.approx(p.mean()) and cell["ratio"] == pytest.approx(q.mean() / p.mean())
    assert (cell["called_before"], cell["called_after"]) == (0.5, 0.75)
    assert found["click"]["a"]["ratio"] == pytest.approx(1.0) and found["click"]["b"]["called_after"] == 1.0
    with pytest.raises(ValueError, match="on the same rows in the same order"):
        rates(before, replace(after, row=after.row[::-1]), SCHEMA)


def rare(seed: int, rows: int = 4000) -> pl.DataFrame:
    """A rare task, near 3 %, with the same law in an old scenario and in a new one."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3))
    click = rng.random(rows) < 1 / (1 + np.exp(-(1.2 * x[:, 0] + 0.5 * x[:, 1] - 4.2)))
    part = rng.choice(["train", "valid", "test"], rows, p=[0.6, 0.1, 0.3])
    site = np.where(rng.random(rows) < 0.5, "new", "old")
    return pl.DataFrame(
        {**{f"x{k}": x[:, k] for k in range(3)}, "click": click.astype(int), "site": site, "part": part}
    )


def rare_run(losses: tuple[Any, ...], seed: int) -> Run:
    data = Data(
        rows="log", domain="site", features=tuple(Feature(f"x{k}", kind="number") for k in range(3)), tasks=(Task("click"),),
        split=Split(kind="column", column="part"), withhold="site = 'new'",
    )  # fmt: skip
    training = Training(batch_size=128, steps=400, evaluate_every=400, mix=Mix(unlabelled=128), checkpoint_seconds=0)
    model = ModelChoice(tower=SharedBottom(bottom=(16,), tower=()))
    return Run(data=data, model=model, losses=losses, update=Joint(lr=0.01), training=training, seed=seed)


@pytest.mark.slow
def test_mcc_invents_positives_of_a_rare_task() -> None:
    """The law is the same in both scenarios: without the loss the predicted rate is right, with it it is 1.7 times as high."""
    found = []
    for seed in range(3):
        log, both = rare(seed), []
        for losses in ((Supervised(),), (Supervised(), MCC())):
            run = rare_run(losses, seed)
            model = train(run, tables={"log": log}, baseline=False).bundle.model
            encoded = Encoded(encode(run.data, tables={"log": log}))
            both.append(predict(model, encoded.in_order(encoded.split("test"), 2048), encoded.schema))
        cell = rates(*both, encoded.schema).values["click"]["new"]
        true = float(both[0].labels["click"][both[0].domain == encoded.schema.domains.index("new")].mean())
        found.append((true, cell["before"], cell["after"]))
    assert all(0.6 < before / true < 1.6 for true, before, _ in found), found
    assert all(after > 1.4 * before for _, before, after in found), found
