"""The best mixture of branches: a search over their shares, on a grid in the simplex.

The shares of B branches are not negative and add up to 1.  A search tries some of them and gives those of the highest value; it
knows nothing of what a branch is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

MOST = 1_000  # combinations that one search may try
Shares = tuple[float, ...]
Value = Callable[[Shares], float]  # shares of the branches -> how good their combination is, higher is better


def simplex(count: int, grid: Sequence[float]) -> list[Shares]:
    """All shares of ``count`` branches whose second and later ones are in the grid, the first getting what is left.

    The shares of the grid are taken as the decimal numbers that they are written as, so that three times 0.1 and 0.7 make
    exactly 1.  In order: those of the largest first share first, then by the second, the third .. from large to small.

    Raises:
        ValueError: there is none, or more than a thousand.
    """
    values = sorted({Fraction(repr(float(a))) for a in grid})

    def rest(left: Fraction, places: int) -> Iterator[tuple[Fraction, ...]]:
        if places == 0:
            yield ()
            return
        for value in values:
            if value <= left:
                yield from ((value, *more) for more in rest(left - value, places - 1))

    found: list[tuple[Fraction, ...]] = []
    for parts in rest(Fraction(1), count - 1):
        found.append((1 - sum(parts, Fraction(0)), *parts))
        if len(found) > MOST:
            raise ValueError(
                f"A grid search over {count} branches with {len(values)} values tries more than {MOST:,} combinations in each "
                'round. Set `search = "greedy"`, or fewer values in `grid`.'
            )
    if not found:
        raise ValueError(f"No weights of {count - 1} branches in `grid` {list(grid)} add up to 1 or less. Add 0.")
    return [tuple(map(float, shares)) for shares in sorted(found, reverse=True)]


def grid_search(count: int, grid: Sequence[float], value: Value) -> Shares:
    """The best of `simplex`, the first of equals."""
    points = simplex(count, grid)
    return max(points, key=value)


def greedy_search(count: int, grid: Sequence[float], value: Value) -> Shares:
    """One branch after the other, the best first, each with the weight of the grid that serves those before it best.

    A weight is relative to the mean of those before.  Among equals: the branch that comes first, and the smallest weight.
    """
    pure = [tuple(float(b == at) for b in range(count)) for at in range(count)]
    order = sorted(range(count), key=lambda b: -value(pure[b]))
    found = {order[0]: 1.0}

    def shares(more: Mapping[int, float]) -> Shares:
        weights = {**found, **more}
        return tuple(weights.get(b, 0.0) / sum(weights.values()) for b in range(count))

    for b in order[1:]:
        mean = sum(found.values()) / len(found)
        found[b] = max((a * mean for a in sorted(set(grid))), key=lambda weight: value(shares({b: weight})))
    return shares({})


SEARCHES = {"grid": grid_search, "greedy": greedy_search}
