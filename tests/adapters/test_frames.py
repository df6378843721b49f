"""Tables of pandas, Arrow and Hugging Face give the numbers that the same Polars frame gives."""

from __future__ import annotations

import datetime as dt
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from toylog import make_data, make_log, make_run

from unbraid.adapters.frames import in_polars, lazy
from unbraid.data.encode import encode, fingerprint
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.job import train
from unbraid.predictor import Predictor

pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")


def as_dataset(frame: pl.DataFrame) -> Any:
    return datasets.Dataset(frame.to_arrow(compat_level=pl.CompatLevel.oldest()))


WAYS = {
    "polars lazy": lambda log: log.lazy(),
    "pandas": lambda log: log.to_pandas(),
    "pandas, Arrow types": lambda log: log.to_pandas(use_pyarrow_extension_array=True),
    "arrow": lambda log: log.to_arrow(),
    "arrow stream": lambda log: pa.RecordBatchReader.from_batches(log.to_arrow().schema, log.to_arrow().to_batches()),
    "arrow dataset": lambda log: __import__("pyarrow.dataset").dataset.dataset(log.to_arrow()),
    "hugging face": as_dataset,
    "hugging face, selected": lambda log: as_dataset(pl.concat([log.tail(1), log])).select(range(1, len(log) + 1)),
    "hugging face stream": lambda log: as_dataset(log).to_iterable_dataset(num_shards=1),
    "columns": lambda log: {name: log[name] for name in log.columns},
}


@pytest.mark.parametrize("way", list(WAYS))
def test_every_library_encodes_to_the_same_columns(way: str, tmp_path: Path) -> None:
    log = make_log()
    want = Encoded(encode(make_data(cache=str(tmp_path / "one")), tables={"log": log}))
    given = WAYS[way](log)
    found = Encoded(encode(make_data(cache=str(tmp_path / "two")), tables={"log": given}))
    assert want.columns.keys() == found.columns.keys() and want.schema == found.schema
    for name, column in want.columns.items():
        np.testing.assert_array_equal(column, found.columns[name], err_msg=name)


def test_training_and_prediction_take_any_of_them() -> None:
    log, run = make_log(), make_run()
    run = replace(run, training=replace(run.training, steps=3))
    ours = train(run, tables={"log": log}, baseline=False)
    theirs = train(run, tables={"log": log.to_pandas()}, baseline=False)
    assert ours.metrics["test"] == theirs.metrics["test"]
    new = log.tail(20).drop("click", "buy")
    want = Predictor(ours.bundle).predict(new, {"log": log})
    for rows in (new.to_pandas(), new.to_arrow(), as_dataset(new)):
        assert_frame_equal(Predictor(theirs.bundle).predict(rows, {"log": log.to_arrow()}), want)


def test_types_stay() -> None:
    day = dt.datetime(2024, 5, 6, 7)
    table = pd.DataFrame({
        "category": pd.Categorical(["x", "y"]), "day": [day, pd.NaT],
        "zone": pd.to_datetime([day, day]).tz_localize("Asia/Tokyo"),
        "date": [day.date(), None], "whole": pd.array([1, None], dtype="Int64"), "number": [1.5, np.nan], "flag": [True, None],
        "list": [[1, 2], []], "bytes": [b"a", None], "text": ["a", None],
    }, index=[7, 7])  # fmt: skip
    frame = lazy(table).collect()
    assert frame.dtypes == [
        pl.Categorical, frame["day"].dtype, frame["zone"].dtype, pl.Date, pl.Int64, pl.Float64, pl.Boolean, pl.List(pl.Int64),
        pl.Binary, pl.String,
    ]  # fmt: skip
    assert frame["zone"].dtype.time_zone == "Asia/Tokyo" and frame["day"].to_list() == [day, None]
    assert frame.null_count().row(0) == (0, 1, 0, 1, 1, 1, 1, 0, 1, 1)
    assert frame["zone"][0].timestamp() == table["zone"].iloc[0].timestamp()
    arrow = pa.table(
        {"d": pa.array(["a", "b"]).dictionary_encode(), "v": pa.array([[1.0], [2.0]], pa.list_(pa.float32(), 1))}
    )
    assert lazy(arrow).collect().dtypes == [pl.Categorical, pl.Array(pl.Float32, 1)]


def picture(shade: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("L", (4, 4), shade).save(out, "PNG")
    return out.getvalue()


def test_hugging_face_pictures_labels_and_arrays(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(picture(9))
    features = datasets.Features({
        "image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]),
        "grid": datasets.Array2D((2, 2), "float32"), "when": datasets.Value("timestamp[s]"),
    })  # fmt: skip
    rest = {"label": [1, 0, None], "grid": [[[1, 2], [3, 4]]] * 3, "when": [dt.datetime(2024, 1, 1)] * 3}

    def read(pictures: list[Any]) -> pl.DataFrame:
        return lazy(datasets.Dataset.from_dict({"image": pictures, **rest}, features=features)).collect()

    raw = [{"bytes": picture(n), "path": "name.png"} for n in (1, 2)]
    path = {"bytes": None, "path": str(tmp_path / "b.png")}
    frame = read([*raw, None])
    assert frame["image"].to_list() == [picture(1), picture(2), None]
    assert frame["label"].to_list() == [1, 0, None]
    assert frame["grid"].to_list() == [[1.0, 2.0, 3.0, 4.0]] * 3 and frame["grid"].dtype == pl.List(pl.Float32)
    assert read([path, None, path])["image"].to_list() == [path["path"], None, path["path"]]
    assert read([*raw, path])["image"].to_list() == [picture(1), picture(2), picture(9)]
    with pytest.raises(DataError, match="column `image`: .*nowhere.png"):
        read([*raw, {"bytes": None, "path": str(tmp_path / "nowhere.png")}])


def test_what_cannot_be_read_says_why() -> None:
    with pytest.raises(DataError, match=r"Table `log`: column `mixed` \(object\).*one type"):
        in_polars({"log": pd.DataFrame({"fine": [1, 2], "mixed": ["a", 1]})})
    with pytest.raises(DataError, match="one name each"):
        lazy(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(DataError, match="different names"):
        lazy(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]))
    with pytest.raises(DataError, match="dict of datasets, train, test"):
        part = datasets.Dataset.from_dict({"a": [1]})
        lazy(datasets.DatasetDict(train=part, test=part))
    with pytest.raises(DataError, match="Found builtins.int"):
        lazy(3)
    with pytest.raises(DataError, match="no rows"):
        lazy(datasets.Dataset.from_dict({"a": [1]}).to_iterable_dataset().filter(lambda row: row["a"] > 1))


def test_another_table_is_encoded_anew() -> None:
    data, log = make_data(), make_log().to_pandas()
    before = fingerprint(data, Path(), {"log": log})
    log.loc[3, "price"] = 77.0  # the same object, changed in place
    assert fingerprint(data, Path(), {"log": log}) != before
