"""Sorting on disk against sorting in memory; a table that is encoded either way; how much memory it takes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_encode import everything, same
from test_events import DATA as EVENTS
from test_events import make

from unbraid.data import encode as encoding
from unbraid.data import spill
from unbraid.data.counting import PIECE, Learnt, learn, pairwise
from unbraid.data.declaration import Data, Negatives
from unbraid.data.encode import encode, fingerprint
from unbraid.data.source import DataError
from unbraid.data.spill import RUNS, Sorter, add_up, pieces
from unbraid.data.table import Encoded
from unbraid.types import Feature


# ------------------------------------------------------------------------------------------------------------- a sorter
@pytest.mark.parametrize("limit", [1, 200, 3_000, 10**9])
@pytest.mark.parametrize("keys", [("a",), ("a", "b"), ("a", "b", "c")])
def test_windows_are_the_sorted_records_in_whole_groups(
    limit: int, keys: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "WINDOW", 50)
    rng = np.random.default_rng(0)
    n = 600
    columns = {
        "a": rng.integers(-9, 9, n), "b": rng.integers(-(2**62), 2**62, n) // 2**60, "c": rng.integers(0, 3, n).astype(np.uint8),
        "place": np.arange(n), "flag": rng.random(n) < 0.5,
    }  # fmt: skip
    frame = pl.DataFrame(columns)
    sorter = Sorter(tmp_path / "runs", keys, limit)
    spilled = [sorter.add(part) for part in frame.iter_slices(15)]
    assert any(spilled) == (limit < 10**9) and sorter.records == n
    windows = list(sorter.windows())
    assert pl.concat(windows).equals(frame.sort(keys, maintain_order=True))
    assert len(sorter.runs) <= RUNS + 1
    groups = [set(window["a"].to_list()) for window in windows]
    assert sum(map(len, groups)) == len(set().union(*groups)), "a group is in one window"
    assert len(windows) > 5 or len(keys) == 1 and limit > 10**6
    sorter.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [pl.Int64, pl.Float64, pl.String])
@pytest.mark.parametrize("limit", [1, 2_000, 10**9])
def test_counts_add_up_on_disk(kind: type, limit: int, tmp_path: Path) -> None:
    values = pl.Series("value", (np.random.default_rng(1).random(1_000) ** 3 * 900).astype(int) - 50).cast(kind)
    sorter = Sorter(tmp_path / "runs", ["value"], limit, add_up)
    for at in range(0, len(values), 25):
        sorter.add(values[at : at + 25].value_counts(name="count").cast({"count": pl.Int64}))
    found = pl.concat(list(sorter.windows()))
    assert found.equals(values.value_counts(name="count").cast({"count": pl.Int64}).sort("value"))
    assert found["value"].n_unique() == len(found) > 200


def test_a_sorter_goes_on_from_its_runs(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [3, 1, 3, 2, 1, 3], "place": range(6)})
    first = Sorter(tmp_path, ["a"], 1)
    first.add(frame[:2])
    first.add(frame[2:3])
    second = Sorter(tmp_path, ["a"], 10**6, runs=first.runs)
    second.add(frame[3:])
    assert pl.concat(list(second.windows())).equals(frame.sort("a", maintain_order=True))


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """Polars' own error would read as if the data were wrong."""
    code = """
import resource, sys
from pathlib import Path
import polars as pl
from unbraid.data.spill import Sorter
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    Sorter(Path(sys.argv[1]), ["a"], 100_000).add(pl.DataFrame({"a": range(100_000)}))
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "runs")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == errno.EFBIG


def test_an_empty_sorter_has_no_windows(tmp_path: Path) -> None:
    sorter = Sorter(tmp_path / "none", ["a"], 1)
    assert not sorter.add(pl.DataFrame({"a": pl.Series([], dtype=pl.Int64)}))
    assert not list(sorter.windows()) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("n", [1, 7, 129, PIECE - 1, PIECE + 8, 3 * PIECE + 12_345])
def test_pieces_are_summed_as_numpy_sums_the_whole(n: int) -> None:
    values = np.sort(np.random.default_rng(n).lognormal(3, 4, n))
    assert pairwise(lambda a, b: values[a:b], 0, n) == values.sum()
    found = learn(lambda a, b: values[a:b], n, False)
    if n > 1:
        assert found.scale == (float(np.float32(values.mean())), float(np.float32(values.std())))
    assert found.quantiles[0] == values[0] and found.quantiles[-1] == values[-1]
    assert learn(lambda a, b: values[a:b], 0, True) == Learnt()


def test_a_mapped_column_is_read_in_pieces(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.int32)
    (tmp_path / "x.bin").write_bytes(values.tobytes())
    mapped = np.memmap(tmp_path / "x.bin", np.int32, "r", shape=(1000,))
    for column in (mapped, values):
        found = list(pieces(column, 300))
        assert [len(part) for part in found] == [300, 300, 300, 100]
        assert np.array_equal(np.concatenate(found), values) and not isinstance(found[0], np.memmap)


# ---------------------------------------------------------------------------------------------------------- the encode
def tight(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """So many bytes for a sorter, of the least memory."""
    monkeypatch.setattr(encoding, "SHARE", limit / 64)
    monkeypatch.setenv("UNBRAID_MEMORY_MB", "64")


def declared(name: str) -> tuple[Data, dict[str, pl.DataFrame]]:
    data, tables = everything(7, n=300)
    if name == "exposure":
        return replace(data, exposure=("user", "item")), tables
    if name == "negatives":
        return replace(
            data, negatives=Negatives("item", 2, labels=("click", "buy", "size", "spend")), tasks=data.tasks[:1]
        ), tables
    if name == "hashed":
        features = (Feature("item", min_count=0, buckets=5), *data.features[1:])
        return replace(data, features=features), tables
    return (EVENTS, make(3)) if name == "events" else (data, tables)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("events", 1), *((name, 1_500) for name in ("everything", "exposure", "negatives", "events", "hashed"))],
)  # with 1 byte each record is a file
def test_a_table_made_on_disk_is_the_same(
    name: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, tables = declared(name)
    whole = Encoded(encode(replace(data, cache=str(tmp_path / "memory")), tables=tables))
    tight(monkeypatch, limit)
    monkeypatch.setattr(encoding, "CHUNK", 40)
    spilled = Encoded(encode(replace(data, cache=str(tmp_path / "disk")), tables=tables))
    same(whole.columns, spilled.columns)
    assert whole.fitted.digest() == spilled.fitted.digest() and whole.about["rows"] == spilled.about["rows"]
    assert sorted(p.name for p in spilled.folder.iterdir()) == sorted(p.name for p in whole.folder.iterdir())


def test_the_bound_is_no_part_of_what_is_made(tmp_path: Path) -> None:
    data, tables = everything()
    assert fingerprint(data, tmp_path, tables) == fingerprint(replace(data, memory_mb=64), tmp_path, tables)
    assert fingerprint(data, tmp_path, tables) != fingerprint(replace(data, time_unit="s"), tmp_path, tables)


def test_a_bound_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, tables = everything()
    with pytest.raises(ValueError, match="`memory_mb` should be at least 64, or 0 for the default. Found 10"):
        replace(data, memory_mb=10)
    monkeypatch.setenv("UNBRAID_MEMORY_MB", "lots")
    with pytest.raises(DataError, match="UNBRAID_MEMORY_MB should be a number of MB, at least 64. Found 'lots'"):
        encode(replace(data, cache=str(tmp_path)), tables=tables)
    assert encode(replace(data, cache=str(tmp_path), memory_mb=64), tables=tables).exists()


# -------------------------------------------------------------------------------------------------------- all by a hash
def test_values_that_are_all_hashed_are_not_counted(tmp_path: Path) -> None:
    data, tables = declared("hashed")
    found = Encoded(encode(replace(data, cache=str(tmp_path)), tables=tables))
    known = found.fitted.vocabularies["item"]
    assert len(known.values) == 0 and known.values.dtype == pl.Int64 and known.size == 7
    codes, items = found.columns["feature.item"], tables["log"]["item"]
    assert set(codes) <= set(range(2, 7)) and len(set(codes)) > 2
    assert np.array_equal(codes, known.encode(items)), "the same hash everywhere"
    with pytest.raises(ValueError, match="`item`: with `min_count` 0 all values are hashed: set `buckets`. Found 0"):
        replace(data, features=(Feature("item", min_count=0), *data.features[1:]))


# --------------------------------------------------------------------------------------------------------------- memory
PEAK = """
import sys
from pathlib import Path
import polars as pl
from unbraid.data.encode import encode
from unbraid.data.declaration import Data, Events, Split
from unbraid.types import Feature, Field, History, Task
folder, memory = Path(sys.argv[1]), int(sys.argv[2])
data = Data(
    rows="rows.parquet", folder=str(folder), user="user", time="time", cache=str(folder / sys.argv[2]), memory_mb=memory,
    features=(Feature("user"), Feature("word"), Feature("x", kind="number")), exposure=("user", "word"),
    fields=(Field("item"), Field("word")), events=(Events(table="events.parquet", columns={"item": "item", "word": "word"}),),
    histories=(History("seen", ("item", "word", "gap"), length=50),), tasks=(Task("click"),),
    split=Split(kind="time", valid_from=900_000_000, test_from=950_000_000),
)
def peak():  # getrusage's counts the parent's, too
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
before = peak()
encode(data)
print(before, peak())
"""


def log_of(folder: Path, events: int) -> None:
    """A number, words, and a user per 20 events."""
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({
        "user": rng.integers(0, events // 20, events), "time": np.sort(rng.integers(0, 10**9, events)),
        "item": rng.integers(0, 50_000, events) * 10**12, "x": rng.normal(size=events),
    }).with_columns(word=pl.lit("word-") + (pl.col("item") // 10**13).cast(pl.String))  # fmt: skip
    frame.drop("x").write_parquet(folder / "events.parquet", row_group_size=100_000)
    rows = frame.gather_every(4).with_columns(click=pl.col("user") % 2)
    rows.write_parquet(folder / "rows.parquet", row_group_size=100_000)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_bounded_by_what_is_asked(tmp_path: Path) -> None:
    log_of(tmp_path, 5_000_000)
    grown = {}
    for memory in (64, 100_000):
        command = [sys.executable, "-c", PEAK, str(tmp_path), str(memory)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, env={**os.environ, "POLARS_MAX_THREADS": "1"}
        )
        before, after = map(int, done.stdout.split())
        grown[memory] = after - before
    assert grown[64] < 64 + 200 and grown[100_000] > grown[64] + 150, grown
    one, two = (next((tmp_path / str(memory)).iterdir()) for memory in (64, 100_000))
    same(Encoded(one).columns, Encoded(two).columns)
