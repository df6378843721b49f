"""What schedules over domains share: the domains' rows and labels, how well each is predicted, and a table of that.

Paper: none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from unbraid.evaluate import evaluate, lower_is_better
from unbraid.render import markdown
from unbraid.slots import Session
from unbraid.train.scoring import selected
from unbraid.types import FIRST_VALUE, Schema, Scores

READING = "*Head*: the largest domains that together have half of the rows; *tail*: the others."
COUNTED_AT_ONCE = 1 << 20  # rows whose labels are read at a time


@dataclass(frozen=True)
class Domains:
    """Rows of the training and validation splits by domain.

    Attributes:
        codes: (D,) codes that have training rows with a label of some task, ascending; *missing* may be one of them.
        train, valid: code -> (n,) its row numbers; labelled: code -> task -> how many training rows have its label.
    """

    names: tuple[str, ...]
    codes: tuple[int, ...]
    train: Mapping[int, np.ndarray]
    valid: Mapping[int, np.ndarray]
    labelled: Mapping[int, Mapping[str, int]]

    @classmethod
    def of(cls, session: Session) -> Domains:
        """Look through the session's rows."""
        names = session.schema.domains
        train, valid = ({**by_code(session, session.rows(split))} for split in ("train", "valid"))
        labelled = {code: count_labels(session, rows) for code, rows in train.items()}
        codes = tuple(sorted(code for code, counts in labelled.items() if any(counts.values())))
        none = np.zeros(0, np.int64)
        everyone = range(len(names))
        return cls(names, codes, {c: train.get(c, none) for c in everyone}, {c: valid.get(c, none) for c in everyone},
                   {c: labelled.get(c, {}) for c in everyone})  # fmt: skip

    @property
    def without(self) -> dict[str, str]:
        """Name -> why nothing can be learned from it, of known domains without rows or labels."""
        known = [code for code in range(FIRST_VALUE, len(self.names)) if code not in self.codes]
        return {self.names[code]: "no label" if len(self.train[code]) else "no training row" for code in known}

    def labels(self) -> dict[str, dict[str, int]]:
        """Name -> task -> training rows with its label, of the domains that have labels."""
        return {self.names[code]: dict(self.labelled[code]) for code in self.codes}

    def counts(self) -> dict[str, int]:
        """Name -> training rows, of the domains that have labels."""
        return {self.names[code]: len(self.train[code]) for code in self.codes}


def by_code(session: Session, rows: np.ndarray) -> dict[int, np.ndarray]:
    """Domain's code -> those of the rows that are its own."""
    codes = session.column("domain", rows)
    if codes is None:
        return {FIRST_VALUE: rows}
    return {int(code): rows[codes == code] for code in np.unique(codes)}


def count_labels(session: Session, rows: np.ndarray) -> dict[str, int]:
    """Task -> how many of the rows have its label."""
    counts = {task.name: 0 for task in session.schema.tasks}
    for at in range(0, len(rows), COUNTED_AT_ONCE):
        observed = session.batch(rows[at : at + COUNTED_AT_ONCE], {}).observed
        counts = {name: count + int(observed[name].sum()) for name, count in counts.items()}
    return counts


# ------------------------------------------------------------------------------------------------------------ validation
def judge(scores: Scores, schema: Schema, metric: str, tasks: Sequence[str] = ()) -> tuple[float | None, bool, str]:
    """The value that selection goes by on these rows, whether lower is better, and why there is none."""
    found = evaluate(scores, schema, replicates=0)
    value, falls = selected(found, metric, schema, tasks)
    whys = [
        each["why"] for task in found.values() for each in task.values() if isinstance(each, dict) and "why" in each
    ]
    return value, falls, "" if value is not None else next((why for why in whys if why), "undefined")


def values(session: Session, model: nn.Module) -> dict[str, float | None]:
    """Domain's name -> the run's selection metric on its validation rows; None where there is none.  Empty without rows."""
    if not len(session.rows("valid")):
        return {}
    schema, found = session.schema, evaluate(session.score(model), session.schema, replicates=0)
    names = schema.domains[FIRST_VALUE:] if len(schema.domains) == FIRST_VALUE + 1 else schema.domains
    inside = {name: {t: whole["domains"].get(name, {}) for t, whole in found.items()} for name in names}
    if len(names) == 1:  # a log without domains is one
        inside = {names[0]: found}
    return {name: selected(each, session.metric, schema)[0] for name, each in inside.items() if all(each.values())}


def falls(session: Session) -> bool:
    """Is a lower value of the run's selection metric better?"""
    return lower_is_better(session.metric.rpartition(".")[2])


# ------------------------------------------------------------------------------------------------------------- the table
def head_and_tail(rows: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The largest domains that together have half of all rows, and the others."""
    order = sorted(rows, key=lambda name: (-rows[name], name))
    before = np.cumsum([0, *(rows[name] for name in order)])[:-1]
    head = [name for name, sum_before in zip(order, before, strict=True) if 2 * sum_before < sum(rows.values())]
    return head, order[len(head) :]


def table(
    rows: Mapping[str, int], columns: Mapping[str, Mapping[str, float | None]], lower: bool,
    more: Mapping[str, Mapping[str, str]] | None = None,
) -> str:  # fmt: skip
    """Markdown: one line per domain, most rows first, then the average, the worst, and the averages of head and tail.

    Args:
        rows: domain -> training rows; columns: title -> domain -> value; lower: are low values good?
        more: title -> domain -> text, on the right.
    """
    order, more = sorted(rows, key=lambda name: (-rows[name], name)), more or {}
    lines = [[name, f"{rows[name]:,}", *(number(column.get(name)) for column in columns.values()),
              *(column.get(name, "") for column in more.values())] for name in order]  # fmt: skip
    judged = [name for name in order if all(column.get(name) is not None for column in columns.values())]
    head, tail = head_and_tail(rows)
    groups = {"average": judged, "head": [n for n in head if n in judged], "tail": [n for n in tail if n in judged]}
    for title, names in groups.items():
        lines.append(
            [
                f"*{title}*",
                f"{len(names)} domains",
                *(_mean(column, names) for column in columns.values()),
                *("" for _ in more),
            ]
        )
    worst = max if lower else min
    found = [
        number(worst([v for n in judged if (v := column[n]) is not None], default=None)) for column in columns.values()
    ]
    lines.insert(len(order) + 1, ["*worst*", f"{len(judged)} domains", *found, *("" for _ in more)])
    return markdown(["domain", "rows", *columns, *more], lines, left=1)


def _mean(column: Mapping[str, float | None], names: Sequence[str]) -> str:
    return number(float(np.mean([column[name] for name in names])) if names else None)  # type: ignore[arg-type]


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None else f"{value:.4f}"
