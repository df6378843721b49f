"""The page's programs run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning and of cross-validation on 300 rows
@pytest.mark.parametrize("program", PROGRAMS, ids=["tables", "estimators", "domains", "lightning"])
def test_a_program_of_the_page_runs(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "lightning" in program:
        pytest.importorskip("unbraid.adapters.lightning")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(program, str(PAGE), "exec"), names)
    if "lightning" in program:
        assert (tmp_path / "runs" / "by-lightning" / "weights.safetensors").exists()
