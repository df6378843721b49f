"""Does the model see what of the history goes with the row's own item?

Attention is for what depends on both: that a user has just seen the author of this very video.  For a history and an event field
that shares a vocabulary with a feature of the row, m is the log of 1 + the number of a row's events with the feature's own value.
If the model uses the match, its residuals have nothing to do with m.  A logistic regression on (logit, m, logit m) is fitted to
one half of the users and scores the other::

    value = AUC(fitted on logit and m) - AUC(logit)            cross-fitted, validation rows, interval over users

The search module of long histories needs no attention weights for this, and neither does a mean: whatever the encoder is, what it
misses of the match is here.  ``newest`` limits m to so many newest events (0: all).

Where the encoder scores events, two maps stand beside: what an event of the row's own value says at each position, as it is
counted on training rows and as attention has it, and their rank correlation (`unbraid.diagnosis.retrieval`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from unbraid.analysis.correlation import Truth
from unbraid.bootstrap import Drawn
from unbraid.diagnosis.case import Case, paired
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, NotApplicable, Remedy
from unbraid.diagnosis.plots import Bars, Lines
from unbraid.diagnosis.retrieval import Grids, Match, counted, grids, heats, matches, scored
from unbraid.encoders.attention import TargetAttention
from unbraid.encoders.dare import DARE
from unbraid.evaluate import replicate
from unbraid.types import FIRST_VALUE, Ragged, Scores

PAGE = "diagnosis.md#does-it-see-the-match"
Compared = tuple[Truth, Grids]


@dataclass(frozen=True)
class Attention:
    """See the module's docstring.  ``usual``, ``severe``: gains in AUC."""

    name: ClassVar[str] = "attention"
    title: ClassVar[str] = "Does the model see what of the history goes with the item?"
    page: ClassVar[str] = PAGE
    newest: int = 0
    usual: float = 0.002
    severe: float = 0.008

    def __call__(self, case: Case) -> list[Diagnosis]:
        """A diagnosis per history and field.  Raises NotApplicable where no event field is also a feature of the row."""
        pairs = matches(case)
        tasks = [task.name for task in case.targets if task.kind == "binary"]
        if not pairs or not tasks:
            raise NotApplicable(
                "no event field of a history has the vocabulary of a feature, or there is no binary target"
            )
        counts = self._matches(case, pairs)
        found = []
        for pair in pairs:
            for task in tasks:
                gain = missed(case, task, counts[pair])
                if gain is not None:
                    found.append((pair, task, *gain))
        if not found:
            raise NotApplicable("no row of the validation split has events that match")
        found.sort(key=lambda each: -each[2])
        bars = Bars(
            "What the match with the history would add", "gain in AUC",
            tuple(f"{task}: {history}.{field}" for (history, field, _), task, *_ in found[:20]),
            tuple(value for _, _, value, *_ in found[:20]), tuple(low for *_, low, _ in found[:20]),
            tuple(high for *_, high in found[:20]), x="target: history and field",
        )  # fmt: skip
        maps = self._maps(case, [each[:2] for each in found[:5]])
        return [self._of(case, *each, bars, counts[each[0]], maps.get(each[:2])) for each in found[:5]]

    def _matches(self, case: Case, pairs: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], np.ndarray]:
        """pair -> (n,) how many of a validation row's events have the value of the row's own feature."""
        parts: dict[tuple[str, str, str], list[np.ndarray]] = {pair: [] for pair in pairs}
        for batch in case.batches("valid"):
            for history, field, feature in pairs:
                events, own = batch.features[history], batch.features[feature]
                assert isinstance(events, Ragged) and isinstance(own, torch.Tensor)
                row = torch.repeat_interleave(torch.arange(len(own)), events.lengths)
                same = (events.values[field] == own[row]) & (own[row] >= FIRST_VALUE)
                if self.newest:
                    age = events.offsets[1:][row] - 1 - torch.arange(len(row))
                    same &= age < self.newest
                parts[history, field, feature].append(np.bincount(row[same].numpy(), minlength=len(own)))
        return {pair: np.concatenate(part) for pair, part in parts.items()}

    def _maps(self, case: Case, asked: list[tuple[Match, str]]) -> dict[tuple[Match, str], Compared]:
        """What goes with the label by value and position, counted and learned, where the encoder scores events."""
        able, found = set(scored(case)), dict[tuple[Match, str], Compared]()
        train = list(case.batches("train")) if able & {match for match, _ in asked} else []
        for match, task in asked:
            if match in able:
                truth = counted(case, match, task, train)
                if (made := grids(case, truth)) is not None:
                    found[match, task] = truth, made
        return found

    def _of(
        self, case: Case, pair: Match, task: str, value: float, low: float, high: float, bars: Bars, match: np.ndarray,
        maps: Compared | None,
    ) -> Diagnosis:  # fmt: skip
        history, field, feature = pair
        run, model = case.run, case.run.model
        choices: list[Any] = (
            [TargetAttention(), DARE()] if not isinstance(model.history, TargetAttention | DARE) else [DARE()]
        )
        remedies = tuple(
            Remedy(
                choice.kind, "An encoder that weighs each event by how it goes with the row's own item.", "model.history",
                replace(run, name=f"{run.name}_{choice.kind}", model=replace(model, history=choice, history_of={})),
                measure=Measure(task, "auc"), page=f"methods/{choice.kind}.md",
            )
            for choice in choices
            if choice.kind != model.history.kind
        )  # fmt: skip
        return Diagnosis(
            "attention", f"{history}.{field} on {task}", value, self.usual, self.severe,
            f"How many events of `{history}` have the row's own `{feature}` would add {value:+.4f} to the AUC of `{task}`"
            + (": the history's encoder does not see that match" if low > self.usual else ": little is missed"),
            "gain in AUC", low, high, remedies=remedies, paper="https://arxiv.org/abs/2410.02604", page=PAGE,
            evidence={
                "plots": (bars, *curve(case, task, match), *(heats(*maps) if maps else ())),
                **({"rank_correlation": maps[1].spearman, "cells": maps[1].cells} if maps else {}),
            },
        )  # fmt: skip


def missed(case: Case, task: str, match: np.ndarray) -> tuple[float, float, float] | None:
    """What the match adds to a task's AUC, with its interval; None where it cannot be said."""
    scores = case.valid
    known = scores.observed[task].astype(bool)
    m, logit, label = np.log1p(match.astype(float)), scores.logits[task].astype(float), scores.labels[task]
    if m[known].std() == 0 or min(label[known].sum(), (1 - label[known]).sum()) < 50:
        return None
    fold = np.unique(scores.group, return_inverse=True)[1] % 2
    inputs = np.stack([logit, (m - m[known].mean()) / m[known].std()], 1)
    inputs = np.concatenate([inputs, inputs[:, :1] * inputs[:, 1:]], 1)
    plain, with_match = logit.copy(), logit.copy()
    for part in (0, 1):
        here, there = fold == part, (fold != part) & known
        if not here.any() or len(np.unique(label[there])) < 2:
            return None
        fitted = LogisticRegression(C=10.0).fit(inputs[there], label[there])
        with_match[here] = fitted.decision_function(inputs[here])
        same = LogisticRegression(C=10.0).fit(inputs[there, :1], label[there])
        plain[here] = same.decision_function(inputs[here, :1])
    drawn = [auc_of(case, scores, task, each) for each in (plain, with_match)]
    return paired(*drawn)


def auc_of(case: Case, scores: Scores, task: str, logits: np.ndarray) -> tuple[str, Drawn]:
    """AUC with its replicates of other logits for a task."""
    other = replace(scores, logits={task: logits.astype(np.float32)})
    return "auc", replicate(other, case.schema, replicates=300, seed=case.seed)[task, ""].metrics["auc"]


def curve(case: Case, task: str, match: np.ndarray) -> tuple[Any, ...]:
    """What is observed and what is predicted, by the number of matching events."""
    scores = case.valid
    known = scores.observed[task].astype(bool)
    label, p = scores.labels[task], 1 / (1 + np.exp(-scores.logits[task]))
    levels = [k for k in range(int(match.max()) + 1) if (known & (match == k)).sum() >= 20][:20]
    if len(levels) < 2:
        return ()
    rows = [known & (match == k) for k in levels]
    return (
        Lines(
            f"{task} by the number of matching events", "events with the row's own value", "rate",
            {"observed": (tuple(levels), tuple(float(label[r].mean()) for r in rows)),
             "predicted": (tuple(levels), tuple(float(p[r].mean()) for r in rows))},
        ),
    )  # fmt: skip
