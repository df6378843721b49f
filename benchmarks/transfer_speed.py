"""What do the parts of transfer learning cost?  Ratios of times in one process, so that they hold on any machine.

    python benchmarks/transfer_speed.py [--quick] [--threads 1] [--only feature_cache ...]

| part | above | below |
|---|---|---|
| ``feature_cache`` | the first epoch on pictures with a frozen backbone, which runs on every one | the second epoch |
| ``feature_cache.restart`` | the same | reading the files' hashes and the weights' anew, as another run begins, and an epoch |
| ``mcc_closed_form`` | class confusion of 256 rows and 10,000 classes by its matrix, forward and backward | by its closed form |
| ``mcc_closed_form.memory`` | by how much its process's peak (resident set) grew over its inputs | the same |

Every part returns its ratios and figures; a new part is a function in ``PARTS``.  Times are the process's CPU seconds
(threads that read pictures included); ``NAME.wall`` is by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from unbraid.backbones.efficientnet_lite0 import EfficientNetLite0
from unbraid.bundle import build
from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Split
from unbraid.data.encode import encode
from unbraid.data.features import attach
from unbraid.data.table import Encoded
from unbraid.losses.mcc import class_confusion
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.towers.mlp import SharedBottom
from unbraid.train import losses_of
from unbraid.types import Feature, Task

Figures = dict[str, Any]
BATCH = 32


# -------------------------------------------------------------------------------------------------------- feature cache
def pictures(folder: Path, count: int) -> Run:
    """Photographs-to-be of 256 x 340 pixels as JPEG, and a run on them: EfficientNet-Lite0, frozen, and two small layers.

    Its weights are random: they cost what trained ones cost.
    """
    from PIL import Image

    draw = np.random.default_rng(0)
    for n in range(count):
        coarse = draw.integers(0, 256, (16, 21, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((340, 256), Image.Resampling.BICUBIC).save(folder / f"{n}.jpg", quality=90)
    splits = ["train"] * (count - 8) + ["valid"] * 4 + ["test"] * 4
    names = [f"{n}.jpg" for n in range(count)]
    frame = pl.DataFrame({"picture": names, "label": [str(n % 4) for n in range(count)], "split": splits})
    frame.write_parquet(folder / "rows.parquet")
    data = Data(
        rows="rows.parquet", folder=str(folder), features=(Feature("picture", kind="image"),), cache=str(folder / "cache"),
        tasks=(Task("label", kind="multiclass"),), split=Split(kind="column", column="split"),
    )  # fmt: skip
    tower = SharedBottom(bottom=(64,), tower=(32,))
    return Run(data, model=ModelChoice(tower=tower, images=EfficientNetLite0(weights="none")))


def epoch(model: Model, data: Encoded) -> list[float]:
    """Train on every training row once, in batches; returns the losses."""
    terms, found = [Supervised().bind(data.schema)], []
    step = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for batch in data.in_order(data.split("train"), BATCH):
        loss = torch.stack(list(losses_of(model, batch, terms, 0)[0].values())).sum()
        step.zero_grad()
        loss.backward()
        step.step()
        found.append(loss.item())
    return found


def feature_cache(folder: Path, quick: bool) -> Figures:
    """The first and the second epoch with a frozen backbone, and the first of another run."""
    run = pictures(folder, 64 if quick else 512)
    data = Encoded(encode(run.data))
    model = build(run, data.schema).train()
    epoch(with_vectors(model, data), data)  # imports and first calls of everything but the backbone
    data.readers.clear()
    rows = len(data.split("train"))
    found = {
        "first": timed(lambda: (attach(data, model), epoch(model, data))),
        "second": timed(lambda: epoch(model, data), 5),
        "restart": timed(lambda: (attach(data, model), epoch(model, data)), 3),
    }
    figures = {name: {"seconds": times, "pictures/s": round(rows / times["wall"])} for name, times in found.items()}
    ratios = {"feature_cache": found["first"]["cpu"] / found["second"]["cpu"]}
    ratios["feature_cache.wall"] = found["first"]["wall"] / found["second"]["wall"]
    ratios["feature_cache.restart"] = found["first"]["cpu"] / found["restart"]["cpu"]
    return {"ratios": ratios, "figures": figures}


def with_vectors(model: Model, data: Encoded) -> Model:
    """The model, which is given zeros in the place of all vectors of pictures."""
    data.readers["picture"] = lambda rows: torch.zeros(len(rows), model.vector_widths["picture"])
    return model


# ------------------------------------------------------------------------------------------------------- class confusion
TEMPERATURE = 2.5


def matrix_confusion(logits: torch.Tensor, temperature: float = TEMPERATURE) -> torch.Tensor:
    """Class confusion as the paper writes it, by the (C, C) matrix of all pairs of classes."""
    p = (logits / temperature).softmax(1)
    weight = 1 + torch.exp((p * p.log()).sum(1).detach())
    weight = len(p) * weight / weight.sum()
    pairs = (p * weight[:, None]).T @ p
    pairs = pairs / pairs.sum(1, keepdim=True)
    return (pairs.sum() - pairs.trace()) / len(pairs)


def confusion(closed: bool, rows: int, classes: int, threads: int, repeats: int) -> dict[str, float]:
    """Median seconds of forward and backward of one form, and the growth of this process's peak in MiB."""
    torch.set_num_threads(threads)
    form = class_confusion if closed else matrix_confusion
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    form(logits[:, :4], TEMPERATURE).backward()  # what the first call of anything costs
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(repeats):
        logits.grad, cpu, wall = None, time.process_time(), time.perf_counter()
        form(logits, TEMPERATURE).backward()
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    cpu, wall = (statistics.median(each) for each in zip(*times, strict=True))
    return {"cpu": cpu, "wall": wall, "mib": grown, "loss": float(form(logits.detach(), TEMPERATURE))}


def mcc_closed_form(folder: Path, quick: bool) -> Figures:
    """Both forms, each in a process of its own."""
    rows, classes = (32, 500) if quick else (256, 10_000)
    found = {}
    for name, closed, repeats in (("matrix", False, 3), ("closed", True, 15)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            call = process.submit(confusion, closed, rows, classes, torch.get_num_threads(), repeats)
            found[name] = call.result()
    matrix, closed_form = found["matrix"], found["closed"]
    ratios = {
        "mcc_closed_form": matrix["cpu"] / closed_form["cpu"],
        "mcc_closed_form.wall": matrix["wall"] / closed_form["wall"],
    }
    ratios["mcc_closed_form.memory"] = matrix["mib"] / max(
        closed_form["mib"], 1.0
    )  # pages of a small size may be there
    return {"ratios": ratios, "figures": found}


# -------------------------------------------------------------------------------------------------------------- the rest
def timed(work: Callable[[], Any], rounds: int = 1) -> dict[str, float]:
    """Mean CPU and wall seconds of a round."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        work()
    return {"cpu": (time.process_time() - cpu) / rounds, "wall": (time.perf_counter() - wall) / rounds}


PARTS: dict[str, Callable[[Path, bool], Figures]] = {
    "feature_cache": feature_cache,
    "mcc_closed_form": mcc_closed_form,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small data, a few seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}")
    ratios: dict[str, float] = {}
    figures: dict[str, Any] = {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as scratch:
            found = PARTS[name](Path(scratch), args.quick)
        figures[name], ratios = found["figures"], {**ratios, **found["ratios"]}
        for case, values in found["figures"].items():
            print(f"{name:<20} {case:<12} " + "  ".join(f"{key} {value}" for key, value in values.items()))
        for case, ratio in found["ratios"].items():
            print(f"{case:<33} {ratio:>10.1f}")
        sys.stdout.flush()
    print(json.dumps({"benchmark": "transfer_speed", "ratios": ratios, "figures": figures}))


if __name__ == "__main__":
    main()
