"""More forward passes for an update: what they read, and that they leave no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toylog import make_data, make_log, make_run

from unbraid.bundle import build
from unbraid.config import DIN, ModelChoice, Run
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.optim.joint import Joint, JointUpdate
from unbraid.preflight import bound_terms
from unbraid.slots import Course
from unbraid.train import Local
from unbraid.types import Losses, Output


class Looks(JointUpdate):
    """The joint update, which asks for more passes before each step."""

    course: Course
    seen: list[dict[str, Any]]

    def __call__(self, losses: Losses, output: Output) -> None:
        rehearse = self.course.rehearse
        assert rehearse is not None
        once, twice, valid = rehearse.again(), rehearse.again(), rehearse.valid(self.step)
        self.seen.append({
            "again": {k: float(v.detach()) for k, v in once[0].items()},
            "twice": {k: float(v.detach()) for k, v in twice[0].items()},
            "valid": {k: float(v.detach()) for k, v in valid[0].items()},
            "losses": {k: float(v.detach()) for k, v in losses.items()},
            "course": self.course,
        })  # fmt: skip
        super().__call__(losses, output)


@dataclasses.dataclass(frozen=True)
class Looking(Joint):
    """Config of `Looks`."""

    seen: list = dataclasses.field(default_factory=list)

    def build(
        self, model: nn.Module, *, steps: int, weights: Mapping[str, float], objectives: Collection[str] | None = None,
        course: Course | None = None,
    ) -> Looks:  # fmt: skip
        update = Looks(self, model, steps, weights, objectives)
        assert course is not None
        update.course, update.seen = course, self.seen
        return update


def session(update: Any, cache: Path, unknown_rate: float = 0.2) -> tuple[Run, Local, Any]:
    tables = Views(width=4, lazy_rows=0, unknown_rate=unknown_rate)  # random ids, and Dice has buffers
    run = make_run(update=update, model=ModelChoice(history=DIN(), tables=tables), data=make_data(cache=str(cache)))
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, batch_size=64, evaluate_every=100))
    encoded = Encoded(encode(run.data, tables={"log": make_log()}))
    model = build(run, encoded.schema)
    terms = bound_terms(run, encoded.schema, model)
    return run, Local(encoded, terms, run.update, run.training, {}, run.seed), model


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_passes_leave_parameters_buffers_and_random_numbers_alone(decay: float, tmp_path: Path) -> None:
    """Bit for bit; where rows of lazy tables owe decay, an extra read pays it in two parts, which rounds otherwise."""
    states = []
    for kind in (Looking, Joint):
        _, local, model = session(kind(weight_decay=0.1, table_weight_decay=decay), tmp_path)
        assert any(True for _ in model.buffers())
        local.fit(model, 8)
        states.append({**model.state_dict(), "random": torch.rand(1)})
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        close = {"rtol": 0, "atol": 1e-6 if decay else 0}
        torch.testing.assert_close(value, states[1][name], **close, msg=lambda text, name=name: f"{name}: {text}")


def test_what_they_read(tmp_path: Path) -> None:
    """The current batch with the same draws twice; validation batches that are a function of seed and step."""
    seen = []
    for _ in range(2):
        update = Looking()
        _, local, model = session(update, tmp_path)
        local.fit(model, 5)
        seen.append(update.seen)
    for one, other in zip(*seen, strict=True):
        assert one["again"] == one["twice"] != one["losses"]
        assert one["valid"] == other["valid"]
    assert len({tuple(step["valid"].values()) for step in seen[0]}) == 5
    update = Looking()
    _, local, model = session(update, tmp_path, unknown_rate=0.0)
    local.fit(model, 3)
    assert all(step["again"] == step["losses"] for step in update.seen), "without draws it is the batch's own loss"
    course = update.seen[0]["course"]
    assert course.per_epoch == len(local.rows("train")) // 64 and set(course.targets) <= {"click", "buy"}


def test_without_validation_rows_an_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Looking()
    _, local, model = session(update, tmp_path)
    local.rows("train")
    local._cache["valid"] = local.rows("train")[:0]
    with pytest.raises(ValueError, match="learns weights on the validation split, which has no rows"):
        local.fit(model, 3)
