"""The loop: what a service saw becomes tables, these the next bundle, and the service takes it up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from toylog import make_data, make_log, make_run
from typer.testing import CliRunner

from unbraid import config
from unbraid.bundle import Bundle
from unbraid.cli.main import app
from unbraid.data.declaration import Split
from unbraid.predictor import Predictor
from unbraid.serve.ranker import Ranker
from unbraid.serve.store import open_store

pytest.importorskip("lmdb")
ROOT = Path(__file__).parents[2]


def command(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_two_commands_make_the_next_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log, end, more = make_log(), 600 * 10**6, 850 * 10**6
    begun, coming = log.filter(pl.col("time") < end), log.filter(pl.col("time").is_between(end, more, closed="left"))
    begun.write_parquet(tmp_path / "log.parquet")
    split = {"valid_from": 400 * 10**6, "test_from": 500 * 10**6}
    data = make_data(rows="log.parquet", folder=str(tmp_path), split=Split(kind="time", **split))
    (tmp_path / "run.toml").write_text(config.dumps(make_run(data=data)))
    plain = ("--no-baseline", "--no-report")
    command("train", tmp_path / "run.toml", "--out", tmp_path / "bundles" / "1", *plain)
    command("store", "import", tmp_path / "bundles" / "1", tmp_path / "histories", "--keep", "rows")
    with closing(open_store(tmp_path / "histories")) as store:
        ranker = Ranker(tmp_path / "bundles" / "1", store)
        rows = coming.select(list(ranker.sources["rows"])).to_dicts()
        store.append([(u, r._replace(id=f"app-{i}")) for i, (u, r) in enumerate(ranker.records("rows", rows))])

    command("store", "export", tmp_path / "histories", tmp_path / "day", "--until", more)
    cuts = {"train_from": split["test_from"], "valid_from": "1970-01-09T02:26:40", "test_from": 800 * 10**6}
    settings = {"data.folder": "day", **{f"data.split.{key}": at for key, at in cuts.items()}}
    settings |= {"schedule": '{kind = "online", first = 0, period = 100000, epochs = 2}'}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command(
        "train",
        tmp_path / "run.toml",
        "--init",
        tmp_path / "bundles" / "1",
        *words,
        "--out",
        tmp_path / "bundles" / "2",
        *plain,
    )

    old, new = (Bundle.load(tmp_path / "bundles" / name) for name in "12")
    seen = pl.concat([begun, coming])
    counts = {name: seen["time"].is_between(*at, closed="left").sum() for name, at in {
        "trained": (cuts["train_from"], cuts["test_from"]), "test": (cuts["test_from"], more)}.items()}  # fmt: skip
    assert new.metrics["schedule"]["trained"] == counts["trained"] and new.metrics["rows"]["test"] == counts["test"]
    assert new.run.init == str(tmp_path / "bundles" / "1") and new.run.data.folder == str(tmp_path / "day")
    rows_now = coming.tail(50).drop("click", "buy")
    told = [Predictor(one, tmp_path / "day").predict(rows_now)["click"] for one in (old, new)]
    assert not told[0].equals(told[1])
    # the next bundle follows the first in a service: nothing that clients send is another
    with closing(open_store(tmp_path / "histories")) as store:
        a, b = (Ranker(tmp_path / "bundles" / name, store) for name in "12")
        assert {n: c.kind for n, c in a.rows.items()} == {n: c.kind for n, c in b.rows.items()}
        assert {n: c.kind for n, c in a.sources["rows"].items()} == {n: c.kind for n, c in b.sources["rows"].items()}
        assert b.predict(rows_now)["click"].to_list() == pytest.approx(told[1].to_list(), abs=1e-6)


@pytest.mark.slow
def test_the_example_serves_learns_and_drops_nothing(tmp_path: Path) -> None:
    words = ["--days", "3", "--rows", "500", "--steps", "30", "--out", str(tmp_path / "loop")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "online_loop.py"), *words],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("2022-05-")]
    assert [line[:2] for line in lines] == [[f"2022-05-0{day}", "500"] for day in (2, 3, 4)]
    live, frozen, asked, dropped = ([line[i] for line in lines] for i in (2, 3, 9, 10))
    assert live[0] == frozen[0] and lines[0][4] == lines[0][5], "until the first exchange both are the same bundle"
    assert live[1] != frozen[1] and live[2] != frozen[2], "afterwards they are not"
    assert int(asked[0]) < int(asked[1]) < int(asked[2]) and set(dropped) == {"0"}
    assert "the server ended with 0" in done.stdout

    runs = [
        config.load(tmp_path / "loop" / "bundles" / name / "run.toml")
        for name in ("first", *(line[0] for line in lines))
    ]
    trained = [json.loads((tmp_path / "loop" / "bundles" / line[0] / "metrics.json").read_text()) for line in lines]
    for before, run, metrics in zip(runs, runs[1:], trained, strict=False):  # each row once
        assert run.data.split.train_from == before.data.split.test_from
        times: Any = pl.read_parquet(Path(run.data.folder) / "impressions.parquet" / "*.parquet")["time_ms"]
        news = times.is_between(run.data.split.train_from, run.data.split.test_from, closed="left").sum()
        assert metrics["schedule"]["trained"] == news > 400
    assert [Path(run.init).name for run in runs[1:]] == ["first", "2022-05-02", "2022-05-03"]
