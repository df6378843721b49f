"""CDAN: a domain adversary that reads the trunk together with what the model predicts.

Paper: "Conditional Adversarial Domain Adaptation", Long, Cao, Wang, Jordan, NeurIPS 2018, https://arxiv.org/abs/1705.10667.

Idea: where several classes share a domain, features can match as a whole and be crossed class by class.  So the classifier of
domains reads the products of all features f (the trunk) and all predicted probabilities g = softmax(z)::

    f (x) g = (f_a g_c) for all a, c           or, where that is more than 4,096 numbers,
    (R_f f) * (R_g g) / sqrt(d)                R: normal numbers drawn once and never trained, d wide

and everything else is as in `unbraid.losses.domain_adversary`.  With ``entropy`` (CDAN+E) rows count by 1 + exp(-H(g)), so
that rows that the model is sure of are aligned first.

How this differs:

- g and the weights are constants to the gradient, as in the authors' code (the paper's game would let the adversary change
  predictions through g as well).
- Domains are many, or the two sides of adaptation (``of``), as in `unbraid.losses.domain_adversary`; one learning rate for all.
- d = 1,024 as in the code; it draws from torch's generator with the model's seed, and the matrices are saved with the model.
- A head reads the predictions of one task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unbraid.layers import require_positive
from unbraid.losses.domain_adversary import DomainAdversary, DomainClassifierModule, Sides, extras_of
from unbraid.losses.unlabelled import class_logits, row_entropy
from unbraid.types import FORBID, Batch, Output, Schema

BIBTEX = """
@inproceedings{long2018cdan,
  title     = {Conditional Adversarial Domain Adaptation},
  author    = {Long, Mingsheng and Cao, Zhangjie and Wang, Jianmin and Jordan, Michael I.},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {31},
  year      = {2018},
  eprint    = {1705.10667},
  archiveprefix = {arXiv},
}
"""

SURE = "extra_heads.conditional.sure"
LARGEST = 4096  # products that the classifier reads as they are; more are projected


@dataclass(frozen=True)
class Conditional:
    """The classifier of domains that `CDAN` trains: an MLP on products of the trunk and a task's predicted probabilities.

    Args:
        hidden: widths of its hidden layers; empty: it is linear.
        of: what it tells apart: the known domains, or rows with a label from rows without (``labelled``); as in the loss.
        task: whose predictions; empty: those of the first task of role ``target`` that is not real.
        projected: d, where products are projected.

    Raises:
        ValueError: a width is not positive.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    loss: ClassVar[str] = "cdan"  # what trains it
    kind: Literal["conditional"] = field(default="conditional", kw_only=True)
    hidden: tuple[int, ...] = (64,)
    of: Sides = "domains"
    task: str = ""
    projected: int = 1024

    def __post_init__(self) -> None:
        require_positive(hidden=self.hidden, projected=self.projected)

    @property
    def reads_domains(self) -> bool:
        """Does it need domains?"""
        return self.of == "domains"

    def build(self, schema: Schema, trunk: int, hidden: Mapping[str, int]) -> ConditionalModule:
        """See `unbraid.slots.ExtraHead`.  Raises ValueError where ``task`` is no task with classes, or there is none."""
        able = [task.name for task in schema.tasks if task.kind != "real"]
        first = [name for name in able if schema.task(name).role == "target"][:1]
        if not (chosen := [self.task] if self.task in able else [] if self.task else first):
            raise ValueError(
                f"Extra head `{self.kind}` reads a binary or multiclass task: set `task` to one of {able}. Found `{self.task}`."
            )
        task = schema.task(chosen[0])
        return ConditionalModule(self, task.name, trunk, max(schema.outputs(task), 2), schema)


class ConditionalModule(DomainClassifierModule):
    """Module of `Conditional`."""

    of_trunk: Tensor
    of_classes: Tensor

    def __init__(self, config: Conditional, task: str, trunk: int, classes: int, schema: Schema) -> None:
        self.flat = trunk * classes <= LARGEST
        width = trunk * classes if self.flat else config.projected
        super().__init__(config.kind, config.of, width, config.hidden, schema)
        self.gives = (self.own, self.lower, SURE)
        self.task = task
        if not self.flat:
            self.register_buffer("of_trunk", torch.randn(trunk, width))
            self.register_buffer("of_classes", torch.randn(classes, width))

    def read(self, output: Output) -> Tensor:
        """(B, width): the products, or their projection."""
        f, g = output.trunk, self._log_p(output).exp().to(output.trunk.dtype)
        if self.flat:
            return (g.unsqueeze(2) * f.unsqueeze(1)).flatten(1)
        return (f @ self.of_trunk) * (g @ self.of_classes) / math.sqrt(self.of_trunk.shape[1])

    def forward(self, output: Output) -> dict[str, Tensor]:
        """As in the parent, and (B,) 1 + exp(-H) of the predictions."""
        return {**super().forward(output), SURE: 1 + torch.exp(-row_entropy(self._log_p(output)))}

    def _log_p(self, output: Output) -> Tensor:
        """(B, C) logarithms of the predicted probabilities, without a gradient."""
        return class_logits(output.logits[self.task].detach()).log_softmax(1)


@dataclass(frozen=True)
class CDAN(DomainAdversary):
    """The loss of a conditional classifier of domains.  Needs the extra head ``conditional``.  Its objective is ``cdan``.

    Args:
        mu, ramp, of: as in `DomainAdversary`.
        entropy: let rows that the model is sure of count more (CDAN+E).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["cdan"] = field(default="cdan", kw_only=True)  # type: ignore[assignment]
    entropy: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """Extras of the classifier: its own logits, those that train the trunk, and what rows count."""
        return (*extras_of("conditional", self.of), SURE)

    def row_weights(self, output: Output, batch: Batch) -> Tensor:
        """(B,) what rows count."""
        weight = super().row_weights(output, batch)
        return weight * output.extras[SURE] if self.entropy else weight
