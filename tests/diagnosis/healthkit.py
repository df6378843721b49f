"""A small healthy log whose labels follow known probabilities, and a case of a run on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
from scipy.special import expit

from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Split
from unbraid.diagnosis.case import Case
from unbraid.job import train
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Feature, Scores, Task


def make_table(rows: int = 4000, users: int = 500, items: int = 40, seed: int = 0) -> pl.DataFrame:
    """No row twice (``x`` and ``time`` are continuous), every value in every split, 60 : 20 : 20."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows)
    return pl.DataFrame({
        "user": rng.integers(0, users, rows),
        "item": rng.integers(0, items, rows),
        "site": rng.choice(["home", "mail"], rows, p=[0.6, 0.4]),
        "time": rng.permutation(rows) * 1000,
        "x": x,
        "tags": [[int(t) for t in rng.integers(0, 9, rng.integers(0, 4))] for _ in range(rows)],
        "click": (rng.random(rows) < expit(1.5 * x)).astype(int),
        "buy": (rng.random(rows) < expit(x - 1)).astype(int),
        "split": rng.choice(["train", "valid", "test"], rows, p=[0.6, 0.2, 0.2]),
    })  # fmt: skip


def make_run(steps: int = 4, metric: str = "logloss", **changes: Any) -> Run:
    """On `make_table`; ``changes`` are of its data."""
    data = Data(
        rows="log", user="user", time="time", domain="site", split=Split(kind="column", column="split"),
        features=(Feature("item"), Feature("x", kind="number"), Feature("tags", kind="bag")),
        tasks=(Task("click"), Task("buy")),
    )  # fmt: skip
    return Run(
        name="toy", data=replace(data, **changes), baseline=(), update=Joint(lr=0.01),
        model=ModelChoice(tower=SharedBottom(bottom=(8,), tower=(4,))),
        training=Training(batch_size=256, steps=steps, metric=metric, checkpoint_seconds=0),
    )  # fmt: skip


def make_case(table: pl.DataFrame, run: Run | None = None, **more: Any) -> Case:
    """Train the run on the table for its few steps."""
    bundle = train(run or make_run(), tables={"log": table}, baseline=False).bundle
    return Case.of(bundle, tables={"log": table}, **more)


def with_scores(case: Case, scores: Scores) -> Case:
    """The case, with other predictions of its validation sample."""
    case.__dict__["valid"] = scores
    return case


def oracle(case: Case, table: pl.DataFrame) -> Scores:
    """Predictions of the validation sample by the probabilities that the labels were drawn with."""
    x = table["x"].to_numpy()[case.sample("valid")]
    return replace(case.valid, logits={"click": 1.5 * x, "buy": x - 1})
