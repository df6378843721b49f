"""A function over a stream, in threads: its results in order, as if it had been called for one item after the other.

What encoding does with a chunk (look values up, hash, sort, count) runs in NumPy and Polars, which let other threads go on
meanwhile, so that threads keep the cores busy without a copy of a vocabulary in each process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import polars as pl

Frames = TypeVar("Frames", pl.DataFrame, Sequence[pl.DataFrame])
Result = TypeVar("Result")


def ahead(function: Callable[[Frames], Result], items: Iterable[Frames], limit: int) -> Iterator[Result]:
    """``function`` of each item, in order, computed by as many threads as Polars has (``$POLARS_MAX_THREADS``).

    An error of an item comes when its turn comes, also when reading the next item failed first.

    Args:
        function: without side effects.
        items: frames or several of them, read by the caller's thread.
        limit: bytes of items that are read ahead, at least one item.
    """
    threads = pl.thread_pool_size()
    if threads == 1:
        yield from map(function, items)
        return
    waiting: deque[tuple[Future[Result], int]] = deque()
    held, failed, source = 0, None, iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="unbraid-encode")
    try:
        while True:
            try:
                item = next(source)
            except StopIteration:
                break
            except Exception as error:
                failed = error
                break
            size = item.estimated_size() if isinstance(item, pl.DataFrame) else sum(f.estimated_size() for f in item)
            waiting.append((pool.submit(function, item), int(size)))
            held += int(size)
            del item
            while waiting and (held > limit or len(waiting) > threads):
                future, size = waiting.popleft()
                yield future.result()
                held -= size
        while waiting:
            yield waiting.popleft()[0].result()
        if failed is not None:
            raise failed
    finally:
        pool.shutdown(cancel_futures=True)
