"""A recipe on the bundled log, changed with dataclasses.replace and trained for a few steps."""

from dataclasses import replace

from unbraid import recipes
from unbraid.encoders.attention import TargetAttention
from unbraid.job import train
from unbraid.train import Training

run = recipes.mmoe()
videos = tuple(history for history in run.data.histories if "video_id" in history.fields)  # what a target can attend to
run = replace(
    run,
    name="mmoe_attention",
    data=replace(run.data, histories=videos),
    model=replace(run.model, history=TargetAttention(), tower=replace(run.model.tower, experts=2)),
    training=Training(batch_size=512, steps=20),
)
result = train(run, baseline=False)  # out="runs/mmoe_attention" would write a bundle
for task, found in result.metrics["test"].items():
    print(f"{task}: test AUC {found['auc']['value']:.3f} after {run.training.steps} steps")
