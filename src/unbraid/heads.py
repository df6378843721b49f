"""Heads: what stands on the tower, one per task or one per task and domain, and second heads on what histories give."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from unbraid.layers import REFUSES, by_domain, initialise, mlp, mlp_width, require_dropout, require_positive
from unbraid.types import FIRST_VALUE, FORBID, UNKNOWN


@dataclass(frozen=True)
class Heads:
    """What stands on the tower: one head per task, or one per task and domain (``by = "domain"``).

    Args:
        two: heads of binary tasks give two numbers (z0, z1), whose difference z1 - z0 is the logit; both are the extra
            ``heads.two.TASK`` (B, 2), for a loss that needs them (``ranking`` of form ``jrc``).
        hidden: widths of a small MLP in every head, below its linear layer: with heads per domain the domain's own tower.
        dropout: after every ReLU of it.
        unknown: what rows of a domain that training did not know get from heads per domain: the ``mean`` of the logits of
            all domains that it knew, the ``root`` that the schedule kept from before there was a head per domain, or an
            ``error``.

    Raises:
        ValueError: a width is not positive, or ``dropout`` is not in [0, 1).
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    by: Literal["task", "domain"] = "task"
    two: bool = False
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    unknown: Literal["mean", "root", "error"] = "mean"

    def __post_init__(self) -> None:
        require_positive(hidden=self.hidden)
        require_dropout(self.dropout)


class SecondHead(nn.Module):
    """An MLP that predicts one task from what its histories give for it."""

    def __init__(self, task: str, width: int, hidden: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.gives = (f"history.{task}",)
        self.layers = nn.Sequential(mlp(width, hidden), nn.Linear(mlp_width(width, hidden), outputs))
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B,) or (B, K) logits."""
        logits = self.layers(x)
        return logits.squeeze(1) if self.outputs == 1 else logits


class Head(nn.Module):
    """The head of one task in one domain."""

    def __init__(self, heads: TaskHead, domain: int) -> None:
        super().__init__()
        self.tower = heads.towers[domain] if len(heads.towers) else nn.Sequential()
        self.linear, self.outputs, self.gives = heads.linears[domain], heads.outputs, heads.gives

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H) -> (B,) or (B, K) logits, and the (B, h) vector before the linear layer."""
        hidden = self.tower(hidden)
        logits = self.linear(hidden)
        return (logits.squeeze(1) if self.outputs == 1 else logits), hidden


class TaskHead(nn.Module):
    """Heads of one task, one per domain or one for all: an MLP (the identity without ``config.hidden``), then a linear layer.

    A domain without an observed row of the task in the batch is read detached: a zero gradient would let momentum and
    weight decay move its head.  With ``two``, the name of an extra, a binary task's head gives the (B, 2) of that extra.
    """

    def __init__(self, width: int, outputs: int, domains: int, two: str, config: Heads) -> None:
        super().__init__()
        outputs = 2 if two else outputs
        self.outputs, self.gives, self.unknown = outputs, (two,) if two else (), config.unknown
        self.width = last = mlp_width(width, config.hidden)
        self.linears = nn.ModuleList(nn.Linear(last, outputs) for _ in range(domains))
        own = domains if config.hidden else 0
        self.towers = nn.ModuleList(mlp(width, config.hidden, config.dropout) for _ in range(own))

    def forward(self, hidden: Tensor, domain: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) or (B, K) logits, and the (B, h) vectors before the linear layers.

        Raises:
            ValueError: ``unknown`` is ``error`` and, not in training, a row's domain is unknown.
        """
        if len(self.linears) == 1:
            below = self.towers[0](hidden) if len(self.towers) else hidden
            logits = self.linears[0](below)
            return (logits.squeeze(1) if self.outputs == 1 else logits), below
        live = [True] * len(self.linears)
        if self.training:
            live = torch.bincount(domain[observed], minlength=len(self.linears)).bool().tolist()
        elif self.unknown == "error" and (count := int((domain == UNKNOWN).sum())):
            raise ValueError(
                f"{count:,} rows are of domains that training did not know, and `model.heads.unknown` is `error`. Leave these "
                "rows out, or train with another `unknown`: mean, or root."
            )
        below = self._through_towers(hidden, domain, live) if len(self.towers) else hidden
        weights, biases = self._stacked("weight", live), self._stacked("bias", live)
        logits = torch.einsum("bh,bkh->bk", below, weights[domain]) + biases[domain]
        if self._averages and len(self.towers):
            logits = self._with_means(logits, hidden, domain)
        return (logits.squeeze(1) if self.outputs == 1 else logits), below

    def finish(self, found: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the extras that the head gives."""
        return (found[:, 1] - found[:, 0], {name: found for name in self.gives}) if self.gives else (found, {})

    @property
    def no_graph(self) -> str:
        """Why there is no graph of it (`unbraid.export`)."""
        return REFUSES if len(self.linears) > 1 and self.unknown == "error" else ""

    @property
    def _averages(self) -> bool:
        """Do rows of unknown domains get the mean of the known domains' logits now?"""
        return not self.training and self.unknown == "mean"

    def _stacked(self, part: str, live: list[bool]) -> Tensor:
        """(domains, ...) weights or biases; a domain that training did not know may have the mean of those it knew."""
        parts = [
            getattr(m, part) if on else getattr(m, part).detach() for m, on in zip(self.linears, live, strict=True)
        ]
        if self._averages:
            parts[UNKNOWN] = torch.stack(parts[FIRST_VALUE:]).mean(0)
        return torch.stack(parts)

    def _through_towers(self, hidden: Tensor, domain: Tensor, live: list[bool]) -> Tensor:
        """(B, h) each row through its domain's MLP; of unknown domains the mean of all, where logits are means."""

        def of(code: int, mine: Tensor) -> tuple[Tensor]:
            if code == UNKNOWN and self._averages:
                found = torch.stack([tower(hidden[mine]) for tower in self.towers[FIRST_VALUE:]]).mean(0)
            else:
                found = self.towers[code](hidden[mine])
            return (found if live[code] else found.detach(),)

        return by_domain(domain, len(self.towers), of)[0]

    def _with_means(self, logits: Tensor, hidden: Tensor, domain: Tensor) -> Tensor:
        """The logits (B, K), those of unknown domains' rows as means over the heads: a mean of MLPs is no MLP of means."""
        known = list(zip(self.towers[FIRST_VALUE:], self.linears[FIRST_VALUE:], strict=True))

        def of(unknown: int, mine: Tensor) -> tuple[Tensor]:
            if not unknown:
                return (logits[mine],)
            return (torch.stack([linear(tower(hidden[mine])) for tower, linear in known]).mean(0),)

        return by_domain((domain == UNKNOWN).long(), 2, of)[0]

    def tie(self) -> None:
        """One module in the place of all domains' own."""
        for parts in (self.linears, self.towers):
            for code in range(len(parts)):
                parts[code] = parts[FIRST_VALUE]

    def untie(self, fresh: Collection[int], seed: int) -> None:
        """A copy for every domain, those of ``fresh`` drawn anew: domain d from (seed, d), whatever the others are."""
        device = cast(Tensor, self.linears[FIRST_VALUE].weight).device
        for part, parts in enumerate((self.linears, self.towers)):
            tied = list(parts)  # all one module
            for code, root in enumerate(tied):
                parts[code] = copy.deepcopy(root)
                if code in fresh:
                    with torch.random.fork_rng(devices=[]):  # drawn on the CPU: the same on every device
                        torch.random.default_generator.manual_seed((seed * 2 + part) * 1_000_003 + code)
                        initialise(parts[code].cpu()).to(device)
