"""Weights that an update or a schedule gave, from real short runs into the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from reportkit import make_report
from toylog import make_run

from unbraid import config
from unbraid.diagnosis.diagnose import diagnose
from unbraid.diagnosis.plots import Lines
from unbraid.job import train
from unbraid.report import dump, html, load
from unbraid.report.words import curves
from unbraid.schedules.fork_merge import ForkMerge
from unbraid.train import Training

SHORT = Training(batch_size=64, steps=12, evaluate_every=4, checkpoint_seconds=0)


def run_of(**changes: Any) -> config.Run:
    """On the toy log, with an auxiliary task for `ForkMerge` to weigh."""
    run = make_run(training=SHORT, **changes)
    tasks = tuple(replace(task, role="auxiliary") if task.name != "click" else task for task in run.data.tasks)
    return replace(run, data=replace(run.data, tasks=tasks))


def titled(plots: list[Any], title: str) -> list[Lines]:
    return [plot for plot in plots if plot.title == title]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_weights_of_every_merge_are_drawn_over_its_steps(log: pl.DataFrame, tmp_path: Path) -> None:
    made = train(run_of(schedule=ForkMerge(rounds=3)), tmp_path / "run", tables={"log": log}, baseline=False)
    rounds = made.metrics["schedule"]["rounds"]
    assert len(rounds) == 3
    lines = [line for line in logged(tmp_path / "run") if line["call"] == "schedule"]
    assert [line["step"] for line in lines] == [round_["step"] for round_ in rounds] == [4, 8, 12]
    report = diagnose(tmp_path / "run", only=["leak"], tables={"log": log})
    (found,) = titled(curves(report), "Weights of the schedule")
    branches = made.metrics["schedule"]["branches"]
    assert list(found.series) == list(branches) and len(branches) > 1
    for name, (steps, weights) in found.series.items():
        assert weights == tuple(round_["weights"][name] for round_ in rounds) and steps == (4.0, 8.0, 12.0)
    assert all(sum(each) == pytest.approx(1) for each in zip(*(w for _, w in found.series.values()), strict=True))
    assert not titled(curves(report), "Weights of the losses")
    assert load(dump(report)).curve == report.curve
    assert "Weights of the schedule" in html(report)


def test_a_dropped_branch_ends_where_it_was_dropped(log: pl.DataFrame, tmp_path: Path) -> None:
    run = run_of(schedule=ForkMerge(rounds=3, prune=2))
    train(run, tmp_path / "run", tables={"log": log}, baseline=False)
    (found,) = titled(curves(make_report(curve=tuple(logged(tmp_path / "run")))), "Weights of the schedule")
    assert sorted(len(steps) for steps, _ in found.series.values()) == [1] * (len(found.series) - 2) + [3, 3]


def test_a_run_that_died_after_its_schedule_logs_rounds_once(
    log: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise RuntimeError("out of memory")

    run = run_of(schedule=ForkMerge(rounds=2))
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="out of memory"):
        patched.setattr("unbraid.job.measure", dies)
        train(run, tmp_path / "run", tables={"log": log}, baseline=False)
    before = [line for line in logged(tmp_path / "run") if line["call"] == "schedule"]
    train(run, tmp_path / "run", tables={"log": log}, baseline=False, resume=True)
    assert [line for line in logged(tmp_path / "run") if line["call"] == "schedule"] == before and len(before) == 2


def test_an_update_s_weights_are_drawn_over_steps(log: pl.DataFrame, tmp_path: Path) -> None:
    run = run_of(update=config.Weighted(lr=0.01))
    train(run, tmp_path / "run", tables={"log": log}, baseline=False)
    lines = logged(tmp_path / "run")
    report = diagnose(tmp_path / "run", only=["leak"], tables={"log": log})
    (found,) = titled(curves(report), "Weights of the losses")
    assert set(found.series) == set(lines[0]["update"]) and len(found.series) > 1
    for name, (steps, weights) in found.series.items():
        assert steps == tuple(float(line["step"]) for line in lines)
        assert weights == tuple(line["update"][name] for line in lines)
    assert any(len(set(weights)) > 1 for _, weights in found.series.values())
    assert not titled(curves(report), "Weights of the schedule")


def test_a_run_without_weights_shows_none(log: pl.DataFrame, tmp_path: Path) -> None:
    train(run_of(), tmp_path / "run", tables={"log": log}, baseline=False)
    assert not [p for p in curves(make_report(curve=tuple(logged(tmp_path / "run")))) if p.title.startswith("Weights")]
