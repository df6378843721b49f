"""The record of a training in rounds of branches and merges (``schedule`` of ``metrics.json``), as Markdown and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.analysis.plots import figure, finish
from unbraid.evaluate import lower_is_better
from unbraid.render import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def words(record: Mapping[str, Any]) -> str:
    """The record as Markdown: what was done and a line per round."""
    lines = record["rounds"]
    best = record["final"]
    text = (
        f"{len(record['branches'])} branches, {len(lines)} rounds of {record['interval']:,} steps, "
        f"{record['total_steps']:,} steps over all branches. Search: {record['search']}, {record['evaluations']:,} "
        f"evaluations of {record['rows']:,} validation rows, {record['seconds']:.1f} s. The model is that of step "
        f"{best['step']:,}: {record['metric']} {cell(best['value'])} there."
    )
    barriers = [line["step"] for line in lines if line.get("barrier", 0) > 0]
    if barriers:
        text += (
            f" After {len(barriers)} of the rounds some mixture was worse than both branches: they may have trained too long "
            "apart (fewer steps in a round, or a smaller step size)."
        )
    return f"{text}\n\n{_table(record)}"


def cell(value: float | None) -> str:
    """A metric in a line."""
    return "-" if value is None else f"{value:.4f}"


def _table(record: Mapping[str, Any]) -> str:
    """One line per round: the weights and the metric, of the merge and of the single branches, and the search's cost."""
    names = list(record["branches"])
    titles = ["step", *names, record["metric"], "best branch alone", "evaluations", "seconds"]
    lines = []
    for line in record["rounds"]:
        weights = [f"{line['weights'][name]:.3f}" if name in line["weights"] else "pruned" for name in names]
        alone = [value for value in line["branches"].values() if value is not None]
        best = (min if lower_is_better(record["metric"].rpartition(".")[2]) else max)(alone) if alone else None
        lines.append(
            [
                f"{line['step']:,}",
                *weights,
                cell(line["value"]),
                cell(best),
                str(line["evaluations"]),
                f"{line['seconds']:.1f}",
            ]
        )
    return markdown(titles, lines, left=1).rstrip("\n")


def plot(record: Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """The branches' weights by round, and the metric of the merge beside that of each branch alone.

    Args:
        record: ``metrics.json``'s ``schedule``; path: where to write it, if anywhere.

    Raises:
        ImportError: there is no matplotlib.
    """
    drawn, (left, right) = figure(11, 3.8, panels=2)
    steps = [line["step"] for line in record["rounds"]]
    for place, name in enumerate(record["branches"]):
        weights = [line["weights"].get(name, math.nan) for line in record["rounds"]]
        alone = [line["branches"].get(name) for line in record["rounds"]]
        left.plot(steps, weights, "o-", ms=3, color=f"C{place}", label=name)
        right.plot(steps, [math.nan if v is None else v for v in alone], "-", lw=0.9, color=f"C{place}", label=name)
    merged = [math.nan if line["value"] is None else line["value"] for line in record["rounds"]]
    right.plot(steps, merged, "ko-", ms=3, label="merged")
    right.axvline(record["final"]["step"], color="0.6", lw=0.8, ls=":", label="the final model's step")
    left.set_title("weight in the merge")
    left.set_ylabel("weight, of 1")
    right.set_title(f"{record['metric']}, validation")
    right.set_ylabel(record["metric"])
    for axis in (left, right):
        axis.set_xlabel("steps of each branch")
        axis.legend(frameon=False, fontsize=8)
    return finish(drawn, path)
