"""Tracking: what the readers of TensorBoard and MLflow find is what happened, each step once, and the training is the same."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from toylog import make_log, make_run
from typer.testing import CliRunner

from unbraid import config
from unbraid.cli.main import app
from unbraid.config import ModelChoice
from unbraid.encoders.table import Views
from unbraid.job import train
from unbraid.losses.supervised import Supervised
from unbraid.towers.stem import STEM
from unbraid.track import FEW_DOMAINS, Entry, MLflow, TensorBoard, Tracker, loss_name, numbers, stores_of
from unbraid.train import Training, Watcher
from unbraid.workers import _Board

TABLES = {"log": make_log()}
RUN = make_run(
    model=ModelChoice(tower=STEM(expert=(16,), tower=(8,), dropout=0.3), tables=Views(kind="per_task", width=4)),
    training=Training(batch_size=64, steps=12, evaluate_every=4, checkpoint_steps=5, checkpoint_seconds=0),
)


@pytest.fixture(autouse=True)
def _folder_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's store in a folder, which it wants to be asked for: it opens at once, and its database takes seconds."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


class Sees(Watcher):
    """Remembers what it is told."""

    def __init__(self, dies: int = 0) -> None:
        self.losses: dict[str, dict[int, float]] = {}
        self.values: dict[int, Any] = {}
        self.notes: list[str] = []
        self.before, self.dies = 0, dies

    def begins(self, call: int, before: int) -> None:
        self.before = before

    def trained(self, step: int, losses: Mapping[str, Tensor]) -> None:
        for name, loss in losses.items():
            self.losses.setdefault(name, {})[self.before + step] = float(loss.detach())
        if self.before + step == self.dies:
            raise RuntimeError("killed")

    def evaluated(self, step: int, metric: str, value: float | None, best: bool, values: Mapping[str, Any]) -> None:
        self.values[self.before + step] = values

    def note(self, text: str) -> None:
        self.notes.append(text)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """name -> (step, value) in the order of writing."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def client(folder: Path) -> tuple[Any, list[Any]]:
    """MLflow's client and its runs."""
    from mlflow import MlflowClient

    found = MlflowClient(tracking_uri=str(folder))
    experiment = found.get_experiment_by_name("unbraid")
    return found, found.search_runs([experiment.experiment_id]) if experiment else []


def history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found, (run,) = client(folder)
    return {
        name: [(one.step, one.value) for one in found.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def both(where: Path) -> tuple[str, str]:
    return f"tensorboard={where / 'tb'}", f"mlflow={where / 'ml'}"


def values(points: Sequence[tuple[int, float]]) -> dict[int, float]:
    """step -> value; every step stands there once."""
    assert len({step for step, _ in points}) == len(points)
    return dict(points)


# ------------------------------------------------------------------------------------------------------ what is written
def test_what_happened_is_what_the_readers_find(tmp_path: Path) -> None:
    sees = Sees()
    result = train(RUN, tmp_path / "out", tables=TABLES, watcher=sees, track=both(tmp_path), track_every=1)
    logged = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    for found, single in ((events(tmp_path / "tb" / "toy-seed-0"), True), (history(tmp_path / "ml"), False)):
        kept = np.float32 if single else float
        for task in ("click", "buy"):
            assert len(sees.losses[task]) == 12
            assert values(found[f"loss/{task}"]) == {s: kept(v) for s, v in sees.losses[task].items()}
            looked = {record["step"]: kept(record["valid"][task]["logloss"]["value"]) for record in logged}
            assert values(found[f"valid/{task}/logloss"]) == looked and list(looked) == [4, 8, 12]
            whole = result.metrics["test"][task]
            for end, key in (("", "value"), ("_low", "low"), ("_high", "high")):
                assert values(found[f"test/{task}/auc{end}"]) == {12: kept(whole["auc"][key])}
            home = whole["domains"]["home"]["logloss"]
            assert values(found[f"test_domains/{task}/home/logloss_low"]) == {12: kept(home["low"])}
            target = result.metrics["baseline"]["target_encoding"][task]["auc"]["value"]
            assert values(found[f"target_encoding/{task}/auc"]) == {12: kept(target)}
        times = values(found["time/step"])
        assert all(0 < seconds < 60 for seconds in times.values())
        assert sorted(times) == [2, 3, 4, 5, 7, 8, 9, 10, 12], "the first step, and those after a checkpoint, have none"
        assert values(found["time/training"])[12] == pytest.approx(result.metrics["seconds"]["train"])
        assert "selection/auc" in found and not [name for name in found if "valid" in name and "_low" in name]


def test_the_run_file_is_there_as_text_and_as_values(tmp_path: Path) -> None:
    train(RUN, tmp_path / "out", tables=TABLES, baseline=False, track=both(tmp_path))
    accumulator = EventAccumulator(str(tmp_path / "tb" / "toy-seed-0"))
    accumulator.Reload()
    (text,) = accumulator.Tensors("run/text_summary")
    assert text.tensor_proto.string_val[0].decode() == f"```toml\n{config.dumps(RUN)}```"
    found, (run,) = client(tmp_path / "ml")
    assert run.info.run_name == "toy-seed-0" and run.info.status == "FINISHED"
    assert Path(found.download_artifacts(run.info.run_id, "run.toml")).read_text() == config.dumps(RUN)
    params = run.data.params
    assert (params["training.batch_size"], params["training.patience"]) == ("64", "0"), "defaults, too"
    assert (params["model.tower.kind"], params["model.tower.expert"]) == ("stem", "[16]")
    assert params["data.features.price.kind"] == "number" and "data.features.item.min_count" not in params
    assert params["losses.0.kind"] == "supervised"


def test_losses_of_every_so_many_steps_from_the_first_on(tmp_path: Path) -> None:
    sees = Sees()
    train(RUN, tables=TABLES, baseline=False, watcher=sees, track=both(tmp_path)[:1], track_every=5)
    found = events(tmp_path / "tb" / "toy-seed-0")
    assert values(found["loss/click"]) == {s: np.float32(sees.losses["click"][s]) for s in (1, 6, 11)}
    assert sorted(values(found["time/step"])) == [6, 11]


def test_tracking_changes_nothing(tmp_path: Path) -> None:
    plain = train(RUN, tables=TABLES, baseline=False)
    tracked = train(RUN, tables=TABLES, baseline=False, track=both(tmp_path), track_every=1)
    assert plain.metrics["test"] == tracked.metrics["test"]
    ours, theirs = plain.bundle.model.state_dict(), tracked.bundle.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()) and len(ours) == len(theirs)


def test_runs_of_one_folder_have_entries_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(RUN, tmp_path / name, tables=TABLES, baseline=False, track=both(tmp_path))
    assert sorted(p.name for p in (tmp_path / "tb").iterdir()) == ["toy-seed-0", "toy-seed-0-2"]
    assert len(client(tmp_path / "ml")[1]) == 2
    keys = json.loads((tmp_path / "b" / "track.json").read_text())
    assert keys[both(tmp_path)[0]] == "toy-seed-0-2"


@dataclasses.dataclass(frozen=True)
class TwoFits:
    """A schedule of two calls."""

    def __call__(self, session: Any, model: Any, steps: int) -> Any:
        for share in (5, steps - 5):
            model, _ = session.fit(model, share)
        return model


def test_steps_of_several_calls_follow_one_another(tmp_path: Path) -> None:
    sees, run = Sees(), dataclasses.replace(RUN, schedule=TwoFits())
    track = both(tmp_path)[:1]
    train(run, tables=TABLES, baseline=False, watcher=sees, track=track, track_every=1)
    found = events(tmp_path / "tb" / "toy-seed-0")
    assert values(found["loss/click"]) == {s: np.float32(v) for s, v in sees.losses["click"].items()}
    assert sorted(sees.losses["click"]) == list(range(1, 13))
    assert list(values(found["valid/click/auc"])) == [4, 5, 9, 12] == list(sees.values)


def test_evaluations_of_calls_that_run_at_once_stand_at_their_own_steps() -> None:
    sees = Sees()
    board = _Board(SimpleNamespace(watcher=sees, steps=100), 3, 2, 40)  # type: ignore[arg-type]
    for place, step in ((1, 20), (0, 10), (1, 40)):
        board.read(place, ("evaluated", (step, "auc", 0.5, True, place)))
    assert sees.values == {160: 1, 110: 0, 180: 1}


# --------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("dies", [7, 9])  # in the middle; after an evaluation that is done again
def test_a_resumed_run_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: int) -> None:
    whole = tmp_path / "whole"
    train(RUN, tmp_path / "reference", tables=TABLES, baseline=False, track=both(whole), track_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "__exit__", lambda *_: None)  # the process is gone before it can tidy up
        with pytest.raises(RuntimeError, match="killed"):
            train(
                RUN, tmp_path / "out", tables=TABLES, baseline=False, watcher=Sees(dies), track=both(tmp_path),
                track_every=1,
            )  # fmt: skip
    assert client(tmp_path / "ml")[1][0].info.status == "RUNNING"
    steps = [step for step, _ in history(tmp_path / "ml")["loss/click"]]
    assert steps == list(range(1, steps[-1] + 1)) and 5 <= steps[-1] < dies, "all of the checkpoint is there"
    train(RUN, tmp_path / "out", tables=TABLES, baseline=False, resume=True, track=both(tmp_path), track_every=1)
    assert client(tmp_path / "ml")[1][0].info.status == "FINISHED"
    assert [p.name for p in (tmp_path / "tb").iterdir()] == ["toy-seed-0"]
    for one, other in (
        (events(tmp_path / "tb" / "toy-seed-0"), events(whole / "tb" / "toy-seed-0")),
        (history(tmp_path / "ml"), history(whole / "ml")),
    ):
        assert one.keys() == other.keys()
        for name in (name for name in one if not name.startswith("time/")):
            assert values(one[name]) == values(other[name]), name


def test_a_finished_run_is_not_written_again(tmp_path: Path) -> None:
    train(RUN, tmp_path / "out", tables=TABLES, baseline=False, track=both(tmp_path))
    before = history(tmp_path / "ml")
    train(RUN, tmp_path / "out", tables=TABLES, resume=True, track=both(tmp_path))
    assert history(tmp_path / "ml") == before


def test_an_entry_that_is_gone_is_begun_again_and_said(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    keys = {both(tmp_path)[0]: "gone", both(tmp_path)[1]: "0123456789abcdef0123456789abcdef"}
    (tmp_path / "out" / "track.json").write_text(json.dumps(keys))
    sees = Sees()
    with Tracker(sees, both(tmp_path), 1, RUN, tmp_path / "out", resume=True) as tracker:
        assert tracker.keys[both(tmp_path)[0]] == "toy-seed-0"
    assert [("no longer has" in note, "tracked" in note) for note in sees.notes] == [(True, False), (False, True)] * 2


# --------------------------------------------------------------------------------------------------------------- errors
def test_a_store_that_fails_is_left_out_with_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real, sees = [], MLflow.write, Sees()

    def write(self: MLflow, points: Any) -> None:
        calls.append(len(points))
        if len(calls) == 2:
            raise ConnectionError("the server is gone\nfor good")
        real(self, points)

    monkeypatch.setattr(MLflow, "write", write)
    result = train(RUN, tables=TABLES, baseline=False, watcher=sees, track=both(tmp_path), track_every=1)
    assert result.metrics["steps"] == 12 and len(calls) == 2
    assert [note for note in sees.notes if "failed" in note] == [
        f"! {both(tmp_path)[1]} failed and is written to no more, the training goes on: ConnectionError: the server is gone"
    ]
    assert len(events(tmp_path / "tb" / "toy-seed-0")["loss/click"]) == 12, "the other one has it all"


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("wandb=x", "should be KIND=ADDRESS with a kind among tensorboard, mlflow"),
        ("tensorboard", "should be KIND=ADDRESS"),
        ("tensorboard=http://host", "reads a folder"),
        ("mlflow=http://127.0.0.1:9", "cannot be written to"),
    ],
)
def test_a_bad_address_is_an_error_before_training(tmp_path: Path, spec: str, text: str) -> None:
    sees = Sees()
    with pytest.raises(ValueError, match=text):
        train(RUN, tmp_path / "out", tables=TABLES, track=[spec], watcher=sees)
    assert not sees.losses
    train(make_run(training=Training(batch_size=64, steps=1)), tmp_path / "out", tables=TABLES, baseline=False)


def test_other_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="given twice"):
        stores_of(["tensorboard=a", "tensorboard=a"])
    with pytest.raises(ValueError, match="--track-every should be at least 1. Found 0"):
        train(RUN, tables=TABLES, track=["tensorboard=a"], track_every=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no folder|Not a directory"):
        train(RUN, tables=TABLES, track=[f"tensorboard={tmp_path / 'file'}"])
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    with pytest.raises(ValueError, match="cannot be written to: .*sqlite:///mlflow.db"):
        train(RUN, tables=TABLES, track=[both(tmp_path)[1]])


@pytest.mark.parametrize(
    ("library", "spec"),
    [("tensorboard", "tensorboard=a"), ("mlflow", "mlflow=a"), ("alembic", "mlflow=sqlite:///a.db")],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, library: str, spec: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ImportError, match=rf'needs {library}\. Install it: pip install "unbraid\[track\]"'):
        stores_of([spec])
    result = CliRunner().invoke(app, ["train", "--track", spec, "--out", "never"])
    assert result.exit_code == 2 and "unbraid[track]" in result.output and not Path("never").exists()


def test_a_run_that_fails_or_is_interrupted_says_so(tmp_path: Path) -> None:
    for error, status in ((RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with (
            pytest.raises(error),
            Tracker(Watcher(), [f"mlflow={tmp_path / status}"], 1, RUN, None, resume=False) as told,
        ):
            told.trained(1, {"click": torch.tensor(0.5)})
            raise error
        assert client(tmp_path / status)[1][0].info.status == status
        assert history(tmp_path / status)["loss/click"] == [(1, 0.5)], "what waited is written"


def test_the_time_of_a_step_is_of_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("unbraid.track.time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0]))
    write = TensorBoard.write

    def slow(self: TensorBoard, points: Any) -> None:
        now[0] += 50
        write(self, points)

    monkeypatch.setattr(TensorBoard, "write", slow)

    def step(number: int, seconds: float) -> None:
        now[0] += seconds
        told.trained(number, {"click": torch.tensor(0.5)})

    with Tracker(Watcher(), both(tmp_path)[:1], 2, RUN, None, resume=False) as told:
        told.begins(0, 0)
        step(1, 30)  # the first one, with what it took to begin
        step(2, 1)
        step(3, 2)  # a mean of 1.5
        now[0] += 100
        told.evaluated(3, "auc", 0.5, True, {})
        step(4, 3)
        told.saving()
        now[0] += 200
        step(5, 4)  # with the checkpoint, so that 3 is left
        step(6, 5)
        step(7, 7)  # a mean of 6; and writing every 5 seconds, which is after it
        step(8, 1)
        step(9, 1)
    assert values(events(tmp_path / "tb" / "toy-seed-0")["time/step"]) == {3: 1.5, 5: 3.0, 7: 6.0, 9: 1.0}


# ---------------------------------------------------------------------------------------------------------------- names
def test_names_are_stable_distinct_and_permitted() -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert loss_name("click") == "loss/click" and loss_name("click@home") == "loss_domains/click/home"
    domains = ["home", "a/b", "a_b", "a b", "", ".", "..", "50%", "émile", "x@y", "x:y", "(missing)"]
    found = [loss_name(f"click@{domain}") for domain in domains]
    assert len(set(found)) == len(found)
    for name in found:
        _validate_metric_name(name)
    assert loss_name("click@a/b") == "loss_domains/click/a_2f_b"
    one = {"ndcg@5": {"value": 0.5, "low": None, "high": None}, "rows": 3, "positives": 1}
    assert numbers("valid", {"click": {**one, "domains": {}}})["valid/click/ndcg_at_5"] == 0.5


def test_many_domains_are_left_out() -> None:
    part = {"auc": {"value": 0.5, "low": 0.4, "high": 0.6}, "rows": 30, "positives": 12}
    for count in (FEW_DOMAINS, FEW_DOMAINS + 1):
        domains = {f"d{i}": part for i in range(count)} | {"empty": {**part, "rows": 0}}
        found = numbers("test", {"click": {**part, "domains": domains}})
        assert ("test_domains/click/d3/auc_low" in found) == (count == FEW_DOMAINS)
        assert found["test/click/auc_high"] == 0.6 and "test_domains/click/empty/auc" not in found


def test_losses_of_tasks_in_domains(tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, losses=(Supervised(by="task@domain"),))
    train(run, tables=TABLES, baseline=False, track=both(tmp_path)[1:], track_every=1)
    found = history(tmp_path / "ml")
    assert {"loss_domains/click/home", "loss_domains/buy/search"} <= found.keys()


# --------------------------------------------------------------------------------------------------- database, commands
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's use of SQLAlchemy
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_database_keeps_the_same(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    file, sees = tmp_path / "new" / "mlflow.db", Sees()
    spec = f"mlflow=sqlite:///{file}"
    train(RUN, tmp_path / "out", tables=TABLES, baseline=False, watcher=sees, track=[spec], track_every=1)
    run_id = json.loads((tmp_path / "out" / "track.json").read_text())[spec]
    found = MlflowClient(tracking_uri=f"sqlite:///{file}")
    assert {p.step: p.value for p in found.get_metric_history(run_id, "loss/click")} == sees.losses["click"]
    assert found.get_run(run_id).info.artifact_uri.startswith((tmp_path / "new" / "mlartifacts").as_uri())
    assert list((tmp_path / "new" / "mlartifacts").rglob("run.toml"))
    again = MLflow(f"sqlite:///{file}")
    key, has = again.begin(Entry.of(RUN), run_id)
    assert key == run_id and has["loss/click"] == set(range(1, 13))
    again.close("FINISHED")


def test_the_command_tracks(tmp_path: Path) -> None:
    make_log().write_parquet(tmp_path / "log.parquet")
    (tmp_path / "run.toml").write_text(config.dumps(RUN).replace('rows = "log"', 'rows = "log.parquet"'))
    words = ["train", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out"), "--no-baseline", "--track-every", "3"]
    result = CliRunner().invoke(app, [*words, *(w for spec in both(tmp_path) for w in ("--track", spec))])
    assert result.exit_code == 0, result.output
    assert f"tracked: {both(tmp_path)[0]} toy-seed-0" in result.stderr.replace("\n", "")
    assert sorted(values(events(tmp_path / "tb" / "toy-seed-0")["loss/buy"])) == [1, 4, 7, 10]
    assert sorted(values(history(tmp_path / "ml")["loss/buy"])) == [1, 4, 7, 10]
    result = CliRunner().invoke(app, ["train", "--track", "x=y", "--out", str(tmp_path / "other")])
    assert result.exit_code == 2 and not (tmp_path / "other").exists()


def test_telemetry_of_mlflow_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    MLflow("somewhere")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    MLflow("somewhere")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false" and TensorBoard("somewhere").writer is None
