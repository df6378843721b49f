"""How far deviations are from errors: a trained network whose true logits are known, by how often it saw the item.

A logit is the sum of a normal number of the user and one of the item (``sums``), or a product of four factors (``products``).
Items are drawn by Zipf's law, and some are never seen.  Errors are those of the logit on pairs drawn evenly: rare items are
many.  The figures of docs/exploration.md are what this prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from unbraid.config import Run
from unbraid.data.declaration import Data, Split
from unbraid.job import train
from unbraid.optim.joint import Joint
from unbraid.predictor import Predictor, with_uncertainty
from unbraid.train import Training
from unbraid.types import Feature, Task
from unbraid.uncertainty.ensemble import Ensemble
from unbraid.uncertainty.explore import sigmoid

USERS, ITEMS, UNSEEN, TRAIN, PAIRS, MEMBERS = 200, 500, 50, 32_000, 20_000, 5
SPLITS = {"train": TRAIN, "valid": 4_000, "test": 8_000}
BINS = {"none": (0, 0), "1 to 10": (1, 10), "11 to 100": (11, 100), "more than 100": (101, TRAIN)}


def make(world: str, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame, np.ndarray]:
    """The log, pairs of every item, and the pairs' true logits."""
    rng = np.random.default_rng(seed)
    width = 1 if world == "sums" else 4
    taste, quality = rng.normal(size=(USERS, width)), rng.normal(size=(ITEMS + UNSEEN, width))
    rows = sum(SPLITS.values())
    share = np.arange(1, ITEMS + 1) ** -1.2
    users, items = rng.integers(0, USERS, rows), rng.choice(ITEMS, rows, p=share / share.sum())
    pairs = rng.integers(0, USERS, PAIRS), rng.integers(0, ITEMS + UNSEEN, PAIRS)

    def logit(user: np.ndarray, item: np.ndarray) -> np.ndarray:
        both = taste[user], quality[item]
        return (sum(both) if world == "sums" else both[0] * both[1]).sum(1) - 1

    click = (rng.random(rows) < sigmoid(logit(users, items))).astype(int)
    split = np.repeat(list(SPLITS), list(SPLITS.values()))
    log = pl.DataFrame({"user": users, "item": items, "click": click, "split": split})
    return log, pl.DataFrame({"user": pairs[0], "item": pairs[1]}), logit(*pairs)


@dataclass(frozen=True)
class Measured:
    """Test AUC of the first member; how often training saw each pair's item; true errors and deviations, (PAIRS,) each."""

    auc: float
    seen: np.ndarray
    error: dict[str, np.ndarray]
    deviation: dict[str, np.ndarray]

    def table(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Bin -> model -> (RMS error, mean deviation)."""
        found = {}
        for name, (low, high) in BINS.items():
            rows = (self.seen >= low) & (self.seen <= high)
            found[name] = {
                model: (
                    float(np.sqrt(np.square(self.error[model][rows]).mean())),
                    float(self.deviation[model][rows].mean()),
                )
                for model in self.error
            }
        return found

    def correlation(self, model: str) -> float:
        """Of ranks: deviations and errors, over pairs whose item was seen."""
        rows = self.seen > 0
        return float(spearmanr(self.deviation[model][rows], np.abs(self.error[model][rows])).statistic)


def measured(world: str) -> Measured:
    log, pairs, truth = make(world)
    tables: dict[str, Any] = {"log": log}
    data = Data(rows="log", features=(Feature("user"), Feature("item")), tasks=(Task("click"),),
                split=Split(kind="column", column="split"))  # fmt: skip
    training = Training(batch_size=512, epochs=20, patience=3, checkpoint_seconds=0, threads=1)
    done = [train(Run(data=data, update=Joint(lr=3e-3), training=training, seed=seed), tables=tables, baseline=False)
            for seed in range(MEMBERS)]  # fmt: skip
    single = Predictor(with_uncertainty(done[0].bundle, tables=tables)).beliefs(pairs, tables)[1]["click"]
    several = Ensemble([Predictor(each.bundle) for each in done]).beliefs(pairs, tables)[1]["click"]
    beliefs = {"last layer": single, "ensemble": several}
    counts = np.bincount(log.filter(pl.col("split") == "train")["item"].to_numpy(), minlength=ITEMS + UNSEEN)
    return Measured(
        done[0].metrics["test"]["click"]["auc"]["value"], counts[pairs["item"].to_numpy()],
        {name: belief.mean - truth for name, belief in beliefs.items()},
        {name: np.sqrt(belief.variance) for name, belief in beliefs.items()},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("world", ["sums", "products"])
def test_deviations_are_far_below_the_errors(world: str) -> None:
    """The order of magnitude that the page states, both ways: the page is wrong, too, if deviations become good."""
    found = measured(world)
    table, ranks = found.table(), {model: found.correlation(model) for model in found.error}
    print(
        f"{world}, test AUC {found.auc:.3f}, rank correlation", {model: round(rank, 2) for model, rank in ranks.items()}
    )
    for name, by in table.items():
        print(f"{name:14}", *(f"{model}: error {error:.2f}, s {s:.3f}" for model, (error, s) in by.items()), sep="  ")
    rare, frequent = table["1 to 10"], table["more than 100"]
    for name, by in table.items():
        assert 5 < by["last layer"][0] / by["last layer"][1] < 50, name
        assert by["ensemble"][0] > by["ensemble"][1] > 2 * by["last layer"][1], name
    assert all(rare[model][0] > 1.5 * frequent[model][0] for model in rare), "rare items are further off"
    assert 0 < ranks["last layer"] < 0.4
    if world == "sums":  # and the deviations do not say so
        assert all(rare[model][1] < 1.5 * frequent[model][1] for model in rare)
