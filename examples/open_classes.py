"""Classes known by name alone, in a domain that training never saw: train on half of the names, score all of them."""

import numpy as np
import polars as pl
import torch

from unbraid.analysis.open_classes import in_the_wild
from unbraid.bundle import with_classes
from unbraid.class_head import ClassFile, write_vectors
from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Split
from unbraid.job import train
from unbraid.losses.margin import Margin
from unbraid.optim.beta_average import BetaAverage
from unbraid.predictor import Predictor
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Feature, Task

rng, n, names = np.random.default_rng(1), 2_000, [f"class {i}" for i in range(8)]
vectors = rng.normal(size=(8, 12))  # what a text encoder would say of the names
label, camera = rng.integers(0, 8, n), rng.choice(["north", "south"], n)
seen = vectors[label] @ (np.eye(12) + 0.4 * rng.normal(size=(12, 12))) + 0.3 * rng.normal(size=(n, 12))
table = pl.DataFrame({"picture": seen.tolist(), "kind": [names[i] for i in label], "camera": camera})
protocol = in_the_wild(table["kind"].to_list(), camera.tolist(), "south", names)
table = table.with_columns(protocol.split(table["kind"].to_list()))
write_vectors("names.npz", names, torch.from_numpy(vectors))

data = Data(
    rows="photos", keep="split is not null", domain="camera", split=Split(kind="column", column="split"),
    features=(Feature("picture", kind="vector"),), tasks=(Task("kind", kind="multiclass"),),
)  # fmt: skip
head = {"kind": ClassFile("names.npz", scale=20.0, projection="always")}
model = ModelChoice(tower=SharedBottom(bottom=(), tower=()), classes=head)
length = Training(batch_size=64, steps=100, metric="accuracy")
run = Run(data=data, model=model, losses=(Margin(strength=0.1),), average=BetaAverage(beta=0.5), training=length)
bundle = train(run, tables={"photos": table}, baseline=False).bundle
bundle = with_classes(bundle, "kind", protocol.new, torch.from_numpy(vectors[4:]))
found = protocol.measure(Predictor(bundle).scores(table.drop("split")), bundle.fitted.schema, "kind")
print({name: round(accuracy["value"], 3) for name, accuracy in found.items()}, "are accuracies")
