"""Cross: explicit products of features, one degree more per layer (DCN V2).

Paper: "DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems", Wang,
Shivanna, Cheng, Jain, Lin, Hong, Chi, WWW 2021, https://doi.org/10.1145/3442381.3450078,
https://arxiv.org/abs/2008.13535.

Idea: an MLP on concatenated vectors finds products of features only slowly.  Here every layer multiplies the input once
more, entry by entry, by a linear function of what it has so far.  With x_0 (B, d) the fields side by side::

    x_(l+1) = x_0 * (W_l x_l + b_l) + x_l              W_l (d, d), or U_l V_l with V_l (rank, d), U_l (d, rank)

so x_l holds products of up to l + 1 features, and the width stays d.  Zero weights and biases give the identity.

How this differs from the paper: this is the *stacked* structure, the tower reads x_L; the parallel one (the tower reads
x_0, and the head both) is not here, nor is the mixture of low-rank experts.  The first weights are the library's
(Xavier-normal, zero bias).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.interactions.flat import FlatModule
from unbraid.layers import require_positive
from unbraid.types import FORBID

BIBTEX = """
@inproceedings{wang2021dcnv2,
  title     = {{DCN} {V2}: Improved Deep \\& Cross Network and Practical Lessons for Web-scale Learning to Rank Systems},
  author    = {Wang, Ruoxi and Shivanna, Rakesh and Cheng, Derek and Jain, Sagar and Lin, Dong and Hong, Lichan and
               Chi, Ed},
  booktitle = {Proceedings of the Web Conference 2021},
  pages     = {1785--1797},
  year      = {2021},
  doi       = {10.1145/3442381.3450078},
  eprint    = {2008.13535},
  archiveprefix = {arXiv},
}
"""


def product(width: int, rank: int) -> nn.Module:
    """W x + b, or U V x + b where a rank is given: (B, width) -> (B, width)."""
    if rank == 0:
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))


class CrossModule(FlatModule):
    """Module of `Cross`.

    Attributes:
        width: width of the result, the sum of all fields' D.
    """

    compiles = True  # `unbraid.train.dense`

    def __init__(self, config: Cross, widths: Mapping[str, int]) -> None:
        super().__init__(widths)
        self.layers = nn.ModuleList(product(self.width, config.rank) for _ in range(config.layers))

    def forward(self, view: Mapping[str, Tensor]) -> Tensor:
        """field -> (B, D) becomes (B, width).  Fields it was not built with are ignored; a missing one: KeyError."""
        x = first = super().forward(view)
        for layer in self.layers:
            x = torch.addcmul(x, first, layer(x))
        return x


@dataclass(frozen=True)
class Cross:
    """Cross layers over all fields of a view.

    Args:
        layers: how many; products of up to ``layers`` + 1 features.
        rank: of each layer's matrix; 0 for a full one.  A full layer has d^2 + d parameters per view, one of rank r
            2 d r + d, where d is the sum of the fields' widths.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["cross"] = field(default="cross", kw_only=True)
    layers: int = 2
    rank: int = 0

    def __post_init__(self) -> None:
        require_positive(layers=self.layers)
        if self.rank < 0:
            raise ValueError(f"Parameter `rank` should not be negative. Found {self.rank}.")

    def build(self, widths: Mapping[str, int]) -> CrossModule:
        """The module for fields of the given widths.  Raises ValueError if there is none, or for a rank above their sum."""
        if not widths:
            raise ValueError("Interaction `cross` needs at least one field. Found none.")
        if self.rank > sum(widths.values()):
            raise ValueError(
                f"Parameter `rank` should be at most the width of a view, {sum(widths.values())} here. Found {self.rank}."
            )
        return CrossModule(self, widths)
