"""The two towers of a CLIP model of open_clip: vectors of pictures and vectors of texts in one space.

Paper: "Learning Transferable Visual Models From Natural Language Supervision", Radford et al., ICML 2021,
https://arxiv.org/abs/2103.00020.

Idea: a network for pictures and one for texts are trained so that the vectors of a picture and of its caption point in one
direction. As features each is used alone; with both, ``model.vectors`` of kind ``similarity`` compares them.

How this differs: vectors are given as the towers give them, not scaled to length 1.  Pictures are resized, cut and normalised
as the model's own configuration says.  Texts have open_clip's fixed length, longer ones are cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from unbraid.backbones.frozen import NONE, require_weights
from unbraid.compat import declare_operators, optional
from unbraid.types import FORBID, Transform

BIBTEX = """@inproceedings{radford2021clip,
  title     = {Learning Transferable Visual Models From Natural Language Supervision},
  author    = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and Agarwal, Sandhini
               and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and Krueger, Gretchen
               and Sutskever, Ilya},
  booktitle = {Proceedings of the 38th International Conference on Machine Learning},
  year      = {2021},
}"""


@dataclass(frozen=True)
class OpenClip:
    """The picture tower of a CLIP model (extra ``images``).

    Args:
        name: open_clip's name of the model (``ViT-B-32``, ``RN50`` ...).
        frozen: keep it as it came, or train it with the model.
        weights: a file; with ``download`` one of open_clip's tags (``openai``); ``none``: they begin at random.
        download: let open_clip fetch the weights of that tag.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["open_clip"] = field(default="open_clip", kw_only=True)
    name: str = "ViT-B-32"
    frozen: bool = True
    weights: str = ""
    download: bool = False

    def build(self, *, load: bool = True) -> PictureTower:
        """The tower; ``load``: with its weights.  Raises ValueError or ImportError."""
        return PictureTower(_model(self.name, self.weights, self.download, load, "images"))


@dataclass(frozen=True)
class OpenClipText:
    """The text tower of a CLIP model (extra ``images``).  Arguments as of `OpenClip`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["open_clip"] = field(default="open_clip", kw_only=True)
    name: str = "ViT-B-32"
    frozen: bool = True
    weights: str = ""
    download: bool = False

    def build(self, *, load: bool = True) -> TextTower:
        """The tower; ``load``: with its weights.  Raises ValueError or ImportError."""
        return TextTower(_model(self.name, self.weights, self.download, load, "texts"), self.name)


def _model(name: str, weights: str, download: bool, load: bool, slot: str) -> Any:
    """The whole model of open_clip."""
    what = f"model.{slot} of kind `open_clip`"
    declare_operators()  # open_clip imports torchvision
    open_clip = optional("open_clip", "images", what)
    if load:
        require_weights("open_clip", weights, download)
    if name not in open_clip.list_models():
        raise ValueError(f"{what}: open_clip has no model `{name}`. `open_clip.list_models()` names them.")
    # parts that open_clip asks a server for, even of a model that begins at random
    parts = ("hf_model_name", "hf_tokenizer_name") if slot == "texts" else ("hf_model_name",)
    about = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    fetched = [about[part] for part in parts if about.get(part)]
    if fetched and not download:
        raise ValueError(
            f"{what}: open_clip fetches parts of `{name}` ({', '.join(fetched)}). Allow it with `download = true`, or take a "
            "model that is whole in open_clip, such as `ViT-B-32`."
        )
    if load and not download and weights not in ("", NONE):
        from pathlib import Path

        if not Path(weights).is_file():
            raise ValueError(f"{what}: there is no file of weights {weights}.")
    wanted = weights if load and weights != NONE else None
    return open_clip.create_model(name, pretrained=wanted or ("openai" if load and download else None))


class PictureTower(nn.Module):
    """(B, 3, H, W) -> (B, width) (`unbraid.slots.Backbone`)."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.tower, about = clip.visual, clip.visual.preprocess_cfg
        side = about["size"] if isinstance(about["size"], int) else about["size"][0]
        kind = "bilinear" if about["interpolation"] == "bilinear" else "bicubic"
        self.transform = Transform(side, 0, "RGB", tuple(about["mean"]), tuple(about["std"]), cast(Any, kind))
        self.width, self.reads = clip.visual.output_dim, "image"

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, width)."""
        return self.tower(pictures)


class TextTower(nn.Module):
    """(B, L) tokens -> (B, width) (`unbraid.slots.Backbone`)."""

    padding = None  # all texts have open_clip's length

    def __init__(self, clip: Any, name: str) -> None:
        super().__init__()
        clip.visual = None  # no parameters that nothing trains
        self.clip, self.name, self.reads = clip, name, "text"
        with torch.no_grad():
            self.width = self.forward(self.tokens([""])).shape[1]

    def tokens(self, texts: list[str]) -> Tensor:
        """(n, L) int64."""
        return optional("open_clip", "images", "A text tower").get_tokenizer(self.name)(texts)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, width)."""
        return self.clip.encode_text(tokens)
