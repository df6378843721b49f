"""How unsure several models are that were trained alike with different seeds: where they disagree, they do not know.

Papers: Lakshminarayanan, Pritzel and Blundell, "Simple and scalable predictive uncertainty estimation using deep ensembles",
NeurIPS 2017 (https://arxiv.org/abs/1612.01474); draws from an ensemble for exploration as in Osband and Van Roy, "Bootstrapped
Thompson sampling and deep exploration", 2015 (https://arxiv.org/abs/1507.00300).

With logits ``z_1 .. z_M`` of a row: ``mu = mean_m z_m``, ``s^2 = sum_m (z_m - mu)^2 / (M - 1)``.  Over several rows their
covariance is that of the members, whose root is the (N, M) matrix of ``(z_m - mu) / sqrt(M - 1)``.

How this differs: the members see all rows, as in the first paper; no bootstrap, no adversarial rows.  A draw is normal with
the members' covariance, not one of the members.  The mean is of logits, not of probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from unbraid.adapters.frames import Table
from unbraid.bundle import Bundle
from unbraid.data.source import Tables
from unbraid.predictor import Predictor, explained
from unbraid.types import Scores
from unbraid.uncertainty.explore import Belief, Exploration
from unbraid.uncertainty.last_layer import KINDS, UncertaintyError, digest_of

BIBTEX = """@inproceedings{lakshminarayanan2017simple,
  title = {Simple and Scalable Predictive Uncertainty Estimation Using Deep Ensembles},
  author = {Lakshminarayanan, Balaji and Pritzel, Alexander and Blundell, Charles},
  booktitle = {Advances in Neural Information Processing Systems 30},
  year = {2017}
}
"""


class Ensemble:
    """Several bundles as one predictor, with the interface of `unbraid.predictor.Predictor`.

    Args:
        members: at least two predictors, bundles or their folders, of one set of tasks: with equal labels and ``given``.
        folder: where the runs' tables are read from now, for members that are no predictors yet.

    Raises:
        UncertaintyError: there is one member, tasks differ, none is binary or real, or two members have the same weights.
    """

    def __init__(self, members: Sequence[Predictor | Bundle | str | Path], folder: str | Path | None = None) -> None:
        self.members = [m if isinstance(m, Predictor) else Predictor(m, folder) for m in members]
        if len(self.members) < 2:
            raise UncertaintyError(f"An ensemble needs at least two models. Found {len(self.members)}.")
        self.schema, self.data = self.members[0].bundle.fitted.schema, self.members[0].data
        tasks = [
            [
                (t.name, t.kind, s.classes.get(t.name), f"label {t.source}", f"given {t.given or 'nothing'}")
                for t in s.tasks
            ]
            for s in (m.bundle.fitted.schema for m in self.members)
        ]
        if different := [i for i, found in enumerate(tasks) if found != tasks[0]]:
            raise UncertaintyError(
                f"An ensemble's models need the same tasks. Number 0 has {tasks[0]}, number {different[0]} {tasks[different[0]]}."
            )
        if not any(task.kind in KINDS for task in self.schema.tasks):
            raise UncertaintyError(
                "Uncertainty of an ensemble is for binary and real tasks; the models have multiclass ones."
            )
        digests = [digest_of(m.bundle.model) for m in self.members]
        if twice := [i for i, digest in enumerate(digests) if digest in digests[:i]]:
            raise UncertaintyError(
                f"Number {digests.index(digests[twice[0]])} and number {twice[0]} of the ensemble have the same weights: they "
                "would never disagree, and seem to be sure. Train each with a seed of its own (`--seed`)."
            )

    def beliefs(self, rows: Table | str | Path, tables: Tables | None = None) -> tuple[Scores, dict[str, Belief]]:
        """The members' mean logits, and task -> belief about the rows."""
        scores = [member.scores(rows, tables) for member in self.members]
        logits = {name: np.stack([s.logits[name] for s in scores]).astype(np.float64) for name in scores[0].logits}
        mean = {name: members.mean(0) for name, members in logits.items()}
        head = np.zeros(len(scores[0].row), np.int64)
        found = {}
        for task in (t for t in self.schema.tasks if t.kind in KINDS):
            root = (logits[task.name] - mean[task.name]).T / np.sqrt(len(scores) - 1)
            found[task.name] = Belief(mean[task.name], root, head)
        return replace(scores[0], logits=mean), found

    def scores(self, rows: Table | str | Path, tables: Tables | None = None) -> Scores:
        """The members' mean logits, with the labels and what else the first one knows of the rows."""
        return self.beliefs(rows, tables)[0]

    def predict(
        self, rows: Table | str | Path, tables: Tables | None = None, *,
        explore: Exploration | None = None, uncertainty: bool = False,
    ) -> pl.DataFrame:  # fmt: skip
        """As `unbraid.predictor.Predictor.predict`; the plain prediction is that of the mean logit."""
        scores, beliefs = self.beliefs(rows, tables)
        return explained(scores, beliefs if uncertainty or explore else {}, self.schema, explore)
