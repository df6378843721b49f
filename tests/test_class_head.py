"""Heads with given vectors of classes: values, what trains, files, classes that training never saw, bundles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn.functional import normalize
from toylog import make_data, make_run

from unbraid import config
from unbraid.bundle import Bundle, BundleError, build, with_classes
from unbraid.class_head import Classes, ClassFile, read_vectors
from unbraid.config import ModelChoice, RunError
from unbraid.data.declaration import Split
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.job import train
from unbraid.losses.margin import Margin
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.predictor import Predictor
from unbraid.schedules.individual import Individual
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Batch, Feature, Task

NAMES = ["ant", "bee", "cat", "dog", "elk"]  # training knows the first three
VECTORS = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 5)))[0].T.astype(np.float32) * 3  # (5, 6), orthogonal


def photos(rows: int = 400, classes: int = 3, seed: int = 0) -> pl.DataFrame:
    """Vectors near that of their class, in a space of their own."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, rows)
    vector = VECTORS[label] / 3 + 0.25 * rng.normal(size=(rows, 6))
    place = np.where(np.arange(rows) % 5 == 3, "valid", np.where(np.arange(rows) % 5 == 4, "test", "train"))
    return pl.DataFrame({
        "clip": [[float(x) for x in v] for v in vector], "species": [NAMES[c] for c in label], "split": place,
        "camera": rng.choice(["north", "south"], rows), "night": (rng.random(rows) < 0.4).astype(int),
    })  # fmt: skip


def data_of(tmp_path: Path, **changes: Any) -> Any:
    data = make_data(
        rows="photos", user="", time="", domain="camera", features=(Feature("clip", kind="vector"),), fields=(), events=(),
        histories=(), tasks=(Task("species", kind="multiclass"), Task("night")), split=Split(kind="column", column="split"),
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    return replace(data, **changes)


@pytest.fixture
def file(tmp_path: Path) -> str:
    np.savez(tmp_path / "classes.npz", names=NAMES[::-1], vectors=VECTORS[::-1])
    return str(tmp_path / "classes.npz")


NONE = SharedBottom(bottom=(), tower=())


def run_of(tmp_path: Path, file: str, tower: Any = NONE, projection: Any = "always", **changes: Any) -> Any:
    classes = {"species": ClassFile(file, scale=10.0, projection=projection)}
    run = make_run(
        data=data_of(tmp_path), model=ModelChoice(tower=tower, tables=Views(width=4), classes=classes),
        training=Training(batch_size=32, steps=10), update=Joint(lr=1e-2),
    )  # fmt: skip
    return replace(run, **changes)


def batch_of(tmp_path: Path) -> tuple[Any, Batch]:
    encoded = Encoded(encode(data_of(tmp_path), tables={"photos": photos()}))
    return encoded, encoded.batch(np.arange(20))


# ---------------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(
    ("tower", "projection", "own"),
    [
        (NONE, "never", False), (NONE, "auto", False), (NONE, "always", True),
        (SharedBottom(bottom=(7,), tower=(4,)), "auto", True),
        (SharedBottom(bottom=(7,), tower=(6,)), "auto", False), (SharedBottom(bottom=(7,), tower=(6,)), "never", False),
    ],
)  # fmt: skip
def test_logits_are_scaled_cosines(tower: Any, projection: Any, own: bool, tmp_path: Path, file: str) -> None:
    encoded, batch = batch_of(tmp_path)
    model = build(run_of(tmp_path, file, tower, projection), encoded.schema).double()
    batch = replace(batch, features={"clip": batch.features["clip"].double()})  # type: ignore[union-attr]
    output = model(batch)
    head: Any = model.heads["task/species"]
    assert (head.projection is not None) == own
    below = output.hidden["species"] if head.projection is None else output.hidden["species"] @ head.projection.T
    vectors = torch.from_numpy(VECTORS[:3]).double()  # in the order of the classes' codes, whatever the file's
    cosine = torch.stack([torch.stack([f @ t / f.norm().clamp(min=1e-12) / t.norm() for t in vectors]) for f in below])
    torch.testing.assert_close(output.logits["species"], 10 * cosine, rtol=0, atol=1e-6)  # the file is float32
    torch.testing.assert_close(head.vectors.norm(dim=1), torch.ones(3).double(), rtol=0, atol=1e-6)
    if tower is NONE:  # P starts as the identity: the zero-shot classifier
        clip: Any = batch.features["clip"]
        torch.testing.assert_close(
            output.logits["species"], 10 * normalize(clip, dim=1) @ head.vectors.T, rtol=0, atol=1e-10
        )


def test_a_row_of_zeros_has_finite_logits_and_gradients(tmp_path: Path, file: str) -> None:
    encoded, batch = batch_of(tmp_path)
    model = build(run_of(tmp_path, file), encoded.schema)
    output = model(replace(batch, features={"clip": torch.zeros(20, 6)}))
    assert torch.equal(output.logits["species"], torch.zeros(20, 3))
    output.logits["species"].square().sum().backward()
    head: Any = model.heads["task/species"]
    assert bool(torch.isfinite(head.projection.grad).all())


def test_other_tasks_begin_as_without_vectors_of_classes(tmp_path: Path, file: str) -> None:
    encoded, batch = batch_of(tmp_path)
    run = run_of(tmp_path, file, SharedBottom(bottom=(7,), tower=(6,)))
    other = build(replace(run, model=replace(run.model, classes={})), encoded.schema)
    assert set(dict(build(run, encoded.schema).named_parameters())) - set(dict(other.named_parameters())) == {
        "heads.task/species.projection"
    }


def test_training_leaves_the_vectors_and_the_scale_bit_for_bit(tmp_path: Path, file: str) -> None:
    run = run_of(tmp_path, file, losses=(Margin(),), update=Joint(lr=0.1, weight_decay=0.5))
    model: Any = train(run, tables={"photos": photos()}, baseline=False).bundle.model
    head = model.heads["task/species"]
    assert torch.equal(head.vectors, Classes(torch.from_numpy(VECTORS[:3])).vectors) and float(head.scale) == 10
    assert not torch.allclose(head.projection, torch.eye(6), atol=0.05), "the projection learned"
    assert [name for name, _ in model.named_parameters() if "species" in name] == ["heads.task/species.projection"]


def test_zero_shot_is_a_run_that_learns_nothing(tmp_path: Path, file: str) -> None:
    run = run_of(tmp_path, file, update=Joint(lr=0.0), training=Training(batch_size=32, steps=1))
    result = train(run, tables={"photos": photos()}, baseline=False)
    rows = photos().filter(pl.col("split") == "test")
    cosine = np.array(rows["clip"].to_list()) @ VECTORS[:3].T
    accuracy = np.mean([NAMES[c] for c in cosine.argmax(1)] == rows["species"].to_numpy())
    assert result.metrics["test"]["species"]["accuracy"]["value"] == pytest.approx(accuracy)


# ---------------------------------------------------------------------------------------------- classes never seen before
def trained(tmp_path: Path, file: str, **changes: Any) -> Bundle:
    return train(run_of(tmp_path, file, **changes), tables={"photos": photos()}, baseline=False).bundle


def test_new_classes_are_rows_of_the_vectors_and_nothing_else(tmp_path: Path, file: str) -> None:
    bundle = trained(tmp_path, file)
    more = with_classes(bundle, "species", NAMES[3:], torch.from_numpy(VECTORS[3:]))
    assert more.fitted.schema.classes["species"] == tuple(NAMES)
    assert bundle.fitted.schema.classes["species"] == tuple(NAMES[:3]), "the bundle itself stays"
    before, after = bundle.model.state_dict(), more.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items() if not name.endswith(".vectors"))
    rows = photos(300, classes=5, seed=9)
    old, new = (Predictor(each).scores(rows.drop("species")).logits for each in (bundle, more))
    assert np.array_equal(old["night"], new["night"]) and new["species"].shape == (300, 5)
    assert np.allclose(old["species"], new["species"][:, :3], rtol=0, atol=1e-5)
    first, second = old["species"].argmax(1), new["species"].argmax(1)
    assert all(b == a or b >= 3 for a, b in zip(first, second, strict=True)), (
        "predictions change towards new names alone"
    )
    known = rows["species"].is_in(NAMES[:3]).to_numpy()
    truth = np.array([NAMES.index(name) for name in rows["species"]])
    assert (first == truth)[known].mean() >= (second == truth)[known].mean(), "fewer names never cost the others"
    assert (second == truth)[~known].mean() > 0.8
    labelled = Predictor(more).scores(rows)
    assert labelled.observed["species"].all() and np.array_equal(labelled.labels["species"], truth)


def test_a_bundle_with_new_classes_lives_on_disk_without_the_file(tmp_path: Path, file: str) -> None:
    bundle = trained(tmp_path, file)
    bundle.save(tmp_path / "plain")
    with_classes(bundle, "species", ["dog"], torch.from_numpy(VECTORS[3:4])).save(tmp_path / "more")
    Path(file).unlink()
    rows = photos(50, classes=4, seed=1)
    for name, width in (("plain", 3), ("more", 4)):
        loaded = Bundle.load(tmp_path / name)
        assert Predictor(loaded).predict(rows.drop("species"))["species"].to_numpy().shape == (50, width)
    assert isinstance(loaded.model, Model) and loaded.model.schema.classes["species"] == (*NAMES[:3], "dog")


def test_what_classes_cannot_be_added(tmp_path: Path, file: str) -> None:
    bundle = trained(tmp_path, file)
    one = torch.ones(1, 6)
    for task, names, vectors, message in (
        ("night", ["x"], one, "Task `night` of this bundle has no vectors"), ("species", ["bee"], one, r"Found \['bee'\]"),
        ("species", ["x", "x"], torch.ones(2, 6), r"Found \['x'\]"),
        ("species", ["x"], torch.ones(2, 6), "1 names and 2 vectors"),
        ("species", ["x"], torch.ones(1, 5), r"\(n, 6\)"), ("species", ["x"], torch.zeros(1, 6), "not zeros"),
    ):  # fmt: skip
        with pytest.raises(BundleError, match=message):
            with_classes(bundle, task, names, vectors)
    several = trained(tmp_path, file, schedule=Individual(by="domain"))
    assert Predictor(several).predict(photos(20))["species"].to_numpy().shape == (20, 3)
    with pytest.raises(BundleError, match="in one model"):
        with_classes(several, "species", ["x"], one)


def test_a_warm_start_keeps_the_projection_and_takes_vectors_of_its_own(tmp_path: Path, file: str) -> None:
    bundle = trained(tmp_path, file)
    bundle.save(tmp_path / "first")
    run = run_of(tmp_path, file, init=str(tmp_path / "first"), update=Joint(lr=0.0))
    again: Any = train(run, tables={"photos": photos()}, baseline=False).bundle.model
    was: Any = bundle.model
    assert torch.equal(again.heads["task/species"].projection, was.heads["task/species"].projection)


# ----------------------------------------------------------------------------------------------------------------- files
def test_parquet_and_npz_say_the_same(tmp_path: Path, file: str) -> None:
    frame = pl.DataFrame({"name": NAMES, "vector": [[float(x) for x in v] for v in VECTORS], "more": 1})
    frame.write_parquet(tmp_path / "classes.parquet")
    one, other = ClassFile(file).of(["dog", "ant"]), ClassFile(str(tmp_path / "classes.parquet")).of(["dog", "ant"])
    assert torch.equal(one.vectors, other.vectors) and one.vectors.shape == (2, 6)
    assert torch.allclose(one.vectors, torch.from_numpy(VECTORS[[3, 0]]) / 3, atol=1e-6)


def test_files_that_are_not_as_described(tmp_path: Path, file: str) -> None:
    with pytest.raises(ValueError, match="There is no file"):
        read_vectors(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"no vector of class \['yak'\]. It names 5 classes"):
        ClassFile(file).of(["ant", "yak"])
    for names, vectors, message in (
        (["a", "a"], np.ones((2, 3)), r"Found twice: \['a'\]"), (["a"], np.ones((2, 3)), "1 names, vectors"),
        (["a", "b"], np.ones(2), "one vector per name"),
    ):  # fmt: skip
        np.savez(tmp_path / "bad.npz", names=names, vectors=vectors)
        with pytest.raises(ValueError, match=message):
            read_vectors(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", vectors=np.ones((2, 3)))
    pl.DataFrame({"name": ["a"], "vectors": [1]}).write_parquet(tmp_path / "bad.parquet")
    (tmp_path / "text.npz").write_text("no archive")
    for bad in ("bad.npz", "bad.parquet", "text.npz"):
        with pytest.raises(ValueError, match="should hold vectors of classes"):
            read_vectors(tmp_path / bad)
    for given, message in (
        (torch.ones(3), "width"),
        (torch.full((2, 2), torch.nan), "finite"),
        (torch.zeros(1, 2), "zeros"),
    ):
        with pytest.raises(ValueError, match=message):
            Classes(given)
    with pytest.raises(ValueError, match="`scale`"):
        ClassFile(file, scale=0)


def test_refusals_of_a_run(tmp_path: Path, file: str) -> None:
    encoded, _ = batch_of(tmp_path)
    run = run_of(tmp_path, file)
    with pytest.raises(RunError, match=r"multiclass tasks, among \['species'\]. Found \['night'\]"):
        config.from_dict({**config.to_dict(run), "model": {"classes": {"night": {"kind": "file", "file": "x.npz"}}}})
    with pytest.raises(ValueError, match="heads.by"):
        build(replace(run, model=replace(run.model, heads=Heads(by="domain"))), encoded.schema)
    with pytest.raises(ValueError, match="No parameter of the model trains"):
        only = data_of(tmp_path, tasks=(Task("species", kind="multiclass"),))
        train(run_of(tmp_path, file, NONE, "never", data=only), tables={"photos": photos()}, baseline=False)
    narrow = run_of(tmp_path, file, SharedBottom(bottom=(), tower=(4,)), "never")
    with pytest.raises(ValueError, match="of width 6, and what its head reads has width 4"):
        build(narrow, encoded.schema)


def test_the_file_of_a_run_file_is_relative_to_it(tmp_path: Path, file: str) -> None:
    run = run_of(tmp_path, "classes.npz")
    (tmp_path / "run.toml").write_text(config.dumps(run))
    assert config.load(tmp_path / "run.toml").model.classes["species"].file == str(Path(file).resolve())
