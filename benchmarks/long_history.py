"""What does a long history cost: the search over it, a training step with DARE, and memory?

Every comparison computes one thing twice, by plain torch as one would write it by hand and by the library, and asserts before
the timing that both give the same: the same events kept up to ties of 1e-6, outputs within 1e-5.  Rounds of the two sides
alternate in one process (each case has its own); a ratio is the median over the pairs of rounds, above 1 ours is better.  Times
are CPU times of the process, with one thread.

    python benchmarks/long_history.py [--quick] [--only search training memory]

Search, forward only: 256 rows with 10,000 events each, the 20 best are kept and attended to; uniform ids among 100,000 of
width 16, with values of width 64, unless the name says otherwise.  Ours is `unbraid.encoders.search.search`, then scores,
softmax and sum of the kept.

| ratio | plain |
|---|---|
| ``search_d16_vs_best_plain`` | gather, product, top-k, softmax, sum of the kept: the best of 12 forms |
| ``search_d64_...``, ``search_d128_...`` | the same, wider vectors |
| ``search_1m_...``, ``search_10m_...`` | the same, 1M ids, or 10M with values of width 16; left out where memory is short |
| ``search_zipf_...``, ``search_repeats_...`` | the same, ids by a Zipf law; each row has 500 different ids |
| ``search_d16_vs_two_pass`` | all vectors gathered, scores, top-k mask, scores again, softmax and sum over all |
| ``search_d16_vs_two_pass_chunked`` | the same, 16 rows at a time |
| ``search_d16_vs_two_pass_v16`` | the same, all rows at once, values of width 16 |
| ``search_d16_vs_din`` | DIN's network of 64 units on each event, sum over all: another model, not checked |

| ratio | plain | ours |
|---|---|---|
| ``dare_packed`` | DARE on padded histories of up to 200 events, mean 75, batch 1,024 | `unbraid.train.fit`, packed |
| ``train_2000`` | the same, up to 2,000 events, mean 750, batch 128 | the same |
| ``..._kept`` | in processes that keep the memory they free: without page faults | |
| ``attention_vs_mean`` | no comparison of one thing: a step with ``target_attention``, up to 50 events | a step with ``mean`` |
| ``memory_10k_vs_plain`` | peak memory of DARE's training step with 10,000 events a row, padded | packed |

Figures that are no comparisons: ``recall_bfloat16``, the share of the kept events that a search in bfloat16 keeps (``.d64`` of
width 64); ``memory_10k_per_1k`` and ``memory_50k_per_1k``, bytes per event of histories of 10,000 or 50,000 events over those of
1,000 (1: linear, below: fixed costs).

The plain forms gather by ``F.embedding`` or by ``index_select`` and take 1, 2, 4, 8, 16 or 32 rows at a time; the best on this
machine is looked for first, then timed against ours.  A training step is forward, backward and fused Adam with dense tables on
both sides, with second heads and their loss; items, categories and ranks.  Memory: 16 rows, peak of the resident memory of a
process of its own over that before the first step (Linux only), over the number of events; fixed costs are those of no
history, subtracted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_speed import KEEP as KEPT
from train_speed import highest, layers, resident, zipf

from unbraid.data.declaration import Data, Events, Split
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.attention import TargetAttention
from unbraid.encoders.dare import DARE
from unbraid.encoders.din import DIN
from unbraid.encoders.packed import pool, segment_softmax
from unbraid.encoders.pooling import Mean
from unbraid.encoders.search import Part, event_scores, recall, search
from unbraid.encoders.table import Views
from unbraid.layers import initialise
from unbraid.losses.history import HistoryLoss
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.train import fit
from unbraid.types import FIRST_VALUE, Feature, Field, History, Ragged, Rows, Schema, Task

ROWS, LENGTH, KEEP, ITEMS, CATEGORIES, WIDTH = 256, 10_000, 20, 100_000, 5_000, 16
CHUNKS, FORMS, TIE = (1, 2, 4, 8, 16, 32), ("embedding", "index_select"), 1e-6
VALUES, TOP, SECOND = 64, (128, 64), (64,)


# --------------------------------------------------------------------------------------------------------------- search
class Searched:
    """What all sides of a search case read.

    Args:
        width: D of the keys; vocabulary: U; ids: ``uniform``, ``zipf`` or ``repeats``; quick: few and short rows.
        values: D of the values.
    """

    def __init__(self, width: int, vocabulary: int, ids: str, quick: bool, values: int = VALUES) -> None:
        rng, g = np.random.default_rng(0), torch.Generator().manual_seed(0)
        self.rows, self.length = (24, 3_000) if quick else (ROWS, LENGTH)
        n = self.rows * self.length
        if ids == "zipf":
            drawn = zipf(rng, vocabulary, n)
        elif ids == "repeats":
            own = rng.integers(0, vocabulary, (self.rows, 500))
            drawn = np.take_along_axis(own, rng.integers(0, 500, (self.rows, self.length)), 1).reshape(-1)
        else:
            drawn = rng.integers(0, vocabulary, n)
        self.ids = torch.from_numpy(drawn)
        self.keys, self.values = (torch.randn(vocabulary, d, generator=g) for d in (width, values))
        self.query = torch.randn(self.rows, width, generator=g)
        self.scale = 1 / math.sqrt(width)
        self.lists = Ragged({}, torch.arange(0, n + 1, self.length))

    def exact(self, kept: Tensor) -> Tensor:
        """(B, K) float64 scores of some events (B, K)."""
        vectors = self.keys[self.ids.view(self.rows, -1).gather(1, kept)].double()
        return (vectors * self.query.double().unsqueeze(1)).sum(2) * self.scale

    def attended(self, kept: Tensor) -> Tensor:
        """(B, D) float64 what attention to some events (B, K) gives."""
        values = self.values[self.ids.view(self.rows, -1).gather(1, kept)].double()
        return torch.bmm(self.exact(kept).softmax(1).unsqueeze(1), values).squeeze(1)


Result = tuple[Tensor, Tensor]  # columns of the kept events (B, K) in any order, and what is attended to (B, D)


def ours(case: Searched) -> Result:
    """Search, then attention to what was kept."""
    parts = [Part(Rows(case.keys, case.ids), case.query, case.scale)]
    kept = search(parts, Ragged({}, case.lists.offsets), KEEP)
    weights = segment_softmax(event_scores(kept.parts(parts), kept.lists), kept.lists)
    out = pool(kept.of(Rows(case.values, case.ids)), weights, kept.lists)
    return kept.index.view(case.rows, KEEP) - case.lists.offsets[:-1].unsqueeze(1), out


def _gathered(table: Tensor, ids: Tensor, form: str) -> Tensor:
    """(b, L, D) vectors of ids (b, L)."""
    if form == "embedding":
        return F.embedding(ids, table)
    return table.index_select(0, ids.view(-1)).view(*ids.shape, -1)


def plain(case: Searched, form: str, chunk: int) -> Result:
    """The same by hand, some rows at a time."""
    kept, out = [], []
    for ids, query in zip(case.ids.view(case.rows, -1).split(chunk), case.query.split(chunk), strict=True):
        scores = torch.bmm(_gathered(case.keys, ids, form), query.unsqueeze(2)).squeeze(2) * case.scale
        best = scores.topk(KEEP, dim=1)
        values = _gathered(case.values, ids.gather(1, best.indices), form)
        out.append(torch.bmm(best.values.softmax(1).unsqueeze(1), values).squeeze(1))
        kept.append(best.indices)
    return torch.cat(kept), torch.cat(out)


def two_pass(case: Searched, chunk: int) -> Result:
    """Two passes over all events: one to find the mask of the best, one to attend under it."""
    kept, out = [], []
    for ids, query in zip(case.ids.view(case.rows, -1).split(chunk), case.query.split(chunk), strict=True):
        keys, values = F.embedding(ids, case.keys), F.embedding(ids, case.values)
        scores = torch.bmm(keys, query.unsqueeze(2)).squeeze(2) * case.scale
        best = scores.topk(KEEP, dim=1).indices
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        again = torch.bmm(keys, query.unsqueeze(2)).squeeze(2) * case.scale
        weights = again.masked_fill(~mask, -(2.0**32) + 1).softmax(1)
        out.append(torch.bmm(weights.unsqueeze(1), values).squeeze(1))
        kept.append(best)
    return torch.cat(kept), torch.cat(out)


def din(case: Searched) -> Result:
    """DIN's network on every event, and the sum of all: another model, what it costs."""
    torch.manual_seed(0)
    module = DIN(hidden=(64,), activation="relu").build({"item": case.keys.shape[1]}, {"item": case.keys.shape[1]})
    events = {"value": {"item": Rows(case.keys, case.ids)}}
    module.eval()
    return case.ids[:0], module(events, case.lists, {"value": {"item": case.query}})["item"]


def same(case: Searched, mine: Result, theirs: Result) -> None:
    """Raises AssertionError unless both kept the same events, up to ties, and give the same.

    Of events of one id, which tie, either may be kept.  Rows whose kept ids differ by a tie are few; there each side's output
    is that of the events that it kept, which is asserted in float64 for all rows.
    """
    places = [found[0].sort(1).values for found in (mine, theirs)]
    for found in places:
        assert found.shape == (case.rows, KEEP) and bool((found.diff(dim=1) > 0).all()), "some row keeps an event twice"
    scores = [case.exact(found).sort(1).values for found in places]
    torch.testing.assert_close(*scores, rtol=0, atol=TIE)
    for kept, out in (mine, theirs):
        torch.testing.assert_close(out.double(), case.attended(kept), rtol=0, atol=1e-5)
    ids = [case.ids.view(case.rows, -1).gather(1, found).sort(1).values for found in places]
    agree = (ids[0] == ids[1]).all(1)
    assert int((~agree).sum()) <= case.rows // 8, f"{int((~agree).sum())} of {case.rows} rows keep other ids"
    torch.testing.assert_close(mine[1][agree], theirs[1][agree], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- measuring
def seconds(function: Callable[[], Any]) -> float:
    """CPU seconds of this process for one call: other work on the machine counts less than by the wall clock."""
    start = time.process_time()
    function()
    return time.process_time() - start


def alternate(theirs: Callable[[], Any], mine: Callable[[], Any], pairs: int) -> dict[str, float]:
    """Milliseconds of both sides and the median ratio of alternating pairs of rounds."""
    theirs(), mine()
    found = []
    for number in range(pairs):
        order = (theirs, mine) if number % 2 else (mine, theirs)
        times = [seconds(side) for side in order]
        found.append(times if number % 2 else times[::-1])
    return {
        "plain": round(1e3 * statistics.median(a for a, _ in found), 2),
        "ours": round(1e3 * statistics.median(b for _, b in found), 2),
        "ratio": round(statistics.median(a / b for a, b in found), 3),
    }


def best_plain(case: Searched, rounds: int) -> tuple[str, int]:
    """The fastest plain form on this machine."""
    times: dict[tuple[str, int], list[float]] = {form: [] for form in product(FORMS, CHUNKS)}
    for _ in range(rounds):
        for form, found in times.items():
            found.append(seconds(lambda: plain(case, *form)))  # noqa: B023
    return min(times, key=lambda form: min(times[form]))


def search_case(against: str, width: int, vocabulary: int, ids: str, values: int, quick: bool) -> dict[str, Any]:
    """One line of the table."""
    if 2 * 4 * (width + values) * vocabulary > free_memory():
        return {}
    pairs = 3 if quick else 11
    with torch.no_grad():
        case = Searched(width, vocabulary, ids, quick, values)
        mine = partial(ours, case)
        if against == "best_plain":
            form = best_plain(case, 1 if quick else 3)
            same(case, mine(), plain(case, *form))
            return {**alternate(partial(plain, case, *form), mine, pairs), "form": form}
        if against == "din":
            return alternate(partial(din, case), mine, min(pairs, 5))
        chunk = 16 if against == "two_pass_chunked" else case.rows
        same(case, mine(), two_pass(case, chunk))
        return alternate(partial(two_pass, case, chunk), mine, min(pairs, 5))


def free_memory() -> int:
    """Bytes that may still be used."""
    return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])


def recall_case(width: int, quick: bool) -> dict[str, Any]:
    """Share of the kept events that a search in bfloat16 keeps."""
    case = Searched(width, ITEMS, "uniform", quick)
    parts = [Part(Rows(case.keys, case.ids), case.query, case.scale)]
    return {"ratio": round(recall(parts, case.lists, KEEP), 4)}


# -------------------------------------------------------------------------------------------------------------- training
def encoded(rows: int, users: int, longest: int, mean: float, folder: Path, seed: int = 0) -> Encoded:
    """A log of items with categories and a label, and histories of exponential lengths, all ``longest`` with mean 0."""
    rng = np.random.default_rng(seed)
    category = rng.integers(0, CATEGORIES, ITEMS)
    item = zipf(rng, ITEMS, rows)
    log = pl.DataFrame({
        "user": rng.integers(0, users, rows), "item": item, "category": category[item],
        "click": rng.integers(0, 2, rows).astype(np.int8), "time": np.ones(rows, dtype=np.int64),
        "split": ["train"] * (rows - 4) + ["valid"] * 2 + ["test"] * 2,
    })  # fmt: skip
    lengths = np.minimum(rng.exponential(1.1 * mean, users), longest) if mean else np.full(users, longest)
    owner = np.repeat(np.arange(users), lengths.astype(np.int64))
    items = zipf(rng, ITEMS, len(owner))
    past = pl.DataFrame({"user": owner, "items": items, "categories": category[items]})
    data = Data(
        rows="log", features=(Feature("item"), Feature("category")), tasks=(Task("click"),),
        fields=(Field("items", vocabulary="item"), Field("categories", vocabulary="category")),
        events=(Events({"items": "items", "categories": "categories"}, table="past", time="none"),),
        histories=(History("past", ("items", "categories", "position"), length=longest),), user="user", time="time",
        split=Split(kind="column", column="split"), cache=str(folder),
    )  # fmt: skip
    return Encoded(encode(data, tables={"log": log, "past": past}))


def our_dare(schema: Schema) -> Model:
    """DARE from the library's parts, all tables dense."""
    tower = SharedBottom(bottom=TOP, tower=())
    return Model(schema, tower, Views(width=WIDTH, lazy_rows=-1), history=DARE(keep=KEEP, auxiliary=SECOND))


class PlainDARE(nn.Module):
    """DARE on padded histories, as one would write it: items, categories and ranks of both tables side by side."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        names = ("item", "category", "position")
        for role in ("value", "attention"):
            tables = {name: nn.Embedding(schema.sizes[name], WIDTH) for name in names}
            for table in tables.values():
                nn.init.normal_(table.weight, 0.0, 1e-2)
            setattr(self, role, nn.ModuleDict(tables))
        self.rank_query = nn.Parameter(torch.empty(WIDTH).normal_(0.0, 1e-2))
        self.top, self.head = layers(7 * WIDTH, *TOP), nn.Linear(TOP[-1], 1)
        self.second = nn.Sequential(*layers(7 * WIDTH, *SECOND), nn.Linear(SECOND[-1], 1))
        initialise(self)

    @staticmethod
    def read(tables: nn.ModuleDict, *ids: Tensor) -> Tensor:
        """(..., fields * D) vectors side by side."""
        return torch.cat([table(column) for table, column in zip(tables.values(), ids, strict=False)], -1)

    def forward(self, target: Sequence[Tensor], events: Sequence[Tensor], mask: Tensor) -> Tensor:
        """(2, B) logits of the head and the second head; target: two (B,); events: three (B, L); mask (B, L) bool."""
        keys, values, own = (
            self.read(self.attention, *events),
            self.read(self.value, *events),
            self.read(self.value, *target),
        )
        query = self.read(self.attention, *target) / math.sqrt(2 * WIDTH)
        query = torch.cat([query, (self.rank_query / math.sqrt(WIDTH)).expand(len(query), -1)], 1)
        scores = torch.bmm(keys, query.unsqueeze(2)).squeeze(2).masked_fill(~mask, torch.finfo(query.dtype).min)
        best = scores.topk(min(KEEP, scores.shape[1]), dim=1)
        kept = values.gather(1, best.indices.unsqueeze(2).expand(-1, -1, values.shape[2]))
        found = torch.bmm(self.weights(best.values, mask.gather(1, best.indices)), kept).squeeze(1)
        spread = torch.bmm(self.weights(scores, mask), values).squeeze(1)
        both = own.shape[1]
        x = torch.cat([own, found, found[:, :both] * own], 1)
        y = torch.cat([spread, spread[:, :both] * own, own], 1)
        return torch.stack([self.head(self.top(x)).squeeze(1), self.second(y).squeeze(1)])

    @staticmethod
    def weights(scores: Tensor, real: Tensor) -> Tensor:
        """(B, 1, L) softmax; 0 for padding, also where a row has nothing else."""
        return (scores.softmax(1) * real).unsqueeze(1)


class PlainSide:
    """The plain loop: all rows in memory, padded per batch, fused Adam."""

    def __init__(self, model: PlainDARE, data: Encoded, batch: int) -> None:
        columns, rows = data.columns, data.split("train")
        self.model, self.batch = model, batch
        self.target = [torch.from_numpy(columns[f"feature.{n}"][rows].astype(np.int64)) for n in ("item", "category")]
        self.label = torch.from_numpy(columns["label.click"][rows].astype(np.float32))
        self.events = [torch.from_numpy(columns[f"event.{n}"].astype(np.int64)) for n in ("items", "categories")]
        self.start, self.end = (torch.from_numpy(columns[f"{n}.past"][rows].astype(np.int64)) for n in ("start", "end"))
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        self.order = self.batches()

    def batches(self) -> Iterator[Tensor]:
        """Row numbers of the batches, in a new order every epoch."""
        while True:
            order = torch.randperm(len(self.label))
            yield from order[: len(order) // self.batch * self.batch].split(self.batch)

    def losses(self, index: Tensor) -> Tensor:
        """(2,) cross-entropies of the head and the second head on some rows."""
        start, lengths = self.start[index], self.end[index] - self.start[index]
        place = torch.arange(max(1, int(lengths.max())))
        mask = place < lengths.unsqueeze(1)
        at = (start.unsqueeze(1) + place).clamp_(max=max(0, len(self.events[0]) - 1))
        rank = (lengths.unsqueeze(1) - 1 - place + FIRST_VALUE) * mask
        events = [*(column[at] * mask for column in self.events), rank]
        logits = self.model([column[index] for column in self.target], events, mask)
        label = self.label[index].to(logits.dtype).expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, label, reduction="none").mean(1)

    def train(self, steps: int) -> None:
        """Some steps."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.losses(next(self.order)).sum().backward()
            self.optimizer.step()


class OurSide:
    """The library's loop on an endless stream of prefetched batches; ``second``: with the loss of second heads."""

    def __init__(self, model: Model, data: Encoded, batch: int, *, second: bool = True) -> None:
        self.model, self.done = model, 0
        self.terms = [term.bind(data.schema) for term in ((Supervised(), HistoryLoss()) if second else (Supervised(),))]
        self.update = Joint(lr=1e-3).build(model, steps=1, weights={})
        self.stream = data.shuffled(data.split("train"), batch, seed=0)

    def train(self, steps: int) -> None:
        """Some steps; then wait until the prefetch thread has filled its queue, so that it is paid for."""
        self.done = fit(self.model, self.stream, self.terms, self.update, steps=self.done + steps, start=self.done)
        time.sleep(0.3)


def training_case(longest: int, mean: float, batch: int, folder: Path, quick: bool) -> dict[str, Any]:
    """A DARE step, padded against packed."""
    batch = batch // 8 if quick else batch
    data = encoded(8 * batch + 4, 4 * batch, longest, mean, folder)
    theirs, mine = PlainSide(PlainDARE(data.schema), data, batch), OurSide(our_dare(data.schema), data, batch)
    steps, pairs = (1, 2) if quick else (6, 7)
    theirs.train(2), mine.train(2)
    return {"steps": steps, "batch": batch, **alternate(lambda: theirs.train(steps), lambda: mine.train(steps), pairs)}


def attention_case(folder: Path, quick: bool) -> dict[str, Any]:
    """A step with target attention against one with mean pooling, of up to 50 events; both are the library's."""
    batch = 128 if quick else 1024
    data = encoded(8 * batch + 4, 4 * batch, 50, 25, folder)
    tower = SharedBottom(bottom=TOP, tower=())
    attention, mean = (
        OurSide(Model(data.schema, tower, Views(width=WIDTH), history=history), data, batch, second=False)
        for history in (TargetAttention(), Mean())
    )
    steps, pairs = (1, 2) if quick else (6, 15)
    attention.train(2), mean.train(2)
    return {"steps": steps, **alternate(lambda: attention.train(steps), lambda: mean.train(steps), pairs)}


def memory_case(side: str, length: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Peak bytes of training steps on 16 histories of one length, then a search while serving."""
    data = encoded(68, 64, length, 0, folder)
    batch = 16
    trained: PlainSide | OurSide = (
        PlainSide(PlainDARE(data.schema), data, batch)
        if side == "plain"
        else OurSide(our_dare(data.schema), data, batch)
    )
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    trained.train(1 if quick else 4)
    peak = highest() - before
    if isinstance(trained, OurSide):
        trained.model.eval()
        with torch.no_grad():
            logits = trained.model(data.batch(data.split("test"))).logits["click"]
        assert bool(logits.isfinite().all())
    return {"bytes": peak, "events": batch * length}


# ----------------------------------------------------------------------------------------------------------------- cases
Case = Callable[[Path, bool], dict[str, Any]]


def _search(
    against: str, width: int = WIDTH, vocabulary: int = ITEMS, ids: str = "uniform", values: int = VALUES
) -> Case:
    return lambda _, quick: search_case(against, width, vocabulary, ids, values, quick)


def _training(longest: int, mean: float, batch: int) -> Case:
    return lambda folder, quick: training_case(longest, mean, batch, folder, quick)


def _memory(side: str, length: int) -> Case:
    return lambda folder, quick: memory_case(side, length, folder, quick)


CASES: dict[str, tuple[str, Case]] = {
    "search_d16_vs_best_plain": ("search", _search("best_plain")),
    "search_d64_vs_best_plain": ("search", _search("best_plain", width=64)),
    "search_d128_vs_best_plain": ("search", _search("best_plain", width=128)),
    "search_1m_vs_best_plain": ("search", _search("best_plain", vocabulary=1_000_000)),
    "search_10m_vs_best_plain": ("search", _search("best_plain", vocabulary=10_000_000, values=16)),
    "search_zipf_vs_best_plain": ("search", _search("best_plain", ids="zipf")),
    "search_repeats_vs_best_plain": ("search", _search("best_plain", ids="repeats")),
    "search_d16_vs_two_pass": ("search", _search("two_pass")),
    "search_d16_vs_two_pass_chunked": ("search", _search("two_pass_chunked")),
    "search_d16_vs_two_pass_v16": ("search", _search("two_pass", values=16)),
    "search_d16_vs_two_pass_kept": ("search", _search("two_pass")),
    "search_d16_vs_din": ("search", _search("din")),
    "recall_bfloat16": ("search", lambda _, quick: recall_case(WIDTH, quick)),
    "recall_bfloat16.d64": ("search", lambda _, quick: recall_case(64, quick)),
    "dare_packed": ("training", _training(200, 75, 1024)),
    "dare_packed_kept": ("training", _training(200, 75, 1024)),
    "train_2000": ("training", _training(2_000, 750, 128)),
    "train_2000_kept": ("training", _training(2_000, 750, 128)),
    "attention_vs_mean": ("training", attention_case),
    "memory.1k": ("memory", _memory("ours", 1_000)),
    "memory.10k": ("memory", _memory("ours", 10_000)),
    "memory.50k": ("memory", _memory("ours", 50_000)),
    "memory.none": ("memory", _memory("ours", 1)),
    "memory.plain.10k": ("memory", _memory("plain", 10_000)),
    "memory.plain.none": ("memory", _memory("plain", 1)),
}
SLOW = (
    "search_10m_vs_best_plain",
    "search_1m_vs_best_plain",
    "search_d128_vs_best_plain",
    "memory.50k",
)  # not if quick


def apart(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """What a case gives in a process of its own: none finds the heap that another one left."""
    command = [sys.executable, __file__, "--case", name, "--cache", str(folder), *(["--quick"] if quick else [])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(KEPT if name.endswith("_kept") else {})}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def memory_ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Bytes per event of each length beside those of 1,000 events, and ours beside plain."""

    def of(name: str, without: str) -> float:
        return figures[name]["bytes"] - figures[without]["bytes"]

    def per_event(name: str) -> float:
        return of(name, "memory.none") / figures[name]["events"]

    ratios = {
        f"memory_{size}_per_1k": per_event(f"memory.{size}") / per_event("memory.1k")
        for size in ("10k", "50k") if f"memory.{size}" in figures
    }  # fmt: skip
    ratios["memory_10k_vs_plain"] = of("memory.plain.10k", "memory.plain.none") / of("memory.10k", "memory.none")
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def run(groups: Sequence[str], folder: Path, quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure, print the table, return ratios and figures."""
    ratios: dict[str, float] = {}
    figures: dict[str, Any] = {}
    print(f"{'case':<32} {'plain ms':>10} {'ours ms':>10} {'ratio':>8}")
    for name, (group, _) in CASES.items():
        if group not in groups or (quick and name in SLOW):
            continue
        figures[name] = found = apart(name, folder, quick)
        if "ratio" in found:
            ratios[name] = found["ratio"]
        times = [f"{found[side]:>10.2f}" if side in found else f"{'':>10}" for side in ("plain", "ours")]
        what = f"{found['bytes'] / 2**20:,.0f} MiB" if "bytes" in found else found.get("ratio", "skipped")
        print(f"{name:<32} {times[0]} {times[1]} {what:>8} {found.get('form', '')}", flush=True)
    if "memory" in groups:
        ratios |= memory_ratios(figures)
        print(*(f"{name}: {ratio}" for name, ratio in ratios.items() if name.startswith("memory")), sep="\n")
    return ratios, figures


def main() -> None:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows and rounds, no large tables: does it run")
    groups = [*dict.fromkeys(group for group, _ in CASES.values())]
    parser.add_argument("--only", nargs="+", choices=groups, default=groups)
    parser.add_argument("--cache", default="", help="keep the encoded logs here")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.cache or scratch)
        if args.case:
            torch.set_num_threads(1)
            torch.manual_seed(0)
            print(json.dumps(CASES[args.case][1](folder, args.quick)))
            return
        ratios, figures = run(args.only, folder, args.quick)
    print(json.dumps({"benchmark": "long_history", "ratios": ratios, "figures": figures}))


if __name__ == "__main__":
    main()
