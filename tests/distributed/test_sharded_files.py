"""Checkpoints and bundles of divided tables: whatever number of processes writes them, and whatever number reads them."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from every_member import base
from together_kit import Losses, Trained, apart, gap, together, trained, uneven_log, with_divided
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from toylog import make_run

from unbraid import parallel, sharded_files, sharding, store
from unbraid.bundle import Bundle, build
from unbraid.config import EMA, AdaTask, ForkMerge, ModelChoice, Run
from unbraid.data.encode import encode
from unbraid.data.fitted import Fitted
from unbraid.encoders.table import Table, Views
from unbraid.warm_start import warm_start

SIZES = {"a/b/value": 11, "c/d/value": 2}  # of 11 rows 4 processes have 3, 3, 3, 2, and of 2 rows two of them none


class Small(nn.Module):
    """Two tables and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: Table(size, 3, 1.0, True, True) for name, size in SIZES.items()})
        self.layer = nn.Linear(2, 2)


def state_of(model: Small) -> dict[str, Any]:
    """What checkpoints hold: weights, moments below tables' names, and what is no row of a table."""
    moments = {
        name: {"step": 3, "mean": t.weight.detach().half() * 2, "clock": torch.tensor(0.5)}
        for name, t in model.tables.items()
    }
    moments["a/b/value"]["last"] = torch.zeros(len(model.tables["a/b/value"].weight), dtype=torch.float64)
    return {"model": model.state_dict(), "rows": [moments, None], "other": (torch.arange(5), "text", None)}


def _made(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def _write(path: Path) -> list[Any]:
    model = _made()
    sharded_files.save(path, state_of(model), sharded_files.sizes(model))
    sharded_files.save(path, state_of(model), sharded_files.sizes(model))
    parallel.wait()
    return [len(sharded_files.folders(path)), path.exists()]


def _read(path: Path) -> dict[str, Any]:
    """The rows of all processes together, and the rest."""
    found = sharded_files.load(path)
    for holder, key in [(found["model"], f"tables.{n}.weight") for n in SIZES] + [
        (found["rows"][0][n], "mean") for n in SIZES
    ]:
        holder[key] = torch.cat(parallel.gather(holder[key]))
    return found


@pytest.mark.slow
def test_rows_come_back_in_any_number_of_processes(tmp_path: Path) -> None:
    wanted = state_of(_made())
    for before, after in ((4, 3), (4, 1), (1, 3)):
        path = tmp_path / f"{before}.safetensors"
        if not path.exists():
            written = [_write(path)] if before == 1 else together(before, tmp_path, _write, path)
            assert written == [[1, True]] * before, "what was written before goes"
        for found in [_read(path)] if after == 1 else together(after, tmp_path, _read, path):
            assert found["other"][1:] == ("text", None) and torch.equal(found["other"][0], torch.arange(5))
            assert found["rows"][1] is None
            for name, value in wanted["model"].items():
                assert torch.equal(found["model"][name], value), (before, after, name)
            for name in SIZES:
                mine, theirs = found["rows"][0][name], wanted["rows"][0][name]
                assert mine["step"] == 3 and mine["clock"] == 0.5 and torch.equal(mine["mean"], theirs["mean"])
                assert mine["mean"].dtype == torch.float16


def test_a_checkpoint_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    path, model = tmp_path / "fit-0.safetensors", _made()
    sharded_files.save(path, state_of(model), {})
    assert not sharded_files.folders(path) and sharded_files.load(path).keys() == {"model", "rows", "other"}
    sharded_files.save(path, state_of(model), SIZES)
    (folder,) = sharded_files.folders(path)
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match="which is not there, or not whole. Continue from an earlier checkpoint"):
        sharded_files.load(path)
    with pytest.raises(ValueError, match=r"tables.a/b/value.weight` should have this process's rows of 12. Found 11"):
        sharded_files.save(path, state_of(model), {"a/b/value": 12})
    sharded_files.remove(path)
    assert not any(tmp_path.iterdir())


class Bomb:
    """Its unpickling leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_a_folder_of_pickles_that_would_run_is_refused(tmp_path: Path) -> None:
    """torch's own reader would run them: its list of contents, and what that says is no tensor."""
    path, mark = tmp_path / "fit-0.safetensors", tmp_path / "mark"
    sharded_files.save(path, state_of(_made()), SIZES)
    (folder,) = sharded_files.folders(path)
    whole = (folder / ".metadata").read_bytes()
    contents = pickle.loads(whole)
    first = next(iter(contents.state_dict_metadata))

    def refused(content: bytes, why: str) -> None:
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(OSError, match=why):
            sharded_files.load(path)
        assert not mark.exists()

    refused(pickle.dumps(Bomb(mark)), "names (posix|nt).mkdir, which could do anything")
    refused(whole[: len(whole) // 2], "or is damaged")
    refused(pickle.dumps(replace(contents, planner_data=Bomb(mark))), "could do anything")
    bomb = folder / "bomb"
    bomb.write_bytes(pickle.dumps(Bomb(mark)))
    changed = copy.deepcopy(contents)
    changed.state_dict_metadata[first] = BytesStorageMetadata()
    for index, place in contents.storage_data.items():
        if index.fqn == first:
            changed.storage_data[MetadataIndex(first)] = replace(
                place, relative_path="bomb", offset=0, length=bomb.stat().st_size
            )
    refused(pickle.dumps(changed), "BytesStorageMetadata")
    changed = copy.deepcopy(contents)
    for index, place in contents.storage_data.items():
        changed.storage_data[index] = replace(place, relative_path=f"../{folder.name}/{place.relative_path}")
    refused(pickle.dumps(changed), "a file elsewhere")
    (folder / ".metadata").write_bytes(whole)
    assert sharded_files.load(path)["other"][1] == "text"
    found = store.load(path)
    for name in ("..", f"../{folder.parent.name}/{folder.name}", "elsewhere", 5):
        store.save(path, {**found, sharded_files.FOLDER: name})
        with pytest.raises(ValueError, match="should lie beside it"):
            sharded_files.load(path)


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "fit-0.safetensors", _made()
    sharded_files.save(path, state_of(model), SIZES)
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(sharded_files.store, "save", full)
        with pytest.raises(OSError, match="No space left"):
            sharded_files.save(path, state_of(_made(1)), SIZES)
    assert torch.equal(_read(path)["model"]["tables.a/b/value.weight"], model.tables["a/b/value"].weight.detach())
    sharded_files.save(path, state_of(_made(1)), SIZES)
    assert len(sharded_files.folders(path)) == 1, "the leftover goes with the next one"


def _bundle(path: Path, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        model = _made()
        patch.setattr(sharding, "BLOCK", block)
        store.save(path, sharded_files.whole(model)) if parallel.rank() == 0 else sharded_files.send(model)


@pytest.mark.slow
def test_the_bundle_is_the_same_file(tmp_path: Path) -> None:
    """Bit for bit, with blocks of two rows."""
    store.save(tmp_path / "one", _made().state_dict())
    together(4, tmp_path, _bundle, tmp_path / "four", 7)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "four").read_bytes()


def test_a_warm_start_copies_the_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier bundle is whole; each process takes from it what it owns, and counts what all took."""
    run = make_run(model=ModelChoice(tables=Views(width=4, lazy_rows=0, shard_mb=1e-9)))
    fitted = Fitted.load(encode(run.data, tables={"log": uneven_log()}))
    old = Bundle(run, fitted, build(replace(run, seed=5), fitted.schema), {})
    wanted = build(run, fitted.schema)
    counts = warm_start(wanted, fitted, old)
    found = []
    monkeypatch.setattr(parallel, "world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        model = build(run, fitted.schema)
        assert sharding.parts(model) and warm_start(model, fitted, old) == counts
        found.append(model.state_dict())
    for name, value in wanted.state_dict().items():
        parts = [each[name] for each in found]
        assert torch.equal(torch.cat(parts) if name in sharding.parts(model) else parts[0], value), name


# ---------------------------------------------------------------------------------------------------------------- trainings
def stopping() -> dict[str, Run]:
    """What a checkpoint must have of divided tables: moments of tasks, means, kept weights, what branches and merges remember."""
    run = base()
    run = replace(run, data=replace(run.data, withhold=""))
    run = replace(run, training=replace(run.training, steps=12, evaluate_every=2, checkpoint_steps=4))
    update = AdaTask(lr=0.02, table_weight_decay=0.1)
    averaged = replace(run, update=update, average=EMA(decay=0.5), training=replace(run.training, patience=6))
    merged = replace(run, schedule=ForkMerge(rounds=3, optimiser_state="average", branches="two"), update=update)
    return {name: with_divided(one) for name, one in {"averaged": averaged, "merged": merged}.items()}


class Stops(Losses):
    """Ends a training after its first checkpoint."""

    def trained(self, step: int, losses: Any) -> None:
        super().trained(step, losses)
        if len(self.steps) == 10:
            raise KeyboardInterrupt


def _stopped(folder: Path) -> None:
    for name, run in stopping().items():
        with pytest.raises(KeyboardInterrupt):
            trained(run, folder / name, watcher=Stops())


def _resumed(folder: Path) -> dict[str, Trained]:
    return {name: trained(run, folder / name, resume=True) for name, run in stopping().items()}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 1), (1, 2)])
def test_trainings_go_on_in_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    undisturbed = {name: trained(run) for name, run in stopping().items()}
    for name in stopping():
        (tmp_path / name).mkdir()
    together(before, tmp_path, _stopped, tmp_path) if before > 1 else _stopped(tmp_path)
    found = together(after, tmp_path, _resumed, tmp_path)[0] if after > 1 else _resumed(tmp_path)
    for name, one in undisturbed.items():
        assert not found[name].refused, found[name].refused
        assert (tmp_path / name).exists() and 0 < len(found[name].losses) < len(one.losses)
        rest = replace(one, losses=one.losses[-len(found[name].losses) :])
        assert gap(rest, found[name]) <= 1e-9 and apart(one, found[name]) <= 1e-9, (name, gap(rest, found[name]))
        assert found[name].looks == pytest.approx(one.looks[len(one.looks) - len(found[name].looks) :], abs=1e-9)
