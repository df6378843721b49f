"""What a history store promises, of both: order, ids, increments, many writers, crashes."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storekit import Model, Server, event

from unbraid.serve.store import FORMAT_KEY, Page, Record, Store, StoreError, open_store, public, user_hash

pytest.importorskip("lmdb")
redis = pytest.importorskip("redis")
FIRST, LAST = -(2**63), 2**63 - 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("redis"))
    yield running
    running.stop()


@pytest.fixture(params=["lmdb", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "lmdb":
        return str(tmp_path / "store")
    url = request.getfixturevalue("server").url
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    opened = open_store(address)
    yield opened
    opened.close()


def ids(records: list[Record]) -> list[str]:
    return [record.id for record in records]


# ---------------------------------------------------------------------------------------------------------------- order
def test_events_come_back_by_time_and_ties_by_arrival(store: Store) -> None:
    sent = [event("late", 30), event("b", 10), event("a", 10), event("c", 10), event("early", -5)]
    assert store.append([(7, record) for record in sent]) == [True] * 5
    page = store.read(7)
    assert ids(page.records) == ["early", "b", "a", "c", "late"]
    assert page.records[-1] == sent[0]
    assert (page.seq, page.whole) == (5, True) and page.generation > 0
    assert store.read(8) == Page(0, 0, [], True)


def test_the_last_are_the_newest_before_a_time_oldest_first(store: Store) -> None:
    store.append([(u, event(f"{u}.{t}.{k}", t)) for u in (1, 2, 3) for t in (0, 10, 20) for k in "ab"])
    assert ids(store.last(2, 3)) == ["2.10.b", "2.20.a", "2.20.b"]
    assert ids(store.last(2, 3, before=20)) == ["2.0.b", "2.10.a", "2.10.b"]
    assert ids(store.last(2, 100, before=10)) == ["2.0.a", "2.0.b"]
    assert store.last(2, 5, before=0) == store.last(2, 0) == store.last(4, 5) == store.last(0, 5) == []
    assert len(store.last(3, 100)) == 6


def test_users_and_times_span_64_bits_exactly(store: Store) -> None:
    times = [FIRST, FIRST + 1, -(2**53) - 1, -(2**53), -1, 0, 1, 2**53, 2**53 + 1, LAST - 1, LAST]
    shuffled = random.Random(0).sample(times, len(times))
    users = [0, 1, 255, 256, 2**63 - 1, 2**63, 2**64 - 1]
    store.append([(user, event(str(t), t)) for user in users for t in shuffled])
    for user in users:
        assert [record.time for record in store.read(user).records] == times
        for n, before in enumerate(times):
            assert [record.time for record in store.last(user, 99, before)] == times[:n]
    assert list(store.users()) == users


def test_values_and_ids_come_back_as_they_were(store: Store) -> None:
    values = {
        "text": "Grüße \u2603 \U0001f600 \ud800 \x00 \"quoted\", [comma]", "": None, "list": [1, [2.5, "x"], {}], "yes": True,
        "big": 2**80, "small": -(2**63), "float": 0.1 + 0.2, "tiny": 5e-324, "infinite": -math.inf,
    }  # fmt: skip
    names = ["é", "e\u0301", "\ud800", "\x00", "]", '"', "x" * 5000, " "]
    store.append([(1, Record(name, n, "täble/ü.parquet", values)) for n, name in enumerate(names)])
    found = store.read(1).records
    assert ids(found) == names
    assert all(record.values == values and record.table == "täble/ü.parquet" for record in found)
    assert type(found[0].values["yes"]) is bool and type(found[0].values["big"]) is int
    store.append([(2, event("nan", values={"x": math.nan}))])
    assert math.isnan(store.read(2).records[0].values["x"])


# ------------------------------------------------------------------------------------------------------------------ ids
def test_a_known_id_is_no_append_whatever_its_time(store: Store) -> None:
    assert store.append([(1, event("a", 5)), (1, event("a", 6)), (2, event("a", 7)), (1, event("b", 5))]) == [
        True, False, True, True,
    ]  # fmt: skip
    assert store.append([(1, event("a", 99)), (1, event("A", 99))]) == [False, True]
    page = store.read(1)
    assert [(r.id, r.time) for r in page.records] == [("a", 5), ("b", 5), ("A", 99)] and page.seq == 3
    assert store.append([]) == []
    assert store.stats()["events"] == 4 and store.stats()["users"] == 2 and store.stats()["bytes"] > 0


def test_ids_outlive_a_trim_and_not_a_delete(store: Store) -> None:
    store.append([(1, event(str(t), t)) for t in range(10)])
    assert store.trim(1, 4) == 6 and store.trim(1, 4) == store.trim(1, 9) == store.trim(5, 0) == 0
    assert store.append([(1, event("0", 0)), (1, event("9", 9))]) == [False, False]
    assert ids(store.read(1).records) == ["6", "7", "8", "9"]
    assert store.trim(1, 0) == 4 and store.read(1).records == [] and list(store.users()) == [1]
    assert store.delete(1) == 0 and list(store.users()) == []
    assert store.append([(1, event("0", 0))]) == [True]
    assert store.delete(1) == 1 and store.delete(1) == 0
    assert store.stats()["users"] == store.stats()["events"] == 0


# ----------------------------------------------------------------------------------------------------------- increments
def test_an_increment_is_what_arrived_since_even_if_its_time_is_early(store: Store) -> None:
    store.append([(1, event(str(t), t)) for t in (10, 20, 30)])
    first = store.read(1)
    assert store.read(1, first.generation, first.seq) == Page(first.generation, 3, [], False)
    store.append([(1, event("25", 25)), (2, event("other", 1)), (1, event("5", 5)), (1, event("10", 99))])
    more = store.read(1, first.generation, first.seq)
    assert (more.generation, more.seq, more.whole) == (first.generation, 5, False)
    assert ids(more.records) == ["5", "25"]
    assert ids(store.read(1, first.generation, 4).records) == ["5"]
    for generation, after in ((first.generation + 1, 3), (first.generation, 6), (first.generation, 0), (0, 3)):
        assert store.read(1, generation, after) == Page(first.generation, 5, store.read(1).records, True)


def test_a_removal_makes_readers_start_again_and_no_generation_returns(store: Store) -> None:
    seen = {0}
    for turn in range(5):
        store.append([(1, event(f"{turn}.{k}", k)) for k in range(3)])
        page = store.read(1)
        assert page.generation not in seen
        seen.add(page.generation)
        assert store.trim(1, 2) == 1
        again = store.read(1, page.generation, page.seq)
        assert again.whole and len(again.records) == 2 and again.generation not in seen
        seen.add(again.generation)
        store.append([(1, event(f"{turn}.more", 9))])
        assert ids(store.read(1, again.generation, again.seq).records) == [f"{turn}.more"]
        assert store.delete(1) == 3
        assert store.read(1, again.generation, again.seq) == Page(0, 0, [], True)


def test_a_store_is_the_same_when_opened_again(address: str) -> None:
    first = open_store(address)
    first.append([(1, event("a", 1))])
    first.set("user_type", "Int64")
    page = first.read(1)
    other = open_store(address)  # beside the first
    assert other.append([(1, event("a", 1)), (1, event("b", 0))]) == [False, True]
    assert ids(first.read(1, page.generation, page.seq).records) == ["b"]
    first.close()
    other.append([(1, event("c", 2))])  # closing one leaves the other
    other.close()
    with closing(open_store(address)) as again:
        assert ids(again.read(1).records) == ["b", "a", "c"]
        assert again.read(1).generation == page.generation
        assert (again.get("user_type"), again.get("nothing"), again.get(FORMAT_KEY)) == ("Int64", None, "1")
        again.ready()
        assert "every event" in again.durability or "snapshot" in again.durability


def test_users_are_listed_in_order_in_several_chunks(store: Store) -> None:
    chance = random.Random(1)
    users = [chance.getrandbits(64) for _ in range(2500)]
    store.append([(user, event("x")) for user in users])
    assert list(store.users()) == sorted(users)
    gone = set(sorted(users)[500::100])
    for user in store.users():  # a listing holds nothing open
        if user in gone:
            store.delete(user)
    assert list(store.users()) == sorted(set(users) - gone)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_it_does_what_plain_lists_do(store: Store, data: st.DataObject) -> None:
    model, cache = Model(), {}  # user -> what a reader that never reads all twice knows
    users, times = (3, 2**64 - 1), st.sampled_from([FIRST, -1, 0, 1, 2, LAST])
    for user in store.users():
        store.delete(user)
    for step in range(data.draw(st.integers(1, 25))):
        user, what = (
            data.draw(st.sampled_from(users)),
            data.draw(st.sampled_from(["append"] * 4 + ["trim", "delete", "last"])),
        )
        if what == "append":
            made = data.draw(st.lists(st.tuples(st.sampled_from(users), st.integers(0, 30), times), max_size=6))
            events = [(u, event(str(i), t, values={"step": step})) for u, i, t in made]
            assert store.append(events) == model.append(events)
        elif what == "last":
            n, before = data.draw(st.integers(0, 5)), data.draw(st.none() | times)
            assert store.last(user, n, before) == model.last(user, n, before)
        elif what == "trim":
            keep = data.draw(st.integers(0, 4))
            assert store.trim(user, keep) == model.trim(user, keep)
        else:
            assert store.delete(user) == model.delete(user)
        assert store.read(user).records == model.records(user)
        generation, seq, arrived = cache.get(user, (0, 0, []))
        page = store.read(user, generation, seq)
        arrived = page.records if page.whole else arrived + page.records
        cache[user] = page.generation, page.seq, arrived
        assert sorted(ids(arrived)) == sorted(ids(model.records(user)))
    assert store.stats()["events"] == sum(map(len, model.held.values()))


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("user", "record", "says"),
    [
        (-1, event("a"), "2\\*\\*64|18446744073709551615. Found -1"),
        (2**64, event("a"), "18446744073709551615"),
        (True, event("a"), "Found True"),
        ("7", event("a"), "Found '7'"),
        (1, event("a", 2**63), "`time`.*Found 9223372036854775808"),
        (1, event("a", 1.5), "`time`.*1.5"),  # type: ignore[arg-type]
        (1, Record(7, 0, "rows", {}), "id should be text.*Found 7"),  # type: ignore[arg-type]
        (1, event(""), "not empty"),
        (1, Record("a", 0, None, {}), "`table`"),  # type: ignore[arg-type]
        (1, Record("a", 0, "rows", [1]), "`values`"),  # type: ignore[arg-type]
        (1, event("a", values={"x": b"raw"}), "'a'.*JSON.*'x': 'bytes'"),
        (1, Record("a", 0, "rows", {1: 2}), "names of columns"),  # type: ignore[dict-item]
    ],
)
def test_what_cannot_be_kept_is_refused_and_nothing_of_its_batch_is_kept(
    store: Store, user: Any, record: Record, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        store.append([(1, event("good")), (user, record)])
    assert store.read(1).records == []


def test_counts_that_are_none_are_refused(store: Store) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: store.last(1, -1), lambda: store.trim(1, -1), lambda: store.read(1, 0, -1), lambda: store.read(2**64),
        lambda: store.last(1, 1, before=2**63), lambda: store.delete(-1),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="should be an integer"):
            call()


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    store.close()
    for call in (lambda: store.read(1), lambda: store.append([(1, event("a"))]), store.ready):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_addresses_that_are_none() -> None:
    for address in (
        "",
        "http://localhost",
        "postgres://x/y",
        "Redis://:s3cret@h",
        "redis:/:s3cret@h",
        "redis:s3cret@h",
    ):
        with pytest.raises(ValueError, match="address should be") as error:
            open_store(address)
        assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://somebody:s3cret@host:6379/3?client_name=s3cret", "redis://host:6379/3"),
        ("redis://:s3cret@[::1]:6379/0", "redis://[::1]:6379/0"),
        ("rediss://host/0?password=a@s3cret", "rediss://..."),
        ("unix://u:s3cret@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        *((f"redis://:s3{sign}cret@host:6379/0", "redis://...") for sign in "/?#"),
        ("redis://s3:12/cret@host:1/0", "redis://..."), ("redis://:12?s3cret@host/0", "redis://..."),
        ("a/folder:s3", "a/folder:s3"),
    ],
)  # fmt: skip
def test_an_address_is_shown_without_its_password(url: str, shown: str) -> None:
    assert public(url) == shown


@pytest.mark.parametrize("sign", "/?#")
def test_a_password_that_splits_the_address_is_in_no_message(sign: str) -> None:
    with pytest.raises((ValueError, StoreError)) as error:
        open_store(f"redis://:s3{sign}cret@127.0.0.1:1/0")
    told: BaseException | None = error.value
    while told is not None:  # the log prints what it came from, too
        assert "s3" not in str(told) and "cret" not in str(told)
        told = told.__cause__ or (None if told.__suppress_context__ else told.__context__)


def test_users_are_hashed_as_encoded_rows_have_them() -> None:
    import polars as pl

    from unbraid.data.vocabulary import stable_hash

    for kind, raw, read in (("Int64", "-17", -17), ("Int64", 17.0, 17), ("Float64", "1.5", 1.5), ("String", 17, "17")):
        series = pl.Series([read], dtype=getattr(pl, kind))
        assert user_hash(raw, kind) == int(stable_hash(series)[0])
    for kind, raw in (("Int64", "x"), ("Int64", 1.5), ("Int64", 2**63), ("Int64", None), ("Float64", "y")):
        with pytest.raises(ValueError, match=f"User ids of this store are {kind}"):
            user_hash(raw, kind)


# --------------------------------------------------------------------------------------------------------- many writers
WRITER = """
import sys
from unbraid.serve.store import Record, open_store
store, start = open_store(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
new = 0
for n in range(start, start + 60):
    new += sum(store.append([(u, Record(str(n), n % 7, "rows", {"n": n})) for u in (1, 2)]))
print(new)
store.close()
"""


def run_writer(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_threads_and_processes_write_at_once_and_nothing_is_lost_or_there_twice(address: str, store: Store) -> None:
    processes = [run_writer(WRITER, address, start) for start in (0, 30)]  # 30 to 59 come from both
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    new: list[int] = []

    def write(thread: int) -> None:
        for n in range(40):  # every id from two threads
            records = [(u, event(f"t{(thread // 2) * 40 + n}", n, values={"thread": thread})) for u in (1, 3)]
            new.append(sum(store.append(records)))

    threads = [threading.Thread(target=write, args=(t,)) for t in range(8)]
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for thread in threads:
        thread.start()
    pages: list[Page] = []
    while any(
        thread.is_alive() for thread in threads
    ):  # readers see whole batches, in order, and never less than before
        page = store.read(1, *((pages[-1].generation, pages[-1].seq) if pages else (0, 0)))
        assert page.seq >= (pages[-1].seq if pages else 0)
        pages.append(page)
    for thread in threads:
        thread.join()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert sum(int(text) for text in outputs) == 2 * 90
    assert sum(new) == 2 * 4 * 40
    expected = {*(str(n) for n in range(90)), *(f"t{n}" for n in range(160))}
    found = ids(store.read(1).records)
    assert len(found) == len(expected) and set(found) == expected
    pages.append(store.read(1, pages[-1].generation, pages[-1].seq))
    increments = [name for page in pages for name in ids(page.records)]
    assert sorted(increments) == sorted(expected)
    assert store.stats()["events"] == 90 * 2 + 160 * 2


FORKING = """
import os, sys
from unbraid.serve.store import Record, open_store
store = open_store(sys.argv[1])
store.append([(1, Record("parent", 0, "rows", {}))])
child = os.fork()
for n in range(20):
    assert store.append([(1, Record(f"{child == 0}{n}", n, "rows", {}))]) == [True]
    assert len(store.read(1).records) >= n
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert len(store.read(1).records) == 41, len(store.read(1).records)
store.close()
"""


def test_a_fork_leaves_a_working_store_on_both_sides(address: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORKING, address], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------------- crashes
KILLED = """
import sys, threading
from unbraid.serve.store import Record, open_store
store, turn = open_store(sys.argv[1]), sys.argv[2]
def write(thread):
    n = 0
    while True:
        names = [f"{turn}.{thread}.{n}.{k}" for k in range(3)]
        records = [(k % 2, Record(name, n % 5, "rows", {"pad": "x" * 300})) for k, name in enumerate(names)]
        assert store.append(records) == [True] * 3
        if n % 20 == 19:
            store.trim(9, 2)
            store.append([(9, Record(f"{turn}.{thread}.{n}", n, "rows", {}))])
        sys.stdout.write("".join(name + "\\n" for name in names))
        sys.stdout.flush()
        n += 1
for thread in range(4):
    threading.Thread(target=write, args=(thread,)).start()
"""


@pytest.mark.slow
def test_what_was_acknowledged_survives_killed_writers(address: str) -> None:
    told: set[str] = set()
    chance = random.Random(0)
    for turn in range(20):
        with run_writer(KILLED, address, turn) as process:
            assert process.stdout
            first = process.stdout.readline()
            time.sleep(chance.uniform(0.01, 0.1))
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read()
        # a last line may be cut off by the kill: it is no acknowledgement
        told |= set((first + rest).split("\n")[:-1])
        with closing(open_store(address)) as store:
            found = [name for user in (0, 1) for name in ids(store.read(user).records)]
            assert len(set(found)) == len(found), "an event is there twice"
            assert told <= set(found), f"lost: {sorted(told - set(found))[:5]}"
            batches: dict[str, int] = {}
            for name in found:
                batches[name.rpartition(".")[0]] = batches.get(name.rpartition(".")[0], 0) + 1
            assert set(batches.values()) == {3}, "a batch is half there"
            count = store.stats()["events"]
            assert count == sum(len(store.read(user).records) for user in store.users())
    assert len(told) > 100


def test_a_big_history_is_read_in_pieces_of_any_size(store: Store) -> None:
    for start in range(0, 9000, 1500):
        store.append([(1, event(str(t), (t * 7919) % 9000)) for t in range(start, start + 1500)])
    page = store.read(1)
    assert [record.time for record in page.records] == list(range(9000))
    assert len(store.read(1, page.generation, 2).records) == 8998
    assert [r.time for r in store.last(1, 5000)] == list(range(4000, 9000))
    assert store.trim(1, 2500) == 6500
    assert [record.time for record in store.read(1).records] == list(range(6500, 9000))


def test_the_commands_tell_no_password(tmp_path: Path) -> None:
    """Whether it stands in the environment or in the command."""
    from typer.testing import CliRunner

    from unbraid.cli.main import app

    wrong = "redis:/:s3cret@127.0.0.1:1"
    served = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0"], env={"UNBRAID_STORE": wrong})
    assert served.exit_code and "address should be" in served.output
    for address in (wrong, "redis://:s3cret@127.0.0.1:1/0", "redis://:s3/cret@127.0.0.1:1/0"):
        for command in (["stats", address], ["check", address], ["trim", address, "--keep", "5"]):
            found = CliRunner().invoke(app, ["store", *command])
            assert found.exit_code and "cret" not in found.output + served.output, found.output
