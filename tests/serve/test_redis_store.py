"""The store on Redis: a server that stops, hangs, fills up, forgets, or holds something else."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from storekit import Server, event

from unbraid.serve.redis_store import RedisStore
from unbraid.serve.store import Record, StoreCorrupt, StoreDown, StoreError, StoreFull, open_store

redis = pytest.importorskip("redis")
KEEP = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"), *KEEP)
    yield server
    server.stop()


@pytest.fixture
def server(lasting: Server) -> Server:
    with redis.Redis.from_url(lasting.url) as client:
        client.flushall()
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")
    return lasting


def test_nothing_that_was_acknowledged_goes_with_a_killed_server_and_it_comes_back_by_itself(server: Server) -> None:
    store = RedisStore(server.url, timeout=1.0)
    assert store.durability == "every event whose append returned"
    store.append([(1, event(str(t), t)) for t in range(50)])
    page = store.read(1)
    server.stop(hard=True)
    began = time.monotonic()
    for call in (
        lambda: store.read(1),
        lambda: store.append([(1, event("x"))]),
        store.ready,
        lambda: list(store.users()),
    ):
        with pytest.raises(StoreDown, match=f"redis://127.0.0.1:{server.port}/0 does not answer"):
            call()
    assert time.monotonic() - began < 2
    server.start()
    again = store.read(1, page.generation, page.seq)
    assert again.records == page.records
    # the server may have lost arrivals, and given their numbers to others: nobody continues from before
    assert again.whole and again.generation > page.generation
    assert store.append([(1, event("49")), (1, event("50", 50))]) == [False, True]
    assert [r.id for r in store.read(1, again.generation, again.seq).records] == ["50"]
    other = RedisStore(server.url)  # of the same run of the server: the generation holds
    assert not other.read(1, again.generation, again.seq).whole
    other.close()
    store.close()


def test_a_server_that_hangs_is_down_for_as_long(server: Server) -> None:
    store = RedisStore(server.url, timeout=0.3)
    store.append([(1, event("a"))])
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(StoreDown, match="does not answer"):
            store.append([(1, event("b"))])
        assert time.monotonic() - began < 1.5
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    for _ in range(100):
        try:
            store.append([(1, event("b")), (1, event("c"))])  # sent again: kept once, whatever became of the first
            break
        except StoreDown:
            time.sleep(0.05)
    assert sorted(record.id for record in store.read(1).records) == ["a", "b", "c"]
    store.close()


def test_a_server_that_is_not_there_is_down() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(StoreDown, match=f"redis://127.0.0.1:{port}/3 does not answer") as error:
        open_store(f"redis://somebody:secret@127.0.0.1:{port}/3?client_name=x")
    assert "secret" not in str(error.value)


def test_full_memory_keeps_nothing_of_a_write_and_reads_go_on(server: Server) -> None:
    store = RedisStore(server.url)
    store.append([(1, event("before"))])
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 400_000)
        kept, batch = 1, []
        with pytest.raises(StoreFull, match="no room for a write"):
            for n in range(1000):
                batch = [(u, event(f"{n}.{u}", n, values={"pad": "x" * 3000})) for u in (1, 2, 3)]
                store.append(batch)
                kept += 3
        assert store.stats()["events"] == kept
        assert sum(len(store.read(user).records) for user in store.users()) == kept
        with pytest.raises(StoreFull):
            store.append(batch)
        client.config_set("maxmemory", 0)
        assert store.append(batch) == [True] * 3 and store.stats()["events"] == kept + 3
    store.close()


def test_a_server_that_would_evict_events_is_refused(server: Server) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 10**8)
        client.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(StoreError, match="would evict events.*allkeys-lru.*noeviction"):
            RedisStore(server.url)


def test_databases_of_other_versions_and_of_others_are_refused(server: Server) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.hset("unbraid:settings", "format", "2")
        with pytest.raises(StoreCorrupt, match=r"unbraid:\*: a store of format 2; this version reads 1"):
            RedisStore(server.url)
        client.flushall()
        client.zadd("unbraid:users", {"someone": 1})
        with pytest.raises(StoreCorrupt, match="format unknown"):
            RedisStore(server.url)
        with pytest.raises(StoreCorrupt, match="format unknown"):  # looking at it did not make it a store
            RedisStore(server.url)
        client.flushall()
        client.set("unbraid:settings", "text")
        with pytest.raises(StoreError, match="WRONGTYPE"):
            RedisStore(server.url)


def test_stores_of_several_prefixes_share_a_server(server: Server) -> None:
    first, second = RedisStore(server.url, prefix="a:"), RedisStore(server.url, prefix="b:")
    first.append([(1, event("x"))])
    assert second.read(1).records == [] and second.append([(1, event("x"))]) == [True]
    second.delete(1)
    assert len(first.read(1).records) == 1 and first.stats()["events"] == 1 and second.stats()["events"] == 0
    first.close()
    second.close()


def test_a_password_is_asked_for_and_not_told(tmp_path: Path) -> None:
    guarded = Server(tmp_path, "--requirepass", "secret")
    try:
        for url in (guarded.url, guarded.url.replace("://", "://:wrong-word@")):
            with pytest.raises(StoreError, match="(?i)name and password|authentication") as error:
                open_store(url)
            assert "wrong-word" not in str(error.value)
        store = open_store(guarded.url.replace("://", "://:secret@"))
        assert store.append([(1, event("a"))]) == [True]
        assert "snapshot" in store.durability
        store.close()
    finally:
        guarded.stop()


def test_a_damaged_event_says_where(server: Server) -> None:
    store = RedisStore(server.url)
    store.append([(1, event("a"))])
    with redis.Redis.from_url(server.url) as client:
        client.hset("unbraid:v:1", "1", "5,[half")
    with pytest.raises(StoreCorrupt, match=server.url):
        store.read(1)
    store.close()


def test_too_many_events_at_once_are_refused(server: Server) -> None:
    store = RedisStore(server.url)
    with pytest.raises(ValueError, match="at most 50,000 events at once. Found 50,001"):
        store.append([(1, Record("a", 0, "rows", {}))] * 50_001)
    store.close()
