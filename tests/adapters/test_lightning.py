"""Lightning's loop against the package's own: the same losses at every step, and the same weights."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.augmentations.tabular import Tabular
from unbraid.bundle import Bundle
from unbraid.compat import declare_operators
from unbraid.data.encode import encode
from unbraid.data.mix import Mix
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.evaluate import evaluate
from unbraid.job import JobError, prepared
from unbraid.losses.flexmatch import FlexMatch
from unbraid.losses.supervised import Supervised
from unbraid.optim.adatask import AdaTask
from unbraid.optim.auto_lambda import AutoLambda
from unbraid.optim.cagrad import CAGrad
from unbraid.optim.ema import EMA
from unbraid.optim.uniform_average import UniformAverage
from unbraid.optim.uw import UW
from unbraid.predictor import Predictor
from unbraid.schedules.individual import Individual
from unbraid.slots import Look
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Watcher

declare_operators()
lightning = pytest.importorskip("lightning.pytorch")

from unbraid.adapters.lightning import UnbraidData, UnbraidModule  # noqa: E402

# Lightning's own doings beside this torch
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (".*LeafSpec.*:FutureWarning", ".*manual optimization and every_n.*", ".*Be aware that.*")
]
STEPS, MIDDLE = 12, 7
TABLES = {"log": make_log()}


def run_with(**changes: Any) -> config.Run:
    """A run with dropout, so that random numbers count, and a few steps beyond one epoch."""
    base = make_run()
    training = changes.pop("training", None) or replace(
        base.training, batch_size=64, steps=STEPS, evaluate_every=4, metric="logloss"
    )
    model = replace(base.model, tower=SharedBottom(bottom=(16,), tower=(8,), dropout=0.3))
    return replace(base, training=training, model=model, seed=3, **changes)


def semi() -> config.Run:
    """Labelled and unlabelled rows, two views of each, and a loss that remembers."""
    run = run_with(losses=(Supervised(), FlexMatch()), augment=Tabular(), data=make_data(withhold="site = 'mail'"))
    return replace(run, training=replace(run.training, batch_size=32, mix=Mix(unlabelled=32)))


RUNS = {
    "joint": run_with(),
    "joint, cosine": run_with(update=replace(make_run().update, learning_rate="cosine", warmup_steps=2, clip_norm=1.0)),
    "lazy tables": run_with(update=replace(make_run().update, table_weight_decay=0.1)),
    "adatask": run_with(update=AdaTask(lr=0.01)),
    "uncertainty": run_with(update=config.Weighted(weighting=UW())),
    "auto_lambda": run_with(update=config.Weighted(weighting=AutoLambda())),
    "cagrad": run_with(update=config.Aggregated(aggregator=CAGrad())),
    "exponential mean": run_with(average=EMA(decay=0.9)),
    "mean of weights": run_with(average=UniformAverage()),
    "few labels": semi(),
    "bfloat16": run_with(training=replace(make_run().training, batch_size=64, steps=STEPS, precision="bfloat16")),
}
LAZY = RUNS["lazy tables"]
RUNS["lazy tables"] = replace(LAZY, model=replace(LAZY.model, tables=Views(lazy_rows=0)))


class Losses(lightning.Callback):
    """What Lightning was told at each step."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        named = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        self.found.append({name.removeprefix("train/"): value for name, value in named.items()})


def trainer_of(tmp_path: Path, *callbacks: Any, **more: Any) -> Any:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    given = {"max_steps": STEPS, "accelerator": "cpu", "default_root_dir": tmp_path, "limit_val_batches": 0}
    given |= dict.fromkeys(off, False)
    return lightning.Trainer(**{**given, **more}, callbacks=list(callbacks))


def by_lightning(run: config.Run, tmp_path: Path, **more: Any) -> tuple[UnbraidModule, list[dict[str, float]]]:
    data = UnbraidData(run, TABLES)
    module, losses = UnbraidModule(run, data), Losses()
    trainer_of(tmp_path, losses, **more).fit(module, datamodule=data)
    return module, losses.found


def by_ourselves(run: config.Run, look: int = -1) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    found: list[dict[str, float]] = []

    class Told(Watcher):
        def trained(self, step: int, losses: Any) -> None:
            found.append({name: float(loss.detach()) for name, loss in losses.items()})

    encoded = Encoded(encode(run.data, tables=TABLES))
    model, session = prepared(run, encoded, "cpu", watcher=Told())
    return session.fit(model, STEPS, look=Look(every=look))[0], found


@pytest.mark.parametrize("name", list(RUNS))
def test_losses_and_weights_are_those_of_our_loop(name: str, tmp_path: Path) -> None:
    module, theirs = by_lightning(RUNS[name], tmp_path)
    model, ours = by_ourselves(RUNS[name])
    assert len(theirs) == len(ours) == STEPS
    assert [{k: each[k] for k in mine} for each, mine in zip(theirs, ours, strict=True)] == ours
    want = model.state_dict()
    assert {k for k, v in module.model.state_dict().items() if not torch.equal(v, want[k])} == set()


@pytest.mark.parametrize("name", ["lazy tables", "exponential mean"])
def test_validations_leave_the_training_as_our_looks_do(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    module, losses = by_lightning(
        run, tmp_path, val_check_interval=4, check_val_every_n_epoch=None, limit_val_batches=1.0
    )
    model, ours = by_ourselves(run, look=4)
    assert [{k: each[k] for k in mine} for each, mine in zip(losses, ours, strict=True)] == ours
    want = model.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in module.model.state_dict().items())
    data = UnbraidData(run, TABLES)
    (found,) = trainer_of(tmp_path).test(module, datamodule=data)
    scores = Predictor(module.bundle()).split_scores("test", TABLES)
    metrics = evaluate(scores, data.encoded.schema, replicates=0)
    assert found["test/click/auc"] == pytest.approx(metrics["click"]["auc"]["value"])


@pytest.mark.parametrize("name", ["adatask", "exponential mean", "few labels", "lazy tables"])
def test_a_checkpoint_in_the_middle_of_an_epoch_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    module, whole = by_lightning(run, tmp_path)
    data = UnbraidData(run, TABLES)
    first = UnbraidModule(run, data)
    assert MIDDLE % data.per_epoch
    kept = lightning.callbacks.ModelCheckpoint(tmp_path / "kept", "at", every_n_train_steps=MIDDLE, save_top_k=-1)
    before = Losses()
    trainer_of(tmp_path, before, kept, enable_checkpointing=True).fit(first, datamodule=data)
    data = UnbraidData(run, TABLES)
    second, after = UnbraidModule(run, data), Losses()
    torch.manual_seed(99)  # what is drawn from here on is the checkpoint's
    trainer_of(tmp_path, after).fit(second, datamodule=data, ckpt_path=tmp_path / "kept" / "at.ckpt")
    assert after.found == whole[MIDDLE:]
    want = module.model.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in second.model.state_dict().items())


def test_lightnings_early_stopping_and_the_bundle(tmp_path: Path) -> None:
    run = RUNS["joint"]
    data = UnbraidData(run, TABLES)
    module = UnbraidModule(run, data)
    stop = lightning.callbacks.EarlyStopping("valid/logloss", patience=1)
    trainer = trainer_of(tmp_path, stop, max_steps=-1, max_epochs=40, limit_val_batches=1.0)
    trainer.fit(module, datamodule=data)
    assert module.steps == STEPS and 0 < trainer.global_step < 40 * data.per_epoch
    module.bundle().save(tmp_path / "bundle")
    rows = make_log(50, seed=5)
    loaded = Predictor(Bundle.load(tmp_path / "bundle")).predict(rows, tables=TABLES)
    assert loaded.equals(Predictor(module.bundle()).predict(rows, tables=TABLES))
    parts = trainer.predict(module, datamodule=data)
    assert sum(len(part["click"]) for part in parts) == len(data.encoded.split("test"))


def test_step_sizes_follow_the_trainers_length_and_can_be_monitored(tmp_path: Path) -> None:
    run = run_with(update=replace(make_run().update, lr=0.02, learning_rate="linear"))
    data = UnbraidData(run, TABLES)
    module = UnbraidModule(run, data)
    trainer_of(tmp_path, max_steps=4).fit(module, datamodule=data)
    assert module.call.update.config.factor(4, 4) == 0
    assert module.call.update.dense.param_groups[0]["lr"] == pytest.approx(0.0)
    (optimizer,) = module.trainer.optimizers
    assert optimizer.param_groups is module.call.update.dense.param_groups


def test_what_lightning_cannot_do_is_refused(tmp_path: Path) -> None:
    run = RUNS["joint"]
    data = UnbraidData(run, TABLES)
    with pytest.raises(JobError, match="individual.*one_stage"):
        UnbraidModule(replace(run, schedule=Individual()), data)
    with pytest.raises(JobError, match="training.patience"):
        UnbraidModule(replace(run, training=replace(run.training, patience=2)), data)
    with pytest.raises(RuntimeError, match="UnbraidModule"):
        UnbraidData(run, TABLES).train_dataloader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(JobError, match="32-true"):
            trainer_of(tmp_path, precision="bf16-mixed").fit(UnbraidModule(run, data), datamodule=data)
        with pytest.raises(Exception, match="clipping"):
            trainer_of(tmp_path, gradient_clip_val=1.0).fit(UnbraidModule(run, data), datamodule=data)


def test_several_processes_are_refused(tmp_path: Path) -> None:
    module = UnbraidModule(RUNS["joint"], UnbraidData(RUNS["joint"], TABLES))
    module._trainer = type("Two", (), {"world_size": 2})()  # type: ignore[assignment]
    with pytest.raises(JobError, match="torchrun"):
        module.configure_optimizers()
