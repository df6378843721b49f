"""An encode that is killed or interrupted anywhere is continued: the table is the same, and what was done is not done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from test_encode import everything, same
from test_events import DATA as EVENTS
from test_events import make

from unbraid import store
from unbraid.data import dictionary, events, spill
from unbraid.data import encode as encoding
from unbraid.data.counting import Counted
from unbraid.data.declaration import Data, Negatives
from unbraid.data.encode import encode
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.store import Journal, resumable_folder

PLACES: dict[str, tuple[Any, str]] = {  # where it stops: what is called there
    "counting": (Counted, "add"), "rows": (encoding, "write_rows"), "exposure": (encoding, "earlier"),
    "events": (events, "encode_events"), "merging": (events._Cut, "window"), "spilling": (spill.Sorter, "_write"),
    "naming": (store, "_publish"), "listing": (dictionary, "_scatter"), "copying": (dictionary, "copy"),
}  # fmt: skip


def declared(name: str) -> tuple[Data, dict[str, pl.DataFrame]]:
    data, tables = everything(7, n=150)
    if name == "exposure":
        return replace(data, exposure=("user", "item")), tables
    if name == "negatives":
        drawn = Negatives("item", 2, labels=("click", "buy", "size", "spend"))
        return replace(data, negatives=drawn, tasks=data.tasks[:1], keep="item > 2"), tables
    return (EVENTS, make(3)) if name == "events" else (data, tables)


def watched(monkeypatch: pytest.MonkeyPatch, place: str, stop: int = 0) -> list[int]:
    """Count the calls of what `PLACES` names; the one of that number is an interruption."""
    where, name = PLACES[place]
    real: Callable[..., Any] = getattr(where, name)
    calls: list[int] = []

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(where, name, counting)
    return calls


def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note after every chunk of a few rows, runs of a few records."""
    monkeypatch.setattr(Journal, "every", 0.0)
    monkeypatch.setattr(encoding, "CHUNK", 40)
    monkeypatch.setattr(encoding, "SHARE", 30)


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize(
    "name", ["events", *(pytest.param(n, marks=pytest.mark.slow) for n in ("everything", "exposure", "negatives"))]
)
def test_an_interrupted_encode_is_continued(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, tables = declared(name)
    data = replace(data, memory_mb=64)
    small_steps(monkeypatch)
    monkeypatch.setattr(pl, "thread_pool_size", lambda: 2)  # some work is under way when it stops
    if place in ("listing", "copying"):  # vocabularies on disk
        monkeypatch.setattr(dictionary, "LARGE", 2)
    with monkeypatch.context() as patch:
        calls = watched(patch, place)
        whole = Encoded(encode(replace(data, cache=str(tmp_path / "whole")), tables=tables))
    needed, data = len(calls), replace(data, cache=str(tmp_path / "parts"))
    if needed == 0:
        pytest.skip(f"{name} has no {place}")
    first = 1 + needed // 2 if needed > 1 else 1
    for stop in (first, 1):  # the second time right where it goes on
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            watched(patch, place, stop)
            encode(data, tables=tables)
        assert [p.name for p in (tmp_path / "parts").iterdir()] == [f".{whole.folder.name}.unfinished"]
    calls = watched(monkeypatch, place)
    found = Encoded(encode(data, tables=tables))
    same(whole.columns, found.columns)
    assert found.fitted.digest() == whole.fitted.digest() and found.about == whole.about
    assert sorted(p.name for p in found.folder.rglob("*")) == sorted(p.name for p in whole.folder.rglob("*"))
    if place == "rows":
        assert first - 1 + len(calls) == needed, "no chunk of rows is encoded twice"


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it merges: nothing is counted, and neither rows nor events are read, the second time."""
    data, tables = declared("everything")
    data = replace(data, cache=str(tmp_path), memory_mb=64)
    small_steps(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watched(patch, "merging", 2)
        encode(data, tables=tables)
    for place in ("counting", "rows"):
        watched(monkeypatch, place, 1)
    calls = watched(monkeypatch, "events")
    encode(data, tables=tables)
    assert len(calls) <= 1, "the last, unfinished run at most"


def test_what_was_too_quick_to_be_noted_is_noted_with_what_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitting and rows took no time, a run of events was spilled: all three are on disk then, or none."""
    data, tables = declared("everything")
    whole = Encoded(encode(replace(data, cache=str(tmp_path / "whole")), tables=tables))
    data = replace(data, cache=str(tmp_path / "parts"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watched(patch, "merging", 1)
        encode(data, tables=tables)
    (unfinished,) = (tmp_path / "parts").iterdir()
    assert not (unfinished / "journal.json").exists(), "seconds of work are not worth a note"
    add = spill.Sorter.add
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(spill.Sorter, "add", lambda self, frame: add(self, frame) or "source" in frame.columns)
        watched(patch, "merging", 1)
        encode(data, tables=tables)
    assert {"fitted", "rows", "events"} <= set(Journal(unfinished).noted)
    for place in ("counting", "rows"):
        watched(monkeypatch, place, 1)
    same(whole.columns, Encoded(encode(data, tables=tables)).columns)


def test_an_error_leaves_nothing_and_others_do_not_wait(tmp_path: Path) -> None:
    with pytest.raises(DataError), resumable_folder(tmp_path / "one") as (folder, _):
        (folder / "part").touch()
        raise DataError("no")
    assert not list(tmp_path.iterdir())
    with resumable_folder(tmp_path / "one") as (folder, journal):
        (folder / "part").touch()
        with resumable_folder(tmp_path / "two") as (other, _):
            assert folder.exists() and other != folder
        with resumable_folder(tmp_path / "one") as (second, none):
            assert second != folder and not none.due() and none.path is None
            journal.note(done=1)
            (second / "part").touch()
        # the second was faster
        assert (tmp_path / "one" / "part").exists()
        (tmp_path / "one" / "part").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["part"], "neither journal nor lock"


def test_what_nobody_continues_goes_after_a_week(tmp_path: Path) -> None:
    for name, age in (("old", 8), ("new", 6)):
        with pytest.raises(KeyboardInterrupt), resumable_folder(tmp_path / name):
            raise KeyboardInterrupt
        past = time.time() - age * 86_400
        os.utime(tmp_path / f".{name}.unfinished", (past, past))
    with resumable_folder(tmp_path / "other"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".new.unfinished", "other"]


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from unbraid.data.encode import encode
import test_resume_encode as here
data, tables = here.declared("everything")
patch = here.pytest.MonkeyPatch()
here.small_steps(patch)
here.dictionary.LARGE = 2
where, name = here.PLACES[sys.argv[2]]
real, left = getattr(where, name), [int(sys.argv[3])]
def dying(*args, **options):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
setattr(where, name, dying)
encode(here.replace(data, cache=sys.argv[1], memory_mb=64), tables=tables)
"""


@pytest.mark.slow
def test_a_killed_encode_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in each of its stages, one after the other, with vocabularies on disk; the table is as with those in memory."""
    code = KILLED.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    for place, call in (
        ("counting", 9), ("listing", 2), ("copying", 2), ("rows", 4), ("events", 3), ("merging", 3), ("naming", 1),
    ):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), place, str(call)], capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    data, tables = declared("everything")
    whole = Encoded(encode(replace(data, cache=str(tmp_path / "whole")), tables=tables))
    for place in ("counting", "listing", "copying", "rows", "events", "merging"):  # it was to get its name alone
        watched(monkeypatch, place, 1)
    small_steps(monkeypatch)
    found = Encoded(encode(replace(data, cache=str(tmp_path), memory_mb=64), tables=tables))
    same(whole.columns, found.columns)
    for name, known in whole.fitted.vocabularies.items():
        assert pl.concat(list(dictionary.pieces(found.fitted.vocabularies[name].values))).equals(known.values), name
