"""A trained artefact on disk, and predictions from it.

A bundle is a folder: ``run.toml``, ``schema.json``, ``vocabularies/``, ``weights.safetensors``, ``metrics.json``,
``environment.json``, ``report.md``, and ``report.html``, ``report.json``, ``uncertainty.safetensors`` and
``calibration.safetensors`` once asked for; ``backbones.safetensors`` holds what a frozen backbone is, whole, so that nothing
else is needed to load it.  Nothing in it is a pickle.  Loading refuses what does not match, by name.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import platform
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from torch import nn

from unbraid import config, parallel, sharded_files, sharding, store
from unbraid.adapters.frames import Table, lazy
from unbraid.backbones.frozen import Frozen, fill
from unbraid.calibration.kept import Calibrators
from unbraid.class_head import Classes, ClassHead
from unbraid.data.declaration import Data
from unbraid.data.dictionary import pieces
from unbraid.data.encode import encode, encode_query
from unbraid.data.features import attach
from unbraid.data.fitted import Fitted
from unbraid.data.source import DataError, Tables, known_types, scan_given
from unbraid.data.table import Encoded
from unbraid.layers import device_of, task_key
from unbraid.mc_dropout import McDropout
from unbraid.model import Model
from unbraid.train import predict
from unbraid.types import FIRST_VALUE, Schema, Scores
from unbraid.uncertainty.explore import Belief, Exploration, requests, sigmoid
from unbraid.uncertainty.last_layer import FITS, LastLayer, UncertaintyError, digest_of, fit

UNCERTAINTY, CALIBRATION = "uncertainty.safetensors", "calibration.safetensors"
BACKBONES = "backbones.safetensors"
EVALUATION_ROWS = 16_384


class BundleError(ValueError):
    """A bundle is not whole, or its parts do not belong together."""


def build(run: config.Run, schema: Schema, weights: Mapping[str, torch.Tensor] | None = None) -> Model:
    """The run's model, initialised from the run's seed.

    Args:
        weights: of a trained one: vectors of classes are taken from here, and not from where the run had them.
    """
    torch.manual_seed(run.seed)
    choice = run.model
    made = backbones(run, schema, load=weights is None)
    return Model(
        schema, choice.tower, choice.tables, choice.interaction, choice.history, choice.heads, choice.experts,
        choice.numbers, choice.numbers_of, choice.vectors, choice.history_of, choice.extra_heads,
        class_vectors(run, schema, weights or {}), made,
    )  # fmt: skip


def backbones(run: config.Run, schema: Schema, load: bool) -> dict[str, nn.Module]:
    """Kind of feature -> its backbone, for those that the run has; ``load``: with the weights that it comes with.

    Raises:
        ValueError, ImportError: as the members of `unbraid.backbones`.
    """
    found: dict[str, nn.Module] = {}
    for kind, choice in (("image", run.model.images), ("text", run.model.texts)):
        if choice is not None and any(f.kind == kind for f in schema.features):
            module = choice.build(load=load)
            found[kind] = Frozen(module) if choice.frozen else module
    return found


def class_vectors(run: config.Run, schema: Schema, weights: Mapping[str, torch.Tensor]) -> dict[str, Classes]:
    """Task -> vectors of its classes, for those that have some.  Raises ValueError as `unbraid.class_head.ClassFile.of`."""
    found = {}
    for task, given in run.model.classes.items():
        stored = [value for name, value in weights.items() if name.endswith(f"heads.{task_key(task)}.vectors")]
        kept = Classes(stored[0], given.scale, given.projection) if stored else None
        found[task] = kept or given.of(schema.classes[task])
    return found


def build_trained(run: config.Run, schema: Schema, weights: Collection[str]) -> nn.Module:
    """The module whose weights have these names: the run's model, or what its schedule makes of it (``module``)."""
    model = build(run, schema, weights if isinstance(weights, Mapping) else None)
    make = getattr(run.schedule, "module", None)
    return make(model, weights) if make is not None else model


def environment() -> dict[str, Any]:
    """Versions of what computed the numbers."""
    versions = {}
    for name in ("unbraid", "torch", "numpy", "polars", "scikit-learn", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine(),
            "threads": torch.get_num_threads(), "cuda": torch.version.cuda, "versions": versions}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A trained model with everything that says what it is."""

    run: config.Run
    fitted: Fitted
    model: nn.Module
    metrics: Mapping[str, Any]
    uncertainty: LastLayer | None = None
    calibrators: Calibrators | None = None

    def save(self, folder: str | Path) -> None:
        """Write the bundle; the weights come last, so that a folder with weights is whole.

        The first of several processes writes it, and if tables are divided the others `unbraid.sharded_files.send` theirs.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        store.write_text(folder / "run.toml", config.dumps(self.run))
        self.fitted.save(folder)
        store.write_text(folder / "metrics.json", json.dumps(self.metrics, indent=1))
        store.write_text(folder / "environment.json", json.dumps(environment(), indent=1))
        kept = {
            UNCERTAINTY: None if self.uncertainty is None else self.uncertainty.state_dict(),
            CALIBRATION: None if self.calibrators is None else self.calibrators.state_dict(),
            BACKBONES: constants(self.model) or None,
        }
        for name, state in kept.items():
            if state is not None:
                store.save(folder / name, state)
            else:  # of an earlier model
                (folder / name).unlink(missing_ok=True)
        store.save(folder / "weights.safetensors", sharded_files.whole(self.model))

    @classmethod
    def load(cls, folder: str | Path, *, images: nn.Module | None = None) -> Bundle:
        """Read a bundle.

        Args:
            images: the network that the run's ``model.images`` of kind `module` was given; its weights are those of the bundle.

        Raises:
            BundleError: a part is missing, or the weights are not those of the run: the names are listed.
        """
        folder = Path(folder)
        missing = [n for n in ("run.toml", "schema.json", "weights.safetensors") if not (folder / n).exists()]
        if missing:
            unfinished = (
                " It holds an unfinished run: continue it with `--resume`."
                if any((*folder.glob("fit-*"), *folder.glob("schedule-*")))
                else ""
            )
            raise BundleError(f"{folder} is not a bundle: there is no {', '.join(missing)}.{unfinished}")
        try:
            run, fitted = config.load(folder / "run.toml"), Fitted.load(folder)
            weights = store.load(folder / "weights.safetensors")
            if not isinstance(weights, dict) or not all(isinstance(each, torch.Tensor) for each in weights.values()):
                raise BundleError("weights.safetensors should hold tensors by name")
            metrics = json.loads((folder / "metrics.json").read_text()) if (folder / "metrics.json").exists() else {}
            fixed = store.load(folder / BACKBONES) if (folder / BACKBONES).exists() else {}
            unsure = LastLayer.load(store.load(folder / UNCERTAINTY)) if (folder / UNCERTAINTY).exists() else None
            found = Calibrators.load(store.load(folder / CALIBRATION)) if (folder / CALIBRATION).exists() else None
        except Exception as error:
            raise BundleError(f"{folder} cannot be loaded: {error}") from error
        for part in ("features", "tasks", "histories", "fields"):
            if getattr(run.data, part) != getattr(fitted.schema, part):
                raise BundleError(
                    f"{folder}: `{part}` of run.toml and schema.json differ. They are from different runs."
                )
        if images is not None:
            choice = dataclasses.replace(cast(Any, run.model.images), module=images)
            run = dataclasses.replace(run, model=dataclasses.replace(run.model, images=choice))
        try:
            with parallel.alone():  # tables are whole here
                model = build_trained(run, fitted.schema, weights)
            set_constants(model, fixed)
        except (ValueError, TypeError, LookupError, RuntimeError, ImportError) as error:  # whatever such parts lead to
            raise BundleError(f"{folder}: weights.safetensors does not fit run.toml: {error}") from error
        _check_weights(folder, {k: tuple(v.shape) for k, v in model.state_dict().items()}, weights)
        model.load_state_dict(weights)
        model.eval()
        if found is not None:
            try:
                found.check(digest_of(model), fitted.schema.domains, tuple(t.name for t in fitted.schema.tasks))
            except ValueError as error:
                raise BundleError(f"{folder / CALIBRATION}: {error}") from error
        return cls(run, fitted, model, metrics, unsure, found)


def constants(model: nn.Module) -> dict[str, Any]:
    """Kind of feature -> what its backbone is beside the model's own weights: those of a frozen one, how texts become tokens."""
    found: dict[str, Any] = {}
    for kind, module in _backbones(model):
        inner = module.inner if isinstance(module, Frozen) else module
        weights = inner.state_dict() if isinstance(module, Frozen) else {}
        found[kind] = {"weights": weights, "rules": getattr(inner, "rules", "")}
    return found


def set_constants(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Give a model's backbones what `constants` found.  Raises ValueError where it does not fit, or is not there."""
    for kind, module in _backbones(model):
        if kind not in found:
            raise ValueError(f"{BACKBONES} holds nothing of the backbone that reads kind `{kind}`.")
        inner: Any = module.inner if isinstance(module, Frozen) else module
        if isinstance(module, Frozen):
            fill(inner, found[kind]["weights"], BACKBONES)
        if found[kind]["rules"]:
            inner.rules = found[kind]["rules"]


def _backbones(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(kind of feature, backbone) of a model, or of all models in what a schedule made of it."""
    for module in model.modules():
        if isinstance(module, Model):
            yield from module.backbones.items()


def _check_weights(folder: Path, want: Mapping[str, tuple], have: Mapping[str, torch.Tensor]) -> None:
    wrong = [
        f"{k} is {tuple(have[k].shape)}, not {want[k]}" for k in want if k in have and tuple(have[k].shape) != want[k]
    ]
    wrong += [f"{k} is missing" for k in want if k not in have] + [
        f"{k} is not in the model" for k in have if k not in want
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise BundleError(
            f"{folder}: weights.safetensors does not fit run.toml and schema.json: {'; '.join(wrong[:5])}{more}."
        )


# ---------------------------------------------------------------------------------------------------------- predictions
class Predictor:
    """Rows in, probabilities out.

    Args:
        bundle: a loaded bundle or its folder.
        folder: where the joined tables and the events of the run are read from now; the run's own folder by default.
        raw: the model's own probabilities, without the bundle's calibrators.
        mc_dropout: the mean of so many passes with dropout (`unbraid.mc_dropout`); 0: one pass without.  Calibrators were not
            fitted to that: ``raw`` is needed where the bundle has some.

    Raises:
        ValueError: MC-dropout of a model without dropout, or of a calibrated bundle.
    """

    def __init__(
        self, bundle: Bundle | str | Path, folder: str | Path | None = None, device: str = "cpu", *, raw: bool = False,
        mc_dropout: int = 0,
    ) -> None:  # fmt: skip
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        data = self.bundle.run.data
        self.data = data if folder is None else dataclasses.replace(data, folder=str(Path(folder).resolve()))
        self.device = device
        self.model = self.bundle.model.to(device)
        self.calibrators = None if raw else self.bundle.calibrators
        if mc_dropout:
            if self.calibrators is not None:
                raise ValueError(
                    "The bundle's calibrators were fitted without MC-dropout. Use `raw` (`--raw`) with it."
                )
            self.model = McDropout(self.bundle.model, self.schema, mc_dropout)

    @property
    def schema(self) -> Schema:
        """What the model reads and predicts."""
        return self.bundle.fitted.schema

    def scores(self, rows: Table | str | Path, tables: Tables | None = None, *, hidden: bool = False) -> Scores:
        """Logits (and labels, where there are any) of rows: a table in memory, or a Parquet or CSV file or folder.

        Args:
            tables: tables in memory instead of files, by the name that the run uses.
            hidden: keep each task's hidden vectors, too.
        """
        return self._calibrated(self._scores(rows, tables, hidden))

    def split_scores(self, split: str, tables: Tables | None = None, *, hidden: bool = False, most: int = 0) -> Scores:
        """Logits and labels of a split of the run's own data (``train``, ``valid`` or ``test``).

        Args:
            tables, hidden: as of `scores`.
            most: at most so many rows, evenly spaced; 0: all.
        """
        encoded = Encoded(encode(self.data, tables=tables, fitted=self.bundle.fitted))
        attach(encoded, self.model, device=self.device)
        rows = encoded.split(split)
        if most and len(rows) > most:
            rows = rows[np.arange(most) * len(rows) // most]
        batches = encoded.in_order(rows, EVALUATION_ROWS)
        return self._calibrated(predict(self.model, batches, encoded.schema, hidden=hidden, device=self.device))

    def _calibrated(self, scores: Scores) -> Scores:
        return scores if self.calibrators is None else self.calibrators.apply(scores)

    def _scores(self, rows: Table | str | Path, tables: Tables | None, hidden: bool) -> Scores:
        """`scores` before any calibrator."""
        with given_rows(rows, self.data, self.bundle.fitted, tables) as encoded:
            attach(encoded, self.model, keep=False, device=self.device)
            batches = encoded.in_order(encoded.split("all"), 4 * self.bundle.run.training.batch_size)
            return predict(self.model, batches, self.bundle.fitted.schema, hidden=hidden, device=self.device)

    def beliefs(self, rows: Table | str | Path, tables: Tables | None = None) -> tuple[Scores, dict[str, Belief]]:
        """The rows' scores, and how unsure the model is: binary and real task -> belief about its logits before calibration.

        Raises:
            UncertaintyError: the bundle has no uncertainty, or that of other weights.
        """
        if self.bundle.uncertainty is None:
            raise UncertaintyError(f"The bundle holds no uncertainty. Make it from the training rows: {FITS}.")
        if isinstance(self.model, McDropout):
            raise UncertaintyError("MC-dropout has no last layer to be unsure about. Use one of the two.")
        self.bundle.uncertainty.check(self.bundle.model)
        scores = self._scores(rows, tables, True)
        return self._calibrated(scores), self.bundle.uncertainty.beliefs(scores)

    def predict(
        self, rows: Table | str | Path, tables: Tables | None = None, *,
        explore: Exploration | None = None, uncertainty: bool = False,
    ) -> pl.DataFrame:  # fmt: skip
        """The rows' predictions in their order: ``TASK`` -> probability, a list of K probabilities, or a number.

        Args:
            explore: `unbraid.uncertainty.explore.Thompson` or ``UCB``: also ``TASK_explore``, the prediction by the logit
                that it chooses, and ``TASK_sd``.
            uncertainty: also ``TASK_sd``, the standard deviation of the logit before calibration (of a real task: of the value).

        Raises:
            UncertaintyError: see `beliefs`; or another task has the name of such a column.
        """
        if explore is None and not uncertainty:
            return as_frame(self.scores(rows, tables), self.schema)
        return explained(*self.beliefs(rows, tables), self.schema, explore, self.calibrators)


@contextlib.contextmanager
def given_rows(rows: Table | str | Path, data: Data, fitted: Fitted, tables: Tables | None = None) -> Iterator[Encoded]:
    """Rows that training did not see, encoded as it knows them: a frame, or a Parquet or CSV file or folder.

    Args:
        data: what declares them; tables: tables in memory instead of files, by the name that the data use.

    Raises:
        DataError: there is no such file, or the rows are not as declared.
    """
    if isinstance(rows, str | Path):
        if not Path(rows).exists():
            raise DataError(f"There is no file or folder {rows}.")
        values = {name: found.values.dtype for name, found in fitted.vocabularies.items()}
        rows = scan_given(rows, data, lambda: known_types(data, values, Path(), tables))
    with tempfile.TemporaryDirectory(prefix="unbraid-") as place:
        encode_query(data, lazy(rows, "The rows to predict"), fitted, Path(place), tables=tables)
        yield Encoded(Path(place), fitted)


def as_frame(scores: Scores, schema: Schema) -> pl.DataFrame:
    """Logits as probabilities (binary, multiclass) or values (real), one column per task."""
    return pl.DataFrame(predictions(scores.logits, schema))


def predictions(of: Mapping[str, Any], schema: Schema) -> dict[str, np.ndarray]:
    """Task -> (N,) or (N, K) logits become probabilities (binary, multiclass) or values (real), float64."""
    columns: dict[str, np.ndarray] = {}
    for task in schema.tasks:
        logits = of[task.name].astype(np.float64)
        if task.kind == "binary":
            columns[task.name] = sigmoid(logits)
        elif task.kind == "multiclass":
            raised = np.exp(logits - logits.max(1, keepdims=True))
            columns[task.name] = raised / raised.sum(1, keepdims=True)
        else:
            columns[task.name] = logits
    return columns


def explained(
    scores: Scores, beliefs: Mapping[str, Belief], schema: Schema, explore: Exploration | None = None,
    calibrators: Calibrators | None = None,
) -> pl.DataFrame:  # fmt: skip
    """`as_frame`, and ``TASK_sd`` (and ``TASK_explore``) of every task with a belief.  Raises UncertaintyError.

    Args:
        calibrators: what turned the logits that beliefs are about into those of ``scores``; chosen logits go the same way.
    """
    frame, columns = as_frame(scores, schema), {}
    for name, belief in beliefs.items():
        columns[f"{name}_sd"] = np.sqrt(belief.variance)
        if explore is not None:
            chosen = explore(belief, requests(scores))
            if calibrators is not None:
                chosen = calibrators.logits(name, chosen, scores.domain, scores.domains)
            columns[f"{name}_explore"] = sigmoid(chosen) if schema.task(name).kind == "binary" else chosen
    if clash := sorted(set(columns) & set(frame.columns)):
        raise UncertaintyError(f"Column {', '.join(clash)} would be a task's and an uncertainty's. Rename the task.")
    return frame.with_columns(**columns)


def with_uncertainty(
    bundle: Bundle, folder: str | Path | None = None, *, tables: Tables | None = None, prior: float = 1.0
) -> Bundle:
    """The bundle with the uncertainty of its last layer, from one pass over the rows of `trained_splits`.

    Args:
        folder: where the run's tables are read from now; the run's own folder by default.
        tables: tables in memory by name; prior: precision of the weights before any row was seen.

    Raises:
        UncertaintyError: no task is binary or real; ValueError: the prior is not positive; DataError as it says.
    """
    if not isinstance(bundle.model, Model):
        raise UncertaintyError(
            f"Schedule `{bundle.run.schedule.kind}` makes several models, whose last layers have no uncertainty."
        )
    device = str(device_of(bundle.model))
    predictor = Predictor(bundle, folder, device)
    encoded = Encoded(encode(predictor.data, tables=tables, fitted=bundle.fitted))
    attach(encoded, bundle.model, device=device)
    rows = np.sort(np.concatenate([encoded.split(name) for name in trained_splits(bundle.run)]))
    batches = encoded.in_order(rows, 4 * bundle.run.training.batch_size)
    scored = (predict(bundle.model, [batch], encoded.schema, hidden=True) for batch in batches)
    return dataclasses.replace(bundle, uncertainty=fit(bundle.model, scored, encoded.schema, prior))


def with_classes(bundle: Bundle, task: str, names: Sequence[str], vectors: torch.Tensor) -> Bundle:
    """The bundle with further classes of a task, which training never saw: rows of its head's vectors, and nothing else.

    Args:
        task: one with vectors of classes (``model.classes``); names: of the new classes, as labels are written; vectors: (n, d).

    Raises:
        BundleError: there are several models, or the task has no vectors of classes, or already such a class; the vectors are
            not one per name, of another width, not finite, or zeros.
    """
    head = (
        bundle.model.heads[task_key(task)]
        if isinstance(bundle.model, Model) and task in bundle.run.model.classes
        else None
    )
    if not isinstance(head, ClassHead):
        raise BundleError(f"Task `{task}` of this bundle has no vectors of classes in one model: see `model.classes`.")
    schema = bundle.fitted.schema
    known = schema.classes[task]
    if twice := sorted({name for name in names if name in known or list(names).count(name) > 1}):
        raise BundleError(f"Task `{task}`: new classes should differ from all others. Found {twice[:5]}.")
    if len(names) != len(vectors):
        raise BundleError(f"There should be one vector per name. Found {len(names)} names and {len(vectors)} vectors.")
    model = copy.deepcopy(cast(Model, bundle.model))
    try:
        cast(ClassHead, model.heads[task_key(task)]).add(vectors)
    except ValueError as error:
        raise BundleError(f"Task `{task}`: {error}") from error
    model.schema = dataclasses.replace(schema, classes={**schema.classes, task: (*known, *names)})
    fitted = dataclasses.replace(bundle.fitted, schema=model.schema)
    # what is known of other tasks' last layers is known of these very weights
    return dataclasses.replace(bundle, fitted=fitted, model=model, uncertainty=None, calibrators=None)


def trained_splits(run: config.Run) -> tuple[str, ...]:
    """The splits whose rows the run's schedule trains on: its ``splits``, or the training split alone."""
    return getattr(run.schedule, "splits", ("train",))


# ----------------------------------------------------------------------------------------------------------- warm start
def warm_start(model: Model, fitted: Fitted, old: Bundle) -> dict[str, int]:
    """Copy what an earlier model knows: table rows by value, heads by domain, everything else by name.

    Returns:
        Counts: table rows copied and new; other tensors copied and new.

    Raises:
        BundleError: a tensor of one name has another shape in the two models, or a task's classes differ; or domains do,
            where they have tables or weights.
    """
    counts = {"rows copied": 0, "rows new": 0, "tensors copied": 0, "tensors new": 0}
    if not isinstance(old.model, Model):
        raise BundleError(
            f"Schedule `{old.run.schedule.kind}` makes several models. A run starts from a bundle of one."
        )
    theirs, ours = old.model.state_dict(), model.state_dict()
    digits, apart = _growing(model, old.model), sharding.parts(model)
    for name, classes in fitted.schema.classes.items():
        if name in old.fitted.schema.classes and old.fitted.schema.classes[name] != classes:
            raise BundleError(
                f"Task `{name}` has classes {classes}; the bundle to start from has {old.fitted.schema.classes[name]}."
            )
    by_code = hasattr(model.tower, "reads_domain") or any(
        getattr(m, "reads_domain", False) for m in model.extra_heads.values()
    )
    if by_code and fitted.schema.domains != old.fitted.schema.domains:
        raise BundleError(
            "Tables or weights per domain can start only from a bundle with the same domains in the same order."
        )
    with torch.no_grad():
        for key, table in ours.items():
            source = _same_place(key, fitted.schema, old.fitted.schema)
            if source not in theirs:
                counts["tensors new"] += 1
            elif key.startswith("embeddings."):
                vocabulary, part = key.split("/")[1], apart.get(key)
                size = part.rows if part is not None else len(table)
                if table.shape[1] != theirs[source].shape[1]:
                    raise BundleError(
                        f"{key} is {table.shape[1]} wide; in the bundle to start from {theirs[source].shape[1]}."
                    )
                counts["rows new"] += size
                for here, there in _matching_rows(fitted, old.fitted, vocabulary, size):
                    counts["rows copied"] += len(here)
                    counts["rows new"] -= len(here)
                    if part is not None:
                        mine = (here >= part.start) & (here < part.start + len(part))
                        here, there = here[mine] - part.start, there[mine]
                    table[here] = theirs[source][there]
            elif key in digits and table.shape[1] == theirs[source].shape[1]:
                digits[key].take(theirs[source])
                counts["tensors copied"] += 1
            elif table.shape != theirs[source].shape:
                raise BundleError(
                    f"{key} is {tuple(table.shape)}, in the bundle to start from {tuple(theirs[source].shape)}. "
                    f"A warm start needs the same model."
                )
            else:
                table.copy_(theirs[source])
                counts["tensors copied"] += 1
    return counts


def _growing(model: Model, old: Model) -> dict[str, Any]:
    """Key of a weight whose shape follows the training data, in both models -> the module that can ``take`` the old one."""
    found: dict[str, Any] = {}
    for name, module in model.numbers.items():
        if hasattr(module, "growing") and name in old.numbers:
            parts = cast(Any, module).growing(old.numbers[name])
            found |= {f"numbers.{name}.{key}": part for key, part in parts.items()}
    return found


def _same_place(key: str, new: Schema, old: Schema) -> str:
    """A per-domain head's name in the old model: its domain may have had another code there."""
    if not key.startswith("heads."):
        return key
    parts = next((name for name in (".linears.", ".towers.") if name in key), "")
    if not parts:
        return key
    head, _, rest = key.partition(parts)
    code, _, part = rest.partition(".")
    name = new.domains[int(code)]  # one head for all domains is number 0 in both
    return f"{head}{parts}{old.domains.index(name)}.{part}" if name in old.domains else ""


def _matching_rows(
    new: Fitted, old: Fitted, vocabulary: str, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Rows of the new table and of the old one that mean the same value, some at a time."""
    if vocabulary not in new.vocabularies:  # a fixed table, such as time gaps
        both = torch.arange(min(size, old.schema.sizes.get(vocabulary, 0)))
        yield both, both
        return
    if vocabulary not in old.vocabularies:
        return
    ours, theirs = new.vocabularies[vocabulary], old.vocabularies[vocabulary]
    if ours.values.dtype != theirs.values.dtype:
        raise BundleError(
            f"Vocabulary `{vocabulary}` holds {ours.values.dtype}; in the bundle to start from {theirs.values.dtype}."
        )
    yield torch.arange(FIRST_VALUE), torch.arange(FIRST_VALUE)
    code = FIRST_VALUE
    for piece in pieces(theirs.values):
        codes = torch.from_numpy(ours.encode(piece).astype(np.int64))
        known = codes >= FIRST_VALUE
        yield codes[known], known.nonzero()[:, 0] + code
        code += len(piece)
    if ours.buckets and ours.buckets == theirs.buckets:
        each = torch.arange(ours.buckets)
        yield ours.size - ours.buckets + each, theirs.size - theirs.buckets + each
