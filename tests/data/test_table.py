"""The order of training batches, and the thread that makes them ahead."""

from __future__ import annotations

import threading
import time
from itertools import islice

import numpy as np
import polars as pl
import pytest

from unbraid.data.declaration import Data, Split
from unbraid.data.table import order, prefetch, steps_per_epoch
from unbraid.types import Feature, Task


def running() -> int:
    return sum(t.name == "unbraid-prefetch" and t.is_alive() for t in threading.enumerate())


def wait_for_none() -> None:
    until = time.time() + 10
    while running() and time.time() < until:
        time.sleep(0.02)
    assert not running()


@pytest.mark.parametrize(("n", "size"), [(100, 10), (103, 10), (7, 10), (10, 10), (1, 1)])
def test_an_order_can_be_resumed_from_any_step(n, size):
    rows = np.arange(n) * 3 + 1
    whole = list(islice(order(rows, size, seed=5), 40))
    for start in range(0, 35):
        for step, part in enumerate(islice(order(rows, size, seed=5, start=start), 5)):
            assert np.array_equal(part, whole[start + step])


def test_every_row_at_most_once_an_epoch_and_other_orders_in_others():
    rows = np.random.default_rng(0).choice(10_000, 103, replace=False)
    steps = steps_per_epoch(103, 10)
    assert steps == 10
    parts = list(islice(order(rows, 10, seed=0), 3 * steps))
    epochs = [np.concatenate(parts[i * steps : (i + 1) * steps]) for i in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 100 and set(epoch) <= set(rows)
    assert len({tuple(e) for e in epochs}) == 3
    assert len({frozenset(set(rows) - set(e)) for e in epochs}) == 3  # other rows are left out each time
    assert not np.array_equal(parts[0], next(order(rows, 10, seed=1)))
    assert len(next(order(rows[:7], 10, seed=0))) == 7 and steps_per_epoch(7, 10) == 1


def test_batches_follow_the_order(opened):
    n = 50
    frame = pl.DataFrame(
        {"item": range(n), "label": [0, 1] * (n // 2), "split": ["train"] * 40 + ["valid"] * 5 + ["test"] * 5}
    )
    table = opened(
        Data("log", (Feature("item"),), (Task("label"),), split=Split(kind="column", column="split")), log=frame
    )
    train = table.split("train")
    batches = table.shuffled(train, 8, seed=3, start=7)
    for got, want in islice(zip(batches, order(train, 8, 3, 7), strict=False), 12):
        assert np.array_equal(got.row, want) and (got.features["item"] == got.row + 2).all()
    batches.close()
    ordered = [b.row.tolist() for b in table.in_order(np.arange(50), 20)]
    assert [len(r) for r in ordered] == [20, 20, 10] and sum(ordered, []) == list(range(50))
    assert list(table.in_order(np.arange(0), 20)) == []
    wait_for_none()


def test_prefetch_keeps_order_and_ends():
    assert list(prefetch(iter(range(100)))) == list(range(100))
    wait_for_none()


def test_prefetch_raises_what_the_batches_raise_after_what_came_before():
    def batches():
        yield 1
        yield 2
        raise ValueError("row 3 is broken")

    found = []
    with pytest.raises(ValueError, match="row 3 is broken"):
        for item in prefetch(batches()):
            found.append(item)
    assert found == [1, 2]
    wait_for_none()


@pytest.mark.parametrize("read", [1, 10])
def test_closing_stops_the_thread(read):
    made = []

    def batches():
        while True:
            made.append(1)
            yield len(made)

    ahead = prefetch(batches(), depth=3)
    assert list(islice(ahead, read)) == list(range(1, read + 1))
    assert running() == 1
    ahead.close()
    wait_for_none()
    assert len(made) <= read + 5  # never far ahead


def test_an_abandoned_prefetch_ends_too():
    ahead = prefetch(iter(range(10**6)))
    next(ahead)
    del ahead
    wait_for_none()
