"""Pictures: from bytes to the numbers that a backbone reads, plain or randomly changed.

What a random change draws is a function of (seed, step, row), by a generator of its own: the global one belongs to the
training thread, and pictures are read ahead in others.  A run that is resumed, or that reads with more threads, sees the same
pixels.

RandAugment ("RandAugment: Practical automated data augmentation with a reduced search space", Cubuk, Zoph, Shlens, Le, NeurIPS
2020, https://arxiv.org/abs/1909.13719): of fourteen changes ``ops`` are drawn, with replacement, and applied one after another,
each as strong as ``magnitude`` says.  Operations and strengths are those of ``torchvision.transforms.v2.RandAugment``,
whose own class draws from the global generator.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.compat import optional, torchvision
from unbraid.data.source import DataError
from unbraid.types import Transform

OPS, MAGNITUDE, BINS = 2, 9, 31  # torchvision's defaults of RandAugment
LOOK = 24  # pictures whose size is looked at
PAD = 8  # a weak view that has no margin to cut from is padded by its side / 8, as 4 of 32 pixels of CIFAR


def pillow() -> Any:
    """Pillow's ``Image``.  Raises ImportError with a hint."""
    return optional("PIL.Image", "lite", "Reading pictures")


def opened(raw: bytes, name: str, mode: str) -> Any:
    """A picture, decoded and converted.

    Args:
        raw: the file's bytes; name: what to call it in a message; mode: ``RGB`` or ``L``.

    Raises:
        DataError: the bytes are no picture, or only the beginning of one.
    """
    image = pillow()
    try:
        with image.open(io.BytesIO(raw)) as found:
            found.load()
            if (
                found.mode.startswith("I") and found.mode != "I"
            ):  # 16 bits, of which a conversion would clip all above 255
                found = image.fromarray((np.asarray(found).astype(np.uint32) >> 8).astype(np.uint8))
            return found.convert(mode)
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        why = "its format is not known" if isinstance(error, image.UnidentifiedImageError) else error
        raise DataError(
            f"{name} ({len(raw):,} bytes) is not a whole picture: {why}. Replace it, or leave its rows out with `data.keep`."
        ) from error


def looked_at(pictures: Sequence[Any], root: Path) -> dict[str, Any]:
    """The least and greatest shorter side (``sides``), their median (``side``) and the modes of some pictures, without
    decoding them.

    Args:
        pictures: paths, relative to ``root``, or bytes.

    Raises:
        DataError: one is no picture.
    """
    sides: list[int] = []
    modes: set[str] = set()
    for value in pictures[:: max(len(pictures) // LOOK, 1)]:
        try:
            with pillow().open(io.BytesIO(value) if isinstance(value, bytes) else root / value) as image:
                sides.append(min(image.size))
                modes.add(image.mode)
        except OSError as error:
            raise DataError(f"{value if isinstance(value, str) else 'A picture'} is no picture: {error}.") from error
    sides.sort()
    ends = (sides[0], sides[-1]) if sides else (None, None)
    return {"sides": ends, "side": sides[len(sides) // 2] if sides else None, "modes": sorted(modes)}


def not_pictures(paths: Sequence[Path]) -> list[int]:
    """Places of the files that are no pictures by their first bytes.  One that is cut short further on passes."""
    places = []
    for place, path in enumerate(paths):
        try:
            with pillow().open(path):
                pass
        except OSError:
            places.append(place)
    return places


def pixels(image: Any, transform: Transform, draw: np.random.Generator | None = None) -> np.ndarray:
    """(C, size, size) float32, normalised.

    Args:
        image: of Pillow, in the transform's mode; draw: what a random transform draws from.
    """
    size = transform.size
    image = _resized(image, transform.resize or size, transform.interpolation)
    if draw is not None and transform.random:
        image = _weak(image, size, transform.flip, draw)
        image = randaugment(image, draw) if transform.augment == "strong" else image
    else:
        image = _cut(image, size, lambda room: int(round(room / 2)))
    values = np.asarray(image, dtype=np.float32).reshape(size, size, -1).transpose(2, 0, 1) / np.float32(255)
    mean, std = (np.asarray(part, dtype=np.float32)[:, None, None] for part in (transform.mean, transform.std))
    return (values - mean) / std


def _resized(image: Any, side: int, interpolation: str) -> Any:
    """The shorter side of that many pixels, the longer one in proportion, rounded down."""
    width, height = image.size
    if min(width, height) == side:
        return image
    longer = side * max(width, height) // min(width, height)
    new = (side, longer) if width <= height else (longer, side)
    filters = pillow().Resampling
    return image.resize(new, filters.BICUBIC if interpolation == "bicubic" else filters.BILINEAR)


def _cut(image: Any, size: int, place: Callable[[int], int]) -> Any:
    """A square, whose corner ``place`` chooses given how much room there is."""
    left, top = (place(side - size) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _weak(image: Any, size: int, flip: bool, draw: np.random.Generator) -> Any:
    """A random square and, half of the time, its mirror image."""
    if min(image.size) == size:
        array, pad = np.asarray(image), max(size // PAD, 1)
        edges = [(pad, pad), (pad, pad), *[(0, 0)] * (array.ndim - 2)]
        image = pillow().fromarray(np.pad(array, edges, mode="reflect" if size > pad else "edge"))
    image = _cut(image, size, lambda room: int(draw.integers(room + 1)))
    return image.transpose(pillow().Transpose.FLIP_LEFT_RIGHT) if flip and draw.random() < 0.5 else image


# ----------------------------------------------------------------------------------------------------------- RandAugment
def randaugment(image: Any, draw: np.random.Generator, ops: int = OPS, magnitude: int = MAGNITUDE) -> Any:
    """A picture after ``ops`` random changes of strength ``magnitude`` (of 0 to 30)."""
    share = magnitude / (BINS - 1)
    for _ in range(ops):
        name = CHANGES[int(draw.integers(len(CHANGES)))]
        sign = -1.0 if name in SIGNED and draw.random() <= 0.5 else 1.0
        image = changed(image, name, sign * strength(name, share, image.size))
    return image


SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
CHANGES = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")


def strength(name: str, share: float, size: tuple[int, int]) -> float:
    """How strong a change of that name is, in its own unit, at ``share`` of its range; size: (width, height)."""
    if name in ("TranslateX", "TranslateY"):
        return share * 150.0 / 331.0 * size[name == "TranslateY"]
    if name == "Posterize":
        return float(round(8 - 4 * share))
    most = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0, "Solarize": 1.0}
    found = share * most.get(name, 0.9)
    return 1.0 - found if name == "Solarize" else found


def changed(image: Any, name: str, value: float) -> Any:
    """One change of that strength."""
    torchvision("RandAugment")
    functional = optional("torchvision.transforms.v2.functional", "images", "RandAugment")
    tilt, shift = math.degrees(math.atan(value)), int(value)
    affine = {"ShearX": ([0, 0], [tilt, 0.0], [0, 0]), "ShearY": ([0, 0], [0.0, tilt], [0, 0]),
              "TranslateX": ([shift, 0], [0.0, 0.0], None), "TranslateY": ([0, shift], [0.0, 0.0], None)}  # fmt: skip
    if name in affine:
        translate, shear, center = affine[name]
        return functional.affine(image, angle=0.0, translate=translate, scale=1.0, shear=shear, center=center)
    factors = {"Brightness": functional.adjust_brightness, "Color": functional.adjust_saturation,
               "Contrast": functional.adjust_contrast, "Sharpness": functional.adjust_sharpness}  # fmt: skip
    if name in factors:
        return factors[name](image, 1.0 + value)
    others: dict[str, Callable[[], Any]] = {
        "Identity": lambda: image, "Rotate": lambda: functional.rotate(image, value),
        "Posterize": lambda: functional.posterize(image, int(value)),
        "Solarize": lambda: functional.solarize(image, 255.0 * value),
        "AutoContrast": lambda: functional.autocontrast(image), "Equalize": lambda: functional.equalize(image),
    }  # fmt: skip
    return others[name]()
