"""Networks of torchvision as backbones of pictures.

Paper: that of the network.  ``name`` is torchvision's (``resnet50``, ``vit_b_16`` ...); pictures are resized, cut and
normalised as torchvision declares for its default weights.  The last linear layer, the classifier, is taken off: the vector
is what it read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from unbraid.backbones.frozen import NONE, fill, read_weights, require_weights
from unbraid.compat import torchvision
from unbraid.types import FORBID, Transform


@dataclass(frozen=True)
class Torchvision:
    """A network of torchvision (extra ``images``).

    Args:
        name: torchvision's name of it.
        frozen: keep it as it came, or train it with the model.
        weights: a file of its tensors (``.pth``, ``.safetensors``), or ``none``: they begin at random.
        download: let torchvision fetch its default weights.
        size: side of the square that it sees; 0: as it was trained.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["torchvision"] = field(default="torchvision", kw_only=True)
    name: str = "resnet18"
    frozen: bool = True
    weights: str = ""
    download: bool = False
    size: int = 0

    def build(self, *, load: bool = True) -> TorchvisionNetwork:
        """The network; ``load``: with its weights.

        Raises:
            ValueError: torchvision has no network of that name, or the weights do not fit it; ImportError: it is missing.
        """
        if load:
            require_weights(self.kind, self.weights, self.download)
        return TorchvisionNetwork(self, load)


class TorchvisionNetwork(nn.Module):
    """The network below its classifier (`unbraid.slots.Backbone`)."""

    def __init__(self, config: Torchvision, load: bool) -> None:
        super().__init__()
        torchvision(f"model.images of kind `{config.kind}`")
        from torchvision import models  # after the import above has made it possible

        try:
            enum = models.get_model_weights(config.name)
        except ValueError as error:
            raise ValueError(f"torchvision has no network `{config.name}`: {error}") from error
        default = cast(Any, enum).DEFAULT
        fetched = default if load and config.download and not config.weights else None
        network = models.get_model(config.name, weights=fetched)
        head = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)][-1]
        self.width, self.reads = cast(Any, network.get_submodule(head)).in_features, "image"
        parent, _, last = head.rpartition(".")
        setattr(network.get_submodule(parent), last, nn.Identity())
        if load and config.weights not in ("", NONE):
            fill(network, read_weights(config.weights, config.kind), config.weights, unused=(f"{head}.",))
        self.network, self.transform = network, _transform(default.transforms(), config.size)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width)."""
        return self.network(pictures)


def _transform(found: Any, size: int) -> Transform:
    """How torchvision's transform sees pictures, at another size in the same proportion."""
    (crop,), (resize,) = found.crop_size, found.resize_size
    side = size or crop
    kind = "bicubic" if "bicubic" in str(found.interpolation).lower() else "bilinear"
    return Transform(side, round(resize * side / crop), "RGB", tuple(found.mean), tuple(found.std), cast(Any, kind))
