"""Recipes on the bundled log, several seeds: test AUC beside target encoding's on the same rows, and the cost.

    python benchmarks/bundled_log.py                 # stem, mmoe, shared_bottom; 3 seeds: about 10 minutes on 2 cores
    python benchmarks/bundled_log.py --quick         # one seed, 20 steps: does it run

Prints Markdown and, last, one JSON line.  An interval is a bootstrap over users (test noise) of the first seed; the spread
over seeds (training noise) is its own column.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from statistics import mean, stdev

from unbraid import recipes
from unbraid.job import train


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["stem", "mmoe", "shared_bottom"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    lines, figures = [], {}
    for name in args.recipes:
        results = []
        for seed in range(1 if args.quick else args.seeds):
            run = replace(recipes.get(name), seed=seed)
            if args.quick:
                run = replace(run, training=replace(run.training, steps=20))
            results.append(train(run).metrics)
        base = results[0]["baseline"]["target_encoding"]
        seconds = mean(r["seconds"]["train"] for r in results)
        for task, found in base.items():
            values = [r["test"][task]["auc"]["value"] for r in results]
            first = results[0]["test"][task]["auc"]
            error = (found["auc"]["high"] - found["auc"]["low"]) / (2 * 1.96)
            spread = stdev(values) if len(values) > 1 else 0.0
            gain = mean(values) - found["auc"]["value"]
            figures[f"{name}.{task}"] = {
                "auc": mean(values),
                "sd": spread,
                "baseline": found["auc"]["value"],
                "baseline_se": error,
            }
            lines.append(
                f"| {name} | {task} | {mean(values):.4f} | {spread:.4f} | [{first['low']:.4f}, {first['high']:.4f}] "
                f"| {found['auc']['value']:.4f} | {error:.4f} | {gain:+.4f} | {seconds:.0f} |"
            )
            print(lines[-1], flush=True)
    head = ["recipe", "task", "test AUC, mean", "sd over seeds", "95 % interval (first seed)", "target encoding",
            "its s.e.", "difference", "training s"]  # fmt: skip
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head) + "\n" + "\n".join(lines) + "\n")
    print(json.dumps({"benchmark": "bundled_log", "ratios": {}, "figures": figures}))


if __name__ == "__main__":
    main()
