"""Have the rows that are predicted moved away from those it learned from, where the model feels it?

A column that changed matters as far as it moves predictions.  Rows of the test split (without their labels) are predicted as
they are, and with column j taken from random training rows; if the column's law is the same, nothing changes on average::

    move_j = mean over test rows of [logit(row) - logit(row with j of a random training row)] / sd of logits on training rows

The same for validation rows says what is usual between parts of one log.  No label is read.  What this does not see: a change
that leaves the mean prediction where it is, one of several columns together, and one of labels given the columns.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from unbraid.diagnosis.case import Case, interval, without_feature
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, NotApplicable, Remedy
from unbraid.diagnosis.plots import Bars
from unbraid.train import predict
from unbraid.types import EXACT, Batch

PAGE = "diagnosis.md#have-the-rows-moved"


@dataclass(frozen=True)
class Drift:
    """See the module's docstring.

    Args:
        rows: of each side, drawn from the sample.
        usual, severe: moves of the logits, in their standard deviations.
    """

    name: ClassVar[str] = "drift"
    title: ClassVar[str] = "Have the rows that are predicted moved away?"
    page: ClassVar[str] = PAGE
    rows: int = 2048
    usual: float = 0.2
    severe: float = 0.6

    def __call__(self, case: Case) -> list[Diagnosis]:
        """A diagnosis per feature, worst first.  Raises NotApplicable without a binary target, or with too few rows."""
        tasks = [task.name for task in case.targets if task.kind == "binary"]
        n = min(self.rows, len(case.sample("train")), len(case.sample("test")))
        if not tasks or n < 100:
            raise NotApplicable("there is no binary target, or there are fewer than 100 rows to compare")
        rng = np.random.default_rng([case.seed, 17])
        there, here = (
            case.encoded.batch(np.sort(rng.choice(case.sample(split), n, replace=False))) for split in ("train", "test")
        )
        there = there.select(torch.from_numpy(rng.permutation(n)))
        home, away = ({t: predict(case.model, [b], case.schema).logits[t] for t in tasks} for b in (there, here))
        group = here.meta["user"].numpy() if "user" in here.meta else here.row.numpy()
        found = []
        columns = [f.name for f in case.schema.features if not f.has_content] + [h.name for h in case.schema.histories]
        for name in columns:
            mixed = predict(case.model, [with_column(here, there, name)], case.schema).logits
            judged = []
            for task in tasks:
                moved = (away[task] - mixed[task]) / max(float(home[task].std()), 1e-6)
                value = abs(float(moved.mean()))
                judged.append((value, *interval(value, moved, group), task))
            found.append((name, *max(judged)))
        found.sort(key=lambda each: -each[1])
        shown = found[:20]
        bars = Bars(
            "How far the change of a column moves the predictions", "standard deviations of the logit",
            tuple(name for name, *_ in shown), tuple(v for _, v, *_ in shown), tuple(max(0.0, low) for _, _, low, *_ in shown),
            tuple(high for _, _, _, high, _ in shown), x="column",
        )  # fmt: skip
        return [self._of(case, *each, bars) for each in shown[:5]]

    def _of(self, case: Case, name: str, value: float, low: float, high: float, task: str, bars: Bars) -> Diagnosis:
        changed = without_feature(case.run, name)
        remedies = (
            Remedy(
                f"without_{name}", f"Leave `{name}` out, or mend it where it comes from: it no longer means what it did.",
                "data.features", changed, measure=Measure(task, "logloss"),
            ),
        ) if changed is not None else ()  # fmt: skip
        calibrated = Remedy(
            "calibrate", "Calibrate the predictions to the target's rows, which needs none of their labels.",
            command="unbraid calibrate BUNDLE", page="calibration.md",
        )  # fmt: skip
        return Diagnosis(
            "drift", name, value, self.usual, self.severe,
            f"`{name}` of the rows that are predicted is not what it was in training: that alone moves the logits of `{task}` by "
            f"{value:.2f} of their standard deviation",
            "standard deviations of the logit", low, high, remedies=(*remedies, calibrated), page=PAGE,
            paper="https://arxiv.org/abs/2007.08259", evidence={"plots": (bars,)},
        )  # fmt: skip


def with_column(batch: Batch, other: Batch, name: str) -> Batch:
    """The batch with one feature or history of another batch's rows, of which there are as many."""
    moved = {key: other.features[key] for key in (name, name + EXACT) if key in other.features}
    return dataclasses.replace(batch, features={**batch.features, **moved})
