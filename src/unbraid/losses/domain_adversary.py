"""DANN for many domains: a classifier of the domain reads the trunk, and the trunk learns to leave it nothing to read.

Papers: "Domain-Adversarial Training of Neural Networks", Ganin, Ustinova, Ajakan, Germain, Larochelle, Laviolette, Marchand,
Lempitsky, JMLR 17, 2016, https://arxiv.org/abs/1505.07818.  For T labelled domains with a T-way classifier it is a baseline of
multi-domain learning (DANN-MDL), and what "Multi-Domain Adversarial Learning" (MulANN, Schoenauer-Sebag, Heinrich, Schoenauer,
Sebag, Wu, Altschuler, ICLR 2019, https://arxiv.org/abs/1903.09239) reduces to where all domains have the same labels and all of
them known.

Idea: features that do not say which domain a row is of carry over from one to another.  With the trunk psi, the tasks' own
layers h_t, the classifier c and CE its cross-entropy over domains::

    min over psi, h_t   max over c       sum_t L_t  -  mu CE(c(psi(x)), t)
    mu(p) = mu (2 / (1 + exp(-10 p)) - 1)                       p: share of the training that is done, from 0 to 1

So one step moves c down CE, at factor 1 always, and psi *up* CE, at factor mu(p).

The classifier is a part of the model (`DomainClassifier`), so that optimiser and checkpoint find it; the loss is
`DomainAdversary`.  Instead of one pass through a layer that turns the gradient round, the classifier gives its logits twice,
equal in value: on a detached trunk, which trains it alone, and with detached weights, which trains the trunk alone.  The loss
then says by itself what each gets, and nothing in the model depends on mu.  The price is a second pass of a small network.

How this differs:

- T domains and the mean over all rows of known domains, labelled or not, are the form of the baseline as it is known
  second-hand; the classifier's size, and mu = 1 at the end, are ours (the ramp is that of DANN's paper).
- Rows of unknown or missing domains, strong views and rows of weight 0 take no part.
- ``of = "labelled"`` is the DANN of adaptation: two sides, rows with a label of any task and rows without.  As in the paper
  each side's mean counts alike, however many rows it has.
- The share p is that of one training: of a schedule with several, each begins at 0, unless they hand on their state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unbraid.layers import mlp, mlp_width, require_positive
from unbraid.losses.supervised import counted
from unbraid.types import FIRST_VALUE, FORBID, Batch, Losses, Output, Schema

BIBTEX = """
@article{ganin2016dann,
  title   = {Domain-Adversarial Training of Neural Networks},
  author  = {Ganin, Yaroslav and Ustinova, Evgeniya and Ajakan, Hana and Germain, Pascal and Larochelle, Hugo and
             Laviolette, Fran{\\c{c}}ois and Marchand, Mario and Lempitsky, Victor},
  journal = {Journal of Machine Learning Research},
  volume  = {17},
  number  = {59},
  pages   = {1--35},
  year    = {2016},
}
"""

Sides = Literal["domains", "labelled"]


def extras_of(head: str, of: Sides) -> tuple[str, str]:
    """Names of the classifier's logits that train it, and of those that train the trunk."""
    kind = "" if of == "domains" else f"{of}."
    return f"extra_heads.{head}.{kind}own", f"extra_heads.{head}.{kind}trunk"


@dataclass(frozen=True)
class DomainClassifier:
    """The classifier of domains that `DomainAdversary` trains: an MLP on the trunk, one logit per known domain.

    Args:
        hidden: widths of its hidden layers; empty: it is linear.
        of: what it tells apart: the known domains, or rows with a label from rows without (``labelled``); as in the loss.

    Raises:
        ValueError: a width is not positive.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    loss: ClassVar[str] = "domain_adversary"  # what trains it
    kind: Literal["domain"] = field(default="domain", kw_only=True)
    hidden: tuple[int, ...] = (64,)
    of: Sides = "domains"

    def __post_init__(self) -> None:
        require_positive(hidden=self.hidden)

    @property
    def reads_domains(self) -> bool:
        """Does it need domains?"""
        return self.of == "domains"

    def build(self, schema: Schema, trunk: int, hidden: Mapping[str, int]) -> DomainClassifierModule:
        """See `unbraid.slots.ExtraHead`."""
        return DomainClassifierModule(self.kind, self.of, trunk, self.hidden, schema)


class DomainClassifierModule(nn.Module):
    """A classifier of domains or sides, of the kind ``head``, that reads ``width`` numbers per row."""

    gives: tuple[str, ...]

    def __init__(self, head: str, of: Sides, width: int, hidden: tuple[int, ...], schema: Schema) -> None:
        super().__init__()
        self.gives = self.own, self.lower = extras_of(head, of)
        self.reads_domain = of == "domains"  # its outputs are domains in the order of their codes
        classes = len(schema.domains) - FIRST_VALUE if self.reads_domain else 2
        self.layers = nn.Sequential(*mlp(width, hidden), nn.Linear(mlp_width(width, hidden), classes))

    def read(self, output: Output) -> Tensor:
        """(B, width), what it reads."""
        return output.trunk

    def forward(self, output: Output) -> dict[str, Tensor]:
        """The same logits (B, T) twice: the gradient of the extra ``own`` goes to this module alone, that of ``trunk`` to what it
        reads alone."""
        x = self.read(output)
        frozen = {name: parameter.detach() for name, parameter in self.layers.named_parameters()}
        return {self.own: self.layers(x.detach()), self.lower: functional_call(self.layers, frozen, (x,))}


@dataclass(frozen=True)
class DomainAdversary:
    """The loss of a classifier of domains, whose gradient the trunk gets turned round.  Needs the extra head ``domain``.

    Its objective is its own, ``domain_adversary``; the value is the classifier's cross-entropy.

    Args:
        mu: factor of the trunk's gradient at the end; 0: the classifier looks on and the trunk does not learn from it.
        ramp: let the factor grow with the share of the training that is done, or have it all from the first step.
        of: what the classifier tells apart, as in the extra head.

    Raises:
        ValueError: ``mu`` is negative or not finite.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["domain_adversary"] = field(default="domain_adversary", kw_only=True)
    mu: float = 1.0
    ramp: bool = True
    of: Sides = "domains"

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise ValueError(f"Parameter `mu` should be finite and not negative. Found {self.mu}.")

    @property
    def needs(self) -> tuple[str, ...]:
        """Extras of the classifier: its own logits, and those that train the trunk."""
        return extras_of("domain", self.of)

    def bind(self, schema: Schema) -> BoundDomainAdversary:
        """The term for the domains of a schema.

        Raises:
            ValueError: there are fewer than two known domains to tell apart, or a task or domain has the name of the objective.
        """
        known = schema.domains[FIRST_VALUE:]
        if self.of == "domains" and len(known) < 2:
            raise ValueError(f"Loss `{self.kind}` tells domains apart and needs at least two. Found {list(known)}.")
        if self.kind in {*(task.name for task in schema.tasks), *known}:
            raise ValueError(f"`{self.kind}` is the objective of a loss. Rename the task or domain of this name.")
        return BoundDomainAdversary(self)

    def row_weights(self, output: Output, batch: Batch) -> Tensor:
        """(B,) what rows count."""
        return torch.ones_like(batch.row, dtype=torch.float32) if batch.weight is None else batch.weight


@dataclass(frozen=True)
class BoundDomainAdversary:
    """`DomainAdversary` in a training of ``total`` steps that began ``before`` steps ago; without a length it is at its end."""

    trains: ClassVar[tuple[str, ...]] = ()  # a part of the model, and no task's own logits
    config: DomainAdversary
    before: int = 0
    total: int = 0

    @property
    def needs(self) -> tuple[str, ...]:
        """See `unbraid.slots.Term`."""
        return self.config.needs

    @property
    def objectives(self) -> tuple[str, ...]:
        """All that its losses may be called."""
        return (self.config.kind,)

    def over(self, before: int, total: int) -> BoundDomainAdversary:
        """The term in a training whose step 0 is step ``before`` of ``total``."""
        return replace(self, before=before, total=total)

    def factor(self, step: int) -> float:
        """mu(p) at a step of the training."""
        if not self.config.ramp or not self.total:
            return self.config.mu
        share = min((self.before + step) / self.total, 1.0)
        return self.config.mu * (2 / (1 + math.exp(-10 * share)) - 1)

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        """The objective's scalar; none where no row that belongs to a side has a positive weight."""
        weight = self.config.row_weights(output, batch)
        side, known = self._sides(batch)
        rows = counted(known & (weight > 0) & (batch.view == 0))
        if rows is None:
            return {}
        own, lower = self.config.needs[:2]
        side, shares = side[rows], weight[rows].to(output.extras[own].dtype)
        if self.config.of == "labelled":
            shares = shares / shares.new_zeros(2).index_add(0, side, shares)[side]

        def entropy(name: str) -> Tensor:
            losses = F.cross_entropy(output.extras[name][rows], side, reduction="none")
            return (losses * shares).sum() / shares.sum()

        loss, mu = entropy(own), self.factor(step)
        if mu:
            of_trunk = entropy(lower)
            loss = loss + mu * (of_trunk.detach() - of_trunk)  # 0 in value, -mu times the gradient
        return {self.config.kind: loss}

    def _sides(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B,) class of each row, and (B,) bool, has it one?"""
        if self.config.of == "domains":
            return batch.domain - FIRST_VALUE, batch.domain >= FIRST_VALUE
        labelled = torch.stack(list(batch.observed.values())).any(0)
        return (~labelled).long(), torch.ones_like(labelled)
