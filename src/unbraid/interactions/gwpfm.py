"""GwPFM: products of fields whose vectors have one part per partner group, with a weight per pair of groups.

Paper: "Ads Recommendation in a Collapsed and Entangled World", Pan, Xue, Wang, Yu, Liu, Quan, Qiu, Liu, Xiao, Jiang, KDD
2024, https://arxiv.org/abs/2403.00793.  Field-aware factorization machines, where every field is a group of its own:
"Field-aware Factorization Machines for CTR Prediction", Juan, Zhuang, Chin, Lin, RecSys 2016,
https://doi.org/10.1145/2959100.2959134.

Idea: in a factorization machine every partner pulls at the same vector, and a partner of few values pulls it into few
directions.  A vector per partner field (FFM) is too much memory, so fields are put into G groups, and a value has one vector
per partner *group*.  With P(i) the group of field i, e_(i,g) (B, k) its vector for partners in group g::

    sum_(i<j) r_(P(i),P(j)) e_(i,P(j)) * e_(j,P(i))

No loop over pairs of fields: with S_(g,h) = sum of e_(i,h) over the fields i of g, two groups give S_(g,h) * S_(h,g), and
within a group (S_(g,g)^2 - sum of e_(i,g)^2) / 2.  One group and r = 1 is FM; as many groups as fields and r = 1 is FFM.

How this differs: the paper's body was not at hand, so the sum above is from descriptions of it, and the rest is our design.
One table of width G k is read as G tables of width k: the G parts of a vector, by the groups' names in order.  Fields of other
widths are brought to that of the tables by a linear map.  r starts at 1.  The products stay vectors, or come apart by pair of
groups, or are added up to the one number of the formula (``pooled``).  Without groups, all fields are one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Literal

import torch
from torch import Tensor, nn

from unbraid.interactions.pairs import Pairwise, PairwiseModule

BIBTEX = """
@inproceedings{pan2024ads,
  title     = {Ads Recommendation in a Collapsed and Entangled World},
  author    = {Pan, Junwei and Xue, Wei and Wang, Ximei and Yu, Haibin and Liu, Xun and Quan, Shijie and Qiu, Xueming and
               Liu, Dapeng and Xiao, Lei and Jiang, Jie},
  booktitle = {Proceedings of the 30th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year      = {2024},
  eprint    = {2403.00793},
  archiveprefix = {arXiv},
}
"""


class GwPFMModule(PairwiseModule):
    """Module of `GwPFM`; ``weights`` (pairs,) holds r in the order of ``pairs``, (group, group) names.

    Attributes:
        groups: group -> its fields, by name, as equal configs are equal models; fields that no group names are those of
            group ``""``, the last.
        pairs: pairs of groups that have a pair of fields.
        width: k, 1 or pairs times k, and the sum of the fields' widths where ``flat``.
    """

    member: Tensor
    part: Tensor
    one: Tensor
    two: Tensor
    within: Tensor
    scale: Tensor

    def __init__(self, config: GwPFM, widths: Mapping[str, int]) -> None:
        super().__init__(config, widths, config.kind)
        self.groups, self.pooled = config.of(widths), config.pooled
        if self.common % len(self.groups):
            rest = ", one of them for the fields that no group names" if "" in self.groups else ""
            raise ValueError(
                f"Interaction `gwpfm` cuts vectors into one part per group: their width should be divisible by "
                f"{len(self.groups)} (groups{rest}). Found {self.common}."
            )
        self.k = self.common // len(self.groups)
        names, sizes = list(self.groups), [len(fields) for fields in self.groups.values()]
        order = combinations_with_replacement(range(len(names)), 2)
        pairs = torch.tensor([(g, h) for g, h in order if g != h or sizes[g] > 1])
        self.pairs = [(names[g], names[h]) for g, h in pairs.tolist()]
        part = {name: g for g, fields in enumerate(self.groups.values()) for name in fields}
        self._keep("part", torch.tensor([part[name] for name in self.fields]))  # (F,) a field's group
        self._keep("member", nn.functional.one_hot(self.part, len(names)).T.to(torch.get_default_dtype()))  # (G, F)
        self._keep("one", pairs[:, 0])
        self._keep("two", pairs[:, 1])
        within = (self.one == self.two).unsqueeze(1)  # pairs of a group with itself ..
        self._keep("within", within.to(self.member.dtype))
        self._keep("scale", torch.where(within, 0.5, 1.0))  # .. count every product twice
        self.weights = nn.Parameter(torch.ones(len(pairs)))
        self.width += {"vector": self.k, "scalar": 1, "pairs": len(pairs) * self.k}[config.pooled]

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def interact(self, e: Tensor) -> Tensor:
        """(B, F, G k) becomes (B, k), (B, 1) or (B, pairs k)."""
        rows, groups = e.shape[0], len(self.groups)
        sums = (self.member @ e).view(rows, groups, groups, self.k)  # S, by group and partner group
        products = sums[:, self.one, self.two] * sums[:, self.two, self.one]  # (B, pairs, k)
        own = e.view(rows, -1, groups, self.k)[:, torch.arange(e.shape[1], device=e.device), self.part]  # e_(i,P(i))
        squares = self.member @ own.square()  # by group
        products = products - self.within * squares[:, self.one]
        products = products * (self.scale * self.weights.unsqueeze(1))
        if self.pooled == "pairs":
            return products.flatten(1)
        summed = products.sum(1)
        return summed.sum(1, keepdim=True) if self.pooled == "scalar" else summed


@dataclass(frozen=True)
class GwPFM(Pairwise):
    """Products of fields with a part of the vector per partner group and a weight per pair of groups, added up.

    Args:
        width: as in `Pairwise`; divisible by the number of groups.
        groups: group -> fields of a view: features, and ``HISTORY.FIELD`` for what a history gives.  Fields that no group
            names are one group more.  Empty: all fields are one group.
        pooled: ``vector`` adds up over pairs of groups, ``scalar`` also over entries, ``pairs`` keeps pairs side by side.
    """

    kind: Literal["gwpfm"] = field(default="gwpfm", kw_only=True)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pooled: Literal["vector", "scalar", "pairs"] = "vector"

    def __post_init__(self) -> None:
        super().__post_init__()
        if empty := [name for name, fields in self.groups.items() if not name or not fields]:
            raise ValueError(f"A group of `groups` should have a name and a field. Found {empty}.")
        twice = [name for name, n in Counter(f for fields in self.groups.values() for f in fields).items() if n > 1]
        if twice:
            raise ValueError(f"A field should be in one group of `groups`. Found several times: {', '.join(twice)}.")

    def of(self, widths: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
        """Group -> its fields by name, then the rest under ``""``.  Raises ValueError for fields that the view does not have."""
        named = [name for fields in self.groups.values() for name in fields]
        if unknown := [name for name in named if name not in widths]:
            raise ValueError(f"`groups` names {', '.join(unknown)}. Fields of the view: {', '.join(widths)}.")
        rest = tuple(name for name in widths if name not in named)
        return {**dict(sorted(self.groups.items())), **({"": rest} if rest else {})}

    def build(self, widths: Mapping[str, int]) -> GwPFMModule:
        """The module for fields of the given widths.

        Raises:
            ValueError: fewer than two fields; groups with fields that the view does not have; a width that the number of
                groups does not divide.
        """
        return GwPFMModule(self, widths)
