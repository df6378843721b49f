"""SDIM: events that collide with the row's item under random hashes are summed; the sums stand for attention.

Paper: "Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction", Cao, Zhou, Feng, Huang, Xiao,
Chen, Chen, CIKM 2022, arXiv 2205.10249.  Everything said here about it is from memory of the paper, not checked against it.

Idea: attention asks how near an event is to the row's item.  Whether some bits of their sign hashes agree is a sample of the
answer, without a product or a softmax, and with no event left out by a search.  With code_g the g-th group of tau of the m
bits (`unbraid.encoders.hashing`), e(i) the event's vectors of the fields that the row has, q the row's own and r(i) the
event's vectors of all fields, end to end::

    S_g = {i : code_g(e(i)) = code_g(q)}
    u   = tau / m  sum_g  l2(sum_{i in S_g} r(i)),       l2(x) = x / |x|, and l2(0) = 0

An event at an angle to q is in S_g with probability (1 - angle / pi)^tau: before normalisation that is its expected weight.
A gradient reaches the tables through the sums; the hash has none, and nothing reaches q but by target-aware outputs.

How this differs:

- m = 48 and tau = 3 are defaults of which we are not sure.
- The length is that of all event fields' sums together, since the paper's event is one vector; u is then cut into fields.
- ``target_aware`` adds u * q of the fields that the row has, as for the other encoders of long histories.
- The hash is of the tables as they are at each read; the paper's server stores the sums of every code beforehand.
- Event fields that the row has not are no part of the hash, but are summed.  In a history without a field that the row has
  all events collide: u is the direction of their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.encoders.hashing import WORD, SignHash
from unbraid.encoders.packed import Listed, pool
from unbraid.encoders.search import Kept, Part
from unbraid.encoders.searched import Reads, Targets
from unbraid.layers import require_positive
from unbraid.types import FORBID, Ragged, Rows

BIBTEX = """
@inproceedings{cao2022sdim,
  title     = {Sampling Is All You Need on Modeling Long-Term User Behaviors for {CTR} Prediction},
  author    = {Cao, Yue and Zhou, Xiaojiang and Feng, Jiaqi and Huang, Peihao and Xiao, Yao and Chen, Dayao and Chen, Sheng},
  booktitle = {Proceedings of the 31st {ACM} International Conference on Information and Knowledge Management},
  year      = {2022},
}
"""

TINY = 1e-24  # a sum whose square is below it has no direction: it gives zeros, and no gradient


@dataclass(frozen=True)
class SDIM:
    """Normalised sums of the events that collide with the row's item, averaged over groups of hash bits.

    Args:
        bits: m, of all groups together; a multiple of ``group``.
        group: tau, bits that must agree.
        target_aware: give ``u * q`` of the fields that the row has; pooled: give ``u``.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["sdim"] = field(default="sdim", kw_only=True)
    bits: int = 48
    group: int = 3
    target_aware: bool = True
    pooled: bool = True

    needs_target: ClassVar[bool] = True  # of at least one history, or nothing is compared

    def __post_init__(self) -> None:
        require_positive(bits=self.bits, group=self.group)
        if self.group >= WORD:
            raise ValueError(f"Parameter `group` should be less than {WORD}. Found {self.group}.")
        if self.bits % self.group:
            raise ValueError(
                f"Parameter `bits` should be a multiple of `group`, which is {self.group}. Found {self.bits}."
            )
        if not (self.pooled or self.target_aware):
            raise ValueError("One of `pooled` and `target_aware` should be true. Found neither.")

    def build(self, widths: Mapping[str, int], targets: Mapping[str, int]) -> SDIMHistory:
        """widths: event field -> D; targets: the event fields that the row has, too."""
        return SDIMHistory(self, widths, targets)


class SDIMHistory(nn.Module):
    """See the module's docstring.

    Attributes:
        widths: output field -> D.
    """

    def __init__(self, config: SDIM, widths: Mapping[str, int], targets: Mapping[str, int]) -> None:
        super().__init__()
        self.bits, self.group = config.bits, config.group
        self.fields, self.targets = tuple(widths), tuple(targets)
        both = {**{n: w for n, w in widths.items() if config.pooled},
                **{f"{n}.product": widths[n] for n in targets if config.target_aware}}  # fmt: skip
        self.widths = both or dict(widths)
        self.hash = SignHash([widths[name] for name in targets], config.bits, config.group)

    def forward(self, events: Reads, history: Ragged, target: Targets) -> dict[str, Tensor]:
        """events: role -> event field -> N reads; target: role -> event field -> (B, D) of the row itself.

        Returns:
            output field -> (B, D).  A row without a colliding event has zeros.
        """
        reads, own = events["value"], target["value"]
        asked = [Part(reads[name], own[name]) for name in self.targets]
        if isinstance(history, Listed):
            total = self._at_once(reads, asked, history)
        else:
            total = self._one_by_one(reads, asked, history)
        mean = {name: x * (self.group / self.bits) for name, x in zip(self.fields, total, strict=True)}
        found = {**mean, **{f"{name}.product": mean[name] * own[name] for name in self.targets}}
        return {name: found[name] for name in self.widths}

    def _one_by_one(self, reads: Mapping[str, Rows], asked: Sequence[Part], history: Ragged) -> list[Tensor]:
        """(B, D) per field: the sum over groups of the normalised sums."""
        total: list[Tensor] = []
        for kept in self.collisions(asked, history):
            ones = reads[self.fields[0]].vectors.new_ones(len(kept.index))
            sums = [pool(kept.of(reads[name]), ones, kept.lists) for name in self.fields]
            total = [a + b for a, b in zip(total, _unit(sums), strict=True)] if total else _unit(sums)
        return total

    def _at_once(self, reads: Mapping[str, Rows], asked: Sequence[Part], history: Listed) -> list[Tensor]:
        """As `_one_by_one`, of (N, groups, D) values, so that a graph does not hold its steps once per group."""
        different = self.hash.differing_bits(asked, history)
        same = ~different.view(-1, self.bits // self.group, self.group).any(2, keepdim=True)
        units = _unit([history.sum(reads[name].gather().unsqueeze(1) * same) for name in self.fields])
        return [x.sum(1) for x in units]

    @torch.no_grad()
    def collisions(self, asked: Sequence[Part], history: Ragged) -> Iterator[Kept]:
        """For each group of bits, the events that agree with their row's query (``asked``) in all of them."""
        words = self.hash.differing(asked, history)
        mask, per_word = (1 << self.group) - 1, self.hash.word // self.group
        for at in range(self.bits // self.group):
            word = words[at // per_word if asked else 0]
            yield Kept.marked(((word >> (at % per_word * self.group)) & mask) == 0, history)


def _unit(sums: Sequence[Tensor]) -> list[Tensor]:
    """Fields' (.., D) divided by the length of all of them together."""
    squares = torch.stack([x.square().sum(-1) for x in sums]).sum(0)
    factor = torch.where(squares > TINY, squares.clamp(min=TINY).rsqrt(), 0.0).unsqueeze(-1)
    return [x * factor for x in sums]
