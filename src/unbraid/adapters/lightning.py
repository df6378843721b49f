"""Lightning's Trainer in the place of the package's own loop.

    data = UnbraidData(run, tables)
    module = UnbraidModule(run, data)
    Trainer(max_steps=module.steps).fit(module, datamodule=data)
    module.bundle().save(folder)

The same batches in the same order, the same losses and the same update give the same weights, bit for bit (on one device).
Lightning calls ``backward`` and one optimiser's ``step`` by itself; an `unbraid.slots.Update` does both in its own way (AdaTask
has a gradient per task, rows of lazy tables move apart from the layers).  So optimisation is *manual* in Lightning's word: its
one optimiser here is the update.  Whatever Lightning does to gradients between the two (``gradient_clip_val``,
``accumulate_grad_batches``, 16 bit precision) is refused, by Lightning or here: clipping is ``update.clip_norm``.

Needs ``pip install "unbraid[lightning]"``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbraid import config
from unbraid.bundle import EVALUATION_ROWS, Bundle
from unbraid.compat import declare_operators, optional
from unbraid.data.encode import encode
from unbraid.data.source import Tables
from unbraid.data.table import Encoded, steps_per_epoch
from unbraid.evaluate import evaluate
from unbraid.job import JobError, prepared
from unbraid.predictor import predictions
from unbraid.slots import Look
from unbraid.train import losses_of
from unbraid.train.checkpoints import random_state, set_random_state
from unbraid.train.dense import dense
from unbraid.train.scoring import join_scores, scores_of, selected
from unbraid.types import Batch, Losses, Output, Scores, State

declare_operators()  # Lightning's metrics import torchvision where there is one
optional("lightning.pytorch", "lightning", "unbraid.adapters.lightning")

from lightning.pytorch import LightningDataModule, LightningModule  # noqa: E402


class UnbraidData(LightningDataModule):
    """A run's encoded data as Lightning's dataloaders of `unbraid.types.Batch`.

    Args:
        run: what to read; tables: tables in memory by name, as of `unbraid.job.train`; base: the folder it is relative to.

    The training loader goes on where the Trainer is, in the middle of an epoch, too.  The others read their split in order.

    Raises:
        DataError: for anything in the data that contradicts the declaration.
    """

    def __init__(self, run: config.Run, tables: Tables | None = None, base: Path = Path()) -> None:
        super().__init__()
        self.old = Bundle.load(run.init, mapped=True) if run.init else None
        self.run = run
        self.encoded = Encoded(encode(run.data, base, tables=tables, grow=self.old.fitted if self.old else None))
        self.batches: Callable[[int], Iterator[Batch]] | None = None  # of training, from a step on: the module knows
        self.per_epoch = 0

    def train_dataloader(self) -> Steps:
        """Batches of an epoch.  Raises RuntimeError without an `UnbraidModule`, which says what they are made of."""
        if self.batches is None:
            raise RuntimeError("The training batches are those of an `UnbraidModule`: make one with this data module.")
        return Steps(self.batches, self.per_epoch, lambda: self.trainer.global_step if self.trainer else 0)

    def val_dataloader(self) -> InOrder:
        """Rows of the validation split in order."""
        return InOrder(self.encoded, self.encoded.split("valid"), 4 * self.run.training.batch_size)

    def test_dataloader(self) -> InOrder:
        """Rows of the test split in order."""
        return InOrder(self.encoded, self.encoded.split("test"), EVALUATION_ROWS)

    def predict_dataloader(self) -> InOrder:
        """Rows of the test split in order."""
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """See Lightning."""
        return batch.to(str(device))


class Steps:
    """The training batches of one epoch, from the step that ``at`` says: an epoch that was interrupted has the rest."""

    def __init__(self, batches: Callable[[int], Iterator[Batch]], per_epoch: int, at: Callable[[], int]) -> None:
        self.batches, self.per_epoch, self.at = batches, per_epoch, at

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[Batch]:
        start = self.at()
        given = self.batches(start)
        try:
            for _ in range(self.per_epoch - start % self.per_epoch):
                yield next(given)
        finally:
            given.close()  # type: ignore[attr-defined]  # stops the thread that makes them

    def state_dict(self) -> dict[str, int]:
        """Where it is, which tells Lightning that it can be resumed."""
        return {"step": self.at()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: it begins where the Trainer is, which the checkpoint has moved there."""


class InOrder:
    """Rows in batches of at most ``size``, first to last."""

    def __init__(self, encoded: Encoded, rows: np.ndarray, size: int) -> None:
        self.encoded, self.rows, self.size = encoded, rows, size

    def __len__(self) -> int:
        return -(-len(self.rows) // min(self.size, self.encoded.most))

    def __iter__(self) -> Iterator[Batch]:
        given = self.encoded.in_order(self.rows, self.size)
        try:
            yield from given
        finally:
            given.close()  # type: ignore[attr-defined]


class UpdateOptimizer:
    """An update as an optimiser of Lightning's: its step is the update's, its state goes into checkpoints."""

    def __init__(self, update: Any) -> None:
        self.update = update
        inner = getattr(update, "dense", None)
        self.param_groups: list[dict[str, Any]] = (
            [] if inner is None else inner.param_groups
        )  # for monitors of step sizes
        self.defaults: dict[str, Any] = {}
        self.state: dict[Any, Any] = {}

    def step(self, closure: Callable[[], Any]) -> Any:
        """Run the update, which the closure does."""
        return closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: the update clears what it fills."""

    def state_dict(self) -> State:
        """The update's."""
        return self.update.state_dict()

    def load_state_dict(self, state: State) -> None:
        """The update's."""
        self.update.load_state_dict(state)


class UnbraidModule(LightningModule):
    """A run's model, losses and update as a LightningModule.

    It logs ``train/OBJECTIVE`` at every step, ``valid/TASK/METRIC`` of every task at every validation, and the run's own metric
    as ``valid/METRIC``, for Lightning's EarlyStopping and ModelCheckpoint; ``test/TASK/METRIC`` in ``Trainer.test``.

    Args:
        run: of one stage, without patience and ``selection``: who stops and keeps the best here are Lightning's callbacks.
        data: its `UnbraidData`.

    Attributes:
        steps: of the run's own training, for ``Trainer(max_steps=...)``; step sizes go by the Trainer's length.

    Raises:
        JobError: the run does what Lightning's loop cannot; or as `unbraid.job.train`.
    """

    def __init__(self, run: config.Run, data: UnbraidData) -> None:
        super().__init__()
        self.automatic_optimization = False
        _require_one_stage(run)
        self.run, self.encoded = run, data.encoded
        self.model, self.session = prepared(run, data.encoded, "cpu", old=data.old)
        rows = self.session.rows("train")
        parts = self.session.parts(rows)
        self.steps = self.session.total_steps()
        data.per_epoch = steps_per_epoch(len(rows) if parts is None else parts.rows, run.training.batch_size)
        data.batches = self._batches
        self.call: Any = None
        self.kept: Mapping[str, Any] = {}  # of a checkpoint, until training starts
        self.parts: list[Scores] = []
        self.until = contextlib.ExitStack()  # of training: what `unbraid.train.dense` changes
        self.weights: dict[str, Tensor] | None = None  # while a mean of weights is looked at

    def _batches(self, start: int) -> Iterator[Batch]:
        return self.call._batches(start)

    # ---------------------------------------------------------------------------------------------------------- training
    def configure_optimizers(self) -> Any:
        """See Lightning.  Raises JobError for a Trainer of several processes or another precision."""
        trainer = self.trainer
        if trainer.world_size > 1:
            raise JobError(
                f"A Trainer of {trainer.world_size} processes would sum gradients in a way that updates do not know. Use one "
                "device, or train with `torchrun -m unbraid train` (docs/distributed.md)."
            )
        if trainer.precision != "32-true":
            raise JobError(
                f"The Trainer's precision should be 32-true. Found {trainer.precision}. Set `training.precision` of the run."
            )
        steps = trainer.estimated_stepping_batches
        steps = int(steps) if np.isfinite(steps) else self.steps
        self.session.device, self.session.calls = str(self.device), 0
        self.call = self.session.begin(self.model, steps, look=Look(every=-1))
        return UpdateOptimizer(self.call.update)

    def on_train_start(self) -> None:
        """Begin where a checkpoint ended, or with the run's seed."""
        self.call.remembered = self.kept.get("memories", [])
        self.terms = self.call.terms()
        if self.kept:
            if self.call.average is not None:
                self.call.average.load_state_dict(self.kept["average"])
            set_random_state(self.kept["rng"])
        else:
            torch.manual_seed(self.call.seed)
        self.until.enter_context(dense(self.model, self.run.training))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of the update."""
        step, call = self.global_step, self.call
        call.rehearse.terms, call.rehearse.now = self.terms, (batch, step)
        losses, output = losses_of(self.model, batch, self.terms, step)
        self._act(losses, output)
        for name, loss in losses.items():
            self.log(f"train/{name}", loss.detach(), batch_size=len(batch.whole))

    def _act(self, losses: Losses, output: Output) -> None:
        self.optimizers().step(lambda: self.call.step(losses, output))  # type: ignore[union-attr]

    def on_train_end(self) -> None:
        """Leave the weights that the run keeps: rows of lazy tables up to date, or the mean of the weights."""
        self._close()
        self.call.end()

    def on_exception(self, exception: BaseException) -> None:
        """Leave nothing running."""
        if self.call is not None:
            self._close()

    def _close(self) -> None:
        self.until.close()
        self.call.rehearse.close()

    # ------------------------------------------------------------------------------------------------------- checkpoints
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the training remembers beside weights and update."""
        call = self.call
        if call is not None:
            checkpoint["unbraid"] = {
                "rng": random_state(), "average": None if call.average is None else call.average.state_dict(),
                "memories": [term.state_dict() for term in call.memories],
            }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self.kept = checkpoint.get("unbraid", {})

    # --------------------------------------------------------------------------------------------------------- measuring
    def on_validation_start(self) -> None:
        """Bring lazily kept rows up to date, and put a mean of weights in their place where the run looks by it."""
        self.parts = []
        if self.call is not None:
            self.call.update.settle()
            self.weights = self.call._before_look() if self.global_step else None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Predict."""
        self.parts.append(scores_of(self.model, [batch], self.encoded.schema, device=str(self.device)))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        found = self._measured("valid")
        value, _ = selected(found, self.run.training.metric, self.encoded.schema)
        if value is not None:
            self.log(f"valid/{self.run.training.metric}", value)

    def on_validation_end(self) -> None:
        """Take the weights back."""
        if self.weights is not None:
            self.model.load_state_dict(self.weights)
            self.weights = None

    def on_test_start(self) -> None:
        """Nothing is measured yet."""
        self.parts = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Predict."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._measured("test")

    def _measured(self, split: str) -> dict[str, Any]:
        found = evaluate(join_scores(self.parts), self.encoded.schema, replicates=0)
        self.parts = []
        for task, metrics in found.items():
            for name, metric in metrics.items():
                if isinstance(metric, dict) and isinstance(metric.get("value"), float):
                    self.log(f"{split}/{task}/{name}", metric["value"])
        return found

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, np.ndarray]:
        """Task -> (B,) or (B, K) probabilities, or values of a real task."""
        scores = scores_of(self.model, [batch], self.encoded.schema, device=str(self.device))
        return predictions(scores.logits, self.encoded.schema)

    def bundle(self) -> Bundle:
        """The trained model as a bundle, to save and to predict with."""
        return Bundle(self.run, self.encoded.fitted, self.model.cpu().eval(), {})


def _require_one_stage(run: config.Run) -> None:
    if run.schedule.kind != "one_stage":
        raise JobError(
            f"Schedule `{run.schedule.kind}` has a loop of its own. Use `unbraid.job.train`, or `one_stage`."
        )
    if run.training.patience or run.selection is not None:
        what = "training.patience" if run.training.patience else "selection"
        raise JobError(f"`{what}`: Lightning's EarlyStopping and ModelCheckpoint stop and choose here. Leave it out.")
