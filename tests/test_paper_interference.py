"""The comparison of methods for many tasks and domains: who is in it, at which budget, how predictions of several models become
one, what a whole run prints."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_benchmarks import run_twice

from unbraid import config, store
from unbraid.analysis.transfer import delta_m
from unbraid.data.census import COLUMNS, FILES, NUMBERS, WEIGHT
from unbraid.types import Scores

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "paper_interference.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_interference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their annotations up here
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("part", ["tasks", "domains"])
def test_every_method_has_the_same_budget_and_is_a_valid_run(bench: ModuleType, part: str) -> None:
    methods = {method.name: method for method in getattr(bench, part)()}
    assert bench.ALONE[part] in methods and len(methods) == len(getattr(bench, part)())
    base = methods[bench.ALONE[part]].run.training
    for method in methods.values():
        for rate in bench.RATES:
            for target, run in method.runs(rate, 2).items():
                assert run.training == base and run.seed == 2 and run.update.lr == rate, (method.name, target)
                assert config.from_dict(tomllib.loads(config.dumps(run))) == run, method.name


def test_all_balancing_methods_take_part(bench: ModuleType) -> None:
    methods = {method.name: method for method in bench.tasks()}
    kinds = {**bench.members(config.WeightingChoice), **bench.members(config.AggregatorChoice)}
    assert kinds.keys() <= methods.keys() and {"uw", "cagrad", "gradnorm"} <= kinds.keys()
    targets = [task.name for task in methods["equal_weight"].run.data.tasks]
    for kind, cls in kinds.items():
        has_targets = "targets" in [part.name for part in fields(cls)]
        runs = methods[kind].runs(1e-3, 0)
        assert list(runs) == (targets if has_targets else [""]), kind
        for target, run in runs.items():
            choice = getattr(run.update, "weighting", None) or run.update.aggregator
            assert choice.kind == kind and (not has_targets or choice.targets == (target,))
    for name in ("fork_merge", "fork_merge_equal_cost", "stem_fork_merge"):
        runs = methods[name].runs(1e-3, 0)
        assert {target: run.schedule.targets for target, run in runs.items()} == {t: (t,) for t in targets}
    assert methods["fork_merge_equal_cost"].runs(1e-3, 0)["like"].schedule.equal_cost


def test_what_is_not_there_is_said(bench: ModuleType) -> None:
    (base,) = [method.run for method in bench.tasks() if method.name == "equal_weight"]
    absent = bench.Method("later", bench.with_update(base, "no_such_update"))
    assert bench.why_not(absent) == "no such member yet" and bench.with_schedule(base, "no_such_schedule") is None


def scores(seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    logits, labels = ({t: rng.normal(size=6) for t in ("a", "b")} for _ in range(2))
    domain = np.array([2, 3, 2, 3, 2, 3])
    return Scores(logits, {}, labels, {}, domain, None, np.arange(6), np.arange(6), ("", "", "x", "y"))


@pytest.mark.parametrize("by", ["tasks", "domains"])
def test_every_target_is_predicted_by_its_own_model(bench: ModuleType, by: str, tmp_path: Path) -> None:
    (base,) = [method.run for method in bench.tasks() if method.name == "equal_weight"]
    targets = ("a", "b") if by == "tasks" else ("x", "y")
    method = bench.Method("both", per_target=dict.fromkeys(targets, base))
    for n, target in enumerate(targets):
        folder = bench.folder_of(tmp_path, method, 1e-3, 0, target)
        folder.mkdir(parents=True)
        store.save(folder / "scores.safetensors", {part.name: getattr(scores(n), part.name) for part in fields(Scores)})
    found = bench.scores_of(method, tmp_path, 1e-3, 0)
    for task in ("a", "b"):
        for row in range(6):
            whose = ("a", "b").index(task) if by == "tasks" else row % 2
            assert found.logits[task][row] == scores(whose).logits[task][row]


def test_delta_m_of_a_table(bench: ModuleType) -> None:
    def cell(**values: float | None) -> dict[str, Any]:
        return {"": {"runs": {name: {"auc": {"mean": value}} for name, value in values.items()}}}

    table = {"values": {"a": cell(one=0.8, two=0.84), "b": cell(one=0.5, two=0.45), "rare": cell(one=None, two=0.9),
                        bench.MEAN: cell(one=0.1, two=0.9)}}  # fmt: skip
    want = delta_m({"a": {"auc": 0.84}, "b": {"auc": 0.45}}, {"a": {"auc": 0.8}, "b": {"auc": 0.5}})
    assert bench.deltas(table, "one") == {"one": 0.0, "two": pytest.approx(want)}


def people(path: Path, rows: int, seed: int) -> None:
    """A file of Census-Income in which older people earn more and are married."""
    rng = np.random.default_rng(seed)
    lines = []
    for age in rng.integers(16, 80, rows):
        old = rng.random() < (age - 16) / 64
        values = {name: str(rng.integers(0, 50)) if name in NUMBERS else "Not in universe" for name in COLUMNS}
        values |= {"age": str(age), "income": "50000+." if old else "- 50000.", WEIGHT: "1.5",
                   "marital_status": "Never married" if rng.random() < 1 - (age - 16) / 64 else "Divorced",
                   "race": str(rng.choice(["White", "Black"])), "year": str(rng.choice([94, 95]))}  # fmt: skip
        lines.append(", ".join(values[name] for name in COLUMNS))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_a_part_runs_and_continues(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for n, (name, rows) in enumerate(zip(FILES, (2500, 600), strict=True)):
        people(source / name, rows, n)
    asked = "census --steps 6 --seeds 2 --jobs 1 --only equal_weight adatask_mean gcs fork_merge".split()
    shown = run_twice("paper_interference", *asked, "--out", str(tmp_path / "out"), "--source", str(source))
    last = json.loads(shown.splitlines()[-1])
    names = {"single_task", "equal_weight", "adatask_mean", "gcs", "fork_merge"}
    assert last["rates"].keys() == last["delta_m"].keys() == names and last["delta_m"]["single_task"] == 0
    whole = json.loads((tmp_path / "out" / "steps-6" / "census.json").read_text())
    for task in ("income", "never_married"):
        assert whole["values"][task][""]["runs"].keys() >= names
    assert whole["cost"]["fork_merge"]["steps"] == 4 * whole["cost"]["equal_weight"]["steps"] == 24, (
        "two targets, two branches"
    )
    assert whole["cost"]["gcs"]["steps"] == 12, "two targets"
    assert "Unequal budgets" in shown and "fork_merge" in shown
