"""Several processes that train one model together, over ``torch.distributed`` (docs/distributed.md).

Every process holds the whole model (large tables may be divided: `unbraid.sharding`) and reads its own rows of each batch.
What the processes say about their rows is put together, so that **every process computes the losses of the whole batch**, with
the terms as they are: a mean over observed rows, a ratio of sums, pairs of rows in a list and a memory of rows are then what one
process computes, and no loss knows of processes.  With L the loss of the whole batch and z_r what process r says about its rows::

    dL/dtheta = sum over r of (dz_r/dtheta)^T dL/dz_r

A process differentiates through its own rows alone; the rows of the others are constants to it.  The sum over processes of
gradients is therefore the gradient, whatever the loss, and nothing is divided by the number of processes.  What an update does
with gradients comes after the sum, and is the same on all processes.

Rows of a table that no process read have no gradient: processes exchange the ids that they read, and the sum is over their
union.  A parameter that no process reached has none either, rather than zeros that would move it by its momentum.

All processes must call the functions here in the same order.  They do, because they compute the same losses and decide by
these.  With one process each function returns what it is given.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from unbraid.types import Batch, Lookup, Output

# A process that ends closes its connections, which the others see at once; this is for one that hangs, and must be longer than
# whatever one process does while the others wait for it (encoding, the bootstrap of the test metrics).
PATIENCE = timedelta(hours=2)
MEETING = timedelta(minutes=10)  # for all processes to start
T = TypeVar("T")
Key = TypeVar("Key")
_joined = False
_group: dist.ProcessGroup | None = None  # those that train together now, if not all
_counts = True


class Lost(RuntimeError):
    """Another process of this training ended, or cannot be reached."""


class Elsewhere(RuntimeError):
    """Another process stopped the training, and says why."""


# ------------------------------------------------------------------------------------------------------------- the processes
def world() -> int:
    """How many processes train together."""
    return dist.get_world_size(_group) if _joined else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank(_group) if _joined else 0


def group() -> dist.ProcessGroup | None:
    """Those processes; None: all that there are."""
    return _group


@contextlib.contextmanager
def among(chosen: dist.ProcessGroup) -> Iterator[None]:
    """Until the block ends, this process trains together with those of a group alone, to which it belongs."""
    global _group
    before, _group = _group, chosen
    try:
        yield
    finally:
        _group = before


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Until the block ends, this process does what it does as if there were no others."""
    global _joined
    before, _joined = _joined, False
    try:
        yield
    finally:
        _joined = before


def launched() -> int:
    """Which of several processes this was started as (0: the first, or the only one), before they are `together`."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


@contextlib.contextmanager
def together(device: str = "auto") -> Iterator[str]:
    """Join the processes that torchrun started, if it did, until the block ends.

    Args:
        device: ``auto`` is CUDA when there is one.

    Yields:
        This process's device.

    Raises:
        ValueError: there are more processes on this machine than GPUs.
        Lost: not all processes could be reached.
    """
    global _joined
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if _joined or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield kind
        return
    if kind == "cuda":
        kind = _own_gpu()
    started = not dist.is_initialized()
    if started:
        # torch's optimisers import it at their first step, and then it keeps the group: its threads would outlive the group's
        # end, and one that lets go of a tensor while the interpreter ends aborts the process
        importlib.import_module("torch._dynamo")

        try:
            store, place, count = next(rendezvous("env://", timeout=MEETING))
            store = dist.PrefixStore(_meet(store, place, count), store)
            backend = "cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo"
            dist.init_process_group(backend, store=store, rank=place, world_size=count, timeout=PATIENCE)
        except RuntimeError as error:
            raise Lost(f"The processes of this training did not find each other: {error}") from error
    _joined = True
    try:
        yield kind
    finally:
        _joined = False
        if started:
            dist.destroy_process_group()


def _meet(store: dist.Store, place: int, count: int) -> str:
    """A name that all processes of this start agree on, and that no earlier start had.

    torchrun keeps one store over its restarts, and addresses in it of processes that are gone.  The first process makes a name;
    each other one answers to it with a number of its own and waits for the first one's nod to that number, which an earlier start
    cannot have given.
    """
    mine = uuid.uuid4().hex
    if place == 0:
        store.set("unbraid/name", mine)
        for other in range(1, count):
            answer = store.get(f"unbraid/{mine}/{other}").decode()
            store.set(f"unbraid/{mine}/{other}/{answer}", "yes")
        return mine
    until = time.monotonic() + MEETING.total_seconds()
    while time.monotonic() < until:
        name = store.get("unbraid/name").decode()
        store.set(f"unbraid/{name}/{place}", mine)
        for _ in range(20):
            if store.check([f"unbraid/{name}/{place}/{mine}"]):
                return name
            time.sleep(0.02)
    raise RuntimeError(f"process {place} waited {MEETING.total_seconds():.0f} s for the first one")


def _own_gpu() -> str:
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise ValueError(
            f"There are {os.environ.get('LOCAL_WORLD_SIZE', place + 1)} processes on a machine with {count} GPUs. Start one per "
            "GPU (`--nproc-per-node`), or set `training.device` to `cpu`."
        )
    torch.cuda.set_device(place)
    return f"cuda:{place}"


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Say what a failed exchange means."""
    try:
        yield
    except RuntimeError as error:  # of gloo; those of NCCL are subclasses
        raise Lost(
            "Another process of this training ended, or cannot be reached; its own message says why. Continue from the last "
            "checkpoint with the same command and --resume, on any number of processes."
        ) from error


def on_first(do: Callable[[], T]) -> T:
    """What ``do`` returns on the first process, on all of them.

    Raises:
        Elsewhere: it raised on the first process, and this is another one.
    """
    if world() == 1:
        return do()
    found: list[Any] = [None, ""]
    try:
        if rank() == 0:
            found[0] = do()
    except Exception as error:
        found[1] = f"{type(error).__name__}: {error}"
        raise
    finally:
        with told():
            dist.broadcast_object_list(found, group_src=0, group=_group)
    if found[1]:
        raise Elsewhere(found[1])
    return found[0]


def one_by_one(do: Callable[[], T]) -> T:
    """``do`` on the first process of every machine, then on its others: those find on disk what the first one wrote.

    Raises:
        Elsewhere: it raised on another process.
    """
    if world() == 1:
        return do()
    found: Any = None
    for turn in (True, False):
        why = ""
        try:
            if (int(os.environ.get("LOCAL_RANK", rank())) == 0) == turn:
                found = do()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise
        finally:
            whys = [text for text in gather(why) if text]
        if whys:
            raise Elsewhere(whys[0])
    return found


def gather(value: T) -> list[T]:
    """A small value of every process, in their order."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    with told():
        dist.all_gather_object(found, value, group=_group)
    return found


def require_same(what: str, value: Any) -> None:
    """Raises ValueError unless all processes have the same value."""
    found = gather(value)
    if other := [place for place, one in enumerate(found) if one != found[0]]:
        raise ValueError(
            f"All processes should have the same {what}. Process 0 has {found[0]}, process {other[0]} has {found[other[0]]}."
        )


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        gather(None)  # not a barrier: that of NCCL would need to know this process's device


# ------------------------------------------------------------------------------------------------------------ rows of batches
@dataclass(frozen=True)
class Spare(Batch):
    """A row of a batch that another process reads too, for one that has none of its own: it runs and counts nowhere."""


@dataclass(frozen=True)
class Slice(Batch):
    """This process's rows of a batch.

    Args:
        every: all processes' rows, without features, on the same device; lengths: how many each process has.
        order: (B,) places in the processes' rows one after the other of the rows of ``every``; None: their own order.
    """

    every: Batch = field(kw_only=True)
    lengths: tuple[int, ...] = field(kw_only=True)
    order: Tensor | None = field(kw_only=True, default=None)

    @property
    def whole(self) -> Batch:
        """See `Batch.whole`."""
        return self.every

    def select(self, rows: Tensor) -> Batch:
        """Raises TypeError: rows of a part are no part of the whole that losses are of."""
        raise TypeError("A batch that several processes share has no selections. Select before `join`.")

    def to(self, device: torch.device | str) -> Slice:
        """A copy on another device."""
        moved = Batch(**{part.name: getattr(self, part.name) for part in fields(Batch)}).to(device)
        order = None if self.order is None else self.order.to(device)
        return Slice(**_parts(moved), every=self.every.to(device), lengths=self.lengths, order=order)


def _parts(batch: Batch) -> dict[str, Any]:
    return {part.name: getattr(batch, part.name) for part in fields(Batch)}


def share(count: int) -> slice:
    """This process's part of so many rows: the parts are consecutive and of nearly one size."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def mine(read: Callable[[Any, int], Batch], rows: Any) -> Batch:
    """This process's part of the rows of a batch; a `Spare` if there are too few rows for all processes.

    Args:
        read: (row numbers, place of the first of them in the batch) -> their batch; rows: (n,) row numbers of the batch.
    """
    part = share(len(rows))
    return read(rows[part], part.start) if part.start < part.stop else Spare(**_parts(read(rows[:1], 0)))


def join(batch: Batch) -> Batch:
    """This process's rows of a batch, on the CPU, with what all losses need to know of the others'."""
    if world() == 1:
        return batch
    count = 0 if isinstance(batch, Spare) else len(batch)
    names: list[tuple[str, str]] = []
    values: list[Tensor] = []
    for part in fields(Batch):
        value = getattr(batch, part.name)
        if part.name == "features" or value is None:
            continue
        for key, one in value.items() if isinstance(value, Mapping) else (("", value),):
            names.append((part.name, key))
            values.append(one[:count])
    joined, lengths = _rows_of_all(values)
    every: dict[str, Any] = {"features": {}, "labels": {}, "observed": {}, "meta": {}, "weight": None}
    for (name, key), one in zip(names, joined, strict=True):
        if key:
            every[name][key] = one
        else:
            every[name] = one
    starts = torch.repeat_interleave(torch.tensor([0, *lengths[:-1]]).cumsum(0), torch.tensor(lengths))
    every["pair"] = torch.where(every["pair"] >= 0, every["pair"] + starts, every["pair"])
    whole, order = Batch(**every), None
    if bool((whole.view > 0).any()):  # as one process has them: rows, then their strong views
        order = torch.sort(whole.view, stable=True)[1]
        whole = whole.select(order)
    return Slice(**_parts(batch), every=whole, lengths=tuple(lengths), order=order)


def said(output: Output, batch: Batch, constants: Iterable[str] = ()) -> tuple[Output, Batch]:
    """What losses read: the output on the whole batch, and the whole batch.

    Hidden vectors, the trunk and extras are fetched from the other processes when they are read.

    Args:
        batch: what the output is about; anything but a `Slice` comes back as it is.
        constants: names of extras that are not one per row, which all processes have alike.
    """
    if not isinstance(batch, Slice):
        return output, batch
    names = list(output.logits)
    logits = dict(zip(names, _placed(batch, list(output.logits.values())), strict=True))
    hidden = Fetched(output.hidden, lambda value: _placed(batch, [value])[0])
    extras = Fetched(output.extras, lambda value: _placed(batch, [value])[0], constants)
    return Output(logits, hidden, lambda: _placed(batch, [output.trunk])[0], extras), batch.whole


def note(batch: Batch) -> None:
    """Remember whether the rows that a model reads next count (`counts`)."""
    global _counts
    _counts = not (isinstance(batch, Slice) and batch.lengths[rank()] == 0)


def counts() -> float:
    """1, or 0 where the rows that a model reads are another process's (`Spare`): for statistics of a batch."""
    return float(_counts)


def all_sum(value: Tensor) -> Tensor:
    """The sum over all processes, differentiable: every process's value moves what all of them compute from the sum.

    All processes must go through it backwards, too: what each computes has to depend on the sum.
    """
    return value if world() == 1 else _Sum.apply(value)


def all_rows(value: Tensor) -> Tensor:
    """The rows (n, D) of all processes one after the other, differentiable, in both directions as `all_sum`."""
    if world() == 1:
        return value
    found = [_sizes(len(value)), _sizes(int(value.requires_grad))]
    if any(found[1]) and not value.requires_grad:  # no rows of its own, and yet the others wait for it on the way back
        value = value.detach().requires_grad_()
    return _Rows.apply(value, found[0])


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, lengths: list[int]) -> Tensor:
        ctx.own = slice(sum(lengths[: rank()]), sum(lengths[: rank() + 1]))
        return _rows_of_all([value], lengths)[0][0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _summed(grad)[ctx.own], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _summed(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


def _summed(value: Tensor) -> Tensor:
    found = value.clone(memory_format=torch.contiguous_format)
    with told():
        dist.all_reduce(found, group=_group)
    return found


class Fetched(Mapping[str, Tensor]):
    """Tensors of this process's rows that become those of all rows when they are read, once.

    Args:
        own: name -> tensor; fetch: makes one of all rows; constants: names of those that come as they are.
    """

    def __init__(
        self, own: Mapping[str, Tensor], fetch: Callable[[Tensor], Tensor], constants: Iterable[str] = ()
    ) -> None:
        self.own, self.fetch, self.found = own, fetch, {name: own[name] for name in constants if name in own}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.found:
            self.found[name] = self.fetch(self.own[name])
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def _placed(batch: Slice, values: Sequence[Tensor]) -> list[Tensor]:
    """(n, ...) of this process's rows -> (B, ...) of all rows; gradients flow to the own ones."""
    own = batch.lengths[rank()]
    at = sum(batch.lengths[: rank()])
    if odd := [tuple(value.shape) for value in values if len(value) != len(batch)]:
        raise ValueError(
            f"What a model says should have one entry for each of {len(batch)} rows, or be named by `constants`. Found shape "
            f"{odd[0]}."
        )
    values = [value[:own] for value in values]  # a spare row counts nowhere
    joined, _ = _rows_of_all(values, batch.lengths)
    found = [torch.cat([rest[:at], mine, rest[at + own :]]) for rest, mine in zip(joined, values, strict=True)]
    return found if batch.order is None else [value.index_select(0, batch.order) for value in found]


@torch.no_grad()
def _rows_of_all(values: Sequence[Tensor], lengths: Sequence[int] | None = None) -> tuple[list[Tensor], list[int]]:
    """All processes' rows of some tensors (n, ...), one process after the other, and how many each has.

    All is sent in one piece, row by row as bytes.  ``lengths`` where they are known.
    """
    count = len(values[0])
    flat = [value.detach().flatten(1) if value.dim() > 1 else value.detach().unsqueeze(1) for value in values]
    bytes_of = [part.contiguous().view(torch.uint8) for part in flat]
    packed = torch.cat(bytes_of, 1)
    counts = _sizes(count) if lengths is None else list(lengths)
    padded = packed.new_zeros(max(counts), packed.shape[1])
    padded[:count] = packed
    parts = [torch.empty_like(padded) for _ in range(world())]
    with told():
        dist.all_gather(parts, padded, group=_group)
    joined = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
    found, at = [], 0
    for value, part in zip(values, bytes_of, strict=True):
        # a copy in any case: of a single row torch takes a slice to be contiguous, and then cannot read it as another type
        piece = joined[:, at : at + part.shape[1]].clone(memory_format=torch.contiguous_format).view(value.dtype)
        found.append(piece.view(len(joined), *value.shape[1:]))
        at += part.shape[1]
    return found, counts


def _sizes(count: int) -> list[int]:
    """A number of every process."""
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    with told():
        dist.all_gather(found, torch.tensor([count]), group=_group)
    return [int(one) for one in found]


# ------------------------------------------------------------------------------------------------------------------ gradients
@torch.no_grad()
def total(grads: Mapping[Key, Tensor | None], like: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """The sum over all processes of named gradients; one that no process has is absent.

    Args:
        grads: name -> this process's, if it has any; like: all names, the same on all processes -> a tensor of the shape,
            layout, dtype and device.
    """
    names = list(like)
    if not names:
        return {}
    device = like[names[0]].device
    there = torch.tensor([grads.get(name) is not None for name in names], dtype=torch.int32, device=device)
    with told():
        dist.all_reduce(there, dist.ReduceOp.MAX, group=_group)
    reached = [name for name, flag in zip(names, there.tolist(), strict=True) if flag]
    found: dict[Key, Tensor] = {}
    for dtype in dict.fromkeys(like[name].dtype for name in reached):  # a flat bucket of each
        some = [name for name in reached if like[name].dtype == dtype]
        parts = [grads.get(name) for name in some]
        flat = torch.cat([
            like[name].new_zeros(like[name].numel()) if part is None else part.flatten()
            for name, part in zip(some, parts, strict=True)
        ])  # fmt: skip
        with told():
            dist.all_reduce(flat, group=_group)
        for name, piece in zip(some, flat.split([like[name].numel() for name in some]), strict=True):
            shaped = piece.view(like[name].shape)
            same = shaped.stride() == like[name].stride()  # fused optimisers read memory as it comes
            found[name] = shaped if same else torch.empty_like(like[name]).copy_(shaped)
    return {name: found[name] for name in reached}


@torch.no_grad()
def union(ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Table -> the distinct ids (G,) that any process has, ascending; all processes name the same tables."""
    if world() == 1 or not ids:
        return dict(ids)
    sizes = torch.tensor([len(each) for each in ids.values()])
    counts = [torch.empty_like(sizes) for _ in range(world())]
    with told():
        dist.all_gather(counts, sizes, group=_group)
    joined, _ = _rows_of_all([torch.cat(list(ids.values()))], [int(one.sum()) for one in counts])
    pieces = joined[0].split([int(n) for one in counts for n in one])
    return {name: torch.cat(pieces[place :: len(ids)]).unique() for place, name in enumerate(ids)}


def read_by_any(lookups: Sequence[Lookup]) -> Sequence[Lookup]:
    """The lookups with the ids that any process read; their vectors are those of this one's and have other ids."""
    if world() == 1:
        return lookups
    ids: dict[str, Tensor] = {}
    for table, own, _ in lookups:
        ids[table] = torch.cat([ids[table], own]) if table in ids else own
    vectors = {lookup.table: lookup.vectors for lookup in lookups}
    return [Lookup(name, every, vectors[name]) for name, every in union(ids).items()]
