"""Is our training loop as fast as a plain torch loop, and what do lazy tables and packed histories gain?

Every comparison trains one model twice, with the same arithmetic and on the same encoded ids: once by a plain loop as one
would write it by hand (below), once by `unbraid.train.fit` on `unbraid.data.table.Encoded`, prefetch thread included.
Encoding lies outside the timing.  Rounds of the two sides alternate in one process (each case has its own), so that other
work on the machine hits both; a ratio is the median over the pairs, above 1 ours is better.

    python benchmarks/train_speed.py [--quick] [--threads 1 2] [--only mmoe tables din dense memory]

| ratio | plain | ours |
|---|---|---|
| ``loop_overhead_dense`` | MMoE, fused Adam | the same, all tables dense |
| ``loop_overhead_lazy`` | MMoE, SparseAdam for the tables, fused Adam for the layers | the same, all tables lazy |
| ``loop_overhead`` | | the smaller of the two |
| ``lazy_vs_dense_1m`` | MMoE, 8 tables of 1M rows, fused Adam | the same, lazy |
| ``din_packed`` | DIN, histories padded to the longest of the batch, fused Adam | packed, all tables dense |
| ``din_packed_kept`` | as ``din_packed``, in a process that keeps the memory it frees: without page faults | the same |
| ``bfloat16_NAME`` | our loop in float32 | the same in bfloat16: MMoE, a small shared bottom, cross layers |
| ``compile_NAME`` | our loop | the same with ``training.compile``: an interaction below a small tower |
| ``din_memory`` | peak of the resident memory over that before the first step, plain | the same, ours |

Ratios of speed are ratios of rows per second, by the clock and the number of torch's threads: ``NAME.wall.2``; ``NAME`` alone
is by the process's CPU time with the first number of ``--threads``.  CPU time counts our prefetch thread; what it prepared
before a round is paid for by what it prepares after it.  On a busy machine read the CPU ratios of one thread and nothing else.

Each side of ``din_memory`` runs in a process of its own (Linux only), with one thread; ``whole`` is the peak of the whole
process: imports, data and model included.  Both models and both forms of the data are loaded in both processes.

Data: a generated log.  Eight id columns of 100k, 100k, 10k, 1k, 500, 50, 24 and 8 values, drawn by a Zipf law; two binary
labels planted from the ids; a history of up to 200 items (mean 75) of the same 100k values as the item column.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbraid.data.declaration import Data, Events, Split
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.interactions.cross import Cross
from unbraid.interactions.fm import FM
from unbraid.interactions.gwpfm import GwPFM
from unbraid.layers import initialise
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.slots import Update
from unbraid.towers.experts import MMoE
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training, fit
from unbraid.train.dense import dense
from unbraid.types import Feature, Field, History, Schema, Task

SIZES = {"user": 100_000, "item": 100_000, "shop": 10_000, "brand": 1_000, "city": 500, "age": 50, "hour": 24, "os": 8}
TASKS, WIDTH, BATCH, LENGTH, MEAN = ("click", "buy"), 16, 4096, 200, 75
EXPERTS, EXPERT, TOWER, TOP, ATTENTION = 4, (256, 128), (64,), (256, 128), 64
# Rows per CPU-second of other plain loops for these models, once measured on 2 cores: a slower one here would flatter us.
REACHES = {"loop_overhead_dense": 24_000, "din_packed": 2_400}


# ----------------------------------------------------------------------------------------------------------------- data
def zipf(rng: np.random.Generator, size: int, n: int) -> np.ndarray:
    """(n,) values below ``size`` whose frequencies fall as 1 / rank; the ranks are shuffled over the values."""
    mass = np.cumsum(1 / np.arange(1, size + 1))
    return rng.permutation(size)[np.searchsorted(mass, rng.random(n) * mass[-1])]


def make_log(rows: int, sizes: Mapping[str, int] = SIZES, seed: int = 0) -> pl.DataFrame:
    """The id columns and two labels that depend on them; the last hundredth of the rows validates and tests."""
    rng = np.random.default_rng(seed)
    columns = {name: zipf(rng, size, rows) for name, size in sizes.items()}
    effects = {task: sum(rng.normal(size=sizes[n])[c] for n, c in columns.items()) for task in TASKS}
    labels = {t: (rng.random(rows) < 1 / (1 + np.exp(1.0 - 0.5 * e))).astype(np.int8) for t, e in effects.items()}
    held = rows // 200
    split = ["train"] * (rows - 2 * held) + ["valid"] * held + ["test"] * held
    return pl.DataFrame({**columns, **labels, "time": np.ones(rows, dtype=np.int64), "split": split})


def make_histories(log: pl.DataFrame, seed: int = 1) -> pl.DataFrame:
    """One list of items per user of the log: exponential lengths, cut at 200, of mean 75."""
    rng = np.random.default_rng(seed)
    users = log["user"].unique(maintain_order=True)
    lengths = np.minimum(rng.exponential(1.1 * MEAN, len(users)).astype(np.int64), LENGTH)
    items = pl.Series("items", zipf(rng, SIZES["item"], int(lengths.sum())))
    owner = users.gather(np.repeat(np.arange(len(users)), lengths))
    return pl.DataFrame({"user": owner, "items": items})


def encoded(
    rows: int, folder: Path, history: bool = False, sizes: Mapping[str, int] = SIZES, domain: str = ""
) -> Encoded:  # fmt: skip
    """The log through the library's own encoder; ``domain``: a column that says the domain, too."""
    log = make_log(rows, sizes)
    tables = {"log": log, **({"past": make_histories(log)} if history else {})}
    past = {
        "user": "user", "time": "time", "fields": (Field("items", vocabulary="item"),),
        "events": (Events({"items": "items"}, table="past", time="none"),),
        "histories": (History("past", ("items",), length=LENGTH),),
    }  # fmt: skip
    data = Data(
        rows="log", features=tuple(Feature(name) for name in sizes), tasks=tuple(Task(name) for name in TASKS),
        split=Split(kind="column", column="split"), cache=str(folder), domain=domain, **(past if history else {}),
    )  # fmt: skip
    return Encoded(encode(data, tables=tables))


# ------------------------------------------------------------------------------------------------------- the plain loop
def layers(*widths: int) -> nn.Sequential:
    """Linear and ReLU between each two widths."""
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU(inplace=True))))


class PlainTables(nn.Module):
    """One embedding per column, side by side; initialised as the library's tables are."""

    def __init__(self, schema: Schema, sparse: bool) -> None:
        super().__init__()
        sizes = {f.name: schema.sizes[f.vocab] for f in schema.features}
        self.embeddings = nn.ModuleDict({n: nn.Embedding(size, WIDTH, sparse=sparse) for n, size in sizes.items()})
        for table in self.embeddings.values():
            nn.init.normal_(table.weight, 0.0, 1e-2)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> list[Tensor]:
        """One (B, D) per column of ids (B, columns)."""
        return [table(column) for table, column in zip(self.embeddings.values(), ids.unbind(1), strict=True)]


class PlainMMoE(nn.Module):
    """MMoE on the concatenated embeddings."""

    def __init__(self, schema: Schema, sparse: bool = False) -> None:
        super().__init__()
        self.tables, width = PlainTables(schema, sparse), WIDTH * len(schema.features)
        self.experts = nn.ModuleList(layers(width, *EXPERT) for _ in range(EXPERTS))
        self.gates = nn.ModuleList(nn.Linear(width, EXPERTS) for _ in schema.tasks)
        self.towers = nn.ModuleList(layers(EXPERT[-1], *TOWER) for _ in schema.tasks)
        self.heads = nn.ModuleList(nn.Linear(TOWER[-1], 1) for _ in schema.tasks)
        initialise(self)

    def forward(self, ids: Tensor, history: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
        """One (B,) logit per task.  ``history`` is not read."""
        x = torch.cat(self.tables(ids), dim=1)
        pool = [expert(x) for expert in self.experts]
        logits = []
        for gate, tower, head in zip(self.gates, self.towers, self.heads, strict=True):
            share = gate(x).softmax(dim=1)
            mixed = share[:, :1] * pool[0]
            for n in range(1, EXPERTS):  # faster on a CPU than a stack and a sum or a batched matmul
                mixed = torch.addcmul(mixed, share[:, n : n + 1], pool[n])
            logits.append(head(tower(mixed)).squeeze(1))
        return logits


class PlainDIN(nn.Module):
    """DIN on padded histories: an MLP on [q, e, q - e, q * e] weighs the events; then an MLP for all tasks."""

    def __init__(self, schema: Schema, sparse: bool = False) -> None:
        super().__init__()
        self.tables, width = PlainTables(schema, sparse), WIDTH * (len(schema.features) + 1)
        self.item = [f.name for f in schema.features].index("item")
        self.attention = nn.Sequential(*layers(4 * WIDTH, ATTENTION), nn.Linear(ATTENTION, 1))
        self.top = layers(width, *TOP)
        self.heads = nn.ModuleList(nn.Linear(TOP[-1], 1) for _ in schema.tasks)
        initialise(self)

    def forward(self, ids: Tensor, history: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
        """One (B,) logit per task.  ``history``: items (B, L) and which of them are events (B, L)."""
        assert history is not None
        items, mask = history
        fields = self.tables(ids)
        events = self.tables.embeddings["item"](items)
        query = fields[self.item].unsqueeze(1).expand_as(events)
        scores = self.attention(torch.cat([query, events, query - events, query * events], dim=2)).squeeze(2)
        past = torch.bmm((scores * mask).unsqueeze(1), events).squeeze(1)
        hidden = self.top(torch.cat([*fields, past], dim=1))
        return [head(hidden).squeeze(1) for head in self.heads]


class PlainData:
    """All training rows in memory as tensors, of the types that the model reads; histories packed, padded per batch."""

    def __init__(self, data: Encoded, rows: np.ndarray) -> None:
        columns, schema = data.columns, data.schema
        self.ids = torch.from_numpy(np.stack([columns[f"feature.{f.name}"][rows] for f in schema.features], 1)).long()
        self.labels = torch.from_numpy(np.stack([columns[f"label.{t.name}"][rows] for t in schema.tasks], 1)).float()
        self.events: Tensor | None = None
        if schema.histories:
            name = schema.histories[0].name
            self.events = torch.from_numpy(columns["event.items"].astype(np.int64))
            self.start = torch.from_numpy(columns[f"start.{name}"][rows].astype(np.int64))
            self.lengths = torch.from_numpy(columns[f"end.{name}"][rows].astype(np.int64)) - self.start

    def padded(self, index: Tensor) -> tuple[Tensor, Tensor] | None:
        """Items (B, L) and mask (B, L) float of some rows, L the longest of them."""
        if self.events is None:
            return None
        lengths = self.lengths[index]
        place = torch.arange(int(lengths.max()))
        mask = place < lengths.unsqueeze(1)
        at = (self.start[index].unsqueeze(1) + place).clamp_(max=len(self.events) - 1)
        return self.events[at] * mask, mask.float()  # padding reads row 0, as a padding index would


def plain_optimizers(model: nn.Module, sparse: bool) -> list[torch.optim.Optimizer]:
    """Fused Adam, of everything or of all but the tables."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    others = [p for p in model.parameters() if not sparse or all(p is not t for t in tables)]
    dense = torch.optim.Adam(others, lr=1e-3, fused=True)
    return [dense, torch.optim.SparseAdam(tables, lr=1e-3)] if sparse else [dense]


def plain_losses(model: nn.Module, data: PlainData, index: Tensor) -> Tensor:
    """(T,) mean cross-entropy of each task on some rows."""
    logits = model(data.ids[index], data.padded(index))
    labels = data.labels[index].to(logits[0].dtype)
    return torch.stack([F.binary_cross_entropy_with_logits(s, labels[:, t]) for t, s in enumerate(logits)])


class Plain:
    """The plain side: trains on from where it was, some steps at a time."""

    def __init__(self, model: nn.Module, data: PlainData, sparse: bool = False) -> None:
        self.model, self.data, self.optimizers = model, data, plain_optimizers(model, sparse)
        self.order = self.batches()

    def batches(self) -> Iterator[Tensor]:
        """Row numbers of the batches, in a new order every epoch."""
        while True:
            order = torch.randperm(len(self.data.ids))
            yield from order[: len(order) // BATCH * BATCH].split(BATCH)

    def train(self, steps: int) -> None:
        """Some steps."""
        for _ in range(steps):
            loss = plain_losses(self.model, self.data, next(self.order)).sum()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()

    def settle(self) -> None:
        """Nothing runs between rounds."""


# ----------------------------------------------------------------------------------------------------------- our side
class Ours:
    """The library's side, on an endless stream of prefetched batches; ``training``: precision and compilation."""

    def __init__(self, model: Model, data: Encoded, training: Training | None = None) -> None:
        self.model, self.done, self.training = model, 0, training or Training()
        self.terms = [Supervised().bind(data.schema)]
        self.update: Update = Joint(lr=1e-3).build(model, steps=1, weights={})
        self.stream = data.shuffled(data.split("train"), BATCH, seed=0)

    def train(self, steps: int) -> None:
        """Some steps."""
        with dense(self.model, self.training):
            self.done = fit(self.model, self.stream, self.terms, self.update, steps=self.done + steps, start=self.done)

    def settle(self) -> None:
        """Let the prefetch thread fill its queue again, so that a round pays for as many batches as it used."""
        time.sleep(0.3)


def our_mmoe(schema: Schema, lazy: bool, heads: Heads | None = None) -> Model:
    """The same MMoE from the library's parts."""
    tower = MMoE(experts=EXPERTS, expert=EXPERT, gate=(), tower=TOWER)
    return Model(schema, tower, Views(width=WIDTH, lazy_rows=0 if lazy else -1), heads=heads)


def our_small(schema: Schema, interaction: Any = None) -> Model:
    """A small shared bottom on an interaction of the eight fields."""
    return Model(
        schema, SharedBottom(bottom=(64, 32), tower=()), Views(width=WIDTH, lazy_rows=0), interaction=interaction
    )


def our_din(schema: Schema, lazy: bool) -> Model:
    """The same DIN from the library's parts."""
    from unbraid.encoders.din import DIN

    history = DIN(hidden=(ATTENTION,), activation="relu")
    tables = Views(width=WIDTH, lazy_rows=0 if lazy else -1)
    return Model(schema, SharedBottom(bottom=TOP, tower=()), tables, history=history)


# ------------------------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class Round:
    """Seconds of a round: of the wall clock, and of this process on all cores."""

    wall: float
    cpu: float


def timed(side: Plain | Ours, steps: int) -> Round:
    """Train some steps."""
    wall, cpu = time.perf_counter(), time.process_time()
    side.train(steps)
    wall = time.perf_counter() - wall
    side.settle()
    return Round(wall, time.process_time() - cpu)


def compare(plain: Plain | Ours, ours: Ours, steps: int, pairs: int) -> dict[str, Any]:
    """Rows per second of both sides and the median ratios of alternating pairs of rounds."""
    sides: tuple[Plain | Ours, ...] = (plain, ours)
    for side in sides:  # moments are made, pages touched
        side.train(3)
        side.settle()
    found: list[tuple[Round, Round]] = []
    for number in range(pairs):
        order = sides if number % 2 else sides[::-1]
        rounds = [timed(side, steps) for side in order]
        found.append((rounds[0], rounds[1]) if number % 2 else (rounds[1], rounds[0]))
    rows, figures = steps * BATCH, {}
    for clock in ("wall", "cpu"):
        times = [(getattr(a, clock), getattr(b, clock)) for a, b in found]
        figures[clock] = {
            "plain": round(rows / statistics.median(a for a, _ in times)),
            "ours": round(rows / statistics.median(b for _, b in times)),
            "ratio": round(statistics.median(a / b for a, b in times), 3),
        }
    return figures


Side = Plain | Ours
Case = Callable[[Path, bool], tuple[Side, Ours, int, int]]  # (cache, quick) -> both sides, steps per round, pairs


def mmoe(folder: Path, quick: bool, lazy: bool) -> tuple[Plain, Ours, int, int]:
    """MMoE with the same optimiser on both sides."""
    data = encoded(40_000 if quick else 400_000, folder)
    plain = Plain(PlainMMoE(data.schema, sparse=lazy), PlainData(data, data.split("train")), sparse=lazy)
    return plain, Ours(our_mmoe(data.schema, lazy), data), *((4, 3) if quick else (16, 11))


def million(folder: Path, quick: bool) -> tuple[Plain, Ours, int, int]:
    """MMoE with eight tables of a million rows: more than the log has values, as in a log that grows."""
    sizes = dict.fromkeys(SIZES, 1_000_000)
    data = encoded(20_000 if quick else 200_000, folder, sizes=sizes)
    data.schema = dataclasses.replace(data.schema, sizes=sizes)
    plain = Plain(PlainMMoE(data.schema), PlainData(data, data.split("train")))
    return plain, Ours(our_mmoe(data.schema, lazy=True), data), *((2, 2) if quick else (5, 7))


def din(folder: Path, quick: bool) -> tuple[Plain, Ours, int, int]:
    """DIN, padded against packed; all tables dense."""
    data = encoded(20_000 if quick else 200_000, folder, history=True)
    plain = Plain(PlainDIN(data.schema), PlainData(data, data.split("train")))
    return plain, Ours(our_din(data.schema, lazy=False), data), *((1, 2) if quick else (3, 7))


INTERACTIONS: dict[str, Any] = {
    "small": None,
    "cross": Cross(),
    "fm": FM(),
    "gwpfm": GwPFM(groups={"of_user": ("user", "age")}),
}


def options(folder: Path, quick: bool, name: str, training: Training) -> tuple[Ours, Ours, int, int]:
    """Our loop without and with an option, all tables lazy."""
    data = encoded(40_000 if quick else 400_000, folder)
    of = [
        our_mmoe(data.schema, True) if name == "mmoe" else our_small(data.schema, INTERACTIONS[name]) for _ in range(2)
    ]
    return Ours(of[0], data), Ours(of[1], data, training), *((2, 2) if quick else (16, 11))


def bfloat16(name: str) -> tuple[str, Case]:
    """The case of a precision."""
    return "dense", lambda folder, quick: options(folder, quick, name, Training(precision="bfloat16"))


def compiled(name: str) -> tuple[str, Case]:
    """The case of compilation.  Quick ones are left to the eager loop: a compiler takes a minute."""
    return "dense", lambda folder, quick: options(folder, quick, name, Training(compile=not quick))


CASES: dict[str, tuple[str, Case]] = {
    "loop_overhead_dense": ("mmoe", lambda folder, quick: mmoe(folder, quick, lazy=False)),
    "loop_overhead_lazy": ("mmoe", lambda folder, quick: mmoe(folder, quick, lazy=True)),
    "lazy_vs_dense_1m": ("tables", million),
    "din_packed": ("din", din),
    "din_packed_kept": ("din", din),
    **{f"bfloat16_{name}": bfloat16(name) for name in ("mmoe", "small", "cross")},
    **{f"compile_{name}": compiled(name) for name in ("cross", "fm", "gwpfm")},
}
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # glibc: give nothing back


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest() -> int:
    """Most bytes of this process in memory since its start or since the peak was last reset."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def memory_of(side: str, folder: Path, quick: bool) -> None:
    """Print, as JSON, how much memory some steps of one side of DIN take.  Runs in a process of its own."""
    torch.set_num_threads(1)
    plain, ours, *_ = din(folder, quick)
    chosen = plain if side == "plain" else ours
    before, loading = resident(), highest()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    chosen.train(2 if quick else 8)
    print(json.dumps({"training": highest() - before, "whole": max(loading, highest())}))


def apart(folder: Path, quick: bool, *options: str) -> dict[str, Any]:
    """What this file prints last when it is run in a process of its own: no case finds the heap that another one left."""
    command = [sys.executable, __file__, "--cache", str(folder), *options, *(["--quick"] if quick else [])]
    env = {**os.environ, **(KEEP if any(option.endswith("_kept") for option in options) else {})}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def memory(folder: Path, quick: bool) -> dict[str, Any]:
    """Peak memory of both sides of DIN, each in its own process, and the ratios."""
    found = {side: apart(folder, quick, "--memory-of", side) for side in ("plain", "ours")}
    ratios = {key: round(found["plain"][key] / found["ours"][key], 3) for key in ("training", "whole")}
    return {**found, "ratio": ratios}


def speed_of(name: str, threads: list[int], folder: Path, quick: bool) -> None:
    """Print, as JSON, `compare` of one case for each number of threads.  Runs in a process of its own."""
    torch.manual_seed(0)
    case = CASES[name][1](folder, quick)
    found = {}
    for count in threads:
        torch.set_num_threads(count)
        found[str(count)] = compare(*case)
    print(json.dumps(found))


def run(cases: list[str], threads: list[int], folder: Path, quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure, print the table, return ratios and figures."""
    ratios: dict[str, float] = {}
    figures: dict[str, Any] = {}
    print(f"{'case':<22} {'threads':>7} {'clock':>5} {'plain rows/s':>13} {'ours rows/s':>12} {'ours/plain':>11}")
    for name, (group, _) in CASES.items():
        if group not in cases:
            continue
        counted = apart(folder, quick, "--speed-of", name, "--threads", *map(str, threads))
        for count, found in counted.items():
            figures[f"{name}.{count}"] = found
            ratios.setdefault(name, found["cpu"]["ratio"])
            for clock, row in found.items():
                ratios[f"{name}.{clock}.{count}"] = row["ratio"]
                line = f"{name:<22} {count:>7} {clock:>5} {row['plain']:>13,} {row['ours']:>12,} {row['ratio']:>11.3f}"
                print(line, flush=True)
    for key in [key for key in ratios if key.startswith("loop_overhead_dense")]:
        ratios[key.replace("_dense", "")] = min(ratios[key], ratios[key.replace("_dense", "_lazy")])
    for name, least in REACHES.items():
        if f"{name}.1" in figures:
            print(
                f"plain loop of {name}: {figures[f'{name}.1']['cpu']['plain']:,} rows per CPU-second; reference {least:,}"
            )
    if "memory" in cases:
        figures["din_memory"] = found = memory(folder, quick)
        ratios["din_memory"], ratios["din_memory.whole"] = found["ratio"]["training"], found["ratio"]["whole"]
        sizes = {side: {k: f"{v / 2**20:,.0f} MiB" for k, v in found[side].items()} for side in ("plain", "ours")}
        print(f"din_memory: plain {sizes['plain']}, ours {sizes['ours']}, ratio {found['ratio']}")
    return ratios, figures


def main() -> None:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows and steps, one thread: does it run")
    parser.add_argument("--threads", type=int, nargs="+", help="of torch; 1 and, with two cores, 2")
    groups = [*dict.fromkeys(group for group, _ in CASES.values()), "memory"]
    parser.add_argument("--only", nargs="+", choices=groups, default=groups)
    parser.add_argument("--cache", default="", help="keep the encoded log here")
    parser.add_argument("--speed-of", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", choices=["plain", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    threads = args.threads or ([1] if args.quick or (os.cpu_count() or 1) == 1 else [1, 2])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.cache or scratch)
        if args.memory_of:
            memory_of(args.memory_of, folder, args.quick)
            return
        if args.speed_of:
            speed_of(args.speed_of, threads, folder, args.quick)
            return
        ratios, figures = run(args.only, threads, folder, args.quick)
    print(json.dumps({"benchmark": "train_speed", "ratios": ratios, "figures": figures}))


if __name__ == "__main__":
    main()
