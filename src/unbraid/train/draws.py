"""One objective per step, drawn by chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from unbraid.data.table import order
from unbraid.slots import Term
from unbraid.types import Batch, Losses, Output


class Sample:
    """One objective per step (`Local.fit` with ``sample``): which, its rows, and its loss alone.

    Args:
        chances: objective -> weight of being drawn; rows: objective -> the rows to draw from.
    """

    def __init__(self, chances: Mapping[str, float], rows: Mapping[str, np.ndarray], steps: int, seed: int) -> None:
        self.names, self.rows, self.seed = list(chances), rows, seed
        shares = np.array([chances[name] for name in self.names], float)
        self.picks = np.random.default_rng([seed, 1]).choice(len(shares), steps, p=shares / shares.sum())

    def order(self, size: int, start: int) -> Iterator[np.ndarray]:
        """Row numbers of the batches from step ``start`` on: each objective goes through its own rows in an order of its own."""
        before = np.bincount(self.picks[:start], minlength=len(self.names))
        seeds = np.random.SeedSequence([self.seed, 2]).generate_state(len(self.names))
        parts = [order(self.rows[n], size, int(s), int(b)) for n, s, b in zip(self.names, seeds, before, strict=True)]
        return (next(parts[pick]) for pick in self.picks[start:])

    def restrict(self, term: Term) -> Term:
        """The term with the losses of each step's objective alone."""
        return Restricted(self, term)


@dataclass(frozen=True)
class Restricted:
    """A term with the losses of each step's drawn objective alone."""

    sample: Sample
    term: Term

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the extras that the term reads."""
        return self.term.needs

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        """The term's losses, of the objective that this step drew and its parts."""
        name = self.sample.names[self.sample.picks[step]]
        losses = self.term(output, batch, step)
        return {
            objective: loss for objective, loss in losses.items() if name in (objective, objective.partition("@")[0])
        }
