"""Adapting a classifier of digits to turned digits without their labels: class confusion, entropy, and nothing.

Two settings.  `loop` is a plain loop with the loss in it, whose table is in docs/methods/mcc.md: an MLP 64-256-64-10 with batch
normalisation over labelled and unlabelled rows together, SGD with Nesterov momentum, batches of 36 + 36, and the accuracy on the
unlabelled rows themselves.  `a_run` is a whole run: withheld labels, a mix of 36 + 36 rows, Adam, and test rows of the target.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Split
from unbraid.data.mix import Mix
from unbraid.job import train
from unbraid.losses.entropy import Entropy
from unbraid.losses.mcc import MCC, class_confusion
from unbraid.losses.supervised import Supervised
from unbraid.losses.unlabelled import row_entropy
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Feature, Task

pytestmark = pytest.mark.slow
SOURCE = 900


def digits(seed: int, angle: float, few: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Upright digits and their labels, and other ones, turned and noisy; ``few``: of the latter only 0 to 4."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    source, target = order[:SOURCE], order[SOURCE:]
    target = target[y[target] < 5] if few else target
    turned = rotate((x[target] / 16).reshape(-1, 8, 8), angle, axes=(1, 2), reshape=False, order=1).reshape(-1, 64)
    return x[source] / 16, y[source], np.clip(turned + rng.normal(0, 0.1, turned.shape), 0, 1), y[target]


def loop(seed: int, loss_of: Any, angle: float, few: bool = False) -> float:
    """Accuracy in per cent on the target, after 400 steps of cross-entropy on the source and ``loss_of`` the target's logits."""
    parts = digits(seed, angle, few)
    xs, xt = (torch.tensor(part, dtype=torch.float32) for part in (parts[0], parts[2]))
    ys, yt = (torch.tensor(part) for part in (parts[1], parts[3]))
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)
    )
    step = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(400):
        here, there = (torch.randint(len(x), (36,), generator=draw) for x in (xs, xt))
        z = net(torch.cat([xs[here], xt[there]]))
        loss = F.cross_entropy(z[:36], ys[here]) + (0.0 if loss_of is None else loss_of(z[36:]))
        step.zero_grad()
        loss.backward()
        step.step()
    net.eval()
    with torch.no_grad():
        return 100 * float((net(xt).argmax(1) == yt).float().mean())


def sure(logits: Tensor) -> Tensor:
    return row_entropy(logits.log_softmax(1)).mean()


def a_run(losses: tuple[Any, ...], seed: int) -> Run:
    data = Data(
        rows="log", domain="site", features=(Feature("pixels", kind="vector"),), tasks=(Task("digit", kind="multiclass"),),
        split=Split(kind="column", column="part"), withhold="site = 'turned'",
    )  # fmt: skip
    training = Training(
        batch_size=36, steps=400, evaluate_every=400, metric="accuracy", mix=Mix(unlabelled=36), checkpoint_seconds=0
    )
    model = ModelChoice(tower=SharedBottom(bottom=(256, 64), tower=()))
    return Run(
        data=data, model=model, losses=(Supervised(), *losses), update=Joint(lr=0.001), training=training, seed=seed
    )


def in_a_run(losses: tuple[Any, ...], seed: int, angle: float) -> float:
    """Accuracy in per cent on test rows of the target (the test split has no others)."""
    xs, ys, xt, yt = digits(seed, angle, few=False)
    n = len(xt)
    part = ["train"] * 750 + ["valid"] * 150 + ["train"] * int(0.55 * n) + ["valid"] * int(0.15 * n)
    log = pl.DataFrame({
        "site": ["upright"] * SOURCE + ["turned"] * n,
        "pixels": np.concatenate([xs, xt]).astype(np.float32).tolist(),
        "digit": np.concatenate([ys, yt]).astype(str),
        "part": part + ["test"] * (SOURCE + n - len(part)),
    })  # fmt: skip
    found = train(a_run(losses, seed), tables={"log": log}, baseline=False).metrics["test"]["digit"]
    return 100 * found["accuracy"]["value"]


@pytest.mark.parametrize(
    ("angle", "few", "temperature", "gain"),
    [(15.0, False, 2.5, 8.0), (15.0, False, 1.0, 8.0), (25.0, False, 2.5, 12.0), (20.0, True, 2.5, 5.0)],
)
def test_class_confusion_adapts(angle: float, few: bool, temperature: float, gain: float) -> None:
    """The last case is partial: the target has half of the classes.  (At T = 1 it gains little there.)"""
    plain = [loop(seed, None, angle, few) for seed in range(2)]
    adapted = [loop(seed, lambda z: class_confusion(z, temperature), angle, few) for seed in range(2)]
    assert np.mean(adapted) >= np.mean(plain) + gain, (plain, adapted)


def test_entropy_collapses_where_class_confusion_does_not() -> None:
    collapsed = [loop(seed, sure, 15.0) for seed in range(2)]
    adapted = [loop(seed, class_confusion, 15.0) for seed in range(2)]
    assert np.mean(adapted) > np.mean(collapsed) + 40, (adapted, collapsed)


def test_a_whole_run_adapts_to_rows_without_labels() -> None:
    found = {
        name: [in_a_run(losses, seed, 25.0) for seed in range(2)]
        for name, losses in {"plain": (), "mcc": (MCC(),), "entropy": (Entropy(),)}.items()
    }
    assert np.mean(found["mcc"]) > np.mean(found["plain"]) + 12, found
    assert np.mean(found["mcc"]) > np.mean(found["entropy"]) + 40, found
