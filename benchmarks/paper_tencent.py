"""The assembled system of recipe `tencent`: what each part is worth, what width is worth, what a ranking loss is worth.

    python benchmarks/paper_tencent.py ablation --out FOLDER     the recipe without one part at a time, and its rivals
    python benchmarks/paper_tencent.py widths --out FOLDER       one wide set of tables against several narrow ones, with spectra
    python benchmarks/paper_tencent.py ranking --out FOLDER      cross-entropy with a ranking loss, at falling positive rates
    python benchmarks/paper_tencent.py cost --out FOLDER         CPU time of a training step of each run of ablation
    options: --seeds 3 --jobs 2 --quick --plot

All on the bundled log, by `unbraid.compare.compare`: the same seeds and budget for all, early stopping on the validation split,
differences paired on the test split.  The second table is what a run cost: steps until early stopping, parameters, and seconds,
which mean something only where the machine did nothing else.  Of *ablation* the reference is ``shared_bottom``, then the whole
recipe; of *widths* one table of width 8; of *ranking* plain cross-entropy at the same rate of positives.

*widths* also prints information abundance (`unbraid.analysis.collapse`) of the tables of videos, authors and tags, those of
several sets side by side, over that of a random matrix.  Their spectra, s / s_1 of every seed, are in ``widths.json``, and with
``--plot`` in ``spectra.png``.  *ranking* keeps every negative and a share of the positives of clicks,
those whose time in milliseconds ends on few numbers; the validation and test splits are thinned alike.  *cost* trains the runs in
alternating rounds in one process; CPU time of all threads, the medians' ratio to the first run.

Finished trainings are kept in FOLDER: the command continues where it was stopped.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unbraid import recipes
from unbraid.analysis.collapse import abundance, gram, random_abundance, spectrum
from unbraid.analysis.plots import INK, figure, finish
from unbraid.bundle import Bundle, build
from unbraid.compare import compare
from unbraid.config import Expert, Run
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.numbers import Standardise
from unbraid.encoders.pooling import Mean
from unbraid.encoders.table import Views
from unbraid.interactions.cross import Cross
from unbraid.interactions.flat import Flat
from unbraid.job import train
from unbraid.losses.ranking import Ranking
from unbraid.losses.supervised import Supervised
from unbraid.preflight import bound_terms
from unbraid.towers.multi_embedding import MultiEmbedding
from unbraid.train import fit
from unbraid.types import FIRST_VALUE

SHARES = (100, 30, 10, 3)  # per cent of the positives that stay
FIELDS = ("video_id", "author_id", "tag")


# ------------------------------------------------------------------------------------------------------------------ runs
def ablation() -> list[Run]:
    """The recipe, the recipe without one part, and what it is measured against."""
    whole = recipes.tencent()
    model, widths = whole.model, whole.model.tables.widths
    middle = sorted(widths)[len(widths) // 2]
    without = {
        "numerals": {"numbers": Standardise()},
        "kinds": {"experts": tuple(Expert(at, Flat()) for at in range(len(widths)))},
        "widths": {"tables": Views(kind="several", widths=(middle,) * len(widths))},
        "tables": {
            "tables": Views(width=sum(widths)),
            "experts": tuple(replace(expert, view=0) for expert in model.experts),
        },
        "history": {"history": Mean()},
    }  # fmt: skip
    runs = [replace(whole, name=f"no_{part}", model=replace(model, **change)) for part, change in without.items()]
    runs.append(replace(whole, name="no_ranking", losses=(Supervised(),)))
    rivals = [recipes.shared_bottom(), recipes.mmoe(), recipes.stem()]
    return [rivals[0], whole, *runs, *rivals[1:]]


def widths() -> list[Run]:
    """One set of tables of growing width against sets of width 8, on cross layers."""
    base = recipes.shared_bottom()
    interaction, tower = Cross(layers=2, rank=16), MultiEmbedding(expert=(64, 32), tower=(16,), dropout=0.1)

    def run(name: str, tables: Views) -> Run:
        return replace(base, name=name, model=replace(base.model, tower=tower, tables=tables, interaction=interaction))

    one = [run(f"1x{d}", Views(width=d)) for d in (8, 16, 32, 64)]
    return [*one, *(run(f"{m}x8", Views(kind="several", widths=(8,) * m)) for m in (2, 4, 8))]


def ranking(share: int) -> list[Run]:
    """Cross-entropy of clicks, and its mixtures with pairs, where a share of the positives is kept."""
    base = recipes.shared_bottom()
    keep = f"({base.data.keep}) and (is_click = 0 or time_ms % 100 < {share})"
    data = replace(base.data, keep=keep, tasks=base.data.tasks[:1])
    base = replace(base, data=data)
    runs = [replace(base, name="cross_entropy")]
    for alpha in (0.9, 0.5):
        losses = (Supervised(weight=alpha), Ranking(weight=round(1 - alpha, 6)))
        runs.append(replace(base, name=f"pairs_{1 - alpha:.1f}", losses=losses))
    return runs


# ------------------------------------------------------------------------------------------------------------- measuring
def trained(run: Run, folder: Path) -> None:
    """Train a run unless it is there."""
    if not (folder / "metrics.json").exists():
        train(run, folder, resume=(folder / "run.toml").exists(), baseline=False, keep_scores=True)


def compared(runs: Sequence[Run], out: Path, args: argparse.Namespace, pool: Any, metric: str = "") -> dict[str, Any]:
    """All trainings side by side, then the comparison."""
    if args.quick:
        few = [replace(run.data, keep=f"({run.data.keep}) and user_id % 5 = 0") for run in runs]
        short = [replace(run.training, steps=2, evaluate_every=2) for run in runs]
        runs = [replace(run, data=d, training=t) for run, d, t in zip(runs, few, short, strict=True)]
    for run in runs:
        encode(run.data)
    seeds = range(args.seeds)
    trials = [(replace(run, seed=run.seed + n), out / run.name / f"seed-{run.seed + n}") for run in runs for n in seeds]
    list(pool.map(trained, *zip(*trials, strict=True)))
    table = compare(runs, out, seeds=args.seeds, metric=metric, resume=True)
    print(f"\n# {out.name}{', ' + metric if metric else ''}\n\n{(out / 'compare.md').read_text()}")
    print(f"Seconds of training hold for an idle machine only; here up to {args.jobs} trainings ran side by side.")
    return table


def costs(runs: Sequence[Run], rounds: int, steps: int) -> dict[str, float]:
    """Run -> CPU milliseconds of a training step, reading the batch included, in the median of alternating rounds."""
    torch.set_num_threads(1)
    encoded = Encoded(encode(runs[0].data))
    rows, schema, sides = encoded.split("train"), encoded.schema, {}
    for run in runs:
        model = build(run, schema)
        update = run.update.build(model, steps=rounds * steps, weights={})
        sides[run.name] = model, bound_terms(run, schema, model), update, run.training.batch_size
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first is warm-up
        for name, (model, terms, update, size) in sides.items():
            batches = encoded.shuffled(rows, size, seed=number)
            began = time.process_time()
            fit(model, batches, terms, update, steps=steps)
            batches.close()
            times[name].append(1000 * (time.process_time() - began) / steps)
    return {name: float(np.median(each[1:])) for name, each in times.items()}


def abundances(folder: Path) -> dict[str, dict[str, Any]]:
    """vocabulary -> of a bundle's tables side by side: IA, width, IA over that of a random matrix, spectrum s / s_1."""
    model, found = Bundle.load(folder).model, {}
    for vocabulary in FIELDS:
        tables = [t.weight.detach() for key, t in model.tables.items() if key.split("/")[1:] == [vocabulary, "value"]]
        matrix = torch.cat(tables, 1)[FIRST_VALUE:]
        values = spectrum(gram(matrix), len(matrix))
        ia = abundance(values)
        random = np.mean([random_abundance(*matrix.shape, seed=seed) for seed in range(5)])
        shape = {"ia": ia, "width": matrix.shape[1], "relative": float(ia / random)}
        found[vocabulary] = {**shape, "spectrum": [round(float(x), 6) for x in values / values[0]]}
    return found


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Spectra of every run, means over seeds: one wide set of tables in blue, several in orange; darker is wider."""
    drawn, axes = figure(5.0 * len(FIELDS), 4.2, len(FIELDS))
    for axis, vocabulary in zip(axes, FIELDS, strict=True):
        for name, seeds in found.items():
            values = np.mean([seed[vocabulary]["spectrum"] for seed in seeds], axis=0)
            ink = INK["blue" if name.startswith("1x") else "orange"]
            shade = 0.3 + 0.7 * len(values) / max(each[0][vocabulary]["width"] for each in found.values())
            axis.plot(np.arange(1, len(values) + 1), values, color=ink, alpha=shade, label=name)
        axis.set_title(vocabulary, fontsize=10)
        axis.set_xlabel("k")
        axis.set_ylim(0, 1.02)
    axes[0].set_ylabel("k-th singular value / the largest")
    axes[-1].legend(frameon=False, fontsize=8)
    finish(drawn, path)


def main() -> None:
    """One part: train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["ablation", "widths", "ranking", "cost"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="two steps, a fifth of the users: does it run")
    parser.add_argument("--plot", action="store_true", help="of widths: draw the spectra, FOLDER/spectra.png")
    args = parser.parse_args()
    out, results = args.out.resolve() / args.part, {}
    args.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        if args.part == "ablation":
            results["ablation"] = compared(ablation(), out, args, pool)
        elif args.part == "widths":
            runs = widths()
            results["widths"] = compared(runs, out, args, pool)
            results["abundance"] = {}
            for run in runs:
                each = [abundances(out / run.name / f"seed-{run.seed + n}") for n in range(args.seeds)]
                results["abundance"][run.name] = each
                cells = (f"{v} {np.mean([one[v]['ia'] for one in each]):.1f} of {each[0][v]['width']} "
                         f"({np.mean([one[v]['relative'] for one in each]):.2f} of random)" for v in FIELDS)  # fmt: skip
                print(f"IA {run.name:<6}", "; ".join(cells))
            if args.plot:
                plot(results["abundance"], args.out / "spectra.png")
        elif args.part == "cost":
            results = costs(ablation(), *((1, 2) if args.quick else (5, 20)))
            first = next(iter(results.values()))
            print("\n".join(f"{name:<16} {ms:7.1f} ms a step, {ms / first:.2f}" for name, ms in results.items()))
        else:
            for share in SHARES[-1:] if args.quick else SHARES:
                for metric in ("auc", "logloss"):
                    found = compared(ranking(share), out.parent / f"ranking-{share}", args, pool, metric)
                    results[f"{share}/{metric}"] = found
    (args.out / f"{args.part}.json").write_text(json.dumps(results))
    print(json.dumps({"benchmark": "paper_tencent", "part": args.part, "seeds": args.seeds}))


if __name__ == "__main__":
    main()
