"""The report that a finished training leaves in its bundle's folder: metrics, curves, and the checks that train nothing.

Those checks read a sample that is as large as a tenth of the training's time allows, so that nobody has a reason to leave them
out; `unbraid.diagnosis.diagnose` looks deeper.  ``report.md`` is what every training writes (`unbraid.job.report`), with the
checks behind it: it is there before a check has run, and whatever becomes of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbraid import job, report, store
from unbraid.data.source import Tables
from unbraid.diagnosis.calibration import Calibrated
from unbraid.diagnosis.collapse import Collapse
from unbraid.diagnosis.diagnose import CHECKS, THOROUGH, Check, curve, diagnose
from unbraid.diagnosis.diagnosis import Report
from unbraid.diagnosis.duplicates import Copies
from unbraid.diagnosis.leak import Leak
from unbraid.diagnosis.small import Small
from unbraid.diagnosis.units import Units
from unbraid.diagnosis.unseen import Unseen
from unbraid.report.text import findings
from unbraid.train import Watcher

QUICK: tuple[Check, ...] = (Leak(), Copies(), Units(), Unseen(), Collapse(), Calibrated(), Small())
LEAST_ROWS, MOST_ROWS = 500, 10_000  # of each split
SHARE, SECONDS = 0.1, 2.0  # of the training's time, or so long, may predictions of the sample take
FORWARD = 3  # a step of training takes about so many times a prediction of its rows


def examine(result: job.Result, tables: Tables | None = None, watcher: Watcher | None = None) -> Report:
    """The report of what `unbraid.job.train` made, also as ``report.html``, ``report.md`` and ``report.json`` in its folder.

    Without the extra `report` there is no page, which is noted.

    Raises:
        ValueError, OSError: the data cannot be read any more, or the folder cannot be written to.
    """
    watcher = watcher or Watcher()
    run, folder = result.bundle.run, result.folder
    rows = affordable(result.metrics, run.training.batch_size)
    found = diagnose(result.bundle, rows=rows, tables=tables, checks=QUICK, watcher=watcher)
    facts = {name: text for name, text in found.facts.items() if name != "short trainings"}
    facts = {"deeper": deeper(folder), **job.facts(run, result.metrics), **facts}
    made = dataclasses.replace(found, facts=facts, curve=curve(folder))
    if folder is not None:
        write(made, folder, job.report(run, result.metrics), watcher)
    return made


def affordable(metrics: Mapping[str, Any], batch_size: int) -> int:
    """How many rows of each of two splits can be predicted in the time that there is, from what training took."""
    seconds = float(metrics["seconds"]["train"])
    trained = float(metrics["steps"]) * batch_size
    if not seconds or not trained:
        return MOST_ROWS
    each = seconds / trained / FORWARD
    return int(min(MOST_ROWS, max(LEAST_ROWS, max(SHARE * seconds, SECONDS) / 2 / each)))


def deeper(folder: Path | None) -> str:
    """One sentence: what has not been looked at, and how to."""
    left = [check.name for check in (*CHECKS, *THOROUGH) if check.name not in {quick.name for quick in QUICK}]
    return f"`unbraid diagnose {folder or 'BUNDLE'} --html FILE` looks deeper (also at {', '.join(left)}, and at more rows)."


def write(made: Report, folder: Path, head: str, watcher: Watcher) -> None:
    """The files of a report; JSON comes last, so that a folder with it has all."""
    try:
        store.write_text(folder / "report.html", report.html(made))
    except ImportError as error:
        watcher.note(f"no report.html: {error}")
    store.write_text(folder / "report.md", f"{head.rstrip()}\n\n## Checks\n\n{findings(made)}")
    store.write_text(folder / "report.json", report.dump(made))
