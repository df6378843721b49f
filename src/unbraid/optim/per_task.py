"""One gradient per objective: what all updates share that look at every task's own gradient before they move anything.

One forward pass, then one backward pass per objective (``torch.autograd.grad``), each of which stops at the *leaves* of the
step:

- a trained dense parameter; a dense table's whole weight, or its looked-up rows for a class with ``reads_dense_lookups``;
- the looked-up rows (U, D) of a trained lazy table.

Leaves are named as in the states of `JointUpdate`: a parameter by its name, rows by their table's.  A leaf is *shared* once
gradients of two objectives have reached it, and until then its objective's own.  That is remembered, in the state too, so
that a batch without some task changes nothing about which parameters are shared.

An objective (a task, a domain, ``task@domain``) that is absent from the losses or has weight 0 takes no part, and neither
has a gradient for leaves that its loss does not reach: it is absent there, not 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from unbraid import parallel, sharding
from unbraid.optim.joint import Joint, JointUpdate, spread
from unbraid.types import Losses, Output, State


@dataclass(frozen=True)
class Gradients:
    """One step's gradients of the losses, unweighted.

    Args:
        of: objective, in the order of the losses -> leaf -> gradient.  A leaf that it does not reach is absent.
        ids: table whose leaf is its looked-up rows -> their distinct ids (U,).
    """

    of: Mapping[str, Mapping[str, Tensor]]
    ids: Mapping[str, Tensor]

    def leaves(self) -> list[str]:
        """All leaves that some objective reaches, in a fixed order."""
        return sorted({name for grads in self.of.values() for name in grads})

    def reaching(self, leaf: str) -> list[str]:
        """The objectives that reach a leaf."""
        return [objective for objective, grads in self.of.items() if leaf in grads]

    def weighted(self, leaf: str, weight: Mapping[str, float]) -> Tensor:
        """Sum over the objectives that reach a leaf of weight times gradient: the joint update's gradient."""
        found = [self.of[objective][leaf] * weight[objective] for objective in self.reaching(leaf)]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def matrix(self, leaves: Sequence[str]) -> Tensor:
        """(K, n) gradients of all K objectives side by side over the given leaves; 0 where one does not reach."""
        like = self._some(leaves)
        rows = [
            torch.cat([grads[name].flatten() if name in grads else like[name].new_zeros(like[name].numel()) for name in leaves])
            for grads in self.of.values()
        ]  # fmt: skip
        return torch.stack(rows)

    def split(self, vector: Tensor, leaves: Sequence[str]) -> dict[str, Tensor]:
        """The inverse of one row of `matrix`: (n,) -> leaf -> tensor of the leaf's shape."""
        like = self._some(leaves)
        parts = vector.split([like[name].numel() for name in leaves])
        return {name: part.view_as(like[name]) for name, part in zip(leaves, parts, strict=True)}

    def _some(self, leaves: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.of[self.reaching(name)[0]][name] for name in leaves}


class PerTask(JointUpdate):
    """An update from one gradient per objective.

    A subclass defines `combine`: which gradient every leaf shall step with; clipping, Adam, the rows of lazy tables, decay and
    the learning rate are then those of `JointUpdate`.  An update with state of its own per objective defines `act` instead.
    As it stands this class sums the weighted gradients: the joint update, at the price of a backward pass per objective.

    Attributes:
        reached: leaf -> the objectives whose gradients have reached it, in the order of their first time.
        kept: the gradients of the last step.
        loss_scale: factor on every loss during its backward pass, divided out of the gradients at once: for half precision,
            whose small gradients would become 0.
        all_rows: does every process need the gradients of all rows of divided tables, to compare objectives by them?  Else each
            has those of its own rows, and `Gradients.ids` are places among these.
        keep_graph: is the graph kept after the last backward pass, for somebody who goes through it again?
    """

    loss_scale: float = 1.0
    keep_graph: bool = False
    all_rows: ClassVar[bool] = True

    def __init__(
        self, config: Joint, model: nn.Module, steps: int, weights: Mapping[str, float],
        objectives: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, model, steps, weights, objectives)
        self.reached: dict[str, list[str]] = {}
        # The last step's gradients.  Blocks that outlive a step keep glibc from giving the memory of its backward passes back
        # to the system and fetching it again, page by page: 7 % of a step of four tasks.
        self.kept: Gradients | None = None
        dense = [p for group in self.dense.param_groups for p in group["params"]]
        self.parameters: dict[str, Tensor] = dict(zip(self.names, dense, strict=True))
        by_id = {id(p): name for name, p in self.parameters.items()}
        tables = {name: id(table.weight) for name, table in cast(Mapping[str, Any], model.tables).items()}
        self.dense_tables = {name: by_id[key] for name, key in tables.items() if key in by_id}  # -> parameter's name

    def __call__(self, losses: Losses, output: Output) -> None:
        """Move the model by its losses; without losses, as `JointUpdate`.

        Raises:
            FloatingPointError: a loss is not finite, or with a loss scale a gradient.  No parameter and no state has moved.
        """
        self.begin(output)
        parts = {objective: loss for objective, loss in losses.items() if self.weight(objective) != 0}
        grads = self.gradients(parts, output)
        if parts:
            self.check(parts, torch.stack([loss.detach() for loss in parts.values()]).sum())
        if self.loss_scale != 1:
            self.check_gradients(grads)
        self.note(grads)
        self.act(grads)
        self.kept = grads

    # --------------------------------------------------------------------------------------------------- the gradients
    def gradients(self, losses: Losses, output: Output) -> Gradients:
        """The gradient of every loss, one backward pass each; the graph is freed by the last."""
        names, tensors, ids = self._leaves(output)
        live = [objective for objective, loss in losses.items() if loss.requires_grad]
        of: dict[str, dict[str, Tensor]] = {objective: {} for objective in losses}
        for objective in live:
            found = torch.autograd.grad(
                losses[objective] * self.loss_scale if self.loss_scale != 1 else losses[objective], tensors,
                retain_graph=self.keep_graph or objective != live[-1], allow_unused=True,
            )  # fmt: skip
            laid = [_laid_out(grad, like) for grad, like in zip(found, tensors, strict=True)]
            of[objective] = self._named(names, laid, ids)
        grads = Gradients(
            of, {name: parts[0] if len(parts) == 1 else torch.cat(parts).unique() for name, parts in ids.items()}
        )
        return grads if parallel.world() == 1 else self._summed(grads, output)

    def _summed(self, grads: Gradients, output: Output) -> Gradients:
        """The sums of all processes' gradients, all objectives' in one exchange."""
        apart = {} if self.all_rows else self.divided
        tables = {name: weight for name, weight in self.rows.tables.items() if name not in apart}
        if self.reads_dense_lookups:
            tables |= {name: cast(nn.Parameter, self.parameters[key]) for name, key in self.dense_tables.items()}
        ids = self.read_anywhere(output.lookups, tables)
        like = {**self.parameters, **{n: tables[n].new_empty(len(each), tables[n].shape[1]) for n, each in ids.items()}}
        own: dict[tuple[str, str], Tensor | None] = {
            (objective, leaf): spread(grads.ids[leaf], grad, ids[leaf]) if leaf in ids else grad
            for objective, found in grads.of.items() for leaf, grad in found.items() if leaf not in apart
        }  # fmt: skip
        every = parallel.total(own, {(objective, leaf): one for objective in grads.of for leaf, one in like.items()})
        of: dict[str, dict[str, Tensor]] = {objective: {} for objective in grads.of}
        for (objective, leaf), grad in every.items():
            of[objective][leaf] = grad
        if apart:
            mine = {(o, leaf): grad for o, found in grads.of.items() for leaf, grad in found.items() if leaf in apart}
            table_of = {(objective, leaf): leaf for objective in grads.of for leaf in apart}
            places, sums = sharding.to_owners(apart, {n: grads.ids[n] for n in apart if n in grads.ids}, mine, table_of)
            ids |= places
            for (objective, leaf), grad in sums.items():
                of[objective][leaf] = grad
        return Gradients(of, ids)

    def norm(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Global norm of one objective's gradients."""
        apart = {} if self.all_rows else self.divided
        own = [grad for leaf, grad in grads.items() if leaf in apart]
        return sharding.total_norm([grad for leaf, grad in grads.items() if leaf not in apart], own)

    def check_gradients(self, grads: Gradients) -> None:
        """Raise FloatingPointError unless all gradients are finite: a loss scale may be too large for them."""
        for objective, found in grads.of.items():
            if not torch.isfinite(self.norm(found)):
                raise FloatingPointError(
                    f"The gradient of `{objective}` is not finite at step {self.step}. Lower `loss_scale` ({self.loss_scale:g})."
                )

    def _leaves(self, output: Output) -> tuple[list[str], list[Tensor], dict[str, list[Tensor]]]:
        """Names and tensors of the leaves (a table's name once per lookup), and table -> ids of each of its lookups."""
        tables = {*self.rows.tables, *(self.dense_tables if self.reads_dense_lookups else ())}
        read = [lookup for lookup in output.lookups if lookup.table in tables]
        by_rows = {self.dense_tables.get(lookup.table) for lookup in read}
        whole = {name: p for name, p in self.parameters.items() if name not in by_rows}
        ids: dict[str, list[Tensor]] = {}
        for lookup in read:
            ids.setdefault(lookup.table, []).append(lookup.ids)
        return [*whole, *(x.table for x in read)], [*whole.values(), *(x.vectors for x in read)], ids

    def _named(
        self, names: Sequence[str], found: Sequence[Tensor | None], ids: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, Tensor]:
        """leaf -> gradient, free of the loss scale; a table that was read in several lookups gets their sum."""
        grads: dict[str, Tensor] = {}
        several: dict[str, list[Tensor | None]] = {}
        for name, grad in zip(names, found, strict=True):
            grad = grad if grad is None or self.loss_scale == 1 else grad / self.loss_scale
            if len(ids.get(name, ())) > 1:
                several.setdefault(name, []).append(grad)
            elif grad is not None:
                grads[name] = grad
        for name, parts in several.items():
            if any(part is not None for part in parts):
                grads[name] = _summed(ids[name], parts)
        return grads

    # ------------------------------------------------------------------------------------------------- what is shared
    def note(self, grads: Gradients) -> None:
        """Remember which objectives reach which leaves."""
        for objective, found in grads.of.items():
            for leaf in found:
                owners = self.reached.setdefault(leaf, [])
                if objective not in owners:
                    owners.append(objective)

    def shared(self, grads: Gradients) -> list[str]:
        """The leaves of this step that more than one objective has reached so far, in a fixed order."""
        return [leaf for leaf in grads.leaves() if len(self.reached[leaf]) > 1]

    def own(self, grads: Gradients) -> dict[str, Tensor]:
        """leaf -> weighted gradient, of the leaves of this step that are one objective's own."""
        weight = {objective: self.weight(objective) for objective in grads.of}
        return {leaf: grads.weighted(leaf, weight) for leaf in grads.leaves() if len(self.reached[leaf]) == 1}

    # ------------------------------------------------------------------------------------------------------- the step
    def act(self, grads: Gradients) -> None:
        """Move the model by one step's gradients."""
        self.move(self.write(self.combine(grads), grads.ids))

    def combine(self, grads: Gradients) -> Mapping[str, Tensor]:
        """leaf -> the gradient that it steps with.  A leaf that is absent does not move, nor does its state."""
        weight = {objective: self.weight(objective) for objective in grads.of}
        return {leaf: grads.weighted(leaf, weight) for leaf in grads.leaves()}

    def write(
        self, combined: Mapping[str, Tensor], ids: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
        """Put gradients into ``.grad`` of the dense parameters; returns those of lazy tables as `move` takes them.

        Args:
            combined: leaf -> gradient; ids: those of all rows, `Gradients.ids` of an update with ``all_rows``.
        """
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for leaf, grad in combined.items():
            if leaf in self.rows.tables:
                rows[leaf] = (ids[leaf], grad)
            elif leaf in ids:  # rows of a dense table
                weight = self.parameters[self.dense_tables[leaf]]
                weight.grad = torch.zeros_like(weight).index_copy_(0, ids[leaf], grad)
            else:
                self.parameters[leaf].grad = grad
        return sharding.own_rows(rows, self.rows.tables)

    # ---------------------------------------------------------------------------------------------------------- states
    def state_dict(self) -> State:
        """That of `JointUpdate`, and ``reached``."""
        return {**super().state_dict(), "reached": {leaf: list(owners) for leaf, owners in self.reached.items()}}

    def load_state_dict(self, state: State) -> None:
        """As `JointUpdate`."""
        super().load_state_dict(state)
        self.load_reached(state["reached"])

    def load_reached(self, reached: Mapping[str, Iterable[str]]) -> None:
        """Continue from ``reached`` of a state; leaves that are not trained now are dropped."""
        trained = {*self.parameters, *self.dense_tables, *self.rows.tables}
        self.reached = {leaf: list(owners) for leaf, owners in reached.items() if leaf in trained}


def _laid_out(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient in the memory layout of its leaf: `backward` sees to that, ``autograd.grad`` does not, and fused optimisers
    read memory as it comes."""
    return grad if grad is None or grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


def _summed(ids: Sequence[Tensor], parts: Sequence[Tensor | None]) -> Tensor:
    """(U, D) gradient at the sorted distinct ids of several lookups."""
    unique, place = torch.unique(torch.cat(list(ids)), return_inverse=True)
    some = next(part for part in parts if part is not None)
    total = some.new_zeros(len(unique), some.shape[1])
    for part, at in zip(parts, place.split([len(one) for one in ids]), strict=True):
        if part is not None:
            total.index_add_(0, at, part)
    return total
