"""Does `unbraid diagnose` find what was planted, and only that?  Logs of `unbraid.data.planted.sick_log` with a known illness.

    python benchmarks/planted_truth.py levels --out FOLDER     seeds 0-9: the values that the levels were fixed on
    python benchmarks/planted_truth.py truth --out FOLDER      seeds 100-119: who ranks first, strengths, two at once
    python benchmarks/planted_truth.py remedies --out FOLDER   seeds 100-109: what the first remedies recover of (healthy - sick)
    options: --jobs 2 --only ILLNESS ... --quick

A healthy log is that of the same seed with all strengths 0.  Finished cases are kept in FOLDER, with their values: the command
continues where it was stopped, and tables are made from the values with the present levels.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from unbraid import recipes, store
from unbraid.data.planted import ILLNESSES, sick_log
from unbraid.diagnosis.diagnose import CHECKS, diagnose, ranked
from unbraid.diagnosis.diagnosis import Diagnosis
from unbraid.diagnosis.interference import Interference
from unbraid.job import train
from unbraid.render import markdown

FIXED, SHOWN = range(10), range(100, 120)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS, STEPS = 8000, 200
TRIED = 2  # remedies of an illness
PAIRED = 3  # seeds on which two illnesses are planted at once
LEVELS = {check.name: (check.usual, check.severe) for check in CHECKS if hasattr(check, "severe")}  # type: ignore[attr-defined]
LEVELS["alone"] = (Interference().usual_alone, Interference().severe_alone)
OF = {"conflict": "interference", "dominance": "interference", "auxiliary": "interference"}


# ---------------------------------------------------------------------------------------------------------------- a case
def examined(job: tuple[Path, int, Mapping[str, float]]) -> None:
    """Train on one log, examine, and keep what was found."""
    out, seed, ill = job
    path = out / f"{name_of(ill)}-{seed}.json"
    if path.exists():
        return
    tables, data = sick_log(seed, **ill)
    result = train(recipes.planted(data), tables=tables, baseline=False)
    report = diagnose(result.bundle, rows=ROWS, steps=STEPS, seed=seed, tables=tables)
    kept_of = ("name", "where", "value", "low", "high", "usual", "severe")
    found = [{k: getattr(d, k) for k in kept_of} for d in report.diagnoses]
    kept = {
        "found": found,
        "failed": dict(report.failed),
        "test": brief(result.metrics["test"]),
        "facts": report.facts["seconds"],
    }
    store.write_text(path, json.dumps(kept))


def treated(job: tuple[Path, int, str]) -> None:
    """Train on a sick log as it is and with the first remedies of the planted illness, and on the healthy twin."""
    out, seed, ill = job
    path = out / f"remedy-{ill}-{seed}.json"
    if path.exists():
        return
    tables, data = sick_log(seed, **{ill: 1.0})
    sick = train(recipes.planted(data), tables=tables, baseline=False)
    check = OF.get(ill, ill)
    report = diagnose(sick.bundle, rows=ROWS, steps=STEPS, seed=seed, tables=tables, only=[check])
    mine = next((d for d in report.found if d.name == ill), None)
    kept: dict[str, Any] = {"sick": brief(sick.metrics["test"]), "healthy": twin(out, seed)}
    able = [r for r in mine.remedies if r.run is not None and r.measure is not None] if mine else []
    for remedy in able[:TRIED]:
        tried = train(remedy.run, tables=tables, baseline=False)
        kept.setdefault("remedies", []).append(
            {
                "name": remedy.name,
                "measure": (remedy.measure.task, remedy.measure.metric),
                "test": brief(tried.metrics["test"]),
            }
        )
    store.write_text(path, json.dumps(kept))


def twin(out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Test metrics of the healthy log of a seed."""
    path = out / f"twin-{seed}.json"
    if not path.exists():
        tables, data = sick_log(seed)
        found = brief(train(recipes.planted(data), tables=tables, baseline=False).metrics["test"])
        store.write_text(path, json.dumps(found))
    return dict(json.loads(path.read_text()))


def brief(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """task -> metric -> value."""
    names = ("auc", "logloss", "rmse")
    return {task: {m: whole[m]["value"] for m in names if m in whole} for task, whole in metrics.items()}


def name_of(ill: Mapping[str, float]) -> str:
    return "+".join(f"{name}_{strength:g}" for name, strength in sorted(ill.items()) if strength) or "healthy"


# -------------------------------------------------------------------------------------------------------------- reading
def read(out: Path, seed: int, ill: Mapping[str, float]) -> list[Diagnosis]:
    """What was found in a case, ranked by the present levels."""
    found = json.loads((out / f"{name_of(ill)}-{seed}.json").read_text())["found"]
    made = []
    for each in found:
        alone = each["where"].endswith(" and the others")
        check = "alone" if alone else OF.get(each["name"], each["name"])
        usual, severe = LEVELS.get(check, (each["usual"], each["severe"]))
        made.append(Diagnosis(**{**each, "usual": usual, "severe": severe}, reading=""))
    return list(ranked(made))


def kinds(found: Sequence[Diagnosis]) -> list[str]:
    """Names of what was found, worst first, each once; what another explains is left out."""
    return list(dict.fromkeys(d.name for d in found if d.grade != "none" and not d.because))


# --------------------------------------------------------------------------------------------------------------- tables
def levels(out: Path, seeds: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """The sure ends of the worst values, healthy against sick: what `usual` and `severe` are fixed on."""
    lines, found = [], {}
    for ill in names:
        ends = {
            what: [_most(read(out, seed, strengths), ill) for seed in seeds]
            for what, strengths in (("healthy", {}), ("sick", {ill: 1.0}))
        }
        own = LEVELS["alone" if ill == "conflict" else OF.get(ill, ill)]
        lines.append(
            [
                ill,
                *(f"{min(v):.3f} .. {np.median(v):.3f} .. {max(v):.3f}" for v in ends.values()),
                f"{own[0]:g}",
                f"{own[1]:g}",
            ]
        )
        found[ill] = ends
    print(markdown(["illness", "healthy", "strength 1", "usual", "severe"], lines, left=1))
    return found


def _most(found: Sequence[Diagnosis], name: str) -> float:
    """The largest lower end of an interval among diagnoses of a name, of its check if there is none of that name."""
    check = OF.get(name, name)
    own = [d for d in found if OF.get(d.name, d.name) == check]
    return max((min(d.value, d.low if d.low is not None else d.value) for d in own), default=0.0)


def truth(
    out: Path, seeds: Sequence[int], names: Sequence[str], few: int, pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Who ranks first where one illness is planted, at which strength it is named at all, and two at once."""
    lines, found = [], dict[str, Any]()
    for ill in names:
        first = sum(kinds(read(out, seed, {ill: 1.0}))[:1] == [ill] for seed in seeds)
        rising = [sum(kinds(read(out, s, {ill: x}))[:1] == [ill] for s in seeds[:few]) for x in STRENGTHS]
        severe = sum(any(d.name == ill and d.grade == "severe" for d in read(out, seed, {ill: 1.0})) for seed in seeds)
        lines.append([ill, f"{first} of {len(seeds)}", f"{severe} of {len(seeds)}", *(f"{k} of {few}" for k in rising)])
        found[ill] = {"first": first, "severe": severe, "rising": rising}
    print(
        markdown(["planted at strength 1", "first", "severe", *(f"first at {x:g}" for x in STRENGTHS)], lines, left=1)
    )
    said = [[d for d in read(out, seed, {}) if d.grade != "none"] for seed in seeds]
    found["healthy"] = {
        g: sum(any(d.grade == g for d in each) for each in said) for g in ("severe", "moderate", "mild")
    }
    print(
        "Healthy logs with a finding, by its grade: "
        + ", ".join(f"{g} {k} of {len(seeds)}" for g, k in found["healthy"].items())
    )
    both = {
        f"{a} + {b}": sum({a, b} <= set(kinds(read(out, seed, {a: 1.0, b: 1.0}))[:3]) for seed in seeds[:PAIRED])
        for a, b in pairs
    }
    if both:
        print(f"\nTwo at once, both among the first three: {sum(both.values())} of {PAIRED * len(both)}")
        print(markdown(["pair", f"of {PAIRED}"], [[pair, str(k)] for pair, k in both.items()], left=1))
    found["pairs"] = both
    return found


def remedies(out: Path, seeds: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Share of (healthy - sick) that each remedy recovers: mean over seeds, with the seeds in which it is at least half."""
    lines, found = [], dict[str, Any]()
    for ill in names:
        got: dict[str, list[tuple[float, float, float]]] = {}
        for seed in seeds:
            kept = json.loads((out / f"remedy-{ill}-{seed}.json").read_text())
            for remedy in kept.get("remedies", ()):
                task, metric = remedy["measure"]
                values = [each[task][metric] for each in (kept["healthy"], kept["sick"], remedy["test"])]
                got.setdefault(f"{remedy['name']} ({metric})", []).append((values[0], values[1], values[2]))
        for name, rows in got.items():
            table = np.array(rows)
            healthy, sick, after = table.mean(0)
            share = (after - sick) / (healthy - sick)
            each = (table[:, 2] - table[:, 1]) / (table[:, 0] - table[:, 1])
            lines.append(
                [
                    ill,
                    name,
                    f"{len(rows)}",
                    f"{healthy:.4f}",
                    f"{sick:.4f}",
                    f"{after:.4f}",
                    f"{share:.0%}",
                    f"{(each >= 0.5).sum()}",
                ]
            )
            found[f"{ill}/{name}"] = {"recovered": share, "seeds": len(rows), "half": int((each >= 0.5).sum())}
    print(
        markdown(
            ["illness", "remedy (metric)", "logs", "healthy", "sick", "treated", "recovered", "logs with half"],
            lines,
            left=2,
        )
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("levels", "truth", "remedies"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=ILLNESSES, default=list(ILLNESSES))
    parser.add_argument("--quick", action="store_true", help="one seed, no pairs: does it run")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    out: Path = asked.out
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in ILLNESSES if name in asked.only]
    seeds = list(FIXED if asked.part == "levels" else SHOWN)[: 1 if asked.quick else None]
    few = 1 if asked.quick else 3
    pairs = [] if asked.quick else list(combinations(names, 2))
    jobs: list[Any] = []
    if asked.part == "remedies":
        seeds = seeds[:10]
        jobs = [(out, seed, ill) for seed in seeds for ill in names]
    else:
        jobs = [(out, seed, {}) for seed in seeds] + [(out, seed, {ill: 1.0}) for seed in seeds for ill in names]
        if asked.part == "truth":
            jobs += [(out, seed, {ill: x}) for seed in seeds[:few] for x in STRENGTHS[1:-1] for ill in names]
            jobs += [(out, seed, {a: 1.0, b: 1.0}) for seed in seeds[:PAIRED] for a, b in pairs]
    work = treated if asked.part == "remedies" else examined
    with ProcessPoolExecutor(asked.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(work, jobs))
    if asked.part == "levels":
        found = levels(out, seeds, names)
    elif asked.part == "truth":
        found = truth(out, seeds, names, few, pairs)
    else:
        found = remedies(out, seeds, names)
    print(json.dumps({"benchmark": "planted_truth", "part": asked.part, "quick": asked.quick, "found": found}))


if __name__ == "__main__":
    main()
