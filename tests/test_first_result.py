"""What is loaded before anything is asked for: `benchmarks/first_result.py` measures what that saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import unbraid
from unbraid.cli.main import app

SOURCE = Path(__file__).parents[1] / "src"
HEAVY = {
    "torch",
    "numpy",
    "polars",
    "pydantic",
    "scipy",
    "sklearn",
    "rich",
    "safetensors",
    "pandas",
    "pyarrow",
    "fastapi",
}


def loaded(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after some code."""
    program = f"import sys\n{code}\nimport json; print('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SOURCE)}
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_the_package_loads_nothing_heavy() -> None:
    assert not loaded("import unbraid") & HEAVY
    assert "torch" in loaded("import unbraid; unbraid.recipes.get('stem')"), "modules load when they are used"


def test_solvers_load_when_they_are_called() -> None:
    program = (
        "import unbraid.job\nimport sys\nassert not {'scipy.optimize', 'scipy.special', 'sklearn'} & set(sys.modules)"
    )
    assert "torch" in loaded(program)


def test_help_of_every_command_loads_nothing_heavy() -> None:
    commands = [[name] for name in get_command(app).commands]  # type: ignore[attr-defined]
    commands += [[group, name] for group in ("data", "store") for name in get_command(app).commands[group].commands]  # type: ignore[attr-defined]
    assert len(commands) > 12
    code = f"""
from unbraid.cli.main import app
for words in {[[], *commands]}:
    try:
        app([*words, '--help'])
    except SystemExit as end:
        assert not end.code, words
"""
    assert not loaded(code) & HEAVY - {"pydantic"}, "typer itself looks for pydantic"


def test_modules_and_the_version_are_attributes() -> None:
    assert unbraid.types.UNKNOWN == 0 and isinstance(getattr(unbraid, "__version__", ""), str)
    assert not hasattr(unbraid, "nothing_of_that_name") and not hasattr(unbraid, "_private")
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        unbraid.nothing_of_that_name  # noqa: B018
