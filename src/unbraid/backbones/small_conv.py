"""A small convolutional network that is trained from scratch: for digits, icons and other small pictures.

Paper: none.  Each stage is a 3x3 convolution, a normalisation over groups of channels ("Group Normalization", Wu, He, ECCV 2018,
https://arxiv.org/abs/1803.08494, in the place of batches, so that rows do not see each other), ReLU and a mean over 2x2 places;
then a linear layer and ReLU on all places that are left.  It needs no extra but Pillow, which reads the pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from unbraid.layers import require_positive
from unbraid.types import FORBID, Transform

GROUPS = 8


@dataclass(frozen=True)
class SmallConv:
    """A small network from scratch.

    Args:
        channels: of each stage, multiples of 8; every stage halves the side.
        width: of the vector.
        size: side of the square that it sees.
        colour: three channels instead of one of grey.

    Raises:
        ValueError: a size is not positive, channels are no multiples of 8, or there are more stages than the side can be halved.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["small_conv"] = field(default="small_conv", kw_only=True)
    channels: tuple[int, ...] = (32, 64)
    width: int = 128
    size: int = 28
    colour: bool = True

    def __post_init__(self) -> None:
        require_positive(channels=self.channels, width=self.width, size=self.size)
        if any(count % GROUPS for count in self.channels):
            raise ValueError(f"Parameter `channels` should hold multiples of {GROUPS}. Found {list(self.channels)}.")
        if self.size >> len(self.channels) < 1:
            raise ValueError(f"{len(self.channels)} stages halve a side of {self.size} to nothing. Leave some out.")

    @property
    def frozen(self) -> bool:
        """It is trained: what it begins with means nothing."""
        return False

    def build(self, *, load: bool = True) -> SmallNetwork:
        """The network; there are no weights to load."""
        return SmallNetwork(self)


class SmallNetwork(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: SmallConv) -> None:
        super().__init__()
        before = 3 if config.colour else 1
        half = (0.5,) * before
        self.width, self.reads = config.width, "image"
        self.transform = Transform(config.size, 0, "RGB" if config.colour else "L", half, half, flip=False)
        layers: list[nn.Module] = []
        for after in config.channels:
            convolution = nn.Conv2d(before, after, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            layers += [convolution, nn.GroupNorm(GROUPS, after), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
            before = after
        places = (config.size >> len(config.channels)) ** 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * places, config.width), nn.ReLU())

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, C, size, size) -> (B, width)."""
        return self.layers(pictures)
