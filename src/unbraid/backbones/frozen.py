"""What all backbones share: keeping one as it came, naming its weights by a hash, reading them from a file.

A *frozen* backbone is a constant of the model, not a part of its state: it has no parameters that an optimiser, a weight
average or a checkpoint would find, copies of the model share it, and a bundle writes it once, whole, so that it loads without
the package or the file that it came from.  It is always in evaluation mode, and its vectors never depend on what else is in a
batch: on a CPU it reads one picture (or text) at a time, which is as fast as reading many (a picture's activations then stay in
the processor's caches) and gives the same bits; elsewhere pictures in groups of a fixed size, padded with zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

GROUP = 32  # pictures at once on a GPU
NONE = "none"  # `weights` that begin at random


class Frozen(nn.Module):
    """A backbone that stays as it is (`unbraid.slots.Backbone`)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        for parameter in inner.parameters():
            parameter.requires_grad_(False)
        self.__dict__["inner"] = inner.eval()  # no submodule: see the module's docstring
        self.width, self.reads = cast(int, inner.width), cast(str, inner.reads)

    @property
    def inner(self) -> Any:
        """The backbone itself."""
        return self.__dict__["inner"]

    @property
    def transform(self) -> Any:
        """How it sees pictures; None: it reads texts."""
        return getattr(self.inner, "transform", None)

    @property
    def padding(self) -> int | None:
        """The token that fills texts up to one length; None: all have one."""
        return self.inner.padding

    def tokens(self, texts: list[str]) -> Tensor:
        """(n, L) int64, as the backbone's."""
        return self.inner.tokens(texts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        self.inner._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return Frozen(self.inner)

    @torch.no_grad()
    def forward(self, values: Tensor) -> Tensor:
        """(B, D) vectors of (B, C, H, W) pictures or (B, L) tokens."""
        if not len(values):
            return torch.zeros(0, self.width, device=values.device)
        if self.reads == "text":
            return torch.cat([self.inner(self._alone(row)[None]) for row in values])
        if values.device.type == "cpu":
            return torch.cat([self.inner(one[None]) for one in values])
        return torch.cat([self._group(part) for part in values.split(GROUP)])

    def _alone(self, row: Tensor) -> Tensor:
        """(L',) a text without what pads it to the length of others, so that its vector depends on nothing else."""
        padding = self.inner.padding
        return row if padding is None else row[: max(int((row != padding).sum()), 1)]

    def _group(self, part: Tensor) -> Tensor:
        whole = torch.cat([part, part.new_zeros(GROUP - len(part), *part.shape[1:])])
        return self.inner(whole)[: len(part)]


def digest(module: nn.Module) -> str:
    """Names a module: a hash of how it is built, and of every weight and buffer."""
    state = hashlib.blake2b(repr(module).encode(), digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


# -------------------------------------------------------------------------------------------------------------- weights
def located(model: Any, base: Path) -> Any:
    """A run's choice of a model, with the files of its backbones' weights absolute."""
    for slot in ("images", "texts"):
        choice = getattr(model, slot)
        path = getattr(choice, "weights", "")
        if path not in ("", NONE) and not getattr(choice, "download", False):
            model = replace(model, **{slot: replace(choice, weights=str((base / path).resolve()))})
    return model


def read_weights(path: str, kind: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of one that ``torch.save`` wrote and that holds nothing but tensors.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"model.images or model.texts, kind `{kind}`: there is no file of weights {path}.")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} holds no plain tensors: {error}") from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} should hold names and tensors. Found {type(found).__name__}.")
    return {name.removeprefix("module."): value for name, value in found.items()}


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: str, unused: tuple[str, ...] = ()) -> None:
    """Load weights; those whose names begin with one of ``unused`` belong to a head that is not there.

    Raises:
        ValueError: names or shapes are not those of the module: the first ones.
    """
    kept = {name: value for name, value in weights.items() if not name.startswith(unused or ("\0",))}
    want = module.state_dict()
    wrong = [f"{name} is missing" for name in want if name not in kept]
    wrong += [f"{name} is not in the network" for name in kept if name not in want]
    wrong += [
        f"{name} is {tuple(kept[name].shape)}, not {tuple(want[name].shape)}"
        for name in want
        if name in kept and kept[name].shape != want[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{source} does not fit the network: {'; '.join(wrong[:3])}{more}.")
    module.load_state_dict(kept)


def require_weights(kind: str, weights: str, download: bool) -> None:
    """Raise ValueError unless it is said where the weights come from."""
    if not weights and not download:
        raise ValueError(
            f'Kind `{kind}` needs weights: a file (weights = "PATH"), the library\'s own (download = true, which fetches them), '
            f'or none (weights = "{NONE}"), to begin at random.'
        )
