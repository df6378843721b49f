"""Whose doing is a change?  Any update's steps taken apart by objective, and the parts' squares accumulated over time.

Parts of the change.  An update with accumulators per task reports its parts itself.  Every other one steps with one gradient c
and Adam's single state; c is taken apart, c = sum_k a_k g_k + rest, and each term followed through the momentum, which is linear
(``adam``; the divisor is the joint one)::

    m_k = b1 m_k + (1 - b1) a_k g_k        D_k = - lr m_k / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

a_k is the task's weight where c is the weighted sum, else the least-squares fit over all shared parameters.  What no combination
of the g_k explains (signs that were drawn per entry) or what older momentum holds is the *rest*: it is reported, and no task's.
The parts and the rest add up to what the parameter really did, weight decay apart: `Recorder.miss` says how
nearly.

`unbraid.analysis.dominance` says what the averages of the squares are for, and trains a model to get them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.optim.joint import Joint
from unbraid.optim.per_task import Gradients, PerTask
from unbraid.slots import Course
from unbraid.types import Losses, Output, State

SAME = 1e-4  # a gradient this close to the weighted sum of all is that sum: float32 rounds in another order
Parts = dict[str, dict[str, Tensor]]  # site -> objective -> tensor


@dataclass
class Site:
    """What is accumulated for one parameter, or one table: averages as of each row's (or the parameter's) last move.

    Args:
        like: the parameter; rows: are its rows moved one by one?
    """

    like: Tensor
    rows: bool
    updates: dict[str, Tensor] = field(default_factory=dict)
    numerators: dict[str, Tensor] = field(default_factory=dict)
    last: Tensor | None = None

    def add(
        self, step: int, gamma: float, ids: Tensor | None, parts: Mapping[str, Tensor], numerators: Mapping[str, Tensor]
    ) -> None:
        """One move at the given rows (all: None): objective -> its part of the change, and what its step size multiplied."""
        if self.last is None:
            self.last = torch.zeros(len(self.like) if self.rows else 1, dtype=torch.float64, device=self.like.device)
        place: Any = slice(None) if ids is None else ids
        gone = gamma ** (step - self.last[place])
        keep = gone.view(-1, *[1] * (self.like.dim() - 1)) if self.rows else gone.view([1] * self.like.dim())
        for store, found in ((self.updates, parts), (self.numerators, numerators)):
            for objective in {**store, **found}:
                held = store.setdefault(objective, torch.zeros_like(self.like))
                new = held[place] * keep.to(held.dtype)
                held[place] = new + (1 - gamma) * found[objective] ** 2 if objective in found else new
        self.last[place] = float(step)


class Recorder:
    """An update that does what the given one does, and accumulates whose doing it was (an `unbraid.slots.Update`).

    Args:
        config: any member of the run's ``update``; model, steps, weights, objectives, course: as its ``build`` takes them.
        gamma: of the averages.

    Attributes:
        update: the update itself.
        sites: parameter's name, or table -> what has been accumulated.
        miss: largest relative difference between a change and the sum of its parts so far.
        rest: per step, the length of the rest over that of the change, over all sites.
        step: calls so far.
    """

    def __init__(
        self, config: Any, model: nn.Module, *, steps: int, weights: Mapping[str, float],
        objectives: Collection[str] | None = None, course: Course | None = None, gamma: float = 0.9,
    ) -> None:  # fmt: skip
        self.look = PerTask(Joint(), model, steps, weights)  # before the update, whose hooks on the tables shall stay
        self.look.keep_graph = True
        self.update = config.build(model, steps=steps, weights=weights, objectives=objectives, course=course)
        self.look.reads_dense_lookups = self.update.reads_dense_lookups  # type: ignore[misc]
        self.gamma, self.step, self.miss = gamma, 0, 0.0
        self.sites: dict[str, Site] = {}
        self.rest: list[float] = []
        self.told_parts: dict[str, dict[str, tuple[Tensor | None, Tensor]]] = {}
        self.momentum: Parts = {}
        self.combined: dict[str, tuple[Tensor, Tensor]] = {}
        self.reports = hasattr(self.update, "observe")
        if self.reports:
            self.update.observe = self._observe
        else:
            self._move, self.update.move = self.update.move, self._watch

    # ------------------------------------------------------------------------------------------------------- the update
    def __call__(self, losses: Losses, output: Output) -> None:
        """Move the model as the update does."""
        wanted = {name: loss for name, loss in losses.items() if self.look.weight(name) != 0}
        grads = self.look.gradients(wanted, output)
        self.look.note(grads)
        found = self._by_site(grads)
        before = {site: self._read(site, ids).clone() for site, (ids, _) in found.items()}
        rates = {site: self._rates(site) for site in found}
        self.told_parts, self.combined = {}, {}
        self.update(losses, output)
        self.step += 1
        shares = {} if self.reports else self._shares(found)
        lengths = [0.0, 0.0]
        for site, (ids, of) in found.items():
            parts, numerators, rest = (
                self._told(site, of) if self.reports else self._apart(site, ids, of, shares, rates[site][0])
            )
            change = self._read(site, ids) - before[site] * (1 - rates[site][0] * rates[site][1])
            self._check(change, parts, rest)
            lengths[0] += float(rest.double().square().sum())
            lengths[1] += float(change.double().square().sum())
            if parts and len(self.look.reached[self._leaf(site, ids)]) > 1:
                place = self.sites.setdefault(site, Site(torch.zeros_like(self._parameter(site)), ids is not None))
                place.add(self.step, self.gamma, ids, parts, numerators)
        self.rest.append((lengths[0] / lengths[1]) ** 0.5 if lengths[1] > 0 else 0.0)

    def settle(self) -> None:
        """See `unbraid.slots.Update`."""
        self.update.settle()

    def seek(self, step: int) -> None:
        """See `unbraid.slots.Update`."""
        self.update.seek(step)

    def state_dict(self) -> State:
        """That of the update; what has been accumulated is not in it."""
        return self.update.state_dict()

    def load_state_dict(self, state: State) -> None:
        """That of the update.  Momentum of earlier steps then belongs to the rest."""
        self.update.load_state_dict(state)

    # -------------------------------------------------------------------------------------------------------- the sites
    def _by_site(self, grads: Gradients) -> dict[str, tuple[Tensor | None, dict[str, Tensor]]]:
        """site -> the rows that may move (None: all), and objective -> gradient there."""
        found: dict[str, tuple[Tensor | None, dict[str, Tensor]]] = {}
        for leaf in grads.leaves():
            of = {name: grads.of[name][leaf] for name in grads.reaching(leaf)}
            if leaf in self.update.rows.tables:
                found[leaf] = (grads.ids[leaf], of)
            elif leaf in grads.ids:  # rows of a dense table, which moves as a whole
                name = self.look.dense_tables[leaf]
                whole = self.look.parameters[name]
                of = {o: torch.zeros_like(whole).index_copy_(0, grads.ids[leaf], g) for o, g in of.items()}
                found[name] = (None, of)
            else:
                found[leaf] = (None, of)
        return found

    def _leaf(self, site: str, ids: Tensor | None) -> str:
        """The leaf whose objectives a site has."""
        by_parameter = {name: table for table, name in self.look.dense_tables.items()}
        return by_parameter[site] if site in by_parameter and self.look.reads_dense_lookups else site

    def _parameter(self, site: str) -> Tensor:
        rows = self.update.rows.tables
        return (rows[site] if site in rows else self.look.parameters[site]).detach()

    def _read(self, site: str, ids: Tensor | None) -> Tensor:
        value = self._parameter(site)
        return value if ids is None else value[ids]

    def _rates(self, site: str) -> tuple[float, float]:
        """Step size and weight decay of the step that comes."""
        if site in self.update.rows.tables:
            (group,) = self.update.rows.param_groups
        else:
            wanted = id(self.look.parameters[site])
            (group,) = (g for g in self.update.dense.param_groups if any(id(p) == wanted for p in g["params"]))
        return group["lr"], group["weight_decay"]

    # ------------------------------------------------------------------------------------------- parts that are reported
    def _observe(self, objective: str, leaf: str, ids: Tensor | None, change: Tensor) -> None:
        self.told_parts.setdefault(leaf, {})[objective] = (ids, change.clone())

    def _told(self, site: str, of: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """The reported parts, the momentum or gradient of each, and a rest of zeros."""
        parts = {objective: change for objective, (_, change) in self.told_parts.get(site, {}).items()}
        config = self.update.config
        beta = config.betas[0] if config.base == "adam" else 0.0
        (ids,) = {ids for ids, _ in self.told_parts.get(site, {}).values()} or (None,)
        numerators = {name: self._followed(site, name, ids, of.get(name), beta) for name in parts}
        zero = torch.zeros_like(next(iter(of.values())))
        return parts, numerators, zero

    def _followed(self, site: str, objective: str, ids: Tensor | None, grad: Tensor | None, beta: float) -> Tensor:
        """The objective's momentum, moved by its gradient (None: zeros), at the rows that step."""
        held = self.momentum.setdefault(site, {}).setdefault(objective, torch.zeros_like(self._parameter(site)))
        place: Any = slice(None) if ids is None else ids
        new = held[place] * beta + (0.0 if grad is None else grad * (1 - beta))
        held[place] = new
        return new

    # ------------------------------------------------------------------------------------ parts of one gradient's step
    def _watch(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Stands in the place of the update's `move`: clipping scales the gradients that are kept here in place."""
        self._move(rows)
        self.combined = dict(rows)

    def _gradient(self, site: str, ids: Tensor | None) -> Tensor | None:
        """What the update stepped with; of a table's rows in the order of ``ids``."""
        if ids is None:
            return self.look.parameters[site].grad
        if site not in self.combined:
            return None
        own, grad = self.combined[site]
        if len(own) == len(ids) and torch.equal(own, ids):
            return grad
        whole = torch.zeros_like(self._parameter(site)).index_copy_(0, own, grad)
        return whole[ids]

    def _shares(self, found: Mapping[str, tuple[Tensor | None, Mapping[str, Tensor]]]) -> dict[str, float]:
        """objective -> a_k over all shared sites: the weights, scaled by clipping, or the least-squares fit."""
        names = list(dict.fromkeys(name for _, of in found.values() for name in of))
        if not names:
            return {}
        weights = np.array([self.look.weight(name) for name in names])
        gram, target, length = np.zeros((len(names), len(names))), np.zeros(len(names)), 0.0
        for site, (ids, of) in found.items():
            combined = self._gradient(site, ids)
            if combined is None or len(self.look.reached[self._leaf(site, ids)]) < 2:
                continue
            at = [names.index(name) for name in of]
            rows = torch.stack([grad.flatten() for grad in of.values()]).double()
            gram[np.ix_(at, at)] += (rows @ rows.T).cpu().numpy()
            target[at] += (rows @ combined.flatten().double()).cpu().numpy()
            length += float(combined.double().square().sum())
        joint = weights @ gram @ weights
        scale = float(weights @ target / joint) if joint > 0 else 1.0
        missed = length - 2 * scale * (weights @ target) + scale**2 * joint  # |c - scale sum w g|^2
        if length == 0 or missed <= SAME**2 * length:
            return dict(zip(names, scale * weights, strict=True))
        return dict(zip(names, np.linalg.lstsq(gram, target, rcond=1e-10)[0], strict=True))

    def _apart(
        self, site: str, ids: Tensor | None, of: Mapping[str, Tensor], shares: Mapping[str, float], lr: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Parts of Adam's change, the momentum of each, and the rest."""
        combined = self._gradient(site, ids)
        if combined is None:  # the update gave it no gradient: it did not move
            return {}, {}, torch.zeros_like(next(iter(of.values())))
        mean, size, beta = self._adam(site, ids, lr)
        owners = self.look.reached[self._leaf(site, ids)]
        if len(owners) == 1:
            given = {owners[0]: combined}
        else:
            given = {name: grad * shares[name] for name, grad in of.items()}
        names = {**self.momentum.get(site, {}), **given}
        momentum = {name: self._followed(site, name, ids, given.get(name), beta) for name in names}
        rest = mean - torch.stack(list(momentum.values())).sum(0)
        return {name: -size * m for name, m in momentum.items()}, momentum, -size * rest

    def _adam(self, site: str, ids: Tensor | None, lr: float) -> tuple[Tensor, Tensor, float]:
        """First moment, step size per entry, and b1, as the update's Adam left them."""
        if ids is not None:
            (group,), state = self.update.rows.param_groups, self.update.rows.state[self.update.rows.tables[site]]
            (b1, b2), t = group["betas"], state["step"]
            mean, square = state["mean"][ids], state["square"][ids]
            return mean, lr * (1 - b2**t) ** 0.5 / (1 - b1**t) / (square.sqrt() + group["eps"]), b1
        state, group = self.update.dense.state[self.look.parameters[site]], self.update.dense.param_groups[0]
        (b1, b2), t = group["betas"], float(state["step"])
        root = (state["exp_avg_sq"] / (1 - b2**t)).sqrt()
        return state["exp_avg"], lr / (1 - b1**t) / (root + group["eps"]), b1

    def _check(self, change: Tensor, parts: Mapping[str, Tensor], rest: Tensor) -> None:
        largest = float(change.abs().max()) if change.numel() else 0.0
        if largest > 0:
            told = torch.stack([*parts.values(), rest]).sum(0)
            self.miss = max(self.miss, float((change - told).abs().max()) / largest)
