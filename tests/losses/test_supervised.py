"""The supervised loss, against sums written out row by row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from unbraid.losses.supervised import Bound, Supervised
from unbraid.slots import Term
from unbraid.types import Batch, Output, Schema, Task

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SCHEMA = Schema(
    features=(),
    tasks=(Task("click"), Task("stars", kind="multiclass"), Task("dwell", kind="real")),
    domains=("(unknown)", "(missing)", "feed", "search"),
    classes={"stars": ("1", "3", "5")},
)
B = 40


@pytest.fixture
def data():
    """A batch with NaN or out-of-range labels wherever a label is not known, and float64 logits."""
    random = torch.Generator().manual_seed(1)
    observed = {task.name: torch.rand(B, generator=random) < 0.6 for task in SCHEMA.tasks}
    labels = {
        "click": torch.randint(2, (B,), generator=random).float(),
        "stars": torch.randint(3, (B,), generator=random),
        "dwell": torch.randn(B, generator=random),
    }
    for name, value in labels.items():
        value[~observed[name]] = -100_000 if value.dtype == torch.int64 else math.nan
    rate = 0.05 + 0.9 * torch.rand(B, generator=random, dtype=torch.float64)
    rate[~observed["click"]] = math.nan
    batch = Batch(
        features={}, labels=labels, observed=observed,
        domain=torch.randint(4, (B,), generator=random),
        weight=0.1 + torch.rand(B, generator=random),
        row=torch.arange(B), view=torch.zeros(B, dtype=torch.int8), pair=torch.full((B,), -1),
        meta={"sampling_rate.click": rate},
    )  # fmt: skip
    logits = {
        "click": 3 * torch.randn(B, generator=random, dtype=torch.float64),
        "stars": torch.randn(B, 3, generator=random, dtype=torch.float64),
        "dwell": torch.randn(B, generator=random, dtype=torch.float64),
    }
    return {name: z.requires_grad_() for name, z in logits.items()}, batch


def all_observed(batch):
    """The same batch with every label and rate known."""
    known = {name: torch.ones(B, dtype=torch.bool) for name in batch.observed}
    clean = {n: torch.where(batch.observed[n], v, torch.ones_like(v)) for n, v in batch.labels.items()}
    return replace(batch, observed=known, labels=clean, meta={k: v.nan_to_num(0.5) for k, v in batch.meta.items()})


def output(logits):
    return Output(logits, {}, torch.zeros(B, 1))


def row_loss(name, logits, batch, i):
    """Loss of one row and its derivative by the logits, from the definitions, in Python's floats."""
    y = batch.labels[name][i].item()
    if name == "dwell":
        s = logits[name][i].item()
        return (s - y) ** 2, [2 * (s - y)]
    if name == "stars":
        odds = [math.exp(s) for s in logits[name][i].tolist()]
        p = [o / sum(odds) for o in odds]
        return -math.log(p[y]), [q - (k == y) for k, q in enumerate(p)]
    rate = batch.meta["sampling_rate.click"][i].item() if batch.meta else 1.0
    p = 1 / (1 + math.exp(-logits[name][i].item()) * rate)  # odds e^s / rate
    return -(y * math.log(p) + (1 - y) * math.log(1 - p)), [p - y]


def expected(logits, batch, by):
    """objective -> (loss, task -> gradient), each group's weighted mean written out."""
    groups = {}
    for name in logits:
        for i in range(B):
            if batch.observed[name][i]:
                domain = SCHEMA.domains[int(batch.domain[i])]
                part = {"task": (name, name), "domain": (domain, name), "task@domain": (f"{name}@{domain}", name)}[by]
                groups.setdefault(part, []).append(i)
    found = {}
    for (objective, name), rows in groups.items():
        weight = [1.0 if batch.weight is None else batch.weight[i].item() for i in rows]
        value, grads = found.setdefault(objective, [0.0, {n: torch.zeros_like(z) for n, z in logits.items()}])
        for w, i in zip(weight, rows, strict=True):
            loss, slope = row_loss(name, logits, batch, i)
            found[objective][0] += w * loss / sum(weight)
            grads[name][i] = torch.tensor(slope).view_as(grads[name][i]) * w / sum(weight)
    return found


@pytest.mark.parametrize("by", ["task", "domain", "task@domain"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("complete", [True, False])
def test_value_and_gradient(data, by, weighted, sampled, complete):
    torch.set_default_dtype(torch.float64)
    try:
        logits, batch = data
        batch = all_observed(batch) if complete else batch
        batch = replace(batch, weight=batch.weight if weighted else None, meta=batch.meta if sampled else {})
        losses = Supervised(by=by).bind(SCHEMA)(output(logits), batch, 0)
        want = expected({name: z.detach() for name, z in logits.items()}, batch, by)
        assert set(losses) == set(want) and len(want) == {"task": 3, "domain": 4, "task@domain": 12}[by]
        for objective, loss in losses.items():
            assert loss.shape == () and loss.dtype == torch.float64
            torch.testing.assert_close(loss, torch.tensor(want[objective][0]), **EXACT)
            got = torch.autograd.grad(loss, list(logits.values()), retain_graph=True, allow_unused=True)
            for grad, name in zip(got, logits, strict=True):
                grad = torch.zeros_like(logits[name]) if grad is None else grad
                torch.testing.assert_close(grad, want[objective][1][name], **EXACT)
    finally:
        torch.set_default_dtype(torch.float32)


def test_by_hand():
    tasks = (Task("click"),)
    batch = Batch(
        {}, {"click": torch.tensor([1.0, 0.0, 1.0])}, {"click": torch.tensor([True, True, False])},
        torch.tensor([2, 3, 2]), torch.tensor([3.0, 1.0, 9.0]), torch.arange(3),
        torch.zeros(3, dtype=torch.int8), torch.full((3,), -1),
    )  # fmt: skip
    logits = {"click": torch.tensor([0.0, math.log(3), 50.0], dtype=torch.float64)}
    term = Supervised().bind(replace(SCHEMA, tasks=tasks))
    loss = term(Output(logits, {}, torch.zeros(3, 1)), batch, 0)["click"]
    assert loss.item() == pytest.approx((3 * math.log(2) + math.log(4)) / 4, rel=1e-12)


def test_labels_that_are_not_known_are_never_read(data):
    logits, batch = data
    other = {name: value.clone() for name, value in batch.labels.items()}
    for name, value in other.items():
        value[~batch.observed[name]] = 1
    moved = {name: z.detach().clone() for name, z in logits.items()}
    for name, z in moved.items():
        z[~batch.observed[name]] = math.inf
    term = Supervised().bind(SCHEMA)
    before, after = term(output(logits), batch, 0), term(output(moved), replace(batch, labels=other), 0)
    assert all(torch.equal(before[name], after[name]) for name in logits)


@pytest.mark.parametrize("by", ["task", "domain", "task@domain"])
def test_objectives_without_a_known_label_are_absent(data, by):
    logits, batch = data
    term = Supervised(by=by).bind(SCHEMA)
    nobody = {name: torch.zeros(B, dtype=torch.bool) for name in logits}
    assert term(output(logits), replace(batch, observed=nobody), 0) == {}
    feed = batch.domain == 2
    some = nobody | {"dwell": feed, "click": torch.arange(B) == int((batch.domain == 3).nonzero()[0])}
    batch = replace(batch, observed=some, labels={n: torch.zeros_like(v) for n, v in batch.labels.items()}, meta={})
    losses = term(output(logits), batch, 0)
    keys = {"task": ["click", "dwell"], "domain": ["search", "feed"], "task@domain": ["click@search", "dwell@feed"]}
    assert list(losses) == keys[by]
    sum(losses.values()).backward()
    assert logits["stars"].grad is None
    assert all(torch.isfinite(logits[name].grad).all() for name in ("click", "dwell"))


def test_rows_of_weight_zero_are_no_rows(data):
    logits, batch = data
    term = Supervised().bind(SCHEMA)
    assert term(output(logits), replace(batch, weight=torch.zeros(B)), 0) == {}
    half = torch.where(torch.arange(B) < 20, batch.weight, 0)
    kept = {name: value & (torch.arange(B) < 20) for name, value in batch.observed.items()}
    losses = term(output(logits), replace(batch, weight=half), 0)
    same = term(output(logits), replace(batch, observed=kept), 0)
    assert all(torch.equal(losses[name], same[name]) for name in losses)


def test_sampled_negatives_leave_the_logit_calibrated_to_the_full_log():
    """100 positives in 1,000 rows, a tenth of the negatives kept: the loss is stationary at the full log's odds."""
    labels = torch.cat([torch.ones(100), torch.zeros(90)])
    n = len(labels)
    batch = Batch(
        {}, {"click": labels}, {"click": torch.ones(n, dtype=torch.bool)}, torch.zeros(n, dtype=torch.int64), None,
        torch.arange(n), torch.zeros(n, dtype=torch.int8), torch.full((n,), -1),
        {"sampling_rate.click": torch.full((n,), 0.1, dtype=torch.float64)},
    )  # fmt: skip
    logit = torch.tensor(math.log(100 / 900), dtype=torch.float64, requires_grad=True)
    term = Supervised().bind(replace(SCHEMA, tasks=(Task("click"),)))
    term(Output({"click": logit.expand(n)}, {}, torch.zeros(n, 1)), batch, 0)["click"].backward()
    assert abs(logit.grad.item()) < 1e-10


def test_float32_stays_float32(data):
    logits, batch = data
    losses = Supervised().bind(SCHEMA)(output({name: z.float() for name, z in logits.items()}), batch, 0)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


def test_it_is_a_term_and_data():
    term = Supervised(by="domain").bind(SCHEMA)
    assert isinstance(term, Term) and term.needs == () == Supervised.needs
    assert term == Bound(SCHEMA, "domain") and Supervised() == Supervised(by="task")


def test_misspelt_key_is_refused():
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(Supervised)
    assert adapter.validate_python({"by": "task@domain"}) == Supervised(by="task@domain")
    for wrong in ({"bye": "task"}, {"by": "user"}):
        with pytest.raises(pydantic.ValidationError):
            adapter.validate_python(wrong)
