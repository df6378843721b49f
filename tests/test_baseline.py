"""Target encodings against loops, the regression against scikit-learn on encodings written out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from unbraid.baseline import TargetEncoding, _encode
from unbraid.evaluate import auc
from unbraid.types import Schema, Task


def schema(kind: Any = "binary", classes: int = 3) -> Schema:
    names = {"t": tuple("abcd"[:classes])} if kind == "multiclass" else {}
    return Schema(features=(), tasks=(Task("t", kind=kind),), classes=names)


def fit(ids: dict, y: Any, kind: str = "binary", observed: Any = None, weight: Any = None, **options) -> TargetEncoding:
    seen = np.ones(len(y), bool) if observed is None else observed
    return TargetEncoding(schema(kind), **options).fit(ids, {"t": np.asarray(y)}, {"t": seen}, weight)


def planted(seed: int, rows: int = 6000) -> tuple[dict, np.ndarray, np.ndarray]:
    """Two id columns whose effects add up on the logit."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(2, 102, rows), rng.integers(2, 52, rows)
    z = rng.normal(size=102)[user] + rng.normal(size=52)[item] - 1
    return {"user": user, "item": item}, z, rng.random(rows) < 1 / (1 + np.exp(-z))


def test_encodings_agree_with_a_loop():
    rng = np.random.default_rng(0)
    codes, y, w = rng.integers(0, 12, 60), rng.random(60), rng.exponential(size=60)
    mean = np.average(y)
    table, own = _encode(codes, y[:, None], w, np.array([mean]), 20.0)
    for code in range(codes.max() + 1):
        mine = codes == code
        expected = ((w * y)[mine].sum() + 20 * mean) / (w[mine].sum() + 20)
        assert table[code, 0] == pytest.approx(expected, abs=1e-12)
    for i, code in enumerate(codes):
        others = (codes == code) & (np.arange(60) != i)
        assert own[i, 0] == pytest.approx(((w * y)[others].sum() + 20 * mean) / (w[others].sum() + 20), abs=1e-12)


def test_an_id_that_occurs_once_encodes_to_the_mean_in_training():
    codes, y = np.append(np.arange(2, 10), [10, 10]), np.array([1.0, 0, 1, 0, 1, 0, 1, 0, 1, 1])
    _, own = _encode(codes, y[:, None], np.ones(10), np.array([0.6]), 20.0)
    assert own[:8, 0] == pytest.approx(0.6, abs=1e-15)
    assert own[8:, 0] == pytest.approx((1 + 12) / 21, abs=1e-15)


def test_labels_do_not_leak_through_ids_of_one_row():
    """Labels are noise and each row has its own id: nothing can be learnt, though the table itself knows all labels."""
    rng = np.random.default_rng(0)
    y, codes = rng.random(500) < 0.3, np.arange(2, 502)
    model = fit({"row": codes}, y)
    z = model.predict({"row": codes})["t"]
    assert np.ptp(z) == 0  # the coefficient is 0
    assert z[0] == pytest.approx(np.log(y.mean() / (1 - y.mean())), abs=1e-3)  # lbfgs stops at a gradient of 1e-4
    assert auc(model.models["t"].tables["row"][2:, 0], y) == 1


@pytest.mark.parametrize("feature", ["logit", "rate"])
def test_logits_agree_with_sklearn_on_encodings_written_out(feature):
    ids, _, y = planted(0, 400)
    w = np.random.default_rng(1).exponential(size=400)
    mean = np.average(y, weights=w)

    def encoded(codes, leave):
        out = []
        for i, code in enumerate(codes):
            rows = (ids_of == code) & ~(leave & (np.arange(400) == i))
            out.append(((w * y)[rows].sum() + 5 * mean) / (w[rows].sum() + 5))
        rate = np.array(out)
        return np.log(rate / (1 - rate)) if feature == "logit" else rate

    train, other = [], []
    new = {"user": np.arange(0, 110), "item": np.arange(0, 110) % 60}
    for name, ids_of in ids.items():
        train.append(encoded(ids_of, True))
        other.append(encoded(new[name], False))
    x, x_new = np.column_stack(train), np.column_stack(other)
    center = np.average(x, axis=0, weights=w)
    scale = np.sqrt(np.average((x - center) ** 2, axis=0, weights=w))
    reference = LogisticRegression(max_iter=1000).fit((x - center) / scale, y, sample_weight=w)
    z = fit(ids, y, weight=w, smoothing=5.0, feature=feature).predict(new)["t"]
    assert z == pytest.approx(reference.decision_function((x_new - center) / scale), abs=1e-10)


def test_codes_without_a_training_row_encode_to_the_mean():
    """0 and 1 did not occur, 51 lies past the table, 7 occurs only where the task is unobserved."""
    ids, _, y = planted(1, 600)
    seen = ids["item"] != 7
    model = fit(ids, y, observed=seen)
    user = np.full(4, 5)
    z = model.predict({"user": user, "item": np.array([0, 1, 7, 10**6])})["t"]
    assert np.ptp(z) < 1e-12
    table = model.models["t"].tables["item"]
    assert table[[0, 1, 7], 0] == pytest.approx(y[seen].mean(), abs=1e-12)
    others = np.unique(ids["item"][seen])
    assert np.abs(model.predict({"user": np.full(len(others), 5), "item": others})["t"] - z[0]).max() > 0.1


def test_unknown_and_missing_learn_a_rate_if_they_occur():
    y = np.tile([1, 1, 0, 0, 1, 0], 50)
    model = fit({"a": np.tile([0, 0, 1, 1, 2, 2], 50)}, y)
    table = model.models["t"].tables["a"][:, 0]
    assert table == pytest.approx([110 / 120, 10 / 120, 0.5], abs=1e-12)
    z = model.predict({"a": np.array([0, 1, 2, 3])})["t"]
    assert z[0] > z[2] > z[1] and z[3] == pytest.approx(z[2], abs=1e-12)  # 3 is new: the mean, not the rate of 0


def test_unobserved_rows_do_not_count():
    ids, _, y = planted(2, 800)
    seen = np.arange(800) % 3 > 0
    labels = np.where(seen, y, np.nan)
    inside = fit({k: v[seen] for k, v in ids.items()}, y[seen])
    assert fit(ids, labels, observed=seen).predict(ids)["t"] == pytest.approx(inside.predict(ids)["t"], abs=1e-12)


def test_weights_encode_like_repeated_rows():
    ids, _, y = planted(3, 300)
    times = np.random.default_rng(3).integers(1, 4, 300)
    weighted = fit(ids, y, weight=times.astype(float)).models["t"]
    repeated = fit({k: np.repeat(v, times) for k, v in ids.items()}, np.repeat(y, times)).models["t"]
    assert weighted.mean == pytest.approx(repeated.mean, abs=1e-12)
    for name in ids:
        assert weighted.tables[name] == pytest.approx(repeated.tables[name], abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_planted_effects_are_found(seed):
    """On new rows of the same ids the AUC comes within .02 of that of the true logits, and calibration near 1."""
    ids, z, y = planted(seed, 24000)
    half = np.arange(24000) < 12000
    model = fit({k: v[half] for k, v in ids.items()}, y[half])
    found = model.predict({k: v[~half] for k, v in ids.items()})["t"]
    best = auc(z[~half], y[~half])
    assert best - 0.02 < auc(found, y[~half]) < best
    assert (1 / (1 + np.exp(-found))).mean() == pytest.approx(y[~half].mean(), abs=0.02)


def test_one_class_in_training_gives_a_finite_constant():
    z = fit({"a": np.arange(2, 12)}, np.zeros(10)).predict({"a": np.arange(20)})["t"]
    assert z == pytest.approx(np.log(0.5 / 10.5), abs=1e-12)


def test_real_task_is_ridge_on_mean_labels():
    rng = np.random.default_rng(0)
    codes = rng.integers(2, 22, 500)
    y = 3 * rng.normal(size=22)[codes] + rng.normal(size=500)
    sums, count = np.bincount(codes, y), np.bincount(codes)
    x = (sums[codes] - y + 20 * y.mean()) / (count[codes] - 1 + 20)
    center, scale = x.mean(), x.std()
    reference = Ridge(alpha=1.0).fit(((x - center) / scale)[:, None], y)
    full = (sums[2:] + 20 * y.mean()) / (count[2:] + 20)
    found = fit({"a": codes}, y, "real").predict({"a": np.arange(2, 22)})["t"]
    assert found == pytest.approx(reference.predict(((full - center) / scale)[:, None]), abs=1e-10)


def test_multiclass_finds_the_class_of_an_id():
    rng = np.random.default_rng(0)
    codes, favourite = rng.integers(2, 32, 6000), rng.integers(0, 3, 32)
    y = np.where(rng.random(6000) < 0.8, favourite[codes], rng.integers(0, 3, 6000))
    z = fit({"a": codes}, y, "multiclass").predict({"a": np.arange(2, 32)})["t"]
    assert z.shape == (30, 3) and (z.argmax(1) == favourite[2:]).all()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert p.max(1).mean() == pytest.approx(0.8 + 0.2 / 3, abs=0.03)


@pytest.mark.parametrize("seen", [(0, 2), (1, 2, 3)])
def test_multiclass_with_classes_that_training_lacks(seen):
    rng = np.random.default_rng(0)
    codes = rng.integers(2, 32, 3000)
    y = np.where(rng.random(3000) < 0.8, np.array(seen)[codes % len(seen)], rng.choice(seen, 3000))
    model = TargetEncoding(schema("multiclass", 4)).fit({"a": codes}, {"t": y}, {"t": np.ones(3000, bool)})
    z = model.predict({"a": np.arange(2, 32)})["t"]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    lacking = [k for k in range(4) if k not in seen]
    assert (z.argmax(1) == np.array(seen)[np.arange(2, 32) % len(seen)]).all()
    assert p[:, lacking].max() < 0.01
    assert p.max(1).mean() == pytest.approx(0.8 + 0.2 / len(seen), abs=0.03)


def test_several_tasks_are_independent():
    ids, _, y = planted(4, 500)
    both = Schema(features=(), tasks=(Task("t"), Task("u", kind="real")))
    seen = np.ones(500, bool)
    model = TargetEncoding(both).fit(ids, {"t": y, "u": ids["user"] * 1.0}, {"t": seen, "u": seen})
    found = model.predict(ids)
    assert set(found) == {"t", "u"} and (found["t"] == fit(ids, y).predict(ids)["t"]).all()


def test_errors_say_what_is_wrong():
    ids, _, y = planted(5, 50)
    with pytest.raises(ValueError, match="Parameter `smoothing` should be positive. Found 0"):
        TargetEncoding(schema(), smoothing=0)
    with pytest.raises(ValueError, match="should be 'logit' or 'rate'. Found 'odds'"):
        TargetEncoding(schema(), feature="odds")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Codes of column `user` should be 0 or more. Found -1"):
        fit({"user": ids["user"] * 0 - 1}, y)
    with pytest.raises(ValueError, match="at least one id column"):
        fit({}, y)
    with pytest.raises(ValueError, match="Task `t` has no observed training row"):
        fit(ids, y, observed=np.zeros(50, bool))
    with pytest.raises(RuntimeError, match="not fitted"):
        TargetEncoding(schema()).predict(ids)
