"""Predictions from a bundle: rows in, probabilities out."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unbraid.adapters.frames import Table, lazy
from unbraid.bundle import EVALUATION_ROWS, Bundle, trained_splits
from unbraid.calibration.kept import Calibrators
from unbraid.data.declaration import Data
from unbraid.data.encode import encode, encode_query
from unbraid.data.features import attach
from unbraid.data.fitted import Fitted
from unbraid.data.source import DataError, Tables, known_types, scan_given
from unbraid.data.table import Encoded
from unbraid.layers import device_of
from unbraid.mc_dropout import McDropout
from unbraid.model import Model
from unbraid.train import predict
from unbraid.types import Schema, Scores
from unbraid.uncertainty.explore import Belief, Exploration, requests, sigmoid
from unbraid.uncertainty.last_layer import FITS, UncertaintyError, fit


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
