"""What the command line shows while a job runs: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console as Rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from unbraid.train import Watcher


class Console(Watcher):
    """Prints to standard error, so that standard output holds results only."""

    def __init__(self, quiet: bool = False) -> None:
        self.rich = Rich(stderr=True, quiet=quiet, highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.rich, transient=True, disable=quiet or not self.rich.is_terminal)
        self.now: TaskID | None = None
        self.what, self.told = "", 0.0

    def __enter__(self) -> Console:
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def _show(self, what: str, done: int, total: int, text: str = "") -> None:
        if what != self.what:
            if self.now is not None:
                self.bar.remove_task(self.now)
            self.now, self.what = self.bar.add_task(what, total=total or None, text=text), what
            if not self.rich.is_terminal:
                self.rich.print(what, soft_wrap=True)
        assert self.now is not None
        self.bar.update(self.now, completed=done, total=total or None, text=text)

    def stage(self, what: str, done: int, total: int) -> None:
        """Show a piece of work."""
        self._show(what, done, total)

    def step(self, done: int, total: int, rows_per_second: float, losses: Mapping[str, float]) -> None:
        """Show the training's place, speed and losses."""
        text = f"{rows_per_second:,.0f} rows/s  " + "  ".join(f"{k} {v:.4f}" for k, v in list(losses.items())[:4])
        self._show("training", done, total, text)
        if not self.rich.is_terminal and (time.monotonic() - self.told > 10 or done == total):
            self.told = time.monotonic()
            self.rich.print(f"  step {done:,}/{total:,}  {text}", soft_wrap=True)

    def evaluated(self, step: int, metric: str, value: float | None, best: bool, values: Mapping[str, Any]) -> None:
        """Print the validation metric."""
        name = metric.rpartition(".")[2]
        each = "  ".join(
            f"{task} {found[name]['value']:.4f}"
            for task, found in values.items()
            if found.get(name, {}).get("value") is not None
        )
        shown = "none" if value is None else f"{value:.4f}"
        self.rich.print(
            f"  step {step:,}  validation {metric} {shown}{' (best)' if best else ''}   {each}", soft_wrap=True
        )

    def note(self, text: str) -> None:
        """Print a line."""
        self.rich.print(text, soft_wrap=True)
