"""Small pictures on disk and in tables, and networks small enough to count their passes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from unbraid.backbones.given import Given
from unbraid.backbones.small_conv import SmallConv
from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Split
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Feature, Task

CLASSES = ("red", "green", "blue")


def array(n: int = 0, colour: int = 0, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    """(H, W, 3) bytes: noise with more of one colour."""
    noise = np.random.default_rng(n).integers(0, 90, (*size, 3))
    noise[..., colour] += 120
    return noise.astype(np.uint8)


def as_bytes(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=form, **options)
    return out.getvalue()


def write(path: Path, pixels: np.ndarray | None = None, n: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_bytes(array(n) if pixels is None else pixels))
    return path


def make_rows(folder: Path, rows: int = 30) -> pl.DataFrame:
    """Pictures of three colours in a folder, and their table: half of site b has no label."""
    for n in range(rows):
        write(folder / "pics" / f"{n}.png", array(n, n % 3))
    splits = ["train", "train", "train", "valid", "test"]
    return pl.DataFrame({
        "picture": [f"pics/{n}.png" for n in range(rows)],
        "caption": [CLASSES[n % 3] for n in range(rows)],
        "colour": [None if n % 4 == 3 and n % 5 < 3 else CLASSES[n % 3] for n in range(rows)],
        "site": ["ab"[n % 2] for n in range(rows)],
        "split": [splits[n % 5] for n in range(rows)],
    })  # fmt: skip


def make_data(folder: Path, **changes: Any) -> Data:
    """The declaration of `make_rows` (table ``rows``, in memory)."""
    data = Data(
        rows="rows",
        folder=str(folder),
        domain="site",
        features=(Feature("picture", kind="image"),),
        tasks=(Task("colour", kind="multiclass"),),
        split=Split(kind="column", column="split"),
    )
    return replace(data, **changes)


def make_run(folder: Path, images: Any = None, **changes: Any) -> Run:
    """A small run on `make_rows`."""
    run = Run(
        data=make_data(folder),
        name="pictures",
        model=ModelChoice(
            tower=SharedBottom(bottom=(8,), tower=(8,)), images=images or SmallConv(channels=(8,), width=12, size=8)
        ),
        update=Joint(lr=0.02),
        training=Training(batch_size=6, steps=8, evaluate_every=4, metric="accuracy", checkpoint_seconds=0),
    )
    return replace(run, **changes)


class Counting(nn.Module):
    """A convolution and a normalisation of batches; counts the pictures that it has seen."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.layer, self.norm, self.seen = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), 0

    def forward(self, pictures: Tensor) -> Tensor:
        self.seen += len(pictures)
        return self.norm(self.layer(pictures)).relu().mean((2, 3))


def counting(seed: int = 0, **changes: Any) -> tuple[Given, Counting]:
    """A frozen backbone with statistics of its own, and the module that is given."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Counting()
        module.norm.running_mean = torch.randn(5) * 0.1
        module.norm.running_var = torch.rand(5) + 0.5
    return Given(module=module, **{"width": 5, "size": 8, **changes}), module
