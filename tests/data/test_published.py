"""The run files of `docs/data-sets.md` for AliExpress, Ali-CCP and Tenrec read small files of our own in the owners' formats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from unbraid import config
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.job import train

PAGE = (Path(__file__).parents[2] / "docs" / "data-sets.md").read_text()
Scope = dict[str, Any]


def section(title: str, language: str) -> list[str]:
    """The code blocks of a section."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def prepared(title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> config.Run:
    """Run the section's lines of Python, if any, in the folder of the files, and load its run file there."""
    monkeypatch.chdir(folder)
    for text in section(title, "python"):
        exec(compile(text, title, "exec"), {})
    (text,) = section(title, "toml")
    (folder / "run.toml").write_text(text)
    return config.load(folder / "run.toml")


def encoded(run: config.Run, folder: Path) -> Encoded:
    return Encoded(encode(run.data, folder))


def short(run: config.Run) -> config.Run:
    from dataclasses import replace

    return replace(run, training=replace(run.training, batch_size=32, steps=3, evaluate_every=3))


def csv(folder: Path, name: str, rows: list[list[Any]]) -> None:
    (folder / name).write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------------------ AliExpress
def aliexpress(folder: Path) -> dict[tuple[str, str], list[list[Any]]]:
    """Files of four countries: 8 search pages of 10 items each to train on, 4 to test.  Returns the items."""
    rng, items = np.random.default_rng(0), {}
    for country in ("nl", "es", "fr", "us"):
        for part, pages in (("train", 8), ("test", 4)):
            users = [
                [page, *rng.integers(0, 3, 7), *rng.normal(size=23).round(3), *rng.integers(0, 3, 2)]
                for page in range(pages)
            ]
            rows = [
                [page, *rng.normal(size=47).round(3), rng.choice([0, 0, 1, 2])]
                for page in range(pages)
                for _ in range(10)
            ]
            for row in rows:
                for place in (19, 34, 35, 36, 40, 41, 42):
                    row[place - 1] = int(rng.integers(0, 4))
            csv(folder, f"{country}_user_{part}.csv", users)
            csv(folder, f"{country}_item_{part}.csv", rows)
            items[country, part] = rows
    return items


def test_aliexpress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = aliexpress(tmp_path)
    run = prepared("AliExpress", tmp_path, monkeypatch)
    kinds = [f.kind for f in run.data.features if f.name != "country"]
    assert kinds.count("id") == 16 and kinds.count("number") == 63
    names = {f.name for f in run.data.features}
    assert not names & {"item_1", "user_1", "item_49"}, "neither the page nor the label is a feature"
    table = encoded(run, tmp_path)
    assert {name: len(table.split(name)) for name in ("train", "valid", "test")} == {
        "train": 320,
        "valid": 80,
        "test": 80,
    }
    assert set(table.schema.domains[2:]) == {"nl", "es", "fr", "us"}
    batch = table.batch(table.split("test"))
    label = {c: [row[-1] for row in items[c, "test"][20:]] for c in ("nl", "es", "fr", "us")}
    for code, country in enumerate(table.schema.domains[2:], 2):
        mine = batch.domain == code
        assert batch.labels["click"][mine].tolist() == [float(value > 0) for value in label[country]]
        assert batch.labels["conversion"][mine].tolist() == [float(value == 2) for value in label[country]]
        request = batch.meta["request"][mine]
        assert len(set(request.tolist())) == 2, "the last two pages"
    assert len(set(batch.meta["request"].tolist())) == 8, "pages of two countries are not one"
    assert set(train(short(run), baseline=False).metrics["test"]) == {"click", "conversion"}


# --------------------------------------------------------------------------------------------------------------- Ali-CCP
def ali_ccp(folder: Path, part: str, rows: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose own features are 205, 206, 301 and common ones 101, 121, 109_14 (several); returns what they are."""
    rng, known = np.random.default_rng(seed), []
    common = {f"key{k}": {"101": int(rng.integers(0, 40)), "121": int(rng.integers(0, 3))} for k in range(12)}

    def packed(pairs: list[tuple[str, Any]]) -> str:
        return "\x01".join(f"{field}\x02{value}\x031.0" for field, value in pairs)

    lines = []
    for number in range(rows):
        key, click = f"key{rng.integers(0, 12)}", int(rng.random() < 0.5)
        own = {"205": int(rng.integers(0, 30)), "206": int(rng.integers(0, 4)), "301": 1 + number % 3}
        bought = int(click and rng.random() < 0.5)
        lines.append([number, click, bought, key, len(own), packed(list(own.items()))])
        known.append({"click": click, "conversion": bought, **own, **common[key]})
    csv(folder, f"sample_skeleton_{part}.csv", lines)
    several = [("109_14", 205), ("109_14", 121)]  # ids that look like fields must not be taken for them
    table = [[key, 4, packed([*several, *each.items(), ("110_14", 7)])] for key, each in common.items()]
    csv(folder, f"common_features_{part}.csv", table)
    return known


def test_ali_ccp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ali_ccp(tmp_path, "train", 400, 0)
    tested = ali_ccp(tmp_path, "test", 100, 1)
    run = prepared("Ali-CCP", tmp_path, monkeypatch)
    frame = pl.read_parquet(tmp_path / "train.parquet")
    for name in ("101", "121", "205", "206", "301"):
        assert frame[f"f{name}"].to_list() == [str(row[name]) for row in known]
    assert frame["f216"].null_count() == 400 and frame["click"].to_list() == [row["click"] for row in known]
    table = encoded(run, tmp_path)
    assert {name: len(table.split(name)) for name in ("train", "valid", "test")} == {
        "train": 360,
        "valid": 40,
        "test": 100,
    }
    batch = table.batch(table.split("test"))
    assert batch.labels["click"].tolist() == [float(row["click"]) for row in tested]
    assert batch.observed["conversion"].tolist() == [row["click"] == 1 for row in tested]
    assert sorted(table.schema.domains[2:]) == ["1", "2", "3"]
    assert set(train(short(run), baseline=False).metrics["test"]) == {"click", "conversion"}


# ---------------------------------------------------------------------------------------------------------------- Tenrec
def test_tenrec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    header = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age".split(",")
    header += [f"hist_{i}" for i in range(1, 11)]
    rows = []
    for number in range(600):
        age = "\\N" if number % 50 == 0 else rng.integers(1, 8)
        rows.append([number // 6, rng.integers(1, 20), *rng.integers(0, 2, 4), rng.integers(0, 4), rng.integers(0, 9),
                     rng.integers(0, 3), age, *rng.integers(0, 20, 10)])  # fmt: skip
    csv(tmp_path, "ctr_data_1M.csv", [header, *rows])
    run = prepared("Tenrec", tmp_path, monkeypatch)
    sources = {f.source for f in run.data.features}
    assert sources == set(header) - {"user_id", "click", "follow", "like", "share", "watching_times"}, (
        "no outcome is a feature"
    )
    table = encoded(run, tmp_path)
    assert sum(len(table.split(name)) for name in ("train", "valid", "test")) == 600
    batch = table.batch(np.arange(600))
    for name in ("click", "like", "share", "follow"):
        assert batch.labels[name].tolist() == [float(row[header.index(name)]) for row in rows]
    vocabulary = table.fitted.vocabularies["item_id"]
    codes = dict(zip(map(int, vocabulary.values), range(2, 99), strict=False))
    for name in ("item_id", "hist_1", "hist_10"):
        assert batch.features[name].tolist() == [codes.get(int(row[header.index(name)]), 0) for row in rows]
    assert set(train(short(run), baseline=False).metrics["test"]) == {"click", "like", "share", "follow"}
