"""The table ``[training]`` of a run file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from unbraid.data.mix import Mix
from unbraid.data.table import steps_per_epoch
from unbraid.types import FORBID


@dataclass(frozen=True)
class Training:
    """How long, how fast, and when to look.

    Args:
        batch_size: rows per step; epochs: passes over the training rows; steps: instead of epochs, when above 0.
        evaluate_every: steps between evaluations on the validation split; 0 is once per epoch.
        metric: what early stopping and the kept weights go by, without a ``selection``: a metric averaged over target tasks
            (``auc``, ``logloss``, ``rmse`` ...), or ``TASK.metric``.
        patience: stop after so many evaluations without a better value; the best weights are kept.  0: train to the end
            and keep the last weights.
        checkpoint_seconds, checkpoint_steps: write a checkpoint so often (0: not by that measure).
        mix: rows with and without labels in fixed numbers per batch (`unbraid.data.mix.Mix`); ``batch_size`` counts those with
            a label, and an epoch is one pass over these.  None: all training rows as they come.
        device: where to train; ``auto`` is CUDA when there is one.
        threads: of torch on the CPU; 0 leaves its own choice.  Small models gain little from a second thread, and on a
            machine whose cores are busy two threads can be ten times slower than one.
        precision: what backbones, interactions and the tower compute in while they train (`unbraid.train.dense`); weights,
            losses, updates and all evaluation are float32 in any case.
        compile: compile interactions of fields with ``torch.compile``; needs a compiler (docs/run-file.md).
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    batch_size: int = 4096
    epochs: float = 1.0
    steps: int = 0
    evaluate_every: int = 0
    metric: str = "auc"
    patience: int = 0
    checkpoint_seconds: float = 60.0
    checkpoint_steps: int = 0
    mix: Mix | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Parameter `{name}` should be positive. Found {getattr(self, name)}.")
        for name in ("steps", "evaluate_every", "patience", "checkpoint_seconds", "checkpoint_steps", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"Parameter `{name}` should not be negative. Found {getattr(self, name)}.")

    def total_steps(self, rows: int) -> int:
        """Training steps for so many training rows."""
        return self.steps or max(1, round(self.epochs * steps_per_epoch(rows, self.batch_size)))
