"""Tables: what is read, what is a gradient leaf, which views there are."""

from collections.abc import Callable

import pytest
import torch
from toylog import make_data

from unbraid.data.declaration import Data
from unbraid.data.table import Encoded
from unbraid.encoders.table import Role, Views, distinct
from unbraid.model import Model
from unbraid.towers.mlp import SharedBottom
from unbraid.types import Feature, History


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


def test_a_dense_table_with_one_plain_reader_is_read_directly_unless_its_lookups_are_wanted() -> None:
    ids = torch.tensor([4, 4, 2])
    key = ("shared", "item", "value")
    for lazy, direct, wanted, looked_up in (
        (False, True, False, False), (False, True, True, True), (False, False, False, True), (True, True, False, True),
    ):  # fmt: skip
        tables = Views(width=2, lazy_rows=0 if lazy else -1).build(["a"], {"item": 9, "shop": 5})
        table = tables.tables["shared/item/value"]
        table.wanted = wanted
        read, lookups = tables({"item": [ids], "shop": [ids]}, {"item"} if direct else ())
        assert ("shared/item/value" in {x.table for x in lookups}) == looked_up, (lazy, direct, wanted)
        assert "shared/shop/value" in {x.table for x in lookups}, "another vocabulary is as it was"
        (rows,) = read[key]
        assert (rows.vectors is table.weight) != looked_up
        assert torch.equal(rows.gather(), table.weight[ids])
        (rows.gather() * torch.tensor([[1.0], [2.0], [5.0]])).sum().backward()
        grad = lookups[0].vectors.grad if lazy else table.weight.grad[[2, 4]]
        assert grad.tolist() == [[5, 5], [3, 3]]


def test_one_lazy_view_keeps_the_lookups_of_all_views_of_a_vocabulary() -> None:
    tables = Views(kind="per_task", width=2, lazy_rows=-1).build(["a"], {"item": 9})
    tables.tables["shared/item/value"].lazy = True
    _, lookups = tables({"item": [torch.tensor([4, 2])]}, {"item"})
    assert [x.table for x in lookups] == ["a/item/value", "shared/item/value"]


def test_the_model_reads_directly_what_a_single_id_column_reads(encoded_of: Callable[[Data], Encoded]) -> None:
    encoded = encoded_of(
        make_data(
            features=(Feature("item"), Feature("shop"), Feature("user"), Feature("seller", column="shop"),
                      Feature("again", column="shop", vocabulary="seller"), Feature("tags", kind="bag")),
            histories=(History("seen", fields=("item",), length=10),),
        )
    )  # fmt: skip
    model = Model(encoded.schema, SharedBottom(), Views(width=4))
    batch = encoded.batch(encoded.split("train")[:9])
    found = {x.table.split("/")[1] for x in model(batch).lookups}
    assert found == {"item", "seller", "tags"}, "a history, two columns, a bag"


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
    assert Views(kind="separate").names(["a", "b"]) == ("a", "b")
    separate = Views(kind="separate", width=5).build(["a", "b"], sizes)
    assert separate.widths == {"a": 5, "b": 5}
    assert sorted(separate.tables) == [f"{task}/{v}/value" for task in ("a", "b") for v in ("item", "user")]
    assert Views().names(["a", "b"]) == ("shared",)
    several = Views(kind="several", widths=(2, 6)).build(["a", "b"], sizes)
    assert several.widths == {"view0": 2, "view1": 6}
    two_roles = Views(width=2).build(["a"], sizes, roles={"value": Role(), "attention": Role()})
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
        ({"kind": "several"}, "Tables of kind `several` need `widths`"),
        ({"widths": (3,)}, "belongs to tables of kind `several` and to no other"),
        ({"kind": "separate", "widths": (3, 3)}, "belongs to tables of kind `several` and to no other"),
    ],
)
def test_bad_views_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(**change)
