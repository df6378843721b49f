"""The main job: a run becomes a bundle, with the baseline that it has to beat beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
import torch
from torch import nn

from unbraid import config, parallel, sharded_files, sharding, store
from unbraid.adapters.frames import in_polars, lazy
from unbraid.baseline import TargetEncoding
from unbraid.bundle import EVALUATION_ROWS, Bundle, build
from unbraid.data.declaration import Data
from unbraid.data.encode import encode
from unbraid.data.events import warnings_of
from unbraid.data.features import attach
from unbraid.data.source import Tables, scan_given
from unbraid.data.table import Encoded
from unbraid.encoders.table import Table
from unbraid.evaluate import evaluate
from unbraid.model import Model
from unbraid.predictor import Predictor
from unbraid.preflight import (
    ORACLE,
    JobError,
    bound_terms,
    check_labels,
    check_selection,
    empty_histories,
    one_class_domains,
    unknown_domains,
)
from unbraid.render import render_markdown
from unbraid.run_folder import clear, prepare, remove_checkpoints, worth
from unbraid.track import Tracker
from unbraid.train import Local, Watcher, predict
from unbraid.train.dense import check_dense
from unbraid.train.scoring import shared_scores
from unbraid.types import FIRST_VALUE, UNKNOWN, Schema, Scores
from unbraid.warm_start import warm_start

if TYPE_CHECKING:
    from unbraid.diagnosis.diagnosis import Report


@dataclasses.dataclass(frozen=True)
class Result:
    """What `train` made: the bundle, the test metrics of the model and of the baseline, where everything lies.

    ``report`` is there if one was asked for and nothing went wrong with it.
    """

    bundle: Bundle
    metrics: Mapping[str, Any]
    folder: Path | None
    report: Report | None = None


def train(
    run: config.Run, out: str | Path | None = None, *, tables: Tables | None = None, resume: bool = False,
    overwrite: bool = False, baseline: bool = True, keep_scores: bool = False, watcher: Watcher | None = None,
    track: Sequence[str] = (), track_every: int = 10, report: bool = False,
) -> Result:  # fmt: skip
    """Encode, train, evaluate and write the bundle.

    In one of several processes that torchrun started (docs/distributed.md) they train together; the first one writes and tells.

    Args:
        run: what to do; out: the bundle's folder (None: nothing is written); tables: tables in memory by name
            (Polars, pandas, Arrow, Hugging Face: `unbraid.adapters.frames.lazy`).
        resume: continue the unfinished run in ``out``; overwrite: delete what is in ``out`` first.
        baseline: fit and report target encoding, too; keep_scores: write the test split's `Scores` to ``scores.safetensors``.
        track: ``tensorboard=FOLDER``, ``mlflow=URI``: where to write what happens (docs/tracking.md), the losses of every
            ``track_every``-th step.
        report: run the checks that train nothing, and write ``report.html``, ``report.json`` and more into ``report.md``
            (`unbraid.report.trained`); of a finished run that is resumed, if it has none.  What goes wrong with it is noted.

    Raises:
        JobError: ``out`` holds another run, or a finished one; DataError, BundleError, OSError as they say.
        ValueError, ImportError: ``track`` cannot be written to, or its library is missing.
        unbraid.parallel.Lost: another process ended; unbraid.parallel.Elsewhere: one raised what is meant for all.
    """
    watcher, tables = watcher or Watcher(), in_polars(tables)
    if run.training.threads:
        torch.set_num_threads(run.training.threads)
    folder = None if out is None else Path(out)
    with parallel.together(run.training.device) as device:
        if parallel.rank():
            watcher, track = Watcher(), ()
        resume = resume or _restarted(folder)
        tracker = Tracker(watcher, track, track_every, run, folder, resume) if track else None
        if folder is not None and _prepared(folder, run, resume, overwrite):
            watcher.note(f"{folder} is finished; nothing to resume")
            bundle = Bundle.load(folder)
            result = Result(bundle, bundle.metrics, folder)
            report = report and not (folder / "report.json").exists()
        else:
            try:
                with tracker or contextlib.nullcontext(watcher) as told:
                    result = _train(run, folder, tables, resume, baseline, keep_scores, told, device)
            except (ValueError, JobError, FloatingPointError):  # a mistake to mend: the folder is free for the next try
                if folder is not None and not parallel.rank() and not worth(folder):
                    clear(folder)
                raise
        report = report and not parallel.rank()
        if report and sharding.parts(result.bundle.model):  # of several processes, none of which may have room for all
            watcher.note(
                "! no report: the tables are divided over processes, and a report looks at whole ones. "
                f"`unbraid diagnose {folder or 'BUNDLE'}` makes one, in one process, where they fit"
            )
            report = False
    return reported(result, tables, watcher) if report else result


def _restarted(folder: Path | None) -> bool:
    """Did torchrun start this again after a process ended (``--max-restarts``), with something to resume?"""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return again and folder is not None and (folder / "run.toml").exists()


def _prepared(folder: Path, run: config.Run, resume: bool, overwrite: bool) -> bool:
    """`unbraid.run_folder.prepare` by the first process.  Raises JobError where another one does not see the folder."""
    finished = parallel.on_first(lambda: prepare(folder, run, resume, overwrite))
    if not all(seen := parallel.gather((folder / "run.toml").exists())):
        raise JobError(
            f"Process {seen.index(False)} does not see {folder}, which the first one wrote. Processes on several machines need a "
            "folder that all of them share."
        )
    return finished


def reported(result: Result, tables: Tables | None, watcher: Watcher) -> Result:
    """The result with its report.  The training is finished, so that whatever goes wrong here is noted and no more."""
    from unbraid.report.trained import examine  # late: checks read this module

    try:
        return dataclasses.replace(result, report=examine(result, tables, watcher))
    except Exception as error:
        watcher.note(f"! no report: {type(error).__name__}: {error}")
        return result


def _train(
    run: config.Run, folder: Path | None, tables: Tables | None, resume: bool, baseline: bool, keep_scores: bool,
    watcher: Watcher, device: str,
) -> Result:  # fmt: skip
    """`train` once its folder is ready."""
    encoded, trained, session = learn(run, folder, device=device, tables=tables, resume=resume, watcher=watcher)
    session.watcher.stage("evaluating", 0, 0)
    scores = shared_scores(
        lambda rows: predict(trained, encoded.in_order(rows, EVALUATION_ROWS), encoded.schema, device=device),
        encoded.split("test"),
    )
    metrics = parallel.on_first(lambda: measure(run, encoded, trained, scores, session, baseline))
    bundle = Bundle(run, encoded.fitted, trained.cpu().eval(), metrics)
    if folder is not None and parallel.rank():
        sharded_files.send(trained)
    elif folder is not None:
        if keep_scores:
            state = {part.name: getattr(scores, part.name) for part in dataclasses.fields(scores)}
            store.save(folder / "scores.safetensors", state)
        bundle.save(folder)
        store.write_text(folder / "report.md", report(run, metrics))
        remove_checkpoints(folder)
    watcher.measured(metrics)
    return Result(bundle, metrics, folder)


def learn(
    run: config.Run, folder: Path | None, *, device: str, tables: Tables | None = None, resume: bool = False,
    watcher: Watcher,
) -> tuple[Encoded, Model, Local]:  # fmt: skip
    """Encode and train a run.  The test split is not looked at.

    Args:
        folder: where checkpoints and the log go, if anywhere; device: of `parallel.together`; the rest as of `train`.

    Returns:
        The encoded data, the trained model on the session's device, and the session, whose processes have ended.
    """
    old = Bundle.load(run.init, mapped=True) if run.init else None
    grow = old.fitted if old else None
    encoded = Encoded(parallel.one_by_one(lambda: encode(run.data, tables=tables, grow=grow, progress=watcher.stage)))
    parallel.require_same("data (encoded folder, rows)", (encoded.folder.name, encoded.rows))
    parallel.require_same("run (sum of its text)", zlib.crc32(config.dumps(run).encode()))
    for warning in warnings_of(run.data, tables=tables):
        watcher.note(f"! {warning}")
    model, session = prepared(run, encoded, device, old=old, folder=folder, resume=resume, watcher=watcher)
    old = grow = None  # a training does not carry along what it began with
    with contextlib.closing(session):
        trained = run.schedule(session, model, session.total_steps())
    return encoded, cast(Model, trained), session


def prepared(
    run: config.Run, encoded: Encoded, device: str, *, old: Bundle | None = None, folder: Path | None = None,
    resume: bool = False, watcher: Watcher | None = None,
) -> tuple[Model, Local]:  # fmt: skip
    """A run's model on a device and the session that trains it, before the first step, once everything fits together.

    Args:
        encoded: the run's encoded data; old: the bundle to start from; folder, resume, watcher: as of `learn`.

    Raises:
        JobError: losses, labels or what selects do not fit the data.
    """
    schema, watcher = encoded.schema, watcher or Watcher()
    for warning in (
        *one_class_domains(encoded), *empty_histories(encoded), *unknown_domains(run, encoded),
    ):  # fmt: skip
        watcher.note(f"! {warning}")
    model = build(run, schema)
    if old is not None:
        counts = warm_start(model, encoded.fitted, old)
        watcher.note("warm start: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    terms = bound_terms(run, schema, model)
    check_labels(terms, encoded, run.training.mix)
    if run.data.exposure and not any("exposure" in getattr(term, "reads", ()) for term in terms):
        watcher.note("! data.exposure is counted for every row, and no loss reads it: see docs/methods/exposure.md")
    session = Local(
        encoded, terms, run.update, run.training, {t.name: t.weight for t in schema.tasks},
        run.seed, folder, resume, device, watcher, augment=run.augment, average=run.average,
        selection=run.selection,
    )  # fmt: skip
    check_selection(run, session)
    model = model.to(device)
    check_dense(model, run.training, device)
    session.tables = sharded_files.sizes(model)
    parallel.one_by_one(lambda: attach(encoded, model, augment=run.augment, progress=watcher.stage, device=device))
    return model, session


# ----------------------------------------------------------------------------------------------------------- evaluation
def measure(
    run: config.Run, encoded: Encoded, model: nn.Module, scores: Scores, session: Local, baseline: bool
) -> dict[str, Any]:  # fmt: skip
    """Test metrics of the model and the baseline, cost and sizes: what ``metrics.json`` holds."""
    metrics: dict[str, Any] = {"test": evaluate(scores, encoded.schema, seed=run.seed)}
    if baseline and not (run.baseline or default_baseline(run)):
        session.watcher.note("no baseline: target encoding needs an id feature, a user or a domain")
    elif baseline:
        session.watcher.stage("baseline", 0, 0)
        metrics["baseline"] = {
            "target_encoding": evaluate(baseline_scores(run, encoded, scores), encoded.schema, seed=run.seed)
        }
    metrics["rows"] = {name: len(encoded.split(name)) for name in ("train", "valid", "test")}
    metrics["seconds"] = {"train": round(session.seconds, 2)}
    metrics["steps"], metrics["data"] = session.steps, encoded.folder.name
    own = cast(Mapping[str, Table], model.tables)
    tables = sum(t.size * t.weight.shape[1] for t in own.values())
    dense = sum(p.numel() for p in model.parameters()) - sum(t.weight.numel() for t in own.values())
    metrics["parameters"] = {"tables": tables, "dense": dense}
    metrics["lazy tables"] = sorted(name for name, t in own.items() if t.lazy)
    if session.record is not None:
        metrics["schedule"] = session.record
    if run.selection is not None:
        metrics["selection"] = {"kind": run.selection.kind, "oracle": run.selection.oracle, **session.best}
    if session.told:
        metrics["weights"] = dict(session.told)
    return metrics


def baseline_scores(run: config.Run, encoded: Encoded, scores: Scores) -> Scores:
    """The test scores with target encoding's logits instead of the model's."""
    train_rows, test_rows = encoded.split("train"), scores.row
    ids = {name: _codes(encoded, name, train_rows, test_rows) for name in run.baseline or default_baseline(run)}
    labels, observed = encoded.labels(train_rows)
    weight = encoded.columns["weight"][train_rows] if "weight" in encoded.columns else None
    plain = ({k: v.numpy() for k, v in labels.items()}, {k: v.numpy() for k, v in observed.items()})
    model = TargetEncoding(encoded.schema).fit({n: c[0] for n, c in ids.items()}, *plain, weight)
    return dataclasses.replace(scores, logits=model.predict({n: c[1] for n, c in ids.items()}))


def default_baseline(run: config.Run) -> tuple[str, ...]:
    """The user, the domain and every id feature."""
    roles = [role for role in ("user", "domain") if getattr(run.data, role)]
    return (*roles, *(f.name for f in run.data.features if f.kind == "id"))


def _codes(encoded: Encoded, name: str, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A column's codes in two sets of rows; users have hashes and no vocabulary, so theirs are numbered here."""
    column = encoded.columns[name if name in ("user", "domain") else f"feature.{name}"]
    if name != "user":
        return column[train].astype(np.int64), column[test].astype(np.int64)
    known, codes = np.unique(column[train], return_inverse=True)
    place = np.searchsorted(known, column[test]).clip(max=len(known) - 1)
    return codes + FIRST_VALUE, np.where(known[place] == column[test], place + FIRST_VALUE, UNKNOWN)


def facts(run: config.Run, metrics: Mapping[str, Any]) -> dict[str, str]:
    """What is to be said of a training beside its metrics, by name; a schedule's own report is several lines of Markdown."""
    sizes, over = metrics["parameters"], "users" if run.data.user else "requests" if run.data.request else "rows"
    said = {
        "rows": ", ".join(f"{name} {count:,}" for name, count in metrics["rows"].items()),
        "training": f"seed {run.seed}, {metrics['steps']:,} steps, {metrics['seconds']['train']:.0f} s",
        "parameters": f"{sizes['tables']:,} in tables, {sizes['dense']:,} dense",
        "intervals": f"95 %, by a bootstrap over {over}",  # what `evaluate` draws
    }
    if (chosen := metrics.get("selection")) is not None:
        value = "no look had a value" if chosen["value"] is None else f"step {chosen['step']:,}, {chosen['value']:.4g}"
        said["selection"] = f"by `{chosen['kind']}` on the validation split: {value}"
        if chosen["oracle"]:
            said[chosen["kind"]] = f"it {ORACLE}"
    if "weights" in metrics:
        found = ", ".join(f"{name} {value:.3g}" for name, value in metrics["weights"].items())
        said["weights"] = f"of the update {run.update.kind} at the end: {found}"
    if "schedule" in metrics and hasattr(run.schedule, "report"):
        said["schedule"] = run.schedule.report(metrics["schedule"])
    return said


def report(run: config.Run, metrics: Mapping[str, Any]) -> str:
    """The Markdown report of a training; `unbraid.report.trained` adds what checks say."""
    said = facts(run, metrics)
    lines = [f"# {run.name}", "", f"Rows: {said['rows']}; training: {said['training']}; parameters: {said['parameters']}.", "",
             f"Test split, {said['intervals'].replace('95 %, by', '95 % intervals by')}.", "",
             render_markdown(metrics["test"], metrics.get("baseline", {}).get("target_encoding"))]  # fmt: skip
    if "selection" in said:
        kind = metrics["selection"]["kind"]
        warning = f" **{kind.capitalize()}**: {said[kind]}." if kind in said else ""
        lines.append(f"Selected {said['selection']}.{warning}\n")
    lines += [f"Weights {said['weights']}.\n"] if "weights" in said else []
    lines += [said["schedule"]] if "schedule" in said else []
    return "\n".join(lines) + "\n"


def evaluate_bundle(
    bundle: Bundle,
    *,
    split: str = "test",
    rows: Any = None,
    folder: str | Path | None = None,
    tables: Tables | None = None,
    raw: bool = False,
    mc_dropout: int = 0,
) -> dict[str, Any]:
    """Metrics of a bundle on a split of its data (in ``folder`` now, if given) or on labelled rows of a file or frame.

    Args:
        raw, mc_dropout: as of `unbraid.predictor.Predictor`.

    Raises:
        JobError: no row has a label of any task.
    """
    predictor = Predictor(bundle, folder, raw=raw, mc_dropout=mc_dropout)
    if rows is not None:
        scores = predictor.scores(rows, tables)
        _require_labels(scores, rows, bundle.fitted.schema, predictor.data)
    else:
        scores = predictor.split_scores(split, tables)
    return evaluate(scores, bundle.fitted.schema, seed=bundle.run.seed)


def _require_labels(scores: Scores, rows: Any, schema: Schema, data: Data) -> None:
    """Raises JobError when no task has a label in any of the rows."""
    if any(scores.observed[task.name].any() for task in schema.tasks):
        return
    plan = scan_given(rows, data) if isinstance(rows, str | Path) else lazy(rows, "The rows")
    have = plan.collect_schema().names()
    missing = [task.source for task in schema.tasks if task.source.isidentifier() and task.source not in have]
    what = f"column `{'`, `'.join(missing)}` is missing" if missing else "they are all null"
    raise JobError(f"no labels in {rows if isinstance(rows, str | Path) else 'the rows'}: {what}")


def write_predictions(rows: Path, predictions: pl.DataFrame, out: Path, data: Data | None = None) -> None:
    """The rows' file, read as the run's data say, with ``predicted_`` before each column of the predictions.

    Raises JobError when such a column exists.
    """
    frame = scan_given(rows, data).collect()
    columns = predictions.rename(lambda name: f"predicted_{name}")
    clash = sorted(set(frame.columns) & set(columns.columns))
    if clash:
        raise JobError(f"{rows} already has {', '.join(clash)}. Rename them, or pass the rows without.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.part")
    try:
        pl.concat([frame, columns], how="horizontal").write_parquet(temporary)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
