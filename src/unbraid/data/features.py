"""How an encoded table reads pictures and texts for a model, and the cache of what frozen backbones made of them.

A frozen backbone gives the same vector of the same picture every time, so it runs once per distinct picture (or text).  The
vectors lie in a folder named by what made them (a hash of the backbone's build and of all its weights, the transform, the
torch version, the kind of device), in blocks that each hold the hashes of their pictures' bytes.  They are read as memory
maps.  So a changed weight reads nothing of what is there, and a changed picture computes one vector.  A block is written
whole or not at all: an interrupted pass goes on where it was.

`Frozen` gives each vector alone, so a training with the cache and one without are equal bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.backbones.frozen import Frozen, digest
from unbraid.data.contents import DIGEST, Contents
from unbraid.data.fit import Progress, no_progress
from unbraid.data.table import Encoded
from unbraid.store import atomic_folder
from unbraid.types import Transform

BLOCK = 4_096  # vectors of a file: what an interruption can cost
CHUNK = 64  # pictures decoded at once
PIXELS = 2**25  # values of a batch of pictures that nothing trains on: 128 MiB


def attach(
    encoded: Encoded, model: nn.Module, *, cache: Path | None = None, keep: bool = True, augment: Any = None,
    progress: Progress = no_progress, device: str = "cpu",
) -> None:  # fmt: skip
    """Let the table read pictures and texts as the model's backbones want them.

    Args:
        encoded: the table; model: what holds backbones (a model, or what a schedule made of one).
        cache: folder of remembered vectors; None: beside the encoded table.
        keep: remember them for other runs; else they lie in the encoded table's folder and go with it.
        augment: of the run; one with ``reads_pictures`` draws views of pictures, which are then read for every batch,
            although the backbone is frozen.
        progress: is told how far the backbone is; device: where it runs.

    Raises:
        DataError: a picture cannot be read.
    """
    again = getattr(augment, "reads_pictures", False)
    for name, contents in encoded.contents.items():
        backbone = backbone_of(model, contents.feature.kind)
        if backbone is None:
            continue  # the table says so when somebody reads it
        codes = encoded.columns[f"feature.{name}"]
        if isinstance(backbone, Frozen) and not (again and contents.feature.kind == "image"):
            backbone.to(device)
            if keep:
                found = remember(contents, backbone, cache or encoded.folder.parent / "features", progress=progress)
            else:
                found = computed(contents, backbone, encoded.folder / f"{len(encoded.readers)}.features", progress)
            encoded.readers[name] = partial(_remembered, found, codes)
        elif contents.feature.kind == "image":
            encoded.most = min(encoded.most, max(PIXELS // (3 * backbone.transform.size**2), 1))
            encoded.readers[name] = partial(_pictures, contents, codes, backbone.transform)
        else:
            encoded.readers[name] = partial(_tokens, backbone.tokens(contents.names), backbone.padding, codes)
        if contents.feature.kind == "image":
            encoded.transforms[name] = backbone.transform


def backbone_of(model: nn.Module, kind: str) -> Any:
    """The first module that reads features of this kind; None: there is none."""
    return next((module for module in model.modules() if getattr(module, "reads", "") == kind), None)


def _remembered(vectors: Vectors, codes: np.ndarray, rows: np.ndarray) -> Tensor:
    return vectors.of(codes[rows])


def _pictures(contents: Contents, codes: np.ndarray, transform: Transform, rows: np.ndarray) -> Tensor:
    return contents.pictures(codes[rows], transform, rows)


def _tokens(tokens: Tensor, padding: int | None, codes: np.ndarray, rows: np.ndarray) -> Tensor:
    found = tokens[torch.from_numpy(codes[rows].astype(np.int64))]
    return found if padding is None else found[:, : max(int((found != padding).sum(1).max()), 1)]


# ------------------------------------------------------------------------------------------------------------ the cache
class Vectors:
    """Vectors of numbered contents, spread over the blocks of a folder.

    Args:
        blocks: (n, D) memory maps; place: (U,) number of each content's block, and at: (U,) its row there.
    """

    def __init__(self, blocks: Sequence[np.ndarray], place: np.ndarray, at: np.ndarray) -> None:
        self.blocks, self.place, self.at = blocks, place, at

    def of(self, codes: np.ndarray) -> Tensor:
        """(n, D) float32 of (n,) numbers."""
        place, at = self.place[codes], self.at[codes]
        out = np.empty((len(codes), self.blocks[0].shape[1]), dtype=np.float32)
        for block in np.unique(place):
            mine = place == block
            out[mine] = self.blocks[block][at[mine]]
        return torch.from_numpy(out)


def refusal(backbone: nn.Module, transform: Transform | None = None) -> str:
    """Why vectors of this backbone cannot be remembered; empty: they can."""
    if not isinstance(backbone, Frozen):
        return "it is trained, so its vectors change with every step. Set `frozen = true`"
    if transform is not None and transform.random:
        return f"pictures are drawn anew every time (augment `{transform.augment}`), so no vector is used twice"
    if awake := [type(part).__name__ for part in backbone.inner.modules() if part.training]:
        return f"it is in training mode ({awake[0]}), where dropout and BatchNorm depend on the batch. Call `eval()`"
    return ""


def remember(
    contents: Contents, backbone: nn.Module, folder: Path, *, transform: Transform | None = None, progress: Progress = no_progress
) -> Vectors:  # fmt: skip
    """The vectors of all contents; those that the folder does not hold yet are computed and added.

    Args:
        contents: pictures or texts; backbone: a `Frozen` one; folder: of the cache; transform: instead of the backbone's.

    Raises:
        ValueError: the vectors cannot be remembered (`refusal`); DataError: a picture cannot be read.
    """
    transform = transform or getattr(backbone, "transform", None)
    if why := refusal(backbone, transform):
        raise ValueError(
            f"Vectors of `{contents.feature.name}` cannot be remembered: the backbone's cache is refused because {why}."
        )
    assert isinstance(backbone, Frozen)
    home = folder / _name(backbone, transform)
    digests = contents.digests()
    known = _known(home)
    new = [code for code, name in enumerate(digests) if name not in known]
    new = list({digests[code]: code for code in reversed(new)}.values())[::-1]  # one of each
    what = f"backbone on {contents.feature.name}"
    for at in range(0, len(new), BLOCK):
        part = new[at : at + BLOCK]
        vectors = np.empty((len(part), backbone.width), dtype=np.float32)
        _compute(contents, backbone, part, transform, vectors, partial(_told, progress, what, at, len(new)))
        _write(home, [digests[code] for code in part], vectors)
    return _mapped(home, digests, backbone.width)


def _told(progress: Progress, what: str, before: int, total: int, done: int) -> None:
    progress(what, before + done, total)


def _name(backbone: Frozen, transform: Transform | None) -> str:
    """What made the vectors, in one name."""
    where = next((part.device.type for part in backbone.inner.state_dict().values()), "cpu")
    text = f"{digest(backbone.inner)} {transform} {torch.__version__} {where}"
    return hashlib.blake2b(text.encode(), digest_size=DIGEST).hexdigest()


def computed(contents: Contents, backbone: Frozen, file: Path, progress: Progress = no_progress) -> Vectors:
    """The vectors of all contents, in a file of their own, and nothing remembered.  Raises DataError as `remember`."""
    shape = (len(contents), backbone.width)
    out = np.memmap(file, dtype=np.float32, mode="w+", shape=shape) if len(contents) else np.zeros(shape, np.float32)
    told = partial(_told, progress, f"backbone on {contents.feature.name}", 0, len(contents))
    _compute(contents, backbone, range(len(contents)), backbone.transform, out, told)
    return Vectors([out], np.zeros(len(contents), np.int64), np.arange(len(contents)))


def _compute(
    contents: Contents, backbone: Frozen, codes: Sequence[int], transform: Transform | None, out: np.ndarray,
    done: Callable[[int], None],
) -> None:  # fmt: skip
    """Write the vectors of the contents of these numbers into ``out``, (n, D) float32."""
    device = next((part.device for part in backbone.inner.state_dict().values()), torch.device("cpu"))
    for at in range(0, len(codes), CHUNK):
        done(at)
        part = np.asarray(codes[at : at + CHUNK])
        if transform is not None:
            read = contents.pictures(part, transform)
        else:
            read = backbone.tokens([contents.names[code] for code in part])
        out[at : at + CHUNK] = backbone(read.to(device)).float().cpu().numpy()
    done(len(codes))


def _write(home: Path, digests: Sequence[bytes], vectors: np.ndarray) -> None:
    """Add a block, whole or not at all."""
    names = b"".join(digests)
    block = home / hashlib.blake2b(names, digest_size=DIGEST).hexdigest()
    with (
        contextlib.suppress(FileExistsError),
        atomic_folder(block) as temporary,
    ):  # another process may have been faster
        (temporary / "names.bin").write_bytes(names)
        vectors.tofile(temporary / "vectors.bin")


def _blocks(home: Path) -> Iterator[tuple[Path, list[bytes]]]:
    """Folder and hashes of every block, in an order that stays."""
    for path in sorted(home.glob("*/names.bin")):
        if not path.parent.name.startswith("."):  # of a process that died while it wrote
            names = path.read_bytes()
            yield path.parent, [names[at : at + DIGEST] for at in range(0, len(names), DIGEST)]


def _known(home: Path) -> set[bytes]:
    return {name for _, names in _blocks(home) for name in names}


def _mapped(home: Path, digests: Sequence[bytes], width: int) -> Vectors:
    """The blocks that hold some of the hashes, and where each is."""
    found: dict[bytes, tuple[int, int]] = {}
    maps: list[np.ndarray] = []
    wanted = set(digests)
    for path, names in _blocks(home):
        mine = {name: (len(maps), row) for row, name in enumerate(names) if name in wanted}
        if mine:
            maps.append(np.memmap(path / "vectors.bin", dtype=np.float32, mode="r", shape=(len(names), width)))
            found |= mine
    places = np.array([found[name] for name in digests], dtype=np.int64).reshape(-1, 2)
    return Vectors(maps or [np.zeros((0, width), np.float32)], places[:, 0], places[:, 1])
