"""Which columns name users and items."""

from __future__ import annotations

from collections.abc import Iterable

from unbraid.guess.columns import Column
from unbraid.guess.words import ITEMS, USERS

NO_USER = "no column looks like a user"


def user_of(columns: Iterable[Column]) -> tuple[str, str]:
    """(The column named like a user, why there is none): among equals the one with the most values, but none of its own in
    every row."""
    best, why = (0, 0, ""), NO_USER
    for c in columns:
        name = c.name.lower()
        if (c.named(USERS) or name.startswith(("user", "uid"))) and c.distinct > 10 and c.exact and not c.form:
            if c.names_rows:
                why = f"`{c.name}` has another value in every row, which names rows and no users"
                continue
            simple = "".join(c.words) in {"user", "userid", "uid", "member", "memberid", "customerid", "visitorid"}
            ends = name.endswith(("id", "key", "hash"))
            best = max(best, (3 if simple else 2 if ends else 1, c.distinct, c.name))
    return best[2], why


def item_of(columns: Iterable[Column]) -> Column | None:
    """The column that names what is recommended: named so, and with the most values."""
    named = [c for c in columns if c.named(ITEMS) and c.distinct > 20]
    best = [c for c in named if c.name.lower().endswith(("id", "sku", "asin")) or len(c.words) == 1]
    return max(best or named, key=lambda c: c.distinct, default=None)
