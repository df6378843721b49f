"""The shell asks the program what a word may become."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from unbraid.cli import complete

SOURCE = Path(__file__).parents[1] / "src"


def completed(line: str) -> set[str]:
    words = line.split(" ")
    asked = {"_UNBRAID_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    program = "from unbraid.cli.main import app; app(prog_name='unbraid')"
    environment = {**os.environ, **asked, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "found"),
    [("unbraid tr", {"train"}), ("unbraid data d", {"describe"}), ("unbraid train --over", {"--overwrite"})],
)
def test_words_are_completed(line: str, found: set[str]) -> None:
    assert completed(line) == found


def test_names_are_completed(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"schema": {"tasks": [{"name": "click"}, {"name": "buy"}]}}')
    (tmp_path / "mine.toml").touch()
    (tmp_path / "data.csv").touch()
    lines = {
        "unbraid recipe st": {"stem"}, "unbraid compare shared_bottom din mm": {"mmoe"},
        f"unbraid compare stem {tmp_path}/": {f"{tmp_path}/mine.toml"}, f"unbraid calibrate {tmp_path} --task ": {"click", "buy"},
        "unbraid calibrate nowhere --task ": set(), "unbraid calibrate b --method iso": {"isotonic"},
        "unbraid calibrate b --split t": {"train", "test"}, "unbraid diagnose b --only le": {"leak"},
        "unbraid tune run.toml --metric log": {"logloss"}, "unbraid tune --pruner ": {"median", "hyperband", "none"},
        "unbraid export b --to o": {"onnx"}, "unbraid store import b a --keep r": {"rows"},
    }  # fmt: skip
    for line, found in lines.items():
        assert completed(line) == found, line


def test_the_names_are_those_that_there_are() -> None:
    from unbraid import recipes
    from unbraid.calibrate import CalibratorChoice
    from unbraid.diagnosis.diagnose import CHECKS, THOROUGH
    from unbraid.measures import NAMES

    assert complete.recipe_names() == list(recipes.RECIPES)
    assert complete.metric_names() == sorted({name for names in NAMES.values() for name in names})
    assert set(complete.check_names()) == {check.name for check in (*CHECKS, *THOROUGH)}
    assert set(complete.method_names()) == {m.kind for m in get_args(get_args(CalibratorChoice)[0])}


def test_a_word_waits_for_nothing_heavy() -> None:
    asked = "import sys\nfrom unbraid.cli import complete, main\n"
    asked += "complete.recipe_names(), complete.metric_names(), complete.check_names(), complete.method_names()\n"
    asked += "sys.exit(bool({'torch', 'numpy', 'polars', 'pydantic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", asked], env={**os.environ, "PYTHONPATH": str(SOURCE)}, check=True, timeout=60)
