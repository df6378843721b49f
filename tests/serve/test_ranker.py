"""The ranker gives the numbers of `Predictor.predict`, on the bundled log, and says what is wrong with a request."""

from __future__ import annotations

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from devicekit import DEVICE, Apart
from rankerkit import Memory, kuairand_rows, untrained

from unbraid import recipes
from unbraid.bundle import Bundle
from unbraid.calibration.kept import Calibrators, Kept
from unbraid.calibration.maps import Affine, Calibration
from unbraid.predictor import Predictor
from unbraid.serve.importer import import_events
from unbraid.serve.ranker import Ranker, Request, RequestError
from unbraid.serve.store import Record, StoreDown, open_store
from unbraid.uncertainty.explore import UCB, Thompson
from unbraid.uncertainty.last_layer import LastLayer, digest_of

TASKS = ["click", "long_view", "like", "profile_enter"]
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-6}  # single precision, in another order of sums


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoded")


@pytest.fixture(scope="module")
def bundles(cache: Path) -> dict[str, Bundle]:
    """Of the recipe with searched histories, and of the one that means them."""
    return {name: untrained(getattr(recipes, name)(), cache) for name in ("dare", "shared_bottom")}


@pytest.fixture(scope="module")
def imported(bundles: dict[str, Bundle]) -> Memory:
    store = Memory()
    import_events(bundles["dare"].run.data, store)  # type: ignore[arg-type]
    return store


@pytest.fixture
def store(imported: Memory) -> Memory:
    """The imported events; what a test adds is its own."""
    found = Memory()
    found.held = {user: list(events) for user, events in imported.held.items()}
    found.settings = dict(imported.settings)
    return found


@pytest.fixture(scope="module")
def rows() -> pl.DataFrame:
    return kuairand_rows(1_000)


def test_a_model_on_another_device_answers_the_same(
    bundles: dict[str, Bundle], store: Memory, rows: pl.DataFrame
) -> None:
    """What is encoded lies on the CPU, and what the model remembers of a user where the model is."""
    ranker = Ranker(copy.deepcopy(bundles["dare"]), store)  # type: ignore[arg-type]
    user = busiest(store, rows, ranker)
    asked = Request(user, rows.head(50).select(list(ranker.columns)).to_dicts(), time=int(rows["time_ms"].max()) + 1)  # type: ignore[arg-type]
    want = ranker.rank(asked)
    with Apart() as device:
        there = Ranker(copy.deepcopy(bundles["dare"]), store, device=DEVICE)  # type: ignore[arg-type]
        for _ in range(2):  # from a store; from memory
            found = there.rank(asked)
            assert found.order.tolist() == want.order.tolist()
            np.testing.assert_allclose(found.score, want.score, rtol=1e-5)
    assert device.operations > 10 and want.events


def busiest(store: Memory, rows: pl.DataFrame, ranker: Ranker) -> int:
    return max(rows["user_id"].to_list(), key=lambda user: len(store.held.get(ranker.user_hash(user), [])))


def agree(got: pl.DataFrame, want: pl.DataFrame, tolerance: dict[str, Any] = CLOSE) -> None:
    assert got.columns == want.columns and min(want[name].std() for name in want.columns) > 1e-4  # type: ignore[type-var, operator]
    for name in want.columns:
        np.testing.assert_allclose(got[name].to_numpy(), want[name].to_numpy(), err_msg=name, **tolerance)


@pytest.mark.parametrize("name", ["dare", "shared_bottom"])
def test_predict_is_that_of_a_predictor(
    name: str, bundles: dict[str, Bundle], store: Memory, rows: pl.DataFrame
) -> None:
    ranker = Ranker(bundles[name], store)  # type: ignore[arg-type]
    assert (
        rows["user_id"].n_unique() > 400
        and (rows["user_id"] == 123_456_789).sum()
        and (rows["video_id"] == 987_654_321).sum()
    )
    want = Predictor(bundles[name]).predict(rows)
    agree(ranker.predict(rows), want, {"rtol": 0, "atol": 0})
    agree(ranker.predict(rows), want, {"rtol": 0, "atol": 0})  # from what is remembered
    assert ranker.cache_stats()["hits"] > 400


@pytest.mark.parametrize("name", ["dare", "shared_bottom"])
def test_rank_is_the_order_of_a_predictors_predictions(
    name: str, bundles: dict[str, Bundle], store: Memory, rows: pl.DataFrame
) -> None:
    ranker, predictor = Ranker(bundles[name], store), Predictor(bundles[name])  # type: ignore[arg-type]
    user, some = busiest(store, rows, ranker), rows.head(300)
    nobody = 123_456_789
    late = int(rows["time_ms"].max()) + 1  # type: ignore[arg-type]
    whose = {user: {late, int(rows["time_ms"].median())}, nobody: {late}}  # type: ignore[arg-type]
    seen = []
    for who, times in whose.items():
        for at in sorted(times):
            want = predictor.predict(some.with_columns(user_id=pl.lit(who), time_ms=pl.lit(at)))
            for _ in range(2):  # from a store; from memory
                found = ranker.rank(Request(who, some.select(list(ranker.columns)).to_dicts(), time=at))
                got = pl.DataFrame(
                    {task: values[np.argsort(found.order)] for task, values in found.predictions.items()}
                )
                agree(got, want)
                assert found.order.tolist() == np.argsort(-got["click"].to_numpy(), kind="stable").tolist()
                np.testing.assert_array_equal(found.score, found.predictions["click"])
                assert not found.degraded and set(found.seconds) == {"rows", "history", "model", "score"}
            seen.append(found.events)
    assert 0 < seen[0] < seen[1] and seen[2] == 0


def test_context_is_for_all_candidates(bundles: dict[str, Bundle], store: Memory, rows: pl.DataFrame) -> None:
    ranker = Ranker(bundles["dare"], store)  # type: ignore[arg-type]
    videos, user, at = rows["video_id"][:20].to_list(), rows["user_id"][0], rows["time_ms"][0]
    whole = [{"video_id": v, "tab": 1 if v != videos[3] else 4, "hourmin": 2100} for v in videos]
    short = [{"video_id": v} | ({"tab": 4} if v == videos[3] else {}) for v in videos]
    want = ranker.rank(Request(user, whole, time=at))
    got = ranker.rank(Request(user, short, context={"tab": 1, "hourmin": 2100}, time=at, top=5))
    assert got.order.tolist() == want.order[:5].tolist() and len(got.score) == 5
    np.testing.assert_array_equal(got.predictions["like"], want.predictions["like"][:5])


# ---------------------------------------------------------------------------------------------------------------- events
def impressions(rows: pl.DataFrame, ranker: Ranker, user: int, times: list[int]) -> list[tuple[int, Record]]:
    """New events of a user."""
    draw = np.random.default_rng(0)
    labels = {
        n: draw.integers(0, 2, len(times)).tolist() for n in ("is_click", "is_like", "long_view", "is_profile_enter")
    }
    events = [
        {
            "user_id": user,
            "video_id": rows["video_id"][i],
            "time_ms": t,
            "tab": 1,
            **{n: v[i] for n, v in labels.items()},
        }
        for i, t in enumerate(times)
    ]
    return [(u, r._replace(id=f"new {i}")) for i, (u, r) in enumerate(ranker.records("rows", events))]


def test_late_and_repeated_events_give_what_a_store_read_at_once_gives(
    bundles: dict[str, Bundle], store: Memory, rows: pl.DataFrame
) -> None:
    ranker = Ranker(bundles["dare"], store)  # type: ignore[arg-type]
    user = busiest(store, rows, ranker)
    at = int(rows["time_ms"].max()) + 10  # type: ignore[arg-type]
    asked = Request(user, rows.head(50).select(list(ranker.columns)).to_dicts(), time=at)
    before = ranker.rank(asked)
    events = impressions(rows, ranker, user, [at - 1, at - 10**8, at - 5, at - 5, at, at + 10**6, at - 3 * 10**8])
    for event in events:  # one after the other, some long late, each twice
        assert store.append([event]) == [True]
        ranker.rank(asked)
        assert store.append([event]) == [False]
    got = ranker.rank(asked)
    assert got.events == before.events + 5  # not that of this very time, nor the later one
    assert max(store.reads[-1:]) == 0 and store.reads.count(1) >= 6  # only what is new is read
    fresh = Ranker(bundles["dare"], store).rank(asked)  # type: ignore[arg-type]
    assert got.order.tolist() == fresh.order.tolist()
    for task in TASKS:
        np.testing.assert_array_equal(got.predictions[task], fresh.predictions[task])
    assert (
        np.abs(
            got.predictions["click"][np.argsort(got.order)] - before.predictions["click"][np.argsort(before.order)]
        ).max()
        > 1e-4
    )
    alone = Memory()
    alone.append(sorted(((u, r) for u, r in events), key=lambda e: -e[1].time))
    held = alone.held[events[0][0]]
    past = Ranker(bundles["dare"], alone).histories.of([events[0][0]])[0]  # type: ignore[arg-type, union-attr]
    assert past.events["time"].tolist() == sorted(r.time for _, r in held)
    fields = {name for name in past.events if not name.startswith("where.")}
    assert fields == {"time", "place", *(field.name for field in bundles["dare"].run.data.fields)}, (
        "nothing else is kept"
    )


def test_live_events_are_those_of_an_import(bundles: dict[str, Bundle], imported: Memory) -> None:
    """A row of the log sent as an event is kept as the import keeps it."""
    ranker = Ranker(bundles["dare"], imported)  # type: ignore[arg-type]
    folder = Path(recipes.__file__).parent / "data" / "kuairand"
    log = (
        pl.scan_parquet(folder / "impressions.parquet")
        .filter(pl.sql_expr(recipes.kuairand().keep))
        .unique(maintain_order=True)
    )
    lists = pl.scan_parquet(folder / "history.parquet")
    for table, frame in (("rows", log.head(200).collect()), ("history.parquet", lists.head(20).collect())):
        sent = frame.select(list(ranker.sources[table])).to_dicts()
        for user, record in ranker.records(table, sent):
            values = [(r.time, dict(r.values)) for _, r in imported.held[user] if r.table == table]
            want = {n: v for n, v in record.values.items()}
            assert any(t == record.time and {n: known.get(n) for n in want} == want for t, known in values), record
        assert ranker.record(table, sent[0]) == ranker.records(table, sent[:1])[0]


def test_a_full_cache_forgets_the_earliest(bundles: dict[str, Bundle], store: Memory, rows: pl.DataFrame) -> None:
    rows = rows.head(200)
    want = Ranker(bundles["dare"], store).predict(rows)  # type: ignore[arg-type]
    small = Ranker(bundles["dare"], store, cache_bytes=100_000)  # type: ignore[arg-type]
    agree(small.predict(rows), want, {"rtol": 0, "atol": 0})
    stats = small.cache_stats()
    assert 0 < stats["bytes"] <= 100_000 and 0 < stats["users"] < 100
    assert stats["bytes"] == sum(size for _, size in small.histories._held.values())  # type: ignore[union-attr]
    for user in rows["user_id"][:30].to_list():
        small.rank(Request(user, [{"video_id": 1, "tab": 1, "hourmin": 0}], time=10**13))
    last = small.user_hash(rows["user_id"][29])
    assert last in small.histories._held or not store.held.get(last)  # type: ignore[union-attr]
    none = Ranker(bundles["dare"], store, cache_bytes=0)  # type: ignore[arg-type]
    agree(none.predict(rows), want, {"rtol": 0, "atol": 0})
    assert none.cache_stats()["bytes"] == 0


def test_what_encoders_know_counts_as_memory(bundles: dict[str, Bundle], store: Memory, rows: pl.DataFrame) -> None:
    ranker = Ranker(bundles["dare"], store)  # type: ignore[arg-type]
    user = busiest(store, rows, ranker)
    ranker.histories.of([ranker.user_hash(user)])  # type: ignore[union-attr]
    before = ranker.cache_stats()["bytes"]
    asked = Request(user, [{"video_id": 1, "tab": 1, "hourmin": 0}] * 3, time=10**13)
    ranker.rank(asked)
    ((past, size),) = ranker.histories._held.values()  # type: ignore[union-attr]
    keys = [x for _, memo in past.memos.values() for pair in memo.values() for x in pair if x is not None]
    assert size - before == sum(x.numel() * 4 for x in keys) > 0
    memo = past.memos["seen"][1]
    ranker.rank(asked)
    assert past.memos["seen"][1] is memo
    ranker.rank(dataclasses.replace(asked, time=int(past.events["time"][-1])))  # one event fewer
    assert past.memos["seen"][1] is not memo


def test_deleted_and_unknown_users_have_no_past(bundles: dict[str, Bundle], store: Memory, rows: pl.DataFrame) -> None:
    ranker = Ranker(bundles["dare"], store)  # type: ignore[arg-type]
    user = busiest(store, rows, ranker)
    asked = Request(user, [{"video_id": 1, "tab": 1, "hourmin": 0}], time=10**13)
    assert ranker.rank(asked).events > 0
    store.delete(ranker.user_hash(user))
    assert ranker.rank(asked).events == 0


def test_a_store_that_is_down_degrades_a_ranking_and_fails_predictions(
    bundles: dict[str, Bundle], store: Memory, rows: pl.DataFrame
) -> None:
    ranker = Ranker(bundles["dare"], store)  # type: ignore[arg-type]
    store.fault = StoreDown("nobody answers")
    some = rows.head(20)
    found = ranker.rank(Request(some["user_id"][0], some.select(list(ranker.columns)).to_dicts(), time=10**13))
    assert found.degraded == "nobody answers" and found.events == 0
    want = Ranker(bundles["dare"], Memory()).rank(Request(1, some.select(list(ranker.columns)).to_dicts(), time=10**13))  # type: ignore[arg-type]
    assert found.predictions.keys() == want.predictions.keys() and len(found.order) == 20
    with pytest.raises(StoreDown):
        ranker.predict(some)


def test_on_lmdb(bundles: dict[str, Bundle], store: Memory, rows: pl.DataFrame, tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    ranker = Ranker(bundles["dare"], store)  # type: ignore[arg-type]
    some = rows.head(60)
    disk = open_store(tmp_path / "store")
    for user in some["user_id"].unique().to_list():
        code = ranker.user_hash(user)
        disk.append([(code, record) for _, record in store.held.get(code, [])])
    agree(Ranker(bundles["dare"], disk).predict(some), ranker.predict(some), {"rtol": 0, "atol": 0})
    disk.close()


def test_threads_give_what_one_gives(bundles: dict[str, Bundle], store: Memory, rows: pl.DataFrame) -> None:
    """Some of them on the same users, and in a cache that is too small for all."""
    alone = Ranker(bundles["dare"], store)  # type: ignore[arg-type]
    asked = [
        Request(user, rows.slice(20 * i, 20).select(list(alone.columns)).to_dicts(), time=10**13)
        for i, user in enumerate(rows["user_id"][:16].to_list() * 2)
    ]
    want = [alone.rank(one) for one in asked]
    shared = Ranker(bundles["dare"], store, cache_bytes=60_000)  # type: ignore[arg-type]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(shared.rank, asked))
    for a, b in zip(got, want, strict=True):
        assert a.order.tolist() == b.order.tolist() and a.events == b.events
        np.testing.assert_array_equal(a.predictions["like"], b.predictions["like"])
    held = shared.histories._held.values()  # type: ignore[union-attr]
    assert shared.cache_stats()["bytes"] == sum(size for _, size in held) <= 60_000


# ------------------------------------------------------------------------------------------------------ errors of requests
@pytest.fixture(scope="module")
def ranker(bundles: dict[str, Bundle], imported: Memory) -> Ranker:
    return Ranker(bundles["dare"], imported)  # type: ignore[arg-type]


GOOD: dict[str, Any] = {"video_id": 5, "tab": 1, "hourmin": 1200}


@pytest.mark.parametrize(("change", "field", "says"), [
    ({"candidates": []}, "candidates", "at least one"),
    ({"candidates": [GOOD, {"video_id": 5, "tab": 1}]}, "candidates.1.hourmin", "missing"),
    ({"candidates": [{"tab": 1}], "context": {"hourmin": 0}}, "candidates.0.video_id", "missing, of all"),
    ({"candidates": [GOOD, GOOD, {**GOOD, "video_id": "x"}]}, "candidates.2.video_id", "kind int or null. Found 'x'"),
    ({"candidates": [{**GOOD, "tab": 1.5}]}, "candidates.0.tab", "Found 1.5"),
    ({"candidates": [{**GOOD, "tab": True}]}, "candidates.0.tab", "Found True"),
    ({"candidates": [{**GOOD, "tab": 2**63}]}, "candidates.0.tab", "Int64"),
    ({"candidates": [GOOD, {**GOOD, "colour": 1}]}, "candidates.1.colour", "not read. Columns of candidates"),
    ({"candidates": [{**GOOD, "user_id": 1}]}, "candidates.0.user_id", "not read"),
    ({"context": {"taab": 1}}, "context.taab", "not read"),
    ({"candidates": [{"video_id": 1, "tab": 1}], "context": {"hourmin": "noon"}}, "context.hourmin", "kind int"),
    ({"user": "me"}, "user", "kind int"),
    ({"user": None}, "user", "needs a user"),
    ({"time": "now"}, "time", "kind int"),
    ({"top": -1}, "top", "negative"),
    ({"score": "clik"}, "score", "no column `clik`. Columns: click, long_view, like, profile_enter"),
    ({"score": "click +"}, "score", "neither a column nor an SQL expression"),
    ({"score": "click + SUM(like)"}, "score", "its own row alone"),
    ({"score": "'a'"}, "score", "should be a number. Found String"),
    ({"score": "click / (like - like)"}, "score", "finite"),
    ({"score": "NULL + click"}, "score", ""),
    ({"score": "click +" * 1_000 + "click"}, "score", "at most 2,000"),
    ({"explore": UCB()}, "explore", "no uncertainty"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_errors_name_the_field(ranker: Ranker, change: dict[str, Any], field: str, says: str) -> None:
    asked = Request(**{"user": 1, "candidates": [GOOD], "time": 10**13, **change})
    with pytest.raises(RequestError) as caught:
        ranker.rank(asked)
    assert caught.value.field == field and says in str(caught.value)


@pytest.mark.parametrize(("table", "change", "field", "says"), [
    ("roows", {}, "table", "one of history.parquet, rows"),
    ("rows", {"user_id": None}, "user_id", "needs a user"),
    ("rows", {"time_ms": None}, "time_ms", "needs a time"),
    ("rows", {"is_click": "yes"}, "is_click", "kind int"),
    ("rows", {"colour": 1}, "colour", "not read"),
    ("rows", {"tab": 3}, "", "leaves such rows out"),
    ("history.parquet", {}, "tab", "not read"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_errors_of_events(ranker: Ranker, table: str, change: dict[str, Any], field: str, says: str) -> None:
    event = dict(user_id=1, video_id=2, time_ms=5, is_click=1, is_like=0, long_view=0, is_profile_enter=None, tab=1)
    if table == "history.parquet":
        event = {"tab": 1, **{n: None for n in ranker.sources[table]}}
    with pytest.raises(RequestError, match=says) as caught:
        ranker.record(table, {**event, **change})
    assert caught.value.field == field
    if table == "rows" and field:
        with pytest.raises(RequestError) as caught:
            ranker.records(table, [event, {**event, **change}])
        assert caught.value.field == f"events.1.{field}"


def test_errors_of_rows(ranker: Ranker, rows: pl.DataFrame) -> None:
    for change, field in (
        (rows.drop("tab"), "tab"),
        (rows.with_columns(pl.col("video_id").cast(pl.String)), "video_id"),
        (rows.with_columns(time_ms=pl.when(pl.int_range(pl.len()) != 7).then("time_ms")), "rows.7.time_ms"),
        (rows.head(0), "rows"),
    ):
        with pytest.raises(RequestError) as caught:
            ranker.predict(change)
        assert caught.value.field == field


# ------------------------------------------------------------------------------------------------------------------ scores
def test_scores_are_arithmetic_over_tasks(ranker: Ranker, rows: pl.DataFrame) -> None:
    some = rows.head(40).select(list(ranker.columns)).to_dicts()
    plain = ranker.rank(Request(7, some, time=10**13))
    values = {task: plain.predictions[task][np.argsort(plain.order)] for task in TASKS}
    want = 0.7 * values["click"] + values["like"] * values["long_view"]
    got = ranker.rank(Request(7, some, time=10**13, score="0.7 * click + like * long_view", top=9))
    np.testing.assert_allclose(got.score, np.sort(want)[::-1][:9], rtol=1e-12)
    assert got.order.tolist() == np.argsort(-want, kind="stable")[:9].tolist()
    # equal scores: the request's order; a constant is one score for all
    assert ranker.rank(Request(7, some, time=10**13, score="1")).order.tolist() == list(range(40))
    assert (ranker.rank(Request(7, some, time=10**13)).seconds["model"]) > 0


def test_now_is_the_time_of_a_request_without_one(ranker: Ranker) -> None:
    now, late = ranker.rank(Request(7, [GOOD])), ranker.rank(Request(7, [GOOD], time=2 * 10**12))
    assert now.events == late.events


def test_columns_say_what_a_client_sends(ranker: Ranker) -> None:
    assert {n: c.kind for n, c in ranker.columns.items()} == {"hourmin": "int", "tab": "int", "video_id": "int"}
    assert list(ranker.rows) == ["hourmin", "tab", "time_ms", "user_id", "video_id"]
    assert ranker.user.kind == "int" and all(column.required for column in ranker.rows.values())
    assert ranker.sources["history.parquet"]["watch_seq"].kind == "list[int]"
    assert set(ranker.sources["rows"]) == {
        "user_id",
        "video_id",
        "time_ms",
        "tab",
        "is_click",
        "is_like",
        "long_view",
        "is_profile_enter",
    }
    # its own examples are a request and events that it answers
    asked = Request(ranker.user.example, [{n: c.example for n, c in ranker.columns.items()}])
    assert len(ranker.rank(asked).order) == 1
    for table, columns in ranker.sources.items():
        assert (
            ranker.record(table, {n: c.example for n, c in columns.items()} | ({"tab": 1} if table == "rows" else {}))[
                1
            ].table
            == table
        )


# ------------------------------------------------------------------------------------- calibrators and exploration
def calibrators(bundle: Bundle) -> Calibrators:
    """A map for all rows of each task, and another for one tab of clicks."""
    parts = [*((task, "", 0.5 + i) for i, task in enumerate(TASKS)), ("click", "1", 3.0)]
    kept = tuple(Kept(task, domain, {}, "", "", Calibration(Affine(factor))) for task, domain, factor in parts)
    return Calibrators(digest_of(bundle.model), kept)


def test_calibrated_bundles(bundles: dict[str, Bundle], imported: Memory, rows: pl.DataFrame) -> None:
    calibrated, some = dataclasses.replace(bundles["dare"], calibrators=calibrators(bundles["dare"])), rows.head(100)
    want, plain = Predictor(calibrated).predict(some), Predictor(bundles["dare"]).predict(some)
    assert (want["click"] - plain["click"]).abs().max() > 1e-3  # type: ignore[operator]
    ranker = Ranker(calibrated, imported)  # type: ignore[arg-type]
    agree(ranker.predict(some), want, {"rtol": 0, "atol": 0})
    same = some.with_columns(user_id=pl.lit(some["user_id"][0]), time_ms=pl.lit(10**13))
    found = ranker.rank(Request(some["user_id"][0], same.select(list(ranker.columns)).to_dicts(), time=10**13))
    want = Predictor(calibrated).predict(same)
    agree(pl.DataFrame({t: v[np.argsort(found.order)] for t, v in found.predictions.items()}), want)


def test_exploration_sorts_by_what_it_draws(bundles: dict[str, Bundle], imported: Memory, rows: pl.DataFrame) -> None:
    bundle, some = bundles["dare"], rows.head(80)
    unsure = LastLayer.of(bundle.model, bundle.fitted.schema)
    unsure.update(Predictor(bundle).scores(rows, hidden=True))
    for posterior in unsure.tasks.values():  # rows without labels teach nothing: their spread is the prior's
        posterior.normalise()
    given = dataclasses.replace(bundle, uncertainty=unsure, calibrators=calibrators(bundle))
    user, at = some["user_id"][0], 10**13
    same = some.with_columns(user_id=pl.lit(user), time_ms=pl.lit(at))
    ranker = Ranker(given, imported)  # type: ignore[arg-type]
    asked = Request(user, same.select(list(ranker.columns)).to_dicts(), time=at)
    for explore in (lambda: UCB(1.5), lambda: Thompson(seed=3), lambda: Thompson(seed=3, share="row")):
        want = Predictor(given).predict(same, explore=explore())
        found = ranker.rank(dataclasses.replace(asked, explore=explore(), score="click + like"))
        got = pl.DataFrame({t: v[np.argsort(found.order)] for t, v in found.predictions.items()})
        agree(got, want, {"rtol": 0, "atol": 1e-5})
        score = got["click_explore"].to_numpy() + got["like_explore"].to_numpy()
        assert found.order.tolist() == np.argsort(-score, kind="stable").tolist()
    other = dataclasses.replace(given, uncertainty=LastLayer(unsure.tasks, "of others"))
    with pytest.raises(RequestError, match="other weights") as caught:
        Ranker(other, imported).rank(dataclasses.replace(asked, explore=UCB()))  # type: ignore[arg-type]
    assert caught.value.field == "explore"


# ----------------------------------------------------------------------------------------------------- what is refused early
def test_a_store_of_other_users_is_refused(bundles: dict[str, Bundle]) -> None:
    store = Memory()
    store.settings["user_type"] = "String"
    with pytest.raises(ValueError, match="user ids are String, and the run's are Int64"):
        Ranker(bundles["dare"], store)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Give a store.*open_store"):
        Ranker(bundles["dare"])
