"""Pictures and texts of an encoded table: what is kept of them, what is wrong with them, how rows read them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from picturekit import array, as_bytes, make_data, make_rows, write

from unbraid.data.contents import digest_of
from unbraid.data.declaration import Data
from unbraid.data.encode import encode, encode_query
from unbraid.data.features import attach
from unbraid.data.images import opened, pixels
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.types import Feature, Transform

pytest.importorskip("PIL", reason="Pillow is not installed")
PLAIN = Transform(8, 10)


def encoded(data: Data, rows: pl.DataFrame) -> Encoded:
    return Encoded(encode(data, tables={"rows": rows}))


@pytest.fixture
def rows(tmp_path: Path) -> pl.DataFrame:
    return make_rows(tmp_path)


def in_bytes(folder: Path, rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(picture=pl.Series([(folder / name).read_bytes() for name in rows["picture"]]))


@pytest.mark.parametrize("kind", ["relative", "absolute", "bytes", "csv", "categorical"])
def test_rows_read_their_own_pictures_however_they_are_given(tmp_path: Path, rows: pl.DataFrame, kind: str) -> None:
    want = [pixels(opened((tmp_path / name).read_bytes(), "", "RGB"), PLAIN) for name in rows["picture"]]
    data = make_data(tmp_path)
    if kind == "absolute":
        rows = rows.with_columns(picture=pl.lit(f"{tmp_path}/") + pl.col("picture"))
    elif kind == "bytes":
        rows = in_bytes(tmp_path, rows)
    elif kind == "categorical":
        rows = rows.with_columns(pl.col("picture").cast(pl.Categorical))
    if kind == "csv":
        rows.write_csv(tmp_path / "rows.csv")
        found = Encoded(encode(replace(data, rows="rows.csv")))
    else:
        found = encoded(data, rows)
    which = np.array([7, 0, 29, 7])
    got = found.pictures(which, PLAIN)
    assert got.shape == (4, 3, 8, 8) and got.dtype == torch.float32
    assert np.array_equal(got.numpy(), np.stack([want[row] for row in which]))


def test_files_that_are_called_by_numbers_are_paths(tmp_path: Path) -> None:
    for n in range(30):
        write(tmp_path / f"{n}", n=n)
    rows = make_rows(tmp_path).with_columns(picture=pl.int_range(30))
    assert len(encoded(make_data(tmp_path), rows).contents["picture"]) == 30


def test_a_relative_folder_is_below_the_base(tmp_path: Path, rows: pl.DataFrame, monkeypatch: Any) -> None:
    data = replace(make_data(tmp_path), folder=tmp_path.name)
    found = Encoded(encode(data, tmp_path.parent, tables={"rows": rows}))
    assert len(found.pictures(np.arange(3), PLAIN)) == 3
    (tmp_path / "other" / tmp_path.name).mkdir(parents=True)
    with pytest.raises(
        DataError, match="30 of 30 files cannot be read"
    ):  # the same declaration elsewhere is another table
        encode(data, tmp_path / "other", tables={"rows": rows})


def test_nothing_decoded_is_stored(tmp_path: Path, rows: pl.DataFrame) -> None:
    def bytes_of(found: Encoded) -> int:
        return sum(path.stat().st_size for path in (found.folder / "contents").iterdir())

    assert bytes_of(encoded(make_data(tmp_path), rows)) < 6_000
    packed = in_bytes(tmp_path, rows)
    twice = pl.concat([packed, packed])
    sizes = packed["picture"].bin.size().sum()
    assert sizes <= bytes_of(encoded(make_data(tmp_path), twice)) < sizes + 6_000, "each picture once"


def test_the_same_bytes_under_two_names_have_one_hash(tmp_path: Path, rows: pl.DataFrame) -> None:
    write(tmp_path / "pics/1.png", array(0, 0))
    digests = encoded(make_data(tmp_path), rows).contents["picture"].digests()
    assert digests[0] == digests[1] == digest_of((tmp_path / "pics/0.png").read_bytes()) and len(set(digests)) == 29


def test_hashes_are_those_of_the_files_as_they_are_now(tmp_path: Path, rows: pl.DataFrame) -> None:
    contents = encoded(make_data(tmp_path), rows).contents["picture"]
    before = contents.digests()
    changed = array(4, 1)
    changed[3, 5, 0] ^= 1
    path = write(tmp_path / "pics/4.png", changed)
    os.utime(path, ns=(1, 1))
    after = contents.digests()
    assert [n for n in range(30) if before[n] != after[n]] == [4]
    path.unlink()
    with pytest.raises(DataError, match="pics/4.png cannot be read any more"):
        contents.digests()


# -------------------------------------------------------------------------------------------------------------- errors
def test_missing_files_are_an_error_with_counts_and_first_names(tmp_path: Path, rows: pl.DataFrame) -> None:
    for n in range(3, 10):
        (tmp_path / "pics" / f"{n}.png").unlink()
    with pytest.raises(DataError) as error:
        encoded(make_data(tmp_path), pl.concat([rows, rows.head(5)]))
    text = str(error.value)
    assert "`picture`: 7 of 30 files cannot be read, of 9 rows: pics/3.png, pics/4.png" in text
    assert "pics/7.png, ..." in text and str(tmp_path) in text and "data.folder" in text


def test_a_truncated_file_is_an_error_when_it_is_read(tmp_path: Path, rows: pl.DataFrame) -> None:
    path = tmp_path / "pics/5.png"
    path.write_bytes(path.read_bytes()[:200])
    found = encoded(make_data(tmp_path), rows)
    assert len(found.pictures(np.array([4, 6]), PLAIN)) == 2
    with pytest.raises(DataError, match=r"pics/5.png \(200 bytes\) is not a whole picture.*data.keep"):
        found.pictures(np.array([4, 5]), PLAIN)


def test_rows_without_a_picture_are_an_error(tmp_path: Path, rows: pl.DataFrame) -> None:
    some = rows.with_columns(picture=pl.when(pl.int_range(30) > 3).then("picture"))
    for frame in (some, in_bytes(tmp_path, rows).with_columns(picture=pl.when(pl.int_range(30) > 3).then("picture"))):
        with pytest.raises(DataError, match="4 rows have no picture .null.*picture IS NOT NULL"):
            encoded(make_data(tmp_path), frame)
        assert encoded(make_data(tmp_path, keep="picture IS NOT NULL"), frame).rows == 26


@pytest.mark.parametrize(("kind", "values"), [("image", 1.5), ("image", [1, 2]), ("text", [1.5]), ("text", b"x")])
def test_columns_of_other_types_are_an_error(tmp_path: Path, rows: pl.DataFrame, kind: Any, values: Any) -> None:
    wrong = rows.with_columns(picture=pl.Series([values] * 30))
    with pytest.raises(DataError, match=f"`picture`: kind `{kind}` needs .* Found "):
        encoded(make_data(tmp_path, features=(Feature("picture", kind=kind),)), wrong)


def test_which_pictures_must_be_clear(tmp_path: Path, rows: pl.DataFrame) -> None:
    two = make_data(tmp_path, features=(Feature("picture", kind="image"), Feature("again", "image", "picture")))
    found = encoded(two, rows)
    assert torch.equal(
        found.pictures(np.arange(2), PLAIN, feature="again"), found.pictures(np.arange(2), PLAIN, feature="picture")
    )
    for name in ("", "site"):
        with pytest.raises(ValueError, match=r"`feature` should name one of the pictures, \['picture', 'again'\]"):
            found.pictures(np.arange(2), PLAIN, feature=name)


def test_a_batch_without_a_backbone_is_an_error(tmp_path: Path, rows: pl.DataFrame) -> None:
    with pytest.raises(DataError, match="no backbone reads it: set `model.images`"):
        encoded(make_data(tmp_path), rows).batch(np.arange(3))


# --------------------------------------------------------------------------------------------------- views and queries
def test_views_are_functions_of_seed_step_row_and_feature(tmp_path: Path, rows: pl.DataFrame) -> None:
    two = make_data(tmp_path, features=(Feature("picture", kind="image"), Feature("again", "image", "picture")))
    found, weak = encoded(two, rows), replace(PLAIN, augment="weak")

    def view(rows: Any, seed: int = 0, step: int = 0, feature: str = "picture") -> torch.Tensor:
        return found.pictures(np.asarray(rows), weak, seed, step, feature)

    base = view(range(30))
    assert torch.equal(base, view(range(30))) and torch.equal(base[[9, 2]], view([9, 2])), "whatever else is read"
    for other in (view(range(30), seed=1), view(range(30), step=1), view(range(30), feature="again")):
        assert (other != base).flatten(1).any(1).sum() > 20
    same = pl.concat([rows.head(1)] * 30).with_columns(rows["split"], rows["colour"])
    assert (
        len({one.numpy().tobytes() for one in encoded(two, same).pictures(np.arange(30), weak, feature="again")}) > 10
    )


def test_rows_to_predict_bring_pictures_of_their_own(tmp_path: Path, rows: pl.DataFrame) -> None:
    data = make_data(tmp_path)
    trained = encoded(data, rows)
    write(tmp_path / "new/x.png", array(99, 2))
    queries = [
        rows.head(2).with_columns(picture=pl.lit("new/x.png")),
        in_bytes(tmp_path, rows.tail(2)).drop("colour", "split"),
    ]
    wants = [tmp_path / "new/x.png", tmp_path / "pics/29.png"]
    for n, (query, want) in enumerate(zip(queries, wants, strict=True)):
        (tmp_path / f"q{n}").mkdir()
        encode_query(data, query.lazy(), trained.fitted, tmp_path / f"q{n}")
        found = Encoded(tmp_path / f"q{n}", trained.fitted).pictures(np.array([1]), PLAIN)[0].numpy()
        assert np.array_equal(found, pixels(opened(want.read_bytes(), "", "RGB"), PLAIN))


# --------------------------------------------------------------------------------------------------------------- texts
def test_distinct_texts_are_kept_once_and_in_their_template(tmp_path: Path, rows: pl.DataFrame) -> None:
    features = (Feature("caption", kind="text", template="a photo of a {}."),)
    frame = rows.with_columns(caption=pl.when(pl.int_range(30) != 4).then("caption"))
    found = encoded(make_data(tmp_path, features=features), frame)
    assert found.contents["caption"].names == ["a photo of a red.", "a photo of a green.", "a photo of a blue.", ""]
    assert found.columns["feature.caption"][:6].tolist() == [0, 1, 2, 0, 3, 2], "a null is the empty text"
    plain = encoded(make_data(tmp_path, features=(Feature("caption", kind="text"),)), rows)
    assert plain.contents["caption"].names == ["red", "green", "blue"]
    assert plain.contents["caption"].digests()[0] == digest_of(b"red")


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_has_one_place(template: str) -> None:
    with pytest.raises(ValueError, match="Feature `caption`: `template` .* holds {} once"):
        Feature("caption", kind="text", template=template)


def test_a_template_is_for_texts() -> None:
    with pytest.raises(ValueError, match="Found kind `id`"):
        Feature("caption", template="a {}.")


def test_tokens_of_a_batch_end_with_its_longest_text(tmp_path: Path, rows: pl.DataFrame) -> None:
    class Letters(torch.nn.Module):
        reads, padding, width = "text", 0, 1

        def tokens(self, texts: list[str]) -> torch.Tensor:
            longest = max(map(len, texts))
            return torch.tensor([[*map(ord, text), *[0] * (longest - len(text))] for text in texts])

    found = encoded(make_data(tmp_path, features=(Feature("caption", kind="text"),)), rows)
    attach(found, Letters())
    assert found.readers["caption"](np.array([0, 3])).tolist() == [[*b"red"], [*b"red"]]
    assert found.readers["caption"](np.array([0, 1])).tolist() == [[*b"red", 0, 0], [*b"green"]]


def test_bytes_that_hold_a_jpeg_are_read_without_being_written_again(tmp_path: Path, rows: pl.DataFrame) -> None:
    raw = as_bytes(array(), "JPEG")
    found = encoded(make_data(tmp_path), rows.with_columns(picture=pl.lit(raw)))
    assert len(found.contents["picture"]) == 1 and found.contents["picture"].raw(0)[0] == raw
