"""The calibrators of a bundle: which task and domain each is for, and the scores after them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from unbraid.calibration.maps import Calibration
from unbraid.types import Scores, State

Array = np.ndarray


@dataclass(frozen=True)
class Kept:
    """One calibrator of a bundle.

    Args:
        task, domain: what it is for; an empty domain: all rows of the task for which there is none of their own domain.
        method: its configuration, ``kind`` included; source, target: which rows it was fitted on, in words.
    """

    task: str
    domain: str
    method: Mapping[str, Any]
    source: str
    target: str
    calibration: Calibration


@dataclass(frozen=True)
class Calibrators:
    """All calibrators of a bundle, at most one per task and domain.

    Args:
        digest: of the weights that they belong to; kept: in any order.
    """

    digest: str
    kept: tuple[Kept, ...] = ()

    def with_one(self, new: Kept) -> Calibrators:
        """With a calibrator in the place of that of its task and domain."""
        rest = tuple(one for one in self.kept if (one.task, one.domain) != (new.task, new.domain))
        return dataclasses.replace(self, kept=(*rest, new))

    def without(self, tasks: tuple[str, ...] = (), domain: str | None = None) -> Calibrators:
        """Without those of these tasks (empty: of all) and this domain (None: of all)."""
        stay = tuple(
            one
            for one in self.kept
            if (tasks and one.task not in tasks) or (domain is not None and one.domain != domain)
        )
        return dataclasses.replace(self, kept=stay)

    def logits(self, task: str, logits: Array, domain: Array, names: tuple[str, ...]) -> Array:
        """Calibrated logits of one task's rows with domain codes (N,) into ``names``; unchanged where none is for them."""
        found = logits
        for one in sorted((one for one in self.kept if one.task == task), key=lambda one: bool(one.domain)):
            rows = np.full(len(logits), True) if not one.domain else domain == names.index(one.domain)
            found = np.array(found, np.float64)
            found[rows] = one.calibration(logits[rows])  # of the model's own logits, whatever stands there now
        return found

    def apply(self, scores: Scores) -> Scores:
        """The scores with calibrated logits."""
        changed = {
            name: self.logits(name, np.asarray(logits), np.asarray(scores.domain), scores.domains)
            for name, logits in scores.logits.items()
        }
        return dataclasses.replace(scores, logits=changed)

    def check(self, digest: str, domains: tuple[str, ...], tasks: tuple[str, ...]) -> None:
        """Raises ValueError when they belong to other weights, or name a task or domain that is not there."""
        again = "Make them again (`unbraid calibrate`), or remove them (`unbraid calibrate BUNDLE --remove`)."
        if digest != self.digest:
            raise ValueError(f"the calibrators belong to other weights than the model's. {again}")
        for one in self.kept:
            if one.task not in tasks or (one.domain and one.domain not in domains):
                where = f"task `{one.task}`, domain `{one.domain or 'all'}`"
                raise ValueError(f"a calibrator is for {where}, which is not there. {again}")

    def state_dict(self) -> State:
        """What `load` reads."""
        kept = [
            {**vars(one), "method": dict(one.method), "calibration": one.calibration.state_dict()} for one in self.kept
        ]
        return {"digest": self.digest, "kept": kept}

    @classmethod
    def load(cls, state: State) -> Calibrators:
        """From `state_dict`.  Raises ValueError when it is none."""
        try:
            kept = [Kept(**{**one, "calibration": Calibration.load(one["calibration"])}) for one in state["kept"]]
            return cls(state["digest"], tuple(kept))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"calibrators should be what `unbraid calibrate` wrote. Found another content: {error}"
            ) from error
