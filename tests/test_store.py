"""States come back as they were; files are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from unbraid import store

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.bool, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
]  # fmt: skip
ARRAYS = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "?", "u8", "u4", "u2", "u1"]


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        keys = zip(a, b, strict=True)
        return len(a) == len(b) and all(same(k, j) for k, j in keys) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        bits = [x.clone(memory_format=torch.contiguous_format).untyped_storage().tolist() for x in (a, b)]
        return alike and bits[0] == bits[1]
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return a.hex() == b.hex()
    return a == b


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    raw = torch.tensor(draw(st.lists(st.integers(-9, 9), min_size=27, max_size=27)))
    count = int(np.prod(shape, dtype=int))
    return (raw[:count] / 3).to(draw(st.sampled_from(DTYPES))).reshape(shape)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    values = np.array(draw(st.lists(st.integers(0, 9), min_size=27, max_size=27)))
    return values[: int(np.prod(shape, dtype=int))].astype(draw(st.sampled_from(ARRAYS))).reshape(shape)


numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.none())
anything = st.text(st.characters(), max_size=6)  # lone surrogates included
keys = st.one_of(
    anything, st.sampled_from(["a/b", "a", "b", "1", "1#1", "__metadata__"]), st.integers(0, 3), st.booleans()
)
states = st.recursive(
    st.one_of(numbers, anything, tensors(), arrays()),
    lambda inner: st.one_of(
        st.dictionaries(keys, inner, max_size=4), st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(keys, states, max_size=4))
def test_round_trip(state: dict[Any, Any], tmp_path: Path) -> None:
    store.save(tmp_path / "state", state)
    assert same(store.load(tmp_path / "state"), state)


@pytest.mark.parametrize("key", ["__metadata__", "", "/", "\ud800", "\0", "ключ", 'a"b\\'])
def test_any_text_may_name_a_tensor(key: str, tmp_path: Path) -> None:
    state = {key: torch.ones(2), "list": [{key: torch.zeros(1)}]}
    store.save(tmp_path / "state", state)
    assert same(store.load(tmp_path / "state"), state)


def test_paths_that_read_alike_stay_apart_and_other_layouts_are_copied(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "a/b": base, "a": {"b": base.t(), "c": base[1:, ::2]}, 1: {"x": torch.tensor(1)}, "1": {"x": torch.tensor(2)},
        "shared": [base, base.view(-1), base[:1, 3:], base[0, ::4]], "grad": torch.nn.Parameter(torch.ones(2)),
        "array": np.arange(6).reshape(2, 3)[::-1, ::2], "big endian": np.arange(3, dtype=">i4"),
    }  # fmt: skip
    store.save(tmp_path / "state", state)
    found = store.load(tmp_path / "state")
    assert found["grad"].tolist() == [1, 1] and type(found["grad"]) is torch.Tensor
    assert found["big endian"].tolist() == [0, 1, 2]
    for special in ("grad", "big endian"):
        del found[special], state[special]
    assert same(found, state)


def test_it_is_a_safetensors_file_with_tensors_named_by_path_and_no_copy_of_text(tmp_path: Path) -> None:
    state = {
        "model": {"w": torch.ones(3, 2), "flag": torch.tensor([True])},
        "rows": [torch.zeros(2, dtype=torch.int64)],
    }
    store.save(tmp_path / "state", state)
    found = load_file(tmp_path / "state")
    assert set(found) == {"model/w", "model/flag", "rows/0"}
    assert torch.equal(found["model/w"], state["model"]["w"])  # type: ignore[call-overload]
    assert found["rows/0"].data_ptr() % 8 == 0


def test_a_loaded_state_does_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    store.save(path, {"w": torch.ones(1000)})
    found = store.load(path)
    with path.open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(b"\0" * 4000)
    assert torch.equal(found["w"], torch.ones(1000))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": object()}}, "`a/b` is a object"),
        ({"a": [np.float32(1)]}, "`a/0` is a float32"),
        ({"a": np.array(["x"])}, "`a` is an array of <U1"),
        ({"a": np.zeros(1, dtype=complex)}, "`a` is an array of complex128"),
        ({"a": torch.zeros(1, dtype=torch.complex64)}, "`a` is a tensor of torch.complex64"),
        ({"a": torch.eye(2).to_sparse()}, "`a` is a tensor of torch.float32, torch.sparse_coo"),
        ({"a": torch.empty(1, device="meta")}, "`a` is a tensor of torch.float32, torch.strided, meta"),
        ({"a": {(1, 2): 0}}, "`a` has a key of type tuple"),
    ],
)
def test_what_a_state_cannot_hold(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        store.save(tmp_path / "state", value)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- damage
def test_every_cut_and_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    store.save(path, {"w": torch.arange(5), "lr": 0.1, "name": "x"})
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(len(whole))] + [whole + b"\0"]
    damaged += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=re.escape(str(path)) + ".*Delete it and continue from an earlier checkpoint"
        ):
            store.load(path)


def test_a_file_of_someone_else(tmp_path: Path) -> None:
    path = tmp_path / "state"
    text = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0")
    with pytest.raises(ValueError, match="not written by unbraid"):
        store.load(path)
    with pytest.raises(FileNotFoundError):
        store.load(tmp_path / "none")


# ------------------------------------------------------------------------------------------------------------ no space
def test_a_full_disk_leaves_the_previous_file(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write itself fails half way."""
    path = tmp_path / "state"
    store.save(path, {"w": torch.ones(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"Cannot write .*state: .*\. It needs 8,000,\d+ bytes; [\d,]+ are free"
        ) as error:
            store.save(path, {"w": torch.ones(2_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert torch.equal(store.load(path)["w"], torch.ones(10))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failures_of_the_last_calls(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note"
    store.write_text(path, "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="Cannot write .*note: No space left on device. It needs 3 bytes") as error:
        store.write_text(path, "new")
    assert error.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["note"]
    assert path.read_text() == "old"


def test_data_are_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda f: (calls.append("folder" if stat.S_ISDIR(os.fstat(f).st_mode) else "file"), sync(f))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    store.save(tmp_path / "new" / "state", {})
    assert calls == ["file", "rename", "folder"]
    calls.clear()
    with store.atomic_folder(tmp_path / "bundle") as folder:
        (folder / "x").write_text("x")
    assert calls == ["file", "folder", "rename", "folder"]


# -------------------------------------------------------------------------------------------------------------- crashes
WRITER = """
import os, signal, sys, torch
from unbraid import store
path, moment = sys.argv[1:]
states = [{"n": n, "w": torch.full((500_000,), n), "v": [torch.full((1000,), n)]} for n in range(7)]
store.save(path, states[3])
print("ready", flush=True)
if moment:
    setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
while True:
    for state in states:
        store.save(path, state)
"""


@pytest.mark.parametrize("moment", ["fsync", "replace", ""])
def test_a_writer_that_is_killed_leaves_a_whole_file(moment: str, tmp_path: Path) -> None:
    """Killed just before the data are synced, just before the rename, or at any moment of repeated writes."""
    path = tmp_path / "state"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), moment], stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        if not moment:
            time.sleep(0.37)
            writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    state = store.load(path)
    assert state["n"] == 3 if moment else state["n"] in range(7)
    assert bool((state["w"] == state["n"]).all()) and bool((state["v"][0] == state["n"]).all())
    left = len(list(tmp_path.iterdir())) - 1
    assert left == 1 if moment else left in (0, 1)
    store.write_text(tmp_path / "note", "the next start")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note", "state"]


def test_only_leftovers_of_dead_processes_of_this_machine_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, parent = socket.gethostname(), os.getppid()
    gone = [
        f".state.unbraid-{host}-{dead.pid}-0",
        f".a.b.unbraid-{host}-{dead.pid}-12",
        f".state.unbraid-{host}-{os.getpid()}-99999",
    ]
    kept = [
        f".state.unbraid-{host}-{parent}-0",
        f".state.unbraid-{host}x-{dead.pid}-0",
        f"state.unbraid-{host}-{dead.pid}-0",
        f".state.unbraid-{host}-{dead.pid}",
        ".hidden",
    ]
    for name in [*gone[1:], *kept]:
        (tmp_path / name).write_text("")
    (tmp_path / gone[0] / "deep").mkdir(parents=True)
    store.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_a_write_does_not_remove_what_this_process_is_writing(tmp_path: Path) -> None:
    with store.atomic_folder(tmp_path / "bundle") as folder:
        store.write_text(tmp_path / "note", "x")
        assert folder.is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "note"]


# -------------------------------------------------------------------------------------------------------------- folders
def test_a_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "new" / "bundle"
    with store.atomic_folder(final) as folder:
        assert folder.parent == final.parent and not any(folder.iterdir())
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("x")
        assert not final.exists()
    assert (final / "sub" / "x").read_text() == "x"
    assert [p.name for p in final.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_whose_block_raises_never_appears(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), store.atomic_folder(tmp_path / "bundle") as folder:
        (folder / "x").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with store.atomic_folder(tmp_path / "bundle") as folder:
        (folder / "x").write_text("first")
    with pytest.raises(FileExistsError, match="bundle exists"), store.atomic_folder(tmp_path / "bundle"):
        raise AssertionError("the block must not run")
    assert (tmp_path / "bundle" / "x").read_text() == "first"
