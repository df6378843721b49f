"""How many seeds the tests of planted data take: those that their bounds need, or those of the tables in the docs.

``PUBLISHED=1 pytest -m slow -s FILE`` prints a table as its page has it.
"""

from __future__ import annotations

import os

WHOLE = bool(os.environ.get("PUBLISHED"))


def seeds(fewest: int, published: int) -> range:
    """The first so many seeds."""
    return range(published if WHOLE else fewest)
