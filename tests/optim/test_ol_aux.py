"""OL-AUX in the form with cosines, written out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from balancing_kit import NAMES, Trunk, build, compare, view_of, weighted

from unbraid.optim.ol_aux import OLAUX


@pytest.mark.parametrize(("method", "beta", "every", "floor"), [
    (OLAUX(), 1e-4, 5, 0.0), (OLAUX(beta=0.8, every=2, floor=0.3), 0.8, 2, 0.3),
])  # fmt: skip
def test_steps_are_those_of_the_definition(method: OLAUX, beta: float, every: int, floor: float) -> None:
    w = dict.fromkeys(NAMES, 1.0)
    cosines: dict[str, list[float]] = {name: [] for name in NAMES}

    def rule(
        jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        used = np.array([w[name] for name in names])
        if "a" in names:
            target = jacobian[list(names).index("a")]
            for name, g in zip(names, jacobian, strict=True):
                if name != "a":
                    cosines[name].append(g @ target / np.linalg.norm(g) / np.linalg.norm(target))
                    if len(cosines[name]) % every == 0:
                        w[name] = max(w[name] + beta * sum(cosines[name][-every:]), floor)
        return weighted(used, jacobian, own=True)

    update = compare(method, rule, steps=20, b=2.0)
    assert update.told() == pytest.approx(w, abs=1e-9)
    assert w["a"] == 1 and w["b"] != 1 != w["c"]
    if floor:
        assert min(w.values()) == floor


def test_agreement_raises_and_conflict_lowers() -> None:
    rule = build(OLAUX(beta=0.1, every=1), Trunk()).rule
    rule.weights(view_of(np.array([[1.0, 0.0], [2.0, 0.0], [-3.0, 0.0]])))
    assert rule.told() == pytest.approx({"a": 1.0, "b": 1.1, "c": 0.9})


@pytest.mark.parametrize(("given", "message"), [
    ({"beta": 0.0}, "`beta`"), ({"every": 0}, "`every`"), ({"floor": 2.0}, "`floor`"),
])  # fmt: skip
def test_errors(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OLAUX(**given)  # type: ignore[arg-type]
