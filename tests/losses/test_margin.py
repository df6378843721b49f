"""Margin metric softmax: printed numbers, both published forms, gradients, the head it needs, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from toylog import make_data, make_log, make_run

from unbraid.bundle import build
from unbraid.class_head import ClassFile
from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.job import JobError
from unbraid.losses.margin import Margin, margin_loss
from unbraid.losses.supervised import Supervised
from unbraid.preflight import bound_terms
from unbraid.types import Feature, Task

T = normalize(torch.tensor([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 1]], dtype=torch.float64), dim=1)
FEATURES = normalize(torch.tensor([[0.9, 0.3, 0.1], [0.2, 0.9, 0.4]], dtype=torch.float64), dim=1)
Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("scale", "strength", "each", "mean"),
    [
        (10, 0, (0.693261, 0.055852), 0.374557), (10, 0.1, (0.798418, 0.136105), 0.467261),
        (10, 0.3, (1.039109, 0.706846), 0.872977), (100, 0, (0.693147, 0.0), 0.346574),
        (100, 0.1, (2.126928, 0.0), 1.063464), (100, 0.3, (6.002476, 0.770358), 3.386417),
    ],
)  # fmt: skip
def test_the_worked_example(scale: float, strength: float, each: tuple[float, float], mean: float) -> None:
    similarity = FEATURES @ T.T
    wanted = torch.tensor([[0.943456, 0.943456, 0.104828], [0.199007, 0.696526, 0.398015]], dtype=torch.float64)
    torch.testing.assert_close(similarity, wanted, rtol=0, atol=5e-7)
    found = margin_loss(scale * similarity, T, Y, scale, strength)
    torch.testing.assert_close(found, torch.tensor(each, dtype=torch.float64), rtol=0, atol=5e-7)
    assert float(found.mean()) == pytest.approx(mean, abs=1e-6)


def test_the_worked_examples_logits() -> None:
    """The gradient of cross-entropy tells its softmax, which is that of the printed logits, and of these less s lambda."""
    logits = (10 * FEATURES @ T.T).requires_grad_()
    (grad,) = torch.autograd.grad(margin_loss(logits, T, Y, 10, 0.3).sum(), logits)
    printed = torch.tensor([[9.434564, 10.034564, 4.048285], [2.590074, 6.965260, 6.980149]], dtype=torch.float64)
    found = grad + torch.eye(3, dtype=torch.float64)[Y]
    torch.testing.assert_close(found, printed.softmax(1), rtol=0, atol=5e-7)
    theirs = 10 * (FEATURES - 0.3 * T[Y]) @ T.T
    torch.testing.assert_close(theirs, printed - 3.0, rtol=0, atol=6e-7)


def code_form(f: Tensor, vectors: Tensor, labels: Tensor, scale: float, strength: float) -> Tensor:
    """The authors' code, written out: softmax of s (f - lambda t_y) T^T."""
    logits = scale * (f - strength * vectors[labels]) @ vectors.T
    return torch.stack([row.logsumexp(0) - row[y] for row, y in zip(logits, labels, strict=True)])


def margin_form(f: Tensor, vectors: Tensor, labels: Tensor, scale: float, strength: float) -> Tensor:
    """The paper's form with loops."""
    found = []
    for row, y in zip(f, labels.tolist(), strict=True):
        terms = [(scale * (row @ t + strength * (1 - vectors[y] @ t))).exp() for t in vectors]
        found.append(-((scale * (row @ vectors[y])).exp() / sum(terms)).log())
    return torch.stack(found)


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.3, 1.7])
def test_both_forms_and_this_one_have_the_same_value_and_gradient(strength: float) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = normalize(torch.randn(7, 5, dtype=torch.float64, generator=generator), dim=1)
    x = torch.randn(11, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(0, 7, (11,), generator=generator)
    values, gradients = [], []
    for form in (
        lambda f: margin_loss(8.0 * f @ vectors.T, vectors, labels, 8.0, strength),
        lambda f: code_form(f, vectors, labels, 8.0, strength), lambda f: margin_form(f, vectors, labels, 8.0, strength),
    ):  # fmt: skip
        values.append(form(normalize(x, dim=1)).detach())
        gradients.append(torch.autograd.grad(form(normalize(x, dim=1)).mean(), x)[0])
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=1e-10)
    if not strength:
        plain = torch.nn.functional.cross_entropy(8.0 * normalize(x, dim=1) @ vectors.T, labels, reduction="none")
        assert torch.equal(margin_loss(8.0 * normalize(x, dim=1) @ vectors.T, vectors, labels, 8.0, 0), plain)


def test_the_loss_rises_with_the_strength_unless_classes_have_the_same_vector() -> None:
    losses = [margin_loss(10 * FEATURES @ T.T, T, Y, 10, strength) for strength in (0, 0.1, 0.3, 1, 2)]
    assert all(bool((more > less).all()) for less, more in zip(losses, losses[1:], strict=False))
    twins = T[[0, 0]]
    for strength in (0.0, 0.5):
        found = margin_loss(10 * FEATURES @ twins.T, twins, Y, 10, strength)
        assert float((found - np.log(2)).abs().max()) < 1e-12, (
            "a pair with one vector has no margin, and cannot be told apart"
        )


# ------------------------------------------------------------------------------------------------------------ in a model
@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    tasks = (Task("size", kind="multiclass"), Task("click"))
    features = (Feature("item"), Feature("text_vector", kind="vector"))
    cache = str(tmp_path_factory.mktemp("cache"))
    return Encoded(encode(make_data(tasks=tasks, features=features, cache=cache), tables={"log": make_log()}))


@pytest.fixture
def file(tmp_path: Path) -> ClassFile:
    vectors = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    np.savez(tmp_path / "classes.npz", names=["XL", "S", "M", "L"], vectors=vectors)
    return ClassFile(str(tmp_path / "classes.npz"), scale=20.0)


def built(encoded: Encoded, file: ClassFile | None, loss: Any, **more: Any) -> tuple[Any, Any]:
    classes = {} if file is None else {"size": file}
    choice = ModelChoice(tables=Views(width=4), classes=classes, **more)
    run = make_run(
        data=make_data(tasks=encoded.schema.tasks, features=encoded.schema.features), model=choice, losses=(loss,)
    )
    model = build(run, encoded.schema)
    return model, bound_terms(run, encoded.schema, model)


def test_in_a_model_it_is_the_weighted_mean_over_known_rows(encoded: Encoded, file: ClassFile) -> None:
    model, (term,) = built(encoded, file, Margin(strength=0.3), heads=Heads(hidden=(6,)))
    model.double()
    batch = encoded.batch(np.arange(30))
    batch = replace(
        batch, weight=torch.rand(30, dtype=torch.float64), observed={**batch.observed, "size": torch.arange(30) % 3 > 0},
        features={k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.features.items()},
    )  # fmt: skip
    output = model(batch)
    losses = term(output, batch, 0)
    rows = (torch.arange(30) % 3 > 0).nonzero().squeeze(1)
    head = model.heads["task/size"]
    f = normalize(output.hidden["size"][rows] @ head.projection.T, dim=1)
    each = code_form(f, head.vectors, batch.labels["size"][rows], 20.0, 0.3)
    weight: Any = batch.weight
    wanted = (each * weight[rows]).sum() / weight[rows].sum()
    torch.testing.assert_close(losses["size"], wanted, rtol=0, atol=1e-10)
    plain = Supervised().bind(encoded.schema)(output, batch, 0)
    assert torch.equal(losses["click"], plain["click"]), "other kinds of tasks have the supervised loss"
    parameters = [p for n, p in model.named_parameters() if n.startswith(("heads.task/size", "tower", "embeddings"))]
    ours, theirs = (
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (losses["size"], wanted)
    )
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in ours) >= 5
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_strength_zero_is_the_supervised_loss_and_domains_are_objectives(encoded: Encoded, file: ClassFile) -> None:
    for by in ("task", "domain", "task@domain"):
        model, (term,) = built(encoded, file, Margin(strength=0, by=by))  # type: ignore[arg-type]
        batch = encoded.batch(np.arange(40))
        output = model(batch)
        wanted = Supervised(by=by).bind(encoded.schema)(output, batch, 0)  # type: ignore[arg-type]
        found = term(output, batch, 0)
        assert found.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_refusals(encoded: Encoded, file: ClassFile) -> None:
    with pytest.raises(JobError, match="Loss `margin` needs vectors of the classes: set `model.classes.size`"):
        built(encoded, None, Margin())
    with pytest.raises(JobError, match=r"multiclass tasks, among \['size'\]. Found `tasks` \['click'\]"):
        built(encoded, file, Margin(tasks=("click",)))
    with pytest.raises(ValueError, match="`strength`"):
        Margin(strength=-0.1)
    bare = replace(encoded.schema, tasks=(Task("click"),))
    with pytest.raises(ValueError, match="Found none"):
        Margin().bind(bare)
