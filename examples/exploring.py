"""Rank the candidates of requests by what the model believes and by how unsure it is, with one draw per request."""

import numpy as np
import polars as pl

from unbraid.config import Run
from unbraid.data.declaration import Data, Split
from unbraid.job import train
from unbraid.predictor import Predictor, with_uncertainty
from unbraid.train import Training
from unbraid.types import Feature, Task
from unbraid.uncertainty.explore import UCB, Thompson

rng, n = np.random.default_rng(0), 6_000
user, item = rng.integers(0, 200, n), rng.integers(0, 40, n)
logit = rng.normal(size=200)[user] + rng.normal(size=40)[item] - 1
click = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
log = pl.DataFrame({"request": np.arange(n) // 5, "user": user, "item": item, "time": np.arange(n), "click": click})

data = Data(
    rows="log", user="user", request="request", time="time", time_unit="s",
    features=(Feature("user"), Feature("item")), tasks=(Task("click"),),
    split=Split(kind="time", valid_from=4_000, test_from=5_000),
)  # fmt: skip
result = train(Run(data=data, training=Training(batch_size=256, epochs=5)), tables={"log": log}, baseline=False)
print(f"test AUC {result.metrics['test']['click']['auc']['value']:.3f}")

bundle = with_uncertainty(result.bundle, tables={"log": log})  # `unbraid uncertainty BUNDLE` for one on disk
candidates = log.tail(10).drop("click")
for policy in (Thompson(seed=0), UCB(beta=2.0)):
    print(type(policy).__name__)
    found = Predictor(bundle).predict(candidates, {"log": log}, explore=policy)
    ranked = pl.concat([candidates, found], how="horizontal").sort("request", -pl.col("click_explore"))
    print(ranked.select("request", "item", "click", "click_sd", "click_explore"))
