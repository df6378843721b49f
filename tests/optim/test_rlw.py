"""Random loss weighting: draws that are a function of seed, step and name, and what they are distributed like."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from balancing_kit import NAMES, Trunk, build, compare, weighted

from unbraid.optim.rlw import RLW


def test_steps_are_those_of_the_definition() -> None:
    def rule(
        jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        z = [np.random.default_rng([3, at, zlib.crc32(name.encode())]).standard_normal() for name in names]
        return weighted(np.exp(z) / np.exp(z).sum(), jacobian, own=True)

    assert set(compare(RLW(), rule, a=0.5).told()) == set(NAMES)


def test_weights_are_a_softmax_of_independent_normals() -> None:
    update = build(RLW(), Trunk())
    draws = []
    for at in range(4000):
        update.step = at
        drawn = update.weighting._draw(dict.fromkeys(NAMES, torch.zeros(())))
        assert sum(drawn.values()) == pytest.approx(1)
        draws.append([drawn[name] for name in NAMES])
    logs = np.log(np.array(draws))
    differences = np.stack([logs[:, 0] - logs[:, 1], logs[:, 1] - logs[:, 2]])  # of normals: variance 2, covariance -1
    assert np.abs(differences.mean(1)).max() < 4 * np.sqrt(2 / 4000)
    assert np.cov(differences) == pytest.approx(np.array([[2, -1], [-1, 2]]), abs=0.2)
    assert abs(np.corrcoef(logs[:-1, 0] - logs[:-1, 1], logs[1:, 0] - logs[1:, 1])[0, 1]) < 0.07, "from step to step"
