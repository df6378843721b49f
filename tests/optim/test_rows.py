"""RowAdam against torch.optim.SparseAdam and against dense decay."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from unbraid.encoders.table import Table
from unbraid.optim.rows import RowAdagrad, RowAdam, RowOptimizer, RowRMSprop

V, D = 23, 5
EXACT = {"rtol": 0.0, "atol": 1e-12}


def weight(seed: int = 0, size: int = V) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def some_rows(generator: torch.Generator, size: int = V) -> Tensor:
    count = int(torch.randint(1, size, (), generator=generator))
    return torch.randperm(size, generator=generator)[:count].sort().values


def normal(ids: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(len(ids), D, dtype=torch.float64, generator=generator)


def sparse(ids: Tensor, grad: Tensor, size: int = V) -> Tensor:
    return torch.sparse_coo_tensor(ids.unsqueeze(0), grad, (size, D), check_invariants=True).coalesce()


def test_equals_sparse_adam_over_200_steps_of_two_tables() -> None:
    """One of the tables has a gradient in half of the steps, so that its step count lags."""
    mine = {"a": weight(1), "b": weight(2)}
    theirs = {name: nn.Parameter(value.detach().clone()) for name, value in mine.items()}
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3}  # an eps large enough that its place shows
    rows, reference = RowAdam(mine, **settings), torch.optim.SparseAdam(list(theirs.values()), **settings)
    generator = torch.Generator().manual_seed(3)
    for step in range(200):
        lookups = {}
        for name, parameter in theirs.items():
            ids = some_rows(generator)
            grad = normal(ids, generator)
            absent = name == "b" and step % 2 == 0
            lookups[name] = (ids, None if absent else grad)
            parameter.grad = None if absent else sparse(ids, grad)
        rows.step(lookups)
        reference.step()
    for name, parameter in theirs.items():
        state, expected = rows.state[mine[name]], reference.state[parameter]
        assert state["step"] == expected["step"] == (200 if name == "a" else 100)
        torch.testing.assert_close(mine[name].detach(), parameter.detach(), **EXACT)
        torch.testing.assert_close(state["mean"], expected["exp_avg"], **EXACT)
        torch.testing.assert_close(state["square"], expected["exp_avg_sq"], **EXACT)


@pytest.mark.parametrize("rule", ["rmsprop", "adagrad"])
def test_other_rules_equal_torchs_at_the_rows_read(rule: str) -> None:
    """Reading all rows they are RMSprop and Adagrad; reading some, each row is one that counts its own reads alone."""
    mine = {"a": weight(1), "b": weight(2)}
    rows = {"rmsprop": RowRMSprop(mine, 0.03, 0.9, 1e-3), "adagrad": RowAdagrad(mine, 0.03, 1e-3)}[rule]
    single = [nn.Parameter(row.clone()) for row in mine["b"].detach()]
    whole = nn.Parameter(mine["a"].detach().clone())
    made = {
        "rmsprop": lambda p: torch.optim.RMSprop([p], lr=0.03, alpha=0.9, eps=1e-3),
        "adagrad": lambda p: torch.optim.Adagrad([p], lr=0.03, eps=1e-3),
    }
    references = [made[rule](p) for p in single]
    reference, generator = made[rule](whole), torch.Generator().manual_seed(3)
    for _ in range(200):
        ids, every = some_rows(generator), torch.arange(V)
        whole.grad, grad = normal(every, generator), normal(ids, generator)
        rows.step({"a": (every, whole.grad), "b": (ids, grad)})
        reference.step()
        for row, value in zip(ids.tolist(), grad, strict=True):
            single[row].grad = value
            references[row].step()
    torch.testing.assert_close(mine["a"].detach(), whole.detach(), **EXACT)
    torch.testing.assert_close(mine["b"].detach(), torch.stack([p.detach() for p in single]), **EXACT)


@pytest.mark.parametrize("decay", ["catch_up", "touched"])
@pytest.mark.parametrize("make", [RowAdam, RowRMSprop, RowAdagrad])
def test_several_changes_of_one_step_add_up_and_decay_once(make: type[RowOptimizer], decay: str) -> None:
    tables, parts = [weight(), weight()], [make({"a": weight()}) for _ in range(2)]
    moved = [RowAdam({"a": table}, 0.1, weight_decay=0.2, decay=decay) for table in tables]  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = some_rows(generator)
        changes = [part.change("a", ids, normal(ids, generator), 0.1) for part in parts]
        moved[0].move("a", ids, changes)
        moved[1].move("a", ids, [changes[0] + changes[1]])
    for one in moved:
        one.settle()
    torch.testing.assert_close(*tables, **EXACT)
    zero = RowAdam({"a": tables[0]}, 0.1, weight_decay=0.2, decay=decay)  # type: ignore[arg-type]
    before, ids = tables[0].detach().clone(), torch.arange(3)
    zero.move("a", ids, [torch.zeros(3, D, dtype=torch.float64)] * 3)
    torch.testing.assert_close(tables[0][ids].detach(), before[ids] * 0.98, **EXACT)


@pytest.mark.parametrize("make", [RowAdam, RowRMSprop, RowAdagrad])
def test_moments_of_half_precision_weights_are_float32(make: type[RowOptimizer]) -> None:
    """A gradient whose square would be 0 in float16 still moves the row by about the step size."""
    table = nn.Parameter(torch.zeros(V, D, dtype=torch.float16))
    rows = make({"a": table}, lr=0.25, **({"eps": 1e-12} if make is not RowAdagrad else {}))
    rows.step({"a": (torch.arange(2), torch.full((2, D), 1e-5, dtype=torch.float16))})
    assert all(rows.state[table][name].dtype == torch.float32 for name in rows.moments)
    moved = {RowAdam: -0.25, RowRMSprop: -2.5, RowAdagrad: -0.25}[make]
    torch.testing.assert_close(table[:2].detach(), torch.full((2, D), moved, dtype=torch.float16), rtol=1e-2, atol=0)


def test_a_gradient_of_no_rows_is_a_step_as_in_sparse_adam() -> None:
    mine, theirs = weight(), weight()
    rows, reference = RowAdam({"a": mine}), torch.optim.SparseAdam([theirs])
    generator = torch.Generator().manual_seed(0)
    for ids in (torch.arange(3), torch.arange(0), torch.arange(3)):
        grad = normal(ids, generator)
        theirs.grad = sparse(ids, grad)
        rows.step({"a": (ids, grad)})
        reference.step()
    assert rows.state[mine]["step"] == 3
    torch.testing.assert_close(mine.detach(), theirs.detach(), **EXACT)


@pytest.mark.parametrize("decay", ["catch_up", "touched"])
def test_rows_that_are_not_read_stay_bit_equal(decay: str) -> None:
    table = weight()
    rows = RowAdam({"a": table}, lr=0.1, weight_decay=0.1, decay=decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        rows.step({"a": (torch.arange(V), torch.randn(V, D, dtype=torch.float64, generator=generator))})
    before = table.detach().clone(), {k: copy.deepcopy(v) for k, v in rows.state[table].items()}
    ids = torch.tensor([2, 7, 11])
    rows.step({"a": (ids, normal(ids, generator))})
    other = torch.ones(V, dtype=torch.bool)
    other[ids] = False
    assert torch.equal(table[other], before[0][other])
    assert bool((table[ids] != before[0][ids]).all())
    for name in ("mean", "square"):
        assert torch.equal(rows.state[table][name][other], before[1][name][other])
        assert bool((rows.state[table][name][ids] != before[1][name][ids]).all())


@pytest.mark.parametrize("through_reads", [True, False])
def test_catch_up_with_zero_gradients_equals_dense_decay_under_a_schedule(through_reads: bool) -> None:
    """Each read shows what dense AdamW's table would show, and `settle` gives its whole table."""
    table = Table(V, D, 1.0, lazy=True).double()
    dense = nn.Parameter(table.weight.detach().clone())
    rows = RowAdam({"a": table.weight}, lr=0.5, weight_decay=0.3)
    reference = torch.optim.AdamW([dense], lr=0.5, weight_decay=0.3)
    if through_reads:
        rows.watch({"a": table})
    pair = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.01) for o in (rows, reference)]
    generator = torch.Generator().manual_seed(1)
    for step in range(40):
        ids = some_rows(generator)
        leaf = table.read(ids)
        if through_reads:
            torch.testing.assert_close(leaf.detach(), dense.detach()[ids], **EXACT)
        rows.step({"a": (ids, torch.zeros(len(ids), D, dtype=torch.float64))})
        torch.testing.assert_close(table.weight.detach()[ids], dense.detach()[ids] * _rate(reference), **EXACT)
        dense.grad = torch.zeros_like(dense)
        reference.step()
        for schedule in pair:
            schedule.step()
        if step == 20:
            rows.settle()
            torch.testing.assert_close(table.weight.detach(), dense.detach(), **EXACT)
    assert not torch.allclose(table.weight, dense)  # some rows still owe decay, else `settle` is not tested
    rows.settle()
    torch.testing.assert_close(table.weight.detach(), dense.detach(), **EXACT)
    settled = table.weight.detach().clone()
    rows.settle()
    assert torch.equal(table.weight, settled)


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return 1 - optimizer.param_groups[0]["lr"] * optimizer.param_groups[0]["weight_decay"]


def test_catch_up_in_float32_decays_small_rates() -> None:
    """1 - lr * wd rounds to 1 in float32 at these rates, so a clock in float32 would never move."""
    table = nn.Parameter(torch.ones(4, D))
    rows = RowAdam({"a": table}, lr=1e-4, weight_decay=1e-5)
    for _ in range(1000):
        rows.step({"a": (torch.tensor([0]), torch.zeros(1, D))})
    assert rows.state[table]["clock"] == pytest.approx(1000 * math.log1p(-1e-9), rel=1e-12)
    assert rows.state[table]["last"].dtype == torch.float64
    rows.settle()
    assert float(table[1, 0].detach()) == pytest.approx(1 - 1e-6, abs=6e-8)
    assert float(table[1, 0].detach()) < 1


@pytest.mark.parametrize("decay", ["catch_up", "touched"])
def test_decay_and_step_are_decoupled_adam_w(decay: str) -> None:
    """With all rows in every step both kinds are p <- (1 - lr wd) p, then SparseAdam's step."""
    mine, theirs = weight(), weight()
    rows = RowAdam({"a": mine}, lr=0.1, weight_decay=0.2, decay=decay)
    reference = torch.optim.SparseAdam([theirs], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(V)
    for _ in range(30):
        grad = normal(ids, generator)
        theirs.grad = sparse(ids, grad)
        rows.step({"a": (ids, grad)})
        with torch.no_grad():
            theirs.mul_(1 - 0.1 * 0.2)
        reference.step()
    torch.testing.assert_close(mine.detach(), theirs.detach(), **EXACT)


def test_touched_decays_each_row_once_per_step_that_reads_it() -> None:
    table = weight()
    expected = table.detach().clone()
    rows = RowAdam({"a": table}, lr=0.1, weight_decay=0.5, decay="touched")
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        ids = some_rows(generator)
        rows.step({"a": (ids, torch.zeros(len(ids), D, dtype=torch.float64))})
        expected[ids] *= 1 - 0.1 * 0.5
    torch.testing.assert_close(table.detach(), expected, **EXACT)
    rows.settle()
    torch.testing.assert_close(table.detach(), expected, **EXACT)


@pytest.mark.parametrize("decay", ["catch_up", "touched"])
def test_a_table_without_gradient_stays_bit_equal(decay: str) -> None:
    """Even when the batch reads its rows: after `settle`, nothing of it differs."""
    tables = {name: Table(V, D, 1.0, lazy=True) for name in "ab"}
    rows = RowAdam({name: table.weight for name, table in tables.items()}, lr=0.1, weight_decay=0.1, decay=decay)
    rows.watch(tables)
    generator = torch.Generator().manual_seed(0)
    twin: dict[str, Tensor] = {}
    for step in range(40):
        lookups: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, table in tables.items():
            ids = some_rows(generator)
            shape = table.read(ids).shape
            grad = torch.randn(shape, generator=generator)
            lookups[name] = (ids, None if name == "b" and step >= 20 else grad)
        rows.step(lookups)
        if step == 19:
            before = _settled(rows, tables["b"])
            twin = {name: table.weight.detach().clone() for name, table in tables.items()}
    after = _settled(rows, tables["b"])
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key], key
    assert not torch.equal(tables["a"].weight, twin["a"])


def _settled(rows: RowAdam, table: Table) -> dict:
    """Weight and state of one table as they would be after `settle`, without doing it."""
    stored = table.weight.detach().clone(), copy.deepcopy(rows.state[table.weight])
    rows.settle()
    found = {"weight": table.weight.detach().clone(), **copy.deepcopy(rows.state[table.weight])}
    with torch.no_grad():
        table.weight.copy_(stored[0])
    rows.state[table.weight] = stored[1]
    return found


def test_reads_in_evaluation_change_nothing() -> None:
    table = Table(V, D, 1.0, lazy=True)
    rows = RowAdam({"a": table.weight}, lr=0.1, weight_decay=0.1)
    rows.watch({"a": table})
    rows.step({"a": (torch.tensor([0]), torch.ones(1, D))})
    before = table.weight.detach().clone()
    table.eval().read(torch.arange(V))
    assert torch.equal(table.weight, before)
    table.train().read(torch.arange(V))
    assert not torch.equal(table.weight, before)


def test_a_copied_model_does_not_reach_into_the_optimiser_of_the_original() -> None:
    table = Table(V, D, 1.0, lazy=True)
    rows = RowAdam({"a": table.weight}, weight_decay=0.1)
    rows.watch({"a": table})
    assert table.before_read is not None
    assert copy.deepcopy(table).before_read is None
    RowAdam({"a": table.weight}).watch({"a": table})
    assert table.before_read is None  # the hook of an earlier optimiser is gone


@pytest.mark.parametrize("decay", ["catch_up", "touched"])
def test_state_round_trip_continues_bit_equal(decay: str) -> None:
    first, second = weight(), weight()
    make = {"lr": 0.1, "weight_decay": 0.1, "decay": decay}
    rows, again = RowAdam({"a": first, "b": weight(1)}, **make), RowAdam({"a": second, "b": weight(1)}, **make)
    generator = torch.Generator().manual_seed(0)
    steps = [(ids := some_rows(generator), normal(ids, generator)) for _ in range(40)]
    for ids, grad in steps[:20]:
        rows.step({"a": (ids, grad)})
    again.load_state_dict(rows.state_dict())
    assert set(rows.state_dict()) == {"a"}  # "b" never had a gradient
    second.data.copy_(first.data)
    for ids, grad in steps[20:]:
        rows.step({"a": (ids, grad)})
    assert not torch.equal(first, second)  # the loaded state is a copy
    for ids, grad in steps[20:]:
        again.step({"a": (ids, grad)})
    rows.settle(), again.settle()
    assert torch.equal(first, second)
    for key, value in rows.state[first].items():
        other = again.state[second][key]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def test_errors() -> None:
    table = weight()
    for wrong in ({"lr": -1.0}, {"eps": math.nan}, {"weight_decay": math.inf}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` should be finite and not negative"):
            RowAdam({"a": table}, **wrong)
    with pytest.raises(ValueError, match="`betas` should be in"):
        RowAdam({"a": table}, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="`decay` should be `catch_up` or `touched`. Found `lazily`"):
        RowAdam({"a": table}, decay="lazily")  # type: ignore[arg-type]
    rows = RowAdam({"a": table}, lr=2.0, weight_decay=0.5)
    ids = torch.arange(3)
    with pytest.raises(KeyError, match="No table `c`"):
        rows.step({"c": (ids, torch.zeros(3, D))})
    with pytest.raises(ValueError, match=r"table `a` should have shape \(3, 5\). Found \(2, 5\)"):
        rows.step({"a": (ids, torch.zeros(2, D))})
    with pytest.raises(ValueError, match="`lr` \\* `weight_decay` should be below 1"):
        rows.step({"a": (ids, torch.zeros(3, D, dtype=torch.float64))})
    assert not rows.state_dict(), "nothing has moved"
    rows = RowAdam({"a": table})
    rows.step({"a": (ids, torch.zeros(3, D, dtype=torch.float64))})
    with pytest.raises(ValueError, match=r"State of table `a` should hold \['square'\]. Found \['mean', 'step'\]"):
        rows.load_state_dict({"a": {"step": 1, "mean": table.detach()}})
    other = RowAdam({"a": weight(size=V + 1), "b": weight()})
    with pytest.raises(ValueError, match=r"should have shape \(24, 5\). Found \(23, 5\)"):
        other.load_state_dict(rows.state_dict())
    with pytest.raises(ValueError, match="table `x`, which is not one of \\['a', 'b'\\]"):
        other.load_state_dict({"x": rows.state_dict()["a"]})
