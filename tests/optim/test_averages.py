"""Averages of weights: printed numbers, sums over all iterates, lazy tables, resumption, running statistics, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optim_kit import Small, batches, train, weights_of
from torch import nn
from toylog import make_data, make_log, make_run

from unbraid import config, store
from unbraid.bundle import build
from unbraid.config import ModelChoice, RunError
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.job import train as train_run
from unbraid.optim.adatask import AdaTask
from unbraid.optim.averaging import MEASURED, Average, Running, remeasure
from unbraid.optim.beta_average import BetaAverage
from unbraid.optim.ema import EMA
from unbraid.optim.joint import Joint
from unbraid.optim.uniform_average import UniformAverage
from unbraid.optim.wise_ft import WiSEFT
from unbraid.preflight import bound_terms
from unbraid.schedules.individual import Individual
from unbraid.towers.ame import AME
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Local, Training, Watcher
from unbraid.types import Output

AVERAGES: list[Average] = [
    BetaAverage(beta=0.1), EMA(decay=0.9), EMA(decay=0.9, warmup=False), UniformAverage(), UniformAverage(start=0.3, every=3),
    WiSEFT(alpha=0.3),
]  # fmt: skip
NAMES = [f"{type(a).__name__}{i}" for i, a in enumerate(AVERAGES)]


def weights_under(shares: np.ndarray) -> np.ndarray:
    """The weight of each iterate in the last mean, which shares amount to."""
    later = np.append(np.cumprod((1 - shares[1:])[::-1])[::-1], 1.0)
    return shares * later


def running(shares: np.ndarray, values: np.ndarray) -> list[float]:
    """The means of a scalar that has these values at steps 0, 1, ..."""
    module = nn.Linear(1, 1, bias=False).double()
    module.weight.data.fill_(values[0])
    mean = Running(module, shares, torch.float64)
    found = [float(mean.means["weight"])]
    for value in values[1:]:
        module.weight.data.fill_(value)
        mean.after(lambda: None)
        found.append(float(mean.means["weight"]))
    return found


# ------------------------------------------------------------------------------------------------------- printed numbers
def test_the_worked_example_of_the_beta_average() -> None:
    average = BetaAverage(beta=0.5)
    np.testing.assert_allclose(average.weights(4), [1.061033, 0.694609, 0.636620, 0.694609, 1.061033], atol=5e-7)
    for beta, shares, means in (
        (0.5, [0.255800, 0.167460, 0.153480, 0.167460, 0.255800], [0, 0.395644, 0.822589, 1.312551, 2.0]),
        (0.1, [0.300151, 0.140010, 0.119677, 0.140010, 0.300151], [0, 0.318089, 0.677633, 1.142241, 2.0]),
        (1.0, [0.2] * 5, [0, 0.5, 1, 1.5, 2]),
        (2.0, [0.105882, 0.247059, 0.294118, 0.247059, 0.105882], None),
    ):
        found = BetaAverage(beta=beta)
        np.testing.assert_allclose(found.weights(4) / found.weights(4).sum(), shares, atol=5e-7)
        np.testing.assert_allclose(weights_under(found.shares(4)), shares, atol=5e-7)
        if means is not None:
            np.testing.assert_allclose(running(found.shares(4), np.arange(5.0)), means, atol=5e-7)


def test_how_much_of_the_beta_average_is_the_start() -> None:
    def normal(beta: float, steps: int) -> np.ndarray:
        found = BetaAverage(beta=beta).weights(steps)
        return found / found.sum()

    assert normal(0.5, 5000)[0] == pytest.approx(0.0064, abs=5e-5)
    assert normal(0.1, 5000)[0] == pytest.approx(0.0625, abs=5e-5)
    assert normal(0.1, 500)[0] == pytest.approx(0.0917, abs=5e-5)
    for beta, first, middle in ((0.5, 0.062, 0.335), (0.1, 0.223, 0.149)):
        found = normal(beta, 5000)
        assert found[:51].sum() == pytest.approx(first, abs=2e-3)
        assert found[1250:3751].sum() == pytest.approx(middle, abs=1e-3)
    for steps, start in ((4, 0.311), (500, 0.122), (5000, 0.095)):  # a beta near 0 is not the mean of the two ends
        assert normal(1e-6, steps)[0] == pytest.approx(start, abs=5e-4)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 3.0, 500.0])
def test_weights_of_the_beta_average_are_symmetric_and_sum_to_one(beta: float) -> None:
    average = BetaAverage(beta=beta)
    np.testing.assert_allclose(average.weights(37), average.weights(37)[::-1], rtol=1e-12)
    found = weights_under(average.shares(37))
    assert found.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found, average.weights(37) / average.weights(37).sum(), atol=1e-12)


def test_shares_of_the_others() -> None:
    np.testing.assert_allclose(EMA(decay=0.9, warmup=False).shares(3), [1, 0.1, 0.1, 0.1])
    np.testing.assert_allclose(EMA(decay=0.7).shares(5), [1, 1 / 2, 1 / 3, 0.3, 0.3, 0.3])
    np.testing.assert_allclose(weights_under(UniformAverage(start=0).shares(4)), [0.2] * 5)
    np.testing.assert_allclose(weights_under(UniformAverage(start=0.5).shares(4)), [0, 0, 1 / 3, 1 / 3, 1 / 3])
    np.testing.assert_allclose(
        weights_under(UniformAverage(start=0.5, every=2).shares(7)), [0, 0, 0, 0, 0.5, 0, 0.5, 0]
    )
    np.testing.assert_allclose(weights_under(WiSEFT(alpha=0.3).shares(4)), [0.7, 0, 0, 0, 0.3])
    assert running(UniformAverage(start=0.5).shares(4), np.arange(5.0)) == [0, 1, 2, 2.5, 3], (
        "until then the last weights"
    )


# ------------------------------------------------------------------------------------------------------------ invariants
@pytest.mark.parametrize("average", AVERAGES, ids=NAMES)
def test_online_is_the_weighted_mean_of_all_iterates(average: Average) -> None:
    steps, generator = 1000, torch.Generator().manual_seed(1)
    path = 1 + torch.cat([torch.zeros(1, 5), torch.randn(steps, 5, generator=generator) * 1e-3]).cumsum(0).double()
    for precision, bound in (("float64", 2e-14), ("float32", 3e-6)):
        module = nn.Linear(5, 1, bias=False).double()
        module.weight.data.copy_(path[0])
        mean = dataclasses.replace(average, precision=precision).begin(module, steps)  # type: ignore[arg-type]
        for theta in path[1:]:
            module.weight.data.copy_(theta)
            mean.after(lambda: None)
        wanted = torch.from_numpy(weights_under(average.shares(steps))) @ path
        assert float((mean.means["weight"].double() - wanted).abs().max()) < bound


def test_constant_weights_stay_and_a_line_gives_its_middle() -> None:
    for average in AVERAGES:
        assert running(average.shares(50), np.full(51, 0.7)) == [0.7] * 51
    line = np.linspace(-1, 3, 51)
    for beta in (0.1, 0.5, 1, 2):
        assert running(BetaAverage(beta=beta).shares(50), line)[-1] == pytest.approx(1.0, abs=1e-12)


def test_one_copy_without_gradients_or_optimiser_state_and_of_trained_parameters_alone() -> None:
    model = Small(lazy=False)
    model.layers["click"].weight.requires_grad_(False)
    update = Joint(lr=0.1).build(model, steps=5, weights={})
    mean = BetaAverage().begin(model, 5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(mean.means) == trained and "layers.click.weight" not in trained
    assert all(not value.requires_grad for value in mean.means.values())
    assert {v.data_ptr() for v in mean.means.values()}.isdisjoint(p.data_ptr() for p in model.parameters())
    train(model, update, batches(5))
    assert set(update.state_dict()["dense"]) <= trained


def test_half_precision_weights_are_averaged_in_float64() -> None:
    """Steps of a quarter of float16's spacing near 1 vanish in a mean of that precision."""
    module = nn.Linear(1, 1, bias=False).half()
    module.weight.data.fill_(1.0)
    mean = BetaAverage(beta=1.0).begin(module, 999)
    for step in range(999):
        module.weight.data.fill_(1.0 if step % 2 else 1.0009765625)
        mean.after(lambda: None)
    assert mean.means["weight"].dtype == torch.float64
    assert float(mean.means["weight"]) == pytest.approx(1 + 0.0009765625 / 2, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- lazy tables
@pytest.mark.parametrize("average", AVERAGES, ids=NAMES)
@pytest.mark.parametrize("update", [Joint, AdaTask])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lazy_tables_have_the_mean_of_all_their_iterates(average: Average, update: Any, decay: float) -> None:
    model = Small(lazy=True)
    step = update(lr=0.05, table_weight_decay=decay).build(model, steps=30, weights={})
    mean = average.begin(model, 30)
    assert bool(mean.lazy) == (decay == 0) and mean.settles == (decay > 0)
    path = [weights_of(model)]
    for at, ids in enumerate(batches(30)):
        output = model(ids)
        mean.before(output.lookups)
        losses = {} if at == 7 else {task: (output.logits[task] - 1).square().mean() for task in ("click", "like")}
        step(losses, output)
        mean.after(step.settle)
        step.settle()  # what dense decay would show
        path.append(weights_of(model))
        if at in (3, 14):  # a look in between changes nothing
            mean.write()
            model.load_state_dict(path[-1])
    mean.write()
    shares = torch.from_numpy(weights_under(average.shares(30)))
    for name, value in model.named_parameters():
        wanted = torch.einsum("t,t...->...", shares, torch.stack([each[name] for each in path]))
        torch.testing.assert_close(value.detach(), wanted, rtol=0, atol=1e-12, msg=name)


def test_the_mean_continues_from_a_file_bit_for_bit(tmp_path: Path) -> None:
    def go(model: Small, update: Any, mean: Running, ids: Any) -> None:
        for batch in ids:
            output = model(batch)
            mean.before(output.lookups)
            update({task: output.logits[task].square().mean() for task in ("click", "like")}, output)
            mean.after(update.settle)

    def made() -> tuple[Small, Any, Running]:
        model = Small(lazy=True)
        return model, Joint(lr=0.1).build(model, steps=12, weights={}), BetaAverage().begin(model, 12)

    whole, half, again = made(), made(), made()
    go(*whole, batches(12))
    go(*half, batches(12)[:5])
    state = {"model": half[0].state_dict(), "update": half[1].state_dict(), "mean": half[2].state_dict()}
    store.save(tmp_path / "state", state)
    state = store.load(tmp_path / "state")
    for part, value in zip(again, state.values(), strict=True):
        part.load_state_dict(value)
    go(*again, batches(12)[5:])
    for one in (whole, again):
        one[2].write()
    assert all(torch.equal(v, again[0].state_dict()[k]) for k, v in whole[0].state_dict().items())
    with pytest.raises(ValueError, match="averages of"):
        again[2].load_state_dict({**state["mean"], "last": {}})


# ----------------------------------------------------------------------------------------------------- running statistics
class Normed(nn.Module):
    """A normalised input, dropout behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen, self.drop = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.frozen.train = lambda mode=True: nn.Module.train(self.frozen, False)  # type: ignore[method-assign, assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.drop(self.norm(x)))


def test_running_statistics_are_means_over_batches_measured_as_in_evaluation() -> None:
    model = Normed().train()
    given = [torch.randn(8, 3) * 2 + 5 for _ in range(6)]
    state = torch.get_rng_state()
    assert remeasure(model, lambda: (x for x in given), 4) == 4  # type: ignore[misc]
    torch.testing.assert_close(model.norm.running_mean, torch.stack(given[:4]).mean((0, 1)))
    torch.testing.assert_close(model.norm.running_var, torch.stack([x.var(0) for x in given[:4]]).mean(0))
    assert torch.equal(torch.get_rng_state(), state), "no dropout is drawn"
    assert not model.frozen.running_mean.any()  # type: ignore[union-attr]
    assert model.norm.momentum == 0.1
    assert model.training and model.norm.training and not model.frozen.training
    many = (x for x in [given[0]] * 1000)
    assert remeasure(model, lambda: many, 1000) == MEASURED  # type: ignore[arg-type, return-value]
    assert remeasure(nn.Linear(1, 1), lambda: pytest.fail("nothing to measure"), 3) == 0


# ------------------------------------------------------------------------------------------------------------ end to end
@dataclasses.dataclass(frozen=True)
class Recording(Joint):
    """The joint update, which writes down settled weights after every step."""

    path: Any = None

    def build(self, model: nn.Module, **more: Any) -> Any:
        update = super().build(model, **more)
        path, call = self.path, update.__call__
        path.append(weights_of(model))

        class Recorder:
            def __getattr__(self, name: str) -> Any:
                return getattr(update, name)

            def __call__(self, losses: Any, output: Output) -> None:
                call(losses, output)
                path.append(weights_of(model))

        return Recorder()


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return Encoded(encode(make_data(cache=str(tmp_path_factory.mktemp("cache"))), tables={"log": make_log()}))


def fitted(
    encoded: Encoded, average: Average | None, *, steps: int = 12, **more: Any
) -> tuple[Any, list[dict], nn.Module]:
    run = make_run(model=ModelChoice(tower=SharedBottom(bottom=(8,), tower=(4,)), tables=Views(width=4, lazy_rows=0)))
    model, path = build(run, encoded.schema), list[dict]()
    training = Training(batch_size=64, evaluate_every=5, **more)
    session = Local(
        encoded,
        bound_terms(run, encoded.schema, model),
        Recording(lr=0.05, path=path),
        training,
        {},
        0,
        average=average,
    )
    session.fit(model, steps)
    return session, path, model


@pytest.mark.parametrize("average", AVERAGES, ids=NAMES)
def test_fit_ends_with_the_mean_and_trains_as_without_it(average: Average, encoded: Encoded) -> None:
    _, path, model = fitted(encoded, average)
    _, plain, last = fitted(encoded, None)
    assert len(path) == len(plain) == 13
    assert all(torch.equal(v, plain[-1][k]) for k, v in path[-1].items()), "the mean does not reach the training"
    shares = torch.from_numpy(weights_under(average.shares(12)))
    for name, value in model.named_parameters():
        wanted = torch.einsum("t,t...->...", shares, torch.stack([each[name].double() for each in path]))
        torch.testing.assert_close(value.detach().double(), wanted, rtol=0, atol=2e-7, msg=name)
        assert torch.equal(last.state_dict()[name], plain[-1][name])


def test_early_stopping_selects_among_averages_that_are_looked_at(encoded: Encoded) -> None:
    _, path, model = fitted(encoded, EMA(decay=0.8), patience=1, steps=200)
    looks = [at for at in range(5, len(path), 5)]
    assert len(path) < 201 and len(looks) >= 2, "it stopped early"
    best = looks[-2]  # patience 1: the look before the last was the best
    shares = torch.from_numpy(weights_under(EMA(decay=0.8).shares(best)))
    for name, value in model.named_parameters():
        wanted = torch.einsum("t,t...->...", shares, torch.stack([each[name].double() for each in path[: best + 1]]))
        torch.testing.assert_close(value.detach().double(), wanted, rtol=0, atol=2e-7, msg=name)


def test_an_average_at_the_end_refuses_early_stopping(encoded: Encoded) -> None:
    for average in (BetaAverage(), WiSEFT()):
        with pytest.raises(ValueError, match="Set `patience` to 0"):
            fitted(encoded, average, patience=2)
        with pytest.raises(ValueError, match=f"Average `{average.kind}` needs the whole training"):
            make_run(average=average, training=Training(patience=1))
    with pytest.raises(RunError, match="`patience` to 0"):
        config.override(make_run(average=BetaAverage()), ["training.patience=1"])


class Dies(Watcher):
    """A watcher that kills the run at an evaluation."""

    def evaluated(self, step: int, *rest: Any) -> None:
        if step == 20:
            raise RuntimeError("killed")


@pytest.mark.parametrize("average", [BetaAverage(beta=0.1), EMA(decay=0.9)], ids=["beta", "ema"])
def test_a_resumed_run_has_the_same_average_bit_for_bit(average: Average, tmp_path: Path) -> None:
    several = Views(kind="several", widths=(4, 4), lazy_rows=0)
    model = ModelChoice(tower=AME(expert=(6,), gate=(), tower=(4,), norm="batch", dropout=0.2), tables=several)
    training = Training(batch_size=64, steps=30, evaluate_every=10, checkpoint_seconds=0, checkpoint_steps=5)
    run, tables = make_run(model=model, training=training, average=average), {"log": make_log()}
    whole = train_run(run, tables=tables, baseline=False)
    with pytest.raises(RuntimeError, match="killed"):
        train_run(run, tmp_path / "out", tables=tables, baseline=False, watcher=Dies())
    again = train_run(run, tmp_path / "out", tables=tables, baseline=False, resume=True)
    wanted = whole.bundle.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.bundle.model.state_dict().items())
    assert any("running_mean" in name for name in wanted)
    plain = train_run(dataclasses.replace(run, average=None), tables=tables, baseline=False).bundle.model.state_dict()
    assert not torch.equal(
        plain[next(n for n in plain if "running_var" in n)], wanted[next(n for n in plain if "running_var" in n)]
    )


def test_running_statistics_after_averaging_are_those_of_the_averaged_weights(encoded: Encoded) -> None:
    several = Views(kind="several", widths=(4, 4))
    run = make_run(model=ModelChoice(tower=AME(expert=(6,), gate=(), tower=(4,), norm="batch"), tables=several))
    model = build(run, encoded.schema)
    terms = bound_terms(run, encoded.schema, model)
    session = Local(encoded, terms, Joint(lr=0.05), Training(batch_size=64), {}, 0, average=BetaAverage())
    session.fit(model, 20)
    first = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    seen: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean(0)))
    rows = session.rows("train")
    with torch.no_grad():
        model.eval()(encoded.batch(rows))
    torch.testing.assert_close(first.running_mean, seen[0], rtol=0.05, atol=0.02)


def test_every_call_of_a_schedule_averages_by_itself(encoded: Encoded) -> None:
    run = make_run(schedule=Individual(by="domain"), average=WiSEFT(alpha=0.0))
    start = build(run, encoded.schema).state_dict()
    trained = train_run(run, tables={"log": make_log()}, baseline=False).bundle.model.state_dict()
    assert len(trained) == 3 * len(start)
    for name, value in trained.items():  # alpha 0: what each began with
        assert torch.equal(value, next(v for k, v in start.items() if name.endswith(f".{k}"))), name


def test_a_run_file_names_an_average() -> None:
    run = config.from_dict(config.to_dict(make_run(average=EMA(decay=0.5))))
    assert run.average == EMA(decay=0.5)
    assert config.override(run, ["average.kind=beta", "average.beta=0.1"]).average == BetaAverage(beta=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BetaAverage(beta=0), "`beta`"), (lambda: EMA(decay=1), "`decay`"), (lambda: WiSEFT(alpha=1.5), "`alpha`"),
        (lambda: UniformAverage(start=1), "`start`"), (lambda: UniformAverage(every=0), "`every`"),
    ],
)  # fmt: skip
def test_values_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
