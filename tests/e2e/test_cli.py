"""The commands, as a user types them, in this process where that is enough and in their own where it is not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from toylog import make_log, make_run
from typer.testing import CliRunner, Result

from unbraid import config, recipes, store
from unbraid.cli.main import app

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def unbraid(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def ok(*words: str | Path) -> str:
    result = unbraid(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*words: str | Path) -> str:
    result = unbraid(*words)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a log and a run file."""
    make_log().write_parquet(tmp_path / "log")
    (tmp_path / "log").rename(tmp_path / "log.parquet")
    run = make_run()
    text = config.dumps(run).replace('rows = "log"', 'rows = "log.parquet"')
    (tmp_path / "run.toml").write_text(text)
    return tmp_path


def test_train_evaluate_predict(here: Path) -> None:
    out = ok("train", here / "run.toml", "--out", here / "b")
    assert "baseline" in out and "diff." in out and str(here / "b" / "report.md") in out
    metrics = json.loads((here / "b" / "metrics.json").read_text())
    again = json.loads(ok("evaluate", here / "b", "--json"))
    assert again["test"] == metrics["test"]
    valid = json.loads(ok("evaluate", here / "b", "--split", "valid", "--json"))
    assert valid["valid"]["click"]["auc"] != metrics["test"]["click"]["auc"]
    ok("predict", here / "b", here / "log.parquet", "--out", here / "p.parquet")
    predicted = pl.read_parquet(here / "p.parquet")
    assert predicted.drop("predicted_click", "predicted_buy").equals(pl.read_parquet(here / "log.parquet"))
    assert predicted["predicted_click"].is_between(0, 1).all()
    labelled = json.loads(ok("evaluate", here / "b", here / "p.parquet", "--json"))
    assert labelled["rows"]["click"]["rows"] == 600
    new, log = here / "new.parquet", pl.read_parquet(here / "log.parquet")
    log.drop("click", "buy").write_parquet(new)
    assert f"no labels in {new}: column `click`, `buy` is missing" in fails("evaluate", here / "b", new)
    log.with_columns(click=pl.lit(None), buy=pl.lit(None)).write_parquet(new)
    assert f"no labels in {new}: they are all null" in fails("evaluate", here / "b", new)
    log.drop("buy").write_parquet(new)
    assert json.loads(ok("evaluate", here / "b", new, "--json"))["rows"]["click"]["rows"] == 600


def test_train_json_and_settings(here: Path) -> None:
    out = ok(
        "train",
        here / "run.toml",
        "--out",
        here / "b",
        "--json",
        "--set",
        "model.tower.kind=mmoe",
        "--seed",
        "3",
        "--steps",
        "5",
    )
    assert set(json.loads(out)["test"]) == {"click", "buy"}
    saved = config.load(here / "b" / "run.toml")
    assert (saved.seed, saved.training.steps, saved.model.tower.kind) == (3, 5, "mmoe")


def test_every_recipe_is_a_run_file_that_loads(tmp_path: Path) -> None:
    names = json.loads(ok("recipes", "--json"))
    assert list(names) == list(recipes.RECIPES)
    for name in names:
        (tmp_path / f"{name}.toml").write_text(ok("recipe", name))
        assert config.load(tmp_path / f"{name}.toml") == recipes.get(name)
    assert "There is no recipe `stemm`. Recipes: stem" in fails("recipe", "stemm")


def edit(here: Path, old: str, new: str) -> Path:
    text = (here / "run.toml").read_text()
    assert old in text
    (here / "run.toml").write_text(text.replace(old, new))
    return here / "run.toml"


def relog(here: Path, **columns: pl.Expr) -> Path:
    pl.read_parquet(here / "log.parquet").with_columns(**columns).write_parquet(here / "log.parquet")
    return here / "run.toml"


def test_bad_input_is_named(here: Path) -> None:
    def train(run: Path) -> str:
        return fails("train", run, "--out", here / "b")

    assert "There is no run file" in train(here / "nothing.toml")
    original = (here / "run.toml").read_text()

    assert "unknown key `trainin`" in train(edit(here, "[training]", "[trainin]"))
    (here / "run.toml").write_text(original)
    message = train(edit(here, 'rows = "log.parquet"', 'rows = "lag.parquet"'))
    assert "There is no table `lag.parquet`" in message and "log.parquet" in message
    (here / "run.toml").write_text(original)
    message = train(edit(here, 'user = "user"', 'user = "member"'))
    assert "there is no column `member`" in message and "site" in message
    (here / "run.toml").write_text(original)

    log = pl.read_parquet(here / "log.parquet")
    run = relog(here, click=pl.when(pl.int_range(pl.len()) == 5).then(3).otherwise("click"))
    assert "labels of `click` should be 0 or 1" in train(run) and "in 1 rows" in train(run)
    log.write_parquet(here / "log.parquet")
    run = relog(here, price=pl.when(pl.int_range(pl.len()) == 5).then(float("nan")).otherwise("price"))
    message = train(run)
    assert "`price` holds NaN in 1 rows" in message and 'nan = "missing"' in message
    log.write_parquet(here / "log.parquet")
    run = relog(here, click=pl.lit(1))
    assert "all 361 observed labels of the training split are 1" in train(
        run
    ) or "observed labels of the training split are 1" in train(run)
    log.write_parquet(here / "log.parquet")
    assert "split is empty" in train(edit(here, "test_from = 800000000", "test_from = 99999999999"))
    (here / "run.toml").write_text(original)
    data = (here / "log.parquet").read_bytes()
    (here / "log.parquet").write_bytes(data[: len(data) // 2])
    assert "log.parquet cannot be read" in train(here / "run.toml")
    assert not list((here / "b").glob("*.safetensors"))


def test_mistakes_of_a_first_day_are_answered(here: Path) -> None:
    run = here / "run.toml"
    assert "There is nothing to resume" in fails("train", run, "--out", here / "typo", "--resume")
    assert "There is nothing to resume" in fails("train", "--out", here / "typo", "--resume")
    assert "is data, not a run file. `unbraid init" in fails("train", here / "log.parquet")
    assert "is a file. Choose another --out" in fails("train", run, "--out", here / "log.parquet")
    assert "`seed` should not be negative" in fails("train", run, "--seed", "-1")
    message = fails("train", run, "--set", "model.tower.kind=stm")
    assert "`model.tower` has no kind `stm`. Did you mean `stem`? Allowed: shared_bottom, mmoe, stem" in message
    original = run.read_text()
    pl.DataFrame({"uid": [1, 2], "country": ["no", "se"]}).write_parquet(here / "users.parquet")
    join = '[[data.joins]]\ntable = "users.parquet"\non = "uid"\n\n[data.split]'
    message = fails("train", edit(here, "[data.split]", join), "--out", here / "j")
    assert (
        "Join of `users.parquet`: the rows have no column `uid`. Columns: user, item" in message and "__" not in message
    )
    run.write_text(original)
    ok("train", run, "--out", here / "b", "--no-baseline")
    assert "There is no file or folder" in fails(
        "predict", here / "b", here / "nope.parquet", "--out", here / "p.parquet"
    )
    assert "should be a .parquet file" in fails("predict", here / "b", here / "log.parquet", "--out", here / "p.csv")
    message = fails("train", run, "--out", here / "b", "--resume", "--set", "training.steps=7")
    assert "(there / here): training.steps: 20 / 7" in message


def test_one_class_in_one_domain_is_a_warning_and_null(here: Path) -> None:
    run = relog(here, click=pl.when(pl.col("site") == "mail").then(0).otherwise("click"))
    result = unbraid("train", run, "--out", here / "b")
    assert result.exit_code == 0, result.output
    assert "task click, domain mail: only 0s in the training split" in result.stderr
    mail = json.loads((here / "b" / "metrics.json").read_text())["test"]["click"]["domains"]["mail"]
    assert mail["auc"]["value"] is None and mail["auc"]["why"]


def test_a_full_disk_leaves_nothing_half_written(here: Path) -> None:
    """Files may not grow past a limit: the encode, then the checkpoint, fails with a clear message and no leftovers."""
    limit = (
        "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from unbraid.cli.main import app; app(sys.argv[2:])"
    )
    cache = here / "cache2"
    env = {**ENV, "UNBRAID_CACHE": str(cache)}

    words = ["train", str(here / "run.toml"), "--set", "training.checkpoint_steps=2", "--out"]

    def limited(size: int, out: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", limit, str(size), *words, str(here / out)]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    small = limited(3000, "b1")
    assert small.returncode == 2 and "Traceback" not in small.stderr and "File too large" in small.stderr
    assert not list(cache.rglob("columns.json")) and not list(cache.iterdir())
    middle = limited(30_000, "b2")
    assert middle.returncode == 2 and "Cannot write" in middle.stderr and "bytes; " in middle.stderr
    assert not list((here / "b2").glob("*.safetensors")) and not list((here / "b2").glob(".*unbraid*"))
    ok(*words, here / "b2", "--resume")


@pytest.mark.slow
def test_kill_nine_four_times_then_resume_is_bit_equal(here: Path) -> None:
    """Four deaths by SIGKILL at random moments of training, each resumed: the weights are those of an undisturbed run."""
    settings = [
        "model.tower.kind=stem", "model.tower.dropout=0.2", "model.tables.kind=per_task", "model.tables.lazy_rows=0",
        "update.table_weight_decay=0.01", "training.steps=1200", "training.evaluate_every=100", "training.checkpoint_steps=7",
    ]  # fmt: skip
    words = [sys.executable, "-m", "unbraid", "train", str(here / "run.toml"), "--no-baseline"]
    words += [w for s in settings for w in ("--set", s)]
    env = {**ENV, "UNBRAID_CACHE": str(here / "cache3")}
    subprocess.run([*words, "--out", str(here / "whole")], env=env, check=True, capture_output=True)
    chance, kills, steps = random.Random(0), 0, []
    while kills < 4:
        resume = ["--resume"] if (here / "cut" / "run.toml").exists() else []
        process = subprocess.Popen(
            [*words, "--out", str(here / "cut"), *resume], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        checkpoint = here / "cut" / "fit-0.safetensors"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.01)  # until it has trained beyond the last checkpoint
        time.sleep(chance.random() * 0.7)
        assert process.poll() is None, "it should die before it is done"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        steps.append(store.load(checkpoint)["step"])
    assert steps == sorted(steps) and len(set(steps)) == 4, steps
    subprocess.run([*words, "--out", str(here / "cut"), "--resume"], env=env, check=True, capture_output=True)
    whole, cut = (store.load(here / name / "weights.safetensors") for name in ("whole", "cut"))
    assert all((whole[k] == cut[k]).all() for k in whole) and whole.keys() == cut.keys()
    logs = [(here / name / "log.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = (
        "import sys, unbraid.cli.main; from typer.testing import CliRunner; "
        "r = CliRunner().invoke(unbraid.cli.main.app, ['--help']); assert r.exit_code == 0; "
        "print('torch' in sys.modules, 'polars' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True).stdout
    assert out.split() == ["False", "False"]
