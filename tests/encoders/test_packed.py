"""Packed softmax and histories against plain per-row references, values and gradients in float64."""

import math

import pytest
import torch

from unbraid.encoders import packed as primitives
from unbraid.encoders.attention import TargetAttention
from unbraid.encoders.packed import compare, gather, in_pieces, segment_softmax, weighted_sum
from unbraid.encoders.pooling import BagAttention, Mean, pool_bag
from unbraid.model import Model
from unbraid.towers.mlp import SharedBottom
from unbraid.types import Feature, Field, History, Ragged, Rows, Schema, Task

LENGTHS = [3, 0, 1, 5, 0, 2]


def packed(seed: int = 0, vocabulary: int = 7, width: int = 4) -> tuple[torch.Tensor, torch.Tensor, Ragged]:
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(vocabulary, width, generator=g, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, vocabulary, (sum(LENGTHS),), generator=g)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    return table, ids, Ragged({"item": ids}, offsets)


def pieces(ragged: Ragged) -> list[slice]:
    ends = ragged.offsets.tolist()
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def test_segment_softmax_is_softmax_of_each_row() -> None:
    _, _, ragged = packed()
    scores = torch.randn(sum(LENGTHS), dtype=torch.float64, requires_grad=True)
    got = segment_softmax(scores, ragged)
    want = torch.cat([scores[part].softmax(0) for part in pieces(ragged)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    flow = torch.randn_like(want)
    grads = [torch.autograd.grad((w * flow).sum(), scores, retain_graph=True)[0] for w in (got, want)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: segment_softmax(s, ragged), scores)


def test_segment_softmax_survives_huge_scores_and_no_values() -> None:
    ragged = Ragged({}, torch.tensor([0, 2, 2]))
    assert segment_softmax(torch.tensor([1e30, -1e30]), ragged).tolist() == [1.0, 0.0]
    assert segment_softmax(torch.zeros(0), Ragged({}, torch.tensor([0, 0, 0]))).shape == (0,)


def same_gradients(got: torch.Tensor, want: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    flow = torch.randn_like(want)
    mine, theirs = (torch.autograd.grad((x * flow).sum(), leaves, retain_graph=True) for x in (got, want))
    for a, b in zip(mine, theirs, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gather_is_indexing() -> None:
    table, ids, _ = packed(vocabulary=9)  # some of its rows are not read, some several times
    assert 1 < len(ids.unique()) < len(ids) and len(ids.unique()) < 9
    same_gradients(gather(Rows(table, ids)), table[ids], [table])
    empty = gather(Rows(table, ids[:0]))
    assert empty.shape == (0, 4) and torch.equal(torch.autograd.grad(empty.sum(), table)[0], torch.zeros(9, 4).double())


def test_weighted_sum_is_a_sum_of_each_row() -> None:
    table, ids, ragged = packed()
    vectors = table.detach()[ids].requires_grad_()
    weights = torch.randn(len(ids), dtype=torch.float64, requires_grad=True)
    want = torch.stack([(weights[part].unsqueeze(1) * vectors[part]).sum(0) for part in pieces(ragged)])
    same_gradients(weighted_sum(vectors, weights, ragged), want, [vectors, weights])


@pytest.mark.parametrize("common", [0, 3, 4])
def test_compare_puts_values_products_and_queries_side_by_side(common: int) -> None:
    table, ids, ragged = packed()
    vectors = table.detach()[ids].requires_grad_()
    query = torch.randn(len(LENGTHS), common, dtype=torch.float64, requires_grad=True)
    of_value = torch.cat([query[i].expand(n, common) for i, n in enumerate(LENGTHS)])
    want = torch.cat([vectors, of_value * vectors[:, :common], of_value], 1)
    same_gradients(compare(vectors, query, ragged), want, [vectors, query] if common else [vectors])


@pytest.mark.parametrize(
    ("lengths", "size", "want"),
    [
        ([3, 0, 1, 5, 0, 2], 4, [(3, 4), (1, 5), (2, 2)]),
        ([3, 0, 1, 5, 0, 2], 1, [(1, 3), (2, 1), (1, 5), (2, 2)]),
        ([3, 0, 1, 5, 0, 2], 11, [(6, 11)]),
        ([3, 0, 1, 5, 0, 2], 99, [(6, 11)]),
        ([0, 0, 9, 1, 0, 0], 2, [(3, 9), (3, 1)]),
        ([2, 2, 0, 0], 2, [(1, 2), (3, 2)]),
        ([0, 0, 0], 2, [(3, 0)]),
    ],
)
def test_pieces_are_whole_rows_and_none_is_without_values(lengths: list[int], size: int, want: list[tuple]) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    found = list(primitives.pieces(Ragged({}, offsets), size))
    assert [(rows.stop - rows.start, at.stop - at.start) for at, rows, _ in found] == want
    assert torch.cat([own.lengths for _, _, own in found]).tolist() == lengths
    assert all(own.offsets[0] == 0 for _, _, own in found)
    assert [at.start for at, _, _ in found] == [0, *(at.stop for at, _, _ in found[:-1])]
    assert [rows.start for _, rows, _ in found] == [0, *(rows.stop for _, rows, _ in found[:-1])]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_in_pieces_is_the_function_of_everything(size: int) -> None:
    table, ids, ragged = packed()
    values = table.detach()[ids].requires_grad_()
    per_row = torch.randn(len(LENGTHS), 4, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    unused = torch.randn(2, dtype=torch.float64, requires_grad=True)
    calls: list[int] = []

    def function(lists: Ragged, values: torch.Tensor, per_row: torch.Tensor, *shared: torch.Tensor) -> torch.Tensor:
        calls.append(len(values))
        x = (compare(values, per_row, lists) @ shared[0]).tanh()
        return weighted_sum(x, x[:, 0], lists)

    got = in_pieces(function, ragged, values, per_row, [matrix, unused], size)
    assert sum(calls) == len(values) and len(calls) == {1: 4, 4: 3, 100: 1}[size]
    same_gradients(got, function(ragged, values, per_row, matrix), [values, per_row, matrix])
    assert not torch.autograd.grad(got.sum(), unused, retain_graph=True)[0].any()
    fixed = in_pieces(function, ragged, values.detach(), per_row, [matrix.detach()], size)
    assert torch.equal(fixed, got)
    same_gradients(fixed, function(ragged, values, per_row, matrix), [per_row])


def test_in_pieces_may_give_one_line_per_piece() -> None:
    table, ids, ragged = packed()
    values, nothing = table.detach()[ids].requires_grad_(), table.new_zeros(len(LENGTHS), 0)
    got = in_pieces(lambda lists, x, per_row: (x**2).sum(0, keepdim=True), ragged, values, nothing, [], 4)
    assert got.shape == (3, 4)
    same_gradients(got.sum(0), (values**2).sum(0), [values])


@pytest.mark.parametrize("kind", ["mean", "target_attention"])
def test_histories_match_a_loop_over_rows(kind: str) -> None:
    table, ids, ragged = packed()
    other = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    other_ids = torch.arange(len(ids)) % 3
    query = torch.randn(len(LENGTHS), 4, dtype=torch.float64, requires_grad=True)
    config = Mean(count=False) if kind == "mean" else TargetAttention()
    encoder = config.build({"item": 4, "kind": 4}, {"item": 4})
    events = {"value": {"item": Rows(table, ids), "kind": Rows(other, other_ids)}}
    got = encoder(events, ragged, {"value": {"item": query}})
    for name, vectors in (("item", table[ids]), ("kind", other[other_ids])):
        rows = []
        for i, part in enumerate(pieces(ragged)):
            weights = (table[ids][part] @ query[i] / math.sqrt(4)).softmax(0)
            weights = torch.full_like(weights, 1 / max(1, len(weights))) if kind == "mean" else weights
            rows.append(weights @ vectors[part])
        want = torch.stack(rows)
        torch.testing.assert_close(got[name], want, rtol=0, atol=1e-12)
        flow = torch.randn_like(want)
        leaves = [table, other, query]
        mine = torch.autograd.grad((got[name] * flow).sum(), leaves, allow_unused=True, retain_graph=True)
        theirs = torch.autograd.grad((want * flow).sum(), leaves, allow_unused=True, retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(
                torch.zeros(()) if a is None else a.sum(), torch.zeros(()) if b is None else b.sum(), check_dtype=False
            )
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_mean_counts_events() -> None:
    table, ids, ragged = packed()
    out = Mean().build({"item": 4}, {})({"value": {"item": Rows(table, ids)}}, ragged, {})
    assert out["count"].squeeze(1).tolist() == pytest.approx([math.log1p(n) for n in LENGTHS])


def test_target_attention_with_nothing_to_compare_is_the_mean() -> None:
    table, ids, ragged = packed()
    events = {"value": {"item": Rows(table, ids)}}
    got = TargetAttention().build({"item": 4}, {})(events, ragged, {"value": {}})["item"]
    torch.testing.assert_close(
        got, Mean(count=False).build({"item": 4}, {})(events, ragged, {})["item"], rtol=0, atol=1e-12
    )


def test_target_attention_without_any_target_is_refused() -> None:
    schema = Schema(
        (Feature("price", kind="number"),), (Task("a"),), histories=(History("h", ("item",)),), fields=(Field("item"),),
        sizes={"item": 5},
    )  # fmt: skip
    with pytest.raises(ValueError, match="`target_attention` needs a history with an event field"):
        Model(schema, SharedBottom(), history=TargetAttention())


@pytest.mark.parametrize("pooling", ["mean", "sum", "attention"])
def test_bags_match_a_loop_over_rows(pooling: str) -> None:
    table, ids, ragged = packed()
    attention = BagAttention(4).double() if pooling == "attention" else None
    got = pool_bag(Rows(table, ids), ragged, pooling, attention)
    rows = []
    for part in pieces(ragged):
        vectors = table[ids][part]
        if pooling == "sum":
            rows.append(vectors.sum(0))
        elif not len(vectors):
            rows.append(torch.zeros(4, dtype=torch.float64))
        elif pooling == "mean":
            rows.append(vectors.mean(0))
        else:
            assert attention is not None
            rows.append((vectors @ attention.score.weight[0]).softmax(0) @ vectors)
    want = torch.stack(rows)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    flow = torch.randn_like(want)
    mine, theirs = (torch.autograd.grad((x * flow).sum(), table, retain_graph=True)[0] for x in (got, want))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
