"""Draws and bounds, their laws and what they share; predictors and ensembles; the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from toylog import make_data, make_log, make_run
from typer.testing import CliRunner

from unbraid import config
from unbraid.bundle import Bundle
from unbraid.cli.main import app
from unbraid.heads import Heads
from unbraid.job import train
from unbraid.predictor import Predictor, with_uncertainty
from unbraid.train import Training
from unbraid.types import Scores, Task
from unbraid.uncertainty.ensemble import Ensemble
from unbraid.uncertainty.explore import UCB, Belief, Thompson, requests, sigmoid
from unbraid.uncertainty.last_layer import UncertaintyError

LOG = {"log": make_log()}
DRAWS = 5000
ROWS = LOG["log"].tail(60)


def belief(n: int = 6, rank: int = 3, heads: int = 1) -> Belief:
    rng = np.random.default_rng(0)
    return Belief(rng.normal(size=n), rng.normal(size=(n, rank)), np.arange(n) % heads)


def draws(policy: Thompson, of: Belief, request: Any, count: int = DRAWS) -> np.ndarray:
    return np.stack([policy(of, np.asarray(request)) for _ in range(count)])


# ---------------------------------------------------------------------------------------------------------------- laws
def within(found: np.ndarray, want: np.ndarray, errors: float = 5.0, count: int = DRAWS) -> None:
    """Moments of draws, within so many standard errors (their variance bounded by twice the largest variance's square)."""
    assert np.abs(found - want).max() < errors * np.sqrt(2 / count) * max(1.0, np.abs(want).max())


def test_one_draw_of_a_call_has_the_posteriors_law() -> None:
    of = belief()
    found = draws(Thompson(0, share="call"), of, np.arange(6))
    within(found.mean(0), of.mean)
    within(np.cov(found.T), of.root @ of.root.T)


def test_rows_drawn_alone_are_independent_and_of_equal_variance() -> None:
    of = belief()
    found = draws(Thompson(0, share="row"), of, np.zeros(6, np.int64))
    within(found.mean(0), of.mean)
    within(np.cov(found.T), np.diag(of.variance))


def test_a_request_shares_a_draw_and_heads_do_not() -> None:
    of = belief(heads=2)
    request = np.array([7, 7, 7, 7, -3, -3])
    found = np.cov(draws(Thompson(0), of, request).T)
    same = (request[:, None] == request) & (of.head[:, None] == of.head)
    within(found, np.where(same, of.root @ of.root.T, 0.0))
    assert same.sum() == 10


def test_scale_and_beta() -> None:
    of, request = belief(), np.zeros(6, np.int64)
    one, three = Thompson(5)(of, request) - of.mean, Thompson(5, scale=3.0)(of, request) - of.mean
    np.testing.assert_allclose(three, 3 * one, rtol=1e-12)
    rows = [Thompson(5, scale=s, share="row")(of, request) - of.mean for s in (1.0, 3.0)]
    np.testing.assert_allclose(rows[1], 3 * rows[0], rtol=1e-12)
    assert np.array_equal(Thompson(5, scale=0.0)(of, request), of.mean)
    np.testing.assert_allclose(UCB(1.5)(of, request), of.mean + 1.5 * np.sqrt((of.root**2).sum(1)), rtol=1e-12)
    assert np.array_equal(UCB(0.0)(of, request), of.mean)
    for share in ("request", "row", "call"):
        assert (
            len(
                Thompson(0, share=share)(
                    Belief(np.zeros(0), np.zeros((0, 3)), np.zeros(0, np.int64)), np.zeros(0, np.int64)
                )
            )
            == 0
        )  # type: ignore[arg-type]


def test_a_seed_repeats_and_calls_differ() -> None:
    of, request = belief(), np.zeros(6, np.int64)
    one, again = Thompson(3), Thompson(3)
    first = one(of, request)
    assert np.array_equal(first, again(of, request))
    second = one(of, request)
    assert not np.array_equal(first, second) and np.array_equal(second, again(of, request))
    assert not np.array_equal(first, Thompson(4)(of, request))
    assert not np.array_equal(Thompson()(of, request), Thompson()(of, request))


def test_the_expected_probability() -> None:
    of = belief(200, 2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z = of.mean[:, None] + np.sqrt(of.variance)[:, None] * nodes
    exact = (sigmoid(z) * weights).sum(1) / weights.sum()
    assert np.abs(of.expected() - exact).max() < 0.02
    assert np.abs(sigmoid(of.mean) - exact).max() > 0.05, "the plain prediction is another"
    certain = replace(of, root=0 * of.root)
    assert np.array_equal(certain.expected(), sigmoid(of.mean))


def test_wrong_parameters_are_named() -> None:
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="`scale` should be finite"):
            Thompson(scale=wrong)
        with pytest.raises(ValueError, match="`beta` should be finite"):
            UCB(wrong)
    with pytest.raises(ValueError, match="`share` should be request, row or call. Found rows"):
        Thompson(share="rows")  # type: ignore[arg-type]


def test_what_competes() -> None:
    n = np.arange(6)
    scores = Scores({}, {}, {}, {}, n, None, np.array([1, 1, 2, 2, 1, 1]), n)
    assert len(set(requests(scores))) == 1, "without requests all rows of a call"
    codes = requests(replace(scores, meta={"request": np.array([5, 5, 5, 6, -1, -1])}))
    assert codes[0] == codes[1] and len(set(codes.tolist())) == 5, "users and requests; rows of no request are alone"


# ---------------------------------------------------------------------------------------------------------- a predictor
TASKS = (
    Task("click"), Task("buy"), Task("spend", kind="real"), Task("size", kind="multiclass", role="auxiliary"),
)  # fmt: skip


def run(seed: int = 0, by: Any = "task", **data: Any) -> config.Run:
    made = make_run(data=make_data(**{"tasks": TASKS, **data}), seed=seed)
    return replace(made, model=replace(made.model, heads=Heads(by=by)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: Any) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNBRAID_CACHE", str(tmp_path_factory.mktemp("cache")))
        return with_uncertainty(train(run(by="domain"), tables=LOG, baseline=False).bundle, tables=LOG)


def test_plain_predictions_stay_what_they_are(bundle: Bundle) -> None:
    predictor = Predictor(bundle)
    plain = predictor.predict(ROWS, LOG)
    assert plain.columns == ["click", "buy", "spend", "size"]
    unsure = predictor.predict(ROWS, LOG, uncertainty=True)
    assert unsure.columns == [*plain.columns, "click_sd", "buy_sd", "spend_sd"]
    for explore in (Thompson(0), UCB()):
        found = predictor.predict(ROWS, LOG, explore=explore)
        names = [f"{task}_{part}" for task in ("click", "buy", "spend") for part in ("sd", "explore")]
        assert found.columns == [*plain.columns, *names]
        assert found.select(plain.columns).equals(plain) and found.select(unsure.columns).equals(unsure)


def test_columns_are_the_beliefs(bundle: Bundle) -> None:
    predictor = Predictor(bundle)
    scores, beliefs = predictor.beliefs(ROWS, LOG)
    found = predictor.predict(ROWS, LOG, explore=UCB(1.5))
    for task, of in beliefs.items():
        sd = found[f"{task}_sd"].to_numpy()
        np.testing.assert_array_equal(of.head, scores.domain)
        assert np.array_equal(sd, np.sqrt(of.variance)) and (sd > 0).all()
        logit = scores.logits[task].astype(float) + 1.5 * sd
        want = logit if task == "spend" else 1 / (1 + np.exp(-logit))
        np.testing.assert_allclose(found[f"{task}_explore"], want, rtol=1e-12)
        assert (found[f"{task}_explore"] > found[task]).all()
    one, two = (predictor.predict(ROWS, LOG, explore=Thompson(7)) for _ in range(2))
    assert one.equals(two) and not one.equals(predictor.predict(ROWS, LOG, explore=Thompson(8)))


def test_an_unknown_domain_is_less_sure(bundle: Bundle) -> None:
    strange = ROWS.with_columns(site=pl.lit("nowhere"))
    known, unknown = (
        Predictor(bundle).predict(r, LOG, uncertainty=True)["click_sd"].to_numpy() for r in (ROWS, strange)
    )
    assert (unknown > known).all()


def test_requests_share_their_draw(tmp_path: Path) -> None:
    log = make_log().with_columns(request=pl.int_range(pl.len()) // 4)
    made = with_uncertainty(
        train(run(request="request"), tables={"log": log}, baseline=False).bundle, tables={"log": log}
    )
    row, numbers = log.tail(1), pl.Series([5, 5, 99999, None, None])
    several = pl.concat([row] * 5).with_columns(request=numbers)
    chosen = Predictor(made).predict(several, {"log": log}, explore=Thompson(0))["click_explore"].to_list()
    assert chosen[0] == chosen[1] and len(set(chosen)) == 4, "rows of no request are alone"
    other = pl.concat([row] * 2).with_columns(request=5, user=pl.Series([1, 2]))
    assert len(set(requests(Predictor(made).scores(other, {"log": log})))) == 2, "requests nest in users"


def test_requests_without_users() -> None:
    log = make_log().with_columns(request=pl.int_range(pl.len()) // 4)
    nobody = run(request="request", user="", histories=(), events=(), fields=())
    done = train(nobody, tables={"log": log}, baseline=False)
    assert done.metrics["test"]["click"]["ndcg@5"]["value"] is not None
    assert done.metrics["test"]["click"]["ndcg@5"]["low"] < done.metrics["test"]["click"]["ndcg@5"]["high"]
    made = with_uncertainty(done.bundle, tables={"log": log})
    several = pl.concat([log.tail(1)] * 5).with_columns(request=pl.Series([5, 5, 6, None, None]))
    chosen = Predictor(made).predict(several, {"log": log}, explore=Thompson(0))["click_explore"].to_list()
    assert chosen[0] == chosen[1] and len(set(chosen)) == 4


def test_without_uncertainty_the_command_is_named() -> None:
    plain = train(run(), tables=LOG, baseline=False).bundle
    for options in ({"uncertainty": True}, {"explore": UCB()}):
        with pytest.raises(UncertaintyError, match="holds no uncertainty. Make it .* `unbraid uncertainty BUNDLE`"):
            Predictor(plain).predict(ROWS, LOG, **options)  # type: ignore[arg-type]


def test_a_task_of_the_columns_name_is_named() -> None:
    tasks = (Task("click"), Task("click_sd", column="buy"))
    made = with_uncertainty(train(run(tasks=tasks), tables=LOG, baseline=False).bundle, tables=LOG)
    with pytest.raises(UncertaintyError, match="Column click_sd would be a task's and an uncertainty's"):
        Predictor(made).predict(ROWS, LOG, uncertainty=True)


# ----------------------------------------------------------------------------------------------------------- an ensemble
def test_an_ensemble_is_the_moments_of_its_members() -> None:
    members = [Predictor(train(run(seed), tables=LOG, baseline=False).bundle) for seed in range(3)]
    ensemble = Ensemble(members)
    logits = np.stack([m.scores(ROWS, LOG).logits["buy"].astype(float) for m in members])
    scores, beliefs = ensemble.beliefs(ROWS, LOG)
    np.testing.assert_allclose(scores.logits["buy"], logits.mean(0), rtol=1e-12)
    np.testing.assert_allclose(beliefs["buy"].variance, logits.var(0, ddof=1), rtol=1e-10)
    np.testing.assert_allclose(beliefs["buy"].root @ beliefs["buy"].root.T, np.cov(logits.T), rtol=1e-8, atol=1e-12)
    assert set(beliefs) == {"click", "buy", "spend"}
    plain, found = ensemble.predict(ROWS, LOG), ensemble.predict(ROWS, LOG, explore=Thompson(0))
    assert plain.columns == ["click", "buy", "spend", "size"] and found.select(plain.columns).equals(plain)
    np.testing.assert_allclose(plain["buy"], 1 / (1 + np.exp(-logits.mean(0))), rtol=1e-12)
    assert found.columns[4:8] == ["click_sd", "click_explore", "buy_sd", "buy_explore"]
    assert np.array_equal(ensemble.predict(ROWS, LOG, uncertainty=True)["buy_sd"], found["buy_sd"])
    again = train(
        run(1), tables=LOG, baseline=False
    ).bundle  # other objects, the same weights: no disagreement is no certainty
    with pytest.raises(UncertaintyError, match=r"Number 1 and number 3 .* the same weights.*`--seed`"):
        Ensemble([*members, again])


def test_ensembles_that_make_no_sense_are_refused() -> None:
    one = train(run(), tables=LOG, baseline=False).bundle
    with pytest.raises(UncertaintyError, match="at least two models. Found 1"):
        Ensemble([one])
    other = train(run(tasks=TASKS[:2]), tables=LOG, baseline=False).bundle
    with pytest.raises(UncertaintyError, match="the same tasks. Number 0 has .* number 2 "):
        Ensemble([one, one, other])
    swapped = run(tasks=(Task("click", column="buy"), Task("buy", column="click")))
    given = run(tasks=(Task("click"), Task("buy", given="click")))
    plain = train(run(tasks=TASKS[:2]), tables=LOG, baseline=False).bundle
    for strange, what in ((swapped, "label buy"), (given, "given click")):
        with pytest.raises(UncertaintyError, match=f"the same tasks. .* number 1 .*{what}"):
            Ensemble([plain, train(strange, tables=LOG, baseline=False).bundle])
    made = replace(run(tasks=(replace(TASKS[3], role="target"),)), training=Training(steps=2, metric="accuracy"))
    classes = train(made, tables=LOG, baseline=False).bundle
    with pytest.raises(UncertaintyError, match="for binary and real tasks"):
        Ensemble([classes, classes])


# ------------------------------------------------------------------------------------------------------ the command line
def call(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A log, and bundles `a` and `b` of two seeds."""
    LOG["log"].write_parquet(tmp_path / "log.parquet")
    (tmp_path / "run.toml").write_text(config.dumps(make_run()).replace('rows = "log"', 'rows = "log.parquet"'))
    for name, seed in (("a", 0), ("b", 1)):
        done = call("train", tmp_path / "run.toml", "--out", tmp_path / name, "--seed", seed, "--no-baseline")
        assert done.exit_code == 0, done.output
    return tmp_path


def test_the_commands(here: Path) -> None:
    def predict(*options: Any) -> tuple[pl.DataFrame, str]:
        done = call("predict", here / "a", here / "log.parquet", "--out", here / "p.parquet", *options)
        assert done.exit_code == 0, done.output
        return pl.read_parquet(here / "p.parquet"), done.stdout

    def fails(*options: Any) -> str:
        done = call("predict", here / "a", here / "log.parquet", "--out", here / "p.parquet", *options)
        assert done.exit_code == 2 and "Traceback" not in done.output
        return " ".join(done.stderr.split())

    plain, said = predict()
    assert "seed" not in said
    assert "`unbraid uncertainty BUNDLE`" in fails("--uncertainty")
    done = call("uncertainty", here / "a", "--prior", 2)
    assert done.exit_code == 0 and "uncertainty.safetensors: observed rows click 3" in done.stdout, done.output
    saved = Bundle.load(here / "a").uncertainty
    assert saved is not None and saved.tasks["click"].prior == 2.0
    assert predict()[0].equals(plain)
    unsure, _ = predict("--uncertainty")
    assert unsure.columns == [*plain.columns, "predicted_click_sd", "predicted_buy_sd"]
    drawn, said = predict("--explore", "thompson", "--seed", 5)
    assert said.strip().endswith("600 rows, tasks click, buy, seed 5") and drawn.select(plain.columns).equals(plain)
    assert "predicted_buy_explore" in drawn.columns and drawn.equals(predict("--explore", "thompson", "--seed", 5)[0])
    assert not drawn.equals(predict("--explore", "thompson", "--seed", 5, "--share", "row")[0])
    assert not drawn.equals(predict("--explore", "thompson", "--seed", 5, "--strength", 2)[0])
    seeds = {predict("--explore", "thompson")[1].split()[-1] for _ in range(2)}
    assert len(seeds) == 2, "another seed every time"
    bound, two, one = (predict("--explore", "ucb", *more)[0] for more in ((), ("--strength", 2), ("--strength", 1)))
    assert bound.equals(two) and not bound.equals(one)
    assert (bound["predicted_click_explore"] > bound["predicted_click"]).all()
    both, _ = predict("--uncertainty", "--with", here / "b")
    assert both.columns == unsure.columns and not both.equals(unsure)
    assert "--explore should be thompson or ucb. Found greedy" in fails("--explore", "greedy")
    assert "--share should be one of request, row, call. Found user" in fails(
        "--explore", "thompson", "--share", "user"
    )
    for option, value in (("--strength", 1), ("--seed", 1), ("--share", "row")):
        assert f"{option}: it is for --explore, which is not given" in fails(option, value)
        if option != "--strength":
            assert f"{option}: --explore ucb does not read it" in fails("--explore", "ucb", option, value)
    assert "--strength should be finite and not negative. Found -1" in fails("--explore", "ucb", "--strength", -1)
    bad = call("uncertainty", here / "a", "--prior", 0)
    assert bad.exit_code == 2 and "`prior` should be positive" in bad.stderr
    assert "trained on" not in call("evaluate", here / "b", "--split", "valid").stderr
    stream = (here / "run.toml", "--out", here / "c", "--no-baseline", "--set", "schedule.kind=online")
    assert (done := call("train", *stream)).exit_code == 0, done.output
    said = {split: call("evaluate", here / "c", "--split", split).stderr for split in ("train", "valid", "test")}
    assert "! schedule online trained on the valid rows, too" in said["valid"]
    assert "trained on" not in said["train"] + said["test"]
    again = call("train", here / "run.toml", "--out", here / "a", "--overwrite", "--no-baseline")
    assert again.exit_code == 0 and not (here / "a" / "uncertainty.safetensors").exists()
