"""Networks of torchvision, timm and open_clip: what they see, local files of weights, what is wrong with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from unbraid.backbones.frozen import fill, read_weights
from unbraid.backbones.given import Given
from unbraid.backbones.open_clip_models import OpenClip, OpenClipText
from unbraid.backbones.timm_models import Timm
from unbraid.backbones.torchvision_models import Torchvision
from unbraid.types import Transform


def needs(name: str) -> Any:
    missing = importlib.util.find_spec(name) is None or importlib.util.find_spec("torchvision") is None
    return pytest.mark.skipif(missing, reason=f"the extra images ({name}) is not installed")


@needs("torchvision")
@pytest.mark.parametrize(
    ("name", "width", "head"), [("resnet18", 512, "fc"), ("mobilenet_v3_small", 1024, "classifier.3")]
)
def test_torchvision(name: str, width: int, head: str, tmp_path: Path) -> None:
    config = Torchvision(name=name, weights="none", size=64)
    backbone = config.build().eval()
    assert backbone.width == width and backbone(torch.randn(2, 3, 64, 64)).shape == (2, width)
    bilinear = Transform(64, backbone.transform.resize, "RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    assert backbone.transform == bilinear and 64 < backbone.transform.resize < 80
    from torchvision import models

    whole = models.get_model(name, weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    loaded = Torchvision(name=name, weights=str(tmp_path / "w.pth")).build().eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(whole.get_submodule(head)(loaded(x)), whole(x))


@needs("torchvision")
def test_torchvision_has_no_such_network() -> None:
    with pytest.raises(ValueError, match="torchvision has no network `resnet19`"):
        Torchvision(name="resnet19", weights="none").build()


@needs("timm")
def test_timm(tmp_path: Path) -> None:
    import timm

    backbone = Timm(name="resnet10t", weights="none", size=64).build().eval()
    assert backbone.width == 512 and backbone(torch.randn(2, 3, 64, 64)).shape == (2, 512)
    about = timm.data.resolve_model_data_config(timm.create_model("resnet10t", num_classes=0))
    assert backbone.transform.mean == about["mean"] and backbone.transform.resize == int(64 / about["crop_pct"])
    whole = timm.create_model("resnet10t", pretrained=False).eval()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    loaded = Timm(name="resnet10t", weights=str(tmp_path / "w.safetensors")).build().eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(whole.get_classifier()(loaded(x)), whole(x))
    with pytest.raises(ValueError, match="timm does not make `resnet19`"):
        Timm(name="resnet19", weights="none").build()


@pytest.fixture
def tiny_clip(tmp_path: Path) -> str:
    """A model of open_clip that is small: its configuration in a folder that open_clip is shown."""
    import json

    from unbraid.compat import declare_operators

    declare_operators()
    import open_clip

    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (tmp_path / "unbraid-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    return "unbraid-tiny"


@needs("open_clip")
def test_open_clip_towers(tiny_clip: str, tmp_path: Path) -> None:
    import open_clip

    whole = open_clip.create_model(tiny_clip).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    pictures = OpenClip(name=tiny_clip, weights=str(tmp_path / "w.pt")).build().eval()
    texts = OpenClipText(name=tiny_clip, weights=str(tmp_path / "w.pt")).build().eval()
    assert (pictures.width, texts.width, pictures.transform.size, pictures.transform.mode) == (12, 12, 16, "RGB")
    assert pictures.transform.mean == tuple(open_clip.OPENAI_DATASET_MEAN)
    x, tokens = torch.randn(2, 3, 16, 16), texts.tokens(["a dog", "a photo of two cats."])
    assert tokens.shape == (2, 77) and texts.padding is None
    with torch.no_grad():
        torch.testing.assert_close(pictures(x), whole.encode_image(x))
        torch.testing.assert_close(texts(tokens), whole.encode_text(tokens))
    assert not any("visual" in name for name, _ in texts.named_parameters())
    assert (
        OpenClipText(name=tiny_clip, weights="none").build(load=False).state_dict().keys() == texts.state_dict().keys()
    )
    with pytest.raises(ValueError, match="open_clip has no model `ViT-Q`"):
        OpenClip(name="ViT-Q", weights="none").build()
    with pytest.raises(ValueError, match="there is no file of weights nowhere.pt"):
        OpenClip(name=tiny_clip, weights="nowhere.pt").build()


@pytest.mark.parametrize("member", [Torchvision(), Timm(), OpenClip(), OpenClipText()])
def test_weights_must_be_chosen(member: Any) -> None:
    if importlib.util.find_spec("open_clip") is None and member.kind == "open_clip":
        pytest.skip("the extra images (open_clip) is not installed")
    with pytest.raises(
        ValueError, match=f'Kind `{member.kind}` needs weights: a file .*download = true.*weights = "none"'
    ):
        member.build()


# ---------------------------------------------------------------------------------------------------------------- files
def test_files_of_weights(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    want = {name: value + 1 for name, value in layer.state_dict().items()}
    torch.save({"state_dict": {f"module.{name}": value for name, value in want.items()}}, tmp_path / "w.pth")
    save_file(want, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        fill(layer, read_weights(str(tmp_path / name), "timm"), name)
        assert all(torch.equal(value, want[key]) for key, value in layer.state_dict().items())
    fill(layer, {**want, "head.bias": torch.zeros(1)}, "w", unused=("head.",))
    with pytest.raises(ValueError, match="head.bias is not in the network"):
        fill(layer, {**want, "head.bias": torch.zeros(1)}, "w")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth should hold names and tensors. Found list"):
        read_weights(str(tmp_path / "list.pth"), "timm")


# ---------------------------------------------------------------------------------------------------------------- given
def test_a_given_module_is_copied_and_checked() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16, 4))
    backbone = Given(module=module, width=4, size=4, mean=(0.2,), std=(0.1, 0.2, 0.3)).build()
    assert backbone.transform == Transform(4, 0, "RGB", (0.2,) * 3, (0.1, 0.2, 0.3))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(backbone(x), module(x))
    before = backbone(x)
    module[1].weight.data.zero_()
    assert torch.equal(backbone(x), before)
    assert Given(module=module, width=4, colour=False).build().transform.mode == "L"
    with pytest.raises(ValueError, match=r"should give \(B, 5\). Found \(2, 4\)"):
        Given(module=module, width=5, size=4).build()(x)
    with pytest.raises(ValueError, match=r"a network given from Python.*Bundle.load"):
        Given().build()
    for wrong in ({"mean": (0.1, 0.2)}, {"std": (0.0,)}, {"colour": False, "std": (1.0, 1.0, 1.0)}):
        with pytest.raises(ValueError, match="`mean` and `std` should hold 1 or"):
            Given(module=module, **wrong)  # type: ignore[arg-type]
