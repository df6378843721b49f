"""Auto-lambda: its slopes against second-order autograd, the weights' steps, and that the look-ahead leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from balancing_kit import LR, NAMES, Adam, Trunk, batches, build, compare, losses_of, step, weighted
from torch import Tensor
from torch.func import functional_call

from unbraid.config import Weighted
from unbraid.optim.auto_lambda import AutoLambda, Leaves
from unbraid.slots import Course


def slopes(
    model: Trunk, ids: Tensor, names: Sequence[str], w: dict[str, float], at: int, ahead: float
) -> dict[str, float]:
    """d L_val(theta - ahead grad sum w L) / d w by autograd through the step."""
    weights = torch.tensor([w[name] for name in names], dtype=torch.float64, requires_grad=True)
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    losses = losses_of(functional_call(model, params, (ids,)), ids, names)
    total = (weights * torch.stack(list(losses.values()))).sum()
    grads = torch.autograd.grad(total, list(params.values()), create_graph=True, allow_unused=True)
    moved = {n: p if g is None else p - ahead * g for (n, p), g in zip(params.items(), grads, strict=True)}
    (seen,) = batches(1, 1000 + at)
    value = losses_of(functional_call(model, moved, (seen,)), seen)["a"]
    return dict(zip(names, torch.autograd.grad(value, weights)[0].tolist(), strict=True))


@pytest.mark.parametrize("lazy", [True, False])
def test_slopes_are_those_of_autograd_through_the_step(lazy: bool) -> None:
    for ahead in (None, 0.5):
        model, twin = Trunk(lazy), Trunk()
        update = build(AutoLambda(ahead=ahead, radius=1e-4), model)
        found: dict[str, Tensor] = {}
        update.weighting.numbers.step = found.update
        for at, ids in enumerate(batches(3)):
            twin.load_state_dict(model.state_dict())
            step(update, model, ids)
            exact = slopes(twin, ids, NAMES, dict.fromkeys(NAMES, 0.1), at, ahead or LR)
            assert {name: float(v) for name, v in found.items()} == pytest.approx(exact, rel=1e-5, abs=1e-9)


def test_steps_are_those_of_the_definition() -> None:
    w, adam = dict.fromkeys(NAMES, 0.1), {name: Adam(0.02) for name in NAMES}
    ids = batches(14)

    def rule(
        jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        for name, slope in slopes(model, ids[at], names, w, at, LR).items():
            w[name] = max(w[name] + adam[name](slope), 0.0)
        return weighted(np.array([w[name] for name in names]), jacobian, own=True)

    from balancing_kit import CLOSE

    CLOSE["atol"] = 1e-4  # a finite difference beside a derivative
    try:
        update = compare(AutoLambda(lr=0.02, radius=1e-4), rule)
    finally:
        CLOSE["atol"] = 1e-9
    assert update.told() == pytest.approx(w, abs=1e-3)
    assert max(w.values()) - min(w.values()) > 0.05


@pytest.mark.parametrize("lazy", [True, False])
def test_shifted_parameters_come_back_bit_for_bit(lazy: bool) -> None:
    model = Trunk(lazy)
    update = build(AutoLambda(), model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (ids,) = batches(1)
    output = model(ids)
    loss = losses_of(output, ids)["a"]
    leaves = Leaves(update, None)
    parts = leaves.gradient(loss, output, keep=True)
    leaves.shift(parts, -1.0)
    leaves.shift(parts, 3.0)
    shifted = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert {"layer.weight", "heads.a.weight"} < set(shifted) and any("views" in name for name in shifted)
    leaves.put_back()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    loss.backward()  # the graph from before is still good


def test_an_auxiliary_task_that_hurts_loses_weight() -> None:
    """`b` wants the opposite of the target `a`."""
    model = Trunk()
    update = build(AutoLambda(lr=0.01), model, lr=0.002)
    rehearse = update.weighting.setting.course.rehearse
    plain = rehearse.again

    def both(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"a": losses["a"], "b": 5 - losses["a"]}

    rehearse.again = lambda: (both(plain()[0]), plain()[1])
    for ids in batches(40):
        rehearse.ids = ids
        output = model(ids)
        update(both(losses_of(output, ids)), output)
    told = update.told()
    assert told["b"] < 0.01 and told["a"] > 0.15


def test_a_validation_batch_without_the_target_moves_no_weight() -> None:
    model = Trunk()
    update = build(AutoLambda(), model)
    rehearse = update.weighting.setting.course.rehearse
    full = rehearse.valid
    rehearse.valid = lambda at: ({"b": full(at)[0]["b"]}, full(at)[1])
    step(update, model, batches(1)[0])
    assert update.told() == dict.fromkeys(NAMES, pytest.approx(0.1))


def test_a_validation_loss_that_is_not_finite_moves_nothing() -> None:
    model = Trunk()
    update = build(AutoLambda(), model)
    rehearse = update.weighting.setting.course.rehearse
    full = rehearse.valid
    rehearse.valid = lambda at: ({"a": full(at)[0]["a"] * float("nan")}, full(at)[1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match="Loss of `a` is nan at step 0"):
        step(update, model, batches(1)[0])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_errors() -> None:
    model = Trunk()
    alone: Any = Weighted(weighting=AutoLambda()).build(model, steps=1, weights={}, course=Course(targets=("a",)))
    with pytest.raises(ValueError, match="needs validation batches, which only a session gives"):
        step(alone, model, batches(1)[0])
    with pytest.raises(ValueError, match="No task has the role `target`"):
        Weighted(weighting=AutoLambda()).build(model, steps=1, weights={})
    for name in ("lr", "start", "radius", "ahead"):
        with pytest.raises(ValueError, match=f"`{name}` should be positive"):
            AutoLambda(**{name: 0.0})
    with pytest.raises(ValueError, match="`floor` should be in"):
        AutoLambda(floor=0.5)
