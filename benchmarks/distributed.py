"""What do two processes gain over one with two threads, what do they pay for talking, and what memory do divided tables save?

    python benchmarks/distributed.py [--quick] [--only scaling memory]

**Scaling.**  The same training steps (`unbraid.train.fit`, 4,096 rows a step) by one process with two threads and by two
processes with one thread each, which talk by gloo on this machine.  Rounds of the sides alternate, each in new processes, and a
ratio is the median over the pairs of rows per second by the clock: above 1, two processes are faster.

| case | model |
|---|---|
| ``mmoe`` | MMoE, eight id columns, tables as the defaults have them: the two of 100,000 rows lazy, the others dense |
| ``mmoe_divided`` | the same, all tables lazy and divided by rows over the processes |
| ``dare`` | DARE on histories of up to 200 items, tables as in ``mmoe`` |

``work``: CPU time of a step in both processes over that of one process with one thread: what being two costs, whoever else uses
the machine.  2 / ``work`` is the best that two free cores could gain over one.

``communication_ms``: time of a step that the first process spends in exchanges, waiting for the other one included, by kind:
``all_gather`` (labels, logits, ids), ``all_reduce`` (gradients, flags), ``all_to_all`` (rows of divided tables).

**Memory.**  One table of 20 million rows of 16 numbers and Adam's two moments of each, in each of two processes: the peak of the
resident memory over that before the table was made, after steps of 4,096 ids and after all rows were touched.  ``memory``: of a
divided table over that of a replicated one.

Data: the generated log of ``train_speed.py``.  Two cores should be free: on a busy machine the figures mean little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from train_speed import BATCH, EXPERT, EXPERTS, TOWER, WIDTH, encoded

from unbraid import parallel, sharding
from unbraid.data.table import Encoded, order
from unbraid.encoders.dare import DARE
from unbraid.encoders.table import Table, Views
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.towers.experts import MMoE
from unbraid.towers.mlp import SharedBottom
from unbraid.train import fit
from unbraid.train.rehearsal import shares
from unbraid.types import Batch, Output

CASES = ("mmoe", "mmoe_divided", "dare")
WARM = 5  # steps before the clock starts
BIG = 20_000_000
EXCHANGES = ("all_gather", "all_reduce", "all_to_all_single")


# ------------------------------------------------------------------------------------------------------- one of the processes
def model_of(case: str, data: Encoded) -> Model:
    """The model of a case."""
    torch.manual_seed(0)
    if case == "dare":
        return Model(data.schema, SharedBottom(bottom=(256, 128), tower=TOWER), Views(width=WIDTH), history=DARE())
    tables = Views(width=WIDTH) if case == "mmoe" else Views(width=WIDTH, lazy_rows=0, shard_mb=1e-9)
    return Model(data.schema, MMoE(experts=EXPERTS, expert=EXPERT, tower=TOWER), tables)


def steps_of(case: str, folder: Path, count: int) -> dict[str, Any]:
    """Train ``count`` steps; returns a step's seconds, CPU seconds of all processes and, by kind, seconds in exchanges."""
    data = Encoded(folder)
    model = model_of(case, data)
    sharding.same_start(model)
    term = Supervised().bind(data.schema)
    update = Joint().build(model, steps=WARM + count, weights={})
    batches = shares(order(data.split("train"), BATCH, 0), data.batch)
    spent: Counter[str] = Counter()

    def joined() -> Iterator[Batch]:
        for batch in batches:
            found = parallel.join(batch)
            parallel.note(found)
            yield found

    given = joined()
    fit(model, islice(given, WARM), [term], update, steps=WARM)
    for name in EXCHANGES:
        setattr(dist, name, timed(getattr(dist, name), name, spent))
    parallel.wait()
    began, busy = time.perf_counter(), time.process_time()
    fit(model, given, [term], update, steps=WARM + count, start=WARM)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    batches.close()  # type: ignore[attr-defined]
    cpu = sum(parallel.gather(busy)) / count
    return {"seconds": seconds / count, "cpu": cpu, "exchanges": {name: spent[name] / count for name in EXCHANGES}}


def timed(call: Callable[..., Any], name: str, spent: Counter[str]) -> Callable[..., Any]:
    """The call, whose time is added up."""

    def timed_call(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*given, **named)
        finally:
            spent[name] += time.perf_counter() - began  # type: ignore[assignment]

    return timed_call


class OneTable(nn.Module):
    """A table whose vectors are scored by one linear layer."""

    def __init__(self, rows: int, divided: bool) -> None:
        super().__init__()
        config = Views(width=WIDTH, lazy_rows=0, shard_mb=1e-9 if divided else 0.0)
        self.views = config.build((), {"item": rows})
        self.head = nn.Linear(WIDTH, 1)

    @property
    def tables(self) -> dict[str, Table]:
        """Name in a lookup -> table."""
        return dict(self.views.tables.items())  # type: ignore[arg-type]

    def forward(self, ids: torch.Tensor) -> Output:
        """Logits (B,) of ids (B,)."""
        read, lookups = self.views({"item": [ids]})
        hidden = read["shared", "item", "value"][0].gather()
        return Output({"click": self.head(hidden).squeeze(1)}, {"click": hidden}, hidden, {}, lookups)


def memory_of(divided: bool, rows: int) -> dict[str, Any]:
    """Bytes of this process's peak over what it had before the table."""
    torch.manual_seed(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model = OneTable(rows, divided)
    update = Joint().build(model, steps=5, weights={})
    for _ in range(5):
        output = model(torch.randint(2, rows, (BATCH,)))
        update({"click": nn.functional.softplus(output.logits["click"]).mean()}, output)
    for state in update.rows.state_dict().values():
        for moment in update.rows.moments:
            state[moment].add_(0.0)  # memory that nobody touched is not there yet
    return {"bytes": resident("VmHWM") - before}


def resident(name: str) -> int:
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def worker(what: str, case: str, folder: str, count: int) -> None:
    """One of the processes; the first one prints what it found."""
    with parallel.together("cpu"):
        found = steps_of(case, Path(folder), count) if what == "scaling" else memory_of(case == "divided", count)
        if what == "memory":
            found = {"bytes": max(parallel.gather(found["bytes"]))}
        parallel.wait()
        if parallel.rank() == 0:
            print(json.dumps(found), flush=True)


# -------------------------------------------------------------------------------------------------------------- both sides
def started(processes: int, threads: int, *arguments: Any) -> dict[str, Any]:
    """What the first of so many processes found."""
    own = [__file__, "--worker", *map(str, arguments)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), *own]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def scaling(cases: Sequence[str], steps: int, pairs: int, rows: int) -> dict[str, Any]:
    """Ratios and costs of some cases."""
    found: dict[str, Any] = {"scaling": {}, "work": {}, "communication_ms": {}, "step_ms": {}}
    with tempfile.TemporaryDirectory() as place:
        plain, past = (encoded(rows, Path(place) / name, history=name == "past").folder for name in ("plain", "past"))
        for case in cases:
            folder, ratios, twos = (past if case == "dare" else plain), list[float](), list[dict[str, Any]]()
            work: list[float] = []
            for number in range(pairs):
                sides = [(1, 2), (2, 1), (1, 1)]
                made = {s: started(*s, "scaling", case, folder, steps) for s in sides[:: 1 if number % 2 else -1]}
                ratios.append(made[1, 2]["seconds"] / made[2, 1]["seconds"])
                work.append(made[2, 1]["cpu"] / made[1, 1]["cpu"])
                twos.append(made[2, 1])
            exchanges = {n: 1e3 * statistics.median(two["exchanges"][n] for two in twos) for n in EXCHANGES}
            step = 1e3 * statistics.median(two["seconds"] for two in twos)
            found["scaling"][case] = round(statistics.median(ratios), 3)
            found["work"][case] = round(statistics.median(work), 3)
            found["communication_ms"][case] = {name: round(value, 2) for name, value in exchanges.items()}
            found["step_ms"][case] = round(step, 1)
            text = ", ".join(f"{name} {value:.1f}" for name, value in exchanges.items())
            print(f"{case}: {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}), "
                  f"{statistics.median(work):.2f} times the work ({min(work):.2f} to {max(work):.2f}); "
                  f"a step of two takes {step:.0f} ms, in exchanges {text}", flush=True)  # fmt: skip
    return found


def memory(rows: int) -> dict[str, Any]:
    """Peaks of a process with the whole table and with a part."""
    whole, part = (started(2, 1, "memory", case, "-", rows)["bytes"] for case in ("replicated", "divided"))
    print(f"memory of a process, {rows:,} x {WIDTH} and two moments: replicated {whole / 1e6:,.0f} MB, divided "
          f"{part / 1e6:,.0f} MB, {part / whole:.2f} times", flush=True)  # fmt: skip
    return {"memory": round(part / whole, 3), "memory_mb": {"replicated": whole // 10**6, "divided": part // 10**6}}


def main() -> None:
    """Print a line per case, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case, one short round; a table of 2 million rows")
    parser.add_argument("--only", nargs="+", choices=("scaling", "memory"), default=("scaling", "memory"))
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        what, case, folder, count = asked.worker
        worker(what, case, folder, int(count))
        return
    found: dict[str, Any] = {"benchmark": "distributed", "load": round(os.getloadavg()[0], 1)}
    if "scaling" in asked.only:
        found |= scaling(("mmoe_divided",), 10, 1, 70_000) if asked.quick else scaling(CASES, 40, 3, 200_000)
    if "memory" in asked.only:
        found |= memory(BIG // 10 if asked.quick else BIG)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
