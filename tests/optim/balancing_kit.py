"""A trunk with three tasks that want different things of it, and an independent training loop in NumPy and plain autograd."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.config import Aggregated, AggregatorChoice, Weighted, WeightingChoice
from unbraid.encoders.table import Table, Tables, Views
from unbraid.slots import Course
from unbraid.types import Losses, Output

V, NAMES = 23, ("a", "b", "c")
LR, EPS, BETAS = 0.02, 1e-6, (0.9, 0.999)
CLOSE = {"rtol": 0.0, "atol": 1e-9}
WEIGHTINGS, AGGREGATORS = (
    typing.get_args(typing.get_args(choice)[0]) for choice in (WeightingChoice, AggregatorChoice)
)


class Trunk(nn.Module):
    """One shared table, one shared layer, a head per task."""

    def __init__(self, lazy: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.views: Tables = Views(width=4, std=1.0, lazy_rows=0 if lazy else -1).build(NAMES, {"item": V})
        self.layer = nn.Linear(4, 5)
        self.heads = nn.ModuleDict({name: nn.Linear(5, 1) for name in NAMES})
        self.double()

    @property
    def tables(self) -> dict[str, Table]:
        return dict(self.views.tables.items())  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Output:
        read, lookups = self.views({"item": [ids]})
        hidden = torch.tanh(self.layer(read["shared", "item", "value"][0].gather()))
        logits = {name: head(hidden).squeeze(1) for name, head in self.heads.items()}
        return Output(logits, {}, hidden, {}, lookups)

    def shared(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("heads")]


def batches(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (9,), generator=generator) for _ in range(count)]


def losses_of(output: Output, ids: Tensor, names: Sequence[str] = NAMES) -> dict[str, Tensor]:
    """Targets of the ids that conflict (a against b), and a third task on another scale."""
    aims = {"a": torch.sin(ids.double()), "b": -torch.sin(ids.double() + 0.3), "c": 3 * torch.cos(ids.double())}
    return {name: (output.logits[name] - aims[name]).square().mean() for name in names}


class Rehearse:
    """What a session gives an update that asks for more passes."""

    def __init__(self, model: Trunk) -> None:
        self.model, self.ids, self.names = model, torch.zeros(1, dtype=torch.int64), NAMES

    def again(self) -> tuple[Losses, Output]:
        output = self.model(self.ids)
        return losses_of(output, self.ids, self.names), output

    def valid(self, step: int) -> tuple[Losses, Output]:
        (ids,) = batches(1, 1000 + step)
        output = self.model(ids)
        return losses_of(output, ids), output


def build(
    method: Any, model: Trunk, weights: Mapping[str, float] | None = None, per_epoch: int = 4, **more: Any
) -> Any:
    """The update of a weighting or an aggregator, with task `a` as the target."""
    config: Any = Weighted if isinstance(method, WEIGHTINGS) else Aggregated
    slot = {"weighting" if config is Weighted else "aggregator": method}
    given = {"lr": LR, "eps": EPS, **more}
    course = Course(per_epoch, 3, ("a",), tuple("abcdefg"), Rehearse(model))
    return config(**slot, **given).build(model, steps=100, weights=weights or {}, objectives=NAMES, course=course)


def step(update: Any, model: Trunk, ids: Tensor, names: Sequence[str] = NAMES) -> None:
    rehearse = (getattr(update, "weighting", None) or update.rule).__dict__.get("setting")
    if rehearse is not None and rehearse.course.rehearse is not None:
        rehearse.course.rehearse.ids, rehearse.course.rehearse.names = ids, names
    output = model(ids)
    update(losses_of(output, ids, names), output)


class Adam:
    """One number's Adam, in plain floats."""

    def __init__(self, lr: float = LR) -> None:
        self.lr, self.m, self.v, self.t = lr, 0.0, 0.0, 0

    def __call__(self, grad: float) -> float:
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * grad
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * grad**2
        root = np.sqrt(self.v / (1 - BETAS[1] ** self.t)) + EPS
        return -self.lr * self.m / (1 - BETAS[0] ** self.t) / root


# (J (K, n), losses (K,), names, step, model) -> the combined gradient (n,), and the factor of each task's own gradient (K,)
Reference = Callable[[np.ndarray, np.ndarray, Sequence[str], int, Trunk], tuple[np.ndarray, np.ndarray]]


def reference(
    rule: Reference, ids: Sequence[Tensor], names: Sequence[Sequence[str]], weights: Mapping[str, float]
) -> Trunk:
    """Train a trunk with dense tables: autograd's gradients, the rule in NumPy, torch's Adam."""
    model = Trunk()
    adam = torch.optim.Adam(model.parameters(), lr=LR, betas=BETAS, eps=EPS)
    for number, (batch, present) in enumerate(zip(ids, names, strict=True)):
        losses = losses_of(model(batch), batch, present)
        losses = {name: loss * weights.get(name, 1.0) for name, loss in losses.items()}
        grads = {n: torch.autograd.grad(loss, model.shared(), retain_graph=True) for n, loss in losses.items()}
        own = {n: torch.autograd.grad(loss, list(model.heads[n].parameters())) for n, loss in losses.items()}
        jacobian = np.stack([torch.cat([g.flatten() for g in grads[n]]).numpy() for n in present])
        values = np.array([float(losses[n].detach()) for n in present])
        combined, factors = rule(jacobian, values, present, number, model)
        adam.zero_grad()
        parts = torch.from_numpy(combined).split([p.numel() for p in model.shared()])
        for p, part in zip(model.shared(), parts, strict=True):
            p.grad = part.view_as(p).clone()
        for n, factor in zip(present, factors, strict=True):
            for p, grad in zip(model.heads[n].parameters(), own[n], strict=True):
                p.grad = grad * factor
        adam.step()
    return model


PATTERN = (NAMES, NAMES, ("a", "b"), NAMES, ("b", "c"), NAMES, ("a", "c"))


def compare(method: Any, rule: Reference, steps: int = 14, all_present: bool = False, **weights: float) -> Any:
    """Both loops on the same batches, with tasks that come and go; returns the update."""
    ids = batches(steps)
    names = [NAMES if all_present else PATTERN[at % len(PATTERN)] for at in range(steps)]
    mine = Trunk()
    update = build(method, mine, weights)
    for batch, present in zip(ids, names, strict=True):
        step(update, mine, batch, present)
    theirs = reference(rule, ids, names, weights)
    moved = [float((p - q).detach().abs().max()) for p, q in zip(mine.parameters(), Trunk().parameters(), strict=True)]
    assert min(moved) > 1e-5, "everything should have moved"
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    return update


def weighted(weights: np.ndarray, jacobian: np.ndarray, own: bool) -> tuple[np.ndarray, np.ndarray]:
    """The answer of a rule that weighs losses (``own``), or gradients alone."""
    return weights @ jacobian, weights if own else np.ones(len(weights))


def view_of(jacobian: np.ndarray, losses: Sequence[float] = (), names: Sequence[str] = "abcdefg", seed: int = 0) -> Any:
    """What a rule sees of a Jacobian."""
    from unbraid.optim.aggregated import View

    j = torch.from_numpy(np.asarray(jacobian, float))
    values = torch.tensor(losses or [1.0] * len(j), dtype=torch.float64)
    return View(tuple(names[: len(j)]), j @ j.T, values, lambda: j, (seed, 0))


def rule_of(method: Any) -> Any:
    """A bound aggregator whose target is task `a`."""
    return build(method, Trunk()).rule


def conflicting(k: int = 3, n: int = 7, seed: int = 0) -> np.ndarray:
    """(K, n) a Jacobian with rows of different lengths, some of which conflict."""
    draw = np.random.default_rng(seed)
    found = draw.normal(size=(k, n)) * 10.0 ** draw.uniform(-2, 1, (k, 1))
    found[1] -= 1.5 * found[0] / np.linalg.norm(found[0]) * np.linalg.norm(found[1])
    return found
