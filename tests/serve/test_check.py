"""A look at a whole store: what is whole passes, every kind of damage is found, and none of it ends the process."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from storekit import Server, event
from typer.testing import CliRunner

from unbraid.cli.main import app
from unbraid.serve.check import MOST, check
from unbraid.serve.lmdb_store import LmdbStore
from unbraid.serve.redis_store import RedisStore
from unbraid.serve.store import Record, Store, StoreError, open_store

pytest.importorskip("lmdb")
PAGE = 4096


def filled(store: Store) -> Store:
    """Appends, late ones too, and removals."""
    for user in (1, 2, 2**64 - 1):
        store.append([(user, event(f"e{n}", n * 7 % 50 - 9, values={"pad": "x" * 60})) for n in range(60)])
    store.append([(2, event("late", -500)), (2, event("e1"))])
    store.append([(4, event("gone"))])
    store.trim(1, 20)
    store.delete(4)
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    filled(LmdbStore(tmp_path / "store", fsync=False)).close()
    return tmp_path / "store"


def test_a_whole_store_passes(folder: Path) -> None:
    found = check(folder)
    assert (found.users, found.events, found.problems, found.more) == (3, 20 + 61 + 60, [], 0)
    said = CliRunner().invoke(app, ["store", "check", str(folder)])
    assert said.exit_code == 0 and "3 users, 141 events looked at\nnothing is wrong" in said.output
    told = json.loads(CliRunner().invoke(app, ["store", "check", f"lmdb:{folder}", "--json"]).output)
    assert told == {"users": 3, "events": 141, "problems": [], "more": 0}


def test_a_store_that_another_process_writes_into_passes(folder: Path) -> None:
    code = """
import sys
from unbraid.serve.store import Record, open_store
store = open_store(sys.argv[1])
print("open", flush=True)
n = 0
while True:
    store.append([(7, Record(f"{n}", n, "rows", {}))])
    n += 1
"""
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"open\n"
        found = [check(folder) for _ in range(5)]
        writer.kill()
    assert [one.problems for one in found] == [[]] * 5
    assert found[0].events < found[-1].events


def test_a_page_of_noise_is_found_or_is_not_in_use(folder: Path, tmp_path: Path) -> None:
    with closing(open_store(folder)) as store:
        users = list(store.users())
        want = [store.read(user).records for user in users]
    draw, size, found = random.Random(1), (folder / "data.mdb").stat().st_size, 0
    for page in range(2, size // PAGE):
        copy = tmp_path / f"{page}"
        shutil.copytree(folder, copy)
        with (copy / "data.mdb").open("r+b") as file:
            file.seek(page * PAGE)
            file.write(draw.randbytes(PAGE))
        if check(copy).problems:
            found += 1
            continue
        with closing(open_store(copy)) as store:  # an old page, which waits to be used again
            assert [store.read(user).records for user in users] == want
    assert found > 5


def test_a_damaged_page_ends_the_command_with_its_number_and_one(folder: Path) -> None:
    size = (folder / "data.mdb").stat().st_size
    with (folder / "data.mdb").open("r+b") as file:
        for page in range(2, size // PAGE):
            file.seek(page * PAGE)
            file.write(os.urandom(PAGE))
    done = subprocess.run(
        [sys.executable, "-m", "unbraid", "store", "check", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "wrong  data.mdb: " in done.stdout and "page" in done.stdout, done
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: os.truncate(file, 0), "it is empty"),
        (lambda file: os.truncate(file, 3 * PAGE), r"data\.mdb: "),
        (lambda file: file.write_bytes(os.urandom(5 * PAGE)), "not a history store|LMDB"),
    ],
)  # fmt: skip
def test_files_that_are_none_are_found(folder: Path, damage: Callable[[Path], Any], says: str) -> None:
    damage(folder / "data.mdb")
    said = CliRunner().invoke(app, ["store", "check", str(folder)])
    assert said.exit_code == 1 and "wrong  " in said.output, said.output
    assert re.search(says, said.output), said.output


KEY = (2).to_bytes(8, "big")
EARLIEST = KEY + ((1 << 63) - 500).to_bytes(8, "big") + (61).to_bytes(8, "big")  # of "late"
LMDB = [
    (lambda write: write.remove("events", EARLIEST), ["user 2: the store counts 61 events; there are 60", "61 has time None"]),
    (lambda write: write.remove("arrivals", KEY + EARLIEST[16:]), ["user 2: arrival 61 has time -500, and None in the index"]),
    (lambda write: write.put("events", EARLIEST, b"[half"), ["user 2: the event of arrival 61 is no JSON"]),
    (lambda write: write.put("events", EARLIEST, b'["late","rows",[]]'), ["is no list of id, table and values"]),
    (lambda write: write.put("events", EARLIEST, b'["other","rows",{}]'), ["id that is not among the known: 'other'"]),
    (lambda write: write.remove("users", KEY), ["user 2: has 61 events and 61 ids, and is not among the users"]),
    (lambda write: write.put("users", KEY, bytes(23) + b"\x3d"), ["user 2: arrival 61 is later than the newest, 0"]),
    (lambda write: write.put("ids", b"\0" * 7 + b"\3" + bytes(16), b""), ["user 3: has 0 events and 1 ids, and is not among"]),
    (lambda write: write.put("events", KEY + b"short", b"[]"), ["a key after user 2 is damaged"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), LMDB)
def test_records_indexes_and_counters_are_compared(folder: Path, damage: Callable[[Any], Any], says: list[str]) -> None:
    with closing(LmdbStore(folder, fsync=False)) as store:
        store._env.write(lambda write: damage(write))
    problems = "\n".join(check(folder).problems)
    assert all(one in problems for one in says), problems
    assert "user 1:" not in problems and str(2**64 - 1) not in problems


def test_many_problems_are_counted(folder: Path) -> None:
    with closing(LmdbStore(folder, fsync=False)) as store:
        store.append([(8, Record(f"{n}", n, "rows", {})) for n in range(2 * MOST)])
        store._env.write(
            lambda write: [
                write.remove("arrivals", (8).to_bytes(8, "big") + n.to_bytes(8, "big")) for n in range(1, 181)
            ]
        )
    found = check(folder)
    assert len(found.problems) == MOST and found.more == 80
    assert "and 80 more" in CliRunner().invoke(app, ["store", "check", str(folder)]).output


def test_what_cannot_be_looked_at_is_said(folder: Path, tmp_path: Path) -> None:
    with closing(open_store(folder)), pytest.raises(StoreError, match="open in this process"):
        check(folder)
    assert check(folder).problems == []
    for address, says in (
        (tmp_path / "nowhere", "There is no history store"),
        ("redis://127.0.0.1:1/0", "does not answer"),
    ):
        said = CliRunner().invoke(app, ["store", "check", str(address)])
        assert said.exit_code == 2 and says in said.output


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("redis")
    server = Server(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop(hard=True)


REDIS = [
    (("hset", "p*:state", "events", 7), ["the store counts 7 events; there are 141"]),
    (("hdel", "p*:v:2", "61"), ["user 2: arrival 61 has time None, and -500 in the index"]),
    (("zremrangebyrank", "p*:e:2", 0, 0), ["user 2: arrival 61 has time -500, and None in the index"]),
    (("hset", "p*:v:2", "61", "-500,[half"), ["user 2: the event of arrival 61 is no JSON"]),
    (("hset", "p*:v:2", "61", "x"), ["a key of user 2 is damaged"]),
    (("del", "p*:i:2"), ["id that is not among the known: 'late'"]),
    (("zrem", "p*:users", f"{2:016x}"), ["user 2: has 61 events and 61 ids, and is not among", "counts 2 users; there are 3"]),
    (("hset", "p*:u:2", "seq", 5), ["user 2: arrival 61 is later than the newest, 5"]),
    (("set", "p*:v:2", "text"), ["WRONGTYPE"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), REDIS)
def test_redis_is_compared_in_the_same_way(
    server: Server, monkeypatch: pytest.MonkeyPatch, damage: tuple[Any, ...], says: list[str]
) -> None:
    """With a prefix that is a pattern, and keys of others beside it."""
    import redis

    monkeypatch.setattr(RedisStore.__init__, "__kwdefaults__", {"timeout": 2.0, "prefix": "p*:"})
    with closing(redis.Redis.from_url(server.url)) as client:
        client.flushall()
        client.hset("pq:v:9", "1", "text of others")
        filled(RedisStore(server.url)).close()
        whole = check(server.url)
        assert (whole.users, whole.events, whole.problems) == (3, 141, [])
        client.execute_command(*damage)
    try:
        problems = "\n".join(check(server.url).problems)
    except StoreError as error:
        problems = str(error)
    assert all(one in problems for one in says), problems
    assert "user 1:" not in problems
