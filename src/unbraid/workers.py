"""Calls of `unbraid.train.Local.fit` that do not depend on each other, each in a process of its own.

A worker opens the encoded folder itself (memory-mapped, so that its pages are shared), gets the model through a file and the
rest through a pipe, and leaves its result in the file that `fit` writes when it has finished; on the way it says how far it
is.  A call trains from the seed of its number or its own, whichever process it runs in, and torch is given as many threads as
it has here: the result is that of a call after the other, bit for bit.

Workers are spawned, since a fork of a process with threads or CUDA may hang, and live until `Workers.close`, because importing
torch takes seconds.  They end with this process, and when one of them ends unexpectedly all do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unbraid import sharded_files, store
from unbraid.data.features import attach
from unbraid.data.table import Encoded
from unbraid.train import Local, Watcher
from unbraid.types import State

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

OF_SESSION = (
    "terms",
    "update",
    "training",
    "weights",
    "seed",
    "resume",
    "device",
    "average",
    "augment",
)  # what a worker's session shares with ours


class Workers:
    """Processes that wait for calls of ``fit``."""

    def __init__(self) -> None:
        self.idle: list[Worker] = []
        self.busy: dict[Connection, Worker] = {}

    def fit_apart(
        self, session: Local, model: nn.Module, steps: int, calls: Sequence[Mapping[str, Any]], jobs: int
    ) -> Iterator[tuple[State, State]]:  # fmt: skip
        """See `unbraid.train.Local.fit_apart`.  However it ends, no worker is left with half a call."""
        first, session.calls = session.calls, session.calls + len(calls)
        with _folder(session) as (folder, scratch):
            start = scratch / "start.pickle"
            _dump(start, model)
            tasks = [_task(session, folder, start, first + place, steps, call) for place, call in enumerate(calls)]
            board = _Board(session, first, len(calls), steps)
            try:
                for place in self._run(tasks, jobs, board):
                    path = folder / f"fit-{first + place}.safetensors"
                    result = sharded_files.load(path)
                    if session.folder is None:
                        sharded_files.remove(path)
                    yield result["model"], result["update"]
            except BaseException:  # an interruption and an abandoned loop, too
                self.close()
                raise

    def _run(self, tasks: Sequence[bytes], jobs: int, board: _Board) -> Iterator[int]:
        """Give out the tasks and yield their places in order as they get finished."""
        waiting, finished, told = list(enumerate(tasks)), set[int](), 0
        while told < len(tasks):
            while waiting and len(self.busy) < jobs:
                worker = self.idle.pop() if self.idle else Worker()
                worker.give(*waiting.pop(0))
                self.busy[worker.pipe] = worker
            for pipe in wait(list(self.busy)):
                worker = self.busy[pipe]  # type: ignore[index]
                if board.read(worker.place, worker.hear()):
                    finished.add(worker.place)
                    self.idle.append(self.busy.pop(worker.pipe))
            while told in finished:
                yield told
                told += 1

    def close(self) -> None:
        """End all processes."""
        for worker in (*self.idle, *self.busy.values()):
            worker.process.terminate()
        for worker in (*self.idle, *self.busy.values()):
            worker.end()
        self.idle, self.busy = [], {}


class Worker:
    """One process, and our end of its pipe."""

    name = "unbraid-fit"

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        settings = (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
        self.process: SpawnProcess = context.Process(
            target=self.work, args=(theirs, settings), daemon=True, name=self.name
        )
        self.process.start()
        theirs.close()  # else this process would keep the pipe of a dead worker open
        self.place = -1

    def give(self, place: int, task: bytes) -> None:
        """Hand over a task; a worker that is gone is noticed when it is listened to."""
        self.place = place
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(task)

    def hear(self) -> tuple[str, Any]:
        """Its next message.  Raises ChildProcessError when it ended without one."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise ChildProcessError(self.lost(_ending(self.process.exitcode or 0))) from None

    def lost(self, ending: str) -> str:
        """What to say of a process that is gone."""
        return (
            f"The process of training no. {self.place + 1} of those that run at once ended by {ending}. "
            "Checkpoints are kept: resume, with fewer `jobs` if memory was short."
        )

    def end(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.join()
        self.pipe.close()

    @staticmethod
    def work(pipe: Connection, settings: tuple[int, torch.dtype, bool]) -> None:
        """What the process does: tasks until there are no more."""
        _work(pipe, settings)


def _ending(code: int) -> str:
    """How a process ended."""
    if code < 0:
        return f"signal {-code}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")
    return (
        f'exit status {code}. If the program is a script, what it runs should stand under `if __name__ == "__main__":`'
    )


class _Board:
    """Adds up what the workers say and tells the session's watcher."""

    def __init__(self, session: Local, first: int, count: int, steps: int) -> None:
        self.session, self.first, self.total = session, first, count * steps
        self.steps, self.before = steps, session.steps
        self.done, self.speed, self.losses = [0] * count, [0.0] * count, dict[str, float]()

    def read(self, place: int, message: tuple[str, Any]) -> bool:
        """Act on a message.  Returns whether it was the call's last; raises what the call raised."""
        what, value = message
        watcher = self.session.watcher
        if what == "error":
            error, text = value
            raise error from RuntimeError(f"In the process of call {self.first + place}:\n{text}")
        if what == "step":
            self.done[place], self.speed[place], self.losses = value
            watcher.step(sum(self.done), self.total, sum(self.speed), self.losses)
        elif what in ("log", "cut_log"):
            getattr(self.session, what)(*value)
        elif what == "note":
            watcher.note(*value)
        elif what == "evaluated":
            watcher.begins(self.first + place, self.before + place * self.steps)
            watcher.evaluated(*value)
        elif what == "finished":
            self.session.seconds += value[0]
            self.session.steps += value[1]
            self.session.told = value[2]
            self.speed[place] = 0.0
        return what == "finished"


@contextlib.contextmanager
def _folder(session: Local) -> Iterator[tuple[Path, Path]]:
    """Where calls leave their checkpoints, and a folder for what is needed meanwhile: the same if the session has none."""
    if session.folder is None:
        with tempfile.TemporaryDirectory(prefix="unbraid-") as name:
            yield Path(name), Path(name)
    else:
        with store.scratch(session.folder) as scratch:
            yield session.folder, scratch


def _task(session: Local, folder: Path, start: Path, call: int, steps: int, arguments: Mapping[str, Any]) -> bytes:
    """All that a worker needs to know of a call."""
    shared = {name: getattr(session, name) for name in OF_SESSION}
    state = arguments.get("update_state")
    path = start.with_name(f"state-{call}.safetensors")
    if state is not None:
        store.save(path, state)
    told = {
        "data": session.data.folder,
        "session": shared,
        "folder": folder,
        "model": start,
        "call": call,
        "steps": steps,
    }
    told |= {"arguments": {**arguments, "update_state": None}, "state": None if state is None else path}
    return _pickled(told)


def _dump(path: Path, model: nn.Module) -> None:
    with path.open("wb") as file, _picklable():
        pickle.dump(model, file, protocol=pickle.HIGHEST_PROTOCOL)


def _pickled(value: Any) -> bytes:
    with _picklable():
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


@contextlib.contextmanager
def _picklable() -> Iterator[None]:
    try:
        yield
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"Trainings that run at once need a model, losses and arguments that can be pickled ({error}). "
            "Let them run one after another: `jobs` = 1."
        ) from error


# ----------------------------------------------------------------------------------------------------- in the new process
class _Reporter(Watcher):
    """Passes on what happens in a call."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def step(self, done: int, total: int, rows_per_second: float, losses: Mapping[str, float]) -> None:
        self.pipe.send(("step", (done, rows_per_second, dict(losses))))

    def evaluated(self, *found: Any) -> None:
        self.pipe.send(("evaluated", found))

    def note(self, text: str) -> None:
        self.pipe.send(("note", (text,)))


class _Remote(Local):
    """A session whose log is written by the process that gave out the call."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on a line."""
        self.watcher.pipe.send(("log", (record,)))  # type: ignore[attr-defined]

    def cut_log(self, call: int | str, step: int) -> None:
        """Pass on that lines are to go."""
        self.watcher.pipe.send(("cut_log", (call, step)))  # type: ignore[attr-defined]


def _work(pipe: Connection, settings: tuple[int, torch.dtype, bool]) -> None:
    """Do tasks until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first ends the others
    threads, dtype, deterministic = settings
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    with contextlib.suppress(EOFError, OSError):  # the first process is gone
        while True:
            _do(pickle.loads(pipe.recv_bytes()), pipe)


def _do(task: Mapping[str, Any], pipe: Connection) -> None:
    """One call of ``fit``; what it raises is passed on."""
    try:
        with task["model"].open("rb") as file:
            model = pickle.load(file)
        state = None if task["state"] is None else store.load(task["state"])
        data, shared = Encoded(task["data"]), task["session"]
        attach(data, model, augment=shared["augment"], device=shared["device"])
        session = _Remote(
            data=data,
            folder=task["folder"],
            calls=task["call"],
            watcher=_Reporter(pipe),
            **shared,
        )
        session.fit(model, task["steps"], **{**task["arguments"], "update_state": state})
        pipe.send(("finished", (session.seconds, session.steps, session.told)))
    except OSError as error:
        if pipe.closed or isinstance(error, BrokenPipeError):
            raise
        _send_error(pipe, error)
    except Exception as error:
        _send_error(pipe, error)


def _send_error(pipe: Connection, error: Exception) -> None:
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    pipe.send(("error", (error, text)))
