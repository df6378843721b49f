"""The one loop: batches, losses by objective, an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from unbraid import parallel
from unbraid.slots import Term
from unbraid.types import Batch, Losses, Output

Callback = Callable[[int, Batch, Mapping[str, Tensor]], bool]  # (steps done, batch, losses) -> stop?


def fit(
    model: nn.Module, batches: Iterator[Batch], terms: Sequence[Term], update: Callable[[Losses, Output], None], *,
    steps: int, start: int = 0, callbacks: Sequence[Callback] = (),
) -> int:  # fmt: skip
    """Train from step ``start`` until ``steps`` steps are done or a callback says stop.  Returns the steps done."""
    model.train()
    for step in range(start, steps):
        batch = next(batches)
        losses, output = losses_of(model, batch, terms, step)
        update(losses, output)
        stop = [callback(step + 1, batch, losses) for callback in callbacks]
        if any(stop):
            return step + 1
    return steps


def losses_of(
    model: nn.Module, batch: Batch, terms: Sequence[Term], step: int
) -> tuple[dict[str, Tensor], Output]:  # fmt: skip
    """Losses of a batch by objective, and what the model said about it; of a batch that processes share, about the own rows."""
    parallel.note(batch)
    output = model(batch)
    said, whole = parallel.said(output, batch, getattr(model, "constants", ()))
    losses: dict[str, Tensor] = {}
    for term in terms:
        for objective, loss in term(said, whole, step).items():
            losses[objective] = losses[objective] + loss if objective in losses else loss
    return losses, output
