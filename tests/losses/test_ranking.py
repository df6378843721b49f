"""Ranking losses against loops over pairs and lists; invariances, contexts, the cap, heads of two logits, rare positives."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from toylog import make_data, make_log, make_run

from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.job import JobError, train
from unbraid.losses.ranking import Ranking, lists_of
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.towers.mlp import SharedBottom
from unbraid.types import Batch, Output, Schema, Task

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
FORMS: Any = ["pair", "list", "listce", "jrc"]
SCHEMA = Schema(
    (), (Task("click"), Task("dwell", kind="real"), Task("buy")), domains=("(unknown)", "(missing)", "feed", "search")
)
ONE = replace(SCHEMA, tasks=(Task("click"),))
B = 30


def make_batch(labels: Any, **changes: Any) -> Batch:
    """A batch of one task, all observed."""
    y = torch.as_tensor(labels, dtype=torch.float32)
    n = len(y)
    batch = Batch(
        {}, {"click": y}, {"click": torch.ones(n, dtype=torch.bool)}, torch.full((n,), 2), None, torch.arange(n),
        torch.zeros(n, dtype=torch.int8), torch.full((n,), -1),
    )  # fmt: skip
    return replace(batch, **changes)


def make_output(logits: Tensor, two: Tensor | None = None) -> Output:
    extras = {} if two is None else {"heads.two.click": two}
    return Output({"click": logits}, {}, torch.zeros(len(logits), 1), extras)


def value(form: Any, logits: Tensor, batch: Batch, step: int = 0, **options: Any) -> Tensor:
    """The loss; of jrc, ``logits`` are (B, 2)."""
    output = make_output(logits[:, 1] - logits[:, 0], logits) if form == "jrc" else make_output(logits)
    return Ranking(form=form, **options).bind(ONE)(output, batch, step)["click"]


def draw(form: str, seed: int = 0, n: int = B) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn((n, 2) if form == "jrc" else (n,), generator=g, dtype=torch.float64)).requires_grad_()


def random_batch(seed: int = 3) -> Batch:
    """Some rows unobserved with labels and rates that are NaN, weights (some 0), rates, users, requests, domains."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (B,), generator=g).float()
    observed = torch.rand(B, generator=g) < 0.8
    weight = (torch.rand(B, generator=g) + 0.5).double() * (torch.rand(B, generator=g) < 0.9)
    rate = (0.2 + 0.8 * torch.rand(B, generator=g)).double()
    rate[~observed] = math.nan
    y[~observed] = math.nan
    meta = {
        "sampling_rate.click": rate,
        "user": torch.randint(3, (B,), generator=g) * 10**15,  # 0: no user
        "request": torch.randint(-1, 2, (B,), generator=g),
    }
    domain = torch.randint(2, 4, (B,), generator=g)
    return make_batch(y, observed={"click": observed}, weight=weight, meta=meta, domain=domain)


def key_of(batch: Batch, within: str, i: int) -> Any:
    user, request = int(batch.meta["user"][i]), int(batch.meta["request"][i])
    if within == "request":
        return None if request < 0 else (user, request)
    return {"batch": 0, "user": user or None, "domain": int(batch.domain[i])}[within]


def in_loops(form: str, z: Tensor, batch: Batch, within: str) -> Tensor:
    """The docstring's formulas, row by row."""
    assert batch.weight is not None
    contexts: dict[Any, list[int]] = {}
    for i in range(B):
        if batch.observed["click"][i] and batch.weight[i] > 0 and key_of(batch, within, i) is not None:
            contexts.setdefault(key_of(batch, within, i), []).append(i)
    found = []
    for rows in contexts.values():
        ones = [i for i in rows if batch.labels["click"][i] == 1]
        zeros = [i for i in rows if batch.labels["click"][i] == 0]
        if not ones or not zeros:
            continue
        m = {
            i: float(batch.weight[i]) / (1 if i in ones else float(batch.meta["sampling_rate.click"][i])) for i in rows
        }
        if form == "pair":
            top = sum(m[i] * m[j] * -torch.log(1 / (1 + torch.exp(z[j] - z[i]))) for i in ones for j in zeros)
            found.append(top / sum(m[i] * m[j] for i in ones for j in zeros))
            continue
        counted = rows if form == "jrc" else ones
        top = torch.zeros((), dtype=torch.float64)
        for i in counted:
            if form == "jrc":
                score = {j: torch.exp(z[j, int(i in ones)]) for j in rows}
            elif form == "list":
                score = {j: torch.exp(z[j]) for j in rows}
            else:
                score = {j: 1 / (1 + torch.exp(-z[j])) for j in rows}
            top = top - m[i] * torch.log(score[i] / sum(m[j] * score[j] for j in rows))
        found.append(top / sum(m[i] for i in counted))
    return sum(found) / len(found)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------ the formulas
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("within", ["batch", "user", "request", "domain"])
def test_value_and_gradient_are_those_of_loops(form: Any, within: Any) -> None:
    for seed in range(4):
        z, batch = draw(form, seed), random_batch(seed)
        got = value(form, z, batch, within=within, weight=0.25)
        want = 0.25 * in_loops(form, z, batch, within)
        assert got.shape == () and got.dtype == torch.float64
        torch.testing.assert_close(got, want, **EXACT)
        mine, theirs = (torch.autograd.grad(x, z)[0] for x in (got, want))
        assert (theirs != 0).sum() >= 5
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_requests_without_users_are_their_own_contexts() -> None:
    z, batch = draw("pair"), random_batch()
    nobody = replace(batch, meta={name: x for name, x in batch.meta.items() if name != "user"})
    want = replace(batch, meta={**batch.meta, "user": torch.zeros(B, dtype=torch.int64)})
    torch.testing.assert_close(
        value("pair", z, nobody, within="request"), in_loops("pair", z, want, "request"), **EXACT
    )


def test_rows_without_a_user_or_a_request_are_in_no_context(tmp_path: Any) -> None:
    log = make_log().with_columns(user=None, request=None).with_columns(pl.col("user", "request").cast(pl.Int64))
    data = make_data(request="request", histories=(), events=(), fields=(), cache=str(tmp_path))
    encoded = Encoded(encode(data, tables={"log": log}))
    batch = encoded.batch(np.arange(50))
    for within in ("user", "request"):
        assert lists_of(Task("click"), batch, within) is None
    assert lists_of(Task("click"), batch, "batch") is not None


def test_pairs_of_tiny_weights_are_finite() -> None:
    batch = make_batch([1, 0, 1, 0, 0], weight=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert batch.weight is not None
    z = torch.tensor([0.1, -2.0, 1.0, 0.5, 3.0])
    tiny = replace(batch, weight=batch.weight * 1e-25)  # of a context the product is 0 in float32
    torch.testing.assert_close(value("pair", z, tiny), value("pair", z, batch))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_by_finite_differences(form: Any) -> None:
    z, batch = draw(form, n=6), make_batch([1, 0, 0, 1, 0, 0])
    assert torch.autograd.gradcheck(lambda x: value(form, x, batch), z, eps=1e-6, atol=1e-8)


def test_the_pairs_gradient_on_a_negative() -> None:
    z, y = draw("pair"), (torch.arange(B) % 3 == 0).float()
    (grad,) = torch.autograd.grad(value("pair", z, make_batch(y)), z)
    ones, zeros = z[y == 1].detach(), z[y == 0].detach()
    want = torch.stack([torch.sigmoid(s - ones).sum() for s in zeros]) / (len(ones) * len(zeros))
    torch.testing.assert_close(grad[y == 0], want, **EXACT)


def test_the_two_gradients_of_an_easy_negative() -> None:
    """A negative of probability .01: .0100 by the cross-entropy, .2462 against a positive that is scored .03."""
    z = torch.tensor([0.03, 0.01], dtype=torch.float64).logit().requires_grad_()
    batch = make_batch([1, 0])
    (pair,) = torch.autograd.grad(value("pair", z, batch), z)
    (plain,) = torch.autograd.grad(Supervised().bind(ONE)(make_output(z), batch, 0)["click"], z)
    assert pair[1].item() == pytest.approx(0.2462, abs=5e-5) and 2 * plain[1].item() == pytest.approx(0.0100, abs=5e-5)


@pytest.mark.parametrize("form", ["pair", "list"])
def test_a_constant_changes_nothing(form: Any) -> None:
    z, batch = draw(form), random_batch()
    shift = torch.where(batch.domain == 2, 5.0, -3.0).double()
    torch.testing.assert_close(value(form, z + 7, batch), value(form, z, batch), **EXACT)
    torch.testing.assert_close(
        value(form, z + shift, batch, within="domain"), value(form, z, batch, within="domain"), **EXACT
    )


def test_of_jrc_a_constant_of_each_side_changes_nothing_and_listce_is_not_invariant() -> None:
    z, batch = draw("jrc"), random_batch()
    torch.testing.assert_close(value("jrc", z + torch.tensor([4.0, -2.0]), batch), value("jrc", z, batch), **EXACT)
    s = draw("listce")
    assert abs((value("listce", s + 1, batch) - value("listce", s, batch)).item()) > 0.01


def test_swapped_labels_flip_the_pairs() -> None:
    z, y = draw("pair"), torch.arange(B) % 3 == 0
    torch.testing.assert_close(value("pair", z, make_batch(~y)), value("pair", -z, make_batch(y)), **EXACT)


def test_equal_logits() -> None:
    zeros, batch = torch.zeros(10, dtype=torch.float64), make_batch([1] * 3 + [0] * 7)
    assert value("pair", zeros, batch).item() == pytest.approx(math.log(2), abs=1e-12)
    assert value("list", zeros, batch).item() == pytest.approx(math.log(10), abs=1e-12)
    assert value("listce", zeros + 1, batch).item() == pytest.approx(math.log(10), abs=1e-12)
    assert value("jrc", torch.zeros(10, 2), batch).item() == pytest.approx(math.log(10), abs=1e-6)


def test_listce_agrees_with_the_cross_entropy() -> None:
    """It is stationary where sigmoid(z) is the rate of positives: two places, of rates .2 and .6."""
    y = torch.tensor([1] * 2 + [0] * 8 + [1] * 6 + [0] * 4)
    for form, small in (("listce", True), ("list", False)):
        at = torch.tensor([0.2, 0.6], dtype=torch.float64).logit().requires_grad_()
        (grad,) = torch.autograd.grad(value(form, at.repeat_interleave(10), make_batch(y)), at)
        assert (grad.abs().max().item() < 1e-12) == small


def test_a_sampled_log_ranks_as_the_full_one() -> None:
    """A negative kept at rate 1/4 stands for four."""
    z = torch.tensor([0.3, 1.0, -2.0, 0.5], dtype=torch.float64)
    kept = make_batch([1, 0, 0, 0], meta={"sampling_rate.click": torch.tensor([0.25, 0.25, 1.0, 0.5])})
    full = torch.tensor([0, 1, 1, 1, 1, 2, 3, 3])
    for form in FORMS:
        s = torch.stack([-z, z * 2], 1) if form == "jrc" else z
        want = value(form, s[full], make_batch([1, *[0] * 7]))
        torch.testing.assert_close(value(form, s, kept), want, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_logits_are_finite(form: Any) -> None:
    z = torch.tensor([-1e4, 1e4, 0.0, 88.0])
    z = (torch.stack([-z, z], 1) if form == "jrc" else z).requires_grad_()
    loss = value(form, z, make_batch([1, 0, 1, 0]))
    loss.backward()
    assert torch.isfinite(loss) and loss.dtype == torch.float32 and torch.isfinite(z.grad).all()


# ---------------------------------------------------------------------------------------------------------- what is absent
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
def test_without_both_classes_there_is_no_objective(form: Any, labels: list[int]) -> None:
    n = len(labels)
    output = make_output(torch.zeros(n), torch.zeros(n, 2))
    assert Ranking(form=form).bind(ONE)(output, make_batch(labels), 0) == {}
    hidden = make_batch([1, 0, 1], observed={"click": torch.tensor([True, False, True])})
    assert Ranking(form=form).bind(ONE)(make_output(torch.zeros(3), torch.zeros(3, 2)), hidden, 0) == {}
    unweighted = make_batch([1, 0, 1], weight=torch.tensor([1.0, 0.0, 1.0]))
    assert Ranking(form=form).bind(ONE)(make_output(torch.zeros(3), torch.zeros(3, 2)), unweighted, 0) == {}


@pytest.mark.parametrize("form", FORMS)
def test_contexts_of_one_class_contribute_nothing(form: Any) -> None:
    z = draw(form, n=7)
    batch = make_batch([1, 1, 0, 0, 1, 0, 1], meta={"user": torch.tensor([7, 7, 8, 8, 9, 9, 10])})
    loss = value(form, z, batch, within="user")
    torch.testing.assert_close(loss, value(form, z[4:6], make_batch([1, 0])), **EXACT)
    (grad,) = torch.autograd.grad(loss, z)
    assert not grad[[0, 1, 2, 3, 6]].any() and grad[4:6].any()


def test_only_binary_tasks_and_those_that_are_asked_for() -> None:
    ones = torch.ones(4, dtype=torch.bool)
    labels = {"click": torch.tensor([1.0, 0, 0, 0]), "dwell": torch.randn(4), "buy": torch.tensor([0, 0, 1.0, 1])}
    batch = replace(make_batch([1, 0, 0, 0]), labels=labels, observed=dict.fromkeys(labels, ones))
    output = Output({name: torch.zeros(4) for name in labels}, {}, torch.zeros(4, 1))
    assert list(Ranking().bind(SCHEMA)(output, batch, 0)) == ["click", "buy"]
    bound = Ranking(tasks=("buy",)).bind(SCHEMA)
    assert list(bound(output, batch, 0)) == ["buy"] == list(bound.objectives)
    assert Ranking(form="jrc", tasks=("buy",)).bind(SCHEMA).needs == ("heads.two.buy",)
    assert bound.needs == () == bound.reads and Ranking(within="user").bind(SCHEMA).reads == ("user",)


@pytest.mark.parametrize("tasks", [("dwell",), ("click", "nothing")])
def test_tasks_that_cannot_be_ranked(tasks: Any) -> None:
    with pytest.raises(ValueError, match=r"should be among the binary ones, \['click', 'buy'\]"):
        Ranking(tasks=tasks).bind(SCHEMA)
    with pytest.raises(ValueError, match="binary ones, "):
        Ranking().bind(replace(SCHEMA, tasks=(Task("dwell", kind="real"),)))


@pytest.mark.parametrize(("name", "wrong"), [("weight", 0.0), ("weight", -1.0), ("weight", math.nan), ("pairs", 0)])
def test_wrong_parameters(name: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"Parameter `{name}` should be"):
        Ranking(**{name: wrong})


# ----------------------------------------------------------------------------------------------------------------- the cap
def test_drawn_pairs_are_a_function_of_step_and_task() -> None:
    z, batch = draw("pair"), random_batch()
    first = value("pair", z, batch, step=5, pairs=4)
    torch.manual_seed(123)
    assert torch.equal(first, value("pair", z, batch, step=5, pairs=4))
    assert not torch.equal(first, value("pair", z, batch, step=6, pairs=4))
    two = replace(ONE, tasks=(Task("click"), Task("buy")))
    both = replace(
        batch, labels=dict.fromkeys(("click", "buy"), batch.labels["click"]),
        observed=dict.fromkeys(("click", "buy"), batch.observed["click"]), meta={},
    )  # fmt: skip
    output = Output(dict.fromkeys(("click", "buy"), z), {}, torch.zeros(B, 1))
    losses = Ranking(pairs=4).bind(two)(output, both, 5)
    assert not torch.equal(losses["click"], losses["buy"])


@pytest.mark.parametrize("within", ["batch", "user", "domain"])
def test_drawn_pairs_are_unbiased(within: Any) -> None:
    z, batch = draw("pair"), random_batch()
    batch = replace(batch, weight=batch.weight * torch.linspace(0.1, 5, B))  # type: ignore[operator]
    exact = value("pair", z, batch, within=within)
    (slope,) = torch.autograd.grad(exact, z)
    steps, found, slopes = 1000, [], torch.zeros_like(z)
    for step in range(steps):
        loss = value("pair", z, batch, step=step, within=within, pairs=3)
        slopes += torch.autograd.grad(loss, z)[0] / steps
        found.append(loss.item())
    spread = float(np.std(found))
    assert spread > 0.05, "it should have drawn"
    assert abs(np.mean(found) - exact.item()) < 4 * spread / math.sqrt(steps)
    assert (slopes - slope).abs().max() < 0.02 < slope.abs().max()


def test_below_the_cap_nothing_is_drawn() -> None:
    z, batch = draw("pair"), make_batch([1, 0] * 15)
    whole = value("pair", z, batch)
    assert torch.equal(whole, value("pair", z, batch, step=9, pairs=225))
    assert not torch.equal(whole, value("pair", z, batch, step=9, pairs=224))


# ------------------------------------------------------------------------------------------------------------- in a model
@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    tasks = (Task("click"), Task("buy"), Task("spend", kind="real"), Task("size", kind="multiclass"))
    return Encoded(
        encode(make_data(tasks=tasks, cache=str(tmp_path_factory.mktemp("cache"))), tables={"log": make_log()})
    )


@pytest.mark.parametrize("by", ["task", "domain"])
def test_heads_of_two_logits(encoded: Encoded, by: Any) -> None:
    torch.manual_seed(0)
    model = Model(encoded.schema, SharedBottom(), Views(width=4), heads=Heads(by=by, two=True))
    assert model.gives == {"heads.two.click", "heads.two.buy"}
    batch = encoded.batch(np.arange(100, 140))
    output = model(batch)
    domains = len(encoded.schema.domains)
    for task in ("click", "buy"):
        both = output.extras[f"heads.two.{task}"]
        assert both.shape == (40, 2) and output.logits[task].shape == (40,)
        assert torch.equal(output.logits[task], both[:, 1] - both[:, 0])
        heads: Any = model.heads[f"task/{task}"]
        assert len(heads.linears) == (domains if by == "domain" else 1)
        i, code = 5, int(batch.domain[5]) if by == "domain" else 0
        torch.testing.assert_close(both[i], heads.linears[code](output.hidden[task][i]), rtol=1e-5, atol=1e-6)
    assert output.logits["size"].shape == (40, 3) and output.logits["spend"].shape == (40,)
    assert not any(name.startswith("heads") for name in Model(encoded.schema, SharedBottom(), Views(width=4)).gives)


@pytest.mark.parametrize("by", ["task", "domain"])
def test_with_two_logits_an_absent_task_does_not_move(encoded: Encoded, by: Any) -> None:
    torch.manual_seed(0)
    model = Model(encoded.schema, SharedBottom(), Views(width=4), heads=Heads(by=by, two=True))
    terms = [term.bind(encoded.schema) for term in (Supervised(weight=0.5), Ranking(form="jrc", weight=0.5))]
    step = Joint(weight_decay=0.1, table_weight_decay=0.1).build(model, steps=100, weights={})

    def go(batch: Batch) -> None:
        output = model(batch)
        first, second = (dict(term(output, batch, 0)) for term in terms)
        step({name: loss + second.get(name, 0) for name, loss in first.items()}, output)

    for at in range(10):
        go(encoded.batch(np.arange(20 * at, 20 * at + 40)))
    batch = encoded.batch(np.arange(100, 140))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    go(replace(batch, observed={**batch.observed, "buy": torch.zeros(40, dtype=torch.bool)}))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not any("heads.task/buy" in name or "task/buy" in name for name in moved)
    assert any("heads.task/click" in name for name in moved)


def run_of(*losses: Any, two: bool = False, **changes: Any) -> Any:
    return make_run(model=ModelChoice(tables=Views(width=4), heads=Heads(two=two)), losses=losses, **changes)


def test_two_logits_and_jrc_need_each_other() -> None:
    with pytest.raises(JobError, match="needs heads with two logits: set `model.heads.two` to true"):
        train(run_of(Supervised(), Ranking(form="jrc")), tables={"log": make_log()}, baseline=False)
    with pytest.raises(JobError, match="Heads with two logits .* are for the loss `ranking` of form `jrc`"):
        train(run_of(Supervised(), Ranking(), two=True), tables={"log": make_log()}, baseline=False)


@pytest.mark.parametrize(("within", "role"), [("user", "user"), ("request", "request"), ("domain", "domain")])
def test_contexts_that_the_data_lack_are_refused(within: Any, role: str) -> None:
    data = make_data(
        user="", domain="", histories=(), events=(), fields=(), split=make_data().split,
    )  # fmt: skip
    with pytest.raises((JobError, ValueError), match=f"and the data declare none: set `data.{role}`"):
        train(run_of(Supervised(), Ranking(within=within), data=data), tables={"log": make_log()}, baseline=False)
    if within != "domain":
        with pytest.raises(ValueError, match=f"needs `data.{role}`"):
            value("pair", torch.zeros(2), make_batch([1, 0]), within=within)


@pytest.mark.parametrize(
    ("form", "within"), [("pair", "batch"), ("list", "user"), ("listce", "domain"), ("jrc", "request")]
)
def test_a_run_adds_it_to_the_tasks_own_loss(form: Any, within: Any) -> None:
    data = make_data(request="shop")
    losses = (Supervised(weight=0.9), Ranking(form=form, within=within, weight=0.1))
    run = run_of(*losses, two=form == "jrc", data=data)
    result = train(run, tables={"log": make_log()}, baseline=False)
    alone = train(
        replace(run_of(Supervised(weight=0.9), data=data), seed=run.seed), tables={"log": make_log()}, baseline=False
    )
    heads = [r.bundle.model.state_dict()["heads.task/click.linears.0.weight"] for r in (result, alone)]
    assert heads[0].isfinite().all() and not torch.equal(heads[0][-1], heads[1][-1]), "it moved the model"
    assert len(bound_terms(run, result.bundle.model.schema, result.bundle.model)) == 2


@pytest.mark.parametrize("form", FORMS)
def test_ranking_alone_is_refused(form: Any) -> None:
    with pytest.raises(JobError, match="Task click, buy has the loss `ranking` alone, .* supervised, focal or esmm"):
        train(run_of(Ranking(form=form), two=form == "jrc"), tables={"log": make_log()}, baseline=False)


def test_resumed_runs_draw_the_same_pairs(tmp_path: Any) -> None:
    training = replace(make_run().training, checkpoint_steps=7, checkpoint_seconds=0)
    run = run_of(Supervised(weight=0.5), Ranking(weight=0.5, pairs=20), training=training)
    whole = train(run, tables={"log": make_log()}, baseline=False).bundle.model.state_dict()

    class Interrupt(Exception):
        pass

    from unbraid.train import Watcher

    class Stop(Watcher):
        def evaluated(self, step: int, *rest: Any) -> None:
            if step == 10:
                raise Interrupt

    with pytest.raises(Interrupt):
        train(run, tmp_path / "run", tables={"log": make_log()}, baseline=False, watcher=Stop())
    again = train(
        run, tmp_path / "run", tables={"log": make_log()}, baseline=False, resume=True
    ).bundle.model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


# -------------------------------------------------------------------------------------------------------------- behaviour
def rare(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows with about 1 % positives, which ten inputs tell apart."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 10, generator=g)
    logit = 1.2 * x[:, 0] * x[:, 1] + x[:, 2] - x[:, 3].abs() - 5.1
    return x, (torch.rand(rows, generator=g) < logit.sigmoid()).float()


def trained(terms: Any, seed: int, epochs: int) -> tuple[list[float], float, float]:
    """Mean |gradient| on negatives by epoch, validation cross-entropy of the best epoch, sum of p / sum of y there."""
    x, y = rare(40_000, seed)
    vx, vy = rare(40_000, seed + 1000)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    push, found = [], []
    for epoch in range(epochs):
        total, count = 0.0, 0
        for at, part in enumerate(torch.randperm(len(x)).split(1000)):
            batch, z = make_batch(y[part]), net(x[part]).squeeze(1)
            losses = [loss for term in terms for loss in term(make_output(z), batch, 40 * epoch + at).values()]
            (slope,) = torch.autograd.grad(sum(losses), z, retain_graph=True)
            total, count = total + float(slope[y[part] == 0].abs().sum()), count + int((y[part] == 0).sum())
            optimizer.zero_grad()
            sum(losses).backward()  # type: ignore[union-attr]
            optimizer.step()
        push.append(total / count)
        with torch.no_grad():
            z = net(vx).squeeze(1)
            found.append(
                (float(nn.functional.binary_cross_entropy_with_logits(z, vy)), float(z.sigmoid().sum() / vy.sum()))
            )
    return push, *min(found)


PLAIN = [Supervised().bind(ONE)]
PAIR = [Supervised(weight=0.5).bind(ONE), Ranking(weight=0.5).bind(ONE)]


def test_with_rare_positives_negatives_are_pushed_harder() -> None:
    """Mean |gradient| on negatives in the first epoch; and the cross-entropy's falls behind further."""
    plain, pair = (trained(terms, seed=0, epochs=2)[0] for terms in (PLAIN, PAIR))
    assert pair[0] > 1.2 * plain[0] and pair[1] > 1.5 * plain[1]


@pytest.mark.slow
def test_with_rare_positives_on_more_seeds() -> None:
    """Prints what the page reports: validation cross-entropy and calibration of both."""
    assert 0.007 < float(rare(40_000, 0)[1].mean()) < 0.013
    for seed, epochs in ((seed, epochs) for epochs in (10, 25) for seed in range(3)):
        (a, bce_a, ratio_a), (b, bce_b, ratio_b) = trained(PLAIN, seed, epochs), trained(PAIR, seed, epochs)
        print(
            f"{epochs}, {seed}: push {a[0]:.2e} {b[0]:.2e} bce {bce_a:.4f} {bce_b:.4f} p/y {ratio_a:.3f} {ratio_b:.3f}"
        )
        assert b[0] > a[0] and bce_b < bce_a
