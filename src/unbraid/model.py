"""The model: encoders -> views -> interaction -> tower -> heads.

A view is a mapping field -> (B, D).  Every view holds the same fields, read from its own tables; numbers and given
vectors have no tables and are the same tensors in every view.

A history encoder may give further vectors for *second heads*: one small network per task that predicts it from them alone
(extras ``history.TASK``), so that a loss can reach every event although the view holds only a few that a search kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from unbraid.encoders.pooling import BagAttention, Mean, pool_bag
from unbraid.encoders.table import VALUE, Role, Table, Views
from unbraid.interactions.flat import Flat
from unbraid.layers import initialise, mlp, mlp_width, task_key
from unbraid.types import (
    FIRST_VALUE,
    FORBID,
    UNKNOWN,
    Batch,
    History,
    Interaction,
    Lookup,
    Output,
    Ragged,
    Rows,
    Schema,
)


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
        self._wire(getattr(encoder, "roles", VALUE))
        needed = [vocabulary for vocabulary, _ in self._reads.values()]
        ids = {f.vocab for f in schema.features if f.kind == "id"}
        self._direct = frozenset(name for name in ids if needed.count(name) == 1)
        by_role = {role: {v for v, roles in self._reads.values() if role in roles} for role in self._roles}
        self.embeddings = config.build(tasks, {name: schema.sizes[name] for name in needed}, self._roles, by_role)
        self.histories, self.bags = nn.ModuleDict(), nn.ModuleDict()
        self.interactions = nn.ModuleDict()
        for view, width in self.embeddings.widths.items():
            self.interactions[f"view/{view}"] = (interaction or Flat()).build(self._build_fields(view, width, encoder))
        views = list(self.embeddings.widths)
        self.tower = tower.build(tasks, views, [cast(Any, self.interactions[f"view/{v}"]).width for v in views])
        self.second = nn.ModuleDict()
        hidden = getattr(encoder, "auxiliary", ())
        for task in schema.tasks if hidden else ():
            width = sum(sum(module.second.values()) for _, module in self._second_of(task.name))
            self.second[task_key(task.name)] = _SecondHead(task.name, width, hidden, schema.outputs(task))
        by_domain = (heads or Heads()).by == "domain"
        self.heads = nn.ModuleDict(
            {f"task/{t.name}": _Head(self.tower.widths[t.name], schema.outputs(t), len(schema.domains) if by_domain else 1)
             for t in schema.tasks}
        )  # fmt: skip
        initialise(self)

    # ---------------------------------------------------------------------------------------------------------- building
    def _wire(self, roles: Mapping[str, Role]) -> None:
        """Who reads which tables: reader -> (vocabulary, roles); a history's field reads under ``history.field``."""
        self._roles = dict(roles)
        asked = {feature for history in self.schema.histories for feature in self.targets(history).values()}
        of_target = [role for role, config in roles.items() if role != "value" and config.reads != "events"]
        of_events = [role for role, config in roles.items() if config.reads != "target"]
        self._reads: dict[str, tuple[str, tuple[str, ...]]] = {
            name: (vocabulary, ("value", *(of_target if name in asked else ())))
            for name, vocabulary in self.vocabularies.items()
        }
        for history in self.schema.histories:
            for name in history.fields:
                self._reads[f"{history.name}.{name}"] = (self.schema.field_vocabulary(name), tuple(of_events))

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
            widths = {role: self.embeddings.width(view, role) for role in self._roles}
            fields_of, targets = dict.fromkeys(history.fields, width), dict.fromkeys(self.targets(history), width)
            module = encoder.build(fields_of, targets, **({"roles": widths} if hasattr(encoder, "roles") else {}))
            self.histories[f"{view}/{history.name}"] = module
            fields |= {f"{history.name}.{name}": w for name, w in module.widths.items()}
        return fields

    def _second_of(self, task: str) -> list[tuple[str, Any]]:
        """(key, module) of the history encoders that a task's second head reads: those of its own view and of views of none."""
        tasks = {t.name for t in self.schema.tasks}
        views = [view for view in self.embeddings.widths if view == task or view not in tasks]
        keys = [f"{view}/{history.name}" for view in views for history in self.schema.histories]
        return [(key, self.histories[key]) for key in keys if getattr(self.histories[key], "second", None)]

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
        rows, lookups = self._read(batch)
        second: dict[str, Tensor] = {}
        out = self.tower([self._hidden(view, batch, rows, second) for view in self.embeddings.widths])
        logits = {
            task.name: self.heads[f"task/{task.name}"](out.tasks[task.name], batch.domain, batch.observed[task.name])
            for task in self.schema.tasks
        }
        return Output(logits, out.tasks, out.shared, {**out.extras, **self._second_logits(second)}, lookups)

    def views(self, batch: Batch) -> dict[str, Tensor]:
        """view -> (B, width): what the tower reads."""
        rows, _ = self._read(batch)
        return {view: self._hidden(view, batch, rows, {}) for view in self.embeddings.widths}

    def event_scores(
        self, history: str, events: Ragged, target: Mapping[str, Tensor], *, view: str | None = None,
        fields: Collection[str] | None = None,
    ) -> Tensor:  # fmt: skip
        """(N,) attention scores of packed events, before any softmax.

        Args:
            history: a history's name; events: event field -> (N,) ids; target: row feature -> (B,) ids.
            view: whose tables; None: the last view (the shared one, if there is one).
            fields: event fields that count, all if None.

        Raises:
            ValueError: the history encoder scores no events, or not by single fields.
        """
        (found,) = (h for h in self.schema.histories if h.name == history)
        view = view or list(self.embeddings.widths)[-1]
        module = cast(Any, self.histories[f"{view}/{history}"])
        if not hasattr(module, "scores"):
            raise ValueError(f"History encoder `{type(module).__name__}` has no scores that are sums over fields.")
        readers = {f"{history}.{name}": events.values[name] for name in found.fields}
        readers |= {feature: target[feature] for feature in self.targets(found).values()}
        rows, _ = self._read_ids(readers)
        read, query = self._of_history(view, found, rows, target)
        return module.scores(read, events, query, fields)

    def _read(self, batch: Batch) -> tuple[dict[tuple[str, str], dict[str, Rows]], tuple[Lookup, ...]]:
        """(view, role) -> reader -> its reads, and the lookups."""
        ids: dict[str, Tensor] = {}
        for name in self.vocabularies:
            value = batch.features[name]
            ids[name] = value.values[name] if isinstance(value, Ragged) else value
        for history in self.schema.histories:
            packed = cast(Ragged, batch.features[history.name])
            ids |= {f"{history.name}.{name}": packed.values[name] for name in history.fields}
        return self._read_ids(ids)

    def _read_ids(self, ids: Mapping[str, Tensor]) -> tuple[dict[tuple[str, str], dict[str, Rows]], tuple[Lookup, ...]]:
        """As `_read`, of some readers' ids."""
        by_vocabulary: dict[str, list[str]] = {}
        for reader in ids:
            by_vocabulary.setdefault(self._reads[reader][0], []).append(reader)
        parts = {vocabulary: [ids[reader] for reader in readers] for vocabulary, readers in by_vocabulary.items()}
        roles = {
            vocabulary: [self._reads[reader][1] for reader in readers] for vocabulary, readers in by_vocabulary.items()
        }
        found, lookups = self.embeddings(parts, self._direct, roles)
        rows: dict[tuple[str, str], dict[str, Rows]] = {
            (view, role): {} for view in self.embeddings.widths for role in self._roles
        }
        for (view, vocabulary, role), reads in found.items():
            readers = [reader for reader in by_vocabulary[vocabulary] if role in self._reads[reader][1]]
            rows[view, role].update(zip(readers, reads, strict=True))
        return rows, lookups

    def _of_history(
        self, view: str, history: History, rows: Mapping[tuple[str, str], Mapping[str, Rows]], ids: Mapping[str, Any]
    ) -> tuple[dict[str, dict[str, Rows]], dict[str, dict[str, Tensor]]]:
        """role -> event field -> its reads, and role -> event field -> (B, D) of the row itself; ``id`` -> (B,) its ids."""
        events: dict[str, dict[str, Rows]] = {}
        target = {"id": {name: ids[feature] for name, feature in self.targets(history).items()}}
        for role in self._roles:
            reads = rows[view, role]
            mine = {name: f"{history.name}.{name}" for name in history.fields}
            events[role] = {name: reads[reader] for name, reader in mine.items() if reader in reads}
            asked = self.targets(history).items()
            target[role] = {name: reads[feature].gather() for name, feature in asked if feature in reads}
        return events, target

    def _hidden(
        self, view: str, batch: Batch, rows: Mapping[tuple[str, str], Mapping[str, Rows]], second: dict[str, Tensor]
    ) -> Tensor:
        """(B, width) of one view; what only second heads read goes into ``second``."""
        fields: dict[str, Tensor] = {}
        values = rows[view, "value"]
        for f in self.schema.features:
            value = batch.features[f.name]
            if f.kind == "id":
                fields[f.name] = values[f.name].gather()
            elif isinstance(value, Ragged):
                key = f"{view}/{f.name}"
                attention = self.bags[key] if key in self.bags else None
                fields[f.name] = pool_bag(values[f.name], value, f.pooling, attention)  # type: ignore[arg-type]
            else:
                fields[f.name] = value
        for history in self.schema.histories:
            key = f"{view}/{history.name}"
            module = cast(Any, self.histories[key])
            events, target = self._of_history(view, history, rows, batch.features)
            pooled = module(events, batch.features[history.name], target)
            fields |= {f"{history.name}.{name}": pooled[name] for name in module.widths}
            if (more := getattr(module, "second", None)) and self.training:
                second[key] = torch.cat([pooled[name] for name in more], 1)
        return self.interactions[f"view/{view}"](fields)

    def _second_logits(self, second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Extras of the second heads, (B,) or (B, K), while training: they would cost serving a pass over all events."""
        extras = {}
        for task in self.schema.tasks if len(self.second) and self.training else ():
            read = torch.cat([second[key] for key, _ in self._second_of(task.name)], 1)
            extras[f"history.{task.name}"] = self.second[task_key(task.name)](read)
        return extras


class _SecondHead(nn.Module):
    """An MLP that predicts one task from what its histories give for it."""

    def __init__(self, task: str, width: int, hidden: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.gives = (f"history.{task}",)
        self.layers = nn.Sequential(mlp(width, hidden), nn.Linear(mlp_width(width, hidden), outputs))
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B,) or (B, K) logits."""
        logits = self.layers(x)
        return logits.squeeze(1) if self.outputs == 1 else logits


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
