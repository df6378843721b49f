"""The form of packed lists that graphs are made of gives what the packed form gives."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
import torch
from torch import Tensor
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.bundle import build
from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.packed import Listed, compare, dots, in_pieces, pool, pool_all, segment_softmax, weighted_sum
from unbraid.encoders.search import Part, event_scores, search, top_k
from unbraid.encoders.searched import newest
from unbraid.encoders.table import Views
from unbraid.graph import PREDICTED, Graph, taken_apart
from unbraid.types import Ragged, Rows

LENGTHS = torch.tensor([3, 0, 5, 1, 0, 7])
COUNT = int(LENGTHS.sum())


def both() -> tuple[Ragged, Listed]:
    values = {"v": torch.arange(COUNT)}
    return Ragged(values, torch.cat([LENGTHS.new_zeros(1), LENGTHS.cumsum(0)])), Listed.end_to_end(values, LENGTHS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_rows_and_offsets() -> None:
    packed, listed = both()
    assert listed.rows.tolist() == packed.rows.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 3, *[5] * 7]
    assert listed.offsets.tolist() == packed.offsets.tolist() and len(listed) == 6
    empty = Listed.end_to_end({"v": torch.zeros(0, dtype=torch.int64)}, torch.tensor([0, 0]))
    assert empty.rows.tolist() == [] and empty.sum(torch.zeros(0, 2)).tolist() == [[0, 0], [0, 0]]


def test_every_operation() -> None:
    packed, listed = both()
    read = Rows(drawn(9, 4), torch.randint(9, (COUNT,), generator=torch.Generator().manual_seed(1)))
    values, query, weights = read.gather(), drawn(6, 4, seed=2), drawn(COUNT, seed=3)
    same(segment_softmax(weights, listed), segment_softmax(weights, packed))
    same(weighted_sum(values, weights, listed), weighted_sum(values, weights, packed))
    same(compare(values, query, listed), compare(values, query, packed))
    same(dots(read, query, listed), dots(read, query, packed))
    same(pool(read, weights, listed), pool(read, weights, packed))
    for mode in ("mean", "sum"):
        same(pool_all(read, listed, mode), pool_all(read, packed, mode))

    def summed(lists: Ragged, x: Tensor, q: Tensor) -> Tensor:
        return weighted_sum(compare(x, q, lists), x[:, 0], lists)

    same(in_pieces(summed, listed, values, query, ()), in_pieces(summed, packed, values, query, (), 4))


def test_values_of_no_row() -> None:
    """What is not marked counts for nothing, whatever it is."""
    packed, listed = both()
    marked = torch.arange(COUNT) % 3 > 0
    kept = listed.keep(marked)
    assert kept.lengths.tolist() == [int(marked[packed.rows == row].sum()) for row in range(6)]
    scores = torch.where(marked, drawn(COUNT), 1e6)
    weights = segment_softmax(scores, kept)
    assert bool((weights[~marked] == 0).all()) and weights.sum().item() == pytest.approx(4)
    index = marked.nonzero().squeeze(1)
    short = Ragged({}, torch.searchsorted(index, packed.offsets))
    same(weights[marked], segment_softmax(scores[marked], short))
    same(weighted_sum(drawn(COUNT, 2), scores, kept), weighted_sum(drawn(COUNT, 2)[index], scores[index], short))


@pytest.mark.parametrize("k", [1, 2, 4, 10])
def test_what_is_kept(k: int) -> None:
    """The highest and the newest are those of the packed form, ties included."""
    packed, listed = both()

    def chosen(lists: Ragged, find: Any) -> list[int]:
        kept = find(lists)
        mine = kept.lists.rows < len(lists)
        return kept.index[mine].tolist()

    tied = torch.randint(3, (COUNT,), generator=torch.Generator().manual_seed(4)).double()
    marked = torch.arange(COUNT) % 2 == 0
    part = Part(Rows(drawn(9, 4), torch.arange(COUNT) % 9), drawn(6, 4, seed=5), 0.5)
    for find in (
        lambda lists: top_k(drawn(COUNT), lists, k),
        lambda lists: top_k(tied, lists, k),
        lambda lists: newest(marked, lists, k),
        lambda lists: newest(marked, lists, k, fill=True),
        lambda lists: search([part], lists, k),
    ):
        assert chosen(listed, find) == chosen(packed, find)
    kept = search([part], listed, k)
    assert len(event_scores(kept.parts([part]), kept.lists)) == COUNT


HISTORIES = typing.get_args(typing.get_args(config.HistoryChoice)[0])
LOG = make_log(rows=300)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return Encoded(encode(make_data(cache=str(tmp_path_factory.mktemp("cache"))), tables={"log": LOG}))


@pytest.mark.parametrize("member", HISTORIES, ids=lambda member: member.__name__)
@pytest.mark.parametrize("kind", ["shared", "several"])
def test_models(member: Any, kind: str, encoded: Encoded) -> None:
    """A model of any history encoder that keeps few events, read in the form of graphs."""
    few = {"keep": 3} if "keep" in {field.name for field in dataclasses.fields(member)} else {}
    sizes = {"widths": (4, 6)} if kind == "several" else {"width": 4}
    choice = ModelChoice(history=member(**few), tables=Views(kind=kind, **sizes))  # type: ignore[arg-type]
    model = build(make_run(model=choice), encoded.schema).eval()
    if any(getattr(module, "no_graph", "") for module in model.modules()):
        pytest.skip("says that there is no graph of it")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
        graph = Graph(model.double(), encoded.schema)
        for rows in (encoded.split("valid"), encoded.split("all")[:1]):  # the first has no history
            batch = encoded.batch(rows)
            features = {
                name: x.double() if getattr(x, "is_floating_point", bool)() else x for name, x in batch.features.items()
            }
            batch = dataclasses.replace(batch, features=features)
            found = graph(taken_apart(batch, encoded.schema))
            for task, logits in model(batch).logits.items():
                torch.testing.assert_close(found[PREDICTED + task], logits.sigmoid().float(), rtol=0, atol=1e-6)
