"""The page of the analyses: its code runs, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from analysis_fakes import Scorer

PAGE = Path(__file__).parents[2] / "docs" / "analyses.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(first, str(PAGE), "exec"), names)
    assert "clusters of the" in capsys.readouterr().out and names["truth"].rows(names["target"])[0] > 1000
    names["model"] = Scorer(lambda a, b, p: 5.0 * (a == b) - p, field="topic", feature="topic")
    exec(compile(second, str(PAGE), "exec"), names)
    shown = capsys.readouterr().out
    assert "rank correlation of" in shown and "NDCG@20" in shown
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["grids.png", "ndcg.png"]
    assert names["ndcg"].values["learned_minus_random"][1] > 0
