"""Branches that train at once on groups of processes: what they make is what they make one after the other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from every_member import base
from together_kit import Losses, Trained, apart, together, trained, with_divided

from unbraid import parallel
from unbraid.config import ForkMerge, Run
from unbraid.train.groups import Groups, from_one, join_logs


def forked(jobs: int) -> Run:
    """Three branches, so that a round of two groups has a second wave in which one of them waits."""
    run = base(
        schedule=ForkMerge(
            rounds=2, branches="each", branch_select="best_in_round", jobs=jobs, targets=("click", "buy")
        )
    )
    training = replace(run.training, steps=8, evaluate_every=2, checkpoint_steps=2)
    return replace(run, data=replace(run.data, withhold=""), training=training)


class Stops(Losses):
    """Ends both processes in the first wave of the second round: the first has trained two calls by then, the other one."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def trained(self, step: int, losses: Any) -> None:
        super().trained(step, losses)
        if len(self.steps) == self.last:
            raise KeyboardInterrupt


def _all(folder: Path, jobs: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "whole": trained(forked(jobs), folder / "whole"),
        "refused": trained(with_divided(forked(jobs))),
    }
    if parallel.world() == 2:
        with pytest.raises(KeyboardInterrupt):
            trained(forked(jobs), folder / "stopped", watcher=Stops(10 if parallel.rank() == 0 else 6))
        found["resumed"] = trained(forked(jobs), folder / "stopped", resume=True)
    value = {
        "a": [torch.full((2,), float(parallel.rank())), {1: torch.tensor(parallel.rank())}],
        "b": (parallel.rank(), "text", None),
    }
    return found | {"sent": from_one(value, parallel.world() - 1)}


def log(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return sorted((line for line in lines if line["call"] != "schedule"), key=lambda line: (line["call"], line["step"]))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_groups_make_what_one_process_makes(world: int, tmp_path: Path) -> None:
    for name in ("alone", "whole", "stopped"):
        (tmp_path / name).mkdir()
    alone = trained(forked(1), tmp_path / "alone")
    found = together(world, tmp_path, _all, tmp_path, 2)
    for each in found:
        whole: Trained = each["whole"]
        assert not whole.refused, whole.refused
        # groups of one process do what one process does, bit for bit
        assert apart(alone, whole) <= (0 if world == 2 else 1e-9)
        assert (
            "need all rows of tables" in each["refused"].refused
            and "`model.tables.shard_mb` to 0" in each["refused"].refused
        )
        assert each["sent"]["a"][0].tolist() == [world - 1] * 2 and each["sent"]["a"][1][1] == world - 1
        assert each["sent"]["b"] == (world - 1, "text", None)
        if world == 2:
            assert apart(alone, each["resumed"]) == 0
    assert len(found[0]["whole"].losses) < len(alone.losses), "another process trained the rest"
    ours, theirs = log(tmp_path / "whole"), log(tmp_path / "alone")
    assert [(line["call"], line["step"]) for line in ours] == [(line["call"], line["step"]) for line in theirs]
    assert not list(tmp_path.glob("*/log-*.jsonl"))
    if world == 2:
        assert ours == theirs and log(tmp_path / "stopped") == theirs


def test_groups_are_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world", lambda: 4)
    with pytest.raises(
        ValueError, match="`schedule.jobs` should divide the number of processes that train together, 4. Found 3"
    ):
        Groups(3)


def test_logs_are_joined_in_the_order_of_calls(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("0\n")
    for call in (10, 2):
        (tmp_path / f"log-{call}.jsonl").write_text(f"{call}\n")
    join_logs(tmp_path)
    join_logs(None)
    assert (tmp_path / "log.jsonl").read_text() == "0\n2\n10\n" and len(list(tmp_path.iterdir())) == 1
