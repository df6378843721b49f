"""Draws of users; intervals made of them are tested with the metrics (`test_evaluate.py`)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unbraid import bootstrap


def test_poisson_draws() -> None:
    """Mean and variance of the table are 1; the draws of a user do not depend on how many users there are."""
    table = bootstrap._POISSON.astype(float)
    assert len(table) == 65536
    assert table.mean() == pytest.approx(1, abs=1e-4) and table.var() == pytest.approx(1, abs=3e-4)
    few, many = bootstrap._draws(1, 0, 7, 30), bootstrap._draws(1, 0, 1000, 30)
    assert (few == many[:7]).all() and (bootstrap._draws(2, 0, 7, 30) != few).any()
    assert abs(many.mean() - 1) < 4 / math.sqrt(30_000)
    assert abs(np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]) < 4 / math.sqrt(30_000)
