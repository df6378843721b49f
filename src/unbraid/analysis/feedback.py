"""For whom does training together help?  Test rows by which of two tasks their user gives feedback to, and AUC in each part.

Paper: Liangcai Su, Junwei Pan, Ximei Wang, Xi Xiao, Shijie Quan, Xihua Chen, Jie Jiang: *STEM: Unleashing the Power of
Embeddings for Multi-task Recommendation*.  AAAI 2024, https://arxiv.org/abs/2308.13537.

Idea.  Averaged over all rows, negative transfer hides.  Where a user gives far more positives to one task than to the other, the
poor task borrows from the rich one.  The paper finds that models of one shared embedding fall below single-task models where
both tasks have *comparable* feedback.

Equations.  P_k(u) is the number of positives of task k among the training rows of user u (or of a value of an id feature)::

    r(u)   = log((P_a(u) + s) / (P_b(u) + s))          s = 1
    bucket = how many edges r(u) reaches; edges: quantiles .2, .4, .6, .8 of r over the groups seen in training
    gain   = metric of a model in the bucket - metric of the reference there          < 0: negative transfer in that bucket

How this differs.  Whether the paper groups by user or by item, and where it cuts, was not read: both are settings here.  Rows
of groups that training never saw are in no bucket.  Intervals are paired bootstraps over users.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unbraid.analysis.plots import INK, figure, finish
from unbraid.analysis.transfer import paired_gain, require_same_rows
from unbraid.evaluate import Slice, lead_metric, replicate
from unbraid.types import FIRST_VALUE, Array, Batch, Finding, Ragged, Schema, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USER = "user"
QUANTILES = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Feedback:
    """What training rows said of each group.

    Args:
        groups: (G,) ascending ids of users, or codes of a feature's values.
        positives: (G, 2) of both tasks.
        ratio: (G,) r; edges: (E,) ascending.
    """

    groups: Array
    positives: Array
    ratio: Array
    edges: Array

    def buckets(self, groups: Array) -> Array:
        """(N,) bucket of each row by its group: 0 where the second task has the most, E where the first has; -1 unseen."""
        place = np.searchsorted(self.groups, groups).clip(max=len(self.groups) - 1)
        found = np.searchsorted(self.edges, self.ratio[place], side="right")
        return np.where(self.groups[place] == groups, found, -1)


@dataclass(frozen=True)
class Partition:
    """Metrics of models in parts of the test rows.  `count` the training rows, then call it with predictions.

    Args:
        first, second: two binary tasks.
        by: ``user``, or the name of an id feature.
        quantiles: of r over the groups, where buckets are cut; edges: the cuts themselves instead.
        smoothing: s.
        metric: empty is AUC.
        replicates, seed, confidence: of the bootstrap over users.

    Raises:
        ValueError: a value is out of its range.
    """

    first: str
    second: str
    by: str = USER
    quantiles: tuple[float, ...] = QUANTILES
    edges: tuple[float, ...] = ()
    smoothing: float = 1.0
    metric: str = ""
    replicates: int = 500
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise ValueError(f"Parameters `first` and `second` should be two tasks. Found `{self.first}` twice.")
        if not 0 < self.smoothing < np.inf:
            raise ValueError(f"Parameter `smoothing` should be positive. Found {self.smoothing}.")
        cuts = self.edges or self.quantiles
        if not cuts or list(cuts) != sorted(set(cuts)) or not (self.edges or 0 < cuts[0] and cuts[-1] < 1):
            what = "`edges`" if self.edges else "`quantiles`, between 0 and 1,"
            raise ValueError(f"Parameter {what} should ascend. Found {list(cuts)}.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"Parameter `confidence` should lie between 0 and 1. Found {self.confidence}.")

    def names(self) -> list[str]:
        """Names of the buckets, from the second task's to the first's."""
        a, b, count = self.first, self.second, len(self.edges or self.quantiles) + 1
        if count == len(QUANTILES) + 1:
            return [f"{b} >> {a}", f"{b} > {a}", f"{a} ~ {b}", f"{a} > {b}", f"{a} >> {b}"]
        return [f"{n + 1} of {count}, from {b} to {a}" for n in range(count)]

    def count(self, schema: Schema, batches: Iterable[Batch]) -> Feedback:
        """Count the positives of both tasks per group in batches of *training* rows.

        Raises:
            ValueError: tasks that are not two binary ones of the schema, no such id feature, no users, or no row.
        """
        self._check(schema)
        groups, positives = [], []
        for batch in batches:
            groups.append(self._groups(batch))
            known = [batch.observed[t] & (batch.labels[t] == 1) & (batch.view == 0) for t in (self.first, self.second)]
            positives.append(np.stack([one.cpu().numpy() for one in known], 1))
        if not groups:
            raise ValueError("There is no training row to count.")
        values, place = np.unique(np.concatenate(groups), return_inverse=True)
        flat = np.concatenate(positives)
        counts = np.stack([np.bincount(place, flat[:, k], len(values)) for k in range(2)], 1)
        keep = values >= FIRST_VALUE if self.by != USER else values != 0  # unknown, missing and no user are no groups
        values, counts = values[keep], counts[keep]
        if not len(values):
            raise ValueError(f"No training row has a known `{self.by}`.")
        ratio = np.log((counts[:, 0] + self.smoothing) / (counts[:, 1] + self.smoothing))
        edges = np.array(self.edges) if self.edges else np.quantile(ratio, self.quantiles)
        return Feedback(values, counts, ratio, edges)

    def _check(self, schema: Schema) -> None:
        for name in (self.first, self.second):
            if schema.task(name).kind != "binary":
                raise ValueError(f"Task `{name}` should be binary. Found {schema.task(name).kind}.")
        ids = [f.name for f in schema.features if f.kind == "id"]
        if self.by != USER and self.by not in ids:
            raise ValueError(f"Parameter `by` should be `user` or an id feature among {ids}. Found `{self.by}`.")

    def _groups(self, batch: Batch) -> Array:
        if self.by == USER:
            if USER not in batch.meta:
                raise ValueError("The data declare no user: set `data.user`, or `by` to an id feature.")
            return batch.meta[USER].cpu().numpy()
        value = batch.features[self.by]
        assert not isinstance(value, Ragged)
        return value.cpu().numpy()

    def __call__(
        self, feedback: Feedback, scores: Mapping[str, Scores], schema: Schema, *, against: str, groups: Array | None = None
    ) -> Finding:  # fmt: skip
        """The finding.

        ``values``: ``buckets`` (E + 1 names), ``edges`` (E,), ``rows`` (E + 1,) test rows, ``left_out`` rows of groups that
        training never saw, ``against``, ``metric``, ``tasks``: task -> ``positives`` (E + 1,) and ``models``: model -> ``value``
        (E + 1,), ``gain``, ``low``, ``high`` (E + 1,) against the reference.  A metric that rests on too few rows is NaN.

        Args:
            scores: model -> predictions of the same test rows; ``against`` names the reference (single-task training).
            groups: (N,) the rows' groups; None: their users.  With ``by`` a feature, its codes of these rows.

        Raises:
            ValueError: rows differ, no such reference, groups missing, or the metric cannot be had.
        """
        self._check(schema)
        if against not in scores:
            raise ValueError(f"`against` should be one of {', '.join(scores)}. Found {against}.")
        if groups is None and self.by != USER:
            raise ValueError(f"With `by` = `{self.by}` the rows' groups should be given: codes of that feature.")
        reference = scores[against]
        place = feedback.buckets(np.asarray(reference.group if groups is None else groups))
        names, tasks = self.names(), (self.first, self.second)
        for other in scores.values():
            for task in tasks:
                require_same_rows(reference, other, task)
        slices = {name: self._slices(each, place, names, schema) for name, each in scores.items()}
        metric = self.metric or lead_metric(slices[against][self.first, ""].metrics)
        if metric not in slices[against][self.first, ""].metrics or metric == "calibration":
            raise ValueError(f"There is no metric `{metric}` with a better side.")
        values = {
            "buckets": names, "edges": feedback.edges, "rows": np.bincount(place[place >= 0], minlength=len(names)),
            "left_out": int((place < 0).sum()), "against": against, "metric": metric, "by": self.by,
            "tasks": {task: self._of_task(task, slices, against, metric, names) for task in tasks},
        }  # fmt: skip
        return Finding(
            "feedback", values, unit=metric, reading=_reading(values),
            remedy="Tables of their own for each task, such as `stem`.",
            reference="Su et al., AAAI 2024, arXiv 2308.13537: transfer by relative positive feedback",
        )  # fmt: skip

    def _slices(self, scores: Scores, place: Array, names: list[str], schema: Schema) -> dict[tuple[str, str], Slice]:
        """Metrics with replicates: buckets stand in the place of domains."""
        domains = ("(unknown)", "(missing)", *names)
        parted = replace(scores, domain=np.where(place < 0, 0, place + FIRST_VALUE), domains=domains)
        wanted = replace(schema, tasks=tuple(schema.task(name) for name in (self.first, self.second)), domains=domains)
        return replicate(parted, wanted, replicates=self.replicates, seed=self.seed)

    def _of_task(
        self, task: str, slices: Mapping[str, Mapping[tuple[str, str], Slice]], against: str, metric: str, names: list[str]
    ) -> dict[str, Any]:  # fmt: skip
        models: dict[str, dict[str, Array]] = {}
        for model, found in slices.items():
            rows: list[list[float | None]] = []
            for name in names:
                drawn = [side[task, name].metrics[metric] for side in (found, slices[against]) if (task, name) in side]
                if len(drawn) < 2 or any(each.value is None for each in drawn):
                    rows.append([np.nan] * 4)
                else:
                    rows.append([drawn[0].value, *paired_gain(drawn[0], drawn[1], metric, self.confidence)])
            value, gain, low, high = np.array(rows, float).T
            models[model] = {"value": value, "gain": gain, "low": low, "high": high}
        ones = [slices[against].get((task, name)) for name in names]
        return {"positives": np.array([0 if one is None else one.positives for one in ones]), "models": models}


def _reading(values: Mapping[str, Any]) -> str:
    """The finding in words."""
    lowest = [
        (float(np.nanmin(of["gain"])), int(np.nanargmin(of["gain"])), model, task)
        for task, found in values["tasks"].items()
        for model, of in found["models"].items()
        if model != values["against"] and np.isfinite(of["gain"]).any()
    ]
    if not lowest:
        return "No bucket has enough positives and negatives of either task to compare models."
    gain, place, model, task = min(lowest)
    return (
        f"The lowest gain in {values['metric']} against `{values['against']}` is {gain:+.4f}: `{model}`, task `{task}`, bucket "
        f"`{values['buckets'][place]}` of {values['rows'][place]:,} rows. {values['left_out']:,} rows are of a {values['by']} "
        f"that training never saw."
    )


def plot(finding: Finding, path: str | Path | None = None) -> Figure:
    """Gain of every model against the reference, bucket by bucket, a panel per task.  Raises ValueError without other models."""
    values: Mapping[str, Any] = finding.values
    models = [model for model in next(iter(values["tasks"].values()))["models"] if model != values["against"]]
    if not models:
        raise ValueError(f"There is nothing to plot: `{values['against']}` is the only model.")
    drawn, axes = figure(6.4 * len(values["tasks"]), 4.2, len(values["tasks"]))
    places, width = np.arange(len(values["buckets"])), 0.8 / len(models)
    colours = [INK["blue"], INK["orange"], INK["grey"], "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    for axis, (task, found) in zip(axes, values["tasks"].items(), strict=True):
        for n, model in enumerate(models):
            of = found["models"][model]
            errors = np.abs(np.array([of["gain"] - of["low"], of["high"] - of["gain"]]))
            at, colour = places + (n - (len(models) - 1) / 2) * width, colours[n % len(colours)]
            axis.bar(at, of["gain"], width, label=model, color=colour,
                     yerr=np.where(np.isfinite(errors), errors, 0), capsize=2)  # fmt: skip
        axis.axhline(0, color="black", linewidth=0.8)
        labels = [f"{name}\n{rows:,} rows" for name, rows in zip(values["buckets"], values["rows"], strict=True)]
        axis.set_xticks(places, labels, fontsize=7, rotation=20)
        axis.set_title(task, fontsize=10)
    axes[0].set_ylabel(f"gain of {values['metric']} against {values['against']}")
    axes[0].legend(frameon=False, fontsize=8)
    return finish(drawn, path)
