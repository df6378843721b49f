"""A trained artefact on disk.

A bundle is a folder: ``run.toml``, ``schema.json``, ``vocabularies/``, ``weights.safetensors``, ``metrics.json``,
``environment.json``, ``report.md``, and ``report.html``, ``report.json``, ``uncertainty.safetensors`` and
``calibration.safetensors`` once asked for; ``backbones.safetensors`` holds what a frozen backbone is, whole, so that nothing
else is needed to load it.  Nothing in it is a pickle.  Loading refuses what does not match, by name.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from unbraid import config, parallel, sharded_files, store
from unbraid.backbones.frozen import Frozen, fill
from unbraid.calibration.kept import Calibrators
from unbraid.class_head import Classes, ClassHead
from unbraid.data.fitted import Fitted
from unbraid.encoders.table import undrawn
from unbraid.layers import task_key
from unbraid.model import Model
from unbraid.types import Schema
from unbraid.uncertainty.last_layer import LastLayer, digest_of

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
    def load(cls, folder: str | Path, *, images: nn.Module | None = None, mapped: bool = False) -> Bundle:
        """Read a bundle.

        Args:
            images: the network that the run's ``model.images`` of kind `module` was given; its weights are those of the bundle.
            mapped: weights stay in their file, and take memory only where they are read: for one who copies from them
                (`unbraid.warm_start`) and neither trains nor predicts.

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
            weights = store.load(folder / "weights.safetensors", mapped=mapped)
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
            with parallel.alone(), undrawn() if mapped else nullcontext():  # tables are whole here
                model = build_trained(run, fitted.schema, weights)
            set_constants(model, fixed)
        except (ValueError, TypeError, LookupError, RuntimeError, ImportError) as error:  # whatever such parts lead to
            raise BundleError(f"{folder}: weights.safetensors does not fit run.toml: {error}") from error
        _check_weights(folder, {k: tuple(v.shape) for k, v in model.state_dict().items()}, weights)
        model.load_state_dict(weights, assign=mapped)
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
