"""Forward passes beside those of the training, for updates that learn from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from unbraid import parallel
from unbraid.data.table import Read, order, prefetch
from unbraid.slots import Term
from unbraid.train.loop import losses_of
from unbraid.types import Batch, Losses, Output

if TYPE_CHECKING:
    from unbraid.train.session import Local


class Rehearse:
    """More forward passes of a session's model: an `unbraid.slots.Rehearsal`."""

    def __init__(self, session: Local, model: nn.Module, seed: int) -> None:
        self.session, self.model, self.seed = session, model, seed
        self.now: tuple[Batch, int] | None = None  # the current training batch and its step
        self.batches: Iterator[Batch] | None = None  # of the validation split
        self.at = 0  # the step that the next of them belongs to
        self.terms: Sequence[Term] = session.terms
        self.read: Read | None = None

    def watch(
        self, batches: Iterator[Batch], start: int, terms: Sequence[Term], read: Read | None
    ) -> Iterator[Batch]:  # fmt: skip
        """The training batches of steps ``start`` and on; the last one that was given out is the current one.

        Args:
            terms: those of this training; read: what makes its batches, None: the session's data.
        """
        self.terms, self.read = terms, read
        for step, batch in enumerate(batches, start):
            self.now = batch, step
            yield batch

    def again(self) -> tuple[Losses, Output]:
        """See `unbraid.slots.Rehearsal`."""
        assert self.now is not None
        return self._losses(*self.now, draw=0)

    def valid(self, step: int) -> tuple[Losses, Output]:
        """See `unbraid.slots.Rehearsal`.  Raises ValueError when the validation split has no rows."""
        if self.batches is None or self.at != step:
            self.close()
            rows, size = self.session.rows("valid"), self.session.training.batch_size
            if not len(rows):
                raise ValueError("The update learns weights on the validation split, which has no rows.")
            self.at, read = step, self.read or self.session.data.batch
            self.batches = shares(order(rows, size, self.seed, step), read)
        self.at += 1
        return self._losses(parallel.join(next(self.batches)).to(self.session.device), step, draw=1)

    def close(self) -> None:
        """Stop reading ahead."""
        if self.batches is not None:
            self.batches.close()  # type: ignore[attr-defined]
            self.batches = None

    def _losses(self, batch: Batch, step: int, draw: int) -> tuple[Losses, Output]:
        """A pass in training mode.  Through ``.data``, buffers change without a backward pass that read them being told."""
        before = {name: value.clone() for name, value in self.model.named_buffers()}
        cuda = [torch.cuda.current_device()] if self.session.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=cuda):
            # processes read other rows, and draw other numbers for them
            numbers = [self.seed, step, draw, *([parallel.rank()] if parallel.rank() else [])]
            torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
            found = losses_of(self.model, batch, self.terms, step)
        for name, value in self.model.named_buffers():
            value.data.copy_(before[name])
        return found


def shares(rows: Iterable[np.ndarray], read: Read) -> Iterator[Batch]:
    """This process's rows of the batches of these row numbers, made ahead."""
    return prefetch(parallel.mine(lambda part, _: read(part), each) for each in rows)
