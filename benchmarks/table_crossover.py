"""From which size on is a lazy table faster than a dense one?

One table of width 16, 8,192 uniform ids a step, whole training steps through `Tables` and the joint update: once with
the table dense (fused Adam over all rows), once lazy (`RowAdam` over the rows read).  Dense and lazy rounds alternate,
so that other work on the machine hits both, and the median ratio of a pair is reported.  Above 1, lazy is faster.

    python benchmarks/table_crossover.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor, nn

from unbraid.encoders.table import Table, Tables, Views
from unbraid.optim.joint import Joint, JointUpdate
from unbraid.types import Output

WIDTH, IDS = 16, 8192
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)


class OneTable(nn.Module):
    """A table whose looked-up vectors are scored by one linear layer."""

    def __init__(self, size: int, lazy: bool) -> None:
        super().__init__()
        self.views: Tables = Views(width=WIDTH, lazy_rows=0 if lazy else -1).build((), {"item": size})
        self.head = nn.Linear(WIDTH, 1)

    @property
    def tables(self) -> dict[str, Table]:
        """Name in a lookup -> table."""
        return dict(self.views.tables.items())  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Output:
        """Logits (B,) of ids (B,)."""
        read, lookups = self.views({"item": [ids]})
        hidden = read["shared", "item", "value"][0].gather()
        return Output({"click": self.head(hidden).squeeze(1)}, {"click": hidden}, hidden, {}, lookups)


def round_time(model: OneTable, update: JointUpdate, batches: list[Tensor]) -> float:
    """Seconds per training step."""
    start = time.perf_counter()
    for ids in batches:
        output = model(ids)
        update({"click": nn.functional.softplus(output.logits["click"]).mean()}, output)
    return (time.perf_counter() - start) / len(batches)


def measure(size: int, steps: int, pairs: int) -> tuple[float, float, float]:
    """Median seconds per dense step and lazy step, and the median ratio dense / lazy of the pairs."""
    torch.manual_seed(0)
    sides = []
    for lazy in (False, True):
        model = OneTable(size, lazy)
        sides.append((model, Joint().build(model, steps=1, weights={})))
    dense, slim = [], []
    for number in range(pairs + 1):
        batches = [torch.randint(2, size, (IDS,)) for _ in range(steps)]
        times = [round_time(*side, batches) for side in (sides if number % 2 else sides[::-1])]
        if number:  # the first pair allocates
            dense.append(times[0 if number % 2 else 1])
            slim.append(times[1 if number % 2 else 0])
    ratio = statistics.median(d / s for d, s in zip(dense, slim, strict=True))
    return statistics.median(dense), statistics.median(slim), ratio


def main() -> None:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    quick = parser.parse_args().quick
    ratios, figures = {}, {}
    print(f"width {WIDTH}, {IDS:,} ids a step, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'rows':>10} {'dense ms':>9} {'lazy ms':>9} {'dense/lazy':>11}")
    for size in SIZES:
        dense, lazy, ratio = measure(size, *((3, 3) if quick else (10, 15)))
        print(f"{size:>10,} {1e3 * dense:>9.2f} {1e3 * lazy:>9.2f} {ratio:>11.2f}")
        ratios[str(size)] = round(ratio, 3)
        figures[str(size)] = {"dense_ms": round(1e3 * dense, 3), "lazy_ms": round(1e3 * lazy, 3)}
    print(json.dumps({"benchmark": "table_crossover", "ratios": ratios, "figures": figures}))


if __name__ == "__main__":
    main()
