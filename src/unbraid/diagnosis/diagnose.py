"""The examination: every check looks at one trained run, what they say is ranked, and remedies are tried.

What explains something else is put before it: a column that says the label is also one that changed, if it is empty where the
label is not yet known; a task that loses by sharing may be one from which another task takes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from unbraid import config
from unbraid.bundle import Bundle, environment
from unbraid.data.source import Tables
from unbraid.diagnosis.attention import Attention
from unbraid.diagnosis.calibration import Calibrated
from unbraid.diagnosis.case import Case
from unbraid.diagnosis.collapse import Collapse
from unbraid.diagnosis.diagnosis import Diagnosis, NotApplicable, Report
from unbraid.diagnosis.drift import Drift
from unbraid.diagnosis.duplicates import Copies
from unbraid.diagnosis.interference import Interference
from unbraid.diagnosis.leak import Leak
from unbraid.diagnosis.retrieval import Retrieval
from unbraid.diagnosis.small import Small
from unbraid.diagnosis.transfer import NegativeTransfer
from unbraid.diagnosis.units import Units
from unbraid.diagnosis.unseen import Unseen
from unbraid.train import Watcher


class Check(Protocol):
    """Looks at a case and says what it found."""

    name: ClassVar[str]
    title: ClassVar[str]
    page: ClassVar[str]

    def __call__(self, case: Case) -> list[Diagnosis]:
        """Findings, worst first or in any order; none where all is well."""


CHECKS: tuple[Check, ...] = (
    Leak(), Copies(), Units(), Unseen(), Drift(), Interference(), Attention(), Retrieval(), Collapse(), Calibrated(), Small(),
)  # fmt: skip
THOROUGH: tuple[Check, ...] = (NegativeTransfer(steps=400),)  # they train a whole model, so they are asked for
EXPLAINS = {  # name -> what it explains of the same subject
    "leak": ("drift", "units"),
    **dict.fromkeys(("auxiliary", "conflict", "dominance"), ("negative_transfer",)),  # all that `Interference` finds
}


def diagnose(
    bundle: Bundle | str | Path, *, rows: int = 20_000, steps: int = 100, seed: int = 0, only: Sequence[str] = (),
    thorough: bool = False, tables: Tables | None = None, checks: Sequence[Check] = CHECKS, watcher: Watcher | None = None,
    jobs: int = 1,
) -> Report:  # fmt: skip
    """Examine a trained run.

    Args:
        bundle: the artefact, or its folder; tables: in-memory tables by name.
        rows: a check looks at no more than so many rows of each split; steps: and trains copies for no more steps.
        seed: of the sample and of the short trainings.
        only: names of checks, `THOROUGH` ones among them; empty: all.
        thorough: those of `THOROUGH`, too, which train a whole model each.
        checks: what to look for, in the place of `CHECKS`.
        jobs: short trainings that run at once, each in a process of its own, where they would take long one after another.  A
            script that asks for several should stand under ``if __name__ == "__main__":``.

    Returns:
        The report, without proofs (`unbraid.diagnosis.prove`).

    Raises:
        ValueError: there is no check of a name.
        BundleError, DataError: the bundle or its data cannot be read.
    """
    started = time.perf_counter()
    watcher = watcher or Watcher()
    chosen = chosen_of(checks, only, thorough)
    folder = None if isinstance(bundle, Bundle) else Path(bundle)
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    torch.set_num_threads(loaded.run.training.threads or max(1, torch.get_num_threads() // jobs))  # as its training had
    case = Case.of(loaded, rows=rows, steps=steps, seed=seed, tables=tables, watcher=watcher, jobs=jobs)
    found, skipped, failed = list[Diagnosis](), dict[str, str](), dict[str, str]()
    for check in chosen:
        watcher.stage(check.title, 0, 0)
        try:
            found += check(case)
        except NotApplicable as why:
            skipped[check.name] = str(why)
        except Exception as error:  # a check that dies takes nothing else with it, and is named in the report
            failed[check.name] = f"{type(error).__name__}: {error}"
    return Report(
        loaded.run.name, _facts(case, time.perf_counter() - started),
        {task.name: f"{task.kind}, {task.role}" for task in case.schema.tasks},
        loaded.metrics.get("test", {}), next(iter(loaded.metrics.get("baseline", {}).values()), {}), curve(folder),
        ranked(found), skipped, failed, toml=config.dumps(case.run),
    )  # fmt: skip


def chosen_of(checks: Sequence[Check], only: Sequence[str], thorough: bool) -> list[Check]:
    """The checks to run.  Raises ValueError where there is none of a name."""
    given = {check.name for check in checks}
    slow = [check for check in THOROUGH if check.name not in given]
    known = {check.name: check for check in (*checks, *slow)}
    if unknown := sorted(set(only) - set(known)):
        raise ValueError(f"Checks are {', '.join(known)}. Found {', '.join(unknown)}.")
    if only:
        return [check for name, check in known.items() if name in only]
    return list(known.values()) if thorough else list(checks)


def ranked(found: Sequence[Diagnosis]) -> tuple[Diagnosis, ...]:
    """Worst first; what another diagnosis explains comes behind everything that none explains."""
    ill = sorted((d for d in found if d.grade != "none" and d.name in EXPLAINS), key=lambda d: -d.severity)
    out = []
    for each in found:
        causes = [d for d in ill if each.name in EXPLAINS[d.name] and subject(d) == subject(each)]
        out.append(dataclasses.replace(each, because=f"{causes[0].name}: {causes[0].where}") if causes else each)
    return tuple(sorted(out, key=lambda d: (bool(d.because) or d.grade == "none", -d.severity)))


def subject(found: Diagnosis) -> str:
    """The column or the task that a diagnosis is about."""
    return found.subject or found.where


def _facts(case: Case, seconds: float) -> dict[str, str]:
    splits = {split: (len(case.sample(split)), len(case.encoded.split(split))) for split in ("train", "valid", "test")}
    made = environment()
    return {
        "sample": "; ".join(f"{split} {n:,} of {of:,} rows" for split, (n, of) in splits.items()),
        "short trainings": f"{case.steps} steps each",
        "seed": str(case.seed),
        "seconds": f"{seconds:.1f}",
        "versions": ", ".join(f"{name} {number}" for name, number in made["versions"].items()),
    }


def curve(folder: Path | None) -> tuple[dict[str, Any], ...]:
    """The lines of a bundle's training log; none without a folder."""
    path = None if folder is None else folder / "log.jsonl"
    if path is None or not path.exists():
        return ()
    return tuple(json.loads(line) for line in path.read_text().splitlines() if line.strip())
