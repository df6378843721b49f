"""Embedding tables by rows over processes: each holds, reads and moves its own (docs/distributed.md).

Of a table with V rows, process r of W owns the rows from r ceil(V / W) on, ceil(V / W) of them or what is left.  It keeps their
weights and all that optimisers and averages remember of them, and nothing of other rows.

- **Reading.**  A process needs the vectors of the distinct ids of its rows.  It asks their owners, who answer; the vectors are
  the leaf that losses are differentiated at, as those of a table that lies here (`unbraid.types.Lookup`).
- **Moving.**  The gradients at these vectors go to the owners, who add up what all processes send and move their rows alone,
  or, for updates that compare all gradients of all tasks, every process has all gradients of the step, and moves its own rows.

All of it is the exchange of the step's distinct rows; nothing is as long as the table.  (torch's ``DTensor`` makes a dense
gradient of the whole part in each step and refuses sparse ones.  It is how checkpoints know the parts, `unbraid.sharded_files`.)

All processes must read the same tables in the same order, also where one has nothing to read (`in_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unbraid import parallel

BLOCK = 1 << 20  # numbers that are drawn, written or sent at once; a multiple of 16, see `draw`
Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")


class Part(nn.Parameter):
    """The rows of a table's weight that this process owns, (n, D).

    Attributes:
        start: number of the first of them; rows: V, those of the whole table; world: how many processes own parts.
    """

    start: int
    rows: int
    world: int

    @classmethod
    def of(cls, rows: Tensor, size: int) -> Part:
        """This process's rows of a table with so many rows."""
        self = cast(Part, cls(rows, True))
        self.start, self.rows, self.world = owned(size).start, size, parallel.world()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        found = cast(Part, type(self)(self.detach().clone(), self.requires_grad))
        found.start, found.rows, found.world = self.start, self.rows, self.world
        memo[id(self)] = found
        return found

    def own(self, ids: Tensor) -> slice:
        """Which of some ascending row numbers of the whole table are this process's."""
        low, high = torch.searchsorted(
            ids, torch.tensor([self.start, self.start + len(self)], device=ids.device)
        ).tolist()
        return slice(low, high)


class Divided(Protocol):
    """What is needed of a table."""

    weight: nn.Parameter
    size: int
    training: bool
    before_read: Callable[[Tensor], None] | None


def owned(size: int, place: int | None = None) -> range:
    """The rows of a table with so many that a process (this one) owns: as torch divides a tensor into chunks."""
    each, place = -(-size // parallel.world()), parallel.rank() if place is None else place
    return range(min(place * each, size), min((place + 1) * each, size))


def draw(size: int, width: int, std: float) -> Part:
    """This process's rows of a table of normal numbers, those that ``torch.empty(size, width).normal_`` draws.

    No process holds the whole: all numbers are drawn, in blocks.  torch draws normal numbers in groups of 16, the last of
    which may overlap the one before it; blocks of whole groups, with all that is left in the last, are the same stream.
    """
    mine, total, at = owned(size), size * width, 0
    own = torch.empty(len(mine) * width)
    first = mine.start * width
    while at < total:
        count = BLOCK if total - at >= 2 * BLOCK else total - at
        block = torch.empty(count).normal_(0.0, std)
        low, high = max(at, first), min(at + count, first + len(own))
        if low < high:
            own[low - first : high - first] = block[low - at : high - at]
        at += count
    return Part.of(own.view(-1, width), size)


def parts(model: nn.Module) -> dict[str, Part]:
    """Name of a parameter -> this process's part of it, of those that are divided."""
    return {name: p for name, p in model.named_parameters() if isinstance(p, Part)}


def divided(model: nn.Module) -> bool:
    """Does a model read tables that are divided, itself or through what lies below it (`FrozenHead`)?"""
    return any(isinstance(p, Part) for part in (model, *getattr(model, "below", ())) for p in part.parameters())


# ------------------------------------------------------------------------------------------------------------------ exchange
def fetch(tables: Sequence[Divided], ids: Tensor) -> list[Tensor]:
    """(U, D) of each table at the same ascending distinct ids (U,), from their owners.  The tables have the same size.

    Decay that a row owes is paid by its owner before it is sent, in training.

    Raises:
        RuntimeError: the processes that own the tables are not there any more.
    """
    weights = [cast(Part, table.weight) for table in tables]
    if weights[0].world != parallel.world():
        raise RuntimeError(
            f"A table is divided over {weights[0].world} processes, and {parallel.world()} read it. After training, load the "
            "bundle: its tables are whole."
        )
    asked, counts, others = _asked(ids, weights[0].rows)
    own = asked - weights[0].start
    for table in tables:
        if table.before_read is not None and table.training:
            table.before_read(own)
    answer = torch.cat([weight.detach().index_select(0, own) for weight in weights], 1)
    found = answer.new_empty(len(ids), answer.shape[1])
    all_to_all(found, answer, counts, others)
    vectors = found.split([weight.shape[1] for weight in weights], 1)
    return [one.contiguous().requires_grad_(weight.requires_grad) for one, weight in zip(vectors, weights, strict=True)]


def _asked(ids: Tensor, size: int) -> tuple[Tensor, list[int], list[int]]:
    """Row numbers that all processes ask this one for; how many this one asks each for, and each this one."""
    counts = _counts(ids, size)
    others = [row[0] for row in _transposed([[count] for count in counts])]
    asked = ids.new_empty(sum(others))
    all_to_all(asked, ids, others, counts)
    return asked, counts, others


def _counts(ids: Tensor, size: int) -> list[int]:
    """How many of some ascending ids each process owns."""
    stops = torch.tensor([owned(size, place).stop for place in range(parallel.world())], device=ids.device)
    ends = torch.searchsorted(ids, stops).tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _transposed(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of whole numbers for each process, what each has for this one."""
    sent = torch.tensor(rows).flatten()
    found = torch.empty_like(sent)
    width = [len(rows[0])] * parallel.world()
    all_to_all(found, sent, width, width)
    return found.view(parallel.world(), -1).tolist()


def all_to_all(found: Tensor, sent: Tensor, received: Sequence[int], counts: Sequence[int]) -> None:
    """Rows of ``sent``, ``counts`` for each process, become rows of ``found``, ``received`` from each."""
    with parallel.told():
        dist.all_to_all_single(found, sent.contiguous(), list(received), list(counts), group=parallel.group())


@torch.no_grad()
def to_owners(
    weights: Mapping[str, Part], ids: Mapping[str, Tensor], grads: Mapping[Key, Tensor], table_of: Mapping[Key, str]
) -> tuple[dict[str, Tensor], dict[Key, Tensor]]:
    """Sums over all processes of gradients at rows, each at its owner.

    Args:
        weights: table -> this process's part; ids: table -> ascending distinct ids (U,) that this process read, of the whole
            table; none if it is absent.
        grads: key -> gradient (U, D) at the ids of its table, of those that this process has.
        table_of: all keys that a process may have, the same in the same order on all -> table.

    Returns:
        table -> distinct places (G,) among this process's rows; key -> gradient (G, D), of those that any process has.
    """
    some = next(iter(weights.values()))
    here = torch.tensor([key in grads for key in table_of], dtype=torch.int32)
    with parallel.told():
        dist.all_reduce(here, dist.ReduceOp.MAX, group=parallel.group())
    keys = [key for key, flag in zip(table_of, here.tolist(), strict=True) if flag]
    tables = [name for name in weights if any(table_of[key] == name for key in keys)]
    if not tables:
        return {}, {}
    none = torch.zeros(0, dtype=torch.int64, device=some.device)
    mine = {name: ids.get(name, none) for name in tables}
    counts = [_counts(mine[name], weights[name].rows) for name in tables]  # (tables, W)
    others = _transposed([list(each) for each in zip(*counts, strict=True)])  # (W, tables)
    received = [list(each) for each in zip(*others, strict=True)]
    asked = _sent([mine[name].unsqueeze(1) for name in tables], counts, received)
    places: dict[str, Tensor] = {}
    order: dict[str, Tensor] = {}
    for name, each in zip(tables, asked, strict=True):
        distinct, order[name] = torch.unique(each.squeeze(1), return_inverse=True)
        places[name] = distinct - weights[name].start
    of = {name: [key for key in keys if table_of[key] == name] for name in tables}
    sent = []
    for name in tables:
        zeros = weights[name].new_zeros(len(mine[name]), weights[name].shape[1])
        sent.append(torch.cat([grads.get(key, zeros) for key in of[name]], 1))
    sums: dict[Key, Tensor] = {}
    for name, each in zip(tables, _sent(sent, counts, received), strict=True):
        total = each.new_zeros(len(places[name]), each.shape[1]).index_add_(0, order[name], each)
        sums |= dict(zip(of[name], [one.contiguous() for one in total.chunk(len(of[name]), 1)], strict=True))
    return places, sums


def _sent(values: Sequence[Tensor], counts: Sequence[Sequence[int]], received: Sequence[Sequence[int]]) -> list[Tensor]:
    """Rows of several tensors (n, w), ``counts`` of each for each process, in one exchange: what comes, in the senders' order."""
    widths, world = [value.shape[1] for value in values], parallel.world()
    cut = [value.split(list(each)) for value, each in zip(values, counts, strict=True)]
    flat = torch.cat([cut[i][place].flatten() for place in range(world) for i in range(len(values))])
    mine, theirs = (
        [sum(each[place] * width for each, width in zip(of, widths, strict=True)) for place in range(world)]
        for of in (counts, received)
    )
    found = flat.new_empty(sum(theirs))
    all_to_all(found, flat, theirs, mine)
    pieces = found.split([received[i][place] * widths[i] for place in range(world) for i in range(len(values))])
    return [torch.cat(pieces[i :: len(values)]).view(-1, width) for i, width in enumerate(widths)]


def own_rows(
    rows: Mapping[str, tuple[Tensor, Tensor]], tables: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Table -> ids and gradients at all rows of a step, as places among this process's rows and the gradients there."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (ids, grad) in rows.items():
        weight = tables[name]
        if isinstance(weight, Part):
            mine = weight.own(ids)
            ids, grad = ids[mine] - weight.start, grad[mine]
        found[name] = ids, grad
    return found


def total_norm(grads: Iterable[Tensor], own: Sequence[Tensor] = ()) -> Tensor:
    """Global norm of gradients that all processes have alike, and of those of which each has its rows (``own``).

    All processes must have the same number of tensors in ``own``, with any number of rows.
    """
    found = torch.nn.utils.get_total_norm(list(grads))
    if not own:
        return found
    squares = torch.nn.utils.get_total_norm(list(own)).square()
    with parallel.told():
        dist.all_reduce(squares, group=parallel.group())
    return (found.to(squares.device).square() + squares).sqrt()


def any_of(flags: Sequence[bool]) -> list[bool]:
    """Is each flag up on any process?  All have the same number of them."""
    if parallel.world() == 1 or not flags:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    with parallel.told():
        dist.all_reduce(found, dist.ReduceOp.MAX, group=parallel.group())
    return [bool(flag) for flag in found.tolist()]


def in_step(given: Iterable[T], model: nn.Module) -> Iterator[tuple[T, bool]]:
    """This process's batches, and whether each counts: while another process has more, the last comes again and does not.

    A model that reads divided tables needs all processes for every batch, and parts of rows may make other numbers of batches.
    """
    together = parallel.world() > 1 and divided(model)
    last: T | None = None
    batches = iter(given)
    while True:
        batch = next(batches, None)
        if not any_of([batch is not None])[0] if together else batch is None:
            return
        if batch is None and last is None:
            raise ValueError("This process has no rows to predict, and others have.")
        yield cast(T, last if batch is None else batch), batch is not None
        last = last if batch is None else batch


@torch.no_grad()
def same_start(model: nn.Module) -> None:
    """Give all processes the first one's weights and buffers; parts of tables are what each drew."""
    apart = parts(model)
    for name, value in model.state_dict().items() if parallel.world() > 1 else ():
        if name in apart:
            continue
        sent = value.contiguous()
        with parallel.told():
            dist.broadcast(sent, group_src=0, group=parallel.group())
        if sent is not value:
            value.copy_(sent)
