"""Graphs predict what bundles predict.  ``python tests/test_export.py`` writes the table of `docs/export.md` anew."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from toylog import make_data, make_log, make_run, views_for
from typer.testing import CliRunner

from unbraid import config, export
from unbraid.bundle import Bundle, build
from unbraid.calibration.kept import Calibrators, Kept
from unbraid.calibration.maps import Affine, Calibration, Curves, Linear
from unbraid.class_head import Classes
from unbraid.cli.main import app
from unbraid.config import ModelChoice
from unbraid.data.declaration import Data
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.packed import Listed
from unbraid.encoders.table import Views
from unbraid.graph import PREDICTED, Graph, drawn, inputs_of, mapped, taken_apart
from unbraid.heads import Heads
from unbraid.model import Model
from unbraid.predictor import Predictor
from unbraid.types import Feature, Field, History, Task
from unbraid.uncertainty.last_layer import digest_of

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
LOG = make_log(rows=400)
TABLES = {"log": LOG}
TASKS = (Task("click"), Task("buy"), Task("spend", kind="real"), Task("size", kind="multiclass"))
SMALL = {"features": (Feature("item"), Feature("price", kind="number")), "tasks": (Task("click"),),
         "fields": (Field("item"),), "histories": (History("seen", fields=("item",), length=10),)}  # fmt: skip


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """With weights that tell rows apart, as after training."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model.eval()


def make_bundle(choice: ModelChoice, cache: Path, data: Data | None = None, schedule: Any = None) -> Bundle:
    data = dataclasses.replace(data or make_data(tasks=TASKS), cache=str(cache))
    run = make_run(data=data, model=choice, **({"schedule": schedule} if schedule else {}))
    encoded = Encoded(encode(data, tables=TABLES))
    model: torch.nn.Module = build(run, encoded.schema)
    if schedule is not None:
        codes = [f"domain{code}" for code in range(2, len(encoded.schema.domains))]
        keys = [f"task/{task.name}" for task in encoded.schema.tasks] if schedule.by == "task" else [*codes, "root"]
        model = schedule.module(model, [f"models.{key}.x" for key in keys])
    return Bundle(run, encoded.fitted, moved(model), {})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(ModelChoice(tables=Views(width=4)), tmp_path_factory.mktemp("cache"), make_data(**SMALL))


@pytest.fixture(scope="module")
def written(small: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "torch"
    export.export(small, out, "torch", tables=TABLES)
    return out


# ---------------------------------------------------------------------------------------------------------------- parity
def test_torch_predicts_raw_rows(small: Bundle, written: Path) -> None:
    got, want = export.Exported(written).predict(LOG, TABLES), Predictor(small).predict(LOG, TABLES)
    assert got.columns == want.columns
    np.testing.assert_allclose(got["click"].to_numpy(), want["click"].to_numpy(), atol=1e-6)


def test_onnx_predicts_raw_rows(small: Bundle, tmp_path: Path) -> None:
    found = export.export(small, tmp_path / "out", "onnx", tables=TABLES)
    assert found.difference < 1e-6 and found.source == "validation split"
    got, want = export.Exported(tmp_path / "out").predict(LOG, TABLES), Predictor(small).predict(LOG, TABLES)
    np.testing.assert_allclose(got["click"].to_numpy(), want["click"].to_numpy(), atol=1e-6)


def test_threads_lose_no_events(small: Bundle, tmp_path: Path) -> None:
    """ONNX Runtime adds with several threads in some steps, and then summands are lost: sums of 50,000 events hold all."""
    graph = Graph(small.model, small.fitted.schema)
    program, inputs = export.traced(graph)
    export.write_program(program, inputs, graph, tmp_path / "model.onnx")
    run = export.loaded(tmp_path / "model.onnx", inputs, threads=8)
    given = drawn(inputs, 1000, longest=100)
    with torch.no_grad():
        want = graph(given)[f"{PREDICTED}click"].numpy()
    for _ in range(10):
        np.testing.assert_allclose(run(given)["click"], want, atol=1e-6)


def test_a_sum_that_threads_lose_is_refused(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_index_add(self: Listed, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(self.lengths.shape[0] + 1, *x.shape[1:]).index_add(0, self.rows, x)[:-1]

    monkeypatch.setattr(Listed, "sum", by_index_add)
    graph = Graph(small.model, small.fitted.schema)
    program, inputs = export.traced(graph)
    with pytest.raises(export.ExportError, match="several threads"):
        export.write_program(program, inputs, graph, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_row_without_history_and_one_alone(small: Bundle, written: Path) -> None:
    exported = export.Exported(written)
    rows = LOG.with_columns(user=pl.Series([10**6 + i for i in range(len(LOG))]))  # users that nobody has seen
    for some in (rows.head(1), rows, LOG.tail(1)):
        got, want = exported.predict(some, TABLES), Predictor(small).predict(some, TABLES)
        np.testing.assert_allclose(got["click"].to_numpy(), want["click"].to_numpy(), atol=1e-6)


def test_the_folder_says_what_it_is(small: Bundle, written: Path) -> None:
    about = json.loads((written / "export.json").read_text())
    assert [(i["name"], i["dtype"], i["shape"]) for i in about["inputs"]] == [
        ("item", "int64", ["rows"]),
        ("price", "float32", ["rows", 2]),  # its exact value and the domain, which nothing reads here, are left out
        ("seen.values.item", "int64", ["seen.values"]),
        ("seen.lengths", "int64", ["rows"]),
    ]
    assert about["tasks"] == [
        {"name": "click", "output": "predicted_click", "kind": "binary", "classes": [], "calibrated": False}
    ]
    assert about["bundle"] == {"run": "toy", "weights": digest_of(small.model)}
    values = pl.read_parquet(written / about["vocabularies"]["item"])["value"]
    assert about["inputs"][0]["codes"] == len(values) + 2
    assert about["check"]["difference"] < 1e-6 and about["check"]["tolerance"] == export.TOLERANCE
    assert about["versions"]["torch"] == torch.__version__


def test_inputs_that_are_read_stay(tmp_path: Path) -> None:
    data = make_data(**SMALL)
    choice = ModelChoice(tables=Views(width=4), numbers=config.Quantile(), heads=Heads(by="domain"))
    bundle = make_bundle(choice, tmp_path, data)
    names = [each.name for each in export.traced(Graph(bundle.model, bundle.fitted.schema))[1]]
    assert names == ["item", "price", "price.exact", "seen.values.item", "seen.lengths", "row.domain"]


def test_drawn_inputs_are_valid(small: Bundle) -> None:
    schema = small.fitted.schema
    inputs = drawn(inputs_of(schema), 50, longest=3, seed=1)
    assert int(inputs["seen.lengths"].max()) == 3 and int(inputs["seen.lengths"].sum()) == len(
        inputs["seen.values.item"]
    )
    assert set(inputs["price"][:, 1].tolist()) == {0.0, 1.0} and int(inputs["item"].max()) < schema.sizes["item"]
    again = taken_apart(Graph(small.model, schema).batch(inputs, export.packed), schema)
    assert set(again) == set(inputs) and all(torch.equal(again[name], inputs[name]) for name in inputs)


# ----------------------------------------------------------------------------------------------------------- calibrators
PLACES, VALUES = np.array([-2.0, -0.5, 0.5, 2.0]), np.array([0.05, 0.2, 0.6, 0.9])
WEIGHT, BIAS = np.array([[1.0, 0.2, 0.0], [0.0, 0.9, 0.0], [0.1, 0.0, 1.1]]), np.array([0.1, 0.0, -0.1])
MAPS = {
    "affine": (Affine(0.7, 0.1), 1), "linear": (Linear(WEIGHT, BIAS), 3),
    "lines": (Curves((PLACES,), (VALUES,), True), 1), "steps": (Curves((PLACES,), (VALUES,), False), 1),
    "many lines": (Curves((PLACES,) * 3, (VALUES, VALUES[::-1].copy(), VALUES), True), 3),
    "one step": (Curves((PLACES[:1],), (VALUES[:1],), False), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_calibrators(name: str) -> None:
    """On both sides of all places, at them, and far outside."""
    by, width = MAPS[name]
    z = np.concatenate(
        [PLACES, PLACES - 1e-9, PLACES + 1e-9, np.random.default_rng(0).normal(size=24) * 3, [-40.0, 40.0, 7.0]]
    )
    z = z if width == 1 else np.stack([z, z[::-1], np.zeros_like(z)], 1)
    np.testing.assert_allclose(mapped(by, torch.tensor(z)).numpy(), by(z), rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    data = make_data(**SMALL | {"tasks": (Task("click"), Task("size", kind="multiclass"))})
    bundle = make_bundle(ModelChoice(tables=Views(width=4)), tmp_path_factory.mktemp("cache"), data)
    parts = (
        ("click", "", "affine"),
        ("click", "home", "lines"),
        ("size", "", "linear"),
        ("size", "mail", "many lines"),
    )
    kept = tuple(Kept(task, domain, {}, "", "", Calibration(MAPS[name][0])) for task, domain, name in parts)
    return dataclasses.replace(bundle, calibrators=Calibrators(digest_of(bundle.model), kept))


@pytest.mark.slow
def test_calibrators_are_in_the_graph(calibrated: Bundle, tmp_path: Path) -> None:
    export.export(calibrated, tmp_path / "out", "torch", tables=TABLES)
    got, want = export.Exported(tmp_path / "out").predict(LOG, TABLES), Predictor(calibrated).predict(LOG, TABLES)
    raw = Predictor(calibrated, raw=True).predict(LOG, TABLES)
    for name in ("click", "size"):
        np.testing.assert_allclose(got[name].to_numpy(), want[name].to_numpy(), atol=1e-6)
        assert np.abs(want[name].to_numpy() - raw[name].to_numpy()).max() > 0.01
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert [task["calibrated"] for task in about["tasks"]] == [True, True]
    assert about["inputs"][-1]["name"] == "row.domain"


def eager(graph: Graph) -> Any:
    """A graph as what runs it, without any tracing."""

    def run(given: Any) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {name.removeprefix(PREDICTED): value.numpy() for name, value in graph(given).items()}

    return run


def test_calibrators_by_domain(calibrated: Bundle) -> None:
    """The graph's own calibrators are those of the bundle, and without them it predicts otherwise."""
    graph = Graph(calibrated.model, calibrated.fitted.schema, calibrated.calibrators)
    assert export.checked(graph, eager(graph), calibrated, None, TABLES).difference < 1e-6
    plain = Graph(calibrated.model, calibrated.fitted.schema)
    assert export.checked(graph, eager(plain), calibrated, None, TABLES).difference > 0.01


# ---------------------------------------------------------------------------------------------------------------- refusals
def test_a_difference_is_an_error(small: Bundle, tmp_path: Path) -> None:
    with pytest.raises(
        export.ExportError, match=r"otherwise than the bundle: the largest difference is .* Nothing was written"
    ):
        export.export(small, tmp_path / "out", "torch", tables=TABLES, tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_is_wrong_is_found(small: Bundle, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check compares with the packed model: a graph that forgets an event is caught."""
    graph = Graph(small.model, small.fitted.schema)

    def forgets(given: Any) -> dict[str, np.ndarray]:
        some = {**given, "seen.lengths": (given["seen.lengths"] - 1).clamp(min=0)}
        return {name.removeprefix(PREDICTED): value.detach().numpy() for name, value in graph(some).items()}

    assert export.checked(graph, forgets, small, None, TABLES).difference > 1e-4


def test_without_data_rows_are_drawn(small: Bundle) -> None:
    graph = Graph(small.model, small.fitted.schema)
    found = export.checked(graph, eager(graph), small, None, None)
    assert found.source.startswith("drawn at random, since the run's data cannot be read (") and found.rows == 1000
    assert found.difference < 1e-6


def test_what_no_graph_can_hold_is_named(small: Bundle, tmp_path: Path) -> None:
    choice = ModelChoice(tables=Views(width=4), history=config.TWINV2())
    with pytest.raises(
        export.ExportError, match=r"`histories.shared/seen` \(TWINV2History\) cannot be exported: clusters"
    ):
        export.export(make_bundle(choice, tmp_path / "a", make_data(**SMALL)), tmp_path / "out", tables=TABLES)
    choice = ModelChoice(tables=Views(width=4), heads=Heads(by="domain", unknown="error"))
    with pytest.raises(export.ExportError, match="a graph cannot refuse a row"):
        export.export(make_bundle(choice, tmp_path / "b", make_data(**SMALL)), tmp_path / "out", tables=TABLES)
    image = Feature("face", kind="image")
    schema = dataclasses.replace(small.fitted.schema, features=(image,))
    fitted = dataclasses.replace(small.fitted, schema=schema)
    with pytest.raises(export.ExportError, match=r"`face` \(image\).*a feature of kind `vector`"):
        export.export(dataclasses.replace(small, fitted=fitted), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_step_that_fixes_a_size_is_named(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(small.model, small.fitted.schema)
    forward = Model.trunk
    monkeypatch.setattr(Model, "trunk", lambda self, batch: (len(batch.row), forward(self, batch))[1])
    with pytest.raises(export.ExportError, match=r"`len\(x\)`.*x.shape\[0\]"):
        export.traced(graph)


def test_a_step_that_depends_on_values_is_named(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(small.model, small.fitted.schema)
    forward = Model.trunk
    monkeypatch.setattr(Model, "trunk", lambda self, batch: (bool(batch.domain.any()), forward(self, batch))[1])
    with pytest.raises(
        export.ExportError, match=r"unbraid/model.py, function `forward`, line \d+, cannot be in a graph"
    ):
        export.traced(graph)


def test_bad_calls(small: Bundle, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(export.ExportError, match="should be one of onnx, torch. Found `tflite`"):
        export.export(small, tmp_path / "out", "tflite")  # type: ignore[arg-type]
    with pytest.raises(FileExistsError, match="exists. Delete it"):
        export.export(small, written, "torch", tables=TABLES)
    with pytest.raises(export.ExportError, match="is not an exported bundle"):
        export.Exported(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'need onnxruntime: pip install "unbraid\[onnx\]"'):
        export.export(small, tmp_path / "out", "onnx", tables=TABLES)


def test_the_command(small: Bundle, tmp_path: Path) -> None:
    """A bundle on disk whose data are in a file, through the command line and back."""
    LOG.write_parquet(tmp_path / "log.parquet")
    data = dataclasses.replace(small.run.data, rows="log.parquet", folder=str(tmp_path))
    dataclasses.replace(small, run=dataclasses.replace(small.run, data=data)).save(tmp_path / "bundle")
    arguments = ["export", str(tmp_path / "bundle"), "--to", "torch", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert re.search(r"largest difference to the bundle \d\.\de-0\d of \d+ rows \(validation split\)", found.output)
    got = export.Exported(tmp_path / "out").predict(tmp_path / "log.parquet")
    want = Predictor(tmp_path / "bundle").predict(tmp_path / "log.parquet")
    np.testing.assert_allclose(got["click"].to_numpy(), want["click"].to_numpy(), atol=1e-6)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "exists. Delete it" in again.output
    elsewhere = CliRunner().invoke(
        app, [*arguments[:-1], str(tmp_path / "other"), "--folder", str(tmp_path / "bundle")]
    )
    assert (
        elsewhere.exit_code == 2 and "log.parquet" in elsewhere.output
    )  # a folder that is named should hold the tables


# ----------------------------------------------------------------------------------------------------------- every member
def members(choice: Any) -> Iterator[Any]:
    """The classes of a slot's union."""
    yield from typing.get_args(typing.get_args(choice)[0])


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Vectors of classes without a file."""

    scale: float = 10.0
    projection: str = "auto"

    def of(self, names: Any) -> Classes:
        return Classes(torch.eye(len(names), 5), self.scale, "auto")


def every_choice() -> dict[tuple[str, str], tuple[ModelChoice, Any]]:
    """(slot, member) -> a model with it, and a schedule that makes several."""
    plain = Views(width=4)
    found: dict[tuple[str, str], tuple[Any, Any]] = {}
    for tower in members(config.TowerChoice):
        found["tower", tower().kind] = ModelChoice(tower=tower(), tables=views_for(tower())), None
    for kind in ("per_task", "separate", "several"):
        tables = Views(kind=kind, **({"widths": (4, 6)} if kind == "several" else {"width": 4}))  # type: ignore[arg-type]
        tower = (
            config.SingleTask() if kind == "separate" else config.SharedBottom() if kind == "several" else config.STEM()
        )
        found["tables", kind] = ModelChoice(tower=tower, tables=tables), None
    by_domain = Views(kind="per_task", by="domain", width=4)
    found["tables", "per_task, by domain"] = ModelChoice(tower=config.STEM(), tables=by_domain), None
    for history in members(config.HistoryChoice):
        few = {"keep": 3} if "keep" in {field.name for field in dataclasses.fields(history)} else {}
        found["history", history().kind] = ModelChoice(history=history(**few), tables=plain), None
    for interaction in members(config.InteractionChoice):
        found["interaction", interaction().kind] = ModelChoice(interaction=interaction(), tables=plain), None
    for number in members(config.NumberChoice):
        found["numbers", number().kind] = ModelChoice(numbers=number(), tables=plain), None
    for vector in members(config.VectorChoice):
        pair: Any = {"pairs": (("text_vector", "other_vector"),)} if vector is config.Similarity else {}
        found["vectors", vector().kind] = ModelChoice(vectors=vector(**pair), tables=plain), None
    for name, heads in {"by domain": Heads(by="domain"), "by domain, hidden": Heads(by="domain", hidden=(4,)),
                        "two": Heads(two=True), "unknown `error`": Heads(by="domain", unknown="error")}.items():  # fmt: skip
        found["heads", name] = ModelChoice(heads=heads, tables=plain), None
    found["heads", "vectors of classes"] = ModelChoice(classes={"size": Vectors()}, tables=plain), None  # type: ignore[dict-item]
    for schedule in members(config.ScheduleChoice):
        for by in ("domain", "task") if hasattr(schedule, "module") else ():
            found["schedule", f"{schedule().kind}, by {by}"] = ModelChoice(tables=plain), schedule(by=by)
    refusing = config.Individual(by="domain", unknown="error")
    found["schedule", "individual, by domain, unknown `error`"] = ModelChoice(tables=plain), refusing
    return found


CHOICES = every_choice()
EXPORTS = "| yes | yes |"  # what the page does not list


def of_some(members: list[tuple[str, str]]) -> tuple[str, str]:
    """How a model of several members is called."""
    return ", ".join(dict.fromkeys(slot for slot, _ in members)), ", ".join(name for _, name in members)


def together() -> dict[tuple[str, str], tuple[ModelChoice, Any]]:
    """Models that have all members of these slots of which the page says that they export, one of each slot at a time."""
    slots: dict[str, list[str]] = {"tower": [], "history": [], "interaction": [], "numbers": [], "vectors": []}
    refused = {tuple(line.strip("| ").split(" | ")[:2]) for line in lines()}
    for slot, name in CHOICES:
        if slot in slots and (slot, name) not in refused:
            slots[slot].append(name)
    found: dict[tuple[str, str], tuple[ModelChoice, Any]] = {}
    for at in range(max(map(len, slots.values()))):
        members = [(slot, names[at]) for slot, names in slots.items() if at < len(names)]
        choice = ModelChoice(tables=Views(width=4))
        for slot, name in members:
            own = CHOICES[slot, name][0]
            choice = dataclasses.replace(
                choice, **{slot: getattr(own, slot)}, **({"tables": own.tables} if slot == "tower" else {})
            )
        found[of_some(members)] = choice, None
    return found


def line_of(key: tuple[str, str], cache: Path) -> str:
    """A member, or several, as a line of the page's table."""
    choice, schedule = CHOICES[key] if key in CHOICES else together()[key]
    features = (*make_data().features, Feature("other_vector", column="text_vector", kind="vector"))
    plain = key[0] in ("tables", "heads", "schedule")  # whatever a row has
    own = (
        {**SMALL, "fields": make_data().fields}
        if plain
        else {"features": features, "histories": make_data().histories[:1]}
    )
    bundle = make_bundle(choice, cache, make_data(**{**own, "tasks": (TASKS[0], TASKS[3])}), schedule)
    graph = Graph(bundle.model, bundle.fitted.schema)
    try:
        export.refuse(bundle)
        program, inputs = export.traced(graph)
    except export.ExportError as error:
        return f"| {' | '.join(key)} | no | no | {str(error).partition(': ')[2].rstrip('.')} |"
    cells, why = [], ""
    for file in export.FILES.values():
        try:
            export.write_program(program, inputs, graph, cache / file)
            found = export.checked(graph, export.loaded(cache / file, inputs), bundle, None, TABLES).difference
            cells.append("yes" if found <= export.TOLERANCE else f"wrong by {found:.0e}")
        except export.ExportError as error:
            cells, why = [*cells, "no"], str(error).partition(": ")[2].rstrip(".")
    return f"| {' | '.join(key)} | {cells[0]} | {cells[1]} | {why} |"


def lines() -> list[str]:
    """The table of the page."""
    return re.findall(r"^\| (?!slot|---).* \| .* \| (?:yes|no) \| (?:yes|no) \|.*\|$", PAGE.read_text(), re.M)


def test_the_page_names_no_member_that_is_gone() -> None:
    named = [tuple(line.strip("| ").split(" | ")[:2]) for line in lines()]
    assert named and set(named) <= set(CHOICES), "write the table anew: python tests/test_export.py"


def few() -> list[tuple[str, str]]:
    """Models that hold every member: by itself what does not export, or stands in no slot of `together`."""
    several, listed = together(), {tuple(line.strip("| ").split(" | ")[:2]) for line in lines()}
    slots = {slot for slots, _ in several for slot in slots.split(", ")}
    return [*several, *(key for key in CHOICES if key in listed or key[0] not in slots)]


@pytest.mark.slow
@pytest.mark.parametrize("key", few(), ids=lambda key: "-".join(key).replace(" ", ""))
def test_the_page_says_what_exports(key: tuple[str, str], tmp_path: Path) -> None:
    line = line_of(key, tmp_path)
    named = [other for other in lines() if other.startswith(f"| {' | '.join(key)} |")]
    assert named == ([] if EXPORTS in line else [line]), "write the table anew: python tests/test_export.py"


@pytest.mark.slow
def test_the_bundled_log(tmp_path: Path) -> None:
    """1,000 rows of the bundled log, the default recipe after a few steps: raw rows through both ways."""
    from unbraid import recipes
    from unbraid.data.source import scan_of
    from unbraid.job import train

    run = recipes.DEFAULT()
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, steps=20))
    train(run, tmp_path / "bundle", baseline=False)
    rows = scan_of(run.data, run.data.rows, Path(), None).collect()
    rows = rows[np.arange(1000) * len(rows) // 1000]
    want = Predictor(tmp_path / "bundle").predict(rows)
    for to in export.FILES:
        found = export.export(tmp_path / "bundle", tmp_path / to, to)  # type: ignore[arg-type]
        assert found.rows == 1000 and found.difference < 1e-6
        got = export.Exported(tmp_path / to).predict(rows)
        for name in want.columns:
            assert float((got[name] - want[name]).abs().max()) < 1e-6  # type: ignore[arg-type]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for place, key in enumerate(CHOICES):
            line = line_of(key, Path(folder) / str(place))
            print(line, flush=True)
            made += [] if EXPORTS in line else [line]
    head = "| slot | member | onnx | torch | why not |\n|---|---|---|---|---|\n"
    before, _, after = PAGE.read_text().partition(head)
    rest = after[re.match(r"(?:\|.*\n)*", after).end() :]  # type: ignore[union-attr]
    PAGE.write_text(before + head + "\n".join(made) + "\n" + rest)
