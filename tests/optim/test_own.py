"""Updates on a plain module, beside plain torch."""

from __future__ import annotations

import copy
import typing

import pytest
import torch
from torch import Tensor, nn

from unbraid import config
from unbraid.optim.adatask import AdaTask
from unbraid.optim.joint import Joint
from unbraid.optim.own import Stepper

MEMBERS = [member for member in typing.get_args(typing.get_args(config.UpdateChoice)[0])]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom, self.heads = nn.Linear(5, 4), nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.bottom(x).tanh()
        return {task: head(hidden)[:, 0] for task, head in self.heads.items()}


def setting() -> tuple[Two, Two, list[tuple[Tensor, dict[str, Tensor]]]]:
    torch.manual_seed(0)
    model = Two().double()
    batches = [
        (torch.randn(8, 5, dtype=torch.float64), {t: torch.randn(8, dtype=torch.float64) for t in "ab"})
        for _ in range(12)
    ]
    return model, copy.deepcopy(model), batches


def losses(model: Two, x: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: (z - y[task]).square().mean() * (9 if task == "a" else 1) for task, z in model(x).items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in pairs)


def test_the_joint_update_is_adam_on_the_weighted_sum() -> None:
    mine, theirs, batches = setting()
    step = Stepper(Joint(lr=0.01), mine, weights={"b": 2.0})
    opt = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for x, y in batches:
        step(losses(mine, x, y))
        found = losses(theirs, x, y)
        opt.zero_grad()
        (found["a"] + 2 * found["b"]).backward()
        opt.step()
    assert same(mine, theirs)


def test_shared_parameters_take_a_step_per_task() -> None:
    """An independent reference: an Adam per task on shared parameters, whose steps are added; one for each head."""
    mine, theirs, batches = setting()
    step = Stepper(AdaTask(lr=0.01), mine)
    shared = list(theirs.bottom.parameters())
    copies = {task: [nn.Parameter(p.detach().clone()) for p in shared] for task in "ab"}
    each = {task: torch.optim.Adam(copies[task], lr=0.01) for task in "ab"}
    heads = torch.optim.Adam(theirs.heads.parameters(), lr=0.01)
    for x, y in batches:
        step(losses(mine, x, y))
        found = losses(theirs, x, y)
        grads = {task: torch.autograd.grad(found[task], shared, retain_graph=True) for task in "ab"}
        heads.zero_grad()
        sum(found.values()).backward()  # type: ignore[union-attr]
        heads.step()
        before = [p.detach().clone() for p in shared]
        for task in "ab":
            for copied, old, grad in zip(copies[task], before, grads[task], strict=True):
                copied.data.copy_(old)
                copied.grad = grad
            each[task].step()
        for place, p in enumerate(shared):
            p.data.copy_(before[place] + sum(copies[task][place].data - before[place] for task in "ab"))
    assert same(mine, theirs)
    assert not same(mine, setting()[0])


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member().kind)
def test_every_update_trains_a_plain_module_and_resumes(member: type) -> None:
    mine, other, batches = setting()
    first = Stepper(member(lr=0.01), mine)
    before = sum(float(v.detach()) for v in losses(mine, *batches[0]).values())
    for _ in range(10):
        for x, y in batches[:4]:
            first(losses(mine, x, y))
    assert sum(float(v.detach()) for v in losses(mine, *batches[0]).values()) < before
    other.load_state_dict(mine.state_dict())
    second = Stepper(member(lr=0.01), other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for x, y in batches:
        first(losses(mine, x, y))
        second(losses(other, x, y))
    assert same(mine, other)


def test_errors_and_losses_that_are_absent() -> None:
    mine, theirs, batches = setting()
    with pytest.raises(ValueError, match="needs `steps`"):
        Stepper(Joint(learning_rate="cosine"), mine)
    step, (x, y) = Stepper(Joint(lr=0.01), mine), batches[0]
    with pytest.raises(FloatingPointError, match="`a` is nan"):
        step({**losses(mine, x, y), "a": mine(x)["a"].mean() * float("nan")})
    assert same(mine, theirs)
    step({"a": losses(mine, x, y)["a"]})
    assert torch.equal(mine.heads["b"].weight, theirs.heads["b"].weight), "what is absent does not move"
    assert not torch.equal(mine.heads["a"].weight, theirs.heads["a"].weight)
