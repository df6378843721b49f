"""How far could a head that is right on the rows with a label be wrong on the others?

Paper: "Debiased Self-Training for Semi-Supervised Learning", Chen, Jiang, Wang, Wan, Wang, Long, NeurIPS 2022,
https://arxiv.org/abs/2202.07136.

Idea.  Keep features and main head as they are, and train a fresh head to agree with the main one on rows with a label and to
disagree on the rows without.  If it can do both, labels say little about the others: the main head itself may be such a head.
It is the worst head of DST's loss (`unbraid.losses.dst`) turned into a measurement, for models of any training.

Equations.  With f the features that the main head reads, yhat its answers, w the fresh head, an MLP::

    w minimises   eta' mean_l CE(w(f_l), yhat_l) + mean_u -log min(1 - softmax(w(f_u))[yhat_u] + 1e-6, 1)
    by Adam, all rows at once
    agreement = share of rows with a label where argmax w = yhat        disagreement = share of rows without where it is not

How this differs.  The paper has no such probe.  Its figures depend on the head's size, the steps and the step size: compare
models at the same settings.  Training goes on after ``steps`` until agreement is complete, at most ten times as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbraid.analysis.plots import INK, at_rest, device_of, figure, finish
from unbraid.layers import initialise, mlp, mlp_width, require_positive
from unbraid.losses.dst import shunned
from unbraid.losses.self_training import hidden_rows, known_rows, over_classes
from unbraid.types import Batch, Finding, Schema

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class WorstHead:
    """The worst head of a trained model.  Call it with batches of *training* rows, with and without labels.

    Args:
        task: binary or multiclass.
        hidden: widths of the head's hidden layers; steps: of Adam; lr: its step size; eta_prime: weight of agreement.
        seed: draws the head.
    """

    task: str
    hidden: tuple[int, ...] = (64,)
    steps: int = 300
    lr: float = 1e-3
    eta_prime: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(hidden=self.hidden, steps=self.steps)
        for name in ("lr", "eta_prime"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Parameter `{name}` should be positive. Found {getattr(self, name)}.")

    def __call__(self, model: nn.Module, schema: Schema, batches: Iterable[Batch]) -> Finding:
        """The finding; the model is not changed.

        ``values``: ``agreement`` on rows with a label and ``disagreement`` on the others, shares in [0, 1]; ``by_class``
        (K,), the disagreement among rows that the main head gives to each class, NaN where there is none; ``known``,
        ``hidden``: rows of each; ``steps`` that were trained.

        Raises:
            ValueError: a real-valued task, or no row with a label, or none without.
        """
        if schema.task(self.task).kind == "real":
            raise ValueError(f"Task `{self.task}` should be binary or multiclass. Found real.")
        known, hidden = self._read(model, schema, batches)
        if not (len(known[1]) and len(hidden[1])):
            raise ValueError(
                f"The probe needs rows with and without a label of `{self.task}`. Found {len(known[1])} and {len(hidden[1])}."
            )
        classes = max(schema.outputs(schema.task(self.task)), 2)
        head, steps = self._train(known, hidden, classes)
        with torch.no_grad():
            agreement = (head(known[0]).argmax(1) == known[1]).double().mean().item()
            differs = (head(hidden[0]).argmax(1) != hidden[1]).cpu().numpy()
        answers = hidden[1].cpu().numpy()
        counts = np.bincount(answers, minlength=classes)
        with np.errstate(invalid="ignore"):
            by_class = np.bincount(answers, weights=differs, minlength=classes) / counts
        values = {"task": self.task, "agreement": agreement, "disagreement": float(differs.mean()), "by_class": by_class,
                  "known": len(known[1]), "hidden": len(differs), "steps": steps}  # fmt: skip
        return Finding(
            "worst head", values, unit="share of rows", reading=_reading(values),
            reference="Chen et al., NeurIPS 2022, arXiv 2202.07136: the worst-case hyperplane",
            remedy="Loss `dst` moves the features against such heads; more labels leave them less room.",
        )  # fmt: skip

    def _read(
        self, model: nn.Module, schema: Schema, batches: Iterable[Batch]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Features (n, H) and the main head's answers (n,), of rows with a label and without."""
        task, device = schema.task(self.task), device_of(model)
        parts: list[list[tuple[Tensor, Tensor]]] = [[], []]
        with at_rest(model):
            for batch in batches:
                moved = batch.to(device)
                output = model(moved)
                features, answers = output.hidden[self.task].float(), over_classes(output.logits[self.task]).argmax(1)
                for part, rows in zip(parts, (known_rows(task, moved), hidden_rows(task, moved)), strict=True):
                    part.append((features[rows], answers[rows]))
        if not parts[0]:
            raise ValueError("The probe needs batches of rows. Found none.")
        known, hidden = ([torch.cat(values) for values in zip(*part, strict=True)] for part in parts)
        return (known[0], known[1]), (hidden[0], hidden[1])

    def _train(
        self, known: tuple[Tensor, Tensor], hidden: tuple[Tensor, Tensor], classes: int
    ) -> tuple[nn.Module, int]:  # fmt: skip
        """The head, and its steps."""
        width = known[0].shape[1]
        with torch.random.fork_rng(devices=[]):  # drawn on the CPU: the same on every device
            torch.random.default_generator.manual_seed(self.seed)
            head = nn.Sequential(*mlp(width, self.hidden), nn.Linear(mlp_width(width, self.hidden), classes))
            head = initialise(head).to(known[0].device)  # type: ignore[assignment]
        adam = torch.optim.Adam(head.parameters(), self.lr)
        for step in range(10 * self.steps):
            logits = head(known[0])
            if step >= self.steps and bool((logits.argmax(1) == known[1]).all()):
                return head, step
            loss = self.eta_prime * F.cross_entropy(logits, known[1]) + shunned(head(hidden[0]), hidden[1]).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        return head, 10 * self.steps


def _reading(values: Mapping[str, Any]) -> str:
    whole = values["agreement"] == 1
    how = "agrees with the model on all" if whole else f"agrees with the model on only {values['agreement']:.1%} of the"
    return (
        f"A head that {how} {values['known']:,} rows with a label of `{values['task']}` can disagree on "
        f"{values['disagreement']:.1%} of the {values['hidden']:,} without ({values['steps']:,} steps)."
    )


def plot(finding: Finding, path: str | Path | None = None) -> Figure:
    """Disagreement by the class that the model gives, and over all."""
    values: Mapping[str, Any] = finding.values
    drawn, (axis,) = figure(6.4, 4.2)
    axis.bar(np.arange(len(values["by_class"])), values["by_class"], color=INK["blue"])
    axis.axhline(values["disagreement"], color=INK["orange"], linestyle="--", label="all rows")
    axis.set_xlabel(f"class of {values['task']} that the model gives")
    axis.set_ylabel("share that the worst head gives to another")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False)
    drawn.suptitle(
        f"Worst head: {values['disagreement']:.1%} of {values['hidden']:,} rows without a label", fontsize=11
    )
    return finish(drawn, path)
