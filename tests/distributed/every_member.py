"""A small run with every member of every slot, for trainings in one process and in several."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from toylog import make_data, make_run, views_for

from unbraid import config
from unbraid.augmentations.tabular import Change, Tabular
from unbraid.class_head import ClassFile, write_vectors
from unbraid.config import ModelChoice, Run
from unbraid.data.mix import Mix
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.losses.exposure import Exposure
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Feature, Schema, Task

TASKS = (
    Task("click"), Task("buy", given="click"), Task("spend", kind="real", role="auxiliary", weight=0.5),
    Task("size", kind="multiclass"),
)  # fmt: skip
STEPS = 4
NO_DRAW = Tabular(weak=Change(features=0.0, history=1.0), strong=Change(features=0.0, history=1.0))


def members(choice: Any) -> list[Any]:
    """The classes of a slot's union."""
    inner = typing.get_args(choice)[0] if typing.get_origin(choice) is typing.Annotated else choice
    return list(typing.get_args(inner)) or [inner]


def base(**changes: Any) -> Run:
    """Weights of rows, labels that only some rows have, lazy tables with decay that catches up, a bound of the gradient."""
    data = make_data(
        tasks=TASKS, weight="abs(coalesce(price, 0.5)) + 0.1", request="shop", exposure=("user", "item"),
        withhold="site = 'mail'",
        features=(*make_data().features, Feature("other_vector", column="text_vector", kind="vector")),
    )  # fmt: skip
    run = make_run(
        data=data, model=small(), update=Joint(lr=0.02, weight_decay=0.01, table_weight_decay=0.1, clip_norm=5.0),
        training=Training(batch_size=47, steps=STEPS, evaluate_every=2, metric="logloss", checkpoint_seconds=0),
    )  # fmt: skip
    return replace(run, **changes)


def small(**changes: Any) -> ModelChoice:
    parts: dict[str, Any] = {"tower": SharedBottom(bottom=(8,), tower=(6,)), "tables": Views(width=4, lazy_rows=0)}
    return ModelChoice(**{**parts, **changes})


def words(member: type, *keys: str) -> Iterator[tuple[str, Any]]:
    """The member as it is, and with each other word that some keys of it may have."""
    kind = member().kind  # type: ignore[attr-defined]
    yield kind, member()
    hints = typing.get_type_hints(member)
    for part in dataclasses.fields(member):
        if part.name in keys and typing.get_origin(hints[part.name]) is typing.Literal:
            for word in typing.get_args(hints[part.name]):
                if word not in (part.default, "error"):
                    yield f"{kind}, {part.name} {word}", member(**{part.name: word})


def models() -> Iterator[tuple[str, str, Run]]:
    for cls in members(config.TowerChoice):
        for name, tower in words(cls, "norm"):
            yield "tower", name, base(model=small(tower=tower, tables=views_for(tower, lazy_rows=0)))
    dense = replace(small(), tables=Views(width=4, lazy_rows=-1))
    yield "tower", "shared_bottom, dense tables", base(model=dense)
    for tower, kind in ((config.STEM, "per_task"), (config.STEMAL, "separate")):
        views = Views(kind=kind, by="domain", width=4, lazy_rows=0)  # type: ignore[arg-type]
        mcc = (Supervised(), config.MCC(of="all"))  # reads rows of domains without labels
        yield "tower", f"{tower().kind}, by domain", base(model=small(tower=tower(), tables=views), losses=mcc)
    heads = small(heads=Heads(by="domain", hidden=(4,)))
    yield "tower", "heads by domain", base(model=heads, losses=(Supervised(), config.MCC(of="all")))
    for cls in members(config.HistoryChoice):
        for name, history in words(cls, "activation"):
            yield "history", name, base(model=small(history=history))
    for cls in members(config.InteractionChoice):
        yield "interaction", cls().kind, base(model=small(interaction=cls()))
    for cls in members(config.NumberChoice):
        yield "numbers", cls().kind, base(model=small(numbers=cls()))
    for cls in members(config.VectorChoice):
        features = {"pairs": (("text_vector", "other_vector"),)} if cls is config.Similarity else {}
        yield "vectors", cls().kind, base(model=small(vectors=cls(**features)))


def losses(folder: Path) -> Iterator[tuple[str, str, Run]]:
    schema = Schema(
        (), TASKS, domains=("(unknown)", "(missing)", "home", "mail", "search"), classes={"size": ("L", "M", "S")}
    )
    for cls in members(config.TermChoice):
        by = ("by",) if cls is Supervised else ()  # the same code in all of them
        for name, loss in words(cls, "of", "rule", "within", "form", *by):
            loss = replace(loss, threshold=0.4) if hasattr(loss, "threshold") else loss  # something is believed
            if hasattr(loss, "ramp"):
                loss = replace(loss, ramp=False)
            needs, model = loss.bind(schema).needs, dict[str, Any]()
            heads = [head for head in members(config.ExtraHeadChoice) if head.loss == loss.kind]
            drawn = {"dropout": 0.0}
            of = {"of": loss.of} if hasattr(loss, "of") else {}
            model["extra_heads"] = tuple(
                head(**(drawn if "dropout" in {f.name for f in dataclasses.fields(head)} else {}), **of)
                for head in heads
            )
            if any(need.startswith("history.") for need in needs):
                model["history"] = config.SIM(auxiliary=(4,))
            if any(need.startswith("heads.vectors.") for need in needs):
                model["classes"] = {"size": ClassFile(file=str(folder / "sizes.npz"))}
            if any(need.startswith("heads.two.") for need in needs):
                model["heads"] = Heads(two=True)
            more: dict[str, Any] = {}
            if (views := getattr(loss, "views", "none")) != "none":
                more["augment"] = replace(NO_DRAW, of=views)
            training = replace(base().training, mix=Mix(unlabelled=24))
            yield "loss", name, base(model=small(**model), losses=(Supervised(), loss), training=training, **more)
    yield "loss", "supervised, exposure", base(losses=(Supervised(exposure=Exposure()),))


def updates() -> Iterator[tuple[str, str, Run]]:
    for cls in members(config.UpdateChoice):
        parts = {part.name for part in dataclasses.fields(cls)}
        common: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.01, "table_weight_decay": 0.1, "clip_norm": 5.0}
        if not parts & {"weighting", "aggregator"}:
            for name, update in words(cls, "base", "scale", "missing", "clip", "decay"):
                rest = {} if getattr(update, "base", "adam") == "adam" else {"betas": (0.9, 0.999)}
                yield "update", name, base(update=replace(update, **common, **rest))
        for slot, choice in (("weighting", config.WeightingChoice), ("aggregator", config.AggregatorChoice)):
            for inner in members(choice) if slot in parts else ():
                fields = {part.name for part in dataclasses.fields(inner)}
                targets = {"targets": ("click",)} if "targets" in fields else {}
                some = inner in (config.UW, config.PCGrad)  # the others are the same code with dense tables
                for tables in (0, -1) if some else (0,):
                    name = inner().kind + (", dense tables" if tables else "")
                    model = small(tables=Views(width=4, lazy_rows=tables))
                    yield slot, name, base(update=cls(**common, **{slot: inner(**targets)}), model=model)


def rest() -> Iterator[tuple[str, str, Run]]:
    mcc = (Supervised(), config.MCC(weight=0.5))
    for cls in members(config.AverageChoice):
        yield "average", cls().kind, base(average=cls(), losses=mcc)
    for cls in members(config.SelectionChoice):
        run = base(selection=cls(domains=("mail",)), losses=mcc)
        data = replace(run.data, withhold="site = 'mail' and time < 600000000")
        yield "selection", cls().kind, replace(run, data=data)
    for cls in members(config.ScheduleChoice):
        own = (
            [("d_train, l2", cls(l2=0.1)), ("d_train, lbfgs", cls(l2=0.1, solver="lbfgs"))]
            if cls is config.DTrain
            else []
        )
        for name, schedule in [*words(cls, "by", "branches"), *own]:
            heads = {"heads": Heads(by="domain")} if getattr(schedule, "keeps_root", False) else {}
            run = base(model=small(**heads), schedule=schedule)
            run = replace(run, data=replace(run.data, withhold=""), training=replace(run.training, steps=8))
            yield "schedule", name, run
    believed = {"losses": (Supervised(), config.FixMatch(threshold=0.4))}
    believed |= {"training": replace(base().training, mix=Mix(unlabelled=24))}
    for cls in members(config.AugmentChoice):
        run = base(augment=NO_DRAW if cls is Tabular else cls(), **believed)
        yield "augment", cls().kind, run if cls is Tabular else with_pictures(run, config.SmallConv(**TINY))
    yield "images", "small_conv", with_pictures(base(), config.SmallConv(**TINY))


TINY: Any = {"channels": (8,), "width": 6, "size": 8}


def with_pictures(run: Run, images: Any) -> Run:
    data = replace(run.data, features=(*run.data.features, Feature("picture", kind="image")))
    return replace(run, data=data, model=replace(run.model, images=images))


def every(folder: Path) -> dict[tuple[str, str], Run]:
    """(slot, name) -> run."""
    if not (folder / "sizes.npz").exists():
        write_vectors(
            folder / "sizes.npz", ["S", "M", "L"], torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        )
    parts = itertools.chain(models(), losses(folder), updates(), rest())
    return {(slot, name): run for slot, name, run in parts}
