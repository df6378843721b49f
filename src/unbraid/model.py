"""The model: encoders -> views -> interaction -> tower -> heads.

A view is a mapping field -> (B, D).  Every view holds the same fields, read from its own tables; numbers and given
vectors have no tables and are the same tensors in every view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from unbraid.encoders.pooling import BagAttention, Mean, pool_bag
from unbraid.encoders.table import Table, Views
from unbraid.interactions.flat import Flat
from unbraid.layers import initialise
from unbraid.types import FIRST_VALUE, FORBID, UNKNOWN, Batch, Interaction, Output, Ragged, Rows, Schema


@dataclass(frozen=True)
class Heads:
    """One linear head per task, or one per task and domain (``by = "domain"``)."""

    __pydantic_config__: ClassVar[dict] = FORBID
    by: Literal["task", "domain"] = "task"


class Model(nn.Module):
    """See the module's docstring.

    Args:
        schema: what is read and predicted.
        tables: which embedding tables; interaction, tower, history: the members of their slots; heads: per task or domain.
    """

    def __init__(
        self, schema: Schema, tower: Any, tables: Views | None = None, interaction: Interaction | None = None,
        history: Any = None, heads: Heads | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.schema, config = schema, tables or Views()
        encoder = history or Mean()
        tasks = [task.name for task in schema.tasks]
        if getattr(encoder, "needs_target", False) and not any(self.targets(h) for h in schema.histories):
            raise ValueError(
                f"History encoder `{encoder.kind}` needs a history with an event field whose vocabulary is also an id feature of "
                f"the row. Found histories {[(h.name, *h.fields) for h in schema.histories]}."
            )
        self.vocabularies = {f.name: f.vocab for f in schema.features if f.kind in ("id", "bag")}
        needed = self._tables_needed()
        sizes = {name: schema.sizes[name] for name in needed}
        ids = {f.vocab for f in schema.features if f.kind == "id"}
        self._direct = frozenset(name for name in ids if needed.count(name) == 1)
        self.embeddings = config.build(tasks, sizes, getattr(encoder, "roles", ("value",)))
        self.histories, self.bags = nn.ModuleDict(), nn.ModuleDict()
        self.interactions = nn.ModuleDict()
        for view, width in self.embeddings.widths.items():
            self.interactions[f"view/{view}"] = (interaction or Flat()).build(self._build_fields(view, width, encoder))
        views = list(self.embeddings.widths)
        self.tower = tower.build(tasks, views, [cast(Any, self.interactions[f"view/{v}"]).width for v in views])
        by_domain = (heads or Heads()).by == "domain"
        self.heads = nn.ModuleDict(
            {f"task/{t.name}": _Head(self.tower.widths[t.name], schema.outputs(t), len(schema.domains) if by_domain else 1)
             for t in schema.tasks}
        )  # fmt: skip
        initialise(self)

    # ---------------------------------------------------------------------------------------------------------- building
    def _tables_needed(self) -> list[str]:
        """The vocabulary of every reader, in order: once per reader."""
        names = list(self.vocabularies.values())
        return names + [self.schema.field_vocabulary(f) for h in self.schema.histories for f in h.fields]

    def targets(self, history: Any) -> dict[str, str]:
        """Event field -> the id feature of the same vocabulary: what the row itself has of what its events have."""
        ids = {f.vocab: f.name for f in reversed(self.schema.features) if f.kind == "id"}
        vocabularies = {name: self.schema.field_vocabulary(name) for name in history.fields}
        return {name: ids[vocab] for name, vocab in vocabularies.items() if vocab in ids}

    def _build_fields(self, view: str, width: int, encoder: Any) -> dict[str, int]:
        """Make the view's history encoders and bag poolers; return its fields and their widths."""
        fields: dict[str, int] = {}
        for f in self.schema.features:
            fields[f.name] = {"number": 2, "vector": self.schema.widths.get(f.name, 0)}.get(f.kind, width)
            if f.kind == "bag" and f.pooling == "attention":
                self.bags[f"{view}/{f.name}"] = BagAttention(width)
        for history in self.schema.histories:
            module = encoder.build(dict.fromkeys(history.fields, width), dict.fromkeys(self.targets(history), width))
            self.histories[f"{view}/{history.name}"] = module
            fields |= {f"{history.name}.{name}": w for name, w in module.widths.items()}
        return fields

    @property
    def tables(self) -> Mapping[str, Table]:
        """Every embedding table by the name that its lookups carry."""
        return dict(self.embeddings.tables.items())  # type: ignore[arg-type]

    @property
    def gives(self) -> frozenset[str]:
        """Names of the extras in its output, as its members state them."""
        members = (member for child in self.children() for member in child.modules())
        return frozenset(name for member in members for name in getattr(member, "gives", ()))

    # ----------------------------------------------------------------------------------------------------------- forward
    def forward(self, batch: Batch, step: int | None = None) -> Output:
        """What the model says about a batch.  ``step`` is for members whose behaviour depends on training time."""
        readers = self._readers(batch)
        read, lookups = self.embeddings({v: [ids for _, ids in parts] for v, parts in readers.items()}, self._direct)
        hidden = []
        for view in self.embeddings.widths:
            rows: dict[str, dict[str, Rows]] = {role: {} for role in self.embeddings.roles}
            for vocabulary, parts in readers.items():
                for role in self.embeddings.roles:
                    for (reader, _), found in zip(parts, read[view, vocabulary, role], strict=True):
                        rows[role][reader] = found
            hidden.append(self.interactions[f"view/{view}"](self._view(view, batch, rows)))
        out = self.tower(hidden)
        logits = {
            task.name: self.heads[f"task/{task.name}"](out.tasks[task.name], batch.domain, batch.observed[task.name])
            for task in self.schema.tasks
        }
        return Output(logits, out.tasks, out.shared, out.extras, lookups)

    def _readers(self, batch: Batch) -> dict[str, list[tuple[str, Tensor]]]:
        """Vocabulary -> who reads which ids; a history's field reads under ``history.field``."""
        readers: dict[str, list[tuple[str, Tensor]]] = {}
        for name, vocabulary in self.vocabularies.items():
            value = batch.features[name]
            ids = value.values[name] if isinstance(value, Ragged) else value
            readers.setdefault(vocabulary, []).append((name, ids))
        for history in self.schema.histories:
            packed = batch.features[history.name]
            assert isinstance(packed, Ragged)
            for name in history.fields:
                readers.setdefault(self.schema.field_vocabulary(name), []).append(
                    (f"{history.name}.{name}", packed.values[name])
                )
        return readers

    def _view(self, view: str, batch: Batch, rows: Mapping[str, Mapping[str, Rows]]) -> dict[str, Tensor]:
        """All fields of one view: field -> (B, D)."""
        fields: dict[str, Tensor] = {}
        for f in self.schema.features:
            value = batch.features[f.name]
            if f.kind == "id":
                fields[f.name] = rows["value"][f.name].gather()
            elif isinstance(value, Ragged):
                key = f"{view}/{f.name}"
                attention = self.bags[key] if key in self.bags else None
                fields[f.name] = pool_bag(rows["value"][f.name], value, f.pooling, attention)  # type: ignore[arg-type]
            else:
                fields[f.name] = value
        for history in self.schema.histories:
            packed = batch.features[history.name]
            target = {
                role: {name: reads[feature].gather() for name, feature in self.targets(history).items()}
                for role, reads in rows.items()
            }
            events = {role: {n: reads[f"{history.name}.{n}"] for n in history.fields} for role, reads in rows.items()}
            pooled = self.histories[f"{view}/{history.name}"](events, packed, target)
            fields |= {f"{history.name}.{name}": vector for name, vector in pooled.items()}
        return fields


class _Head(nn.Module):
    """Linear heads of one task, one per domain or one for all.

    A domain without an observed row of the task in the batch is read detached: a zero gradient would let momentum and
    weight decay move its head.
    """

    def __init__(self, width: int, outputs: int, domains: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.linears = nn.ModuleList(nn.Linear(width, outputs) for _ in range(domains))

    def forward(self, hidden: Tensor, domain: Tensor, observed: Tensor) -> Tensor:
        """(B,) or (B, K)."""
        if len(self.linears) == 1:
            logits = self.linears[0](hidden)
            return logits.squeeze(1) if self.outputs == 1 else logits
        if self.training:
            live = torch.bincount(domain[observed], minlength=len(self.linears)).bool().tolist()
        else:
            live = [True] * len(self.linears)
        weights, biases = self._stacked("weight", live), self._stacked("bias", live)
        logits = torch.einsum("bh,bkh->bk", hidden, weights[domain]) + biases[domain]
        return logits.squeeze(1) if self.outputs == 1 else logits

    def _stacked(self, part: str, live: list[bool]) -> Tensor:
        """(domains, ...) weights or biases; a domain that training did not know has the mean of those it knew."""
        parts = [
            getattr(m, part) if on else getattr(m, part).detach() for m, on in zip(self.linears, live, strict=True)
        ]
        if not self.training:
            parts[UNKNOWN] = torch.stack(parts[FIRST_VALUE:]).mean(0)
        return torch.stack(parts)
