"""Dictionaries on disk find what a table in memory finds, take no memory, and change nothing that is encoded."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from test_encode import everything, same

from unbraid.data import dictionary
from unbraid.data.dictionary import Dictionary, packed, pieces, text_hash, write
from unbraid.data.encode import encode
from unbraid.data.fitted import Fitted
from unbraid.data.source import DataError
from unbraid.data.spill import Room
from unbraid.data.table import Encoded
from unbraid.data.vocabulary import Vocabulary, fit


def some(kind: str, count: int, seed: int = 0) -> pl.Series:
    """Sorted values: texts have 0 to 30 bytes, common beginnings and zero bytes, and differ in their ends alone."""
    rng = np.random.default_rng(seed)
    if kind == "String":
        texts = {"ab\0ü"[rng.integers(4)] * int(n) + "cü\0"[rng.integers(3)] for n in rng.integers(0, 30, 20 * count)}
        return pl.Series("value", sorted({"", *texts}, key=str.encode)[:count])
    numbers = np.unique(rng.integers(-(2**62), 2**62, count))
    return pl.Series("value", numbers if kind == "Int64" else numbers / 2**50)


@pytest.mark.parametrize("size", [1, 2, 7, 90])
@pytest.mark.parametrize("kind", ["Int64", "Float64", "String"])
def test_it_is_read_and_searched_like_a_series(
    kind: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionary, "PIECE", 7)
    values = some(kind, size)
    found = write(tmp_path / "x.bin", values.dtype, [values[:3], values[3:3], values[3:]])
    assert len(found) == len(values) and found.dtype == values.dtype
    assert pl.concat(list(pieces(found))).equals(values)
    assert [found[i] for i in range(len(values))] == values.to_list()
    others = some(kind, 60, seed=1)
    asked = pl.concat([values, others, pl.Series([None], dtype=values.dtype), values[:5]])
    asked = asked.sample(fraction=1, shuffle=True, seed=0)
    table = {value: place for place, value in enumerate(values)}
    want = [table.get(value, -1) for value in asked]
    assert -1 in want and found.find(asked).tolist() == want
    for buckets in (0, 3):
        on_disk, in_memory = Vocabulary(found, buckets), Vocabulary(values, buckets)
        assert np.array_equal(on_disk.encode(asked), in_memory.encode(asked))
        assert on_disk.names() == in_memory.names() and on_disk.size == in_memory.size


def test_nothing_asked_and_nan(tmp_path: Path) -> None:
    for kind in ("Int64", "Float64", "String"):
        found = write(tmp_path / f"{kind}.bin", getattr(pl, kind), [some(kind, 9)])
        assert found.find(pl.Series(dtype=found.dtype)).tolist() == []
        assert found.find(pl.Series([None, None], dtype=found.dtype)).tolist() == [-1, -1]
    floats = write(tmp_path / "f.bin", pl.Float64, [pl.Series([-1.0, 0.0, 2.5])])
    assert floats.find(pl.Series([float("nan"), -0.0, float("inf"), 2.5])).tolist() == [-1, 1, -1, 2]


def test_texts_of_one_hash_are_not_taken_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary, "text_hash", lambda text, at, lengths: lengths.astype(np.uint64) % np.uint64(3))
    values = some("String", 80)
    found = write(tmp_path / "x.bin", pl.String, [values])
    assert found.find(values).tolist() == list(range(len(values)))
    assert found.find(values + "?").tolist() == [-1] * len(values)


def test_hashes_of_texts_never_change() -> None:
    """Dictionaries that are on disk rest on these numbers; they do not depend on what stands beside a text."""
    texts = pl.Series(["", "a", "a\0", "é", "12345678", "123456789"])
    want = [
        11400714819323198485, 1387786489429541378, 9312843868474496213, 6764256505181634929, 3015996426345890344,
        11616373762214505143,
    ]  # fmt: skip
    assert text_hash(*packed(texts)).tolist() == want
    assert [text_hash(*packed(texts[i : i + 1])).item() for i in range(len(texts))] == want


@pytest.mark.parametrize("kind", ["Int64", "String"])
def test_files_do_not_depend_on_how_values_came(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, found = some(kind, 80), []
    for piece, cut in ((1000, 80), (3, 11), (1, 50)):
        monkeypatch.setattr(dictionary, "PIECE", piece)
        folder = tmp_path / str(piece)
        folder.mkdir()
        made = write(folder / "x.bin", values.dtype, [values[:cut], values[cut:]])
        found.append((made.digest, {path.name: path.read_bytes() for path in folder.iterdir()}))
    assert found[0] == found[1] == found[2] and len(found[0][1]) == (4 if kind == "String" else 1)
    other = write(tmp_path / "y.bin", values.dtype, [values[:-1]])
    assert other.digest != found[0][0]


def test_a_digest_tells_texts_of_the_same_bytes_apart(tmp_path: Path) -> None:
    one, two = (
        write(tmp_path / f"{n}.bin", pl.String, [pl.Series(x)]) for n, x in enumerate((["a", "bc"], ["ab", "c"]))
    )
    assert one.digest != two.digest


@pytest.mark.parametrize("kind", ["Int64", "String"])
def test_a_copy_stands_alone_and_another_process_maps_the_files(kind: str, tmp_path: Path) -> None:
    values = some(kind, 50)
    for name in "abc":
        (tmp_path / name).mkdir()
    one = write(tmp_path / "a" / "x.bin", values.dtype, [values])
    (tmp_path / "a").rename(tmp_path / "d")  # as an encoded table gets its name
    two = dictionary.copy(one, tmp_path / "b" / "y.bin")
    del one
    shutil.rmtree(tmp_path / "d")
    assert two.find(values).tolist() == list(range(50))
    plain = pickle.dumps(two)
    three = pickle.loads(plain)
    assert len(plain) < 500 and three[7] == values[7] and three.digest == two.digest


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_it_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """64 MB of values and 24 MB of what finds them, all of which is read."""

    def own() -> int:
        said = Path("/proc/self/status").read_text()
        return int(said.split("RssAnon:")[1].split()[0]) // 1024

    words = pl.Series([f"{n:08d}" for n in range(1 << 18)])
    numbers = np.arange(1 << 23)
    numbers.tofile(tmp_path / "n.bin")
    del numbers
    texts = write(tmp_path / "t.bin", pl.String, [words])
    asked = words.sample(1000, seed=0)
    texts.find(asked)
    before = own()
    found = Dictionary(tmp_path / "n.bin", pl.Int64)
    assert found.find(pl.Series(range(0, 1 << 23, 1 << 10))).max() == (1 << 23) - (1 << 10)
    assert all(piece[0] >= 0 for piece in pieces(found))
    assert Dictionary(tmp_path / "t.bin", pl.String).find(asked).min() >= 0
    assert own() - before < 16, "MiB"


# ---------------------------------------------------------------------------------------------------- vocabularies of them
def test_a_fit_is_the_same_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    readers = [
        [pl.DataFrame({"value": np.unique(rng.integers(0, 500, 200))}).with_columns(count=pl.col("value") % 5)]
        for _ in range(2)
    ]
    old = Vocabulary(pl.Series(np.unique(rng.integers(0, 900, 80))))
    room = Room(tmp_path, 1 << 20)
    for given, grow in ((readers, None), (readers, old), (readers[:1], None), ([], old)):
        monkeypatch.setattr(dictionary, "LARGE", 1 << 20)
        want = fit(given, pl.Int64, 3, 7, grow, room)
        monkeypatch.setattr(dictionary, "LARGE", 20)
        monkeypatch.setattr(dictionary, "PIECE", 16)
        for before in (grow, grow and Vocabulary(write(tmp_path / "old.bin", pl.Int64, [grow.values]))):
            found = fit(given, pl.Int64, 3, 7, before, room)
            assert isinstance(want.values, pl.Series) and isinstance(found.values, Dictionary)
            assert pl.concat(list(pieces(found.values))).equals(want.values) and found.size == want.size
    texts = fit(
        [[pl.DataFrame({"value": [f"{n:03d}" for n in range(50)], "count": [1] * 50})]], pl.String, 1, 0, None, room
    )
    assert texts.values[49] == "049" and found.values[0] == want.values[0], "each has files of its own"


def test_a_damaged_dictionary_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[..., Any]
) -> None:
    monkeypatch.setattr(dictionary, "LARGE", 2)
    data, tables = everything(7)
    opened(data, **tables).fitted.save(tmp_path)
    said = json.loads((tmp_path / "schema.json").read_text())["vocabularies"]
    files = sorted(path.name for path in (tmp_path / "vocabularies").iterdir())
    assert {one["file"] for one in said.values()} <= set(files) and any(name.endswith(".ends.bin") for name in files)
    for name in files:
        path = tmp_path / "vocabularies" / name
        whole = path.read_bytes()
        for left in (whole[:-8], b""):
            path.write_bytes(left)
            with pytest.raises(DataError, match="ocabular.*should hold|readable schema and vocabularies"):
                Fitted.load(tmp_path)
        path.unlink()
        with pytest.raises(DataError, match="readable schema and vocabularies"):
            Fitted.load(tmp_path)
        path.write_bytes(whole)
    Fitted.load(tmp_path)


def test_a_large_vocabulary_of_parquet_becomes_a_dictionary_when_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[..., Any]
) -> None:
    data, tables = everything(7)
    before = opened(data, **tables).fitted
    monkeypatch.setattr(dictionary, "LARGE", 2)
    before.save(tmp_path)
    after = Fitted.load(tmp_path)
    assert any(isinstance(one.values, Dictionary) for one in after.vocabularies.values())
    for name, one in after.vocabularies.items():
        assert pl.concat(list(pieces(one.values))).equals(before.vocabularies[name].values)


# -------------------------------------------------------------------------------------------------------------- everything
@pytest.mark.parametrize("name", ["chunks", "everything"])
def test_encoded_tables_are_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, tables = everything(7, n=300)
    if name == "chunks":
        monkeypatch.setattr("unbraid.data.encode.CHUNK", 40)
        monkeypatch.setattr(dictionary, "PIECE", 3)
    found = {}
    for large in (1 << 20, 2):
        monkeypatch.setattr(dictionary, "LARGE", large)
        found[large] = Encoded(encode(dataclasses.replace(data, cache=str(tmp_path / str(large))), tables=tables))
    one, two = found.values()
    same(one.columns, two.columns)
    assert one.schema == two.schema and one.about == two.about
    assert not list(two.folder.rglob("dictionaries")), "what was counted is gone"
    kinds = {v.values.dtype for v in two.fitted.vocabularies.values() if isinstance(v.values, Dictionary)}
    assert len(kinds) > 1 and not any(isinstance(v.values, Dictionary) for v in one.fitted.vocabularies.values())
