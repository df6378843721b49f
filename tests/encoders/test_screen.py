"""Integer products: the bound on their error, and that a search that rules events out by them finds what a loop finds."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch
from test_search import bounds, found, lists_of, loop
from torch import Tensor

from unbraid.encoders import scratch, screen, search
from unbraid.encoders.search import Part, way_of
from unbraid.types import Rows

LENGTHS = (9_000, 0, 3, 12_345, 20, 700, 2_600)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(vectors: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """(B, U) how far the integers' scores are off, and (B, 1) how far they may be."""
    made = screen.Screen.of(vectors, query)
    assert made is not None
    scores = made.step.double().unsqueeze(1) * (made.query.double() @ made.vectors.double().T)
    return (query.double() @ vectors.double().T - scores).abs(), made.bound.double().unsqueeze(1)


@pytest.mark.parametrize("width", [2, 16, 64, 200])
@pytest.mark.parametrize("kind", ["normal", "uniform", "negative", "long_tail", "queries_of_all_sizes"])
def test_no_score_is_off_by_more_than_the_bound(width: int, kind: str) -> None:
    vectors, query = randn(3_000, width), randn(20, width, seed=1)
    if kind == "uniform":
        vectors, query = torch.rand(3_000, width), torch.rand(20, width)
    elif kind == "negative":
        vectors = -torch.rand(3_000, width)
    elif kind == "long_tail":
        vectors *= 1 + randn(3_000, 1, seed=2).abs()
    elif kind == "queries_of_all_sizes":
        query *= 10.0 ** torch.arange(-10, 10).unsqueeze(1)
        query[3] = 0
    with mock.patch.object(screen, "COARSE", 100):
        off, most = errors(vectors, query)
    assert bool((off <= most).all())


def test_the_bound_is_reached() -> None:
    """Half a unit at every entry of a vector is the first term, at every entry of a query the second."""
    width = 64
    vectors = torch.cat([torch.full((1, width), 127.0), torch.full((999, width), 30.5)])
    off, most = errors(vectors, torch.full((1, width), 127.0))  # the query's integers are exact
    step = 1.25 if len(vectors) <= screen.CHUNK else 1.0
    assert off.max() > 0.5 * most / step - 1
    with mock.patch.object(screen, "COARSE", 100):
        near, far = errors(torch.full((1_000, width), 127.0), torch.tensor([[127.0] + [60.5] * (width - 1)]))
    assert near.max() > 0.3 * far


def test_the_second_term_counts() -> None:
    """Vectors without error, queries with half a unit each: the first term alone is not enough."""
    vectors = torch.full((1_000, 64), 100.0)
    vectors[0, 0] = 101.6  # 127 units of 0.8 * 1.25 = 1
    query = torch.tensor([[127.0] + [0.5] * 63])
    with mock.patch.object(screen, "COARSE", 100):
        off, most = errors(vectors, query)
    assert off.max() > 3_000 and bool((off <= most).all())


@pytest.mark.parametrize("bad", ["zeros", "nan", "infinity", "outlier", "query"])
def test_vectors_that_cannot_be_rounded_well_have_no_integers(bad: str) -> None:
    vectors, query = randn(5_000, 16), randn(4, 16)
    assert screen.Screen.of(vectors, query) is not None
    if bad == "zeros":
        vectors.zero_()
    elif bad == "query":
        query[1, 2] = torch.nan
    else:
        vectors[4_001, 3] = {"nan": torch.nan, "infinity": -torch.inf, "outlier": 200.0}[bad]
    assert screen.Screen.of(vectors, query) is None


def test_vectors_of_one_number_have_no_integers() -> None:
    assert screen.Screen.of(randn(5_000, 2), randn(4, 2)) is not None
    with mock.patch.object(screen, "COARSE", 100):
        assert screen.Screen.of(randn(5_000, 1), randn(4, 1)) is None


def test_an_entry_above_those_looked_at_first_is_not_cut() -> None:
    vectors, query = randn(5_000, 16), randn(4, 16)
    vectors[4_001, 3] = 9.0  # 4,001 is not among every second vector
    assert vectors[::2].abs().max() * 1.25 < 9
    made = screen.Screen.of(vectors, query)
    assert made is not None and made.vectors[4_001, 3] == 127


class Case:
    """Long and short rows; ``parts`` fields with tables of float32."""

    def __init__(self, parts: int, kind: str = "random") -> None:
        self.lists, n = lists_of(LENGTHS), sum(LENGTHS)
        self.parts = []
        for number in range(parts):
            vectors, query = randn(4_000 - 3_000 * number, 24, seed=number), randn(len(LENGTHS), 24, seed=number + 9)
            if kind == "tied":
                vectors, query = vectors.sign(), query.sign()
            if kind == "queries_of_all_sizes":
                query *= 10.0 ** torch.arange(len(LENGTHS)).unsqueeze(1)
            index = torch.randint(len(vectors), (n,), generator=torch.Generator().manual_seed(number))
            self.parts.append(Part(Rows(vectors, index), query, (0.5, -2.0)[number]))

    def scores(self) -> Tensor:
        total = torch.zeros(sum(LENGTHS), dtype=torch.float64)
        for row, (a, b) in enumerate(bounds(self.lists)):
            for read, query, scale in self.parts:
                total[a:b] += scale * (read.vectors[read.index[a:b]].double() @ query[row].double())
        return total


@pytest.mark.parametrize("kind", ["random", "tied", "queries_of_all_sizes"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("piece", "rows"), [(2**22, 64), (100, 2), (10_000, 3)])
def test_a_screened_search_finds_what_a_loop_finds(
    monkeypatch: pytest.MonkeyPatch, kind: str, parts: int, piece: int, rows: int
) -> None:
    monkeypatch.setattr(search, "PIECE_EVENTS", piece)
    monkeypatch.setattr(search, "PRODUCT_ROWS", rows)
    case = Case(parts, kind)
    with (
        mock.patch.object(torch, "_int_mm", wraps=torch._int_mm) as product,
        mock.patch.object(search, "event_scores", wraps=search.event_scores) as again,
    ):
        kept = search.search(case.parts, case.lists, 20, way="screen")
    assert found(kept) == loop(case.scores(), case.lists, 20)
    assert product.called
    if kind == "random" and piece == 2**22:
        (exact,) = again.call_args_list
        assert len(exact.args[0][0].read.index) < 2_500  # a tenth of the events, short rows and all


@pytest.mark.parametrize("parts", [1, 2])
def test_events_whose_rounding_puts_them_last_are_found(parts: int) -> None:
    """The best vector's entries are all rounded down, the others' up: nearly the whole slack is needed."""
    vectors, n = torch.full((5_000, 16), 30.51), 12_000
    vectors[:, 0] -= 0.4
    vectors[0], vectors[1] = 101.6, 30.49  # the step is 1 by the first, which no event reads
    index = torch.full((2 * n,), 2)
    best = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:20].sort().values
    best = torch.cat([best, n + best])
    index[best] = 1
    query = torch.tensor([[127.0], [12.7]]).expand(2, 16)
    nothing = Part(Rows(torch.zeros(10, 4), torch.zeros(2 * n, dtype=torch.int64)), torch.ones(2, 4))
    with mock.patch.object(screen, "COARSE", 100):
        made = screen.Screen.of(vectors, query)
        assert made is not None and made.vectors[:3].sum(1).tolist() == [16 * 102, 16 * 30, 15 * 31 + 30]
        all_parts = [Part(Rows(vectors, index), query), nothing][:parts]
        assert search.search(all_parts, lists_of([n, n]), 20, way="screen").index.equal(best)


def test_a_part_that_cannot_be_screened_is_scored_by_floats() -> None:
    case = Case(2)
    case.parts[1].read.vectors[7] *= 1_000
    with mock.patch.object(torch, "_int_mm", wraps=torch._int_mm) as product:
        assert found(search.search(case.parts, case.lists, 20, way="screen")) == loop(case.scores(), case.lists, 20)
    assert {call.args[1].shape[1] for call in product.call_args_list} == {4_000}


def test_integers_are_for_wide_vectors_long_rows_and_machines_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert way_of(256, 2_560_000, 100_000, 64, integers=True) == "screen"
    assert way_of(256, 2_560_000, 100_000, 64) == "product"
    assert way_of(256, 2_560_000, 100_000, 8, integers=True) != "screen"
    case = Case(1)
    for has, dtype, k, expected in (
        (True, torch.float32, 20, True), (False, torch.float32, 20, False), (True, torch.float64, 20, False),
        (True, torch.float32, 1_000, False),
    ):  # fmt: skip
        monkeypatch.setattr(search, "has_integers", lambda has=has: has)
        part = case.parts[0]
        part = Part(Rows(part.read.vectors.to(dtype), part.read.index), part.query.to(dtype))
        with mock.patch.object(search, "way_of", wraps=way_of) as asked:
            search.search([part], case.lists, k)
        assert asked.call_args.kwargs == {"integers": expected}


def test_machines_without_integer_products_are_told() -> None:
    screen.has_integers.cache_clear()
    with mock.patch.object(torch.cpu, "_is_vnni_supported", lambda: True):
        with mock.patch.object(torch, "_int_mm", lambda a, b: (a.float() @ b.float()).int()):
            assert screen.has_integers()
        screen.has_integers.cache_clear()
        with mock.patch.object(torch, "_int_mm", lambda a, b: (a.float() @ b.float()).int() + 1):
            assert not screen.has_integers()
        screen.has_integers.cache_clear()
        for wrong in (2, 40):  # at one width alone
            fails = lambda a, b, wrong=wrong: (a.float() @ b.float()).int() + (a.shape[1] == wrong)  # noqa: E731
            with mock.patch.object(torch, "_int_mm", fails):
                assert not screen.has_integers()
            screen.has_integers.cache_clear()
        with mock.patch.object(torch, "_int_mm", side_effect=RuntimeError("not here")):
            assert not screen.has_integers()
    screen.has_integers.cache_clear()
    with mock.patch.object(torch.cpu, "_is_vnni_supported", lambda: False):
        assert not screen.has_integers()
    screen.has_integers.cache_clear()


def test_scratch_is_kept_per_name_and_thread_and_never_large(monkeypatch: pytest.MonkeyPatch) -> None:
    first = scratch.scratch("test", (4, 5), torch.float32)
    assert first.shape == (4, 5) and first.dtype == torch.float32
    assert scratch.scratch("test", (2, 3), torch.int32).data_ptr() == first.data_ptr()
    assert scratch.scratch("other", (4, 5), torch.float32).data_ptr() != first.data_ptr()
    there: list[int] = []
    thread = threading.Thread(target=lambda: there.append(scratch.scratch("test", (4, 5), torch.float32).data_ptr()))
    thread.start(), thread.join()
    assert there != [first.data_ptr()]
    monkeypatch.setattr(scratch, "MOST", 79)
    assert scratch.scratch("test", (4, 5), torch.float32).data_ptr() != first.data_ptr()
