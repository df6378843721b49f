"""Random packed data with a target, a history of values, a label; and models that only score events or give views."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.types import FIRST_VALUE, Batch, Feature, Field, History, Ragged, Schema, Task

FIELDS = ("category", "position")


def schema_of(size: int = 8, length: int = 6, fields: tuple[str, ...] = FIELDS) -> Schema:
    """Event field ``category`` in a history ``seen``, of the vocabulary of the row's ``item``."""
    return Schema(
        (Feature("user"), Feature("item", vocabulary="kind"), Feature("price", kind="number")),
        (Task("click"), Task("spend", kind="real"), Task("size", kind="multiclass")),
        (History("seen", fields=fields, length=length),),
        (Field("category", vocabulary="kind"), Field("city")),
        sizes={"kind": size, "user": 5, "city": 4, "position": length + 2},
        classes={"size": ("S", "M", "L")},
    )


def batch_of(
    target: Sequence[int], label: Sequence[int], histories: Sequence[Sequence[int]], *, observed: Any = None,
    user: Any = None, row: int = 0, view: Any = None,
) -> Batch:  # fmt: skip
    """One batch; histories are oldest first."""
    n, lengths = len(target), [len(h) for h in histories]
    values = {
        "category": torch.tensor([b for h in histories for b in h], dtype=torch.int64),
        "position": torch.tensor(
            [FIRST_VALUE + k for size in lengths for k in reversed(range(size))], dtype=torch.int64
        ),
    }
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)
    labels = torch.tensor(label)
    known = torch.ones(n, dtype=torch.bool) if observed is None else torch.tensor(observed)
    own = {"user": torch.full((n,), 3), "price": torch.zeros(n, 2), "item": torch.tensor(target)}
    return Batch(
        features={**own, "seen": Ragged(values, offsets)},
        labels={"click": labels.float(), "size": labels.long()},
        observed=dict.fromkeys(("click", "size"), known),
        domain=torch.full((n,), 2),
        weight=None,
        row=torch.arange(row, row + n),
        view=torch.zeros(n, dtype=torch.int8) if view is None else torch.tensor(view, dtype=torch.int8),
        pair=torch.full((n,), -1),
        meta={} if user is None else {"user": torch.tensor(user)},
    )  # fmt: skip


def random_batches(seed: int, batches: int = 4, rows: int = 60, size: int = 8, length: int = 6) -> list[Batch]:
    """Batches with unobserved labels, unknown and missing values, histories of 0 to ``length`` events."""
    rng = np.random.default_rng(seed)
    return [
        batch_of(
            rng.integers(0, size, rows), rng.integers(0, 2, rows),
            [rng.integers(0, size, rng.integers(0, length + 1)) for _ in range(rows)],
            observed=rng.random(rows) < 0.8, user=rng.integers(0, 9, rows), row=i * rows,
        )
        for i in range(batches)
    ]  # fmt: skip


class Scorer(nn.Module):
    """Attention scores by a function of (target, category, position) arrays, each (N,); remembers what it was asked."""

    def __init__(self, score: Callable[[Any, Any, Any], Any], field: str = "category", feature: str = "item") -> None:
        super().__init__()
        self.score, self.asked, self.field, self.feature = score, [], field, feature  # type: ignore[var-annotated]

    def event_scores(
        self, history: str, events: Ragged, target: Mapping[str, Tensor], *, view: str | None = None,
        fields: Collection[str] | None = None,
    ) -> Tensor:  # fmt: skip
        """See `unbraid.model.Model.event_scores`."""
        assert not self.training and not torch.is_grad_enabled()
        self.asked.append((history, set(events.values), set(target), view, fields))
        category = events.values[self.field]
        position = events.values.get("position", torch.zeros_like(category))
        a = target[self.feature][events.rows]
        found = self.score(a.numpy(), category.numpy(), position.numpy() - FIRST_VALUE + 1)
        return torch.as_tensor(np.broadcast_to(np.asarray(found, float), len(a)).copy())


class Views(nn.Module):
    """Hands out vectors by row number."""

    def __init__(self, **vectors: Any) -> None:
        super().__init__()
        self.vectors = {name: torch.as_tensor(v, dtype=torch.float32) for name, v in vectors.items()}

    def views(self, batch: Batch) -> dict[str, Tensor]:
        """See `unbraid.model.Model.views`."""
        assert not self.training and not torch.is_grad_enabled()
        return {name: v[batch.row] for name, v in self.vectors.items()}
