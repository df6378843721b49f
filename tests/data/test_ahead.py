"""Chunks in threads: what comes of them is what comes of one after the other, whichever is ready first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from test_encode import everything, same
from test_events import DATA as EVENTS
from test_events import make

from unbraid.data import encode as encoding
from unbraid.data import events, spill
from unbraid.data.ahead import ahead
from unbraid.data.counting import Counted
from unbraid.data.encode import encode
from unbraid.data.source import DataError
from unbraid.data.table import Encoded


def frames(n: int) -> list[pl.DataFrame]:
    return [pl.DataFrame({"a": [i]}) for i in range(n)]


def jitter(value: int) -> None:
    time.sleep((value * 7 % 5) / 500)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_to(n: int) -> None:
        monkeypatch.setattr(pl, "thread_pool_size", lambda: n)

    set_to(4)
    return set_to


def test_results_are_in_order_and_by_several_threads(threads: Any) -> None:
    met = threading.Barrier(3, timeout=10)

    def value(frame: pl.DataFrame) -> tuple[int, str]:
        if frame["a"][0] < 3:
            met.wait()  # nobody passes alone
        jitter(frame["a"][0])
        return frame["a"][0], threading.current_thread().name

    found = list(ahead(value, frames(40), 10**6))
    assert [number for number, _ in found] == list(range(40))
    assert len({name for _, name in found}) >= 3


def test_one_thread_is_the_callers(threads: Any) -> None:
    threads(1)
    assert set(ahead(lambda frame: threading.current_thread(), frames(3), 10**6)) == {threading.main_thread()}


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (8 * 2, 3), (10**6, 5)])
def test_what_is_read_ahead_is_bounded(limit: int, most: int, threads: Any) -> None:
    read, taken, lead = 0, 0, []

    def reading() -> Iterator[pl.DataFrame]:
        nonlocal read
        for frame in frames(30):
            read += 1
            lead.append(read - taken)
            yield frame

    for _ in ahead(lambda frame: frame, reading(), limit):
        taken += 1
    assert taken == 30 and max(lead) == most


def test_the_first_error_is_the_one_that_is_raised(threads: Any) -> None:
    """Of two items, of an item before one that cannot be read, and of one that cannot be read: as without threads."""

    def failing(frame: pl.DataFrame) -> int:
        number = frame["a"][0]
        if number in (3, 4):
            time.sleep(0.02 * (4 - number))  # the later one fails first
            raise ValueError(f"item {number}")
        return number

    def unreadable() -> Iterator[pl.DataFrame]:
        yield from frames(4)
        raise OSError("no more")

    for items, error in ((frames(9), "item 3"), (unreadable(), "item 3")):
        found = []
        with pytest.raises(ValueError, match=error):
            for number in ahead(failing, items, 10**6):
                found.append(number)  # noqa: PERF402
        assert found == [0, 1, 2]
    found = []
    with pytest.raises(OSError, match="no more"):
        for frame in ahead(lambda frame: frame["a"][0], unreadable(), 10**6):
            found.append(frame)
    assert found == [0, 1, 2, 3]


def test_who_stops_leaves_no_thread(threads: Any) -> None:
    results = ahead(lambda frame: jitter(4), frames(50), 10**6)
    next(results)
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("unbraid-encode")]


@pytest.mark.parametrize("memory", [64, 1024])
@pytest.mark.parametrize("name", ["everything", "events", "exposure"])
def test_the_table_is_the_same_with_any_number_of_threads(
    name: str, memory: int, threads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, tables = (EVENTS, make(3)) if name == "events" else everything(7, n=300)
    data = replace(data, memory_mb=memory, exposure=("user", "item") if name == "exposure" else ())
    monkeypatch.setattr(encoding, "CHUNK", 20)
    monkeypatch.setattr(encoding, "SHARE", 300)
    monkeypatch.setattr(spill, "WINDOW", 50)
    for place, function in ((encoding, "write_rows"), (events, "encode_events"), (events._Cut, "window")):
        calls, real = [], getattr(place, function)

        def slow(*args: Any, real: Any = real, calls: list[int] = calls, **options: Any) -> Any:
            calls.append(1)
            jitter(len(calls))
            return real(*args, **options)

        monkeypatch.setattr(place, function, slow)
    real_look = Counted.look
    monkeypatch.setattr(Counted, "look", staticmethod(lambda column: (jitter(len(column)), real_look(column))[1]))
    found = []
    for n in (1, 4):
        threads(n)
        found.append(Encoded(encode(replace(data, cache=str(tmp_path / str(n))), tables=tables)))
    same(found[0].columns, found[1].columns)
    assert found[0].fitted.digest() == found[1].fitted.digest() and found[0].about == found[1].about


def test_the_first_bad_chunk_is_named(threads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, tables = everything(7, n=300)
    monkeypatch.setattr(encoding, "CHUNK", 20)
    rows = tables["log"].with_columns(
        click=pl.when(pl.int_range(pl.len()) == 130)
        .then(7)
        .when(pl.int_range(pl.len()) > 150)
        .then(8)
        .otherwise("click")
    )
    for n in (1, 4):
        threads(n)
        with pytest.raises(DataError, match=r"\[7\.0\] in 1 rows"):
            encode(replace(data, cache=str(tmp_path)), tables={**tables, "log": rows})
