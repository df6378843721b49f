"""Ranking losses beside the cross-entropy: pairs and lists of a context, whose gradient does not fade with rare positives.

Papers:

- *pair*: "Learning to Rank using Gradient Descent", Burges, Shaked, Renshaw, Lazier, Deeds, Hamilton, Hullender, ICML 2005,
  https://doi.org/10.1145/1102351.1102363.  Why it helps a classifier: "Understanding the Ranking Loss for Recommendation with
  Sparse User Feedback", Lin, Pan, Zhang, Wang, Xiao, Huang, Xiao, Jiang, KDD 2024, https://arxiv.org/abs/2403.14144, which
  "Ads Recommendation in a Collapsed and Entangled World" (Pan et al., KDD 2024, https://arxiv.org/abs/2403.00793) trains with.
- *list*: the softmax cross-entropy over a list, in the form of the code released with the former.
- *listce*: "Regression Compatible Listwise Objectives for Calibrated Ranking with Binary Relevance", Bai, Jagerman, Qin, Yan,
  Kar, Lin, Wang, Bendersky, Najork, CIKM 2023, https://arxiv.org/abs/2211.01494.
- *jrc*: "Joint Optimization of Ranking and Calibration with Contextualized Hybrid Model", Sheng, Gao, Cheng, Yang, Han, Deng,
  Jiang, Xu, Zheng, KDD 2023, https://arxiv.org/abs/2208.06164.

Idea: cross-entropy pushes a negative by sigmoid(z) / B.  With 1 % positives a model that has learned the base rate has
sigmoid(z) near .01, so that 99 % of the rows hardly teach.  Compared with a *positive* of logit z_i the same row is pushed
by sigmoid(z_j - z_i), which stays far from 0 until the two are told apart.

In a context c with positives P and negatives N, rows of mass m, logits z::

    pair     sum_{i in P, j in N} m_i m_j softplus(z_j - z_i) / (sum_P m_i  sum_N m_j)
    list     mean over P of   log sum_{j in c} m_j exp(z_j)       - z_i
    listce   mean over P of   log sum_{j in c} m_j sigmoid(z_j)   - log sigmoid(z_i)
    jrc      mean over P + N of  log sum_{j in c} m_j exp(z_j^y)  - z_i^y       y the row's own label, z = z^1 - z^0

Means are weighted by m.  The loss of a task is the mean over its contexts: each counts once.  `Ranking.within` says what a
context is; `weight`, with that of the loss beside it, makes the mixture ``alpha * supervised + (1 - alpha) * ranking``.

- *pair* and *list* do not change when a constant is added to the logits of a context: calibration rests on the other loss.
- *listce* is least where sigmoid(z) is *proportional* to the rate of positives within a context, as it is for the
  cross-entropy; the factor, and so the level, rests on the other loss.
- *jrc* leaves free a constant in all z^1 and one in all z^0.  So each form stands beside a loss of the probability.
- *jrc* adds to the cross-entropy of z^1 - z^0 what it is missing: how large z^1 is among the rows of the context.  It needs
  heads with two logits, ``Heads(two=True)``.
- Above `Ranking.pairs` pairs, so many are drawn with replacement: a context uniformly, its positive and its negative by their
  mass.  The mean over them is unbiased.  Draws are a function of the step and the task's place, so that a run resumes bit-equal.
- A context without both classes has nothing to rank and is left out; a task without any other context has no loss.

How this differs:

- The released code knows one context, the batch, and takes all pairs.  Contexts, the cap and the mean over contexts are ours.
- `Batch.weight` w is a row's mass.  Where a log kept a share r of the negatives, a negative stands for 1 / r of them:
  m = w / r.  So the ranking is that of the full log, and no logit is shifted.  Ours.
- The formulas of *list*, *listce* and *jrc* are those of the code released with "Understanding the Ranking Loss", whose
  weight of positives is a mass here; that *listce* and *jrc* are what their own papers define is from memory.
- *jrc* leaves out contexts of one class, where its formula would only make their logits equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unbraid.evaluate import request_codes
from unbraid.losses.supervised import require_weight
from unbraid.types import FORBID, Batch, Losses, Output, Schema, Task

BIBTEX = """
@inproceedings{burges2005ranknet,
  title     = {Learning to Rank using Gradient Descent},
  author    = {Burges, Chris and Shaked, Tal and Renshaw, Erin and Lazier, Ari and Deeds, Matt and Hamilton, Nicole and
               Hullender, Greg},
  booktitle = {Proceedings of the 22nd International Conference on Machine Learning},
  pages     = {89--96},
  year      = {2005},
  doi       = {10.1145/1102351.1102363},
}

@inproceedings{lin2024rankingloss,
  title     = {Understanding the Ranking Loss for Recommendation with Sparse User Feedback},
  author    = {Lin, Zhutian and Pan, Junwei and Zhang, Shangyu and Wang, Ximei and Xiao, Xi and Huang, Shudong and
               Xiao, Lei and Jiang, Jie},
  booktitle = {Proceedings of the 30th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year      = {2024},
  note      = {arXiv:2403.14144},
}

@inproceedings{bai2023listce,
  title     = {Regression Compatible Listwise Objectives for Calibrated Ranking with Binary Relevance},
  author    = {Bai, Aijun and Jagerman, Rolf and Qin, Zhen and Yan, Le and Kar, Pratyush and Lin, Bing-Rong and
               Wang, Xuanhui and Bendersky, Michael and Najork, Marc},
  booktitle = {Proceedings of the 32nd ACM International Conference on Information and Knowledge Management},
  year      = {2023},
  note      = {arXiv:2211.01494},
}

@inproceedings{sheng2023jrc,
  title     = {Joint Optimization of Ranking and Calibration with Contextualized Hybrid Model},
  author    = {Sheng, Xiang-Rong and Gao, Jingyue and Cheng, Yueyao and Yang, Siran and Han, Shuguang and Deng, Hongbo and
               Jiang, Yuning and Xu, Jian and Zheng, Bo},
  booktitle = {Proceedings of the 29th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year      = {2023},
  note      = {arXiv:2208.06164},
}
"""


@dataclass(frozen=True)
class Ranking:
    """A ranking loss of binary tasks, added to each task's own objective.

    Args:
        form: ``pair``, ``list``, ``listce`` or ``jrc``, as in the module's docstring.
        within: which rows are ranked against each other: those of the batch, or of one user, request or domain in it.
        weight: of this loss beside the task's own.
        tasks: binary tasks that are ranked; empty: all of them.
        pairs: of ``pair``: above so many, so many are drawn.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["ranking"] = field(default="ranking", kw_only=True)
    form: Literal["pair", "list", "listce", "jrc"] = "pair"
    within: Literal["batch", "user", "request", "domain"] = "batch"
    weight: float = 1.0
    tasks: tuple[str, ...] = ()
    pairs: int = 200_000

    def __post_init__(self) -> None:
        require_weight(self.weight)
        if self.pairs < 1:
            raise ValueError(f"Parameter `pairs` should be at least 1. Found {self.pairs}.")

    @property
    def cites(self) -> tuple[str, ...]:
        """Keys of the papers of its form."""
        of_form = {"pair": ("burges2005ranknet", "lin2024rankingloss"), "list": ("lin2024rankingloss",),
                   "listce": ("bai2023listce",), "jrc": ("sheng2023jrc",)}  # fmt: skip
        return of_form[self.form]

    def bind(self, schema: Schema) -> BoundRanking:
        """The term for the tasks of a schema.  Raises ValueError if `tasks` names others, or there is no binary task."""
        binary = [task for task in schema.tasks if task.kind == "binary"]
        names = [task.name for task in binary]
        if not names or not set(self.tasks) <= set(names):
            raise ValueError(
                f"`tasks` of loss `ranking` should be among the binary ones, {names}. Found {list(self.tasks)}."
            )
        return BoundRanking(self, tuple(task for task in binary if not self.tasks or task.name in self.tasks))


@dataclass(frozen=True)
class BoundRanking:
    """See `Ranking`."""

    config: Ranking
    tasks: tuple[Task, ...]
    relative: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        """The extras that it reads."""
        return tuple(f"heads.two.{task.name}" for task in self.tasks) if self.config.form == "jrc" else ()

    @property
    def reads(self) -> tuple[str, ...]:
        """What the data must declare of each row."""
        return () if self.config.within == "batch" else (self.config.within,)

    @property
    def objectives(self) -> tuple[str, ...]:
        """All that its losses may be called."""
        return tuple(task.name for task in self.tasks)

    @property
    def trains(self) -> tuple[str, ...]:
        """Whose logits it trains."""
        return self.objectives

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        """objective -> scalar, for the tasks that some context of the batch shows both classes of."""
        losses = {}
        for place, task in enumerate(self.tasks):
            lists = lists_of(task, batch, self.config.within)
            if lists is not None:
                losses[task.name] = self._loss(task, output, lists, (step, place)) * self.config.weight
        return losses

    def _loss(self, task: Task, output: Output, lists: Lists, seed: tuple[int, int]) -> Tensor:
        z = output.logits[task.name][lists.rows]
        if self.config.form == "pair":
            return pair_loss(z, lists, self.config.pairs, seed)
        if self.config.form == "jrc":
            both = output.extras[f"heads.two.{task.name}"][lists.rows]
            of_negative, of_positive = (list_losses(part, lists) for part in both.unbind(1))
            return context_mean(torch.where(lists.positive, of_positive, of_negative), lists, lists.mass)
        losses = list_losses(z if self.config.form == "list" else F.logsigmoid(z), lists)
        return context_mean(losses, lists, lists.mass * lists.positive)


@dataclass(frozen=True)
class Lists:
    """The n rows of the C contexts that have both classes.

    Args:
        rows: (n,) int64, where they stand in the batch; context: (n,) int64 in [0, C); positive: (n,) bool.
        mass: (n,) how many rows of the full log each stands for.
        count: C.
    """

    rows: Tensor
    context: Tensor
    positive: Tensor
    mass: Tensor
    count: int


def lists_of(task: Task, batch: Batch, within: str) -> Lists | None:
    """The contexts of a task in a batch, None if none has both classes.  Raises ValueError if the batch has no such contexts."""
    key = _keys(batch, within)
    weight = torch.ones_like(batch.row, dtype=torch.float32) if batch.weight is None else batch.weight
    rows = (batch.observed[task.name] & (weight > 0) & (key >= 0)).nonzero().squeeze(1)
    positive, mass = batch.labels[task.name][rows] == 1, weight[rows]
    rate = batch.meta.get(f"sampling_rate.{task.name}")
    if rate is not None:
        mass = torch.where(positive, mass, mass / rate[rows])
    context = torch.unique(key[rows], return_inverse=True)[1]
    ones, zeros = (torch.bincount(context[side], minlength=len(rows)) for side in (positive, ~positive))
    both = (ones > 0) & (zeros > 0)
    kept = both[context].nonzero().squeeze(1)
    if len(kept) == 0:
        return None
    number = both.cumsum(0) - 1
    return Lists(rows[kept], number[context[kept]], positive[kept], mass[kept], int(both.sum()))


def _keys(batch: Batch, within: str) -> Tensor:
    """(B,) int64, equal for rows of one context and negative for those of none.  Requests nest in users, as in metrics."""
    if within == "batch":
        return torch.zeros_like(batch.row)
    if within == "domain":
        return batch.domain
    if within not in batch.meta:
        raise ValueError(f"Loss `ranking` within each {within} needs `data.{within}`, which the data do not declare.")
    user = batch.meta.get("user")
    if within == "user":
        assert user is not None
        return torch.where(user == 0, -1, torch.unique(user, return_inverse=True)[1])  # 0: a row of no user
    codes = request_codes(batch.meta["request"].cpu().numpy(), None if user is None else user.cpu().numpy())
    return torch.from_numpy(codes).to(batch.row.device)


def sums(values: Tensor, lists: Lists) -> Tensor:
    """(C,) sum of (n,) values in each context."""
    return values.new_zeros(lists.count).index_add(0, lists.context, values)


def context_mean(losses: Tensor, lists: Lists, weights: Tensor) -> Tensor:
    """Mean over contexts of the weighted mean of (n,) losses in each."""
    weights = weights.to(losses.dtype)
    return (sums(losses * weights, lists) / sums(weights, lists)).mean()


def list_losses(scores: Tensor, lists: Lists) -> Tensor:
    """(n,) minus the logarithm of each row's share in its context's mass of exp(score), times its mass."""
    exponents = scores + lists.mass.to(scores.dtype).log()
    top = exponents.new_full((lists.count,), -torch.inf)
    top = top.scatter_reduce(0, lists.context, exponents.detach(), "amax")  # only keeps exp() in range
    total = top + sums((exponents - top[lists.context]).exp(), lists).log()
    return total[lists.context] - scores


def pair_loss(z: Tensor, lists: Lists, cap: int, seed: tuple[int, ...]) -> Tensor:
    """Mean over contexts of the weighted mean of softplus(z_j - z_i) over their pairs of a positive i and a negative j.

    Args:
        z: (n,) logits; cap: above so many pairs, so many are drawn; seed: of the draw.
    """
    order = lists.context.argsort(stable=True)
    sides = [order[side[order]] for side in (lists.positive, ~lists.positive)]
    counts = [torch.bincount(lists.context[side], minlength=lists.count) for side in sides]
    if int((counts[0] * counts[1]).sum()) > cap:
        i, j = draw(sides, counts, lists, cap, seed)
        return softplus_of(z, i, j).mean()
    repeats = counts[1][lists.context[sides[0]]]  # how many negatives each positive meets
    i = sides[0].repeat_interleave(repeats)
    first = (counts[1].cumsum(0) - counts[1])[lists.context[i]]  # of its context, among the negatives
    within = torch.arange(len(i), device=i.device) - (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
    j = sides[1][first + within]
    mass = lists.mass.to(z.dtype)
    ones, zeros = (sums(mass * side, lists)[lists.context] for side in (lists.positive, ~lists.positive))
    share = mass / torch.where(lists.positive, ones, zeros)  # of its side; the product of two masses could round to 0
    return (softplus_of(z, i, j) * share[i] * share[j]).sum() / lists.count


def softplus_of(z: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """softplus(z_j - z_i) of many pairs; the gradient of ``index_select`` is cheaper than that of ``z[j]``."""
    return F.softplus(z.index_select(0, j) - z.index_select(0, i))


def draw(
    sides: list[Tensor], counts: list[Tensor], lists: Lists, number: int, seed: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """(number,) positives and as many negatives of the same contexts, drawn with replacement.

    Args:
        sides: positives and negatives in the order of their contexts; counts: (C,) of each.
    """
    uniform = torch.from_numpy(np.random.default_rng(seed).random((3, number))).to(lists.mass.device)
    context = (uniform[0] * lists.count).long().clamp(max=lists.count - 1)
    drawn = []
    for side, count, u in zip(sides, counts, uniform[1:], strict=True):
        mass = lists.mass[side].double().cumsum(0)
        last = count.cumsum(0) - 1
        before = F.pad(mass[last], (1, 0))[:-1]  # mass of all contexts before one
        goal = before[context] + u * (mass[last] - before)[context]
        found = torch.searchsorted(mass, goal, right=True)
        drawn.append(side[torch.minimum(torch.maximum(found, (last - count + 1)[context]), last[context])])  # rounding
    return drawn[0], drawn[1]
