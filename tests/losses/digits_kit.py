"""Handwritten digits with few labels: a small network from scratch, weak and strong views, training loops of a few seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from unbraid.losses.dst import DSTHeads
from unbraid.types import Batch, Output, Schema, Task

SCHEMA = Schema((), (Task("digit", kind="multiclass"),), classes={"digit": tuple("0123456789")})
LABELLED, HIDDEN = 32, 128  # rows per batch


class Digits:
    """1,200 training rows, of which ``per_class`` of each digit have a label, and about 600 others."""

    def __init__(self, seed: int, per_class: int) -> None:
        pictures, digits = load_digits(return_X_y=True)
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
        x, y = torch.tensor(pictures / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
        self.x, self.y, self.test_x, self.test_y = x[:1200], y[:1200], x[1200:], y[1200:]
        self.labelled = torch.cat([(self.y == c).nonzero().squeeze(1)[:per_class] for c in range(10)])

    def batch(self, known: Tensor, hidden: Tensor, views: int) -> Batch:
        """Rows with a label, rows without, and as many strong views of these, or none."""
        rows = torch.cat([known, hidden, hidden[: len(hidden) * views]])
        n, start = len(rows), len(known) + len(hidden)
        place, pair = torch.arange(n), torch.full((n,), -1)
        pair[len(known) : start] = pair[len(known) : start] if not views else place[start:]
        pair[start:] = place[len(known) : start][: n - start]
        features = {"x": self.x[rows]}
        known_of = {"digit": place < len(known)}
        return Batch(features, {"digit": self.y[rows]}, known_of, torch.full((n,), 2), None, rows,
                     (place >= start).to(torch.int8), pair)  # fmt: skip


class Net(nn.Module):
    """64 - 256 - 64 with ReLU, a linear head, and DST's heads."""

    def __init__(self, seed: int, heads: DSTHeads) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.psi = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
        self.h, self.extra = nn.Linear(64, 10), heads.build(SCHEMA, 64, {"digit": 64})

    def forward(self, batch: Batch) -> Output:
        features = self.psi(batch.features["x"])
        output = Output({"digit": self.h(features)}, {"digit": features}, features)
        return replace(output, extras=self.extra(output)) if self.training else output


def weak(x: Tensor, g: torch.Generator) -> Tensor:
    """A little noise."""
    return x + 0.05 * torch.randn(x.shape, generator=g)


def strong(x: Tensor, g: torch.Generator) -> Tensor:
    """A roll by up to a pixel each way, 15 % of the pixels gone, more noise."""
    n, place = len(x), torch.arange(8)
    down, right = (torch.randint(-1, 2, (n, 1), generator=g) for _ in range(2))
    lines, columns = (place - down) % 8, (place - right) % 8
    rolled = x.view(n, 8, 8)[torch.arange(n)[:, None, None], lines[:, :, None], columns[:, None, :]].reshape(n, 64)
    return rolled * (torch.rand(x.shape, generator=g) >= 0.15) + 0.15 * torch.randn(x.shape, generator=g)


def train(digits: Digits, losses: Sequence[Any], steps: int, seed: int) -> tuple[float, Net]:
    """Accuracy (%) on the other rows after SGD, and the network."""
    net, g = Net(seed, DSTHeads((128,), dropout=0.0)), torch.Generator().manual_seed(1000 + seed)
    sgd = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    terms = [loss.bind(SCHEMA) for loss in losses]
    terms = [term.over(0, steps) if hasattr(term, "over") else term for term in terms]
    for step in range(steps):
        known = digits.labelled[torch.randint(len(digits.labelled), (LABELLED,), generator=g)]
        batch = digits.batch(known, torch.randint(len(digits.x), (HIDDEN,), generator=g), 1)
        x, plain = batch.features["x"], LABELLED + HIDDEN
        assert isinstance(x, Tensor)
        batch = replace(batch, features={"x": torch.cat([weak(x[:plain], g), strong(x[plain:], g)])})
        output = net(batch)
        loss = torch.stack([part for term in terms for part in term(output, batch, step).values()]).sum()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    net.eval()
    with torch.no_grad():
        found = net.h(net.psi(digits.test_x)).argmax(1)
    return 100 * float((found == digits.test_y).float().mean()), net
