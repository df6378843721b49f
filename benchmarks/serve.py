"""What does it cost to rank one user's candidates on a long history?

    python benchmarks/serve.py [--quick] [--only kernel lengths parts whole]

500 candidates of a user with 10,000 events, the 20 best events of each candidate kept and attended to (DARE, width 16, items and
ranks, 100,000 items), unless said otherwise.  Times are CPU times of the process, with one thread, in milliseconds; rounds of
the sides alternate, a ratio is the median over the pairs of rounds, above 1 ours is better.  Both sides give the same before
they are timed: outputs within 1e-5 (``rank_vs_bare`` apart, whose sides are not one thing).

| ratio | the other side |
|---|---|
| ``rank_vs_best`` | keys gathered once, one product, ``torch.topk``, softmax and sum of the kept: the best of 4 forms |
| ``rank_vs_per_candidate`` | the history's vectors copied for every candidate: the best of 3 sizes of chunks |
| ``rank_vs_bare`` | that of ``rank_vs_best``, beside all of `unbraid.serve.ranker.Ranker.rank`, from raw columns to an order |

``lengths``: our cost by the length of the history and by the number of candidates.  ``parts``: what each device saves at widths
16, 64 and 128, as (time without) / (time with): ``cached_keys`` (they are there from the request before), ``groups`` (the K best
among groups of events instead of ``torch.topk``), and ``bfloat16``, the bare product in that type over that in float32: the
ranker does not use it, since it is not exact and the maxima of such scores cost several times what it saves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before they are imported
    os.environ |= {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}

import numpy as np
import polars as pl
import torch
from torch import Tensor

from unbraid.encoders import search
from unbraid.encoders.dare import DARE
from unbraid.types import FIRST_VALUE, Rows, Shared

ITEMS, KEEP, WIDTH, EVENTS, CANDIDATES = 100_000, 20, 16, 10_000, 500
LENGTHS, COUNTS = (100, 1_000, 10_000, 50_000), (10, 100, 500, 1_000, 5_000)


class Case:
    """A user's history and candidates, and tables of one width."""

    def __init__(self, candidates: int, events: int, width: int) -> None:
        torch.manual_seed(0)
        self.candidates, self.events, self.width = candidates, events, width
        widths = {"item": width, "position": width}
        self.module = DARE(keep=KEEP).build(widths, {"item": width}, {"value": width, "attention": width}).eval()
        sizes = {"item": ITEMS, "position": FIRST_VALUE + events}
        self.tables = {r: {n: torch.randn(s, width) for n, s in sizes.items()} for r in ("value", "attention")}
        self.ids = {
            "item": torch.randint(FIRST_VALUE, ITEMS, (events,)),
            "position": torch.arange(events, 0, -1) + FIRST_VALUE - 1,
        }
        self.target = torch.randint(FIRST_VALUE, ITEMS, (candidates,))
        self.query = self.module.queries["field/position"].detach()
        self.scale = self.module.scales["item"]
        self.memo: dict[Any, Any] = {}

    def ours(self, memo: bool = True) -> dict[str, Tensor]:
        """The library's encoder on a shared list."""
        reads = {r: {n: Rows(x, self.ids[n]) for n, x in of.items()} for r, of in self.tables.items()}
        own = {r: {"item": of["item"].index_select(0, self.target)} for r, of in self.tables.items()}
        shared = Shared(self.ids, self.candidates, self.memo if memo else None)
        return self.module(reads, shared, own)

    # ---------------------------------------------------------------------------------------------------- by plain torch
    def _ends(self, top: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """What attention gives, from the kept events (B, K) and their weights."""
        items, ranks = (
            self.tables["value"][n].index_select(0, self.ids[n][top.view(-1)]) for n in ("item", "position")
        )
        shape = (*top.shape, self.width)
        item = torch.bmm(weights.unsqueeze(1), items.view(shape)).squeeze(1)
        rank = torch.bmm(weights.unsqueeze(1), ranks.view(shape)).squeeze(1)
        own = self.tables["value"]["item"].index_select(0, self.target)
        return {"item": item, "position": rank, "item.product": item * own}

    def _alike(self) -> Tensor:
        """(n,) what ranks add for every candidate."""
        ranks = self.tables["attention"]["position"].index_select(0, self.ids["position"])
        return ranks @ (self.query * self.module.scales["position"])

    def product(self, order: bool = False, again: bool = True) -> dict[str, Tensor]:
        """One product and ``torch.topk``; ``order``: of the found; ``again``: in memory that is there from the time before."""
        keys = self.tables["attention"]["item"].index_select(0, self.ids["item"])
        query = self.tables["attention"]["item"].index_select(0, self.target) * self.scale
        if not again:
            scores = torch.addmm(self._alike(), query, keys.T)
        else:
            if not hasattr(self, "buffer"):
                self.buffer = torch.empty(self.candidates, self.events)
            scores = torch.addmm(self._alike(), query, keys.T, out=self.buffer)
        top = scores.topk(min(KEEP, self.events), 1, sorted=order)
        return self._ends(top.indices, top.values.softmax(1))

    def copied(self, rows: int) -> dict[str, Tensor]:
        """The history's vectors for every candidate, some candidates at a time."""
        query = self.tables["attention"]["item"].index_select(0, self.target) * self.scale
        alike, found = self._alike(), []
        for part in query.split(rows):
            ids = self.ids["item"].repeat(len(part))
            keys = self.tables["attention"]["item"].index_select(0, ids).view(len(part), self.events, self.width)
            scores = torch.bmm(keys, part.unsqueeze(2)).squeeze(2) + alike
            found.append(scores.topk(min(KEEP, self.events), 1, sorted=False))
        top, values = torch.cat([x.indices for x in found]), torch.cat([x.values for x in found])
        return self._ends(top, values.softmax(1))


def same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Both give one thing.  Raises AssertionError."""
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ timing
def cpu(work: Callable[[], Any], times: int = 1) -> float:
    """Milliseconds of one call."""
    begin = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - begin) / times * 1e3


def alternate(plain: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Medians of both sides and of their ratio."""
    plain(), ours()
    pairs = [(cpu(plain), cpu(ours)) for _ in range(rounds)]
    return {
        "plain": statistics.median(p for p, _ in pairs),
        "ours": statistics.median(o for _, o in pairs),
        "ratio": statistics.median(p / o for p, o in pairs),
    }


def best(forms: Mapping[str, Callable[[], Any]], rounds: int) -> str:
    """The fastest of some forms."""
    for form in forms.values():
        form()
    return min(forms, key=lambda name: min(cpu(forms[name]) for _ in range(rounds)))


def forms_of(case: Case) -> dict[str, Callable[[], Any]]:
    """Products by plain torch."""
    return {f"order={o} again={a}": partial(case.product, o, a) for o in (False, True) for a in (False, True)}


@torch.no_grad()
def kernel(quick: bool) -> dict[str, Any]:
    """Ours against both kinds of plain torch."""
    case = Case(CANDIDATES // (10 if quick else 1), EVENTS // (10 if quick else 1), WIDTH)
    rounds, products = 3 if quick else 21, forms_of(case)
    copies = {f"{rows} rows": partial(case.copied, rows) for rows in (2, 8, 32)}
    for form in (*products.values(), *copies.values()):
        same(case.ours(), form())
    found = {}
    for name, forms in (("rank_vs_best", products), ("rank_vs_per_candidate", copies)):
        form = best(forms, 2 if quick else 5)
        found[name] = {
            "form": form,
            **alternate(forms[form], case.ours, rounds if forms is products else max(3, rounds // 3)),
        }
    return found


@torch.no_grad()
def lengths(quick: bool) -> dict[str, Any]:
    """Our cost by events and by candidates, beside the best plain torch."""
    sizes = [(CANDIDATES, n) for n in LENGTHS] + [(n, EVENTS) for n in COUNTS if n != CANDIDATES]
    found = {}
    for candidates, events in sizes[:2] if quick else sizes:
        case = Case(candidates, events, WIDTH)
        same(case.ours(), case.product())
        rounds = 3 if quick or candidates * events > 2 * 10**7 else 11
        found[f"cost.{candidates}x{events}"] = alternate(case.product, case.ours, rounds)
    return found


@torch.no_grad()
def parts(quick: bool) -> dict[str, Any]:
    """What cached keys, groups and bfloat16 save, by width."""
    found = {}
    for width in (16,) if quick else (16, 64, 128):
        found |= parts_of(Case(CANDIDATES, EVENTS, width), 3 if quick else 21)
    return found


def parts_of(case: Case, rounds: int) -> dict[str, Any]:
    """As `parts`, of one width."""
    width, few = case.width, search.FEW
    query, keys = torch.randn(CANDIDATES, width), torch.randn(EVENTS, width)
    rounded = query.bfloat16(), keys.bfloat16()
    outs = [torch.empty(CANDIDATES, EVENTS, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]

    def searched(limit: int) -> None:
        search.FEW = limit
        search.highest_shared(query, keys, None, KEEP)
        search.FEW = few

    return {
        f"cached_keys.d{width}": alternate(lambda: case.ours(False), case.ours, rounds),
        f"groups.d{width}": alternate(lambda: searched(2**40), lambda: searched(few), rounds),
        f"bfloat16.d{width}": alternate(
            lambda: torch.mm(query, keys.T, out=outs[0]),
            lambda: torch.mm(rounded[0], rounded[1].T, out=outs[1]),
            rounds,
        ),
    }


# -------------------------------------------------------------------------------------------------------------- the whole
def log_of(events: int) -> pl.DataFrame:
    """A log with one user of many events, and others."""
    draw = np.random.default_rng(0)
    count = 2 * events
    return pl.DataFrame({
        "user": np.where(np.arange(count) % 2 == 0, 1, draw.integers(2, 50, count)),
        "item": draw.integers(0, 20_000, count), "time": np.arange(count) * 1_000, "click": draw.integers(0, 2, count),
    })  # fmt: skip


def ranker_of(folder: Path, events: int) -> Any:
    """A ranker with random weights on a store on disk, and one of its requests."""
    from unbraid.bundle import Bundle, build
    from unbraid.config import ModelChoice, Run
    from unbraid.data.declaration import Data, Events, Split
    from unbraid.data.encode import encode
    from unbraid.data.fitted import Fitted
    from unbraid.encoders.table import Views
    from unbraid.serve.importer import import_events
    from unbraid.serve.ranker import Ranker, Request
    from unbraid.serve.store import open_store
    from unbraid.towers.mlp import SharedBottom
    from unbraid.types import Feature, Field, History, Task

    log = log_of(events)
    data = Data(
        rows="log", user="user", time="time", features=(Feature("item"),), fields=(Field("item"),), cache=str(folder / "cache"),
        events=(Events(columns={"item": "item"}),), histories=(History("past", fields=("item", "position"), length=events),),
        tasks=(Task("click"),), split=Split(kind="time", valid_from=len(log) * 800, test_from=len(log) * 900),
    )  # fmt: skip
    model = ModelChoice(
        tower=SharedBottom(bottom=(64, 32), tower=(16,)), tables=Views(width=WIDTH, std=0.3), history=DARE(keep=KEEP)
    )
    run = Run(data=data, name="bench", model=model)
    tables = {"log": log}
    fitted = Fitted.load(encode(data, tables=tables))
    store = open_store(folder / "store")
    import_events(data, store, tables=tables)
    ranker = Ranker(Bundle(run, fitted, build(run, fitted.schema).eval(), {}), store, tables=tables)
    items = np.random.default_rng(1).integers(0, 20_000, CANDIDATES).tolist()
    return ranker, Request(1, [{"item": item} for item in items], time=10**15)


def whole(quick: bool) -> dict[str, Any]:
    """`Ranker.rank` from raw columns to an order, beside the bare product, top-k and aggregation."""
    events = EVENTS // (10 if quick else 1)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        ranker, request = ranker_of(Path(place), events)
        assert ranker.rank(request).events == events
        bare = Case(CANDIDATES, events, WIDTH)
        form = forms_of(bare)[best(forms_of(bare), 2 if quick else 5)]
        found = {"rank_vs_bare": alternate(lambda: ranker.rank(request), form, 3 if quick else 21)}
        runs = [ranker.rank(request).seconds for _ in range(3 if quick else 21)]
        stages = {stage: statistics.median(run[stage] for run in runs) * 1e3 for stage in runs[0]}
        found["rank.stages"] = stages  # wall time
        now = replace(request, time=10**15)
        user = ranker.user_hash(1)

        def cold() -> None:
            ranker.histories._held.clear()
            ranker.rank(now)

        found["rank.cold"] = {"ours": statistics.median(cpu(cold) for _ in range(2 if quick else 5))}

        def event(number: int) -> None:
            code, record = ranker.record("rows", {"user": 1, "item": number, "time": 10**9 + number})
            ranker.store.append([(code, record._replace(id=f"new {number}"))])
            ranker.rank(now)

        numbers = iter(range(1_000))
        found["rank.new_event"] = {
            "ours": statistics.median(cpu(lambda: event(next(numbers))) for _ in range(3 if quick else 11))
        }
        assert ranker.rank(now).events > events and user
        ranker.store.close()
    return found


GROUPS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "kernel": kernel,
    "whole": whole,
    "parts": parts,
    "lengths": lengths,
}


def run(groups: Sequence[str], quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure, print the table, return ratios and figures."""
    ratios: dict[str, float] = {}
    figures: dict[str, Any] = {}
    print(f"{'case':<28} {'plain ms':>10} {'ours ms':>10} {'ratio':>8}")
    for group in groups:
        for name, found in GROUPS[group](quick).items():
            figures[name] = found
            if "ratio" in found:
                ratios[name] = round(found["ratio"], 3)
            times = [f"{found[side]:>10.2f}" if side in found else f"{'':>10}" for side in ("plain", "ours")]
            more = found.get("form", "") or ("" if "ours" in found else {k: round(v, 2) for k, v in found.items()})
            print(f"{name:<28} {times[0]} {times[1]} {ratios.get(name, ''):>8} {more}", flush=True)
    return ratios, figures


def main() -> None:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds and small sizes: does it run")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    ratios, figures = run(args.only, args.quick)
    print(json.dumps({"benchmark": "serve", "ratios": ratios, "figures": figures}))


if __name__ == "__main__":
    main()
