"""MC-dropout: the mean of random passes, and nothing else that is random or that moves."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from toylog import make_log, make_run

from unbraid.bundle import Bundle
from unbraid.config import ModelChoice
from unbraid.job import train
from unbraid.mc_dropout import McDropout
from unbraid.predictor import Predictor
from unbraid.towers.mlp import SharedBottom
from unbraid.types import Batch, Output, Schema, Task

SCHEMA = Schema((), (Task("b"), Task("m", kind="multiclass"), Task("r", kind="real")), classes={"m": ("x", "y", "z")})


class Small(nn.Module):
    """Dropout on the weight of a batch, behind a batch normalisation."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(p)

    def forward(self, batch: Batch, step: int | None = None) -> Output:
        x = self.drop(self.norm(batch.weight))  # type: ignore[arg-type]
        return Output({"b": x[:, 0], "m": x[:, 1:4], "r": x[:, 4]}, {"b": x}, x)


def batch(x: torch.Tensor) -> Batch:
    row = torch.arange(len(x))
    return Batch({}, {}, {}, row, x, row, row, row)


def test_is_the_mean_of_the_passes_probabilities() -> None:
    x = torch.randn(7, 5)
    model = Small(0.4)
    got = McDropout(model, SCHEMA, 6, seed=3)(batch(x)).logits
    torch.manual_seed(int(np.random.SeedSequence([3, 0]).generate_state(1)[0]))
    passes = [model(batch(x)).logits for _ in range(6)]
    p = torch.stack([one["b"].double().sigmoid() for one in passes]).mean(0)
    q = torch.stack([one["m"].double().softmax(1) for one in passes]).mean(0)
    torch.testing.assert_close(got["b"].sigmoid(), p, rtol=0, atol=1e-6)
    torch.testing.assert_close(got["m"].softmax(1), q, rtol=0, atol=1e-6)
    torch.testing.assert_close(got["r"], torch.stack([one["r"] for one in passes]).mean(0))


def test_only_dropout_trains_and_the_outside_sees_nothing() -> None:
    model = Small(0.4)
    wrapped = McDropout(model, SCHEMA, 4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = batch(torch.randn(9, 5))
    state = torch.get_rng_state()
    one, two = wrapped(x), wrapped(x)
    assert (
        torch.equal(torch.get_rng_state(), state)
        and not one.hidden
        and not torch.equal(one.logits["b"], two.logits["b"])
    )
    assert not model.norm.training and model.drop.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
        "running means are frozen"
    )


def test_refusals() -> None:
    with pytest.raises(ValueError, match="this one has none: set `dropout`"):
        McDropout(Small(0.0), SCHEMA, 8)
    with pytest.raises(ValueError, match="at least 2 passes.* Found 1"):
        McDropout(Small(0.1), SCHEMA, 1)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    tower = SharedBottom(bottom=(16,), tower=(8,), dropout=0.3)
    return train(make_run(model=ModelChoice(tower=tower)), tables={"log": make_log()}, baseline=False).bundle


def test_a_predictor_averages_and_leaves_the_bundle_as_it_was(bundle: Bundle) -> None:
    log, tables = make_log().head(200), {"log": make_log()}
    plain = Predictor(bundle).predict(log, tables)
    mean = Predictor(bundle, mc_dropout=100).predict(log, tables)
    again = Predictor(bundle, mc_dropout=100).predict(log, tables)
    assert mean.equals(again) and not mean.equals(plain)
    assert Predictor(bundle).predict(log, tables).equals(plain)
    assert np.corrcoef(plain["click"], mean["click"])[0, 1] > 0.9
    few = Predictor(bundle, mc_dropout=2).predict(log, tables)
    gaps = [
        float(np.abs(one["click"] - mean["click"]).mean())
        for one in (few, Predictor(bundle, mc_dropout=40).predict(log, tables))
    ]
    assert gaps[0] > 1.5 * gaps[1], "more passes, less noise"


def test_mixes_with_neither_uncertainty_nor_calibrators(bundle: Bundle) -> None:
    from unbraid.calibrate import calibrate
    from unbraid.calibration.scaling import Temperature
    from unbraid.uncertainty.last_layer import UncertaintyError

    tables: dict[str, pl.DataFrame] = {"log": make_log()}
    with pytest.raises(UncertaintyError):
        Predictor(bundle, mc_dropout=3).predict(make_log(), tables, uncertainty=True)
    calibrated, _, _ = calibrate(bundle, Temperature(), tables=tables)
    with pytest.raises(ValueError, match="fitted without MC-dropout. Use `raw`"):
        Predictor(calibrated, mc_dropout=3)
    frame = Predictor(calibrated, raw=True, mc_dropout=3).predict(make_log(), tables)
    assert frame["click"].is_between(0, 1).all()
