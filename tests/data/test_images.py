"""Bytes to numbers: modes, sizes, damage, and random changes that are functions of (seed, step, row)."""

from __future__ import annotations

import importlib.util
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from picturekit import array, as_bytes

from unbraid import compat
from unbraid.data import images
from unbraid.data.images import CHANGES, SIGNED, changed, looked_at, opened, pixels, randaugment, strength
from unbraid.data.source import DataError
from unbraid.types import Transform

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
no_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="the extra images (torchvision) is not installed"
)
SHAPES = [(20, 24), (24, 20), (33, 33), (17, 50), (200, 300)]


def image(shape: tuple[int, int] = (20, 24), mode: str = "RGB") -> Any:
    return Image.fromarray(array(3, 1, shape)).convert(mode)


@no_torchvision
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "resize"), [(16, 0), (16, 20), (15, 18)])
@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_evaluation_is_torchvisions_resize_centre_crop_and_normalise(
    shape: tuple[int, int], size: int, resize: int, kind: Any
) -> None:
    compat.torchvision()
    from torchvision.transforms import v2

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    theirs = v2.Compose([
        v2.Resize(resize or size, interpolation=v2.InterpolationMode(kind)), v2.CenterCrop(size), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std),
    ])  # fmt: skip
    ours = pixels(image(shape), Transform(size, resize, "RGB", mean, std, kind))
    assert ours.dtype == np.float32 and ours.shape == (3, size, size)
    torch.testing.assert_close(torch.from_numpy(ours), theirs(image(shape)), rtol=1e-6, atol=1e-6)


def test_a_grey_picture_has_one_channel() -> None:
    transform = Transform(16, 0, "L", (0.5,), (0.25,))
    raw = as_bytes(np.full((16, 16), 255, np.uint8))
    assert (pixels(opened(raw, "", "L"), transform) == 2.0).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "LA", "YCbCr"])
@pytest.mark.parametrize("wanted", ["RGB", "L"])
def test_other_modes_are_converted(mode: str, wanted: str) -> None:
    form = {"CMYK": "JPEG", "YCbCr": "TIFF"}.get(mode, "PNG")
    out = io.BytesIO()
    image(mode="RGB" if mode not in ("LA",) else "L").convert(mode).save(out, format=form)
    found = opened(out.getvalue(), "a picture", wanted)
    assert found.mode == wanted and found.size == (24, 20)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    found = np.asarray(opened(as_bytes(values), "a picture", "L"))
    assert found.tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_picture_is_an_error_that_names_it(form: str, share: float) -> None:
    raw = as_bytes(array(size=(64, 64)), form)
    with pytest.raises(DataError, match=r"pics/7.png \([\d,]+ bytes\) is not a whole picture"):
        opened(raw[: int(len(raw) * share)], "pics/7.png", "RGB")


def test_what_is_no_picture_is_an_error() -> None:
    with pytest.raises(DataError, match="note.txt"):
        opened(b"hello", "note.txt", "RGB")


def test_sizes_and_modes_are_looked_at_without_decoding() -> None:
    raw = [as_bytes(array(size=(30 + n, 40))) for n in range(5)] + [as_bytes(array()[..., 0])]
    found = looked_at(raw, images.Path())
    assert found == {"sides": (20, 34), "side": 32, "modes": ["L", "RGB"]}
    assert looked_at([], images.Path())["side"] is None


# ------------------------------------------------------------------------------------------------------ random changes
def draw(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


WEAK = Transform(16, 20, augment="weak")
ANY = pytest.mark.parametrize("augment", ["weak", pytest.param("strong", marks=no_torchvision)])


@ANY
@pytest.mark.parametrize("shape", SHAPES)
def test_a_random_view_is_a_function_of_what_it_draws_from(augment: Any, shape: tuple[int, int]) -> None:
    transform = Transform(16, 16, augment=augment)
    views = [pixels(image(shape), transform, draw(1, 2, 3)) for _ in range(2)]
    assert np.array_equal(*views) and views[0].shape == (3, 16, 16) and views[0].dtype == np.float32
    others = [pixels(image(shape), transform, draw(1, 2, n)) for n in range(12)]
    assert len({other.tobytes() for other in others}) > 6


@ANY
def test_random_views_touch_no_global_generator(augment: Any) -> None:
    transform, before = Transform(16, 20, augment=augment), torch.get_rng_state()
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    for n in range(20):
        pixels(image(), transform, draw(n))
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(state, np.random.get_state()[1])  # type: ignore[index]


@ANY
def test_the_order_of_threads_does_not_matter(augment: Any) -> None:
    transform = Transform(16, 20, augment=augment)
    one = [pixels(image(), transform, draw(n)) for n in range(24)]
    with ThreadPoolExecutor(6) as pool:
        many = list(pool.map(lambda n: pixels(image(), transform, draw(n)), reversed(range(24))))
    assert all(np.array_equal(a, b) for a, b in zip(one, reversed(many), strict=True))


def test_a_weak_view_is_a_crop_of_the_resized_picture_and_may_be_mirrored() -> None:
    whole = np.asarray(images._resized(image((40, 40)), 20, "bicubic"), np.float32)
    found, mirrored = set(), 0
    for n in range(200):
        view = pixels(image((40, 40)), Transform(16, 20, mean=(0.0,) * 3, std=(1.0,) * 3, augment="weak"), draw(n))
        view = np.rint(view.transpose(1, 2, 0) * 255)
        places = {(y, x, flip): whole[y : y + 16, x : x + 16][:, :: -1 if flip else 1] for y in range(5) for x in range(5)
                  for flip in (False, True)}  # fmt: skip
        (place,) = [key for key, value in places.items() if np.array_equal(value, view)]
        found.add(place[:2])
        mirrored += place[2]
    assert len(found) == 25 and 70 < mirrored < 130


def test_without_flip_no_view_is_mirrored() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1)))
    transform = Transform(20, 24, "L", (0.0,), (1.0,), augment="weak", flip=False)
    for n in range(40):
        assert (np.diff(pixels(ramp, transform, draw(n)), axis=2) > 0).all()


def test_a_picture_without_a_margin_is_padded_by_reflection() -> None:
    transform = Transform(16, 0, "L", (0.0,), (1.0,), augment="weak", flip=False)
    grey = Image.fromarray(array(size=(16, 16))[..., 0])
    padded = np.pad(np.asarray(grey), 2, mode="reflect")
    views = {np.rint(pixels(grey, transform, draw(n)) * 255).astype(np.uint8).tobytes() for n in range(300)}
    crops = {padded[y : y + 16, x : x + 16].tobytes() for y in range(5) for x in range(5)}
    assert views == crops


@no_torchvision
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_change_is_torchvisions(name: str, magnitude: int, mode: str) -> None:
    compat.torchvision()
    from torchvision.transforms import v2

    theirs = v2.RandAugment()
    picture = image((40, 56), mode)
    magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
    values = magnitudes(31, 40, 56)
    assert signed == (name in SIGNED)
    for sign in (1.0, -1.0) if signed else (1.0,):
        value = 0.0 if values is None else sign * float(values[magnitude])
        ours = sign * strength(name, magnitude / 30, picture.size)
        if values is not None:
            assert ours == pytest.approx(value, abs=1e-5)
        want = theirs._apply_image_or_video_transform(picture, name, value, theirs.interpolation, theirs._fill)
        found = np.asarray(changed(picture, name, ours)).astype(int)
        assert np.abs(found - np.asarray(want)).max() <= (1 if name in ("Brightness", "Contrast") else 0)


@no_torchvision
def test_randaugment_draws_operations_and_signs_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []
    monkeypatch.setattr(images, "changed", lambda picture, name, value: asked.append((name, value)) or picture)
    generator = draw(0)
    for _ in range(3000):
        randaugment(image(), generator)
    names = [name for name, _ in asked]
    assert len(asked) == 6000 and set(names) == set(CHANGES)
    assert all(330 < names.count(name) < 530 for name in CHANGES)  # 429 expected
    negative = [value < 0 for name, value in asked if name in SIGNED]
    assert 0.45 < np.mean(negative) < 0.55 and not any(value < 0 for name, value in asked if name not in SIGNED)
