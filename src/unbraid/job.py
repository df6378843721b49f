"""The main job: a run becomes a bundle, with the baseline that it has to beat beside it."""

from __future__ import annotations

import dataclasses
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import tomli_w
import torch

from unbraid import config, store
from unbraid.baseline import TargetEncoding
from unbraid.bundle import Bundle, as_frame, build, warm_start
from unbraid.data.encode import encode
from unbraid.data.source import Tables
from unbraid.data.table import Encoded
from unbraid.evaluate import evaluate
from unbraid.model import Model
from unbraid.render import render_markdown
from unbraid.train import Local, Watcher, predict
from unbraid.types import FIRST_VALUE, UNKNOWN, Schema, Scores, Term

EVALUATION_ROWS = 16_384


class JobError(RuntimeError):
    """The job cannot start as asked; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What `train` made: the bundle, the test metrics of the model and of the baseline, where everything lies."""

    bundle: Bundle
    metrics: Mapping[str, Any]
    folder: Path | None


def train(
    run: config.Run, out: str | Path | None = None, *, tables: Tables | None = None, resume: bool = False,
    overwrite: bool = False, baseline: bool = True, keep_scores: bool = False, watcher: Watcher | None = None,
) -> Result:  # fmt: skip
    """Encode, train, evaluate and write the bundle.

    Args:
        run: what to do; out: the bundle's folder (None: nothing is written); tables: tables in memory by name.
        resume: continue the unfinished run in ``out``; overwrite: delete what is in ``out`` first.
        baseline: fit and report target encoding, too; keep_scores: write the test split's `Scores` to ``scores.safetensors``.

    Raises:
        JobError: ``out`` holds another run, or a finished one; DataError, BundleError, OSError as they say.
    """
    watcher = watcher or Watcher()
    if run.training.threads:
        torch.set_num_threads(run.training.threads)
    folder = None if out is None else Path(out)
    if folder is not None and _prepare(folder, run, resume, overwrite):
        watcher.note(f"{folder} is finished; nothing to resume")
        bundle = Bundle.load(folder)
        return Result(bundle, bundle.metrics, folder)
    old = Bundle.load(run.init) if run.init else None
    encoded = Encoded(encode(run.data, tables=tables, grow=old.fitted if old else None, progress=watcher.stage))
    schema = encoded.schema
    for warning in (*one_class_domains(encoded), *empty_histories(encoded)):
        watcher.note(warning)
    model = build(run, schema)
    if old is not None:
        counts = warm_start(model, encoded.fitted, old)
        watcher.note("warm start: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if run.training.device == "auto" else run.training.device
    terms = bound_terms(run, schema, model)
    check_labels(terms, encoded)
    session = Local(
        encoded, terms, run.update, run.training, {t.name: t.weight for t in schema.tasks},
        run.seed, folder, resume, device, watcher,
    )  # fmt: skip
    model = model.to(device)
    trained = run.schedule(session, model, run.training.total_steps(len(session.rows("train"))))
    assert isinstance(trained, Model)
    session.watcher.stage("evaluating", 0, 0)
    scores = predict(trained, encoded.in_order(encoded.split("test"), EVALUATION_ROWS), schema, device=device)
    metrics = measure(run, encoded, trained, scores, session, baseline)
    bundle = Bundle(run, encoded.fitted, trained.cpu().eval(), metrics)
    if folder is not None:
        if keep_scores:
            state = {part.name: getattr(scores, part.name) for part in dataclasses.fields(scores)}
            store.save(folder / "scores.safetensors", state)
        bundle.save(folder)
        store.write_text(folder / "report.md", report(run, metrics))
        for path in folder.glob("*.safetensors"):  # a finished run needs its checkpoints no more
            if path.name.startswith(("fit-", "schedule-")):
                path.unlink()
    return Result(bundle, metrics, folder)


def _prepare(folder: Path, run: config.Run, resume: bool, overwrite: bool) -> bool:
    """Make the folder ready.  Returns whether a finished run was asked to be resumed.  Raises JobError."""
    mark, text = folder / "run.toml", config.dumps(run)
    if folder.exists() and not folder.is_dir():
        raise JobError(f"{folder} is a file. Choose another --out.")
    if resume and not mark.exists():
        raise JobError(f"There is nothing to resume in {folder}: it holds no run.toml.")
    if not mark.exists() and folder.exists() and any(folder.iterdir()):
        raise JobError(f"{folder} is not empty and holds no run. Choose another --out.")
    finished = (folder / "weights.safetensors").exists()
    worth = finished or any(folder.glob("fit-*.safetensors"))  # a run that died before its first checkpoint is not
    if worth and not (resume or overwrite):
        what = "a finished run" if finished else "an unfinished run (continue it with --resume)"
        raise JobError(f"{folder} holds {what}. Choose another --out, or delete it with --overwrite.")
    if worth and resume and mark.read_text() != text:
        changed = config.differences(config.load(mark), run)
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


WRITES = ("run.toml", "schema.json", "vocabularies", "weights.safetensors", "scores.safetensors", "metrics.json", "report.md",
          "environment.json", "log.jsonl", "fit-*.safetensors", "schedule-*.safetensors", ".*.unbraid-*")  # fmt: skip


def clear(folder: Path) -> None:
    """Delete what `train` wrote into a folder.  Raises JobError, and deletes nothing, if there is anything else."""
    try:
        text = (folder / "run.toml").read_text()
        ours = tomli_w.dumps(tomllib.loads(text)) == text  # what a person writes has comments, or another form
    except (OSError, ValueError):
        ours = False
    parts = sorted(folder.iterdir())
    other = [part.name for part in parts if not any(part.match(pattern) for pattern in WRITES)]
    if other or not ours:
        what = f"{', '.join(other[:5])}, which no run wrote" if other else "a run.toml that no run wrote"
        raise JobError(f"{folder} holds {what}; it is not deleted. Choose another --out.")
    for part in parts:
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def bound_terms(run: config.Run, schema: Schema, model: Model) -> list[Term]:
    """The run's loss terms for this schema.

    Raises JobError when one does not fit the schema, or reads what the model does not give, and when none reads the second
    heads of the history encoder.
    """
    try:
        terms: list[Term] = [term.bind(schema) for term in run.losses]
    except ValueError as error:
        raise JobError(str(error)) from error
    for term in terms:
        missing = set(term.needs) - set(model.gives)
        if missing:
            raise JobError(
                f"{term} reads {sorted(missing)}, which the model does not give. It gives {sorted(model.gives)}."
            )
    unread = {name for name in model.gives if name.startswith("history.")} - {n for term in terms for n in term.needs}
    if unread:
        raise JobError(
            f"Second heads of the history encoder give {sorted(unread)}, which no loss reads: they would never learn. "
            f"Add a loss of kind `history`, or set `auxiliary` of `model.history` to []."
        )
    return terms


def check_labels(terms: Sequence[Term], encoded: Encoded) -> None:
    """Let every term that has a ``check`` see how the training labels contradict ``given``.  Raises JobError."""
    checks = [term.check for term in terms if hasattr(term, "check")]
    orphans = encoded.orphans(encoded.split("train")) if checks else {}
    try:
        for check in checks:
            check(orphans)
    except ValueError as error:
        raise JobError(str(error)) from error


def one_class_domains(encoded: Encoded) -> list[str]:
    """A warning for each task and domain whose training labels are all of one class."""
    warnings = []
    rows = encoded.split("train")
    domain = encoded.columns["domain"][rows] if "domain" in encoded.columns else np.full(len(rows), FIRST_VALUE)
    labels, observed = encoded.labels(rows)
    for task in (t for t in encoded.schema.tasks if t.kind == "binary"):
        label, known = labels[task.name].numpy(), observed[task.name].numpy()
        for code in np.unique(domain):
            found = np.unique(label[(domain == code) & known])
            if len(found) < 2:
                what = f"only {found[0]:g}s" if len(found) else "no labels"
                warnings.append(
                    f"task {task.name}, domain {encoded.schema.domains[code]}: {what} in the training split"
                )
    return warnings


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
    run: config.Run, encoded: Encoded, model: Model, scores: Scores, session: Local, baseline: bool
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
    tables = sum(t.weight.numel() for t in model.tables.values())
    metrics["parameters"] = {"tables": tables, "dense": sum(p.numel() for p in model.parameters()) - tables}
    metrics["lazy tables"] = sorted(name for name, t in model.tables.items() if t.lazy)
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


def report(run: config.Run, metrics: Mapping[str, Any]) -> str:
    """The Markdown report."""
    baseline = metrics.get("baseline", {}).get("target_encoding")
    lines = [f"# {run.name}", "", f"Seed {run.seed}; rows: " + ", ".join(f"{k} {v:,}" for k, v in metrics["rows"].items())
             + f"; {metrics['seconds']['train']:.0f} s of training; parameters: {metrics['parameters']['tables']:,} in tables, "
             f"{metrics['parameters']['dense']:,} dense.", "", "Test split, 95 % intervals by a bootstrap over users.",
             "", render_markdown(metrics["test"], baseline)]  # fmt: skip
    return "\n".join(lines) + "\n"


def evaluate_bundle(
    bundle: Bundle,
    *,
    split: str = "test",
    rows: Any = None,
    folder: str | Path | None = None,
    tables: Tables | None = None,
) -> dict[str, Any]:
    """Metrics of a bundle on a split of its data (in ``folder`` now, if given) or on labelled rows of a file or frame."""
    from unbraid.bundle import Predictor

    predictor = Predictor(bundle, folder)
    if rows is not None:
        return evaluate(predictor.scores(rows, tables), bundle.fitted.schema, seed=bundle.run.seed)
    encoded = Encoded(encode(predictor.data, tables=tables, fitted=bundle.fitted))
    batches = encoded.in_order(encoded.split(split), EVALUATION_ROWS)
    return evaluate(predict(bundle.model, batches, encoded.schema), encoded.schema, seed=bundle.run.seed)


def write_predictions(rows: Path, predictions: Scores, schema: Schema, out: Path) -> None:
    """The rows' file with one ``predicted_TASK`` column per task.  Raises JobError when such a column exists."""
    from unbraid.data.source import scan

    frame = scan("", str(rows.resolve()), Path("/"), None).collect()
    columns = as_frame(predictions, schema).rename(lambda name: f"predicted_{name}")
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
