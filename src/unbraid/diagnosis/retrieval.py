"""Does attention put first what goes with the label?  The measures of `unbraid.analysis.retrieval`, with levels.

How many bits an event of value b at position p tells about the label of a row whose own value is a is counted over training rows;
attention's order of the events of validation rows, from value and position alone, is held against that, and so are two orders
that need no model::

    value = NDCG@K(newest first, or random if that is higher) - NDCG@K(attention)        paired interval over users

Above 0 attention is worse than a trivial order.  K is 20, and at most half the history's length.  The levels are set by hand.

Counts from few rows are noise that every order meets alike: it draws the difference towards 0.  So a row counts only if its value
has ``rows`` training rows, and at most so many of its events as half the history's length stand in cells that fewer than
``support`` rows of either label have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from scipy.stats import spearmanr

from unbraid.analysis.correlation import Correlation, Truth, score_fields, score_grid
from unbraid.analysis.plots import shortened
from unbraid.analysis.retrieval import Retrieval as Probe
from unbraid.diagnosis.case import Case
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, NotApplicable, Remedy
from unbraid.diagnosis.plots import Bars, Heat
from unbraid.encoders.dare import DARE
from unbraid.types import POSITION, Array, Batch, History

PAGE = "diagnosis.md#does-attention-put-it-first"
PAPER = "https://arxiv.org/abs/2410.02604"
TARGETS, NEWEST, OTHERS = 12, 20, 8  # of the maps: the row's own values, positions, and other values per own value
LEAST = 10  # rows of either label that a cell of the maps needs

Match = tuple[str, str, str]  # history, its event field, the row's feature of the same vocabulary


@dataclass(frozen=True)
class Retrieval:
    """See the module's docstring.

    Args:
        usual, severe: differences in NDCG.
        rows, support: what a row needs of the training rows to count; least: and so many validation rows have to.
    """

    name: ClassVar[str] = "retrieval"
    title: ClassVar[str] = "Does attention put first what goes with the label?"
    page: ClassVar[str] = PAGE
    usual: float = 0.02
    severe: float = 0.1
    rows: int = 200
    support: int = LEAST
    least: int = 100

    def __call__(self, case: Case) -> list[Diagnosis]:
        """A diagnosis per match and target, worst first.

        Raises:
            NotApplicable: no encoder scores events, no event field has a feature's vocabulary, or counts are too thin.
        """
        asked, tasks = scored(case), [task.name for task in case.targets if task.kind == "binary"]
        if not asked or not tasks:
            raise NotApplicable(
                "no history whose encoder scores events has a field with the vocabulary of a feature, "
                "or there is no binary target"
            )
        train, valid = list(case.batches("train")), list(case.batches("valid"))
        found, thin = list[Diagnosis](), dict[str, int]()
        for match in asked:
            for task in tasks:
                made = self._measured(case, match, task, train, valid)
                if isinstance(made, Diagnosis):
                    found.append(made)
                else:
                    thin[".".join(match[:2])] = max(made, thin.get(".".join(match[:2]), 0))
        if not found:
            most = ", ".join(f"{n:,} by `{name}`" for name, n in thin.items())
            raise NotApplicable(
                f"counts are too thin: {self.least:,} validation rows are needed whose own value has {self.rows:,} training "
                f"rows, and of whose events at most half the history's length lack {self.support} rows of either label. "
                f"Found {most}"
            )
        return sorted(found, key=lambda d: -d.value)[:5]

    def _measured(
        self, case: Case, match: Match, task: str, train: Sequence[Batch], valid: Sequence[Batch]
    ) -> Diagnosis | int:
        """The diagnosis of a match and a target; where counts are too thin, how many validation rows count."""
        length = history_of(case, match).length
        truth = counted(case, match, task, train)
        if truth.totals.sum(1).max(initial=0) < self.rows:  # then no row can count: nothing needs to be scored
            return 0
        probe = Probe(
            truth, rows=self.rows, support=self.support, unsupported=length // 2, at=max(1, min(20, length // 2)),
            replicates=300, seed=case.seed,
        )  # fmt: skip
        found: dict[str, Any] = dict(probe(case.model, case.schema, valid).values)
        if found["rows"] < self.least or found["learned_ndcg"][1] is None:
            return int(found["rows"])
        return self._of(case, match, task, found)

    def _of(self, case: Case, match: Match, task: str, found: dict[str, Any]) -> Diagnosis:
        history, field, _ = match
        ndcg = {order: found[f"{order}_ndcg"] for order in ("learned", "newest", "random")}
        best = max(("newest", "random"), key=lambda order: ndcg[order][0])
        ahead, least, most = found[f"learned_minus_{best}"]
        said = {"newest": "newest first", "random": "a random order"}
        values, low, high = zip(*ndcg.values(), strict=True)
        bars = Bars(
            f"How well events of {history} are ordered for {task}", f"NDCG@{found['at']} (1: the counted order)",
            ("attention", *said.values()), values, low, high, x="order",
            note=f"{found['rows']:,} validation rows of {found['users']:,} users.",
        )  # fmt: skip
        return Diagnosis(
            "retrieval", f"{history}.{field} on {task}", -ahead, self.usual, self.severe,
            f"By what its `{field}` says about `{task}`, attention orders the events of `{history}` with NDCG@{found['at']} "
            f"{ndcg['learned'][0]:.3f}, where {said[best]} has {ndcg[best][0]:.3f}"
            + (": an order that needs no model is better" if -most > self.usual else ""),
            "NDCG below a trivial order", -most, -least, remedies=remedies(case, match, task), paper=PAPER, page=PAGE,
            evidence={"plots": (bars,), "rows": found["rows"], "left_out": found["left_out"]},
        )  # fmt: skip


def remedies(case: Case, match: Match, task: str) -> tuple[Remedy, ...]:
    """Attention tables of their own, and the events' position, as far as the run has them not yet."""
    run, (history, field, _), measure = case.run, match, Measure(task, "auc")
    found = []
    if run.model.history_of.get(history, run.model.history).kind != DARE.kind:
        choice = DARE()
        found.append(
            Remedy(
                choice.kind, "Tables of their own for attention, so that the order of events is not tied to what they say.",
                "model.history",
                replace(run, name=f"{run.name}_{choice.kind}", model=replace(run.model, history=choice, history_of={})),
                measure=measure, page=f"methods/{choice.kind}.md",
            )
        )  # fmt: skip
    if POSITION not in history_of(case, match).fields:
        placed = tuple(
            replace(each, fields=(*each.fields, POSITION)) if each.name == history else each
            for each in run.data.histories
        )
        found.append(
            Remedy(
                "position",
                f"The position of each event of `{history}`, so that attention can tell a new `{field}` from an old one.",
                "data.histories", replace(run, name=f"{run.name}_position", data=replace(run.data, histories=placed)),
                measure=measure, page="analyses.md",
            )
        )  # fmt: skip
    return tuple(found)


# --------------------------------------------------------------------------------------------------- what can be compared
def matches(case: Case) -> list[Match]:
    """Histories, event fields and features of one vocabulary."""
    schema = case.schema
    return [
        (history.name, field, feature.name)
        for history in schema.histories
        for field in history.fields
        for feature in schema.features
        if feature.kind == "id" and feature.vocab == schema.field_vocabulary(field)
    ]


def scored(case: Case) -> list[Match]:
    """Those of `matches` whose history's encoder has scores that are sums over event fields."""
    encoders: Any = getattr(case.model, "histories", {})
    able = {key.rpartition("/")[2] for key, module in encoders.items() if hasattr(module, "scores")}
    return [match for match in matches(case) if match[0] in able]


def history_of(case: Case, match: Match) -> History:
    """The history of a match."""
    return next(history for history in case.schema.histories if history.name == match[0])


def counted(case: Case, match: Match, task: str, batches: Sequence[Batch]) -> Truth:
    """What batches of training rows say about a task by the row's own value, the event's, and its position."""
    history, field, feature = match
    return Correlation(task, history, field, feature).count(case.schema, batches)


# ------------------------------------------------------------------------------------------------------------- the maps
@dataclass(frozen=True)
class Grids:
    """Counted and learned relevance of events with the row's own value, and of others.

    Args:
        rows: names: the row's own values, those with most training rows first, and at the end *others*.
        positions: (P,) 1 is the newest event, up to the last with enough rows.
        bits, learned: (rows, P), NaN where a cell has too few rows.
        spearman: the rank correlation of both within an own value, the mean over own values; None where none has any.
        cells: how many were compared.
    """

    rows: tuple[str, ...]
    positions: Array
    bits: Array
    learned: Array
    spearman: float | None
    cells: int


def grids(case: Case, truth: Truth, least: int = LEAST) -> Grids | None:
    """The maps of a count; None if no cell of any own value has ``least`` rows of both labels.

    Scores of rows with different own values have nothing in common, so both the softmax (of all cells of an own value, 1 being
    their mean) and the rank correlation are within one.  *Others* is the mean over all cells of other values.
    """
    positions = np.arange(1, min(NEWEST, truth.positions) + 1)
    fields = score_fields(case.schema, truth, None)
    known = case.bundle.fitted.vocabularies[case.schema.field_vocabulary(truth.field)]
    rows, own, others, correlations, cells = list[str](), [], [], [], 0
    for a in map(int, truth.targets[:TARGETS]):
        near = truth.behaviours(a, NEWEST)[0]
        values = np.array([a, *near[near != a][:OTHERS]])
        supported = np.minimum(*truth.support(a, values[:, None], positions[None])) >= least
        if not supported.any():
            continue
        scores = score_grid(case.model, case.schema, truth, a, values, positions, fields)
        weight = np.exp(scores - scores.max())
        both = np.stack([truth.grid(a, values, positions), weight / weight.mean()])
        cells += int(supported.sum())
        correlations.append(ranked_alike(*both[:, supported]))
        both = np.where(supported, both, np.nan)
        others.append(both[:, 1:])
        if supported[0].any():
            rows.append(shortened(known.name(a)))
            own.append(both[:, 0])
    if not others:
        return None
    rest = np.concatenate(others, 1)
    there = np.isfinite(rest)
    mean = np.where(there.any(1), np.where(there, rest, 0).sum(1) / np.maximum(there.sum(1), 1), np.nan)
    both = np.stack([*own, mean], 1)
    some = np.flatnonzero(np.isfinite(both).any((0, 1))).max(initial=0) + 1
    bits, learned = both[..., :some]
    found = [each for each in correlations if each is not None]
    return Grids(
        (*unlike(rows), "(others)"), positions[:some], bits, learned, float(np.mean(found)) if found else None, cells
    )


def ranked_alike(one: Array, other: Array) -> float | None:
    """Spearman's rank correlation; None of fewer than three values, or where one side has but one."""
    if len(one) < 3 or not np.ptp(one) > 0 or not np.ptp(other) > 0:
        return None
    return float(spearmanr(one, other).statistic)


def unlike(names: Sequence[str]) -> list[str]:
    """Names that were cut short to the same, told apart by a number."""
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def heats(truth: Truth, found: Grids) -> tuple[Heat, Heat]:
    """The two maps side by side: what is counted, and what is learned."""
    alike = (
        "cannot be compared" if found.spearman is None else f"rank alike to {found.spearman:.2f} (1: the same order)"
    )
    about = f"{truth.history}.{truth.field} on {truth.task}"
    columns = tuple(map(str, found.positions))
    x, y = "position (1: the newest)", truth.field
    note = f"Empty: fewer than {LEAST} rows of a label. Both maps {alike} over {found.cells:,} cells of own and other values."
    counted_, learned = (tuple(map(tuple, grid)) for grid in (found.bits, found.learned))
    return (
        Heat(
            f"Counted: {about}", x, y, "mutual information (bits)", found.rows, columns, counted_, centre=0, note=note
        ),
        Heat(
            f"Learned: {about}",
            x,
            y,
            "attention (1: the mean)",
            found.rows,
            columns,
            learned,
            scale="diverging",
            centre=1,
        ),
    )
