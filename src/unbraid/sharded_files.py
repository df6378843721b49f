"""Checkpoints and bundles of models with divided tables (`unbraid.sharding`, docs/distributed.md).

A checkpoint is one file (`unbraid.store`) in which a mark stands for each tensor of a divided table, and a folder beside it that
all processes write with torch's distributed checkpoint, each its rows.  The file names its folder and is replaced last: a reader
sees the old of both or the new.  What is read back are this process's rows, however many processes wrote them.

A bundle is one file, the same from any number of processes: the first one writes it, block by block as the owners send them.
"""

from __future__ import annotations

import pickle
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unbraid import parallel, sharding, store
from unbraid.types import State

FOLDER = "tables of the folder"  # key of what `save` writes where there are any
MARK = "rows of a divided table"
Rows = dict[str, tuple[Tensor, int]]  # path in a state -> this process's rows (n, ...), and how many the table has


def sizes(model: nn.Module) -> dict[str, int]:
    """Table that several processes divide -> its rows.  They are written apart by one process, too."""
    tables: Mapping[str, Any] = getattr(model, "tables", {})
    return {name: table.size for name, table in tables.items() if table.divided}


# --------------------------------------------------------------------------------------------------------------- checkpoints
def save(path: Path, state: State, tables: Mapping[str, int]) -> None:
    """Write a state: all processes call it with theirs, and the first one's is written, with all rows of divided tables.

    Args:
        tables: `sizes`.  What belongs to a table is below its name, or that of its weight, in the state.

    Raises:
        OSError: something could not be written.  The previous file, and its folder, are as they were.
    """
    rows: Rows = {}
    marked = _marked(state, (), tables, rows)
    if rows:
        name = parallel.on_first(lambda: f"{path.stem}.{uuid.uuid4().hex[:12]}.tables")
        marked = {FOLDER: name, "state": marked}
        _all(path, "save", path.with_name(name), rows)
    if parallel.rank() == 0:
        store.save(path, marked)
        for old in folders(path) if rows else ():
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)


def load(path: Path) -> State:
    """Read what `save` wrote, of divided tables this process's rows.  All processes call it.

    Raises:
        FileNotFoundError, ValueError: as `unbraid.store.load`; ValueError: the file's folder is not there.
        OSError: the folder cannot be read.
    """
    found = store.load(path)
    if FOLDER not in found:
        return found
    name = str(found[FOLDER])
    if not re.fullmatch(re.escape(path.stem) + r"\.[0-9a-f]{12}\.tables", name):
        raise ValueError(f"{path} was not written by unbraid: its tables should lie beside it. Found {name[:100]!r}.")
    folder, rows = path.with_name(name), Rows()
    if not (folder / ".metadata").exists():
        raise ValueError(
            f"{path} goes with {folder}, which is not there, or not whole. Continue from an earlier checkpoint."
        )
    state = _filled(found["state"], rows)
    _all(path, "load", folder, rows)
    return state


def folders(path: Path) -> list[Path]:
    """The folders beside a file that `save` wrote."""
    return list(path.parent.glob(f"{path.stem}.*.tables"))


def remove(path: Path) -> None:
    """Remove what `save` wrote, if it is there."""
    path.unlink(missing_ok=True)
    for folder in folders(path):
        shutil.rmtree(folder, ignore_errors=True)


def _marked(value: Any, path: tuple[str, ...], tables: Mapping[str, int], rows: Rows) -> Any:
    """A state with marks in the place of rows of divided tables, which are put aside."""
    if isinstance(value, Mapping):
        return {key: _marked(each, (*path, str(key)), tables, rows) for key, each in value.items()}
    if isinstance(value, list | tuple):
        found = [_marked(each, (*path, str(i)), tables, rows) for i, each in enumerate(value)]
        return found if isinstance(value, list) else tuple(found)
    table = next((t for t in tables for key in path if key == t or f".{key}".endswith(f".tables.{t}.weight")), None)
    if table is None or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    size = tables[table]
    if len(value) != len(sharding.owned(size)):
        raise ValueError(f"`{'/'.join(path)}` should have this process's rows of {size:,}. Found {len(value):,}.")
    key = f"{len(rows)}/{'/'.join(path)}"
    rows[key] = value.detach(), size
    return {MARK: key, "shape": [size, *value.shape[1:]], "dtype": str(value.dtype).removeprefix("torch.")}


def _filled(value: Any, rows: Rows) -> Any:
    """A state with tensors, of this process's rows and to be read, in the place of its marks."""
    if isinstance(value, Mapping) and MARK in value:
        size, *rest = value["shape"]
        dtype = getattr(torch, value["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"A table's rows should be of a type of torch's numbers. Found {value['dtype']!r}.")
        rows[value[MARK]] = torch.zeros(len(sharding.owned(size)), *rest, dtype=dtype), size
        return rows[value[MARK]][0]
    if isinstance(value, Mapping):
        return {key: _filled(each, rows) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled(each, rows) for each in value)
    return value


def _wrapped(rows: Rows) -> dict[str, Tensor]:
    """The rows as torch's distributed checkpoint knows parts of a whole; in one process they are the whole."""
    if parallel.world() == 1:
        return {key: value for key, (value, _) in rows.items()}
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh(next(iter(rows.values()))[0].device.type, list(range(parallel.world())))
    found: dict[str, Tensor] = {}
    for key, (value, size) in rows.items():
        value, shape = value.contiguous(), torch.Size([size, *value.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        found[key] = DTensor.from_local(value, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    return found


def _all(path: Path, what: Literal["save", "load"], folder: Path, rows: Rows) -> None:
    """Save or load with all processes.  Raises `unbraid.parallel.Lost`, or OSError with what went wrong in any of them."""
    import torch.distributed.checkpoint as dcp  # takes long to import, and most trainings have no divided tables
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with parallel.told(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked for
            if what == "save":
                dcp.save(_wrapped(rows), checkpoint_id=folder, no_dist=parallel.world() == 1)
            else:
                dcp.load(_wrapped(rows), storage_reader=_reader(folder), no_dist=parallel.world() == 1)
    except CheckpointException as error:  # of torch, and no Exception
        why = "; ".join(f"process {place}: {each[0]}" for place, each in error.failures.items())
        raise OSError(
            f"The tables of {path} cannot be written or read. {why}. A previous file is unchanged."
        ) from error


def _reader(folder: Path) -> Any:
    """What reads a folder of torch's: its own reader would run what its list of contents, a pickle, names."""
    from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            path = folder / ".metadata"
            try:
                with path.open("rb") as file:
                    found = _Contents(file).load()
                about, places = found.state_dict_metadata, found.storage_data
                # what is no tensor is a pickle, which torch would load whole
                tensors = all(isinstance(one, TensorStorageMetadata) for one in about.values())
                if not tensors or any(Path(one.relative_path).name != one.relative_path for one in places.values()):
                    raise pickle.UnpicklingError("It names something that is no tensor, or a file elsewhere.")
                found.storage_meta.load_id = self.load_id
            except Exception as error:  # a pickle that was written to do harm may raise anything
                raise ValueError(
                    f"{path} was not written by unbraid, or is damaged ({error}). Continue from an earlier checkpoint."
                ) from error
            return found

    return Reader(folder)


class _Contents(pickle.Unpickler):
    """Reads the names, sizes and places of tensors, as torch's distributed checkpoint writes them, and nothing that could run."""

    allowed = {
        "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath"},
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for anything else."""
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in self.allowed.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"It names {module}.{name}, which could do anything.")


# -------------------------------------------------------------------------------------------------------------------- bundles
def whole(model: nn.Module) -> dict[str, Tensor | store.Streamed]:
    """The model's weights and buffers, with divided tables as they come from their owners, who all must `send` them."""
    found: dict[str, Tensor | store.Streamed] = dict(model.state_dict())
    for name, part in sharding.parts(model).items():
        found[name] = store.Streamed((part.rows, part.shape[1]), part.dtype, partial(_received, part))
    return found


def send(model: nn.Module) -> None:
    """Send this process's rows to the first one, which writes `whole`."""
    for part in sorted(sharding.parts(model).values(), key=lambda part: -part.element_size()):  # as `store.save` writes
        for block in _blocks(part.detach()):
            with parallel.told():
                dist.send(block.contiguous(), group_dst=0, group=parallel.group())


def _received(part: sharding.Part) -> Iterator[Tensor]:
    yield from _blocks(part.detach())
    for place in range(1, parallel.world()):
        rows, each = len(sharding.owned(part.rows, place)), _rows(part)
        for start in range(0, rows, each):
            block = part.detach().new_empty(min(each, rows - start), part.shape[1])
            with parallel.told():
                dist.recv(block, group_src=place, group=parallel.group())
            yield block


def _blocks(value: Tensor) -> Iterator[Tensor]:
    return (value[start : start + _rows(value)] for start in range(0, len(value), _rows(value)))


def _rows(value: Tensor) -> int:
    """Rows of a block."""
    return max(1, sharding.BLOCK // value.shape[1])
