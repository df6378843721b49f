"""Requests of several users ranked in one pass through the model.

A pass costs about as much for ten rows as for a hundred: its price is that of its steps, not of its rows.  Alone, a request's
candidates share their history; together they cannot, and each candidate has a copy of it.  So few candidates with short
histories are ranked together, and all others alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from unbraid.serve.ranker import Ranked, Ranker, Request, Watch, parts

COPIES = 20_000  # events that one request's candidates may read together, copies counted


class JoiningRanker(Ranker):
    """A ranker that also ranks several requests at once."""

    def rank_together(self, requests: Sequence[Request]) -> list[Ranked | Exception]:
        """What `rank` gives for each request, or the error that it raises.  Explorations are not allowed here."""
        found: list[Ranked | Exception] = []
        given: list[tuple[int, dict[str, pl.Series]]] = []
        for i, request in enumerate(requests):
            try:
                given.append((i, self.given(request)))
                found.append(RuntimeError("not ranked"))
            except Exception as error:
                found.append(error)
        if not given:
            return found
        try:
            ranked = self._together([requests[i] for i, _ in given], [columns for _, columns in given])
        except Exception:  # rows that are not as declared: whose they are shows alone
            ranked = [_or_error(self.rank, requests[i]) for i, _ in given]
        for (i, _), one in zip(given, ranked, strict=True):
            found[i] = one
        return found

    def _together(
        self, requests: Sequence[Request], columns: Sequence[dict[str, pl.Series]]
    ) -> list[Ranked | Exception]:
        watch, bounds = Watch(), np.cumsum([0, *(len(one.candidates) for one in requests)])
        joined = {name: pl.concat([one[name] for one in columns], rechunk=True) for name in columns[0]}
        with self.encoded(joined, "candidates") as encoded:
            watch("rows")
            first, size = bounds[:-1], np.diff(bounds)
            events, degraded = np.zeros(len(requests), dtype=np.int64), ""
            if self.histories is not None:
                users, whose = np.unique(encoded.columns["user"].view(np.uint64), return_inverse=True)
                pasts, degraded = self.pasts(users.tolist())
                times = encoded.columns["time"]
                of = whose.reshape(-1)
                events = np.array([np.searchsorted(pasts[of[at]].events["time"], times[at]) for at in first])
                longest = np.minimum(events, max(one.length for one in self.schema.histories))
                if (longest * size).max() > COPIES:
                    few = longest * size <= COPIES
                    return self._split(requests, columns, few)
                encoded.columns |= self.histories.cut(pasts, of, times)
            watch("history")
            found = self.predictions([encoded.batch(part) for part in parts(encoded)])
        watch("model")
        own = [found[int(a) : int(b)] for a, b in pairwise(bounds)]
        return [
            _or_error(self.ordered, *one, degraded, watch) for one in zip(requests, own, events.tolist(), strict=True)
        ]

    def _split(
        self, requests: Sequence[Request], columns: Sequence[dict[str, pl.Series]], few: np.ndarray
    ) -> list[Ranked | Exception]:
        """Those with few copies together, the others alone."""
        rest = [i for i in range(len(requests)) if few[i]]
        joined = iter(self._together([requests[i] for i in rest], [columns[i] for i in rest]) if rest else ())
        return [next(joined) if few[i] else _or_error(self.rank, request) for i, request in enumerate(requests)]


def _or_error(work: Callable[..., Ranked], *arguments: Any) -> Ranked | Exception:
    """What a work gives, or what it raises: the fault of one request is not that of the others."""
    try:
        return work(*arguments)
    except Exception as error:
        return error
