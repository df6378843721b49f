"""Any ``nn.Module`` as a backbone of pictures, given from Python.

    model = ModelChoice(images=Given(module=my_network, width=512, size=224))

Paper: none.  A run file cannot hold a module: a run's file says how the module sees pictures, and a bundle of such a run is
loaded with the module again, ``Bundle.load(folder, images=my_network)``, which then gets the weights of the bundle.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from unbraid.layers import require_positive
from unbraid.types import FORBID, Transform


@dataclass(frozen=True)
class Given:
    """A module that gives (B, ``width``) of (B, C, ``size``, ``size``).

    Args:
        module: the network; a copy of it is used.
        width: D of what it gives.
        frozen: keep it as it is, in evaluation mode, or train it with the model.
        size, resize, colour, mean, std, interpolation: how it sees pictures, as in `unbraid.types.Transform`; ``resize`` 0 is
            ``size``; ``mean`` and ``std`` hold one number per channel, or one for all.

    Raises:
        ValueError: a size is not positive, or ``mean`` and ``std`` fit no channels.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["module"] = field(default="module", kw_only=True)
    module: Any = None
    width: int = 512
    frozen: bool = True
    size: int = 224
    resize: int = 0
    colour: bool = True
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        require_positive(width=self.width, size=self.size)
        channels = 3 if self.colour else 1
        if not {len(self.mean), len(self.std)} <= {1, channels} or min(self.std, default=0) <= 0:
            raise ValueError(
                f"`mean` and `std` should hold 1 or {channels} numbers, `std` positive ones. Found {self.mean}, {self.std}."
            )

    def build(self, *, load: bool = True) -> GivenNetwork:
        """The module with what it reads.  Raises ValueError when there is none."""
        if not isinstance(self.module, nn.Module):
            raise ValueError(
                "model.images of kind `module` is a network given from Python, which a run file does not hold: "
                "`Given(module=...)` in a run, `Bundle.load(folder, images=...)` for a bundle."
            )
        return GivenNetwork(self)


class GivenNetwork(nn.Module):
    """A copy of the module (`unbraid.slots.Backbone`)."""

    def __init__(self, config: Given) -> None:
        super().__init__()
        channels = 3 if config.colour else 1
        mean, std = (part * channels if len(part) == 1 else part for part in (config.mean, config.std))
        self.width, self.reads = config.width, "image"
        self.transform = Transform(
            config.size, config.resize, "RGB" if config.colour else "L", mean, std, config.interpolation
        )
        self.network = copy.deepcopy(config.module)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, width).  Raises ValueError when the module gives another shape."""
        found = self.network(pictures)
        if found.shape != (len(pictures), self.width):
            raise ValueError(f"The module of `model.images` should give (B, {self.width}). Found {tuple(found.shape)}.")
        return found
