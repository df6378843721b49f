"""Who is told how a training goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Watcher:
    """Someone who is told what happens (the command line's progress bar).  This one says nothing."""

    def stage(self, what: str, done: int, total: int) -> None:
        """A piece of work outside training."""

    def step(self, done: int, total: int, rows_per_second: float, losses: Mapping[str, float]) -> None:
        """Some training steps are done."""

    def begins(self, call: int, before: int) -> None:
        """What follows is of this call of ``fit``; so many steps are those of calls before it."""

    def trained(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """A step of the call is done (not told of calls in processes of their own).  Reading a loss waits for the device."""

    def saving(self) -> None:
        """A checkpoint is about to be written."""

    def measured(self, metrics: Mapping[str, Any]) -> None:
        """The run is finished: what ``metrics.json`` holds."""

    def evaluated(self, step: int, metric: str, value: float | None, best: bool, values: Mapping[str, Any]) -> None:
        """The validation split was evaluated; ``best``: so far, and its weights are kept."""

    def note(self, text: str) -> None:
        """Anything else."""
