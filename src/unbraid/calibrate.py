"""Calibrate a bundle: fit a calibrator per task to held-out rows and a target, and say what it changes there."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
from pydantic import TypeAdapter, ValidationError
from scipy.special import expit

from unbraid import store
from unbraid.bundle import CALIBRATION, Bundle, BundleError, trained_splits
from unbraid.calibration.kept import Calibrators, Kept
from unbraid.calibration.maps import Calibration, confidence
from unbraid.config import CalibratorChoice, RunError
from unbraid.data.source import Tables
from unbraid.evaluate import evaluate
from unbraid.layers import device_of
from unbraid.predictor import Predictor
from unbraid.slots import Calibrator
from unbraid.types import Schema, Scores, Task
from unbraid.uncertainty.last_layer import digest_of

TRAIN_ROWS = 200_000  # whose hidden vectors stand for the source: the ratio has a few numbers, and memory is N x H
Rows = pl.DataFrame | pl.LazyFrame | str | Path


@dataclass(frozen=True)
class Change:
    """What a calibrator of one task did on the target.

    Args:
        task, domain: what it is for; numbers, warnings: of the fit.
        before, after: mean of the prediction (binary) or of the largest probability (multiclass) over the target rows.
        labels: where the target has labels, (before, after) of each metric that they allow: for evaluation only, nothing was
            fitted to them.  Empty without.
    """

    task: str
    domain: str
    numbers: Mapping[str, float]
    warnings: tuple[str, ...]
    before: float
    after: float
    labels: Mapping[str, tuple[float | None, float | None]]


def calibrate(
    bundle: Bundle, method: Calibrator, *, tasks: Sequence[str] = (), target: Rows | None = None, split: str = "test",
    domain: str = "", held_out: Rows | None = None, train_features: bool = False, folder: str | Path | None = None,
    tables: Tables | None = None,
) -> tuple[Bundle, list[Change], list[str]]:  # fmt: skip
    """The bundle with calibrators in the place of those of the same tasks and domain.

    Source rows are those of the validation split (``held_out`` instead, if given), and their labels are read.  Labels of the
    target are never read by the fit.

    Args:
        method: the calibrator, such as `unbraid.calibration.transcal.TransCal`.
        tasks: which; empty: all that it can calibrate.
        target: rows of the target, as `Predictor.predict` takes them; None: those of ``split`` of the run's own data.
        domain: the target is the target rows of this domain, and the calibrator serves rows of this domain alone.  For a method
            that reads a target, the source is then all other domains; for others, the held-out rows of the domain.  A domain that
            training never saw is ``(unknown)``.
        held_out: labelled rows that did not train the model, instead of the validation split.
        train_features: compare the target with the hidden vectors of the training rows (evenly spaced ones, if there are
            many) instead of those of the held-out rows: more rows, but the right ones only where both are drawn alike, and not
            where training rows are older, or their ids known by heart.
        folder, tables: as of `Predictor`.

    Returns:
        The bundle, one change per task, and what should be known of the data.

    Raises:
        BundleError: the validation rows trained the model, or a domain or task is unknown; ValueError: a task that was asked for
            cannot be calibrated; DataError as it says.
    """
    schema = bundle.fitted.schema
    notes = _refuse(bundle, held_out is None, domain)
    predictor = Predictor(bundle, folder, str(device_of(bundle.model)), raw=True)
    hidden = method.needs_target

    def read(rows: Rows | None, split: str) -> Scores:
        if rows is None:
            return predictor.split_scores(split, tables, hidden=hidden)
        return predictor.scores(rows, tables, hidden=hidden)

    aimed, held = read(target, split), read(held_out, "valid")
    train = predictor.split_scores("train", tables, hidden=True, most=TRAIN_ROWS) if hidden and train_features else None
    if domain:
        code = schema.domains.index(domain)
        aimed = chosen(aimed, aimed.domain == code, f"target rows of domain `{domain}`")
        held = chosen(held, (held.domain == code) != hidden, f"held-out rows to calibrate domain `{domain}` by")
        train = train and chosen(train, train.domain != code, f"training rows outside domain `{domain}`")
    fitted, skipped = _fits(schema, method, tasks, held, aimed, train)
    where = f"split {split}" if target is None else Path(target).name if isinstance(target, str | Path) else "rows"
    calibrators = bundle.calibrators or Calibrators(digest_of(bundle.model))
    settings = {part.name: getattr(method, part.name) for part in dataclasses.fields(method)}  # type: ignore[arg-type]
    for name, found in fitted.items():
        source = "split valid" if held_out is None else "held-out rows"
        calibrators = calibrators.with_one(Kept(name, domain, settings, source, where, found))
    changes = [_change(schema.task(name), domain, found, aimed, schema) for name, found in fitted.items()]
    return dataclasses.replace(bundle, calibrators=calibrators), changes, [*notes, *skipped]


def _refuse(bundle: Bundle, valid: bool, domain: str) -> list[str]:
    """What should be known of the validation rows, if these are read.  Raises BundleError as `calibrate`."""
    run, known = bundle.run, bundle.fitted.schema.domains
    if domain and domain not in known:
        raise BundleError(f"There is no domain `{domain}`. Domains: {', '.join(known)}.")
    if valid and "valid" in trained_splits(run):
        raise BundleError(
            f"Schedule `{run.schedule.kind}` trained on the validation rows, too: the model is surer of them than of new ones. "
            "Give labelled rows that it did not see (`--held-out`)."
        )
    if valid and run.selection is not None:
        return [
            f"selection `{run.selection.kind}` chose the weights on the validation split: where it read labels of these rows, "
            "the model looks slightly better on them than it is"
        ]
    if valid and run.training.patience:
        return [
            "early stopping chose the weights by these validation rows, on which the model looks slightly better than it is"
        ]
    return []


def method_of(kind: str, settings: Sequence[str] = ()) -> Calibrator:
    """The calibrator of that name with ``key=value`` settings (values in TOML; a bare word is text).  Raises RunError."""
    members = {member.kind: member for member in get_args(get_args(CalibratorChoice)[0])}
    if kind not in members:
        raise RunError(f"There is no calibrator `{kind}`. Calibrators: {', '.join(members)}.")
    keys = [part.name for part in dataclasses.fields(members[kind]) if part.name != "kind"]
    plain: dict[str, Any] = {}
    for setting in settings:
        key, eq, text = setting.partition("=")
        if not eq:
            raise RunError(f"`--set {setting}` should look like `--set power=0.5`.")
        if (key := key.strip()) not in keys:
            raise RunError(f"`--set {setting}`: `{kind}` has no `{key}`. Allowed: {', '.join(keys) or 'none'}.")
        try:
            plain[key] = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            plain[key] = text
    try:
        return TypeAdapter(members[kind]).validate_python(plain)
    except ValidationError as error:
        told = [".".join(map(str, one["loc"])) + ": " * bool(one["loc"]) + one["msg"] for one in error.errors()]
        raise RunError(f"Calibrator `{kind}` of {', '.join(settings)}: {'; '.join(told)}") from None


def _fits(
    schema: Schema, method: Calibrator, tasks: Sequence[str], held: Scores, aimed: Scores, train: Scores | None
) -> tuple[dict[str, Calibration], list[str]]:
    """Task -> its fit, and what was left out.  Raises ValueError for a task that was named, or when none is left."""
    fitted: dict[str, Calibration] = {}
    skipped: dict[str, ValueError] = {}
    for task in [schema.task(name) for name in tasks] or schema.tasks:
        try:
            fitted[task.name] = method.fit(task, held, aimed, train)  # type: ignore[assignment]
        except ValueError as error:
            if tasks:
                raise
            skipped[task.name] = error
    if not fitted:
        raise ValueError("No task can be calibrated. " + " ".join(map(str, skipped.values())))
    return fitted, [f"task {name} is left as it is: {error}" for name, error in skipped.items()]


def chosen(scores: Scores, rows: Any, what: str) -> Scores:
    """The scores of some rows (a mask).  Raises ValueError when there are none; ``what`` they are."""
    if not rows.any():
        raise ValueError(f"There are no {what}.")

    def pick(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: pick(inner) for key, inner in value.items()}
        return value if value is None or isinstance(value, tuple) else np.asarray(value)[rows]

    return Scores(**{part.name: pick(getattr(scores, part.name)) for part in dataclasses.fields(Scores)})


def _change(task: Task, domain: str, found: Calibration, aimed: Scores, schema: Schema) -> Change:
    logits = np.asarray(aimed.logits[task.name], np.float64)
    after = found(logits)
    level = confidence if task.kind == "multiclass" else expit
    labels: dict[str, tuple[float | None, float | None]] = {}
    if np.asarray(aimed.observed[task.name]).any():
        alone = dataclasses.replace(schema, tasks=(task,))
        both = [
            evaluate(dataclasses.replace(aimed, logits={task.name: z}), alone, replicates=0)[task.name]
            for z in (logits, after)
        ]
        names = [name for name in ("calibration", "ece", "ece_mass", "logloss") if name in both[0]]
        labels = {name: (both[0][name]["value"], both[1][name]["value"]) for name in names}
    means = float(level(logits).mean()), float(level(after).mean())
    return Change(task.name, domain, found.numbers, found.warnings, *means, labels)


def remove_from(folder: Path, tasks: tuple[str, ...] = (), domain: str | None = None) -> int:
    """Remove a bundle's calibrators of these tasks (empty: all) and this domain (None: all).  Returns how many are left.

    The model is not read, so that calibrators of other weights can be removed, too.  Raises BundleError when there are none.
    """
    path = Path(folder) / CALIBRATION
    if not path.exists():
        raise BundleError(f"There are no calibrators to remove: {path} is not there.")
    before = Calibrators.load(store.load(path))
    left = before.without(tasks, domain)
    if len(left.kept) == len(before.kept):
        have = ", ".join(f"{one.task} ({one.domain or 'all'})" for one in before.kept)
        raise BundleError(f"There is no such calibrator to remove. Found {have}.")
    if left.kept:
        store.save(path, left.state_dict())
    else:
        path.unlink()
    return len(left.kept)
