"""The search and the products it rests on against loops in Python; packed products' gradients in float64."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from torch import Tensor

from unbraid.encoders import packed, search
from unbraid.encoders.packed import dots, pool, products
from unbraid.encoders.search import Kept, Part, Way, event_scores, recall, top_k, way_of
from unbraid.types import Ragged, Rows

LONG = [
    9_000,
    0,
    3,
    12_345,
    20,
    41,
    31,
    700,
    62,
    63,
]  # K = 20: the long ones go by groups, and make the short ones do so


def lists_of(lengths: Sequence[int]) -> Ragged:
    return Ragged({}, torch.tensor([0, *lengths]).cumsum(0))


def bounds(lists: Ragged) -> list[tuple[int, int]]:
    ends = lists.offsets.tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def loop(scores: Tensor, lists: Ragged, k: int) -> list[list[int]]:
    """Places of each row's k best in order of time; of tied ones the newest."""
    values = scores.tolist()
    return [sorted(sorted(range(a, b), key=lambda i: (values[i], i), reverse=True)[:k]) for a, b in bounds(lists)]


def found(kept: Kept) -> list[list[int]]:
    return [kept.index[a:b].tolist() for a, b in bounds(kept.lists)]


def some_scores(n: int, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(n)
    if kind == "tied":
        return torch.randint(0, 3, (n,), generator=g).to(dtype)
    if kind == "same":
        return torch.full((n,), 0.5, dtype=dtype)
    if kind == "rising":
        return torch.arange(n).to(dtype)
    if kind == "falling":
        return -torch.arange(n).to(dtype)
    scores = torch.randn(n, generator=g, dtype=dtype)
    return torch.where(torch.rand(n, generator=g) < 0.9, -torch.inf, scores) if kind == "infinite" else scores


KINDS = ["random", "tied", "same", "rising", "falling", "infinite"]


# --------------------------------------------------------------------------------------------------------- the k highest
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 20, 50, 13_000])
def test_top_k_is_a_sort_of_each_row_newest_first_among_ties(kind: str, k: int) -> None:
    lists = lists_of(LONG)
    scores = some_scores(sum(LONG), kind)
    kept = top_k(scores, lists, k)
    assert found(kept) == loop(scores, lists, k)
    assert kept.lists.lengths.tolist() == [min(n, k) for n in LONG] and kept.index.dtype == torch.int64
    assert kept.everything == (k >= max(LONG))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 8, 32])
@pytest.mark.parametrize(
    "lengths", [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0], [17, 40, 3, 0, 64], [5], [40, 40], [33, 32, 31, 62, 63, 64]]
)
def test_groups_of_any_size_lose_nothing(kind: str, size: int, lengths: list[int]) -> None:
    lists = lists_of(lengths)
    scores = some_scores(sum(lengths), kind, torch.float64)
    for k in (1, 2, 3, 7):
        if sum(lengths) >= size:
            assert found(search._grouped_top_k(scores, lists, k, size)) == loop(scores, lists, k)
        assert found(search._padded_top_k(scores, lists, k)) == loop(scores, lists, k)


def test_groups_are_used_for_long_rows_alone_and_hold_tens_of_events() -> None:
    assert [search._group_size(n, 20) for n in (100, 2_559, 2_560, 10_000, 10**6)] == [1, 1, 32, 32, 256]
    assert search._group_size(10_000, 1) == 128 and search._group_size(10_000, 1_000) == 1
    with mock.patch.object(search, "_grouped_top_k", wraps=search._grouped_top_k) as grouped:
        top_k(torch.randn(4_000), lists_of([1_000] * 4), 20)
        assert not grouped.called
        top_k(torch.randn(4_000), lists_of([3_000, 1_000]), 20)
        assert grouped.called


def test_few_events_are_left_for_the_second_choice() -> None:
    scores, lists = torch.randn(80_000, generator=torch.Generator().manual_seed(0)), lists_of([10_000] * 8)
    with mock.patch.object(search, "_padded_top_k", wraps=search._padded_top_k) as padded:
        top_k(scores, lists, 20)
    assert len(padded.call_args_list[-1].args[0]) < 8 * 40  # not the 8 * 20 * 32 of the best groups


def test_padded_matrices_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, scores = lists_of([50, 3, 60, 0, 55, 7, 1]), torch.randn(176)
    monkeypatch.setattr(search, "PAD", 100)  # one long row at a time
    with mock.patch.object(search, "_highest_columns", wraps=search._highest_columns) as highest:
        assert found(top_k(scores, lists, 5)) == loop(scores, lists, 5)
    assert all(call.args[0].numel() <= 100 for call in highest.call_args_list)


def test_top_k_of_no_events_and_of_a_view() -> None:
    assert found(top_k(torch.zeros(0), lists_of([0, 0]), 3)) == [[], []]
    lists = lists_of([4_000, 5_000])
    scores = torch.randn(9_000, 2)[:, 1]
    assert not scores.is_contiguous()
    assert found(top_k(scores, lists, 20)) == loop(scores, lists, 20)


@pytest.mark.parametrize("length", [10, 5_000])
def test_a_nan_is_kept_rather_than_hidden(length: int) -> None:
    scores = torch.randn(2 * length)
    scores[[3, length + 4]] = torch.nan
    kept = found(top_k(scores, lists_of([length, length]), 2))
    assert [len(row) for row in kept] == [2, 2] and 3 in kept[0] and length + 4 in kept[1]


# ------------------------------------------------------------------------------------------------------------ the search
class Case:
    """Two fields that the rows have and one (D,) query for all, on rows of very different lengths."""

    lengths = (40, 0, 3, 900, 20, 21, 5, 300)

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(1)
        self.lists, n = lists_of(self.lengths), sum(self.lengths)
        self.parts = []
        for vectors, width, scale in ((500, 4, 0.5), (30, 6, 1.0), (12, 3, -2.0)):
            table = torch.randn(vectors, width, generator=g, dtype=dtype)
            query = torch.randn(*((len(self.lengths),) if vectors > 12 else ()), width, generator=g, dtype=dtype)
            self.parts.append(Part(Rows(table, torch.randint(0, vectors, (n,), generator=g)), query, scale))

    def scores(self) -> Tensor:
        """(N,) by a loop over events."""
        total = torch.zeros(sum(self.lengths), dtype=torch.float64)
        for row, (a, b) in enumerate(bounds(self.lists)):
            for i in range(a, b):
                for read, query, scale in self.parts:
                    asked = query if query.dim() == 1 else query[row]
                    total[i] += scale * (read.vectors[read.index[i]].double() * asked.double()).sum()
        return total


@pytest.mark.parametrize("way", [None, "pairs", "product"])
@pytest.mark.parametrize("piece", [1, 50, 2**22])
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("k", [1, 20, 5_000])
def test_every_way_and_every_piece_find_the_same(
    monkeypatch: pytest.MonkeyPatch, way: Way | None, piece: int, rows: int, k: int
) -> None:
    monkeypatch.setattr(search, "PIECE_EVENTS", piece)
    monkeypatch.setattr(search, "PRODUCT_ROWS", rows)
    case = Case()
    kept = search.search(case.parts, case.lists, k, way=way)
    assert found(kept) == loop(case.scores(), case.lists, k)
    assert kept.everything == (k == 5_000)


def test_ways_are_taken_as_asked_and_buffers_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    monkeypatch.setattr(search, "BUFFER", 1_000)
    with mock.patch.object(search, "_by_product", wraps=search._by_product) as by_product:
        assert found(search.search(case.parts, case.lists, 4, way="product")) == loop(case.scores(), case.lists, 4)
        assert [call.args[1].buffer.shape for call in by_product.call_args_list] == [(2, 500), (8, 30)]
        search.search(case.parts, case.lists, 4, way="pairs")
    assert by_product.call_count == 2


def test_the_cheaper_way() -> None:
    case = Case()
    with mock.patch.object(search, "way_of", wraps=way_of) as asked:
        search.search(case.parts, case.lists, 4)
    assert [call.args for call in asked.call_args_list] == [
        (8, 1_289, 500, 4),
        (8, 1_289, 30, 6),
    ]  # one query needs none
    assert way_of(256, 2_560_000, 50_000, 64) == "product"  # long histories beside the vocabulary
    assert way_of(256, 2_560_000, 1_000_000, 16) == way_of(256, 2_560_000, 1_000_000, 64) == "pairs"
    assert way_of(1024, 75_000, 100_000, 16) == "pairs" and way_of(1024, 75_000, 100, 16) == "product"


def test_event_scores_are_those_that_the_search_ranks_by_and_parts_of_kept_events_are_theirs() -> None:
    case = Case()
    torch.testing.assert_close(event_scores(case.parts, case.lists), case.scores(), rtol=0, atol=1e-10)
    kept = search.search(case.parts, case.lists, 20)
    own = event_scores(kept.parts(case.parts), kept.lists)
    torch.testing.assert_close(own, case.scores()[kept.index], rtol=0, atol=1e-10)
    assert torch.equal(kept.pick(case.scores()), case.scores()[kept.index])
    read = case.parts[0].read
    assert torch.equal(kept.of(read).gather(), read.gather()[kept.index])
    whole = search.search(case.parts, case.lists, 900)
    assert whole.everything and whole.of(read) is read and whole.pick(own) is own


def test_a_search_leaves_no_graph_and_event_scores_do() -> None:
    case = Case()
    parts = [
        p._replace(read=Rows(p.read.vectors.requires_grad_(), p.read.index), query=p.query.requires_grad_())
        for p in case.parts
    ]
    kept = search.search(parts, case.lists, 20)
    assert not kept.index.requires_grad
    event_scores(kept.parts(parts), kept.lists).sum().backward()
    untouched = torch.ones(500, dtype=torch.bool).index_fill_(0, parts[0].read.index[kept.index], False)
    grad = parts[0].read.vectors.grad
    assert grad is not None and untouched.any() and not grad[untouched].any() and grad[~untouched].any(1).all()


def test_bfloat16_rounds_what_it_multiplies() -> None:
    case, rounded = Case(), Case()
    rounded.parts = [
        Part(Rows(p.read.vectors.bfloat16().double(), p.read.index), p.query.bfloat16().double(), p.scale)
        for p in case.parts
    ]
    kept = search.search(case.parts, case.lists, 200, precision="bfloat16")
    assert found(kept) == loop(rounded.scores(), case.lists, 200) != loop(case.scores(), case.lists, 200)


def test_recall_is_the_share_of_kept_events_that_both_keep() -> None:
    g = torch.Generator().manual_seed(2)
    read, lists = Rows(torch.randn(4_000, 8, generator=g), torch.arange(4_000)), lists_of([3_000, 1_000])
    parts = [Part(read, torch.randn(2, 8, generator=g))]
    exact, other = (search.search(parts, lists, 400, precision=p).index.tolist() for p in ("exact", "bfloat16"))
    share = len(set(exact) & set(other)) / len(exact)
    assert 0.9 < share < 1 and recall(parts, lists, 400) == pytest.approx(share)
    assert recall(parts, lists, 400, "exact") == recall(parts, lists, 4_000) == 1
    nothing = Part(Rows(torch.ones(3, 2), torch.zeros(0, dtype=torch.int64)), torch.ones(2, 2))
    assert recall([nothing], lists_of([0, 0]), 3) == 1


def test_no_rows_no_events_and_no_places() -> None:
    nothing = Part(Rows(torch.ones(3, 2), torch.zeros(0, dtype=torch.int64)), torch.ones(2, 2))
    assert found(search.search([nothing], lists_of([0, 0]), 3)) == [[], []]
    assert found(search.search([nothing._replace(query=torch.ones(0, 2))], lists_of([]), 3)) == []
    with pytest.raises(ValueError, match=r"`k` should be positive. Found 0"):
        search.search([nothing], lists_of([0, 0]), 0)


# ----------------------------------------------------------------------------------------- products on a sparse pattern
SHAPES = {"few vectors": (5, [9, 0, 30, 1]), "many vectors": (400, [9, 0, 30, 1]), "a row of its own": (400, [7])}


def leaves(vectors: int, lengths: Sequence[int], width: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor, Ragged]:
    g = torch.Generator().manual_seed(vectors)
    table = torch.randn(vectors, width, generator=g, dtype=torch.float64, requires_grad=True)
    query = torch.randn(len(lengths), width, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(sum(lengths), generator=g, dtype=torch.float64, requires_grad=True)
    return table, torch.randint(0, vectors, (sum(lengths),), generator=g), query, weights, lists_of(lengths)


def same_with_gradients(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    flow = torch.randn_like(want)
    mine, theirs = (torch.autograd.grad((x * flow).sum(), inputs, retain_graph=True) for x in (got, want))
    for a, b in zip(mine, theirs, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("samples", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_dots_and_pool_are_gathers_with_products(monkeypatch: pytest.MonkeyPatch, shape: str, samples: bool) -> None:
    table, ids, query, weights, lists = leaves(*SHAPES[shape])
    assert packed._is_small(query, table, ids) == (shape == "few vectors")
    monkeypatch.setattr(packed, "_samples", lambda: samples)
    monkeypatch.setattr(packed, "OTHER_PIECE_VALUES", 4)
    asked = query[lists.rows]
    same_with_gradients(dots(Rows(table, ids), query, lists), (table[ids] * asked).sum(1), [table, query])
    same_with_gradients(dots(Rows(table, ids), query[0], lists), table[ids] @ query[0], [table, query])
    want = torch.stack([(weights[a:b, None] * table[ids[a:b]]).sum(0) for a, b in bounds(lists)])
    same_with_gradients(pool(Rows(table, ids), weights, lists), want, [table, weights])


@pytest.mark.parametrize("shape", SHAPES)
def test_only_needed_gradients_are_computed_and_reads_share_an_order(shape: str) -> None:
    table, ids, query, weights, lists = leaves(*SHAPES[shape])
    first = Rows(table, ids)
    for vectors, wanted in ((table.detach(), query), (table, query.detach())):
        leaf = wanted if wanted.requires_grad else vectors
        got = dots(Rows(vectors, ids, first), wanted, lists)
        same_with_gradients(got, (vectors[ids] * wanted[lists.rows]).sum(1), [leaf])
    got = pool(Rows(table, ids, first), weights.detach(), lists)
    same_with_gradients(
        got,
        torch.zeros(len(query), 3).double().index_add(0, lists.rows, weights.detach()[:, None] * table[ids]),
        [table],
    )


def test_what_lay_in_memory_before_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    table, ids, query, _, lists = leaves(400, [9, 0, 30, 1])
    want = (table[ids] * query[lists.rows]).sum(1)
    case = Case()
    expected = loop(case.scores(), case.lists, 20)
    torch.use_deterministic_algorithms(True)  # fills what `empty` gives with NaN
    try:
        assert torch.empty(3).isnan().all()
        torch.testing.assert_close(dots(Rows(table, ids), query, lists), want, rtol=0, atol=1e-10)
        for way in ("pairs", "product"):
            assert found(search.search(case.parts, case.lists, 20, way=way)) == expected  # type: ignore[arg-type]
        scores = some_scores(sum(LONG), "tied")
        assert found(top_k(scores, lists_of(LONG), 20)) == loop(scores, lists_of(LONG), 20)
    finally:
        torch.use_deterministic_algorithms(False)


def test_products_of_nothing() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert products(torch.ones(3, 2), empty, torch.ones(2, 2), lists_of([0, 0])).shape == (0,)
    assert products(torch.ones(3, 0), torch.tensor([0, 2]), torch.ones(1, 0), lists_of([2])).tolist() == [0, 0]
