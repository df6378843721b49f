"""`docs/add-a-method.md`, followed to the letter in a copy of the repository."""

from __future__ import annotations

import filecmp
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "add-a-method.md"
COPIED = (
    "src", "tests", "docs", "examples", "benchmarks", ".ci",
    "mkdocs.yml", "pyproject.toml", "CHANGELOG.md", "README.md", "CONTRIBUTING.md", "Makefile", "constraints.txt",
)  # fmt: skip
BLOCK = re.compile(r'^(`{3,4})(\w+)(?: title="(.+?)")?\n(.*?)^\1$', re.M | re.S)


def changed(text: str, diff: str) -> str:
    """A hunk without line numbers: what it takes away must stand in the text, once."""
    lines = diff.splitlines(keepends=True)
    assert {line[0] for line in lines} <= set(" +-")
    old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
    if text.count(old) != 1:
        old, new = "\n" + old, "\n" + new  # whole lines
    assert text.count(old) == 1, f"{text.count(old)} times, not once:\n{old}"
    return text.replace(old, new)


def files(root: Path) -> set[str]:
    made = ("__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "runs/")
    found = (
        str(path.relative_to(root))
        for part in COPIED
        for path in [root / part, *(root / part).rglob("*")]
        if path.is_file()
    )
    return {name for name in found if not any(word in name for word in made)}


@pytest.mark.slow
def test_the_page_followed_to_the_letter_adds_a_method_in_seven_files(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "gallery/*.html"))
        else:
            shutil.copy(source, copy / name)
    before = files(copy)
    original = tmp_path / "original"
    shutil.copytree(copy, original)

    ours = {
        "PYTHONPATH": f"{copy / 'src'}:{copy / 'tests'}",
        "UNBRAID_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    example = PAGE.read_text().partition("\n## An example\n")[2].partition("\n## In a graph\n")[0]
    ran, titles = 0, {"tests/golden/losses.json"}  # which a command writes
    for _, language, title, text in BLOCK.findall(example):
        titles |= {title} - {""}
        if language == "diff":
            (copy / title).write_text(changed((copy / title).read_text(), text))
        elif title:
            assert not (copy / title).exists()
            (copy / title).write_text(text)
        for line in re.findall(r"^\$ (.+)$", text, re.M) if language == "console" else ():
            words = shlex.split(line)
            words = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", *words]
            done = subprocess.run(words, cwd=copy, env={**os.environ, **ours}, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
            ran += 1
    assert ran == 6

    after = files(copy)
    touched = (after - before) | {n for n in before & after if not filecmp.cmp(copy / n, original / n, shallow=False)}
    table = re.findall(r"^\| `(.+?)` \|", PAGE.read_text().partition("\n## The member\n")[0], re.M)
    assert touched == titles and len(touched) == len(table) == 7
    members = {"src/unbraid/encoders/max_pooling.py", "src/unbraid/config.py", "src/unbraid/recipes.py"}
    assert {name for name in touched if name.startswith("src/")} == members, "no loop, command or model learns its name"
