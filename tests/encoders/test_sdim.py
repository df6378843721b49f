"""SDIM against groups written out event by event, values and gradients in float64; the law of its collisions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from history_kit import ValueCase
from test_eta import FIELDS, D, agree
from test_packed import LENGTHS, packed, pieces
from torch import Tensor

from unbraid.encoders import hashing
from unbraid.encoders.sdim import SDIM
from unbraid.encoders.search import Part
from unbraid.types import Ragged, Rows


class Case(ValueCase):
    def __init__(self, config: SDIM, targets: Sequence[str] = ("item", "brand"), seed: int = 0) -> None:
        _, ids, history = packed(seed)
        super().__init__(config, {name: (ids + i) % 7 for i, name in enumerate(FIELDS)}, history, targets, seed)

    def code(self, vectors: Sequence[Tensor]) -> list[bool]:
        if not vectors:
            return [True] * self.config.bits
        return (torch.cat(list(vectors)).detach() @ self.module.hash.planes >= 0).tolist()

    def reference(self) -> dict[str, Tensor]:
        rows, tau = [], self.config.group
        for row, part in enumerate(pieces(self.history)):
            asked = self.code([self.query[n][row] for n in self.targets])
            total = torch.zeros(len(FIELDS) * D, dtype=torch.float64)
            for at in range(0, self.config.bits, tau):
                found = torch.zeros(len(FIELDS) * D, dtype=torch.float64)
                for i in range(sum(LENGTHS))[part]:
                    code = self.code([self.tables[n][self.index[n][i]] for n in self.targets])
                    if code[at : at + tau] == asked[at : at + tau]:
                        found = found + torch.cat([self.tables[n][self.index[n][i]] for n in FIELDS])
                if bool(found.any()):
                    total = total + found / (found**2).sum() ** 0.5
            rows.append(total / (self.config.bits // tau))
        u = dict(zip(FIELDS, torch.stack(rows).split(D, 1), strict=True))
        found = {**u, **{f"{n}.product": u[n] * self.query[n] for n in self.targets}}
        return {name: found[name] for name in self.module.widths}


@pytest.mark.parametrize("targets", [("item", "brand"), ("brand", "item"), ("item",), ()], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(48, 3), (4, 2), (1, 1), (130, 5), (126, 2)])
def test_it_is_the_mean_of_the_groups_directions(
    bits: int, group: int, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "PIECE_BITS", 3 * bits)  # pieces of three events
    case = Case(SDIM(bits=bits, group=group), targets)
    agree(case(), case.reference(), case.leaves)


def test_an_event_collides_with_probability_one_minus_the_angle_to_the_power_of_tau() -> None:
    """All groups are independent draws: 20,000 of them for each tau."""
    torch.manual_seed(0)
    degrees = [0, 20, 45, 90, 120, 180]
    vectors = torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a)), 0.0] for a in degrees]).double()
    groups = 20_000
    for tau in (1, 2, 3, 5):
        module = SDIM(bits=groups * tau, group=tau).build({"item": 3}, {"item": 3}).double()
        asked, lists = [Part(Rows(vectors, torch.arange(6)), vectors[:1] * 2)], Ragged({}, torch.tensor([0, 6]))
        count = torch.zeros(6)
        for kept in module.collisions(asked, lists):
            count[kept.index] += 1
        for angle, found in zip(degrees, (count / groups).tolist(), strict=True):
            p = (1 - angle / 180) ** tau
            assert found == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / groups) + 1e-12), (tau, angle)


def test_identical_events_give_their_direction_times_the_share_of_groups_that_they_collide_in() -> None:
    torch.manual_seed(1)
    table, q = torch.randn(1, D).double(), torch.randn(1, D).double()
    module = SDIM(target_aware=False).build({"item": D}, {"item": D}).double()
    same = ((table @ module.hash.planes >= 0) == (q @ module.hash.planes >= 0)).view(16, 3).all(1).double().mean()
    assert 0 < float(same) < 1
    for n, query, share in (
        (1, q, same),
        (9, q, same),
        (9, 5 * table, torch.tensor(1.0)),
        (3, -table, torch.tensor(0.0)),
    ):
        events = {"value": {"item": Rows(table, torch.zeros(n, dtype=torch.int64))}}
        out = module(events, Ragged({}, torch.tensor([0, n])), {"value": {"item": query}})["item"]
        torch.testing.assert_close(out, share * table / table.norm(), rtol=0, atol=1e-12)


def test_the_hash_has_no_gradient() -> None:
    case = Case(SDIM(target_aware=False))
    assert not list(case.module.parameters()) and not case.module.hash.planes.requires_grad
    out = sum(x.sum() for x in case().values())
    grads = torch.autograd.grad(out, list(case.query.values()), allow_unused=True)  # type: ignore[arg-type]
    assert grads == (None, None), "only target-aware outputs reach the row's own vectors"


def test_a_sum_without_direction_gives_zeros_and_no_gradient() -> None:
    table = torch.zeros(1, D, requires_grad=True)
    module = SDIM().build({"item": D}, {"item": D})
    events = {"value": {"item": Rows(table, torch.zeros(3, dtype=torch.int64))}}
    out = module(events, Ragged({}, torch.tensor([0, 3, 3])), {"value": {"item": torch.randn(2, D)}})
    sum(x.sum() for x in out.values()).backward()
    assert all(not bool(x.any()) and x.shape == (2, D) for x in out.values())
    assert table.grad is not None and not bool(table.grad.any())


def test_rows_without_events_have_zeros() -> None:
    case = Case(SDIM())
    empty = [i for i, n in enumerate(LENGTHS) if not n]
    assert empty and all(not bool(x[empty].any()) for x in case().values())
    case.index = {name: ids[:0] for name, ids in case.index.items()}
    case.history = Ragged({}, torch.zeros(len(LENGTHS) + 1, dtype=torch.int64))
    assert all(not bool(x.any()) and len(x) == len(LENGTHS) for x in case().values())


def test_which_outputs_there_are() -> None:
    fields, targets = {"item": D, "gap": D}, {"item": D}
    assert list(SDIM().build(fields, targets).widths) == ["item", "gap", "item.product"]
    assert list(SDIM(pooled=False).build(fields, targets).widths) == ["item.product"]
    assert list(SDIM(pooled=False).build(fields, {}).widths) == ["item", "gap"], "there is nothing else to give"


def test_what_is_not_a_configuration() -> None:
    with pytest.raises(ValueError, match="Parameter `bits` should be a multiple of `group`, which is 3. Found 49."):
        SDIM(bits=49)
    with pytest.raises(ValueError, match="Parameter `group` should be less than 64. Found 64."):
        SDIM(bits=64, group=64)
    with pytest.raises(ValueError, match="Parameter `group` should be positive. Found 0."):
        SDIM(group=0)
    with pytest.raises(ValueError, match="One of `pooled` and `target_aware` should be true."):
        SDIM(pooled=False, target_aware=False)
