"""The model: encoders -> views -> interaction -> tower -> heads.

A view is a mapping field -> (B, D).  Every view holds the same fields, read from its own tables, those of number and vector
encoders included; numbers and vectors that are given as they are, are the same tensors in every view.  So are the vectors that
backbones make of pictures and texts: they are read, projected or compared as given vectors are.

A history encoder may give further vectors for *second heads*: one small network per task that predicts it from them alone
(extras ``history.TASK``), so that a loss can reach every event although the view holds only a few that a search kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from unbraid.class_head import Classes, ClassHead, require_tasks
from unbraid.encoders.numbers import NumberEncoder, Spread, Standardise, require_features
from unbraid.encoders.pooling import BagAttention, Mean, pool_bag
from unbraid.encoders.table import VALUE, Role, Table, Views
from unbraid.encoders.vectors import Raw, VectorEncoder
from unbraid.heads import Head, Heads, SecondHead, TaskHead
from unbraid.interactions.flat import Flat
from unbraid.layers import initialise, task_key
from unbraid.slots import ExtraHead, Interaction, TowerOutput
from unbraid.towers.domains import DomainTower, domain_names, of_domains
from unbraid.types import EXACT, FIRST_VALUE, Batch, History, Lookup, Output, Ragged, Rows, Schema, Shared


class Model(nn.Module):
    """See the module's docstring.

    Args:
        schema: what is read and predicted.
        tables: which embedding tables; interaction, tower, history: the members of their slots; heads: per task or domain.
        experts: several interactions per view instead of one: each has a ``view``, by its place, and an ``interaction``.
            The tower then reads one hidden vector per expert, in this order.
        numbers, vectors: the members of their slots; numbers_of: number feature -> its own member.
        history_of: history -> its own encoder, which reads value tables alone and has no second heads.
        classes: multiclass task -> vectors of its classes, in the place of a linear head.
        extra_heads: what only losses read, while training (a classifier of domains ...): their outputs are extras.
        backbones: kind of feature, ``image`` or ``text`` -> what makes vectors of them (`unbraid.slots.Backbone`).
    """

    def __init__(
        self, schema: Schema, tower: Any, tables: Views | None = None, interaction: Interaction | None = None,
        history: Any = None, heads: Heads | None = None, experts: Sequence[Any] = (),
        numbers: NumberEncoder | None = None, numbers_of: Mapping[str, NumberEncoder] | None = None,
        vectors: VectorEncoder | None = None, history_of: Mapping[str, Any] | None = None,
        extra_heads: Sequence[ExtraHead] = (), classes: Mapping[str, Classes] | None = None,
        backbones: Mapping[str, nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.schema, config = schema, tables or Views()
        encoder, self._apart = history or Mean(), frozenset(history_of or ())
        require_encoders(schema.histories, encoder, history_of or {})
        encoders: dict[str, Any] = {h.name: encoder for h in schema.histories} | dict(history_of or {})
        tasks = [task.name for task in schema.tasks]
        owners = domain_names(schema) if config.by == "domain" else tasks
        plan = expert_plan(experts, interaction or Flat(), config, config.names(owners))
        self._require_targets(encoder, [h for h in schema.histories if h.name not in self._apart])
        for history in schema.histories:
            if history.name in self._apart:
                self._require_targets(encoders[history.name], [history])
        self.vocabularies = {f.name: f.vocab for f in schema.features if f.kind in ("id", "bag")}
        self._wire(getattr(encoder, "roles", VALUE))
        needed = [vocabulary for vocabulary, _ in self._reads.values()]
        ids = {f.vocab for f in schema.features if f.kind == "id"}
        self._direct = frozenset(name for name in ids if needed.count(name) == 1)
        by_role = {role: {v for v, roles in self._reads.values() if role in roles} for role in self._roles}
        self.embeddings = config.build(owners, {name: schema.sizes[name] for name in needed}, self._roles, by_role)
        self.histories, self.bags = nn.ModuleDict(), nn.ModuleDict()
        self.numbers, self.vectors, self.interactions = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        require_features(schema.features, "number", numbers_of or (), "model.numbers_of")
        plain = {f.name: numbers or Standardise() for f in schema.features if f.kind == "number"}
        self.vector_widths = vector_widths(schema, backbones or {})
        for view, width in self.embeddings.widths.items():
            self._build_given(view, width, config.std, {**plain, **(numbers_of or {})}, vectors or Raw())
        for view, width in self.embeddings.widths.items():
            fields = self._build_fields(view, width, encoders)
            for name, (read, chosen) in plan.items():
                if read == view:
                    self.interactions[view_key(name)] = chosen.build(fields)
        self.experts = {name: view for name, (view, _) in plan.items()}
        self.tower = self._tower(tower, tasks, owners, config.by)
        self._build_second(getattr(encoder, "auxiliary", ()), config.by)
        self._build_heads(heads or Heads(), classes or {})
        initialise(self)
        # After what draws all weights anew: these bring their own.
        self.backbones = nn.ModuleDict(dict(backbones or {}))
        self._build_extra_heads(extra_heads)  # after all else is drawn, which is then what it is without them

    # ---------------------------------------------------------------------------------------------------------- building
    def _wire(self, roles: Mapping[str, Role]) -> None:
        """Who reads which tables: reader -> (vocabulary, roles); a history's field reads under ``history.field``."""
        self._roles = dict(roles)
        searched = [history for history in self.schema.histories if history.name not in self._apart]
        asked = {feature for history in searched for feature in self.targets(history).values()}
        of_target = [role for role, config in roles.items() if role != "value" and config.reads != "events"]
        of_events = [role for role, config in roles.items() if config.reads != "target"]
        self._reads: dict[str, tuple[str, tuple[str, ...]]] = {
            name: (vocabulary, ("value", *(of_target if name in asked else ())))
            for name, vocabulary in self.vocabularies.items()
        }
        for history in self.schema.histories:
            read = ("value",) if history.name in self._apart else tuple(of_events)
            for name in history.fields:
                self._reads[f"{history.name}.{name}"] = (self.schema.field_vocabulary(name), read)

    def targets(self, history: Any) -> dict[str, str]:
        """Event field -> the id feature of the same vocabulary: what the row itself has of what its events have."""
        ids = {f.vocab: f.name for f in reversed(self.schema.features) if f.kind == "id"}
        vocabularies = {name: self.schema.field_vocabulary(name) for name in history.fields}
        return {name: ids[vocab] for name, vocab in vocabularies.items() if vocab in ids}

    def _require_targets(self, encoder: Any, histories: Sequence[History]) -> None:
        """Raise ValueError if the encoder asks for what the row itself has, and none of its histories has a field for that."""
        asks = bool(histories) and getattr(encoder, "needs_target", False)
        if asks and not any(self.targets(history) for history in histories):
            raise ValueError(
                f"History encoder `{encoder.kind}` needs a history with an event field whose vocabulary is also an id feature "
                f"of the row. Found histories {[(h.name, *h.fields) for h in histories]}."
            )

    def _build_given(
        self, view: str, width: int, std: float, numbers: Mapping[str, NumberEncoder], vectors: VectorEncoder
    ) -> None:
        """Make the view's encoders of numbers and of given vectors."""
        for name, encoder in numbers.items():
            self.numbers[f"{view_key(view)}/{name}"] = encoder.build(Spread.of(self.schema, name), width, std)
        if self.vector_widths:
            self.vectors[view_key(view)] = vectors.build(self.vector_widths, width, std)

    def _build_fields(self, view: str, width: int, encoders: Mapping[str, Any]) -> dict[str, int]:
        """Make the view's history encoders and bag poolers; return its fields and their widths."""
        fields: dict[str, int] = {}
        vectors = cast(Any, self.vectors[view_key(view)]).widths if len(self.vectors) else {}
        for f in self.schema.features:
            if f.kind == "number":
                fields[f.name] = cast(Any, self.numbers[f"{view_key(view)}/{f.name}"]).width
            elif f.name in self.vector_widths:
                fields |= {f.name: vectors[f.name]} if f.name in vectors else {}
            else:
                fields[f.name] = width
            if f.kind == "bag" and f.pooling == "attention":
                self.bags[f"{view}/{f.name}"] = BagAttention(width)
        fields |= vectors  # the fields that are no feature's own come last
        for history in self.schema.histories:
            widths = {role: self.embeddings.width(view, role) for role in self._roles}
            encoder = encoders[history.name]
            fields_of, targets = dict.fromkeys(history.fields, width), dict.fromkeys(self.targets(history), width)
            module = encoder.build(fields_of, targets, **({"roles": widths} if hasattr(encoder, "roles") else {}))
            self.histories[f"{view}/{history.name}"] = module
            fields |= {f"{history.name}.{name}": w for name, w in module.widths.items()}
        return fields

    def _tower(self, tower: Any, tasks: Sequence[str], owners: Sequence[str], by: str) -> Any:
        """The tower for the interactions' widths."""
        names = list(self.experts)
        widths = [cast(Any, self.interactions[view_key(name)]).width for name in names]
        if by == "domain":
            return DomainTower(of_domains(tower, self.schema), tasks, owners, names, widths)
        if getattr(tower, "reads_domains", False):
            return tower.build(tasks, names, widths, domains=len(self.schema.domains) - FIRST_VALUE)
        if not getattr(tower, "reads_roles", False):
            return tower.build(tasks, names, widths)
        return tower.build(tasks, names, widths, [task.name for task in self.schema.tasks if task.role == "target"])

    def _build_second(self, hidden: tuple[int, ...], by: str) -> None:
        """Make the second heads; ``hidden``: widths of their layers, none where the history encoder has no second heads."""
        self.second = nn.ModuleDict()
        if hidden and by == "domain":
            raise ValueError("Second heads of tasks would write the tables of all domains. Leave `auxiliary` empty.")
        for task in self.schema.tasks if hidden else ():
            width = sum(sum(module.second.values()) for _, module in self._second_of(task.name))
            self.second[task_key(task.name)] = SecondHead(task.name, width, hidden, self.schema.outputs(task))

    def _build_heads(self, config: Heads, classes: Mapping[str, Classes]) -> None:
        """Make each task's head, or its heads of all domains."""
        self.heads_by = config.by
        domains = len(self.schema.domains) if config.by == "domain" else 1
        self.heads = nn.ModuleDict()
        for task in self.schema.tasks:
            two = f"heads.two.{task.name}" if config.two and task.kind == "binary" else ""
            head = TaskHead(self.tower.widths[task.name], self.schema.outputs(task), domains, two, config)
            self.heads[task_key(task.name)] = head
        self._give_classes(classes, config)

    def _build_extra_heads(self, configs: Sequence[ExtraHead]) -> None:
        """Make what only losses read."""
        self.extra_heads = nn.ModuleDict()
        if configs:
            trunk = self._trunk_width()
            hidden = {t.name: cast(TaskHead, self.heads[task_key(t.name)]).width for t in self.schema.tasks}
            self.extra_heads.update({e.kind: initialise(e.build(self.schema, trunk, hidden)) for e in configs})

    def _give_classes(self, classes: Mapping[str, Classes], config: Heads) -> None:
        """Put heads with given vectors of classes in the place of those tasks' own."""
        require_tasks(self.schema.tasks, classes)
        if classes and config.by == "domain":
            raise ValueError("Vectors of classes are those of all domains. Set `model.heads.by` to `task`.")
        for task, given in classes.items():
            head = ClassHead(task, given, self.tower.widths[task], config.hidden, config.dropout)
            if len(head.vectors) != (count := self.schema.outputs(self.schema.task(task))):
                raise ValueError(f"Task `{task}` has {count} classes. Found {len(head.vectors)} vectors.")
            self.heads[task_key(task)] = head

    @torch.no_grad()
    def _trunk_width(self) -> int:
        """Width of the trunk, from a row of zeros: towers state the widths of tasks alone."""
        hidden = [torch.zeros(1, cast(Any, self.interactions[view_key(name)]).width) for name in self.experts]
        row = (torch.full((1,), FIRST_VALUE), torch.ones(1, dtype=torch.bool))
        self.tower.eval()
        found: Tensor = self.tower(hidden, *(row if getattr(self.tower, "reads_domain", False) else ())).trunk
        self.tower.train()
        return found.shape[1]

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
        names = frozenset(name for member in members for name in getattr(member, "gives", ()))
        return names.difference(getattr(self.tower, "renamed", ()))

    @property
    def dense_parts(self) -> list[nn.Module]:
        """What may train in another precision or compiled (`unbraid.train.dense`): all that reads nothing but numbers of rows.

        Not the heads: a logit of bfloat16 would have three digits.
        """
        return [*self.backbones.values(), *self.interactions.values(), self.tower]

    @property
    def constants(self) -> frozenset[str]:
        """Names of the extras that are not one per row, as its heads state them."""
        return frozenset(name for head in self.heads.values() for name in getattr(head, "constants", ()))

    # ----------------------------------------------------------------------------------------------------------- forward
    def forward(self, batch: Batch) -> Output:
        """What the model says about a batch."""
        out, lookups = self.trunk(batch)
        logits, hidden, two = {}, {}, dict[str, Tensor]()
        for task in self.schema.tasks:
            head = cast(TaskHead, self.heads[task_key(task.name)])
            observed = of_live_domains(batch, partial(_observed, task.name))
            found, hidden[task.name] = head(out.tasks[task.name], batch.domain, observed)
            logits[task.name], more = head.finish(found)
            two |= more
        output = Output(logits, hidden, out.shared, {**out.extras, **two}, lookups)
        if not (self.training and len(self.extra_heads)):
            return output
        output = replace(output, shared=lambda: out.trunk)  # made once, whoever reads it
        extra = {name: value for head in self.extra_heads.values() for name, value in head(output).items()}
        return replace(output, extras={**output.extras, **extra})

    def trunk(self, batch: Batch) -> tuple[TowerOutput, tuple[Lookup, ...]]:
        """All below the heads: what the tower gives (second heads' logits among its extras), and the lookups."""
        batch = self._with_own_lists(batch)
        rows, lookups = self._read(batch)
        second: dict[str, Tensor] = {}
        hidden = list(self._all_hidden(batch, rows, second).values())
        reads = getattr(self.tower, "reads_domain", False)
        domains = (batch.domain, of_live_domains(batch, counted_rows)) if reads else ()
        out = self.tower(hidden, *domains)
        return TowerOutput(out.tasks, out.shared, {**out.extras, **self._second_logits(second)}), lookups

    # ------------------------------------------------------------------------------------------------- heads per domain
    def tie_heads(self) -> None:
        """Make all domains' heads of a task one module, the first known domain's: whatever reads it trains it."""
        for head in self.heads.values():
            cast(TaskHead, head).tie()

    def untie_heads(self, fresh: Collection[int] = (), seed: int = 0) -> None:
        """Give every domain a copy of the head that `tie_heads` made; those of domains ``fresh`` (codes) are drawn anew."""
        for place, head in enumerate(self.heads.values()):
            cast(TaskHead, head).untie(fresh, seed + place)

    def domain_heads(self, domain: int) -> nn.ModuleDict:
        """Task's key -> the head of one domain (its code), the live module: (B, H) -> `Head.forward`."""
        return nn.ModuleDict({key: Head(cast(TaskHead, head), domain) for key, head in self.heads.items()})

    def views(self, batch: Batch) -> dict[str, Tensor]:
        """view, or expert where there are any -> (B, width): what the tower reads."""
        batch = self._with_own_lists(batch)
        rows, _ = self._read(batch)
        return self._all_hidden(batch, rows, {})

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

    def _with_own_lists(self, batch: Batch) -> Batch:
        """The batch with a list for each row where an encoder does not read one that all rows share."""
        given: dict[str, Any] = {h.name: batch.features[h.name] for h in self.schema.histories}
        repeated = {
            name: one.repeated()
            for name, one in given.items()
            if isinstance(one, Shared)
            and not all(getattr(self.histories[f"{view}/{name}"], "shared", False) for view in self.embeddings.widths)
        }
        return replace(batch, features={**batch.features, **repeated}) if repeated else batch

    def _read(self, batch: Batch) -> tuple[dict[tuple[str, str], dict[str, Rows]], tuple[Lookup, ...]]:
        """(view, role) -> reader -> its reads, and the lookups."""
        ids: dict[str, Tensor] = {}
        for name in self.vocabularies:
            value = batch.features[name]
            ids[name] = value.values[name] if isinstance(value, Ragged) else cast(Tensor, value)
        for history in self.schema.histories:
            packed = cast("Ragged | Shared", batch.features[history.name])
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

    def _all_hidden(
        self, batch: Batch, rows: Mapping[tuple[str, str], Mapping[str, Rows]], second: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """expert -> (B, width), in the tower's order; what only second heads read goes into ``second``."""
        given = self._vectors(batch)
        fields = {view: self._fields(view, batch, rows, second, given) for view in self.embeddings.widths}
        return {name: self.interactions[view_key(name)](fields[view]) for name, view in self.experts.items()}

    def _vectors(self, batch: Batch) -> dict[str, Tensor]:
        """feature -> (B, D), of given vectors, pictures and texts; those of a backbone may be remembered, and come as vectors."""
        found: dict[str, Tensor] = {}
        for f in self.schema.features:
            if f.name in self.vector_widths:
                value = cast(Tensor, batch.features[f.name])
                read = f.has_content and not (value.dim() == 2 and value.is_floating_point())
                found[f.name] = self.backbones[f.kind](value) if read else value
        return found

    def _fields(
        self, view: str, batch: Batch, rows: Mapping[tuple[str, str], Mapping[str, Rows]], second: dict[str, Tensor],
        given: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """field -> (B, D) of one view; what only second heads read goes into ``second``."""
        fields: dict[str, Tensor] = {}
        values = rows[view, "value"]
        if len(self.vectors):
            fields |= self.vectors[view_key(view)](given)
        for f in self.schema.features:
            value = batch.features[f.name]
            if f.kind == "id":
                fields[f.name] = values[f.name].gather()
            elif isinstance(value, Ragged):
                key = f"{view}/{f.name}"
                attention = self.bags[key] if key in self.bags else None
                fields[f.name] = pool_bag(values[f.name], value, f.pooling, attention)  # type: ignore[arg-type]
            elif f.kind == "number":
                fields[f.name] = self.numbers[f"{view_key(view)}/{f.name}"](value, batch.features.get(f.name + EXACT))
        for history in self.schema.histories:
            key = f"{view}/{history.name}"
            module = cast(Any, self.histories[key])
            events, target = self._of_history(view, history, rows, batch.features)
            pooled = module(events, batch.features[history.name], target)
            fields |= {f"{history.name}.{name}": pooled[name] for name in module.widths}
            if (more := getattr(module, "second", None)) and self.training:
                second[key] = torch.cat([pooled[name] for name in more], 1)
        return fields

    def _second_logits(self, second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Extras of the second heads, (B,) or (B, K), while training: they would cost serving a pass over all events."""
        extras = {}
        for task in self.schema.tasks if len(self.second) and self.training else ():
            read = torch.cat([second[key] for key, _ in self._second_of(task.name)], 1)
            extras[f"history.{task.name}"] = self.second[task_key(task.name)](read)
        return extras


def vector_widths(schema: Schema, backbones: Mapping[str, nn.Module]) -> dict[str, int]:
    """feature -> D, of vectors, pictures and texts.  Raises ValueError for a feature that no backbone reads."""
    found = {}
    for f in schema.features:
        if f.has_content and f.kind not in backbones:
            raise ValueError(
                f"Feature `{f.name}` is of kind `{f.kind}`, and no backbone reads it: set `model.{f.kind}s`."
            )
        if f.has_content or f.kind == "vector":
            found[f.name] = cast(Any, backbones[f.kind]).width if f.has_content else schema.widths.get(f.name, 0)
    return found


def require_encoders(histories: Sequence[History], encoder: Any, history_of: Mapping[str, Any]) -> None:
    """Check the histories' own encoders.

    Raises:
        ValueError: of a history that is not there; with tables beside the features' own, or second heads; or every history
            has one of its own, so that nothing reads ``encoder`` although it was set.
    """
    names = [history.name for history in histories]
    if wrong := sorted(set(history_of) - set(names)):
        raise ValueError(f"`model.history_of` should name histories, among {names}. Found {wrong}.")
    for name, own in history_of.items():
        own_tables = set(getattr(own, "roles", VALUE)) != {"value"}
        if own_tables or getattr(own, "auxiliary", None):
            raise ValueError(
                f"An encoder of `model.history_of` reads the features' own tables and has no second heads. History `{name}` has "
                f"`{own.kind}`: make it `model.history`, and name the other histories in `model.history_of`."
            )
    if history_of and set(history_of) == set(names) and encoder != Mean():
        raise ValueError(
            f"`model.history_of` names all histories, {names}: no history is left for `{encoder.kind}` of `model.history`. "
            f"Leave one out, or leave out `model.history`."
        )


def view_key(name: str) -> str:
    """Name of a view's or an expert's interaction inside an ``nn.ModuleDict``, which allows no dot."""
    return f"view/{name}".replace(".", "_")


def expert_plan(
    experts: Sequence[Any], interaction: Interaction, config: Views, views: Sequence[str]
) -> dict[str, tuple[str, Any]]:
    """name -> (view, interaction): one per view under the view's name, or the given ``experts`` as ``view0.cross``.

    A second expert of the same kind on one view is ``view0.cross.2``.

    Raises:
        ValueError: experts, where views belong to tasks or domains; an expert of a view that is not there; a view without one.
    """
    if not experts:
        return {view: (view, interaction) for view in views}
    if config.kind not in ("shared", "several"):
        raise ValueError(
            f"`experts` read views that belong to no task. Found model.tables.kind `{config.kind}`. Set it to `shared` or "
            f"`several`, or set `model.experts` to []."
        )
    read = [each.view for each in experts]
    if set(read) != set(range(len(views))):
        raise ValueError(
            f"`experts` should read each view from 0 to {len(views) - 1} and no other. Found experts of views {read}."
        )
    plan: dict[str, tuple[str, Any]] = {}
    for each in experts:
        view, name = views[each.view], f"{views[each.view]}.{each.interaction.kind}"
        before = sum(taken == name or taken.startswith(f"{name}.") for taken in plan)
        plan[f"{name}.{before + 1}" if before else name] = (view, each.interaction)
    return plan


def counted_rows(batch: Batch) -> Tensor:
    """(B,) bool: rows that are observed for some task and whose weight is not 0."""
    observed = torch.stack(list(batch.observed.values())).any(0)
    return observed if batch.weight is None else observed & (batch.weight > 0)


def _observed(task: str, batch: Batch) -> Tensor:
    return batch.observed[task]


def of_live_domains(batch: Batch, which: Callable[[Batch], Tensor]) -> Tensor:
    """(B,) bool: which rows count, to somebody who asks only whether any row of a domain does.

    Of a batch that several processes share these are the rows of domains that have such a row in any of them.
    """
    if batch.whole is batch:
        return which(batch)
    return torch.isin(batch.domain, batch.whole.domain[which(batch.whole)])
