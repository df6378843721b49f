"""Dynamic weight average against epochs written out, with tasks that an epoch lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from balancing_kit import NAMES, Trunk, batches, build, compare, step, weighted

from unbraid.config import Weighted
from unbraid.optim.dwa import DWA


class Reference:
    """``weights`` of epoch e from the means of e - 1 and e - 2, every epoch of 4 steps."""

    def __init__(self, temperature: float = 2.0, total: bool = True) -> None:
        self.temperature, self.total = temperature, total
        self.losses: dict[str, list[list[float]]] = {name: [] for name in NAMES}  # per epoch
        self.weights: dict[str, float] = {}

    def __call__(
        self, jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        if at % 4 == 0:
            if at:
                self.weights = self._weights()
            for name in NAMES:
                self.losses[name].append([])
        for name, loss in zip(names, losses, strict=True):
            self.losses[name][-1].append(loss)
        first = 1.0 if self.total else 1 / 3
        return weighted(np.array([self.weights.get(name, first) for name in names]), jacobian, own=True)

    def _weights(self) -> dict[str, float]:
        rates = {}
        for name, epochs in self.losses.items():
            means = [np.mean(epoch) for epoch in epochs if epoch]
            rates[name] = means[-1] / means[-2] if len(means) > 1 else 1.0
        shares = {name: math.exp(rate / self.temperature) for name, rate in rates.items()}
        size = 3 if self.total else 1
        return {name: size * share / sum(shares.values()) for name, share in shares.items()}


@pytest.mark.parametrize(("method", "known"), [
    (DWA(), Reference()), (DWA(temperature=0.5, factor="one"), Reference(0.5, total=False)),
    (DWA(epoch_steps=4), Reference()),
])  # fmt: skip
def test_steps_are_those_of_the_definition(method: DWA, known: Reference) -> None:
    update = compare(method, known, steps=20, b=0.7)
    told = known._weights()
    assert update.told() == pytest.approx(told, abs=1e-9)
    assert max(told.values()) - min(told.values()) > 1e-3, "weights should have moved"
    assert sum(told.values()) == pytest.approx(3 if method.factor == "tasks" else 1)


def test_weights_are_one_for_two_epochs() -> None:
    model = Trunk()
    update = build(DWA(), model)
    for at, ids in enumerate(batches(8)):
        assert update.told() == {name: pytest.approx(1.0) for name in (NAMES if at else ())}
        step(update, model, ids)


def test_a_task_without_rows_for_an_epoch_keeps_its_means() -> None:
    model = Trunk()
    update = build(DWA(), model)
    for ids in batches(8):
        step(update, model, ids)
    before = list(update.weighting.means["c"])
    for ids in batches(4, 1):
        step(update, model, ids, ("a", "b"))
    assert update.weighting.means["c"] == before != update.weighting.means["a"]


def test_somebody_must_say_how_long_an_epoch_is() -> None:
    with pytest.raises(ValueError, match="Set `epoch_steps`"):
        Weighted(weighting=DWA()).build(Trunk(), steps=10, weights={})


@pytest.mark.parametrize(
    ("given", "message"), [({"temperature": 0.0}, "`temperature`"), ({"epoch_steps": -1}, "`epoch_steps`")]
)
def test_errors(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DWA(**given)  # type: ignore[arg-type]
