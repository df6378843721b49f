"""Views that belong to domains instead of tasks: any tower that has one state per task has one per domain as well.

Idea: what a tower such as STEM does for tasks it can do for domains (scenarios, sites): domain d has tables and experts of
its own, and the state of a row is that of *its* domain.  All tasks share this state, and their own layers come after it::

    z_i        = state^d(i) of row i           the tower's state of that "task", its own layers left out
    hidden^k_i = tower^k(z_i)

Views of kind ``several`` belong to nobody: then domains have a gate each over experts that all share, and the tower should have
a gate per task.

Rows of other domains give domain d's tables, experts and gate a gradient of exactly zero, and a batch without a counted row
of d (one that is observed for some task) gives them none at all, so that neither momentum nor weight decay moves them.

A row whose domain training did not know, or is missing, reads the shared experts' mean where views are ``per_task``.  Where
they are ``separate`` or ``several`` it reads the mean of all domains' states, and does not write them.

Paper: none; STEM's and STEM-AL's are about tasks and name scenarios as another use.  The form is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.layers import average, by_domain, mlp_width
from unbraid.slots import TowerOutput
from unbraid.towers.mlp import task_towers
from unbraid.types import FIRST_VALUE, Schema


def domain_names(schema: Schema) -> tuple[str, ...]:
    """``domain0``, ``domain1``, ..: the domains that training knew, in the order of their codes.

    Raises ValueError if there is none.
    """
    names = tuple(f"domain{i}" for i in range(len(schema.domains) - FIRST_VALUE))
    if not names:
        raise ValueError("Tables per domain need a known domain. Found none in the training split.")
    return names


def of_domains(config: Any, schema: Schema) -> Any:
    """The tower with names of views, ``domain0``, for the domains that its key ``main`` names, if it has one.

    Raises ValueError for other names.
    """
    main = getattr(config, "main", ())
    views = dict(zip(schema.domains[FIRST_VALUE:], domain_names(schema), strict=True))
    if unknown := [name for name in main if name not in views and name not in views.values()]:
        raise ValueError(f"Parameter `main` should name domains, among {list(views)}. Found {unknown}.")
    return replace(config, main=tuple(views.get(name, name) for name in main)) if main else config


class DomainTower(nn.Module):
    """A tower whose views belong to domains.

    Args:
        config: a tower that reads views ``per_task``, ``separate`` or ``several``; its key ``tower`` is that of the tasks'
            own layers.
        tasks: their names; domains: names of the domains' views; views, widths: as for every tower.

    Attributes:
        widths: task -> H.
        gives: names of its extras; renamed: those that the tower would give, one per domain.

    Raises:
        ValueError: the tower does not read such views, or nothing in it would tell domains apart.
    """

    reads_domain = True

    def __init__(
        self, config: Any, tasks: Sequence[str], domains: Sequence[str], views: Sequence[str], widths: Sequence[int]
    ) -> None:
        super().__init__()
        self.domains, self.falls_back = tuple(domains), "shared" in views
        self.inner = replace(config, tower=()).build(domains, views, widths)
        width = self.inner.widths[domains[0]]
        self.towers = task_towers(tasks, width, config.tower, config.dropout)
        self.widths = dict.fromkeys(tasks, mlp_width(width, config.tower))
        self.renamed = tuple(getattr(self.inner, "gives", ()))
        gated = {name.rpartition(".gate.")[2] for name in self.renamed} >= set(domains)
        if not (gated or self.falls_back or set(views) & set(domains)):
            raise ValueError(
                f"Tower `{config.kind}` has no gate per task, and tables of kind `several` belong to no domain: all domains "
                f"would be one. Take a tower with a gate per task, or model.tables.kind `per_task` or `separate`."
            )
        self.gives = tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.renamed))

    def forward(self, hidden: Sequence[Tensor], domain: Tensor, counted: Tensor) -> TowerOutput:
        """One (B, width) per view, domain codes (B,) and which rows count (B,) bool, become task -> (B, H).

        The trunk is the rows' states (B, D).  Extras hold, for each kind of the tower's gates, ``KIND.gate`` (B, pool), every
        row's own domain's; zeros for a row without one.
        """
        out = self.inner(hidden)
        found = by_domain(domain, len(self.domains) + FIRST_VALUE, partial(self._of, out, counted))
        z, extras = found[0], dict(zip(self.gives, found[1:], strict=True))
        return TowerOutput({task: t(z) for task, t in zip(self.widths, self.towers.values(), strict=True)}, z, extras)

    def _of(self, out: TowerOutput, counted: Tensor, code: int, mine: Tensor) -> list[Tensor]:
        """Of the rows (n,) of one domain: their states (n, D), and by ``gives`` that domain's gates, or zeros.

        What the tower gives is for all rows and all domains: normalisation over a batch sees all of it.
        """
        own = self.domains[code - FIRST_VALUE] if code >= FIRST_VALUE else ""
        if own:
            state = out.tasks[own][mine]
        elif self.falls_back:
            state = out.trunk[mine]
        else:
            state = average([out.tasks[name][mine] for name in self.domains]).detach()
        if self.training and not bool(counted[mine].any()):
            state = state.detach()  # a gradient of zeros would move them by their momentum
        gates = {n.rpartition("."): gate[mine] for n, gate in out.extras.items()}
        found = {name: torch.zeros_like(gate) for (name, _, _), gate in gates.items()}
        found |= {name: gate for (name, _, of), gate in gates.items() if of == own}
        return [state, *(found[name] for name in self.gives)]
