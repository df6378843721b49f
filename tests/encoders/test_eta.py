"""ETA against hashes written out bit by bit, values and gradients in float64; what the hash measures; who gets gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from history_kit import ValueCase, leaf
from test_packed import LENGTHS, packed, pieces
from torch import Tensor
from toylog import make_log, make_run

from unbraid.bundle import Bundle
from unbraid.config import ModelChoice
from unbraid.encoders import hashing
from unbraid.encoders.eta import ETA
from unbraid.encoders.hashing import SignHash, count_bits
from unbraid.encoders.search import Part
from unbraid.encoders.searched import SearchedHistory, Sides
from unbraid.encoders.table import Views
from unbraid.job import train
from unbraid.types import Ragged, Rows

D = 4
FIELDS = ("action", "item", "brand")


class Case(ValueCase):
    def __init__(self, config: ETA, targets: Sequence[str] = ("item", "brand"), seed: int = 0) -> None:
        _, ids, history = packed(seed)
        super().__init__(config, {name: (ids + i) % 7 for i, name in enumerate(FIELDS)}, history, targets, seed)

    def kept(self, row: int, part: Sequence[int]) -> list[int]:
        """Bits by plain loops; ties to the newest."""
        asked = [name for name in FIELDS if name in self.targets]
        q = torch.cat([self.query[n][row].detach() for n in asked]) if asked else torch.zeros(0).double()
        distance = {}
        for i in part:
            e = (
                torch.cat([self.tables[n][self.index[n][i]].detach() for n in asked])
                if asked
                else torch.zeros(0).double()
            )
            planes = self.module.hash.planes
            distance[i] = sum(
                (float(e @ planes[:, j]) >= 0) != (float(q @ planes[:, j]) >= 0) for j in range(planes.shape[1])
            )
        return sorted(sorted(part, key=lambda i: (distance[i], -i))[: self.config.keep])

    def reference(self) -> dict[str, Tensor]:
        out: dict[str, list[Tensor]] = {name: [] for name in self.module.widths}
        for row, part in enumerate(pieces(self.history)):
            chosen = self.kept(row, range(sum(LENGTHS))[part])
            scores = torch.zeros(len(chosen), dtype=torch.float64)
            for name in FIELDS:
                q = self.query[name][row] if name in self.targets else self.module.queries[f"field/{name}"]
                own = len(self.targets) if name in self.targets else len(FIELDS) - len(self.targets)
                scores = scores + self.tables[name][self.index[name][chosen]] @ q / math.sqrt(own * D)
            for name in FIELDS:
                u = scores.softmax(0) @ self.tables[name][self.index[name][chosen]]
                for key, x in (
                    (name, u),
                    (f"{name}.product", u * self.query[name][row] if name in self.targets else u),
                ):
                    if key in out:
                        out[key].append(x)
        return {name: torch.stack(x) for name, x in out.items()}


def agree(got: Mapping[str, Tensor], want: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> None:
    """Outputs and all gradients."""
    assert set(got) == set(want)
    flow = {name: torch.randn_like(x) for name, x in want.items()}
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-10)
    mine, theirs = (
        torch.autograd.grad(
            sum((out[n] * flow[n]).sum() for n in flow),
            list(leaves.values()),
            allow_unused=True,
            materialize_grads=True,  # type: ignore[union-attr]
        )
        for out in (got, want)
    )
    for name, a, b in zip(leaves, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    assert any(bool(b.any()) for b in theirs)


@pytest.mark.parametrize("targets", [("item", "brand"), ("brand", "item"), ("item",), ()], ids=str)
@pytest.mark.parametrize("bits", [1, 5, 64, 130])
def test_the_nearest_hashes_are_attended_to(
    bits: int, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "PIECE_BITS", 3 * bits)  # pieces of three events
    for keep in (1, 2, 3):
        case = Case(ETA(keep=keep, bits=bits), targets)
        agree(case(), case.reference(), case.leaves)


def test_with_all_events_kept_it_is_full_attention() -> None:
    case = Case(ETA(keep=max(LENGTHS)))
    full = SearchedHistory(case.config, dict.fromkeys(FIELDS, D), dict.fromkeys(case.targets, D), Sides()).double()
    full.load_state_dict({n: x for n, x in case.module.state_dict().items() if "hash" not in n})
    want = full(case.events(), case.history, {"value": case.query})
    for name, x in case().items():
        assert torch.equal(x, want[name])


def test_what_is_not_kept_gets_no_gradient_and_the_planes_never() -> None:
    case = Case(ETA(keep=1))
    case.index = {name: torch.arange(sum(LENGTHS)) for name in FIELDS}
    case.tables = {name: leaf(sum(LENGTHS), D) for name in FIELDS}
    (grad,) = torch.autograd.grad(sum(x.sum() for x in case().values()), case.tables["item"])  # type: ignore[arg-type]
    kept = {i for row, part in enumerate(pieces(case.history)) for i in case.kept(row, range(sum(LENGTHS))[part])}
    assert set(grad.abs().sum(1).nonzero().squeeze(1).tolist()) == kept
    assert not case.module.hash.planes.requires_grad and "hash.planes" not in dict(case.module.named_parameters())


def test_second_heads_read_all_events_while_training() -> None:
    case = Case(ETA(keep=1, auxiliary=(4,)))
    out = case()
    full = Case(ETA(keep=100))
    full.module.load_state_dict(case.module.state_dict())
    for name, x in full.reference().items():
        torch.testing.assert_close(out[f"all.{name}"], x, rtol=0, atol=1e-10)
    for name, x in case.reference().items():
        torch.testing.assert_close(out[name], x, rtol=0, atol=1e-10)
    case.module.eval()
    assert set(case()) == set(case.module.widths)


def test_rows_without_events_have_zeros() -> None:
    case = Case(ETA(keep=2))
    empty = [i for i, n in enumerate(LENGTHS) if not n]
    assert empty and all(not bool(x[empty].any()) for x in case().values())
    case.index = {name: ids[:0] for name, ids in case.index.items()}
    case.history = Ragged({}, torch.zeros(len(LENGTHS) + 1, dtype=torch.int64))
    assert all(not bool(x.any()) and len(x) == len(LENGTHS) for x in case().values())


# --------------------------------------------------------------------------------------------------------------- the hash
def test_counting_bits_of_any_word() -> None:
    numbers = [0, -1, 1, 2**63 - 1, -(2**63), 0x5555555555555555, -2, *torch.randint(-(2**62), 2**62, (200,)).tolist()]
    assert count_bits(torch.tensor(numbers)).tolist() == [bin(n & (2**64 - 1)).count("1") for n in numbers]


def test_bits_differ_in_proportion_to_the_angle() -> None:
    torch.manual_seed(0)
    degrees = [0, 30, 60, 90, 150, 180]
    vectors = torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees]).double()
    hash_ = SignHash([2], 6400).double()
    part = Part(Rows(vectors, torch.arange(6)), vectors[:1] * 3)  # lengths do not matter
    words = hash_.differing([part], Ragged({}, torch.tensor([0, 6])))
    assert len(words) == 100
    share = sum(count_bits(word) for word in words) / 6400  # type: ignore[operator]
    for angle, found in zip(degrees, share.tolist(), strict=True):
        p = angle / 180
        assert found == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 6400))


def test_the_planes_come_from_the_seed_and_survive_a_bundle(tmp_path: Path) -> None:
    torch.manual_seed(3)
    one = ETA().build({"item": D}, {"item": D}).hash.planes
    torch.manual_seed(3)
    assert torch.equal(one, ETA().build({"item": D}, {"item": D}).hash.planes) and one.shape == (D, 64)
    run = make_run(model=ModelChoice(history=ETA(keep=3), tables=Views(width=4)))
    result = train(run, tables={"log": make_log()}, baseline=False)
    result.bundle.save(tmp_path / "bundle")
    saved = Bundle.load(tmp_path / "bundle").model.state_dict()
    names = [name for name in saved if name.endswith("hash.planes")]
    assert names and all(torch.equal(saved[name], result.bundle.model.state_dict()[name]) for name in names)


def test_what_is_not_a_configuration() -> None:
    with pytest.raises(ValueError, match="Parameter `bits` should be positive. Found 0."):
        ETA(bits=0)
    with pytest.raises(ValueError, match="Parameter `precision` of `eta` should be `exact`. Found `bfloat16`."):
        ETA(precision="bfloat16")
    with pytest.raises(ValueError, match="Parameter `keep` should be positive. Found 0."):
        ETA(keep=0)
