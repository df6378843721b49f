"""IMTL-L against the loss written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from balancing_kit import NAMES, Adam, Trunk, batches, build, compare, losses_of, step, weighted

from unbraid.optim.imtl_l import IMTLL


def test_steps_are_those_of_the_definition() -> None:
    s, adam = dict.fromkeys(NAMES, 0.0), {name: Adam() for name in NAMES}

    def rule(
        jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        weights = np.array([math.exp(s[name]) for name in names])
        for name, loss in zip(names, losses, strict=True):
            s[name] += adam[name](math.exp(s[name]) * loss - 1)
        return weighted(weights, jacobian, own=True)

    assert compare(IMTLL(), rule, c=2.0).told() == pytest.approx({n: math.exp(v) for n, v in s.items()}, abs=1e-9)


def test_the_scaled_losses_become_one() -> None:
    model = Trunk()
    update = build(IMTLL(lr=0.05), model, lr=0.0)
    (ids,) = batches(1)
    for _ in range(600):
        step(update, model, ids)
    for name, loss in losses_of(model(ids), ids).items():
        assert update.told()[name] * float(loss.detach()) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("given", "message"), [({"lr": -1.0}, "`lr`"), ({"limit": 0.0}, "`limit` should be positive")])
def test_errors(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IMTLL(**given)
