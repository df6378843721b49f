"""TWIN: one score both finds the K most relevant events of a long history and weighs them, on one table.

Paper: "TWIN: TWo-stage Interest Network for Lifelong User Behavior Modeling in CTR Prediction at Kuaishou", Chang, Zhang, Fu,
Zang, Guan, Lu, Hui, Leng, Niu, Song, Gai, KDD 2023.  What is said of it here is from memory of the paper, not checked against
it.  The forms below are those of the comparison in "Long-Sequence Recommendation Models Need Decoupled Embeddings" (DARE, ICLR
2025, arXiv 2410.02604) and of its code.

Idea: a cheap first stage that searches by another measure than the attention after it hands over the wrong events.  So both
stages have the same score: it is computed over the whole history, the K highest are kept, and a softmax of the same numbers
weighs them.  In DARE's comparison that is DARE with one table for attention and representation::

    s_i = <k(i), q>, scaled as in `unbraid.encoders.searched`
    S   = the K highest s,  w = softmax over S
    u   = sum_{i in S} w_i r(i),   h = u * v

    here            k = r = e(i),  q = v = e(row)                      one table for all four
    projections     k = e(i) W_k,  q = e(row) W_q,  r = e(i) W_r,  v = e(row) W_v     square, per field, without a bias
    tables = four   k, r and q have tables of their own; v is the row's features' (TWIN-4E)
    search = hard   S = the K newest events with the row's category; with ``fill`` the newest others make up for missing ones
    target_aware = false      no h, only u (w/o TR)

Four tables lose two things that shared ones have: relevance is symmetric, and an item is relevant to itself.

How this differs:

- From memory of the paper, not checked against it: there, keys are item features with a projection that serving caches, the
  user-item cross features of an event are squeezed to one number each, and the attention has several heads.  None of this is
  here; a field that the row has not (``position``, ``gap``, what the user did) has a learned query.
- In DARE's code hard search always fills up, with padding too when there is nothing else, and its score counts the time
  twice; here only real events are kept and the score is that of soft search.
- An unknown or missing category equals none: two values that training did not see are two values.
- How projections are computed: the distinct vectors of a batch are projected, not its events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from unbraid.encoders.search import Kept, Part
from unbraid.encoders.searched import (
    Reads,
    SearchedHistory,
    Searching,
    Sides,
    Targets,
    need_category,
    newest,
    require_category,
)
from unbraid.encoders.table import VALUE, Role
from unbraid.types import FIRST_VALUE, FORBID, Ragged, Rows

BIBTEX = """
@inproceedings{chang2023twin,
  title     = {{TWIN}: {TWo}-stage Interest Network for Lifelong User Behavior Modeling in {CTR} Prediction at {Kuaishou}},
  author    = {Chang, Jianxin and Zhang, Chenbin and Fu, Zhiyi and Zang, Xiaoxue and Guan, Lin and Lu, Jing and Hui, Yiqun and
               Leng, Dewei and Niu, Yanan and Song, Yang and Gai, Kun},
  booktitle = {Proceedings of the 29th {ACM} {SIGKDD} Conference on Knowledge Discovery and Data Mining},
  year      = {2023},
}
"""

FOUR: Mapping[str, Role] = {
    "value": Role(reads="target"),
    "query": Role(reads="target"),
    "event_key": Role(reads="events"),
    "event_value": Role(reads="events"),
}


@dataclass(frozen=True)
class TWIN(Searching):
    """One table finds, weighs and represents the K most relevant events.

    Args:
        keep, target_aware, pooled, auxiliary, scale, precision: see `unbraid.encoders.searched.Searching`.
        search: ``soft``: the events with the highest scores; ``hard``: the newest with the row's category.
        category: for ``hard``: the event field that says the category; every history needs it, and the row, too.
        fill: for ``hard``: keep the newest other events, too, where there are fewer than ``keep`` of the category.
        projections: square maps of each field's vectors, one for each of keys, queries, values and the row's own.
        tables: ``shared``: one; ``four``: one each for keys, queries, values and the row's own (TWIN-4E).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["twin"] = field(default="twin", kw_only=True)
    search: Literal["soft", "hard"] = "soft"
    category: str = ""
    fill: bool = False
    projections: bool = False
    tables: Literal["shared", "four"] = "shared"

    needs_target: ClassVar[bool] = True  # of at least one history, or there is nothing to be relevant to

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("search", ("soft", "hard")), ("tables", ("shared", "four"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Parameter `{name}` should be one of {allowed}. Found `{getattr(self, name)}`.")
        require_category(self.search, self.category)
        if self.fill and self.search != "hard":
            raise ValueError("Parameter `fill` belongs to search `hard`. Found search `soft`.")

    @property
    def roles(self) -> Mapping[str, Role]:
        """The tables that it reads."""
        return FOUR if self.tables == "four" else VALUE

    def build(self, widths: Mapping[str, int], targets: Mapping[str, int], roles: Mapping[str, int]) -> TWINHistory:
        """widths: event field -> D; targets: the event fields that the row has, too; roles: role -> D of its tables.

        Raises ValueError for a category that is no field of the history and the row.
        """
        if self.search == "hard":
            need_category(self.kind, self.category, widths, targets)
        return (HardTWINHistory if self.search == "hard" else TWINHistory)(self, widths, targets)


class TWINHistory(SearchedHistory):
    """See the module's docstring.

    Attributes:
        maps: ``SIDE/FIELD`` -> the projection of its vectors; none without ``projections``.
    """

    def __init__(self, config: TWIN, widths: Mapping[str, int], targets: Mapping[str, int]) -> None:
        four = config.tables == "four"
        sides = Sides(key="event_key", query="query", value="event_value") if four else Sides()
        super().__init__(config, widths, targets, sides)
        summed = widths if config.pooled or not targets else targets  # what nobody reads has no map
        own = targets if config.target_aware or config.auxiliary else {}
        of_side = {"key": widths, "query": targets, "value": summed, "own": own}
        self.maps = nn.ModuleDict()
        for side, fields in of_side.items() if config.projections else ():
            for name in fields:
                self.maps[self._key(side, name)] = nn.Linear(widths[name], widths[name], bias=False)

    @staticmethod
    def _key(side: str, name: str) -> str:
        return f"{side}/{name}".replace(".", "_")

    def _mapped(self, side: str, name: str, vectors: Tensor) -> Tensor:
        key = self._key(side, name)
        return self.maps[key](vectors) if key in self.maps else vectors

    def _reads(self, side: str, reads: Mapping[str, Rows]) -> Mapping[str, Rows]:
        if not self.maps:
            return reads
        return {n: Rows(self._mapped(side, n, read.vectors), read.index, read) for n, read in reads.items()}

    def _of_row(self, side: str, vectors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: self._mapped(side, name, vectors[name]) for name in self.targets}

    def keys(self, events: Reads) -> Mapping[str, Rows]:
        """As of `SearchedHistory`, projected; so are the other three."""
        return self._reads("key", super().keys(events))

    def asked(self, target: Targets) -> Mapping[str, Tensor]:
        """Event field -> (B, D) queries."""
        return self._of_row("query", super().asked(target))

    def values(self, events: Reads) -> Mapping[str, Rows]:
        """Event field -> what is summed."""
        return self._reads("value", super().values(events))

    def own(self, target: Targets) -> Mapping[str, Tensor]:
        """Event field -> (B, D) of the row."""
        return self._of_row("own", super().own(target))


class HardTWINHistory(TWINHistory):
    """`TWINHistory` that keeps the newest events of the row's category."""

    config: TWIN

    def find(self, parts: Sequence[Part], history: Ragged, target: Targets) -> Kept:
        """The events to attend to."""
        asked = target["id"][self.config.category].index_select(0, history.rows)
        same = (history.values[self.config.category] == asked) & (asked >= FIRST_VALUE)
        return newest(same, history, self.config.keep, fill=self.config.fill)
