"""The cache of frozen backbones: once per distinct picture, named by all that made a vector, refused where it would lie."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from picturekit import Counting, array, counting, make_data, make_rows, make_run, write
from torch import nn

from unbraid.backbones.frozen import GROUP, Frozen, digest
from unbraid.bundle import build
from unbraid.data import features
from unbraid.data.encode import encode
from unbraid.data.features import attach, computed, refusal, remember
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.job import train

pytest.importorskip("PIL", reason="Pillow is not installed")


@pytest.fixture
def table(tmp_path: Path) -> Encoded:
    return Encoded(encode(make_data(tmp_path), tables={"rows": make_rows(tmp_path)}))


def frozen(seed: int = 0, **changes: Any) -> tuple[Frozen, Counting]:
    backbone = Frozen(counting(seed, **changes)[0].build())
    return backbone, backbone.inner.network


def vectors(table: Encoded, backbone: Frozen, folder: Path) -> np.ndarray:
    return remember(table.contents["picture"], backbone, folder).of(table.columns["feature.picture"]).numpy()


# ------------------------------------------------------------------------------------------------------------ hits, misses
def test_a_picture_goes_through_the_backbone_once(table: Encoded, tmp_path: Path) -> None:
    backbone, network = frozen()
    first = vectors(table, backbone, tmp_path / "f")
    assert network.seen == 30
    assert np.array_equal(first, vectors(table, backbone, tmp_path / "f")) and network.seen == 30
    again, other = frozen()
    assert np.array_equal(first, vectors(table, again, tmp_path / "f")) and other.seen == 0, "another process"
    pictures = table.pictures(np.arange(30), backbone.transform)
    assert np.array_equal(first, backbone(pictures).numpy())


def test_copies_of_a_picture_are_computed_once(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    for n in range(10, 20):
        write(tmp_path / f"pics/{n}.png", array(n - 10, (n - 10) % 3))
    table = Encoded(encode(make_data(tmp_path), tables={"rows": rows}))
    backbone, network = frozen()
    found = vectors(table, backbone, tmp_path / "f")
    assert network.seen == 20 and np.array_equal(found[:10], found[10:20])


def test_one_changed_pixel_computes_one_vector(table: Encoded, tmp_path: Path) -> None:
    backbone, network = frozen()
    before = vectors(table, backbone, tmp_path / "f")
    changed = array(7, 1)
    changed[10, 10, 2] ^= 64
    write(tmp_path / "pics/7.png", changed)
    after = vectors(table, backbone, tmp_path / "f")
    assert network.seen == 31
    assert [n for n in range(30) if (before[n] != after[n]).any()] == [7]
    write(tmp_path / "pics/7.png", array(7, 1))
    assert np.array_equal(vectors(table, backbone, tmp_path / "f"), before) and network.seen == 31, (
        "both are remembered"
    )


@pytest.mark.parametrize("part", ["weight", "statistic", "stride", "size", "mean"])
def test_whatever_makes_another_vector_misses(table: Encoded, tmp_path: Path, part: str) -> None:
    backbone, network = frozen()
    vectors(table, backbone, tmp_path / "f")
    network.seen = 0
    with torch.no_grad():
        if part == "weight":
            network.layer.weight[0, 0, 0, 0] += 1e-7
        elif part == "statistic":
            network.norm.running_mean[2] += 1e-7
        elif part == "stride":
            network.layer.stride = (2, 2)
    if part in ("size", "mean"):
        backbone, network = frozen(**{"size": {"size": 9}, "mean": {"mean": (0.4,)}}[part])
    want = backbone(table.pictures(np.arange(30), backbone.transform)).numpy()
    network.seen = 0
    assert np.array_equal(vectors(table, backbone, tmp_path / "f"), want) and network.seen == 30


def test_a_hash_is_of_every_part_of_a_module() -> None:
    module = counting()[1]
    found = {digest(module)}
    assert digest(copy.deepcopy(module)) in found
    for name, value in module.state_dict().items():
        other = copy.deepcopy(module)
        other.state_dict()[name].add_(1)
        found.add(digest(other))
        assert value.shape == other.state_dict()[name].shape
    assert len(found) == len(module.state_dict()) + 1


def test_vectors_are_memory_maps_in_blocks_and_an_interrupted_pass_goes_on(
    table: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "BLOCK", 8)
    backbone, network = frozen()
    (tmp_path / "pics/20.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match="pics/20.png"):
        vectors(table, backbone, tmp_path / "f")
    assert len(list((tmp_path / "f").rglob("vectors.bin"))) == 2
    write(tmp_path / "pics/20.png", array(20, 2))
    before = network.seen
    found = remember(table.contents["picture"], backbone, tmp_path / "f")
    assert network.seen - before == 14 and len(found.blocks) == 4
    assert all(isinstance(block, np.memmap) and block.mode == "r" for block in found.blocks)
    want = backbone(table.pictures(np.arange(30), backbone.transform))
    some = np.array([29, 3, 3, 11, 0])
    assert torch.equal(found.of(some), want[some]) and found.of(some[:0]).shape == (0, 5)
    assert not [path for path in (tmp_path / "f").rglob("*") if ".unbraid-" in path.name]


def test_vectors_of_rows_to_predict_are_not_remembered(table: Encoded, tmp_path: Path) -> None:
    backbone, _ = frozen()
    found = computed(table.contents["picture"], backbone, tmp_path / "once")
    assert torch.equal(found.of(np.arange(30)), backbone(table.pictures(np.arange(30), backbone.transform)))


# -------------------------------------------------------------------------------------------------------------- refusals
def test_what_would_lie_is_refused_with_a_reason(table: Encoded, tmp_path: Path) -> None:
    contents = table.contents["picture"]
    trained = counting()[0].build()
    with pytest.raises(ValueError, match=r"`picture` cannot be remembered.*it is trained.*frozen = true"):
        remember(contents, trained, tmp_path)
    backbone, network = frozen()
    with pytest.raises(ValueError, match="drawn anew every time .augment `weak`"):
        remember(contents, backbone, tmp_path, transform=replace(backbone.transform, augment="weak"))
    network.norm.train()
    with pytest.raises(ValueError, match=r"training mode \(BatchNorm2d\)"):
        remember(contents, backbone, tmp_path)
    network.eval()
    assert refusal(backbone, backbone.transform) == "" and not list(tmp_path.glob("*/*/vectors.bin"))


# ---------------------------------------------------------------------------------------------------------------- Frozen
def test_a_frozen_backbone_gives_each_row_the_same_bits_in_any_batch() -> None:
    backbone, _ = frozen()
    pictures = torch.randn(40, 3, 8, 8)
    want = backbone(pictures)
    order = torch.randperm(40)
    assert torch.equal(backbone(pictures[order]), want[order])
    assert torch.equal(torch.cat([backbone(part) for part in pictures.split(7)]), want)
    assert backbone(pictures[:0]).shape == (0, 5)


def test_groups_of_a_fixed_size_are_filled_up_and_cut() -> None:
    """What runs where it is not the CPU."""
    backbone, network = frozen()
    pictures = torch.randn(40, 3, 8, 8)
    found = torch.cat([backbone._group(part) for part in pictures.split(GROUP)])
    torch.testing.assert_close(found, backbone(pictures))
    network.seen = 0
    assert len(backbone._group(pictures[:3])) == 3 and network.seen == GROUP


def test_a_frozen_backbone_is_no_part_of_a_models_state() -> None:
    backbone, network = frozen()
    holder = nn.Sequential(backbone, nn.Linear(5, 1))
    assert {name for name, _ in holder.named_parameters()} == {"1.weight", "1.bias"} and len(holder.state_dict()) == 2
    assert not list(backbone.buffers()) and not any(p.requires_grad for p in network.parameters())
    holder.train()
    assert not network.training and not network.norm.training
    assert copy.deepcopy(holder)[0].inner is backbone.inner, "copies share it"
    holder.double()
    assert network.layer.weight.dtype == torch.float64, "it moves with the model"
    holder.float()
    before = digest(network)
    loss = holder(torch.randn(4, 3, 8, 8)).sum()
    loss.backward()
    assert digest(network) == before and network.layer.weight.grad is None and holder[1].weight.grad is not None


# -------------------------------------------------------------------------------------------------------------- training
def weights_of(run: Any, rows: pl.DataFrame, out: Path | None = None, **options: Any) -> dict[str, torch.Tensor]:
    return train(run, out, tables={"rows": rows}, baseline=False, **options).bundle.model.state_dict()


def test_training_with_and_without_the_cache_is_equal_bit_for_bit(tmp_path: Path, monkeypatch: Any) -> None:
    rows, run = make_rows(tmp_path), make_run(tmp_path, counting()[0])
    cached = weights_of(run, rows)
    warm = weights_of(run, rows)
    again = lambda encoded, model, **_: attach(encoded, model, augment=type("Views", (), {"reads_pictures": True}))  # noqa: E731
    monkeypatch.setattr("unbraid.job.attach", again)
    uncached = weights_of(run, rows)
    assert cached.keys() == uncached.keys() and len(cached) > 4
    for name in cached:
        assert torch.equal(cached[name], uncached[name]) and torch.equal(cached[name], warm[name]), name


@pytest.mark.parametrize("images", ["frozen", "trained", "small_conv"])
def test_resuming_is_bit_equal(tmp_path: Path, images: str) -> None:
    rows = make_rows(tmp_path)
    chosen = None if images == "small_conv" else counting(frozen=images == "frozen")[0]
    run = make_run(tmp_path, chosen)
    run = replace(run, training=replace(run.training, checkpoint_steps=3))
    want = weights_of(run, rows)

    class Stop(Exception):
        pass

    from unbraid.train import Watcher

    class Dies(Watcher):
        def evaluated(self, step: int, *rest: Any) -> None:
            raise Stop

    with pytest.raises(Stop):
        weights_of(run, rows, tmp_path / "out", watcher=Dies())
    found = weights_of(run, rows, tmp_path / "out", resume=True)
    assert all(torch.equal(want[name], found[name]) for name in want)


def test_a_trained_backbone_learns_and_a_frozen_one_does_not(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    given, module = counting(frozen=False)
    state = weights_of(make_run(tmp_path, given), rows)
    found = {name.split("network.")[1]: value for name, value in state.items() if "network." in name}
    assert found.keys() == module.state_dict().keys() and not torch.equal(found["layer.weight"], module.layer.weight)
    assert not torch.equal(found["norm.running_mean"], module.norm.running_mean), "batches move its statistics"
    frozen_state = weights_of(make_run(tmp_path, counting()[0]), rows)
    assert not any("network" in name for name in frozen_state)


def test_all_views_share_one_backbone_and_it_runs_once_per_batch(tmp_path: Path, table: Encoded) -> None:
    from unbraid.encoders.table import Views

    given = counting(frozen=False)[0]
    run = make_run(tmp_path, given)
    run = replace(run, model=replace(run.model, tables=Views(kind="several", widths=(4, 6))))
    model = build(run, table.schema)
    attach(table, model)
    network = model.backbones["image"].network
    network.seen = 0
    model(table.batch(np.arange(9)))
    assert network.seen == 9
    assert all(module.width for module in model.interactions.values())


def test_evaluation_reads_no_more_pictures_at_once_than_fit_in_memory(
    table: Encoded, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(features, "PIXELS", 3 * 8 * 8 * 4)
    attach(table, build(make_run(tmp_path), table.schema))
    assert [len(batch) for batch in table.in_order(np.arange(10), 1_000)] == [4, 4, 2]
