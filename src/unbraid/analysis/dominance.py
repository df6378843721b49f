"""Which task moves a parameter?  Accumulated updates of every task, for any update rule, while a model trains.

Paper: Enneng Yang, Junwei Pan, Ximei Wang, Haibin Yu, Li Shen, Xihua Chen, Lei Xiao, Jie Jiang, Guibing Guo: *AdaTask: A
Task-aware Adaptive Learning Rate Approach to Multi-task Learning*.  AAAI 2023, https://arxiv.org/abs/2211.15055.

Idea.  The change of a shared parameter in one step is a sum of parts, one per task.  Their squares are averaged over time, and a
task's share of the sum of these averages says how much of the parameter's motion is that task's doing.

Equations, elementwise; D_k is task k's part of the change in a step, 0 where it took no part::

    AU_k  = gamma AU_k + (1 - gamma) D_k^2                  gamma = 0.9
    rAU_k = AU_k^p / sum_j AU_j^p                           power p = 1, or 0.5; a parameter that never moved is not counted
    dominated by k: rAU_k > 1 - tau                         tau = 0.1

What an update did for each task is taken apart in `unbraid.analysis.accumulated`.

Why.  With M_k the average of (m_k)^2, m_k the momentum behind D_k, the first factor below is how large the task's gradients are,
the second how large a step size they met::

    AU_k = M_k (AU_k / M_k)                gradient share = M_k^p / sum,   learning-rate share = (AU_k / M_k)^p / sum

Under one accumulator all tasks meet the same step size; under accumulators per task, small gradients meet larger ones.

How this differs.  The paper describes AU in words: gamma, the normaliser, the power, and how a joint Adam's change is taken
apart are ours, and are written into the finding; so is tau.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.analysis.accumulated import Recorder, Site
from unbraid.analysis.plots import INK, device_of, figure, finish, shortened
from unbraid.bundle import build
from unbraid.config import Run
from unbraid.layers import require_positive
from unbraid.model import Model
from unbraid.preflight import bound_terms
from unbraid.slots import Course
from unbraid.train import fit
from unbraid.types import Array, Batch, Finding, Losses, Schema

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 20  # of the histograms


# ------------------------------------------------------------------------------------------------------------ the numbers
def relative(accumulated: Tensor, power: float = 1.0) -> Tensor:
    """(K, n) shares of (K, n) accumulated updates, which sum to 1 over tasks; 1/K where all are 0."""
    raised = accumulated.double() ** power
    total = raised.sum(0)
    return torch.where(total > 0, raised / total.where(total > 0, torch.ones_like(total)), 1 / len(raised))


def depths(model: Model) -> dict[str, int]:
    """Parameter, or table -> its place from the bottom of the model up."""
    tables = {id(table.weight): name for name, table in model.tables.items()}
    return {tables.get(id(p), name): n for n, (name, p) in enumerate(model.named_parameters())}


# -------------------------------------------------------------------------------------------------------------- the probe
@dataclass(frozen=True)
class Dominance:
    """Trains the run's model for some steps and says who moved its shared parameters.  Call it with *training* batches.

    Args:
        run: model, losses and update; any update that needs no more than the training rows.
        steps: how many, at most.
        gamma, power, tau: see the module's docstring.
        every: steps between two points of the history.

    Raises:
        ValueError: a value is out of its range.
    """

    run: Run
    steps: int = 200
    gamma: float = 0.9
    power: float = 1.0
    tau: float = 0.1
    every: int = 20

    def __post_init__(self) -> None:
        require_positive(steps=self.steps, every=self.every)
        for name, low, high in (("gamma", 0.0, 1.0), ("tau", 0.0, 0.5)):
            if not low <= getattr(self, name) < high:
                raise ValueError(f"Parameter `{name}` should be in [{low:g}, {high:g}). Found {getattr(self, name)}.")
        if not 0 < self.power < float("inf"):
            raise ValueError(f"Parameter `power` should be positive, such as 1 or 0.5. Found {self.power}.")

    def __call__(self, model: nn.Module | None, schema: Schema, batches: Iterable[Batch]) -> Finding:
        """The finding.  A copy of the model trains on from where it is; None: the run's model, from its start.

        ``values``: ``update`` (its kind), ``objectives`` (K names), ``gamma``, ``power``, ``tau``, ``steps``; ``sites``, from the
        bottom of the model up: parameter or table (``view/vocabulary/role``) that two objectives reached -> ``parameters``,
        ``counted`` (that moved at all), ``mean`` and ``median`` (K,) of rAU over them, ``histogram`` (K, 20) counts,
        ``dominated`` (K,) share of them that each objective dominates, ``gradient`` and ``rate`` (K,), the mean shares of
        gradients and of step sizes; NaN for an objective that did not reach the site; ``all``, the same of all sites together;
        ``history``: ``step`` (T,), ``dominated`` (T,) and by site (T,) share dominated by anybody; ``identity``, the largest
        relative miss; ``rest`` (S,), the rest's length over the change's by step.

        Raises:
            ValueError: there is no batch, no parameter is reached by two objectives, or the update cannot be built here.
        """
        probed = cast(Model, build(self.run, schema) if model is None else copy.deepcopy(model))
        for parameter in probed.parameters():
            parameter.requires_grad_(True)
        recorder = self._train(probed, schema, batches)
        if not recorder.sites:
            what = "No parameter was reached by two objectives." if recorder.step else "There is no batch to train on."
            raise ValueError(what)
        label = {name: table for table, name in recorder.look.dense_tables.items()}  # of a dense table
        place = depths(probed)
        shown = {site: label.get(site, site) for site in recorder.sites}
        names = sorted(shown, key=lambda site: place[shown[site]])
        objectives = list(dict.fromkeys(o for leaf in recorder.look.reached.values() for o in leaf))
        found = {shown[site]: self._of_site(recorder.sites[site], objectives) for site in names}
        values = {
            "update": self.run.update.kind, "objectives": objectives, "gamma": self.gamma, "power": self.power,
            "tau": self.tau, "steps": recorder.step, "sites": found, "all": _together(found),
            "history": self._history_of(recorder, label), "identity": recorder.miss, "rest": np.array(recorder.rest),
        }  # fmt: skip
        return Finding(
            "dominance", values, unit="share of accumulated updates", reading=_reading(values),
            reference="Yang et al., AAAI 2023, arXiv 2211.15055: accumulated updates and their shares",
            remedy="Accumulators per task (update `adatask`), at a tuned step size.",
        )  # fmt: skip

    def _train(self, model: Model, schema: Schema, batches: Iterable[Batch]) -> _Kept:
        recorder = _Kept(
            self.run.update, model, steps=self.steps, weights={task.name: task.weight for task in schema.tasks},
            course=Course(seed=self.run.seed, targets=tuple(t.name for t in schema.tasks if t.role == "target")),
            gamma=self.gamma,
        )  # fmt: skip
        device = device_of(model)
        moved = (batch.to(device) for batch in batches)

        def keep(done: int, batch: Batch, losses: Losses) -> bool:
            if done % self.every == 0 or done == self.steps:
                recorder.history.append((done, {site: self._dominated(at) for site, at in recorder.sites.items()}))
            return False

        with suppress(StopIteration):  # fewer batches than steps
            fit(model, moved, bound_terms(self.run, schema, model), recorder, steps=self.steps, callbacks=(keep,))
        return recorder

    def _shares(self, site: Site, store: Mapping[str, Tensor]) -> tuple[list[str], Tensor, Tensor]:
        """Objectives, (K, n) shares, (n,) which entries count."""
        stacked = torch.stack([part.flatten() for part in store.values()])
        return list(store), relative(stacked, self.power), (stacked > 0).any(0)

    def _dominated(self, site: Site) -> tuple[int, int]:
        """How many entries somebody dominates, and how many count."""
        _, shares, counted = self._shares(site, site.updates)
        return int((shares[:, counted].max(0).values > 1 - self.tau).sum()), int(counted.sum())

    def _of_site(self, site: Site, objectives: list[str]) -> dict[str, Any]:
        names, shares, counted = self._shares(site, site.updates)
        shares = shares[:, counted].cpu()
        both = torch.stack([site.numerators[name].flatten() for name in names])
        rate = torch.stack([site.updates[name].flatten() for name in names]) / both.clamp(
            min=torch.finfo(both.dtype).tiny
        )
        known = counted & (both > 0).all(0)  # a task without any gradient at an entry met no step size there
        edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
        numbers = {
            "mean": shares.mean(1), "median": shares.quantile(0.5, 1) if shares.numel() < 2**24 else shares.median(1).values,
            "dominated": (shares > 1 - self.tau).double().mean(1),
            "histogram": torch.stack([torch.histogram(row.clamp(0, 1), edges)[0] for row in shares]),
            "gradient": relative(both[:, known], self.power).mean(1).cpu(),
            "rate": relative(rate[:, known], self.power).mean(1).cpu(),
        }  # fmt: skip
        spread = {key: _spread(value.numpy(), names, objectives) for key, value in numbers.items()}
        return {"parameters": counted.numel(), "counted": int(counted.sum()), **spread}

    def _history_of(self, recorder: _Kept, label: Mapping[str, str]) -> dict[str, Any]:
        steps = np.array([step for step, _ in recorder.history])
        sites = {
            label.get(s, s): np.array([_ratio(at.get(s, (0, 0))) for _, at in recorder.history]) for s in recorder.sites
        }
        both = [tuple(sum(pair[k] for pair in at.values()) for k in range(2)) for _, at in recorder.history]
        return {"step": steps, "dominated": np.array([_ratio(pair) for pair in both]), "sites": sites}


class _Kept(Recorder):
    """A recorder with the history of what is dominated."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.history: list[tuple[int, dict[str, tuple[int, int]]]] = []


def _ratio(pair: Any) -> float:
    return pair[0] / pair[1] if pair[1] else float("nan")


def _spread(values: Array, names: list[str], objectives: list[str]) -> Array:
    """(K, ...) in the order of all objectives, NaN for those that are not among ``names``."""
    out = np.full((len(objectives), *values.shape[1:]), np.nan)
    for name, row in zip(names, values, strict=True):
        out[objectives.index(name)] = row
    return out


def _together(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the entries of all sites; an objective's are over the sites that it reached."""
    counts = np.array([site["counted"] for site in sites.values()], float)
    out: dict[str, Any] = {"parameters": sum(s["parameters"] for s in sites.values()), "counted": int(counts.sum())}
    for key in ("mean", "dominated", "gradient", "rate"):
        table = np.stack([site[key] for site in sites.values()])
        known = np.isfinite(table)
        weight = np.where(known, counts[:, None], 0.0)
        out[key] = np.where(
            weight.sum(0) > 0, (np.where(known, table, 0) * weight).sum(0) / np.maximum(weight.sum(0), 1), np.nan
        )
    out["histogram"] = np.nansum(np.stack([site["histogram"] for site in sites.values()]), 0)
    return out


def _reading(values: Mapping[str, Any]) -> str:
    """The finding in words."""
    share, names = values["all"]["dominated"], values["objectives"]
    first = int(np.nanargmax(share))
    rest = float(values["rest"].mean()) if len(values["rest"]) else 0.0
    unknown = f" {rest:.1%} of the changes' length is no task's." if rest > 0.01 else ""
    return (
        f"After {values['steps']:,} steps of `{values['update']}`, one objective dominates {np.nansum(share):.1%} of "
        f"{values['all']['counted']:,} shared parameters (share of accumulated updates above {1 - values['tau']:g}, power "
        f"{values['power']:g}, gamma {values['gamma']:g}); most are `{names[first]}`'s, {share[first]:.1%}.{unknown}"
    )


# --------------------------------------------------------------------------------------------------------------- the plot
def plot(finding: Finding, path: str | Path | None = None, objective: str = "", most: int = 12) -> Figure:
    """Shares of one objective by layer, mean shares of all by layer, and what is dominated over time.

    Args:
        objective: whose histograms; empty: the one that dominates most.
        most: so many layers, those with the most parameters.

    Raises:
        ValueError: there is no such objective.
    """
    values: Mapping[str, Any] = finding.values
    names = values["objectives"]
    chosen = objective or names[int(np.nanargmax(values["all"]["dominated"]))]
    if chosen not in names:
        raise ValueError(f"There is no objective `{chosen}`. Objectives: {', '.join(names)}.")
    sites = values["sites"]
    largest = sorted(sites, key=lambda site: -sites[site]["counted"])[:most]
    shown = [site for site in sites if site in largest]  # from the bottom up
    drawn, axes = figure(16.5, max(4.2, 0.32 * len(shown) + 1.8), 3)
    _draw_histograms(axes[0], [sites[site] for site in shown], names.index(chosen))
    axes[0].set_xlabel(f"share of `{chosen}` in accumulated updates (1/{len(names)}: even)")
    image = axes[1].imshow(
        np.array([sites[site]["mean"] for site in shown]), vmin=0, vmax=1, cmap="viridis", aspect="auto"
    )
    axes[1].figure.colorbar(image, ax=axes[1], label="mean share")
    axes[1].set_xticks(range(len(names)), [shortened(name, 16) for name in names], rotation=45, ha="right")
    axes[1].set_yticks(range(len(shown)), [shortened(site) for site in shown], fontsize=7)
    axes[1].invert_yaxis()
    axes[1].set_title("bottom of the model below, top above", fontsize=9)
    history = values["history"]
    once: Any = {"marker": "o", "markersize": 3} if len(history["step"]) == 1 else {}  # no line goes through one point
    for n, site in enumerate(shown):
        alpha = 0.25 + 0.6 * n / len(shown)
        axes[2].plot(history["step"], history["sites"][site], color=INK["blue"], alpha=alpha, linewidth=0.8, **once)
    axes[2].plot(history["step"], history["dominated"], color=INK["orange"], label="all shared parameters", **once)
    axes[2].set_ylim(0, 1.02)
    axes[2].set_xlabel("training step (thin lines: layers, darker towards the top)")
    axes[2].set_ylabel(f"share dominated by one objective (above {1 - values['tau']:g})")
    axes[2].legend(frameon=False)
    drawn.suptitle(
        f"Dominance under `{values['update']}` (power {values['power']:g}, gamma {values['gamma']:g})", fontsize=11
    )
    return finish(drawn, path)


def _draw_histograms(axis: Any, sites: list[Mapping[str, Any]], place: int) -> None:
    edges = np.linspace(0, 1, BINS + 1)
    for n, site in enumerate(sites):
        counts = site["histogram"][place]
        if np.isfinite(counts).all() and counts.sum():
            axis.stairs(counts / counts.sum(), edges, color=INK["blue"], alpha=0.25 + 0.7 * (n + 1) / len(sites))
    axis.set_xlim(0, 1)
    axis.set_ylabel("share of a layer's parameters (darker towards the top)")
