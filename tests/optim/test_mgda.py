"""The shortest convex combination: known values, the optimality conditions, TorchJD's solver, normalised gradients, steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from balancing_kit import Trunk, compare, conflicting, rule_of, view_of

from unbraid.optim.mgda import MGDA, shortest


def combined(method: MGDA, j: np.ndarray, losses: Sequence[float] = ()) -> np.ndarray:
    return (rule_of(method).weights(view_of(j, losses)) @ torch.from_numpy(j)).numpy()


def test_orthogonal_unit_vectors_weigh_the_same() -> None:
    assert rule_of(MGDA()).weights(view_of(np.eye(2, 5))).tolist() == pytest.approx([0.5, 0.5], abs=1e-12)
    assert rule_of(MGDA()).weights(view_of(np.eye(5))).tolist() == pytest.approx([0.2] * 5, abs=1e-12)


@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_no_gradient_is_nearer_to_the_origin(k: int, seed: int) -> None:
    """Optimality: <g_k, d> >= |d|^2 for all k, with equality where a_k > 0."""
    j = conflicting(k, 9, seed)
    a = shortest(torch.from_numpy(j @ j.T)).numpy()
    d = a @ j
    assert (a >= 0).all() and a.sum() == pytest.approx(1)
    slack = j @ d - d @ d
    scale = np.linalg.norm(j, axis=1).max() * np.linalg.norm(d)
    assert slack.min() > -1e-9 * scale and np.abs(slack[a > 0]).max() < 1e-9 * scale


def test_two_gradients_have_the_closed_form() -> None:
    for seed in range(20):
        a, b = np.random.default_rng(seed).normal(size=(2, 6)) * [[1.0], [4.0]]
        gamma = np.clip((b - a) @ b / ((a - b) @ (a - b)), 0, 1)
        np.testing.assert_allclose(combined(MGDA(), np.stack([a, b])), gamma * a + (1 - gamma) * b, atol=1e-9)


@pytest.mark.parametrize("how", ["l2", "loss", "loss+"])
def test_gradients_are_normalised_for_the_search_alone(how: Any) -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 6)) * [[1.0], [4.0]]
    losses = np.array([0.2, 3.0])
    norms = np.array([np.linalg.norm(a), np.linalg.norm(b)])
    scale = {"l2": norms, "loss": losses, "loss+": losses * norms}[how]
    ua, ub = a / scale[0], b / scale[1]
    gamma = np.clip((ub - ua) @ ub / ((ua - ub) @ (ua - ub)), 0, 1)
    found = combined(MGDA(how), np.stack([a, b]), list(losses))
    np.testing.assert_allclose(found, gamma * a + (1 - gamma) * b, atol=1e-9)


@pytest.mark.skipif(not importlib.util.find_spec("torchjd"), reason="the extra `mtl` is not installed")
@pytest.mark.parametrize("seed", range(3))
def test_it_is_torchjds(seed: int) -> None:
    from torchjd.aggregation import MGDAWeighting

    j = np.random.default_rng(seed).normal(size=(3, 8))
    expected = MGDAWeighting(epsilon=1e-6, max_iters=3000)(torch.from_numpy(j @ j.T)).numpy() @ j
    np.testing.assert_allclose(combined(MGDA(), j), expected, atol=2e-2 * np.linalg.norm(expected))


def test_stationary_zero_and_tiny_gradients() -> None:
    assert np.linalg.norm(combined(MGDA(), np.array([[1.0, 2.0], [-2.0, -4.0]]))) < 1e-6
    assert rule_of(MGDA()).weights(view_of(np.zeros((3, 2)))).sum() == pytest.approx(1)
    j = conflicting()
    np.testing.assert_allclose(combined(MGDA(), j * 1e-9), combined(MGDA(), j) * 1e-9, rtol=1e-6)


def test_steps_are_those_of_the_definition() -> None:
    def rule(
        jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        if len(jacobian) == 2:
            a, b = jacobian
            gamma = np.clip((b - a) @ b / ((a - b) @ (a - b)), 0, 1)
            return gamma * a + (1 - gamma) * b, np.ones(2)
        best = None
        for one, two in ((0, 1), (0, 2), (1, 2)):  # an edge, or the inside of the triangle
            a, b = jacobian[one], jacobian[two]
            gamma = np.clip((b - a) @ b / ((a - b) @ (a - b)), 0, 1)
            found = gamma * a + (1 - gamma) * b
            best = found if best is None or found @ found < best @ best else best
        inside = np.linalg.solve(jacobian @ jacobian.T, np.ones(3))
        if (inside > 0).all():
            best = inside / inside.sum() @ jacobian
        assert best is not None
        return best, np.ones(3)

    compare(MGDA(), rule, b=0.7)
