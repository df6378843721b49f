"""Tables of text: ids are what is written, types come from all values, and mistakes are told by file, column and value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from unbraid.data.declaration import Data, Events, Join, Split, Text
from unbraid.data.encode import encode, encode_query
from unbraid.data.source import DataError, known_types, scan, scan_given
from unbraid.data.table import Encoded
from unbraid.data.text import Reads
from unbraid.predictor import Predictor
from unbraid.types import Feature, Field, History, Task

DATA = Data(
    rows="log.csv", features=(Feature("item"),), tasks=(Task("label"),), split=Split(kind="column", column="split")
)
SPLITS = ["train"] * 8 + ["valid"] * 2 + ["test"] * 2


def log(folder: Path, items: list[Any], name: str = "log.csv", **more: list[Any]) -> Encoded:
    """Twelve rows, whose items go round, as a file, encoded."""
    columns = {"item": items, **more}
    columns = {key: [values[i % len(values)] for i in range(12)] for key, values in columns.items()}
    lines = [",".join([*columns, "label", "split"])]
    lines += [",".join(map(str, (*row, i % 2, SPLITS[i]))) for i, row in enumerate(zip(*columns.values(), strict=True))]
    (folder / name).write_text("\n".join(lines) + "\n")
    return Encoded(encode(replace(DATA, rows=name), folder))


def known(table: Encoded, vocabulary: str = "item") -> list[Any]:
    return table.fitted.vocabularies[vocabulary].values.to_list()


# ----------------------------------------------------------------------------------------------------------- ids are text
@pytest.mark.parametrize(
    "items",
    [
        ["12e84091", "12e84092", "99e99999"],  # as numbers all infinity
        ["1e3", "1000", "1000.0"],
        ["007", "7", "07"],
        ["36893488147419103231", "36893488147419103232"],  # equal as floating-point numbers
        ["9223372036854775807", "9223372036854775808"],
        ["-0", "0"],
        ["+5", "5"],
        ["1.50", "1.5"],
        ["NaN", "nan", "inf"],
    ],
)
def test_ids_are_what_is_written(items, tmp_path):
    table = log(tmp_path, items)
    assert known(table) == sorted(items)
    got = table.batch(np.arange(12)).features["item"].tolist()
    assert got == [2 + sorted(items).index(items[i % len(items)]) for i in range(12)]


def test_whole_numbers_are_those_of_a_parquet_file(tmp_path):
    items = [9, 10, -3, 2**63 - 1]
    text = log(tmp_path, items)
    frame = pl.read_csv(tmp_path / "log.csv").with_columns(item=pl.Series([items[i % 4] for i in range(12)]))
    frame.write_parquet(tmp_path / "log.parquet")
    parquet = Encoded(encode(replace(DATA, rows="log.parquet"), tmp_path))
    assert known(text) == known(parquet) == sorted(items)
    assert all(
        text.fitted.vocabularies["item"].values.dtype == t.fitted.vocabularies["item"].values.dtype for t in [parquet]
    )


def test_an_empty_field_is_missing_quoted_or_not(tmp_path):
    for items in (["a", "", '""'], ["7", "", '""']):
        table = log(tmp_path, items)
        assert table.batch(np.arange(3)).features["item"].tolist() == [2, 1, 1] and len(known(table)) == 1


def test_true_and_false_are_flags(tmp_path):
    table = log(tmp_path, ["true", "false"])
    assert known(table) == [0, 1]


def test_every_role_of_an_id_is_text(tmp_path):
    hexes = ["1e5", "100000", "12e84091", "12e84092"]
    users = [hexes[i % 4] for i in range(24)]
    frame = pl.DataFrame({
        "user": users, "site": users, "call": users, "key": users, "tags": users, "kind": users, "label": [0, 1] * 12,
        "time": range(24), "split": ["train"] * 16 + ["valid"] * 4 + ["test"] * 4,
    })  # fmt: skip
    frame.write_csv(tmp_path / "log.csv")
    pl.DataFrame({"key": hexes, "colour": ["c0", "c1", "c2", "c3"]}).write_csv(tmp_path / "keys.csv")
    pl.DataFrame({"user": users, "time": range(24), "what": users}).write_csv(tmp_path / "events.csv")
    data = replace(
        DATA, user="user", domain="site", request="call", time="time", joins=(Join("keys.csv", "key"),),
        features=(Feature("colour"), Feature("tags", "bag", separator="|")), fields=(Field("what"),),
        tasks=(Task("label"), Task("kind", kind="multiclass")), events=(Events({"what": "what"}, "events.csv"),),
        histories=(History("seen", ("what",)),),
    )  # fmt: skip
    table = Encoded(encode(data, tmp_path))
    batch = table.batch(np.arange(24))
    for name in ("user", "request"):
        assert len(batch.meta[name].unique()) == 4, name
    assert sorted(table.schema.domains[2:]) == sorted(hexes) and len(batch.domain.unique()) == 4
    assert batch.features["colour"].tolist() == [2, 3, 4, 5] * 6
    assert known(table, "tags") == known(table, "what") == sorted(hexes)
    assert table.schema.classes["kind"] == tuple(sorted(hexes))
    seen = batch.features["seen"]
    assert seen.lengths.tolist() == [i // 4 for i in range(24)], "a user's own events alone"
    # the same rows as a file to predict, one at a time: alone, `100000` looks like a number
    for place in (1, 21):
        frame[place : place + 1].drop("label", "kind", "split").write_csv(tmp_path / "one.csv")
        (tmp_path / f"q{place}").mkdir()
        values = {name: found.values.dtype for name, found in table.fitted.vocabularies.items()}
        query = scan_given(tmp_path / "one.csv", data, lambda values=values: known_types(data, values, tmp_path))
        encode_query(data, query, table.fitted, tmp_path / f"q{place}", tmp_path)
        one = Encoded(tmp_path / f"q{place}", table.fitted).batch(np.arange(1))
        assert one.features["colour"].item() == batch.features["colour"][place]
        assert one.domain.item() == batch.domain[place] and one.meta["user"].item() == batch.meta["user"][place]
        assert one.features["tags"].values["tags"].tolist() == [batch.features["tags"].values["tags"][place].item()]
        assert one.features["seen"].lengths.item() == place // 4


@pytest.mark.parametrize(
    ("items", "asked", "codes"),
    [
        (["12e84091", "17156075", "z"], ["17156075"], [3]),  # alone it looks like a number
        (
            ["7", "8"],
            ["7", "007", "x", "", "36893488147419103232"],
            [2, 0, 0, 1, 0],
        ),  # among numbers, a word is unknown
        (["7", "8"], ["x"], [0]),
        (["true", "false"], ["true"], [3]),
    ],
)
def test_rows_to_predict_are_read_with_the_types_of_training(items, asked, codes, tmp_path):
    table = log(tmp_path, items)
    (tmp_path / "new.csv").write_text("item,other\n" + "".join(f"{value},1\n" for value in asked))
    data = replace(DATA, folder=str(tmp_path))
    values = {name: found.values.dtype for name, found in table.fitted.vocabularies.items()}
    (tmp_path / "query").mkdir()
    query = scan_given(tmp_path / "new.csv", data, lambda: known_types(data, values, tmp_path))
    encode_query(data, query, table.fitted, tmp_path / "query")
    assert Encoded(tmp_path / "query", table.fitted).batch(np.arange(len(asked))).features["item"].tolist() == codes


def test_a_column_that_is_a_number_and_an_id(tmp_path):
    """The number wins, in training and in rows to predict."""
    both = (Feature("age", "number"), Feature("group", column="age"))
    for ages in (["1.5", "2", "007"], ["1", "2", "007"]):
        lines = [f"{ages[i % 3]},{i % 2},{split}" for i, split in enumerate(SPLITS)]
        (tmp_path / "log.csv").write_text("\n".join(["age,label,split", *lines]))
        data = replace(DATA, folder=str(tmp_path), features=both)
        table = Encoded(encode(data))
        assert known(table, "group") == sorted(map(float, ages))
        (tmp_path / "new.csv").write_text("age\n2\n007\n")
        values = {name: found.values.dtype for name, found in table.fitted.vocabularies.items()}
        place = tmp_path / f"query{ages[0]}"
        place.mkdir()
        query = scan_given(
            tmp_path / "new.csv", data, lambda values=values, data=data: known_types(data, values, tmp_path)
        )
        encode_query(data, query, table.fitted, place)
        batch = Encoded(place, table.fitted).batch(np.arange(2))
        assert batch.features["age.exact"].flatten().tolist() == [2.0, 7.0]
        assert batch.features["group"].tolist() == [2 + known(table, "group").index(x) for x in (2, 7)]


def test_integers_are_their_text_among_words(tmp_path):
    """Parquet rows to predict, and another log to start from, of a model whose ids were words and numbers in text."""
    table = log(tmp_path, ["7", "12e84091", "8"])
    data = replace(DATA, folder=str(tmp_path))
    (tmp_path / "query").mkdir()
    encode_query(data, pl.LazyFrame({"item": [8, 9, None, 7]}), table.fitted, tmp_path / "query")
    assert Encoded(tmp_path / "query", table.fitted).batch(np.arange(4)).features["item"].tolist() == [4, 0, 1, 3]
    lines = [f"{7 + i % 3},{i % 2},{split}" for i, split in enumerate(SPLITS)]
    (tmp_path / "next.csv").write_text("\n".join(["item,label,split", *lines]))
    grown = Encoded(encode(replace(DATA, rows="next.csv"), tmp_path, grow=table.fitted))
    assert known(grown) == ["12e84091", "7", "8", "9"]
    assert grown.batch(np.arange(3)).features["item"].tolist() == [3, 4, 5]
    words = log(tmp_path, ["a", "b"], "words.csv")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="its values are Int64; those of the training split are String"):
        encode_query(data, pl.LazyFrame({"item": [8]}), words.fitted, tmp_path / "none")


def test_a_joined_file_may_have_words_now(tmp_path):
    log(tmp_path, ["a", "b"], key=[1, 2])
    (tmp_path / "keys.csv").write_text("key,colour\n1,7\n2,8\n")
    data = replace(DATA, folder=str(tmp_path), joins=(Join("keys.csv", "key"),), features=(Feature("colour"),))
    table = Encoded(encode(data, tmp_path))
    assert known(table, "colour") == [7, 8]
    (tmp_path / "keys.csv").write_text("key,colour\n1,8\n2,red\n3,007\n")
    (tmp_path / "query").mkdir()
    encode_query(data, pl.LazyFrame({"key": [1, 2, 3, 4]}), table.fitted, tmp_path / "query")
    assert Encoded(tmp_path / "query", table.fitted).batch(np.arange(4)).features["colour"].tolist() == [3, 0, 0, 1]


def test_a_bundle_predicts_one_row_of_text(tmp_path):
    from unbraid import config
    from unbraid.job import train
    from unbraid.train import Training

    log(tmp_path, ["12e84091", "17156075", "z"])
    data = replace(DATA, folder=str(tmp_path))
    run = config.Run(data, training=Training(batch_size=8, steps=1, evaluate_every=1, metric="logloss", patience=0))
    predictor = Predictor(train(run, baseline=False).bundle)
    (tmp_path / "new.csv").write_text("item\n17156075\n")
    both = pl.DataFrame({"item": ["17156075", "12e84091"]})
    assert predictor.predict(tmp_path / "new.csv")["label"][0] == pytest.approx(predictor.predict(both)["label"][0])


# -------------------------------------------------------------------------------------------------- what is not an id
def test_types_come_from_all_values(tmp_path):
    rows = 3000
    text = "a,b,c,d,e,f\n" + "1,1,01,true,2,\n" * rows + "2,1.5,x,false,99999999999999999999, \n"
    (tmp_path / "log.csv").write_text(text)
    schema = scan("", "log.csv", tmp_path).collect_schema()
    assert list(schema.values()) == [pl.Int64, pl.Float64, pl.String, pl.Boolean, pl.String, pl.String]
    reads = Reads(ids=frozenset("ac"), numbers=frozenset("ef"))
    frame = scan("", "log.csv", tmp_path, reads=reads).collect()
    assert frame["e"].dtype == pl.Float64 and frame["e"][-1] == 1e20
    assert frame["c"].unique().sort().to_list() == ["01", "x"] and frame["a"].dtype == pl.Int64


def test_files_of_one_table_share_their_types(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "1.csv").write_text("a,b\n1,1\n2,2\n")
    (tmp_path / "log" / "2.csv").write_text("a,b\nx,2.5\n")
    frame = scan("", "log", tmp_path).collect()
    assert frame.to_dict(as_series=False) == {"a": ["1", "2", "x"], "b": [1.0, 2.0, 2.5]}


@pytest.mark.parametrize("word", ["word", "12e84091", "1,5"])
def test_a_value_that_is_no_number(word, tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "1.csv").write_text("age,label,split\n" + "1,1,train\n" * 200)
    (tmp_path / "log" / "2.csv").write_text("age,label,split\n" + "2.5,1,train\n" * 300 + f'"{word}",0,test\n')
    data = replace(DATA, rows="log", features=(Feature("age", "number"),))
    with pytest.raises(DataError) as error:
        encode(data, tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'log' / '2.csv'}: column `age` is read as a number, and `{word}` in line 302 is none (1 of 501 values "
        "are not). Mend or empty them in the file; or read them as missing, with `TRY_CAST(age AS DOUBLE)` in the place of "
        "`age` in the run file; or read the column as an id."
    )


def test_the_way_out_of_it_works(tmp_path):
    lines = [f"{i if i != 3 else 'word'},{i % 2},{split}" for i, split in enumerate(SPLITS)]
    (tmp_path / "log.csv").write_text("\n".join(["age,label,split", *lines]))
    table = Encoded(encode(replace(DATA, features=(Feature("age", "number", "TRY_CAST(age AS DOUBLE)"),)), tmp_path))
    assert table.batch(np.arange(12)).features["age"][:, 1].tolist() == [float(i == 3) for i in range(12)]


def test_lines_and_bytes_that_are_no_table(tmp_path):
    (tmp_path / "log.csv").write_text("item,label,split\na,0,train\na,0,train,more\n")
    with pytest.raises(
        DataError, match="log.csv cannot be read as declared: a line has more values than the 3 columns. Put"
    ):
        encode(DATA, tmp_path)
    (tmp_path / "log.csv").write_bytes(b"item,label,split\na,0,train\n\xff\xfe,0,train\n")
    with pytest.raises(DataError, match="log.csv cannot be read as declared: it is not UTF-8"):
        encode(DATA, tmp_path)


def test_a_file_that_changed_is_looked_at_again(tmp_path):
    (tmp_path / "log.csv").write_text("a\n1\n")
    assert scan("", "log.csv", tmp_path).collect_schema()["a"] == pl.Int64
    (tmp_path / "log.csv").write_text("a\nword\n")
    assert scan("", "log.csv", tmp_path).collect_schema()["a"] == pl.String


# --------------------------------------------------------------------------------------------- rows without their labels
def test_named_text_without_its_label(tmp_path):
    """Criteo's ``test.txt`` has no label, and so one column fewer than its names."""
    lines = [f"{i % 2}\ti{i % 3}\t{i}\t{split}\n" for i, split in enumerate(SPLITS)]
    (tmp_path / "log.txt").write_text("".join(lines))
    text = Text("log.txt", ("label", "item", "age", "split"), "\t")
    data = replace(DATA, rows="log.txt", text=(text,), features=(Feature("item"), Feature("age", "number")))
    table = Encoded(encode(data, tmp_path))
    (tmp_path / "new.txt").write_text("".join(line.partition("\t")[2] for line in lines[:3]))
    query = scan_given(tmp_path / "new.txt", data)
    assert query.collect_schema().names() == ["item", "age", "split"]
    (tmp_path / "query").mkdir()
    encode_query(data, query, table.fitted, tmp_path / "query")
    got, want = Encoded(tmp_path / "query", table.fitted).batch(np.arange(3)), table.batch(np.arange(3))
    assert got.features["item"].tolist() == want.features["item"].tolist() and not got.observed["label"].any()
    (tmp_path / "new.txt").write_text("i0\t1\n")
    with pytest.raises(
        DataError, match="has 2 columns between separators.*names 4.*may come without the labels, with 3"
    ):
        scan_given(tmp_path / "new.txt", data)
