"""Batches of rows with and without labels and their views, and runs on a small table of which few labels are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toylog import make_data, make_log, make_run

from unbraid.augmentations.tabular import Change, Tabular
from unbraid.config import ModelChoice, Run
from unbraid.data.mix import Mix
from unbraid.job import train
from unbraid.losses.supervised import Supervised
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training, Watcher
from unbraid.types import Batch, Output, Schema, Task

TASKS = (
    Task("click", weight=0.5), Task("buy", given="click"), Task("spend", kind="real"),
    Task("size", kind="multiclass", weight=2.0),
)  # fmt: skip
SCHEMA = Schema((), TASKS, classes={"size": ("S", "M", "L")})
OUTPUTS = {"click": 1, "buy": 1, "spend": 1, "size": 3}
KNOWN, HIDDEN = 6, 9
ROWS = KNOWN + HIDDEN + HIDDEN  # labelled, unlabelled, and the strong views of the latter


def make_batch(seed: int = 0, weighted: bool = False, strong: bool = True, of_all: bool = False) -> Batch:
    """Labelled rows, unlabelled ones, strong views of these (or, ``of_all``, of both); labels of hidden rows are noise."""
    g = torch.Generator().manual_seed(seed)
    plain = KNOWN + HIDDEN
    seen = torch.arange(plain) if of_all else torch.arange(KNOWN, plain)
    seen = seen if strong else seen[:0]
    rows, n = torch.cat([torch.arange(plain), seen]), plain + len(seen)
    view, pair = (rows.new_zeros(n).to(torch.int8), torch.full((n,), -1))
    view[plain:] = 1
    pair[seen], pair[plain:] = torch.arange(plain, n), seen
    known = (rows < KNOWN) & (view == 0)
    click = torch.randint(0, 2, (n,), generator=g).float()
    labels = {
        "click": click, "buy": torch.randint(0, 2, (n,), generator=g).float(), "spend": torch.randn(n, generator=g),
        "size": torch.randint(0, 3, (n,), generator=g),
    }  # fmt: skip
    observed = {name: known.clone() for name in labels} | {"buy": known & (click == 1)}
    weight = (torch.arange(n) % 4).float()[rows] if weighted else None
    return Batch({}, labels, observed, torch.full((n,), 2), weight, 100 + rows, view, pair)


def make_logits(batch: Batch, seed: int = 1, scale: float = 2.0) -> dict[str, Tensor]:
    """Leaves in float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = {name: (len(batch),) if k == 1 else (len(batch), k) for name, k in OUTPUTS.items()}
    drawn = {name: scale * torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: value.requires_grad_() for name, value in drawn.items()}


def say(logits: dict[str, Tensor], extras: dict[str, Tensor] | None = None, hidden: Any = None) -> Output:
    return Output(logits, hidden or {}, torch.zeros(0), extras or {})


def few_labels_run(*losses: Any, **changes: Any) -> Run:
    """A run on `toylog` that reads the labels of one site, with weak and strong views."""
    augment = Tabular(weak=Change(noise=0.05), strong=Change(features=0.3, history=0.5, noise=0.2))
    run = make_run(
        data=make_data(tasks=(Task("click"), Task("size", kind="multiclass")), withhold="site <> 'home'"),
        model=ModelChoice(tower=SharedBottom(bottom=(16,), tower=(8,))),
        losses=(Supervised(), *losses),
        augment=augment,
        training=Training(batch_size=32, steps=14, evaluate_every=7, checkpoint_seconds=0, mix=Mix(unlabelled=48)),
    )
    return replace(run, **changes)


class Dies(Watcher):
    """Kills the training at its second look."""

    def evaluated(self, step: int, *args: Any) -> None:
        if step > 7:
            raise KeyboardInterrupt


def weights_of(run: Run, out: Path | None = None, log: Any = None, **changes: Any) -> dict[str, Tensor]:
    """What training ends with."""
    log = make_log() if log is None else log
    result = train(run, out, tables={"log": log}, baseline=False, **changes)
    return result.bundle.model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
