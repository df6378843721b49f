"""The BibTeX of exactly what a run uses: the library, the data, and the method in each slot.

A module that implements a paper holds its entry in a constant ``BIBTEX``, and so may a class where a module has several; a
part of a run that uses only some of them names their keys in ``cites``; a folder of data may hold a ``CITATION.bib``.
Nothing is registered anywhere: the parts of a run are dataclasses, and each knows the module that it comes from.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from unbraid.config import Run
from unbraid.data.source import bundled


def citations(run: Run) -> str:
    """BibTeX entries, one blank line between them, in the order library, data, then the run's parts from top to bottom.

    Args:
        run: the run; only what stands in its slots is cited.

    Returns:
        BibTeX that ends with a line break.  A paper that several parts share is there once.
    """
    folder = bundled(run.data.folder) or Path(run.data.folder)
    entries = [library()]
    if (folder / "CITATION.bib").is_file():
        entries.append((folder / "CITATION.bib").read_text())
    entries.extend(entry for part in parts(run) for entry in entries_in_use(part))
    stripped = (entry.strip() for text in entries for entry in _split(text))
    return "\n\n".join(dict.fromkeys(entry for entry in stripped if entry)) + "\n"


def entries_in_use(part: Any) -> list[str]:
    """A part's entries: those that its ``cites`` names by their keys, or all of its class."""
    entries = [entry for text in entries_of(type(part)) for entry in _split(text)]
    if (keys := getattr(part, "cites", None)) is None:
        return entries
    return [entry for entry in entries if entry.partition("{")[2].partition(",")[0] in keys]


def _split(text: str) -> list[str]:
    """The entries of BibTeX."""
    return re.split(r"^(?=@)", text, flags=re.MULTILINE)


def entries_of(cls: type) -> list[str]:
    """A class's own ``BIBTEX`` where it has one, else those of its module and of the modules of the classes that it extends."""
    if hasattr(cls, "BIBTEX"):
        return [cls.BIBTEX]
    return [getattr(sys.modules[base.__module__], "BIBTEX", "") for base in cls.__mro__]


def parts(value: Any) -> Iterator[Any]:
    """A dataclass, and every dataclass in its fields, depth first."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in dataclasses.fields(value):
            yield from parts(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from parts(item)
    elif isinstance(value, Mapping):
        yield from parts(list(value.values()))


def library() -> str:
    """The library's own entry, with the installed version (none where it runs from a bare source tree)."""
    try:
        version = f"  version = {{{metadata.version('unbraid')}}},\n"
    except metadata.PackageNotFoundError:
        version = ""
    return (
        "@software{unbraid,\n"
        "  title   = {unbraid},\n"
        "  author  = {{The unbraid authors}},\n"
        f"{version}"
        "  note    = {Python library for multi-task and multi-domain recommendation and transfer models},\n"
        "}"
    )
