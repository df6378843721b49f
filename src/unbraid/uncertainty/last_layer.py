"""How unsure a trained model is, from a Bayesian view of its last layer.

Papers: Laplace's approximation as in MacKay, "The evidence framework applied to classification networks", Neural Computation
1992 (https://doi.org/10.1162/neco.1992.4.5.720); of the last layer alone as in Kristiadi, Hein and Hennig, "Being Bayesian,
even just a bit, fixes overconfidence in ReLU networks", ICML 2020 (https://arxiv.org/abs/2002.10118).

A head is linear in its hidden vector: ``z = w . h~`` with ``h~ = (h, 1)``.  Everything below it is taken as given, so its
posterior is that of a (logistic) regression, normal around the trained w, with precision

    A = lambda I + sum_i omega_i p_i (1 - p_i) h~_i h~_i^T        binary
    A = lambda I + sum_i omega_i h~_i h~_i^T / sigma^2            real, sigma^2 = sum omega r^2 / sum omega of the residuals r

over the observed training rows of weight omega.  A new row's logit is ``N(z, s^2)`` with ``s^2 = h~^T A^-1 h~``.

- One pass over the rows, memory O(H^2) per head, all sums in float64.
- omega is the row's weight over the mean weight of the task's counted rows: the unit of ``data.weight`` does not matter.
- Only the sum is kept.  Eigenvalues of it below 0 are rounding and count as 0, lambda is added to them, and
  ``A^-1/2 h~`` is a row's root: no variance is ever negative, however singular the sum is.
- With a head per domain each has its own A.  A domain without rows has lambda alone: it is as unsure as it can be.
- Where the log kept a share r of a task's negatives, p is that of the kept log, ``sigmoid(z - log r)``: its rows are what
  was learned from.
- The real residuals and p are those of the trained model on its training rows.

How this differs: our design throughout.  Tables, encoders and towers count as known, so s^2 is a lower bound of what the
model does not know; a loss that is not the row-wise likelihood (ESMM's product, rankings) is treated as if it were.
Multiclass tasks have no such posterior here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import scipy
import torch
from torch import nn

from unbraid.types import Schema, Scores, State
from unbraid.uncertainty.explore import Array, Belief

BIBTEX = """@inproceedings{kristiadi2020being,
  title = {Being {B}ayesian, Even Just a Bit, Fixes Overconfidence in {ReLU} Networks},
  author = {Kristiadi, Agustinus and Hein, Matthias and Hennig, Philipp},
  booktitle = {Proceedings of the 37th International Conference on Machine Learning},
  year = {2020}
}
"""

FITS = "`unbraid uncertainty BUNDLE` (in Python, `unbraid.predictor.with_uncertainty`)"


class UncertaintyError(ValueError):
    """A model's uncertainty was asked for and is not there, or is not this model's."""


class Posterior:
    """Normal posterior of the last layers of one task: one per domain, or one for all.

    Args:
        weights: (K, H + 1) trained weights and biases; prior: lambda.
        information: (K, H + 1, H + 1) the sum in A; rows: (K,) how many rows are in it; None: nothing was seen.
        mass: sum of omega; unit: the given weight that counts as 1.
    """

    kind = ""

    def __init__(
        self, weights: Array, prior: float = 1.0, information: Array | None = None, rows: Array | None = None,
        mass: float = 0.0, unit: float = 1.0,
    ) -> None:  # fmt: skip
        if not 0 < prior < np.inf:
            raise ValueError(f"Parameter `prior` should be positive and finite. Found {prior}.")
        self.weights, self.prior = np.asarray(weights, np.float64), float(prior)
        heads, width = self.weights.shape
        self.information = np.zeros((heads, width, width)) if information is None else information
        self.rows = np.zeros(heads, np.int64) if rows is None else rows
        self.mass, self.unit = float(mass), float(unit)
        self._whitening: dict[int, Array] = {}

    @property
    def gain(self) -> float:
        """What the sum is multiplied by."""
        return 1.0

    def precision(self) -> Array:
        """(K, H + 1, H + 1) A."""
        return self.gain * self.information + self.prior * np.eye(self.weights.shape[1])

    def variance(self, hidden: Array, head: Array | None = None) -> Array:
        """(N,) s^2 of rows with hidden vectors (N, H) and heads (N,); None where there is one."""
        return np.square(self.roots(hidden, head)).sum(1)

    def roots(self, hidden: Array, head: Array | None = None) -> Array:
        """(N, H + 1) ``A^-1/2 h~``."""
        x, head = self._extended(hidden), self._heads(head, len(hidden))
        roots = np.empty_like(x)
        for k in np.unique(head):
            rows = head == k
            roots[rows] = x[rows] @ self._inverse_root(int(k))
        return roots

    def normalise(self) -> None:
        """Make the mean weight of all rows so far the unit of weights."""
        if not self.mass > 0:
            return
        mean = self.mass / self.rows.sum()
        self.unit *= mean
        self._divide(mean)
        self._whitening.clear()

    def _divide(self, mean: float) -> None:
        self.information, self.mass = self.information / mean, self.mass / mean

    def _add(self, hidden: Array, omega: Array, head: Array | None, factor: Array | float = 1.0) -> None:
        x, head, counts = self._extended(hidden), self._heads(head, len(hidden)), omega * factor
        if not (np.isfinite(x).all() and np.isfinite(counts).all() and (counts >= 0).all()):
            raise ValueError("Hidden vectors should be finite, and weights finite and not negative.")
        for k in np.unique(head):
            rows = head == k
            self.information[k] += (x[rows] * counts[rows, None]).T @ x[rows]
            self.rows[k] += rows.sum()
        self.mass += float(omega.sum())
        self._whitening.clear()

    def _weights(self, weight: Array | None, count: int) -> Array:
        return np.ones(count) if weight is None else np.asarray(weight, np.float64) / self.unit

    def _heads(self, head: Array | None, count: int) -> Array:
        if head is None and len(self.weights) > 1:
            raise ValueError(
                f"There are {len(self.weights)} heads, one per domain: say which one each row has (`head`, the code of its "
                "domain: `scores.domain`)."
            )
        return np.zeros(count, np.int64) if head is None else np.asarray(head)

    def _inverse_root(self, k: int) -> Array:
        """(H + 1, H + 1) U with ``U U^T = A^-1``, kept until the next update."""
        if k not in self._whitening:
            values, vectors = np.linalg.eigh(self.gain * self.information[k])
            self._whitening[k] = vectors / np.sqrt(np.maximum(values, 0.0) + self.prior)
        return self._whitening[k]

    def _extended(self, hidden: Array) -> Array:
        hidden = np.asarray(hidden, np.float64)
        if hidden.ndim != 2 or hidden.shape[1] + 1 != self.weights.shape[1]:
            raise ValueError(f"Hidden vectors should be (N, {self.weights.shape[1] - 1}). Found {hidden.shape}.")
        return np.concatenate([hidden, np.ones((len(hidden), 1))], 1)

    def state_dict(self) -> State:
        """What `posterior` reads."""
        parts = ("kind", "weights", "prior", "information", "rows", "mass", "unit")
        return {name: getattr(self, name) for name in parts}


class Logistic(Posterior):
    """Of a binary task."""

    kind = "binary"

    def update(self, hidden: Array, p: Array, weight: Array | None = None, head: Array | None = None) -> None:
        """Add observed rows: hidden vectors (N, H), what the model predicts for them (N,), weights (N,).

        Their labels do not matter: p (1 - p) is how much one more label tells.

        Args:
            weight: as in the log; None: each counts as much as a row of mean weight.
            head: (N,) codes of the rows' domains, where each has a head of its own; else None.

        Raises:
            ValueError: shapes differ, p is not in [0, 1], something is not finite; several heads and no ``head``.
        """
        p = np.asarray(p, np.float64)
        if p.shape != (len(hidden),) or not ((p >= 0) & (p <= 1)).all():
            raise ValueError(f"Probabilities should be ({len(hidden)},) and within 0 and 1. Found {p.shape}.")
        self._add(hidden, self._weights(weight, len(hidden)), head, p * (1 - p))

    def update_scored(
        self, hidden: Array, logits: Array, labels: Array, weight: Array | None, head: Array | None
    ) -> None:
        """As `update`, from logits (N,): exact where p rounds to 1."""
        self._add(
            hidden, self._weights(weight, len(hidden)), head, scipy.special.expit(logits) * scipy.special.expit(-logits)
        )


class Linear(Posterior):
    """Of a real task; ``squares`` is the sum of omega r^2."""

    kind = "real"

    def __init__(
        self, weights: Array, prior: float = 1.0, information: Array | None = None, rows: Array | None = None,
        mass: float = 0.0, unit: float = 1.0, squares: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(weights, prior, information, rows, mass, unit)
        self.squares = float(squares)

    @property
    def noise(self) -> float:
        """Variance of the residuals: 1 before any was seen, never below 1e-12."""
        return max(self.squares / self.mass, 1e-12) if self.mass > 0 else 1.0

    @property
    def gain(self) -> float:
        """1 / sigma^2."""
        return 1.0 / self.noise

    def update(self, hidden: Array, residual: Array, weight: Array | None = None, head: Array | None = None) -> None:
        """Add observed rows: hidden vectors (N, H), label minus prediction (N,); the rest as of `Logistic.update`."""
        residual, omega = np.asarray(residual, np.float64), self._weights(weight, len(hidden))
        if residual.shape != omega.shape or not np.isfinite(residual).all():
            raise ValueError(f"Residuals should be ({len(hidden)},) and finite. Found {residual.shape}.")
        self._add(hidden, omega, head)
        self.squares += float(omega @ residual**2)

    def _divide(self, mean: float) -> None:
        super()._divide(mean)
        self.squares /= mean

    def update_scored(
        self, hidden: Array, logits: Array, labels: Array, weight: Array | None, head: Array | None
    ) -> None:
        """As `update`, from predictions and labels (N,)."""
        self.update(hidden, labels.astype(np.float64) - logits, weight, head)

    def state_dict(self) -> State:
        """What `posterior` reads."""
        return super().state_dict() | {"squares": self.squares}


KINDS: dict[str, type[Logistic] | type[Linear]] = {"binary": Logistic, "real": Linear}


class LastLayer:
    """The posteriors of a model's tasks.

    Args:
        tasks: name -> `Logistic` or `Linear`; digest: `digest_of` the model whose they are.
    """

    def __init__(self, tasks: Mapping[str, Logistic | Linear], digest: str) -> None:
        self.tasks, self.digest = dict(tasks), digest
        self._checked: list[tuple[int, int]] = []

    @classmethod
    def of(cls, model: nn.Module, schema: Schema, prior: float = 1.0) -> LastLayer:
        """That of a model before any row.

        Raises:
            UncertaintyError: the model has no binary and no real task.
        """
        found = {t.name: KINDS[t.kind](head_weights(model, t.name), prior) for t in schema.tasks if t.kind in KINDS}
        if not found:
            raise UncertaintyError(
                "Uncertainty of the last layer is for binary and real tasks; the model has multiclass ones."
            )
        return cls(found, digest_of(model))

    def update(self, scores: Scores) -> None:
        """Add scored rows with their hidden vectors: of each task those that are observed and weigh more than 0."""
        for name, posterior in self.tasks.items():
            seen = scores.observed[name] if scores.weight is None else scores.observed[name] & (scores.weight > 0)
            if not seen.any():
                continue
            logits = scores.logits[name][seen].astype(np.float64)
            if (rate := scores.meta.get(f"sampling_rate.{name}")) is not None:
                logits = logits - np.log(rate[seen].astype(np.float64))
            weight = None if scores.weight is None else scores.weight[seen]
            hidden, labels = scores.hidden[name][seen], scores.labels[name][seen]
            posterior.update_scored(hidden, logits, labels, weight, self._head(posterior, scores)[seen])

    def beliefs(self, scores: Scores) -> dict[str, Belief]:
        """task -> belief about scored rows, which need their hidden vectors."""
        found = {}
        for name, posterior in self.tasks.items():
            head = self._head(posterior, scores)
            roots = posterior.roots(scores.hidden[name], head)
            found[name] = Belief(scores.logits[name].astype(np.float64), roots, head)
        return found

    def check(self, model: nn.Module) -> None:
        """Raises UncertaintyError when these are posteriors of other weights than the model's."""
        now = [(part.data_ptr(), part._version) for part in model.state_dict().values()]
        if now == self._checked:  # not written to since: large tables are read once, not at each prediction
            return
        if digest_of(model) != self.digest:
            raise UncertaintyError(f"The uncertainty belongs to other weights than the model's. Make it again: {FITS}.")
        self._checked = now

    @staticmethod
    def _head(posterior: Posterior, scores: Scores) -> Array:
        return scores.domain if len(posterior.weights) > 1 else np.zeros(len(scores.row), np.int64)

    def state_dict(self) -> State:
        """What `load` reads."""
        return {
            "digest": self.digest, "tasks": {name: posterior.state_dict() for name, posterior in self.tasks.items()}
        }  # fmt: skip

    @classmethod
    def load(cls, state: State) -> LastLayer:
        """From what `state_dict` gave."""
        return cls({name: posterior(part) for name, part in state["tasks"].items()}, state["digest"])


def posterior(state: State) -> Logistic | Linear:
    """A posterior from what its ``state_dict`` gave."""
    parts: dict[str, Any] = dict(state)
    return KINDS[parts.pop("kind")](**parts)


def fit(model: nn.Module, batches: Iterable[Scores], schema: Schema, prior: float = 1.0) -> LastLayer:
    """The posteriors after scored rows with hidden vectors, batch by batch."""
    found = LastLayer.of(model, schema, prior)
    for scores in batches:
        found.update(scores)
    for posterior in found.tasks.values():
        posterior.normalise()
    return found


def digest_of(model: nn.Module) -> str:
    """Of all weights, the same on every device."""
    found = hashlib.blake2b(digest_size=16)
    for name, part in model.state_dict().items():
        found.update(name.encode())
        found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def head_weights(model: Any, task: str) -> Array:
    """(K, H + 1) float64 weights and biases of the logit of a binary or real task's heads; of two numbers, their difference."""
    head = model.heads[f"task/{task}"]
    with torch.no_grad():
        both = [torch.cat([linear.weight, linear.bias[:, None]], 1).double().cpu().numpy() for linear in head.linears]
    return np.stack([each[1] - each[0] if head.gives else each[0] for each in both])
