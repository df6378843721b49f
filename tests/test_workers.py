"""Calls of `fit` in processes of their own: the same bits, what is told on the way, deaths and interruptions."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid.bundle import build
from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.slots import Look
from unbraid.towers.stem import STEM
from unbraid.train import Local, Training, Watcher

MODEL = ModelChoice(
    tower=STEM(expert=(8,), tower=(4,), dropout=0.3),
    tables=Views(kind="per_task", width=4, lazy_rows=0, unknown_rate=0.1),
)
UPDATE = Joint(lr=0.01, weight_decay=0.01, table_weight_decay=0.05, learning_rate="cosine", clip_norm=1.0)
TRAINING = Training(batch_size=32, evaluate_every=4, checkpoint_steps=2, checkpoint_seconds=0)


class Told(Watcher):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.looks: list[int] = []
        self.notes: list[str] = []

    def step(self, done: int, total: int, rows_per_second: float, losses: Mapping[str, float]) -> None:
        self.steps.append((done, total))

    def evaluated(self, step: int, *rest: Any) -> None:
        self.looks.append(step)

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Fails:
    """A term that raises, or ends its process, or waits, when it sees a task's weight that says so."""

    term: Any
    at: int
    how: str
    mark: str  # a file: once it is there, nothing happens any more
    needs: tuple[str, ...] = ()

    def __call__(self, output: Any, batch: Any, step: int) -> Any:
        if step == self.at and not Path(self.mark).exists():
            Path(self.mark).write_text("")
            if self.how == "raise":
                raise FloatingPointError("Loss of `click` is nan at step 3.")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "exit":
                os._exit(3)
            time.sleep(120)
        return self.term(output, batch, step)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    cache = str(tmp_path_factory.mktemp("cache"))
    return Encoded(encode(make_data(cache=cache), tables={"log": make_log(rows=400)}))


def session(data: Encoded, folder: Path | None = None, resume: bool = False, **fails: Any) -> tuple[Local, Any]:
    run = make_run(model=MODEL, update=UPDATE, training=TRAINING)
    model = build(run, data.schema)
    terms = [Fails(term, **fails) if fails else term for term in bound_terms(run, data.schema, model)]
    return Local(data, terms, run.update, run.training, {}, 7, folder, resume, watcher=Told()), model


def calls(data: Encoded) -> list[dict[str, Any]]:
    rows = data.split("train")
    return [
        {"weights": {"click": 1.0, "buy": 0.0}},
        {"seed": (3, 1), "rows": rows[: len(rows) // 2]},
        {"sample": {"click": 1.0, "buy": 1.0}},
    ]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}/{key}").items()}
    return {path: value}


def equal(one: Any, other: Any) -> bool:
    a, b = flat(one), flat(other)
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


def go(local: Local, model: Any, jobs: int, given: list[dict[str, Any]], **common: Any) -> list[Any]:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        found = list(local.fit_apart(model, 8, given, jobs=jobs, total=20, **common))
        if jobs > 1:
            workers = local._workers
            assert len(workers.idle) <= jobs and not workers.busy
    finally:
        local.close()
    assert equal(before, dict(model.state_dict())), "the model ends as it began"
    return found


def test_processes_give_the_same_bits_as_one_call_after_the_other(data: Encoded, tmp_path: Path) -> None:
    """Without a folder, and on from a state; with a folder, the log and the counts are the same, too."""
    one, model = session(data)
    first = go(one, model, 1, calls(data), look=Look(every=-1))
    assert len(first) == 3 and not equal(first[0], first[1]) and not one.watcher.looks
    on = [{**call, "update_state": state} for call, (_, state) in zip(calls(data), first, strict=True)]
    found = {}
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        folder.mkdir()
        local, other = session(data, folder if jobs == 2 else None)
        local.calls, local.folder = 3, folder
        begun = time.monotonic()
        results = go(local, other, jobs, on, look=Look(metric="logloss", keep_best=True))
        log = sorted((folder / "log.jsonl").read_text().splitlines())
        told = local.watcher
        found[jobs] = results, log, local.calls, local.steps, sorted(told.looks)
        assert 0 < local.seconds < 2 * jobs * (time.monotonic() - begun)
        assert sorted(p.name for p in folder.iterdir()) == [*(f"fit-{n}.safetensors" for n in (3, 4, 5)), "log.jsonl"]
        if jobs == 2:
            assert all(total == 24 for _, total in told.steps) and max(done for done, _ in told.steps) == 24
    assert found[1][2:] == found[2][2:] == (6, 24, [4, 4, 4, 8, 8, 8])
    assert all(equal(a, b) for a, b in zip(found[1][0], found[2][0], strict=True))
    assert [json.loads(line) for line in found[1][1]] == [json.loads(line) for line in found[2][1]]


@pytest.mark.slow
def test_a_death_is_told_and_the_rest_can_be_resumed(data: Encoded, tmp_path: Path) -> None:
    whole, model = session(data)
    want = go(whole, model, 1, calls(data))
    messages = {
        "raise": (FloatingPointError, "Loss of `click` is nan"),
        "kill": (
            ChildProcessError,
            "The process of training no. . of those that run at once ended by signal 9, perhaps for want of memory",
        ),
        "exit": (ChildProcessError, "ended by exit status 3"),
    }
    for how, (kind, message) in messages.items():
        folder = tmp_path / how
        folder.mkdir()
        local, model = session(data, folder, at=5, how=how, mark=str(folder / "mark"))
        with pytest.raises(kind, match=message) as error:
            go(local, model, 2, calls(data))
        if how == "raise":
            assert "In the process of call" in str(error.value.__cause__) and "Traceback" in str(error.value.__cause__)
        assert list(folder.glob("fit-*.safetensors"))
        again, model = session(data, folder, True, at=5, how=how, mark=str(folder / "mark"))
        found = go(again, model, 2, calls(data))
        assert all(equal(a, b) for a, b in zip(want, found, strict=True))
        assert not list(folder.glob(".*")), "what a killed process was writing is gone"
        assert again.steps == 24 and any("resumed at step" in note for note in again.watcher.notes)


@pytest.mark.slow
def test_an_interruption_ends_the_processes(data: Encoded, tmp_path: Path) -> None:
    local, model = session(data, tmp_path, at=1, how="wait", mark=str(tmp_path / "mark"))
    timer = threading.Thread(target=_interrupt_when, args=(tmp_path / "mark",))
    timer.start()
    pids: list[int] = []
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        try:
            for _ in local.fit_apart(model, 8, calls(data), jobs=2):
                pass
        finally:
            pids = [worker.process.pid for worker in (*local._workers.idle, *local._workers.busy.values())]
    timer.join()
    assert time.monotonic() - begun < 110 and not pids, "they were ended at once"


def _interrupt_when(mark: Path) -> None:
    while not mark.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def test_what_cannot_be_pickled_is_said_before_anything_trains(data: Encoded) -> None:
    local, model = session(data)
    local.terms = [lambda output, batch, step: {}]  # type: ignore[list-item]
    with pytest.raises(ValueError, match="can be pickled .* Let them run one after another: `jobs` = 1"):
        go(local, model, 2, calls(data))
    assert local._workers is None


def test_one_call_or_one_job_needs_no_process(data: Encoded) -> None:
    for jobs, given in ((8, calls(data)[:1]), (1, calls(data)[:2])):
        local, model = session(data)
        assert len(
            go(local, model, jobs, given) if jobs == 1 else list(local.fit_apart(model, 8, given, jobs=jobs))
        ) == len(given)
        assert local._workers is None


# ------------------------------------------------------------------------------------------------------- what fit learned
def test_columns_are_those_of_training_and_validation_rows(data: Encoded) -> None:
    local, _ = session(data)
    rows = local.rows("valid")
    np.testing.assert_array_equal(local.column("user", rows), data.columns["user"][rows])
    assert local.column("request", rows) is None
    with pytest.raises(ValueError, match="rows of the training and validation splits"):
        local.column("domain", data.split("test"))
    assert local.objectives == ("click", "buy") and local.metric == "auc"


def test_a_look_says_what_is_judged_how_often_and_when_to_stop(data: Encoded) -> None:
    def looks(**look: Any) -> tuple[list[int], int, dict[str, torch.Tensor]]:
        local, model = session(data)
        local.fit(model, 8, look=Look(**look) if look else None)
        return local.watcher.looks, local.steps, {k: v.clone() for k, v in model.state_dict().items()}

    assert looks()[0] == looks(every=4)[0] == [4, 8] and looks(every=-1)[0] == [] and looks(every=3)[0] == [3, 6, 8]
    last, best = looks(every=1, metric="click.ece"), looks(every=1, metric="click.ece", keep_best=True)
    assert last[1] == best[1] == 8
    for name, value in looks()[2].items():  # but for rounding: a look pays the tables' decay at another time
        torch.testing.assert_close(last[2][name], value, rtol=1e-5, atol=1e-6)
    early = looks(every=1, metric="click.ece", patience=1)
    assert early[1] == len(early[0]) <= 8
    half = data.split("valid")[:50]
    seen: list[Any] = []
    local, model = session(data)
    score = local.score
    local.score = lambda *args: (seen.append(args[2]), score(*args))[1]  # type: ignore[assignment, method-assign]
    local.fit(model, 4, look=Look(rows=half))
    assert all(np.array_equal(rows, half) for rows in seen) and seen


def test_a_seed_of_several_numbers_is_the_same_in_any_call(data: Encoded) -> None:
    def trained(calls_before: int, **rest: Any) -> dict[str, torch.Tensor]:
        local, model = session(data)
        local.calls = calls_before
        return {k: v.clone() for k, v in local.fit(model, 4, **rest)[0].state_dict().items()}

    assert equal(trained(0, seed=(5, 2)), trained(9, seed=(5, 2)))
    assert not equal(trained(0, seed=(5, 2)), trained(0, seed=(5, 3)))
    assert not equal(trained(0), trained(9)) and equal(trained(0), trained(0, seed=7))


def test_a_start_moves_the_step_size_along(data: Encoded) -> None:
    local, model = session(data)
    _, state = local.fit(model, 2, total=20, start=10)
    assert state["step"] == 12
    update = UPDATE.build(model, steps=20, weights={})
    update.seek(12)
    assert update.dense.param_groups[0]["lr"] == pytest.approx(0.01 * UPDATE.factor(12, 20))


def test_the_log_of_other_calls_survives_a_resumption(data: Encoded, tmp_path: Path) -> None:
    local, model = session(data, tmp_path)
    for _ in range(2):
        local.fit(model, 8)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 4
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"call": 1, "st']) + "\n")
    again, model = session(data, tmp_path, True)
    for _ in range(2):
        again.fit(model, 8)
    assert (tmp_path / "log.jsonl").read_text().splitlines() == lines
    (tmp_path / "fit-1.safetensors").unlink()
    third, model = session(data, tmp_path, True)
    for _ in range(2):
        third.fit(model, 8)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [4, 8, 4, 8]


def test_an_objective_that_cannot_be_drawn_is_refused(data: Encoded) -> None:
    local, model = session(data)
    with pytest.raises(ValueError, match="`clack` is no objective. Permitted are"):
        local.fit(model, 2, sample={"clack": 1.0})
    rows = data.split("train")
    home = rows[data.columns["domain"][rows] == data.schema.domains.index("home")]
    with pytest.raises(ValueError, match="Objective `click@mail` has no row to train on"):
        local.fit(model, 2, rows=home, sample={"click@mail": 1.0})
