"""The focal loss against the paper's formula with probabilities, its limits, its bias, and what is not binary."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from unbraid.losses.focal import Focal
from unbraid.losses.supervised import Supervised
from unbraid.types import Batch, Output, Schema, Task

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
TASKS = (Task("click", weight=2.0), Task("dwell", kind="real"), Task("stars", kind="multiclass"))
SCHEMA = Schema((), TASKS, domains=("(unknown)", "(missing)", "feed", "search"), classes={"stars": ("1", "3", "5")})
B = 20


def make(seed: int = 0) -> tuple[Output, Batch]:
    g = torch.Generator().manual_seed(seed)
    labels = {
        "click": torch.randint(2, (B,), generator=g).float(),
        "dwell": torch.randn(B, generator=g),
        "stars": torch.randint(3, (B,), generator=g),
    }
    observed = {name: torch.rand(B, generator=g) < 0.8 for name in labels}
    labels["click"][~observed["click"]] = math.nan
    weight = 0.5 + torch.rand(B, generator=g).double()
    rate = (0.1 + 0.9 * torch.rand(B, generator=g)).double()
    domain = torch.randint(2, 4, (B,), generator=g)
    places = torch.arange(B), torch.zeros(B, dtype=torch.int8), torch.full((B,), -1)
    batch = Batch({}, labels, observed, domain, weight, *places, {"sampling_rate.click": rate})
    shapes: dict[str, tuple[int, ...]] = {"click": (B,), "dwell": (B,), "stars": (B, 3)}
    logits = {n: (2 * torch.randn(*s, generator=g, dtype=torch.float64)).requires_grad_() for n, s in shapes.items()}
    return Output(logits, {}, torch.zeros(B, 1)), batch


def of_row(output: Output, batch: Batch, i: int, gamma: float, alpha: float | None) -> Tensor:
    p = 1 / (1 + torch.exp(-output.logits["click"][i]) * batch.meta["sampling_rate.click"][i])
    p = p if batch.labels["click"][i] == 1 else 1 - p
    a = 1.0 if alpha is None else alpha if batch.labels["click"][i] == 1 else 1 - alpha
    return -a * (1 - p) ** gamma * torch.log(p)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("by", ["task", "domain", "task@domain"])
def test_value_and_gradient(gamma: float, alpha: float | None, by: Any) -> None:
    output, batch = make()
    assert batch.weight is not None
    losses = Focal(gamma=gamma, alpha=alpha, by=by, weight=0.5).bind(SCHEMA)(output, batch, 0)
    plain = Supervised(by=by, weight=0.5).bind(replace(SCHEMA, tasks=TASKS[1:]))(output, batch, 0)
    for code in [None] if by == "task" else [2, 3]:
        rows = [i for i in range(B) if batch.observed["click"][i] and code in (None, int(batch.domain[i]))]
        total = sum(batch.weight[i] * of_row(output, batch, i, gamma, alpha) for i in rows)
        want = 0.5 * total / sum(batch.weight[i] for i in rows)
        name = "click" if code is None else SCHEMA.domains[code] if by == "domain" else f"click@{SCHEMA.domains[code]}"
        if by == "domain":
            want = 2.0 * want + plain[name]
        torch.testing.assert_close(losses[name], want, **EXACT)
        z = output.logits["click"]
        mine, theirs = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (losses[name], want))
        torch.testing.assert_close(mine, theirs, **EXACT)
    for name, loss in plain.items() if by != "domain" else ():
        assert torch.equal(losses[name], loss)


def test_without_gamma_it_is_the_supervised_loss() -> None:
    output, batch = make()
    focal, plain = (term.bind(SCHEMA)(output, batch, 0) for term in (Focal(gamma=0.0), Supervised()))
    assert focal.keys() == plain.keys()
    for name, loss in plain.items():
        torch.testing.assert_close(focal[name], loss, **EXACT)


@pytest.mark.parametrize(
    ("rate", "alpha", "found"), [(0.01, None, 0.154), (0.1, None, 0.306), (0.01, 0.25, 0.108), (0.1, 0.25, 0.227)]
)
def test_it_is_not_calibrated(rate: float, alpha: float | None, found: float) -> None:
    """The mean loss of rows of one rate is stationary where the page says."""
    places = torch.arange(2), torch.zeros(2, dtype=torch.int8), torch.full((2,), -1)
    y = {"click": torch.tensor([1.0, 0.0])}
    seen = {"click": torch.ones(2, dtype=torch.bool)}
    weight = torch.tensor([rate, 1 - rate], dtype=torch.float64)
    batch = Batch({}, y, seen, torch.full((2,), 2), weight, *places)
    term = Focal(alpha=alpha).bind(replace(SCHEMA, tasks=TASKS[:1]))
    slopes = []
    for p in (found - 0.001, found + 0.001):
        z = torch.tensor(p, dtype=torch.float64).logit().requires_grad_()
        term(Output({"click": z.expand(2)}, {}, torch.zeros(2, 1)), batch, 0)["click"].backward()
        slopes.append(z.grad.item())
    assert slopes[0] < 0 < slopes[1]


def test_extreme_logits_are_finite() -> None:
    _, batch = make()
    z = torch.tensor([-1e4, 1e4, -200.0, 200.0] * 5).requires_grad_()
    term = Focal().bind(replace(SCHEMA, tasks=TASKS[:1]))
    loss = term(Output({"click": z}, {}, torch.zeros(B, 1)), batch, 0)["click"]
    loss.backward()
    assert torch.isfinite(loss) and loss.dtype == torch.float32 and torch.isfinite(z.grad).all()


def test_absent_tasks_have_no_objective() -> None:
    output, batch = make()
    hidden = replace(batch, observed={**batch.observed, "click": torch.zeros(B, dtype=torch.bool)})
    assert set(Focal().bind(SCHEMA)(output, hidden, 0)) == {"dwell", "stars"}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("gamma", -1.0), ("gamma", math.inf), ("alpha", 0.0), ("alpha", 1.0), ("weight", 0.0), ("weight", math.inf)],
)
def test_wrong_parameters(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=f"Parameter `{name}` should be"):
        Focal(**{name: wrong})  # type: ignore[arg-type]
