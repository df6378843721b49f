"""What a user is told: refusals that name the place and the fix, tables that fit, figures that say why they are empty."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from test_citations import keys
from test_docs import small_schema
from toylog import make_data, make_log, make_run
from typer.testing import CliRunner

from unbraid import config, recipes
from unbraid.analysis import collapse
from unbraid.bundle import build
from unbraid.citations import citations
from unbraid.cli.common import refuse_unread
from unbraid.cli.main import app
from unbraid.config import ModelChoice
from unbraid.data.declaration import Data, Split
from unbraid.data.encode import encode
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.encoders.numeral import Numeral
from unbraid.encoders.similarity import Similarity
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.job import train
from unbraid.losses.exposure import Exposure
from unbraid.losses.ranking import Ranking
from unbraid.losses.supervised import Supervised
from unbraid.render import render_table
from unbraid.schedules import online
from unbraid.train import Watcher
from unbraid.types import Feature, Finding, Task

ROOT = Path(__file__).parent.parent


def said(*words: Any, code: int = 2) -> str:
    """What the command line says."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


# --------------------------------------------------------------------------------------------------------- domains
@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model.tables.by", {"model": ModelChoice(tables=Views(kind="per_task", by="domain"))}),
        ("model.heads.by", {"model": ModelChoice(heads=Heads(by="domain"))}),
        ("losses.0.by", {"losses": (Supervised(by="domain"),)}),
        ("losses.0.by", {"losses": (Supervised(by="task@domain"),)}),
        ("losses.1.within", {"losses": (Supervised(), Ranking(within="domain"))}),
    ],
)
def test_what_is_by_domain_needs_domains(key: str, change: dict[str, Any]) -> None:
    make_run(**change)
    with pytest.raises(ValueError, match=f"`{key}` needs domains, and the data declare none: set `data.domain`"):
        make_run(data=make_data(domain=""), **change)


# ------------------------------------------------------------------------------------------------------ the command line
def test_a_budget_that_the_schedule_does_not_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(config.dumps(make_run(schedule=online.Online())))
    run = tmp_path / "run.toml"
    message = said("train", run, "--steps", 3, "--out", tmp_path / "a")
    assert "--steps: schedule online does not read it. Set schedule.epochs or schedule.first_epochs instead" in message
    message = said("train", run, "--set", "training.epochs=2", "--out", tmp_path / "a")
    assert "--set training.epochs: schedule online does not read it" in message
    assert "--steps: schedule online" in said("compare", run, "--steps", 3, "--out", tmp_path / "a")
    refuse_unread([make_run(schedule=online.Online()), make_run()], ["training.epochs=2"], 3)  # one of them reads it


def test_options_of_exploration_are_named(tmp_path: Path) -> None:
    for name in ("ucb", "thompson"):
        message = said("predict", tmp_path, tmp_path, "--out", "x.parquet", "--explore", name, "--strength", "-1")
        assert "--strength should be finite and not negative. Found -1" in message
    message = said("predict", tmp_path, tmp_path, "--out", "x.parquet", "--explore", "thompson", "--share", "all")
    assert "--share should be one of request, row, call. Found all" in message


def test_recipes_are_listed_by_a_whole_sentence() -> None:
    lines = said("recipes", code=0).splitlines()
    assert len(lines) == len(recipes.RECIPES) and all(line.rstrip().endswith(".") for line in lines)
    assert any("a gate per task; numbers in numeral systems" in line for line in lines)


def test_the_version_of_a_source_tree(tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, runpy, sys\n"
        "def missing(name): raise m.PackageNotFoundError(name)\n"
        "m.version = missing\n"
        "sys.argv = ['unbraid', '--version']\n"
        "runpy.run_module('unbraid', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "src", timeout=120)
    assert done.returncode == 0 and "source tree" in done.stdout and not done.stderr


def test_a_ranking_cites_its_form_alone() -> None:
    of_form = {"pair": {"burges2005ranknet", "lin2024rankingloss"}, "list": {"lin2024rankingloss"},
               "listce": {"bai2023listce"}, "jrc": {"sheng2023jrc"}}  # fmt: skip
    plain = set(keys(citations(make_run())))
    for form, wanted in of_form.items():
        run = make_run(losses=(Supervised(), Ranking(form=form)))
        assert set(keys(citations(run))) - plain == wanted


# ------------------------------------------------------------------------------------------------------ what the data hold
def numbers(values: list[Any], **keys: Any) -> None:
    log = pl.DataFrame({"x": values, "label": [0, 1] * 6, "split": ["train"] * 8 + ["valid"] * 2 + ["test"] * 2})
    feature = Feature("x", **{"kind": "number", **keys})
    data = Data("log", (feature,), (Task("label"),), split=Split(kind="column", column="split"))
    encode(data, tables={"log": log})


@pytest.mark.parametrize("place", [2, 11])  # in the training split, and after it
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinity_is_named(place: int, value: float) -> None:
    values = [1.0] * 12
    values[place], values[0] = value, float("nan")
    with pytest.raises(DataError) as error:
        numbers(values, nan="missing")
    assert "`x` holds infinity, or numbers beyond single precision, in 1 rows, which `nan` is not about" in str(
        error.value
    )
    numbers(values, nan="missing", column="CASE WHEN ABS(x) < 1e38 THEN x END")  # what it advises
    with pytest.raises(DataError, match="holds NaN in 1 rows"):
        numbers([float("nan"), *[1.0] * 11])


def test_nan_in_vectors_is_counted() -> None:
    nan = float("nan")
    rows = [[1.0, 2.0], [nan, nan], [1.0, None], [float("inf"), 0.0], None, *[[0.0, 1.0]] * 7]
    with pytest.raises(
        DataError, match="infinity in 3 rows. Write null for the whole vector .*leave those rows out with `data.keep`"
    ):
        numbers(rows, kind="vector")


def test_exposure_that_no_loss_reads_is_noted() -> None:
    notes: list[str] = []

    class Ear(Watcher):
        def note(self, text: str) -> None:
            notes.append(text)

    run = make_run(data=make_data(exposure=("user", "item")))
    tables = {"log": make_log(rows=300)}
    train(run, tables=tables, baseline=False, watcher=Ear())
    assert [text for text in notes if "data.exposure is counted for every row, and no loss reads it" in text]
    notes.clear()
    weighted = replace(run, losses=(Supervised(exposure=Exposure()),))
    train(weighted, tables=tables, baseline=False, watcher=Ear())
    assert not [text for text in notes if "data.exposure" in text]


# ------------------------------------------------------------------------------------------------------ what a run says
def refused(*settings: str, run: config.Run | None = None) -> str:
    with pytest.raises(config.RunError) as error:
        config.override(run or make_run(), settings)
    return str(error.value)


def test_settings_of_another_shape() -> None:
    one = refused("model.vectors.kind=similarity", 'model.vectors.pairs=["a", "b"]')
    assert '`model.vectors.pairs` should be a list of lists, such as [["a", "b"]]. Found ["a", "b"]' in one
    assert one.count("pairs") == 2, "said once, and once in the settings"
    assert '`model.numbers` is a table, whose `kind` says what it is: `model.numbers.kind = "numeral"`' in refused(
        "model.numbers=numeral"
    )
    message = refused("schedule.kind=online", "schedule.period=week")
    assert (
        "`period` should be day, hour or a number of seconds of at least 1, such as 604800 for a week. Found week"
        in message
    )
    assert "\n" not in message
    message = refused("schedule.kind=online", "schedule.period=0.5")
    assert "`schedule.period` should be text or an integer. Found 0.5" in message and "\n" not in message
    message = refused("model.tables.kind=several")
    assert "Tables of kind `several` need `widths`" in message and "such as `model.tables.widths = [8, 16]`" in message


@pytest.mark.parametrize("pairs", [(("a", "a"),), (("a", "b"), ("c", "d"), ("b", "a")), (("a", "b"), ("a", "b"))])
def test_pairs_of_vectors_that_say_nothing_new(pairs: Any) -> None:
    with pytest.raises(ValueError, match="`pairs` should hold two different vectors each, and each pair once. Found"):
        Similarity(pairs=pairs)


def test_each_step_to_tables_per_task_is_told() -> None:
    """From the assembled system to STEM, one setting after another."""
    run = recipes.tencent()
    steps = ["model.tower.kind=stem", "model.tables.kind=per_task", "model.tables.widths=[]", "model.experts=[]"]
    page = (ROOT / "docs" / "tencent.md").read_text()
    assert " ".join(f"--set '{s}'" if "[" in s else f"--set {s}" for s in steps) in page
    schema = small_schema(run.data)
    with pytest.raises(
        ValueError, match="model.tables.kind to `per_task`, and model.tables.widths and model.experts to"
    ):
        build(config.override(run, steps[:1]), schema)
    message = refused(*steps[:2], run=run)
    assert "Set `model.tables.widths` to [], and `model.experts`, too" in message
    with pytest.raises(ValueError, match="or set `model.experts` to \\[\\]"):
        build(config.override(run, steps[:3]), schema)
    build(config.override(run, steps), schema)


def make_encoded(**changes: Any) -> Encoded:
    return Encoded(encode(make_data(**changes), tables={"log": make_log(rows=300)}))


def test_whole_numerals_of_a_logarithm_say_so() -> None:
    features = (Feature("shop", kind="number", transform="log1p"), Feature("item"))
    encoded = make_encoded(features=features)
    run = make_run(data=make_data(features=features), model=ModelChoice(numbers=Numeral(scale="integer")))
    with pytest.raises(
        ValueError, match='`shop` has .*scale = "quantile" or "log", or take transform = "log1p" off the feature'
    ):
        build(run, encoded.schema)
    plain = (Feature("price", kind="number"), Feature("item"))
    with pytest.raises(ValueError, match='"quantile" or "log"\\.$'):
        build(replace(run, data=make_data(features=plain)), make_encoded(features=plain).schema)


# -------------------------------------------------------------------------------------------------------------- tables
def metrics(ranks: bool, *domains: str) -> dict[str, Any]:
    def found(shift: float) -> dict[str, Any]:
        names = ["gauc", "logloss", "calibration", "ece"]
        names += [f"{name}@{k}" for name in ("ndcg", "recall") for k in (5, 10)] if ranks else []
        value = {"value": 0.7 + shift, "low": 0.6, "high": 0.8}
        return {"auc": value, **{name: {"value": 0.5} for name in names}, "rows": 123_456, "positives": 12_345}

    return {"long_view": {**found(0.0123), "domains": {name: found(0.01) for name in domains}}}


@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize("width", [200, 120, 100, 80, 60, 45])
def test_a_table_always_shows_the_comparison(ranks: bool, width: int) -> None:
    ours, theirs = metrics(ranks, "a_domain_with_a_long_name"), metrics(ranks, "a_domain_with_a_long_name")
    theirs["long_view"]["auc"]["value"] = 0.6
    made, out = render_table(ours, theirs, width=width), io.StringIO()
    Console(file=out, width=width).print(made)
    (line,) = [line for line in out.getvalue().splitlines() if " all " in line]
    assert "0.7123" in line and "0.6000" in line and line.rstrip().endswith("+0.1123")
    assert ("recall@10" in out.getvalue()) == (ranks and width == 200)
    assert ("123,456" in line) == (width >= 100) and ("[0.6000, 0.8000]" in line) == (width >= 100)


# ------------------------------------------------------------------------------------------------------------- figures
def record(auc: float | None, **more: Any) -> dict[str, Any]:
    live = {"rows": 5, "positives": 1, "auc": auc, "pcoc": 1.0, "logloss": 0.3, **more}
    return {"kind": "online", "periods": [{"begin": f"2022-05-0{i}", "live": {"click": live}} for i in (1, 2)]}


def texts(drawn: Any, panel: int) -> list[str]:
    return [text.get_text() for text in drawn.axes[panel].texts]


def test_an_empty_panel_says_why() -> None:
    drawn = online.plot(record(None, why="fewer than 10 positives"), "click")
    assert texts(drawn, 0) == ["fewer than 10 positives"] and texts(drawn, 1) == []
    assert texts(online.plot(record(0.7), "click"), 0) == []


def test_a_plot_over_time_needs_a_stream() -> None:
    with pytest.raises(
        ValueError, match="needs the record of a run with schedule `online`.*Found that of schedule `fork_merge`"
    ):
        online.plot({"kind": "fork_merge", "branches": []}, "click")
    with pytest.raises(ValueError, match="`schedule` of its metrics.json. Found no periods in it"):
        online.plot({}, "click")


def test_the_remedy_of_collapse_depends_on_the_tables() -> None:
    encoded = make_encoded()
    batches = list(encoded.in_order(encoded.split("train"), 64))
    for views, start in (
        (Views(width=4), "Several narrow sets"),
        (Views(kind="several", widths=(2, 4)), "The model has several"),
    ):
        model = build(make_run(model=ModelChoice(tables=views)), encoded.schema)
        found = collapse.Collapse()(model, encoded.schema, batches)
        assert found.remedy.startswith(start) and "were not less collapsed" in found.remedy


def test_names_and_legend_of_the_collapse_plot_are_not_cut() -> None:
    long = "view1/a_vocabulary_with_quite_a_long_name_indeed"
    rng = np.random.default_rng(0)
    table = {"rows": 100_000, "size": 100_000, "width": 8, "spectrum": np.linspace(1, 0.1, 8), "abundance": 4.0,
             "random": np.array([7.0]), "relative": 0.6}  # fmt: skip
    fields = [f"a_field_with_quite_a_long_name_{i}" for i in range(12)]
    grid = {"view0.cross": {"fields": fields, "abundance": rng.random(12), "grid": 1 + rng.random((12, 12))}}
    values = {"tables": {f"{long}_{i}": table for i in range(20)}, "projected": grid, "skipped": {}, "normalise": False}
    drawn = collapse.plot(Finding("collapse", values, unit="", reading="", reference="", remedy=""))
    drawn.canvas.draw()
    whole = drawn.bbox
    for axis in drawn.axes[1:3]:  # whose ticks are names; others have ticks beyond their limits, which are not drawn
        for label in [*axis.get_yticklabels(), *axis.get_xticklabels(), axis.xaxis.label, axis.yaxis.label]:
            box = label.get_window_extent()
            assert box.x0 >= whole.x0 - 1 and box.y0 >= whole.y0 - 1 and box.x1 <= whole.x1 + 1, label.get_text()
    (legend,) = drawn.legends
    bars = drawn.axes[1].get_window_extent()
    assert not bars.overlaps(legend.get_window_extent()) and bars.width > 150
