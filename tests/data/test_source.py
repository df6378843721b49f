"""Files, joins, splits and declarations: what is read, and what a mistake is told."""

from __future__ import annotations

import datetime as dt
import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from unbraid import config
from unbraid.data import source as src
from unbraid.data.declaration import SPLITS, Data, Events, Join, Negatives, Split, Text
from unbraid.data.encode import encode
from unbraid.data.source import DataError, instant, scan, scan_given
from unbraid.data.table import Encoded
from unbraid.types import Feature, Field, History, Task

DATA = Data(
    rows="log.parquet", features=(Feature("item"),), tasks=(Task("label"),), split=Split(kind="column", column="split"),
)  # fmt: skip
N = 12
LOG = pl.DataFrame({
    "item": [f"i{i % 4}" for i in range(N)],
    "key": [i % 3 for i in range(N)],
    "label": [0, 1] * (N // 2),
    "split": ["train"] * 8 + ["valid"] * 2 + ["test"] * 2,
    "day": [dt.date(2022, 5, 1 + i) for i in range(N)],
})  # fmt: skip


def codes(table: Encoded, name: str = "item") -> list[int]:
    return table.batch(np.arange(table.rows)).features[name].tolist()


def splits(table: Encoded) -> list[str]:
    return [SPLITS[code] for code in table.columns["split"]]


# ---------------------------------------------------------------------------------------------------------------- files
def test_parquet_csv_folders_and_globs_read_alike(tmp_path):
    (tmp_path / "parts" / "deep").mkdir(parents=True)
    (tmp_path / "texts").mkdir()
    LOG.write_parquet(tmp_path / "log.parquet")
    LOG.write_csv(tmp_path / "log.csv")
    LOG[:5].write_parquet(tmp_path / "parts" / "1.parquet")
    LOG[5:9].write_parquet(tmp_path / "parts" / "2.parquet")
    LOG[9:].write_parquet(tmp_path / "parts" / "deep" / "3.parquet")
    (tmp_path / "parts" / "_SUCCESS").touch()
    for i in range(3):
        LOG[4 * i : 4 * i + 4].write_csv(tmp_path / "texts" / f"{i}.csv")
    LOG.write_parquet(tmp_path / "odd[1].parquet")
    (tmp_path / "packed" / "deep").mkdir(parents=True)
    LOG[:4].lazy().sink_csv(tmp_path / "packed" / "0.csv.gz", compression="gzip")
    LOG[4:9].write_csv(tmp_path / "packed" / "1.csv")
    LOG[9:].lazy().sink_csv(tmp_path / "packed" / "deep" / "2.csv.zst", compression="zstd")
    LOG.write_csv(tmp_path / "log.tsv", separator="\t")
    LOG.lazy().sink_csv(tmp_path / "log.tsv.gz", separator="\t", compression="gzip")
    want = codes(Encoded(encode(DATA, tmp_path)))
    names = ["log.csv", "parts", "texts", "texts/*.csv", "texts/[0-2].csv", "parts/**/*.parquet", "odd[1].parquet",
             "packed", "log.tsv", "log.tsv.gz",
             str(tmp_path / "log.csv"), str(tmp_path / "texts" / "?.csv")]  # fmt: skip
    for name in names:
        assert codes(Encoded(encode(replace(DATA, rows=name), tmp_path))) == want, name
    assert codes(Encoded(encode(replace(DATA, folder=str(tmp_path)), tmp_path / "elsewhere"))) == want
    assert codes(Encoded(encode(replace(DATA, rows="given"), tables={"given": LOG.lazy()}))) == want


def test_missing_truncated_and_mixed_files(tmp_path):
    (tmp_path / "two").mkdir()
    LOG.write_parquet(tmp_path / "two" / "a.parquet")
    with pytest.raises(DataError, match=r"no table `log.parquet` \(looked for .*log.parquet\). In .*: two"):
        encode(DATA, tmp_path)
    with pytest.raises(DataError, match="no table `no\\*.parquet`"):
        encode(replace(DATA, rows="no*.parquet"), tmp_path)
    with pytest.raises(DataError, match="the folder does not exist"):
        encode(replace(DATA, folder="nowhere"), tmp_path)
    whole = (tmp_path / "two" / "a.parquet").read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "log.parquet").write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"log.parquet cannot be read \({size:,} bytes\).*Write the file again"):
            encode(DATA, tmp_path)
    middle = bytearray(whole)
    middle[10:200] = bytes(190)  # the footer is whole, a page is not
    (tmp_path / "log.parquet").write_bytes(middle)
    with pytest.raises(DataError, match="log.parquet.*cannot be read"):
        encode(DATA, tmp_path)
    (tmp_path / "log.csv").write_text("")
    with pytest.raises(DataError, match="log.csv cannot be read"):
        encode(replace(DATA, rows="log.csv"), tmp_path)
    LOG.write_csv(tmp_path / "two" / "b.csv")
    with pytest.raises(DataError, match="`two`.*of one kind.*csv.*parquet"):
        encode(replace(DATA, rows="two"), tmp_path)
    (tmp_path / "log.json").touch()
    with pytest.raises(DataError, match=r"one kind: .parquet, .csv or .tsv.*Found \['.json'\]"):
        scan("", "log.json", tmp_path)


@pytest.mark.parametrize(("suffix", "how"), [(".csv.gz", "gzip"), (".tsv.zst", "zstd")])
def test_compressed_text_that_is_cut_short_or_has_no_rows(suffix, how, tmp_path):
    mark = "\t" if "tsv" in suffix else ","
    pl.concat([LOG] * 500).lazy().sink_csv(tmp_path / f"log{suffix}", compression=how, separator=mark)
    LOG[:0].lazy().sink_csv(tmp_path / f"head{suffix}", compression=how, separator=mark)
    with pytest.raises(DataError, match="a header and no rows"):
        scan("", f"head{suffix}", tmp_path)
    whole = (tmp_path / f"log{suffix}").read_bytes()
    (tmp_path / f"log{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=rf"log{suffix} cannot be read \({len(whole) // 2:,} bytes\).*Write the file again"
    ):
        encode(replace(DATA, rows=f"log{suffix}"), tmp_path)


def test_rows_to_predict_may_be_compressed_otherwise(tmp_path):
    (tmp_path / "log.txt").write_text(LOG.write_csv(separator="|", include_header=False))
    text = (Text("log.txt", tuple(LOG.columns), "|"),)
    (tmp_path / "new.txt.gz").write_bytes(gzip.compress((tmp_path / "log.txt").read_bytes()))
    found = scan_given(tmp_path / "new.txt.gz", replace(DATA, rows="log.txt", text=text)).collect()
    assert found.columns == LOG.columns and len(found) == N


def test_files_and_values_that_do_not_fit_together(tmp_path):
    (tmp_path / "parts").mkdir()
    LOG[:6].write_parquet(tmp_path / "parts" / "1.parquet")
    LOG[6:].with_columns(pl.lit(1.5).alias("item")).write_parquet(tmp_path / "parts" / "2.parquet")
    with pytest.raises(DataError, match="parts.*cannot be read as declared"):
        encode(replace(DATA, rows="parts"), tmp_path)
    many = pl.concat([LOG.select("item", "label", "split")] * 200)
    text = many.write_csv().replace("i0,", "1,").replace("i1,", "1,").replace("i2,", "1,").replace("i3,", "1,")
    (tmp_path / "late.csv").write_text(text + "word,1,train\n")
    late = replace(DATA, rows="late.csv", features=(Feature("item", "number"),))
    with pytest.raises(
        DataError, match="late.csv: column `item` is read as a number, and `word` in line 2,402 is none"
    ):
        encode(late, tmp_path)
    assert Encoded(encode(replace(DATA, rows="late.csv"), tmp_path)).schema.sizes["item"] == 4, "an id may be a word"


def test_keep_and_duplicates(tmp_path):
    pl.concat([LOG, LOG[:3]]).write_parquet(tmp_path / "log.parquet")
    assert Encoded(encode(DATA, tmp_path)).rows == N + 3
    assert Encoded(encode(replace(DATA, drop_duplicates=True), tmp_path)).rows == N
    kept = Encoded(encode(replace(DATA, keep="item IN ('i1', 'i2')", drop_duplicates=True), tmp_path))
    assert codes(kept) == [2, 3] * 3 and kept.schema.sizes["item"] == 4
    with pytest.raises(DataError, match="data.keep.*no column `itme`"):
        encode(replace(DATA, keep="itme = 'i1'"), tmp_path)
    with pytest.raises(DataError, match="split is empty"):
        encode(replace(DATA, keep="item = 'nothing'"), tmp_path)


# ---------------------------------------------------------------------------------------------------------------- joins
def test_joins_keep_rows_and_order_whatever_the_key_type(opened):
    right = pl.DataFrame({"key": pl.Series([2, 0, 7], dtype=pl.Int16), "shop": ["two", "zero", "seven"]})
    more = pl.DataFrame({"shop": ["zero", "two"], "town": ["Z", None]}).cast({"shop": pl.Categorical})
    data = replace(DATA, rows="log", joins=(Join("right", "key"), Join("more", "shop")),
                   features=(Feature("shop"), Feature("town"), Feature("key")))  # fmt: skip
    table = opened(data, log=LOG, right=right, more=more)
    assert codes(table, "shop") == [3, 1, 2] * 4 and codes(table, "key") == [2, 3, 4] * 4
    assert codes(table, "town") == [2, 1, 1] * 4
    names = table.fitted.vocabularies
    assert names["shop"].values.to_list() == ["two", "zero"]  # seven is in no training row


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (pl.DataFrame({"key": [0, 1, 1], "shop": [1, 2, 3]}), ["`right`", "`key` should be unique", "3 rows, 2 keys"]),
        (pl.DataFrame({"kee": [0, 1], "shop": [1, 2]}), ["`right`", "no column `key`"]),
        (pl.DataFrame({"key": ["0", "1"], "shop": [1, 2]}), ["`right`", "`key` is Int64 in the rows and String"]),
        (pl.DataFrame({"key": [0, 1], "item": [1, 2]}), ["`right`", "both sides have item", "rename"]),
    ],
)
def test_bad_joins(right, words, opened):
    with pytest.raises(DataError) as error:
        opened(replace(DATA, rows="log", joins=(Join("right", "key"),)), log=LOG, right=right)
    assert all(word in str(error.value) for word in words), error.value


def test_a_join_by_a_key_of_another_name_twice(tmp_path):
    ports = pl.DataFrame({"code": ["A", "B", "C"], "name": ["007", "x", "y"], "zip": ["0501", "1", "2"]})
    ports.write_csv(tmp_path / "ports.csv")
    rows = pl.DataFrame(
        {
            "start": ["A", "B"] * 6,
            "stop": ["C", "A"] * 6,
            "name": range(N),
            "label": LOG["label"],
            "split": LOG["split"],
        }
    )
    rows.write_csv(tmp_path / "log.csv")
    joins = tuple(Join("ports.csv", on, "code", f"{on}_") for on in ("start", "stop"))
    data = replace(
        DATA, rows="log.csv", folder=str(tmp_path), joins=joins, features=(Feature("start_name"), Feature("stop_zip"))
    )
    got = src.rows_plan(data, Path(), None).collect()
    assert got["start_name"].to_list() == ["007", "x"] * 6 and got["stop_name"].to_list() == ["y", "007"] * 6
    assert got["name"].to_list() == list(range(N)) and got["stop_zip"].to_list() == ["2", "0501"] * 6, (
        "an id is what is written"
    )
    with pytest.raises(DataError, match="no column `cod`. Columns: code, name, zip"):
        src.rows_plan(replace(data, joins=(Join("ports.csv", "start", "cod"),)), Path(), None)
    ports.with_columns(start=pl.lit(1)).write_csv(tmp_path / "odd.csv")
    with pytest.raises(DataError, match="has `start` beside its key `code`. Give a `prefix`"):
        src.rows_plan(replace(data, joins=(Join("odd.csv", "start", "code"),)), Path(), None)


def splits_of(data, **tables):
    return src.rows_plan(data, Path(), tables or None).collect()[src.SPLIT].to_list()


def test_a_split_by_files(tmp_path):
    for name, rows in (("a_train", 200), ("b_train", 100), ("test", 30), ("val", 20)):
        pl.DataFrame({"item": [f"{name}{n % 9}" for n in range(rows)], "label": [0] * rows}).write_csv(
            tmp_path / f"{name}.csv"
        )
    by = Split(kind="file", valid_files="val.csv", test_files="t*.csv")
    data = replace(DATA, rows="*.csv", folder=str(tmp_path), split=by)
    got = splits_of(data)
    assert got == [0] * 300 + [2] * 30 + [1] * 20, "files in the order of their names"
    got = splits_of(replace(data, split=replace(by, valid_files="")))
    assert got[300:330] == [2] * 30 and set(got[:300]) == {0, 1} == set(got[330:]) | {1} and 10 < got.count(1) < 60
    users = src.rows_plan(replace(data, user="item", split=replace(by, valid_files="")), Path(), None).collect()
    assert users.group_by("item").agg(pl.col(src.SPLIT).n_unique())[src.SPLIT].max() == 1, "whole users"
    doubled = replace(data, drop_duplicates=True)
    assert len(splits_of(doubled)) == 36, "equal rows of one file and of two are one"
    with pytest.raises(DataError, match="`valid_files`: no file of `\\*.csv` is called `v.csv`. Found a_train.csv"):
        splits_of(replace(data, split=replace(by, valid_files="v.csv")))
    with pytest.raises(DataError, match="is in memory"):
        splits_of(replace(DATA, rows="log", split=by), log=LOG)
    with pytest.raises(ValueError, match="needs `test_files`"):
        Split(kind="file")
    with pytest.raises(ValueError, match="are of a split by `file`"):
        Split(kind="user", test_files="x")


def test_a_split_by_rows():
    log = pl.concat([LOG] * 100)
    data = replace(DATA, rows="log", split=Split(kind="row", valid=0.2, test=0.3, seed=1))
    got = splits_of(data, log=log)
    assert [round(got.count(k) / len(got), 1) for k in range(3)] == [0.5, 0.2, 0.3]
    assert got == splits_of(data, log=log) != splits_of(replace(data, split=replace(data.split, seed=2)), log=log)


def test_a_joined_file_that_is_missing(tmp_path):
    LOG.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="no table `items.parquet`"):
        encode(replace(DATA, joins=(Join("items.parquet", "key"),)), tmp_path)


# --------------------------------------------------------------------------------------------------------------- splits
ORDER = ["train"] * 6 + ["valid"] * 3 + ["test"] * 3
STAMPS = [dt.datetime(2022, 5, 1 + i, 0, 0, tzinfo=dt.UTC) for i in range(N)]
SECONDS = [int(s.timestamp()) for s in STAMPS]


@pytest.mark.parametrize(
    ("time", "unit", "first", "second"),
    [
        (pl.Series(SECONDS), "s", SECONDS[6], SECONDS[9]),
        (pl.Series(SECONDS), "s", "2022-05-07", "2022-05-10"),
        (pl.Series(SECONDS) * 1000, "ms", "2022-05-07T00:00", "2022-05-10T00:00Z"),
        (pl.Series(SECONDS) * 10**6, "us", "2022-05-07T08:00+08:00", "2022-05-09T20:00-04:00"),
        (pl.Series(SECONDS) * 10**9, "ns", "2022-05-07", "2022-05-10"),
        (pl.Series([s.date() for s in STAMPS]), "ms", "2022-05-07", "2022-05-10"),
        (pl.Series(STAMPS), "ms", "2022-05-07", "2022-05-10"),
        (pl.Series(STAMPS).dt.replace_time_zone(None).cast(pl.Datetime("ms")), "ms", "2022-05-07", "2022-05-10"),
        (pl.Series(STAMPS).dt.convert_time_zone("Asia/Shanghai"), "ms", "2022-05-07T08:00+08:00", "2022-05-10"),
    ],
)
def test_splits_by_time(time, unit, first, second, opened):
    data = replace(DATA, rows="log", time="t", time_unit=unit, split=Split("time", valid_from=first, test_from=second))
    table = opened(data, log=LOG.with_columns(t=time))
    assert splits(table) == ORDER
    late = replace(data, split=Split("time", valid_from="2022-05-07T00:00:01", test_from=second))
    assert splits(opened(late, log=LOG.with_columns(t=time)))[6] == "train"


def test_a_boundary_is_exact_to_its_unit():
    assert instant("2022-05-07T00:00:00.123456", 1e9) == 1_651_881_600_123_456_000
    assert instant("1969-12-31T23:59:59.5", 1e3) == -500 and instant(77, 1e3) == 77


def test_text_times_through_sql(opened):
    data = replace(
        DATA, rows="log", time="TIMESTAMP(t)", split=Split("time", valid_from="2022-05-07", test_from="2022-05-10")
    )
    text = pl.Series([s.strftime("%Y-%m-%d %H:%M:%S") for s in STAMPS])
    assert splits(opened(data, log=LOG.with_columns(t=text))) == ORDER


def test_a_split_by_users_is_a_stable_hash_of_whole_users(opened):
    rng = np.random.default_rng(0)
    n = 3000
    log = pl.DataFrame({"user": rng.integers(0, 1000, n), "item": ["a"] * n, "label": rng.integers(0, 2, n)})
    data = replace(DATA, rows="log", user="user", split=Split("user", valid=0.2, test=0.3, seed=1))
    table = opened(data, log=log)
    of: dict[int, set[str]] = {}
    for user, name in zip(log["user"], splits(table), strict=True):
        of.setdefault(user, set()).add(name)
    assert all(len(names) == 1 for names in of.values())
    shares = [sum(names == {name} for names in of.values()) / len(of) for name in SPLITS]
    assert np.abs(np.array(shares) - [0.5, 0.2, 0.3]).max() < 0.06  # 4 standard deviations
    shuffled = log.sample(fraction=1, shuffle=True, seed=0).with_columns(pl.col("user").cast(pl.Int32))
    again = opened(data, log=shuffled)
    assert all(of[u] == {name} for u, name in zip(shuffled["user"], splits(again), strict=True))
    other = opened(replace(data, split=Split("user", valid=0.2, test=0.3, seed=2)), log=log)
    assert splits(other) != splits(table)
    few = pl.DataFrame({"user": range(12), "item": ["a"] * 12, "label": [0, 1] * 6})
    assert "".join(name[1] for name in splits(opened(data, log=few))) == "rerrreerraer"  # second letters; never changes


@pytest.mark.parametrize(
    ("split", "columns", "words"),
    [
        (Split("column", column="part"), {}, ["data.split.column", "no column `part`"]),
        (Split("column", column="split"), {"split": ["train"] * 9 + ["valid", "test", "holdout"]},
         ["1 rows belong to no split", "`split`", "train"]),
        (Split("column", column="split"), {"split": ["train"] * 9 + ["valid", "test", None]},
         ["1 rows belong to no split", "`split`"]),
        (Split("column", column="split"), {"split": ["train"] * 9 + ["test"] * 3},
         ["The valid split is empty", "train 9, valid 0, test 3", "data.split"]),
        (Split("time", valid_from="2022-06-07", test_from="2022-06-10"), {},
         ["valid and test split is empty", "train 12"]),
        (Split("time", valid_from="2022-05-07", test_from="2022-05-07"), {},
         ["`valid_from` should be before `test_from`"]),
        (Split("time", valid_from="May 7", test_from="2022-05-10"), {}, ["`May 7` is not an ISO date"]),
        (Split("time", valid_from="2022-05-07", test_from="2022-05-10"), {"day": [None, *STAMPS[1:]]},
         ["1 rows belong to no split", "`day`", "nulls"]),
        (Split("user"), {"key": [None, *range(11)]}, ["1 rows belong to no split", "`key`", "nulls"]),
    ],
)  # fmt: skip
def test_bad_splits(split, columns, words, opened):
    log = LOG.with_columns(pl.Series(k, v) for k, v in columns.items())
    with pytest.raises(DataError) as error:
        opened(replace(DATA, rows="log", user="key", time="day", split=split), log=log)
    assert all(word in str(error.value) for word in words), error.value


# --------------------------------------------------------------------------------------------------------- declarations
GOOD = {
    "rows": "log", "user": "user", "time": "time", "features": [{"name": "item"}], "tasks": [{"name": "label"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"featurs": []}, ["data.featurs", "features"]),
        ({"features": [{"name": "item", "min_cuont": 2}]}, ["min_cuont", "min_count"]),
        ({"tasks": [{"name": "label", "knid": "binary"}]}, ["knid", "kind"]),
        ({"split": {"kind": "user", "vald": 0.1}}, ["vald", "valid"]),
        ({"joins": [{"table": "x", "onn": "y"}]}, ["onn", "on"]),
        ({"events": [{"columns": {"a": "a"}, "tabel": "x"}]}, ["tabel", "table"]),
        ({"histories": [{"name": "h", "fields": ["a"], "lenght": 3}]}, ["lenght", "length"]),
        ({"fields": [{"name": "a", "vocab": "b"}]}, ["vocab", "vocabulary"]),
        ({"negatives": {"item": "item", "labels": ["label"], "per_postive": 2}}, ["per_postive", "per_positive"]),
        ({"features": [{"name": "item", "kind": "picture"}]}, ["kind", "number"]),
        ({"time_unit": "minutes"}, ["time_unit", "ms"]),
    ],
)
def test_a_misspelt_key_in_toml(change, words, tmp_path):
    import tomli_w

    (tmp_path / "run.toml").write_text(tomli_w.dumps({"data": {**GOOD, **change}}))
    with pytest.raises(config.RunError) as error:
        config.load(tmp_path / "run.toml")
    assert all(word in str(error.value) for word in words), error.value


FIELDS = {"fields": (Field("item"),), "events": (Events(columns={"item": "item"}),), "user": "u", "time": "t"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": (Feature("a"), Feature("a"))}, "own name.*a"),
        ({"features": (Feature("a.b"),)}, "dots"),
        ({"features": ()}, "at least one feature"),
        ({"tasks": ()}, "at least one task"),
        (
            {"features": (Feature("a", min_count=0),)},
            "`a`: with `min_count` 0 all values are hashed: set `buckets`. Found 0",
        ),
        ({"features": (Feature("a", buckets=-1),)}, "`a`: `buckets` should be at least 0. Found -1"),
        ({"features": (Feature("gap"),)}, "gap"),
        ({"fields": (Field("time"),)}, "not user, time, gap or position.*time"),
        ({"fields": (Field("x"), Field("x"))}, "names of their own.*x"),
        ({"events": (Events(columns={"user": "u"}),)}, "`rows`.*user"),
        ({**FIELDS, "histories": (History("h", ("item",), length=0),)}, "`h`: `length` should be at least 1. Found 0"),
        ({**FIELDS, "histories": (History("h", ("itme",)),)}, "History `h`.*item.*itme"),
        ({**FIELDS, "histories": (History("h", ()),)}, "History `h`.*Found \\[\\]"),
        ({**FIELDS, "time": "", "histories": (History("h", ("item",)),)}, "Histories need"),
        ({"tasks": (Task("a", given="b"), Task("b"))}, "Task `a`.*binary task above.*`b`"),
        ({"tasks": (Task("a", sampling_rate=0.0),)}, "Task `a`.*`sampling_rate`.*\\(0, 1\\].*0.0"),
        ({"tasks": (Task("a", sampling_rate=1.5),)}, "Task `a`.*`sampling_rate`.*1.5"),
        ({"tasks": (Task("a", kind="real", sampling_rate=0.5),)}, "Task `a`.*binary"),
        ({"tasks": (Task("a"), Task("b")), "negatives": Negatives("item", labels=("a",))}, "Task `b`.*labels"),
        ({"split": Split("time", valid_from=1, test_from=2), "time": ""}, "split by time needs `data.time`"),
        ({"split": Split("user"), "user": ""}, "split by user needs `data.user`"),
    ],
)
def test_bad_declarations(change, words):
    with pytest.raises(ValueError, match=words):
        replace(DATA, **change)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "time"}, "valid_from"),
        ({"kind": "column"}, "needs `column`"),
        ({"kind": "user", "valid": 0.5, "test": 0.5}, "leave rows to train on. Found 0.5, 0.5"),
        ({"kind": "user", "valid": 0.0}, "positive"),
    ],
)
def test_bad_split_declarations(arguments, words):
    with pytest.raises(ValueError, match=words):
        Split(**arguments)


# ------------------------------------------------------------------------------------------------- text without a header
TEXT = Text("log.txt", tuple(LOG.columns), "\t")


def as_text(path, frame=LOG, header=False):
    frame.write_csv(path, separator="\t", include_header=header)


def test_declared_text_reads_as_its_parquet_file_does(tmp_path):
    LOG.write_parquet(tmp_path / "log.parquet")
    as_text(tmp_path / "log.txt")
    as_text(tmp_path / "log.data", header=True)
    as_text(tmp_path / "1.tsv", LOG[:7])
    as_text(tmp_path / "2.tsv", LOG[7:])
    want = Encoded(encode(DATA, tmp_path))
    for text in (TEXT, Text("log.data", separator="\t"), replace(TEXT, table="?.tsv")):
        got = Encoded(encode(replace(DATA, rows=text.table, text=(text,)), tmp_path))
        assert (codes(got), splits(got)) == (codes(want), splits(want))
        assert got.columns["label.label"].tolist() == LOG["label"].to_list()


def test_joins_and_events_may_be_text(tmp_path):
    log = LOG.with_columns(user=pl.lit("u"), time=pl.int_range(pl.len()) * 1000)
    events = pl.DataFrame({"user": ["u"] * 5, "time": [500, 2500, 2600, 4000, 9500], "what": ["a", "b", "a", "a", "b"]})
    keys = pl.DataFrame({"key": [0, 1, 2], "colour": ["red", "blue", "red"]})
    data = replace(
        DATA, rows="log", user="user", time="time", features=(Feature("colour"),), fields=(Field("what"),),
        joins=(Join("keys.txt", "key"),), events=(Events({"what": "what"}, "events.txt"),),
        histories=(History("seen", ("what",)),),
    )  # fmt: skip
    want = Encoded(encode(data, tables={"log": log, "keys.txt": keys, "events.txt": events}))
    as_text(tmp_path / "keys.txt", keys)
    as_text(tmp_path / "events.txt", events)
    text = (Text("keys.txt", ("key", "colour"), "\t"), Text("events.txt", ("user", "time", "what"), "\t"))
    got = Encoded(encode(replace(data, text=text), tmp_path, tables={"log": log}))
    assert codes(got, "colour") == codes(want, "colour") and len(set(codes(got, "colour"))) == 2
    ours, theirs = (t.batch(np.arange(N)).features["seen"] for t in (got, want))
    assert ours.values["what"].tolist() == theirs.values["what"].tolist()
    assert ours.offsets.tolist() == theirs.offsets.tolist() and ours.offsets[-1] > N


def test_a_file_to_predict_is_read_like_the_rows(tmp_path):
    as_text(tmp_path / "new.txt", LOG[:3])
    LOG[:3].write_csv(tmp_path / "new.csv")
    data = replace(DATA, rows="log.txt", text=(TEXT,))
    for name in ("new.txt", "new.csv"):
        assert scan_given(tmp_path / name, data).collect()["item"].to_list() == ["i0", "i1", "i2"]
    with pytest.raises(DataError, match="of one kind.*txt"):
        scan_given(tmp_path / "new.txt")


def test_text_of_other_columns_is_refused(tmp_path):
    as_text(tmp_path / "log.txt")
    data = replace(DATA, rows="log.txt")
    for change, columns in (
        ({"names": TEXT.names[:4]}, 5),
        ({"names": (*TEXT.names, "more")}, 5),
        ({"separator": ","}, 1),
    ):
        text = replace(TEXT, **change)
        with pytest.raises(DataError) as error:
            encode(replace(data, text=(text,)), tmp_path)
        assert str(error.value) == (
            f"{tmp_path / 'log.txt'} has {columns} columns between separators {text.separator!r}; `data.text` names "
            f"{len(text.names)}, item to {text.names[-1]}."
        )
    with pytest.raises(DataError, match="of one kind: .parquet"):
        encode(data, tmp_path)
    (tmp_path / "log.txt").write_text("")
    with pytest.raises(DataError, match=r"log.txt cannot be read as text \(0 bytes\)"):
        encode(replace(data, text=(TEXT,)), tmp_path)
    (tmp_path / "log.txt").write_text("item\tlabel\n")
    with pytest.raises(DataError, match="`log.txt` has a header and no rows"):
        encode(replace(data, text=(Text("log.txt", separator="\t"),)), tmp_path)
    LOG.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="`log.parquet` is Parquet, which `data.text` does not describe"):
        encode(replace(DATA, text=(replace(TEXT, table="log.parquet"),)), tmp_path)


def test_long_and_short_lines(tmp_path):
    line = "i0\t0\t0\ttrain\t2022-05-01\n"
    data = replace(DATA, rows="log.txt", text=(TEXT,))
    (tmp_path / "log.txt").write_text(line * 12_000 + line.replace("\n", "\tmore\n"))
    with pytest.raises(
        DataError, match="log.txt cannot be read as declared: a line has more values than the 5 columns"
    ):
        scan("", "log.txt", tmp_path, None, data.text)
    (tmp_path / "log.txt").write_text(line * 3 + "i0\t0\t0\n")
    assert scan("", "log.txt", tmp_path, None, data.text).collect()["split"].to_list() == ["train"] * 3 + [None]


def test_declarations_of_text_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"Text `a`: `names` should differ and not be empty. Found \['', 'x'\]"):
        Text("a", ("x", "y", "x", ""))
    for separator in ("", "::", "é"):
        with pytest.raises(ValueError, match="Text `a`: `separator` should be one character. Found"):
            Text("a", separator=separator)
    for tables in (("log.txt",), ("log.parquet", "log.parquet")):
        with pytest.raises(ValueError, match=r"`data.text` should describe tables among \['log.parquet'\], each once"):
            replace(DATA, text=tuple(map(Text, tables)))


# --------------------------------------------------------------------------------------------------------- split by order
def test_a_split_by_order_takes_the_last_rows(tmp_path):
    data = replace(DATA, split=Split(kind="order", valid=0.2, test=0.3))
    log = pl.concat([LOG] * 5)  # 60 rows, of which `keep` leaves 50
    log = log.with_columns(n=pl.int_range(pl.len()))
    log[:17].write_parquet(tmp_path / "a.parquet")
    log[17:].write_parquet(tmp_path / "b.parquet")
    data = replace(data, rows="?.parquet", keep="n >= 10", features=(Feature("n"),))
    table = Encoded(encode(data, tmp_path))
    assert splits(table) == ["train"] * 25 + ["valid"] * 10 + ["test"] * 15
    known = table.fitted.vocabularies["n"].values
    assert sorted(known) == list(range(10, 35)), "the last rows are not in the vocabulary"
    assert codes(table, "n")[25:] == [0] * 25


def test_rows_that_are_events_have_the_split_of_the_rows():
    log = LOG.with_columns(user=pl.lit("u"), time=pl.int_range(pl.len()), item=pl.int_range(pl.len()).cast(pl.String))
    data = replace(
        DATA, rows="log", user="user", time="time", fields=(Field("item"),), events=(Events({"item": "item"}),),
        histories=(History("seen", ("item",)),), split=Split(kind="order", valid=0.25, test=0.25),
    )  # fmt: skip
    table = Encoded(encode(data, tables={"log": log}))
    assert splits(table) == ["train"] * 6 + ["valid"] * 3 + ["test"] * 3
    assert set(table.fitted.vocabularies["item"].values) == set(map(str, range(6)))


def test_shares_of_a_split_by_order():
    with pytest.raises(ValueError, match="Shares should be positive"):
        Split(kind="order", valid=0.0)
    with pytest.raises(DataError, match="The valid split is empty"):
        encode(replace(DATA, rows="log", split=Split(kind="order", valid=0.01, test=0.1)), tables={"log": LOG})
