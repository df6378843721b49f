"""Metrics against hand-computed values, scikit-learn and brute force; intervals against theory and exact replicates."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score

from unbraid import bootstrap
from unbraid.evaluate import auc, evaluate, summary, user_means
from unbraid.render import render_markdown, render_table
from unbraid.types import Schema, Scores, Task

NAMES = ("(unknown)", "(missing)", "home", "[nearby]")


def logit(p: Any) -> np.ndarray:
    p = np.asarray(p, float)
    return np.log(p) - np.log1p(-p)


def schema(kind: Any = "binary", classes: int = 3) -> Schema:
    names = {"t": tuple("abcdefgh"[:classes])} if kind == "multiclass" else {}
    return Schema(features=(), tasks=(Task("t", kind=kind),), domains=NAMES, classes=names)


def scored(
    z: Any, y: Any, user: Any, *, domain: Any = None, weight: Any = None, observed: Any = None, request: Any = None
) -> Scores:
    z, y = np.asarray(z), np.asarray(y)
    return Scores(
        logits={"t": z}, hidden={}, labels={"t": y},
        observed={"t": np.ones(len(y), bool) if observed is None else observed},
        domain=np.full(len(y), 2) if domain is None else np.asarray(domain), domains=NAMES, weight=weight,
        group=np.asarray(user), row=np.arange(len(y)), meta={} if request is None else {"request": request},
    )  # fmt: skip


def pick(scores: Scores, rows: np.ndarray) -> Scores:
    """The given rows, repeated rows included."""

    def take(part: Any) -> Any:
        return None if part is None else {k: v[rows] for k, v in part.items()} if isinstance(part, dict) else part[rows]

    names = ("logits", "labels", "observed", "domain", "weight", "group", "row", "meta")
    return replace(scores, **{name: take(getattr(scores, name)) for name in names})


def noisy(seed: int, rows: int = 600, users: int = 40, ties: bool = True) -> Scores:
    """Weighted rows of 2 domains with tied scores and requests of a few rows."""
    rng = np.random.default_rng(seed)
    y = rng.random(rows) < 0.3
    z = y + rng.normal(size=rows)
    z = np.round(2 * z) / 2 if ties else z
    user, request = 3 * rng.integers(0, users, rows), rng.integers(0, 4, rows)  # each user has requests 0 to 3
    return scored(z, y.astype(np.float32), user, domain=rng.integers(2, 4, rows), request=request)


def values(found: dict) -> dict[str, float]:
    return {name: metric["value"] for name, metric in found.items() if isinstance(metric, dict) and "value" in metric}


def flat(metrics: dict) -> dict[str, float]:
    """Every number: values, ends of intervals and counts."""
    cells = {f"{row['domain']} {name}": value for row in summary(metrics) for name, value in row.items()}
    return {name: value for name, value in cells.items() if isinstance(value, int | float)}


# --------------------------------------------------------------------------------------------------------------- values
def test_gauc_of_the_worked_example():
    """Users with AUC 1 (2 rows) and 0 (3 rows), and one without positives that does not count: 2 / 5."""
    z, y, user = [0.9, 0.1, 0.2, 0.8, 0.5, 0.7, 0.3], [1, 0, 1, 0, 0, 0, 0], [1, 1, 2, 2, 2, 3, 3]
    scores = scored(np.tile(z, 10), np.tile(y, 10), np.tile(user, 10) + np.repeat(np.arange(10), 7) * 10)
    assert evaluate(scores, schema())["t"]["gauc"]["value"] == pytest.approx(0.4, abs=1e-12)


def test_binary_values_by_hand():
    p, y = [0.21, 0.81, 0.61, 0.62, 0.5], [0, 1, 0, 1, 1]  # bins 3, 12, 9, 9, 7
    found = evaluate(scored(np.tile(logit(p), 10), np.tile(y, 10), np.arange(50)), schema())["t"]
    assert found["logloss"]["value"] == pytest.approx(-np.mean(np.log([0.79, 0.81, 0.39, 0.62, 0.5])), abs=1e-12)
    assert found["calibration"]["value"] == pytest.approx(2.75 / 3, abs=1e-12)
    assert found["ece"]["value"] == pytest.approx((0.21 + 0.19 + abs(0.61 + 0.62 - 1) + 0.5) / 5, abs=1e-12)
    assert found["accuracy"]["value"] == pytest.approx(4 / 5, abs=1e-12)
    assert found["auc"]["value"] == pytest.approx(5 / 6, abs=1e-12)
    assert (found["rows"], found["positives"]) == (50, 30)


def test_ece_agrees_with_a_loop_over_bins():
    """Labels follow p, so that the bins' gaps have both signs and 14 bins would give another value."""
    rng = np.random.default_rng(0)
    p, w = rng.random(400), rng.exponential(size=400)
    y = rng.random(400) < p
    bins = [(p >= k / 15) & (p < (k + 1) / 15) for k in range(15)]
    gaps = np.array([(w[b] * (p[b] - y[b])).sum() for b in bins]) / w.sum()
    assert (gaps > 0).any() and (gaps < 0).any()
    found = values(evaluate(scored(logit(p), y, np.arange(400), weight=w), schema())["t"])
    assert found["ece"] == pytest.approx(np.abs(gaps).sum(), abs=1e-12)


def test_ece_of_bins_of_equal_weight_agrees_with_a_sort():
    """Distinct p: 15 runs of the sorted rows that carry a fifteenth of the weight each; equal p: all rows in one bin."""
    rng = np.random.default_rng(0)
    p, w = rng.random(400) ** 4 / 5, rng.exponential(size=400)
    y = rng.random(400) < p * 1.3
    order = np.argsort(p)
    place = np.empty(400, int)
    place[order] = (15 * (np.cumsum(w[order]) - w[order] / 2) / w.sum()).astype(int)
    gaps = [(w[place == k] * (p[place == k] - y[place == k])).sum() for k in range(15)]
    found = values(evaluate(scored(logit(p), y, np.arange(400), weight=w), schema())["t"])
    assert found["ece_mass"] == pytest.approx(np.abs(gaps).sum() / w.sum(), abs=1e-12)
    assert found["ece_mass"] != found["ece"]
    tied = values(evaluate(scored(np.zeros(40), np.arange(40) < 10, np.arange(40)), schema())["t"])
    assert tied["ece_mass"] == pytest.approx(0.25, abs=1e-12)


def test_huge_logits_stay_finite():
    found = evaluate(scored([800.0, -800.0] * 20, [0, 1] * 20, np.arange(40)), schema())["t"]
    assert found["logloss"]["value"] == pytest.approx(800, rel=1e-12)
    assert found["calibration"]["value"] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auc_and_logloss_agree_with_sklearn(dtype):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        base = noisy(seed)
        z = (base.logits["t"] * rng.choice([-1, 1])).astype(dtype)  # has zeros of both signs
        scores = replace(base, logits={"t": z}, weight=rng.exponential(size=600))
        y, w = scores.labels["t"], scores.weight
        found = values(evaluate(scores, schema())["t"])
        assert found["auc"] == pytest.approx(roc_auc_score(y, z, sample_weight=w), abs=1e-12)
        assert auc(z, y, w) == pytest.approx(roc_auc_score(y, z, sample_weight=w), abs=1e-12)
        assert auc(z, y) == pytest.approx(roc_auc_score(y, z), abs=1e-12)
        p = 1 / (1 + np.exp(-z.astype(float)))
        assert found["logloss"] == pytest.approx(log_loss(y, p, sample_weight=w), abs=1e-12)


def test_auc_of_one_class_is_nan():
    assert math.isnan(auc(np.array([0.1, 0.2]), np.array([1, 1])))


def test_gauc_agrees_with_a_loop_over_users():
    scores = replace(noisy(3), weight=np.random.default_rng(3).exponential(size=600))
    y, z, w, total, norm = scores.labels["t"], scores.logits["t"], scores.weight, 0.0, 0.0
    for one in np.unique(scores.group):
        mine = scores.group == one
        if 0 < y[mine].sum() < mine.sum():
            total += w[mine].sum() * roc_auc_score(y[mine], z[mine], sample_weight=w[mine])
            norm += w[mine].sum()
    assert values(evaluate(scores, schema())["t"])["gauc"] == pytest.approx(total / norm, abs=1e-12)


def test_ndcg_and_recall_of_a_tie_are_expected_values():
    """One positive tied with one negative on top: at 1 half a hit is expected, at 2 places (1 + 1/log2(3)) / 2."""
    scores = scored([1.0, 1.0, 0.0] * 10, [1, 0, 0] * 10, np.repeat(np.arange(10), 3), request=np.zeros(30, int))
    found = values(evaluate(scores, schema(), at=(1, 2))["t"])  # one request id, but ten users: ten requests
    assert found["ndcg@1"] == found["recall@1"] == pytest.approx(0.5, abs=1e-12)
    assert found["ndcg@2"] == pytest.approx((1 + 1 / math.log2(3)) / 2, abs=1e-12)
    assert found["recall@2"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("ties", [True, False])
def test_ranking_agrees_with_sklearn(ties):
    scores = noisy(4, ties=ties)
    scores.meta["request"][::50] = -1
    y, z, request = scores.labels["t"], scores.logits["t"], scores.meta["request"]
    ndcg, recall = [], []
    for user, one in {*zip(scores.group, request, strict=True)}:
        mine = (request == one) & (scores.group == user) & (request >= 0)
        if y[mine].sum() and mine.sum() > 1:
            ndcg.append(ndcg_score(y[None, mine], z[None, mine], k=2))
            order = np.argsort(-z[mine])
            recall.append(float(y[mine][order][:2].sum()) / float(y[mine].sum()))
        elif y[mine].sum():  # sklearn refuses a list of one
            ndcg.append(1.0)
            recall.append(1.0)
    found = values(evaluate(scores, schema(), at=(2,))["t"])
    assert found["ndcg@2"] == pytest.approx(np.mean(ndcg), abs=1e-12)
    if not ties:
        assert found["recall@2"] == pytest.approx(np.mean(recall), abs=1e-12)


def test_a_request_weighs_like_its_rows():
    """Two kinds of request with NDCG@1 of 1 and 0, of weights 3 and 1: the mean is 3/4."""
    z, y, w = [2.0, 1.0, 1.0, 2.0], [1, 0, 1, 0], [3.0, 3.0, 1.5, 0.5]
    request = np.repeat(np.arange(20), 2)
    scores = scored(z * 10, y * 10, np.repeat(np.arange(10), 4), weight=np.array(w * 10), request=request)
    assert values(evaluate(scores, schema(), at=(1,))["t"])["ndcg@1"] == pytest.approx(0.75, abs=1e-12)


def test_multiclass_values():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(200, 3)), rng.integers(0, 3, 200)
    w = rng.exponential(size=200)
    found = evaluate(scored(z, y, np.arange(200), weight=w), schema("multiclass"))["t"]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    right, top = p.argmax(1) == y, p.max(1)
    bins = [(top >= k / 15) & (top < (k + 1) / 15) for k in range(15)]
    gaps = [abs((w[b] * (top[b] - right[b])).sum()) for b in bins]
    assert found["accuracy"]["value"] == pytest.approx(np.average(right, weights=w), abs=1e-12)
    assert found["logloss"]["value"] == pytest.approx(log_loss(y, p, sample_weight=w), abs=1e-12)
    assert found["ece"]["value"] == pytest.approx(sum(gaps) / w.sum(), abs=1e-12)
    assert set(values(found)) == {"accuracy", "logloss", "ece"} and found["positives"] is None


def test_real_values():
    found = evaluate(scored([1.0, 2.0, 5.0], [0.0, 2.0, 9.0], [0, 1, 1], weight=np.array([2.0, 1, 1])), schema("real"))
    assert found["t"]["rmse"]["value"] == pytest.approx(math.sqrt((2 + 16) / 4), abs=1e-12)
    assert found["t"]["mae"]["value"] == pytest.approx((2 + 4) / 4, abs=1e-12)


# ------------------------------------------------------------------------------------------------------ rows that count
@pytest.mark.parametrize("kind", ["binary", "multiclass", "real"])
def test_weights_equal_repeated_rows_and_zero_no_row(kind):
    rng = np.random.default_rng(1)
    times = rng.integers(0, 4, 500)
    z = rng.normal(size=(500, 3)) if kind == "multiclass" else rng.normal(size=500)
    y = rng.normal(size=500) if kind == "real" else rng.integers(0, 3 if kind == "multiclass" else 2, 500)
    plain = scored(z, y, rng.integers(0, 50, 500), domain=rng.integers(2, 4, 500))
    one = evaluate(replace(plain, weight=times.astype(float)), schema(kind))["t"]
    two = evaluate(pick(plain, np.repeat(np.arange(500), times)), schema(kind))["t"]
    for a, b in ((one, two), *((one["domains"][n], two["domains"][n]) for n in NAMES[2:])):
        for name in values(a):
            for part, exact in (("value", 1e-12), ("low", 1e-6), ("high", 1e-6)):  # replicates are float32
                assert a[name][part] == pytest.approx(b[name][part], rel=exact)
    assert one["rows"] == (times > 0).sum() and two["rows"] == times.sum()


def test_sampling_rate_equals_repeated_negatives():
    scores = noisy(5)
    rate = np.where(np.arange(600) % 2, 0.25, 1.0)
    times = np.where((scores.labels["t"] == 0) & (rate < 1), 4, 1)
    full = values(evaluate(pick(scores, np.repeat(np.arange(600), times)), schema())["t"])
    found = evaluate(replace(scores, meta={**scores.meta, "sampling_rate.t": rate}), schema())["t"]
    for name in ("auc", "gauc", "logloss", "calibration", "ece", "accuracy"):
        assert found[name]["value"] == pytest.approx(full[name], rel=1e-12)
    assert found["ndcg@5"]["value"] is None and "sampled" in found["ndcg@5"]["why"]
    assert found["rows"] == 600


def test_only_observed_rows_count():
    scores, seen = noisy(6), np.random.default_rng(6).random(600) < 0.5
    labels = np.where(seen, scores.labels["t"], np.nan)  # may be anything where unobserved
    logits = np.where(seen, scores.logits["t"], np.inf)
    hidden = evaluate(replace(scores, observed={"t": seen}, labels={"t": labels}, logits={"t": logits}), schema())["t"]
    expected = evaluate(pick(scores, np.flatnonzero(seen)), schema())["t"]
    assert values(hidden) == pytest.approx(values(expected), rel=1e-12)
    assert hidden["rows"] == seen.sum()


def test_row_order_does_not_matter():
    scores = noisy(7)
    shuffled = pick(scores, np.random.default_rng(7).permutation(600))
    one, two = (flat(evaluate(each, schema(), at=(1,))) for each in (scores, shuffled))
    assert len(one) == 3 * (2 + 3 * 9) and one == pytest.approx(two, rel=1e-6)


def test_domains_are_slices_and_share_the_draws():
    scores = noisy(8)
    found = evaluate(scores, schema())["t"]
    assert list(found["domains"]) == ["home", "[nearby]"]
    for code, name in ((2, "home"), (3, "[nearby]")):
        alone = evaluate(pick(scores, np.flatnonzero(scores.domain == code)), schema())["t"]
        assert values(found["domains"][name]) == pytest.approx(values(alone), rel=1e-12)
        assert found["domains"][name]["rows"] == (scores.domain == code).sum()
    whole = evaluate(replace(scores, domain=np.full(600, 2)), schema())["t"]
    home = whole["domains"].pop("home")
    assert whole["domains"].pop("[nearby]")["rows"] == 0 and not whole.pop("domains")
    assert home == whole


def test_unknown_domain_is_listed_with_rows_only():
    scores = noisy(9)
    found = evaluate(replace(scores, domain=np.where(np.arange(600) < 300, 0, 2)), schema())["t"]["domains"]
    assert list(found) == ["(unknown)", "home", "[nearby]"]
    assert found["[nearby]"]["auc"] == {"value": None, "low": None, "high": None, "why": "no observed rows"}


# ---------------------------------------------------------------------------------------------------------------- nulls
def test_fewer_than_ten_of_a_class_is_null_with_counts():
    y = np.arange(100) < 9
    found = evaluate(scored(np.arange(100.0), y, np.arange(100), request=np.zeros(100, int)), schema())["t"]
    assert set(values(found).values()) == {None} and len(values(found)) == 11
    assert found["auc"]["why"] == "9 positives and 91 negatives; at least 10 of each are needed"
    assert (found["rows"], found["positives"]) == (100, 9)
    enough = evaluate(scored(np.arange(100.0), np.arange(100) < 10, np.arange(100)), schema())["t"]
    assert enough["auc"]["value"] == 0 and "why" not in enough["auc"]
    fewer = evaluate(scored(np.arange(100.0), ~y, np.arange(100)), schema())["t"]
    assert fewer["ece"]["why"].startswith("91 positives and 9 negatives")


def test_gauc_counts_users_with_both_classes_and_ranking_counts_requests():
    """100 users of one row, 40 positives: no user has both classes; 5 rows of 2 classes have a request."""
    y, request = np.arange(100) % 5 < 2, np.where(np.arange(100) < 5, 0, -1)
    found = evaluate(scored(np.arange(100.0), y, np.arange(100), request=request), schema())["t"]
    assert found["gauc"]["value"] is None and "in users with both classes" in found["gauc"]["why"]
    assert found["ndcg@5"]["why"].startswith("2 positives and 0 negatives in requests with a positive")
    assert found["auc"]["value"] is not None
    none = evaluate(scored(np.arange(100.0), y, np.arange(100), request=np.full(100, -1)), schema())["t"]
    assert none["recall@5"]["why"] == "no observed rows in requests with a positive"


@pytest.mark.parametrize("kind", ["binary", "multiclass", "real"])
def test_no_rows(kind):
    z = np.zeros((4, 3)) if kind == "multiclass" else np.zeros(4)
    found = evaluate(scored(z, np.zeros(4), np.arange(4), observed=np.zeros(4, bool)), schema(kind))["t"]
    assert set(values(found).values()) == {None} and found["rows"] == 0


def test_one_user_has_a_value_and_no_interval():
    found = evaluate(scored([0.1, 0.7] * 10, [0, 1] * 10, np.zeros(20, int)), schema())["t"]["auc"]
    assert found["value"] == 1 and found["low"] is None and "one user" in found["why"]


def test_no_replicates_no_interval():
    found = evaluate(noisy(0), schema(), replicates=0)["t"]["auc"]
    assert found["value"] > 0.5 and found["low"] is None and found["why"] == "no replicates"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": {"t": np.array([0.0, np.nan])}}, "Logits of task `t` should be finite. Found 1"),
        ({"labels": {"t": np.array([0, 2])}}, "1 observed labels of task `t` are no binary label"),
        ({"weight": np.array([1.0, -1.0])}, "Weights should be finite and at least 0"),
        ({"domain": np.array([2, 4])}, "Domain codes should be below 4, the number of names. Found 4"),
        ({"meta": {"sampling_rate.t": np.array([0.0, 1.0])}}, r"Sampling rates of task `t` should lie in \(0, 1\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(replace(scored([0.0, 1.0], [0, 1], [0, 1]), **change), schema())


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="Parameter `confidence` should lie between 0 and 1. Found 95"):
        evaluate(noisy(0), schema(), confidence=95)
    with pytest.raises(ValueError, match="`at` positive"):
        evaluate(noisy(0), schema(), at=(0,))


# ------------------------------------------------------------------------------------------------------------ intervals
def test_user_means_are_over_rows_and_their_draws_over_users():
    rng = np.random.default_rng(0)
    user = rng.integers(3, 40, 900) * 10**12
    level = rng.normal(size=40)[user // 10**12]
    columns = {"x": level + rng.normal(size=900), "y": level, "same": np.full(900, 2.5)}
    columns["difference"] = columns["x"] - columns["y"]
    found = user_means(columns, user, replicates=800, seed=1)
    for name, column in columns.items():
        assert found[name]["value"] == pytest.approx(column.mean())
    means = np.array([level[user == u].mean() for u in np.unique(user)])
    width = found["y"]["high"] - found["y"]["low"]
    assert width == pytest.approx(2 * 1.96 * means.std() / np.sqrt(len(means)), rel=0.25)
    assert found["difference"]["high"] - found["difference"]["low"] < width / 2  # paired: the users' levels cancel
    assert (found["same"]["low"], found["same"]["high"]) == pytest.approx((2.5, 2.5))
    narrow = user_means(columns, user, replicates=800, seed=1, confidence=0.5)["y"]
    assert narrow["high"] - narrow["low"] < width / 2
    assert user_means({"x": np.arange(3.0)}, np.zeros(3, int))["x"]["low"] is None
    assert "no replicates" in user_means(columns, user, replicates=0)["x"]["why"]


@pytest.mark.parametrize("seed", range(5))
def test_a_replicate_is_the_metric_of_the_drawn_users(seed):
    """With one replicate both ends of the interval are its value; each draw of a user is a user of its own."""
    scores = noisy(seed, rows=900, users=60)
    found = evaluate(scores, schema(), replicates=1, seed=seed, at=(1, 2))["t"]
    users, code = np.unique(scores.group, return_inverse=True)
    draws = bootstrap._draws(seed, 0, len(users), 1)[:, 0].astype(int)
    rows = np.repeat(np.arange(900), draws[code])
    copy = np.concatenate([np.arange(n) for n in draws[code]])
    drawn = pick(scores, rows)
    expected = evaluate(replace(drawn, group=drawn.group * 10 + copy), schema(), replicates=0, at=(1, 2))["t"]
    for a, b in ((found, expected), *((found["domains"][n], expected["domains"][n]) for n in NAMES[2:])):
        assert len(values(a)) == 11
        for name in set(values(a)) - {"auc", "ece_mass"}:  # the bins of equal weight stay those of all users
            assert a[name]["low"] == a[name]["high"] == pytest.approx(b[name]["value"], rel=1e-5)
        assert a["auc"]["low"] == pytest.approx(b["auc"]["value"], abs=0.01)  # linearised: see the next test
        assert a["auc"]["low"] != a["auc"]["value"]


@pytest.mark.parametrize("kind", ["multiclass", "real"])
def test_a_replicate_of_other_tasks(kind):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 3)) if kind == "multiclass" else rng.normal(size=300)
    y = rng.integers(0, 3, 300) if kind == "multiclass" else rng.normal(size=300)
    scores = scored(z, y, rng.integers(0, 30, 300))
    found = evaluate(scores, schema(kind), replicates=1)["t"]
    draws = bootstrap._draws(0, 0, 30, 1)[:, 0].astype(int)
    expected = evaluate(pick(scores, np.repeat(np.arange(300), draws[scores.group])), schema(kind), replicates=0)["t"]
    for name, value in values(expected).items():
        assert found[name]["low"] == pytest.approx(value, rel=1e-5) and found[name]["low"] != found[name]["value"]


def test_linearised_auc_interval_agrees_with_an_exact_bootstrap():
    """Same draws: only the dropped product of fluctuations differs.  Own draws: also Monte-Carlo error.

    The end of a 95 % percentile interval of R normal replicates with deviation s has the standard error
    sqrt(.025 * .975 / R) / density = 2.67 s / sqrt(R); two independent ends differ by 4 sqrt(2) times that at most,
    with a probability of 1 - 6e-5.
    """
    rng = np.random.default_rng(0)
    users, each, replicates = 200, 10, 4000
    user = np.repeat(np.arange(users), each)
    taste = rng.normal(size=users)[user]
    y = rng.random(users * each) < 1 / (1 + np.exp(1 - taste))
    z = np.round(y + taste + rng.normal(size=users * each), 1)
    win = (z[:, None] > z) + 0.5 * (z[:, None] == z)
    to_user = np.eye(users)[user]
    pairs = to_user[y].T @ win[np.ix_(y, ~y)] @ to_user[~y]  # (users, users): exact AUC is a form in the draws
    ups, downs = to_user[y].sum(0), to_user[~y].sum(0)

    def ends(draws):
        exact = ((draws @ pairs) * draws).sum(1) / ((draws @ ups) * (draws @ downs))
        return np.quantile(exact, (0.025, 0.975)), exact.std()

    found = evaluate(scored(z, y, user), schema(), replicates=replicates)["t"]["auc"]
    ours = np.array([found["low"], found["high"]])
    same, deviation = ends(bootstrap._draws(0, 0, users, replicates).T.astype(float))
    assert np.abs(ours - same).max() < 0.06 * deviation
    other, _ = ends(rng.poisson(1, (replicates, users)).astype(float))
    assert np.abs(ours - other).max() < (4 * math.sqrt(2) * 2.67 / math.sqrt(replicates) + 0.06) * deviation


def simulations(count: int, rowwise: bool) -> dict[str, list[tuple[float, float]]]:
    """Intervals of data in which a label and half of the score's noise belong to the user."""
    ends: dict[str, list] = {"auc": [], "accuracy": []}
    for seed in range(count):
        rng = np.random.default_rng(seed)
        user = np.repeat(np.arange(250), 6)
        y = (rng.random(250) < 0.5)[user]
        z = (2 * y - 1.0) + rng.normal(size=250)[user] + rng.normal(size=1500)
        found = evaluate(scored(z, y, np.arange(1500) if rowwise else user), schema(), replicates=300, seed=seed)["t"]
        for name, pairs in ends.items():
            pairs.append((found[name]["low"], found[name]["high"]))
    return ends


def test_coverage_over_users_and_not_over_rows():
    """True AUC is P(N(2, 2 * 2) > 0), true accuracy P(N(1, 2) > 0).

    Of 200 intervals of coverage .95, .89 to .99 cover except with a probability of 1e-3; rows drawn alone are
    taken for independent, which makes an interval about 0.6 times as wide and its coverage about .75.
    """
    truth = {"auc": 0.5 * (1 + math.erf(1 / math.sqrt(2))), "accuracy": 0.5 * (1 + math.erf(0.5))}
    users, rows = simulations(200, rowwise=False), simulations(200, rowwise=True)
    for name, true in truth.items():
        covered = np.mean([low <= true <= high for low, high in users[name]])
        assert 0.89 <= covered <= 0.99
        assert np.mean([low <= true <= high for low, high in rows[name]]) < 0.82
        wider = [(b - a) / (d - c) for (a, b), (c, d) in zip(users[name], rows[name], strict=True)]
        assert min(wider) > 1.2 and 1.5 < np.mean(wider) < 2.5


def test_seed_confidence_and_blocks(monkeypatch):
    scores = noisy(1)
    base = evaluate(scores, schema())
    assert base == evaluate(scores, schema()) and base != evaluate(scores, schema(), seed=1)
    narrow = evaluate(scores, schema(), confidence=0.5)["t"]["auc"]
    wide = base["t"]["auc"]
    assert wide["low"] < narrow["low"] < narrow["value"] < narrow["high"] < wide["high"]
    monkeypatch.setattr(bootstrap, "BLOCK", 16)  # users of a slice then lie in several blocks, some with gaps
    apart = evaluate(scores, schema(), replicates=4000, at=(1,))["t"]["domains"]["home"]
    monkeypatch.undo()
    together = evaluate(scores, schema(), replicates=4000, at=(1,))["t"]["domains"]["home"]
    for name, value in values(apart).items():
        assert value == values(together)[name]
        deviation = (together[name]["high"] - together[name]["low"]) / 3.92
        error = 4 * math.sqrt(2) * 2.67 / math.sqrt(4000) * deviation  # as in the test of AUC
        assert abs(apart[name]["low"] - together[name]["low"]) < error


# ------------------------------------------------------------------------------------------------------------ rendering
def two_tasks() -> dict:
    metrics = evaluate(noisy(2), schema())
    real = evaluate(scored([1.0, 2.0], [0.0, 2.0], [0, 1]), schema("real"))
    return {"click": metrics["t"], "time": real["t"]}


def test_summary_is_flat():
    rows = summary(two_tasks())
    names = [(row["task"], row["domain"]) for row in rows]
    assert names == [(task, domain) for task in ("click", "time") for domain in ("", "home", "[nearby]")]
    assert rows[0]["auc_low"] < rows[0]["auc"] < rows[0]["auc_high"] and rows[0]["rows"] == 600
    assert rows[-1]["rmse"] is None and rows[-1]["rows"] == 0 and "auc" not in rows[-1]


def test_tables_show_intervals_dashes_and_signed_differences():
    from rich.console import Console

    metrics = two_tasks()
    found = metrics["click"]["auc"]
    other = evaluate(replace(noisy(2), logits={"t": -noisy(2).logits["t"]}), schema())
    text = render_markdown(metrics, {"click": other["t"]})
    head, _, first, *rest = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines()]
    assert head[:6] == ["task", "domain", "rows", "positives", "AUC", "RMSE"]
    assert head[-2:] == ["baseline AUC/RMSE", "difference"] and "log-loss" in head and "ndcg@5" in head
    assert first[:6] == ["click", "all", "600", str(metrics["click"]["positives"]),
                         f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]", "-"]  # fmt: skip
    assert first[-2:] == [f"{1 - found['value']:.4f}", f"{2 * found['value'] - 1:+.4f}"]
    assert rest[-1][:6] == ["time", "[nearby]", "0", "-", "-", "-"] and rest[-1][-2:] == ["-", "-"]
    out = io.StringIO()
    Console(file=out, width=300).print(render_table(metrics))
    assert "[nearby]" in out.getvalue() and first[4] in out.getvalue() and "baseline" not in out.getvalue()


def test_a_narrow_terminal_keeps_the_comparison():
    metrics = {"click": {"auc": {"value": 0.7, "low": 0.6, "high": 0.8}, "ece": {"value": 0.1, "low": 0, "high": 1},
                         "rows": 9, "positives": 3, "domains": {}}}  # fmt: skip
    columns = {w: [c.header for c in render_table(metrics, metrics, width=w).columns] for w in (80, 120)}
    assert columns[80] == [c for c in columns[120] if c != "ECE"] and "ECE" in columns[120]
