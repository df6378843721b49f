"""Docstrings as Markdown: a literal block is announced by one colon there."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Colons(griffe.Extension):
    """``::`` at the end of a line becomes ``:``."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Griffe calls this for everything that it has read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"::$", ":", obj.docstring.value, flags=re.M)
