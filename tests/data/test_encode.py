"""What an encoded table holds, when it is made again, and what is left when making it fails."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from unbraid.data import encode as encoding
from unbraid.data.declaration import Data, Events, Join, Negatives, Split
from unbraid.data.encode import encode, encode_query, fingerprint
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.types import Feature, Field, History, Task

NAN = float("nan")
DATA = Data(
    rows="log", features=(Feature("item"),), tasks=(Task("label"),), split=Split(kind="column", column="split"),
)  # fmt: skip
SPLIT = ["train", "train", "train", "train", "valid", "test"]
SIX = pl.DataFrame({"item": list("aabbab"), "label": [0, 1, 0, 1, 0, 1], "split": SPLIT})


def batch(table: Encoded):
    return table.batch(np.arange(table.rows))


def everything(seed: int = 0, n: int = 90) -> tuple[Data, dict[str, pl.DataFrame]]:
    """A declaration with every kind of feature, label and role, and tables for it."""
    rng = np.random.default_rng(seed)

    def holes(values, share=0.15):
        return [None if rng.random() < share else v for v in values]

    log = pl.DataFrame({
        "user": holes([f"u{i}" for i in rng.integers(0, 8, n)]),
        "time": rng.integers(0, 50, n),
        "request": rng.integers(0, 20, n),
        "site": holes(list(rng.choice(["home", "mail"], n))),
        "weight": rng.random(n),
        "item": rng.integers(0, 12, n),
        "code": holes([float(x) for x in rng.integers(0, 5, n) / 2]),
        "flag": holes([bool(x) for x in rng.integers(0, 2, n)]),
        "price": holes([float(x) for x in rng.lognormal(3, 2, n)]),
        "tags": holes([[None if rng.random() < 0.1 else int(t) for t in rng.integers(0, 9, rng.integers(0, 4))]
                       for _ in range(n)]),
        "words": holes([" ".join(rng.choice(["x", "y", "z"], rng.integers(0, 4))) for _ in range(n)]),
        "vector": holes([[float(x) for x in v] for v in rng.normal(size=(n, 3))]),
        "click": rng.integers(0, 2, n),
        "buy": holes([int(x) for x in rng.integers(0, 2, n)]),
        "size": holes(list(rng.choice(["S", "M", "L"], n))),
        "spend": holes([float(x) for x in rng.normal(size=n)]),
        "rate": rng.uniform(0.1, 1, n),
        "part": ["train", "valid", "test"] * (n // 3),
    })  # fmt: skip
    items = pl.DataFrame({"item": range(12), "shop": [f"s{i % 4}" for i in range(12)]})
    data = Data(
        rows="log", user="user", time="time", domain="site", request="request", weight="weight",
        joins=(Join("items", on="item"),),
        features=(
            Feature("item", min_count=2, buckets=3), Feature("shop"), Feature("code"), Feature("flag"),
            Feature("dozen", column="item / 6"),
            Feature("price", kind="number", transform="log1p"), Feature("tags", kind="bag", pooling="sum"),
            Feature("words", kind="bag", separator=" "), Feature("vector", kind="vector"),
        ),
        fields=(Field("item"), Field("shop")),
        events=(Events(columns={"item": "item", "shop": "shop", "click": "click"}),),
        histories=(History("seen", ("item", "shop", "gap"), length=5),
                   History("clicked", ("item",), where="click = 1")),
        tasks=(Task("click", sampling_rate="rate"), Task("buy", given="click", sampling_rate=0.5),
               Task("size", kind="multiclass"), Task("spend", kind="real")),
        split=Split(kind="column", column="part"),
    )  # fmt: skip
    return data, {"log": log, "items": items}


def same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert np.array_equal(one[name], two[name], equal_nan=one[name].dtype.kind == "f"), name


# ------------------------------------------------------------------------------------------------------------ one kind
def test_labels_and_which_are_observed(opened):
    frame = SIX.with_columns(
        buy=pl.Series([None, 1, 1, 0, 1, None]),
        late=pl.Series([1, 1, 0, None, 1, 0]),
        flag=pl.Series([True, False, None, True, False, True]),
        size=pl.Series(["S", "L", None, "M", "S", "M"]),
        number=pl.Series([10, 9, 10, None, 9, 9]),
        spend=pl.Series([0.5, None, -1.0, 2.0, None, 0.0]),
    )
    tasks = (
        Task("label"), Task("buy", given="label"), Task("late", given="buy"), Task("flag"),
        Task("size", kind="multiclass"), Task("number", kind="multiclass"), Task("spend", kind="real"),
        Task("cheap", column="item = 'a'"),
    )  # fmt: skip
    with pytest.raises(
        DataError, match="Task `late`: all 1 observed labels .* are 1"
    ):  # one row has buy = 1, given label
        opened(replace(DATA, tasks=tasks), log=frame)
    tasks = (*tasks[:2], replace(tasks[2], given=""), *tasks[3:])
    table = opened(replace(DATA, tasks=tasks), log=frame)
    found = batch(table)
    observed = {name: value.int().tolist() for name, value in found.observed.items()}
    assert observed == {
        "label": [1] * 6, "buy": [0, 1, 0, 1, 0, 0], "late": [1, 1, 1, 0, 1, 1], "flag": [1, 1, 0, 1, 1, 1],
        "size": [1, 1, 0, 1, 1, 1], "number": [1, 1, 1, 0, 1, 1], "spend": [1, 0, 1, 1, 0, 1], "cheap": [1] * 6,
    }  # fmt: skip
    assert table.schema.classes == {"size": ("L", "M", "S"), "number": ("9", "10")}
    assert found.labels["size"].tolist() == [2, 0, 0, 1, 2, 1] and found.labels["size"].dtype == torch.int64
    assert found.labels["number"].tolist() == [1, 0, 1, 0, 0, 0]
    assert found.labels["flag"].tolist() == [1, 0, 0, 1, 0, 1] and found.labels["flag"].dtype == torch.float32
    assert found.labels["spend"].tolist() == [0.5, 0, -1, 2, 0, 0]
    assert found.labels["cheap"].tolist() == [1, 1, 0, 0, 1, 0]


def test_a_chain_is_masked_link_by_link(opened):
    rows = 12
    frame = pl.DataFrame({
        "item": ["a"] * rows, "split": ["train"] * 8 + ["valid"] * 2 + ["test"] * 2,
        "a": [1, 1, 1, 1, 0, 0, None, 1, 1, 0, 1, None],
        "b": [1, 0, 1, None, 1, 1, 1, 0, 1, 1, None, 1],
        "c": [1, 1, 0, 1, 1, 0, 1, None, 1, 1, 1, 1],
    })  # fmt: skip
    tasks = (Task("a"), Task("b", given="a"), Task("c", given="b"))
    found = batch(opened(replace(DATA, tasks=tasks), log=frame)).observed
    assert found["b"].int().tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert found["c"].int().tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0]


def test_classes_of_floats_and_bools(opened):
    frame = SIX.with_columns(x=pl.Series([1e20, 0.1, 1e20, 2.0, None, 0.1]), y=pl.Series([True, False] * 3))
    tasks = (Task("x", kind="multiclass"), Task("y", kind="multiclass"))
    table = opened(replace(DATA, tasks=tasks), log=frame)
    assert batch(table).labels["x"].tolist() == [2, 0, 2, 1, 0, 0] and batch(table).labels["y"].tolist() == [1, 0] * 3


def test_numbers_are_standardised_with_a_missing_indicator(opened):
    values = [1.0, 2.0, None, 6.0, 100.0, None]
    frame = SIX.with_columns(x=pl.Series(values), whole=pl.Series([1, 2, None, 6, 100, None]),
                             flag=pl.Series([True, False] * 3), empty=pl.Series([None] * 6))  # fmt: skip
    features = (Feature("x", kind="number"), Feature("whole", kind="number"), Feature("flag", kind="number"),
                Feature("log", column="x * -1", kind="number", transform="log1p"),
                Feature("empty", kind="number"))  # fmt: skip
    table = opened(replace(DATA, features=features), log=frame)
    mean, std = 3.0, np.std([1.0, 2.0, 6.0])
    assert table.schema.numbers["x"] == (mean, float(np.float32(std)))
    got = batch(table).features
    want = [[0, 1] if v is None else [(v - mean) / std, 0] for v in values]
    np.testing.assert_allclose(got["x"].numpy(), np.array(want, dtype=np.float32), rtol=1e-6)
    assert torch.equal(got["x"], got["whole"]) and got["x"].dtype == torch.float32
    logs = [-np.log1p(v) for v in (1.0, 2.0, 6.0)]
    np.testing.assert_allclose(got["log"][4, 0], (-np.log1p(100) - np.mean(logs)) / np.std(logs), rtol=1e-6)
    assert got["empty"].tolist() == [[0, 1]] * 6 and table.schema.numbers["empty"] == (0.0, 1.0)


@pytest.mark.parametrize("value", [0.1, 1e9 + 0.1, 1e-30, -3.3, 0.0])
def test_a_constant_number_is_zero_and_never_nan(value, opened):
    n = 20_001  # many: rounding in the sums must not pass for a spread
    frame = pl.DataFrame(
        {"x": [value] * n, "label": [0, 1, 1] * (n // 3), "split": ["train"] * (n - 2) + ["valid", "test"]}
    )
    got = batch(opened(replace(DATA, features=(Feature("x", kind="number"),)), log=frame)).features["x"]
    assert got[:, 1].sum() == 0 and got[:, 0].abs().max() <= abs(value) * 1e-6


def test_a_spread_below_single_precision_is_no_spread(opened):
    """Both values are 32 away from the nearest single-precision numbers: dividing by 0.001 would make that 32,000."""
    frame = SIX.with_columns(x=pl.Series([1e9 + 31.999, 1e9 + 32.001] * 3))
    got = batch(opened(replace(DATA, features=(Feature("x", kind="number"),)), log=frame)).features["x"]
    assert got.abs().max() <= 64


def test_numbers_are_learned_alike_in_every_run(tmp_path):
    rng = np.random.default_rng(0)
    n = 200_000
    frame = pl.DataFrame({"x": rng.normal(0.9, 1e3, n), "y": rng.normal(0, 1, n).cumsum(),
                          "label": rng.integers(0, 2, n),
                          "split": rng.choice(["train", "valid", "test"], n)})  # fmt: skip
    data = replace(DATA, features=(Feature("x", kind="number"), Feature("y", kind="number")))
    found = {
        Encoded(encode(replace(data, cache=str(tmp_path / str(i))), tables={"log": frame})).fitted.digest()
        for i in range(5)
    }
    assert len(found) == 1


def test_bags_from_lists_arrays_and_text(opened):
    frame = SIX.with_columns(
        tags=pl.Series([[3, 1], [], None, [1, None, 1], [9], [3]]),
        pair=pl.Series([[1, 2], [2, 2], None, [1, 1], [7, 1], [1, 2]], dtype=pl.Array(pl.Int64, 2)),
        text=pl.Series(["x|y", "", None, "|x||", "new", "y"]),
    )
    features = (Feature("tags", kind="bag"), Feature("pair", kind="bag"), Feature("text", kind="bag", separator="|"))
    got = batch(opened(replace(DATA, features=features), log=frame)).features

    def lists(name: str) -> list[list[int]]:
        ends = got[name].offsets.tolist()
        return [got[name].values[name][a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)]

    assert lists("tags") == [[3, 2], [], [], [2, 1, 2], [0], [3]]
    assert lists("pair") == [[2, 3], [3, 3], [], [2, 2], [0, 2], [2, 3]]
    assert lists("text") == [[2, 3], [], [], [2], [0], [3]]


def test_vectors_from_lists_and_arrays(opened):
    values = [[1.0, 2.0], None, [0.5, 0.0], [1, 1], [2, 2], [3, 3]]
    frame = SIX.with_columns(
        v=pl.Series(values, dtype=pl.List(pl.Float64)), w=pl.Series(values, dtype=pl.Array(pl.Float32, 2))
    )
    got = batch(
        opened(replace(DATA, features=(Feature("v", kind="vector"), Feature("w", kind="vector"))), log=frame)
    ).features
    assert got["v"].tolist() == [v or [0, 0] for v in values] and torch.equal(got["v"], got["w"])


def test_weights_rates_and_roles_reach_the_batch(opened):
    frame = SIX.with_columns(w=pl.Series([1.0, 0.0, 2.0, 0.5, 1.0, 3.0]), r=pl.Series([0.1, 1.0, 0.5, 1.0, 0.2, 1.0]),
                             u=pl.Series([7, 7, None, 8, 8, 7]), t=pl.Series([5, 4, 3, 2, 1, 0]),
                             d=pl.Series(list("xxyy") + ["x", None]))  # fmt: skip
    tasks = (
        Task("label", sampling_rate="r"),
        Task("again", column="label", sampling_rate=0.25),
        Task("full", column="label"),
    )
    data = replace(DATA, weight="w", user="u", time="t", domain="d", request="u * 2", tasks=tasks)
    table = opened(data, log=frame)
    got = batch(table)
    assert got.weight.tolist() == frame["w"].to_list() and got.weight.dtype == torch.float32
    assert got.meta["sampling_rate.label"].tolist() == pytest.approx(frame["r"].to_list())
    assert got.meta["sampling_rate.again"].tolist() == [0.25] * 6 and "sampling_rate.full" not in got.meta
    assert got.meta["time"].tolist() == frame["t"].to_list()
    user = got.meta["user"].tolist()
    assert user[0] == user[1] == user[5] != user[3] == user[4] and user[2] == 0
    assert got.domain.tolist() == [2, 2, 3, 3, 2, 1] and table.schema.domains == ("(unknown)", "(missing)", "x", "y")
    assert opened(DATA, log=SIX).batch(np.arange(6)).domain.tolist() == [2] * 6  # one domain: all


def test_several_names_for_one_row_batch(opened):
    table = opened(DATA, log=SIX)
    got = table.batch(np.array([5, 0, 5]))
    assert got.row.tolist() == [5, 0, 5] and got.features["item"].tolist() == [3, 2, 3]
    assert [table.split(n).tolist() for n in ("train", "valid", "test", "all")] == [
        [0, 1, 2, 3],
        [4],
        [5],
        list(range(6)),
    ]


# ---------------------------------------------------------------------------------------------- rows to predict, chunks
def test_a_query_equals_the_encoded_rows(opened, arrays, tmp_path):
    data, tables = everything()
    table = opened(data, **tables)
    rows = np.random.default_rng(0).permutation(table.rows)[:40]
    encode_query(data, tables["log"][rows].lazy(), table.fitted, tmp_path, tables=tables)
    query = Encoded(tmp_path, table.fitted)
    one, two = arrays(table.batch(rows)), arrays(query.batch(np.arange(40)))
    assert one.pop("row").tolist() == rows.tolist() and two.pop("row").tolist() == list(range(40))
    same(one, two)
    assert query.split("test").tolist() == list(range(40))


@pytest.mark.parametrize("labels", [(), ("click",), ("size", "spend")])
def test_a_query_needs_neither_labels_nor_roles(labels, opened, arrays, tmp_path):
    data, tables = everything(1)
    table = opened(data, **tables)
    drop = {"click", "buy", "size", "spend", "weight", "request", "part"} - set(labels)
    encode_query(data, tables["log"].drop(drop).lazy(), table.fitted, tmp_path, tables=tables)
    one, two = arrays(batch(table)), arrays(batch(Encoded(tmp_path, table.fitted)))
    for name in two:
        if name.startswith(("features.", "domain")):
            assert np.array_equal(one[name], two[name])
    for task in data.tasks:
        known = {"click"} & set(labels) if task.given else {task.name}
        assert two[f"observed.{task.name}"].any() == (known | {task.name} <= set(labels))


def test_a_query_without_users_where_no_history_needs_them(opened, tmp_path):
    data, tables = everything(2)
    data = replace(data, histories=(), events=(), fields=())
    fitted = opened(data, **tables).fitted
    query = tables["log"].select("site", "item", "code", "flag", "price", "tags", "words", "vector")
    encode_query(data, query.lazy(), fitted, tmp_path, tables=tables)
    assert len(batch(Encoded(tmp_path, fitted))) == 90


@pytest.mark.parametrize("column", ["item", "code", "price", "tags", "words", "vector", "site", "user", "time"])
def test_a_query_without_a_column_says_which(column, opened, tmp_path):
    data, tables = everything(3)
    fitted = opened(data, **tables).fitted
    with pytest.raises(DataError, match=f"`{column}`.*Columns: "):
        encode_query(data, tables["log"].drop(column).lazy(), fitted, tmp_path, tables=tables)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (pl.col("item").cast(pl.String), ["`items`", "`item`", "String"]),
        (pl.col("code").cast(pl.String), ["Feature `code`", "String", "Float64"]),
        (pl.col("site").is_null().alias("site"), ["data.domain", "Int64", "String"]),
        (pl.lit("x").alias("price"), ["Feature `price`", "number", "String"]),
        (pl.lit(1).alias("user"), ["`user`", "String", "Int64"]),
        (pl.lit(NAN).alias("price"), ["Feature `price`", "NaN", "90 rows", 'nan = "missing"']),
        (pl.lit("XL").alias("size"), ["Task `size`", "XL", "training split"]),
        (pl.lit([1.0, 2.0]).alias("vector"), ["Feature `vector`", "length 3", "90 rows"]),
    ],
)
def test_a_query_of_other_types(edit, words, opened, tmp_path):
    data, tables = everything(4)
    fitted = opened(data, **tables).fitted
    with pytest.raises(DataError) as error:
        encode_query(data, tables["log"].with_columns(edit).lazy(), fitted, tmp_path, tables=tables)
    assert all(word in str(error.value) for word in words), error.value


def test_a_query_of_nulls_is_missing_everywhere(opened, tmp_path):
    data, tables = everything(5)
    fitted = opened(data, **tables).fitted
    columns = ["item", "code", "flag", "price", "site", "user"]
    nulls = tables["log"].with_columns(pl.lit(None).alias(c) for c in columns if c not in ("item", "user"))
    encode_query(data, nulls.lazy(), fitted, tmp_path, tables=tables)
    got = batch(Encoded(tmp_path, fitted))
    assert set(got.features["code"].tolist()) == {1} and set(got.domain.tolist()) == {1}
    assert got.features["price"].tolist() == [[0, 1]] * 90


def test_an_empty_query(opened, tmp_path):
    data, tables = everything(6)
    fitted = opened(data, **tables).fitted
    with pytest.raises(DataError, match="no rows to predict"):
        encode_query(data, tables["log"].clear().lazy(), fitted, tmp_path, tables=tables)


@pytest.mark.parametrize("negatives", [None, Negatives("item", 2, labels=("click", "buy", "size", "spend"))])
def test_chunks_change_nothing(negatives, tmp_path, arrays, monkeypatch):
    data, tables = everything(7)
    if negatives:
        data = replace(data, negatives=negatives, tasks=data.tasks[:1])
    found = []
    for chunk in (7, 200_000):
        monkeypatch.setattr(encoding, "CHUNK", chunk)
        found.append(Encoded(encode(replace(data, cache=str(tmp_path / str(chunk))), tables=tables)))
    assert found[0].fitted.digest() == found[1].fitted.digest()
    same(arrays(batch(found[0])), arrays(batch(found[1])))
    for name, column in found[0].columns.items():
        assert np.array_equal(column, found[1].columns[name], equal_nan=column.dtype.kind == "f"), name


# ----------------------------------------------------------------------------------------------------- made once, whole
def written(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_second_encode_reuses_the_first(tmp_path):
    pl.concat([SIX] * 5).write_parquet(tmp_path / "log.parquet")
    data = replace(DATA, rows="log.parquet", cache=str(tmp_path / "one"))
    first = encode(data, tmp_path)
    before = written(first)
    assert encode(data, tmp_path) == first and written(first) == before
    other = encode(replace(data, cache=str(tmp_path / "two")), tmp_path)
    assert other.name == first.name and other != first  # the cache is not part of the declaration
    assert encode(replace(data, folder=str(tmp_path)), tmp_path / "elsewhere").parent == first.parent


def test_what_changes_a_fingerprint(tmp_path, opened):
    SIX.write_parquet(tmp_path / "log.parquet")
    items = pl.DataFrame({"item": ["a", "b"], "shop": [1, 2]})
    items.write_parquet(tmp_path / "items.parquet")
    data = replace(DATA, rows="log.parquet", joins=(Join("items.parquet", "item"),))
    names = [fingerprint(data, tmp_path, None)]
    names.append(fingerprint(replace(data, features=(Feature("item", min_count=2),)), tmp_path, None))
    names.append(fingerprint(replace(data, keep="label = 1"), tmp_path, None))
    SIX.reverse().write_parquet(tmp_path / "log.parquet")
    names.append(fingerprint(data, tmp_path, None))
    os.utime(tmp_path / "items.parquet", ns=(1, 1))
    names.append(fingerprint(data, tmp_path, None))
    fitted = opened(DATA, log=SIX).fitted
    names += [fingerprint(data, tmp_path, None, fitted), fingerprint(data, tmp_path, None, None, fitted)]
    assert len(set(names)) == len(names)
    assert fingerprint(data, tmp_path, None) == names[4]


@pytest.mark.parametrize("name", ["log", "rows"])
def test_tables_in_memory_count_by_their_content_and_order(name, tmp_path):
    data = replace(DATA, rows=name)
    frames = [SIX, SIX.reverse(), SIX.with_columns(item=pl.lit("a")), SIX.cast({"label": pl.Int8}), SIX[:5]]
    names = [fingerprint(data, tmp_path, {name: f}) for f in frames]
    assert len(set(names)) == len(names)
    assert fingerprint(data, tmp_path, {name: SIX.clone().lazy()}) == names[0]


def test_an_exception_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    data, tables = everything(8)
    data = replace(data, cache=str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "CHUNK", 20)
    calls, write_rows = [], encoding.write_rows

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        write_rows(*args)

    monkeypatch.setattr(encoding, "write_rows", failing)
    with pytest.raises(MemoryError):
        encode(data, tables=tables)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(encoding, "write_rows", write_rows)
    assert len(batch(Encoded(encode(data, tables=tables)))) == 90


SCRIPT = """
import sys, time, resource, signal
from pathlib import Path
sys.path.insert(0, {tests!r})
import polars as pl
from unbraid.data import encode as encoding
from test_encode import DATA, everything
from dataclasses import replace
cache = Path(sys.argv[1])
data, tables = everything(9)
data = replace(data, cache=str(cache))
"""


def start(code: str, *args: object) -> subprocess.Popen:
    script = SCRIPT.format(tests=str(Path(__file__).parent)) + code
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_killed_encode_leaves_nothing_that_counts(tmp_path):
    code = """
encoding.CHUNK = 20
write_rows = encoding.write_rows
def slow(*args):
    write_rows(*args)
    (cache / "started").touch()
    time.sleep(60)
encoding.write_rows = slow
encoding.encode(data, tables=tables)
"""
    process = start(code, tmp_path)
    until = time.time() + 60
    while not (tmp_path / "started").exists() and process.poll() is None and time.time() < until:
        time.sleep(0.05)
    assert process.poll() is None, process.stdout.read().decode()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (tmp_path / "started").unlink()
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and not list(tmp_path.glob("*/columns.json"))
    data, tables = everything(9)
    final = encode(replace(data, cache=str(tmp_path)), tables=tables)
    assert len(batch(Encoded(final))) == 90
    assert list(tmp_path.iterdir()) == [final]  # what the dead process left is gone


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    """A limit on the size of a file stands in for the disk."""
    code = """
n = 200_000
split = ["train", "valid", "test", "train"] * (n // 4)
log = pl.DataFrame({"item": range(n), "label": [0, 1] * (n // 2), "split": split})
data, tables = replace(DATA, cache=str(cache)), {"log": log}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    encoding.encode(data, tables=tables)
except OSError as error:
    print("OSError", error.errno, error)
"""
    process = start(code, tmp_path)
    out = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0 and out.startswith(f"OSError {errno.EFBIG}"), out
    assert "Traceback" not in out and "Exception ignored" not in out, out
    for word in ("Cannot write the encoded table", str(tmp_path), "bytes are free", "data.cache", "UNBRAID_CACHE"):
        assert word in out
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_once(tmp_path, monkeypatch):
    """The slower one takes what the faster one has made."""
    data = replace(DATA, cache=str(tmp_path))
    write, inside = encoding.write, []

    def racing(*args, **kwargs):
        if not inside:
            inside.append(1)
            encode(data, tables={"log": SIX})
        write(*args, **kwargs)

    monkeypatch.setattr(encoding, "write", racing)
    final = encode(data, tables={"log": SIX})
    assert list(tmp_path.iterdir()) == [final] and len(Encoded(final).batch(np.arange(6))) == 6


def test_a_broken_folder_is_never_taken_for_whole(opened):
    table = opened(DATA, log=SIX)
    place = table.folder / table.about["columns"]["feature.item"]["file"]
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(DataError, match="feature.item.*should have 6 bytes. Found 5.*Delete"):
        Encoded(table.folder)
    place.unlink()
    with pytest.raises(DataError, match="Delete"):
        Encoded(table.folder)
    (table.folder / "columns.json").write_text("{")
    with pytest.raises(DataError, match="is not an encoded table.*Delete"):
        Encoded(table.folder)


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("tasks", "columns", "words"),
    [
        ((Task("y"),), {"y": [0, 1, 2, 7, 0, 1]}, ["Task `y`", "0 or 1", "[2.0, 7.0]", "2 rows", "multiclass"]),
        ((Task("y"),), {"y": [0, 1, 0, 1, 0, -1]}, ["Task `y`", "0 or 1", "-1.0", "1 rows"]),
        ((Task("y"),), {"y": [0, 1, 0.5, 1, 0, 1]}, ["Task `y`", "0 or 1", "0.5"]),
        ((Task("y"),), {"y": ["no", "yes"] * 3}, ["Task `y`", "0 or 1", "String", "multiclass", "SQL"]),
        ((Task("y"),), {"y": [0, 1, NAN, 1, 0, 1]}, ["Task `y`", "1 labels are NaN", "nulls"]),
        ((Task("y"),), {"y": [1, 1, 1, 1, 0, 0]}, ["Task `y`", "all 4 observed labels", "are 1", "both classes"]),
        ((Task("y"),), {"y": [None, None, None, None, 0, 1]}, ["Task `y`", "no label is observed", "training split"]),
        ((Task("y", kind="real"),), {"y": [0.0, NAN, NAN, 1, 2, 3]}, ["Task `y`", "2 labels are NaN", "nulls"]),
        ((Task("y", kind="real"),), {"y": [0.0, float("inf"), 1, 1, 2, 3]}, ["Task `y`", "1 labels are infinite"]),
        ((Task("y", kind="real"),), {"y": list("abcdef")}, ["Task `y`", "numbers", "String"]),
        ((Task("y", kind="multiclass"),), {"y": list("aabbac")}, ["Task `y`", "['c']", "training split", "('a', 'b')"]),
        ((Task("y", kind="multiclass"),), {"y": [0, 1, NAN, 1, NAN, 1]}, ["Task `y`", "2 labels are NaN", "nulls"]),
        ((Task("y", kind="multiclass"),), {"y": list("aaaabc")}, ["Task `y`", "1 class", "two are needed"]),
        ((Task("nothing"),), {}, ["Task `nothing`", "no column `nothing`", "item, label, split"]),
        (
            (Task("label", sampling_rate="r"),),
            {"r": [0.5, 0, 1, 2, 1, None]},
            ["Sampling rate", "`label`", "(0, 1]", "3 rows"],
        ),
        ((Task("label", sampling_rate="r"),), {}, ["Sampling rate", "`label`", "no column `r`"]),
    ],
)
def test_bad_labels(tasks, columns, words, opened):
    frame = SIX.with_columns(pl.Series(k, v, strict=False) for k, v in columns.items())
    with pytest.raises(DataError) as error:
        opened(replace(DATA, tasks=tasks), log=frame)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("change", "columns", "words"),
    [
        (
            {"features": (Feature("x", kind="number"),)},
            {"x": [1, 2, NAN, 1, 1, NAN]},
            ["`x`", "NaN", "1 rows", 'nan = "missing"'],
        ),
        (
            {"features": (Feature("x", kind="number"),)},
            {"x": [1, 2, 3, 1, 1, NAN]},
            ["`x`", "NaN", "1 rows", 'nan = "missing"'],
        ),
        (
            {"features": (Feature("x", kind="number"),)},
            {"x": list("abcdef")},
            ["Feature `x`", "needs numbers", "String"],
        ),
        (
            {"features": (Feature("x", kind="number", nan="missing"),)},
            {"x": [1, 2, float("inf"), 1, 1, 1]},
            ["`x`", "infinity"],
        ),
        ({"features": (Feature("x"),)}, {}, ["Feature `x`", "no column `x`", "item, label, split"]),
        ({"features": (Feature("x", column="item +* 2"),)}, {}, ["Feature `x`", "neither a column nor an SQL"]),
        ({"features": (Feature("x", column="y + z"),)}, {}, ["Feature `x`", "no column `y`, `z`"]),
        ({"features": (Feature("x"),)}, {"x": [[1]] * 6}, ["Feature `x`", "lists", "bag", "vector"]),
        (
            {"features": (Feature("item", kind="bag"),)},
            {},
            ["Feature `item`", "bag needs lists", "separator", "String"],
        ),
        ({"features": (Feature("item", kind="vector"),)}, {}, ["Feature `item`", "vector needs lists", "String"]),
        ({"features": (Feature("x", kind="vector"),)}, {"x": [[1.0], [1.0, 2.0]] * 3}, ["`x`", "one length", "[1, 2]"]),
        (
            {"features": (Feature("x", kind="vector"),)},
            {"x": [[1.0]] * 5 + [[1.0, 2.0]]},
            ["`x`", "length 1", "1 rows"],
        ),
        ({"features": (Feature("x", kind="vector"),)}, {"x": [[1.0]] * 5 + [[NAN]]}, ["`x`", "finite numbers"]),
        ({"features": (Feature("x", kind="vector"),)}, {"x": [[1.0]] * 5 + [[None]]}, ["`x`", "finite numbers"]),
        ({"weight": "w"}, {"w": [1, 1, None, 1, 1, 1]}, ["`w`", "weights", "without nulls"]),
        ({"weight": "w"}, {"w": [1, 1, -1, 1, 1, 1]}, ["`w`", "not negative"]),
        ({"weight": "w"}, {"w": [1, 1, NAN, 1, 1, 1]}, ["`w`", "finite"]),
        ({"domain": "nowhere"}, {}, ["data.domain", "no column `nowhere`"]),
        ({"time": "t"}, {"t": [1, 2, 3, None, 5, 6]}, ["`t`", "1 rows have no time"]),
        ({"time": "t"}, {"t": list("abcdef")}, ["`t`", "integer", "String", "TIMESTAMP"]),
        ({"features": (Feature("x", column="item + 1"),)}, {}, ["log", "item"]),
    ],
)
def test_bad_columns(change, columns, words, opened):
    frame = SIX.with_columns(pl.Series(k, v, strict=False) for k, v in columns.items())
    with pytest.raises(DataError) as error:
        opened(replace(DATA, **change), log=frame)
    assert all(word in str(error.value) for word in words), error.value


def test_a_nan_is_missing_where_the_feature_says_so(opened):
    frame = SIX.with_columns(x=pl.Series([1.0, 3.0, NAN, None, 2.0, NAN]))
    got = batch(opened(replace(DATA, features=(Feature("x", kind="number", nan="missing"),)), log=frame)).features["x"]
    assert got.tolist() == [[-1, 0], [1, 0], [0, 1], [0, 1], [0, 0], [0, 1]]
