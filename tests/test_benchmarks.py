"""A benchmark is honest only if both of its sides compute the same thing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from unbraid.types import Ragged

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their annotations up here
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load("train_speed")


@pytest.fixture(scope="module")
def long_history(bench: ModuleType) -> ModuleType:
    return load("long_history")  # it imports the other one


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", ["mmoe", "din"])
def test_plain_loop_and_ours_have_the_same_losses_and_gradients(
    bench: ModuleType, tmp_path: Path, name: str, lazy: bool
) -> None:
    if name == "din":
        pytest.importorskip("unbraid.encoders.din")
    data = bench.encoded(1_000, tmp_path, history=name == "din")
    rows = data.split("train")
    plain = {"mmoe": bench.PlainMMoE, "din": bench.PlainDIN}[name](data.schema).double()
    ours = {"mmoe": bench.our_mmoe, "din": bench.our_din}[name](data.schema, lazy).double()
    pairs = list(zip(plain.parameters(), ours.parameters(), strict=True))
    for theirs, mine in pairs:
        assert theirs.shape == mine.shape
        theirs.data.normal_(0.0, 0.3)
        mine.data.copy_(theirs.data)
    chosen = np.random.default_rng(0).permutation(len(rows))[:64]
    batch = data.batch(rows[chosen])
    theirs_ = bench.plain_losses(plain, bench.PlainData(data, rows), torch.from_numpy(chosen))
    output = ours(batch)
    mine_ = torch.stack(list(bench.Supervised().bind(data.schema)(output, batch, 0).values()))
    torch.testing.assert_close(mine_, theirs_, **EXACT)

    theirs_.sum().backward()
    mine_.sum().backward()
    looked_up = {x.table: (x.ids, x.vectors.grad) for x in output.lookups if x.vectors.is_leaf}
    assert bool(looked_up) == lazy
    names = {id(table.weight): name for name, table in ours.tables.items()}
    for theirs, mine in pairs:
        grad = mine.grad
        if (table := names.get(id(mine))) in looked_up:
            ids, found = looked_up[table]
            grad = torch.zeros_like(mine).index_copy_(0, ids, found)
        torch.testing.assert_close(grad, theirs.grad, **EXACT)


def test_the_log_has_the_histories_it_claims(bench: ModuleType, tmp_path: Path) -> None:
    data = bench.encoded(3_000, tmp_path, history=True)
    plain = bench.PlainData(data, data.split("train"))
    assert int(plain.lengths.max()) == bench.LENGTH
    assert abs(float(plain.lengths.float().mean()) - bench.MEAN) < 8
    index = torch.tensor([5, 0, 77])
    items, mask = plain.padded(index)
    history = data.batch(data.split("train")[index.numpy()]).features["past"]
    assert isinstance(history, Ragged)
    assert torch.equal(mask.sum(1).long(), history.lengths)
    assert torch.equal(items[mask.bool()], history.values["items"])


@pytest.mark.parametrize("ids", ["uniform", "zipf", "repeats"])
def test_all_forms_of_the_search_give_the_same(long_history: ModuleType, ids: str) -> None:
    with torch.no_grad():
        case = long_history.Searched(16, 2_000, ids, quick=True)
        mine = long_history.ours(case)
        for form in long_history.FORMS:
            long_history.same(case, mine, long_history.plain(case, form, 7))
        long_history.same(case, mine, long_history.two_pass(case, 24))
        other = case.ids.view(case.rows, -1)[:, :20].argsort(1)
        with pytest.raises(AssertionError):
            long_history.same(case, mine, (other, mine[1]))
        with pytest.raises(AssertionError):
            long_history.same(case, mine, (mine[0], mine[1] + 1e-4))


def test_plain_and_our_dare_have_the_same_losses_and_gradients(long_history: ModuleType, tmp_path: Path) -> None:
    data = long_history.encoded(204, 64, 60, 15, tmp_path)
    theirs, mine = long_history.PlainDARE(data.schema).double(), long_history.our_dare(data.schema).double()
    names = [name for name, _ in theirs.named_parameters()]
    tables = {f"{role}.{name}.weight": mine.tables[f"{view}/{name}/{role}"].weight
              for view, role in (("shared", "value"), ("every", "attention"))
              for name in ("item", "category", "position")}  # fmt: skip
    (history,) = mine.histories.values()
    rest = [*mine.tower.parameters(), *mine.heads.parameters(), *mine.second.parameters()]
    others = [name for name in names if name not in tables and name != "rank_query"]
    matched = {**tables, "rank_query": history.queries["field/position"], **dict(zip(others, rest, strict=True))}
    assert set(matched) == set(names) and len(matched) == len(list(mine.parameters()))
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        assert parameter.shape == matched[name].shape, name
        parameter.data.normal_(0.0, 0.3)
        matched[name].data.copy_(parameter.data)

    rows = data.split("train")
    side = long_history.PlainSide(theirs, data, 64)
    lengths = side.end - side.start
    assert 0 in lengths and int(lengths.max()) > 20  # K
    chosen = torch.randperm(len(rows))[:64]
    batch = data.batch(rows[chosen.numpy()])
    output = mine(batch)
    terms = long_history.Supervised().bind(data.schema), long_history.HistoryLoss().bind(data.schema)
    mine_ = torch.stack([term(output, batch, 0)["click"] for term in terms])
    theirs_ = side.losses(chosen)
    torch.testing.assert_close(mine_, theirs_, **EXACT)
    theirs_.sum().backward()
    mine_.sum().backward()
    for name, parameter in theirs.named_parameters():
        grad = matched[name].grad
        assert grad is not None and grad.any(), name
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
def test_the_comparison_of_long_history_encoders_runs_and_continues(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "paper_dare.py"
    command = [
        sys.executable,
        str(script),
        "kuairand",
        "--out",
        str(tmp_path),
        "--quick",
        "--dims",
        "8",
        "--seeds",
        "2",
    ]
    command += ["--jobs", "1", "--only", "twin", "dare", "mean"]
    found = [subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout for _ in range(2)]
    assert json.loads(found[0].splitlines()[-1])["rates"]["8"].keys() == {"twin", "dare", "mean"}
    assert found[0] == found[1], "nothing is trained twice"
