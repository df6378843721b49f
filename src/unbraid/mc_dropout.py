"""Dropout that stays on while the model predicts: the mean of several random networks instead of one network without it.

Paper: Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty in deep learning", ICML 2016
(https://arxiv.org/abs/1506.02142).

    p(x) = 1/N sum_n p(x; mask_n)         binary, multiclass: probabilities; real: values

Everything but dropout is as in evaluation: batch normalisation uses its running statistics.

How this differs: the mean alone is kept, no variance.  It is handed on as logits, ``log p / (1 - p)`` or ``log p``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from unbraid.types import Batch, Output, Schema

BIBTEX = """@inproceedings{gal2016dropout,
  title = {Dropout as a {B}ayesian Approximation: Representing Model Uncertainty in Deep Learning},
  author = {Gal, Yarin and Ghahramani, Zoubin},
  booktitle = {Proceedings of the 33rd International Conference on Machine Learning},
  year = {2016}
}
"""


class McDropout(nn.Module):
    """A model that predicts the mean of ``passes`` of its passes with dropout.  It has no hidden vectors.

    Args:
        model: with dropout; schema: what its tasks are; passes: N; seed: of the masks, which depend on the order of the
            batches, too.

    Raises:
        ValueError: the model has no dropout, or there are fewer than 2 passes.
    """

    def __init__(self, model: nn.Module, schema: Schema, passes: int, seed: int = 0) -> None:
        super().__init__()
        if passes < 2:
            raise ValueError(f"MC-dropout needs at least 2 passes, better 20 or more. Found {passes}.")
        if not any(_drops(part) for part in model.modules()):
            raise ValueError(
                "MC-dropout needs a model with dropout, and this one has none: set `dropout` of `model.tower` and train it again."
            )
        self.model, self.schema, self.passes, self.seed, self.batches = model, schema, passes, seed, 0
        self.eval()

    def train(self, mode: bool = True) -> McDropout:
        """Always evaluation but for dropout."""
        super().train(False)
        for part in self.model.modules():
            if _drops(part):
                part.train()
        return self

    @torch.no_grad()
    def forward(self, batch: Batch) -> Output:
        """The mean of the passes; the random state outside is left as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence([self.seed, self.batches]).generate_state(1)[0]))
            outputs = [self.model(batch) for _ in range(self.passes)]
        self.batches += 1
        logits = {name: self._mean(name, torch.stack([o.logits[name] for o in outputs])) for name in outputs[0].logits}
        return replace(outputs[0], logits=logits, hidden={}, extras={})

    def _mean(self, name: str, logits: Tensor) -> Tensor:
        """(passes, B) or (passes, B, K) -> (B,) or (B, K) logits of the mean prediction."""
        kind = self.schema.task(name).kind
        if kind == "real":
            return logits.mean(0)
        if kind == "multiclass":
            return _log_mean(torch.log_softmax(logits, -1))
        return _log_mean(nn.functional.logsigmoid(logits)) - _log_mean(nn.functional.logsigmoid(-logits))


def _drops(part: nn.Module) -> bool:
    return isinstance(part, _DropoutNd) and part.p > 0


def _log_mean(log_p: Tensor) -> Tensor:
    """log of the mean of exp over the first axis, in double precision."""
    return torch.logsumexp(log_p.double(), 0) - float(np.log(len(log_p)))
