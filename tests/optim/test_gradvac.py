"""Gradient vaccine against vectors that are turned one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from balancing_kit import NAMES, Trunk, batches, build, compare, conflicting, rule_of, step, view_of

from unbraid.optim.gradvac import GradVac


class Reference:
    def __init__(self, beta: float) -> None:
        self.beta, self.p = beta, {(i, j): 0.0 for i in NAMES for j in NAMES}
        self.turned = 0

    def __call__(
        self, jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk | None
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        draw = np.random.default_rng((3, at))
        total = np.zeros_like(jacobian[0])
        for i, name in enumerate(names):
            h = jacobian[i].copy()
            for j in draw.permutation(len(names)):
                if i == j:
                    continue
                g, p = jacobian[j], self.p[name, names[j]]
                c = h @ g / np.linalg.norm(h) / np.linalg.norm(g)
                if c < p:
                    self.turned += 1
                    w = np.linalg.norm(h) * (p * np.sqrt(1 - c**2) - c * np.sqrt(1 - p**2))
                    h = h + w / (np.linalg.norm(g) * np.sqrt(1 - p**2)) * g
                    assert h @ g / np.linalg.norm(h) / np.linalg.norm(g) == pytest.approx(p, abs=1e-9)
                self.p[name, names[j]] = (1 - self.beta) * p + self.beta * c
            total += h
        return total, np.ones(len(names))


@pytest.mark.parametrize("beta", [0.5, 0.01])
def test_steps_are_those_of_the_definition(beta: float) -> None:
    known = Reference(beta)
    update = compare(GradVac(beta=beta), known, b=0.7)
    assert known.turned > 10
    for (i, j), p in known.p.items():
        assert i == j or update.rule.usual[i][j] == pytest.approx(p, abs=1e-9)


def test_the_first_step_is_pcgrads() -> None:
    j = conflicting()
    found = rule_of(GradVac()).weights(view_of(j, seed=7)).numpy() @ j
    draw, total = np.random.default_rng((7, 0)), np.zeros(7)
    for i in range(3):
        h = j[i].copy()
        for k in draw.permutation(3):
            if k != i and h @ j[k] < 0:
                h -= h @ j[k] / (j[k] @ j[k]) * j[k]
        total += h
    np.testing.assert_allclose(found, total, rtol=1e-9)


def test_pairs_that_a_batch_lacks_keep_their_cosine() -> None:
    model = Trunk()
    update = build(GradVac(), model)
    for ids in batches(3):
        step(update, model, ids)
    before = {i: dict(row) for i, row in update.rule.usual.items()}
    step(update, model, batches(1, 9)[0], ("a", "b"))
    after = update.rule.usual
    assert after["c"] == before["c"] and after["a"]["c"] == before["a"]["c"] and after["a"]["b"] != before["a"]["b"]


def test_errors() -> None:
    with pytest.raises(ValueError, match="Parameter `beta` should be in \\[0, 1\\]. Found 2.0."):
        GradVac(beta=2.0)
