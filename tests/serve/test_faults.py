"""Faults around a service in a process of its own: full disks, a Redis that hangs or dies, damaged stores and bundles."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("lmdb")
from httpkit import NOW, bundle, events, rank, rows  # noqa: E402
from httpserver import Answer, Process  # noqa: E402
from storekit import Server, small_disk  # noqa: E402

from unbraid.serve.patience import Patient  # noqa: E402
from unbraid.serve.store import USER_TYPE, Record, StoreDown, open_store  # noqa: E402

TOKEN = {"Authorization": "Bearer secret"}
KEEP = ("--appendonly", "yes", "--appendfsync", "always")
DEGRADED = "The history store cannot be read: histories are empty."


def metric(service: Process, name: str) -> float:
    found = re.search(rf"^unbraid_{re.escape(name)} (\S+)$", service.get("/metrics").content.decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(seconds: float, what: Any) -> Any:
    """The first true answer of ``what`` within so many seconds."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


# --------------------------------------------------------------------------------------------------------- a full disk
def batch(n: int, user: int = 42) -> dict[str, Any]:
    """20 events whose ids make them large."""
    return events(*(f"{n}.{k}.{'x' * 400}" for k in range(20)), user=user, time=NOW - 10**6 + n)


@pytest.mark.slow
def test_a_full_disk_refuses_writes_alone_and_room_makes_them_work_again(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path, "3m") as disk,
        Process.fake(bundle(tmp_path / "b"), str(disk), tmp_path / "log") as service,
    ):
        assert service.get("/health").json() == {"alive": True, "writes": ""}
        for user, n in ((7, 0), (42, 1)):
            assert service.post("/events", batch(n, user)).json() == {"new": 20, "known": 0}
        kept = 20
        for n in range(2, 1_000):
            answer = service.post("/events", batch(n))
            if answer.status != 200:
                break
            kept += 20
        for _ in range(2):
            assert answer.status == 507 and kept > 200
            assert "store is full. Nothing of this request was kept" in answer.json()["error"]["message"]
            answer = service.post("/events", batch(n))
        assert "The history store is full" in service.get("/health").json()["writes"]
        assert service.get("/ready").status == 200  # reads go on
        ranked = service.post("/rank", rank(5)).json()
        assert (ranked["events"], ranked["degraded"]) == (kept, "")
        assert service.post("/predict", rows(5)).json()["predictions"]["click"] == [(5 + kept) / 1000]
        assert metric(service, 'store_errors_total{kind="StoreFull"}') == 3
        # a user who is removed makes room within the file
        removed = service._ask("DELETE", "/users/7", None, TOKEN)
        assert removed.json() == {"deleted": 20}
        assert service.post("/events", events("small")).json() == {"new": 1, "known": 0}
        assert service.get("/health").json()["writes"] == ""
        # as does another command, and a larger disk
        code = "import sys; from unbraid.cli.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "store", "trim", str(disk), "--newest", "100"], capture_output=True
        )
        assert done.returncode == 0, done.stderr
        assert service.post("/rank", rank(5)).json()["events"] == 100
        assert service.post("/events", batch(n)).json() == {"new": 20, "known": 0}
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        for more in range(n + 1, n + 60):
            assert service.post("/events", batch(more)).status == 200
        assert service.post("/rank", rank(5)).json()["events"] == 100 + 60 * 20
        assert service.end() == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
        with closing(open_store(disk)) as store:
            assert store.stats()["events"] == 100 + 60 * 20


# ----------------------------------------------------------------------------------------------------- Redis hangs, dies
class Traffic:
    """Clients that ask all the time: who sends events sends again, with the same ids, what was not acknowledged."""

    def __init__(self, service: Process, writers: int = 2, readers: int = 6) -> None:
        self.service, self.ends, self.numbers = service, threading.Event(), itertools.count()
        self.acknowledged: set[str] = set()
        self.answers: list[tuple[str, float, float, Answer]] = []  # route, when it began, seconds
        self.threads = [threading.Thread(target=self._writes) for _ in range(writers)]
        self.threads += [threading.Thread(target=self._reads, args=(n,)) for n in range(readers)]
        for one in self.threads:
            one.start()

    def _ask(self, route: str, body: Any) -> Answer:
        began = time.monotonic()
        answer = self.service.post(route, body)
        self.answers.append((route, began, time.monotonic() - began, answer))
        return answer

    def _writes(self) -> None:
        ids: list[str] = []
        while not self.ends.is_set():
            ids = ids or [f"e{next(self.numbers)}" for _ in range(3)]
            if self._ask("/events", events(*ids)).status == 200:
                self.acknowledged.update(ids)
                ids = []
            time.sleep(0.01)

    def _reads(self, n: int) -> None:
        while not self.ends.is_set():  # one of three is large, and computed alone
            self._ask("/rank", rank(*range(1, 3 + 200 * (n % 3 == 0))))
            time.sleep(0.01)

    def between(self, route: str, first: float = 0.0, last: float = float("inf")) -> list[tuple[float, Answer]]:
        """(seconds, answer) of the requests that began then."""
        return [
            (seconds, told) for path, began, seconds, told in self.answers if path == route and first < began < last
        ]

    def end(self) -> None:
        self.ends.set()
        for one in self.threads:
            one.join(30)


@contextmanager
def redis_service(tmp_path: Path) -> Iterator[tuple[Server, Process]]:
    pytest.importorskip("redis")
    folder = tmp_path / "redis"
    folder.mkdir()
    server = Server(folder, *KEEP)
    try:
        with Process.fake(bundle(tmp_path / "b"), server.url, tmp_path / "log") as service:
            yield server, service
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
        server.stop(hard=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_a_redis_that_hangs_or_dies_degrades_and_comes_back(tmp_path: Path, how: str) -> None:
    with redis_service(tmp_path) as (server, service):
        traffic = Traffic(service)
        try:
            until(10, lambda: len(traffic.acknowledged) > 30)
            assert all(answer.status == 200 for *_, answer in traffic.answers)
            away = time.monotonic()
            if how == "hangs":
                os.kill(server.process.pid, signal.SIGSTOP)
            else:
                server.stop(hard=True)
            time.sleep(7)
            asked = time.monotonic()
            assert service.get("/ready").status == 503 and service.get("/health").status == 200
            assert "cannot be reached" in service.get("/health").json()["writes"]
            if how == "hangs":
                os.kill(server.process.pid, signal.SIGCONT)
            else:
                server.start()
            back = time.monotonic()
            until(10, lambda: service.get("/ready").status == 200)
            mended = time.monotonic()
            until(20, lambda: all(len(traffic.between(one, mended + 1.0)) > 3 for one in ("/rank", "/events")))
        finally:
            traffic.end()
        last = asked - 2.5  # one that tries later may still be waiting when the server is back
        ranked = traffic.between("/rank", away + 0.1, last)
        assert len(ranked) > 10 and {answer.status for _, answer in ranked} == {200}
        assert {answer.json()["degraded"] for _, answer in ranked} == {DEGRADED}
        assert max(seconds for seconds, _ in ranked) < 8  # a request may take 10
        refused = traffic.between("/events", away + 0.1, last)
        assert refused and {answer.status for _, answer in refused} == {503}
        assert all("cannot be reached now" in answer.json()["error"]["message"] for _, answer in refused)
        assert mended - back < 8
        assert {answer.status for _, answer in traffic.between("/events", mended + 1.0)} == {200}
        assert {answer.json()["degraded"] for _, answer in traffic.between("/rank", mended + 1.0)} == {""}
        degraded = sum(answer.json()["degraded"] != "" for _, answer in traffic.between("/rank"))
        assert metric(service, "degraded_total") == degraded
        failed = sum(answer.status == 503 for _, answer in traffic.between("/events"))
        assert metric(service, 'store_errors_total{kind="StoreDown"}') >= failed > 0
        assert metric(service, 'requests_total{route="/events",status="503"}') == failed
        ranked_again = service.post("/rank", rank(1)).json()
        with closing(open_store(server.url)) as store:
            kept = [record.id for record in store.read(42).records]
        assert len(kept) == len(set(kept)) and traffic.acknowledged <= set(kept)
        assert (ranked_again["events"], ranked_again["degraded"]) == (len(kept), "")
        assert service.end() == 0
        assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_store_that_is_away_says_when_to_send_again(tmp_path: Path) -> None:
    with redis_service(tmp_path) as (server, service):
        assert service.post("/events", events("a")).status == 200
        server.stop(hard=True)
        with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)) as connection:
            head = {"content-type": "application/json"}
            connection.request("POST", "/events", json.dumps(events("b")), head)
            answer = connection.getresponse()
            assert answer.status == 503 and answer.getheader("Retry-After") == "1"
            answer.read()
            connection.request("POST", "/predict", json.dumps(rows(1)), head)  # its numbers would be wrong without
            answer = connection.getresponse()
            assert answer.status == 503 and answer.getheader("Retry-After") == "1"
        server.start()
        until(5, lambda: service.post("/events", events("b")).status == 200)
        assert service.post("/rank", rank(1)).json()["events"] == 2


class Away:
    """A store that counts who waits for it."""

    def __init__(self) -> None:
        self.asked, self.fault, self.hold = 0, True, threading.Event()

    def ready(self) -> None:
        self.asked += 1
        self.hold.wait(10)
        if self.fault:
            raise StoreDown("gone")


def test_a_store_that_is_away_is_asked_by_one_at_a_time() -> None:
    store = Away()
    patient = Patient(store, rest=0.2)  # type: ignore[arg-type]
    store.hold.set()
    for _ in range(20):
        with pytest.raises(StoreDown, match="gone"):
            patient.ready()
    assert store.asked == 1
    time.sleep(0.25)
    store.hold.clear()
    trying = threading.Thread(target=patient.ready)
    store.fault = False
    trying.start()
    until(5, lambda: store.asked == 2)
    with pytest.raises(StoreDown, match="gone"):  # at once: another one tries
        patient.ready()
    assert store.asked == 2
    store.hold.set()
    trying.join()
    patient.ready()
    assert store.asked == 3


# ------------------------------------------------------------------------------------------ damaged stores and bundles
@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the bundled log."""
    from rankerkit import untrained

    from unbraid import recipes

    folder = tmp_path_factory.mktemp("bundle")
    untrained(recipes.shared_bottom(), folder / "cache").save(folder / "good")
    untrained(recipes.mmoe(), folder / "cache").save(folder / "other")
    return folder / "good"


def cut(file: Path, share: float = 0.5) -> None:
    os.truncate(file, int(file.stat().st_size * share))


def another_schema(folder: Path) -> None:
    schema = json.loads((folder / "schema.json").read_text())
    schema["schema"]["tasks"] = schema["schema"]["tasks"][:1]
    (folder / "schema.json").write_text(json.dumps(schema))


DAMAGES = {  # how a bundle is damaged -> what is said
    "weights cut short": (lambda folder: cut(folder / "weights.safetensors"), "cannot be loaded"),
    "weights of noise": (
        lambda folder: (folder / "weights.safetensors").write_bytes(os.urandom(5_000)),
        "cannot be loaded",
    ),
    "no weights": (lambda folder: (folder / "weights.safetensors").unlink(), "weights.safetensors"),
    "empty weights": (lambda folder: (folder / "weights.safetensors").write_bytes(b""), "cannot be loaded"),
    "run cut short": (lambda folder: cut(folder / "run.toml"), "cannot be loaded|differ"),
    "schema of noise": (lambda folder: (folder / "schema.json").write_bytes(b"\xff\x00{"), "cannot be loaded"),
    "schema of lists": (lambda folder: (folder / "schema.json").write_text("[]"), "cannot be loaded"),
    "another schema": (another_schema, "from different runs"),
    "weights of another run": (
        lambda folder: shutil.copy(folder.parent / "other" / "weights.safetensors", folder),
        "(?i)weights",
    ),
    "vocabularies mixed up": (
        lambda folder: shutil.copy(folder / "vocabularies" / "000.parquet", folder / "vocabularies" / "001.parquet"),
        "vocabular",
    ),
    "no vocabularies": (lambda folder: shutil.rmtree(folder / "vocabularies"), "cannot be loaded"),
    "vocabularies cut short": (
        lambda folder: [cut(one) for one in (folder / "vocabularies").iterdir()],
        "cannot be loaded",
    ),
}


def damaged(good: Path, place: Path) -> Iterator[tuple[Path, str]]:
    """Copies, each damaged in one way, and what is said of it."""
    shutil.copytree(good.parent / "other", place / "other")
    for name, (damage, says) in DAMAGES.items():
        folder = place / name.replace(" ", "-")
        shutil.copytree(good, folder)
        damage(folder)  # type: ignore[no-untyped-call]
        yield folder, says


def command(folder: Path, store: Path) -> list[str]:
    return [sys.executable, "-m", "unbraid", "serve", str(folder), "--store", str(store), "--port", "0"]


@pytest.mark.slow
def test_a_damaged_bundle_is_refused_at_reload_and_the_old_one_goes_on(good: Path, tmp_path: Path) -> None:
    os.environ["UNBRAID_TOKEN"] = "secret"
    try:
        service = Process(command(good, tmp_path / "store"), tmp_path / "log")
    finally:
        del os.environ["UNBRAID_TOKEN"]
    with service:
        example = service.get("/openapi.json").json()["paths"]["/rank"]["post"]["requestBody"]["content"]
        body = {**example["application/json"]["example"], "time": 0}
        before = service.post("/rank", body).json()
        for folder, says in damaged(good, tmp_path):
            answer = service.post("/reload", {"bundle": str(folder)}, TOKEN)
            assert answer.status == 409, (folder, answer.content)
            assert re.search(says, answer.json()["error"]["message"]), (folder, answer.content)
            assert service.post("/rank", body).json() == before
        assert metric(service, 'reloads_total{result="refused"}') == len(DAMAGES)
        assert service.post("/reload", {}, TOKEN).status == 200
        assert service.post("/rank", body).json() == before
        assert service.end() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_damaged_bundle_is_refused_at_start(good: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from unbraid.cli.main import app

    for folder, says in damaged(good, tmp_path):
        found = CliRunner().invoke(app, command(folder, tmp_path / "store")[3:])
        assert found.exit_code == 2 and re.search(says, found.output), (folder, found.output, found.exception)


@pytest.mark.slow
def test_a_damaged_store_is_refused_at_start(good: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from unbraid.cli.main import app

    store = open_store(tmp_path / "whole")
    store.append([(user, Record(f"{n}", n, "rows", {"pad": "x" * 60})) for user in range(5) for n in range(300)])
    store.close()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut(tmp_path / "cut" / "data.mdb")
    shutil.copytree(tmp_path / "whole", tmp_path / "head")
    with (tmp_path / "head" / "data.mdb").open("r+b") as file:
        file.write(os.urandom(8192))
    with closing(open_store(tmp_path / "theirs")) as theirs:
        theirs.set(USER_TYPE, "String")
    with closing(open_store(tmp_path / "later")) as later:
        later.set("format", "2")
    for name, says in (
        ("cut", "cut short"), ("head", "damaged, or not a history store"), ("theirs", "String.*Int64|Int64.*String"),
        ("later", "format 2; this version reads 1"),
    ):  # fmt: skip
        found = CliRunner().invoke(app, command(good, tmp_path / name)[3:])
        assert found.exit_code == 2 and re.search(says, found.output), (name, found.output, found.exception)
    done = subprocess.run(command(good, tmp_path / "cut"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "cut short" in done.stderr
    assert "Traceback" not in done.stderr and "serving" not in done.stdout
