"""Pictures and texts from the run file to predictions: run, model, bundle, commands, description."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from picturekit import CLASSES, array, counting, make_data, make_rows, make_run, write
from torch import nn
from typer.testing import CliRunner

from unbraid import config
from unbraid.backbones.efficientnet_lite0 import EfficientNetLite0
from unbraid.backbones.minilm import MiniLM
from unbraid.backbones.small_conv import SmallConv
from unbraid.bundle import BACKBONES, Bundle, BundleError, build
from unbraid.cli.main import app
from unbraid.config import ModelChoice, Run, RunError
from unbraid.data.describe import describe
from unbraid.data.describe_table import render
from unbraid.data.encode import encode
from unbraid.data.features import attach
from unbraid.data.table import Encoded
from unbraid.job import evaluate_bundle, train
from unbraid.optim.joint import Joint
from unbraid.predictor import Predictor, with_uncertainty
from unbraid.types import Feature, Task

pytest.importorskip("PIL", reason="Pillow is not installed")


def trained(run: Run, rows: pl.DataFrame, out: Path | None = None) -> Any:
    return train(run, out, tables={"rows": rows}, baseline=False)


# -------------------------------------------------------------------------------------------------------------- the run
def test_backbones_and_features_go_together(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    with pytest.raises(ValueError, match="`model.images` has no backbone"):
        Run(data)
    with pytest.raises(ValueError, match="`model.texts` reads nothing"):
        Run(data, model=ModelChoice(images=SmallConv(), texts=MiniLM()))
    encoded = Encoded(encode(data, tables={"rows": make_rows(tmp_path)}))
    from unbraid.model import Model
    from unbraid.towers.mlp import SharedBottom

    with pytest.raises(ValueError, match="`picture` is of kind `image`, and no backbone reads it: set `model.images`"):
        Model(encoded.schema, SharedBottom())


def test_a_run_file_says_all_but_a_given_module(tmp_path: Path) -> None:
    text = """
        [data]
        rows = "rows.parquet"
        features = [{ name = "picture", kind = "image" }, { name = "caption", kind = "text", template = "a {}." }]
        tasks = [{ name = "colour", kind = "multiclass" }]
        split = { kind = "column", column = "split" }
        [model]
        images = { kind = "efficientnet_lite0", weights = "w.pth", size = 96 }
        texts = { kind = "open_clip", weights = "none" }
    """
    (tmp_path / "run.toml").write_text(text)
    run = config.load(tmp_path / "run.toml")
    assert run.model.images == EfficientNetLite0(weights=str(tmp_path / "w.pth"), size=96), (
        "files are beside the run file"
    )
    assert run.model.texts.weights == "none" and run.data.features[1].template == "a {}."
    assert config.override(run, ["model.images.kind=small_conv"]).model.images == SmallConv()
    with pytest.raises(RunError, match="`model.images` has no kind `resnet`"):
        config.override(run, ["model.images.kind=resnet"])
    given = make_run(tmp_path, counting()[0])
    assert "module =" not in config.dumps(given) and 'kind = "module"' in config.dumps(given)


# ------------------------------------------------------------------------------------------------------------ the model
def test_gradients_reach_a_trained_backbone_from_every_row_and_nothing_of_a_frozen_one(tmp_path: Path) -> None:
    encoded = Encoded(encode(make_data(tmp_path), tables={"rows": make_rows(tmp_path)}))
    model = build(make_run(tmp_path, counting(frozen=False)[0]), encoded.schema).eval()
    attach(encoded, model)
    batch = encoded.batch(np.arange(6))
    pictures = batch.features["picture"].requires_grad_()
    model(batch).logits["colour"][2].sum().backward()
    found = pictures.grad.flatten(1).abs().sum(1)
    assert found[2] > 0 and not found[[0, 1, 3, 4, 5]].any()
    assert all(parameter.grad is not None for parameter in model.backbones.parameters())

    model = build(make_run(tmp_path, counting()[0]), encoded.schema)
    pictures = pictures.detach().requires_grad_()
    model(replace(batch, features={"picture": pictures})).logits["colour"].sum().backward()
    assert pictures.grad is None and not list(model.backbones.parameters())


def test_initial_weights_of_a_backbone_are_its_own(tmp_path: Path) -> None:
    """The initialiser of all models draws linear layers anew; those of a backbone came with it."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    from unbraid.backbones.given import Given

    encoded = Encoded(encode(make_data(tmp_path), tables={"rows": make_rows(tmp_path)}))
    model = build(make_run(tmp_path, Given(module=module, width=5, size=8, frozen=False)), encoded.schema)
    assert torch.equal(model.backbones["image"].network[1].weight, module[1].weight)


def test_vectors_of_pictures_are_projected_like_given_ones(tmp_path: Path) -> None:
    from unbraid.encoders.vectors import Projected

    encoded = Encoded(encode(make_data(tmp_path), tables={"rows": make_rows(tmp_path)}))
    run = make_run(tmp_path, counting()[0])
    model = build(replace(run, model=replace(run.model, vectors=Projected())), encoded.schema)
    attach(encoded, model)
    assert model.interactions["view/shared"].width == model.embeddings.widths["shared"] != 5
    assert model(encoded.batch(np.arange(4))).logits["colour"].shape == (4, 3)


def test_a_small_network_learns_colours(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, 45)
    run = make_run(tmp_path)
    result = trained(replace(run, training=replace(run.training, steps=24, evaluate_every=24)), rows)
    assert result.metrics["test"]["colour"]["accuracy"]["value"] > 0.9


# ----------------------------------------------------------------------------------------------------------- the bundle
@pytest.mark.parametrize("images", ["small_conv", "frozen", "trained"])
def test_a_loaded_bundle_predicts_the_same(tmp_path: Path, images: str) -> None:
    rows = make_rows(tmp_path)
    given, module = counting(frozen=images == "frozen")
    result = trained(make_run(tmp_path, None if images == "small_conv" else given), rows, tmp_path / "out")
    before = Predictor(result.bundle).predict(rows)
    other = None if images == "small_conv" else type(module)()
    loaded = Bundle.load(tmp_path / "out", images=other)
    after = Predictor(loaded).predict(rows)
    assert np.array_equal(before["colour"].to_numpy(), after["colour"].to_numpy())
    in_bytes = rows.select(picture=pl.Series([(tmp_path / name).read_bytes() for name in rows["picture"]]), site="site")
    for frame in (in_bytes, rows.select("picture", "site").reverse()):
        found = Predictor(loaded).predict(frame)["colour"].to_numpy()
        same = found if frame is in_bytes else found[::-1]
        np.testing.assert_allclose(same, before["colour"].to_numpy(), rtol=1e-5)
    metrics = evaluate_bundle(loaded, split="valid", tables={"rows": rows})
    assert metrics["colour"]["rows"] == 6


def test_a_bundle_of_a_given_module_says_that_it_needs_it(tmp_path: Path) -> None:
    trained(make_run(tmp_path, counting()[0]), make_rows(tmp_path), tmp_path / "out")
    with pytest.raises(BundleError, match=r"a network given from Python.*Bundle.load\(folder, images=...\)"):
        Bundle.load(tmp_path / "out")
    with pytest.raises(BundleError, match="does not fit"):
        Bundle.load(tmp_path / "out", images=nn.Conv2d(3, 5, 3))
    (tmp_path / "out" / BACKBONES).unlink()
    with pytest.raises(
        BundleError, match="backbones.safetensors holds nothing of the backbone that reads kind `image`"
    ):
        Bundle.load(tmp_path / "out", images=counting()[1])


def test_a_frozen_backbone_is_saved_whole_and_loads_without_its_package(tmp_path: Path, monkeypatch: Any) -> None:
    module = EfficientNetLite0().build(load=False)
    torch.save(module.state_dict(), tmp_path / "w.pth")
    run = make_run(tmp_path, EfficientNetLite0(weights=str(tmp_path / "w.pth"), size=16))
    run = replace(run, training=replace(run.training, steps=2))
    rows = make_rows(tmp_path)
    before = Predictor(trained(run, rows, tmp_path / "out").bundle).predict(rows.head(3))
    (tmp_path / "w.pth").unlink()
    from unbraid.backbones import efficientnet_lite0

    monkeypatch.setattr(efficientnet_lite0, "PACKAGE", "no_such_package")
    after = Predictor(Bundle.load(tmp_path / "out")).predict(rows.head(3))
    assert np.array_equal(before["colour"].to_numpy(), after["colour"].to_numpy())
    assert (tmp_path / "out" / BACKBONES).stat().st_size > 12e6 > (tmp_path / "out/weights.safetensors").stat().st_size


def test_uncertainty_reads_pictures(tmp_path: Path) -> None:
    rows = make_rows(tmp_path).with_columns(good=pl.int_range(30) % 2)
    run = make_run(tmp_path, counting()[0], data=make_data(tmp_path, tasks=(Task("good"),)))
    run = replace(run, training=replace(run.training, metric="logloss"))
    bundle = with_uncertainty(trained(run, rows).bundle, tables={"rows": rows})
    assert Predictor(bundle).predict(rows.head(2), uncertainty=True).columns == ["good", "good_sd"]


@pytest.mark.slow
def test_branches_in_processes_read_pictures_too(tmp_path: Path) -> None:
    from unbraid.schedules.fork_merge import ForkMerge

    run = make_run(tmp_path, counting()[0])
    rows = make_rows(tmp_path)
    tasks = (Task("colour", kind="multiclass"), Task("caption", kind="multiclass", role="auxiliary"))
    run = replace(run, data=replace(run.data, tasks=tasks), schedule=ForkMerge(jobs=2))
    one = trained(replace(run, schedule=replace(run.schedule, jobs=1)), rows)
    two = trained(run, rows)
    states = [result.bundle.model.state_dict() for result in (one, two)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# ---------------------------------------------------------------------------------------------------------------- texts
@pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="the extra texts (tokenizers) is not installed"
)
@pytest.mark.parametrize("frozen", [True, False])
def test_texts_from_training_to_a_bundle(tmp_path: Path, monkeypatch: Any, frozen: bool) -> None:
    from backbones.test_minilm import file_state, rules
    from safetensors.torch import save

    from unbraid.backbones import minilm

    for name, value in {"WORDS": 40, "PLACES": 16, "WIDTH": 12, "INSIDE": 20, "LAYERS": 2, "HEADS": 3}.items():
        monkeypatch.setattr(minilm, name, value)
    (tmp_path / "files").mkdir()
    (tmp_path / "files/model.safetensors").write_bytes(
        save({k: v.float().contiguous() for k, v in file_state().items()})
    )
    (tmp_path / "files/tokenizer.json").write_text(rules())
    rows = make_rows(tmp_path).with_columns(caption=pl.Series([f"a {'dog cat of'.split()[n % 3]}" for n in range(30)]))
    data = make_data(tmp_path, features=(Feature("caption", kind="text", template="{} a"),))
    model = ModelChoice(texts=MiniLM(frozen=frozen, weights=str(tmp_path / "files")))
    run = make_run(tmp_path, data=data, model=model, update=Joint(lr=0.004))
    result = trained(replace(run, training=replace(run.training, steps=80)), rows, tmp_path / "out")
    assert result.metrics["test"]["colour"]["accuracy"]["value"] == 1
    shutil.rmtree(tmp_path / "files")
    loaded = Predictor(Bundle.load(tmp_path / "out"))
    found, want = (p.predict(rows)["colour"].to_numpy() for p in (loaded, Predictor(result.bundle)))
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert any("backbones.text" in name for name in loaded.bundle.model.state_dict()) == (not frozen)


# ------------------------------------------------------------------------------------------------------------- describe
def test_describe_says_what_pictures_and_texts_are(tmp_path: Path, capsys: Any) -> None:
    rows = make_rows(tmp_path)
    features = (Feature("picture", kind="image"), Feature("caption", kind="text"))
    rows = rows.with_columns(caption=pl.when(pl.int_range(30) > 2).then("caption"))
    data = make_data(tmp_path, features=features)
    found = describe(data, tables={"rows": rows})
    assert found["contents"] == {
        "picture": {
            "kind": "image",
            "distinct": 30,
            "missing files": 0,
            "sides": (20, 20),
            "side": 20,
            "modes": ["RGB"],
        },
        "caption": {"kind": "text", "distinct": 3, "median": 4.0, "longest": 5},
    }
    assert found["missing"]["caption"] == {"nulls": 3}
    (tmp_path / "pics/3.png").unlink()
    found = describe(data, tables={"rows": rows})
    assert found["contents"]["picture"]["missing files"] == 1
    assert any("1 of 30 files cannot be read, of 1 rows: pics/3.png" in warning for warning in found["warnings"])
    render(found)
    shown = capsys.readouterr().out
    assert "20 to 20 pixels, RGB, 1 files missing" in shown and "4 characters, at most 5" in shown
    in_bytes = make_rows(tmp_path).with_columns(picture=pl.lit((tmp_path / "pics/1.png").read_bytes()))
    assert describe(data, tables={"rows": in_bytes})["contents"]["picture"]["distinct"] == 1


def test_describe_names_files_that_are_no_pictures(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    first = rows["picture"][0]
    (tmp_path / first).write_bytes(b"no picture")
    found = describe(make_data(tmp_path), tables={"rows": rows})
    assert found["contents"]["picture"]["side"] is not None, "the others are looked at all the same"
    assert any(f"1 of {len(rows)} files are no pictures: {first}. Replace" in warning for warning in found["warnings"])


def test_describe_goes_on_where_a_column_is_of_another_type(tmp_path: Path) -> None:
    found = describe(make_data(tmp_path), tables={"rows": make_rows(tmp_path).with_columns(picture=pl.lit(1.5))})
    assert "contents" in found and any("kind `image` needs paths" in warning for warning in found["warnings"])


# ------------------------------------------------------------------------------------------------------------- commands
def call(*words: Any) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def test_from_a_folder_to_predictions(tmp_path: Path) -> None:
    for n in range(36):
        colour = CLASSES[n % 3]
        write(tmp_path / f"pets/photo/{colour}/{n}.png", array(n, n % 3, (12, 12)))
        write(tmp_path / f"pets/sketch/{n}.png", array(n + 90, n % 3, (12, 12)))
    text = call("init", tmp_path / "pets").stdout
    assert len(text.splitlines()) < 15
    (tmp_path / "run.toml").write_text(text)
    assert "Pictures and texts" in call("data", "describe", tmp_path / "run.toml").stdout
    told = call("train", tmp_path / "run.toml", "--out", tmp_path / "out", "--set", "training.epochs=5").output
    assert "! task label, domain sketch: no labels in the training split" in told and "domain photo: " not in told
    assert "95 % intervals by a bootstrap over rows." in (tmp_path / "out/report.md").read_text()
    call("predict", tmp_path / "out", tmp_path / "pets/rows.parquet", "--out", tmp_path / "scored.parquet")
    scored = pl.read_parquet(tmp_path / "scored.parquet")
    sketches = scored.filter(pl.col("domain") == "sketch")
    names = ["blue", "green", "red"]
    best = [names[int(np.argmax(p))] for p in sketches["predicted_label"]]
    truth = [CLASSES[int(Path(path).stem) % 3] for path in sketches["picture"]]
    assert np.mean(np.array(best) == truth) > 0.8
    call("evaluate", tmp_path / "out", "--split", "valid")
    out = call("data", "prepare", "pictures", tmp_path / "pets", tmp_path / "prepared").stdout
    assert "photo" in out and "no label" in out and "next " in out
    assert config.load(tmp_path / "prepared/run.toml").model.images == SmallConv(size=12)


def test_init_asks_for_labels_that_cannot_be_seen(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "a.parquet")
    result = CliRunner().invoke(app, ["init", str(tmp_path)])
    assert result.exit_code == 2 and "No column looks like a label" in result.output
    for folder, words in (
        (tmp_path / "nowhere", "There is no file or folder"),
        (tmp_path / "empty", "an empty folder"),
    ):
        if folder.name == "empty":
            folder.mkdir()
        result = CliRunner().invoke(app, ["init", str(folder)])
        assert result.exit_code == 2 and words in result.output and "label," not in result.output


def test_init_of_pictures_takes_no_columns(tmp_path: Path) -> None:
    write(tmp_path / "pets/cat/1.png", array(1, 1, (12, 12)))
    for option, words in (("--domain", "no --user, no --time"), ("--label", "is read without `--label`")):
        result = CliRunner().invoke(app, ["init", str(tmp_path / "pets"), option, "sketch"])
        assert result.exit_code == 2 and words in " ".join(result.output.split())
