"""The tutorials run from the first cell to the last, and their pages are what they last printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
SCRIPT = """
import sys, tempfile
from pathlib import Path
sys.path.append(sys.argv[1])
import notebooks
with tempfile.TemporaryDirectory() as folder:
    notebooks.execute(Path(sys.argv[2]), Path(folder))
"""  # a process of its own: notebooks bring an event loop, sockets and deprecations of their own


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_the_first_cell_to_the_last(path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "docs" / "site"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_as_it_was_executed_in_order_and_of_no_machine(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "make notebooks"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(code) >= 4 and not [output for output in outputs if output["output_type"] == "error"]
    shown = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"/(?:tmp|home|root|work)/", shown) and len(path.read_text()) < 150_000


def test_every_tutorial_stands_in_the_navigation() -> None:
    source = (ROOT / "docs" / "site" / "hook.py").read_text()
    (listed,) = re.findall(r"^TUTORIALS = \((.*?)\)", source, re.M | re.S)
    assert sorted(re.findall(r'"(.+?)"', listed)) == [path.stem for path in NOTEBOOKS]
    assert len(NOTEBOOKS) >= 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_resolve(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
        assert target.startswith("http") or (path.parent / target).exists(), target
