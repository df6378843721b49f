"""What a package index shows: README.md without the links and the picture that lead into the repository, which is not there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ELSEWHERE = """## More

The links of this page are left out here. The source archive has the documentation in `docs`; `make docs` builds it as a site
that opens without a server or a network.

"""


def alone(text: str) -> str:
    """The page for readers who have nothing else."""
    text = re.sub(r"^\[!\[.*?\]\(.*?\)\]\(.*?\)\n\n", "", text, flags=re.M)
    text = re.sub(r"^## More\n.*?(?=^## )", lambda _: ELSEWHERE, text, flags=re.M | re.S)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


class Description(MetadataHookInterface):
    """Hatchling calls it while it builds."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the long description."""
        text = alone((Path(self.root) / "README.md").read_text(encoding="utf-8"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
