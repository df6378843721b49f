"""What a training batch is made of, where rows should not come as they are in the log.

Rows without labels (of a new domain, or of a log of which a few rows were labelled) can outnumber the others a thousandfold,
or be lost among them.  A mix gives both a fixed place in every batch: so many rows with a label, so many without.  Each
part goes through its rows in an order of its own, epoch after epoch, and a batch takes the next ones, across the end of an
epoch where it must: every batch is full, and a part with fewer rows than its place in the batch repeats them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from unbraid import parallel
from unbraid.types import FORBID, Batch

Read = Callable[[np.ndarray], Batch]  # row numbers (n,) -> their batch
View = Callable[[Batch, bool, int], Batch]  # see `unbraid.slots.Augmentation`
Of = Literal["unlabelled", "all"]  # which rows get a strong view


@dataclass(frozen=True)
class Mix:
    """Rows with and without labels in fixed numbers per batch.

    Args:
        unlabelled: rows per batch beside the ``batch_size`` rows with a label; 0: there are none.
        pool: where these come from: rows without any label, or ``all`` training rows, whose labels are then not read.
        balance: take the rows with a label as they come, or as many from each domain that has any.

    Raises:
        ValueError: ``unlabelled`` is negative.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    unlabelled: int = 0
    pool: Literal["unlabelled", "all"] = "unlabelled"
    balance: Literal["none", "domain"] = "none"

    def __post_init__(self) -> None:
        if self.unlabelled < 0:
            raise ValueError(f"Parameter `unlabelled` should not be negative. Found {self.unlabelled}.")

    def parts(self, rows: np.ndarray, labelled: np.ndarray, domain: np.ndarray | None, size: int) -> Parts:
        """The parts of the batches.

        Args:
            rows: (n,) training rows; labelled: (n,) bool, has it any label; domain: (n,) codes; size: labelled rows per batch.

        Raises:
            ValueError: no row has a label, or none is without although the mix wants some; a batch has fewer places than there
                are domains; there is no domain.
        """
        known = rows[labelled]
        pool = rows if self.pool == "all" else rows[~labelled]
        if not len(known):
            raise ValueError("No training row has a label.")
        if self.unlabelled and not len(pool):
            raise ValueError(
                f"`training.mix.unlabelled` asks for {self.unlabelled} rows without labels in every batch, and every training "
                'row has one. Null the labels that are not to be read (`data.withhold`), or set `pool = "all"`.'
            )
        groups = [known]
        if self.balance == "domain":
            if domain is None:
                raise ValueError('`training.mix.balance = "domain"` needs domains: set `data.domain`.')
            codes = domain[labelled]
            groups = [known[codes == code] for code in np.unique(codes)]
            if size < len(groups):
                raise ValueError(
                    f"`training.batch_size` {size} has no place for each of the {len(groups)} domains with labels."
                )
        ends = np.arange(len(groups) + 1) * size // len(groups)
        sizes = [int(n) for n in np.diff(ends)]
        return Parts(tuple(groups), tuple(sizes), pool if self.unlabelled else rows[:0], self.unlabelled)


@dataclass(frozen=True)
class Parts:
    """Labelled groups and how many rows of each a batch takes, and the pool with its number."""

    groups: tuple[np.ndarray, ...]
    sizes: tuple[int, ...]
    pool: np.ndarray
    unlabelled: int

    @property
    def rows(self) -> int:
        """Rows with a label: an epoch is one pass over so many."""
        return sum(len(group) for group in self.groups)

    def order(self, seed: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows with labels, rows without) of each batch from step ``start`` on, without end."""
        seeds = np.random.SeedSequence([seed, 3]).generate_state(len(self.groups) + 1)
        walks = [walk(g, n, int(s), start) for g, n, s in zip(self.groups, self.sizes, seeds, strict=False)]
        other = walk(self.pool, self.unlabelled, int(seeds[-1]), start)
        while True:
            yield np.concatenate([next(each) for each in walks]), next(other)


def walk(rows: np.ndarray, size: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """``size`` rows at a time of an endless walk that goes through all rows, in a new order each time, from step ``start`` on."""
    if not size:
        while True:
            yield rows[:0]
    epoch, at = divmod(start * size, len(rows))
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    while True:
        parts, missing = [], size
        while missing:
            part = order[at : at + missing]
            parts.append(part)
            missing, at = missing - len(part), at + len(part)
            if at == len(rows):
                epoch, at = epoch + 1, 0
                order = np.random.default_rng([seed, epoch]).permutation(rows)
        yield np.concatenate(parts)


def batches(
    order: Iterator[tuple[np.ndarray, np.ndarray]], read: Read, seed: int, start: int, view: View | None = None,
    of: Of = "unlabelled",
) -> Iterator[Batch]:  # fmt: skip
    """A batch per step: rows with labels, rows without, and, with ``view``, strong views behind the weak ones.

    Args:
        order: (rows, rows whose labels are not read) of each step from ``start`` on; read: rows -> batch.
        seed: of the views, with the step; view: makes them; of: which rows get a strong view, too.
    """
    for step, (known, hidden) in enumerate(order, start):
        yield parallel.mine(partial(_made, read, len(known), view, of, (seed, step)), np.concatenate([known, hidden]))


def _made(
    read: Read, known: int, view: View | None, of: Of, seed: Sequence[int], rows: np.ndarray, first: int
) -> Batch:  # fmt: skip
    """The rows of a batch from place ``first`` on, with their views; labels from place ``known`` on are not read."""
    batch = read(rows)
    places = torch.arange(first, first + len(batch)) >= known
    if places.any():
        batch = replace(batch, observed={task: seen & ~places for task, seen in batch.observed.items()})
    return batch if view is None else with_views(batch, view, of, seed)


def with_views(batch: Batch, view: View, of: Of, seed: Sequence[int]) -> Batch:
    """The rows as the weak view shows them, then the strong view of those that get one; `Batch.pair` joins the two."""
    weak, strong = (int(s) for s in np.random.SeedSequence([*seed, 4]).generate_state(2))
    any_label = torch.stack(list(batch.observed.values())).any(0)
    chosen = torch.arange(len(batch)) if of == "all" else (~any_label).nonzero().squeeze(1)
    plain = view(batch, False, weak)
    if not len(chosen):
        return plain
    changed = view(batch.select(chosen).unlabelled(), True, strong)
    changed = replace(changed, view=torch.ones(len(chosen), dtype=torch.int8))
    joined = Batch.join([plain, changed])
    pair = joined.pair.clone()
    pair[chosen] = torch.arange(len(batch), len(batch) + len(chosen))
    pair[len(batch) :] = chosen
    return replace(joined, pair=pair)
