"""Fifty steps in one, two and four processes, and trainings that go on in another number of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from every_member import TASKS
from together_kit import Losses, Trained, all_of, apart, gap, together, trained
from toylog import make_data, make_run

from unbraid.augmentations.tabular import Change, Tabular
from unbraid.config import (
    DARE,
    DIN,
    EMA,
    MCC,
    STAR,
    STEM,
    AdaTask,
    AutoLambda,
    FixMatch,
    Joint,
    ModelChoice,
    MultiEmbedding,
    Run,
    Supervised,
    UniformAverage,
    Weighted,
)
from unbraid.data.mix import Mix
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training

pytestmark = pytest.mark.slow
FIFTY = Training(batch_size=64, steps=50, evaluate_every=25, checkpoint_seconds=0)


def fifty() -> dict[str, Run]:
    """What the page promises; labels of `buy` are on few rows, so that processes have other numbers of them."""
    run, lazy = make_run(training=FIFTY), Views(width=4, lazy_rows=0)
    decayed = {"lr": 0.01, "table_weight_decay": 0.1, "clip_norm": 1.0}
    return {
        "joint": run,
        "joint, lazy tables": replace(run, model=ModelChoice(tables=lazy), update=Joint(**decayed)),
        "stem": replace(run, model=ModelChoice(tower=STEM(), tables=replace(lazy, kind="per_task"))),
        "dare": replace(run, model=ModelChoice(history=DARE(), tables=Views(width=4))),
        "adatask": replace(run, update=AdaTask(**decayed), model=ModelChoice(tables=lazy)),
        "mcc": replace(run, losses=(Supervised(), MCC()), data=make_data(tasks=TASKS)),
    }


def test_fifty_steps_are_those_of_one_process(tmp_path: Path) -> None:
    """In single precision, as everybody trains, by four processes; `test_sharding` has two, with divided tables."""
    runs = fifty()
    alone = all_of(runs, False)
    for name, found in together(4, tmp_path, all_of, runs, False)[0].items():
        assert len(found.losses) == 50 and gap(alone[name], found) <= 1e-5, (name, gap(alone[name], found))
        assert apart(alone[name], found) <= 1e-3, (name, apart(alone[name], found))
        assert found.looks == pytest.approx(alone[name].looks, abs=1e-3)


def tiny() -> dict[str, Run]:
    """Batches of three rows, for more processes than that: some have no row, no event, no row of a domain."""
    training = Training(batch_size=3, steps=8, evaluate_every=4, metric="logloss", checkpoint_seconds=0)
    run = make_run(training=training, update=Joint(lr=0.01, table_weight_decay=0.1))
    views = replace(run.training, mix=Mix(unlabelled=1))
    several, lazy = Views(kind="several", widths=(4, 4)), Views(width=4, lazy_rows=0)
    same = Tabular(weak=Change(features=0.0, history=1.0), strong=Change(features=0.0, history=1.0))
    return {
        "joint": run,
        "adatask": replace(run, update=AdaTask(lr=0.01), model=ModelChoice(tables=lazy)),
        "dice": replace(run, model=ModelChoice(history=DIN(hidden=(6, 5)), tables=lazy)),
        "dice, kept events": replace(run, model=ModelChoice(history=DIN(hidden=(6, 5), keep=2), tables=lazy)),
        "star": replace(run, model=ModelChoice(tower=STAR(), tables=lazy)),
        "batch norm": replace(run, model=ModelChoice(tower=MultiEmbedding(norm="batch"), tables=several)),
        "heads by domain": replace(run, model=ModelChoice(heads=Heads(by="domain"), tables=lazy)),
        "views": replace(
            run, data=make_data(tasks=TASKS, withhold="site = 'home'"), augment=same, training=views,
            losses=(Supervised(), FixMatch(threshold=0.34)),
        ),
    }  # fmt: skip


def test_there_may_be_fewer_rows_than_processes(tmp_path: Path) -> None:
    runs = tiny()
    alone = all_of(runs)
    found = together(4, tmp_path, all_of, runs)
    for name, one in alone.items():
        assert not one.refused and len(one.losses) == 8, (name, one.refused)
        bound = 1e-6 if name == "batch norm" else 1e-9  # the gradient of a bias below it is rounding
        assert gap(one, found[0][name]) <= 1e-9 and apart(one, found[0][name]) <= bound, name
        assert all(apart(found[0][name], each[name]) == 0 for each in found[1:]), name


def decided() -> dict[str, Run]:
    """What is decided, or measured anew, at looks and at the end."""
    norm = MultiEmbedding(norm="batch")
    several = ModelChoice(tower=norm, tables=Views(kind="several", widths=(4, 4)))
    run = make_run(training=replace(FIFTY, steps=12, evaluate_every=3, metric="logloss"))
    early = replace(run, training=replace(run.training, steps=200, patience=2), update=Joint(lr=0.1))
    return {
        "averages of normalised": replace(run, model=several, average=UniformAverage()),
        "looks by averages": replace(
            run, model=several, average=EMA(decay=0.5), training=replace(run.training, patience=3)
        ),
        "early stop": early,
        "weights on the validation split": replace(
            run, model=several, update=Weighted(lr=0.01, weighting=AutoLambda())
        ),
    }


def test_all_processes_decide_alike(tmp_path: Path) -> None:
    runs = decided()
    alone = all_of(runs)
    found = together(2, tmp_path, all_of, runs)
    assert len(alone["early stop"].losses) < 200, "it stopped early"
    for name, one in alone.items():
        assert not one.refused, (name, one.refused)
        assert gap(one, found[0][name]) <= 1e-9 and apart(one, found[0][name]) <= 1e-6, name
        assert apart(found[0][name], found[1][name]) == 0, name


def resumable() -> Run:
    """Dropout, views and a memory of rows: what a checkpoint must have for all processes."""
    tower = SharedBottom(bottom=(16,), tower=(8,), dropout=0.2)
    return make_run(
        data=make_data(tasks=TASKS, withhold="site = 'mail'"), augment=Tabular(), losses=(Supervised(), FixMatch(threshold=0.4)),
        model=ModelChoice(tower=tower, tables=Views(width=4, lazy_rows=0, unknown_rate=0.1)),
        update=AdaTask(lr=0.01, table_weight_decay=0.1),
        training=Training(
            batch_size=48, steps=20, evaluate_every=5, checkpoint_steps=4, checkpoint_seconds=0, mix=Mix(unlabelled=16),
        ),
    )  # fmt: skip


class Stops(Losses):
    """Ends a training in the middle of an epoch, after a checkpoint."""

    def trained(self, step: int, losses: object) -> None:
        super().trained(step, losses)  # type: ignore[arg-type]
        if step == 14:
            raise KeyboardInterrupt


def straight(run: Run) -> Trained:
    return trained(run)


def stopped(run: Run, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(run, folder, watcher=Stops())


def resumed(run: Run, folder: Path) -> Trained:
    return trained(run, folder, resume=True)


def test_a_training_goes_on_bit_for_bit_in_as_many_processes(tmp_path: Path) -> None:
    (whole, other), run = together(2, tmp_path, straight, resumable()), tmp_path / "run"
    assert apart(whole, other) == 0
    together(2, tmp_path, stopped, resumable(), run)
    assert (run / "fit-0.safetensors").exists()
    for found in together(2, tmp_path, resumed, resumable(), run):
        assert apart(whole, found) == 0 and found.losses == whole.losses[12:] and len(found.losses) == 8
        assert found.looks == whole.looks[2:]


def plain(run: Run) -> Run:
    """The run without anything that is drawn by each process for its own rows."""
    tables = replace(run.model.tables, unknown_rate=0.0)
    model = replace(run.model, tower=SharedBottom(bottom=(16,), tower=(8,)), tables=tables)
    return replace(run, model=model, augment=None, losses=(Supervised(), MCC()))


@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, 1), (1, 2)])
def test_a_training_goes_on_in_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    run, folder = plain(resumable()), tmp_path / "run"
    whole = trained(run)
    if before == 1:
        stopped(run, folder)
    else:
        together(before, tmp_path, stopped, run, folder)
    found = resumed(run, folder) if after == 1 else together(after, tmp_path, resumed, run, folder)[0]
    assert len(found.losses) == 8 and apart(whole, found) <= 1e-9
    assert found.looks == pytest.approx(whole.looks[2:], abs=1e-9)
    assert gap(replace(whole, losses=whole.losses[12:]), found) <= 1e-9


def test_processes_draw_other_numbers(tmp_path: Path) -> None:
    """Dropout of one process is not that of another: else the same units would be dropped for the first rows of all."""
    one, two = together(2, tmp_path, _drawn)
    assert not torch.equal(one, two)


def _drawn() -> torch.Tensor:
    drawn: list[torch.Tensor] = []

    class Watch(Losses):
        def trained(self, step: int, losses: object) -> None:
            drawn.append(torch.rand(3))

    trained(make_run(training=replace(FIFTY, steps=2)), watcher=Watch())
    return torch.cat(drawn)
