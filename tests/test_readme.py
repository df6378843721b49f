"""The front page: short, true, and its two lines of code do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unbraid.optim.adatask import AdaTask
from unbraid.optim.own import Stepper

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_it_is_short_and_says_the_two_commands() -> None:
    assert len(TEXT.splitlines()) <= 65
    for words in ("unbraid init", "unbraid train", "`make demo`", "`make test`", "## Licence"):
        assert words in TEXT


def test_its_picture_is_there_and_small() -> None:
    (path,) = re.findall(r"\]\((docs/images/\S+?\.png)\)", TEXT)
    picture = (ROOT / path).read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) < 200_000


@pytest.mark.parametrize("side", "+-")
def test_both_sides_of_the_diff_run_and_two_lines_differ(side: str) -> None:
    (diff,) = re.findall(r"^```diff\n(.*?)^```", TEXT, re.M | re.S)
    lines = diff.splitlines()
    assert sum(line[0] == side for line in lines) == 2
    code = "\n".join(line[1:] for line in lines if line[0] in (side, " "))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bottom, self.heads = nn.Linear(4, 8), nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})

        def forward(self, x: Any) -> dict[str, Any]:
            return {task: head(self.bottom(x).tanh())[:, 0] for task, head in self.heads.items()}

    torch.manual_seed(0)
    model, x, loss = Model(), torch.randn(64, 4), nn.functional.mse_loss
    y = {"a": x[:, 0], "b": x[:, 1] * 10}

    def total() -> float:
        return sum(float(loss(z, y[task]).detach()) for task, z in model(x).items())

    before = total()
    names = {
        "model": model,
        "batches": [(x, y)] * 200,
        "loss": loss,
        "torch": torch,
        "Stepper": Stepper,
        "AdaTask": AdaTask,
    }
    exec(code, names)
    assert total() < 0.8 * before


def test_the_figures_are_those_of_the_pages() -> None:
    """What the table rounds stands in the pages that it is from."""
    pages = (ROOT / "docs/evidence.md").read_text() + (ROOT / "docs/results.md").read_text()
    for figure in (
        "+0.0645 | [+0.0370, +0.0919]",
        "+.0040 [+.0021, +.0059]",
        "+.0364 [+.0183, +.0546]",
        "11 points on digits",
    ):
        assert figure in pages
