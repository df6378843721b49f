"""The search on real trainings of the toy log: what is tried, what is read, what is written, what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toylog import make_data, make_log, make_run
from typer.testing import CliRunner

from unbraid import config
from unbraid.cli.main import app
from unbraid.data import encode as encoding
from unbraid.data.declaration import Split
from unbraid.data.table import Encoded
from unbraid.job import JobError, learn
from unbraid.report import tuning
from unbraid.schedules.online import Online
from unbraid.selection.snd import SND
from unbraid.train import Watcher
from unbraid.tune import search, trial
from unbraid.tune import space as spaces
from unbraid.tune.search import tune
from unbraid.tune.space import Choices, Range, Space
from unbraid.tune.trial import Objective, Outcome, measured

pytest.importorskip("optuna")

LOG = {"log": make_log()}
RUN = make_run(training=replace(make_run().training, steps=6, evaluate_every=2))
SPACE: Space = (Range("update.lr", 0.001, 0.1, log=True), Choices("model.tables.width", ("4", "16")))

EMPTY = Split(kind="time", valid_from=8 * 10**8, test_from=8 * 10**8 + 1)


class Heard(Watcher):
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def go(out: Path, run: config.Run = RUN, **more: Any) -> dict[str, Any]:
    return tune(run, out, **{"trials": 3, "space": SPACE, "tables": LOG, **more})


def test_a_search_reads_no_test_row_and_encodes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits, writes = [], []
    split, write = Encoded.split, encoding.write
    monkeypatch.setattr(Encoded, "split", lambda self, name: splits.append(name) or split(self, name))
    monkeypatch.setattr(encoding, "write", lambda *args, **more: writes.append(1) or write(*args, **more))
    found = go(tmp_path / "s")
    assert set(splits) == {"train", "valid"} and len(writes) == 1
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert names == {"study.db", "study.lock", "best.toml", "tune.json", "report.md", "report.html"}
    assert json.loads((tmp_path / "s" / "tune.json").read_text()) == found
    first, best = found["trials"][0], found["best"]
    assert first["as_it_is"] and first["params"] == {"update.lr": 0.01, "model.tables.width": 16} == found["own"]
    assert found["as_it_is"] == first["value"] <= best["value"] == max(line["value"] for line in found["trials"])
    ready = config.load(tmp_path / "s" / "best.toml")
    changes = {text.partition(":")[0] for text in config.differences(config.with_base(RUN, tmp_path / "s"), ready)}
    assert changes <= {"name", *best["params"]} and ready.update.lr == best["params"]["update.lr"]
    page = (tmp_path / "s" / "report.md").read_text()
    assert f"Trial {best['number']} is the best" in page and "The test split was not looked at" in page


def test_a_trial_is_what_training_its_candidate_gives() -> None:
    objective = Objective("click.auc", seeds=2)
    asked: list[tuple[int, float]] = []
    outcome = measured(RUN, objective, LOG, lambda look, value: bool(asked.append((look, value))))
    heard = Ears()
    learn(RUN, None, device="cpu", tables=LOG, watcher=heard)
    assert outcome.state == "complete" and len(outcome.values) == 2
    assert [value for _, value in asked] == list(outcome.looks) == heard.found, "looks of the first seed alone"
    assert outcome.values[0] == heard.found[-1], "without patience the last weights are kept"
    assert outcome.value == pytest.approx(sum(outcome.values) / 2) and outcome.values[0] != outcome.values[1]


class Ears(Watcher):
    """Keeps the AUC of clicks at each look."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def evaluated(self, step: int, metric: str, value: float | None, best: bool, values: Mapping[str, Any]) -> None:
        self.found.append(values["click"]["auc"]["value"])


def test_pruning_stops_a_training_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(trial._Looks, "trained", lambda self, step, losses: steps.append(step))
    outcome = measured(RUN, Objective("auc"), LOG, lambda look, value: look == 2)
    assert outcome.state == "pruned" and outcome.values == () and len(outcome.looks) == 2
    assert steps == [1, 2, 3, 4], "looks are every two steps of six"
    assert measured(RUN, Objective("auc"), LOG, lambda look, value: look == 3).state == "complete", (
        "all is done by then"
    )


def test_equal_seeds_give_equal_searches(tmp_path: Path) -> None:
    one, two, other = go(tmp_path / "a"), go(tmp_path / "b"), go(tmp_path / "c", seed=5)
    still = [[{**line, "seconds": 0} for line in found["trials"]] for found in (one, two, other)]
    assert still[0] == still[1] != still[2]


def test_an_interrupted_search_goes_on_as_if_nothing_had_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = go(tmp_path / "a"), []

    def dies(*args: Any) -> Outcome:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(search, "measured", dies)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "b")
    assert (tmp_path / "b" / "best.toml").exists(), "what was found is there"
    with pytest.raises(JobError, match="holds a search. Continue it with --resume"):
        go(tmp_path / "b")
    found = go(tmp_path / "b", resume=True)
    assert len(calls) == 4, "one trial was lost, and no other trained again"
    assert [(t["params"], t["value"]) for t in found["trials"]] == [(t["params"], t["value"]) for t in whole["trials"]]
    more = go(tmp_path / "b", resume=True, trials=4)
    assert len(calls) == 5 and more["trials"][:3] == found["trials"]
    with pytest.raises(JobError, match="of another search: objective not the same"):
        go(tmp_path / "b", resume=True, metric="click.auc")
    assert len(go(tmp_path / "b", overwrite=True, metric="click.auc")["trials"]) == 3


def test_candidates_that_were_tried_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(search, "measured", lambda *args: calls.append(1) or Outcome("complete", (0.5,), 3.0, (0.5,)))
    found = go(tmp_path / "s", space=(Choices("model.tables.width", ("4", "16")),), trials=8)
    assert len(calls) == 2 and [line["seconds"] for line in found["trials"]].count(3.0) == 2
    assert any(line["error"] == "as trial 0" for line in found["trials"][1:])


def test_lower_is_better_of_a_loss_and_each_task_can_be_asked_for(tmp_path: Path) -> None:
    found = go(tmp_path / "s", metric="buy.logloss", space=(Choices("update.lr", ("0.0", "0.01", "0.02")),))
    values = [line["value"] for line in found["trials"]]
    assert found["lower_is_better"] and found["best"]["value"] == min(values) < max(values)


def test_failed_candidates_cost_their_trial_and_not_the_search(tmp_path: Path) -> None:
    # second heads of a history that no loss reads are refused when a run is built, and not before
    space = (Choices("model.history", ('{"kind": "dare"}', '{"auxiliary": [4], "kind": "dare"}')), SPACE[0])
    watcher = Heard()
    found = go(tmp_path / "s", space=space, trials=6, watcher=watcher)
    failed = [line for line in found["trials"] if line["state"] == "failed"]
    assert failed and "which no loss reads" in failed[0]["error"] and found["best"]["state"] == "complete"
    assert any(failed[0]["error"].splitlines()[0] in note for note in watcher.notes)
    assert f"Trial {failed[0]['number']}: " in tuning.markdown(found)
    assert any(
        "the run as it is is no trial: what varies has not its own model.history" in note for note in watcher.notes
    )


@pytest.mark.parametrize(
    ("run", "more", "message"),
    [
        (RUN, {"metric": "click.aucc"}, "`--metric` is `click.aucc`, which no task has"),
        (RUN, {"metric": "rmse"}, "`--metric` is `rmse`, which no task has"),
        (RUN, {"metric": "calibration"}, "a metric with a better side. Found `calibration`"),
        (RUN, {"seeds": 0}, "--seeds should be at least 1"),
        (RUN, {"trials": 0}, "--trials and --jobs should be at least 1"),
        (RUN, {"pruner": "mean"}, "--pruner should be one of median, hyperband, none. Found mean"),
        (RUN, {"space": ()}, "nothing to tune"),
        (RUN, {"resume": True}, "nothing to resume"),
        (RUN, {"resume": True, "overwrite": True}, "Give one of them"),
        (replace(RUN, schedule=Online()), {}, "trains on the validation rows"),
        (replace(RUN, data=make_data(split=EMPTY)), {}, "The valid split is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_said_before_anything_trains(
    tmp_path: Path, run: config.Run, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError) as error:
        go(tmp_path / "s", run, **more)
    assert message in str(error.value) and not (tmp_path / "s" / "study.db").exists()


def test_if_all_trials_fail_the_first_error_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails(*args: Any) -> Outcome:
        calls.append(1)
        return Outcome("failed", error=f"ValueError: no. {len(calls)}")

    monkeypatch.setattr(search, "measured", fails)
    with pytest.raises(JobError, match="Each of 5 trials failed. The first: ValueError: no. 1"):
        go(tmp_path / "s", trials=50)


def test_a_folder_with_anything_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").write_text("mine")
    for more in ({}, {"overwrite": True}):
        with pytest.raises(JobError, match="holds notes.txt, which no search wrote"):
            go(tmp_path / "s", **more)


def test_different_schedules_are_not_pruned_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "measured", lambda *args: Outcome("complete", (0.5,)))
    watcher = Heard()
    found = go(tmp_path / "s", space=(Choices("schedule", ('{"kind": "one_stage"}',)),), trials=1, watcher=watcher)
    assert found["pruner"] == "none" and any("no trial is pruned" in note for note in watcher.notes)


def test_a_selection_without_labels_is_the_objective_of_its_run() -> None:
    run = replace(RUN, selection=SND())
    objective = Objective.of(run)
    assert (objective.metric, objective.falls(run), objective.name(run)) == ("", SND().lower_is_better, "selection snd")
    assert objective.judge(run, 0.25, {}) == 0.25, "labels are not read"
    assert Objective.of(run, "auc").metric == "auc"


def test_the_test_split_is_compared_with_seeds_that_no_trial_had(tmp_path: Path) -> None:
    found = go(tmp_path / "s", trials=2, test=2, seeds=2)
    name = f"trial-{found['best']['number']}"
    bundles = {path.parent.name + "/" + path.name for path in (tmp_path / "s" / "test").glob("*/seed-*")}
    assert bundles == {f"{run}/seed-{seed}" for run in ("as_it_is", name) for seed in (2, 3)}
    assert found["test"]["reference"] == "as_it_is" and {d["run"] for d in found["test"]["differences"]} >= {name}
    assert "2 seeds each that no trial had: click" in (tmp_path / "s" / "report.md").read_text()
    again = go(tmp_path / "s", trials=2, seeds=2, resume=True)
    assert again["test"] == found["test"], "what was seen is kept"
    go(tmp_path / "s", trials=1, overwrite=True)
    assert not list((tmp_path / "s" / "test").glob("*"))


# ---------------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a log and a run file that says what varies."""
    make_log().write_parquet(tmp_path / "log.parquet")
    text = config.dumps(RUN).replace('rows = "log"', 'rows = "log.parquet"')
    table = '\n[tune]\n"update.lr" = { low = 0.001, high = 0.1, log = true }\n"model.tables.width" = [4, 16]\n'
    (tmp_path / "run.toml").write_text(text + table)
    return tmp_path


def unbraid(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command(here: Path) -> None:
    done = unbraid("tune", here / "run.toml", "--trials", "2", "--out", here / "s")
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    assert "trial ended auc looks seconds lr width" in words and str(here / "s" / "best.toml") in words
    assert "trial 0" not in done.stdout and "0.01, width 16" in done.stderr
    again = unbraid("tune", here / "run.toml", "--trials", "2", "--out", here / "s", "--resume", "--json")
    assert json.loads(again.stdout) == json.loads((here / "s" / "tune.json").read_text())


def test_mistakes_on_the_command_line(here: Path) -> None:
    (here / "space.toml").write_text('"update.lrr" = [0.1]')
    done = unbraid("tune", here / "run.toml", "--space", here / "space.toml", "--out", here / "s")
    assert done.exit_code == 2 and "unknown key `update.lrr`. Did you mean `lr`?" in " ".join(done.stderr.split())
    done = unbraid("tune", here / "run.toml", "--set", "training.metric=aucc", "--out", here / "s")
    assert done.exit_code == 2 and "which no task has" in done.stderr and not (here / "s").exists()


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.slow
def test_several_processes_and_a_kill(here: Path) -> None:
    words = ["tune", here / "run.toml", "--out", here / "s", "--jobs", "2", "--pruner", "none", "--trials", "400"]
    command = [sys.executable, "-m", "unbraid", *map(str, words)]
    with subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = (line for line in iter(process.stderr.readline, "") if "width" in line)
        seen = [line for line, _ in zip(lines, range(6), strict=False)]
        process.send_signal(signal.SIGKILL)
    assert len(seen) == 6
    run = config.load(here / "run.toml")
    space = spaces.load(here / "run.toml", run)
    found = tune(run, here / "s", space=space, pruner="none", trials=9, resume=True)
    assert [line["state"] for line in found["trials"]].count("complete") == len(found["trials"]) >= 9
    values = {line["number"]: f"{line['value']:.5f}" for line in found["trials"]}
    assert all(values[int(line.split()[0])] == line.split()[1] for line in seen), "what had ended is kept"
    alone = measured(run, Objective("auc"), None, lambda look, value: False)
    assert alone.value == found["as_it_is"], "a process of its own changes no bit"


@pytest.mark.slow
def test_a_process_that_dies_costs_its_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = search.Trainer.give_trial
    count: list[int] = []

    def kills(self: Any, *args: Any) -> None:
        given(self, *args)
        count.append(1)
        if len(count) == 2:
            os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(search.Trainer, "give_trial", kills)
    found = go(tmp_path / "s", jobs=2, trials=4, pruner="none")
    states = [line["state"] for line in found["trials"]]
    assert states.count("failed") == 1 and states.count("complete") == 3
    (lost,) = (line for line in found["trials"] if line["state"] == "failed")
    assert f"The process of trial {lost['number']} ended by signal 9" in lost["error"]


class Puppet:
    """A process of a trial that says what it is told to, and keeps what it is replied."""

    place = 7

    def __init__(self, *messages: tuple[str, Any]) -> None:
        self.messages, self.replies, self.ended = list(messages), list[bool](), False

    def hear(self) -> tuple[str, Any]:
        if not self.messages:
            raise ChildProcessError("gone")
        return self.messages.pop(0)

    def reply(self, prune: bool) -> None:
        self.replies.append(prune)

    def end(self) -> None:
        self.ended = True


def test_a_process_is_told_to_prune_and_its_end_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = SimpleNamespace(prune=lambda number, look, value: (number, look, value) == (7, 2, 0.1))
    one = search._Search(RUN, Objective("auc"), study, tmp_path, 1, 2, None, Watcher())  # type: ignore[arg-type]
    ended: list[tuple[int, Outcome]] = []
    monkeypatch.setattr(one, "_ended", lambda *what: ended.append(what))
    puppet: Any = Puppet(("look", (1, 0.1)), ("look", (2, 0.1)), ("done", Outcome("pruned")))
    assert [one._hear(puppet) for _ in range(3)] == [False, False, True]
    assert puppet.replies == [False, True] and ended == [(7, Outcome("pruned"))] and not puppet.ended
    assert one._hear(puppet) and puppet.ended and ended[1] == (7, Outcome("failed", error="gone"))
