"""The run files of `docs/data-sets.md` for Criteo and Avazu read small files of our own in the owners' formats."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from unbraid import config
from unbraid.bundle import Bundle
from unbraid.data.describe import describe
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.job import train, write_predictions
from unbraid.predictor import Predictor

PAGE = (Path(__file__).parents[2] / "docs" / "data-sets.md").read_text()
HASHES = [f"{value:08x}" for value in np.random.default_rng(1).integers(0, 2**32, 12)]


def documented(title: str, folder: Path) -> config.Run:
    """The run file of a section of the page, in a folder."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    (found,) = re.findall(r"^```toml\n(.*?)^```", text, re.M | re.S)
    (folder / "run.toml").write_text(found)
    run = config.load(folder / "run.toml")
    features = tuple(replace(f, min_count=1) for f in run.data.features)  # the files are small
    training = replace(run.training, batch_size=32, steps=3, evaluate_every=3)
    return replace(run, data=replace(run.data, features=features, cache=str(folder / "cache")), training=training)


def written(folder: Path, name: str, rows: list[list[Any]], separator: str) -> None:
    (folder / name).write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))


def codes(table: Encoded, name: str, values: list[Any]) -> list[int]:
    """Codes of values as text: 0 unknown, 1 missing, then those of the training split."""
    known = dict(zip(map(str, table.fitted.vocabularies[name].values), range(2, 999), strict=False))
    return [1 if value == "" else known.get(str(value), 0) for value in values]


# ---------------------------------------------------------------------------------------------------------------- Criteo
def criteo(rows: int = 700) -> list[list[Any]]:
    """Label, 13 whole numbers (long-tailed, some negative), 26 categories of 8 hexadecimal digits; a tenth is missing."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(rows):
        numbers = [int(x) for x in np.exp(rng.normal(2, 2, 13))]
        numbers[1] = int(rng.integers(-3, 100))
        categories = rng.choice(HASHES, 26).tolist()
        cells = [*numbers, *categories]
        for at in np.flatnonzero(rng.random(39) < 0.1):
            cells[at] = ""
        lines.append([int(rng.random() < 0.3), *cells])
    lines[0][1:14] = [""] * 13  # a column's first value may be missing
    return lines


def test_criteo(tmp_path: Path) -> None:
    lines = criteo()
    written(tmp_path, "train.txt", lines, "\t")
    run = documented("Criteo", tmp_path)
    assert [f.name for f in run.data.features] == [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]
    assert run.data.text[0].names == ("label", *(f.name for f in run.data.features))
    table = Encoded(encode(run.data, tmp_path))
    splits = {name: table.split(name).tolist() for name in ("train", "valid", "test")}
    assert splits == {"train": list(range(600)), "valid": list(range(600, 650)), "test": list(range(650, 700))}
    batch = table.batch(np.arange(700))
    assert batch.labels["click"].tolist() == [float(line[0]) for line in lines]
    for place in range(1, 14):
        exact = batch.features[f"I{place}.exact"][:, 0].numpy()
        missing = np.array([line[place] == "" for line in lines])
        assert np.array_equal(batch.features[f"I{place}"][:, 1].numpy() == 1, missing)
        assert exact[~missing].tolist() == [float(line[place]) for line in lines if line[place] != ""]
    for place in range(14, 40):
        want = codes(table, f"C{place - 13}", [line[place] for line in lines])
        assert batch.features[f"C{place - 13}"].tolist() == want
    result = train(run, tmp_path / "out", baseline=False)
    assert result.metrics["test"]["click"]["auc"]["value"] > 0
    assert {type(m).__name__ for m in result.bundle.model.numbers.values()} == {"NumeralNumber"}
    again = Bundle.load(tmp_path / "out")
    assert again.run.data.text == run.data.text
    written(tmp_path, "new.txt", lines[650:], "\t")  # read like train.txt
    predictor = Predictor(again, tmp_path)
    found = predictor.predict(tmp_path / "new.txt")
    with torch.no_grad():
        want = again.model.eval()(table.batch(np.arange(650, 700))).logits["click"].double().sigmoid()
    np.testing.assert_allclose(found["click"].to_numpy(), want, atol=1e-6)
    written(tmp_path, "test.txt", [line[1:] for line in lines[650:]], "\t")  # the owner's has no label
    assert predictor.predict(tmp_path / "test.txt").equals(found)
    write_predictions(tmp_path / "new.txt", found, tmp_path / "predicted.parquet", predictor.data)
    assert pl.read_parquet(tmp_path / "predicted.parquet").columns == [*run.data.text[0].names, "predicted_click"]


# ----------------------------------------------------------------------------------------------------------------- Avazu
HEADER = [
    "id", "click", "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain",
    "app_category", "device_id", "device_ip", "device_model", "device_type", "device_conn_type",
    *(f"C{i}" for i in range(14, 22)),
]  # fmt: skip


def avazu() -> list[list[Any]]:
    """Three rows an hour of the ten days; ids are as long as the owner's, beyond 64 bits."""
    rng = np.random.default_rng(0)
    lines = []
    for hour in range(240):
        for _ in range(3):
            ids = rng.choice(HASHES, 9).tolist()
            few = [int(x) for x in rng.integers(0, 5, 2)]
            ads = [int(x) for x in rng.integers(15000, 15010, 7)]
            lines.append([
                10**19 + len(lines), int(rng.random() < 0.2), f"1410{21 + hour // 24}{hour % 24:02d}", 1005, *few[:1], *ids,
                1, *few[1:], *ads, rng.choice([-1, 100084]),
            ])  # fmt: skip
    return lines


def test_avazu(tmp_path: Path) -> None:
    lines = avazu()
    written(tmp_path, "train.csv", [HEADER, *lines], ",")
    run = documented("Avazu", tmp_path)
    assert {f.source for f in run.data.features} == {"hour % 100", *HEADER} - {"id", "click", "hour"}
    table = Encoded(encode(run.data, tmp_path))
    counts = {name: len(table.split(name)) for name in ("train", "valid", "test")}
    assert counts == {"train": 8 * 72, "valid": 72, "test": 72}
    batch = table.batch(np.arange(720))
    moments = [datetime.strptime(f"20{line[2]}", "%Y%m%d%H").replace(tzinfo=UTC).timestamp() for line in lines]
    assert (batch.meta["time"].numpy() / 1e6).tolist() == moments
    assert batch.labels["click"].tolist() == [float(line[1]) for line in lines]
    assert batch.features["hour_of_day"].tolist() == codes(table, "hour_of_day", [int(line[2][-2:]) for line in lines])
    for name in HEADER[3:]:
        want = codes(table, name, [line[HEADER.index(name)] for line in lines])
        assert batch.features[name].tolist() == want
    assert train(run, baseline=False).metrics["test"]["click"]["auc"]["value"] > 0


# ------------------------------------------------------------------------------------------------------ a look at the data
@pytest.mark.parametrize(("title", "name", "lines"), [("Criteo", "train.txt", criteo), ("Avazu", "train.csv", avazu)])
def test_describe_reads_them(title: str, name: str, lines: Any, tmp_path: Path) -> None:
    header = [HEADER] if title == "Avazu" else []
    written(tmp_path, name, [*header, *lines()], "," if header else "\t")
    found = describe(documented(title, tmp_path).data, tmp_path)
    rows = found["rows"]
    assert rows["train"] == (576 if header else 600) and rows["valid"] == rows["test"] == (72 if header else 50)
