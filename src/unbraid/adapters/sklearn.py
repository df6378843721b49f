"""Estimators of scikit-learn: `UnbraidClassifier` and `UnbraidRegressor`.

Columns become features, one or several columns of y become tasks, and rows may come from domains, labelled or not:

- y has shape (n,) or (n, T).  A NaN or None is a label that is not known, of that task alone.
- ``sample_domain`` is a number or a word per row.  Where it is a negative number the row is of a target without labels: whatever
  y holds there is never read (the convention of skada, domain adaptation in scikit-learn's manner).  Losses such as `mcc` teach
  these rows.

Everything else of a run (`unbraid.config.Run`) is set by its key: ``settings={"model.tower.kind": "mmoe"}``.
"""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import polars as pl
import scipy
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted, validate_data

from unbraid import config, parallel
from unbraid.adapters.frames import lazy
from unbraid.bundle import Bundle
from unbraid.data.declaration import Data, Split
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.job import prepared
from unbraid.optim.joint import Joint
from unbraid.predictor import Predictor
from unbraid.slots import Look
from unbraid.train import Training
from unbraid.types import Feature, Task

DOMAIN, WEIGHT, PART, LABEL = "__domain", "__weight", "__part", "__label "  # columns beside those of X


@dataclass(frozen=True)
class Target:
    """A column of y: its name, its (n,) float64 values with NaN for what is not known, and its classes (codes are values)."""

    name: str
    values: np.ndarray
    classes: np.ndarray | None = None
    mean: float = 0.0
    std: float = 1.0

    def column(self) -> pl.Series:
        """The labels as a table holds them: null where not known, codes of classes as whole numbers."""
        column = pl.Series(LABEL + self.name, self.values).fill_nan(None)
        return column if self.classes is None else column.cast(pl.Int64)

    @property
    def kind(self) -> Literal["binary", "multiclass", "real"]:
        """Of the task."""
        return "real" if self.classes is None else "binary" if len(self.classes) == 2 else "multiclass"


class Parameters(BaseEstimator, ABC):
    """What both estimators do and are set by.

    Args:
        settings: keys of a run file -> their values, as after ``--set``: ``{"update.kind": "adatask", "losses": [...]}``.
        features: what the columns mean, as in a run's ``data.features``; None: by their types.  Text, categories and booleans are
            ids, numbers are numbers, lists of floats are vectors, other lists bags, bytes pictures.
        categories: names or places of number columns that are ids.
        epochs: passes over the training rows; batch_size: rows per step; lr: Adam's step size.
        validation: share of the rows with a label that judge instead of teaching, for ``training.patience`` or ``selection``.
        random_state: seed of weights, order and validation rows.
    """

    # where arguments are routed (scikit-learn's `enable_metadata_routing`, always in skada), domains are passed on unasked
    __metadata_request__fit = {"sample_domain": True}
    __metadata_request__predict = {"sample_domain": True}
    __metadata_request__score = {"sample_domain": True}

    def __init__(
        self, *, settings: Mapping[str, Any] | None = None, features: Sequence[Feature] | None = None,
        categories: Sequence[str | int] = (), epochs: float = 30, batch_size: int = 64, lr: float = 0.01,
        validation: float = 0.0, random_state: Any = None,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.features = features
        self.categories = categories
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.validation = validation
        self.random_state = random_state

    # ----------------------------------------------------------------------------------------------------------- sklearn
    def __sklearn_tags__(self) -> Any:
        """Missing values and several tasks are welcome, and so are columns of words."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.categorical = tags.input_tags.string = True
        tags.target_tags.multi_output = tags.target_tags.single_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None, sample_domain: Any = None) -> Self:
        """Train.

        Args:
            X: (n, d) array, or a table that `unbraid.adapters.frames.lazy` takes.
            y: (n,) or (n, T) labels; NaN or None: not known.
            sample_weight: (n,) weights of the rows; sample_domain: (n,) domains, below 0 of a target without labels.

        Raises:
            ValueError: what scikit-learn raises for such input; no label or one class alone is known; what a run refuses.
        """
        frame = self._frame(X, reset=True)
        columns, self._one_column = _columns_of(y)
        check_consistent_length(frame, *columns.values())
        domain = None if sample_domain is None else _domains(sample_domain, len(frame))
        hidden = np.zeros(len(frame), bool) if domain is None else _is_target(domain)
        self.targets_ = [self._target(name, values, hidden) for name, values in columns.items()]
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, np.empty((len(frame), 1)), ensure_non_negative=True)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with torch.random.fork_rng():  # the caller's random numbers stay theirs
            self.bundle_ = self._trained(frame, weight, domain, seed)
        return self

    def _score(self, measure: Any, predicted: np.ndarray, y: Any, sample_weight: Any) -> float:
        """The mean over tasks of a measure of the rows whose label is known."""
        weight = None if sample_weight is None else np.asarray(sample_weight)
        table, scores = predicted.reshape(len(predicted), -1), []
        for place, values in enumerate(_columns_of(y)[0].values()):
            if (known := ~_unknown(values)).any():
                truth, found = (np.array(part.tolist()) for part in (values[known], table[known, place]))
                scores.append(measure(truth, found, sample_weight=None if weight is None else weight[known]))
        if not scores:
            raise ValueError("No label of y is known: there is nothing to score.")
        return float(np.mean(scores))

    # --------------------------------------------------------------------------------------------------------------- X
    def _frame(self, X: Any, reset: bool) -> pl.DataFrame:
        """X as a frame, with names for columns that have none."""
        if hasattr(X, "columns") or hasattr(X, "column_names") or isinstance(X, pl.LazyFrame):
            frame = lazy(X, "X").collect()
            validate_data(self, X if hasattr(X, "iloc") else frame, reset=reset, skip_check_array=True)
            if not len(frame):
                raise ValueError("Found array with 0 sample(s) (shape=(0, ...)) while a minimum of 1 is required.")
            infinite = [n for n, t in frame.schema.items() if t.is_float() and frame[n].is_infinite().any()]
            if infinite:
                raise ValueError(f"Input X contains infinity in column {', '.join(infinite)}.")
            return frame.with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))
        array = validate_data(self, X, reset=reset, dtype="numeric", ensure_all_finite="allow-nan")
        frame = pl.DataFrame(np.asarray(array), schema=[f"x{i}" for i in range(array.shape[1])])
        return frame.with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))

    def _features(self, frame: pl.DataFrame) -> tuple[Feature, ...]:
        if self.features is not None:
            return tuple(self.features)
        asked = [frame.columns[c] if isinstance(c, int | np.integer) else c for c in self.categories]
        if strange := sorted(set(asked) - set(frame.columns)):
            raise ValueError(f"`categories` should name columns of X, {frame.columns[:12]}. Found {strange}.")
        kinds: dict[str, Any] = {name: "id" if name in asked else _kind(name, frame[name]) for name in frame.columns}
        taken: dict[str, str] = {}
        for name in frame.columns:  # a feature's name has no dot and no slash
            plain = name.replace(".", "_").replace("/", "_") or "column"
            while plain in taken.values():
                plain += "_"
            taken[name] = plain
        return tuple(Feature(taken[name], kind=kind, column=name) for name, kind in kinds.items())

    # ---------------------------------------------------------------------------------------------------------- training
    @abstractmethod
    def _target(self, name: str, values: np.ndarray, hidden: np.ndarray) -> Target:
        """A column of y; labels of ``hidden`` rows are not read.  Raises ValueError for what the estimator cannot learn."""

    _metric: str

    def _run(self, frame: pl.DataFrame, weighted: bool, domains: bool, seed: int) -> config.Run:
        data = Data(
            rows="X", features=self._features(frame),
            tasks=tuple(Task(t.name, column=LABEL + t.name, kind=t.kind) for t in self.targets_),
            weight=WEIGHT if weighted else "", domain=DOMAIN if domains else "", split=Split(kind="column", column=PART),
        )  # fmt: skip
        training = Training(
            batch_size=self.batch_size, epochs=self.epochs, metric=self._metric, checkpoint_seconds=0, threads=0
        )
        run = config.Run(data=data, name="sklearn", seed=seed, update=Joint(lr=self.lr), training=training)
        changes = [(key, value, f"settings {key}") for key, value in (self.settings or {}).items()]
        return config.changed(run, changes) if changes else run

    def _trained(self, frame: pl.DataFrame, weight: np.ndarray | None, domain: np.ndarray | None, seed: int) -> Bundle:
        """The bundle that training on these rows gives."""
        if not 0 <= self.validation < 1:
            raise ValueError(f"Parameter `validation` should be in [0, 1). Found {self.validation}.")
        run = self._run(frame, weight is not None, domain is not None, seed)
        plain = run.schedule.kind == "one_stage" and not run.training.patience and run.selection is None
        if not self.validation and not plain:
            raise ValueError(
                "Early stopping, a selection or a schedule needs rows to judge by: set `validation` to a share of the rows, "
                "such as 0.1."
            )
        rows = frame.with_columns(
            [target.column() for target in self.targets_]
            + ([] if weight is None else [pl.Series(WEIGHT, weight)])
            + ([] if domain is None else [pl.Series(DOMAIN, domain)])
            + [pl.Series(PART, _parts(self.targets_, self.validation, seed))]
        )
        # a log has three splits; of those that nothing reads here there is one row, the first
        empty = ["test"] if self.validation else ["valid", "test"]
        rows = pl.concat([rows, *(rows.head(1).with_columns(pl.lit(name).alias(PART)) for name in empty)])
        with parallel.together(run.training.device) as device, tempfile.TemporaryDirectory(prefix="unbraid-") as place:
            there = replace(run.data, cache=place)
            encoded = Encoded(encode(there, tables={"X": rows}))
            model, session = prepared(run, encoded, device)
            with contextlib.closing(session):
                if self.validation:
                    trained = run.schedule(session, model, session.total_steps())
                else:
                    trained = session.fit(model, session.total_steps(), look=Look(every=-1))[0]
            self.n_steps_ = session.steps
            return Bundle(run, encoded.fitted, trained.cpu().eval(), {})

    def _logits(self, X: Any, sample_domain: Any) -> list[np.ndarray]:
        """For each task (n,) or (n, K) float64."""
        check_is_fitted(self)
        frame, known = self._frame(X, reset=False), self.bundle_.run.data.domain
        if sample_domain is not None:
            if not known:
                raise ValueError(
                    "`sample_domain` was not given to fit, so the model knows no domains. Leave it out here."
                )
            frame = frame.with_columns(pl.Series(DOMAIN, _domains(sample_domain, len(frame))))
        elif known:
            kind = self.bundle_.fitted.vocabularies["domain "].values.dtype
            frame = frame.with_columns(pl.lit(None, kind).alias(DOMAIN))
        scores = Predictor(self.bundle_).scores(frame)
        return [scores.logits[task.name].astype(np.float64) for task in self.bundle_.run.data.tasks]


class UnbraidClassifier(ClassifierMixin, Parameters):
    """Binary and multiclass tasks that share a model: scikit-learn's classifier.

    With several tasks, ``classes_`` and ``predict_proba`` are lists, an entry per task, as those of scikit-learn's forests.
    Parameters are those of `Parameters`.
    """

    _metric = "logloss"
    __metadata_request__predict_proba = {"sample_domain": True}

    def _target(self, name: str, values: np.ndarray, hidden: np.ndarray) -> Target:
        known = ~_unknown(values) & ~hidden
        if not known.any():
            raise ValueError(f"No label of `{name}` is known. Found {len(values):,} rows without.")
        labels = np.array(values[known].tolist())
        check_classification_targets(labels)
        classes, codes = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"Classifier needs two classes of `{name}` or more. Found one class: {classes[0]!r}.")
        coded = np.full(len(values), np.nan)
        coded[known] = codes
        return Target(name, coded, classes)

    @property
    def classes_(self) -> Any:
        """(K,) labels in the order of `predict_proba`; of several tasks a list."""
        check_is_fitted(self, "targets_")
        found = [target.classes for target in self.targets_]
        return found[0] if self._one_column else found

    def predict_proba(self, X: Any, sample_domain: Any = None) -> Any:
        """(n, K) probabilities; of several tasks a list.  Raises ValueError for other columns than those of fit."""
        found, all_logits = [], self._logits(X, sample_domain)
        for task, logits in zip(self.targets_, all_logits, strict=True):
            if task.kind == "binary":
                logits = np.stack([np.zeros_like(logits), logits], 1)
            else:  # columns are the model's classes, which are codes as text
                places = [int(code) for code in self.bundle_.fitted.schema.classes[task.name]]
                logits = logits[:, np.argsort(places)]
            found.append(scipy.special.softmax(logits, axis=1))
        return found[0] if self._one_column else found

    def predict(self, X: Any, sample_domain: Any = None) -> np.ndarray:
        """(n,) most probable classes; of several tasks (n, T)."""
        found = self.predict_proba(X, sample_domain)
        if self._one_column:
            return self.classes_[found.argmax(1)]
        columns = [np.asarray(target.classes)[p.argmax(1)] for target, p in zip(self.targets_, found, strict=True)]
        same = len({column.dtype.kind for column in columns}) == 1
        return np.stack(columns if same else [column.astype(object) for column in columns], 1)

    def score(self, X: Any, y: Any, sample_weight: Any = None, sample_domain: Any = None) -> float:
        """Accuracy over the rows whose label is known; the mean over tasks."""
        return self._score(accuracy_score, self.predict(X, sample_domain), y, sample_weight)


class UnbraidRegressor(RegressorMixin, Parameters):
    """Real tasks that share a model: scikit-learn's regressor.  Labels are standardised inside, each task's by its own.

    Parameters are those of `Parameters`.
    """

    _metric = "rmse"

    def _target(self, name: str, values: np.ndarray, hidden: np.ndarray) -> Target:
        try:
            numbers = np.where(_unknown(values), np.nan, values).astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Labels of `{name}` should be numbers: {error}.") from error
        numbers[hidden] = np.nan
        if np.isinf(numbers).any():
            raise ValueError(f"Input y contains infinity or a value too large for dtype('float64'). Task `{name}`.")
        known = numbers[~np.isnan(numbers)]
        if not len(known):
            raise ValueError(f"No label of `{name}` is known. Found {len(values):,} rows without.")
        mean, std = float(known.mean()), float(known.std()) or 1.0
        return Target(name, (numbers - mean) / std, None, mean, std)

    def predict(self, X: Any, sample_domain: Any = None) -> np.ndarray:
        """(n,) values; of several tasks (n, T)."""
        logits = self._logits(X, sample_domain)
        columns = [z * target.std + target.mean for z, target in zip(logits, self.targets_, strict=True)]
        return columns[0] if self._one_column else np.stack(columns, 1)

    def score(self, X: Any, y: Any, sample_weight: Any = None, sample_domain: Any = None) -> float:
        """R2 over the rows whose label is known; the mean over tasks."""
        return self._score(r2_score, self.predict(X, sample_domain), y, sample_weight)


# ------------------------------------------------------------------------------------------------------- columns of rows
def _kind(name: str, column: pl.Series) -> str:
    """What a column is as a feature, by its type."""
    kind = column.dtype
    if kind.is_numeric():
        return "number"
    if kind in (pl.String, pl.Boolean, pl.Null) or isinstance(kind, pl.Categorical | pl.Enum):
        return "id"
    if kind == pl.Binary:
        return "image"
    if isinstance(kind, pl.List | pl.Array):
        return "vector" if kind.inner.is_float() else "bag"
    raise ValueError(
        f"Column `{name}` of X is {kind}. Make numbers or categories of it, or say what it is with `features`."
    )


def _columns_of(y: Any) -> tuple[dict[str, np.ndarray], bool]:
    """Name -> (n,) values of each column of y, and whether y has one dimension."""
    if y is None:
        raise ValueError("This estimator requires y to be passed, but the target y is None.")
    flat = hasattr(y, "to_frame") and not hasattr(y, "columns")  # a series
    if flat or hasattr(y, "columns"):
        frame = lazy(y.to_frame(y.name or "y") if flat else y, "y").collect()
        return {name.replace(".", "_").replace("/", "_"): _values(frame[name]) for name in frame.columns}, flat
    array = np.asarray(y)
    if array.ndim not in (1, 2) or 0 in array.shape[1:]:
        raise ValueError(f"y should be a 1d or 2d array, got an array of shape {array.shape} instead.")
    if array.dtype.kind == "c":
        raise ValueError("Complex data not supported: y.")
    if array.ndim == 1:
        return {"y": array}, True
    return {f"y{i}": array[:, i] for i in range(array.shape[1])}, False


def _values(column: pl.Series) -> np.ndarray:
    """(n,) values of a label column; nulls are NaN among numbers and None among others."""
    if column.dtype.is_numeric() or (column.dtype == pl.Boolean and not column.null_count()):
        return column.to_numpy()
    found = np.empty(len(column), object)
    found[:] = column.to_list()
    return found


def _unknown(values: np.ndarray) -> np.ndarray:
    """(n,) bool: is it NaN or None?"""
    if values.dtype.kind == "f":
        return np.isnan(values)
    if values.dtype.kind == "O":
        return np.array([value is None or value != value for value in values], bool)
    return np.zeros(len(values), bool)


def _domains(sample_domain: Any, rows: int) -> np.ndarray:
    """(n,) int64 or text.  Raises ValueError for another length, or numbers that are not whole."""
    found = np.asarray(sample_domain)
    if found.shape != (rows,):
        raise ValueError(f"`sample_domain` should have shape ({rows},). Found {found.shape}.")
    if found.dtype.kind in "iub":
        return found.astype(np.int64)
    if found.dtype.kind == "f":
        if not (np.isfinite(found) & (found == np.floor(found))).all():
            raise ValueError("`sample_domain` should hold whole numbers or words. Found fractions, NaN or infinity.")
        return found.astype(np.int64)
    return np.array([str(value) for value in found], object)


def _is_target(domain: np.ndarray) -> np.ndarray:
    """(n,) bool: rows of a target without labels."""
    return domain < 0 if domain.dtype.kind == "i" else np.zeros(len(domain), bool)


def _parts(targets: Sequence[Target], share: float, seed: int) -> list[str]:
    """``train`` or ``valid`` for each row; every class of every task keeps a row that teaches it."""
    rng, rows = np.random.default_rng([seed, 3]), len(targets[0].values)
    valid = np.zeros(rows, bool)
    valid[rng.permutation(rows)[: round(share * rows)]] = True
    for target in targets:
        for code in range(0 if target.classes is None else len(target.classes)):
            of_class = target.values == code
            if not (of_class & ~valid).any():
                valid[np.flatnonzero(of_class)[0]] = False
    if share and (not valid.any() or valid.all()):
        raise ValueError(f"A share of {share:g} of {rows} rows leaves none to judge by, or none to learn from.")
    return ["valid" if v else "train" for v in valid]
