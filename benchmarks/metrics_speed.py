"""How long metrics with intervals take, and AUC alone against scikit-learn's on the same rows.

    python benchmarks/metrics_speed.py            # 20M rows, 1M users, 6 domains, 500 replicates, one binary task
    python benchmarks/metrics_speed.py --quick    # 200,000 rows

Run it with OMP_NUM_THREADS=1 to measure one core.  The last line is JSON: ``ratios`` are times of the other / ours.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from unbraid.evaluate import auc, evaluate
from unbraid.types import Schema, Scores, Task


def simulate(rows: int, seed: int = 0) -> tuple[Scores, Schema]:
    """Rows of ``rows / 20`` users in 6 domains, 30 % positives; float32 logits as a model gives them (so some tie)."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1, 1, rows).astype(np.float32)
    label = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    names = ("(unknown)", "(missing)", *(f"domain {i}" for i in range(6)))
    task = Task("click")
    scores = Scores(
        logits={"click": logit}, hidden={}, labels={"click": label}, observed={"click": np.ones(rows, bool)},
        domain=rng.integers(2, 8, rows), domains=names, weight=None, group=rng.integers(0, max(rows // 20, 2), rows),
        row=np.arange(rows),
    )  # fmt: skip
    return scores, Schema(features=(), tasks=(task,), domains=names)


def seconds(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Shortest of several runs, which the machine's other work disturbs least, and the result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def main() -> None:
    """Measure, print a table, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--replicates", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="200,000 rows")
    options = parser.parse_args()
    rows = 200_000 if options.quick else options.rows
    scores, schema = simulate(rows)
    label, logit = scores.labels["click"], scores.logits["click"]

    from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

    repeats = 3
    ours, value = seconds(lambda: auc(logit, label), repeats)
    theirs, reference = seconds(lambda: roc_auc_score(label, logit), repeats)
    plain, _ = seconds(lambda: evaluate(scores, schema, replicates=0), 1)
    whole, metrics = seconds(lambda: evaluate(scores, schema, replicates=options.replicates), 1)
    scale = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss: bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    assert abs(value - reference) < 1e-9 and abs(value - metrics["click"]["auc"]["value"]) < 1e-9

    for name, time_ in (
        ("AUC alone", ours),
        ("AUC alone, scikit-learn", theirs),
        ("all metrics, 1 + 6 slices, no intervals", plain),
        (f"all metrics, 1 + 6 slices, {options.replicates} replicates", whole),
    ):
        print(f"{name:<55}{time_:>9.2f} s")
    print(f"{'peak memory of the process':<55}{peak:>9.2f} GiB")
    figures = {
        "rows": rows, "users": len(np.unique(scores.group)), "auc_s": ours, "sklearn_auc_s": theirs,
        "evaluate_no_intervals_s": plain, "evaluate_s": whole, "replicates": options.replicates, "peak_gib": peak,
    }  # fmt: skip
    print(json.dumps({"benchmark": "metrics_speed", "ratios": {"sklearn_auc": theirs / ours}, "figures": figures}))


if __name__ == "__main__":
    main()
