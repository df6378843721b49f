"""DARE: what finds and weighs the events of a long history, and what represents them, are two embedding tables.

Paper: "Long-Sequence Recommendation Models Need Decoupled Embeddings", Feng, Pan, Wu, Chen, Wang, Li, Hu, Jiang, Long, ICLR
2025, arXiv 2410.02604.

Idea: one table is asked for two things.  Attention wants vectors whose products say how relevant an event is to the row's
item; representation wants vectors that tell a good item from a bad one.  Their gradients on a shared table differ in size and
often in direction.  So every value has two vectors: ``attention`` and ``value``.  The row's item and the user's past items
share a table within each: an item stays relevant to itself, and relevance stays symmetric::

    s_i = <a(i), q> of the attention tables, scaled as in `unbraid.encoders.searched`
    S   = the K highest s,  w = softmax over S;  the same scores search and weigh
    u   = sum_{i in S} w_i r(i),   h = u * v          r, v of the value tables
    second heads (while training): the same with S = all events

A gradient reaches attention tables through w alone and value tables through u and v alone; nothing is detached.  The width of
the attention tables is free: a search costs width times events, so that half the width halves it.

How this differs:

- The paper writes one product over sqrt(D) of everything; its code scales the row's fields and the time apart.  ``scale =
  "parts"`` is the code's, ``whole`` the paper's.
- The code's time field is the event's rank: read the event field ``position`` (or ``gap``).  The row's own time is a learned
  vector; the code has row 0 of the time table for it.
- In the code a row with fewer than K events attends to padding with its real scores; here only real events are kept, weights
  are a softmax over those, and a row without any gives zeros.
- The code's second head is BatchNorm - 200 - PReLU; here it is a ReLU network of ``auxiliary`` widths on the same inputs.
- The head above is the run's interaction and tower: it reads the row's own vectors as features, u and u * v.  The code's
  initialiser, which also draws BatchNorm's scales near 0, is not here.
- With several views there is one attention table for all (``attention = "shared"``), unless every task has tables alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from unbraid.encoders.searched import SearchedHistory, Searching, Sides
from unbraid.encoders.table import Role
from unbraid.types import FORBID

BIBTEX = """
@inproceedings{feng2025dare,
  title     = {Long-Sequence Recommendation Models Need Decoupled Embeddings},
  author    = {Feng, Ningya and Pan, Junwei and Wu, Jialong and Chen, Baixu and Wang, Ximei and Li, Qian and Hu, Xian and
               Jiang, Jie and Long, Mingsheng},
  booktitle = {The Thirteenth International Conference on Learning Representations},
  year      = {2025},
  eprint    = {2410.02604},
  archivePrefix = {arXiv},
}
"""


@dataclass(frozen=True)
class DARE(Searching):
    """Attention tables find and weigh the K most relevant events, value tables represent them.

    Args:
        keep, target_aware, pooled, auxiliary, scale, precision: see `unbraid.encoders.searched.Searching`.
        attention_width: D of the attention tables; 0: that of the value tables.
        attention: with several views, one attention table for all (``shared``) or one each (``per_view``).  Where every task
            has tables alone (views ``separate``) nothing is shared.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["dare"] = field(default="dare", kw_only=True)
    attention_width: int = 0
    attention: Literal["shared", "per_view"] = "shared"

    needs_target: ClassVar[bool] = True  # of at least one history, or there is nothing to be relevant to

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_width < 0:
            raise ValueError(f"Parameter `attention_width` should not be negative. Found {self.attention_width}.")
        if self.attention not in ("shared", "per_view"):
            raise ValueError(f"Parameter `attention` should be `shared` or `per_view`. Found `{self.attention}`.")

    @property
    def roles(self) -> Mapping[str, Role]:
        """The tables that it reads."""
        return {"value": Role(), "attention": Role(width=self.attention_width, shared=self.attention == "shared")}

    def build(self, widths: Mapping[str, int], targets: Mapping[str, int], roles: Mapping[str, int]) -> SearchedHistory:
        """widths: event field -> D; targets: the event fields that the row has, too; roles: role -> D of its tables."""
        sides = Sides(key="attention", query="attention")
        return SearchedHistory(self, widths, targets, sides, roles["attention"])
