"""Weights by exposure against loops, their limits, the shift that keeps predictions calibrated, and a run on planted repeats."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid.config import ModelChoice, from_dict, to_dict
from unbraid.data.declaration import Data, Split
from unbraid.job import JobError, train
from unbraid.losses.exposure import Exposure
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Batch, Feature, Output, Schema, Task

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
TASKS = (Task("click", weight=2.0), Task("dwell", kind="real"), Task("stars", kind="multiclass"))
SCHEMA = Schema((), TASKS, domains=("(unknown)", "(missing)", "feed", "search"), classes={"stars": ("1", "3", "5")})
B = 40


def make(seed: int = 0) -> tuple[Output, Batch]:
    g = torch.Generator().manual_seed(seed)
    labels = {
        "click": torch.randint(2, (B,), generator=g).float(),
        "dwell": torch.randint(2, (B,), generator=g).float(),
        "stars": torch.randint(3, (B,), generator=g),
    }
    observed = {name: torch.rand(B, generator=g) < 0.8 for name in labels}
    labels["click"][~observed["click"]] = math.nan
    meta = {
        "sampling_rate.click": (0.1 + 0.9 * torch.rand(B, generator=g)).double(),
        "exposure": torch.randint(8, (B,), generator=g),
    }
    weight, domain = 0.5 + torch.rand(B, generator=g).double(), torch.randint(2, 4, (B,), generator=g)
    places = torch.arange(B), torch.zeros(B, dtype=torch.int8), torch.full((B,), -1)
    shapes: dict[str, tuple[int, ...]] = {"click": (B,), "dwell": (B,), "stars": (B, 3)}
    logits = {n: torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}
    return Output(logits, {}, torch.zeros(B, 1)), Batch({}, labels, observed, domain, weight, *places, meta)


def weight_of(k: int, gamma: float, least: float) -> float:
    return max(least, (1 + k) ** -gamma)


def row_loss(task: Task, output: Output, batch: Batch, i: int, shift: float) -> torch.Tensor:
    z, y = output.logits[task.name][i], batch.labels[task.name][i]
    if task.kind == "multiclass":
        return -torch.log(torch.exp(z[y]) / torch.exp(z).sum())
    if task.kind == "real":
        return (z - y) ** 2
    z = z + shift - math.log(batch.meta["sampling_rate.click"][i].item())
    return torch.log(1 + torch.exp(z)) - y * z


@pytest.mark.parametrize("exposure", [Exposure(), Exposure(0.7, 0.3), Exposure(0.5, 0.2, 1.5), Exposure(0.0, 0.2, 0.5)])
@pytest.mark.parametrize("by", ["task", "domain", "task@domain"])
def test_value_and_gradient(exposure: Exposure, by: Any) -> None:
    output, batch = make()
    assert batch.weight is not None
    losses = Supervised(by=by, exposure=exposure, weight=0.5).bind(SCHEMA)(output, batch, 0)
    want: dict[str, Any] = {}
    of_positive = exposure.gamma if exposure.positive_gamma is None else exposure.positive_gamma
    for task in TASKS:
        for code in [None] if by == "task" else [2, 3]:
            total, mass = torch.zeros(()).double(), 0.0
            for i in range(B):
                if not batch.observed[task.name][i] or code not in (None, int(batch.domain[i])):
                    continue
                k = int(batch.meta["exposure"][i])
                of_one, of_zero = (weight_of(k, g, exposure.least) for g in (of_positive, exposure.gamma))
                one = task.kind == "binary" and batch.labels[task.name][i] == 1
                m = float(batch.weight[i]) * (of_one if one else of_zero)
                total, mass = total + m * row_loss(task, output, batch, i, math.log(of_one / of_zero)), mass + m
            place = "" if code is None else SCHEMA.domains[code]
            key = {"task": task.name, "domain": place, "task@domain": f"{task.name}@{place}"}[by]
            part = 0.5 * total / mass * (task.weight if by == "domain" else 1.0)
            want[key] = want.get(key, 0) + part
    assert losses.keys() == want.keys()
    leaves = list(output.logits.values())
    for key, loss in want.items():
        torch.testing.assert_close(losses[key], loss, **EXACT)
        mine, theirs = (
            torch.autograd.grad(x, leaves, retain_graph=True, allow_unused=True) for x in (losses[key], loss)
        )
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, **EXACT)


def test_limits() -> None:
    output, batch = make()
    plain = Supervised().bind(SCHEMA)(output, batch, 0)
    first = replace(batch, meta={**batch.meta, "exposure": torch.zeros(B, dtype=torch.int64)})
    for exposure, seen in ((Exposure(0.0), batch), (Exposure(2.0, 0.1, 0.3), first), (Exposure(2.0, 1.0, 0.3), batch)):
        losses = Supervised(exposure=exposure).bind(SCHEMA)(output, seen, 0)
        assert all(torch.equal(losses[name], loss) for name, loss in plain.items())
    k = torch.tensor([0, 1, 3, 10**6])
    found = Exposure(0.5, 0.1).weights(k, torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(found, torch.tensor([1, 2**-0.5, 0.5, 0.1], dtype=torch.float64), **EXACT)
    assert not Exposure(0.5, 0.1).shift(k).any()
    torch.testing.assert_close(
        Exposure(0.5, 0.1, 1.0).shift(k), torch.tensor([1, 2**-0.5, 0.5, 1.0], dtype=torch.float64).log(), **EXACT
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("positive_gamma", [None, 0.1, 1.5])
def test_mean_predictions_are_mean_labels_per_exposure(seed: int, positive_gamma: float | None) -> None:
    """One free logit per bucket, minimised: within 1e-6 with the shift; without it more than 10 % off where classes differ."""
    rng = np.random.default_rng(seed)
    k = np.minimum(rng.geometric(0.3, 5000) - 1, 6)
    y = torch.from_numpy((rng.random(5000) < 0.4 / (1 + 0.3 * k)).astype(np.float32))
    places = torch.arange(5000), torch.zeros(5000, dtype=torch.int8), torch.full((5000,), -1)
    seen = {"click": torch.ones(5000, dtype=torch.bool)}
    earlier = torch.from_numpy(k)
    batch = Batch({}, {"click": y}, seen, torch.full((5000,), 2), None, *places, {"exposure": earlier})
    exposure = Exposure(0.5, 0.1, positive_gamma)
    z = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    term = Supervised(exposure=exposure).bind(replace(SCHEMA, tasks=(Task("click"),)))
    optimizer = torch.optim.LBFGS(
        [z], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = term(Output({"click": z[earlier]}, {}, torch.zeros(5000, 1)), batch, 0)["click"]
        loss.backward()
        return loss

    optimizer.step(closure)
    for bucket in range(7):
        mean = y[earlier == bucket].mean().item()
        served, unshifted = (float(torch.sigmoid(x.detach()[bucket])) for x in (z, z + exposure.shift(torch.arange(7))))
        assert served == pytest.approx(mean, rel=1e-5)
        assert positive_gamma is None or bucket == 0 or abs(unshifted / mean - 1) > 0.1, (
            "what a loss without shift would serve"
        )


# --------------------------------------------------------------------------------------------------------------- in a run
def repeats(rows: int = 30_000) -> pl.DataFrame:
    """Users see items again and again, the less likely to click the oftener; rows are not in order of time."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 300, rows), np.minimum(rng.geometric(0.08, rows), 30)
    time, seen = rng.permutation(rows), {}
    k = np.zeros(rows, dtype=int)
    for i in np.argsort(time):
        k[i] = seen.get((user[i], item[i]), 0)
        seen[user[i], item[i]] = k[i] + 1
    click = (rng.random(rows) < 0.5 / (1 + 0.3 * k)).astype(int)
    split = np.where(rng.random(rows) < 0.9, "train", np.where(rng.random(rows) < 0.5, "valid", "test"))
    return pl.DataFrame(
        {"user": user, "item": item, "time": time, "k": np.minimum(k, 5), "click": click, "split": split}
    )


def run_on(exposure: Exposure | None, **changes: Any) -> Any:
    data = Data(
        rows="log", user="user", time="time", features=(Feature("k"),), tasks=(Task("click"),),
        split=Split(kind="column", column="split"), **{"exposure": ("user", "item"), **changes},
    )  # fmt: skip
    return make_run(
        data=data, model=ModelChoice(tower=SharedBottom(bottom=(16,), tower=())), losses=(Supervised(exposure=exposure),),
        update=Joint(lr=0.02, learning_rate="cosine"),
        training=Training(batch_size=9000, steps=300, evaluate_every=300, checkpoint_seconds=0),
    )  # fmt: skip


def per_bucket(exposure: Exposure) -> list[float]:
    """Mean prediction over mean label of each number of exposures, in the training rows."""
    log = repeats()
    bundle = train(run_on(exposure), tables={"log": log}, baseline=False).bundle
    from unbraid.predictor import Predictor

    rows = log.filter(pl.col("split") == "train")
    p = Predictor(bundle).predict(rows, tables={"log": log})["click"]
    found = rows.with_columns(p=p).group_by("k").agg(pl.col("p").mean() / pl.col("click").mean()).sort("k")
    return found["p"].to_list()


@pytest.mark.slow
def test_a_run_stays_calibrated_per_exposure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(abs(ratio - 1) < 0.01 for ratio in per_bucket(Exposure(0.5, 0.1, 1.5)))
    monkeypatch.setattr(Exposure, "shift", lambda self, earlier: torch.zeros(len(earlier), dtype=torch.float64))
    assert min(per_bucket(Exposure(0.5, 0.1, 1.5))[1:]) < 0.7


def test_a_run_without_counts_is_refused() -> None:
    with pytest.raises(
        JobError, match="reads the exposure of each row, and the data declare none: set `data.exposure`"
    ):
        train(make_run(losses=(Supervised(exposure=Exposure()),)), tables={"log": make_log()}, baseline=False)


def test_a_run_file_holds_it() -> None:
    run = make_run(
        losses=(Supervised(weight=0.9, exposure=Exposure(positive_gamma=0.2)),),
        data=make_data(exposure=("user", "item")),
    )
    assert from_dict(to_dict(run, defaults=False)) == run
    result = train(run, tables={"log": make_log()}, baseline=False)
    plain = train(replace(run, losses=(Supervised(weight=0.9),)), tables={"log": make_log()}, baseline=False)
    heads = [r.bundle.model.state_dict()["heads.task/click.linears.0.weight"] for r in (result, plain)]
    assert heads[0].isfinite().all() and not torch.equal(*heads), "it moved the model"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("gamma", -0.1), ("gamma", math.nan), ("positive_gamma", math.inf), ("least", 0.0), ("least", 1.1)],
)
def test_wrong_parameters(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=f"Parameter `{name}` should be"):
        Exposure(**{name: wrong})


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_of_supervised_that_is_none(wrong: float) -> None:
    with pytest.raises(ValueError, match="Parameter `weight` should be positive. Found "):
        Supervised(weight=wrong)


@pytest.mark.parametrize("by", ["task", "domain", "task@domain"])
def test_the_weight_of_supervised_multiplies_every_objective(by: Any) -> None:
    output, batch = make()
    one, part = (Supervised(by=by, weight=w).bind(SCHEMA)(output, batch, 0) for w in (1.0, 0.25))
    assert part.keys() == one.keys()
    assert all(torch.equal(part[name], loss * 0.25) for name, loss in one.items())
