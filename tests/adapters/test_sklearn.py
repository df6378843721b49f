"""scikit-learn's own checks, and its pipelines, searches and splits around the estimators."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, make_classification
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from unbraid.adapters.sklearn import UnbraidClassifier, UnbraidRegressor
from unbraid.bundle import Bundle
from unbraid.compat import declare_operators
from unbraid.predictor import Predictor
from unbraid.types import Feature

EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data":
        "rows are drawn in batches: one that is there twice is not in the batches of one with weight 2",
    "check_methods_subset_invariance":
        "float32: a matrix product of other rows rounds otherwise, beyond the 1e-7 that is asked for",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [UnbraidClassifier(random_state=0), UnbraidRegressor(random_state=0)], ids=str)
def test_scikit_learns_checks(estimator: Any) -> None:
    with warnings.catch_warnings():  # of the checks' own data
        warnings.simplefilter("ignore")
        found = check_estimator(estimator, expected_failed_checks=EXPECTED, on_skip=None, on_fail=None)
    bad = {f["check_name"]: repr(f["exception"]) for f in found if f["status"] == "failed"}
    assert not bad and sum(f["status"] == "passed" for f in found) > 50


def planted(n: int = 400, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows whose label follows a category, a number with holes and a bag, and a second label."""
    rng = np.random.default_rng(seed)
    shop, price = rng.choice(["a", "b", "c"], n), rng.normal(size=n)
    tags = [list(rng.choice(["x", "y", "z"], rng.integers(0, 3))) for _ in range(n)]
    logit = 3 * (shop == "a") - 1.5 + price + np.array([1.5 * ("x" in t) for t in tags])
    X = pd.DataFrame(
        {
            "shop": shop,
            "price": np.where(rng.random(n) < 0.1, np.nan, price),
            "tags": tags,
            "floor": rng.integers(0, 3, n),
        }
    )
    return X, (logit + rng.logistic(size=n) > 0).astype(int)


def test_a_table_of_columns_of_every_kind_beats_its_numbers_alone() -> None:
    X, y = planted()
    fit, new = slice(0, 300), slice(300, 400)
    model = UnbraidClassifier(categories=["floor"], random_state=0).fit(X[fit], y[fit])
    kinds = {f.name: f.kind for f in model.bundle_.run.data.features}
    assert kinds == {"shop": "id", "price": "number", "tags": "bag", "floor": "id"}
    plain = LogisticRegression().fit(X[fit][["price"]].fillna(0), y[fit])
    assert model.score(X[new], y[new]) > plain.score(X[new][["price"]].fillna(0), y[new]) + 0.05
    for table in (pl.from_pandas(X), pl.from_pandas(X).to_arrow()):
        again = UnbraidClassifier(categories=[3], random_state=0).fit(table[fit], y[fit])
        assert np.array_equal(again.predict_proba(table), model.predict_proba(X))
    strange = X[new].assign(shop="never seen")
    assert np.isfinite(model.predict_proba(strange)).all()


def test_pipelines_searches_and_splits() -> None:
    X, y = load_iris(return_X_y=True)
    pipe = make_pipeline(StandardScaler(), UnbraidClassifier(random_state=0))
    assert cross_val_score(pipe, X, y, cv=3).mean() > 0.93
    towers = [{"model.tower.kind": "mmoe"}, {"model.tower.kind": "shared_bottom", "model.tower.bottom": [8]}]
    search = GridSearchCV(UnbraidClassifier(epochs=2, random_state=0), {"settings": towers, "lr": [0.01]}, cv=2).fit(
        X, y
    )
    assert search.best_params_["settings"] in towers and search.best_estimator_.predict_proba(X).shape == (150, 3)
    assert search.best_estimator_.bundle_.run.model.tower.kind == search.best_params_["settings"]["model.tower.kind"]


def test_regression_beside_ridge() -> None:
    X, y = load_diabetes(return_X_y=True)
    fit_X, X, fit_y, y = train_test_split(StandardScaler().fit_transform(X), 1000 + 50 * y, random_state=0)
    linear = {"model.tower.bottom": [], "model.tower.tower": []}
    ours = UnbraidRegressor(settings=linear, epochs=60, random_state=0).fit(fit_X, fit_y).score(X, y)
    assert ours == pytest.approx(Ridge().fit(fit_X, fit_y).score(X, y), abs=0.03), "labels are standardised inside"


def test_several_tasks_with_unknown_labels() -> None:
    X, y = planted()
    words = np.array(["no", "maybe", "yes"])[y + (np.arange(len(y)) % 7 == 0)]
    both = pd.DataFrame({"click": np.where(np.arange(len(y)) % 5 == 0, np.nan, y), "said": words})
    both.loc[::4, "said"] = None
    model = UnbraidClassifier(epochs=5, random_state=0).fit(X, both)
    assert [list(c) for c in model.classes_] == [[0.0, 1.0], ["maybe", "no", "yes"]]
    p = model.predict_proba(X)
    assert [part.shape for part in p] == [(400, 2), (400, 3)] and all(np.allclose(part.sum(1), 1) for part in p)
    predicted = model.predict(X)
    assert (predicted[:, 1] == model.classes_[1][p[1].argmax(1)]).all() and predicted.dtype == object
    known = both["said"].notna().to_numpy()
    each = [
        accuracy_score(both["click"][both["click"].notna()], predicted[both["click"].notna(), 0].astype(float)),
        accuracy_score(both["said"][known], predicted[known, 1]),
    ]
    assert model.score(X, both) == pytest.approx(np.mean(each))
    values = np.stack([y * 2.0, np.where(y, np.nan, 1.0 * y)], 1)
    real = UnbraidRegressor(epochs=2, random_state=0).fit(X, values)
    assert real.predict(X).shape == (400, 2) and np.isfinite(real.score(X, values))


def test_labels_of_a_target_are_never_read() -> None:
    X, y = planted()
    domain = np.where(X["shop"] == "b", -2, 1)
    mcc = {"losses": [{"kind": "supervised"}, {"kind": "mcc"}], "training.mix": {"unlabelled": 32}}
    given = {"settings": mcc, "epochs": 3, "random_state": 0}
    one = UnbraidClassifier(**given).fit(X, y, sample_domain=domain)
    wrong = np.where(domain < 0, 1 - y, y)
    two = UnbraidClassifier(**given).fit(X, wrong, sample_domain=domain)
    assert np.array_equal(one.predict_proba(X, sample_domain=domain), two.predict_proba(X, sample_domain=domain))
    masked = UnbraidClassifier(**given).fit(X, np.where(domain < 0, np.nan, y), sample_domain=domain)
    assert np.array_equal(one.predict_proba(X), masked.predict_proba(X))
    assert set(one.bundle_.fitted.schema.domains) >= {"1", "-2"}
    alone = UnbraidClassifier(epochs=3, random_state=0).fit(X[domain > 0], y[domain > 0])
    assert not np.allclose(alone.predict_proba(X), one.predict_proba(X)), "unlabelled rows teach"
    named = UnbraidClassifier(epochs=1, random_state=0).fit(X, y, sample_domain=X["shop"])
    assert named.bundle_.fitted.schema.domains[2:] == ("a", "b", "c")
    with pytest.raises(ValueError, match="not given to fit"):
        alone.predict(X, sample_domain=domain)


def test_validation_rows_judge_and_stop() -> None:
    X, y = make_classification(300, flip_y=0.4, random_state=0)
    settings = {"training.patience": 2, "losses": [{"kind": "supervised"}]}
    model = UnbraidClassifier(settings=settings, epochs=100, validation=0.3, random_state=0).fit(X, y)
    assert model.n_steps_ < 300
    with pytest.raises(ValueError, match="set `validation`"):
        UnbraidClassifier(settings=settings).fit(X, y)
    rare = np.array(["common"] * 298 + ["rare", "rarer"])
    assert len(UnbraidClassifier(epochs=1, validation=0.9, random_state=0).fit(X, rare).classes_) == 3


def test_copies_are_the_same_and_random_numbers_the_callers() -> None:
    X, y = make_classification(120, random_state=1)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = UnbraidClassifier(epochs=3, random_state=np.random.RandomState(4)).fit(X, y, sample_weight=np.ones(120))
    assert torch.equal(before, torch.random.get_rng_state())
    again = clone(model).set_params(random_state=np.random.RandomState(4)).fit(X, y, sample_weight=np.ones(120))
    assert np.array_equal(model.predict_proba(X), again.predict_proba(X))
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), model.predict_proba(X))
    other = UnbraidClassifier(epochs=3, random_state=5).fit(X, y)
    heavy = UnbraidClassifier(epochs=3, random_state=5).fit(X, y, sample_weight=np.where(y == 1, 50.0, 1.0))
    assert heavy.predict_proba(X)[:, 1].mean() > other.predict_proba(X)[:, 1].mean() + 0.1


def test_the_bundle_is_a_bundle(tmp_path: Any) -> None:
    X, y = planted(100)
    model = UnbraidClassifier(epochs=2, random_state=0).fit(X, y)
    model.bundle_.save(tmp_path)
    predicted = Predictor(Bundle.load(tmp_path)).predict(X)
    assert np.allclose(predicted["y"].to_numpy(), model.predict_proba(X)[:, 1])


def test_wrong_input_says_so() -> None:
    X, y = planted(60)
    cases: list[tuple[str, dict[str, Any], Any, Any]] = [
        ("unknown key `model.towr`", {"settings": {"model.towr": 1}}, X, y),
        ("`categories` should name columns", {"categories": ["shops"]}, X, y),
        ("Column `day` of X is Date", {}, X.assign(day=pd.to_datetime("2024-01-01").date()), y),
        ("infinity in column price", {}, X.assign(price=np.inf), y),
        ("one class", {}, X, y * 0),
        ("No label of `y` is known", {}, X, y * np.nan),
        ("`validation` should be in", {"validation": 1.0}, X, y),
        ("Unknown label type", {}, X, y + 0.5),
    ]
    for text, given, table, labels in cases:
        with pytest.raises(ValueError, match=text):
            UnbraidClassifier(**given).fit(table, labels)
    for domain, text in (([1], "shape"), ([1.5] * 60, "whole numbers")):
        with pytest.raises(ValueError, match=text):
            UnbraidClassifier().fit(X, y, sample_domain=domain)
    with pytest.raises(ValueError, match="should be numbers"):
        UnbraidRegressor().fit(X, X["shop"])
    features = (Feature("shop"), Feature("price", kind="number"))
    assert len(UnbraidClassifier(features=features, epochs=1).fit(X, y).bundle_.run.data.features) == 2


def shifted() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of two sites, the second without labels: X, y as skada hides it, domains."""
    X, y = make_classification(120, n_features=4, random_state=0)
    domain = np.where(np.arange(120) < 80, 1, -2)
    return X + 2.0 * (domain < 0)[:, None], np.where(domain < 0, -1, y), domain


def test_domains_are_routed_through_a_pipeline() -> None:
    """Unasked: scikit-learn passes them to who says that it takes them."""
    X, y, domain = shifted()
    with sklearn.config_context(enable_metadata_routing=True):
        pipe = make_pipeline(StandardScaler(), UnbraidClassifier(epochs=2, random_state=0))
        pipe.fit(X, y, sample_domain=domain)
        found = pipe.predict_proba(X, sample_domain=domain)
        assert pipe.score(X, y, sample_domain=domain) == (pipe.predict(X, sample_domain=domain) == y).mean()
    alone = UnbraidClassifier(epochs=2, random_state=0).fit(StandardScaler().fit_transform(X), y, sample_domain=domain)
    assert np.array_equal(found, alone.predict_proba(StandardScaler().fit_transform(X), sample_domain=domain))
    assert set(pipe[-1].bundle_.fitted.schema.domains) >= {"1", "-2"}


def test_skadas_pipelines() -> None:
    """Where it is installed; it is no dependency of anything here."""
    declare_operators()  # skada imports torchvision, if that is there
    skada = pytest.importorskip("skada")
    X, y, domain = shifted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for steps in ([], [skada.CORALAdapter()]):
            pipe = skada.make_da_pipeline(StandardScaler(), *steps, UnbraidClassifier(epochs=2, random_state=0))
            pipe.fit(X, y, sample_domain=domain)
            assert pipe.predict(X[80:], sample_domain=domain[80:]).shape == (40,)
            assert set(pipe[-1].base_estimator_.bundle_.fitted.schema.domains) >= {"1", "-2"}
            assert list(pipe[-1].base_estimator_.classes_) == [0, 1], "hidden labels are no class"
