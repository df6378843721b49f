"""GradNorm against its loss written out, for both constraints and both choices of L(0)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from balancing_kit import NAMES, Adam, Trunk, batches, build, compare, step, weighted

from unbraid.config import Aggregated
from unbraid.optim.gradnorm import GradNorm


class Reference:
    def __init__(self, alpha: float = 1.5, lr: float = 0.02, softmax: bool = True, epoch: int = 4) -> None:
        self.alpha, self.softmax, self.epoch = alpha, softmax, epoch
        self.p, self.adam = dict.fromkeys(NAMES, 0.0 if softmax else 1.0), {name: Adam(lr) for name in NAMES}
        self.seen: dict[str, list[float]] = {name: [] for name in NAMES}
        self.initial: dict[str, float] = {}

    def weights(self, names: Sequence[str]) -> np.ndarray:
        p = np.array([self.p[name] for name in names])
        return len(p) * np.exp(p) / np.exp(p).sum() if self.softmax else p

    def __call__(
        self, jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        w, norms = self.weights(names), np.linalg.norm(jacobian, axis=1)
        if at < self.epoch:
            for name, loss in zip(names, losses, strict=True):
                self.seen[name].append(loss)
            return weighted(w, jacobian, own=True)
        for name, loss in zip(names, losses, strict=True):
            if name not in self.initial:
                self.initial[name] = float(np.mean(self.seen[name] or [loss]))
        left = losses / np.array([self.initial[name] for name in names])
        aim = (w * norms).mean() * (left / left.mean()) ** self.alpha
        slope = np.sign(w * norms - aim) * norms  # d sum |G - aim| / d w
        if self.softmax:
            share = w / len(w)
            slope = len(w) * (np.diag(share) - np.outer(share, share)) @ slope
        before = sum(self.p[name] for name in names)
        for name, grad in zip(names, slope, strict=True):
            self.p[name] += self.adam[name](float(grad))
        if not self.softmax:
            after = sum(self.p[name] for name in names)
            for name in names:
                self.p[name] *= before / after
        return weighted(w, jacobian, own=True)


@pytest.mark.parametrize(("method", "known"), [
    (GradNorm(), Reference()),
    (GradNorm(alpha=0.0, lr=0.1, initial="step"), Reference(0.0, 0.1, epoch=0)),
    (GradNorm(constraint="renormalise", epoch_steps=3), Reference(softmax=False, epoch=3)),
])  # fmt: skip
def test_steps_are_those_of_the_definition(method: GradNorm, known: Reference) -> None:
    update = compare(method, known, steps=20, b=0.7)
    told = update.told()
    assert told == pytest.approx(dict(zip(NAMES, known.weights(NAMES), strict=True)), abs=1e-9)
    assert sum(told.values()) == pytest.approx(3) and max(told.values()) - min(told.values()) > 0.01


def test_norms_become_equal_without_alpha() -> None:
    """A model that stays: w_k |g_k| are equal at the end."""
    model = Trunk()
    update = build(GradNorm(alpha=0.0, lr=0.01, initial="step"), model, lr=0.0)
    (ids,) = batches(1)
    norms: list[np.ndarray] = []
    plain = update.rule.weights
    update.rule.weights = lambda view: norms.append(view.norms.numpy()) or plain(view)
    for _ in range(1200):
        step(update, model, ids)
    scaled = np.array([update.told()[name] for name in NAMES]) * norms[-1]
    assert scaled.max() / scaled.min() < 1.05 < norms[-1].max() / norms[-1].min() / 2


def test_somebody_must_say_how_long_an_epoch_is() -> None:
    with pytest.raises(ValueError, match="Set `epoch_steps`"):
        Aggregated(aggregator=GradNorm()).build(Trunk(), steps=10, weights={})
    Aggregated(aggregator=GradNorm(initial="step")).build(Trunk(), steps=10, weights={})


@pytest.mark.parametrize("name", ["alpha", "lr", "epoch_steps"])
def test_errors(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` should be finite and not negative"):
        GradNorm(**{name: -1})  # type: ignore[arg-type]
