"""Optional libraries, and torchvision beside a torch that it was not compiled for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unbraid import compat


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Two operators of our own, of which a library declares the first, and a torchvision whose compiled part does not load."""
    (tmp_path / "_C.so").write_text("compiled for another torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    monkeypatch.setattr(compat, "NEEDED", {name: name + schema for name in ("unbraid_there", "unbraid_missing")})
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("unbraid_there" + schema)
    declared: list[Any] = []
    monkeypatch.setattr(compat, "_declared", declared)
    return [library, declared]


def test_only_operators_that_are_missing_are_declared_and_only_once(operators: list[Any]) -> None:
    assert compat.declare_operators() == ["unbraid_missing"]
    assert len(operators[1]) == 1 and hasattr(torch.ops.torchvision, "unbraid_missing")
    assert compat.declare_operators() == [] and len(operators[1]) == 1


def test_beside_a_matching_torchvision_nothing_is_declared(
    operators: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its library declares the names when it is loaded; a second declaration would be torch's error."""
    loaded: list[str] = []
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    monkeypatch.setattr(compat, "NEEDED", {"unbraid_own": "unbraid_own" + schema})

    def load(path: str) -> None:
        loaded.append(path)
        operators[0].define("unbraid_own" + schema)

    monkeypatch.setattr(torch.ops, "load_library", load)
    assert compat.declare_operators() == [] and not operators[1] and len(loaded) == 1
    with pytest.raises(RuntimeError):
        operators[0].define("unbraid_own" + schema)


def test_without_torchvision_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compat.declare_operators() == []


def test_torchvision_imports() -> None:
    pytest.importorskip("PIL")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("the extra images is not installed")
    assert compat.torchvision().__name__ == "torchvision"


def test_a_missing_library_says_what_needs_it_and_how_to_install_it(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ImportError, match=r'Reading pictures needs no_such_library. .*pip install "unbraid\[images\]"'):
        compat.optional("no_such_library", "images", "Reading pictures")
    (tmp_path / "library_there.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="No module named 'no_such_library'"):
        compat.optional("library_there", "images", "Reading pictures")
