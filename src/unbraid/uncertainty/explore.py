"""Exploration: score rows not only by what the model believes but also by how unsure it is.

Papers: Thompson, "On the likelihood that one unknown probability exceeds another", Biometrika 1933
(https://doi.org/10.2307/2332286); Chapelle and Li, "An empirical evaluation of Thompson sampling", NeurIPS 2011
(https://papers.nips.cc/paper/4321); Auer, Cesa-Bianchi and Fischer, "Finite-time analysis of the multiarmed bandit problem",
Machine Learning 2002 (https://doi.org/10.1023/A:1013689704352).  That advertising platforms explore with the model's own
uncertainty is in Pan et al., "Ads recommendation in a collapsed and entangled world", KDD 2024
(https://arxiv.org/abs/2403.00793).

A model that always shows what it thinks is best never learns that it was wrong about the rest.  Let a row's logit be
normal, ``z ~ N(mu, s^2)``:

- **Thompson sampling** scores by a draw of z.  A row is chosen as often as it may be the best one.
- **UCB** scores by ``mu + beta s``: the best value that is still believable.

Beliefs about several rows are dependent: two rows of equal hidden vectors have the same unknown logit.  A `Belief` therefore
keeps a root of their covariance, ``z = mu + root xi`` with ``xi ~ N(0, I)``, and one xi for several rows is a draw of one
whole model for them.

How this differs: the paper's body was not available to us; the estimators, the sharing of draws and all defaults here are
our design.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from unbraid.evaluate import request_codes
from unbraid.types import Scores

Array = np.ndarray

BIBTEX = """@inproceedings{chapelle2011thompson,
  title = {An Empirical Evaluation of {T}hompson Sampling},
  author = {Chapelle, Olivier and Li, Lihong},
  booktitle = {Advances in Neural Information Processing Systems 24},
  year = {2011}
}
@inproceedings{pan2024ads,
  title     = {Ads Recommendation in a Collapsed and Entangled World},
  author    = {Pan, Junwei and Xue, Wei and Wang, Ximei and Yu, Haibin and Liu, Xun and Quan, Shijie and Qiu, Xueming and
               Liu, Dapeng and Xiao, Lei and Jiang, Jie},
  booktitle = {Proceedings of the 30th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year      = {2024},
  eprint    = {2403.00793},
  archiveprefix = {arXiv},
}
"""


@dataclass(frozen=True)
class Belief:
    """A normal belief about the logits (of a real task: the values) of N rows.

    Args:
        mean: (N,) what the model says; root: (N, R), each row's covariance with xi.
        head: (N,) which last layer a row has; rows of different ones have independent xi.
    """

    mean: Array
    root: Array
    head: Array

    @property
    def variance(self) -> Array:
        """(N,) never negative."""
        return np.square(self.root).sum(1)

    def expected(self) -> Array:
        """(N,) about the expectation of sigmoid(z): ``sigmoid(mu / sqrt(1 + pi s^2 / 8))`` (MacKay, 1992); binary tasks only."""
        return sigmoid(self.mean / np.sqrt(1 + np.pi / 8 * self.variance))


class Exploration(Protocol):
    """What chooses logits: (belief, (N,) codes of requests) -> (N,)."""

    def __call__(self, belief: Belief, request: Array) -> Array:
        """Logits to rank by; rows with one code of a request share a draw."""


class Thompson:
    """Thompson sampling.  The generator goes on from call to call; an equal object gives equal draws again.

    Args:
        seed: of the generator; None: another one every time.
        scale: factor of the standard deviation, 0 is greedy; above 1 explores more.
        share: what has one draw of the last layer: a ``request`` (all its candidates; without a request column all rows
            of a call), a ``row`` or a ``call``.

    The posterior's own law is one draw for all candidates that compete, hence the default.  With ``row``, each logit has
    the same law alone, but of many equal candidates the luckiest wins: the more candidates, the more it explores.
    """

    def __init__(
        self, seed: int | None = None, scale: float = 1.0, share: Literal["request", "row", "call"] = "request"
    ) -> None:
        if not 0 <= scale < np.inf:
            raise ValueError(f"Parameter `scale` should be finite and not negative. Found {scale}.")
        if share not in ("request", "row", "call"):
            raise ValueError(f"Parameter `share` should be request, row or call. Found {share}.")
        self.scale, self.share, self.generator = scale, share, np.random.default_rng(seed)

    def __call__(self, belief: Belief, request: Array) -> Array:
        """(N,) drawn logits."""
        if self.share == "row":
            return belief.mean + self.scale * np.sqrt(belief.variance) * self.generator.standard_normal(
                len(belief.mean)
            )
        group = request if self.share == "request" else np.zeros_like(request)
        _, place = np.unique(np.stack([group, belief.head]), axis=1, return_inverse=True)
        place = place.reshape(-1)
        xi = self.generator.standard_normal((int(place.max(initial=-1)) + 1, belief.root.shape[1]))
        return belief.mean + self.scale * np.einsum("nr,nr->n", belief.root, xi[place])


@dataclass(frozen=True)
class UCB:
    """Upper confidence bound: the logit plus ``beta`` standard deviations.

    With 1 it stayed with a wrong arm in some of our bandits; 2 did not.
    """

    beta: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < np.inf:
            raise ValueError(f"Parameter `beta` should be finite and not negative. Found {self.beta}.")

    def __call__(self, belief: Belief, request: Array) -> Array:
        """(N,) bounds."""
        return belief.mean + self.beta * np.sqrt(belief.variance)


def requests(scores: Scores) -> Array:
    """(N,) codes of what competes: rows of one user and request; a row of no request is alone; without requests, all rows."""
    rows = np.arange(len(scores.row))
    if "request" not in scores.meta:
        return np.zeros_like(rows)
    codes = request_codes(scores.meta["request"], scores.group)
    return np.where(codes < 0, len(rows) + rows, codes)


def sigmoid(logits: Array) -> Array:
    """Probabilities, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * logits))
