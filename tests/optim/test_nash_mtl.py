"""The bargaining equation, its closed form for orthogonal gradients, and what is kept between solutions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from balancing_kit import Trunk, batches, build, compare, conflicting, rule_of, step, view_of
from scipy.optimize import minimize

from unbraid.optim.nash_mtl import NashMTL, bargain


@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_the_equation_holds(k: int, seed: int) -> None:
    j = conflicting(k, 9, seed)
    a = bargain(torch.from_numpy(j @ j.T)).numpy()
    assert (a > 0).all()
    np.testing.assert_allclose(a * (j @ j.T @ a), 1.0, rtol=1e-8)


def test_orthogonal_gradients_get_one_over_their_norm() -> None:
    j = np.diag([2.0, 1e-6, 300.0])
    np.testing.assert_allclose(bargain(torch.from_numpy(j @ j.T)).numpy(), [0.5, 1e6, 1 / 300], rtol=1e-11)
    free = rule_of(NashMTL(max_norm=0.0)).weights(view_of(j)).numpy()
    np.testing.assert_allclose(free, [0.5, 1e6, 1 / 300], rtol=1e-11)


def test_gradients_that_cancel_or_vanish() -> None:
    j = np.array([[1.0, 2.0], [-1.0, -2.0]])
    a = bargain(torch.from_numpy(j @ j.T)).numpy()
    assert np.isfinite(a).all() and np.linalg.norm(a @ j) < 1e-5 * np.linalg.norm(a)
    j = np.array([[1.0, 2.0], [0.0, 0.0]])
    assert bargain(torch.from_numpy(j @ j.T)).numpy() == pytest.approx([1 / np.sqrt(5), 0.0])
    assert bargain(torch.zeros(2, 2, dtype=torch.float64)).tolist() == [0, 0]


def test_steps_are_those_of_the_definition() -> None:
    """The gains' product, maximised by SciPy, with the norm cut to 1."""

    def rule(
        jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        norms = np.linalg.norm(jacobian, axis=1)
        units = jacobian / norms[:, None]
        cosines = units @ units.T

        def value(x: np.ndarray) -> tuple[float, np.ndarray]:
            b = np.exp(x)
            return b @ cosines @ b / 2 - x.sum(), b * (cosines @ b) - 1

        b = np.exp(minimize(value, np.zeros(len(norms)), jac=True, method="BFGS", options={"gtol": 1e-12}).x)
        d = (b / norms) @ jacobian
        return d / max(np.linalg.norm(d), 1.0), np.ones(len(names))

    compare(NashMTL(), rule)


def test_weights_stay_between_solutions() -> None:
    model = Trunk()
    update = build(NashMTL(max_norm=0.0, every=3), model)
    found = []
    for ids in batches(7):
        step(update, model, ids)
        found.append(update.told()["a"])
    assert found[0] == found[1] == found[2] != found[3] == found[4] == found[5] != found[6]
    step(update, model, batches(1)[0], ("a", "b"))
    assert update.told()["a"] != found[6], "other objectives, another bargain"


@pytest.mark.parametrize(("given", "message"), [({"max_norm": -1.0}, "`max_norm`"), ({"every": 0}, "`every`")])
def test_errors(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NashMTL(**given)  # type: ignore[arg-type]
