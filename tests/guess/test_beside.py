"""Pictures with a table of labels beside them, from `unbraid init` to a training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import picturekit as kit
import polars as pl
import pytest
from typer.testing import CliRunner

from unbraid import config
from unbraid.backbones.small_conv import SmallConv
from unbraid.cli.main import app
from unbraid.data.encode import encode
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.guess.beside import has_labels

N = 60
LABELS = [kit.CLASSES[n % 3] for n in range(N)]


def written(folder: Path, paths: Iterable[str]) -> Path:
    for n, path in enumerate(paths):
        kit.write(folder / path, kit.array(n, n % 3, (12, 12)))
    return folder


def initiated(folder: Path, *options: str) -> tuple[config.Run, str, str]:
    """The run, the run file and what the terminal shows of ``unbraid init FOLDER``."""
    done = CliRunner().invoke(app, ["init", str(folder), *options])
    assert done.exit_code == 0, done.output
    file = folder.parent / "run.toml"
    file.write_text(done.stdout)
    return config.load(file), done.stdout, done.stderr


def trained(folder: Path, *options: str) -> None:
    words = ["train", str(folder / "run.toml"), "--out", str(folder / "out"), "--json", "--no-report", *options]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


def table_of(run: config.Run) -> pl.DataFrame:
    return pl.read_parquet(Path(run.data.folder) / run.data.rows)


def test_a_csv_of_file_names_and_labels_trains(tmp_path: Path) -> None:
    folder = written(tmp_path / "pets", [f"images/p{n}.png" for n in range(N)])
    pl.DataFrame({"file": [f"p{n}.png" for n in range(N)], "label": LABELS}).write_csv(folder / "labels.csv")
    run, text, shown = initiated(folder)
    assert [(f.name, f.kind) for f in run.data.features] == [("picture", "image")]
    assert [(t.name, t.kind) for t in run.data.tasks] == [("label", "multiclass")]
    assert (
        run.model.images == SmallConv(size=12) and run.training.metric == "accuracy" and run.training.batch_size == 32
    )
    assert "the files that `file` of labels.csv names; rows.parquet is that table with their paths" in text
    assert "pictures in 60 rows" in shown and f"wrote {folder / 'rows.parquet'}" in shown
    assert table_of(run)["picture"].to_list() == [f"images/p{n}.png" for n in range(N)]
    assert initiated(folder)[1] == text, "again, over its own table"
    assert Encoded(encode(run.data)).rows == N
    trained(tmp_path, "--steps", "4")


def test_paths_as_they_are_with_domains_and_a_split(tmp_path: Path) -> None:
    paths = [f"{('photo', 'sketch')[n % 2]}/x{n}.png" for n in range(N)]
    folder = written(tmp_path / "pets", paths)
    parts = ["train"] * 40 + ["valid"] * 10 + ["test"] * 10
    frame = pl.DataFrame({"path": paths, "kind": LABELS, "domain": [p.split("/")[0] for p in paths], "split": parts})
    frame.write_csv(folder / "list.csv")
    run, text, shown = initiated(folder)
    assert run.data.rows == "list.csv" and not (folder / "rows.parquet").exists() and "wrote" not in shown
    assert {f.name: f.kind for f in run.data.features} == {"path": "image", "domain": "id"}
    assert (run.data.domain, run.data.split.column, run.data.tasks[0].name) == ("domain", "split", "kind")
    assert "called so: metrics are printed for each" in text and "# paths of pictures" in text
    trained(tmp_path, "--steps", "4")


def test_numbers_without_a_suffix_in_two_folders_beside_other_columns(tmp_path: Path) -> None:
    folder = written(tmp_path / "skin", [f"part_{n % 2 + 1}/{n:03}.JPG" for n in range(N)])
    rng = np.random.default_rng(0)
    ids = [f"{n:03}" for n in range(N + 5)]
    frame = pl.DataFrame({
        "image_id": ids, "patient_id": [f"s{n % 20}" for n in range(N + 5)], "dx": [*LABELS, *LABELS[:5]],
        "thickness": rng.normal(size=N + 5),
    })  # fmt: skip
    frame.write_parquet(folder / "metadata.parquet")
    written(folder, ["part_1/other.JPG"])
    run, text, shown = initiated(folder, "--label", "dx")
    assert {f.name: f.kind for f in run.data.features} == {"picture": "image", "thickness": "number"}
    assert run.data.user == "patient_id" and run.data.split.kind == "user", "a patient's pictures are in one split"
    assert "! 1 pictures are in no row of metadata.parquet" in shown
    assert "! 5 rows of metadata.parquet have no picture: left out" in shown
    assert table_of(run)["picture"].to_list() == [f"part_{n % 2 + 1}/{n:03}.JPG" for n in range(N)]
    trained(tmp_path, "--steps", "4")


@pytest.mark.parametrize("how", ["words", "files"])
def test_splits_in_other_words_and_in_files(how: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "pets", [f"{n}.png" for n in range(N)])
    frame = pl.DataFrame({"picture_file": [f"/home/me/pets/{n}.png" for n in range(N)], "label": LABELS})
    part = pl.Series("fold", ["training"] * 45 + ["val"] * 15)
    if how == "words":
        frame.with_columns(part).write_csv(folder / "all.csv")
    else:
        frame[:45].write_csv(folder / "train.csv")
        frame[45:].write_csv(folder / "val.csv")
    run, _, _ = initiated(folder)
    rows = table_of(run)
    assert run.data.split.kind == "column" and rows[run.data.split.column].to_list()[45:] == ["test"] * 15
    assert 1 <= (rows[run.data.split.column] == "valid").sum() <= 12, "nothing says what validates: a tenth is drawn"
    assert Encoded(encode(run.data)).rows == N


def test_a_table_that_names_no_pictures_leaves_the_folders_to_say_the_classes(tmp_path: Path) -> None:
    folder = written(tmp_path / "pets", [f"{label}/{n}.png" for n, label in enumerate(LABELS)])
    pl.DataFrame({"number": range(9), "note": list("abcdefghi")}).write_csv(folder / "notes.csv")
    assert not has_labels(folder)
    run, _, _ = initiated(folder)
    assert run.data.rows == "rows.parquet" and set(table_of(run)["label"]) == set(kit.CLASSES)
    assert not has_labels(folder), "nor does the table that was written"


def test_tables_that_are_in_the_way_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "pets", [f"images/{n}.png" for n in range(N)])
    frame = pl.DataFrame({"file": [f"{n}.png" for n in range(N)], "label": LABELS})
    frame.with_columns(picture=pl.lit("a nice one")).write_csv(folder / "labels.csv")
    assert "has a column `picture` beside `file`" in CliRunner().invoke(app, ["init", str(folder)]).output.replace(
        "\n", " "
    )
    frame.write_csv(folder / "labels.csv")
    pl.DataFrame({"mine": [1, 2]}).write_parquet(folder / "rows.parquet")
    from unbraid.guess.infer import infer

    with pytest.raises(DataError, match="rows.parquet is there, and is no table of pictures"):
        infer(folder)


def test_a_name_that_two_pictures_share_is_nobodys(tmp_path: Path) -> None:
    folder = written(tmp_path / "pets", [f"{'ab'[n % 2]}/{n if n > 3 else n // 2}.png" for n in range(N)])
    frame = pl.DataFrame({"file": [f"{n}.png" for n in (0, 1, *range(4, N))], "label": ["x", "y", *LABELS[4:]]})
    frame.write_csv(folder / "labels.csv")
    run, _, shown = initiated(folder)
    assert table_of(run)["picture"].to_list() == [f"{'ab'[n % 2]}/{n}.png" for n in range(4, N)]
    assert "! 2 rows of labels.csv have no picture" in shown and "! 4 pictures are in no row" in shown
