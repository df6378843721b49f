"""TransCal: worked numbers, invariants, what its parts do to bias and variance, and the worlds where it works and does not."""

from __future__ import annotations

import numpy as np
import pytest
from calibration_kit import BINARY, MULTI, drawn, rare_world, scores, shifted_world
from scipy.special import expit, softmax

from unbraid.calibration.binning import Histogram, Isotonic
from unbraid.calibration.cpcs import CPCS
from unbraid.calibration.density import density_ratio
from unbraid.calibration.labelled import Labelled, labelled
from unbraid.calibration.maps import Calibration, confidence
from unbraid.calibration.oracle import Oracle, Vanilla, top_ece
from unbraid.calibration.scaling import Temperature, fit_temperature
from unbraid.calibration.transcal import TransCal, controlled_mean, match_confidence, match_mean
from unbraid.types import Scores

WEIGHTS, ERRORS = np.array([0.5, 2, 1, 0.25, 1.5]), np.array([0, 1, 0, 0, 1.0])


# ------------------------------------------------------------------------------------------------------ worked examples
@pytest.mark.parametrize(
    ("power", "plain", "eta1", "first", "eta2", "value"),
    [
        (1.0, 0.700000, -1.256098, 0.637195, 0.284553, 0.608740),
        (0.5, 0.527792, -1.703553, 0.580239, 0.324984, 0.547740),
    ],
)
def test_the_estimate_of_five_rows(
    power: float, plain: float, eta1: float, first: float, eta2: float, value: float
) -> None:
    found = controlled_mean(ERRORS, WEIGHTS, power, 1 - ERRORS, 0.7)
    np.testing.assert_allclose(found, (plain, eta1, first, eta2, value), atol=6e-7)


def test_the_estimate_against_covariances_written_out() -> None:
    rng = np.random.default_rng(0)
    w, e, r = rng.exponential(size=50), rng.random(50), rng.random(50)
    for power in (0.3, 1.0):
        v = w**power
        z = v * e
        eta1 = -np.cov(z, v, ddof=1)[0, 1] / np.var(v, ddof=1)
        u = z + eta1 * (v - 1)
        eta2 = -np.cov(u, r, ddof=1)[0, 1] / np.var(r, ddof=1)
        want = z.mean() + eta1 * (v.mean() - 1) + eta2 * (r.mean() - 0.4)
        assert controlled_mean(e, w, power, r, 0.4).value == pytest.approx(want, abs=1e-12)


def test_ece_of_four_rows() -> None:
    logits = np.array([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0, 0, 0.2]])
    labels = np.array([0, 1, 1, 0])
    np.testing.assert_allclose(confidence(logits), [0.786986, 0.506480, 0.909443, 0.379152], atol=6e-7)
    assert top_ece(logits, labels) == pytest.approx(0.2973010, abs=6e-8)
    assert top_ece(logits / 2, labels) == pytest.approx(0.3768967, abs=6e-8)


# ----------------------------------------------------------------------------------------------------------- invariants
def test_equal_weights_make_the_risk_one_minus_the_calibrated_confidence() -> None:
    e = np.array([0, 1, 0, 0, 1.0, 1])
    for power in (0.0, 0.5, 1.0):
        found = controlled_mean(e, np.ones(6), power, 1 - e, 0.62)
        assert (found.eta1, found.eta2) == (0, pytest.approx(1)) and found.value == pytest.approx(0.38, abs=1e-12)


def test_confidence_falls_with_the_temperature_between_its_limits() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 5)) * 3
    means = [confidence(logits / t).mean() for t in (1e-4, 0.1, 0.5, 1, 3, 30, 1e4)]
    assert (np.diff(means) < 0).all() and means[0] > 0.999 and means[-1] == pytest.approx(0.2, abs=1e-3)


def test_the_temperature_solves_its_equation() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 5)) * 3
    temperature, notes = match_confidence(logits, 0.7, 5)
    assert confidence(logits / temperature).mean() == pytest.approx(0.7, abs=1e-12) and notes == ()
    assert match_confidence(logits * 4, 0.7, 5)[0] == pytest.approx(4 * temperature, rel=1e-9)


def test_no_shift_and_a_calibrated_source_leave_the_temperature_of_the_source() -> None:
    """Target rows are held-out rows: all weights are 1, and the mean confidence that is matched is the calibrated one."""
    _, held, _ = shifted_world(0)
    found = TransCal().fit(MULTI, held, held, held)
    source, _ = fit_temperature(labelled(held, MULTI))
    assert found.numbers["temperature"] == pytest.approx(source, rel=1e-9)


def test_a_calibrated_target_keeps_its_temperature() -> None:
    """Labels follow the model's own probabilities everywhere: T is near 1 although the target is another."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(3, 4))

    def side(shift: float) -> Scores:
        x = rng.normal(size=(6000, 3)) + [shift, 0, 0]
        return scores(x @ mix, drawn(rng, softmax(x @ mix, axis=1)), x)

    train, held, target = side(0), side(0), side(0.7)
    assert TransCal().fit(MULTI, held, target, train).numbers["temperature"] == pytest.approx(1, abs=0.08)


def test_control_variates_keep_the_mean_and_shrink_the_spread() -> None:
    """Known weights exp(x - 1/2), 3,000 repeats of 300 rows: what each control does, and what a power below 1 costs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 300))
    chance = 0.6 * expit(2 * (x - 1))
    wide = rng.normal(size=10**6)
    source, truth = (0.6 * expit(2 * (wide + shift - 1)).mean() for shift in (0, 1))
    assert (source, truth) == (pytest.approx(0.1347, abs=2e-3), pytest.approx(0.3002, abs=2e-3))
    errors, weights = (rng.random(x.shape) < chance) + 0.0, np.exp(x - 0.5)
    found = [controlled_mean(e, w, 1.0, 1 - e, 1 - source) for e, w in zip(errors, weights, strict=True)]
    plain, first, both = (np.array([getattr(one, name) for one in found]) for name in ("plain", "first", "value"))
    assert both.std() / plain.std() < 0.7 and both.std() < 0.85 * first.std() < 0.85 * plain.std()
    assert all(abs(values.mean() - truth) < 0.01 for values in (plain, first, both))
    spreads = [values.std() for values in (plain, first, both)]
    assert spreads == pytest.approx([0.0613, 0.0461, 0.0362], rel=0.05), "the specified ones, of other draws"
    assert abs(errors.mean() - source) < 0.01, "unweighted rows say nothing of the target"


def test_order_of_rows_does_not_matter() -> None:
    train, held, target = shifted_world(0, (300, 200, 300))
    rng = np.random.default_rng(0)

    def shuffled(given: Scores) -> Scores:
        at = rng.permutation(len(given.row))
        return scores(given.logits["t"][at], given.labels["t"][at], given.hidden["t"][at])

    one = TransCal().fit(MULTI, held, target, train).numbers
    two = TransCal().fit(MULTI, *(shuffled(part) for part in (held, target, train))).numbers
    assert one == pytest.approx(two, rel=1e-8)


# ------------------------------------------------------------------------------------------- the traps of the procedure
def test_lambda_zero_and_rows_without_errors_are_no_nan() -> None:
    assert controlled_mean(ERRORS, WEIGHTS, 0.0, 1 - ERRORS, 0.7).value == pytest.approx(0.3, abs=1e-12)
    none = controlled_mean(np.zeros(5), WEIGHTS, 0.5, np.ones(5), 0.9)
    assert none.eta2 == 0 and none.value == 0
    train, held, target = shifted_world(0, (300, 200, 300))
    assert np.isfinite(TransCal(power=0).fit(MULTI, held, target, train).numbers["temperature"])


def test_under_confidence_is_mended() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 4)) * 3
    rows = scores(x / 4, drawn(rng, softmax(x, axis=1)), x)
    assert TransCal().fit(MULTI, rows, rows, rows).numbers["temperature"] == pytest.approx(0.25, rel=0.1)
    assert TransCal(solver="bounded").fit(MULTI, rows, rows, rows).numbers["temperature"] == pytest.approx(1, abs=1e-6)


def test_what_no_temperature_reaches_is_said() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 4))
    low, notes = match_confidence(logits, 0.1, 4)
    assert low == 50 and "0.1, outside what 4 classes allow" in notes[0] and "as low as 0.25" in notes[1]
    high, notes = match_confidence(logits, 1.2, 4)
    assert high == 0.05 and "1.2, outside" in notes[0] and "as high as 1 is allowed" in notes[1]


def test_powers_without_control_variates_are_refused() -> None:
    with pytest.raises(ValueError, match="`bias_term` needs `variance_term`"):
        TransCal(variance_term=False)
    assert TransCal(variance_term=False, bias_term=False).lam(0.5) == 1.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TransCal(power=1.5), r"`power` should lie in \[0, 1\]. Found 1.5"),
        (lambda: TransCal(power=0.5, solver="bounded"), "`power` is for solver `nested`"),
        (lambda: TransCal(solver="slsqp"), "nested, bounded or official. Found slsqp"),
    ],
)
def test_wrong_parameters(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_rows_that_cannot_be_weighted_are_refused() -> None:
    train, held, target = rare_world(0, (2000, 2000, 2000))
    method = TransCal()
    conditional = type(BINARY)("t", given="click")
    with pytest.raises(ValueError, match="observed only where `click` is 1"):
        method.fit(conditional, held, target, train)
    weight = np.linspace(1, 2, 2000)
    uneven = scores(held.logits["t"], held.labels["t"], held.hidden["t"], weight=weight)
    with pytest.raises(ValueError, match="have several weights"):
        method.fit(BINARY, uneven, target, train)
    bare = scores(target.logits["t"], target.labels["t"])
    with pytest.raises(ValueError, match="no hidden vectors of task `t`"):
        method.fit(BINARY, held, bare, train)
    with pytest.raises(ValueError, match="a binary task needs `nested`"):
        TransCal(solver="bounded").fit(BINARY, held, target, train)


# ------------------------------------------------------------------------------------------------ the synthetic table
@pytest.mark.slow
def test_the_table_of_a_planted_shift() -> None:
    """Ten seeds: ECE (%) on the target by method, of which the order and the margins should hold."""
    methods = {
        "vanilla": Vanilla(), "temperature": Temperature(), "cpcs": CPCS(),
        "plain": TransCal(bias_term=False, variance_term=False),
        "full": TransCal(power=1.0), "nested": TransCal(), "bounded": TransCal(solver="bounded"),
        "official": TransCal(solver="official"), "oracle": Oracle(),
    }  # fmt: skip
    errors: dict[str, list[float]] = {name: [] for name in methods}
    for seed in range(10):
        train, held, target = shifted_world(seed)
        for name, method in methods.items():
            found = method.fit(MULTI, held, target, train)
            errors[name].append(100 * top_ece(found(target.logits["t"]), target.labels["t"]))
    mean = {name: float(np.mean(values)) for name, values in errors.items()}
    print({name: f"{np.mean(values):.2f} +- {np.std(values):.2f}" for name, values in errors.items()})
    assert mean["nested"] < 0.65 * mean["temperature"] and mean["nested"] < 0.85 * mean["plain"]
    assert mean["nested"] < 0.2 * mean["vanilla"] and mean["oracle"] == min(mean.values())
    near = {
        "vanilla": 38.92,
        "temperature": 7.21,
        "cpcs": 3.62,
        "plain": 5.78,
        "full": 3.52,
        "nested": 3.42,
        "bounded": 3.58,
    }
    assert {name: mean[name] for name in near} == pytest.approx(near, abs=0.03), "the world is the specified one"
    assert mean["official"] > mean["temperature"], "where the joint search stops depends on its start"


@pytest.mark.slow
def test_the_power_hardly_matters_with_the_controls_and_does_without() -> None:
    """Ten seeds of the planted shift: ECE (%) of powers, and of a power below 1 whose mean weight nothing sets right."""
    powers = {0.1: 3.54, 0.25: 3.42, 0.5: 3.42, 0.75: 3.41, 1.0: 3.52}
    errors: dict[float, list[float]] = {power: [] for power in powers}
    bare = []
    for seed in range(10):
        train, held, target = shifted_world(seed)
        logits, labels = target.logits["t"], target.labels["t"]
        for power in powers:
            errors[power].append(100 * top_ece(TransCal(power=power).fit(MULTI, held, target, train)(logits), labels))
        weights = density_ratio(train.hidden["t"], target.hidden["t"])(held.hidden["t"])
        wrong = held.logits["t"].argmax(1) != held.labels["t"]
        temperature, _ = match_confidence(logits, 1 - float((np.sqrt(weights) * wrong).mean()), 4)
        bare.append(100 * top_ece(logits / temperature, labels))
    mean = {power: float(np.mean(values)) for power, values in errors.items()}
    print(mean, np.mean(bare))
    assert mean == pytest.approx(powers, abs=0.03)
    assert np.mean(bare) == pytest.approx(9.27, abs=0.1), "why `bias_term` needs `variance_term`"


def test_the_joint_search_has_no_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the official search stops is decided by its start: temperatures differ by a factor of more than 5."""
    train, held, target = shifted_world(0)
    found = []
    for start in ((2.0, 0.5), (4.0, 0.5), (6.0, 0.9), (1.5, 0.5)):
        monkeypatch.setattr("unbraid.calibration.transcal.START", start)
        found.append(TransCal(solver="official").fit(MULTI, held, target, train).numbers["temperature"])
    assert max(found) > 5 * min(found)
    fit = TransCal().fit(MULTI, held, target, train).numbers
    assert fit["least temperature"] < fit["temperature"] < fit["largest temperature"]


# -------------------------------------------------------------------------------------------------------- honest negative
@pytest.mark.slow
def test_rotated_digits_fire_the_diagnostics() -> None:
    """A shift of the support: the weighted estimate is far from the target's error, and the warnings say not to believe it."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order] / 16, y[order]
    net = MLPClassifier((64,), max_iter=300, tol=1e-2, random_state=0).fit(x[:700], y[:700])

    def side(x: np.ndarray, y: np.ndarray) -> Scores:
        hidden = np.maximum(x @ net.coefs_[0] + net.intercepts_[0], 0)
        return scores(hidden @ net.coefs_[1] + net.intercepts_[1], y, hidden)

    moved = np.array([_rotated(row.reshape(8, 8), 30).ravel() for row in x[1000:]])
    train, held, target = side(x[:700], y[:700]), side(x[700:1000], y[700:1000]), side(moved, y[1000:])
    truth = (target.logits["t"].argmax(1) == target.labels["t"]).mean()
    assert truth < 0.75
    for source in (train, None):  # features of training rows, or of the held-out ones
        found = TransCal().fit(MULTI, held, target, source)
        assert abs(found.numbers["estimated accuracy"] - truth) > 0.1
        assert found.numbers["temperature"] >= 1, "no more confidence on the word of such an estimate"
        assert any("mean weight" in text or "are worth" in text for text in found.warnings)


def _rotated(image: np.ndarray, degrees: float) -> np.ndarray:
    from scipy.ndimage import rotate

    return rotate(image, degrees, reshape=False, order=1)


# --------------------------------------------------------------------------------------------------------------- binary
def test_the_intercept_solves_its_equation() -> None:
    train, held, target = rare_world(0, (20_000, 20_000, 20_000))
    z = target.logits["t"]
    assert expit(z + match_mean(z, 0.03)).mean() == pytest.approx(0.03, abs=1e-12)
    for slope in (False, True):
        found = TransCal(slope=slope).fit(BINARY, held, target, train)
        assert expit(found(z)).mean() == pytest.approx(found.numbers["estimated rate"], abs=1e-12)
        assert (found.map.slope == 1) != slope


def test_without_a_shift_the_rate_is_that_of_the_held_out_rows() -> None:
    _, held, _ = rare_world(0, (100, 5000, 100))
    found = TransCal().fit(BINARY, held, held, held)
    assert found.numbers["estimated rate"] == pytest.approx(held.labels["t"].mean(), rel=1e-9)


def test_an_impossible_rate_is_clipped_and_said() -> None:
    weights, rows = np.array([1.0, 2, 3]), Labelled(np.zeros(3), np.array([0.0, 1, 1]), np.ones(3))
    from unbraid.calibration.density import Support

    found = TransCal(bias_term=False, variance_term=False, slope=False)._binary(
        rows, weights, Support.of(weights), np.zeros(4)
    )
    assert found.numbers["estimated rate"] == pytest.approx(1 - 1 / 6) and "which is none" in found.warnings[0]


@pytest.mark.slow
def test_a_planted_rate_is_found_by_the_intercept_and_not_by_a_temperature() -> None:
    """1.8 % positives at the source, 4.2 % at the target, four seeds: mean prediction over mean label, each within 5 %."""
    methods = {
        "vanilla": Vanilla(), "temperature": Temperature(), "platt": Temperature(intercept=True), "histogram": Histogram(),
        "isotonic": Isotonic(), "weighted temperature": CPCS(), "weighted platt": CPCS(intercept=True),
        "half": TransCal(power=0.5), "transcal": TransCal(), "oracle": Oracle(),
    }  # fmt: skip
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    for seed in range(4):
        train, held, target = rare_world(seed, (150_000, 400_000, 100_000))
        truth = target.labels["t"].mean()
        for name, method in methods.items():
            found: Calibration = method.fit(BINARY, held, target, train)
            ratios[name].append(expit(found(target.logits["t"])).mean() / truth)
    print({name: np.round(values, 3) for name, values in ratios.items()})
    assert np.abs(np.array(ratios["transcal"]) - 1).max() < 0.05 and abs(np.mean(ratios["transcal"]) - 1) < 0.02
    assert np.abs(np.array(ratios["oracle"]) - 1).max() < 1e-6
    for source_only in ("vanilla", "temperature", "platt", "histogram", "isotonic"):
        assert max(ratios[source_only]) < 0.75
    assert min(ratios["weighted temperature"]) > 1.05, "one slope cannot mend a base rate, weighted or not"
    assert max(ratios["half"]) < 0.9, "a power below 1 stops short of the target"
