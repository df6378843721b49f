"""A small log with every kind of column, its declaration, and a run on it."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Events, Split
from unbraid.encoders.table import Views
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Feature, Field, History, Task


def make_log(rows: int = 600, users: int = 40, seed: int = 0) -> pl.DataFrame:
    """A log with ids, a number with nulls, a bag, a vector, two binary labels (one with nulls), a real and a multiclass
    one, three domains, and users whose taste shows in their history."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, users, rows), rng.integers(0, 30, rows)
    taste = rng.normal(size=(users, 3))[user] * rng.normal(size=(30, 3))[item]
    logit = taste.sum(1)
    price = rng.normal(size=rows)
    bought = rng.random(rows) < 1 / (1 + np.exp(-logit - price))
    return pl.DataFrame({
        "user": user,
        "item": [f"i{i}" for i in item],
        "shop": item % 5,
        "site": rng.choice(["home", "search", "mail"], rows, p=[0.6, 0.3, 0.1]),
        "time": np.sort(rng.integers(0, 10**6, rows)) * 1000,
        "price": [None if rng.random() < 0.1 else float(p) for p in price],
        "tags": [[int(t) for t in rng.integers(0, 9, rng.integers(0, 4))] for _ in range(rows)],
        "text_vector": [[float(x) for x in v] for v in rng.normal(size=(rows, 3))],
        "click": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int),
        "buy": [None if hidden else int(bought) for hidden, bought in zip(rng.random(rows) < 0.3, bought, strict=True)],
        "spend": logit + rng.normal(size=rows),
        "size": rng.choice(["S", "M", "L"], rows),
    })  # fmt: skip


def make_data(**changes: Any) -> Data:
    """The declaration of `make_log` (table ``log``, in memory)."""
    data = Data(
        rows="log",
        user="user",
        time="time",
        domain="site",
        features=(
            Feature("item"),
            Feature("shop"),
            Feature("price", kind="number"),
            Feature("tags", kind="bag"),
            Feature("text_vector", kind="vector"),
        ),
        fields=(Field("item"), Field("shop"), Field("clicked")),
        events=(Events(columns={"item": "item", "shop": "shop", "clicked": "click"}),),
        histories=(
            History("seen", fields=("item", "shop", "clicked", "gap"), length=10),
            History("liked", fields=("item",), where="clicked = 1", length=5),
        ),
        tasks=(Task("click"), Task("buy")),
        split=Split(kind="time", valid_from=600 * 10**6, test_from=800 * 10**6),
    )
    return replace(data, **changes)


def make_run(**changes: Any) -> Run:
    """A small run on `make_log`."""
    run = Run(
        data=make_data(),
        name="toy",
        model=ModelChoice(tower=SharedBottom(bottom=(16,), tower=(8,))),
        update=Joint(lr=0.01),
        training=Training(batch_size=64, steps=20, evaluate_every=10, checkpoint_seconds=0),
    )
    return replace(run, **changes)


def config_classes() -> list[type]:
    """Every dataclass that a run can hold."""
    found: list[type] = []

    def visit(at: Any) -> None:
        for member in typing.get_args(at) or [at]:
            if typing.get_args(member):
                visit(member)
            elif dataclasses.is_dataclass(member) and member not in found:
                found.append(member)  # type: ignore[arg-type]
                for hint in typing.get_type_hints(member, include_extras=True).values():
                    visit(hint)

    visit(Run)
    return found


def views_for(tower: Any, **options: Any) -> Views:
    """Views that a tower accepts."""
    for kind in ("shared", "per_task", "separate"):
        views = Views(kind=kind, width=4, **options)  # type: ignore[arg-type]
        try:
            names = views.names(["a", "b"])
            tower.build(["a", "b"], names, [8] * len(names))
            return views
        except ValueError:
            continue
    raise AssertionError(f"{tower} accepts no views")
