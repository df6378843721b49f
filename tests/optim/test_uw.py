"""Uncertainty weighting against the loss written out, with Adam in plain floats for the variances."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from balancing_kit import NAMES, Adam, Trunk, batches, build, compare, step, weighted

from unbraid.optim.uw import UW


class Reference:
    def __init__(self, lr: float, start: float = -0.5, limit: float = 10.0) -> None:
        self.s, self.adam = dict.fromkeys(NAMES, start), {name: Adam(lr) for name in NAMES}
        self.limit = limit

    def __call__(
        self, jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        weights = np.array([1 / (2 * math.exp(self.s[name])) for name in names])
        for name, loss in zip(names, losses, strict=True):
            slope = -loss / (2 * math.exp(self.s[name])) + 1 / 2
            self.s[name] = float(np.clip(self.s[name] + self.adam[name](slope), -self.limit, self.limit))
        return weighted(weights, jacobian, own=True)


@pytest.mark.parametrize(("method", "known"), [
    (UW(), Reference(0.02)), (UW(lr=0.3, start=0.2, limit=0.5), Reference(0.3, 0.2, 0.5)),
])  # fmt: skip
def test_steps_are_those_of_the_definition(method: UW, known: Reference) -> None:
    update = compare(method, known, b=0.7)
    told = update.told()
    assert told == pytest.approx({name: math.exp(-s) / 2 for name, s in known.s.items()}, abs=1e-9)
    if method.limit == 0.5:
        assert max(abs(s) for s in known.s.values()) == 0.5, "the bound should have been reached"


def test_the_best_variance_is_the_loss() -> None:
    """With a model that stays, exp(s) goes to the loss: every task weighs 1 / (2 L)."""
    model = Trunk()
    update = build(UW(lr=0.05), model, lr=0.0)
    (ids,) = batches(1)
    for _ in range(600):
        step(update, model, ids)
    output = model(ids)
    from balancing_kit import losses_of

    for name, loss in losses_of(output, ids).items():
        assert update.told()[name] == pytest.approx(1 / (2 * float(loss.detach())), rel=0.02)


def test_the_step_size_follows_the_run() -> None:
    model = Trunk()
    update = build(UW(lr=0.1), model, learning_rate="linear", lr=0.01)
    for ids in batches(3):
        step(update, model, ids)
    assert update.weighting.logs.adam["a"].param_groups[0]["lr"] == pytest.approx(0.1 * 0.98)
    assert torch.is_tensor(update.weighting.logs.numbers["a"])


@pytest.mark.parametrize(("given", "message"), [({"lr": -1.0}, "`lr`"), ({"start": 11.0}, "`start` should be within")])
def test_errors(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UW(**given)
