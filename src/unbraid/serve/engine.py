"""What answers: the bundle that is loaded, its store, threads that compute, and the exchange of one bundle for another.

A request keeps the `Loaded` that it began with, so that an exchange is one assignment: whoever came before ends on the old
bundle, whoever comes after begins on the new one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbraid.serve import answers
from unbraid.serve.batching import Batcher
from unbraid.serve.errors import RETRY, ApiError, of_store
from unbraid.serve.settings import Settings
from unbraid.serve.shape import Shape, misfits
from unbraid.serve.store import Store, StoreError
from unbraid.serve.telemetry import Telemetry
from unbraid.serve.wire import Wire

log = logging.getLogger("unbraid.serve")
WRITERS = 16  # threads that wait for the store: one commit serves all that wait


class Misfit(ValueError):
    """A bundle cannot follow the one that is served."""


@dataclass(frozen=True)
class Loaded:
    """A bundle that answers.

    Args:
        ranker: `unbraid.serve.ranker.Ranker`, or what does as it does.
        own: what it reads; shape: what its clients may send, more if they began with an earlier one; wire: their requests.
        rows, ranks: who joins small requests of ``/predict`` and ``/rank``.
    """

    ranker: Any
    own: Shape
    shape: Shape
    wire: Wire
    folder: Path
    fingerprint: str
    rows: Batcher
    ranks: Batcher


class Engine:
    """See the module.

    Args:
        load: folder of a bundle -> (ranker on the store, its shape).
        folder: of the bundle to begin with.
        store: of histories; closed by `close`.
    """

    def __init__(
        self, load: Callable[[Path], tuple[Any, Shape]], folder: Path, store: Store, settings: Settings | None = None
    ) -> None:
        self.load, self.store, self.settings = load, store, settings or Settings()
        self.telemetry = Telemetry()
        self.workers = ThreadPoolExecutor(self.settings.threads, "compute")
        self.writers = ThreadPoolExecutor(WRITERS, "store")
        self._jobs: set[Future[Any]] = set()  # that wait or run
        self.active, self.closing, self.stuck = 0, False, False
        self.refuses = ""  # why the last write was not kept; empty: it was
        self._reloading = threading.Lock()
        self.current = self._read(folder, None)
        self._announce()
        cache = lambda name: lambda: getattr(self.current.ranker, "cache_stats", dict)().get(name, 0)  # noqa: E731
        for name in ("hits", "misses", "bytes"):
            self.telemetry.now(f"cache_{name}", cache(name))
        self.telemetry.now("queue", lambda: len(self.current.rows) + len(self.current.ranks))
        self.telemetry.now("in_flight", lambda: self.active)

    # ---------------------------------------------------------------------------------------------------------- bundles
    def _read(self, folder: Path, old: Loaded | None) -> Loaded:
        before = fingerprint(folder)
        ranker, own = self.load(folder)
        if fingerprint(folder) != before:
            raise Misfit(f"{folder} was written while it was read. Try again.")
        if old is not None and (reasons := misfits(own, old.shape)):
            raise Misfit(f"{folder} does not fit what is served: {'; '.join(reasons)}.")
        shape = own if old is None else own.after(old.shape)
        rows = self._batcher(lambda items: self.compute(answers.predictions, ranker, own.rows, self.telemetry, items))
        ranks = self._batcher(lambda items: self.compute(answers.rank_together, ranker, self.telemetry, items))
        wire = Wire(shape, self.settings.max_candidates)
        return Loaded(ranker, own, shape, wire, folder, before, rows, ranks)

    def _batcher(self, work: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]) -> Batcher:
        return Batcher(
            work, wait=self.settings.batch_wait_ms / 1000, rows=self.settings.batch_rows, slots=self.settings.threads
        )

    def reload(self, folder: Path | None = None) -> Loaded:
        """Exchange the bundle for that of a folder (None: the same folder, read again); takes as long as loading takes.

        Raises:
            Misfit: it does not fit, or another exchange is under way; the old bundle goes on.
            Exception: it cannot be loaded; the same.
        """
        if not self._reloading.acquire(blocking=False):
            raise Misfit("Another bundle is being loaded. Try again when it is done.")
        try:
            self.current = self._read(folder or self.current.folder, self.current)
        except Exception as error:
            self.telemetry.reloads.labels("refused").inc()
            log.warning("bundle refused: %s", error)
            raise
        finally:
            self._reloading.release()
        self.telemetry.reloads.labels("done").inc()
        self._announce()
        return self.current

    def _announce(self) -> None:
        now = self.current
        log.info("bundle %s (%s) from %s answers", now.fingerprint, now.shape.name, now.folder)
        self.telemetry.loaded(now.shape.name, now.fingerprint)

    # ------------------------------------------------------------------------------------------------------------- work
    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place among the requests that are worked on.  Raises ApiError when all are taken."""
        if self.active >= self.settings.concurrency:
            raise ApiError(503, f"{self.active} requests are worked on already. Send it again.", headers=RETRY)
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    async def compute(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run in a thread that computes; given up while it waits, it never starts."""
        asked = time.perf_counter()

        def timed() -> Any:
            self.telemetry.stage_seconds.labels("queue").observe(time.perf_counter() - asked)
            return work(*arguments)

        return await self._submit(self.workers, timed)

    async def _submit(self, pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
        job = pool.submit(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.wrap_future(job)

    async def ask(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run in a thread that waits for the store."""
        return await self._submit(self.writers, lambda: work(*arguments))

    async def write(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """As `ask`, of a call that changes the store; how it ended is kept for ``/health``."""
        try:
            found = await self.ask(work, *arguments)
        except StoreError as error:
            self.refuses = of_store(error).message
            raise
        self.refuses = ""
        return found

    def close(self) -> None:
        """Drop what waits, end what runs, close the store; what does not end in the time of a request is left (`stuck`)."""
        self.closing = True
        for pool in (self.workers, self.writers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.stuck = bool(wait(list(self._jobs), self.settings.timeout).not_done)
        if not self.stuck:
            self.store.close()


# ----------------------------------------------------------------------------------------------------- bundles in folders
def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits of all that a bundle's answers depend on.  Raises OSError where there is no bundle."""
    digest = hashlib.blake2b(digest_size=8)
    weights = folder / "weights.safetensors"
    others = (one for one in folder.glob("*.safetensors") if one != weights)
    parts = [
        folder / "run.toml",
        folder / "schema.json",
        weights,
        *sorted(others),
        *sorted(folder.glob("vocabularies/*")),
    ]
    for part in parts:
        digest.update(f"{part.relative_to(folder)}\0{part.stat().st_size}\0".encode())
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def newest(folder: Path) -> tuple[Path, int] | None:
    """The newest whole bundle in a folder, and when it was written: weights are written last."""
    found = [(weights.stat().st_mtime_ns, weights.parent) for weights in folder.glob("*/weights.safetensors")]
    return max(found)[::-1] if found else None
