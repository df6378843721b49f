"""Tables by rows over processes: drawn, read and moved as one table is, of which nobody holds more than a part."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import together_kit
import torch
from test_training import fifty, tiny
from together_kit import Trained, all_of, apart, gap, together, trained, with_divided
from torch import Tensor, nn
from toylog import make_run

from unbraid import parallel, sharding
from unbraid.config import STEM, AdaTask, Joint, Run
from unbraid.encoders.table import Table, Views
from unbraid.layers import by_domain
from unbraid.train import Training

ROWS, WIDTHS = (
    11,
    (3, 2),
)  # of two tables that one id reads; 11 rows over 3 processes are 4, 4, 3, and over 4 3, 3, 3, 2


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(("size", "width"), [(5, 3), (16, 1), (100, 7), (3, 2), (64, 16)])
def test_the_parts_are_those_of_one_table(world: int, size: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    whole = torch.empty(size, width).normal_(0.0, 0.1)
    after = torch.rand(4)
    monkeypatch.setattr(sharding, "BLOCK", 32)
    monkeypatch.setattr(parallel, "world", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        torch.manual_seed(3)
        found.append(sharding.draw(size, width, 0.1))
        assert torch.equal(torch.rand(4), after), "what is drawn next is the same, too"
        assert len(found[-1]) <= -(-size // world) and found[-1].start == sum(len(part) for part in found[:-1])
    assert torch.equal(torch.cat([part.detach() for part in found]), whole)


def test_a_copy_of_a_part_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    table = Table(5, 2, 1.0, lazy=True, divided=True)
    other = copy.deepcopy(nn.ModuleDict({"a": table}).double())["a"]
    assert isinstance(other.weight, sharding.Part) and other.weight is not table.weight
    assert (other.weight.start, other.weight.rows, other.weight.world) == (3, 5, 2)
    assert other.weight.dtype == torch.float64 and torch.equal(other.weight, table.weight)
    monkeypatch.setattr(parallel, "world", lambda: 1)
    with pytest.raises(RuntimeError, match="divided over 2 processes, and 1 read it. After training, load the bundle"):
        table.read(torch.tensor([0]))


def test_which_tables_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    sizes = {"large": 1000, "small": 999}
    tables = Views(width=10, lazy_rows=500, shard_mb=0.04).build((), sizes).tables
    assert {name: table.apart for name, table in tables.items()} == {
        "shared/large/value": True,
        "shared/small/value": False,
    }
    for config in (Views(width=10, lazy_rows=-1, shard_mb=0.04), Views(width=10, lazy_rows=0)):
        assert not any(table.apart for table in config.build((), sizes).tables.values())
    for bad in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="`shard_mb` should be finite and not negative"):
            Views(shard_mb=bad)


# ------------------------------------------------------------------------------------------------------------- the exchange
def ids_of(rank: int, case: int) -> Tensor:
    """Ascending distinct ids of a process; one has none."""
    chosen = torch.rand(ROWS, generator=torch.Generator().manual_seed(10 * case + rank)) < 0.6
    return (chosen if rank != case else chosen & False).nonzero().squeeze(1)


def grad_of(rank: int, case: int, key: str, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * case + 10 * rank + len(key))
    return torch.randn(len(ids_of(rank, case)), width, generator=generator, dtype=torch.float64)


KEYS = {("click", "wide"): "wide", ("buy", "wide"): "wide", ("click", "slim"): "slim", ("rest", "slim"): "slim"}


def has(rank: int, key: tuple[str, str]) -> bool:
    """Every second process has a gradient of `buy`, none of `rest`."""
    return key[0] == "click" or (key[0] == "buy" and rank % 2 == 1)


def _exchanged() -> list[Any]:
    torch.manual_seed(0)
    tables = nn.ModuleDict(
        {name: Table(ROWS, width, 1.0, True, True) for name, width in zip(("wide", "slim"), WIDTHS, strict=True)}
    )
    tables.double()
    weights: Any = {name: table.weight for name, table in tables.items()}
    found: list[Any] = [[len(weight) for weight in weights.values()]]
    rank = parallel.rank()
    for case in range(3):
        ids = ids_of(rank, case)
        read = sharding.fetch(list(tables.values()), ids)
        assert all(one.is_leaf and one.requires_grad for one in read)
        mine = {
            key: grad_of(rank, case, key[0], weights[table].shape[1]) for key, table in KEYS.items() if has(rank, key)
        }
        places, sums = sharding.to_owners(weights, {name: ids for name in weights}, mine, KEYS)
        full = {
            name: torch.zeros(len(weight), weight.shape[1], dtype=torch.float64) for name, weight in weights.items()
        }
        spread = {key: full[KEYS[key]].index_copy(0, places[KEYS[key]], grad) for key, grad in sums.items()}
        norm = sharding.total_norm([torch.ones(2, dtype=torch.float64)], [sums["click", "wide"], sums["click", "slim"]])
        found.append(([one.detach() for one in read], spread, norm, set(places)))
    found.append(sharding.any_of([rank == 1, False, True]))
    found.append(_domains())
    return found


def _domains() -> list[int]:
    """Which domains a process was asked for, of rows that are all of its own domain."""
    asked: list[int] = []

    def of(code: int, rows: Tensor) -> list[Tensor]:
        asked.append(code)
        return [torch.full((len(rows),), float(code))]

    (found,) = by_domain(torch.full((3,), 2 + parallel.rank()), 9, of, together=True)
    assert found.tolist() == [2.0 + parallel.rank()] * 3
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_vectors_come_from_owners_and_gradients_go_to_them(world: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = [torch.empty(ROWS, width).normal_(0.0, 1.0).double() for width in WIDTHS]
    found = together(world, tmp_path, _exchanged)
    assert [each[0][0] for each in found] == ([4, 4, 3] if world == 3 else [3, 3, 3, 2])
    for case in range(3):
        for rank, each in enumerate(found):
            for read, table in zip(each[1 + case][0], whole, strict=True):
                assert torch.equal(read, table[ids_of(rank, case)])
        wanted: dict[tuple[str, str], Tensor] = {}
        for key, table in KEYS.items():
            width = WIDTHS[table == "slim"]
            wanted[key] = torch.zeros(ROWS, width, dtype=torch.float64)
            for rank in range(world):
                if has(rank, key):
                    wanted[key].index_add_(0, ids_of(rank, case), grad_of(rank, case, key[0], width))
        norm = torch.cat([torch.ones(2), wanted["click", "wide"].flatten(), wanted["click", "slim"].flatten()]).norm()
        for each in found:
            assert set(each[1 + case][1]) == {key for key in KEYS if key[0] != "rest"}, (
                "nobody has a gradient of `rest`"
            )
            assert each[1 + case][2] == pytest.approx(float(norm), abs=1e-12)
        for key in found[0][1 + case][1]:
            joined = torch.cat([each[1 + case][1][key] for each in found])
            torch.testing.assert_close(joined, wanted[key], rtol=0, atol=1e-12)
    assert all(each[4] == [True, False, True] for each in found)
    assert all(each[5] == [2 + rank for rank in range(world)] for each in found)


# ---------------------------------------------------------------------------------------------------------------- trainings
def _sides(runs: dict[str, Run]) -> dict[str, Any]:
    """Replicated and divided, in single and in double precision."""
    divided = {name: with_divided(run) for name, run in runs.items()}
    held = held_by(divided["adatask"])
    return {
        "double": all_of(divided),
        "single": all_of(divided, False),
        "replicated": all_of(runs, False),
        "held": held,
    }


def held_by(run: Run) -> list[tuple[int, int]]:
    """(rows that this process holds of a tensor, rows of its table), of weights and of all moments."""
    made: list[Any] = []
    build = AdaTask.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaTask, "build", lambda *given, **named: made.append(build(*given, **named)) or made[0])
        trained(run)
    (update,) = made
    sizes = {name: part.rows for name, part in update.divided.items()}
    found = [(len(part), part.rows) for part in update.divided.values()]
    state = update.state_dict()
    for name, kept in [pair for task in state["tasks"].values() for pair in task["rows"].items()]:
        found += [(len(kept[key]), sizes[name]) for key in ("mean", "square")]
    return found + [(len(kept["last"]), sizes[name]) for name, kept in state["decay"].items()]


@pytest.mark.slow
def test_fifty_steps_with_divided_tables(tmp_path: Path) -> None:
    """Those of one process in double precision, and of tables that every process holds in single precision."""
    runs = {name: lazy(run) for name, run in fifty().items() if name != "joint"}
    alone = all_of(runs)
    first, second = together(2, tmp_path, _sides, runs)
    for name, one in alone.items():
        found: Trained = first["double"][name]
        assert not found.refused and len(found.losses) == 50, (name, found.refused)
        assert gap(one, found) <= 1e-12 and apart(one, found) <= 1e-12, (name, gap(one, found), apart(one, found))
        assert found.looks == pytest.approx(one.looks, abs=1e-12)
        both = first["single"][name], first["replicated"][name]
        assert gap(*both) <= 1e-6 and apart(*both) <= 1e-6, (name, gap(*both), apart(*both))
        assert apart(found, second["double"][name]) == 0
    for place, side in enumerate((first, second)):
        assert len(side["held"]) > 10
        assert all(here == (size + 1) // 2 if place == 0 else here == size // 2 for here, size in side["held"])


def lazy(run: Run) -> Run:
    return replace(run, model=replace(run.model, tables=replace(run.model.tables, lazy_rows=0)))


@pytest.mark.slow
def test_more_processes_than_rows_of_a_batch_or_of_a_table(tmp_path: Path) -> None:
    runs = {name: lazy(run) for name, run in tiny().items() if name in ("adatask", "dice, kept events", "star")}
    alone, (first, *others) = (
        all_of(runs),
        together(4, tmp_path, all_of, {n: with_divided(run) for n, run in runs.items()}),
    )
    for name, one in alone.items():
        assert not first[name].refused and gap(one, first[name]) <= 1e-9 and apart(one, first[name]) <= 1e-9, name
        assert all(apart(first[name], each[name]) == 0 for each in others), name


def rarely_labelled() -> dict[str, Run]:
    """In many steps a task has no label: its tables are read, by the towers of all tasks, and get no gradient."""
    run = lazy(make_run(training=Training(batch_size=48, steps=12, evaluate_every=0, patience=0, checkpoint_seconds=0)))
    tables = replace(run.model.tables, kind="per_task", width=4)
    run = replace(run, model=replace(run.model, tower=STEM(), tables=tables))
    updates = {"joint": Joint(lr=0.02, table_weight_decay=0.1, clip_norm=0.3), "adatask": AdaTask(lr=0.02)}
    return {name: replace(run, update=update) for name, update in updates.items()}


def _rarely(divided: bool) -> dict[str, Trained]:
    with pytest.MonkeyPatch.context() as patch:
        plain = together_kit.uneven_log
        rare = pl.when(pl.int_range(pl.len()) < 30).then(pl.col("buy"))
        patch.setattr(together_kit, "uneven_log", lambda **given: plain(**given).with_columns(buy=rare))
        runs = rarely_labelled()
        return all_of({name: with_divided(run) for name, run in runs.items()} if divided else runs)


@pytest.mark.slow
def test_a_table_that_is_read_and_gets_no_gradient(tmp_path: Path) -> None:
    alone, (first, second) = _rarely(False), together(2, tmp_path, _rarely, True)
    for name, one in alone.items():
        labelled = sum("buy" in step for step in one.losses)
        assert 0 < labelled <= len(one.losses) - 4, "some steps have no label of it"
        assert not first[name].refused and gap(one, first[name]) <= 1e-12 and apart(one, first[name]) <= 1e-12, name
        assert apart(first[name], second[name]) == 0


def test_a_part_of_one_row_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a step that belong to nobody else: places among the own rows, and the gradients there."""
    monkeypatch.setattr(parallel, "world", lambda: 3)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    part = sharding.Part.of(torch.zeros(4, 1), 11)
    ids, grad = torch.tensor([0, 3, 4, 6, 7, 8]), torch.arange(6.0).unsqueeze(1)
    places, mine = sharding.own_rows({"a": (ids, grad)}, {"a": part})["a"]
    assert places.tolist() == [0, 2, 3] and mine.flatten().tolist() == [2.0, 3.0, 4.0]
    plain = sharding.own_rows({"a": (ids, grad)}, {"a": torch.zeros(11, 1)})["a"]
    assert plain[0] is ids and plain[1] is grad


def test_a_model_that_lies_below_is_divided_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world", lambda: 2)
    table = Table(5, 2, 1.0, lazy=True, divided=True)
    head: Any = nn.Linear(1, 1)
    assert not sharding.divided(head)
    head.below = (table,)
    assert sharding.divided(head) and sharding.divided(table)
