"""Gradient cosine similarity against its definition; with a negative cosine it is single-task training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from balancing_kit import Trunk, batches, build, compare, losses_of, rule_of, step, view_of

from unbraid.optim.gcs import GCS
from unbraid.optim.joint import Joint


@pytest.mark.parametrize("by_cosine", [False, True])
def test_steps_are_those_of_the_definition(by_cosine: bool) -> None:
    used: list[float] = []

    def rule(
        jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        target = jacobian[list(names).index("a")]
        total = np.zeros_like(target)
        for name, g in zip(names, jacobian, strict=True):
            cosine = g @ target / np.linalg.norm(g) / np.linalg.norm(target)
            factor = 1.0 if name == "a" else max(cosine, 0.0) if by_cosine else float(cosine > 0)
            used.append(factor)
            total += factor * g
        return total, np.ones(len(names))

    compare(GCS(weighted=by_cosine), rule, all_present=True, c=0.5)
    assert 0.0 in used, "some gradients should have conflicted"


def test_a_negative_cosine_is_single_task_training() -> None:
    """Auxiliary losses whose gradient on shared parameters is minus the target's: the shared part moves as without them."""
    both, alone = Trunk(), Trunk()
    update, plain = build(GCS(), both), Joint(lr=0.02, eps=1e-6).build(alone, steps=100, weights={})
    for ids in batches(10):
        output = both(ids)
        a = losses_of(output, ids)["a"]
        update({"a": a, "b": -2 * a}, output)
        output = alone(ids)
        plain({"a": losses_of(output, ids)["a"]}, output)
    for p, q in zip(both.shared(), alone.shared(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_without_the_target_nothing_shared_moves() -> None:
    model = Trunk()
    update = build(GCS(), model, weight_decay=0.1, table_weight_decay=0.1)
    for ids in batches(3):
        step(update, model, ids)
    before = [p.detach().clone() for p in model.shared()]
    head = model.heads["b"].weight.detach().clone()
    step(update, model, batches(1, 5)[0], ("b", "c"))
    assert all(torch.equal(p, old) for p, old in zip(model.shared(), before, strict=True))
    assert not torch.equal(model.heads["b"].weight, head), "an auxiliary task's own parameters train"


def test_several_targets_count_by_their_sum() -> None:
    j = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 3.0], [-3.0, 1.0]])
    rule = build(GCS(targets=("a", "b")), Trunk()).rule
    assert rule.weights(view_of(j)).tolist() == [1, 1, 1, 0]
    assert rule_of(GCS(weighted=True)).weights(view_of(j)).tolist() == pytest.approx([1, 0, 0, 0])


def test_errors() -> None:
    with pytest.raises(ValueError, match="`targets` should name objectives or tasks among .* Found \\['d'\\]"):
        build(GCS(targets=("d",)), Trunk())
    from unbraid.config import Aggregated

    with pytest.raises(ValueError, match="No task has the role `target`"):
        Aggregated(aggregator=GCS()).build(Trunk(), steps=1, weights={})
    update = build(GCS(), Trunk())
    with pytest.raises(ValueError, match="Objectives \\['tv'\\] are no tasks and have no role. Set `targets`"):
        update.rule.weights(view_of(np.eye(2), names=("a", "tv")))
