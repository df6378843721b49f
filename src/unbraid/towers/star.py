"""STAR: star topology adaptive recommender, one network whose layers every domain multiplies by factors of its own.

Paper: "One Model to Serve All: Star Topology Adaptive Recommender for Multi-Domain CTR Prediction", Sheng, Zhao, Zhou, Ding,
Dai, Luo, Yang, Lv, Zhang, Deng, Zhu, CIKM 2021, https://arxiv.org/abs/2101.11427.

Idea: what domains have in common is in the shared weights, which rows of all domains train; what is particular to domain t
is how it bends them.  A row x of domain t reads::

    x'       = (gamma gamma_t) (x - m_t) / sqrt(v_t + eps) + beta + beta_t      m_t, v_t: statistics of the domain's rows
    h_l      = relu((W_l * W_l,t) h_{l-1} + b_l + b_l,t)                        h_0 = x'; * is elementwise
    a        = relu(network(domain indicator))                                  the auxiliary network
    hidden^k = [tower^k(h_L), a]

The head on hidden^k is linear, so that it *adds* the auxiliary network's logit to the main one: the network's last layer, one
per task, is in the head.

Factors W_t and gamma_t begin at 1 and offsets b_t and beta_t at 0: at first all domains have one shared bottom.  They are kept
as W_t - 1, so that weight decay pulls a domain towards what is shared and not towards 0.

In training a domain is normalised by the mean and variance of its rows in the batch, and running averages of them (as torch's
batch normalisation keeps) serve evaluation, and domains with fewer than two rows.  A domain without a counted row in the batch
(one that is observed for some task) moves nothing of its own: no factor, no optimiser state, no statistic.

A row whose domain training did not know, or is missing, reads the shared weights with the mean of all domains' factors,
offsets and indicators, is normalised by the running statistics of all domains' rows in equal parts, and writes what is shared
alone.

How this differs:

- The paper's body was not read for this: normalisation, products and the auxiliary network are as known second-hand and from
  memory, that the normalisation stands on the input and nowhere else among it.
- The auxiliary network reads the domain alone.  As we remember it, the paper's reads the other features, too:
  ``auxiliary_reads = "all"``.
- Several tasks, tasks' towers, missing and unknown domains, and W_t - 1 are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbraid import parallel
from unbraid.layers import by_domain, mlp, mlp_width, require_positive, task_key
from unbraid.normalise import sums_by
from unbraid.slots import TowerOutput
from unbraid.towers.mlp import BottomAndTower, one_width, side_by_side, task_towers
from unbraid.types import FIRST_VALUE

BIBTEX = """
@inproceedings{sheng2021star,
  title     = {One Model to Serve All: Star Topology Adaptive Recommender for Multi-Domain {CTR} Prediction},
  author    = {Sheng, Xiang-Rong and Zhao, Liqin and Zhou, Guorui and Ding, Xinyao and Dai, Binding and Luo, Qiang and
               Yang, Siran and Lv, Jingshan and Zhang, Chi and Deng, Hongbo and Zhu, Xiaoqiang},
  booktitle = {Proceedings of the 30th ACM International Conference on Information and Knowledge Management},
  pages     = {4104--4113},
  year      = {2021},
  note      = {arXiv:2101.11427},
}
"""

FEWEST = 2  # rows of a domain in a batch; one has no variance
MOMENTUM, EPS = 0.1, 1e-5  # those of torch's batch normalisation


class StarTower(nn.Module):
    """Module of `STAR`.

    Attributes:
        widths: task -> H, that of its tower and of the auxiliary network together.
        own: what each known domain has, in the order of codes.
    """

    reads_domain = True

    def __init__(self, config: STAR, tasks: Sequence[str], width: int, domains: int) -> None:
        super().__init__()
        sizes = (width, *config.bottom)
        self.normalised = config.norm == "partitioned"
        if self.normalised:
            self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(sizes, config.bottom, strict=False)
        )
        self.dropout = nn.Dropout(config.dropout)
        first, *rest = config.auxiliary or (0,)
        self.features = nn.Linear(width, first) if first and config.auxiliary_reads == "all" else None
        self.auxiliary = mlp(first, rest, config.dropout) if first else None
        self.own = nn.ModuleList(_Domain(sizes, self.normalised, first, domains) for _ in range(domains))
        self.towers = task_towers(tasks, sizes[-1], config.tower, config.dropout)
        self.widths = dict.fromkeys(tasks, mlp_width(sizes[-1], config.tower) + mlp_width(first, rest))

    def forward(self, hidden: Sequence[Tensor], domain: Tensor, counted: Tensor) -> TowerOutput:
        """One (B, width) view, domain codes (B,) and which rows count (B,) bool, become task -> (B, H).

        The trunk is the bottom's output (B, ``bottom[-1]``), each row's by its own domain's weights.
        """
        x = side_by_side(hidden)
        common = None
        if self.normalised and self.training and parallel.world() > 1:
            common = _Common(x, domain, counted, len(self.own) + FIRST_VALUE)

        def of(code: int, mine: Tensor) -> tuple[Tensor, Tensor]:
            own = self._of(code)
            live = not self.training or code < FIRST_VALUE or bool(counted[mine].any())
            if common is None:
                state = self._bottom(x[mine], own, live and code >= FIRST_VALUE)
            else:
                state = self._layers(common.normalised(self, x[mine], own, code), own)
            aside = self._aside(x[mine], own)
            # a gradient of zeros would move them by their momentum
            return (state, aside) if live else (state.detach(), aside.detach())

        z, a = by_domain(domain, len(self.own) + FIRST_VALUE, of)
        if common is not None:
            common.note(self.own)
            z = z + common.zero()
        found = {task: self.towers[task_key(task)](z) for task in self.widths}
        return TowerOutput({task: torch.cat([h, a], 1) if a.shape[1] else h for task, h in found.items()}, z, {})

    def _of(self, code: int) -> dict[str, Tensor]:
        """Name -> what a domain has of its own, the live tensors; of a domain that is not known what all have in the mean."""
        if code >= FIRST_VALUE:
            return _named(self.own[code - FIRST_VALUE])
        parts = [_named(part) for part in self.own]
        mean = {name: torch.stack([part[name] for part in parts]).mean(0).detach() for name in parts[0]}
        if self.normalised:  # of the domains' rows together: variances within and between
            mean["var"] = mean["var"] + torch.stack([part["mean"] for part in parts]).var(0, correction=0)
        return mean

    def _bottom(self, x: Tensor, own: dict[str, Tensor], learns: bool) -> Tensor:
        """(n, width) rows of one domain -> (n, bottom[-1]).  ``learns``: may the domain's statistics move?"""
        if self.normalised:
            gamma, beta = self.gamma * (1 + own["gamma"]), self.beta + own["beta"]
            batch = self.training and learns and len(x) >= FEWEST
            x = F.batch_norm(x, own["mean"], own["var"], gamma, beta, batch, MOMENTUM, EPS)
        return self._layers(x, own)

    def _layers(self, x: Tensor, own: dict[str, Tensor]) -> Tensor:
        """(n, width) normalised rows of one domain -> (n, bottom[-1])."""
        for place, layer in enumerate(self.layers):
            weight, bias = layer.weight, layer.bias
            x = F.linear(x, weight * (1 + own[f"factors.{place}"]), bias + own[f"biases.{place}"])  # type: ignore[operator]
            x = self.dropout(F.relu(x))
        return x

    def _aside(self, x: Tensor, own: dict[str, Tensor]) -> Tensor:
        """(n, auxiliary[-1]) of the auxiliary network, (n, 0) without one."""
        if self.auxiliary is None:
            return x[:, :0]
        first = own["indicator"].expand(x.shape[0], -1)
        found: Tensor = self.auxiliary(F.relu(first if self.features is None else first + self.features(x)))
        return found


class _Common:
    """Statistics by domain over the rows of all processes that share a batch.

    Args:
        x: (n, width) this process's rows; domain, counted: as in `StarTower.forward`; codes: how many there are.
    """

    def __init__(self, x: Tensor, domain: Tensor, counted: Tensor, codes: int) -> None:
        found = sums_by(torch.cat([x, torch.ones_like(x[:, :1]), counted.to(x.dtype).unsqueeze(1)], 1), domain, codes)
        self.count = found[:, -2:-1].detach()
        self.learns = ((found[:, -1] > 0) & (self.count[:, 0] >= FEWEST)).tolist()
        self.learns[:FIRST_VALUE] = [False] * FIRST_VALUE
        self.mean = found[:, :-2] / self.count.clamp(min=1)
        self.var = sums_by((x - self.mean[domain]).square(), domain, codes) / self.count.clamp(min=1)

    def normalised(self, tower: StarTower, x: Tensor, own: dict[str, Tensor], code: int) -> Tensor:
        """(n, width) rows of one domain, by its statistics in the batch if it learns, else by the running ones."""
        mean, var = (self.mean[code], self.var[code]) if self.learns[code] else (own["mean"], own["var"])
        return (x - mean) * (var + EPS).rsqrt() * (tower.gamma * (1 + own["gamma"])) + tower.beta + own["beta"]

    @torch.no_grad()
    def note(self, domains: Iterable[nn.Module]) -> None:
        """Move the running statistics of the domains that learn."""
        for code, part in enumerate(domains, FIRST_VALUE):
            if self.learns[code]:
                kept = _named(part)
                kept["mean"].lerp_(self.mean[code], MOMENTUM)
                kept["var"].lerp_(self.var[code] * (self.count[code] / (self.count[code] - 1)), MOMENTUM)

    def zero(self) -> Tensor:
        """0, through the sums of all processes: each must go through them backwards, also one without a row of a domain."""
        return (self.mean.sum() + self.var.sum()) * 0


class _Domain(nn.Module):
    """What one domain has of its own: factors of weights less 1, offsets, its indicator's vector, its statistics."""

    def __init__(self, sizes: Sequence[int], normalised: bool, indicator: int, domains: int) -> None:
        super().__init__()
        pairs = list(zip(sizes, sizes[1:], strict=False))
        self.factors = nn.ParameterList(nn.Parameter(torch.zeros(after, before)) for before, after in pairs)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(after)) for _, after in pairs)
        if normalised:
            self.gamma, self.beta = nn.Parameter(torch.zeros(sizes[0])), nn.Parameter(torch.zeros(sizes[0]))
            self.register_buffer("mean", torch.zeros(sizes[0]))
            self.register_buffer("var", torch.ones(sizes[0]))
        if indicator:  # a row of the first layer's weights on a one-hot of domains: Xavier's spread, as everywhere
            self.indicator = nn.Parameter(torch.randn(indicator) * math.sqrt(2 / (domains + indicator)))


def _named(part: nn.Module) -> dict[str, Tensor]:
    return {**dict(part.named_parameters()), **dict(part.named_buffers())}


@dataclass(frozen=True)
class STAR(BottomAndTower):
    """A shared bottom that every domain multiplies by factors of its own, then a small MLP per task.

    Args:
        bottom, tower, dropout: as in `BottomAndTower`.
        norm: of the input: by each domain's own statistics and its own scale and shift, or none.
        auxiliary: widths of the layers of the auxiliary network, whose last one is in the head; empty: there is none.
        auxiliary_reads: the domain's indicator, or the input too.

    Raises:
        ValueError: a width is not positive.
    """

    reads_domains: ClassVar[bool] = True
    kind: Literal["star"] = field(default="star", kw_only=True)
    norm: Literal["partitioned", "none"] = "partitioned"
    auxiliary: tuple[int, ...] = (16,)
    auxiliary_reads: Literal["domain", "all"] = "domain"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(auxiliary=self.auxiliary)

    def build(self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int], domains: int = 1) -> StarTower:
        """The module for these tasks and so many known domains.

        Raises:
            ValueError: views belong to tasks, or there is no known domain.
        """
        if domains < 1:
            raise ValueError(
                "Tower `star` has weights per domain and needs a known one. Found none in the training split."
            )
        return StarTower(self, tasks, one_width(self.kind, tasks, views, widths), domains)
