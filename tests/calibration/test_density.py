"""The density ratio: its exact value where densities are known, its symmetries, and what shows that it is worthless."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize

from unbraid.calibration.density import DensityRatio, Support, density_ratio


def normal(n: int, shift: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3)) + [shift, 0, 0]


def test_equals_the_optimum_of_the_penalised_likelihood_written_out() -> None:
    source, target = normal(300, 0, 0), normal(200, 0.7, 1)

    def loss(x: np.ndarray) -> float:
        z = [np.clip(side @ x[:3] + x[3], -500, 500) for side in (source, target)]
        return 0.5 * x[:3] @ x[:3] + np.log1p(np.exp(-z[0])).sum() + 1.5 * np.log1p(np.exp(z[1])).sum()

    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    found = density_ratio(source, target)
    np.testing.assert_allclose(np.append(found.coefficient, found.intercept), best, atol=2e-6)
    np.testing.assert_allclose(found(source), np.exp(-(source @ found.coefficient + found.intercept)), rtol=1e-12)


def test_is_the_ratio_of_two_normal_densities() -> None:
    """q / p of N(1, 1) against N(0, 1) is exp(x - 1/2)."""
    ratio = density_ratio(normal(40_000, 0, 0), normal(40_000, 1, 1))
    np.testing.assert_allclose(ratio.coefficient, [-1, 0, 0], atol=0.05)
    assert ratio.intercept == pytest.approx(0.5, abs=0.05)
    assert Support.of(ratio(normal(20_000, 0, 2))).mean == pytest.approx(1, abs=0.05)


def test_swapped_domains_give_the_inverse() -> None:
    source, target = normal(300, 0, 0), normal(300, 1, 1)
    np.testing.assert_allclose(
        density_ratio(source, target)(source) * density_ratio(target, source)(source), 1, rtol=1e-9
    )


@pytest.mark.parametrize("sizes", [(900, 300), (300, 900)])
def test_unequal_sides_have_even_odds(sizes: tuple[int, int]) -> None:
    """One domain, drawn twice: every weight is 1 whatever the sizes, by weights exactly and by resampling in about."""
    source = np.tile(normal(300, 0, 0), (sizes[0] // 300, 1))
    target = np.tile(normal(300, 0, 0), (sizes[1] // 300, 1))
    np.testing.assert_allclose(density_ratio(source, target)(source), 1, rtol=1e-9)
    resampled = density_ratio(source, target, balance="resample", seed=3)(source)
    assert resampled.mean() == pytest.approx(1, abs=0.05) and resampled.std() > 1e-3


def test_resampling_scatters_around_weights() -> None:
    source, target = normal(600, 0, 0), normal(150, 0.5, 1)
    drawn = [density_ratio(source, target, balance="resample", seed=s).coefficient[0] for s in range(30)]
    exact = density_ratio(source, target).coefficient[0]
    assert abs(np.mean(drawn) - exact) < 3 * np.std(drawn) / np.sqrt(30) + 0.02 and np.std(drawn) > 0.01
    again = density_ratio(source, target, balance="resample", seed=0).coefficient[0]
    assert again == drawn[0] and len(set(drawn)) == 30


def test_order_of_rows_does_not_matter() -> None:
    source, target = normal(400, 0, 0), normal(250, 1, 1)
    shuffled = density_ratio(source[::-1], np.random.default_rng(0).permutation(target))
    np.testing.assert_allclose(shuffled(source), density_ratio(source, target)(source), rtol=1e-9)


def test_support_measures_and_warns() -> None:
    found = Support.of(np.array([1.0, 1, 2]))
    assert (found.rows, found.mean, found.largest) == (3, pytest.approx(4 / 3), 2)
    assert found.effective == pytest.approx(16 / 6) and found.warnings == ()
    assert "mean weight is 0.3" in Support.of(np.full(100, 0.3)).warnings[0]
    assert "mean weight is 2.5" in Support.of(np.full(100, 2.5)).warnings[0]
    (spiky,) = Support.of(np.append(np.full(199, 1e-3), 180.0)).warnings
    assert "200 source rows are worth 1.0" in spiky


def test_separate_domains_are_noticed_and_finite() -> None:
    source, target = normal(500, 0, 0), normal(500, 60, 1)
    weights = density_ratio(source, target)(source)
    assert np.isfinite(weights).all() and np.isfinite((weights**2).sum()) and len(Support.of(weights).warnings) >= 1


GOOD = np.zeros((3, 2)) + np.arange(3)[:, None]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: density_ratio(GOOD, np.zeros((0, 2))), r"Target features should be .* Found shape \(0, 2\)"),
        (lambda: density_ratio(GOOD, GOOD[:, :1]), "Source rows have 2 features and target rows 1"),
        (lambda: density_ratio(GOOD * np.nan, GOOD), "Source features should be finite. Found 3 rows of 3"),
        (lambda: density_ratio(GOOD, GOOD, balance="even"), "`balance` should be weight or resample. Found even"),
        (lambda: density_ratio(GOOD, GOOD, strength=0), "`strength` should be positive and finite. Found 0"),
        (lambda: DensityRatio(np.zeros(3), 0.0)(GOOD), "fitted on 3 features. Found 2"),
        (lambda: Support.of(np.zeros(3)), "not all 0"),
        (lambda: Support.of(np.array([1.0, -1])), "0 or more"),
    ],
)  # fmt: skip
def test_errors_name_what_was_found(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
