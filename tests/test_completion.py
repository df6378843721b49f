"""The shell asks the program what a word may become."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
