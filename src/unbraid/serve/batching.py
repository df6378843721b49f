"""Small requests computed together: one pass over the joined rows costs little more than one over the rows of each.

A request waits at most ``wait`` seconds for others, less where the rows are enough; as long as every slot is busy the queue
goes on filling.  So a lone request waits no longer than the bound, and under load batches grow by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple


class _Waiting(NamedTuple):
    item: Any
    rows: int
    due: float
    done: asyncio.Future[Any]


class Batcher:
    """Joins what is given to it; used from one event loop.

    Args:
        work: items -> their results, or an error in the place of a result; awaited, at most ``slots`` at once.
        wait: seconds that an item waits for others.
        rows: of a batch, at most; an item of more is a batch of its own.
    """

    def __init__(
        self, work: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]], *, wait: float, rows: int, slots: int
    ) -> None:
        self.work, self.wait, self.rows, self.slots = work, wait, rows, slots
        self._queue: list[_Waiting] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._queue)

    async def __call__(self, item: Any, rows: int) -> Any:
        """The item's result; raises its error."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(item, rows, loop.time() + self.wait, loop.create_future())
        self._queue.append(waiting)
        self._look()
        return await waiting.done

    def _look(self) -> None:
        """Start the batches that may start: called whenever something arrives, is due or ends."""
        loop = asyncio.get_running_loop()
        self._queue = [one for one in self._queue if not one.done.done()]  # whoever gave up is not computed
        while self._queue and len(self._tasks) < self.slots and self._ready(loop.time()):
            task = loop.create_task(self._compute(self._take()))
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._queue and len(self._tasks) < self.slots:
            self._timer = loop.call_at(self._queue[0].due, self._look)

    def _ready(self, now: float) -> bool:
        # a timer may fire up to a clock tick early
        return self._queue[0].due <= now + 1e-4 or sum(one.rows for one in self._queue) >= self.rows

    def _take(self) -> list[_Waiting]:
        batch, rows = [self._queue.pop(0)], 0
        rows += batch[0].rows
        while self._queue and rows + self._queue[0].rows <= self.rows:
            batch.append(self._queue.pop(0))
            rows += batch[-1].rows
        return batch

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._look()

    async def _compute(self, batch: Sequence[_Waiting]) -> None:
        try:
            results: Sequence[Any] = await self.work([one.item for one in batch])
        except asyncio.CancelledError:
            for one in batch:
                one.done.cancel()
            raise
        except Exception as error:
            results = [error] * len(batch)
        for one, result in zip(batch, results, strict=True):
            if one.done.done():  # its caller gave up
                continue
            if isinstance(result, Exception):
                one.done.set_exception(result)
            else:
                one.done.set_result(result)
