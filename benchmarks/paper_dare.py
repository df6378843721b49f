"""Long-history encoders side by side: mean pooling, DIN, TIN, SIM, ETA, SDIM, TWIN and its variants, TWIN-V2, DARE.

    python benchmarks/paper_dare.py movielens SOURCE --out FOLDER      SOURCE: MovieLens-1M as its owners or RecBole publish it
    python benchmarks/paper_dare.py kuairand --out FOLDER              the bundled log
    options: --dims 16 64 --seeds 3 --only twin dare --jobs 2 --quick

Every encoder stands in the same model (a shared bottom of 200 and 80 units on the row's own ids and what the history gives),
reads the same histories, and has the same budget: the learning rate is the best of ``RATES`` by AUC on the validation split
(seed 100), then ``--seeds`` seeds are trained with it, each stopped early on the validation split.  Encoders that search
have second heads and their loss, keep 20 events, and are given all fields.  ``compare`` then pairs predictions on the test
split: AUC, GAUC and log-loss with intervals over users and seeds, against TWIN of the same width.

Retrieval NDCG@20 is `unbraid.analysis.retrieval`: of the scores that category (film genres, video topic) and position alone
give, against mutual information counted on training rows; only of encoders whose scores are sums over fields and choose events.

Finished trainings are kept in FOLDER: the command continues where it was stopped.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from unbraid import config, recipes, store
from unbraid.analysis.correlation import Correlation
from unbraid.analysis.retrieval import Retrieval
from unbraid.bundle import Bundle
from unbraid.compare import compare
from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data
from unbraid.data.encode import encode
from unbraid.data.event_log import write
from unbraid.data.public import Ratings, movielens, recbole_folder
from unbraid.data.table import Encoded
from unbraid.encoders.dare import DARE
from unbraid.encoders.din import DIN
from unbraid.encoders.eta import ETA
from unbraid.encoders.pooling import Mean
from unbraid.encoders.sdim import SDIM
from unbraid.encoders.sim import SIM
from unbraid.encoders.table import Views
from unbraid.encoders.tin import TIN
from unbraid.encoders.twin import TWIN
from unbraid.encoders.twin_v2 import TWINV2
from unbraid.evaluate import evaluate
from unbraid.job import EVALUATION_ROWS, train
from unbraid.losses.history import HistoryLoss
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training, predict
from unbraid.types import Feature, Field, History

RATES, TUNING_SEED, KEEP, HEADS = (1e-3, 3e-3, 1e-2), 100, 20, (200,)
SECOND = {"keep": KEEP, "auxiliary": HEADS}
BUDGET = Training(batch_size=1024, epochs=4, evaluate_every=40, patience=3, threads=1)
QUICK = replace(BUDGET, steps=4, evaluate_every=2)


def encoders(dim: int, category: str) -> dict[str, Any]:
    """Name -> the history encoder; ``category``: the event field for hard searches."""
    hard = {"search": "hard", "category": category}
    return {
        "mean": Mean(),
        "din": DIN(hidden=(36,), activation="relu", softmax=True, keep=KEEP, scale=True),
        "tin": TIN(),
        "sim_soft": SIM(search="soft", **SECOND),
        "eta": ETA(**SECOND),
        "sdim": SDIM(),
        "twin": TWIN(**SECOND),
        "twin_plain": TWIN(target_aware=False, **SECOND),
        "twin_projected": TWIN(projections=True, **SECOND),
        "twin_4e": TWIN(tables="four", **SECOND),
        "twin_v2": TWINV2(**SECOND),
        "dare": DARE(**SECOND),
        "dare_half": DARE(attention_width=dim // 2, **SECOND),
        "dare_quarter": DARE(attention_width=dim // 4, **SECOND),
        "sim_hard": SIM(keep=KEEP, **hard),
        "twin_hard": TWIN(**hard, **SECOND),
    }


# ------------------------------------------------------------------------------------------------------------------ runs
def log_of(args: argparse.Namespace) -> tuple[Data, str]:
    """The data and the event field that is a category (of films; the topic of videos)."""
    cache = str(args.out / "cache")
    if args.log == "movielens":
        made = args.out / "movielens"
        if not (made / "run.toml").exists():
            name = args.source.removeprefix("recbole:")
            folder = recbole_folder(name) if name != args.source else Path(args.source)
            write(movielens(folder, Ratings(per_user=19, valid=0.025, test=0.05)), made, "movielens", overwrite=True)
        return replace(config.load(made / "run.toml").data, cache=cache), "category"
    data = recipes.kuairand()
    topic = "split_part(tag, ',', 1)"  # the first tag; videos watched before the window have none
    *earlier, impressions = data.events
    seen = History(
        "seen", fields=("video_id", "author_id", "topic", "gap", "position"), where=data.histories[0].where, length=200
    )
    keep = f"({data.keep}) and user_id % 5 = 0" if args.quick else data.keep
    data = replace(
        data, domain="", histories=(seen,), cache=cache, keep=keep, features=(*data.features, Feature("topic", column=topic)),
        fields=(*data.fields, Field("topic")),
        events=(*earlier, replace(impressions, columns={**impressions.columns, "topic": topic})),
    )  # fmt: skip
    return data, "topic"


def run_of(data: Data, name: str, encoder: Any, dim: int, rate: float, quick: bool) -> Run:
    """One encoder's run."""
    second = getattr(encoder, "auxiliary", ())
    return Run(
        name=name, data=data,
        model=ModelChoice(tower=SharedBottom(bottom=(200, 80), tower=()), tables=Views(width=dim), history=encoder),
        losses=(Supervised(), HistoryLoss()) if second else (Supervised(),),
        update=Joint(lr=rate),
        training=QUICK if quick else BUDGET,
    )  # fmt: skip


def one(run: Run, folder: Path) -> float:
    """Train a run unless it is there; its mean AUC on the validation split."""
    file = folder / "valid.json"
    if not file.exists():
        done = (folder / "run.toml").exists()
        bundle = train(run, folder, resume=done, baseline=False, keep_scores=True).bundle
        encoded = Encoded(encode(run.data))
        scores = predict(bundle.model, encoded.in_order(encoded.split("valid"), EVALUATION_ROWS), encoded.schema)
        found = evaluate(scores, encoded.schema, replicates=0)
        store.write_text(file, json.dumps({name: task["auc"]["value"] for name, task in found.items()}))
    return float(np.mean(list(json.loads(file.read_text()).values())))


def tuned(runs: Mapping[str, Mapping[float, Run]], out: Path, pool: Any) -> dict[str, float]:
    """Name -> the learning rate with the best validation AUC."""
    todo = {(name, rate): pool.submit(one, replace(run, seed=TUNING_SEED), out / "tuning" / name / f"{rate:g}")
            for name, rates in runs.items() for rate, run in rates.items()}  # fmt: skip
    values = {key: future.result() for key, future in todo.items()}
    return {name: max(rates, key=lambda rate: values[name, rate]) for name, rates in runs.items()}


# ------------------------------------------------------------------------------------------------------------- retrieval
def retrieval(folders: Sequence[Path], data: Data, category: str) -> list[Mapping[str, Any]]:
    """The finding's values of each seed; empty where no scores that are sums over fields choose the events."""
    encoded = Encoded(encode(data))
    history = data.histories[0].name
    truth = Correlation(data.tasks[0].name, history, category).count(
        encoded.schema, encoded.in_order(encoded.split("train"), EVALUATION_ROWS)
    )
    found = []
    for folder in folders:
        model = Bundle.load(folder).model
        encoder = next(iter(model.histories.values()))
        if not hasattr(encoder, "scores") or getattr(getattr(encoder, "config", None), "search", "") == "hard":
            return []
        batches = encoded.in_order(encoded.split("test"), EVALUATION_ROWS)
        found.append(Retrieval(truth)(model, encoded.schema, batches).values)
    return found if found and found[0].get("rows") else []


# ------------------------------------------------------------------------------------------------------------------ main
def main() -> None:
    """Tune, train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", choices=["movielens", "kuairand"])
    parser.add_argument("source", nargs="?", default="recbole:ml-1m", help="of movielens")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, one rate, a fifth of the bundled users: does it run"
    )
    args = parser.parse_args()
    args.out = args.out.resolve()
    data, category = log_of(args)
    encode(data)
    rates = RATES[:1] if args.quick else RATES
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for dim in args.dims:
            results[str(dim)] = width(dim, data, category, rates, args, pool)
    (args.out / f"{args.log}.json").write_text(json.dumps(results, default=lambda value: np.asarray(value).tolist()))
    chosen = {dim: result["rates"] for dim, result in results.items()}
    print(json.dumps({"benchmark": "paper_dare", "log": args.log, "rates": chosen}))


def width(
    dim: int, data: Data, category: str, rates: Sequence[float], args: argparse.Namespace, pool: Any
) -> dict[str, Any]:  # fmt: skip
    """All encoders of one width."""
    out = args.out / f"{args.log}-{dim}"
    chosen = {n: e for n, e in encoders(dim, category).items() if not args.only or n in args.only}
    runs = {n: {r: run_of(data, n, e, dim, r, args.quick) for r in rates} for n, e in chosen.items()}
    best = tuned(runs, out, pool)
    final = [runs[name][best[name]] for name in runs]
    seeds = range(args.seeds)
    trials = [(replace(run, seed=seed), out / run.name / f"seed-{seed}") for run in final for seed in seeds]
    list(pool.map(one, *zip(*trials, strict=True)))
    table = compare(
        final, out, seeds=args.seeds, against="twin" if "twin" in runs else final[0].name, resume=True
    )  # fmt: skip
    print(f"\n# {args.log}, width {dim}\n\n{(out / 'compare.md').read_text()}")
    scores = {}
    for name in runs:
        scores[name] = found = retrieval([out / name / f"seed-{seed}" for seed in seeds], data, category)
        if found:
            ndcg = [values["learned_ndcg"][0] for values in found]
            rest = {order: round(found[0][f"{order}_ndcg"][0], 4) for order in ("newest", "random")}
            print(
                f"NDCG@20 {name:<16} {np.mean(ndcg):.4f} (sd {np.std(ndcg, ddof=1):.4f}), {rest}, {found[0]['rows']:,} rows"
            )
    return {"rates": best, "compare": table, "retrieval": scores}


if __name__ == "__main__":
    main()
