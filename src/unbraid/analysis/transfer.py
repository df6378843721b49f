"""Does training together help?  Transfer gain, negative transfer on a grid of weights, confidence discrepancy, Delta_m.

Paper: Junguang Jiang, Baixu Chen, Junwei Pan, Ximei Wang, Dapeng Liu, Jie Jiang, Mingsheng Long: *ForkMerge: Mitigating
Negative Transfer in Auxiliary-Task Learning*.  NeurIPS 2023, https://arxiv.org/abs/2301.12618.

Idea.  A target task is trained alone, and with an auxiliary task at several weights.  Whether the auxiliary task helps is what
the target's *held-out* score says, and nothing that gradients say.  A weight at which it harms is *weak* negative transfer:
another weight may cure it.  If all weights harm, it is *strong*: no weight of this grid does.

Equations.  P is a score of held-out rows where higher is better (losses and errors are negated)::

    TG(lambda)    = P(trained with weight lambda) - P(trained alone)
    weak at lambda: TG(lambda) < 0          strong on this grid: max over lambda > 0 of TG(lambda) < 0
    CSD(lambda)   = 1 - mean over the target's rows of max_y p(y | x)                  0 .. 1 - 1/C, no labels
    Delta_m       = mean over tasks of mean over the task's metrics of (-1)^[lower is better] (M - M_alone) / M_alone

Delta_m averages a task's metrics first and tasks then.  CSD is how little a model trusts itself on the target's rows: the paper
sees it fall and rise again with lambda where transfer is weakly negative, and rise all along where it is strongly so.  An
over-confident model lowers it as well, so here it comes with the gains and never alone.

How this differs.  Intervals: gains are paired differences with a bootstrap over users (`unbraid.evaluate.replicate`), which does
not hold the noise of training; use several seeds and `unbraid.compare` for that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit, softmax

from unbraid.analysis.plots import INK, figure, finish
from unbraid.bootstrap import Drawn
from unbraid.evaluate import lead_metric, lower_is_better, replicate
from unbraid.types import Array, Finding, Schema, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = "Jiang et al., NeurIPS 2023, arXiv 2301.12618: transfer gain, weak and strong negative transfer"


# ------------------------------------------------------------------------------------------------------------ the numbers
def transfer_gain(together: float, alone: float, *, lower: bool = False) -> float:
    """P(together) - P(alone) where higher is better; ``lower``: the values are of a metric where lower is better."""
    return alone - together if lower else together - alone


@dataclass(frozen=True)
class OnGrid:
    """What a grid of weights says.

    Args:
        best: the weight above 0 with the largest gain (the smallest of equal ones), and that gain.
        weak: the weights above 0 whose gain is negative, ascending.
        strong: are they all?  Said of this grid alone: a weight between its points may help.
    """

    best: float
    gain: float
    weak: tuple[float, ...]
    strong: bool


def negative_transfer(gains: Mapping[float, float]) -> OnGrid:
    """Weak and strong negative transfer of gains by weight.

    Raises:
        ValueError: a weight is negative, none is above 0, or a gain is not a number.
    """
    if any(weight < 0 for weight in gains) or not any(weight > 0 for weight in gains):
        raise ValueError(f"Weights of the auxiliary task should not be negative, and one above 0. Found {list(gains)}.")
    if wrong := [weight for weight, gain in gains.items() if not np.isfinite(gain)]:
        raise ValueError(f"Gains should be finite. Found others at weights {wrong}.")
    above = {weight: gains[weight] for weight in sorted(gains) if weight > 0}
    best = max(above, key=lambda weight: above[weight])
    weak = tuple(weight for weight, gain in above.items() if gain < 0)
    return OnGrid(best, above[best], weak, len(weak) == len(above))


def confidence_discrepancy(logits: Array) -> float:
    """1 - mean of the largest class's probability; logits: (N,) of a binary task or (N, K).

    To be reported with the transfer gain, as `Transfer` does: over-confidence lowers it, too.

    Raises:
        ValueError: there are no rows, or a logit is not finite.
    """
    z = np.asarray(logits, float)
    if not len(z) or not np.isfinite(z).all():
        raise ValueError(f"Logits should be finite, of at least one row. Found shape {z.shape}.")
    top = expit(np.abs(z)) if z.ndim == 1 else softmax(z, axis=1).max(1)
    return float(1 - top.mean())


def delta_m(
    method: Mapping[str, Mapping[str, float]], alone: Mapping[str, Mapping[str, float]], lower: Collection[str] | None = None,
) -> float:  # fmt: skip
    """Mean relative improvement over tasks, 0.01 for one per cent; a task's metrics are averaged first.

    Args:
        method, alone: task -> metric -> value, of a method and of single-task training.
        lower: the metrics where lower is better, as ``metric`` or ``task.metric``; None: those of `unbraid.evaluate`.

    Raises:
        ValueError: other tasks or metrics on one side, none at all, a value that is not finite, or one of ``alone`` that is 0.
    """
    shapes = [{task: sorted(metrics) for task, metrics in side.items()} for side in (method, alone)]
    if shapes[0] != shapes[1] or not shapes[0] or not all(shapes[0].values()):
        raise ValueError(
            f"Both sides should have the same tasks and metrics, at least one. Found {shapes[0]} and {shapes[1]}."
        )
    known = {metric for metrics in shapes[0].values() for metric in metrics}
    names = known | {f"{task}.{metric}" for task, metrics in shapes[0].items() for metric in metrics}
    if lower is not None and (unknown := sorted(set(lower) - names)):
        raise ValueError(f"`lower` should name metrics among {sorted(known)}. Found {unknown}.")
    tasks = []
    for task, metrics in alone.items():
        changes = []
        for metric, base in metrics.items():
            value = method[task][metric]
            if not (np.isfinite(value) and np.isfinite(base)) or base == 0:
                raise ValueError(f"`{metric}` of `{task}` should be finite, and not 0 alone. Found {value} and {base}.")
            falls = lower_is_better(metric) if lower is None else bool({metric, f"{task}.{metric}"} & set(lower))
            changes.append((-1 if falls else 1) * (value - base) / base)
        tasks.append(np.mean(changes))
    return float(np.mean(tasks))


# ----------------------------------------------------------------------------------------------------- trained on a grid
@dataclass(frozen=True)
class Transfer:
    """Transfer gain of a target task over a grid of an auxiliary task's weights.  Call it with predictions of all models.

    Args:
        task: the target.
        metric: what P is; empty is AUC, accuracy or RMSE, as the task is binary, multiclass or real.
        replicates, seed, confidence: of the bootstrap over users.
    """

    task: str
    metric: str = ""
    replicates: int = 500
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"Parameter `confidence` should lie between 0 and 1. Found {self.confidence}.")
        if self.replicates < 0:
            raise ValueError(f"Parameter `replicates` should not be negative. Found {self.replicates}.")

    def __call__(self, together: Mapping[float, Scores], alone: Scores, schema: Schema) -> Finding:
        """The finding.

        ``values``: ``task``, ``metric``, ``alone`` (P as it is), ``weights`` (L,) ascending, ``score`` (L,) of the metric as it
        is, ``gain``, ``low``, ``high`` (L,), ``csd`` (L,) and ``csd_alone`` (None for a real task), ``best``, ``best_gain``,
        ``weak``, ``strong`` (see `OnGrid`).

        Args:
            together: weight of the auxiliary task -> predictions of the model that was trained with it; alone: of the model of
                the target task alone.  All on the same rows.

        Raises:
            ValueError: rows or labels differ, the metric cannot be had, or see `negative_transfer`.
        """
        task = schema.task(self.task)
        found = {weight: self._drawn(scores, schema) for weight, scores in sorted(together.items())}
        base, name = self._drawn(alone, schema)
        for scores in together.values():
            require_same_rows(alone, scores, self.task)
        weights = np.array(list(found), float)
        gains = [paired_gain(drawn, base, name, self.confidence) for drawn, _ in found.values()]
        grid = negative_transfer({weight: gain[0] for weight, gain in zip(found, gains, strict=True)})
        real = task.kind == "real"
        values = {
            "task": self.task, "metric": name, "alone": base.value, "weights": weights,
            "score": np.array([drawn.value for drawn, _ in found.values()], float),
            "gain": np.array([gain[0] for gain in gains]), "low": np.array([gain[1] for gain in gains]),
            "high": np.array([gain[2] for gain in gains]),
            "csd": None if real else np.array([_csd(together[weight], self.task) for weight in found]),
            "csd_alone": None if real else _csd(alone, self.task),
            "best": grid.best, "best_gain": grid.gain, "weak": grid.weak, "strong": grid.strong,
        }  # fmt: skip
        return Finding(
            "transfer", values, unit=name, reading=_reading(values), reference=REFERENCE,
            remedy="Another weight where some weight helps; branches that are merged by validation score, or no such task.",
        )  # fmt: skip

    def _drawn(self, scores: Scores, schema: Schema) -> tuple[Drawn, str]:
        """The metric with its replicates, and its name."""
        found = replicate(scores, schema, replicates=self.replicates, seed=self.seed)
        if (self.task, "") not in found:
            raise ValueError(f"The predictions have no task `{self.task}`. Found {', '.join(scores.logits)}.")
        metrics = found[self.task, ""].metrics
        name = self.metric or lead_metric(metrics)
        if name not in metrics or name == "calibration":
            allowed = ", ".join(metric for metric in metrics if metric != "calibration")
            raise ValueError(f"Task `{self.task}` has no metric `{name}` with a better side. Metrics: {allowed}.")
        if metrics[name].value is None:
            raise ValueError(f"`{name}` of `{self.task}` is withheld: {metrics[name].why}.")
        return metrics[name], name


def require_same_rows(one: Scores, other: Scores, task: str) -> None:
    """Raise ValueError unless both predicted the same rows with the same labels of a task."""
    same = len(one.row) == len(other.row) and all(
        np.array_equal(getattr(one, part), getattr(other, part)) for part in ("row", "group", "weight")
    )
    known = np.asarray(one.observed[task], bool)
    if not same or not np.array_equal(known, other.observed[task]):
        raise ValueError("All predictions should be of the same rows, in one order.")
    if not np.array_equal(np.asarray(one.labels[task])[known], np.asarray(other.labels[task])[known]):
        raise ValueError(f"Labels of task `{task}` differ between the predictions.")


def paired_gain(one: Drawn, other: Drawn, metric: str, confidence: float) -> tuple[float, float, float]:
    """How much better the first is, with a percentile interval of the paired replicates (NaN without any)."""
    assert one.value is not None and other.value is not None
    lower = lower_is_better(metric)
    drawn = (one.draws - other.draws) * (-1 if lower else 1)
    drawn = drawn[np.isfinite(drawn)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (np.nan, np.nan)
    return transfer_gain(one.value, other.value, lower=lower), float(low), float(high)


def _csd(scores: Scores, task: str) -> float:
    return confidence_discrepancy(np.asarray(scores.logits[task]))


def _reading(values: Mapping[str, Any]) -> str:
    """The finding in words."""
    task, name, count = values["task"], values["metric"], int((values["weights"] > 0).sum())
    gain = f"{values['best_gain']:+.4f} in {name}"
    best = f"The best weight, {values['best']:g}, has a gain of {gain} over training `{task}` alone"
    if values["strong"]:
        return f"{best}: all {count} weights harm, strong negative transfer on this grid."
    if values["weak"]:
        return f"{best}; {len(values['weak'])} of {count} weights harm: weak negative transfer, which another weight cures."
    return f"{best}; no weight of {count} harms."


# --------------------------------------------------------------------------------------------------------------- the plot
def plot(finding: Finding, path: str | Path | None = None) -> Figure:
    """Transfer gain by weight with its interval and, for tasks of classes, the confidence discrepancy beside it."""
    values: Mapping[str, Any] = finding.values
    panels = 1 if values["csd"] is None else 2
    drawn, axes = figure(5.6 * panels, 3.8, panels)
    weights, gain = values["weights"], values["gain"]
    errors = np.abs(np.array([gain - values["low"], values["high"] - gain]))
    axes[0].errorbar(weights, gain, np.where(np.isfinite(errors), errors, 0), color=INK["blue"], marker="o", capsize=3)
    harm = gain < 0
    axes[0].plot(weights[harm], gain[harm], "o", color=INK["orange"], zorder=3, label="harms")
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[0].set_ylabel(f"transfer gain ({values['metric']})")
    kind = "strong on this grid" if values["strong"] else f"best weight {values['best']:g}"
    axes[0].set_title(f"Gain over training `{values['task']}` alone: {kind}", fontsize=10)
    if harm.any():
        axes[0].legend(frameon=False)
    if panels == 2:
        axes[1].plot(weights, values["csd"], color=INK["grey"], marker="s")
        axes[1].axhline(values["csd_alone"], color="black", linewidth=0.8, linestyle="--", label="alone")
        axes[1].set_ylabel("confidence discrepancy")
        axes[1].set_title("To be read beside the gain, never alone", fontsize=10)
        axes[1].legend(frameon=False)
    for axis in axes:
        axis.set_xlabel("weight of the auxiliary task")
    return finish(drawn, path)
