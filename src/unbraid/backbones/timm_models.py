"""Networks of timm as backbones of pictures.

Paper: that of the network.  ``name`` is timm's (``resnet50.a1_in1k``, ``vit_small_patch16_224.dino`` ...); pictures are
resized, cut and normalised as timm declares for it.  The vector is what its classifier would read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from unbraid.backbones.frozen import NONE, fill, read_weights, require_weights
from unbraid.compat import declare_operators, optional
from unbraid.types import FORBID, Transform


@dataclass(frozen=True)
class Timm:
    """A network of timm (extra ``images``).

    Args:
        name: timm's name of it.
        frozen: keep it as it came, or train it with the model.
        weights: a file of its tensors (``.pth``, ``.safetensors``), or ``none``: they begin at random.
        download: let timm fetch the weights of that name.
        size: side of the square that it sees; 0: as it was trained.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["timm"] = field(default="timm", kw_only=True)
    name: str = "resnet18"
    frozen: bool = True
    weights: str = ""
    download: bool = False
    size: int = 0

    def build(self, *, load: bool = True) -> TimmNetwork:
        """The network; ``load``: with its weights.

        Raises:
            ValueError: timm has no network of that name, or the weights do not fit it; ImportError: it is missing.
        """
        if ":" in self.name:  # `hf-hub:...`: timm would ask a server how the network is made, whatever `download` says
            raise ValueError(
                f"model.images of kind `timm`: `name` should be one of timm's own, as `timm.list_models()` has them. Found "
                f"`{self.name}`, which is read from elsewhere."
            )
        if load:
            require_weights(self.kind, self.weights, self.download)
        return TimmNetwork(self, load)


class TimmNetwork(nn.Module):
    """The network without its classifier (`unbraid.slots.Backbone`)."""

    def __init__(self, config: Timm, load: bool) -> None:
        super().__init__()
        declare_operators()  # timm imports torchvision
        timm = optional("timm", "images", f"model.images of kind `{config.kind}`")
        fetched = load and config.download and not config.weights
        sized = {"img_size": config.size} if config.size and "vit" in config.name else {}  # others take any size
        try:
            network = timm.create_model(config.name, pretrained=fetched, num_classes=0, **sized)
        except RuntimeError as error:
            raise ValueError(f"timm does not make `{config.name}`: {error}") from error
        about = timm.data.resolve_model_data_config(network)
        if load and config.weights not in ("", NONE):
            head = tuple(f"{name}." for name in _heads(network))
            fill(network, read_weights(config.weights, config.kind), config.weights, unused=head)
        self.network, self.transform = network, _transform(about, config.size)
        self.width, self.reads = network.num_features, "image"
        if hasattr(network, "head_hidden_size"):
            self.width = network.head_hidden_size

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width)."""
        return self.network(pictures)


def _heads(network: Any) -> tuple[str, ...]:
    """Names of the classifier that the network would have."""
    found = network.pretrained_cfg.get("classifier", ())
    return (found,) if isinstance(found, str) else tuple(found)


def _transform(about: dict[str, Any], size: int) -> Transform:
    """How timm sees pictures, at another size in the same proportion."""
    side = size or about["input_size"][-1]
    kind = "bilinear" if about["interpolation"] == "bilinear" else "bicubic"
    return Transform(side, int(side / about["crop_pct"]), "RGB", about["mean"], about["std"], cast(Any, kind))
