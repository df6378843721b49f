"""Train on your own pandas DataFrame (pip install pandas pyarrow): two tasks, a domain, histories from the rows."""

import numpy as np
import pandas as pd

from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Events, Split
from unbraid.encoders.table import Views
from unbraid.job import train
from unbraid.optim.joint import Joint
from unbraid.predictor import Predictor
from unbraid.towers.stem import STEM
from unbraid.train import Training
from unbraid.types import Feature, Field, History, Task

rng, n = np.random.default_rng(0), 20_000
user, item = rng.integers(0, 300, n), rng.integers(0, 200, n)
taste = (rng.normal(size=(300, 2))[user] * rng.normal(size=(200, 2))[item]).sum(1)
df = pd.DataFrame({"user": user, "item": item, "site": rng.choice(["app", "web"], n), "time": np.arange(n)})
df["click"] = (rng.random(n) < 1 / (1 + np.exp(-2 * taste))).astype(int)
df["buy"] = np.where(df["click"] == 1, rng.random(n) < 1 / (1 + np.exp(1 - taste)), np.nan)  # unknown without a click

data = Data(
    rows="log", user="user", time="time", time_unit="s", domain="site",
    features=(Feature("user"), Feature("item"), Feature("site")),
    tasks=(Task("click"), Task("buy", given="click")),
    fields=(Field("item"),), events=(Events(columns={"item": "item", "clicked": "click"}),),
    histories=(History("clicked", fields=("item",), where="clicked = 1", length=20),),
    split=Split(kind="time", valid_from=16_000, test_from=18_000),
)  # fmt: skip
model = ModelChoice(tower=STEM(expert=(32,), tower=(16,)), tables=Views(kind="per_task", width=8))
run = Run(data=data, model=model, update=Joint(lr=3e-3), training=Training(batch_size=512, epochs=6, patience=2))

result = train(run, tables={"log": df})
for task, found in result.metrics["test"].items():
    print(f"{task}: AUC {found['auc']['value']:.3f} [{found['auc']['low']:.3f}, {found['auc']['high']:.3f}]")
rows = df.tail(3).drop(columns=["click", "buy"])
print(Predictor(result.bundle).predict(rows, tables={"log": df}))
