"""DST (Debiased Self-Training): one head makes pseudo-labels, another learns them, and a third plays the worst there could be.

Paper: "Debiased Self-Training for Semi-Supervised Learning", Baixu Chen, Junguang Jiang, Ximei Wang, Pengfei Wan, Jianmin Wang,
Mingsheng Long, NeurIPS 2022, https://arxiv.org/abs/2202.07136.

Idea: a model that learns from its own answers believes its own mistakes.  So the main head h, which answers, learns from labels
alone; a head h' learns what h says of rows without a label; both shape the features psi.  And a head w looks for the worst:
agree with h on rows with a label, disagree on the others.  Features are moved so that no such head can disagree much: then h,
which is one of them, cannot be far off.  At test time h alone is left.

Equations, per task, with f = psi of the weak view a, f' = psi of the strong view A, yhat = argmax h(f) without gradient, over
the rows with (l) and without (u) a label::

    L_st    = (1 / B_u) sum over believed u of CE(h'(f'_u), yhat_u)                 as `unbraid.losses.self_training`
    L_worst = eta' mean_l CE(w(f_l), yhat_l)  +  mean_u -log min(1 - softmax(w(f_u))[yhat_u] + 1e-6, 1)
    L       = L_sup(h)  +  mu L_st  +  eta L_worst
    d L / d w = eta dL_worst / dw       d L / d psi has  - lambda(i) eta dL_worst / dpsi       d L / d h is that of L_sup
    lambda(i) = 2 hi / (1 + exp(-i / time)) - hi                                    i: steps of the training before this one

L_sup is another loss of the run (`supervised`); the heads are parts of the model (`DSTHeads`), so that optimiser and checkpoint
find them.  -log(1 - p) stands for the paper's negated cross-entropy: it is bounded, by 13.8155, and where p < 1e-6 it is done.

Instead of one pass through a layer that turns the gradient round, w gives its logits twice, equal in value and with the same
dropout: on detached features, which trains w alone, and with detached weights, which trains psi alone.  So the loss says by
itself what each gets, and nothing in the model depends on lambda.

How this differs from the paper and its two codes, for fine-tuning and from scratch:

- Targets of the labelled part of L_worst are what h says of these rows (as in the code for fine-tuning), not their labels.
- One pass of the model over all views, as in the code from scratch; that for fine-tuning makes three, with a batch normalisation
  each.  Answers are those of this pass, in training mode: with dropout below h they are noisy, and so in the code.
- w has the form of h', as in the code for fine-tuning; that from scratch gives w three layers with batch normalisation.
- The codes' lambda has alpha i / N with alpha = 1; here ``time`` is N / alpha.  It is a time constant and not a length.
- L_worst is absent from a batch that has no row with a label, or none without, of the task: a game with one side settles nothing.
- A batch in which nothing is believed has no L_st, where the codes' is 0: gradients of zeros would still move h' by momentum.
- psi is all below the last linear layer of h: a small MLP in the head (``model.heads.hidden``) belongs to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unbraid.layers import mlp, mlp_width, require_dropout, require_positive, task_key
from unbraid.losses import fixmatch, flexmatch, pseudo_label
from unbraid.losses.self_training import (
    BoundSelfTraining,
    SelfTraining,
    Views,
    class_logits,
    hidden_rows,
    known_rows,
    over_classes,
    tasks_of,
)
from unbraid.types import FORBID, Batch, Losses, Output, Schema, State, Task

_ENTRY = """
@inproceedings{chen2022dst,
  title     = {Debiased Self-Training for Semi-Supervised Learning},
  author    = {Chen, Baixu and Jiang, Junguang and Wang, Ximei and Wan, Pengfei and Wang, Jianmin and Long, Mingsheng},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {35},
  year      = {2022},
  note      = {arXiv:2202.07136},
}
"""
_OF_RULE = {name: module.BIBTEX for name, module in
            (("fixmatch", fixmatch), ("flexmatch", flexmatch), ("pseudo_label", pseudo_label))}  # fmt: skip
BIBTEX = "".join((_ENTRY, *_OF_RULE.values()))
PARTS = (
    "pseudo",
    "worst.own",
    "worst.features",
)  # of the extras: a worst head's gradient for itself, and for the features
SMALL = 1e-6  # in -log(1 - p + SMALL)


def _name(part: str, task: str) -> str:
    """An extra of a task."""
    return f"extra_heads.dst.{part}.{task}"


# ---------------------------------------------------------------------------------------------------------------- the heads
@dataclass(frozen=True)
class DSTHeads:
    """The two heads that `DST` trains, for each binary and multiclass task: MLPs on what the task's own head reads.

    Args:
        hidden: widths of their hidden layers; empty: they are linear.
        dropout: after every ReLU.

    Raises:
        ValueError: a width is not positive, or ``dropout`` is not in [0, 1).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    loss: ClassVar[str] = "dst"  # what trains them
    cites: ClassVar[tuple[str, ...]] = ("chen2022dst",)
    kind: Literal["dst"] = field(default="dst", kw_only=True)
    hidden: tuple[int, ...] = (128,)
    dropout: float = 0.5

    def __post_init__(self) -> None:
        require_positive(hidden=self.hidden)
        require_dropout(self.dropout)

    def build(self, schema: Schema, trunk: int, hidden: Mapping[str, int]) -> DSTHeadsModule:
        """See `unbraid.slots.ExtraHead`."""
        return DSTHeadsModule(self, {t: hidden[t.name] for t in schema.tasks if t.kind != "real"}, schema)


class DSTHeadsModule(nn.Module):
    """Module of `DSTHeads`."""

    def __init__(self, config: DSTHeads, widths: Mapping[Task, int], schema: Schema) -> None:
        super().__init__()
        self.tasks = [task.name for task in widths]
        self.gives = tuple(_name(part, task) for task in self.tasks for part in PARTS)
        self.pseudo, self.worst = nn.ModuleDict(), nn.ModuleDict()
        for task, width in widths.items():
            outputs, last = schema.outputs(task), mlp_width(width, config.hidden)
            below = mlp(width, config.hidden, config.dropout)
            self.pseudo[task_key(task.name)] = nn.Sequential(*below, nn.Linear(last, outputs))
            self.worst[task_key(task.name)] = WorstHead(width, config.hidden, outputs, config.dropout)

    def forward(self, output: Output) -> dict[str, Tensor]:
        """task -> logits, (B,) of a binary one or (B, K), of the pseudo-label head and, twice, of the worst head."""
        extras = {}
        for task in self.tasks:
            features, worst = output.hidden[task], cast(WorstHead, self.worst[task_key(task)])
            masks = worst.masks(features)
            frozen = {name: parameter.detach() for name, parameter in worst.named_parameters()}
            found = (
                self.pseudo[task_key(task)](features),
                worst(features.detach(), masks),
                functional_call(worst, frozen, (features, masks)),
            )
            for part, logits in zip(PARTS, found, strict=True):
                extras[_name(part, task)] = logits.squeeze(1) if logits.shape[1] == 1 else logits
        return extras


class WorstHead(nn.Module):
    """An MLP whose dropout is given from outside, so that it can be read twice with the same."""

    def __init__(self, width: int, hidden: tuple[int, ...], outputs: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip((width, *hidden), hidden, strict=False))
        self.last, self.dropout = nn.Linear(mlp_width(width, hidden), outputs), dropout

    def masks(self, features: Tensor) -> list[Tensor]:
        """What each hidden layer is multiplied by: (B, w), 0 or 1 / (1 - dropout)."""
        widths = [cast(nn.Linear, layer).out_features for layer in self.layers]
        return [F.dropout(features.new_ones(len(features), w), self.dropout, self.training) for w in widths]

    def forward(self, features: Tensor, masks: list[Tensor]) -> Tensor:
        """(B, outputs)."""
        for layer, mask in zip(self.layers, masks, strict=True):
            features = layer(features).relu() * mask
        return self.last(features)


# ----------------------------------------------------------------------------------------------------------------- the loss
@dataclass(frozen=True)
class DST:
    """Pseudo-labels for a head of their own, and a worst head against the features.  Needs the extra head ``dst``.

    Its objective is its own, ``dst``: the sum over tasks of their weight times mu L_st + eta L_worst.

    Args:
        rule: which answers are believed, and which view learns them: those of the loss of this name.
        threshold, temperature, tasks: as for that loss; warmup: as for FlexMatch, and read for it alone.
        mu: factor of L_st; eta: of L_worst; eta_prime: of its labelled part.
        hi: what the factor of the reversed gradient goes to; time: in how many steps (at ``time`` it has 46 % of it).
        strong: factor of a supervised loss of the main head on strong views of rows with a label (the code for fine-tuning: .1);
            needs ``augment.of = "all"``.

    Raises:
        ValueError: a factor is negative or not finite, ``time`` is not positive; ``threshold``, ``temperature``: as for the rule.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["dst"] = field(default="dst", kw_only=True)
    rule: Literal["fixmatch", "flexmatch", "pseudo_label"] = "fixmatch"
    threshold: float = 0.7
    temperature: float = 1.0
    warmup: bool = True
    tasks: tuple[str, ...] = ()
    mu: float = 1.0
    eta: float = 1.0
    eta_prime: float = 2.0
    hi: float = 0.1
    time: int = 1000
    strong: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mu", "eta", "eta_prime", "hi", "strong"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Parameter `{name}` should be finite and not negative. Found {getattr(self, name)}.")
        require_positive(time=self.time)
        self.of_rule()

    def of_rule(self) -> SelfTraining:
        """The loss whose answers are believed."""
        common: dict[str, Any] = {"threshold": self.threshold, "temperature": self.temperature, "tasks": self.tasks}
        if self.rule == "flexmatch":
            return flexmatch.FlexMatch(**common, warmup=self.warmup)
        return (fixmatch.FixMatch if self.rule == "fixmatch" else pseudo_label.PseudoLabel)(**common)

    @property
    def views(self) -> Views:
        """Which rows must have a strong view."""
        return "all" if self.strong else self.of_rule().views

    @property
    def cites(self) -> tuple[str, ...]:
        """Keys of the papers in use: this one and the rule's."""
        return tuple(text.partition("{")[2].partition(",")[0] for text in (_ENTRY, _OF_RULE[self.rule]))

    def bind(self, schema: Schema) -> BoundDST:
        """The term for a schema.  Raises ValueError as `unbraid.losses.self_training.tasks_of`."""
        rule = self.of_rule()
        tasks = tasks_of(schema, self.tasks, self.kind)
        return BoundDST(self, BoundSelfTraining(self.kind, tasks, rule, rule.believe(schema)))


class BoundDST:
    """`DST` in a training that began ``before`` steps ago; ``rule`` says what is believed."""

    trains: ClassVar[tuple[str, ...]] = ()  # the main head learns from labels, which are another loss's

    def __init__(self, config: DST, rule: BoundSelfTraining, before: int = 0) -> None:
        self.config, self.rule, self.before = config, rule, before

    @property
    def needs(self) -> tuple[str, ...]:
        """Extras that it reads."""
        return tuple(_name(part, task.name) for task in self.rule.tasks for part in PARTS)

    @property
    def objectives(self) -> tuple[str, ...]:
        """All that its losses may be called."""
        return self.rule.objectives

    @property
    def unlabelled(self) -> tuple[Task, ...]:
        """The tasks that it wants rows without a label of."""
        return self.rule.tasks

    def over(self, before: int, total: int) -> BoundDST:
        """The term in a training whose step 0 is step ``before``."""
        return BoundDST(self.config, self.rule, before)

    def fresh(self, rows: Any, labels: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> BoundDST:
        """See `unbraid.slots.Term`."""
        return BoundDST(self.config, self.rule.fresh(rows, labels, observed), self.before)

    def state_dict(self) -> State:
        """See `unbraid.slots.Term`."""
        return self.rule.state_dict()

    def load_state_dict(self, state: State) -> None:
        """See `unbraid.slots.Term`."""
        self.rule.load_state_dict(state)

    def factor(self, step: int) -> float:
        """lambda(i) at a step of the training."""
        return 2 * self.config.hi / (1 + math.exp(-(self.before + step) / self.config.time)) - self.config.hi

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        """The objective's scalar; none where no part has a row."""
        parts = [
            task.weight * part
            for task in self.rule.tasks
            for part in self._parts(task, output, batch, self.factor(step))
        ]
        return {self.config.kind: torch.stack(parts).sum()} if parts else {}

    def _parts(self, task: Task, output: Output, batch: Batch, factor: float) -> Iterator[Tensor]:
        """What adds up to a task's loss."""
        config = self.config
        if config.mu and (lesson := self.rule.lesson(task, output, batch)) is not None:
            yield config.mu * lesson.loss(over_classes(output.extras[_name("pseudo", task.name)]))
        if config.strong and len(seen := known_rows(task, batch)):
            seen = seen[batch.pair[seen] >= 0]
            if len(seen):
                logits, label = (
                    class_logits(task, output, batch)[batch.pair[seen]],
                    batch.labels[task.name][seen].long(),
                )
                yield config.strong * _mean(F.cross_entropy(logits, label, reduction="none"), batch, seen)
        known, hidden = known_rows(task, batch), hidden_rows(task, batch)
        if config.eta and len(known) and len(hidden):
            answers = class_logits(task, output, batch).argmax(1)
            read = {
                part: over_classes(output.extras[_name(part, task.name)]) for part in ("worst.own", "worst.features")
            }
            yield config.eta * self._worst(read["worst.own"], answers, known, hidden, batch)
            if factor:
                turned = config.eta * factor * self._worst(read["worst.features"], answers, known, hidden, batch)
                yield turned.detach() - turned  # 0 in value, - eta lambda times the gradient

    def _worst(self, logits: Tensor, answers: Tensor, known: Tensor, hidden: Tensor, batch: Batch) -> Tensor:
        """L_worst of (B, K) logits against the main head's answers (B,)."""
        agree = F.cross_entropy(logits[known], answers[known], reduction="none")
        return self.config.eta_prime * _mean(agree, batch, known) + _mean(
            shunned(logits[hidden], answers[hidden]), batch, hidden
        )


def shunned(logits: Tensor, label: Tensor) -> Tensor:
    """(n,) -log(1 - p) of the class that should not be chosen, p its probability by (n, K) logits; at most 13.8155."""
    p = logits.softmax(1).gather(1, label[:, None]).squeeze(1)
    return -(1 - p + SMALL).clamp(max=1).log()


def _mean(losses: Tensor, batch: Batch, rows: Tensor) -> Tensor:
    """The mean over rows, weighted."""
    if batch.weight is None:
        return losses.mean()
    weight = batch.weight[rows].to(losses.dtype)
    return (losses * weight).sum() / weight.sum()
