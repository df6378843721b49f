"""Convex combinations of states that began as one: weights of several trainings from one fork, and their optimisers' states.

With h the heaviest branch, the first of several, a combination is computed in double precision as::

    x = x_h + sum over b != h of w_b (x_b - x_h)            w_b: non-negative, relative to their sum

which is the weighted mean, and bit-equal to what the branches share wherever they agree: a table row that no branch moved
stays what it was, and one that a single branch moved is the mean of that and of the fork's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unbraid import sharding
from unbraid.types import State

COUNTERS = ("step", "steps", "count")  # names of numbers of steps: of these the largest goes on
_ABSENT = object()


def heaviest(shares: Sequence[float]) -> int:
    """Place of the largest share, the first of several."""
    return max(range(len(shares)), key=lambda place: (shares[place], -place))


def combine(parts: Sequence[Any], shares: Sequence[float]) -> Any:
    """The convex combination of tensors of one shape and dtype, or of numbers; a part of share 0 is not read.

    Args:
        shares: non-negative, not all 0; only their ratios count.
    """
    total, top = sum(shares), heaviest(shares)
    base: Any = parts[top].double() if isinstance(parts[top], Tensor) else float(parts[top])
    found = base
    for place, (part, share) in enumerate(zip(parts, shares, strict=True)):
        if place != top and share > 0:
            part = part.to(base.device, torch.float64) if isinstance(part, Tensor) else part
            found = found + (share / total) * (part - base)
    return found.to(parts[top].dtype) if isinstance(found, Tensor) else found


def among(shares: Sequence[float], chosen: Sequence[bool]) -> list[float]:
    """The shares of some branches, 0 for the others; all shares where these have none."""
    left = [share if has else 0.0 for share, has in zip(shares, chosen, strict=True)]
    return left if sum(left) > 0 else list(shares)


# ------------------------------------------------------------------------------------------------------------- weights
class Branches:
    """Trained weights of several branches of one fork, as rows that moved.

    Args:
        fork: name -> weights and buffers that all branches began with.
        everywhere: a tensor that only some branches moved is a mean over all of them, else over those that have a share; if
            these have none, it stays the fork's.  A single branch's share alone gives that branch in either case.
        divided: names of the tensors of which every process has its rows: one that a branch moved on any process, it moved.
    """

    def __init__(self, fork: Mapping[str, Tensor], everywhere: bool = False, divided: Collection[str] = ()) -> None:
        self.fork, self.everywhere, self.divided = fork, everywhere, tuple(divided)
        self.moved: list[dict[str, tuple[Tensor | None, Tensor]]] = []  # name -> rows (all if None), their values

    def add(self, weights: Mapping[str, Tensor]) -> None:
        """One more branch; only what it moved is kept.  The tensors may be anywhere."""
        found: dict[str, tuple[Tensor | None, Tensor]] = {}
        for name, old in self.fork.items():
            new = weights[name].to(old.device)
            rows = None if old.ndim == 0 else (new != old).flatten(1).any(1) if old.ndim > 1 else new != old
            if rows is None or 2 * int(rows.sum()) > len(rows):
                found |= {name: (None, new)} if bool((new != old).any()) else {}
            elif bool(rows.any()):
                ids = rows.nonzero().squeeze(1)
                found[name] = ids, new.index_select(0, ids)
        self.moved.append(found)

    @cached_property
    def parts(self) -> dict[str, tuple[Tensor | None, list[Tensor], list[bool]]]:
        """name of a tensor that some branch moved -> the rows that any moved (all if None), each branch's values there, and
        which branches moved it.  Read when all branches are there."""
        names = dict.fromkeys(name for branch in self.moved for name in branch)
        flags = sharding.any_of([name in branch for name in self.divided for branch in self.moved])
        count = len(self.moved)
        anywhere = {name: flags[place * count : (place + 1) * count] for place, name in enumerate(self.divided)}
        found: dict[str, tuple[Tensor | None, list[Tensor], list[bool]]] = {}
        for name in names:
            ids = self._rows(name)
            values = [self._values(branch, name, ids) for branch in self.moved]
            found[name] = ids, values, anywhere.get(name) or [name in branch for branch in self.moved]
        return found

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor], shares: Sequence[float]) -> None:
        """Write a combination into the model's live tensors, which hold the fork's values or an earlier combination.

        Whole numbers are the heaviest branch's.

        Args:
            weights: the model's ``state_dict``; shares: one per branch, non-negative, not all 0.
        """
        for name, (ids, values, moved) in self.parts.items():
            if self.fork[name].is_floating_point():
                value = combine(values, list(shares) if self.everywhere else among(shares, moved))
            else:
                value = values[heaviest(shares)]
            live = weights[name]
            live.copy_(value) if ids is None else live.index_copy_(0, ids, value)

    def _rows(self, name: str) -> Tensor | None:
        """The rows of a tensor that some branch moved; None for all."""
        found = [branch[name][0] for branch in self.moved if name in branch]
        if any(ids is None for ids in found):
            return None
        return found[0] if len(found) == 1 else torch.cat([ids for ids in found if ids is not None]).unique()

    def _values(self, branch: Mapping[str, tuple[Tensor | None, Tensor]], name: str, ids: Tensor | None) -> Tensor:
        """What a branch has in the given rows."""
        own, new = branch.get(name, (None, None))
        if new is not None and own is None:
            return new
        old = self.fork[name] if ids is None else self.fork[name].index_select(0, ids)
        if own is None or new is None:
            return old
        return old.index_copy(0, own if ids is None else torch.searchsorted(ids, own), new)


# --------------------------------------------------------------------------------------------------- optimisers' states
def combine_states(
    fork: State | None, states: Sequence[State], shares: Sequence[float], everywhere: bool = False
) -> State:
    """The combination of states of updates, which are nested dicts whose innermost hold what belongs to one parameter.

    Floating-point tensors and numbers are combined as weights are, numbers of steps take the largest, lists of names are
    united.  What belongs to a parameter is a mean over the branches that changed it, or over all that have it.  A branch of
    share 0 counts for nothing.

    Args:
        fork: what all branches began with; None for nothing.
        everywhere: over all that have it.

    Raises:
        ValueError: the states differ in a text, so that they are not of one update.
    """
    counted = [(state, share) for state, share in zip(states, shares, strict=True) if share > 0]
    values, left = zip(*counted, strict=True)
    return _merged("", [_ABSENT if fork is None else fork, *values], list(left), everywhere)


def _merged(key: str, values: Sequence[Any], shares: Sequence[float], everywhere: bool) -> Any:
    """Combine one value of all states; the first of the values is the fork's."""
    fork, *rest = values
    here = [value is not _ABSENT for value in rest]
    if not all(here):
        kept = [value for value, has in zip(rest, here, strict=True) if has]
        chosen = among(shares, here)
        return _merged(key, [fork, *kept], [s for s, has in zip(chosen, here, strict=True) if has], everywhere)
    if not isinstance(rest[0], Mapping):
        return _leaf(key, rest, shares)
    innermost = not any(isinstance(part, Mapping) for value in rest for part in value.values())
    if innermost and not everywhere and isinstance(fork, Mapping):
        moved = [not same(value, fork) for value in rest]
        shares = among(shares, moved if any(moved) else [True] * len(rest))
    names = dict.fromkeys(name for value in rest for name in value)
    old = fork if isinstance(fork, Mapping) else {}
    of = {name: [old.get(name, _ABSENT), *(value.get(name, _ABSENT) for value in rest)] for name in names}
    return {name: _merged(str(name), parts, shares, everywhere) for name, parts in of.items()}


def _leaf(key: str, values: Sequence[Any], shares: Sequence[float]) -> Any:
    """Combine values that are no dicts."""
    first = values[heaviest(shares)]
    if isinstance(first, Tensor):
        counts = key in COUNTERS and all(isinstance(v, Tensor) and v.shape == first.shape for v in values)
        if counts:
            return torch.stack([value.to(first.device) for value in values]).amax(0)
        return combine(values, shares) if first.is_floating_point() else first.clone()
    if isinstance(first, str) or first is None:
        if any(value != first for value in values):
            raise ValueError(f"States of one update should agree in `{key}`. Found {sorted({str(v) for v in values})}.")
        return first
    if isinstance(first, bool | int):
        return max(values)
    if isinstance(first, float):
        return max(values) if key in COUNTERS else combine(values, shares)
    if isinstance(first, list | tuple) and all(isinstance(part, str) for value in values for part in value):
        return type(first)(dict.fromkeys(part for value in values for part in value))
    if isinstance(first, list | tuple) and len({len(value) for value in values}) == 1:
        return type(first)(_leaf(key, parts, shares) for parts in zip(*values, strict=True))
    return first


def same(one: Any, other: Any) -> bool:
    """Are two states bit-equal?"""
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping) and one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
        )
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and bool((one == other.to(one.device)).all())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
