"""What would only be noticed where all tests are collected at once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def test_test_files_have_names_of_their_own() -> None:
    names = Counter(path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py")
    assert not [name for name, count in names.items() if count > 1]
