"""Calls of ``fit`` that do not depend on each other, on groups of the processes that train together (docs/distributed.md).

Of W processes, J groups of W / J train J calls at once, each as if there were no other processes; then all get what each made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unbraid import parallel
from unbraid.train.checkpoints import copies
from unbraid.types import State

if TYPE_CHECKING:
    from unbraid.train.session import Local


class Groups:
    """The processes in ``jobs`` groups of one size.

    Raises:
        ValueError: ``jobs`` does not divide the number of processes.
    """

    def __init__(self, jobs: int) -> None:
        if parallel.world() % jobs:
            raise ValueError(
                f"`schedule.jobs` should divide the number of processes that train together, {parallel.world()}. Found {jobs}."
            )
        self.size = parallel.world() // jobs
        self.each = [
            dist.new_group(list(range(i * self.size, (i + 1) * self.size)), timeout=parallel.PATIENCE)
            for i in range(jobs)
        ]

    def fit_apart(
        self, session: Local, model: nn.Module, steps: int, calls: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[State, State]]:
        """See `unbraid.train.Local.fit_apart`.

        Raises:
            ValueError: tables are divided over all processes; unbraid.parallel.Elsewhere: a call of another group raised.
        """
        if session.tables:
            raise ValueError(
                "Branches that train apart need all rows of tables, and some are divided over all processes. Set `schedule.jobs` "
                "to 1, or `model.tables.shard_mb` to 0."
            )
        begun, first = copies(model), session.calls
        session.calls += len(calls)
        try:
            for start in range(0, len(calls), len(self.each)):
                wave = range(start, min(start + len(self.each), len(calls)))
                made = self._wave(session, model, begun, steps, [(first + call, calls[call]) for call in wave])
                model.load_state_dict(begun)
                yield from made
        finally:
            model.load_state_dict(begun)

    def _wave(
        self, session: Local, model: nn.Module, begun: State, steps: int, calls: Sequence[tuple[int, Mapping[str, Any]]]
    ) -> list[tuple[State, State]]:
        """What each of some calls, at most one for each group, makes."""
        mine = parallel.rank() // self.size
        found: Any = None
        try:
            if mine < len(calls):
                found = self._call(session, model, begun, steps, *calls[mine], self.each[mine])
        except (ValueError, FloatingPointError) as error:
            parallel.gather(f"{type(error).__name__}: {error}")
            raise
        if whys := [text for text in parallel.gather("") if text]:
            raise parallel.Elsewhere(whys[0])
        made = []
        for place in range(len(calls)):
            weights, state, counts = from_one(found, place * self.size)
            session.steps, session.seconds = session.steps + counts["steps"], session.seconds + counts["seconds"]
            session.told, session.best = counts["told"], counts["best"]
            made.append((weights, state))
        if parallel.rank() == 0:
            join_logs(session.folder)
        return made

    @staticmethod
    def _call(
        session: Local, model: nn.Module, begun: State, steps: int, call: int, arguments: Mapping[str, Any],
        group: dist.ProcessGroup,
    ) -> tuple[State, State, State]:  # fmt: skip
        """The weights, the update's state and the counts of one call, by the processes of a group."""
        own = dataclasses.replace(session, calls=call, steps=0, seconds=0.0, log_name=f"log-{call}.jsonl")
        model.load_state_dict(begun)
        with parallel.among(group):
            _, state = own.fit(model, steps, **arguments)
        counts: State = {"steps": own.steps, "seconds": own.seconds, "told": dict(own.told), "best": dict(own.best)}
        return copies(model), state, counts


def join_logs(folder: Path | None) -> None:
    """Put what calls logged apart into the log, in the order of the calls."""
    parts = (
        [] if folder is None else sorted(folder.glob("log-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2]))
    )
    for path in parts:
        with (path.parent / "log.jsonl").open("a") as file:
            file.write(path.read_text())
        path.unlink()


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for a tensor in what is sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str


def from_one(value: Any, source: int) -> Any:
    """A state of one process, on all of them: dicts, lists and tuples of tensors and plain values."""
    tensors: list[Tensor] = []
    sent = [_placed(value, tensors) if parallel.rank() == source else None]
    with parallel.told():
        dist.broadcast_object_list(sent, group_src=source, group=parallel.group())
    given = iter(tensors)

    def fill(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: fill(each) for key, each in part.items()}
        if isinstance(part, list | tuple):
            return type(part)(fill(each) for each in part)
        if not isinstance(part, _Place):
            return part
        found = next(given, None)
        found = torch.empty(part.shape, dtype=part.dtype, device=part.device) if found is None else found
        with parallel.told():
            dist.broadcast(found, group_src=source, group=parallel.group())
        return found

    return fill(sent[0])


def _placed(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Mapping):
        return {key: _placed(each, tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_placed(each, tensors) for each in value)
    if not isinstance(value, Tensor):
        return value
    tensors.append(value.detach().contiguous())
    return _Place(tuple(value.shape), value.dtype, value.device.type)
