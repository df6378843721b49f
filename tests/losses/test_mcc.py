"""Class confusion: the worked example, its invariants, parity with the matrix form, and which rows and tasks it reads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.augmentations.tabular import Tabular
from unbraid.job import JobError, train
from unbraid.losses.mcc import MCC, class_confusion, confusion_gap, floor
from unbraid.losses.supervised import Supervised
from unbraid.losses.unlabelled import row_entropy
from unbraid.types import Batch, Output, Schema, Task

Z = torch.tensor([[2.0, 1.0, 0.1, -1.0], [0.5, 2.5, 0.0, 0.3], [-0.5, 0.2, 1.5, 1.4]], dtype=torch.float64)
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
TINY: dict[str, Any] = {"rtol": 0, "atol": 1e-12}


def normalised(
    logits: Tensor, temperature: float, weight: Tensor | None = None, frozen: bool = True, even: bool = False
) -> Tensor:
    """The normalised matrix of confusion, pair of classes by pair of classes, straight from the equations."""
    b, c = logits.shape
    p = torch.exp(logits / temperature)
    p = p / p.sum(1, keepdim=True)
    h = -(p * p.log()).sum(1)
    w = 1 + torch.exp(-(h.detach() if frozen else h))
    w = torch.ones_like(w) if even else w
    w = w if weight is None else w * weight
    w = b * w / w.sum()
    rows = []
    for j in range(c):
        pairs = torch.stack([(w * p[:, j] * p[:, k]).sum() for k in range(c)])
        rows.append(pairs / pairs.sum())
    return torch.stack(rows)


def by_matrix(logits: Tensor, temperature: float, **how: Any) -> Tensor:
    """The loss as the mean over classes of what lies beside the diagonal."""
    matrix = normalised(logits, temperature, **how)
    return (matrix.abs().sum() - matrix.diagonal().abs().sum()) / len(matrix)


def logits_of(rows: int, classes: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, of)
    return grad


# ----------------------------------------------------------------------------------------------------- the worked example
@pytest.mark.parametrize(
    ("temperature", "want"), [(1.0, 0.56077478), (2.0, 0.69520931), (2.5, 0.71473061), (3.0, 0.72552433),
                              (1000.0, 0.74999979), (0.05, 0.250000001)],
)  # fmt: skip
def test_the_worked_example(temperature: float, want: float) -> None:
    assert float(class_confusion(Z, temperature)) == pytest.approx(want, abs=6e-9)
    assert float(class_confusion(Z.float(), temperature)) == pytest.approx(want, abs=1e-6)


def test_the_worked_examples_rows() -> None:
    """Probabilities, entropies, weights and the matrix itself, printed to six digits; and the guard of the authors' logarithm."""
    want: dict[str, Any] = {
        "p": [[.638066, .234731, .095435, .031767], [.101892, .752885, .061801, .083422], [.058518, .117841, .432394, .391246]],
        "entropy": [.960673, .825656, 1.147772],
        "sure": [1.382635, 1.437947, 1.317343],
        "weight": [1.002412, 1.042513, .955075],
        "matrix": [.422205, .236696, .091771, .051047],
    }  # fmt: skip
    p = Z.softmax(1)
    entropy = row_entropy(p.log())
    sure = 1 + torch.exp(-entropy)
    weight = 3 * sure / sure.sum()
    found = {"p": p, "entropy": entropy, "sure": sure, "weight": weight, "matrix": (weight * p[:, 0]) @ p}
    for name, value in want.items():
        torch.testing.assert_close(found[name], torch.tensor(value).double(), rtol=0, atol=6e-7, msg=name)
    soft = 1 + torch.exp(-row_entropy((Z / 2.5).log_softmax(1)))
    torch.testing.assert_close(
        3 * soft / soft.sum(), torch.tensor([1.002587, 1.003274, 0.994139]).double(), rtol=0, atol=6e-7
    )
    guarded = 1 + torch.exp((p * (p + 1e-5).log()).sum(1))
    theirs = 1 - ((guarded @ p.square()) / (guarded @ p)).mean()
    assert f"{float(theirs):.7f}" == "0.5607748" and abs(float(theirs - class_confusion(Z, 1.0))) < 1e-7


def test_the_worked_examples_matrices() -> None:
    """The reference of this file is the specification's, too."""
    for temperature, want in (
        (1.0, [0.526625, 0.582155, 0.334478, 0.313643]),
        (2.5, [0.303811, 0.342865, 0.253073, 0.241328]),
    ):
        torch.testing.assert_close(
            normalised(Z, temperature).diagonal(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=6e-7
        )
    for temperature, want in ((1.0, 0.56016438), (2.5, 0.71469273)):
        assert float(by_matrix(Z, temperature, even=True)) == pytest.approx(want, abs=6e-9)
        assert abs(float(class_confusion(Z, temperature)) - want) > 1e-5, "rows that are sure count more"


def test_the_worked_examples_gradient() -> None:
    z = Z.clone().requires_grad_()
    found = gradient(class_confusion(z, 1.0), z)
    want = torch.tensor([[-.064243, .037212, .018743, .008287], [.024642, -.056931, .014387, .017901],
                         [.017012, .028490, -.022582, -.022920]], dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(found, want, rtol=0, atol=6e-7)
    torch.testing.assert_close(found.sum(1), torch.zeros(3, dtype=torch.float64), **TINY)
    through = gradient(by_matrix(z, 1.0, frozen=False), z)
    torch.testing.assert_close(
        through[0], torch.tensor([-0.063308, 0.036884, 0.018364, 0.008061]).double(), rtol=0, atol=6e-7
    )
    assert (through - found).abs().max() > 3e-4, "weights are constants"


# ---------------------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize(("rows", "classes"), [(2, 2), (7, 3), (5, 11), (40, 6), (3, 50)])
@pytest.mark.parametrize("temperature", [0.7, 2.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_closed_form_is_the_matrix_form(rows: int, classes: int, temperature: float, weighted: bool) -> None:
    z = logits_of(rows, classes, seed=rows).requires_grad_()
    weight = (
        0.5 + torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if weighted else None
    )
    found, want = class_confusion(z, temperature, weight), by_matrix(z, temperature, weight=weight)
    torch.testing.assert_close(found, want, **TINY)
    torch.testing.assert_close(gradient(found, z), gradient(want, z), **EXACT)
    if weight is not None:
        torch.testing.assert_close(class_confusion(z, temperature, 7.0 * weight), found, **TINY)


def test_gradcheck_with_frozen_weights() -> None:
    """The gradient is that of the loss with its weights held."""
    z = logits_of(6, 4, scale=1.0)
    p = (z / 1.5).softmax(1)
    held = 1 + torch.exp((p * p.log()).sum(1))

    def loss(x: Tensor) -> Tensor:
        q = (x / 1.5).softmax(1)
        return 1 - ((held @ q.square()) / (held @ q)).mean()

    x = z.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,))
    torch.testing.assert_close(gradient(class_confusion(x, 1.5), x), gradient(loss(x), x), **EXACT)


def test_a_weight_of_two_is_a_row_twice() -> None:
    z = logits_of(5, 4)
    twice = class_confusion(torch.cat([z, z[:1]]))
    torch.testing.assert_close(class_confusion(z, weight=torch.tensor([2.0, 1, 1, 1, 1])), twice, **TINY)


# ------------------------------------------------------------------------------------------------------------- invariants
def test_invariants() -> None:
    z = logits_of(9, 5)
    base = class_confusion(z, 1.7)
    shift = torch.arange(9, dtype=torch.float64)[:, None]
    for same in (class_confusion(z + shift, 1.7), class_confusion(3 * z, 5.1), class_confusion(z.flip(0), 1.7),
                 class_confusion(z[:, torch.tensor([3, 0, 4, 1, 2])], 1.7)):  # fmt: skip
        torch.testing.assert_close(same, base, **TINY)


@pytest.mark.parametrize("classes", [2, 4, 9])
def test_extremes(classes: int) -> None:
    most = 1 - 1 / classes
    assert float(class_confusion(torch.zeros(6, classes, dtype=torch.float64))) == pytest.approx(most, abs=1e-12)
    assert float(class_confusion(logits_of(1, classes))) == pytest.approx(most, abs=1e-12)
    z = logits_of(1, classes).requires_grad_()
    assert gradient(class_confusion(z), z).abs().max() < 1e-15, "one row says nothing"
    for k in range(1, classes + 1):
        sure = 1000 * F.one_hot(torch.arange(3 * classes) % k, classes).double()
        assert float(class_confusion(sure, 1.0)) == pytest.approx(1 - k / classes, abs=1e-12)
    assert float(class_confusion(1000 * torch.eye(classes)[[0, 0, 0]], 1.0)) == pytest.approx(most, abs=1e-6), (
        "collapse is worst"
    )


def test_bounds_and_the_floor() -> None:
    for seed in range(50):
        rows, classes = 1 + seed % 9, 2 + seed % 7
        found = float(class_confusion(logits_of(rows, classes, seed, scale=1.0 + seed), 1.0))
        assert floor(rows, classes) - 1e-12 <= found <= 1 - 1 / classes + 1e-12
    assert floor(36, 65) == pytest.approx(0.4462, abs=5e-5) and floor(8, 65) == pytest.approx(0.8769, abs=5e-5)
    assert floor(100, 10) == 0
    sharp = 1000 * torch.eye(65, dtype=torch.float64)[:36]
    assert float(class_confusion(sharp, 1.0)) == pytest.approx(floor(36, 65), abs=1e-12)


def test_a_class_that_underflows_counts_nothing() -> None:
    z = torch.tensor([[200.0, 0, 0]]).repeat(4, 1).requires_grad_()
    loss = class_confusion(z, 1.0)
    assert float(loss.detach()) == pytest.approx(2 / 3, abs=1e-6) and torch.isfinite(gradient(loss, z)).all()
    wide = (60 * torch.randn(8, 30, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = class_confusion(wide, 1.0)
    assert torch.isfinite(loss) and torch.isfinite(gradient(loss, wide)).all()
    torch.testing.assert_close(loss.detach().double(), class_confusion(wide.detach().double(), 1.0), rtol=0, atol=1e-5)


def test_absent_classes_add_a_constant_and_hardly_a_gradient() -> None:
    """Partial adaptation: classes without rows need no weights."""
    z = logits_of(30, 4, scale=3.0)
    absent = torch.full((30, 6), -20.0, dtype=torch.float64)
    few, many = z.clone().requires_grad_(), torch.cat([z, absent], 1).requires_grad_()
    small, large = class_confusion(few, 1.0), class_confusion(many, 1.0)
    assert float(large.detach()) == pytest.approx(0.6 + 0.4 * float(small.detach()), abs=1e-6)
    grads = gradient(large, many)
    torch.testing.assert_close(grads[:, :4], 0.4 * gradient(small, few), rtol=1e-5, atol=1e-8)
    assert grads[:, 4:].abs().max() < 1e-8


def test_half_precision_and_autocast() -> None:
    z = logits_of(64, 12).float()
    want = class_confusion(z.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        found = class_confusion(z.bfloat16())
        plain = class_confusion(z)
    assert found.dtype == plain.dtype == torch.float32 and torch.equal(found, want)
    assert torch.equal(plain, class_confusion(z))
    assert class_confusion(z.double()).dtype == torch.float64


def test_a_binary_logit_is_two_classes() -> None:
    z = logits_of(12, 1)[:, 0].requires_grad_()
    found = class_confusion(z, 1.3)
    want = by_matrix(torch.stack([torch.zeros_like(z), z], 1), 1.3)
    torch.testing.assert_close(found, want, **TINY)
    torch.testing.assert_close(gradient(found, z), gradient(want, z), **EXACT)
    p = (z / 1.3).sigmoid()  # the same through the logistic function
    h = -(p * p.log() + (1 - p) * (1 - p).log())
    w = 1 + torch.exp(-h)
    want = 1 - ((w * p**2).sum() / (w * p).sum() + (w * (1 - p) ** 2).sum() / (w * (1 - p)).sum()) / 2
    torch.testing.assert_close(found, want, **TINY)


# ------------------------------------------------------------------------------------------------------------ consistency
@pytest.mark.parametrize(("rows", "classes"), [(30, 4), (12, 30)])
@pytest.mark.parametrize("weighted", [False, True])
def test_consistency_is_that_of_the_matrices(rows: int, classes: int, weighted: bool) -> None:
    weak = logits_of(rows, classes, 1, 6.0 if classes < 10 else 3.5).requires_grad_()
    strong = logits_of(rows, classes, 2, 3.0).requires_grad_()
    weight = torch.arange(1, rows + 1).double() if weighted else torch.ones(rows, dtype=torch.float64)
    found = confusion_gap(weak, strong, 1.5, 0.6, weight)
    kept = (weak.detach() / 1.5).softmax(1).max(1).values >= 0.6
    assert 2 < kept.sum() < rows
    both = [normalised(z[kept], 1.5, weight[kept]) for z in (weak.detach(), strong)]
    want = (both[0] - both[1]).square().sum() / classes * weight[kept].sum() / weight.sum()
    torch.testing.assert_close(found, want, **EXACT)
    torch.testing.assert_close(gradient(found, strong), gradient(want, strong), rtol=1e-9, atol=1e-12)
    (constant,) = torch.autograd.grad(confusion_gap(weak, strong, 1.5, 0.6), weak, allow_unused=True)
    assert constant is None


def test_consistency_of_nothing_and_of_the_same() -> None:
    z = logits_of(20, 3)
    assert confusion_gap(torch.zeros(5, 3), torch.zeros(5, 3)) is None
    assert float(confusion_gap(30 * z, 30 * z)) == pytest.approx(0, abs=1e-15)


# ------------------------------------------------------------------------------------------------------------ rows, tasks
SCHEMA = Schema(
    (), (Task("click"), Task("buy", given="click"), Task("size", kind="multiclass", weight=0.5), Task("spend", kind="real")),
    domains=("(unknown)", "(missing)", "old", "new"), classes={"size": ("L", "M", "S")},
)  # fmt: skip
B = 12  # rows


def a_batch(**changes: Any) -> Batch:
    """Rows 0-3 have all labels, 4-7 none, 8 a click of 1 without buy, 9 a click of 0, 10 a size alone; 11 is 4, strong."""
    known = torch.zeros(B, dtype=torch.bool)
    click, size = known.clone(), known.clone()
    click[[0, 1, 2, 3, 8, 9]], size[[0, 1, 2, 3, 10]] = True, True
    labels = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0])
    observed = {
        "click": click,
        "buy": known.clone().index_fill(0, torch.tensor([0, 1]), True),
        "size": size,
        "spend": known,
    }
    view, pair = torch.zeros(B, dtype=torch.int8), torch.full((B,), -1)
    view[11], pair[4], pair[11] = 1, 11, 4
    batch = Batch(
        {}, {"click": labels, "buy": labels, "size": torch.zeros(B, dtype=torch.int64), "spend": labels}, observed,
        torch.tensor([2, 2, 2, 2, 3, 3, 3, 2, 2, 2, 3, 3]), None, torch.arange(B), view, pair,
    )  # fmt: skip
    return replace(batch, **changes)


def an_output() -> Output:
    logits = {
        task.name: logits_of(B, 3 if task.kind == "multiclass" else 1, seed) for seed, task in enumerate(SCHEMA.tasks)
    }
    return Output(
        {k: (v if v.shape[1] == 3 else v[:, 0]).requires_grad_() for k, v in logits.items()}, {}, torch.zeros(B, 2)
    )


def read(term: MCC, batch: Batch) -> dict[str, list[int]]:
    """task -> rows whose logits get a gradient."""
    output = an_output()
    (loss,) = term.bind(SCHEMA)(output, batch, 0).values()
    grads = torch.autograd.grad(loss, list(output.logits.values()), allow_unused=True)
    named = zip(output.logits, grads, strict=True)
    return {n: g.reshape(B, -1).abs().sum(1).nonzero().squeeze(1).tolist() for n, g in named if g is not None}


def test_rows_without_a_label_of_the_task() -> None:
    assert read(MCC(), a_batch()) == {"click": [4, 5, 6, 7, 10], "size": [4, 5, 6, 7, 8, 9]}
    assert read(MCC(tasks=("click",), domains=("new",)), a_batch()) == {"click": [4, 5, 6, 10]}
    everyone = read(MCC(of="all"), a_batch())
    assert everyone == {"click": list(range(11)), "size": list(range(11)), "buy": [0, 1, 8]}, (
        "no strong view; buys of clicks alone"
    )
    weight = torch.ones(B).index_fill(0, torch.tensor([4, 5]), 0.0)
    assert read(MCC(), a_batch(weight=weight)) == {"click": [6, 7, 10], "size": [6, 7, 8, 9]}


def test_a_conditional_task_has_only_rows_whose_parent_is_known_to_be_one() -> None:
    batch = a_batch()
    only = MCC(tasks=("buy",)).bind(SCHEMA)
    assert only(an_output(), batch, 0) == {}, "row 8 alone: one row says nothing"
    observed = {**batch.observed, "buy": torch.zeros(B, dtype=torch.bool)}
    assert read(MCC(tasks=("buy",)), replace(batch, observed=observed)) == {"buy": [0, 1, 8]}
    withheld = {name: known & (batch.domain != 2) for name, known in observed.items()}
    assert only(an_output(), replace(batch, observed=withheld), 0) == {}, "nobody knows who clicked"


def test_the_value_is_the_sum_over_tasks_by_weight() -> None:
    output, batch = an_output(), a_batch()
    (found,) = MCC(temperature=1.5, weight=3.0).bind(SCHEMA)(output, batch, 0).values()
    click, size = [4, 5, 6, 7, 10], [4, 5, 6, 7, 8, 9]
    z = output.logits["click"][click]
    want = by_matrix(torch.stack([torch.zeros_like(z), z], 1), 1.5) + 0.5 * by_matrix(output.logits["size"][size], 1.5)
    torch.testing.assert_close(found, 3.0 * want, **EXACT)


def test_nothing_without_such_rows() -> None:
    batch = a_batch()
    full = {name: torch.ones(B, dtype=torch.bool) for name in batch.observed}
    assert MCC().bind(SCHEMA)(an_output(), replace(batch, observed=full), 0) == {}


def test_consistency_joins_the_views() -> None:
    output = an_output()
    big = replace(output, logits={**output.logits, "size": (40 * output.logits["size"].detach()).requires_grad_()})
    batch = a_batch()
    pair, view = batch.pair.clone(), batch.view.clone()
    pair[[5, 10]], view[10] = torch.tensor([10, 5]), 1
    batch = replace(batch, pair=pair, view=view)
    term = MCC(tasks=("size",), consistency=2.0, threshold=0.5)
    (found,) = term.bind(SCHEMA)(big, batch, 0).values()
    (alone,) = replace(term, consistency=0.0).bind(SCHEMA)(big, batch, 0).values()
    z = big.logits["size"]
    gap = confusion_gap(z[[4, 5]], z[[11, 10]], 2.5, 0.5)
    assert gap is not None and float(gap.detach()) > 1e-4
    torch.testing.assert_close(found, alone + 0.5 * 2.0 * gap, **EXACT)


# ------------------------------------------------------------------------------------------------------------ in a run
def a_run(**changes: Any) -> config.Run:
    run = make_run(data=make_data(withhold="site = 'mail'"), losses=(Supervised(), MCC()))
    run = replace(run, training=replace(run.training, steps=6, evaluate_every=3))
    return replace(run, **changes)


def test_it_trains_and_counts_as_an_objective() -> None:
    plain = train(a_run(losses=(Supervised(),)), tables={"log": make_log()}, baseline=False).bundle.model.state_dict()
    found = train(a_run(), tables={"log": make_log()}, baseline=False).bundle.model.state_dict()
    assert any(not torch.equal(found[n], plain[n]) for n in plain)
    views = a_run(losses=(Supervised(), MCC(consistency=1.0, threshold=0.1, temperature=0.5)), augment=Tabular())
    train(views, tables={"log": make_log()}, baseline=False)


def test_errors() -> None:
    for name, value in (
        ("temperature", 0.0),
        ("temperature", math.inf),
        ("weight", 0.0),
        ("consistency", -1.0),
        ("threshold", 1.0),
    ):
        with pytest.raises(ValueError, match=f"Parameter `{name}` should be .* Found"):
            MCC(**{name: value})
    with pytest.raises(ValueError, match="Loss `mcc` is of binary and multiclass tasks. Real-valued: spend"):
        MCC(tasks=("spend",)).bind(SCHEMA)
    with pytest.raises(ValueError, match=r"Loss `mcc`: `domains` should be among \['old', 'new'\]. Found \['other'\]"):
        MCC(domains=("other",)).bind(SCHEMA)
    with pytest.raises(ValueError, match="Loss `mcc` compares two views of a row: set `augment`"):
        a_run(losses=(Supervised(), MCC(consistency=1.0)))
    with pytest.raises(ValueError, match="needs domains, and the data declare none"):
        a_run(data=make_data(domain=""), losses=(Supervised(), MCC(domains=("mail",))))
    with pytest.raises(JobError, match="No loss trains the logits of task click, buy"):
        train(a_run(losses=(MCC(),)), tables={"log": make_log()}, baseline=False)
    assert config.from_dict(config.to_dict(a_run())) == a_run()
