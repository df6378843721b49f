"""The report that a training leaves: what is in it, what it costs, and that nothing which goes wrong with it is fatal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toylog import make_log, make_run
from typer.testing import CliRunner

from unbraid import job, sharding, store
from unbraid import report as rendered
from unbraid.cli.main import app
from unbraid.config import Run, dumps
from unbraid.diagnosis.diagnose import CHECKS
from unbraid.job import Result, train
from unbraid.report import trained
from unbraid.report.trained import LEAST_ROWS, MOST_ROWS, QUICK, affordable
from unbraid.schedules.fork_merge import ForkMerge
from unbraid.train import Watcher

TABLES = {"log": make_log()}
WRITTEN = ("report.html", "report.md", "report.json")


class Notes(Watcher):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def a_run(**changes: object) -> Run:
    return replace(make_run(), **changes)


def reported(folder: Path, run: Run | None = None, **options: Any) -> tuple[Result, list[str]]:
    watcher = Notes()
    return train(run or a_run(), folder, tables=TABLES, watcher=watcher, report=True, **options), watcher.notes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[str]]:
    return reported(tmp_path_factory.mktemp("made") / "out")


# ------------------------------------------------------------------------------------------------------------- what is there
def test_the_three_files_say_the_same_and_all_quick_checks_were_run(made: tuple[Result, list[str]]) -> None:
    pytest.importorskip("altair")
    result, notes = made
    assert result.folder is not None and result.report is not None
    page, text, plain = ((result.folder / name).read_text() for name in WRITTEN)
    loaded = rendered.load(plain)
    assert rendered.dump(loaded) == plain and not loaded.failed and not [n for n in notes if "report" in n]
    looked_at = {d.name for d in loaded.diagnoses} | set(loaded.skipped)
    assert looked_at == {check.name for check in QUICK} < {check.name for check in CHECKS}
    assert [(d.name, d.where, d.value) for d in loaded.diagnoses] == [
        (d.name, d.where, d.value) for d in result.report.diagnoses
    ]
    assert loaded.metrics == result.metrics["test"] and loaded.curve and loaded.toml == dumps(result.bundle.run)
    for said in (loaded.facts["deeper"], loaded.facts["rows"], "Training loss"):
        assert said in page
    assert "looks deeper" in text and "drift" in loaded.facts["deeper"] and "leak" not in loaded.facts["deeper"]
    assert all(part in text for part in ("| click | home |", "## Checks", "20 steps", loaded.facts["parameters"]))


def test_without_report_nothing_is_looked_at_and_metrics_are_the_same(
    made: tuple[Result, list[str]], tmp_path: Path
) -> None:
    result = train(a_run(), tmp_path / "out", tables=TABLES)
    assert result.report is None and result.metrics["test"] == made[0].metrics["test"]
    assert [(tmp_path / "out" / name).exists() for name in WRITTEN] == [False, True, False]
    short, full = ((folder / "report.md").read_text() for folder in (tmp_path / "out", made[0].folder))  # type: ignore[operator]
    assert "## Checks" not in short and short.rstrip().partition("Test split")[2] in full


def test_a_schedule_s_own_report_is_in_all_of_them(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    result, notes = reported(tmp_path / "out", a_run(schedule=ForkMerge(targets=("click",), rounds=2)))
    said = result.bundle.run.schedule.report(result.metrics["schedule"])  # type: ignore[union-attr]
    row = [line for line in said.splitlines() if line.startswith("|")][-1]
    assert all(row in (tmp_path / "out" / name).read_text() for name in WRITTEN), notes
    assert row in rendered.markdown(rendered.load((tmp_path / "out" / "report.json").read_text()))


def test_in_memory_there_is_a_report_and_no_file() -> None:
    result = train(a_run(), tables=TABLES, report=True)
    assert result.report is not None and result.report.diagnoses and result.report.curve == ()
    assert "unbraid diagnose BUNDLE" in result.report.facts["deeper"]


def test_the_data_are_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path / "cache"))
    reported(tmp_path / "out")
    assert len([p for p in (tmp_path / "cache").iterdir() if (p / "columns.json").exists()]) == 1


# --------------------------------------------------------------------------------------------------------------- what it costs
def test_the_sample_is_what_a_tenth_of_the_training_can_predict() -> None:
    def took(seconds: float, steps: int) -> dict[str, object]:
        return {"seconds": {"train": seconds}, "steps": steps}

    assert affordable(took(600.0, 100), 64) == 960  # 60 s for two splits; 600 / 6,400 / 3 s a row
    assert affordable(took(6000.0, 10), 32) == LEAST_ROWS
    assert affordable(took(10.0, 1000), 1024) == MOST_ROWS
    assert affordable(took(0.0, 0), 64) == MOST_ROWS


# -------------------------------------------------------------------------------------------------------------- what goes wrong
def test_a_check_that_dies_is_named_and_the_rest_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dies:
        name, title, page = "dies", "Does it die?", "x.md"

        def __call__(self, case: object) -> list:
            raise KeyError("time")

    monkeypatch.setattr(trained, "QUICK", (Dies(), *QUICK[-1:]))
    result, _ = reported(tmp_path / "out")
    assert result.report is not None and result.report.failed == {"dies": "KeyError: 'time'"}
    assert "1 check failed" in (tmp_path / "out" / "report.md").read_text()


def test_a_report_that_dies_is_noted_and_the_training_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(trained, "diagnose", broken)
    result, notes = reported(tmp_path / "out")
    assert result.report is None and "! no report: MemoryError: no room" in notes
    assert (tmp_path / "out" / "weights.safetensors").exists() and "| click |" in (
        tmp_path / "out" / "report.md"
    ).read_text()
    monkeypatch.undo()
    again, notes = reported(tmp_path / "out", resume=True)
    assert again.report is not None and (tmp_path / "out" / "report.json").exists(), "--resume makes up for it"
    (tmp_path / "out" / "report.html").unlink(missing_ok=True)
    third, _ = reported(tmp_path / "out", resume=True)
    assert third.report is None and not (tmp_path / "out" / "report.html").exists(), "it has one"
    reported(tmp_path / "out", overwrite=True)


def test_divided_tables_of_one_process_are_looked_at_and_of_several_it_is_said_how(
    made: tuple[Result, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process holds all rows; of several none may have room for them."""
    tables = replace(a_run().model.tables, lazy_rows=0, shard_mb=1e-9)
    run = a_run(model=replace(a_run().model, tables=tables))
    result, notes = reported(tmp_path / "one", run)
    assert result.report is not None and not result.report.failed and not [n for n in notes if "no report" in n]
    whole, _ = reported(tmp_path / "whole", replace(run, model=replace(run.model, tables=replace(tables, shard_mb=0))))
    assert whole.report is not None
    assert [(d.name, d.value) for d in result.report.diagnoses] == [(d.name, d.value) for d in whole.report.diagnoses]
    trained_by_several = job._train

    def several(*given: Any, **named: Any) -> Result:
        found = trained_by_several(*given, **named)
        monkeypatch.setattr(sharding, "parts", lambda model: {"a table": None})
        return found

    monkeypatch.setattr(job, "_train", several)
    result, notes = reported(tmp_path / "two", run)
    assert result.report is None and not (tmp_path / "two" / "report.json").exists()
    assert [n for n in notes if f"`unbraid diagnose {tmp_path / 'two'}` makes one, in one process" in n]


def test_without_the_extra_there_is_a_line_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise ImportError('A page needs Jinja2: pip install "unbraid[report]"')

    monkeypatch.setattr(rendered, "html", missing)
    result, notes = reported(tmp_path / "out")
    assert result.report is not None and [
        n for n in notes if n.startswith("no report.html: ") and "unbraid[report]" in n
    ]
    assert [(tmp_path / "out" / name).exists() for name in WRITTEN] == [False, True, True]


# ------------------------------------------------------------------------------------------------------------------ the command
def test_the_command_writes_it_says_so_and_leaves_json_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    make_log().write_parquet(tmp_path / "log.parquet")
    store.write_text(tmp_path / "run.toml", dumps(make_run()).replace('rows = "log"', 'rows = "log.parquet"'))
    common = ["train", str(tmp_path / "run.toml"), "--steps", "5", "--out"]
    done = CliRunner().invoke(app, [*common, str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    assert "checks  " in done.stdout and str(tmp_path / "a" / "report.html") in done.stdout
    assert all((tmp_path / "a" / name).exists() for name in WRITTEN)
    bare = CliRunner().invoke(app, [*common, str(tmp_path / "b"), "--no-report"])
    assert bare.exit_code == 0 and "checks" not in bare.stdout and "report.html" not in bare.stdout
    assert [(tmp_path / "b" / name).exists() for name in WRITTEN] == [False, True, False]
    plain = CliRunner().invoke(app, [*common, str(tmp_path / "c"), "--json"])
    assert json.loads(plain.stdout) == json.loads((tmp_path / "c" / "metrics.json").read_text())
    assert (tmp_path / "c" / "report.json").exists()
