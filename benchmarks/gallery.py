"""Real reports of the bundled log, for `docs/gallery`: three runs examined, one with its remedies tried, and compared.

    python benchmarks/gallery.py [--out docs/gallery] [--seeds 3] [--quick]

Writes NAME.html and NAME.md of every run, and compare.html.  `--quick` trains for a few steps and tries no remedy.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from unbraid import recipes, report
from unbraid.bundle import Bundle
from unbraid.compare import compare
from unbraid.diagnosis.diagnose import diagnose
from unbraid.diagnosis.prove import prove

RUNS = ("stem", "shared_bottom", "dare")
PROVED = "shared_bottom"
DOCS = "../"  # from the gallery's folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "gallery")
    parser.add_argument("--work", type=Path, default=Path("runs/gallery"), help="folder of the trainings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="short trainings at once")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    out: Path = asked.out
    out.mkdir(parents=True, exist_ok=True)
    runs = [recipes.get(name) for name in RUNS]
    seeds = asked.seeds
    if asked.quick:
        runs, seeds = [replace(run, training=replace(run.training, steps=20)) for run in runs], 1
    found = compare(runs, asked.work / "compare", seeds=seeds, against=PROVED, resume=True)
    reports, seconds = {}, {}
    for run in runs:
        folder = asked.work / "compare" / run.name / f"seed-{run.seed}"
        kept = asked.work / f"{run.name}.json"
        started = time.perf_counter()
        if kept.exists():  # only written anew
            made = report.load(kept.read_text())
        else:
            made = diagnose(folder, steps=5 if asked.quick else 100, thorough=not asked.quick, jobs=asked.jobs)
            if run.name == PROVED and not asked.quick:
                made = prove(made, Bundle.load(folder).run, asked.work / "prove", seeds=seeds, resume=True)
            kept.write_text(report.dump(made))
        seconds[run.name] = time.perf_counter() - started
        reports[run.name] = made
        (out / f"{run.name}.html").write_text(report.html(made, docs=DOCS), encoding="utf-8")
        (out / f"{run.name}.md").write_text(report.markdown(made), encoding="utf-8")
    (out / "compare.html").write_text(report.compare_html(found, reports), encoding="utf-8")
    print(json.dumps({"benchmark": "gallery", "quick": asked.quick, "seconds": seconds,
                      "findings": {name: [d.name for d in each.found] for name, each in reports.items()}}))  # fmt: skip


if __name__ == "__main__":
    main()
