"""Inner product: one number for every pair of fields (IPNN).

Paper: "Product-Based Neural Networks for User Response Prediction", Qu, Cai, Ren, Zhang, Yu, Wen, Wang, ICDM 2016,
https://doi.org/10.1109/ICDM.2016.0151, https://arxiv.org/abs/1611.00144.

Idea: a factorization machine adds all inner products up; give each of them to the network instead, beside the fields, and
let it find out which matter.  With e_i (B, d) the vector of field i::

    p_ij = <e_i, e_j>  for i < j                F (F - 1) / 2 numbers: 01, 02, .., 12, ..
    out  = [p, e_0, e_1, ...]

How this differs (written from memory of the paper): the paper's first layer weighs the products by a matrix of rank one to
save parameters, and its products include those of a field with itself; here the tower's first layer reads the pairs as they
are.  The outer products (OPNN) are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from unbraid.interactions.pairs import Pairwise, PairwiseModule

BIBTEX = """
@inproceedings{qu2016pnn,
  title     = {Product-Based Neural Networks for User Response Prediction},
  author    = {Qu, Yanru and Cai, Han and Ren, Kan and Zhang, Weinan and Yu, Yong and Wen, Ying and Wang, Jun},
  booktitle = {Proceedings of the 16th IEEE International Conference on Data Mining},
  pages     = {1149--1154},
  year      = {2016},
  doi       = {10.1109/ICDM.2016.0151},
  eprint    = {1611.00144},
  archiveprefix = {arXiv},
}
"""


class InnerProductModule(PairwiseModule):
    """Module of `InnerProduct`.

    Attributes:
        width: F (F - 1) / 2, and the sum of the fields' widths where ``flat``.
    """

    entries: Tensor

    def __init__(self, config: InnerProduct, widths: Mapping[str, int]) -> None:
        super().__init__(config, widths, config.kind)
        one, two = torch.triu_indices(len(widths), len(widths), 1)
        self.register_buffer("entries", one * len(widths) + two, persistent=False)
        self.width += len(one)

    def interact(self, e: Tensor) -> Tensor:
        """(B, F, d) becomes (B, F (F - 1) / 2)."""
        return (e @ e.transpose(1, 2)).flatten(1).index_select(1, self.entries)


@dataclass(frozen=True)
class InnerProduct(Pairwise):
    """The inner product of every pair of fields."""

    kind: Literal["inner_product"] = field(default="inner_product", kw_only=True)

    def build(self, widths: Mapping[str, int]) -> InnerProductModule:
        """The module for fields of the given widths.  Raises ValueError for fewer than two."""
        return InnerProductModule(self, widths)
