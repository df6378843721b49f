"""How soon something happens: importing the package, the command line's help, the first training step.

    python benchmarks/first_result.py            # five times each
    python benchmarks/first_result.py --quick    # twice

Each is a process of its own, on one thread; what counts are its CPU seconds (user and system, of the least of its
repetitions), which other work on the machine changes little.  The first step is that of the recipe `stem` on the bundled log,
encoded before: opened, checked, model and update built, 1,024 rows forward and backward.  Limits: 1 s for the import, .5 s
for the help, 5 s for the step.

The baseline of the same run is ``import torch`` alone, which every training has to pay: ``ratios`` are CPU seconds over its.

Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile

STEP = """
from unbraid import recipes
from unbraid.job import train
from unbraid.train import Watcher

class First(Watcher):
    def trained(self, step, losses):
        raise KeyboardInterrupt  # what stops a training from outside

try:
    train(recipes.get("stem"), watcher=First())
except KeyboardInterrupt:
    pass
else:
    raise SystemExit("no step was taken")
"""
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import unbraid": ["-c", "import unbraid"],
    "unbraid --help": ["-m", "unbraid", "--help"],
    "first step": ["-c", STEP],
}
LIMITS = {"import unbraid": 1.0, "unbraid --help": 0.5, "first step": 5.0}


def cpu_seconds(arguments: list[str], cache: str) -> float:
    """User and system time of a Python process.  Raises CalledProcessError if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "UNBRAID_CACHE": cache, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print, and end with the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="twice each")
    times = 2 if parser.parse_args().quick else 5
    with tempfile.TemporaryDirectory() as cache:
        encoding = cpu_seconds(COMMANDS["first step"], cache)  # and the log is encoded from here on
        seconds = {name: min(cpu_seconds(each, cache) for _ in range(times)) for name, each in COMMANDS.items()}
    for name, found in {**seconds, "first step, encoding first": encoding}.items():
        limit = LIMITS.get(name)
        said = "" if limit is None else f"   limit {limit:g} s{'' if found < limit else ': OVER'}"
        print(f"{name:<28}{found:6.2f} s of CPU time   {found / seconds['import torch']:5.2f} times import torch{said}")
    print(json.dumps({
        "benchmark": "first_result",
        "ratios": {name: round(found / seconds["import torch"], 3) for name, found in seconds.items()},
        "cpu_seconds": {name: round(found, 3) for name, found in seconds.items()},
        "limits": LIMITS, "within": {name: seconds[name] < limit for name, limit in LIMITS.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
