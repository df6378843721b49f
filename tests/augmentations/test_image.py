"""Views of pictures in training batches: what is drawn, who gets one, resumption."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picturekit import counting, make_data, make_rows, make_run

from unbraid.augmentations.image import Image
from unbraid.bundle import build
from unbraid.data.encode import encode
from unbraid.data.features import attach
from unbraid.data.mix import Mix, with_views
from unbraid.data.table import Encoded
from unbraid.job import train
from unbraid.train import Watcher

pytest.importorskip("PIL", reason="Pillow is not installed")
if importlib.util.find_spec("torchvision") is None:
    pytest.skip("strong views need the extra images (torchvision)", allow_module_level=True)


@pytest.fixture
def table(tmp_path: Path) -> Encoded:
    found = Encoded(encode(make_data(tmp_path), tables={"rows": make_rows(tmp_path)}))
    attach(found, build(make_run(tmp_path, counting()[0]), found.schema), augment=Image())
    return found


def test_views_are_functions_of_seed_and_row(table: Encoded) -> None:
    view, plain = Image().bind(table), table.batch(np.arange(20))
    weak = view(plain, False, 7).features["picture"]
    assert weak.shape == plain.features["picture"].shape and not torch.equal(weak, plain.features["picture"])
    some = torch.tensor([11, 3])
    assert torch.equal(view(plain.select(some), False, 7).features["picture"], weak[some])
    strong = view(plain, True, 7).features["picture"]
    for other in (strong, view(plain, False, 8).features["picture"]):
        assert (other != weak).flatten(1).any(1).sum() > 12
    assert torch.equal(
        weak[3], table.pictures(np.array([3]), replace(table.transforms["picture"], augment="weak"), 7)[0]
    )


def test_only_rows_without_a_label_get_a_strong_view(table: Encoded) -> None:
    batch = table.batch(np.arange(12))
    found = with_views(batch, Image().bind(table), "unlabelled", (0, 5))
    hidden = (~batch.observed["colour"]).nonzero().squeeze(1)
    assert len(hidden) and len(found) == 12 + len(hidden) and found.row[12:].tolist() == hidden.tolist()
    assert not found.observed["colour"][12:].any() and (found.view[12:] == 1).all()


def trained(tmp_path: Path, rows: Any, images: Any, out: Path | None = None, **options: Any) -> dict[str, torch.Tensor]:
    run = make_run(tmp_path, images, augment=Image())
    run = replace(run, training=replace(run.training, checkpoint_steps=3, mix=Mix(unlabelled=3)))
    return train(run, out, tables={"rows": rows}, baseline=False, **options).bundle.model.state_dict()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_training_on_views_resumes_bit_equal(tmp_path: Path, frozen: bool) -> None:
    rows, images = make_rows(tmp_path), counting(frozen=frozen)[0]
    want = trained(tmp_path, rows, images)

    class Dies(Watcher):
        def evaluated(self, *_: Any) -> None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trained(tmp_path, rows, images, tmp_path / "out", watcher=Dies())
    found = trained(tmp_path, rows, images, tmp_path / "out", resume=True)
    assert all(torch.equal(value, found[name]) for name, value in want.items())


def test_nothing_is_remembered_where_pictures_change(table: Encoded, tmp_path: Path) -> None:
    assert not list(table.folder.parent.rglob("vectors.bin"))
    assert table.batch(np.arange(2)).features["picture"].dim() == 4


def test_without_pictures_it_is_an_error(table: Encoded) -> None:
    table.transforms.clear()
    with pytest.raises(ValueError, match="`augment` of kind `image` changes pictures, and the data have none"):
        Image().bind(table)
