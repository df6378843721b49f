"""FM and FwFM: the sum of all products of two fields, plain or with a weight per pair of fields.

Papers: "Factorization Machines", Rendle, ICDM 2010, https://doi.org/10.1109/ICDM.2010.127.  "Field-weighted Factorization
Machines for Click-Through Rate Prediction in Display Advertising", Pan, Xu, Lobos Ruiz, Zhao, Pan, Sun, Lu, WWW 2018,
https://doi.org/10.1145/3178876.3186040, https://arxiv.org/abs/1806.03514.

Idea: what two values say together is the inner product of their vectors, so that pairs which training never saw together
still get an estimate.  In FwFM each pair of fields has a scalar that says how much it matters.  With e_i (B, d) the vector of
field i and * entry by entry::

    fm    = sum_(i<j) e_i * e_j         = ((sum_i e_i)^2 - sum_i e_i^2) / 2
    fwfm  = sum_(i<j) r_ij e_i * e_j    = sum_i e_i * (R e)_i            R (F, F) strictly upper triangular

``pooled = "vector"`` keeps the d entries, ``"scalar"`` adds them up, which makes <e_i, e_j> of e_i * e_j.

How this differs from the papers: there the scalar is added to linear terms and that is the model.  Here the result, with the
fields behind it (``flat``), is what a tower reads, which holds the linear terms and more; ``pooled = "scalar"`` with a tower
without hidden layers comes closest.  FM's sum is over features that are not zero, here over fields: members of a bag and
events of a history are pooled first and make no pairs among themselves.  r starts at 1, where FwFM is FM (our choice; written
from memory of the paper).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from unbraid.interactions.pairs import Pairwise, PairwiseModule

BIBTEX = """
@inproceedings{rendle2010fm,
  title     = {Factorization Machines},
  author    = {Rendle, Steffen},
  booktitle = {Proceedings of the 10th IEEE International Conference on Data Mining},
  pages     = {995--1000},
  year      = {2010},
  doi       = {10.1109/ICDM.2010.127},
}

@inproceedings{pan2018fwfm,
  title     = {Field-weighted Factorization Machines for Click-Through Rate Prediction in Display Advertising},
  author    = {Pan, Junwei and Xu, Jian and Lobos Ruiz, Alfonso and Zhao, Wenliang and Pan, Shengjun and Sun, Yu and
               Lu, Quan},
  booktitle = {Proceedings of the 2018 World Wide Web Conference},
  pages     = {1349--1357},
  year      = {2018},
  doi       = {10.1145/3178876.3186040},
  eprint    = {1806.03514},
  archiveprefix = {arXiv},
}
"""

Pooled = Literal["vector", "scalar"]


class FMModule(PairwiseModule):
    """Module of `FM`.

    Attributes:
        width: d or 1, and the sum of the fields' widths where ``flat``.
    """

    def __init__(self, config: FM | FwFM, widths: Mapping[str, int]) -> None:
        super().__init__(config, widths, config.kind)
        self.scalar = config.pooled == "scalar"
        self.width += 1 if self.scalar else self.common

    def products(self, e: Tensor) -> Tensor:
        """(B, F, d) becomes (B, d): all products of two fields, added up."""
        return (e.sum(1).square() - e.square().sum(1)) / 2

    def interact(self, e: Tensor) -> Tensor:
        """(B, F, d) becomes (B, d) or (B, 1)."""
        products = self.products(e)
        return products.sum(1, keepdim=True) if self.scalar else products


class FwFMModule(FMModule):
    """Module of `FwFM`; ``weights`` (F (F - 1) / 2,) holds r_ij in the order 01, 02, .., 12, .."""

    upper: Tensor

    def __init__(self, config: FwFM, widths: Mapping[str, int]) -> None:
        super().__init__(config, widths)
        self.register_buffer("upper", torch.triu_indices(len(widths), len(widths), 1), persistent=False)
        self.weights = nn.Parameter(torch.ones(self.upper.shape[1]))

    def products(self, e: Tensor) -> Tensor:
        """(B, F, d) becomes (B, d): all products of two fields, weighted and added up."""
        matrix = e.new_zeros(e.shape[1], e.shape[1]).index_put(tuple(self.upper), self.weights)
        return (e * (matrix @ e)).sum(1)


@dataclass(frozen=True)
class FM(Pairwise):
    """All products of two fields, added up.

    Args:
        pooled: ``vector`` keeps the d entries of the sum, ``scalar`` adds them up.
    """

    kind: Literal["fm"] = field(default="fm", kw_only=True)
    pooled: Pooled = "vector"

    def build(self, widths: Mapping[str, int]) -> FMModule:
        """The module for fields of the given widths.  Raises ValueError for fewer than two."""
        return FMModule(self, widths)


@dataclass(frozen=True)
class FwFM(Pairwise):
    """All products of two fields, each pair with a learned weight, added up.

    Args:
        pooled: as in `FM`.
    """

    kind: Literal["fwfm"] = field(default="fwfm", kw_only=True)
    pooled: Pooled = "vector"

    def build(self, widths: Mapping[str, int]) -> FwFMModule:
        """The module for fields of the given widths.  Raises ValueError for fewer than two."""
        return FwFMModule(self, widths)
