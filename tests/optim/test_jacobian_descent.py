"""TorchJD's aggregators as updates: each against its definition in NumPy, on one Jacobian and over steps."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from balancing_kit import Trunk, compare, conflicting, rule_of, view_of
from scipy.optimize import minimize

from unbraid.optim.jacobian_descent import (
    IMTLG,
    AlignedMTL,
    ConFIG,
    DualProj,
    FairGrad,
    GradDrop,
    PCGrad,
    RandomWeights,
    UPGrad,
)

pytest.importorskip("torchjd", reason="the extra `mtl` is not installed")


def seeded(seed: tuple[int, int]) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def pcgrad(j: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    order, total = seeded(seed), np.zeros(j.shape[1])
    for i in range(len(j)):
        h = j[i].copy()
        for k in torch.randperm(len(j), generator=order).tolist():
            if k != i and h @ j[k] < 0:
                h -= h @ j[k] / (j[k] @ j[k]) * j[k]
        total += h
    return total


def imtl_g(j: np.ndarray, seed: tuple[int, int] = (0, 0)) -> np.ndarray:
    u = j / np.linalg.norm(j, axis=1, keepdims=True)
    d, differences = j[0] - j[1:], u[0] - u[1:]
    rest = j[0] @ differences.T @ np.linalg.inv(d @ differences.T)
    return (1 - rest.sum()) * j[0] + rest @ j[1:]


def projected(j: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The nearest vector to v that conflicts with no row of j: v + sum of l_k g_k, l >= 0."""
    units = j / np.linalg.norm(j)

    def value(weights: np.ndarray) -> tuple[float, np.ndarray]:
        moved = v + weights @ units
        return moved @ moved / 2, units @ moved

    found = minimize(value, np.zeros(len(j)), jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(j),
                     options={"ftol": 1e-16, "gtol": 1e-14, "maxiter": 5000})  # fmt: skip
    return v + found.x @ units


def upgrad(j: np.ndarray, seed: tuple[int, int] = (0, 0)) -> np.ndarray:
    return np.mean([projected(j, g) for g in j], axis=0)


def dualproj(j: np.ndarray, seed: tuple[int, int] = (0, 0)) -> np.ndarray:
    return projected(j, j.mean(0))


def aligned(j: np.ndarray, seed: tuple[int, int] = (0, 0), how: str = "min") -> np.ndarray:
    left, sizes, right = np.linalg.svd(j, full_matrices=False)
    length = {"min": sizes.min(), "median": np.sort(sizes)[(len(sizes) - 1) // 2], "rmse": np.sqrt((sizes**2).mean())}[
        how
    ]
    return (length * left @ right).mean(0)


def fairgrad(j: np.ndarray, seed: tuple[int, int] = (0, 0), alpha: float = 1.0) -> np.ndarray:
    """Where a^T G a / 2 - sum a^(1 - 1 / alpha) / (1 - 1 / alpha) is least (sum log a for alpha 1), over log a."""
    size = np.sqrt((j**2).sum(1).mean())
    g, power = j @ j.T / size**2, 1 - 1 / alpha

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        a = np.exp(x)
        gain = x.sum() if power == 0 else (a**power).sum() / power
        return a @ g @ a / 2 - gain, a * (g @ a) - a**power

    x = minimize(value, np.zeros(len(j)), jac=True, method="BFGS", options={"gtol": 1e-12}).x
    return np.exp(x) * size ** (-2 * alpha / (1 + alpha)) @ j


def config(j: np.ndarray, seed: tuple[int, int] = (0, 0)) -> np.ndarray:
    units = j / np.linalg.norm(j, axis=1, keepdims=True)
    best = np.linalg.pinv(units) @ np.ones(len(j))
    best /= np.linalg.norm(best)
    return (j @ best).sum() * best


def random(j: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    z = np.exp(torch.randn(len(j), generator=seeded(seed), dtype=torch.float64).numpy())
    return z / z.sum() @ j


def graddrop(j: np.ndarray, seed: tuple[int, int], leak: float = 0.0) -> np.ndarray:
    size = np.abs(j).sum(0)
    positive = np.where(size > 0, (1 + j.sum(0) / np.where(size > 0, size, 1)) / 2, 0.5)
    u = torch.rand(j.shape[1], generator=seeded(seed), dtype=torch.float64).numpy()
    kept = np.where(u < positive, j > 0, j < 0)
    return ((leak + (1 - leak) * kept) * j).sum(0)


CASES = [
    pytest.param(PCGrad(), pcgrad, 1e-9, id="pcgrad"),
    pytest.param(IMTLG(), imtl_g, 1e-6, id="imtl_g"),
    pytest.param(UPGrad(ridge=1e-12), upgrad, 1e-5, id="upgrad"),
    pytest.param(DualProj(ridge=1e-12), dualproj, 1e-5, id="dualproj"),
    pytest.param(AlignedMTL(), aligned, 1e-6, id="aligned"),
    pytest.param(AlignedMTL("median"), lambda j, s: aligned(j, s, "median"), 1e-6, id="aligned-median"),
    pytest.param(AlignedMTL("rmse"), lambda j, s: aligned(j, s, "rmse"), 1e-6, id="aligned-rmse"),
    pytest.param(FairGrad(), fairgrad, 1e-4, id="fairgrad"),
    pytest.param(FairGrad(alpha=2.0), lambda j, s: fairgrad(j, s, 2.0), 1e-4, id="fairgrad-2"),
    pytest.param(ConFIG(), config, 1e-6, id="config"),
    pytest.param(RandomWeights(), random, 1e-9, id="random"),
    pytest.param(GradDrop(), graddrop, 1e-9, id="graddrop"),
    pytest.param(GradDrop(leak=0.3), lambda j, s: graddrop(j, s, 0.3), 1e-9, id="graddrop-leak"),
]


def combined(method: Any, view: Any) -> np.ndarray:
    rule = rule_of(method)
    vector = rule.vector(view)
    return (rule.weights(view) @ view.jacobian() if vector is None else vector).numpy()


@pytest.mark.parametrize(("method", "known", "close"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_the_combination_is_that_of_the_definition(method: Any, known: Any, close: float, seed: int) -> None:
    j = np.random.default_rng(seed).normal(size=(3, 8)) * np.array([[1.0], [0.3], [2.0]])
    j[1] -= 0.3 * j[0]
    expected = known(j, (seed, 0))
    np.testing.assert_allclose(combined(method, view_of(j, seed=seed)), expected, atol=close * np.linalg.norm(expected))


@pytest.mark.parametrize(("method", "known"), [
    (PCGrad(), pcgrad), (IMTLG(), imtl_g), (ConFIG(), config), (AlignedMTL(), aligned),
    (RandomWeights(), random), (GradDrop(), graddrop),
])  # fmt: skip
def test_steps_are_those_of_the_definition(method: Any, known: Any) -> None:
    def rule(
        jacobian: np.ndarray, losses: np.ndarray, names: Sequence[str], at: int, model: Trunk
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        if known is graddrop:  # its numbers belong to the columns of what a batch reads
            return read_columns(jacobian, model, at), np.ones(len(names))
        return known(jacobian, (3, at)), np.ones(len(names))

    def read_columns(jacobian: np.ndarray, model: Trunk, at: int) -> np.ndarray:
        sizes = [p.numel() for p in model.shared()]
        table, rest = jacobian[:, : sizes[0]], jacobian[:, sizes[0] :]
        rows = np.abs(table).reshape(len(jacobian), -1, 4).sum((0, 2)) > 0
        columns = np.repeat(rows, 4)
        # leaves in alphabetical order: layer.bias, layer.weight, the table's rows
        order = np.concatenate([rest[:, 20:], rest[:, :20], table[:, columns]], axis=1)
        found, out = graddrop(order, (3, at)), np.zeros(jacobian.shape[1])
        out[: sizes[0]][columns] = found[25:]
        out[sizes[0] :] = np.concatenate([found[5:25], found[:5]])
        return out

    compare(method, rule, b=0.7)


# --------------------------------------------------------------------------------------------------------- known values
def test_known_values() -> None:
    agree = np.abs(np.random.default_rng(0).normal(size=(3, 6)))
    np.testing.assert_allclose(combined(PCGrad(), view_of(agree)), agree.sum(0), rtol=1e-12)
    np.testing.assert_allclose(combined(UPGrad(), view_of(agree)), agree.mean(0), rtol=1e-12)
    np.testing.assert_allclose(combined(DualProj(), view_of(agree)), agree.mean(0), rtol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_imtl_g_projects_equally(k: int) -> None:
    j = np.random.default_rng(k).normal(size=(k, 9)) * 10.0 ** np.linspace(-2, 2, k)[:, None]
    d = combined(IMTLG(), view_of(j))
    along = j @ d / np.linalg.norm(j, axis=1)
    assert np.abs(along - along[0]).max() < 1e-9 * max(1.0, abs(along[0]))


@pytest.mark.parametrize(("method", "known", "close"), CASES)
def test_tiny_gradients_are_combined_as_large_ones(method: Any, known: Any, close: float) -> None:
    """TorchJD's own tolerances are absolute: below them it gives up."""
    j = conflicting(3, 8)
    one, tiny = combined(method, view_of(j)), combined(method, view_of(j * 1e-6))
    direction = [v / np.linalg.norm(v) for v in (one, tiny)]
    np.testing.assert_allclose(direction[1], direction[0], atol=1e-4)
    assert not combined(method, view_of(0 * j)).any()
    assert np.isfinite(combined(method, view_of(j * np.array([[1.0], [0.0], [1.0]])))).all()


def test_without_torchjd_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def missing(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("torchjd"):
            raise ImportError(name)
        return plain(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match='Aggregator `pcgrad` needs TorchJD: pip install "unbraid\\[mtl\\]"'):
        rule_of(PCGrad())


@pytest.mark.parametrize(("make", "message"), [
    (lambda: UPGrad(ridge=0.0), "`ridge`"),
    (lambda: DualProj(ridge=-1.0), "`ridge`"), (lambda: FairGrad(alpha=0.0), "`alpha`"), (lambda: GradDrop(leak=2.0), "`leak`"),
])  # fmt: skip
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
