"""The stream: which row is scored and trained when, what goes on from one period to the next, resumption, drift."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.bundle import Bundle, BundleError, build
from unbraid.config import ModelChoice
from unbraid.data.declaration import Data, Split
from unbraid.data.encode import encode
from unbraid.data.table import Encoded, order, steps_per_epoch
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.job import JobError, train
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.schedules import online
from unbraid.schedules.online import Online, plot
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.stem import STEM
from unbraid.train import Local, Training, Watcher
from unbraid.types import Feature, Task

DAY, HOUR = 86_400, 3_600
TABLES = {"log": make_log(rows=900)}  # 11.6 days from 1970-01-01; 60 % train, 20 % valid, 20 % test
TRAINING = Training(batch_size=32, checkpoint_steps=1, checkpoint_seconds=0)
DROPOUT = ModelChoice(
    tower=STEM(expert=(16,), tower=(8,), dropout=0.3),
    tables=Views(kind="per_task", width=4, lazy_rows=0, unknown_rate=0.1),
)
DECAY = Joint(lr=0.01, weight_decay=0.01, table_weight_decay=0.05, learning_rate="cosine", clip_norm=1.0)


class Spy:
    """A session whose batches and calls are written down; it can die at a training step or at a scoring."""

    def __init__(
        self, data: Encoded, run: Any, folder: Path | None = None, resume: bool = False, die: tuple = ()
    ) -> None:
        self.model = build(run, data.schema)
        self.terms, self.die = bound_terms(run, data.schema, self.model), die
        self.events: list[tuple[str, Any]] = []
        self.totals: list[int] = []
        self.local = Local(data, [self.term], run.update, run.training, {}, run.seed, folder, resume)
        fit, score = self.local.fit, self.local.score

        def spied_fit(model: Any, steps: int, **rest: Any) -> Any:
            self.events.append(("fit", np.array(rest["rows"])))
            self.totals.append(rest.get("total", 0))
            return fit(model, steps, **rest)

        def spied_score(model: Any, split: str, rows: Any) -> Any:
            self.events.append(("live" if model is self.model else "frozen", np.array(rows)))
            self.perhaps_die("live")
            return score(model, split, rows)

        self.local.fit, self.local.score = spied_fit, spied_score  # type: ignore[assignment, method-assign]

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def term(self, output: Any, batch: Any, step: int) -> Any:
        self.events.append(("step", batch.row.numpy().copy()))
        self.perhaps_die("step")
        (term,) = self.terms
        return term(output, batch, step)

    def perhaps_die(self, what: str) -> None:
        if self.die and self.die[0] == what and len(self.of(what)) == self.die[1]:
            raise RuntimeError("killed")

    def of(self, what: str) -> list[Any]:
        return [rows for name, rows in self.events if name == what]

    def weights(self) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in self.model.state_dict().items()}


def encoded(**changes: Any) -> Encoded:
    return Encoded(encode(make_data(**changes), tables=TABLES))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def toy(schedule: Online, **changes: Any) -> Any:
    return dataclasses.replace(make_run(training=TRAINING, **changes), schedule=schedule)


# --------------------------------------------------------------------------------------------------------------- the plan
def by_hand(schedule: Online, times: Any, per_second: int) -> list[tuple[int, int]]:
    """(scored, trained) of each row, walking over the periods one by one."""
    width = Fraction(schedule.seconds)
    local = [Fraction(int(t), per_second) + Fraction(schedule.offset) * HOUR for t in times]
    periods = [t // width for t in local]
    begin_of_stream = min(periods) + schedule.first
    found = []
    for t, period in zip(local, periods, strict=True):
        at = begin_of_stream
        while at <= period or at * width < t + Fraction(schedule.wait):
            at += 1
        found.append((int(period), int(at)))
    return found


@pytest.mark.parametrize("wait", [0, 1, 0.5, 299, 300, 301, 900])
@pytest.mark.parametrize("first", [0, 4, 7])
@pytest.mark.parametrize(("offset", "per_second"), [(0, 1), (5.5, 1000), (-3, 1000)])
def test_the_plan_is_that_of_a_walk_over_the_periods(wait: float, first: int, offset: float, per_second: int) -> None:
    rng = np.random.default_rng(first)
    times = rng.integers(-3000, 3000, 200) * per_second + rng.integers(0, per_second, 200)
    times[:40] = rng.integers(-10, 10, 40) * 300 * per_second  # on the boundary
    times[40:50] = times[50]  # ties
    schedule = Online(period=300, offset=offset, first=first, wait=wait)
    plan = schedule.plan(times, float(per_second))
    assert list(zip(plan.scored.tolist(), plan.trained.tolist(), strict=True)) == by_hand(schedule, times, per_second)
    assert plan.start == plan.scored.min() + first and plan.end == plan.scored.max() + 1
    assert (plan.trained > plan.scored).all(), "tested before it is trained on"


def test_a_label_known_exactly_when_a_period_begins_counts_as_known() -> None:
    schedule, times = Online(period=100, wait=100, first=0), np.array([0, 99, 100, 101, 250])
    assert schedule.plan(times, 1.0).trained.tolist() == [1, 2, 2, 3, 4]
    assert Online(period=100, first=0).plan(times, 1.0).trained.tolist() == [1, 1, 2, 2, 3]
    assert Online(period=100, wait=1.25, first=0).plan(np.array([97, 98, 99]), 1.0).trained.tolist() == [1, 1, 2]


@pytest.mark.parametrize(("period", "edge"), [("day", DAY), ("hour", HOUR)])
def test_days_and_hours_begin_in_utc_or_by_local_time(period: Any, edge: int) -> None:
    noon = np.datetime64("2022-05-01T00:00:00", "s").astype(int)
    times = np.array([noon, noon + edge - 1, noon + edge, noon + 2 * edge])
    plan = Online(period=period).plan(times, 1.0)
    assert (plan.scored - plan.scored[0]).tolist() == [0, 0, 1, 2]
    want = {"day": "2022-05-02", "hour": "2022-05-01T01:00:00"}[period]
    assert Online(period=period).label(int(plan.scored[2])) == want
    ahead = Online(period="day", offset=8.0)  # 16:00 UTC is midnight there
    local = ahead.plan(np.array([0, 57_599, 57_600, 57_600 + DAY]) * 1000, 1000.0).scored
    assert local.tolist() == [0, 0, 1, 2] and ahead.label(1) == "1970-01-02"
    assert Online(period=2 * DAY).label(3) == "1970-01-07" and Online(period=90).label(1) == "1970-01-01T00:01:30"


def test_what_cannot_be_streamed_is_refused(encoded_of: Any) -> None:
    for wrong in ({"period": 0}, {"period": -5}, {"first": -1}, {"epochs": 0}, {"first_epochs": 0}, {"wait": -1.0},
                  {"wait": float("inf")}, {"wait": float("nan")}, {"offset": 24.0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Online(**wrong)  # type: ignore[arg-type]
    times = np.arange(10) * DAY
    with pytest.raises(ValueError, match="all 10 training and validation rows lie in the first 10"):
        Online(first=10).plan(times, 1.0)
    with pytest.raises(ValueError, match="No label is known when the stream begins"):
        Online(first=2, wait=2.5 * DAY).plan(times, 1.0)
    assert Online(first=2, wait=2.0 * DAY).plan(times, 1.0).start == 2
    with pytest.raises(config.RunError, match="day"):
        config.override(toy(Online()), ["schedule.period=week"])
    assert config.override(toy(Online()), ["schedule.period=600"]).schedule.seconds == 600  # type: ignore[union-attr]
    untimed = encoded_of(make_data(time="", histories=(), events=(), fields=(), split=Split(kind="user")))
    with pytest.raises(ValueError, match="set `data.time`"):
        spy = Spy(untimed, make_run(data=make_data(histories=())))
        Online()(spy.local, spy.model, 0)


def test_the_session_trains_on_no_test_row(encoded_of: Any) -> None:
    data = encoded_of(make_data())
    spy = Spy(data, make_run())
    assert spy.local.rows("train+valid").tolist() == sorted([*data.split("train"), *data.split("valid")])
    for rows in (data.split("all"), data.split("test")[:1], np.zeros(0, int), np.array([-1]), np.array([10**6])):
        with pytest.raises(ValueError, match="rows of the training and validation splits"):
            spy.local.fit(spy.model, 1, rows=rows)
    spy.local.fit(spy.model, 1, rows=data.split("valid"), stream=True)
    assert set(spy.local.score(spy.model, "train+valid", np.arange(data.rows)).row) == set(
        spy.local.rows("train+valid")
    )


# ------------------------------------------------------------------------------------------------------------ whole passes
@pytest.mark.parametrize(("rows", "size"), [(1, 4), (4, 4), (5, 4), (97, 10), (100, 10), (101, 10), (19, 20)])
def test_a_whole_pass_leaves_no_row_out(rows: int, size: int) -> None:
    numbers, steps = np.arange(rows) * 3, steps_per_epoch(rows, size, whole=True)
    batches = [part for part, _ in zip(order(numbers, size, 7, whole=True), range(3 * steps + 1), strict=False)]
    for epoch in range(3):
        parts = batches[epoch * steps : (epoch + 1) * steps]
        assert sorted(np.concatenate(parts)) == numbers.tolist()
        sizes = [len(p) for p in parts]
        assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    for start in range(len(batches)):
        assert next(order(numbers, size, 7, start, whole=True)).tolist() == batches[start].tolist()


# -------------------------------------------------------------------------------------------------------------- accounting
@pytest.mark.parametrize(
    "schedule",
    [
        Online(),
        Online(first=3, first_epochs=3, epochs=2),
        Online(period="hour", first=30, wait=5.5 * HOUR),
        Online(first=0, frozen=False),
        Online(first=2, wait=1.0 * DAY),
        Online(period=DAY // 2, first=3, wait=40_000.0, offset=8.0, epochs=2),
    ],
)  # fmt: skip
def test_each_row_is_scored_once_then_trained_once_and_never_read_again(schedule: Online) -> None:
    data = encoded()
    spy = Spy(data, toy(schedule))
    schedule(spy.local, spy.model, 0)
    rows, times = spy.local.rows("train+valid"), data.columns["time"][spy.local.rows("train+valid")]
    plan = by_hand(schedule, times, int(data.about["per_second"]))
    start, end = min(s for s, _ in plan) + schedule.first, max(s for s, _ in plan) + 1
    scored = {int(r): s for r, (s, _) in zip(rows, plan, strict=True) if s >= start}
    due = {int(r): t for r, (_, t) in zip(rows, plan, strict=True) if t <= end}
    assert sorted(int(r) for part in spy.of("live") for r in part) == sorted(scored)
    assert len(spy.of("frozen")) == (len(spy.of("live")) if schedule.frozen else 0)
    passes = Counter(int(r) for part in spy.of("step") for r in part)
    first = schedule.first_epochs if schedule.first else schedule.epochs
    assert passes == {r: first if t == start else schedule.epochs for r, t in due.items()}
    seen_scored: set[int] = set()
    done: set[int] = set()
    for what, part in spy.events:  # what happened when
        part = {int(r) for r in part}
        if what == "live":
            (period,) = {scored[r] for r in part}
            assert not part & done, "a row that was trained on is scored"
            assert done == {r for r, t in due.items() if t <= period}, "exactly the known rows were trained on by then"
            seen_scored |= part
        elif what == "fit":
            assert not part & done, "an old row is trained on again"
            assert part & set(scored) <= seen_scored, "a row is trained on before it was scored"
            assert len({due[r] for r in part}) == 1
            done |= part
    assert done == set(due)
    assert set(spy.totals) == {len(spy.of("step"))}, "the learning rate knows how many steps there will be"
    record = spy.local.record
    assert record is not None and record["waiting"] == len(rows) - len(due)
    for line, part in zip(record["periods"], spy.of("live"), strict=True):
        period = scored[int(part[0])]
        known = [r for r, t in due.items() if t <= period]
        began = sum(s < period for s, _ in plan)
        assert (line["rows"], line["trained"], line["waiting"]) == (len(part), len(known), began - len(known))
        assert line["begin"] == schedule.label(period)


def test_empty_periods_have_no_line_and_do_no_harm() -> None:
    log = TABLES["log"].filter(~pl.col("time").is_between(200 * 10**6, 500 * 10**6))  # days 2.3 to 5.8
    data = Encoded(encode(make_data(), tables={"log": log}))
    schedule = Online(period="hour", first=24, wait=2.0 * HOUR)
    spy = Spy(data, toy(schedule))
    schedule(spy.local, spy.model, 0)
    assert spy.local.record is not None
    lines = spy.local.record["periods"]
    assert all(line["rows"] > 0 for line in lines)
    assert not any("1970-01-04" < line["begin"] < "1970-01-06T18" for line in lines)
    after = next(line for line in lines if line["begin"] > "1970-01-05")
    assert after["waiting"] == 0, "all that waited became known in the gap"
    assert sum(line["rows"] for line in lines) + len(spy.of("fit")[0]) >= len(spy.local.rows("train+valid")) - 10


# -------------------------------------------------------------------------------------------------------------- warm start
def test_weights_and_optimiser_state_go_on_as_in_a_loop_written_by_hand() -> None:
    data, schedule = encoded(), Online(period=DAY, first=2, first_epochs=2)
    run = toy(schedule, model=DROPOUT, update=DECAY)
    spy = Spy(data, run)
    live = schedule(spy.local, spy.model, 0)
    times = data.columns["time"][spy.local.rows("train+valid")]
    days = times // (DAY * 1000)
    parts = [
        spy.local.rows("train+valid")[days < 2],
        *(spy.local.rows("train+valid")[days == d] for d in range(2, days.max() + 1)),
    ]
    steps = [2 * -(-len(parts[0]) // 32), *(-(-len(p) // 32) for p in parts[1:])]

    def loop(carry: bool, total: int) -> dict[str, torch.Tensor]:
        hand = Spy(data, run)
        model, state = hand.model, None
        for part, n in zip(parts, steps, strict=True):
            model, state = hand.local.fit(
                model, n, rows=part, update_state=state if carry else None, stream=True, total=total
            )
        return hand.weights()

    assert equal(loop(True, sum(steps)), {k: v for k, v in live.state_dict().items()})
    assert not equal(loop(False, sum(steps)), loop(True, sum(steps)))
    assert not equal(loop(True, 0), loop(True, sum(steps))), "the learning rate falls over the whole stream"


def test_the_frozen_model_is_the_one_trained_once_on_the_first_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    data, schedule = encoded(), Online(period=DAY, first=3, first_epochs=2)
    run = toy(schedule, model=DROPOUT)
    found: dict[str, Any] = {}

    def keeping(config: Any, session: Any, plan: Any, rows: Any, model: Any) -> Any:
        found["stream"] = stream(config, session, plan, rows, model)
        return found["stream"]

    stream = online._Stream
    monkeypatch.setattr(online, "_Stream", keeping)
    spy = Spy(data, run)
    live = schedule(spy.local, spy.model, 0)
    once = Spy(data, run)
    rows = once.local.rows("train+valid")
    rows = rows[data.columns["time"][rows] < 3 * DAY * 1000]
    once.local.fit(once.model, 2 * -(-len(rows) // 32), rows=rows, stream=True)
    assert equal(once.weights(), found["stream"].frozen.state_dict())
    assert not equal(once.weights(), live.state_dict())
    first = found["stream"].lines[0]
    assert first["live"] == first["frozen"], "nothing has been trained on yet since the copy"
    assert found["stream"].lines[-1]["live"] != found["stream"].lines[-1]["frozen"]
    without = Spy(data, toy(dataclasses.replace(schedule, frozen=False), model=DROPOUT))
    assert equal(
        dataclasses.replace(schedule, frozen=False)(without.local, without.model, 0).state_dict(), live.state_dict()
    )


# --------------------------------------------------------------------------------------------------------------- resumption
STREAM = Online(period=DAY, first=2, first_epochs=2, wait=0.5 * DAY, offset=8.0)


@pytest.mark.parametrize(
    "die", [("step", 3), ("step", 9), ("step", 13), ("step", 18), ("live", 1), ("live", 3), ("live", 7)]
)
def test_a_resumed_stream_is_bit_equal(tmp_path: Path, die: tuple[str, int]) -> None:
    data, run = encoded(), toy(STREAM, model=DROPOUT, update=DECAY)
    whole = Spy(data, run)
    STREAM(whole.local, whole.model, 0)
    assert len(whole.of("step")) >= 18 and len(whole.of("live")) >= 7
    killed = Spy(data, run, tmp_path, False, die)
    with pytest.raises(RuntimeError, match="killed"):
        STREAM(killed.local, killed.model, 0)
    again = Spy(data, run, tmp_path, True)
    STREAM(again.local, again.model, 0)
    assert equal(whole.weights(), again.weights())
    one, two = whole.local.record, again.local.record
    assert one is not None and two is not None
    assert one["periods"] == two["periods"] and one["waiting"] == two["waiting"]
    assert again.local.steps == whole.local.steps == len(whole.of("step"))
    assert again.local.calls == whole.local.calls
    before = {int(r) for rows in killed.of("fit")[:-1] for r in rows}
    assert not before & {int(r) for rows in again.of("step") for r in rows}, "finished periods are not read again"
    assert not list(tmp_path.glob("fit-*")), "a period's own checkpoint goes when the stream's is written"


def test_a_stream_that_died_after_its_last_period_does_nothing_again(tmp_path: Path) -> None:
    data, run = encoded(), toy(STREAM)
    whole = Spy(data, run, tmp_path)
    STREAM(whole.local, whole.model, 0)
    again = Spy(data, run, tmp_path, True)
    STREAM(again.local, again.model, 0)
    assert equal(whole.weights(), again.weights()) and not again.events
    assert again.local.seconds == whole.local.seconds > 0


def test_a_killed_run_is_resumed_and_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = toy(STREAM), tmp_path / "out"
    whole = train(run, tables=TABLES, baseline=False)
    judge, calls = online.judge, iter(range(100))

    def dies(*args: Any) -> Any:
        if next(calls) == 5:
            raise RuntimeError("killed")
        return judge(*args)

    monkeypatch.setattr(online, "judge", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train(run, out, tables=TABLES, baseline=False)
    for path in out.glob("fit-*"):
        path.unlink()  # as if it had died right after the stream's own checkpoint
    with pytest.raises(JobError, match="an unfinished run"):
        train(run, out, tables=TABLES, baseline=False)
    with pytest.raises(BundleError, match="continue it with"):
        Bundle.load(out)
    again = train(run, out, tables=TABLES, baseline=False, resume=True)
    assert again.metrics["test"] == whole.metrics["test"] and again.metrics["steps"] == whole.metrics["steps"]
    assert again.metrics["schedule"]["periods"] == whole.metrics["schedule"]["periods"]
    assert not list(out.glob("*-*.safetensors"))
    periods = len(whole.metrics["schedule"]["periods"])
    assert next(calls) == 6 + 2 * (periods - 2), "two models were judged in two periods before the death, and not again"


# ------------------------------------------------------------------------------------------------------------- the record
def test_metrics_report_and_figure(tmp_path: Path) -> None:
    tasks = (Task("click"), Task("buy", given="click"), Task("spend", kind="real"), Task("size", kind="multiclass"))
    run = toy(Online(period=DAY, first=2, offset=-3.5), data=make_data(tasks=tasks))
    train(run, tmp_path / "out", tables=TABLES, baseline=False)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["schedule"]
    assert found["kind"] == "online" and set(found["seconds"]) == {"live", "frozen"}
    line = found["periods"][0]
    assert set(line["live"]) == {"click", "buy", "spend", "size"}
    assert set(line["live"]["click"]) == {"rows", "positives", "auc", "logloss", "pcoc"}
    assert set(line["frozen"]["spend"]) == {"rows", "positives", "rmse"}
    assert set(line["live"]["size"]) == {"rows", "positives", "accuracy", "logloss"}
    few = [p["live"]["buy"] for p in found["periods"] if p["live"]["buy"]["positives"] < 10]
    assert few and all(task["auc"] is task["pcoc"] is None and "at least 10" in task["why"] for task in few)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Task buy:" in text and "PCOC, live | PCOC, frozen |" in text and f"| {line['begin']} |" in text
    clicks = line["live"]["click"]
    assert f"| {line['begin']} | {clicks['rows']} | {clicks['positives']} | {clicks['auc']:.4f} |" in text
    assert "| - |" in text
    plot(found, "buy", tmp_path / "online.png")
    assert (tmp_path / "online.png").stat().st_size > 5_000
    drawn = plot(found, "click")
    blue, orange = drawn.axes[1].lines[:2]
    np.testing.assert_array_equal(
        blue.get_ydata(), np.array([p["live"]["click"]["pcoc"] for p in found["periods"]], float)
    )
    np.testing.assert_array_equal(
        orange.get_ydata(), np.array([p["frozen"]["click"]["pcoc"] for p in found["periods"]], float)
    )
    assert drawn.axes[0].get_ylabel() == "AUC" and "predictions / sum of labels" in drawn.axes[1].get_ylabel()
    assert all(axis.get_xlabel() == "beginning of the period" and len(axis.get_xticks()) <= 8 for axis in drawn.axes)
    for wrong in ("nothing", "spend", "size"):
        with pytest.raises(ValueError, match=r"should be a binary task, among \['click', 'buy'\]. Found " + wrong):
            plot(found, wrong)


def test_the_report_tells_predicted_rows_from_trained_ones() -> None:
    schedule = Online(period=DAY, first=4, wait=2.0 * DAY)
    result = train(toy(schedule), tables=TABLES, baseline=False)
    found, rows = result.metrics["schedule"], result.metrics["rows"]
    predicted = sum(period["rows"] for period in found["periods"])
    assert found["trained"] + found["waiting"] == rows["train"] + rows["valid"] == found["first"] + predicted
    assert found["waiting"] > 0 and found["first"] > 0
    text = schedule.report(found)
    assert f"Rows predicted: {predicted}. Rows trained on: {found['first']} of the first periods, " in text
    rest = (
        f"{predicted - found['waiting']} of those predicted. Rows that still wait for their labels: {found['waiting']}."
    )
    assert rest in text


class Notes(Watcher):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(
    ("by", "late", "warned"), [("domain", True, True), ("domain", False, False), ("task", True, False)]
)
def test_heads_per_domain_and_a_domain_that_training_never_had(by: Any, late: bool, warned: bool) -> None:
    site = pl.when(pl.lit(late) & (pl.col("time") > 600 * 10**6)).then(pl.lit("new")).otherwise(pl.col("site"))
    run = toy(Online(first=2))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, heads=Heads(by=by)))
    notes = Notes()
    train(run, tables={"log": TABLES["log"].with_columns(site=site)}, baseline=False, watcher=notes)
    assert warned == any("domains that the training split does not have: they share one head" in n for n in notes.said)


def test_the_metrics_of_a_period_are_those_of_the_formulas() -> None:
    data, schedule = encoded(), Online(period=DAY, first=2)
    spy = Spy(data, toy(schedule))
    scores: list[Any] = []
    score = spy.local.score

    def keeping(*args: Any) -> Any:
        scores.append(score(*args))
        return scores[-1]

    spy.local.score = keeping  # type: ignore[method-assign]
    schedule(spy.local, spy.model, 0)
    assert spy.local.record is not None
    found, at = spy.local.record["periods"][1]["live"]["click"], scores[2]  # live, frozen, live
    keep = at.observed["click"]
    z, y = at.logits["click"][keep].astype(float), at.labels["click"][keep]
    p = 1 / (1 + np.exp(-z))
    assert found["pcoc"] == pytest.approx(p.sum() / y.sum(), abs=1e-10)
    assert found["logloss"] == pytest.approx(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(), abs=1e-10)
    pairs = (z[y == 1][:, None] > z[y == 0]) + 0.5 * (z[y == 1][:, None] == z[y == 0])
    assert found["auc"] == pytest.approx(pairs.mean(), abs=1e-10)
    assert (found["rows"], found["positives"]) == (len(y), y.sum())


# ----------------------------------------------------------------------------------------------------------- planted drift
def drifting(seed: int, rows: int = 12_000, days: int = 12) -> pl.DataFrame:
    """Items' click rates are redrawn and the whole level falls on day 6."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(0, days * DAY, rows))
    item, late = rng.integers(0, 20, rows), time >= 6 * DAY
    before, after = rng.normal(1.0, 1.2, 20), rng.normal(-1.0, 1.2, 20)
    logit = np.where(late, after[item], before[item])
    clicked = rng.random(rows) < 1 / (1 + np.exp(-logit))
    return pl.DataFrame(
        {"user": rng.integers(0, 500, rows), "item": item, "time": time * 1000, "click": clicked.astype(int)}
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_after_a_planted_drift_the_live_model_recovers_and_the_frozen_one_does_not(seed: int) -> None:
    data = Data(
        rows="log", user="user", time="time", features=(Feature("item"),), tasks=(Task("click"),),
        split=Split(kind="time", valid_from=9 * DAY * 1000, test_from=11 * DAY * 1000),
    )  # fmt: skip
    run = dataclasses.replace(
        make_run(data=data, model=ModelChoice(tower=SharedBottom((16,), ()), tables=Views(width=8)), update=Joint(lr=0.01)),
        schedule=Online(first=3, first_epochs=4, epochs=2), training=Training(batch_size=64), seed=seed,
    )  # fmt: skip
    metrics = train(run, tables={"log": drifting(seed)}, baseline=False).metrics
    days = {p["begin"][-2:]: p for p in metrics["schedule"]["periods"]}
    assert sorted(days) == [f"{d:02}" for d in range(4, 12)]
    for day in ("09", "10", "11"):  # the drift is between the 6th and the 7th
        live, frozen = (days[day][side]["click"] for side in ("live", "frozen"))
        assert live["auc"] > frozen["auc"] + 0.1
        assert live["logloss"] < frozen["logloss"] - 0.15
        assert abs(live["pcoc"] - 1) < 0.25 < 0.4 < frozen["pcoc"] - 1
    assert days["07"]["live"]["click"]["pcoc"] > 1.5, "the first day after the drift takes both by surprise"
    assert abs(days["05"]["frozen"]["click"]["pcoc"] - 1) < 0.2
