"""GradNorm: loss weights that give gradients equal norms, more to tasks that learn slowly.

Paper: Zhao Chen, Vijay Badrinarayanan, Chen-Yu Lee, Andrew Rabinovich: *GradNorm: Gradient Normalization for Adaptive Loss
Balancing in Deep Multitask Networks*.  ICML 2018, https://arxiv.org/abs/1711.02257.

Idea.  Weights w whose sum is K are learned beside the model.  With G_k = |w_k g_k| on shared parameters::

    r_k = (L_k / L_k(0)) / mean_j (L_j / L_j(0))           how much of its loss a task has left, beside the others
    minimise over w:   sum_k |G_k - stop(mean(G) r_k^alpha)|               d = sum_k w_k g_k

How this differs.  `GradNorm.constraint` "softmax" (w = K softmax of free numbers) and L(0) as the mean over the first epoch, in
which all weights are 1, are those of the code released with ForkMerge (Jiang et al., NeurIPS 2023), whose alpha is 1.5.  The
original, from memory, renormalises w after every step (`constraint` "renormalise") and takes L(0) from the first step
(`initial` "step").  The step uses the weights before they move.  g_k is the gradient on all shared parameters, not on one chosen
layer.  In a batch without some task the others' weights sum to their number ("softmax") or keep their sum, and its own stays.
Losses should be positive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unbraid.optim.aggregated import Rule, View
from unbraid.optim.weighted import Learned, Setting
from unbraid.types import FORBID, State

BIBTEX = """
@inproceedings{chen2018gradnorm,
  title     = {GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks},
  author    = {Chen, Zhao and Badrinarayanan, Vijay and Lee, Chen-Yu and Rabinovich, Andrew},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2018},
  note      = {arXiv:1711.02257},
}
"""
LEAST = 1e-8  # of weights and losses


@dataclass(frozen=True)
class GradNorm:
    """GradNorm.

    Args:
        alpha: how much more a task that learns slowly gets; 0: equal norms.
        lr: step size of the weights (Adam); None means that of the layers.
        constraint: how the weights are kept at a sum of K.
        initial: L(0) is the mean over the first ``epoch``, or the loss of the first ``step``.
        epoch_steps: steps that count as the first epoch; 0 means one pass over the training rows.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["gradnorm"] = field(default="gradnorm", kw_only=True)
    alpha: float = 1.5
    lr: float | None = None
    constraint: Literal["softmax", "renormalise"] = "softmax"
    initial: Literal["epoch", "step"] = "epoch"
    epoch_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "lr", "epoch_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"Parameter `{name}` should be finite and not negative. Found {value}.")

    def bind(self, setting: Setting) -> BoundGradNorm:
        """The rule of one training.  Raises ValueError if an epoch is needed and nobody says how long it is."""
        first = setting.epoch(self.epoch_steps) if self.initial == "epoch" else 0
        start = 0.0 if self.constraint == "softmax" else 1.0
        low = -math.inf if self.constraint == "softmax" else LEAST
        return BoundGradNorm(self, setting, first, Learned(setting, self.lr, start, low))


@dataclass
class BoundGradNorm(Rule):
    """See `GradNorm`.

    Attributes:
        first: steps of the first epoch.
        sums: objective -> sum of its losses so far and over how many batches, until `initial` has their mean.
        initial: objective -> L(0).
    """

    weighs_own: ClassVar[bool] = True
    config: GradNorm
    setting: Setting
    first: int
    numbers: Learned
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    initial: dict[str, float] = field(default_factory=dict)

    def weights(self, view: View) -> Tensor:
        """w before it moves."""
        losses = dict(zip(view.names, view.losses, strict=True))
        numbers = self.numbers.of(losses)
        w = self._weights(numbers)
        if self.setting.update.step < self.first:
            for name, loss in losses.items():
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + float(loss), count + 1
        else:
            self._move(view, losses, w)
        return w.detach()

    def _weights(self, numbers: Tensor) -> Tensor:
        return len(numbers) * numbers.softmax(0) if self.config.constraint == "softmax" else numbers * 1.0

    def _move(self, view: View, losses: Mapping[str, Tensor], w: Tensor) -> None:
        for name, loss in losses.items():  # a task that the first epoch did not have begins with its first loss
            total, count = self.sums.pop(name, (float(loss), 1))
            self.initial.setdefault(name, max(total / count, LEAST))
        if len(losses) == 1:
            return
        left = view.losses.clamp(min=LEAST) / torch.tensor([self.initial[name] for name in losses], dtype=torch.float64)
        norms = w * view.norms
        aim = norms.mean().detach() * (left / left.mean()) ** self.config.alpha
        numbers = [self.numbers.numbers[name] for name in losses]
        slopes = torch.autograd.grad((norms - aim).abs().sum(), numbers)
        before = sum(float(number.detach()) for number in numbers)
        self.numbers.step(dict(zip(losses, slopes, strict=True)))
        if self.config.constraint == "renormalise":
            after = sum(float(number.detach()) for number in numbers)
            for number in numbers:
                number.data.mul_(before / after)

    def told(self) -> Mapping[str, float]:
        """objective -> its weight among all."""
        found = self.numbers.told()
        if not found:
            return {}
        numbers = torch.tensor(list(found.values()), dtype=torch.float64)
        return dict(zip(found, self._weights(numbers).tolist(), strict=True))

    def state_dict(self) -> State:
        """The numbers behind the weights, and what is known of L(0)."""
        return {"numbers": self.numbers.state_dict(), "sums": dict(self.sums), "initial": dict(self.initial)}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""
        self.numbers.load_state_dict(state["numbers"])
        self.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        self.initial = dict(state["initial"])
