"""Calibrators of a bundle: which rows they serve, what they read, and that everything after the model uses them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.special import expit
from toylog import make_log, make_run
from typer.testing import CliRunner

from unbraid import store
from unbraid.bundle import CALIBRATION, Bundle, BundleError
from unbraid.calibrate import calibrate, method_of, remove_from
from unbraid.calibration.scaling import Temperature
from unbraid.calibration.transcal import TransCal
from unbraid.cli.main import app
from unbraid.config import RunError
from unbraid.job import evaluate_bundle, train
from unbraid.predictor import Predictor, with_uncertainty
from unbraid.selection.entropy import TargetEntropy
from unbraid.types import Task
from unbraid.uncertainty.ensemble import Ensemble
from unbraid.uncertainty.explore import UCB

LOG = make_log(rows=1500)
TABLES = {"log": LOG}
PLATT = Temperature(intercept=True)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return train(make_run(), tables=TABLES, baseline=False).bundle


def scores_of(bundle: Bundle, **options: bool) -> dict[str, np.ndarray]:
    return dict(Predictor(bundle, **options).split_scores("test", TABLES).logits)  # type: ignore[arg-type]


def test_after_platt_the_mean_prediction_of_the_held_out_rows_is_their_mean_label(bundle: Bundle) -> None:
    after, changes, _ = calibrate(bundle, PLATT, tables=TABLES)
    assert [change.task for change in changes] == ["click", "buy"]
    found = Predictor(after).split_scores("valid", TABLES)
    for task in ("click", "buy"):
        known = found.observed[task]
        assert expit(found.logits[task][known]).mean() == pytest.approx(found.labels[task][known].mean(), rel=1e-6)
    assert bundle.calibrators is None, "the given bundle stays"


def test_everything_after_the_model_uses_it_and_raw_does_not(bundle: Bundle) -> None:
    after, changes, _ = calibrate(bundle, PLATT, tasks=["click"], tables=TABLES)
    a, b = changes[0].numbers["slope"], changes[0].numbers["intercept"]
    before, now = scores_of(bundle), scores_of(after)
    np.testing.assert_allclose(now["click"], a * before["click"].astype(float) + b, rtol=1e-9)
    assert np.array_equal(now["buy"], before["buy"]), "only the task that was asked for"
    assert np.array_equal(scores_of(after, raw=True)["click"], before["click"])
    frame, plain = (Predictor(one).predict(LOG, TABLES) for one in (after, bundle))
    z = np.log(plain["click"] / (1 - plain["click"])).to_numpy()
    np.testing.assert_allclose(frame["click"], expit(a * z + b), rtol=1e-6)
    measured = evaluate_bundle(after, tables=TABLES)["click"]
    assert measured["logloss"]["value"] == pytest.approx(changes[0].labels["logloss"][1], rel=1e-9)
    raw = evaluate_bundle(after, tables=TABLES, raw=True)["click"]
    assert raw["logloss"]["value"] == pytest.approx(changes[0].labels["logloss"][0], rel=1e-9)
    assert raw["auc"]["value"] == pytest.approx(measured["auc"]["value"], abs=1e-12)


def test_a_domains_calibrator_serves_its_rows_alone_and_before_the_general_one(bundle: Bundle) -> None:
    general, changes, _ = calibrate(bundle, PLATT, tasks=["click"], tables=TABLES)
    both, own, _ = calibrate(general, TransCal(), tasks=["click"], domain="search", tables=TABLES)
    assert len(both.calibrators.kept) == 2 and both.calibrators.kept[1].domain == "search"
    scored = Predictor(both, raw=True).split_scores("test", TABLES)
    z, now = scored.logits["click"].astype(float), scores_of(both)["click"]
    here = scored.domain == scored.domains.index("search")
    assert 0 < here.sum() < len(here)
    np.testing.assert_allclose(now[here], own[0].numbers["slope"] * z[here] + own[0].numbers["intercept"], rtol=1e-9)
    np.testing.assert_allclose(
        now[~here], changes[0].numbers["slope"] * z[~here] + changes[0].numbers["intercept"], rtol=1e-9
    )


def test_a_domains_own_labels_are_not_read(bundle: Bundle) -> None:
    """The domain's labels are shuffled in every split: the calibrator is bit-equal.  Its target is the domain's test rows."""
    _, before, _ = calibrate(bundle, TransCal(), tasks=["click"], domain="search", tables=TABLES)
    noise = pl.Series(np.random.default_rng(0).permutation(LOG["click"].to_numpy()))
    other = LOG.with_columns(label=pl.when(LOG["site"] == "search").then(noise).otherwise(LOG["click"]))
    own = replace(bundle.run.data, tasks=(Task("click", column="label"), Task("buy")))  # events keep the true clicks
    fitted = replace(bundle.fitted, schema=replace(bundle.fitted.schema, tasks=own.tasks))
    moved = replace(bundle, run=replace(bundle.run, data=own), fitted=fitted)
    _, after, _ = calibrate(moved, TransCal(), tasks=["click"], domain="search", tables={"log": other})
    assert dict(after[0].numbers) == dict(before[0].numbers) and after[0].labels != before[0].labels


def test_target_rows_of_a_frame_without_labels(bundle: Bundle) -> None:
    rows = LOG.filter(pl.col("time") >= 800 * 10**6).drop("click", "buy")
    after, changes, _ = calibrate(bundle, TransCal(), target=rows, tables=TABLES)
    assert after.calibrators.kept[0].target == "rows" and changes[0].labels == {}
    same, _, _ = calibrate(bundle, TransCal(), tables=TABLES)
    np.testing.assert_allclose(
        [one.calibration.map.intercept for one in after.calibrators.kept],
        [one.calibration.map.intercept for one in same.calibrators.kept], rtol=1e-6,
    )  # fmt: skip
    assert expit(Predictor(after).scores(rows, TABLES).logits["click"]).mean() == pytest.approx(
        changes[0].numbers["estimated rate"]
    )


def test_a_domain_that_training_never_saw(bundle: Bundle) -> None:
    """Rows of a new site: the calibrator serves rows of unknown domains, and no other."""
    new = LOG.head(400).with_columns(site=pl.lit("app")).drop("click", "buy")
    after, changes, _ = calibrate(bundle, TransCal(), target=new, domain="(unknown)", tasks=["click"], tables=TABLES)
    found = Predictor(after).scores(new, TABLES).logits["click"]
    assert expit(found).mean() == pytest.approx(changes[0].numbers["estimated rate"], rel=1e-9)
    assert np.array_equal(scores_of(after)["click"], scores_of(bundle)["click"])


def test_exploration_goes_the_same_way(bundle: Bundle) -> None:
    sure = with_uncertainty(bundle, tables=TABLES)
    after, changes, _ = calibrate(sure, PLATT, tasks=["click"], tables=TABLES)
    plain = Predictor(sure).predict(LOG, TABLES, explore=UCB(1.0))
    found = Predictor(after).predict(LOG, TABLES, explore=UCB(1.0))
    assert np.array_equal(plain["click_sd"], found["click_sd"])
    z = np.log(plain["click_explore"] / (1 - plain["click_explore"])).to_numpy()
    want = expit(changes[0].numbers["slope"] * z + changes[0].numbers["intercept"])
    np.testing.assert_allclose(found["click_explore"], want, rtol=1e-6)


def test_an_ensemble_averages_calibrated_logits(bundle: Bundle) -> None:
    other = train(replace(make_run(), seed=1), tables=TABLES, baseline=False).bundle
    after, _, _ = calibrate(bundle, PLATT, tasks=["click"], tables=TABLES)
    found = Ensemble([after, other]).scores(LOG, TABLES).logits["click"]
    each = [Predictor(one).scores(LOG, TABLES).logits["click"].astype(float) for one in (after, other)]
    np.testing.assert_allclose(found, np.mean(each, 0), rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------ refusals
def test_validation_rows_that_trained_the_model_are_refused(bundle: Bundle) -> None:
    online = replace(bundle, run=replace(bundle.run, schedule=method_online()))
    with pytest.raises(BundleError, match="Schedule `online` trained on the validation rows.*`--held-out`"):
        calibrate(online, PLATT, tables=TABLES)
    _, changes, _ = calibrate(online, PLATT, held_out=LOG.filter(pl.col("time") > 700 * 10**6), tables=TABLES)
    assert len(changes) == 2


def method_online() -> object:
    from unbraid.schedules.online import Online

    return Online()


def test_early_stopping_is_said(bundle: Bundle) -> None:
    stopped = replace(bundle, run=replace(bundle.run, training=replace(bundle.run.training, patience=2)))
    assert "early stopping chose" in calibrate(stopped, PLATT, tables=TABLES)[2][0]
    assert calibrate(bundle, PLATT, tables=TABLES)[2] == []
    chosen = replace(stopped, run=replace(stopped.run, selection=TargetEntropy()))
    assert "selection `entropy` chose the weights" in calibrate(chosen, PLATT, tables=TABLES)[2][0]


def test_tasks_that_cannot_be(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="There is no domain `shop`. Domains: .*search"):
        calibrate(bundle, PLATT, domain="shop", tables=TABLES)
    with pytest.raises(ValueError, match="There is no task `cart`"):
        calibrate(bundle, PLATT, tasks=["cart"], tables=TABLES)
    with pytest.raises(ValueError, match="No task can be calibrated. Task `click` is binary"):
        calibrate(bundle, method_of("vector"), tables=TABLES)
    with pytest.raises(RunError, match="`transcal` has no `powr`. Allowed: solver, power"):
        method_of("transcal", ["powr=1"])
    with pytest.raises(RunError, match="should look like"):
        method_of("transcal", ["power"])
    with pytest.raises(RunError, match=r"of power=2: .*`power` should lie in \[0, 1\]. Found 2"):
        method_of("transcal", ["power=2"])
    with pytest.raises(RunError, match="There is no calibrator `oracle`. Calibrators: temperature, vector"):
        method_of("oracle")
    assert method_of("transcal", ["power=0.25", "slope=true"]) == TransCal(power=0.25, slope=True)


# --------------------------------------------------------------------------------------------------- disk, command line
@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    LOG.write_parquet(data / "log.parquet")
    run = make_run()
    run = replace(run, data=replace(run.data, folder=str(data), rows="log.parquet"))
    train(run, tmp_path / "run", baseline=False)
    return tmp_path / "run"


def test_the_command_writes_checks_and_removes(folder: Path) -> None:
    out, runner = folder.parent / "scored.parquet", CliRunner()
    rows = folder.parent / "data" / "log.parquet"

    def call(*words: str) -> str:
        done = runner.invoke(app, list(words))
        assert done.exit_code == 0, done.output
        return done.output

    def click() -> np.ndarray:
        call("predict", str(folder), str(rows), "--out", str(out))
        return pl.read_parquet(out)["predicted_click"].to_numpy()

    plain = click()
    said = call("calibrate", str(folder), "--domain", "search", "--task", "click")
    assert "before" in said and "which no fit has read" in said and "estimated rate" in said
    call("calibrate", str(folder), "--method", "temperature", "--set", "intercept=true")
    now = click()
    assert not np.allclose(now, plain)
    call("predict", str(folder), str(rows), "--out", str(out), "--raw")
    np.testing.assert_array_equal(pl.read_parquet(out)["predicted_click"].to_numpy(), plain)
    measured = json.loads(call("evaluate", str(folder), "--json"))["test"]["click"]["ece_mass"]["value"]
    assert 0 <= measured < 1
    loaded = Bundle.load(folder)
    assert {(one.task, one.domain) for one in loaded.calibrators.kept} == {
        ("click", "search"),
        ("click", ""),
        ("buy", ""),
    }
    assert loaded.calibrators.kept[0].method["kind"] == "transcal"
    assert "2 calibrators left" in call("calibrate", str(folder), "--remove", "--domain", "search")
    with pytest.raises(BundleError, match=r"no such calibrator to remove. Found click \(all\), buy \(all\)"):
        remove_from(folder, ("spend",))
    call("calibrate", str(folder), "--remove")
    np.testing.assert_array_equal(click(), plain)
    assert not (folder / CALIBRATION).exists()
    done = runner.invoke(app, ["calibrate", str(folder), "--method", "oracle"])
    assert done.exit_code == 2 and "transcal" in done.output


def test_calibrators_of_other_weights_are_refused(folder: Path) -> None:
    after, changes, _ = calibrate(Bundle.load(folder), PLATT)
    after.save(folder)
    assert Bundle.load(folder).calibrators.kept[0].calibration.numbers == changes[0].numbers
    store.save(folder / CALIBRATION, dataclasses.replace(after.calibrators, digest="0").state_dict())
    with pytest.raises(BundleError, match="belong to other weights than the model's.*--remove"):
        Bundle.load(folder)
    assert remove_from(folder) == 0
    replace(Bundle.load(folder), calibrators=None).save(folder)
    store.save(folder / CALIBRATION, {"digest": "1"})
    with pytest.raises(BundleError, match="calibrators should be what `unbraid calibrate` wrote"):
        Bundle.load(folder)
