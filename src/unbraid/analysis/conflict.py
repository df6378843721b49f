"""Do the gradients of two objectives point apart, and does that say whether one helps the other?  One step, both answers.

Paper: Junguang Jiang, Baixu Chen, Junwei Pan, Ximei Wang, Dapeng Liu, Jie Jiang, Mingsheng Long: *ForkMerge: Mitigating
Negative Transfer in Auxiliary-Task Learning*.  NeurIPS 2023, https://arxiv.org/abs/2301.12618.

Idea.  Methods that repair gradients hold that a negative cosine means harm.  Take a trained model, one batch, and one plain step
with the target's gradient and lambda times the auxiliary one's: the held-out score after it, minus that after the target's step
alone, is the harm itself.  The paper finds neither follows from the other.

Equations.  g_i is the gradient of objective i's loss, unweighted; cosines are over the parameters that both objectives reach,
all of them or those of one leaf (a layer's weight, its bias, a table)::

    cos_ij    = <g_i, g_j> / (|g_i| |g_j|)                                       in conflict: < 0
    theta(l)  = theta - eta (g_tgt + l g_aux)         all parameters, heads included, plain gradient descent
    TG(l)     = P_valid(theta(l)) - P_valid(theta(0))                            P: higher is better
    fit       = the cubic in cos that is least squares through the points (cos, TG) of all batches and all l > 0

How this differs.  The model is any of the library's, in training mode, with dropout drawn from a seed of its own.  Of a lazy
table, or of one read by few, the rows of the batch are the parameters.  That one fit goes through the points of all l is ours,
and so are cosines by leaf.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.analysis.dominance import depths
from unbraid.analysis.plots import INK, device_of, figure, finish
from unbraid.analysis.transfer import REFERENCE
from unbraid.config import Run
from unbraid.evaluate import evaluate, lead_metric, lower_is_better
from unbraid.layers import require_positive
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.optim.per_task import Gradients, PerTask
from unbraid.preflight import bound_terms
from unbraid.train import predict
from unbraid.types import Array, Batch, Finding, Schema

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CUBIC = 4  # coefficients of the fit


# ---------------------------------------------------------------------------------------------------------- the gradients
class Probed:
    """A copy of a model, and the gradients of its losses on a batch.

    Args:
        run: says the losses; model: stays as it is.
    """

    def __init__(self, run: Run, model: nn.Module, schema: Schema) -> None:
        self.model = cast(Model, copy.deepcopy(model))
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self.terms, self.device = bound_terms(run, schema, self.model), device_of(model)
        self.update = PerTask(Joint(), self.model, 1, {})

    def gradients(self, batch: Batch, seed: int) -> Gradients:
        """The gradient of every objective, one forward pass; nothing moves."""
        self.model.train()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            batch = batch.to(self.device)
            output, losses = self.model(batch), cast(dict[str, Tensor], {})
            for term in self.terms:
                for objective, loss in term(output, batch, 0).items():
                    losses[objective] = losses[objective] + loss if objective in losses else loss
            return self.update.gradients(losses, output)

    def place(self, leaf: str) -> Tensor:
        """The parameter that a leaf is, or whose rows it is."""
        return self.update.parameters[leaf] if leaf in self.update.parameters else self.model.tables[leaf].weight


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Cosine of two gradients (leaf -> tensor) over the leaves that both have; NaN without any, or where one is 0."""
    shared = [leaf for leaf in one if leaf in other]
    if not shared:
        return float("nan")
    a, b = (torch.cat([grads[leaf].flatten() for leaf in shared]).double() for grads in (one, other))
    norms = a.norm() * b.norm()
    return float((a @ b) / norms) if norms > 0 else float("nan")


# -------------------------------------------------------------------------------------------------------- who conflicts
@dataclass(frozen=True)
class Conflict:
    """Cosines of the gradients of all objectives of a run.  Call it with batches of *training* rows.

    Args:
        run: its losses say what the objectives are (``by`` of the supervised loss: tasks, domains, tasks in domains).
        steps: at most so many batches; seed: of dropout.
    """

    run: Run
    steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(steps=self.steps)

    def __call__(self, model: nn.Module, schema: Schema, batches: Iterable[Batch]) -> Finding:
        """The finding; the model is not changed.

        ``values``: ``objectives`` (K names), ``cosine`` (S, K, K) by batch, ``mean`` (K, K), ``conflicting`` (K, K), the share
        of batches with a cosine below 0 among those that have one; ``leaves`` (L names from the bottom of the model up: what two
        objectives reach, a parameter or a table, ``view/vocabulary/role``), ``parameters`` (L,), how many each has, ``by_leaf``
        (L, K, K), mean cosines over the leaf alone.  NaN where a pair has none: an objective is not in the batch, or no parameter
        is reached by both.

        Raises:
            ValueError: no batch, or fewer than two objectives.
        """
        probed = Probed(self.run, model, schema)
        found = [inner(probed.gradients(b, self.seed + n).of) for n, b in enumerate(islice(batches, self.steps))]
        names = list(dict.fromkeys(name for who, _ in found for name in who))
        if len(names) < 2:
            raise ValueError(f"Cosines need at least one batch and two objectives. Found objectives {names}.")
        every = {leaf: leaf for _, of in found for leaf in of}  # leaf -> parameter's name, or table's
        every |= {name: table for table, name in probed.update.dense_tables.items() if name in every}
        place = depths(probed.model)
        every = dict(sorted(every.items(), key=lambda pair: place[pair[1]]))
        products = np.stack([_laid_out(who, of, names, [*every]) for who, of in found])  # (S, L, K, K)
        table = cosines(products)
        sign = np.where(np.isfinite(table), table < 0, np.nan)
        shared = np.isfinite(products[..., ~np.eye(len(names), dtype=bool)]).any((0, 2))  # (L,)
        leaves = [leaf for leaf, kept in zip(every, shared, strict=True) if kept]
        values = {
            "objectives": names, "cosine": table, "mean": _mean(table), "conflicting": _mean(sign),
            "leaves": [every[leaf] for leaf in leaves],
            "parameters": np.array([probed.place(leaf).numel() for leaf in leaves], int),
            "by_leaf": _mean(np.stack([cosines(products[:, n : n + 1]) for n in np.flatnonzero(shared)], 1))
            if leaves else np.zeros((0, len(names), len(names))),
        }  # fmt: skip
        return Finding(
            "conflict", values, unit="cosine of gradients", reading=_of_conflict(values), reference=REFERENCE,
            remedy="Measure the transfer gain before repairing gradients: a negative cosine need not harm.",
        )  # fmt: skip


def inner(of: Mapping[str, Mapping[str, Tensor]]) -> tuple[list[str], dict[str, tuple[list[int], Array]]]:
    """Objectives, and leaf -> places of the k that reach it and (k, k) inner products of their gradients there."""
    found = {}
    for leaf in dict.fromkeys(leaf for grads in of.values() for leaf in grads):
        at = [n for n, grads in enumerate(of.values()) if leaf in grads]
        rows = torch.stack([grads[leaf].flatten() for grads in of.values() if leaf in grads]).double()
        found[leaf] = at, (rows @ rows.T).cpu().numpy()
    return list(of), found


def _laid_out(
    who: Sequence[str], of: Mapping[str, tuple[list[int], Array]], names: list[str], leaves: Sequence[str]
) -> Array:  # fmt: skip
    """(L, K, K) inner products by leaf and all objectives; NaN for those that do not reach a leaf."""
    out = np.full((len(leaves), len(names), len(names)), np.nan)
    for n, leaf in enumerate(leaves):
        if leaf in of:
            at = [names.index(who[k]) for k in of[leaf][0]]
            out[n][np.ix_(at, at)] = of[leaf][1]
    return out


def cosines(products: Array) -> Array:
    """(S, K, K) cosines over the leaves that both of a pair reach, of (S, L, K, K) inner products; NaN where there is none."""
    both = np.isfinite(products)
    own = np.diagonal(products, axis1=2, axis2=3)  # (S, L, K) squared norms
    square = np.where(both, own[..., :, None], 0).sum(1) * np.where(both, own[..., None, :], 0).sum(1)
    return np.where(square > 0, np.where(both, products, 0).sum(1), np.nan) / np.sqrt(np.where(square > 0, square, 1))


def _mean(table: Array) -> Array:
    """Mean over batches of what is known; NaN where nothing is."""
    known = np.isfinite(table)
    return np.where(known.any(0), np.where(known, table, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def _of_conflict(values: Mapping[str, Any]) -> str:
    names, mean, steps = values["objectives"], values["mean"], len(values["cosine"])
    above = [(mean[i, j], i, j) for i in range(len(names)) for j in range(i) if np.isfinite(mean[i, j])]
    if not above:
        return f"In {steps:,} batches no two objectives had gradients for the same parameters."
    low, i, j = min(above)
    return (
        f"Over {steps:,} batches, `{names[j]}` and `{names[i]}` have the lowest mean cosine of gradients, {low:.2f}; they point "
        f"apart in {values['conflicting'][i, j]:.1%} of the batches."
    )


def plot(finding: Finding, path: str | Path | None = None) -> Figure:
    """Mean cosines and shares of conflicting batches, objectives by objectives."""
    values: Mapping[str, Any] = finding.values
    names = values["objectives"]
    size = max(3.6, 0.5 * len(names) + 2)
    drawn, axes = figure(2 * (size + 1.2), size, 2)
    shown = (
        (axes[0], "mean", "mean cosine", -1, "RdBu"),
        (axes[1], "conflicting", "share of batches in conflict", 0, "Oranges"),
    )
    for axis, key, title, least, colours in shown:
        image = axis.imshow(values[key], vmin=least, vmax=1, cmap=colours)
        axis.figure.colorbar(image, ax=axis)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names)
        for (i, j), value in np.ndenumerate(values[key]):
            text, ink = (
                (f"{value:.2f}", "white" if abs(value) > 0.6 else "black") if np.isfinite(value) else ("none", "black")
            )
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
        axis.set_title(title, fontsize=10)
    return finish(drawn, path)


# -------------------------------------------------------------------------------------------------------------- one step
@dataclass(frozen=True)
class OneStep:
    """One-step transfer gain.  Call it with a model in the middle of training, batches of training rows and validation rows.

    Args:
        run: its losses say what the objectives are.
        target: the objective whose score counts, a task, a domain or ``task@domain``; auxiliary: one or more others.
        lr: eta, the paper's value.
        weights: l of each step.
        metric: what P is; empty is AUC, accuracy or RMSE, as the target's task is binary, multiclass or real.
        steps: at most so many batches; seed: of dropout.

    Raises:
        ValueError: a value is out of its range, or the target is among the others.
    """

    run: Run
    target: str
    auxiliary: tuple[str, ...]
    lr: float = 0.01
    weights: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    metric: str = ""
    steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(steps=self.steps)
        if not 0 < self.lr < np.inf:
            raise ValueError(f"Parameter `lr` should be positive. Found {self.lr}.")
        if not self.weights or min(self.weights) <= 0:
            raise ValueError(f"Parameter `weights` should be positive, at least one. Found {self.weights}.")
        if not self.auxiliary or self.target in self.auxiliary:
            raise ValueError(
                f"Parameter `auxiliary` should name objectives other than `{self.target}`. Found {self.auxiliary}."
            )

    def __call__(self, model: nn.Module, schema: Schema, batches: Iterable[Batch], valid: Sequence[Batch]) -> Finding:
        """The finding; the model is not changed.

        ``values``: ``target``, ``auxiliary``, ``metric``, ``weights`` (L,), ``cosine`` (S,) by batch, ``gain`` (S, L), ``score``
        (S,), P after the target's step alone, ``fit`` (4,), the cubic's coefficients from the third power down (None with fewer
        than four batches), ``agree``, the share of points whose gain and cosine have one sign, ``left_out``, batches without
        a gradient of the target or of the others.

        Raises:
            ValueError: no batch has all objectives, or the metric cannot be had.
        """
        probed = Probed(self.run, model, schema)
        rows: list[tuple[float, float, list[float]]] = []
        left_out = 0
        for step, batch in enumerate(islice(batches, self.steps)):
            grads = probed.gradients(batch, self.seed + step)
            other = _summed([grads.of[name] for name in self.auxiliary if name in grads.of])
            if not grads.of.get(self.target) or not other:
                left_out += 1
                continue
            mine = grads.of[self.target]
            scores = _after(
                probed,
                mine,
                other,
                grads.ids,
                self.lr,
                (0.0, *self.weights),
                lambda: self._score(probed, schema, valid),
            )
            rows.append((cosine(mine, other), scores[0], [score - scores[0] for score in scores[1:]]))
        if not rows:
            raise ValueError(
                f"No batch has a loss of `{self.target}` and of one of {list(self.auxiliary)}. Objectives are what losses name."
            )
        cosines, gains = np.array([row[0] for row in rows]), np.array([row[2] for row in rows])
        values: dict[str, Any] = {
            "target": self.target, "auxiliary": self.auxiliary, "metric": self._named(schema), "weights": np.array(self.weights),
            "cosine": cosines, "gain": gains, "score": np.array([row[1] for row in rows]), "fit": cubic(cosines, gains),
            "agree": _agreement(cosines, gains), "left_out": left_out,
        }  # fmt: skip
        return Finding(
            "one_step", values, unit=values["metric"], reading=_of_step(values), reference=REFERENCE,
            remedy="Judge an auxiliary task by the held-out score of what is trained with it.",
        )  # fmt: skip

    def _named(self, schema: Schema) -> str:
        task = self.target.partition("@")[0]
        kinds = {t.name: t.kind for t in schema.tasks}
        kind = kinds.get(task, schema.tasks[0].kind)
        return self.metric or lead_metric({"binary": ("auc",), "multiclass": ("accuracy",), "real": ("rmse",)}[kind])

    def _score(self, probed: Probed, schema: Schema, valid: Sequence[Batch]) -> float:
        """P of the model as it is now: the metric, negated where lower is better."""
        found = evaluate(predict(probed.model, valid, schema, device=str(probed.device)), schema, replicates=0)
        task, _, domain = self.target.partition("@")
        if task in found:
            slices = [found[task]["domains"].get(domain) if domain else found[task]]
        else:
            slices = [each["domains"].get(self.target) for each in found.values()]
        name = self._named(schema)
        values = [part[name]["value"] for part in slices if part is not None and name in part]
        if not values or any(value is None for value in values):
            raise ValueError(
                f"`{name}` of `{self.target}` cannot be had on the validation rows: absent, or of too few rows."
            )
        return float(np.mean(values)) * (-1 if lower_is_better(name) else 1)


def _summed(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """leaf -> sum of the gradients that reach it."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for leaf, grad in part.items():
            total[leaf] = total[leaf] + grad if leaf in total else grad
    return total


@torch.no_grad()
def _after(
    probed: Probed, mine: Mapping[str, Tensor], other: Mapping[str, Tensor], ids: Mapping[str, Tensor], lr: float,
    weights: Sequence[float], score: Callable[[], float],
) -> list[float]:  # fmt: skip
    """The score after a step with each weight, every step from the same place, to which the parameters return bit for bit."""
    places = {leaf: probed.place(leaf) for leaf in {**mine, **other}}
    before = {leaf: p.index_select(0, ids[leaf]) if leaf in ids else p.clone() for leaf, p in places.items()}

    def put(leaf: str, value: Tensor) -> None:
        if leaf in ids:
            places[leaf].index_copy_(0, ids[leaf], value)
        else:
            places[leaf].copy_(value)

    found = []
    for weight in weights:
        for leaf, base in before.items():
            step = mine[leaf] if leaf in mine else torch.zeros_like(base)
            put(leaf, base - lr * (step + weight * other[leaf] if leaf in other else step))
        found.append(score())
    for leaf, base in before.items():
        put(leaf, base)
    return found


def cubic(cosines: Array, gains: Array) -> Array | None:
    """(4,) least-squares cubic through the points of (S,) cosines and (S, L) gains; None with fewer than four cosines."""
    known = np.isfinite(cosines)
    if len(np.unique(cosines[known])) < CUBIC:
        return None
    x = np.repeat(cosines[known], gains.shape[1])
    return np.polyfit(x, gains[known].ravel(), CUBIC - 1)


def _agreement(cosines: Array, gains: Array) -> float | None:
    signs = np.sign(cosines)[:, None] * np.sign(gains)
    decided = np.isfinite(signs) & (signs != 0)
    return float((signs[decided] > 0).mean()) if decided.any() else None


def _of_step(values: Mapping[str, Any]) -> str:
    gain, others = values["gain"], " and ".join(f"`{name}`" for name in values["auxiliary"])
    agree = (
        ""
        if values["agree"] is None
        else f" The cosine has the sign of the gain in {values['agree']:.1%} of the points."
    )
    return (
        f"In {len(gain):,} batches and {gain.shape[1]} weights, one step with {others} beside `{values['target']}` helps in "
        f"{(gain > 0).mean():.1%} and harms in {(gain < 0).mean():.1%} of the points (mean gain {gain.mean():+.2e}).{agree}"
    )


def plot_step(finding: Finding, path: str | Path | None = None) -> Figure:
    """One-step gain over cosine, a point per batch and weight, with the cubic."""
    values: Mapping[str, Any] = finding.values
    drawn, (axis,) = figure(6.4, 4.4)
    shades = np.linspace(0.25, 1, len(values["weights"]))
    for place, (weight, shade) in enumerate(zip(values["weights"], shades, strict=True)):
        axis.plot(
            values["cosine"], values["gain"][:, place], "o", color=INK["blue"], alpha=shade, label=f"weight {weight:g}"
        )
    if values["fit"] is not None:
        known = values["cosine"][np.isfinite(values["cosine"])]
        x = np.linspace(known.min(), known.max(), 100)
        axis.plot(x, np.polyval(values["fit"], x), color=INK["orange"], label="cubic through all")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(f"cosine of the gradients of {values['target']} and {', '.join(values['auxiliary'])}")
    axis.set_ylabel(f"one-step transfer gain ({values['metric']})")
    axis.ticklabel_format(axis="y", scilimits=(-3, 3))
    axis.legend(frameon=False, fontsize=8)
    return finish(drawn, path)
