"""Protocols for other domains and open classes: rows, names, accuracies by hand, a whole run, names by a text backbone."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import picturekit
import polars as pl
import pytest
import torch
from torch import nn
from toylog import make_data, make_run

from unbraid.analysis.open_classes import domain_shift, harmonic, in_the_wild, open_class
from unbraid.bundle import with_classes
from unbraid.class_head import ClassFile, name_vectors, read_vectors, write_vectors
from unbraid.config import ModelChoice
from unbraid.data.declaration import Split
from unbraid.encoders.table import Views
from unbraid.job import train
from unbraid.losses.margin import Margin
from unbraid.optim.beta_average import BetaAverage
from unbraid.optim.joint import Joint
from unbraid.predictor import Predictor
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Feature, Schema, Scores, Task

NAMES = ("ant", "bee", "cat", "dog", "elk")
LABELS = np.array(["ant", "bee", "cat", "dog", "elk", "ant", "bee", "cat", "dog", "elk"])
DOMAIN = np.array(["sun"] * 5 + ["fog"] * 5)


def test_which_rows_train_and_which_names_compete() -> None:
    shift = domain_shift(LABELS, DOMAIN, "fog")
    assert shift.names == shift.base == NAMES and shift.new == ()
    assert shift.train.tolist() == [True] * 5 + [False] * 5
    assert set(shift.tests) == {"target"} and shift.tests["target"].names == NAMES
    assert shift.tests["target"].rows.tolist() == [False] * 5 + [True] * 5

    opened = open_class(LABELS, DOMAIN == "fog", NAMES)
    assert opened.base == ("ant", "bee") and opened.new == ("cat", "dog", "elk")
    assert opened.train.nonzero()[0].tolist() == [0, 1]
    assert opened.tests["base"].rows.nonzero()[0].tolist() == [5, 6] and opened.tests["base"].names == ("ant", "bee")
    assert opened.tests["new"].rows.nonzero()[0].tolist() == [7, 8, 9]
    assert opened.tests["new"].names == ("cat", "dog", "elk")

    wild = in_the_wild(LABELS, DOMAIN, "fog", NAMES, base=3)
    assert wild.train.nonzero()[0].tolist() == [0, 1, 2]
    assert [wild.tests[name].rows.nonzero()[0].tolist() for name in ("base", "new")] == [[5, 6, 7], [8, 9]]
    assert all(test.names == NAMES for test in wild.tests.values()), "all names compete"


def test_the_split_column() -> None:
    labels, domain = np.tile(LABELS, 50), np.tile(DOMAIN, 50)
    for protocol in (
        domain_shift(labels, domain, "sun"),
        open_class(labels, domain == "sun"),
        in_the_wild(labels, domain, "sun"),
    ):
        column = protocol.split(labels, valid=0.2, seed=3)
        words = np.array([word or "" for word in column])
        assert ((words == "train") | (words == "valid")).tolist() == protocol.train.tolist()
        assert (words == "valid").sum() == round(0.2 * protocol.train.sum())
        tested = np.any([test.rows for test in protocol.tests.values()], axis=0)
        assert ((words == "test") == (tested & np.isin(labels, protocol.base))).all()
        assert not (words[np.isin(labels, protocol.new)] != "").any(), "rows of new classes are in no part"
        assert column.equals(protocol.split(labels, seed=3)) and not column.equals(protocol.split(labels, seed=4))


def scores_of(logits: np.ndarray, labels: np.ndarray) -> Scores:
    n = len(labels)
    return Scores(
        logits={"kind": logits}, hidden={}, labels={"kind": np.array([NAMES.index(c) for c in labels])},
        observed={"kind": np.ones(n, bool)}, domain=np.full(n, 2), weight=None, group=np.arange(n), row=np.arange(n),
        domains=("(unknown)", "(missing)", "all"),
    )  # fmt: skip


SCHEMA = Schema(
    (), (Task("kind", kind="multiclass"),), domains=("(unknown)", "(missing)", "all"), classes={"kind": NAMES}
)


def test_accuracies_by_hand() -> None:
    rng = np.random.default_rng(0)
    labels, domain = rng.choice(NAMES, 500), rng.choice(["sun", "fog"], 500)
    logits = rng.normal(size=(500, 5)) + 1.5 * (np.array(NAMES) == labels[:, None])
    scores = scores_of(logits, labels)
    for protocol in (
        domain_shift(labels, domain, "fog", NAMES),
        open_class(labels, domain == "fog", NAMES),
        in_the_wild(labels, domain, "fog", NAMES),
    ):
        found = protocol.measure(scores, SCHEMA, "kind")
        for name, test in protocol.tests.items():
            hits = []
            for row in test.rows.nonzero()[0]:
                best = max(test.names, key=lambda c, row=row: logits[row, NAMES.index(c)])  # type: ignore[misc]
                hits.append(best == labels[row])
            assert found[name]["value"] == pytest.approx(np.mean(hits)) and found[name]["rows"] == len(hits) > 20
            assert found[name]["low"] < found[name]["value"] < found[name]["high"]
        if protocol.kind != "domain_shift":
            b, n = found["base"]["value"], found["new"]["value"]
            assert found["H"]["value"] == pytest.approx(2 / (1 / b + 1 / n))
    opened, wild = open_class(labels, domain == "fog", NAMES), in_the_wild(labels, domain, "fog", NAMES)
    for name in ("base", "new"):  # more names that compete never help
        assert (
            opened.measure(scores, SCHEMA, "kind")[name]["value"] >= wild.measure(scores, SCHEMA, "kind")[name]["value"]
        )
    assert harmonic(0.0, 0.0) == 0 and harmonic(None, 0.5) is None


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="`rain` should be one of several domains"):
        domain_shift(LABELS, DOMAIN, "rain")
    with pytest.raises(ValueError, match=r"Found \['dog', 'elk'\]"):
        open_class(LABELS, DOMAIN == "fog", NAMES[:3])
    with pytest.raises(ValueError, match="Found 5 base classes among 5"):
        in_the_wild(LABELS, DOMAIN, "fog", base=5)
    protocol = open_class(LABELS, DOMAIN == "fog", NAMES)
    with pytest.raises(ValueError, match="`valid`"):
        protocol.split(LABELS, valid=1)
    scores = scores_of(np.zeros((10, 5)), LABELS)
    few = replace(SCHEMA, classes={"kind": NAMES[:2]})
    with pytest.raises(ValueError, match=r"does not know the classes \['cat', 'dog', 'elk'\]"):
        protocol.measure(scores, few, "kind")
    with pytest.raises(ValueError, match="all 10 rows. Found 9"):
        protocol.measure(replace(scores, row=np.arange(9)), SCHEMA, "kind")
    with pytest.raises(ValueError, match="labels among its 2 names"):
        protocol.measure(replace(scores, observed={"kind": np.zeros(10, bool)}), SCHEMA, "kind")


# ------------------------------------------------------------------------------------------------------------- whole runs
def world(rows: int, seed: int = 0) -> tuple[pl.DataFrame, list[str], np.ndarray]:
    """Rows whose vectors are those of their class, turned a little and noisy, in two domains."""
    rng = np.random.default_rng(seed)
    names = [f"c{i}" for i in range(8)]
    vectors = rng.normal(size=(8, 12))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    turn = np.eye(12) + 1.5 * rng.normal(size=(12, 12)) / np.sqrt(12)
    label, domain = rng.integers(0, 8, rows), rng.choice(["sun", "fog"], rows)
    x = (
        vectors[label] @ turn
        + np.where(domain == "fog", 0.2, 0)[:, None] * rng.normal(size=12)
        + 0.1 * rng.normal(size=(rows, 12))
    )
    frame = pl.DataFrame(
        {"x": [[float(v) for v in row] for row in x], "kind": [names[i] for i in label], "sky": domain}
    )
    return frame, names, vectors


def test_a_run_in_the_wild_from_frame_to_figures(tmp_path: Path) -> None:
    frame, names, vectors = world(1200, seed=1)
    write_vectors(tmp_path / "names.npz", names, torch.from_numpy(vectors))
    labels = frame["kind"].to_list()
    protocol = in_the_wild(labels, frame["sky"].to_list(), "fog", names)
    frame = frame.with_columns(protocol.split(labels))
    data = make_data(
        rows="photos", user="", time="", domain="sky", features=(Feature("x", kind="vector"),), fields=(), events=(),
        histories=(), tasks=(Task("kind", kind="multiclass"),),
        split=Split(kind="column", column="split"), keep="split is not null",
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    classes = {"kind": ClassFile(str(tmp_path / "names.npz"), scale=20.0, projection="always")}
    model = ModelChoice(tower=SharedBottom(bottom=(), tower=()), tables=Views(width=4), classes=classes)
    run = make_run(
        data=data,
        model=model,
        update=Joint(lr=5e-3),
        training=Training(batch_size=64, steps=60, evaluate_every=60, metric="accuracy"),
        losses=(Margin(0.1),),
    )
    zero_shot = replace(run, update=Joint(lr=0.0), training=replace(run.training, steps=1))
    found = {}
    for name, one in {"zero": zero_shot, "tuned": run, "averaged": replace(run, average=BetaAverage(beta=0.5))}.items():
        bundle = train(one, tables={"photos": frame}, baseline=False).bundle
        assert set(bundle.fitted.schema.classes["kind"]) == set(names[:4])
        whole = with_classes(bundle, "kind", names[4:], torch.from_numpy(vectors[4:]))
        scores = Predictor(whole).scores(frame.drop("split"))
        found[name] = protocol.measure(scores, whole.fitted.schema, "kind")
        assert found[name]["base"]["rows"] + found[name]["new"]["rows"] == (frame["sky"] == "fog").sum()
    assert found["tuned"]["base"]["value"] > found["zero"]["base"]["value"] + 0.05
    assert found["averaged"]["base"]["value"] > found["zero"]["base"]["value"] + 0.05
    assert all(each["new"]["value"] > 3 / 8 for each in found.values()), "classes that training never saw"


# ------------------------------------------------------------------------------------------------- names by a text backbone
class Letters(nn.Module):
    """A text backbone (`unbraid.slots.Backbone`) that counts letters, then turns them."""

    padding = 0

    def __init__(self) -> None:
        super().__init__()
        self.width, self.reads = 5, "text"
        self.turn = nn.Linear(128, 5)
        self.seen: list[str] = []

    def tokens(self, texts: list[str]) -> torch.Tensor:
        self.seen += texts
        longest = max(map(len, texts))
        return torch.tensor([[ord(c) for c in text.ljust(longest, "\0")] for text in texts])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros(len(tokens), 128).scatter_add_(1, tokens, torch.ones(tokens.shape))
        counts[:, 0] = 0
        return self.turn(counts)


def test_vectors_of_names_by_templates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = Letters()
    found = name_vectors(["polar_bear", "ant"], backbone, ("a {}.", "the {}"))
    assert backbone.seen == ["a polar bear.", "a ant.", "the polar bear", "the ant"]
    parts = [
        nn.functional.normalize(backbone(backbone.tokens([f"a {n}.", f"the {n}"])), dim=1).sum(0)
        for n in ("polar bear", "ant")
    ]
    wanted = torch.stack([part / part.norm() for part in parts])
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-6)
    many = [f"c{i}" for i in range(130)]
    assert torch.equal(name_vectors(many, backbone)[70:75], name_vectors(many[70:75], backbone)), "in blocks"
    assert not found.requires_grad
    write_vectors(tmp_path / "n.npz", ["polar_bear", "ant"], found)
    names, vectors = read_vectors(tmp_path / "n.npz")
    assert names == ["polar_bear", "ant"] and torch.equal(vectors, found)
    for names, templates in ((["a"], ["no place"]), ([], ["{}"]), (["a"], [])):
        with pytest.raises(ValueError, match="once"):
            name_vectors(names, backbone, templates)


@pytest.fixture
def tiny_clip(tmp_path: Path) -> str:
    """File of weights, begun at random, of a small model of open_clip: `TINY`."""
    from unbraid.compat import declare_operators

    declare_operators()
    import open_clip

    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    (tmp_path / f"{TINY}.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / f"{TINY}.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model(TINY).state_dict(), tmp_path / "clip.pt")
    return str(tmp_path / "clip.pt")


TINY = "unbraid-tiny-open-classes"
ABSENT = any(importlib.util.find_spec(name) is None for name in ("open_clip", "torchvision", "PIL"))


@pytest.mark.skipif(ABSENT, reason="needs the extra `images`")
def test_the_tower_of_a_small_clip_model_is_tuned_and_told_a_new_class(tiny_clip: str, tmp_path: Path) -> None:
    from unbraid.backbones.open_clip_models import OpenClip, OpenClipText

    texts: Any = OpenClipText(name=TINY, weights=tiny_clip)
    names = picturekit.CLASSES
    vectors = name_vectors(names, texts, ("a photo of a {}.", "something {}"))
    assert vectors.shape == (3, 12) and float((vectors @ vectors.T - torch.eye(3)).abs().max()) < 0.9999, "names differ"
    write_vectors(tmp_path / "names.npz", names, vectors)
    rows = picturekit.make_rows(tmp_path)
    images = OpenClip(name=TINY, weights=tiny_clip, frozen=False)
    model = ModelChoice(
        tower=SharedBottom(bottom=(), tower=()),
        images=images,
        classes={"colour": ClassFile(str(tmp_path / "names.npz"), scale=20.0)},
    )
    run = picturekit.make_run(tmp_path, model=model, losses=(Margin(),), average=BetaAverage(), update=Joint(lr=1e-3))
    known = rows.filter(pl.col("colour") != "blue")
    tuned: Any = train(run, tables={"rows": known}, baseline=False).bundle
    zero: Any = train(replace(run, update=Joint(lr=0.0)), tables={"rows": known}, baseline=False).bundle
    head = tuned.model.heads["task/colour"]
    assert head.projection is None, "the tower has the vectors' width"
    order = [names.index(name) for name in tuned.fitted.schema.classes["colour"]]
    torch.testing.assert_close(head.vectors, vectors[order], rtol=0, atol=1e-6)
    before, after = zero.model.state_dict(), tuned.model.state_dict()
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert len(moved) > 10 and all(name.startswith("backbones.image.") for name in moved), "the tower alone learned"
    assert any("ln_post" in name for name in moved), "its normalisations, too"
    pictures = {
        "file": torch.load(tiny_clip)["visual.conv1.weight"],
        "zero": before["backbones.image.tower.conv1.weight"],
    }
    assert torch.equal(pictures["file"], pictures["zero"])
    scores = [
        Predictor(with_classes(each, "colour", ["blue"], vectors[2:])).scores(rows).logits["colour"]
        for each in (zero, tuned)
    ]
    assert all(found.shape == (30, 3) and np.isfinite(found).all() for found in scores)
    assert not np.allclose(*scores)
