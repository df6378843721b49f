"""ETA: the events whose sign hashes lie nearest to the row's are found by counting bits, then attended to.

Paper: "End-to-End User Behavior Retrieval in Click-Through Rate Prediction Model", Chen, Pei, Lv, Li, Ge, Ou, 2021, arXiv
2108.04468.  Everything said here about it is from memory of the paper, not checked against it.

Idea: searching a long history by products costs width times events.  A hash that keeps angles makes it a few operations on
words for each event, and as the hash is of the *present* embeddings, search and attention never drift apart.  With e(i) the
event's vectors of the fields that the row has, end to end, q the row's own and H a fixed random (D, m)::

    code(x) = sign(x H)                                  m bits
    S       = the K events with the smallest Hamming distance between code(e(i)) and code(q)
    w       = softmax over S of s_i,  u = sum_{i in S} w_i r(i)         s as in `unbraid.encoders.searched`

The distance is m times the angle / pi in the mean, with deviation sqrt(m p (1 - p)) for p = angle / pi.  No gradient passes
the hash; what is kept trains the tables as plain attention does.

How this differs:

- ``bits`` is 64 because a hash of up to 64 bits is one word, and fewer would save nothing.  With 48 bits an angle of 90
  degrees is known to 13 degrees (one deviation), with 64 to 11, with 256 to 6.
- Attention has one head, and is scaled as in `unbraid.encoders.searched`.  Events tied at the K-th distance: the newest stay.
- Codes are not stored from one step to the next: they are made of the tables as they are, training and serving alike.
  Every distinct vector is hashed once for a batch.
- Event fields that the row has not (``gap``, what the user did) are no part of the hash.  They are of the attention.
- A history without a field that the row has keeps its K newest events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from unbraid.encoders.hashing import SignHash, count_bits
from unbraid.encoders.packed import Listed
from unbraid.encoders.search import Kept, Part, top_k
from unbraid.encoders.searched import SearchedHistory, Searching, Sides, Targets, exact_only
from unbraid.layers import require_positive
from unbraid.types import FORBID, Ragged

BIBTEX = """
@article{chen2021eta,
  title   = {End-to-End User Behavior Retrieval in Click-Through Rate Prediction Model},
  author  = {Chen, Qiwei and Pei, Changhua and Lv, Shanshan and Li, Chao and Ge, Junfeng and Ou, Wenwu},
  journal = {arXiv preprint arXiv:2108.04468},
  year    = {2021},
}
"""


@dataclass(frozen=True)
class ETA(Searching):
    """The K events with the nearest sign hashes, and target attention over them.

    Args:
        keep, target_aware, pooled, auxiliary, scale: see `unbraid.encoders.searched.Searching`.
        precision: ``exact``; there are no products to round.
        bits: m, the length of a hash.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["eta"] = field(default="eta", kw_only=True)
    bits: int = 64

    needs_target: ClassVar[bool] = True  # of at least one history, or there is nothing to be near to

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(bits=self.bits)
        exact_only(self)

    def build(self, widths: Mapping[str, int], targets: Mapping[str, int]) -> ETAHistory:
        """widths: event field -> D; targets: the event fields that the row has, too."""
        return ETAHistory(self, widths, targets)


class ETAHistory(SearchedHistory):
    """See the module's docstring."""

    def __init__(self, config: ETA, widths: Mapping[str, int], targets: Mapping[str, int]) -> None:
        super().__init__(config, widths, targets, Sides())
        self.hash = SignHash([widths[name] for name in self.fields if name in targets], config.bits)

    def find(self, parts: Sequence[Part], history: Ragged, target: Targets) -> Kept:
        """The events at the smallest Hamming distances."""
        with torch.no_grad():
            common = [part for name, part in zip(self.fields, parts, strict=True) if name in self.targets]
            if isinstance(history, Listed):
                bits = self.hash.differing_bits(common, history).sum(1)
                return top_k(-bits.float(), history, self.config.keep)
            if not len(history) or int(history.lengths.max()) <= self.config.keep:
                return top_k(history.rows.float(), history, self.config.keep)  # all, whatever their codes
            distance = sum(count_bits(word) for word in self.hash.differing(common, history))
            assert isinstance(distance, torch.Tensor)
            return top_k(-distance.float(), history, self.config.keep)
