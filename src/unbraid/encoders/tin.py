"""TIN: attention and representation that both see what an event is and when it was, relative to the predicted item.

Paper: "Temporal Interest Network for User Response Prediction", Zhou, Pan, Zhou, Chen, Jiang, Gao, Chen, WWW 2024 (companion),
arXiv 2308.08487.  As TIM, the *temporal interest module*, it is a part of "Ads Recommendation in a Collapsed and Entangled
World", Pan, Xue, Wang, Yu, Liu, Quan, Qiu, Liu, Xiao, Jiang, KDD 2024, arXiv 2403.00793.

Idea: how much an event tells about an item depends on what both are and on how long ago the event was.  A vector of the time is
added to that of the value, on both sides, so that their product has all four of (event, row) x (value, time)::

    e~_i    = e_i + p(X_i),   v~ = v + p(X_row)       e, v: the fields that the row has, side by side; p as wide as all of them
    alpha_i = softmax_i( <e~_i, v~> / sqrt(D) )       target-aware attention
    u       = sum_i alpha_i (e~_i * v~)               target-aware representation

X_i is the event's rank counted back from the row (1 is the newest) or the bucket of the time between both.  p is a parameter of
the encoder, and the row's own p(X_row) a vector of its own in it.

How it is computed: all is a sum of products with a few vectors, ``<e~_i, v~> = sum_f <e_f(i), v~_f> + <p(X_i), v~>`` and
``u = (sum_i alpha_i e_i + sum_i alpha_i p(X_i)) * v~``, so that no (N, D) values exist.

How this differs:

- The authors' code pools e~ and reads [u, v~, u * v~] in its layers above, after BatchNorm and a linear layer; ``pooled`` gives
  the three.  Its item bias is not here.
- Event fields that the row has not (what the user did) have nothing to be multiplied with: they are no part of the score, and
  the same weights give their mean as a further output.
- A history without a field that the row has, too, has no scores: its output is the mean of its events.
- Ranks beyond ``positions`` share the last row; the code has as many rows as its histories have events.
- ``keep`` attends to the K highest scores only; the paper's attention is over all events.
- There is one p per history and view; the code has one history.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.encoders.packed import pool, segment_softmax
from unbraid.encoders.search import Kept, Part, event_scores, search
from unbraid.encoders.searched import Reads, Targets, newest
from unbraid.layers import require_positive
from unbraid.types import FIRST_VALUE, FORBID, GAP, POSITION, Ragged, Rows

BIBTEX = """
@inproceedings{zhou2024tin,
  title     = {Temporal Interest Network for User Response Prediction},
  author    = {Zhou, Haolin and Pan, Junwei and Zhou, Xinyi and Chen, Xihua and Jiang, Jie and Gao, Xiaofeng and Chen, Guihai},
  booktitle = {Companion Proceedings of the {ACM} Web Conference 2024},
  year      = {2024},
  eprint    = {2308.08487},
  archivePrefix = {arXiv},
}
"""

GAP_CODES = 34  # codes of the field `gap`: unknown, missing and 32 buckets


@dataclass(frozen=True)
class TIN:
    """Vectors of value and time, added, in attention and in representation.

    Args:
        time: ``position``, the event's rank counted back from the row; ``gap``, the bucketed time between both: every history
            then needs the event field ``gap``.  That field is read as the time alone: no mean of its vectors is given.
        positions: ranks that have a vector of their own; those beyond share the last.
        keep: attend to the K highest scores; 0: to all events.
        pooled: give the code's [u, v~, u * v~], where u pools e~, instead of the last alone.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["tin"] = field(default="tin", kw_only=True)
    time: Literal["position", "gap"] = "position"
    positions: int = 430
    keep: int = 0
    pooled: bool = False

    needs_target: ClassVar[bool] = True  # of at least one history, or there is nothing to be relevant to

    def __post_init__(self) -> None:
        require_positive(positions=self.positions)
        if self.time not in (POSITION, GAP):
            raise ValueError(f"Parameter `time` should be `position` or `gap`. Found `{self.time}`.")
        if self.keep < 0:
            raise ValueError(f"Parameter `keep` should not be negative. Found {self.keep}.")

    def build(self, widths: Mapping[str, int], targets: Mapping[str, int]) -> TINHistory:
        """widths: event field -> D; targets: the event fields that the row has, too.

        Raises ValueError for a history without the field ``gap`` where that is the time.
        """
        if self.time == GAP and GAP not in widths:
            raise ValueError(
                f"History encoder `tin` with time `gap` needs the field `gap` in every history. Found a history with fields "
                f"{list(widths)}. Add it there, or set `time` to `position`."
            )
        return TINHistory(self, widths, targets)


class TINHistory(nn.Module):
    """See the module's docstring.

    Attributes:
        widths: output field -> D; targets: the fields of the products -> D; rest: the fields that are pooled alone.
        times: (rows, D of all targets) p: of the row itself first, then of ranks from 1 or of the codes of gaps; (0, 0)
            without targets.
    """

    def __init__(self, config: TIN, widths: Mapping[str, int], targets: Mapping[str, int]) -> None:
        super().__init__()
        self.config = config
        self.targets = {name: widths[name] for name in targets if name != config.time}
        self.rest = [name for name in widths if name not in self.targets and name != config.time]
        if not self.targets and not self.rest:
            self.rest = list(widths)  # a history of nothing but times: their mean
        own: dict[str, int] = {}
        for name, width in self.targets.items():
            own |= {name: width, f"{name}.target": width} if config.pooled else {}
            own[f"{name}.product"] = width
        self.widths = own | {name: widths[name] for name in self.rest}
        total = sum(self.targets.values())
        count = config.positions if config.time == POSITION else GAP_CODES
        self.times = nn.Parameter(torch.empty(1 + count if total else 0, total).normal_(0.0, 1e-2))
        self.scale = 1 / math.sqrt(max(1, total))

    def read_times(self, history: Ragged) -> Rows:
        """Each event's read of ``times``."""
        if self.config.time == GAP:
            codes = history.values[GAP] + 1
        elif POSITION in history.values:
            codes = history.values[POSITION] - (FIRST_VALUE - 1)
        else:  # the newest event stands last
            last = history.offsets[1:].index_select(0, history.rows)
            codes = last - torch.arange(last.shape[0], device=last.device)
        return Rows(self.times, codes.clamp(1, len(self.times) - 1))

    def of_row(self, target: Targets) -> dict[str, Tensor]:
        """Event field -> (B, D) of v~."""
        times = self.times[0].split(list(self.targets.values()))
        return {name: target["value"][name] + time for name, time in zip(self.targets, times, strict=True)}

    def parts(self, events: Reads, history: Ragged, target: Targets) -> dict[str, Part]:
        """What the score is the sum of, by field; the time is the field `TIN.time`.  Nothing without targets."""
        if not self.targets:
            return {}
        own = self.of_row(target)
        parts = {name: Part(events["value"][name], query, self.scale) for name, query in own.items()}
        query = torch.cat(list(own.values()), 1)
        return parts | {self.config.time: Part(self.read_times(history), query, self.scale)}

    def scores(
        self, events: Reads, history: Ragged, target: Targets, fields: Collection[str] | None = None
    ) -> Tensor:  # fmt: skip
        """(N,) scores of all events, from some of their fields or from all; 0 without a field."""
        parts = self.parts(events, history, target)
        return self._sum([part for name, part in parts.items() if fields is None or name in fields], events, history)

    @staticmethod
    def _sum(parts: Sequence[Part], events: Reads, lists: Ragged) -> Tensor:
        like = next(iter(events["value"].values())).vectors
        return event_scores(parts, lists) if parts else like.new_zeros(lists.rows.shape[0])

    def _kept(self, parts: Sequence[Part], history: Ragged) -> Kept:
        keep = self.config.keep
        if keep and parts:
            return search(parts, history, keep)
        every = torch.arange(history.rows.shape[0], device=history.offsets.device)
        return newest(every >= 0, history, keep) if keep else Kept(every, history, everything=True)

    def forward(self, events: Reads, history: Ragged, target: Targets) -> dict[str, Tensor]:
        """As `unbraid.encoders.searched.SearchedHistory.forward`; only v~ is no sum over events, and not 0 without any."""
        parts = self.parts(events, history, target)
        kept = self._kept(list(parts.values()), history)
        weights = segment_softmax(self._sum(kept.parts(list(parts.values())), events, kept.lists), kept.lists)

        def summed(read: Rows) -> Tensor:
            return pool(kept.of(read), weights, kept.lists)

        out = {name: summed(events["value"][name]) for name in self.rest}
        if self.targets:
            times = summed(parts[self.config.time].read).split(list(self.targets.values()), 1)
            for name, time in zip(self.targets, times, strict=True):
                own, pooled = parts[name].query, summed(parts[name].read) + time
                out |= {name: pooled, f"{name}.target": own, f"{name}.product": pooled * own}
        return {name: out[name] for name in self.widths}
