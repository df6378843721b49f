"""What is checked before a training starts: do losses, model, labels and selection fit each other?  What is odd is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unbraid import config
from unbraid.bundle import trained_splits
from unbraid.data.mix import Mix
from unbraid.data.table import Encoded
from unbraid.model import Model
from unbraid.slots import Term
from unbraid.types import FIRST_VALUE, UNKNOWN, Schema, Scores

if TYPE_CHECKING:
    from unbraid.train import Local

ORACLE = "reads labels of the target that a model without labels cannot have: its results are no results of adaptation"


class JobError(RuntimeError):
    """The job cannot start as asked; the message says what to do."""


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
