"""Entropy minimisation: parity with its equation, its collapse, rows and tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_mcc import SCHEMA, B, a_batch, an_output
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.job import JobError, train
from unbraid.losses.entropy import Entropy
from unbraid.losses.mcc import class_confusion
from unbraid.losses.supervised import Supervised
from unbraid.losses.unlabelled import row_entropy

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient(weighted: bool) -> None:
    output = an_output()
    weight = torch.arange(B).float().remainder(5) if weighted else None
    batch = a_batch(weight=weight)
    (found,) = Entropy(weight=2.0, tasks=("click", "size")).bind(SCHEMA)(output, batch, 0).values()
    want = torch.zeros((), dtype=torch.float64)
    for name, rows, share in (("click", [4, 5, 6, 7, 10], 1.0), ("size", [4, 5, 6, 7, 8, 9], 0.5)):
        total, mass = torch.zeros((), dtype=torch.float64), 0.0
        for i in rows:
            z, w = output.logits[name][i], 1.0 if weight is None else float(weight[i])
            p = z.exp() / z.exp().sum() if z.ndim else torch.stack([1 - z.sigmoid(), z.sigmoid()])
            total, mass = total - w * (p * p.log()).sum(), mass + w
        want = want + share * total / mass
    torch.testing.assert_close(found, 2.0 * want, **EXACT)
    of = [output.logits["click"], output.logits["size"]]
    for mine, full in zip(torch.autograd.grad(found, of), torch.autograd.grad(2.0 * want, of), strict=True):
        torch.testing.assert_close(mine, full, **EXACT)


def test_rows_and_absence() -> None:
    output, batch = an_output(), a_batch()
    none = {name: torch.ones(B, dtype=torch.bool) for name in batch.observed}
    assert Entropy().bind(SCHEMA)(output, replace(batch, observed=none), 0) == {}
    assert set(Entropy(of="all").bind(SCHEMA)(output, replace(batch, observed=none), 0)) == {"entropy"}
    (one,) = Entropy(tasks=("size",), domains=("new",)).bind(SCHEMA)(output, batch, 0).values()
    z = output.logits["size"][[4, 5, 6]]
    torch.testing.assert_close(one, 0.5 * -(z.softmax(1) * z.log_softmax(1)).sum(1).mean(), **EXACT)


def test_a_collapse_is_its_minimum_and_class_confusions_maximum() -> None:
    collapsed = 1000 * torch.eye(4)[[1] * 6]
    assert float(row_entropy(collapsed.log_softmax(1)).mean()) == 0
    assert float(class_confusion(collapsed)) == pytest.approx(0.75)
    sharp = torch.tensor([[1e4, 0.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(row_entropy(sharp.log_softmax(1)).sum(), sharp)
    assert torch.isfinite(grad).all()


def test_in_a_run_and_errors() -> None:
    run = make_run(data=make_data(withhold="site = 'mail'"), losses=(Supervised(), Entropy()))
    run = replace(run, training=replace(run.training, steps=4, evaluate_every=4))
    train(run, tables={"log": make_log()}, baseline=False)
    with pytest.raises(
        JobError, match="A loss teaches rows without a label of buy, click, and no training row lacks one"
    ):
        log = make_log()
        train(
            replace(run, data=make_data()),
            tables={"log": log.with_columns(buy=log["buy"].fill_null(0))},
            baseline=False,
        )
    with pytest.raises(ValueError, match="Parameter `weight` should be positive"):
        Entropy(weight=0.0)
    with pytest.raises(ValueError, match=r"`domains` should be among \['old', 'new'\]"):
        Entropy(domains=("x",)).bind(SCHEMA)
    assert config.from_dict(config.to_dict(run)) == run
