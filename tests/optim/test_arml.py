"""ARML's surrogate: Adam down the squared distance of the target's gradient from the weighted auxiliary ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from balancing_kit import Adam, Trunk, build, compare, view_of, weighted

from unbraid.optim.arml import ARML


def test_steps_are_those_of_the_definition() -> None:
    w, adam = {"b": 1.0, "c": 1.0}, {"b": Adam(0.05), "c": Adam(0.05)}

    def rule(
        jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        used = np.array([w.get(name, 1.0) for name in names])
        if "a" in names:
            # gradients over the root of their mean squared norm: what Adam's eps is measured against
            scaled = jacobian / np.sqrt((jacobian**2).sum(1).mean())
            rest = {name: g for name, g in zip(names, scaled, strict=True) if name != "a"}
            left = scaled[list(names).index("a")] - sum(w[name] * g for name, g in rest.items())
            for name, g in rest.items():
                w[name] = max(w[name] + adam[name](float(-2 * left @ g)), 0.0)
        return weighted(used, jacobian, own=True)

    assert compare(ARML(lr=0.05), rule, steps=20, b=0.7).told() == pytest.approx(w, abs=1e-9)
    assert min(abs(v - 1) for v in w.values()) > 0.05


def test_weights_find_the_combination_that_is_the_target() -> None:
    """g_a = .3 g_b + 2 g_c."""
    b, c = np.random.default_rng(0).normal(size=(2, 9))
    rule = build(ARML(lr=0.01), Trunk()).rule
    for _ in range(3000):
        rule.weights(view_of(np.stack([0.3 * b + 2 * c, b, c])))
    assert rule.told() == pytest.approx({"b": 0.3, "c": 2.0}, abs=0.02)


@pytest.mark.parametrize(("given", "message"), [({"lr": -1.0}, "`lr`"), ({"floor": 2.0}, "`floor`")])
def test_errors(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ARML(**given)
