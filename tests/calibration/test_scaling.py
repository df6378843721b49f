"""Temperature, vector and matrix scaling, histogram, isotonic and CPCS: optima against searches written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration_kit import BINARY, MULTI, REAL, drawn, scores
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, softmax

from unbraid.calibration.binning import Histogram, Isotonic
from unbraid.calibration.cpcs import CPCS, brier, brier_temperature, weighted_brier_fit
from unbraid.calibration.labelled import Labelled, labelled
from unbraid.calibration.maps import Calibration, Curves, against_others
from unbraid.calibration.scaling import Matrix, Temperature, Vector, _cross_entropy
from unbraid.types import Scores


def multiclass(seed: int = 0, n: int = 400, heat: float = 2.5) -> Scores:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 3)) * 3
    return scores(z, drawn(rng, softmax(z / heat, axis=1)), rng.normal(size=(n, 2)))


def binary(seed: int = 0, n: int = 600) -> Scores:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n) * 2 - 1
    return scores(z, (rng.random(n) < expit(0.6 * z - 0.8)) + 0.0, rng.normal(size=(n, 2)))


def weighted(given: Scores, seed: int = 9) -> Scores:
    weight = np.random.default_rng(seed).exponential(size=len(given.row))
    return scores(given.logits["t"], given.labels["t"], given.hidden["t"], weight=weight)


# --------------------------------------------------------------------------------------------------------- temperature
@pytest.mark.parametrize("make", [multiclass, lambda: weighted(multiclass())])
def test_temperature_is_the_least_cross_entropy(make) -> None:
    rows = make()
    z, y = rows.logits["t"], rows.labels["t"]
    w = np.ones(len(y)) if rows.weight is None else rows.weight

    def loss(t: float) -> float:
        return -np.average(log_softmax(z / t, axis=1)[np.arange(len(y)), y], weights=w)

    found = Temperature().fit(MULTI, rows)
    best = minimize_scalar(loss, bounds=(0.1, 20), method="bounded", options={"xatol": 1e-10})
    assert found.numbers["temperature"] == pytest.approx(best.x, rel=1e-6) and not found.warnings
    np.testing.assert_allclose(found(z), z / found.numbers["temperature"], rtol=1e-12)
    a = torch.tensor(1 / found.numbers["temperature"], dtype=torch.float64, requires_grad=True)
    lost = torch.nn.functional.cross_entropy(a * torch.tensor(z), torch.tensor(y), reduction="none")
    (lost * torch.tensor(w)).mean().backward()
    assert abs(a.grad.item()) < 1e-10, "it is a stationary point to the last digits"


def test_temperature_recovers_the_one_that_made_the_labels() -> None:
    assert Temperature().fit(MULTI, multiclass(n=20_000)).numbers["temperature"] == pytest.approx(2.5, rel=0.05)


def test_binary_temperature_and_platt_are_stationary() -> None:
    rows = weighted(binary())
    z, y, w = (torch.tensor(part) for part in (rows.logits["t"], rows.labels["t"], rows.weight))
    for intercept in (False, True):
        found = Temperature(intercept=intercept).fit(BINARY, rows).map
        a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (found.slope, found.intercept))
        lost = torch.nn.functional.binary_cross_entropy_with_logits(a * z + b, y, weight=w)
        lost.backward()
        assert abs(a.grad.item()) < 1e-10
        assert (abs(b.grad.item()) < 1e-10) == intercept, "without an intercept the mean stays wrong"


def test_sampled_negatives_count_as_often_as_there_were() -> None:
    """A tenth of the negatives was kept: calibrated to the full log, the mean prediction there is its base rate."""
    rows = binary(n=2000)
    rows = scores(rows.logits["t"], rows.labels["t"], **{"sampling_rate.t": np.full(2000, 0.1)})
    found = Temperature(intercept=True).fit(BINARY, rows)
    y = rows.labels["t"]
    full = np.where(y > 0, 1.0, 10.0)
    assert np.average(expit(found(rows.logits["t"])), weights=full) == pytest.approx(
        np.average(y, weights=full), rel=1e-9
    )


def test_temperature_at_its_bounds_says_so() -> None:
    z = np.array([[3.0, 0], [0, 3], [4, 0]])
    right = Temperature().fit(MULTI, scores(z, [0, 1, 0]))
    wrong = Temperature().fit(MULTI, scores(z, [1, 0, 1]))
    assert (right.numbers["temperature"], wrong.numbers["temperature"]) == (0.01, 100.0)
    assert "without a mistake" in right.warnings[0] and "do not tell the labels" in wrong.warnings[0]


# ----------------------------------------------------------------------------------------------------- vector and matrix
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_value_and_gradient_of_the_cross_entropy(full: bool, penalty: float) -> None:
    rows = labelled(weighted(multiclass(n=50)), MULTI)
    unit = np.eye(3) if full else np.ones(3)
    x = np.random.default_rng(1).normal(size=unit.size + 3)
    value, gradient = _cross_entropy(x, rows, unit, penalty)
    at = torch.tensor(x, requires_grad=True)
    weight = at[: unit.size].reshape(unit.shape)
    z, w = torch.tensor(rows.logits), torch.tensor(rows.weight)
    logits = z @ (weight.T if full else torch.diag(weight)) + at[unit.size :]
    lost = torch.nn.functional.cross_entropy(logits, torch.tensor(rows.labels), reduction="none")
    total = (w * lost).sum() / w.sum() + penalty * ((weight - torch.tensor(unit)) ** 2).sum()
    total = total + penalty * (at[unit.size :] ** 2).sum()
    total.backward()
    assert value == pytest.approx(total.item(), abs=1e-10)
    np.testing.assert_allclose(gradient, at.grad.numpy(), atol=1e-10)


def test_more_numbers_fit_the_held_out_rows_better() -> None:
    rows = multiclass()

    def loss(found: Calibration) -> float:
        return -log_softmax(found(rows.logits["t"]), axis=1)[np.arange(400), rows.labels["t"]].mean()

    one, three, nine = (loss(m.fit(MULTI, rows)) for m in (Temperature(), Vector(), Matrix()))
    assert one > three > nine
    at = Matrix().fit(MULTI, rows)
    assert at.numbers["loss"] == pytest.approx(loss(at), abs=1e-10)


def test_a_planted_matrix_is_found() -> None:
    rng = np.random.default_rng(4)
    z, weight, bias = rng.normal(size=(15_000, 3)), rng.normal(size=(3, 3)), np.array([0.5, 0, -0.5])
    truth = z @ weight.T + bias
    found = Matrix().fit(MULTI, scores(z, drawn(rng, softmax(truth, axis=1))))
    assert np.abs(softmax(found(z), axis=1) - softmax(truth, axis=1)).max() < 0.06


def test_few_rows_for_many_numbers_are_said() -> None:
    assert Vector().fit(MULTI, multiclass(n=60)).warnings == (), "6 numbers"
    assert "59 held-out rows for 6 numbers: set `penalty`" in Vector().fit(MULTI, multiclass(n=59)).warnings[-1]
    assert "60 held-out rows for 12 numbers" in Matrix().fit(MULTI, multiclass(n=60)).warnings[-1]
    assert Matrix(penalty=0.1).fit(MULTI, multiclass(n=60)).warnings == (), "the penalty is an answer to that"


def test_a_large_penalty_leaves_the_logits() -> None:
    rows = multiclass()
    np.testing.assert_allclose(Matrix(penalty=1e6).fit(MULTI, rows)(rows.logits["t"]), rows.logits["t"], atol=1e-3)


# ------------------------------------------------------------------------------------------------ histogram and isotonic
def test_histogram_gives_each_bin_its_mean_label() -> None:
    z, y, w = np.arange(6.0), np.array([0, 1, 0, 1, 1, 1.0]), np.array([1, 1, 2, 2, 1, 1.0])
    found = Histogram(bins=3).fit(BINARY, scores(z, y, weight=w))
    p = expit(found(z))
    np.testing.assert_allclose(p, [0.5, 0.5, 0.5, 0.5, 0.875, 0.875], atol=1e-12)  # 1 is kept below 1 - 1/8
    np.testing.assert_allclose(expit(found(np.array([-9, 1.5, 9]))), [0.5, 0.5, 0.875])


def test_histogram_never_parts_equal_scores() -> None:
    z = np.array([0.0] * 7 + [1.0] * 3)
    found = Histogram(bins=5).fit(BINARY, scores(z, [0, 1] * 5))
    assert len(found.map.scores[0]) == 2


def test_isotonic_pools_violators() -> None:
    z, y = np.arange(6.0), np.array([0, 1, 0, 1, 0, 1.0])
    p = expit(Isotonic().fit(BINARY, scores(z, y))(z))
    np.testing.assert_allclose(p, [1 / 8, 0.5, 0.5, 0.5, 0.5, 7 / 8], atol=1e-12)


def test_several_classes_each_against_all_others() -> None:
    rows = multiclass()
    z, y = rows.logits["t"], rows.labels["t"]
    p = softmax(z, axis=1)
    np.testing.assert_allclose(against_others(z), np.log(p / (1 - p)), atol=1e-9)
    assert np.isfinite(against_others(np.array([[800.0, 0, 0]]))).all()
    found = softmax(Histogram(bins=4).fit(MULTI, rows)(z), axis=1)
    plain = np.empty_like(p)
    for k in range(3):
        order = np.argsort(p[:, k])
        for rows_of_bin in np.array_split(order, 4):
            plain[rows_of_bin, k] = (y[rows_of_bin] == k).mean()
    plain = np.clip(plain, 1 / 402, 401 / 402)
    np.testing.assert_allclose(found, plain / plain.sum(1, keepdims=True), atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------- CPCS
def test_brier_written_out_and_its_least_temperature() -> None:
    rows = labelled(multiclass(), MULTI)
    w = np.random.default_rng(2).exponential(size=400)
    onehot = np.eye(3)[rows.labels]

    def loss(t: float) -> float:
        return (w * ((softmax(rows.logits / t, axis=1) - onehot) ** 2).sum(1)).mean()

    assert brier(rows, w, 1.7) == pytest.approx(loss(1.7), abs=1e-12)
    grid = np.geomspace(0.1, 50, 4000)
    assert loss(brier_temperature(rows, w)) <= min(map(loss, grid)) + 1e-12


def test_binary_brier_is_stationary_and_on_two_classes_the_same() -> None:
    rows = labelled(binary(), BINARY)
    w = np.random.default_rng(2).exponential(size=600)
    two = Labelled(np.stack([np.zeros(600), rows.logits], 1), rows.labels.astype(int), rows.weight)
    assert brier(rows, w, 1.3) == pytest.approx(brier(two, w, 1.3), abs=1e-12)
    slope, intercept = weighted_brier_fit(rows, w)
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (slope, intercept))
    p = torch.sigmoid(a * torch.tensor(rows.logits) + b)
    (torch.tensor(w) * (p - torch.tensor(rows.labels)) ** 2).mean().backward()
    assert abs(a.grad.item()) < 1e-8 and abs(b.grad.item()) < 1e-8
    plain = minimize(lambda x: (w * (expit(x[0] * rows.logits + x[1]) - rows.labels) ** 2).mean(), [1, 0],
                     method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15})  # fmt: skip
    np.testing.assert_allclose([slope, intercept], plain.x, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Temperature().fit(REAL, binary()), "Task `t` is real; .* no probability"),
        (lambda: Vector().fit(BINARY, binary()), "Task `t` is binary; .* `temperature` with `intercept`"),
        (lambda: Temperature(intercept=True).fit(MULTI, multiclass()), "`vector` has one per class"),
        (lambda: Temperature().fit(BINARY, scores([0.1, 0.2], [1.0, 1.0])), "2 labelled rows to calibrate on, all labelled 1"),
        (lambda: Temperature().fit(BINARY, scores([0.1], [1.0], observed=[False])), "no labelled row"),
        (lambda: Temperature(intercept=True).fit(BINARY, scores([1.0, 2, 3, 4], [1.0, 1, 0, 1])), "higher logits mean fewer"),
        (lambda: Histogram(bins=9).fit(BINARY, scores([0.1, 0.2], [0.0, 1.0])), "9 bins need as many labelled rows. Found 2"),
        (lambda: Histogram(bins=0), "`bins` should be at least 1. Found 0"),
        (lambda: Matrix(penalty=-1), "`penalty` should be finite and not negative. Found -1"),
        (lambda: CPCS().fit(BINARY, binary()), "needs rows of the target"),
        (lambda: Calibration.load({"map": "spline", "numbers": {}, "warnings": ()}), "Found spline"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_labels_that_one_logit_separates_have_no_slope() -> None:
    with pytest.raises(ValueError, match="40 rows with 20 positives one logit separates"):
        Temperature(intercept=True).fit(BINARY, scores(np.arange(40.0) - 19.5, np.arange(40) >= 20))


def test_curves_are_of_the_last_place_that_is_not_above() -> None:
    curve = Curves((np.array([0.0, 1.0]),), (np.array([0.2, 0.7]),), smooth=False)
    np.testing.assert_allclose(expit(curve(np.array([-5, 0, 0.99, 1, 5]))), [0.2, 0.2, 0.2, 0.7, 0.7])
