"""The main job: a run becomes a bundle, with the baseline that it has to beat beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
import tomli_w
import torch
from torch import nn

from unbraid import config, parallel, store
from unbraid.baseline import TargetEncoding
from unbraid.bundle import EVALUATION_ROWS, Bundle, build, trained_splits, warm_start
from unbraid.data.encode import encode
from unbraid.data.events import warnings_of
from unbraid.data.features import attach
from unbraid.data.mix import Mix
from unbraid.data.source import Data, Tables, scan_given
from unbraid.data.table import Encoded
from unbraid.encoders.table import Table
from unbraid.evaluate import evaluate
from unbraid.model import Model
from unbraid.render import render_markdown
from unbraid.track import Tracker
from unbraid.train import Local, Watcher, predict
from unbraid.train.scoring import shared_scores
from unbraid.types import FIRST_VALUE, UNKNOWN, Schema, Scores, Term

if TYPE_CHECKING:
    from unbraid.diagnosis.diagnosis import Report

ORACLE = "reads labels of the target that a model without labels cannot have: its results are no results of adaptation"


class JobError(RuntimeError):
    """The job cannot start as asked; the message says what to do."""


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
        run: what to do; out: the bundle's folder (None: nothing is written); tables: tables in memory by name.
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
    watcher = watcher or Watcher()
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
                if folder is not None and not parallel.rank() and not _worth(folder):
                    clear(folder)
                raise
        report = report and not parallel.rank()
    return reported(result, tables, watcher) if report else result


def _restarted(folder: Path | None) -> bool:
    """Did torchrun start this again after a process ended (``--max-restarts``), with something to resume?"""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return again and folder is not None and (folder / "run.toml").exists()


def _prepared(folder: Path, run: config.Run, resume: bool, overwrite: bool) -> bool:
    """`_prepare` by the first process.  Raises JobError where another one does not see the folder."""
    finished = parallel.on_first(lambda: _prepare(folder, run, resume, overwrite))
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
    if folder is not None and not parallel.rank():
        if keep_scores:
            state = {part.name: getattr(scores, part.name) for part in dataclasses.fields(scores)}
            store.save(folder / "scores.safetensors", state)
        bundle.save(folder)
        store.write_text(folder / "report.md", report(run, metrics))
        for path in folder.glob("*.safetensors"):  # a finished run needs its checkpoints no more
            if path.name.startswith(("fit-", "schedule-")):
                path.unlink()
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
    old = Bundle.load(run.init) if run.init else None
    grow = old.fitted if old else None
    encoded = Encoded(parallel.one_by_one(lambda: encode(run.data, tables=tables, grow=grow, progress=watcher.stage)))
    parallel.require_same("data (encoded folder, rows)", (encoded.folder.name, encoded.rows))
    parallel.require_same("run (sum of its text)", zlib.crc32(config.dumps(run).encode()))
    schema = encoded.schema
    for warning in (
        *warnings_of(run.data, tables=tables), *one_class_domains(encoded), *empty_histories(encoded),
        *unknown_domains(run, encoded),
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
    parallel.one_by_one(lambda: attach(encoded, model, augment=run.augment, progress=watcher.stage, device=device))
    with contextlib.closing(session):
        trained = run.schedule(session, model, session.total_steps())
    return encoded, cast(Model, trained), session


def _prepare(folder: Path, run: config.Run, resume: bool, overwrite: bool) -> bool:
    """Make the folder ready.  Returns whether a finished run was asked to be resumed.  Raises JobError."""
    mark, text = folder / "run.toml", config.dumps(run)
    if folder.exists() and not folder.is_dir():
        raise JobError(f"{folder} is a file. Choose another --out.")
    if resume and not mark.exists():
        raise JobError(f"There is nothing to resume in {folder}: it holds no run.toml.")
    if not mark.exists() and folder.exists() and any(folder.iterdir()):
        raise JobError(f"{folder} is not empty and holds no run. Choose another --out.")
    finished, worth = (folder / "weights.safetensors").exists(), _worth(folder)
    if mark.exists() and not worth:
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
    if mark.exists() and not (worth and resume):
        clear(folder)
        finished = False
    folder.mkdir(parents=True, exist_ok=True)
    store.write_text(mark, text)
    return finished


def _worth(folder: Path) -> bool:
    """Whether a folder holds a finished run or a checkpoint.  A run that died before its first starts again."""
    return any(path for kind in ("weights", "fit-*", "schedule-*") for path in folder.glob(f"{kind}.safetensors"))


WRITES = ("run.toml", "schema.json", "vocabularies", "weights.safetensors", "scores.safetensors", "metrics.json", "report.md",
          "report.html", "report.json", "environment.json", "log.jsonl", "uncertainty.safetensors", "calibration.safetensors",
          "backbones.safetensors", "track.json", "fit-*.safetensors", "schedule-*.safetensors", ".*.unbraid-*")  # fmt: skip


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


def bound_terms(run: config.Run, schema: Schema, model: Model) -> list[Term]:
    """The run's loss terms for this schema.

    Raises JobError when one does not fit the schema, or reads what the model does not give, when none reads the second
    heads of the history encoder, two logits or an extra head, and when a task's own logits have no loss.
    """
    try:
        terms: list[Term] = [term.bind(schema) for term in run.losses]
    except ValueError as error:
        raise JobError(str(error)) from error
    for term, loss in zip(terms, run.losses, strict=True):
        if missing := sorted(set(term.needs) - set(model.gives)):
            kind = getattr(loss, "kind", type(loss).__name__)
            raise JobError(_not_given(kind, missing, run.model.history, sorted(model.gives)))
    trained = [(term, getattr(term, "trains", [task.name for task in schema.tasks])) for term in terms]
    covered = {name for _, names in trained for name in names}
    if bare := [task.name for task in schema.tasks if task.name not in covered]:
        raise JobError(
            f"No loss trains the logits of task {', '.join(bare)}, which would be predicted at random. Add a loss that "
            "does, such as `[[losses]]` with kind `supervised`."
        )
    level = {name for term, names in trained for name in names if not getattr(term, "relative", False)}
    if free := [task.name for task in schema.tasks if task.name not in level]:
        raise JobError(
            f"Task {', '.join(free)} has the loss `ranking` alone, which leaves the level of its logits free: they would be no "
            "probabilities. It needs a loss of the probability beside it: supervised, focal or esmm."
        )
    unread = {name for name in model.gives if name.startswith("history.")} - {n for term in terms for n in term.needs}
    if unread:
        raise JobError(
            f"Second heads of the history encoder give {sorted(unread)}, which no loss reads: they would never learn. "
            f"Add a loss of kind `history`, or set `auxiliary` of `model.history` to []."
        )
    two = {name for name in model.gives if name.startswith("heads.two.")}
    if two and not two & {n for term in terms for n in term.needs}:
        raise JobError(
            "Heads with two logits (`model.heads.two`) are for the loss `ranking` of form `jrc`, and there is none. Add it, or "
            "set `model.heads.two` to false."
        )
    for head in run.model.extra_heads:
        given = {name for name in model.gives if name.startswith(f"extra_heads.{head.kind}.")}
        if not given & {n for term in terms for n in term.needs}:
            raise JobError(
                f"No loss reads the extra head `{head.kind}`: it would never learn. Add the loss that does, `[[losses]]` with "
                f"kind `{head.loss}`, or leave it out of `model.extra_heads`."
            )
    return terms


def _not_given(kind: str, missing: Sequence[str], history: Any, given: Sequence[str]) -> str:
    """What to say of a loss that reads what the model does not give."""
    if all(name.startswith("heads.two.") for name in missing):
        return f"Loss `{kind}` of form `jrc` needs heads with two logits: set `model.heads.two` to true."
    if all(name.startswith("extra_heads.") for name in missing):
        head = missing[0].split(".")[1]
        if any(name.startswith(f"extra_heads.{head}.") for name in given):
            return f"Loss `{kind}` and the extra head `{head}` should have the same `of`. Found two."
        return f"Loss `{kind}` needs the extra head `{head}`: add `[[model.extra_heads]]` with kind `{head}`."
    if all(name.startswith(("heads.vectors.", "heads.scale.")) for name in missing):
        tasks = sorted({name.split(".", 2)[2] for name in missing})
        return (
            f"Loss `{kind}` needs vectors of the classes: set `model.classes.{tasks[0]}`, such as "
            '{ kind = "file", file = "classes.npz" }.'
        )
    if not all(name.startswith("history.") for name in missing):
        return f"Loss `{kind}` reads {', '.join(missing)}, which the model does not give. It gives {', '.join(given) or 'none'}."
    if hasattr(history, "auxiliary"):
        return f"Loss `{kind}` needs second heads: set `model.history.auxiliary`, such as [64]."
    return f"Loss `{kind}` needs second heads, and history encoder `{history.kind}` has none."


def check_declared(terms: Sequence[Term], encoded: Encoded) -> None:
    """Raises JobError when a term reads something of each row (its ``reads``) that the data do not declare."""
    for name in [name for term in terms for name in getattr(term, "reads", ()) if name not in encoded.columns]:
        raise JobError(f"A loss reads the {name} of each row, and the data declare none: set `data.{name}`.")


def check_labels(terms: Sequence[Term], encoded: Encoded, mix: Mix | None = None) -> None:
    """`check_declared`, and let every ``check`` of a term see how the training labels contradict ``given``.

    Raises JobError, also when a term teaches rows without a label (its ``unlabelled``) and batches (of ``mix``) have none.
    """
    check_declared(terms, encoded)
    check_unlabelled(terms, encoded, mix)
    checks = [term.check for term in terms if hasattr(term, "check")]
    orphans = encoded.orphans(encoded.split("train")) if checks else {}
    try:
        for check in checks:
            check(orphans)
    except ValueError as error:
        raise JobError(str(error)) from error


def check_unlabelled(terms: Sequence[Term], encoded: Encoded, mix: Mix | None) -> None:
    """Raises JobError when terms teach rows without a label of some tasks, and no batch has any."""
    tasks = {task.name for term in terms for task in getattr(term, "unlabelled", ())}
    if not tasks or (mix is not None and mix.unlabelled and mix.pool == "all"):
        return
    _, observed = encoded.labels(encoded.split("train"))
    read = torch.stack(list(observed.values())).any(0) if mix is not None and not mix.unlabelled else torch.tensor(True)
    if not any((read & ~observed[name]).any() for name in tasks):
        what = "no training row lacks one" if mix is None or mix.unlabelled else "`training.mix.unlabelled` is 0"
        raise JobError(
            f"A loss teaches rows without a label of {', '.join(sorted(tasks))}, and {what}. Null the labels that are not to be "
            'read (`data.withhold`), or give batches such rows with `training.mix` (`unlabelled`, `pool = "all"`).'
        )


def check_selection(run: config.Run, session: Local) -> None:
    """Raises JobError when the run's selection does not fit its validation rows; says it aloud when it reads hidden labels."""
    if run.selection is None:
        return
    rows = session.rows("valid")
    batch = session.data.batch(rows, {})
    labels, observed, meta = (
        {k: v.numpy() for k, v in part.items()} for part in (batch.labels, batch.observed, batch.meta)
    )
    weight = None if batch.weight is None else batch.weight.numpy()
    plain = Scores({}, {}, labels, observed, batch.domain.numpy(), weight, rows, rows, session.schema.domains, meta)
    try:
        run.selection.check(plain, session.schema)
    except ValueError as error:
        raise JobError(str(error)) from error
    if run.selection.oracle:
        session.watcher.note(f"! selection `{run.selection.kind}` {ORACLE}")


def one_class_domains(encoded: Encoded) -> list[str]:
    """A warning for each task and domain whose training labels are all of one class."""
    warnings = []
    rows = encoded.split("train")
    domain = encoded.columns["domain"][rows] if "domain" in encoded.columns else np.full(len(rows), FIRST_VALUE)
    labels, observed = encoded.labels(rows)
    for task in (t for t in encoded.schema.tasks if t.kind != "real"):
        names = encoded.schema.classes[task.name] if task.kind == "multiclass" else ("0s", "1s")
        label, known = labels[task.name].numpy(), observed[task.name].numpy()
        for code in np.unique(domain):
            found = np.unique(label[(domain == code) & known])
            if len(found) < 2:
                what = f"only {names[int(found[0])]}" if len(found) else "no labels"
                warnings.append(
                    f"task {task.name}, domain {encoded.schema.domains[code]}: {what} in the training split"
                )
    return warnings


def unknown_domains(run: config.Run, encoded: Encoded) -> list[str]:
    """A warning where heads per domain learn from rows of domains that the training split does not have."""
    if run.model.heads.by != "domain" or "domain" not in encoded.columns:
        return []
    rows = np.concatenate([encoded.split(name) for name in trained_splits(run)])
    count = int((encoded.columns["domain"][rows] == UNKNOWN).sum())
    return [
        f"{count:,} rows that schedule {run.schedule.kind} trains on are of domains that the training split does not have: "
        "they share one head, which no prediction reads (rows of such domains get the mean of the others)"
    ] * (count > 0)


def empty_histories(encoded: Encoded) -> list[str]:
    """A warning for each history that has no event in any row."""
    places = {
        h.name: (encoded.columns[f"start.{h.name}"], encoded.columns[f"end.{h.name}"]) for h in encoded.schema.histories
    }
    empty = [name for name, (start, end) in places.items() if not (end > start).any()]
    return [
        f"history {name} has no event in any row: look at its `where`, and at users and times of the events"
        for name in empty
    ]


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
    tables = sum(t.weight.numel() for t in own.values())
    metrics["parameters"] = {"tables": tables, "dense": sum(p.numel() for p in model.parameters()) - tables}
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
        raw, mc_dropout: as of `unbraid.bundle.Predictor`.

    Raises:
        JobError: no row has a label of any task.
    """
    from unbraid.bundle import Predictor

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
    plan = scan_given(rows, data) if isinstance(rows, str | Path) else rows.lazy()
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
