"""The folder of a training: made ready, resumed, or cleared of what a run wrote and of nothing else."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import tomli_w

from unbraid import config, store
from unbraid.preflight import JobError


def prepare(folder: Path, run: config.Run, resume: bool, overwrite: bool) -> bool:
    """Make the folder ready.  Returns whether a finished run was asked to be resumed.  Raises JobError."""
    mark, text = folder / "run.toml", config.dumps(run)
    if folder.exists() and not folder.is_dir():
        raise JobError(f"{folder} is a file. Choose another --out.")
    if resume and not mark.exists():
        raise JobError(f"There is nothing to resume in {folder}: it holds no run.toml.")
    if not mark.exists() and folder.exists() and any(folder.iterdir()):
        raise JobError(f"{folder} is not empty and holds no run. Choose another --out.")
    finished, worthy = (folder / "weights.safetensors").exists(), worth(folder)
    if mark.exists() and not worthy:
        _require_ours(folder)
    if mark.exists() and not (resume or overwrite):
        what = "a finished run" if finished else "an unfinished run (continue it with --resume)"
        raise JobError(f"{folder} holds {what}. Choose another --out, or delete it with --overwrite.")
    differs = resume and mark.read_text() != text  # in how a number is written, or in more
    free = tuple(f"schedule.{key}:" for key in getattr(run.schedule, "same", ()))  # they change nothing of the result
    changed = config.differences(config.load(mark), config.with_base(run, folder)) if differs else []
    if changed := [text for text in changed if not text.startswith(free)]:
        raise JobError(
            f"{folder} holds a different run than the one given (there / here): {'; '.join(changed[:5])}. "
            "Give the same settings, or use another --out."
        )
    if mark.exists() and not (worthy and resume):
        clear(folder)
        finished = False
    folder.mkdir(parents=True, exist_ok=True)
    store.write_text(mark, text)
    return finished


def worth(folder: Path) -> bool:
    """Whether a folder holds a finished run or a checkpoint.  A run that died before its first starts again."""
    return any(path for kind in ("weights", "fit-*", "schedule-*") for path in folder.glob(f"{kind}.safetensors"))


WRITES = ("run.toml", "schema.json", "vocabularies", "weights.safetensors", "scores.safetensors", "metrics.json", "report.md",
          "report.html", "report.json", "environment.json", "log.jsonl", "log-*.jsonl", "uncertainty.safetensors",
          "calibration.safetensors", "backbones.safetensors", "track.json", "fit-*.safetensors", "fit-*.tables",
          "schedule-*.safetensors", "schedule-*.tables", ".*.unbraid-*")  # fmt: skip


def remove_checkpoints(folder: Path) -> None:
    """A finished run needs its checkpoints no more."""
    for path in (*folder.glob("fit-*"), *folder.glob("schedule-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def clear(folder: Path) -> None:
    """Delete what `train` wrote into a folder.  Raises JobError, and deletes nothing, if there is anything else."""
    _require_ours(folder)
    for part in sorted(folder.iterdir()):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def _require_ours(folder: Path) -> None:
    """Raises JobError when a folder holds anything that no run wrote."""
    try:
        text = (folder / "run.toml").read_text()
        plain = tomllib.loads(text)  # what a person writes has comments, or another form
        ours = text in (config.written(plain), tomli_w.dumps(plain))  # the latter: runs of earlier versions
    except (OSError, ValueError):
        ours = False
    other = [part.name for part in sorted(folder.iterdir()) if not any(part.match(pattern) for pattern in WRITES)]
    if other or not ours:
        what = f"{', '.join(other[:5])}, which no run wrote" if other else "a run.toml that no run wrote"
        raise JobError(f"{folder} holds {what}; it is not deleted. Choose another --out.")
