"""Online learning: the log as a stream, each period first predicted and then trained on.

Our design.  That ads models go on learning from the stream of impressions, and that conversions are reported late, is the
setting of Pan et al., *Ads Recommendation in a Collapsed and Entangled World* (KDD 2024, https://arxiv.org/abs/2403.00793),
from memory; how the stream is trained there was not read, and nothing below is taken from there.  Test-then-train is the
usual way to judge learners of streams (Gama, Sebastiao, Rodrigues: *On evaluating stream learning algorithms*, Machine
Learning 90, 2013, https://doi.org/10.1007/s10994-012-5320-9, where it is called prequential).

Time is cut into periods of equal length.  With t the time of a row, d the waiting window, w the length of a period::

    scored in   s(t) = floor(t / w)
    trained at the beginning of   r(t) = max(s(t) + 1, ceil((t + d) / w), s0 + first)        s0: the first row's period

so a label is read only in a period that begins when it is known, and never before its row has been predicted.  Rows with
r(t) beyond the end of the stream are not trained on.  Weights and the optimiser's state go on from one period to the next,
and no row is read again once it was trained on.  A *frozen* copy of the model that the first periods gave is scored beside
it: where the live model moves away from it, the data have moved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from torch import nn

from unbraid.analysis.plots import INK, figure, finish
from unbraid.evaluate import evaluate
from unbraid.render import markdown
from unbraid.slots import Session
from unbraid.types import FORBID, Schema, Scores, State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BIBTEX = """
@article{gama2013evaluating,
  title   = {On Evaluating Stream Learning Algorithms},
  author  = {Gama, Jo{\\~a}o and Sebasti{\\~a}o, Raquel and Rodrigues, Pedro Pereira},
  journal = {Machine Learning},
  volume  = {90},
  pages   = {317--346},
  year    = {2013},
  doi     = {10.1007/s10994-012-5320-9},
}
"""

SECONDS = {"day": 86_400, "hour": 3_600}
METRICS = {  # kind of task -> metric of `evaluate` -> its name in the record
    "binary": {"auc": "auc", "logloss": "logloss", "calibration": "pcoc"},
    "multiclass": {"accuracy": "accuracy", "logloss": "logloss"},
    "real": {"rmse": "rmse"},
}
TITLES = {"auc": "AUC", "logloss": "log-loss", "pcoc": "PCOC", "accuracy": "accuracy", "rmse": "RMSE"}


@dataclass(frozen=True)
class Online:
    """Stream training and validation rows in the order of time: predict a period, then train on it.

    Args:
        period: ``day``, ``hour`` or a number of seconds.
        offset: hours by which local time is ahead of UTC; days and hours begin by local time.
        first: periods to train on before the stream begins, counted from the period of the first row; 0: none.
        first_epochs: passes over the rows of the first periods; epochs: over those of each later one.
        wait: seconds after a row until its labels are known.
        frozen: also score a copy of the model as the first periods left it.

    Raises:
        ValueError: a value is out of its range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    splits: ClassVar[tuple[str, ...]] = ("train", "valid")  # whose rows are trained on
    # keys of `training`
    unread: ClassVar[tuple[str, ...]] = ("epochs", "steps", "evaluate_every", "metric", "patience")
    budget: ClassVar[tuple[str, ...]] = ("epochs", "first_epochs")  # what counts instead
    kind: Literal["online"] = field(default="online", kw_only=True)
    period: str | int = "day"
    offset: float = 0.0
    first: int = 1
    first_epochs: int = 1
    epochs: int = 1
    wait: float = 0.0
    frozen: bool = True

    def __post_init__(self) -> None:
        length = SECONDS.get(self.period, 0) if isinstance(self.period, str) else self.period
        if length < 1:
            raise ValueError(
                f"`period` should be day, hour or a number of seconds of at least 1, such as 604800 for a week. "
                f"Found {self.period}."
            )
        for name, low in (("first", 0), ("first_epochs", 1), ("epochs", 1), ("wait", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"Parameter `{name}` should be finite and at least {low}. Found {getattr(self, name)}."
                )
        if not -24 < self.offset < 24:
            raise ValueError(f"`offset` should be hours between -24 and 24. Found {self.offset}.")

    @property
    def seconds(self) -> int:
        """Length of a period."""
        return SECONDS[self.period] if isinstance(self.period, str) else self.period

    def __call__(self, session: Session, model: nn.Module, steps: int) -> nn.Module:
        """Stream all rows of the session; ``steps`` is not read, since the rows say how many there are.

        Raises:
            ValueError: the log has no time, no row is left after the first periods, or no label is known by then.
        """
        rows = session.rows("train+valid")
        plan = self.plan(*session.times(rows))
        stream = _Stream(self, session, plan, rows, model)
        for period in plan.periods():
            if period > stream.last:
                stream.go(period)
        session.keep(stream.record())
        return stream.model

    def plan(self, times: np.ndarray, per_second: float) -> Plan:
        """When each row is scored and trained.

        Args:
            times: (n,) int64 since 1970 in UTC; per_second: how many of their units make a second.
        """
        width = round(self.seconds * per_second)
        local = times + round(self.offset * 3600 * per_second)
        scored = local // width
        start = int(scored.min()) + self.first if len(times) else 0
        known = -((-local - math.ceil(self.wait * per_second)) // width)
        trained = np.maximum(np.maximum(known, scored + 1), start)
        end = int(scored.max()) + 1 if len(times) else 0
        if end <= start:
            what = f"all {len(times):,} training and validation rows lie in the first {self.first}"
            raise ValueError(f"Nothing is left to stream: {what} periods of {self.seconds:,} s.")
        if self.first and not (trained == start).any():
            raise ValueError(
                f"No label is known when the stream begins: `wait` is {self.wait:g} s and `first` is {self.first} "
                f"periods of {self.seconds:,} s. Raise `first`."
            )
        return Plan(scored, trained, start, end)

    def label(self, period: int) -> str:
        """When a period begins, by local time: 2022-04-25, or 2022-04-25T13:00:00."""
        text = str(np.datetime64(period * self.seconds, "s"))
        return text.partition("T")[0] if self.seconds % SECONDS["day"] == 0 else text

    def report(self, record: Mapping[str, Any]) -> str:
        """The record as Markdown: what was done, and one table per task."""
        predicted = sum(period["rows"] for period in record["periods"])
        lines = ["", f"Online: {len(record['periods'])} periods. Rows predicted: {predicted:,}. Rows trained on: "
                     f"{record['first']:,} of the first periods, {record['trained'] - record['first']:,} of those predicted. "
                     f"Rows that still wait for their labels: {record['waiting']:,}. Scoring took "
                     + f"{record['seconds']['live']:.1f} s"
                     + (f", the frozen model {record['seconds']['frozen']:.1f} s more" if self.frozen else "") + "."]  # fmt: skip
        for task in record["periods"][0]["live"]:
            lines += [
                "",
                f"Task {task}:" if self.frozen else f"Task {task}, no frozen model:",
                "",
                _table(record, task),
            ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """Periods are numbered from 1970.

    Attributes:
        scored: (n,) the period in which each row lies; trained: (n,) at whose beginning it is trained on.
        start: the first period that is scored; end: the period after the last.
    """

    scored: np.ndarray
    trained: np.ndarray
    start: int
    end: int

    def periods(self) -> list[int]:
        """Those in which something happens, ascending."""
        scored = self.scored[self.scored >= self.start]
        trained = self.trained[self.trained <= self.end]
        return [int(p) for p in np.unique(np.concatenate([scored, trained, [self.start]]))]


class _Stream:
    """One stream: the models, the state that goes on, and the record."""

    def __init__(self, config: Online, session: Session, plan: Plan, rows: np.ndarray, model: nn.Module) -> None:
        self.config, self.session, self.plan, self.model = config, session, plan, model
        # a copy from before any training: a trained model may still hold its optimiser
        self.frozen = session.fork(model, {})[0] if config.frozen else None
        self.ready, self.shown = _groups(plan.trained, rows), _groups(plan.scored, rows)
        self.total = sum(self._steps(p) for p in self.ready if p <= plan.end)
        self.last, self.trained = plan.start - 1, 0
        self.update: State | None = None
        self.seconds = {"live": 0.0, "frozen": 0.0}
        self.lines: list[dict[str, Any]] = []
        self._restore()

    def _steps(self, period: int) -> int:
        config = self.config
        passes = config.first_epochs if config.first and period == self.plan.start else config.epochs
        return self.session.steps_of(len(self.ready[period]), passes)

    def go(self, period: int) -> None:
        """Train on what is known when the period begins, then score its rows."""
        if period in self.ready:
            rows = self.ready[period]
            self.model, self.update = self.session.fit(
                self.model, self._steps(period), rows=rows, update_state=self.update, total=self.total, stream=True
            )
            self.trained += len(rows)
        if self.frozen is not None and period == self.plan.start:
            self.frozen.load_state_dict(self.model.state_dict())
        if period in self.shown:
            self.lines.append(self._line(period))
        self.last = period
        self._checkpoint()

    def _line(self, period: int) -> dict[str, Any]:
        rows, begun = self.shown[period], self.plan.scored < period
        line = {"begin": self.config.label(period), "rows": len(rows), "trained": self.trained}
        line |= {"waiting": int(begun.sum()) - self.trained, "live": self._score("live", self.model, rows)}
        if self.frozen is not None:
            line["frozen"] = self._score("frozen", self.frozen, rows)
        return line

    def _score(self, who: str, model: nn.Module, rows: np.ndarray) -> dict[str, Any]:
        began = time.monotonic()
        found = judge(self.session.score(model, "train+valid", rows), self.session.schema)
        self.seconds[who] += time.monotonic() - began
        return found

    def record(self) -> dict[str, Any]:
        """What ``metrics.json`` holds under ``schedule``."""
        waiting = len(self.plan.trained) - self.trained
        first = int(((self.plan.scored < self.plan.start) & (self.plan.trained <= self.plan.end)).sum())
        found = {"kind": self.config.kind, "periods": self.lines, "first": first, "trained": self.trained}
        return found | {"waiting": waiting, "seconds": self.seconds}

    # ------------------------------------------------------------------------------------------------------ resumption
    def _checkpoint(self) -> None:
        state: State = {"last": self.last, "trained": self.trained, "seconds": self.seconds, "lines": self.lines}
        state |= {"model": self.model.state_dict(), "update": self.update}
        state["frozen"] = None if self.frozen is None else self.frozen.state_dict()
        self.session.checkpoint("online", state, done=True)

    def _restore(self) -> None:
        state = self.session.restore("online")
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        if self.frozen is not None:
            self.frozen.load_state_dict(state["frozen"])
        self.last, self.update, self.trained = state["last"], state["update"], state["trained"]
        self.seconds, self.lines = state["seconds"], state["lines"]


def _groups(keys: np.ndarray, rows: np.ndarray) -> dict[int, np.ndarray]:
    """Key -> the rows that have it, in their order."""
    order = np.argsort(keys, kind="stable")
    values, begins = np.unique(keys[order], return_index=True)
    return dict(zip(map(int, values), np.split(rows[order], begins[1:]), strict=True))


def judge(scores: Scores, schema: Schema) -> dict[str, Any]:
    """Task -> rows, positives, its metrics, and ``why`` where they are None (as `unbraid.evaluate.evaluate` says)."""
    judged = {}
    for name, found in evaluate(scores, schema, replicates=0).items():
        wanted = METRICS[schema.task(name).kind]
        judged[name] = {"rows": found["rows"], "positives": found["positives"]}
        judged[name] |= {ours: found[theirs]["value"] for theirs, ours in wanted.items()}
        why = [found[theirs]["why"] for theirs in wanted if found[theirs]["value"] is None]
        judged[name] |= {"why": why[0]} if why else {}
    return judged


# ------------------------------------------------------------------------------------------------------------- the record
def _sides(record: Mapping[str, Any]) -> list[str]:
    return [side for side in ("live", "frozen") if side in record["periods"][0]]


def _table(record: Mapping[str, Any], task: str) -> str:
    """One line per period: rows, positives, each metric of the live and of the frozen model."""
    sides = _sides(record)
    names = [name for name in TITLES if name in record["periods"][0]["live"][task]]
    titles = ["period", "rows", "positives", *(f"{TITLES[n]}, {side}" for n in names for side in sides)]
    lines = [[p["begin"], *(_cell(p["live"][task][n]) for n in ("rows", "positives")),
              *(_cell(p[side][task][n]) for n in names for side in sides)] for p in record["periods"]]  # fmt: skip
    return markdown(titles, lines, left=1).rstrip("\n")


def _cell(value: float | int | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def plot(record: Mapping[str, Any], task: str, path: str | Path | None = None) -> Figure:
    """AUC and PCOC of a binary task by period, live against frozen; a period without a value is a gap.

    Args:
        record: ``metrics.json``'s ``schedule``; path: where to write it, if anywhere.

    Raises:
        ValueError: the record is of another schedule; no such task, or no binary one; ImportError: there is no matplotlib.
    """
    if not record.get("periods"):
        raise ValueError(
            "A plot over time needs the record of a run with schedule `online`: `schedule` of its metrics.json. Found "
            f"{f'that of schedule `{kind}`' if (kind := record.get('kind')) else 'no periods in it'}."
        )
    possible = [name for name, found in record["periods"][0]["live"].items() if "auc" in found]
    if task not in possible:
        raise ValueError(f"`task` should be a binary task, among {possible}. Found {task}.")
    drawn, axes = figure(11, 3.6, panels=2)
    ticks = np.arange(len(record["periods"]))
    for axis, metric in zip(axes, ("auc", "pcoc"), strict=True):
        for side, colour in zip(_sides(record), (INK["blue"], INK["orange"]), strict=False):
            values = [period[side][task][metric] for period in record["periods"]]
            axis.plot(ticks, [math.nan if v is None else v for v in values], "o-", color=colour, ms=3, label=side)
        if not any(p[s][task][metric] is not None for p in record["periods"] for s in _sides(record)):
            why = record["periods"][0]["live"][task].get("why", "no period has a value")
            axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", va="center", wrap=True, color=INK["grey"])
        if metric == "pcoc":
            axis.axhline(1.0, color=INK["grey"], lw=0.8)
        shown = ticks[:: math.ceil(len(ticks) / 8)]
        axis.set_xticks(shown, [record["periods"][i]["begin"] for i in shown], rotation=30, ha="right", fontsize=8)
        axis.set_title(f"{TITLES[metric]}, {task}")
        axis.set_xlabel("beginning of the period")
        axis.set_ylabel("AUC" if metric == "auc" else "sum of predictions / sum of labels")
        axis.legend(frameon=False)
    return finish(drawn, path)
