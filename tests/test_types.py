"""Ragged lists, batches and their selection."""

import pytest
import torch

from unbraid.types import Batch, Ragged


def ragged() -> Ragged:
    return Ragged({"x": torch.tensor([1, 2, 3, 4, 5, 6])}, torch.tensor([0, 2, 2, 5, 6]))


def batch(pair: list[int]) -> Batch:
    n = len(pair)
    return Batch(
        features={"h": ragged(), "id": torch.arange(n)},
        labels={"a": torch.arange(n).float()}, observed={"a": torch.ones(n, dtype=torch.bool)},
        domain=torch.zeros(n, dtype=torch.int64), weight=None, row=torch.arange(n) + 10,
        view=torch.zeros(n, dtype=torch.int8), pair=torch.tensor(pair), meta={"time": torch.arange(n)},
    )  # fmt: skip


def test_ragged_rows_and_lengths() -> None:
    assert ragged().lengths.tolist() == [2, 0, 3, 1]
    assert ragged().rows.tolist() == [0, 0, 2, 2, 2, 3]


@pytest.mark.parametrize("rows", [[3, 0, 1], [2, 2], [], [1]])
def test_ragged_select_packs_the_chosen_rows(rows: list[int]) -> None:
    lists = [[1, 2], [], [3, 4, 5], [6]]
    chosen = ragged().select(torch.tensor(rows, dtype=torch.int64))
    assert chosen.values["x"].tolist() == [v for r in rows for v in lists[r]]
    assert chosen.lengths.tolist() == [len(lists[r]) for r in rows]


def test_select_by_mask_and_by_index_agree() -> None:
    b = batch([-1, -1, -1, -1])
    a, c = b.select(torch.tensor([True, False, True, False])), b.select(torch.tensor([0, 2]))
    assert a.row.tolist() == c.row.tolist() == [10, 12]
    assert a.features["h"].values["x"].tolist() == c.features["h"].values["x"].tolist() == [1, 2, 3, 4, 5]
    assert a.meta["time"].tolist() == [0, 2] and a.labels["a"].tolist() == [0, 2] and len(a) == 2


def test_select_remaps_pairs_and_refuses_to_split_one() -> None:
    b = batch([2, -1, 0, -1])
    assert b.select(torch.tensor([2, 1, 0])).pair.tolist() == [2, -1, 0]
    with pytest.raises(ValueError, match="drop the other"):
        b.select(torch.tensor([0, 1]))
