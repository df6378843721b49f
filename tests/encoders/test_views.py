"""Tables: what is read, what is a gradient leaf, which views there are."""

import pytest
import torch

from unbraid.encoders.table import Views, distinct


@pytest.mark.parametrize("size", [50, 10_000_000])
def test_distinct_finds_each_id_once_and_its_places(size: int) -> None:
    ids = torch.tensor([7, 3, 7, 0, 49, 3])
    unique, place = distinct(ids, size)
    assert unique.tolist() == [0, 3, 7, 49]
    assert torch.equal(unique[place], ids)


@pytest.mark.parametrize("lazy_rows", [0, -1])
def test_lazy_rows_are_leaves_and_dense_rows_are_not(lazy_rows: int) -> None:
    tables = Views(width=2, lazy_rows=lazy_rows).build(["a"], {"item": 9})
    read, lookups = tables({"item": [torch.tensor([4, 4, 2]), torch.tensor([8])]})
    (lookup,) = lookups
    assert lookup.ids.tolist() == [2, 4, 8]
    assert lookup.vectors.is_leaf == (lazy_rows == 0)
    first, second = read["shared", "item", "value"]
    weight = tables.tables["shared/item/value"].weight
    assert torch.equal(first.gather(), weight[[4, 4, 2]])
    (first.gather().sum() + second.gather().sum()).backward()
    grad = lookup.vectors.grad if lazy_rows == 0 else weight.grad[[2, 4, 8]]
    assert grad.tolist() == [[1, 1], [2, 2], [1, 1]]
    assert (weight.grad is None) == (lazy_rows == 0)


def test_a_frozen_table_takes_no_gradient() -> None:
    for lazy_rows in (0, -1):
        tables = Views(width=2, lazy_rows=lazy_rows).build(["a"], {"item": 9}).requires_grad_(False)
        _, (lookup,) = tables({"item": [torch.tensor([4, 2])]})
        assert not lookup.vectors.requires_grad


def test_without_gradients_nothing_is_looked_up_and_values_agree() -> None:
    tables = Views(width=3, lazy_rows=0).build(["a"], {"item": 9})
    ids = {"item": [torch.tensor([1, 5])]}
    learning, _ = tables(ids)
    with torch.no_grad():
        reading, lookups = tables(ids)
    assert lookups == ()
    key = ("shared", "item", "value")
    assert torch.equal(learning[key][0].gather(), reading[key][0].gather())


def test_views_and_their_sizes() -> None:
    sizes = {"item": 10, "user": 4}
    assert Views(kind="per_task").names(["a", "b"]) == ("a", "b", "shared")
    per_task = Views(kind="per_task", width=5).build(["a", "b"], sizes)
    assert sum(p.numel() for p in per_task.parameters()) == (10 + 4) * 5 * 3
    several = Views(kind="several", widths=(2, 6)).build(["a", "b"], sizes)
    assert several.widths == {"view0": 2, "view1": 6}
    two_roles = Views(width=2).build(["a"], sizes, roles=("value", "attention"))
    assert sorted(two_roles.tables) == [f"shared/{v}/{r}" for v in ("item", "user") for r in ("attention", "value")]


def test_unknown_rate_reads_row_0_while_training_only() -> None:
    tables = Views(width=1, unknown_rate=0.5).build(["a"], {"item": 5})
    ids = torch.full((4000,), 3)
    torch.manual_seed(0)
    read, _ = tables({"item": [ids]})
    share = (read["shared", "item", "value"][0].gather() == tables.tables["shared/item/value"].weight[0]).float().mean()
    assert abs(float(share) - 0.5) < 5 * 0.5 / 4000**0.5
    tables.eval()
    read, _ = tables({"item": [ids]})
    assert (read["shared", "item", "value"][0].gather() == tables.tables["shared/item/value"].weight[3]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "`width` should be positive"),
        ({"unknown_rate": 1.0}, "`unknown_rate` should be in"),
        ({"kind": "several"}, "`widths` belongs to kind `several`"),
        ({"widths": (3,)}, "`widths` belongs to kind `several`"),
    ],
)
def test_bad_views_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(**change)
