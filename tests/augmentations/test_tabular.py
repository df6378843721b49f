"""Views of a table's rows: what goes missing, what stays of a history, how much noise, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from toylog import make_data, make_log

from unbraid import config
from unbraid.augmentations.tabular import Change, Tabular, changed, newest
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.types import Batch, Feature, Ragged, Task


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    data = make_data(cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data, tables={"log": make_log()}))


def seen(table: Encoded, change: Change, rows: int = 600, seed: int = 0) -> tuple[Batch, Batch]:
    batch = table.batch(np.arange(rows))
    return batch, changed(batch, change, table.schema, torch.Generator().manual_seed(seed))


def test_no_change_changes_nothing(table: Encoded) -> None:
    batch, view = seen(table, Change())
    for name, value in batch.features.items():
        other: Any = view.features[name]
        if isinstance(value, Ragged):
            assert torch.equal(value.offsets, other.offsets)
            assert all(torch.equal(value.values[k], other.values[k]) for k in value.values)
        else:
            assert torch.equal(value, other)


def test_features_go_missing_as_a_null_does(table: Encoded) -> None:
    batch, view = seen(table, Change(features=0.4))
    item, old = view.features["item"], batch.features["item"]
    gone = item != old
    assert 0.33 < gone.float().mean() < 0.47 and (item[gone] == 1).all()
    price, exact = view.features["price"], view.features["price.exact"]
    missing = price[:, 1] == 1
    assert missing[batch.features["price"][:, 1] == 1].all(), "what was missing stays missing"
    assert (price[missing, 0] == 0).all() and (exact[missing] == 0).all()
    assert torch.equal(price[~missing], batch.features["price"][~missing])
    assert torch.equal(exact[~missing], batch.features["price.exact"][~missing])
    vectors = view.features["text_vector"]
    zero = (vectors == 0).all(1)
    assert 0.33 < zero.float().mean() < 0.47 and torch.equal(vectors[~zero], batch.features["text_vector"][~zero])
    tags, whole = view.features["tags"], batch.features["tags"]
    emptied = (tags.lengths == 0) & (whole.lengths > 0)
    assert 0.33 < emptied[whole.lengths > 0].float().mean() < 0.47
    kept = (~emptied).nonzero().squeeze(1)
    assert torch.equal(tags.select(kept).values["tags"], whole.select(kept).values["tags"])
    draws = torch.stack([gone, zero, missing | False, emptied]).float()
    assert torch.corrcoef(draws[:2])[0, 1].abs() < 0.15, "each feature by itself"
    assert torch.equal(view.features["seen"].offsets, batch.features["seen"].offsets), "histories are no features"


def test_a_history_keeps_a_newest_part() -> None:
    lengths = torch.tensor([0, 1, 10, 40] * 200)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    packed = Ragged({"n": torch.arange(int(offsets[-1]))}, offsets)
    cut = newest(packed, 0.5, torch.Generator().manual_seed(0))
    assert (cut.lengths >= (0.5 * lengths).ceil()).all() and (cut.lengths <= lengths).all()
    assert (cut.lengths[lengths == 1] == 1).all(), "rounded up: what has an event keeps one"
    for i in range(len(lengths)):
        mine = cut.values["n"][cut.offsets[i] : cut.offsets[i + 1]]
        assert torch.equal(mine, packed.values["n"][offsets[i + 1] - len(mine) : offsets[i + 1]])
    share = cut.lengths[lengths == 40] / 40
    assert abs(float(share.mean()) - 0.7625) < 0.03, "uniform from .5 to 1, rounded up"


def test_noise_and_values(table: Encoded) -> None:
    batch, view = seen(table, Change(noise=0.3))
    moved = (view.features["text_vector"] - batch.features["text_vector"]).flatten()
    assert abs(float(moved.std()) - 0.3) < 0.02 and abs(float(moved.mean())) < 0.02
    known = batch.features["price"][:, 1] == 0
    by = (view.features["price"] - batch.features["price"])[known, 0]
    assert abs(float(by.std()) - 0.3) < 0.03
    std = table.schema.numbers["price"][1]
    exact = (view.features["price.exact"] - batch.features["price.exact"])[known, 0]
    torch.testing.assert_close(exact, by.double() * std, rtol=1e-5, atol=1e-6)
    assert torch.equal(view.features["price"][~known], batch.features["price"][~known])
    assert torch.equal(view.features["item"], batch.features["item"])
    _, view = seen(table, Change(values=0.25))
    zero = view.features["text_vector"] == 0
    assert abs(float(zero.float().mean()) - 0.25) < 0.04
    assert torch.equal(view.features["text_vector"][~zero], batch.features["text_vector"][~zero])


def test_the_same_seed_gives_the_same_view(table: Encoded) -> None:
    view = Tabular(weak=Change(noise=0.1)).bind(table)
    batch = table.batch(np.arange(50))
    one, two, other = view(batch, False, 3), view(batch, False, 3), view(batch, False, 4)
    assert torch.equal(one.features["price"], two.features["price"])
    assert not torch.equal(one.features["price"], other.features["price"])
    assert torch.equal(one.features["item"], batch.features["item"]), "the weak view, not the strong one"
    assert not torch.equal(view(batch, True, 3).features["item"], batch.features["item"])


def test_every_kind_of_feature_without_rows_or_events(tmp_path: Any) -> None:
    log = make_log().with_columns(tags=pl.lit(None, dtype=pl.List(pl.Int64)))
    data = make_data(tasks=(Task("click"),), cache=str(tmp_path), features=(*make_data().features, Feature("user")))
    table = Encoded(encode(data, tables={"log": log}))
    strong = Change(features=0.9, history=0.1, noise=1.0, values=0.5)
    for rows in (0, 1, 5):
        _, view = seen(table, strong, rows)
        assert len(view) == rows and view.features["tags"].lengths.sum() == 0


@pytest.mark.parametrize(
    ("setting", "text"),
    [({"features": 1.0}, r"`features` should be in \[0, 1\). Found 1.0"), ({"values": -0.1}, "`values` should be in"),
     ({"history": 0.0}, r"`history` should be in \(0, 1\]. Found 0.0"), ({"noise": -1.0}, "`noise` should not be negative"),
     ({"noise": float("nan")}, "`noise` should not be negative. Found nan")],
)  # fmt: skip
def test_errors(setting: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Change(**setting)


def test_in_a_run_file(tmp_path: Any) -> None:
    path = tmp_path / "run.toml"
    run = config.from_dict({
        "data": {"rows": "log.parquet", "user": "user", "features": [{"name": "item"}], "tasks": [{"name": "click"}]},
        "augment": {"kind": "tabular", "strong": {"features": 0.5}},
    })  # fmt: skip
    path.write_text(config.dumps(run))
    assert config.load(path).augment == Tabular(strong=Change(features=0.5))
    with pytest.raises(config.RunError, match="unknown key `augment.strong.feature`. Did you mean `features`"):
        config.override(run, ["augment.strong.feature=0.1"])
