"""New domains and few labels: every method against training on the labels alone, and every calibrator on what it trained.

    python benchmarks/paper_transfer.py digits --out FOLDER                  MNIST to scikit-learn's digits, and back
    python benchmarks/paper_transfer.py fashion --out FOLDER --source DIR    Fashion-MNIST with 4, 25 and 100 labels a class
    python benchmarks/paper_transfer.py kuairand --out FOLDER                clicks in one tab of the bundled log from the others
    options: --seeds 5 --jobs 2 --only NAME ... --cases CASE ... --quick

Labels of the target are read by nothing but the metrics of the test split: they are withheld (`Data.withhold`), or not in the
table at all.  No method is tuned to a target: every run has the settings below, the same steps, and keeps its last weights, so
that nothing is selected, by an oracle or otherwise.  The reference, ``labels_only``, trains on the rows with labels in the same
batches without the others; ``all_labels`` of *fashion*, which reads 3,000 labels a class, says what there is to gain.

Calibrators are fitted to the validation rows of the source and, those that read a target, to the target's test rows without
their labels, and measured on these (as in TransCal's own experiments: the target at hand is the one to be calibrated).
``oracle`` reads the labels, to say what a temperature could do.

DIR holds the four files of Fashion-MNIST, as Debian's package dataset-fashion-mnist installs them.  Finished trainings are kept
in FOLDER: the command continues where it was stopped.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unbraid import config, recipes, store
from unbraid.augmentations.tabular import Change, Tabular
from unbraid.bundle import Bundle
from unbraid.calibrate import calibrate
from unbraid.calibration.binning import Histogram, Isotonic
from unbraid.calibration.cpcs import CPCS
from unbraid.calibration.oracle import Oracle, Vanilla
from unbraid.calibration.scaling import Matrix, Temperature, Vector
from unbraid.calibration.transcal import TransCal
from unbraid.compare import tabulate
from unbraid.config import ModelChoice, Run
from unbraid.data.event_log import write
from unbraid.data.fitted import Fitted
from unbraid.data.mix import Mix
from unbraid.data.pixels import INSTALLED, Few, Pair, digits, fashion_mnist
from unbraid.evaluate import evaluate, replicate
from unbraid.job import train
from unbraid.losses.cdan import CDAN, Conditional
from unbraid.losses.domain_adversary import DomainAdversary, DomainClassifier
from unbraid.losses.dst import DST, DSTHeads
from unbraid.losses.entropy import Entropy
from unbraid.losses.fixmatch import FixMatch
from unbraid.losses.flexmatch import FlexMatch
from unbraid.losses.mcc import MCC
from unbraid.losses.pseudo_label import PseudoLabel
from unbraid.losses.supervised import Supervised
from unbraid.optim.beta_average import BetaAverage
from unbraid.optim.ema import EMA
from unbraid.optim.joint import Joint
from unbraid.predictor import Predictor
from unbraid.render import markdown, render_comparison
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Scores

LABELS_ONLY, ALL_LABELS = "labels_only", "all_labels"
TRANSFERRED = {"cpcs": CPCS(), "transcal": TransCal()}
MULTICLASS = {"vanilla": Vanilla(), "temperature": Temperature(), "vector": Vector(), "matrix": Matrix(),
              "histogram": Histogram(), "isotonic": Isotonic(), **TRANSFERRED, "transcal_bounded": TransCal(solver="bounded"),
              "transcal_official": TransCal(solver="official"), "oracle": Oracle()}  # fmt: skip
BINARY = {"vanilla": Vanilla(), "temperature": Temperature(), "histogram": Histogram(), "isotonic": Isotonic(), **TRANSFERRED,
          "transcal_intercept": TransCal(slope=False)}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One target: the runs by name, and the domain that is the target (empty: all test rows)."""

    runs: Mapping[str, Run]
    target: str = ""


# --------------------------------------------------------------------------------------------------------------- methods
def methods(base: Run, views: Tabular, *, shift: bool, mcc: MCC) -> dict[str, Run]:
    """What is tried on rows without labels; ``shift``: these are of another domain."""
    plain = replace(base, training=replace(base.training, mix=replace(base.training.mix or Mix(), unlabelled=0)))

    def plus(*losses: Any, heads: Sequence[Any] = (), augment: Any = None, **changes: Any) -> Run:
        model = replace(base.model, extra_heads=tuple(heads))
        return replace(base, losses=(Supervised(), *losses), model=model, augment=augment, **changes)

    dst = {"heads": (DSTHeads(hidden=(128,)),), "augment": views}
    found = {
        LABELS_ONLY: plain,
        "beta_average": replace(plain, average=BetaAverage()),
        "ema": replace(plain, average=EMA()),
        "entropy": plus(Entropy()),
        "mcc": plus(mcc),
        "mcc_consistency": plus(replace(mcc, consistency=1.0), augment=views),
        "pseudo_label": plus(PseudoLabel()),
        "fixmatch": plus(FixMatch(), augment=views),
        "flexmatch": plus(FlexMatch(), augment=views),
        "dst": plus(DST(threshold=0.95), **dst),
        "dst_flexmatch": plus(DST(rule="flexmatch", threshold=0.95), **dst),
    }
    if shift:
        both = Conditional(of="labelled")
        found |= {
            "dann": plus(DomainAdversary(of="labelled"), heads=(DomainClassifier(of="labelled"),)),
            "cdan": plus(CDAN(entropy=False, of="labelled"), heads=(both,)),
            "cdan_entropy": plus(CDAN(of="labelled"), heads=(both,)),
            "cdan_mcc": plus(CDAN(entropy=False, of="labelled"), mcc, heads=(both,)),
        }
    return found


VIEWS = Tabular(weak=Change(noise=0.05), strong=Change(noise=0.15, values=0.15))


def of_pixels(folder: Path, size: int, steps: int) -> Run:
    """An MLP on the pixels of a prepared folder, with as many rows without labels per batch as with."""
    training = Training(
        batch_size=size, steps=steps, evaluate_every=steps, metric="accuracy", threads=1, mix=Mix(unlabelled=size)
    )
    model = ModelChoice(tower=SharedBottom(bottom=(256, 64), tower=()))
    return Run(data=config.load(folder / "run.toml").data, model=model, update=Joint(lr=1e-3), training=training)


def of_digits(out: Path, quick: bool) -> dict[str, Case]:
    """Both directions.  The MLP and the views are those of small pictures: noise, and pixels that are dropped."""
    cases = {}
    for target in ("digits", "mnist"):
        folder = out / f"to-{target}"
        if not (folder / "run.toml").exists():
            write(digits(Pair(target=target)), folder, "digits", overwrite=folder.exists())  # type: ignore[arg-type]
        base = of_pixels(folder, 36, 20 if quick else 1500)
        cases[f"to_{target}"] = Case(methods(base, VIEWS, shift=True, mcc=MCC()), target)
    return cases


def of_fashion(out: Path, source: Path, quick: bool) -> dict[str, Case]:
    """Few labels; everything else of the training pictures stays without."""
    cases = {}
    for labels in (4, 25, 100):
        folder = out / f"labels-{labels}"
        if not (folder / "run.toml").exists():
            write(fashion_mnist(source, Few(labels=labels)), folder, "fashion-mnist", overwrite=folder.exists())
        base = of_pixels(folder, 64, 20 if quick else 1500)
        cases[f"labels_{labels}"] = Case(methods(base, VIEWS, shift=False, mcc=MCC()))
    folder = out / "labels-all"
    if not (folder / "run.toml").exists():
        write(fashion_mnist(source, Few(labels=3000)), folder, "fashion-mnist", overwrite=folder.exists())
    every = config.load(folder / "run.toml").data
    for case in cases.values():
        case.runs[ALL_LABELS] = replace(case.runs[LABELS_ONLY], data=every)  # type: ignore[index]
    return cases


def of_kuairand(out: Path, quick: bool) -> dict[str, Case]:
    """One tab's clicks from those of the others."""
    cases = {}
    like = recipes.shared_bottom()
    for tab in ("1", "4", "2"):
        data = replace(like.data, tasks=like.data.tasks[:1], withhold=f"tab = {tab}")
        training = Training(
            batch_size=512, steps=6 if quick else 300, evaluate_every=300, threads=1, mix=Mix(unlabelled=512)
        )
        base = replace(like, data=data, training=training, update=Joint(lr=1e-3))
        views = Tabular(strong=Change(features=0.2, history=0.5, noise=0.1))
        cases[f"to_tab_{tab}"] = Case(methods(base, views, shift=True, mcc=MCC()), tab)
    return cases


# ------------------------------------------------------------------------------------------------------------- measuring
def trained(run: Run, folder: Path) -> None:
    """Train a run unless it is there, and note the CPU time of it all."""
    if (folder / "metrics.json").exists():
        return
    began = time.process_time()
    train(run, folder, resume=(folder / "run.toml").exists(), baseline=False, keep_scores=True)
    store.write_text(folder.with_suffix(".cpu"), json.dumps(time.process_time() - began))


def calibrated(folder: Path, target: str, binary: bool) -> None:
    """Note what every calibrator does to a bundle on the target, unless it is there."""
    noted = folder.with_suffix(".calibrated")
    if noted.exists():
        return
    plain, found = Bundle.load(folder), dict[str, Any]()
    for name, method in (BINARY if binary else MULTICLASS).items():
        try:  # what reads no target learns from all held-out labels, which are those of the source
            bundle, (change,), _ = calibrate(plain, method, domain=target if method.needs_target else "")  # type: ignore[attr-defined]
        except ValueError as error:
            found[name] = {"why": str(error)}
            continue
        scores = Predictor(bundle).split_scores("test")
        (metrics,) = evaluate(scores, bundle.fitted.schema, replicates=0).values()
        part = metrics["domains"][target]
        kept = {key: part[key]["value"] for key in ("ece", "ece_mass", "calibration") if key in part}
        found[name] = kept | {"warnings": list(change.warnings)}
    store.write_text(noted, json.dumps(found))


def slices_of(folder: Path, case: Case) -> dict[Any, Any]:
    """Metrics of the target with their replicates, under the task's name."""
    scores = Scores(**store.load(folder / "scores.safetensors"))
    found = replicate(scores, Fitted.load(folder).schema, replicates=1000)
    return {(task, ""): cell for (task, domain), cell in found.items() if domain == case.target}


def rates_of(folder: Path, case: Case) -> float | None:
    """Mean prediction over mean label on the target, of a binary task."""
    metrics = json.loads((folder / "metrics.json").read_text())["test"]
    (task,) = metrics.values()
    part = task["domains"][case.target] if case.target else task
    return part["calibration"]["value"] if "calibration" in part else None


def cost_of(run: Run, places: Sequence[Path]) -> dict[str, Any]:
    """Steps, CPU seconds (mean over seeds) and parameters of a method."""
    seconds = [json.loads(place.with_suffix(".cpu").read_text()) for place in places]
    parameters = json.loads((places[0] / "metrics.json").read_text())["parameters"]
    return {
        "steps": run.training.steps,
        "seconds": float(np.mean(seconds)),
        "parameters": parameters,
        "configurations": 1,
    }


def measured(cases: Mapping[str, Case], out: Path, args: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """Train, compare, calibrate."""

    def folder(case: str, name: str, seed: int) -> Path:
        return out / case / name / f"seed_{seed}"

    work = [(replace(run, name=name, seed=run.seed + s), folder(case, name, s))
            for s in range(args.seeds) for case, each in cases.items() for name, run in each.runs.items()]  # fmt: skip
    list(pool.map(trained, *zip(*work, strict=True)))
    binary = args.part == "kuairand"
    shifted = [(folder(c, n, s), case.target, binary) for c, case in cases.items() if case.target
               for n in case.runs for s in range(args.seeds)]  # fmt: skip
    if shifted:
        list(pool.map(calibrated, *zip(*shifted, strict=True)))
    tables: dict[str, Any] = {}
    for key, case in cases.items():
        places = {name: [folder(key, name, s) for s in range(args.seeds)] for name in case.runs}
        found = {name: [slices_of(place, case) for place in each] for name, each in places.items()}
        table: dict[str, Any] = {
            "reference": LABELS_ONLY,
            "seeds": args.seeds,
            "replicates": 1000,
            "budget": {},
            **tabulate(found, LABELS_ONLY),
        }
        table["cost"] = {name: cost_of(run, places[name]) for name, run in case.runs.items()}
        table["calibration_ratio"] = {n: _mean_sd([rates_of(p, case) for p in each]) for n, each in places.items()}
        if case.target:
            table["calibrators"] = {
                n: collected([json.loads(p.with_suffix(".calibrated").read_text()) for p in each])
                for n, each in places.items()
            }
        tables[key] = table
    return tables


def _mean_sd(values: Sequence[float | None]) -> tuple[float, float] | None:
    known = [v for v in values if v is not None]
    return (float(np.mean(known)), float(np.std(known, ddof=min(1, len(known) - 1)))) if known else None


def collected(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Calibrator -> metric -> mean and standard deviation over seeds, and in how many it warned."""
    found: dict[str, Any] = {}
    for name in seeds[0]:
        metrics = [key for key in seeds[0][name] if key not in ("why", "warnings")]
        found[name] = {key: _mean_sd([one[name].get(key) for one in seeds]) for key in metrics}
        found[name]["warned"] = sum(bool(one[name].get("warnings")) for one in seeds)
        found[name]["why"] = next((one[name]["why"] for one in seeds if "why" in one[name]), "")
    return found


def shown(key: str, table: Mapping[str, Any], binary: bool) -> str:
    """The comparison, the cost, and the calibrators of a case."""
    base = table["cost"][LABELS_ONLY]["seconds"]
    head = ["method", "CPU time, of labels_only"] + ["predicted rate / rate"] * binary
    lines = [
        [name, f"{cost['seconds'] / base:.2f}", *([_cell(table["calibration_ratio"][name], 2)] if binary else [])]
        for name, cost in table["cost"].items()
    ]
    text = f"\n### {key}\n\n{render_comparison(dict(table))}\n{markdown(head, lines, 1)}\n"
    if "calibrators" not in table:
        return text
    metric = "ece_mass" if binary else "ece"
    names = list(next(iter(table["calibrators"].values())))
    lines = [[m, *(_cell(each[n].get(metric), 3) for n in names)] for m, each in table["calibrators"].items()]
    table_of = markdown(["method", *names], lines, 1)
    text += f"\nExpected calibration error on the target ({metric}), mean ± sd over seeds\n\n{table_of}\n"
    if binary:
        lines = [
            [m, *(_cell(each[n].get("calibration"), 2) for n in names)] for m, each in table["calibrators"].items()
        ]
        text += f"\nMean prediction over rate on the target\n\n{markdown(['method', *names], lines, 1)}\n"
    return text


def _cell(value: Sequence[float] | None, digits: int) -> str:
    return "" if value is None else f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def main() -> None:
    """One part: train, compare, calibrate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["digits", "fashion", "kuairand"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=Path, default=INSTALLED, help="fashion: folder of the four files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", default=[], help="methods by name; labels_only is among them in any case")
    parser.add_argument("--cases", nargs="*", default=[], help="cases by name")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run")
    args = parser.parse_args()
    out = args.out.resolve() / ("quick" if args.quick else "full") / args.part
    out.mkdir(parents=True, exist_ok=True)
    makers = {"digits": lambda: of_digits(out, args.quick), "fashion": lambda: of_fashion(out, args.source, args.quick),
              "kuairand": lambda: of_kuairand(out, args.quick)}  # fmt: skip
    cases = makers[args.part]()
    for what, asked, known in (
        ("cases", args.cases, list(cases)),
        ("only", args.only, [n for c in cases.values() for n in c.runs]),
    ):
        if unknown := sorted(set(asked) - set(known)):
            parser.error(f"--{what}: there is no {', '.join(unknown)}. There are {', '.join(dict.fromkeys(known))}.")
    cases = {key: case for key, case in cases.items() if not args.cases or key in args.cases}
    if args.only:
        cases = {
            k: replace(c, runs={n: r for n, r in c.runs.items() if n in (*args.only, LABELS_ONLY)})
            for k, c in cases.items()
        }
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        tables = measured(cases, out, args, pool)
    for key, table in tables.items():
        print(shown(key, table, args.part == "kuairand"))
    (out / "tables.json").write_text(json.dumps(tables))
    lead = "auc" if args.part == "kuairand" else "accuracy"
    means = {key: {name: each["runs"][name][lead]["mean"] for (task, parts) in t["values"].items() for each in [parts[""]]
                   for name in each["runs"]} for key, t in tables.items()}  # fmt: skip
    print(
        json.dumps(
            {"benchmark": "paper_transfer", "part": args.part, "seeds": args.seeds, "quick": args.quick, lead: means}
        )
    )


if __name__ == "__main__":
    main()
