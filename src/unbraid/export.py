"""A bundle as a folder that predicts without it: a graph (`unbraid.graph`), what encodes raw rows for it, and what was checked.

The folder holds ``model.onnx`` (any ONNX runtime) or ``model.pt2`` (`torch.export.load`), ``export.json``, and, as a bundle does,
``run.toml``, ``schema.json`` and ``vocabularies/``.  A runtime of another language needs the graph, ``export.json`` and the
vocabularies; `Exported` reads all of it and predicts raw rows as `unbraid.predictor.Predictor` does.

Before anything is written the graph predicts rows of the run's validation split beside the bundle, as well as rows without
events and a single row, since a graph is traced from one batch and may have kept something of its sizes.  A module that no
graph can hold says so in ``no_graph``; what else fails is named by the function where it did.
"""

from __future__ import annotations

import contextlib
import json
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unbraid import config, store
from unbraid.adapters.frames import Table
from unbraid.bundle import Bundle, environment
from unbraid.data.declaration import Data
from unbraid.data.encode import encode
from unbraid.data.fitted import Fitted
from unbraid.data.source import Tables
from unbraid.data.table import Encoded
from unbraid.graph import PREDICTED, Graph, Input, drawn, inputs_of, taken_apart
from unbraid.predictor import given_rows, predictions
from unbraid.train import predict as scores_of
from unbraid.types import Batch, Ragged, Schema
from unbraid.uncertainty.last_layer import digest_of

To = Literal["onnx", "torch"]
FILES: Mapping[str, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
TOLERANCE = 1e-5
CHECKED_ROWS, BATCH = 1000, 256
OPSET = 20
Run = Callable[[Mapping[str, Tensor]], dict[str, np.ndarray]]  # inputs -> task -> what is predicted


class ExportError(ValueError):
    """A bundle, or a part of it, cannot be exported."""


@dataclass(frozen=True)
class Check:
    """What the comparison of a graph with its bundle found.

    Args:
        difference: the largest, of probabilities; of values of a real task relative to those above 1.
        rows: how many were compared; source: which, in words.
    """

    difference: float
    rows: int
    source: str


# ---------------------------------------------------------------------------------------------------------------- writing
def export(
    bundle: Bundle | str | Path, out: str | Path, to: To = "onnx", *, folder: str | Path | None = None,
    tables: Tables | None = None, raw: bool = False, tolerance: float = TOLERANCE,
) -> Check:  # fmt: skip
    """Write a bundle as a graph.

    Args:
        bundle: a loaded bundle or its folder; out: a folder that is not there yet, or is empty.
        to: ``onnx``, or ``torch`` for an exported PyTorch program.
        folder: where the run's tables are read from now; tables: tables in memory by name.  Where neither is given and the
            run's own folder cannot be read, drawn inputs are compared.
        raw: without the bundle's calibrators.
        tolerance: the largest difference that is allowed.

    Raises:
        ExportError: something in the model cannot be in a graph, or the graph predicts otherwise than the bundle; nothing is
            written then.
        ImportError: the libraries for ``onnx`` are missing; FileExistsError: ``out`` holds something; DataError, OSError: the
            tables are not in ``folder``.
    """
    if to not in FILES:
        raise ExportError(f"Parameter `to` should be one of {', '.join(FILES)}. Found `{to}`.")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    refuse(bundle)
    if to == "onnx":
        onnx_library("onnxruntime")
    calibrators = None if raw else bundle.calibrators
    graph = Graph(bundle.model.cpu(), bundle.fitted.schema, calibrators)
    with store.atomic_folder(out) as place:
        program, inputs = traced(graph)
        write_program(program, inputs, graph, place / FILES[to])
        found = checked(graph, loaded(place / FILES[to], inputs), bundle, folder, tables)
        if not found.difference <= tolerance:
            raise ExportError(
                f"The graph predicts otherwise than the bundle: the largest difference is {found.difference:.1e} of "
                f"{found.rows:,} rows ({found.source}), {tolerance:g} is allowed. Nothing was written."
            )
        store.write_text(place / "run.toml", config.dumps(bundle.run))
        bundle.fitted.save(place)
        kept = json.loads((place / "schema.json").read_text())["vocabularies"]
        told = about(bundle, graph, to, inputs, found, tolerance, kept)
        store.write_text(place / "export.json", json.dumps(told, indent=1))
    return found


def refuse(bundle: Bundle) -> None:
    """Raise ExportError, naming the part, if there is something that no graph can hold."""
    if content := [f"`{f.name}` ({f.kind})" for f in bundle.fitted.schema.features if f.has_content]:
        raise ExportError(
            f"Features {', '.join(content)} are read by a backbone, and graphs begin at codes, numbers and vectors. Export the "
            "backbone with its own library, and train on its vectors as a feature of kind `vector`."
        )
    for name, module in bundle.model.named_modules():
        if why := getattr(module, "no_graph", ""):
            raise ExportError(f"`{name}` ({type(module).__name__}) cannot be exported: {why}.")


def traced(graph: Graph) -> tuple[torch.export.ExportedProgram, list[Input]]:
    """The graph with free sizes, and the inputs that it reads.  Raises ExportError, naming the function that fails."""
    inputs = inputs_of(graph.schema)
    example = drawn(inputs, rows=3, longest=4)
    free = {first: torch.export.Dim(f"size{place}") for place, first in enumerate({each.first: 0 for each in inputs})}
    try:
        with torch.no_grad(), quiet():
            with Reads() as reads:
                graph(example)
            inputs = [each for each in inputs if not each.optional or id(example[each.name]) in reads.seen]
            shapes = {each.name: {0: free[each.first]} for each in inputs}
            given = {each.name: example[each.name] for each in inputs}
            return torch.export.export(graph, (given,), dynamic_shapes=(shapes,)), inputs
    except Exception as error:
        if "Constraints violated" in str(error):
            raise ExportError(
                "A size that should be free was fixed by a step that takes `len(x)` or `int(x)` of a tensor or list. Such a size "
                f"stays free as x.shape[0], or as lists.lengths.shape[0]. {_first_line(error)}"
            ) from error
        raise ExportError(f"{_where(error)} cannot be in a graph: {_first_line(error)}") from error


class Reads(TorchFunctionMode):
    """Notes the identities of tensors that any function is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(map(id, (*args, *(kwargs or {}).values())))
        return func(*args, **(kwargs or {}))


def _where(error: BaseException) -> str:
    """The innermost function of this library that an error came through."""
    root = Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(root)]
    inner = [frame for frame in frames if Path(frame.filename).name not in ("export.py", "graph.py")] or frames
    return f"{Path(inner[-1].filename).relative_to(root.parent)}, function `{inner[-1].name}`, line {inner[-1].lineno},"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def write_program(
    program: torch.export.ExportedProgram, inputs: Sequence[Input], graph: Graph, path: Path
) -> None:  # fmt: skip
    """Write a traced graph, in the format of the file's name.  Raises ExportError for a step that ONNX does not have."""
    if path.suffix == ".pt2":
        with quiet():
            torch.export.save(program, path)
        return
    onnx_library("onnx")
    steps: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.sort.stable: stable_sort()}
    names = [PREDICTED + task.name for task in graph.schema.tasks]
    try:
        with quiet():
            made = torch.onnx.export(
                program, (), dynamo=True, input_names=[each.name for each in inputs], output_names=names, verbose=False,
                opset_version=OPSET, custom_translation_table=steps,
            )  # fmt: skip
            assert made is not None
        if any(node.op_type == "ScatterND" and "reduction" in node.attributes for node in made.model.graph.all_nodes()):
            # known to its makers (microsoft/onnxruntime#23396): several threads add to one place, and some summands are lost
            raise ValueError("sums by `index_add` are wrong in ONNX Runtime with several threads; use `scatter_add`")
        made.save(path)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"ONNX cannot express the graph: {_first_line(cause)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own remarks, which are about their insides."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnx_ir", "onnxscript"))}
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def stable_sort() -> Callable[..., Any]:
    """``aten.sort.stable`` of vectors in ONNX, which lacks one: TopK of all, which puts the first of equal values first."""
    op = onnx_library("onnxscript").opset18

    def sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        return op.TopK(x, op.Shape(x), axis=dim, largest=int(descending), sorted=1)

    return sort


def onnx_library(name: str) -> Any:
    """A library of the extra ``onnx``.  Raises ImportError that says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f'Graphs of ONNX need {name}: pip install "unbraid[onnx]"') from error


# --------------------------------------------------------------------------------------------------------------- checking
def checked(graph: Graph, run: Run, bundle: Bundle, folder: str | Path | None, tables: Tables | None) -> Check:
    """Compare a graph that was read back with the bundle's own model."""
    schema, inputs = graph.schema, inputs_of(graph.schema)
    made = [drawn(inputs, rows, longest, seed=rows) for rows, longest in ((3, 0), (1, 5), (1, 0))]
    try:
        batches, source = list(validation(bundle, folder, tables)), "validation split"
    except (OSError, ValueError) as error:
        if folder is not None or tables is not None:
            raise
        batches, source = [], f"drawn at random, since the run's data cannot be read ({_first_line(error)})"
        made.append(drawn(inputs, CHECKED_ROWS, 20))
    worst = 0.0
    for batch in [*batches, *(graph.batch(each, packed) for each in made)]:
        scores = scores_of(graph.model, [batch], schema)
        scores = scores if graph.calibrators is None else graph.calibrators.apply(scores)
        found, expected = run(taken_apart(batch, schema)), predictions(scores.logits, schema)
        for name, value in expected.items():
            gap = np.abs(found[name] - value) / np.maximum(1.0, np.abs(value))
            worst = max(worst, float(gap.max()) if np.isfinite(gap).all() else np.inf)
    return Check(worst, sum(map(len, batches)) or CHECKED_ROWS, source)


def packed(values: Mapping[str, Tensor], lengths: Tensor) -> Ragged:
    """Lists as a model is trained on them."""
    return Ragged(values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))


def validation(bundle: Bundle, folder: str | Path | None, tables: Tables | None) -> Iterator[Batch]:
    """At most `CHECKED_ROWS` rows of the validation split, evenly spaced: the first alone, then many."""
    data = at_folder(bundle.run.data, folder)
    encoded = Encoded(encode(data, tables=tables, fitted=bundle.fitted))
    rows = encoded.split("valid")
    if len(rows) > CHECKED_ROWS:
        rows = rows[np.arange(CHECKED_ROWS) * len(rows) // CHECKED_ROWS]
    if not len(rows):
        raise ExportError("the validation split is empty")
    cuts = [0, *range(1, len(rows), BATCH), len(rows)]
    return (encoded.batch(rows[a:b]) for a, b in pairwise(cuts))


def at_folder(data: Data, folder: str | Path | None) -> Data:
    """The data with their tables read from a folder; None: from where they are."""
    return data if folder is None else replace(data, folder=str(Path(folder).resolve()))


def about(
    bundle: Bundle, graph: Graph, to: To, inputs: Sequence[Input], check: Check, tolerance: float, kept: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """What ``export.json`` says."""
    schema, found = graph.schema, environment()
    vocabularies = {name: f"vocabularies/{one['file']}" for name, one in kept.items()}
    names = ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ()
    tasks = [
        {"name": task.name, "output": PREDICTED + task.name, "kind": task.kind,
         "classes": list(schema.classes.get(task.name, ())),
         "calibrated": graph.calibrators is not None and any(one.task == task.name for one in graph.calibrators.kept)}
        for task in schema.tasks
    ]  # fmt: skip
    return {
        "graph": FILES[to],
        "inputs": [
            {"name": i.name, "dtype": i.dtype, "shape": [i.first, *i.rest], "codes": i.codes or None} for i in inputs
        ],
        "tasks": tasks,
        "domains": list(schema.domains),
        "vocabularies": vocabularies,
        "bundle": {"run": bundle.run.name, "weights": digest_of(bundle.model)},
        "versions": found["versions"] | {name: version(name) for name in names},
        "check": asdict(check) | {"tolerance": tolerance},
    }


# ---------------------------------------------------------------------------------------------------------------- reading
def loaded(path: Path, inputs: Sequence[Input], threads: int = 0) -> Run:
    """A function that runs a graph; of inputs it does not read it takes no notice."""
    names = [each.name for each in inputs]
    if path.suffix == ".pt2":
        with quiet():
            program = torch.export.load(path).module()

        def of_torch(given: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
            with torch.no_grad():
                found = program({name: given[name] for name in names})
            return {name.removeprefix(PREDICTED): value.numpy() for name, value in found.items()}

        return of_torch
    runtime = onnx_library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [each.name.removeprefix(PREDICTED) for each in session.get_outputs()]

    def of_onnx(given: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return dict(zip(outputs, session.run(None, {name: given[name].numpy() for name in names}), strict=True))

    return of_onnx


class Exported:
    """An exported folder: raw rows in, probabilities out, as `unbraid.predictor.Predictor`.

    Args:
        place: the folder; folder: where joined tables and events are read from now, the run's own folder by default.
        threads: of ONNX Runtime; 0: as many as it likes.

    Raises:
        ExportError: the folder is not whole; ImportError: its runtime is not installed.
    """

    def __init__(self, place: str | Path, folder: str | Path | None = None, threads: int = 0) -> None:
        place = Path(place)
        try:
            self.about = json.loads((place / "export.json").read_text())
            self.fitted, run = Fitted.load(place), config.load(place / "run.toml")
        except (OSError, ValueError) as error:
            raise ExportError(f"{place} is not an exported bundle: {error}") from error
        self.data, self.batch_size = at_folder(run.data, folder), 4 * run.training.batch_size
        known = {each.name: each for each in inputs_of(self.schema)}
        self.run = loaded(place / self.about["graph"], [known[each["name"]] for each in self.about["inputs"]], threads)

    @property
    def schema(self) -> Schema:
        """What the graph reads and predicts."""
        return self.fitted.schema

    def predict(self, rows: Table | str | Path, tables: Tables | None = None) -> pl.DataFrame:
        """The rows' predictions in their order, one column per task.  Raises DataError for rows that are not as declared.

        Args:
            rows: a table in memory, or a Parquet or CSV file or folder; tables: tables in memory by name.
        """
        with given_rows(rows, self.data, self.fitted, tables) as encoded:
            batches = encoded.in_order(encoded.split("all"), self.batch_size)
            parts = [self.run(taken_apart(batch, self.schema)) for batch in batches]
        return pl.DataFrame({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
