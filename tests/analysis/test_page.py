"""The page of the analyses: its code runs, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "analyses.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    shown = []
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        shown.append(capsys.readouterr().out)
    assert "clusters of the" in shown[0] and names["truth"].rows(names["target"])[0] > 1000
    assert "rank correlation of" in shown[1] and "NDCG@20" in shown[1]
    assert names["grids"].values["scores"].std() > 0 and names["ndcg"].values["rows"] > 100
    assert "times as long as those from attention" in shown[2]
    assert shown[-1] == shown[0].splitlines(keepends=True)[-1], "a bundle on disk measures the same"
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["gradients.png", "grids.png", "ndcg.png"]
