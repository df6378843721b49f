"""Nested states in one file without pickle, and files and folders that are either whole or not there.

`save` writes a valid safetensors file (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON
header, the tensors end to end.  Tensors are named by their path in the state; the rest of the state is JSON under
``unbraid`` in the header's metadata, next to a CRC-32 of the whole file.  It is written here rather than by the
safetensors package, one tensor at a time, so that a checkpoint needs no second copy of the model in memory and a full
disk is an ``OSError``.

Everything is written to ``.NAME.unbraid-HOST-PID-N`` beside its destination, synced and renamed: a reader sees the old
or the new, and a crash leaves at most that temporary.  The next write into the folder removes the temporaries of
processes that are gone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unbraid.types import State

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
_NO_SUM = "00000000"  # stands in the header while the file's sum is computed
_BLOCK = 1 << 20
ABANDONED = 7 * 86_400  # seconds
_MARK = re.compile(r"^\..*\.unbraid-(?P<host>.+)-(?P<pid>\d+)-\d+$", re.DOTALL)


@dataclass(frozen=True)
class Streamed:
    """A tensor for `save` that nobody holds whole.

    Args:
        blocks: makes its rows in their order, as tensors.  Several are asked for theirs in the order of the state, those with
            the widest elements first.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[Tensor]]


_count = itertools.count()
_open: set[Path] = set()  # temporaries that this process is writing


# ------------------------------------------------------------------------------------------------------------- states
def save(path: str | Path, state: State) -> None:
    """Write a state: dicts, lists and tuples of tensors, arrays, numbers, text and None.

    Every value comes back from `load` as it was: floats exactly, tuples as tuples, keys that are numbers as numbers.
    Tensors come back on the CPU, and subclasses (a named tuple, an ordered dict) as the plain type.

    Args:
        path: the file, replaced whole; missing folders are made.
        state: what to write.

    Raises:
        TypeError: a value is of another type; the message has its place.
        OSError: the file could not be written.  The previous file is unchanged.
    """
    tensors: dict[str, Tensor | Streamed] = {}
    skeleton = json.dumps(_encode(state, "", tensors))
    # wide elements first, so that every tensor stays aligned to its element size
    order = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
    header, size = _header(skeleton, {key: tensors[key] for key in order})

    def write(file: BinaryIO) -> None:
        total = zlib.crc32(header)
        file.write(header)
        for key in order:
            given = tensors[key]
            for part in given.blocks() if isinstance(given, Streamed) else (given,):
                data = _bytes(part)
                total = zlib.crc32(data, total)
                file.write(data)
        file.seek(header.rindex(_NO_SUM.encode()))
        file.write(f"{total:08x}".encode())

    _write(Path(path), size, write)


def load(path: str | Path, *, mapped: bool = False) -> State:
    """Read a state that `save` wrote.

    Args:
        mapped: tensors are views of the file, which take memory only for what is read of them.  It is for one who reads some
            and lets go: `save` replaces the file safely, but whoever writes into it changes them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one that `save` wrote, or is damaged.
    """
    try:
        skeleton = _checked(Path(path))
        with safe_open(path, framework="pt") as file:
            return _decode(json.loads(skeleton), file.get_tensor, mapped)
    except (
        SafetensorError, UnicodeDecodeError, LookupError, TypeError, ValueError, RecursionError, struct.error,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path} is damaged, cut short or not written by unbraid ({error}). "
            "Delete it and continue from an earlier checkpoint, or copy it again from its source."
        ) from error


def _encode(value: Any, key: str, tensors: dict[str, Tensor | Streamed]) -> Any:
    """JSON of a value: plain where JSON is exact, else one tag and a payload.  Tensors are put aside under ``key``."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return {"float": float(value).hex()}
    if isinstance(value, Mapping):
        pairs = [[_key(k, key), _encode(v, f"{key}/{k}".lstrip("/"), tensors)] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        parts = [_encode(v, f"{key}/{i}".lstrip("/"), tensors) for i, v in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": parts}
    if isinstance(value, Tensor | Streamed):
        return {"tensor": _put(value, key, tensors)}
    if isinstance(value, np.ndarray):
        with contextlib.suppress(TypeError):
            # copied in C order and this machine's byte order: torch takes no others
            native = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
            return {"array": _put(torch.from_numpy(native), key, tensors)}
        raise TypeError(f"`{key}` is an array of {value.dtype}, which a state cannot hold.")
    found = type(value).__name__
    raise TypeError(f"`{key}` is a {found}, which a state cannot hold. Use tensors, arrays, numbers or text.")


def _key(key: Any, place: str) -> Any:
    if key is None or isinstance(key, bool | int | float | str):
        return _encode(key, place, {})
    raise TypeError(f"`{place}` has a key of type {type(key).__name__}. Keys of a state are text or numbers.")


def _put(tensor: Tensor | Streamed, key: str, tensors: dict[str, Tensor | Streamed]) -> str:
    """Name for a tensor: its path, made unique where two paths read alike ({1: x, "1": y})."""
    if isinstance(tensor, Tensor):
        tensor = _plain(tensor, key)
    # the name is ASCII, and not the header's own
    plain = key.encode("ascii", "backslashreplace").decode()
    name, again = plain, 1
    while name in tensors or name == "__metadata__":
        name, again = f"{plain}#{again}", again + 1
    tensors[name] = tensor
    return name


def _plain(tensor: Tensor, key: str) -> Tensor:
    """A tensor without its graph.  Raises TypeError for one that a state cannot hold."""
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.device.type == "meta":
        found = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
        raise TypeError(f"`{key}` is a tensor of {found}, which a state cannot hold.")
    return tensor.detach()


def _decode(value: Any, tensor: Callable[[str], Tensor], mapped: bool) -> Any:
    if not isinstance(value, dict):
        return value
    ((tag, payload),) = value.items()
    if tag == "dict":
        return {_decode(k, tensor, mapped): _decode(v, tensor, mapped) for k, v in payload}
    if tag in ("list", "tuple"):
        parts = [_decode(v, tensor, mapped) for v in payload]
        return parts if tag == "list" else tuple(parts)
    if tag == "float":
        return float.fromhex(payload)
    # usually a copy: the reader's tensor is a view of the file, which stays on the disk as long as the view is there
    found = tensor(payload) if mapped else tensor(payload).clone()
    return found.numpy() if tag == "array" else found


def _header(skeleton: str, tensors: Mapping[str, Tensor | Streamed]) -> tuple[bytes, int]:
    """The file up to its data, and the size of the file."""
    # the sum is the last metadata value, and tensors precede the metadata: it is found from the end
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    entries["__metadata__"] = {"format": "pt", "unbraid": skeleton, "crc32": _NO_SUM}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + end


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().contiguous()
    # torch views a tensor as bytes only where its stride is 1, which that of 0 or 1 elements need not be
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data


def _checked(path: Path) -> str:
    """The skeleton of a file whose sum is right; raises ValueError."""
    with path.open("rb") as file:
        start = file.read(8)
        (length,) = struct.unpack("<Q", start)
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        text = file.read(length)
        metadata = json.loads(text)["__metadata__"]
        place = text.rindex(metadata["crc32"].encode())
        total = zlib.crc32(start + text[:place] + _NO_SUM.encode() + text[place + len(_NO_SUM) :])
        while block := file.read(_BLOCK):
            total = zlib.crc32(block, total)
    if f"{total:08x}" != metadata["crc32"]:
        raise ValueError("its checksum does not match")
    return metadata["unbraid"]


# ---------------------------------------------------------------------------------------------------- files and folders
def within(folder: Path, name: str) -> Path:
    """The file of a folder that another file in it names.

    Raises:
        ValueError: it is no plain name: what describes a folder points at no file elsewhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{folder} should name files that lie in it. Found {str(name)[:100]!r}.")
    return folder / name


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole.

    Raises:
        OSError: the file could not be written.  The previous file is unchanged.
    """
    data = text.encode()

    def write(file: BinaryIO) -> None:
        file.write(data)

    _write(Path(path), len(data), write)


@contextlib.contextmanager
def atomic_folder(final: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder that appears as ``final`` when the block ends, whole, and not at all when the block raises.

    Args:
        replace: a folder that is there goes in that moment; killed right then, neither is there.

    Yields:
        an empty temporary folder beside ``final``.

    Raises:
        FileExistsError: ``final`` exists, and is not an empty folder.
    """
    final = Path(final)
    if final.exists() and not (final.is_dir() and (replace or not any(final.iterdir()))):
        raise FileExistsError(f"{final} exists. Delete it, or choose another folder.")
    with _temporary(final) as temporary:
        temporary.mkdir()
        yield temporary
        _publish(temporary, final, replace)
    _sync_folder(final.parent)


def _publish(temporary: Path, final: Path, replace: bool) -> None:
    for folder, _, names in os.walk(temporary):
        for name in names:
            sync(Path(folder) / name)
        _sync_folder(Path(folder))
    with _temporary(final) as old:
        if replace and final.exists():
            os.replace(final, old)
        os.replace(temporary, final)


class Journal:
    """What is done of a folder in progress, in a file that is written whole.

    Args:
        folder: where it lies; without one nothing is kept, and nothing is ever due.
    """

    every = 10.0  # seconds of work that may be lost

    def __init__(self, folder: Path | None = None) -> None:
        self.path = None if folder is None else folder / "journal.json"
        self.noted: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self.noted = json.loads(self.path.read_text())
        self._last = time.monotonic()

    def due(self) -> bool:
        """Is it time to note how far the work is?"""
        return self.path is not None and time.monotonic() - self._last >= self.every

    def worth(self) -> bool:
        """Is a step that is done to be noted?  What took seconds alone is made again sooner than it is synced."""
        return self.path is not None and (bool(self.noted) or self.due())

    def note(self, **done: Any) -> None:
        """Keep JSON values by name.  What they speak of must be synced before."""
        self._last = time.monotonic()
        self.noted |= done
        if self.path is not None:
            write_text(self.path, json.dumps(self.noted))


@contextlib.contextmanager
def resumable_folder(final: str | Path) -> Iterator[tuple[Path, Journal]]:
    """A folder as of `atomic_folder`, with a journal, both of which outlive a process that is killed or interrupted.

    The next process that asks for the same ``final`` gets them.  While another one writes it, a folder of its own is
    given, of which nothing is left; so it is where files cannot be locked.  An error leaves nothing.  What nobody has continued
    for a week goes.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    for path in final.parent.glob(".*.unfinished"):
        if time.time() - path.stat().st_mtime > ABANDONED and path.name != f".{final.name}.unfinished":
            with _locked(path) as free:
                if free:
                    _remove(path)
    folder = final.parent / f".{final.name}.unfinished"
    folder.mkdir(exist_ok=True)
    with _locked(folder) as mine:
        if not mine or not folder.exists():
            with atomic_folder(final) as other:
                yield other, Journal()
            return
        if final.exists() and any(final.iterdir()):
            _remove(folder)
            raise FileExistsError(f"{final} exists. Delete it, or choose another folder.")
        try:
            os.utime(folder)
            yield folder, Journal(folder)
        except Exception:  # not an interruption
            _remove(folder)
            raise
        try:
            _publish(folder, final, replace=False)
        except OSError:
            _remove(folder)
            raise
        for name in ("lock", "journal.json"):  # only now: until it has its name, nobody else may write it
            (final / name).unlink(missing_ok=True)
    _sync_folder(final.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process, and no other, may write a folder, until the block ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield False
        return
    try:
        file = (folder / "lock").open("a")
    except FileNotFoundError:  # another process has just finished it
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except OSError:
            mine = False
        yield mine


@contextlib.contextmanager
def scratch(folder: str | Path) -> Iterator[Path]:
    """An empty folder inside another, gone when the block ends; what a killed process leaves goes at the next write."""
    with _temporary(Path(folder) / "scratch") as temporary:
        temporary.mkdir()
        yield temporary


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporaries in a folder whose process was killed.  Every write does this for its own folder first."""
    for path in Path(folder).iterdir():
        match = _MARK.match(path.name)
        if match and path not in _open and match["host"] == _host() and not _alive(int(match["pid"])):
            _remove(path)


def _write(path: Path, size: int, write: Callable[[BinaryIO], None]) -> None:
    """Write a file of ``size`` bytes whole, or leave the one that is there."""
    try:
        with _temporary(path) as temporary:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
        why = f"Cannot write {path}: {error.strerror or error}. It needs {size:,} bytes; {free:,} are free"
        raise OSError(error.errno, f"{why}. A previous file is unchanged.") from error
    _sync_folder(path.parent)


@contextlib.contextmanager
def _temporary(final: Path) -> Iterator[Path]:
    """A free name beside ``final``; whatever is left there at the end is removed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final.parent)
    path = final.parent / f".{final.name}.unbraid-{_host()}-{os.getpid()}-{next(_count)}"
    _open.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _open.discard(path)


def _host() -> str:
    return socket.gethostname().replace("/", "_")


def _alive(pid: int) -> bool:
    """Does a process of this machine run?  Its own number says no: what it is writing is in ``_open``, and a restarted
    container often gets the number of the one that was killed."""
    if pid == os.getpid():
        return False
    if os.name == "nt":  # signal 0 would interrupt the process there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    """Best effort: another process may have been faster."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync(path: Path) -> None:
    """Wait until a file or folder would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    """Best effort: what is in it is whole either way, and some file systems refuse to sync a folder."""
    with contextlib.suppress(OSError):
        sync(path)
