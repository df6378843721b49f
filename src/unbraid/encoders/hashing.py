"""Sign hashes of events and rows: one bit for each side of a random hyperplane, packed into words of 64 bits.

``bit_j(x) = [<x, h_j> >= 0]`` with h_j standard normal.  Two vectors at an angle differ in a bit with probability
angle / pi, so that how many bits differ, or whether some do, estimates the angle.  x is the concatenation of an event's
vectors, and its product with h_j is a sum over fields: every distinct vector is multiplied once, and an event adds up a few
numbers for each bit.  No event's vector is copied, and nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from unbraid.encoders.packed import Listed
from unbraid.encoders.search import Part
from unbraid.types import Ragged

WORD = 64  # bits of an int64
PIECE_BITS = 2**20  # bits of some events that exist unpacked at a time


class SignHash(nn.Module):
    """Random hyperplanes, drawn from torch's global generator when the module is built and saved with it.

    Args:
        widths: D of each field of the concatenation.
        bits: how many hyperplanes.
        group: bits that must lie in one word.
    """

    planes: Tensor

    def __init__(self, widths: Sequence[int], bits: int, group: int = 1) -> None:
        super().__init__()
        self.widths, self.word = list(widths), WORD // group * group
        self.register_buffer("planes", torch.randn(sum(widths), bits))

    @torch.no_grad()
    def differing(self, parts: Sequence[Part], lists: Ragged) -> list[Tensor]:
        """(N,) int64 per word: the bits in which an event's hash differs from that of its row's query.

        Args:
            parts: one per field, in the order of ``widths``; none: there is nothing to differ in.
            lists: which events are whose.
        """
        if not parts:
            return [torch.zeros_like(lists.rows)]
        planes = self.planes.split(self.widths)
        events = [(p.read.vectors @ h, p.read.index) for p, h in zip(parts, planes, strict=True)]
        asked = [p.query @ h for p, h in zip(parts, planes, strict=True)]
        everyone = torch.arange(len(lists), device=lists.offsets.device)
        mine, theirs = self._hash(events), self._hash([(x, everyone) for x in asked])
        return [a ^ b.index_select(0, lists.rows) for a, b in zip(mine, theirs, strict=True)]

    @torch.no_grad()
    def differing_bits(self, parts: Sequence[Part], lists: Listed) -> Tensor:
        """(N, bits) bool, as `differing` but not packed: runtimes of graphs shift and add up large integers each in its way."""
        if not parts:
            return torch.zeros(lists.rows.shape[0], self.planes.shape[1], dtype=torch.bool, device=lists.rows.device)
        planes = self.planes.split(self.widths)
        events = [(p.read.vectors @ h).index_select(0, p.read.index) for p, h in zip(parts, planes, strict=True)]
        asked = [p.query @ h for p, h in zip(parts, planes, strict=True)]
        mine, theirs = (sum(each[1:], each[0]) >= 0 for each in (events, asked))
        return mine != lists.spread(theirs)

    def _hash(self, projected: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """(N,) per word, of fields' projections (U, bits) and the places (N,) in them."""
        if len(projected) == 1:  # the distinct vectors' hashes are the events'
            ((numbers, index),) = projected
            return [word.index_select(0, index) for word in self._pack(numbers)]
        found = list(self._of_pieces(projected))
        return [torch.cat(words) for words in zip(*found, strict=True)]

    def _of_pieces(self, projected: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[Tensor]]:
        size = max(1, PIECE_BITS // self.planes.shape[1])
        for at in range(0, max(1, len(projected[0][1])), size):
            some = [numbers.index_select(0, index[at : at + size]) for numbers, index in projected]
            total = some[0]
            for more in some[1:]:
                total += more
            yield self._pack(total)

    def _pack(self, numbers: Tensor) -> list[Tensor]:
        """(n,) per word, of (n, bits)."""
        words = []
        for bits in (numbers >= 0).split(self.word, 1):
            places = torch.arange(bits.shape[1], device=bits.device)
            words.append((bits.long() << places).sum(1))  # bit 63 is the sign: the sum wraps into it
        return words


def count_bits(words: Tensor) -> Tensor:
    """(N,) how many of the 64 bits of each int64 are set, by sums within ever wider fields of bits."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    bytes_ = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    for shift in (8, 16, 32):
        bytes_ = bytes_ + (bytes_ >> shift)
    return bytes_ & 0x7F
