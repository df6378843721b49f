"""CAGrad: its limits, that no other direction in the ball serves the worst task better, and TorchJD's solution."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from balancing_kit import Trunk, compare, conflicting, rule_of, view_of
from scipy.optimize import minimize

from unbraid.optim.cagrad import CAGrad


def direction(jacobian: np.ndarray, c: float) -> np.ndarray:
    """The primal, over the span of the gradients: max t with <g_k, d> >= t and |d - g0| <= c |g0|."""
    q = np.linalg.qr(jacobian.T)[0]  # (n, K)
    g, mean = jacobian @ q, jacobian.mean(0) @ q
    scale = np.linalg.norm(g, axis=1).mean()
    g, mean = g / scale, mean / scale
    size = np.linalg.norm(mean)
    best = None
    for seed in range(4):
        start = np.append(mean + 0.1 * c * size * np.random.default_rng(seed).normal(size=len(mean)), 0.0)
        found = minimize(
            lambda x: -x[-1], start, method="SLSQP", tol=1e-14, options={"maxiter": 1000},
            constraints=[
                {"type": "ineq", "fun": lambda x: g @ x[:-1] - x[-1]},
                {"type": "ineq", "fun": lambda x: (c * size) ** 2 - ((x[:-1] - mean) ** 2).sum()},
            ],
        )  # fmt: skip
        if found.success and (best is None or found.fun < best.fun):
            best = found
    assert best is not None
    return q @ best.x[:-1] * scale


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("c", [0.3, 0.5, 0.9])
def test_it_is_the_best_direction_in_the_ball(k: int, c: float) -> None:
    for seed in range(4):
        j = np.random.default_rng(seed).normal(size=(k, 8)) + 0.4
        j[1] -= 0.8 * j[0]
        d = rule_of(CAGrad(c=c)).weights(view_of(j)).numpy() @ j
        mean = j.mean(0)
        assert np.linalg.norm(d - mean) <= c * np.linalg.norm(mean) * (1 + 1e-9)
        expected = direction(j, c)
        assert (j @ d).min() >= (j @ expected).min() - 1e-5 * abs((j @ expected).min()), "as good for the worst task"
        np.testing.assert_allclose(d, expected, atol=2e-3 * np.linalg.norm(mean))


@pytest.mark.skipif(
    not (importlib.util.find_spec("torchjd") and importlib.util.find_spec("cvxpy")), reason="no TorchJD with cvxpy"
)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_torchjds(seed: int) -> None:
    from torchjd.aggregation import CAGradWeighting

    j = np.random.default_rng(seed).normal(size=(3 + seed, 9))
    view = view_of(j)
    expected = CAGradWeighting(0.5)(view.gramian).numpy() @ j
    found = rule_of(CAGrad()).weights(view).numpy() @ j
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.linalg.norm(expected))


def test_steps_are_those_of_the_definition_for_two_tasks() -> None:
    """K = 2: the dual by a fine search on a line."""

    def rule(
        jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        mean = jacobian.mean(0)
        radius = 0.4 * np.linalg.norm(mean)

        def value(w: float) -> float:
            g = w * jacobian[0] + (1 - w) * jacobian[1]
            return g @ mean + radius * np.linalg.norm(g)

        low, high = 0.0, 1.0
        for _ in range(200):  # a convex function of w
            one, two = low + (high - low) / 3, high - (high - low) / 3
            low, high = (low, two) if value(one) < value(two) else (one, high)
        w = (low + high) / 2
        g = w * jacobian[0] + (1 - w) * jacobian[1]
        return (mean + radius * g / np.linalg.norm(g)) / (1 + 0.4**2), np.ones(2)

    from balancing_kit import batches, build, losses_of, reference

    ids, names = batches(8), [("a", "b")] * 8
    mine = Trunk()
    update = build(CAGrad(c=0.4, rescale=True), mine)
    for one in ids:
        output = mine(one)
        update(losses_of(output, one, ("a", "b")), output)
    theirs = reference(rule, ids, names, {})
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_without_a_ball_it_is_the_mean() -> None:
    def rule(
        jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        return jacobian.mean(0), np.ones(len(names))

    compare(CAGrad(c=0.0), rule)


def test_scale_changes_nothing_and_zeros_are_finite() -> None:
    j = conflicting()
    one, tiny = (rule_of(CAGrad()).weights(view_of(j * s)).numpy() for s in (1.0, 1e-9))
    np.testing.assert_allclose(tiny, one, rtol=1e-6)
    assert rule_of(CAGrad()).weights(view_of(0 * j)).tolist() == pytest.approx([1 / 3] * 3)
    assert rule_of(CAGrad()).weights(view_of(j[:1])).tolist() == [1.0]
    opposite = rule_of(CAGrad()).weights(view_of(np.array([[1.0, 0.0], [-1.0, 0.0]])))
    assert torch.isfinite(opposite).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="Parameter `c` should be finite and not negative. Found -1.0."):
        CAGrad(c=-1.0)
