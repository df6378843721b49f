"""Products of 8-bit integers with a bound on their error: what an exact search may rule out without 32-bit arithmetic.

Vectors k and a query q are rounded to integers, ``k = s (i + e)`` and ``q = t (j + f)`` with every entry of e and f at most 1/2.
The integers' product is exact in 32 bits, and

    | <q, k> - s t <j, i> |  =  | s <q, e> + t <f, s i> |  <=  s |q|_1 / 2 + t |f|_2 max |s i|_2

An event whose approximate score is lower than the K-th highest by more than twice the bound is not among the K best, so that
exact scores are needed of few others.  Processors with products of 8-bit integers (VNNI) take a quarter of the time.

The step s is the same for all vectors: one vector many times as long as the others makes it coarse, and then too few events
are ruled out (`Screen.of` gives None).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from unbraid.encoders.scratch import scratch

CHUNK = 2048  # vectors that are rounded at a time stay in the cache
LEVELS = 127
COARSE = 1.5  # twice the bound over the scores' spread: above it too many events are left


@cache
def has_integers() -> bool:
    """Does this machine multiply 8-bit integers faster than floats, and does this build of PyTorch give it, right?"""
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    return all(map(_right, (2, 40)))


def _right(width: int) -> bool:
    """Is a product of integers (5, D) and (7, D) right?"""
    numbers = torch.arange(12 * width, dtype=torch.int32).mul_(37).remainder_(255).sub_(127).view(12, width)
    a, b = numbers.split((5, 7))
    try:
        found = torch._int_mm(a.to(torch.int8), b.to(torch.int8).T)
    except (AttributeError, RuntimeError):
        return False
    return bool((found.long() == a.long() @ b.long().T).all())


def _largest(x: Tensor) -> float:
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).item()


def _rounded(vectors: Tensor, largest: float, number: int) -> tuple[Tensor, float, float] | None:
    """(U, D) int8, their step, and the length of the longest of them times the step; None if an entry is above ``largest``."""
    if not 0 < largest < float("inf"):
        return None
    step, longest, integers = largest / LEVELS, 0.0, scratch(f"integers {number}", tuple(vectors.shape), torch.int8)
    some = scratch("chunk", (CHUNK, vectors.shape[1]), vectors.dtype)
    for part, out in zip(vectors.split(CHUNK), integers.split(CHUNK), strict=True):
        longest = max(longest, torch.linalg.vector_norm(part, dim=1).max().item())
        if not _largest(part) <= largest:
            return None
        out.copy_(torch.mul(part, 1 / step, out=some[: len(part)]).round_())
    return integers, step, longest + step * vectors.shape[1] ** 0.5 / 2


@dataclass(frozen=True)
class Screen:
    """Vectors and queries as integers.

    Args:
        vectors: (U, D) int8; query: (B, D) int8.
        step: (B,) the score of one unit of their product; bound: (B,) how far a score may be off.
    """

    vectors: Tensor
    query: Tensor
    step: Tensor
    bound: Tensor

    @classmethod
    def of(cls, vectors: Tensor, query: Tensor, number: int = 0) -> Screen | None:
        """(U, D) and (B, D) float32; None if D is 1 (`torch._int_mm` may be wrong then), rounding would be too coarse, or some
        number is not finite.

        Valid until the thread makes another one of the same ``number``, whose memory it takes.
        """
        if query.shape[1] == 1:
            return None
        most, width = query.abs().amax(1).clamp_(min=torch.finfo(query.dtype).tiny), query.shape[1]
        some = vectors[:: max(1, len(vectors) // CHUNK)]
        # a second pass over all vectors to find their largest entry is rarely needed
        likely = 1.25 * _largest(some)
        found = _rounded(vectors, likely, number) or _rounded(vectors, _largest(vectors), number)
        if found is None or not bool(most.isfinite().all()):
            return None
        integers, s, longest = found
        t = most / LEVELS
        scaled = query / t.unsqueeze(1)
        rounded = scaled.round()
        rest = (scaled - rounded).norm(dim=1)
        # the last factor covers the rounding of 32-bit floats, here and in the scores themselves
        bound = (s * query.abs().sum(1) / 2 + t * rest * longest) * (1 + 2e-5 * width)
        spread = query.norm(dim=1) * some.square().mean().sqrt()
        if float((2 * bound).sum()) > COARSE * float(spread.sum()):
            return None
        return cls(integers, rounded.to(torch.int8), s * t, bound)

    def rows(self, rows: slice) -> Screen:
        """Of some rows' queries."""
        return Screen(self.vectors, self.query[rows], self.step[rows], self.bound[rows])

    def products(self, rows: slice, out: Tensor) -> Tensor:
        """(b, U) int32 of some rows, in ``out``."""
        torch._int_mm(self.query[rows], self.vectors.T, out=out)
        return out
