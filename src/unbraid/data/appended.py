"""Logs that grow: an encode goes on from the table of the files that were there before.

With ``data.appended`` a table keeps, beside its columns, the sorted events of all users and a note of what it read.  When files
are added behind those that it read, and nothing that codes depend on has changed, the next table starts with its rows and events
and reads the new files alone.  It is the table that all files give, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unbraid.data.declaration import Data
from unbraid.data.fitted import Fitted
from unbraid.data.source import Tables, event_plans, files_of, rows_plan
from unbraid.store import Journal

KEPT, EVENTS = "kept.json", "events"
Files = Mapping[str, list[list[Any]]]  # table -> (path, size, time of change) of its files


def files_read(data: Data, base: Path, joined: bool) -> dict[str, list[list[Any]]]:
    """The files of joined tables, or of the rows and events."""
    joins = {join.table for join in data.joins}
    tables = [name for name in data.tables() if (name in joins) == joined]
    found = {name: [(p.resolve(), p.stat()) for p in files_of(data.folder, name, base)] for name in tables}
    return {name: [[str(path), s.st_size, s.st_mtime_ns] for path, s in stats] for name, stats in found.items()}


def family(data: Data, base: Path, tables: Tables | None, fitted: Fitted, declared: str) -> str:
    """What tables share that can go on from each other: declaration, codes, joined files, types of columns.

    Args:
        declared: of `data`, and the format of tables, in words.
    """
    plans = [rows_plan(data, base, tables), *(plan for _, plan in event_plans(data, base, tables, split=False))]
    types = [str(plan.collect_schema()) for plan in plans]
    text = json.dumps([declared, fitted.codes_digest(), files_read(data, base, joined=True), types])
    return hashlib.sha256(text.encode()).hexdigest()


def keep(folder: Path, name: str, files: Files, journal: Journal) -> None:
    """Note, in a table that is finished, what the next one needs; its events are in ``spill/events``."""
    noted = {part: journal.noted[part] for part in ("rows", EVENTS) if part in journal.noted}
    if "rows" not in noted:  # of a process that had no journal: another one was writing the same table
        return
    (folder / KEPT).write_text(json.dumps({"family": name, "files": files, **noted}))


def go_on(cache: Path, folder: Path, name: str, files: Files, journal: Journal) -> None:
    """Put the rows and events of the largest earlier table that fits into a folder in progress, if there is one.

    Raises OSError when the disk is full.
    """
    fitting = [(before["rows"]["done"], str(place), before) for place, before in _earlier(cache, name, files)]
    if not fitting:
        return
    _, place, before = max(fitting, key=lambda found: found[:2])
    for column in before["rows"]["columns"].values():
        shutil.copyfile(Path(place) / column["file"], folder / column["file"])
    events = folder / "spill" / EVENTS
    events.mkdir(parents=True, exist_ok=True)
    for block in (block for run in before.get(EVENTS, {"runs": []})["runs"] for block in run):
        source, target = Path(place) / "spill" / EVENTS / block, events / block
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)  # runs are never changed
        except OSError:
            shutil.copyfile(source, target)
    journal.note(rows=before["rows"] | {"whole": False}, **({EVENTS: before[EVENTS]} if EVENTS in before else {}))


def _earlier(cache: Path, name: str, files: Files) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Tables of one family whose files are the first of these."""
    for path in sorted(cache.glob(f"[!.]*/{KEPT}")):
        with contextlib.suppress(OSError, ValueError):  # a folder that somebody deletes or has broken
            kept = json.loads(path.read_text())
            same = kept["family"] == name and kept["files"].keys() == files.keys()
            if same and all(files[table][: len(had)] == had for table, had in kept["files"].items()):
                yield path.parent, kept
