"""The last layer's posterior: the sums against loops, what they may not depend on, and how it shrinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid import store
from unbraid.bundle import Bundle, BundleError, build, trained_splits
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.heads import Heads
from unbraid.job import train
from unbraid.losses.ranking import Ranking
from unbraid.losses.supervised import Supervised
from unbraid.predictor import Predictor, with_uncertainty
from unbraid.run_folder import clear
from unbraid.schedules.online import Online
from unbraid.train import Training, predict
from unbraid.types import Schema, Task
from unbraid.uncertainty.last_layer import LastLayer, Linear, Logistic, UncertaintyError, fit, posterior

LOG = {"log": make_log()}


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def rows(n: int = 40, width: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden vectors, probabilities, weights."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)), rng.uniform(0.05, 0.95, n), rng.uniform(0.5, 3, n)


# ------------------------------------------------------------------------------------------------------- against loops
def test_a_binary_posterior_is_the_sum_over_rows() -> None:
    hidden, p, weight = rows()
    got = Logistic(np.zeros((1, 4)), prior=0.3)
    got.update(hidden, p, weight)
    want = [[0.3 * (i == j) for j in range(4)] for i in range(4)]
    for h, q, w in zip(hidden, p, weight, strict=True):
        x = [*h, 1.0]
        for i in range(4):
            for j in range(4):
                want[i][j] += w * q * (1 - q) * x[i] * x[j]
    close(got.precision()[0], want)
    new = np.random.default_rng(1).normal(size=(5, 3))
    inverse = np.linalg.inv(np.array(want))
    close(got.variance(new), [np.array([*h, 1.0]) @ inverse @ np.array([*h, 1.0]) for h in new])
    close(got.roots(new) @ got.roots(new).T, np.c_[new, np.ones(5)] @ inverse @ np.c_[new, np.ones(5)].T)
    assert got.rows.tolist() == [40]


def test_a_real_posterior_is_that_of_a_linear_regression() -> None:
    hidden, _, weight = rows()
    residual = np.random.default_rng(2).normal(size=40)
    got = Linear(np.zeros((1, 4)), prior=2.0)
    assert got.noise == 1.0, "before any row"
    got.update(hidden, residual, weight)
    noise = sum(w * r * r for w, r in zip(weight, residual, strict=True)) / sum(weight)
    close(got.noise, noise)
    x = np.c_[hidden, np.ones(40)]
    want = 2.0 * np.eye(4) + sum(w * np.outer(v, v) for w, v in zip(weight, x, strict=True)) / noise
    close(got.precision()[0], want)
    close(got.variance(hidden), np.einsum("ni,ij,nj->n", x, np.linalg.inv(want), x))


def test_heads_keep_their_own_rows_and_one_without_rows_has_the_prior() -> None:
    hidden, p, weight = rows()
    head = np.arange(40) % 2 * 2  # head 1 sees nothing
    got = Logistic(np.zeros((3, 4)), prior=0.5)
    got.update(hidden, p, weight, head)
    for k in (0, 2):
        alone = Logistic(np.zeros((1, 4)), prior=0.5)
        alone.update(hidden[head == k], p[head == k], weight[head == k])
        close(got.variance(hidden, np.full(40, k)), alone.variance(hidden))
    close(got.variance(hidden, np.full(40, 1)), (np.square(hidden).sum(1) + 1) / 0.5)
    mixed = got.variance(hidden, head)
    close(mixed[head == 2], got.variance(hidden, np.full(40, 2))[head == 2])
    assert got.rows.tolist() == [20, 0, 20]


# ---------------------------------------------------------------------------------------- what it does not depend on
@pytest.mark.parametrize("kind", [Logistic, Linear])
def test_updates_equal_one_fit_in_any_order(kind: Any) -> None:
    hidden, p, weight = rows()
    whole, parts = kind(np.zeros((1, 4))), kind(np.zeros((1, 4)))
    whole.update(hidden, p, weight)
    order = np.random.default_rng(0).permutation(40)
    for part in (order[:1], order[1:2], order[2:30], order[30:]):
        parts.update(hidden[part], p[part], weight[part])
        parts.variance(hidden)  # what it kept must not survive the next update
    close(parts.variance(hidden), whole.variance(hidden))
    close(parts.precision(), whole.precision())


def test_a_weight_of_two_is_two_rows() -> None:
    hidden, p, _ = rows()
    for kind in (Logistic, Linear):
        once, twice = kind(np.zeros((1, 4))), kind(np.zeros((1, 4)))
        once.update(hidden, p, np.full(40, 2.0))
        twice.update(hidden, p)
        twice.update(hidden, p)
        close(once.variance(hidden), twice.variance(hidden))


def test_a_rotation_of_the_hidden_space_changes_nothing() -> None:
    hidden, p, _ = rows()
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    plain, turned = Logistic(np.zeros((1, 4))), Logistic(np.zeros((1, 4)))
    plain.update(hidden, p)
    turned.update(hidden @ turn, p)
    close(plain.variance(hidden), turned.variance(hidden @ turn))


def test_more_rows_never_raise_a_variance() -> None:
    hidden, p, _ = rows(200)
    got, before = Logistic(np.zeros((1, 4))), np.full(200, np.inf)
    for at in range(0, 200, 20):
        got.update(hidden[at : at + 20], p[at : at + 20])
        now = got.variance(hidden)
        assert (now < before * (1 + 1e-12)).all()
        before = now


def test_variance_falls_like_one_over_the_rows() -> None:
    x, counts = np.array([[0.7, -1.2, 0.4]]), 10 ** np.arange(2, 7)
    for kind, value in ((Logistic, 0.3), (Linear, 0.8)):
        found = []
        for n in counts:
            got = kind(np.zeros((1, 4)))
            got.update(x, np.array([value]), np.array([float(n)]))
            found.append(got.variance(x)[0])
        slope = np.polyfit(np.log(counts), np.log(found), 1)[0]
        assert abs(slope + 1) < 0.1, slope
    assert abs(found[-1] * counts[-1] - 0.8**2) < 1e-6, "sigma^2 / n in the end"


# ------------------------------------------------------------------------------------------------------------- extremes
def test_singular_sums_and_huge_vectors_give_no_negative_variance() -> None:
    rng = np.random.default_rng(4)
    flat = rng.normal(size=(50, 1)) * 1e6 * np.ones((1, 8))  # rank 2 with the bias
    got = Logistic(np.zeros((1, 9)), prior=1e-6)
    got.update(flat, np.full(50, 0.5))
    found = got.variance(np.concatenate([flat, rng.normal(size=(50, 8)), np.zeros((1, 8))]))
    assert np.isfinite(found).all() and (found >= 0).all()
    assert found[50:100].min() > 1e4 * found[:50].max(), "what no row spoke about is as unsure as the prior"


def test_a_negative_eigenvalue_is_rounding() -> None:
    got = Logistic(np.zeros((1, 2)), prior=1e-6, information=np.diag([-1e-3, 5.0])[None])
    close(got.variance(np.array([[1.0]])), [1e6 + 1 / (5 + 1e-6)])


def test_huge_logits_tell_nothing() -> None:
    hidden, _, _ = rows()
    got = Logistic(np.zeros((1, 4)))
    got.update_scored(hidden, np.full(40, 1e5), np.ones(40), None, None)
    got.update_scored(hidden, np.full(40, -1e5), np.zeros(40), None, None)
    got.update(hidden, np.ones(40))
    close(got.precision()[0], np.eye(4))
    got.update_scored(hidden[:1], np.array([40.0]), np.ones(1), None, None)  # p rounds to 1, p (1 - p) does not to 0
    x = np.array([*hidden[0], 1.0])
    np.testing.assert_allclose(got.information[0], np.exp(-40.0) * np.outer(x, x), rtol=1e-9, atol=0)


def test_a_real_task_without_residuals_is_finite() -> None:
    got = Linear(np.zeros((1, 4)))
    got.update(rows()[0], np.zeros(40))
    assert got.noise == 1e-12 and np.isfinite(got.variance(rows()[0])).all()


def test_wrong_input_is_named() -> None:
    hidden, p, _ = rows()
    got, real = Logistic(np.zeros((1, 4))), Linear(np.zeros((1, 4)))
    for wrong in (p + 1, -p, p[:5], np.full(40, np.nan)):
        with pytest.raises(ValueError, match="within 0 and 1"):
            got.update(hidden, wrong)
    with pytest.raises(ValueError, match=r"should be \(N, 3\). Found \(40, 2\)"):
        got.update(hidden[:, :2], p)
    for part, weight in ((hidden * np.nan, None), (hidden, np.full(40, -1.0)), (hidden, np.full(40, np.inf))):
        with pytest.raises(ValueError, match="finite"):
            got.update(part, p, weight)
    with pytest.raises(ValueError, match="Residuals should be"):
        real.update(hidden, np.full(40, np.nan))
    assert got.rows.sum() == 0 and not got.information.any() and real.mass == 0
    for prior in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="`prior` should be positive"):
            Logistic(np.zeros((1, 4)), prior)


# ------------------------------------------------------------------------------------------------------ of a whole model
TASKS = (
    Task("click"), Task("buy"), Task("spend", kind="real"), Task("size", kind="multiclass", role="auxiliary"),
)  # fmt: skip


def trained(tmp_path: Any = None, by: Any = "task", **data: Any) -> Bundle:
    run = make_run(data=make_data(**{"tasks": TASKS, **data}), training=Training(batch_size=32, steps=30))
    run = replace(run, model=replace(run.model, heads=Heads(by=by)))
    return train(run, tmp_path, tables=LOG, baseline=False).bundle


@pytest.mark.parametrize("by", ["task", "domain"])
def test_the_training_rows_of_a_model_are_summed(by: str) -> None:
    bundle = trained(by=by)
    found = with_uncertainty(bundle, tables=LOG, prior=0.7).uncertainty
    assert found is not None and bundle.uncertainty is None and set(found.tasks) == {"click", "buy", "spend"}
    encoded = Encoded(encode(bundle.run.data, tables=LOG, fitted=bundle.fitted))
    scores = predict(bundle.model, encoded.in_order(encoded.split("train"), 1000), encoded.schema, hidden=True)
    assert len(scores.row) < 400, "the training rows and no others"
    for name, got in found.tasks.items():
        for k in range(len(got.weights)):
            seen = scores.observed[name] & ((scores.domain == k) if by == "domain" else True)
            x = np.c_[scores.hidden[name].astype(float), np.ones(len(seen))][seen]
            z = scores.logits[name].astype(float)[seen]
            if got.kind == "binary":
                count = np.exp(z) / (1 + np.exp(z)) ** 2
            else:
                known = scores.observed[name]
                count = np.full(
                    len(z), 1 / np.mean((scores.labels[name] - scores.logits[name].astype(float))[known] ** 2)
                )
            want = 0.7 * np.eye(x.shape[1]) + np.einsum("n,ni,nj->ij", count, x, x)
            np.testing.assert_allclose(got.precision()[k], want, rtol=1e-9, atol=1e-9)
            assert got.rows[k] == seen.sum()
    assert int(found.tasks["buy"].rows.sum()) < int(found.tasks["click"].rows.sum()), "only observed rows"


def test_weights_and_rates_of_rows_count() -> None:
    log = make_log()
    sampled = trained(tasks=(Task("click", sampling_rate=0.5),))
    half = with_uncertainty(sampled, tables={"log": log}).uncertainty
    encoded = Encoded(encode(sampled.run.data, tables={"log": log}, fitted=sampled.fitted))
    scores = predict(sampled.model, encoded.in_order(encoded.split("train"), 1000), encoded.schema, hidden=True)
    z = scores.logits["click"].astype(float) - np.log(0.5)
    x = np.c_[scores.hidden["click"].astype(float), np.ones(len(z))]
    assert half is not None
    np.testing.assert_allclose(
        half.tasks["click"].information[0], np.einsum("n,ni,nj->ij", np.exp(z) / (1 + np.exp(z)) ** 2, x, x), rtol=1e-6
    )
    encoded = Encoded(encode(make_data(tasks=(Task("click"),), weight="shop + 0.0"), tables={"log": log}))
    model = build(make_run(), encoded.schema)
    scores = predict(model, encoded.in_order(encoded.split("train"), 1000), encoded.schema, hidden=True)
    got = fit(model, [scores], encoded.schema).tasks["click"]
    z, x = scores.logits["click"].astype(float), np.c_[scores.hidden["click"].astype(float), np.ones(len(scores.row))]
    count = scores.weight * np.exp(z) / (1 + np.exp(z)) ** 2
    close(
        got.information[0],
        np.einsum("n,ni,nj->ij", count, x, x) / scores.weight[scores.weight > 0].astype(float).mean(),
    )
    assert got.rows[0] == (scores.weight > 0).sum() < len(z)
    rated = replace(scores, meta={**scores.meta, "sampling_rate.click": np.full(len(z), 0.25)}, weight=None)
    moved = replace(scores, logits={"click": scores.logits["click"].astype(float) + np.log(4.0)}, weight=None)
    close(
        fit(model, [rated], encoded.schema).tasks["click"].information,
        fit(model, [moved], encoded.schema).tasks["click"].information,
    )


def test_the_unit_of_weights_does_not_matter() -> None:
    tasks = (Task("click"), Task("spend", kind="real"))
    encoded = Encoded(encode(make_data(tasks=tasks, weight="shop + 0.0"), tables=LOG))
    model = build(make_run(), encoded.schema)
    parts = [predict(model, [b], encoded.schema, hidden=True) for b in encoded.in_order(encoded.split("train"), 100)]
    heavy = [replace(s, weight=s.weight * 1000.0) for s in parts]
    one, other = (fit(model, each, encoded.schema) for each in (parts, heavy))
    for name in ("click", "spend"):
        a, b = one.tasks[name], other.tasks[name]
        hidden = parts[0].hidden[name]
        np.testing.assert_allclose(a.variance(hidden), b.variance(hidden), rtol=1e-6)
        assert abs(a.mass - a.rows.sum()) < 1e-6 and abs(b.unit / a.unit - 1000) < 1e-3
        label = parts[0].labels[name] if name == "spend" else np.full(len(hidden), 0.3)
        plain, weighted = (posterior({**b.state_dict(), "information": b.information.copy()}) for _ in range(2))
        weighted.rows, plain.rows = b.rows.copy(), b.rows.copy()
        weighted.update(hidden, label, np.full(len(hidden), b.unit))
        plain.update(hidden, label)
        np.testing.assert_allclose(plain.variance(hidden), weighted.variance(hidden), rtol=1e-9)
    one.update(parts[0])
    other.update(heavy[0])
    np.testing.assert_allclose(one.tasks["click"].information, other.tasks["click"].information, rtol=1e-6)


def test_several_heads_need_the_rows_domain() -> None:
    hidden, p, _ = rows()
    for kind in (Logistic, Linear):
        got = kind(np.zeros((3, 4)))
        for call in (got.variance, got.roots, lambda h, got=got: got.update(h, p)):
            with pytest.raises(ValueError, match="There are 3 heads, one per domain: say which one each row has"):
                call(hidden)
        assert got.rows.sum() == 0 and not got.information.any() and got.mass == 0


@pytest.mark.parametrize("by", ["task", "domain"])
def test_of_two_logits_the_difference_has_the_posterior(by: Any) -> None:
    run = make_run(losses=(Supervised(), Ranking(form="jrc")))
    run = replace(run, model=replace(run.model, heads=Heads(by=by, two=True)))
    found = with_uncertainty(train(run, tables=LOG, baseline=False).bundle, tables=LOG)
    scores, beliefs = Predictor(found).beliefs(LOG["log"], LOG)
    assert found.uncertainty is not None
    for name in ("click", "buy"):
        x = np.c_[scores.hidden[name].astype(float), np.ones(len(scores.row))]
        w = found.uncertainty.tasks[name].weights
        assert w.shape[0] == (1 if by == "task" else 5)
        np.testing.assert_allclose((x * w[beliefs[name].head]).sum(1), scores.logits[name], atol=1e-5)


def test_after_a_stream_its_validation_rows_count_too() -> None:
    plain = make_run()
    streamed = replace(plain, schedule=Online(first=2))
    for run, splits in ((plain, ["train"]), (streamed, ["train", "valid"])):
        bundle = train(run, tables=LOG, baseline=False).bundle
        found = with_uncertainty(bundle, tables=LOG).uncertainty
        assert found is not None and trained_splits(run) == tuple(splits)
        encoded = Encoded(encode(run.data, tables=LOG, fitted=bundle.fitted))
        assert found.tasks["click"].rows.sum() == sum(len(encoded.split(name)) for name in splits)


def test_it_is_saved_with_the_bundle(tmp_path: Any) -> None:
    bundle = trained(tmp_path / "b", by="domain")
    assert Bundle.load(tmp_path / "b").uncertainty is None, "an old bundle has none"
    unsure = with_uncertainty(bundle, tables=LOG, prior=3.0)
    unsure.save(tmp_path / "b")
    again = Bundle.load(tmp_path / "b")
    assert again.uncertainty is not None and unsure.uncertainty is not None
    for name, want in unsure.uncertainty.tasks.items():
        got = again.uncertainty.tasks[name]
        assert (type(got), got.prior, got.gain) == (type(want), 3.0, want.gain)
        assert np.array_equal(got.precision(), want.precision()) and np.array_equal(got.rows, want.rows)
    a, b = (Predictor(x).predict(LOG["log"], LOG, uncertainty=True) for x in (again, unsure))
    assert a.equals(b)
    (tmp_path / "b" / "uncertainty.safetensors").write_bytes(b"damaged")
    with pytest.raises(BundleError, match="uncertainty.safetensors"):
        Bundle.load(tmp_path / "b")
    replace(unsure, uncertainty=None).save(tmp_path / "b")
    assert Bundle.load(tmp_path / "b").uncertainty is None, "none is left of another model"
    (tmp_path / "b" / "uncertainty.safetensors").write_bytes(b"damaged")
    clear(tmp_path / "b")
    assert not list((tmp_path / "b").iterdir()), "`--overwrite` knows the file"


def test_a_state_comes_back(tmp_path: Any) -> None:
    hidden, p, _ = rows()
    for kind in (Logistic, Linear):
        got = kind(np.ones((1, 4)), prior=0.2)
        got.update(hidden, p)
        store.save(tmp_path / "s", got.state_dict())
        again = posterior(store.load(tmp_path / "s"))
        assert np.array_equal(again.variance(hidden), got.variance(hidden)) and again.kind == got.kind
        again.update(hidden, p)  # what was loaded can be continued
        got.update(hidden, p)
        assert np.array_equal(again.variance(hidden), got.variance(hidden))


def test_other_weights_are_refused() -> None:
    unsure = with_uncertainty(trained(), tables=LOG)
    Predictor(unsure).predict(LOG["log"], LOG, uncertainty=True)
    for name, weight in unsure.model.named_parameters():
        with torch.no_grad():
            weight[0] += 1e-3
        Predictor(unsure).predict(LOG["log"], LOG)
        with pytest.raises(UncertaintyError, match="belongs to other weights than the model's. Make it again"):
            Predictor(unsure).predict(LOG["log"], LOG, uncertainty=True)
        unsure = replace(unsure, uncertainty=LastLayer.of(unsure.model, unsure.fitted.schema))
        Predictor(unsure).predict(LOG["log"], LOG, uncertainty=True)
        assert name


def test_a_model_of_classes_alone_has_none() -> None:
    schema = Schema((), (Task("size", kind="multiclass"),), classes={"size": ("S", "M")})
    with pytest.raises(UncertaintyError, match="for binary and real tasks"):
        LastLayer.of(torch.nn.Module(), schema)
