"""The worst head: how much room labels leave it, on features where that is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unbraid.analysis.worst_head import WorstHead, plot
from unbraid.types import Batch, Output, Schema, Task

SCHEMA = Schema(
    (), (Task("click"), Task("size", kind="multiclass"), Task("spend", kind="real")), classes={"size": ("S", "M", "L")}
)


class Given(nn.Module):
    """Features are the batch's; the main head is a linear layer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size, self.click = nn.Linear(width, 3), nn.Linear(width, 1)

    def forward(self, batch: Batch) -> Output:
        assert not self.training
        x: Any = batch.features["x"]
        return Output({"size": self.size(x), "click": self.click(x).squeeze(1)}, {"size": x, "click": x}, x)


def batch_of(x: torch.Tensor, known: int) -> Batch:
    n = len(x)
    seen = torch.arange(n) < known
    labels = {"size": torch.zeros(n, dtype=torch.int64), "click": torch.zeros(n)}
    places = torch.arange(n), torch.zeros(n, dtype=torch.int8), torch.full((n,), -1)
    return Batch({"x": x}, labels, {"size": seen, "click": seen, "spend": seen}, torch.full((n,), 2), None, *places)


def spread(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", ["size", "click"])
def test_rows_that_look_like_labelled_ones_leave_no_room(task: str) -> None:
    x = spread(8)
    found = WorstHead(task, lr=0.01)(Given(), SCHEMA, [batch_of(x.repeat(5, 1), 8)]).values
    assert found["agreement"] == 1 and found["known"] == 8 and found["hidden"] == 32
    assert found["disagreement"] == 0 and found["steps"] >= 300


@pytest.mark.parametrize("task", ["size", "click"])
def test_rows_that_look_like_none_leave_all_of_it(task: str) -> None:
    x = spread(60)
    x[:, 3] = 0.0
    x[10:, 3] = 4.0  # what no labelled row has
    model = Given()
    model.train()
    found = WorstHead(task, lr=0.01)(model, SCHEMA, [batch_of(x, 10)])
    assert found.values["agreement"] == 1 and found.values["disagreement"] > 0.95
    assert model.training and "can disagree on" in found.reading and f"of `{task}`" in found.reading


def test_batches_views_and_classes() -> None:
    """One batch or several are the same; strong views are no rows; the shares by class add up to the whole."""
    x, model = spread(50), Given()
    whole = batch_of(x, 10)
    probe = WorstHead("size", hidden=(6,), steps=40)
    one = probe(model, SCHEMA, [whole]).values
    parts = probe(model, SCHEMA, [whole.select(torch.arange(20)), whole.select(torch.arange(20, 50))]).values
    assert one["disagreement"] == parts["disagreement"] and one["steps"] == parts["steps"]
    strong = replace(batch_of(9 * x[:30], 0), view=torch.ones(30, dtype=torch.int8))
    assert probe(model, SCHEMA, [whole, strong]).values["hidden"] == 40
    answers = model.size(x[10:]).argmax(1)
    counts = np.bincount(answers.numpy(), minlength=3)
    assert np.nansum(one["by_class"] * counts) == pytest.approx(40 * one["disagreement"])


def test_the_seed_draws_the_head_and_nothing_else_is_touched() -> None:
    x, model = spread(50), Given()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = [WorstHead("size", steps=20, seed=seed)(model, SCHEMA, [batch_of(x, 10)]).values for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert found[0]["disagreement"] == found[1]["disagreement"]


def test_a_head_that_cannot_agree_says_so() -> None:
    """Labelled rows of equal features cannot have two answers; the probe stops, and says what it reached."""

    class Two(Given):
        def forward(self, batch: Batch) -> Output:
            output, even = super().forward(batch), (batch.row % 2).float()
            return replace(output, logits={"click": 2 * even - 1})

    found = WorstHead("click", steps=5)(Two(), SCHEMA, [batch_of(torch.ones(20, 4), 10)])
    assert found.values["agreement"] == 0.5 and found.values["steps"] == 50
    assert "agrees with the model on only 50.0% of the 10 rows" in found.reading


def test_errors() -> None:
    x, model = spread(12), Given()
    with pytest.raises(ValueError, match="`spend` should be binary or multiclass"):
        WorstHead("spend")(model, SCHEMA, [batch_of(x, 6)])
    for known in (0, 12):
        with pytest.raises(ValueError, match=f"with and without a label of `size`. Found {known} and {12 - known}"):
            WorstHead("size")(model, SCHEMA, [batch_of(x, known)])
    with pytest.raises(ValueError, match="needs batches of rows. Found none"):
        WorstHead("size")(model, SCHEMA, [])
    with pytest.raises(ValueError, match="`steps` should be positive"):
        WorstHead("size", steps=0)
    with pytest.raises(ValueError, match="`eta_prime` should be positive"):
        WorstHead("size", eta_prime=0.0)


def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = WorstHead("size", steps=5)(Given(), SCHEMA, [batch_of(spread(40), 10)])
    drawn = plot(found, tmp_path / "worst.png")
    (axis,) = drawn.axes
    assert (tmp_path / "worst.png").stat().st_size > 0 and len(axis.patches) == 3
    heights = np.array([patch.get_height() for patch in axis.patches])  # type: ignore[attr-defined]
    np.testing.assert_allclose(heights, found.values["by_class"])
