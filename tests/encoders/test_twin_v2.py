"""TWIN-V2 against clusters made one at a time with plain loops, values and gradients in float64; its limits."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import pytest
import torch
from history_kit import ValueCase, leaf
from test_eta import FIELDS, D, agree
from torch import Tensor

from unbraid.encoders import twin_v2
from unbraid.encoders.searched import SearchedHistory, Sides
from unbraid.encoders.twin_v2 import TWINV2, clusters
from unbraid.types import Ragged, Rows

LENGTHS = (1, 23, 0, 40, 3, 9)
IDS = 11


class Case(ValueCase):
    def __init__(self, config: TWINV2, targets: Sequence[str] = ("item", "brand"), seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        most = {name: 3 if name == "action" else IDS for name in FIELDS}
        index = {name: torch.randint(0, n, (sum(LENGTHS),), generator=g) for name, n in most.items()}
        super().__init__(config, index, Ragged(index, torch.tensor([0, *LENGTHS]).cumsum(0)), targets, seed)

    def points(self) -> Tensor:
        """(N, all D)"""
        vectors = [self.tables[n][self.index[n]].detach() for n in self.targets]
        return torch.cat(vectors, 1) if vectors else torch.zeros(sum(LENGTHS), 0).double()

    def virtual(self) -> list[dict[int, int]]:
        """Of each row: nearest event -> size of its cluster."""
        x, out = self.points(), []
        for a, b in zip(self.history.offsets.tolist(), self.history.offsets.tolist()[1:], strict=False):
            groups: dict[int, list[int]] = {}
            for i in range(a, b):
                groups.setdefault(int(self.index[self.config.group][i]) if self.config.group else 0, []).append(i)
            found = [part for group in groups.values() for part in halved(x, group, self.config.cap)]
            out.append({nearest(x, part): len(part) for part in found})
        return out

    def reference(self) -> dict[str, Tensor]:
        out: dict[str, list[Tensor]] = {name: [] for name in self.module.widths}
        for row, sizes in enumerate(self.virtual()):
            events = sorted(sizes)
            logits = torch.tensor([math.log(sizes[i]) for i in events], dtype=torch.float64)
            for name in FIELDS:
                q = self.query[name][row] if name in self.targets else self.module.queries[f"field/{name}"]
                own = len(self.targets) if name in self.targets else len(FIELDS) - len(self.targets)
                logits = logits + self.tables[name][self.index[name][events]] @ q / math.sqrt(own * D)
            best = sorted(sorted(range(len(events)), key=lambda j: -float(logits[j].detach()))[: self.config.keep])
            chosen = [events[j] for j in best]
            for name in FIELDS:
                u = logits[best].softmax(0) @ self.tables[name][self.index[name][chosen]]
                for key, y in (
                    (name, u),
                    (f"{name}.product", u * self.query[name][row] if name in self.targets else u),
                ):
                    if key in out:
                        out[key].append(y)
        return {name: torch.stack(x) for name, x in out.items()}


def newest(values: Tensor, best: Tensor) -> int:
    return int(((values - best).abs() < 1e-9).nonzero().max())


def nearest(x: Tensor, part: list[int]) -> int:
    distance = ((x[part] - x[part].mean(0)) ** 2).sum(1)
    return part[newest(distance, distance.min())]


def halved(x: Tensor, part: list[int], cap: int) -> list[list[int]]:
    """Bisecting 2-means of some events in order of time."""
    if len(part) <= cap:
        return [part]
    y = x[part]
    distance = ((y - y.mean(0)) ** 2).sum(1)
    a = y[newest(distance, distance.max())]
    distance = ((y - a) ** 2).sum(1)
    b = y[newest(distance, distance.max())]
    for _ in range(4):
        side = ((y - b) ** 2).sum(1) - ((y - a) ** 2).sum(1) > 1e-9
        if not (bool(side.any()) and not bool(side.all())):
            middle = len(part) // 2
            return halved(x, part[:middle], cap) + halved(x, part[middle:], cap)
        a, b = y[side].mean(0), y[~side].mean(0)
    parts = [[i for i, on in zip(part, side.tolist(), strict=True) if on == want] for want in (False, True)]
    return halved(x, parts[0], cap) + halved(x, parts[1], cap)


@pytest.mark.parametrize("targets", [("item", "brand"), ("item",), ()], ids=str)
@pytest.mark.parametrize("group", ["", "action"])
@pytest.mark.parametrize(("cap", "keep"), [(1, 100), (2, 4), (4, 100), (4, 3), (100, 1)])
def test_attention_over_clusters(cap: int, keep: int, group: str, targets: tuple[str, ...]) -> None:
    for seed in range(3):
        case = Case(TWINV2(cap=cap, keep=keep, group=group), targets, seed)
        agree(case(), case.reference(), case.leaves)


@pytest.mark.parametrize("targets", [("item", "brand"), ()], ids=str)
@pytest.mark.parametrize("keep", [3, 100])
def test_with_cap_one_it_is_attention_to_events(keep: int, targets: tuple[str, ...]) -> None:
    case = Case(TWINV2(cap=1, keep=keep), targets)
    plain = SearchedHistory(case.config, dict.fromkeys(FIELDS, D), dict.fromkeys(targets, D), Sides()).double()
    plain.queries = case.module.queries
    agree(case(), plain(case.events(), case.history, {"value": case.query}), case.leaves)


def test_a_cluster_of_equal_events_weighs_as_much_as_they_do() -> None:
    """Two items, 12 and 3 times: two clusters give what full attention to 15 events gives."""
    case = Case(TWINV2(cap=12))
    ids = torch.tensor([0] * 5 + [1] * 3 + [0] * 7)
    case.index, case.history = dict.fromkeys(FIELDS, ids), Ragged({}, torch.tensor([0, 15]))
    case.query = {name: x[:1] for name, x in case.query.items()}
    found = clusters([Rows(case.tables["item"].detach(), ids)], case.history, 12)
    assert found.index.tolist() == [7, 14] and found.sizes.tolist() == [3, 12]
    got, full = case(), Case(TWINV2(cap=1))
    full.index, full.history, full.query = case.index, case.history, case.query
    for name, x in full().items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=1e-12)


def test_equal_events_end_in_halves_and_none_is_lost() -> None:
    ids = torch.zeros(1000, dtype=torch.int64)
    for reads in ([Rows(torch.randn(1, D), ids)], []):
        found = clusters(reads, Ragged({}, torch.tensor([0, 999, 1000])), 10)
        assert int(found.sizes.sum()) == 1000 and int(found.sizes.max()) <= 10 and int(found.sizes.min()) >= 1
        assert len(found.index) == 129 and found.lists.lengths.tolist() == [128, 1]


def test_outliers_that_would_be_peeled_off_one_by_one_end_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    plain = twin_v2.split
    monkeypatch.setattr(twin_v2, "split", lambda points, halves: calls.append(halves) or plain(points, halves))
    table = 1.5 ** torch.arange(200, dtype=torch.float64).unsqueeze(1)  # each far beyond all before it
    found = clusters([Rows(table, torch.arange(200))], Ragged({}, torch.tensor([0, 200])), 2)
    assert calls.index(True) == twin_v2.FREE_LEVELS and len(calls) <= twin_v2.FREE_LEVELS + 8
    assert int(found.sizes.sum()) == 200 and int(found.sizes.max()) <= 2


def test_clusters_are_compact_and_apart() -> None:
    """Planted: five far blobs of 20 give five clusters, each with a member of its blob."""
    torch.manual_seed(0)
    blob = torch.arange(5).repeat(20)
    table = torch.randn(5, 8)[blob] * 10 + torch.randn(100, 8) * 0.1
    found = clusters([Rows(table, torch.arange(100))], Ragged({}, torch.tensor([0, 100])), 20)
    assert found.sizes.tolist() == [20] * 5 and sorted(blob[found.index].tolist()) == [0, 1, 2, 3, 4]
    parity = torch.arange(100) % 2
    apart = clusters([Rows(table, torch.arange(100))], Ragged({}, torch.tensor([0, 100])), 10, parity)
    assert apart.sizes.tolist() == [10] * 10


def test_rows_alone_and_together_have_the_same_clusters() -> None:
    case = Case(TWINV2(cap=3, keep=5, group="action"))
    case.module.eval()
    whole = case()
    offsets = case.history.offsets.tolist()
    for row in range(len(LENGTHS)):
        part = slice(offsets[row], offsets[row + 1])
        alone = Case(case.config)
        alone.index = {name: ids[part] for name, ids in case.index.items()}
        alone.history = Ragged(alone.index, torch.tensor([0, LENGTHS[row]]))
        alone.query = {name: x[row : row + 1] for name, x in case.query.items()}
        alone.tables, alone.module = case.tables, case.module
        for name, x in alone().items():
            torch.testing.assert_close(x, whole[name][row : row + 1], rtol=0, atol=1e-12)


def test_gradients_reach_the_kept_virtual_events_only() -> None:
    case = Case(TWINV2(cap=4, keep=2))
    case.tables = {name: leaf(sum(LENGTHS), D) for name in FIELDS}
    case.index = {name: torch.arange(sum(LENGTHS)) for name in FIELDS}
    kept = case.module.find(case.module.parts(case.events(), {"value": case.query}), case.history, {})
    assert kept.lists.lengths.tolist() == [1, 2, 0, 2, 1, 2] and not kept.sizes.requires_grad
    (grad,) = torch.autograd.grad(sum(x.sum() for x in case().values()), case.tables["item"])  # type: ignore[arg-type]
    assert grad.abs().sum(1).nonzero().squeeze(1).tolist() == kept.index.tolist()


def test_second_heads_read_every_event_by_itself() -> None:
    case = Case(TWINV2(cap=4, keep=3, auxiliary=(4,)))
    out = case()
    single = Case(TWINV2(cap=1))
    single.module.load_state_dict(case.module.state_dict())
    for name, x in single.reference().items():
        torch.testing.assert_close(out[f"all.{name}"], x, rtol=0, atol=1e-10)
    for name, x in case.reference().items():
        torch.testing.assert_close(out[name], x, rtol=0, atol=1e-10)
    case.module.eval()
    assert set(case()) == set(case.module.widths)


def test_rows_without_events_have_zeros() -> None:
    for group in ("", "action"):
        case = Case(TWINV2(group=group))
        assert all(not bool(x[2].any()) and bool(x[3].any()) for x in case().values())
        case.index = {name: ids[:0] for name, ids in case.index.items()}
        case.history = Ragged(case.index, torch.zeros(len(LENGTHS) + 1, dtype=torch.int64))
        assert all(not bool(x.any()) and len(x) == len(LENGTHS) for x in case().values())


def test_fifty_thousand_events_run() -> None:
    torch.manual_seed(0)
    table, ids = torch.randn(5000, 8), torch.randint(0, 5000, (50_000,))
    start = time.perf_counter()
    found = clusters([Rows(table, ids)], Ragged({}, torch.tensor([0, 50_000])), 20)
    assert time.perf_counter() - start < 30
    assert int(found.sizes.sum()) == 50_000 and int(found.sizes.max()) <= 20 and bool((found.index.diff() > 0).all())


def test_what_is_not_a_configuration() -> None:
    with pytest.raises(ValueError, match="Parameter `cap` should be positive. Found 0."):
        TWINV2(cap=0)
    with pytest.raises(ValueError, match="Parameter `precision` of `twin_v2` should be `exact`. Found `bfloat16`."):
        TWINV2(precision="bfloat16")
    with pytest.raises(
        ValueError, match=r"should name an event field of every history. Found `played`, fields \['item'\]"
    ):
        TWINV2(group="played").build({"item": D}, {"item": D})
