"""The entire-space loss, against probabilities of the joint event written out row by row."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.citations import citations
from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Split
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.job import JobError, train
from unbraid.losses.esmm import ESMM
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.predictor import Predictor
from unbraid.slots import Term
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Batch, Feature, Output, Schema, Task

EXACT = {"rtol": 1e-10, "atol": 1e-10}
CHAIN = ("show", "click", "buy")
TASKS = (
    Task("show"),
    Task("click", given="show", weight=2.0),
    Task("other"),
    Task("buy", given="click", weight=0.5),
    Task("dwell", kind="real", given="click"),
    Task("stars", kind="multiclass", given="show"),
)
SCHEMA = Schema((), TASKS, domains=("(unknown)", "(missing)", "feed", "search"), classes={"stars": ("1", "3", "5")})
PAIR = replace(SCHEMA, tasks=(Task("click"), Task("buy", given="click")))
PATTERNS = list(itertools.product((0, 1, None), repeat=3))  # of show, click and buy, as a log has them


def make_batch(labels, observed, domain=None, weight=None, meta=None):
    n = len(next(iter(observed.values())))
    where = torch.full((n,), 2) if domain is None else domain
    places = torch.arange(n), torch.zeros(n, dtype=torch.int8), torch.full((n,), -1)
    return Batch({}, labels, observed, where, weight, *places, meta or {})


def pair_batch(clicks, buys, **more):
    """A batch of (click, buy) as a log has them; what is not observed is NaN."""
    seen = {"click": [c is not None for c in clicks]}
    seen["buy"] = [c == 1 and b is not None for c, b in zip(clicks, buys, strict=True)]
    raw = {"click": clicks, "buy": buys}
    labels = {n: torch.tensor([float(v) if k else math.nan for v, k in zip(raw[n], seen[n], strict=True)]) for n in raw}
    return make_batch(labels, {n: torch.tensor(v) for n, v in seen.items()}, **more)


def output(logits):
    return Output(logits, {}, torch.zeros(1, 1))


def pair_output(click, buy):
    return output({"click": torch.tensor(click), "buy": torch.tensor(buy)})


@pytest.fixture
def data():
    """Every pattern of the chain's labels four times, NaN where a label is not observed, and float64 logits."""
    random = torch.Generator().manual_seed(3)
    rows = PATTERNS * 4
    n = len(rows)
    chain = dict(zip(CHAIN, zip(*rows, strict=True), strict=True))
    seen = {"show": torch.tensor([s is not None for s, _, _ in rows])}
    seen["click"] = torch.tensor([s == 1 and c is not None for s, c, _ in rows])
    seen["buy"] = torch.tensor([s == 1 and c == 1 and b is not None for s, c, b in rows])
    seen["other"] = torch.rand(n, generator=random) < 0.6
    seen["dwell"] = torch.tensor([s == 1 and c == 1 for s, c, _ in rows]) & (torch.rand(n, generator=random) < 0.6)
    seen["stars"] = torch.tensor([s == 1 for s, _, _ in rows]) & (torch.rand(n, generator=random) < 0.6)
    labels = {name: torch.tensor([math.nan if v is None else float(v) for v in chain[name]]) for name in CHAIN}
    labels["other"] = torch.randint(2, (n,), generator=random).float()
    labels["dwell"] = torch.randn(n, generator=random)
    labels["stars"] = torch.randint(3, (n,), generator=random)
    for name in CHAIN:
        labels[name][~seen[name]] = math.nan
    rates = {f"sampling_rate.{name}": 0.05 + 0.9 * torch.rand(n, generator=random) for name in (*CHAIN, "other")}
    weight = 0.1 + torch.rand(n, generator=random)
    batch = make_batch(labels, seen, torch.randint(2, 4, (n,), generator=random), weight, rates)
    logits = {t.name: 3 * torch.randn(n, *([3] * (t.kind == "multiclass")), generator=random, dtype=torch.float64)
              for t in TASKS}  # fmt: skip
    return rows, {name: z.requires_grad_() for name, z in logits.items()}, batch


def joint_of(labels):
    """Whether all of these happened; None if that cannot be known."""
    for label in labels:
        if label is None:
            return None
        if label == 0:
            return 0
    return 1


def probability(name, logits, batch, i):
    """Of the joint event in the kept log, from plain probabilities: a share of the rows without it was dropped."""
    p = torch.ones((), dtype=torch.float64)
    for link in CHAIN[: CHAIN.index(name) + 1]:
        p = p / (1 + torch.exp(-logits[link][i]))
        rate = batch.meta[f"sampling_rate.{link}"][i].double() if batch.meta else 1.0
        p = p / (p + rate * (1 - p))
    return p


def row_loss(rows, name, logits, batch, i):
    """A row's loss from the definitions, or None where it does not count."""
    if name in CHAIN:
        happened = joint_of(rows[i][: CHAIN.index(name) + 1])
        if happened is None:
            return None
        p = probability(name, logits, batch, i)
        return -torch.log(p if happened else 1 - p)
    if not batch.observed[name][i]:
        return None
    s, y = logits[name][i], batch.labels[name][i]
    if name == "dwell":
        return (s - y) ** 2
    if name == "stars":
        return -torch.log(torch.exp(s[y]) / torch.exp(s).sum())
    rate = batch.meta["sampling_rate.other"][i].double() if batch.meta else 1.0
    p = 1 / (1 + torch.exp(-s) * rate)
    return -torch.log(p if y == 1 else 1 - p)


def expected(rows, logits, batch, by):
    """objective -> loss, each group's weighted mean written out."""
    groups = {}
    for task in TASKS:
        for i in range(len(rows)):
            loss = row_loss(rows, task.name, logits, batch, i)
            if loss is not None:
                domain = SCHEMA.domains[int(batch.domain[i])]
                key = {"task": task.name, "domain": domain, "task@domain": f"{task.name}@{domain}"}[by]
                weight = 1.0 if batch.weight is None else batch.weight[i].item()
                groups.setdefault(key, {}).setdefault(task, []).append((weight, loss))
    return {
        key: sum(
            (task.weight if by == "domain" else 1) * sum(w * loss for w, loss in pairs) / sum(w for w, _ in pairs)
            for task, pairs in parts.items()
        )
        for key, parts in groups.items()
    }


@pytest.mark.parametrize("by", ["task", "domain", "task@domain"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
def test_value_and_gradient(data, by, weighted, sampled):
    rows, logits, batch = data
    batch = replace(batch, weight=batch.weight.double() if weighted else None, meta=batch.meta if sampled else {})
    double = {name: value.double() if value.is_floating_point() else value for name, value in batch.labels.items()}
    meta = {name: rate.double() for name, rate in batch.meta.items()}
    batch = replace(batch, labels=double, meta=meta)
    losses = ESMM(by=by).bind(SCHEMA)(output(logits), batch, 0)
    want = expected(rows, logits, batch, by)
    assert set(losses) == set(want) and len(want) == {"task": 6, "domain": 2, "task@domain": 12}[by]
    for objective, loss in losses.items():
        assert loss.shape == () and loss.dtype == torch.float64
        torch.testing.assert_close(loss, want[objective], **EXACT)
        got = torch.autograd.grad(loss, list(logits.values()), retain_graph=True, allow_unused=True)
        ours = torch.autograd.grad(want[objective], list(logits.values()), retain_graph=True, allow_unused=True)
        for a, b, z in zip(got, ours, logits.values(), strict=True):
            assert (a is None) == (b is None)
            torch.testing.assert_close(
                torch.zeros_like(z) if a is None else a, torch.zeros_like(z) if b is None else b, **EXACT
            )


def test_by_hand():
    batch = pair_batch([0, 1, 1, 1, None, 0], [None, 0, 1, None, 1, 1])
    log3 = math.log(3)
    logits = [0.0, log3, -log3, 50.0, 50.0, log3], [0.0, log3, log3, 50.0, 50.0, 0.0]
    losses = ESMM().bind(PAIR)(pair_output(*logits), batch, 0)
    # p(joint) 1/4, 9/16, 3/16, -, -, 3/8 and labels 0, 0, 1, unknown, unknown, 0 (a buy without a click)
    buy = -(math.log(3 / 4) + math.log(7 / 16) + math.log(3 / 16) + math.log(5 / 8)) / 4
    click = (math.log(2) - math.log(3 / 4) - math.log(1 / 4) + 0 - math.log(1 / 4)) / 5
    assert losses["buy"].item() == pytest.approx(buy, rel=1e-6)
    assert losses["click"].item() == pytest.approx(click, rel=1e-6)


def test_labels_and_logits_that_do_not_count_are_never_read(data):
    rows, logits, batch = data
    term = ESMM().bind(SCHEMA)
    flipped = {
        name: torch.where(batch.observed[name], value, torch.ones_like(value)) for name, value in batch.labels.items()
    }
    moved = {name: z.detach().clone() for name, z in logits.items()}
    unknown = {name: [joint_of(row[: i + 1]) is None for row in rows] for i, name in enumerate(CHAIN)}
    moved["buy"][torch.tensor(unknown["buy"])] = math.inf
    for name in ("other", "dwell", "stars"):
        moved[name][~batch.observed[name]] = math.inf
    before, after = term(output(logits), batch, 0), term(output(moved), replace(batch, labels=flipped), 0)
    assert all(torch.equal(before[name], after[name]) for name in logits)


def test_a_child_that_the_batch_shows_without_its_parent_is_a_joint_zero():
    """Encoded batches hide it; a batch that does not means the same."""
    batch = pair_batch([0, 0], [None, None])
    shown = replace(
        batch, labels=batch.labels | {"buy": torch.ones(2)}, observed=dict.fromkeys(("click", "buy"), torch.ones(2) > 0)
    )
    term, said = ESMM().bind(PAIR), pair_output([0.3, -1.0], [0.5, 2.0])
    assert torch.equal(term(said, shown, 0)["buy"], term(said, batch, 0)["buy"])


# ------------------------------------------------------------------------------------------------------------- gradients
def test_the_childs_loss_teaches_its_parents_and_no_child():
    """Where there was no click, both factors of the joint fall; where there was a conversion, both rise."""
    click, buy = (torch.tensor([0.4, 0.4, 0.4], dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses = ESMM().bind(PAIR)(output({"click": click, "buy": buy}), pair_batch([0, 1, 1], [None, 0, 1]), 0)
    parent, child = torch.autograd.grad(losses["buy"], [click, buy], retain_graph=True)
    assert all(g[0] > 0 and g[1] > 0 and g[2] < 0 for g in (parent, child))
    p = 1 / (1 + math.exp(-0.4))
    assert child[0].item() == pytest.approx(p * p * (1 - p) / (1 - p * p) / 3, rel=1e-12)  # -d log(1 - p q) / d s
    assert child[2].item() == pytest.approx(-(1 - p) / 3, rel=1e-12)
    alone = torch.autograd.grad(losses["click"], [click, buy], allow_unused=True)
    assert alone[0] is not None and alone[1] is None


def test_a_certain_parent_leaves_the_plain_loss_of_the_child():
    random = torch.Generator().manual_seed(0)
    n = 50
    batch = pair_batch([1] * n, torch.randint(2, (n,), generator=random).tolist())
    buy = (3 * torch.randn(n, generator=random, dtype=torch.float64)).requires_grad_()
    said = output({"click": torch.full((n,), 80.0, dtype=torch.float64), "buy": buy})
    joint, plain = ESMM().bind(PAIR)(said, batch, 0)["buy"], Supervised().bind(PAIR)(said, batch, 0)["buy"]
    torch.testing.assert_close(joint, plain, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(loss, buy)[0] for loss in (joint, plain)), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [20.0, 80.0, 200.0, 1e4])
def test_large_logits_stay_finite_and_right(size, dtype):
    signs = list(itertools.product((-size, size), repeat=3))
    n = len(signs)
    logits = {
        name: torch.tensor(z, dtype=dtype, requires_grad=True)
        for name, z in zip(CHAIN, zip(*signs, strict=True), strict=True)
    }
    rest = {name: torch.zeros(n, *([3] * (name == "stars")), dtype=dtype) for name in ("other", "dwell", "stars")}
    for happened in (0, 1):
        nobody = torch.zeros(n, dtype=torch.bool)
        seen = {t.name: ~nobody if t.name in CHAIN else nobody for t in TASKS}
        labels = {t.name: torch.ones(n) for t in TASKS} | {"buy": torch.full((n,), float(happened))}
        for i, row in enumerate(signs):
            batch = make_batch(labels, seen).select(torch.tensor([i]))
            said = output({name: z[[i]] for name, z in (logits | rest).items()})
            loss = ESMM().bind(SCHEMA)(said, batch, 0)["buy"]
            grads = torch.autograd.grad(loss, list(logits.values()))
            assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads)
            low = sum(z < 0 for z in row)  # -log p is about size * low; -log(1 - p) is size - log(3) or next to nothing
            want = size * low if happened else size - math.log(3) if low == 0 else 0.0
            assert loss.item() == pytest.approx(want, rel=1e-6, abs=3 * math.exp(-size) + 1e-30)


def test_tiny_probabilities_keep_their_digits_in_float32():
    """p = 1e-12: the loss of a joint zero is p, and its slope is p as well."""
    z = math.log(1e-6)
    click, buy = (torch.tensor([z], requires_grad=True) for _ in range(2))
    loss = ESMM().bind(PAIR)(output({"click": click, "buy": buy}), pair_batch([0], [None]), 0)["buy"]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1e-12, rel=1e-4)
    assert all(g.item() == pytest.approx(1e-12, rel=1e-4) for g in torch.autograd.grad(loss, [click, buy]))


# -------------------------------------------------------------------------------------------------------------- presence
def test_objectives_without_a_known_joint_are_absent():
    term = ESMM().bind(PAIR)
    said = pair_output([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert term(said, pair_batch([None] * 3, [1, 0, None]), 0) == {}
    assert set(term(said, pair_batch([1, 1, None], [None] * 3), 0)) == {"click"}
    assert set(term(said, pair_batch([1, 0, None], [None] * 3), 0)) == {"click", "buy"}
    weight = torch.tensor([1.0, 0.0, 1.0])
    assert set(term(said, pair_batch([1, 0, None], [None] * 3, weight=weight), 0)) == {"click"}


def test_only_conditional_binary_tasks_differ_from_supervised(data):
    _, logits, batch = data
    ours, theirs = (kind().bind(SCHEMA)(output(logits), batch, 0) for kind in (ESMM, Supervised))
    assert list(ours) == list(theirs)
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert same == {"show", "other", "dwell", "stars"}


@pytest.mark.parametrize("sampled", ["click", "buy"])
def test_a_log_that_kept_few_negatives_of_a_task_leaves_its_logits_right(sampled):
    """1,000 rows, 200 clicks, 50 of them bought; a tenth of the rows without the sampled event was kept."""
    kept = {"click": (80, 150, 50), "buy": (80, 15, 50)}[sampled]  # no click; click alone; both
    clicks = [c for c, n in zip((0, 1, 1), kept, strict=True) for _ in range(n)]
    buys = [b for b, n in zip((None, 0, 1), kept, strict=True) for _ in range(n)]
    batch = pair_batch(
        clicks, buys, meta={f"sampling_rate.{sampled}": torch.full((sum(kept),), 0.1, dtype=torch.float64)}
    )
    click, buy = (torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True) for p in (0.2, 0.25))
    said = output({"click": click.expand(sum(kept)), "buy": buy.expand(sum(kept))})
    losses = ESMM().bind(PAIR)(said, batch, 0)
    for loss in losses.values() if sampled == "click" else [losses["buy"]]:  # clicks were not drawn by their own label
        grads = torch.autograd.grad(loss, [click, buy], retain_graph=True, allow_unused=True)
        assert all(g is None or abs(g.item()) < 1e-10 for g in grads)


def test_labels_missing_after_a_click_pull_the_child_down_by_a_known_factor():
    """c = 0.2, q = 0.25, and of 200 clicks half have no label: the minimum is at q (1 - m) / (1 - m c)."""
    clicks, buys = [0] * 800 + [1] * 200, [None] * 900 + [0] * 75 + [1] * 25
    wrong = 0.25 * 0.5 / (1 - 0.5 * 0.2)
    buy = torch.tensor(math.log(wrong / (1 - wrong)), dtype=torch.float64, requires_grad=True)
    said = output({"click": torch.full((1000,), math.log(0.25), dtype=torch.float64), "buy": buy.expand(1000)})
    ESMM().bind(PAIR)(said, pair_batch(clicks, buys), 0)["buy"].backward()
    assert abs(buy.grad.item()) < 1e-10


# ---------------------------------------------------------------------------------------------------------------- config
def test_it_is_a_term_and_data():
    term = ESMM(by="domain", orphans="negative").bind(SCHEMA)
    assert isinstance(term, Term) and term.needs == () == ESMM.needs
    assert term == ESMM("domain", "negative").bind(SCHEMA) != ESMM("domain").bind(SCHEMA)


def test_without_a_conditional_binary_task_it_says_that_supervised_is_the_same():
    for tasks in ((Task("click"),), (Task("click"), Task("spend", kind="real", given="click"))):
        with pytest.raises(ValueError, match="binary task with `given`.*loss `supervised`"):
            ESMM().bind(replace(SCHEMA, tasks=tasks))
    with pytest.raises(JobError, match="binary task with `given`"):
        train(make_run(losses=(ESMM(),)), tables={"log": make_log()})


def test_in_a_run_file():
    plain = config.to_dict(make_run())
    for losses in (
        [{"kind": "esmm", "orphans": "negative"}],
        [{"kind": "supervised"}, {"kind": "esmm", "by": "domain"}],
    ):
        run = config.from_dict(plain | {"losses": losses})
        assert [term.kind for term in run.losses] == [entry["kind"] for entry in losses]
        assert config.to_dict(run, defaults=False)["losses"] == losses
    assert config.override(make_run(), ["losses.0.kind=esmm"]).losses == (ESMM(),)
    assert "ma2018esmm" in citations(make_run(losses=(ESMM(),))) and "ma2018esmm" not in citations(make_run())
    for losses, message in (
        ([{"by": "task"}], r"`losses.0` has no `kind`. Allowed: supervised, esmm."),
        ([{"kind": "esm"}], r"`losses.0` has no kind `esm`. Did you mean `esmm`. Allowed: supervised, esmm."),
        (
            [{"kind": "esmm", "orphan": "negative"}],
            r"unknown key `losses.0.orphan`. Did you mean `orphans`. Allowed: kind, by, orphans.",
        ),
        ([{"kind": "esmm", "orphans": "keep"}], "'refuse' or 'negative'"),
    ):
        with pytest.raises(config.RunError, match=message):
            config.from_dict(plain | {"losses": losses})


# --------------------------------------------------------------------------------------------------------------- orphans
def two_tasks(**changes):
    """The toy log with a purchase that needs a click, and a run on it: ESMM in the paper's form."""
    data = make_data(tasks=(Task("click"), Task("buy", given="click")))
    model = ModelChoice(tower=SharedBottom(bottom=(), tower=(8,)), tables=Views(width=4))
    return replace(make_run(data=data, model=model, losses=(ESMM(),)), **changes)


def clean_log(rows=600):
    """The toy log without purchases that had no click."""
    return make_log(rows).with_columns(buy=pl.when(pl.col("click") == 1).then("buy"))


def test_orphans_are_counted_by_what_the_loss_takes_them_for(tmp_path):
    rows = [(*row, n) for row in PATTERNS for n in range(10)]  # tenfold, to be in every split
    frame = pl.DataFrame({
        "user": [n for *_, n in rows], "item": [f"i{n}" for *_, n in rows],
        **{name: [row[i] for row in rows] for i, name in enumerate(CHAIN)}, "spend": [1.0] * len(rows),
    })  # fmt: skip
    tasks = (
        Task("show"),
        Task("click", given="show"),
        Task("buy", given="click"),
        Task("spend", kind="real", given="buy"),
    )
    data = Data(rows="log", user="user", features=(Feature("item"),), tasks=tasks, cache=str(tmp_path))
    encoded = Encoded(encode(data, tables={"log": frame}))
    some = np.arange(0, encoded.rows, 10)  # each pattern once
    assert encoded.orphans(some) == {
        "click": (3, 9),  # show 0; buy anything
        "buy": (4, 9),  # show 0 and click anything; show 1 and click 0
    }
    assert encoded.orphans(some[:0]) == {"click": (0, 0), "buy": (0, 0)}
    assert encoded.orphans(np.repeat(some, 2))["buy"] == (8, 18)


def test_a_run_with_orphans_is_refused_and_both_remedies_work():
    log = make_log()
    train_rows = log.filter(pl.col("time") < 600 * 10**6)
    alone = train_rows.filter((pl.col("buy") == 1) & (pl.col("click") == 0))
    bought = train_rows.filter(pl.col("buy") == 1)
    assert 0 < len(alone) < len(bought)
    with pytest.raises(JobError) as error:
        train(two_tasks(), tables={"log": log}, baseline=False)
    said = str(error.value)
    assert (
        f"Task `buy` is 1 in {len(alone):,} training rows where `click` is 0 ({len(alone) / len(bought):.1%} of" in said
    )
    keep = "coalesce(click, 1) = 1 or coalesce(buy, 0) = 0"
    assert f'data.keep = "{keep}"' in said and "losses.0.orphans=negative" in said
    kept = train(two_tasks(data=replace(two_tasks().data, keep=keep)), tables={"log": log}, baseline=False)
    assert kept.metrics["rows"]["train"] == len(train_rows) - len(alone)
    allowed = train(two_tasks(losses=(ESMM(orphans="negative"),)), tables={"log": log}, baseline=False)
    assert allowed.metrics["rows"]["train"] == len(train_rows)
    train(two_tasks(losses=(Supervised(),)), tables={"log": log}, baseline=False)


def test_the_filter_for_a_chain_names_every_task_before():
    term = ESMM().bind(replace(SCHEMA, tasks=(Task("show", column="s > 0"), *TASKS[1:])))
    with pytest.raises(ValueError) as error:
        term.check({"click": (0, 4), "buy": (3, 12)})
    said = str(error.value)
    assert (
        "Task `buy` is 1 in 3 training rows where `show` or `click` is 0 (25.0% of" in said
        and "Task `click`" not in said
    )
    assert '"(coalesce(s > 0, 1) = 1 and coalesce(click, 1) = 1) or coalesce(buy, 0) = 0"' in said
    with pytest.raises(ValueError, match="Task `click` is 1 in 1 .*Task `buy` is 1 in 3 "):
        term.check({"click": (1, 4), "buy": (3, 12)})
    term.check({"click": (0, 4), "buy": (0, 12)})
    ESMM(orphans="negative").bind(SCHEMA).check({"click": (1, 4), "buy": (3, 12)})


def test_the_job_shows_every_term_that_asks_the_orphans_of_the_training_rows():
    seen = []

    @dataclass(frozen=True)
    class Asks:
        def bind(self, schema):
            self_term = Supervised().bind(schema)

            class Bound:
                needs = ()

                def check(self, orphans):
                    seen.append(orphans)
                    if len(seen) == 3:
                        raise ValueError("not with these")

                def __call__(self, output, batch, step):
                    return self_term(output, batch, step)

            return Bound()

    run = two_tasks(losses=(Supervised(), Asks()), training=replace(make_run().training, steps=2))
    train(run, tables={"log": make_log()}, baseline=False)
    train(run, tables={"log": clean_log()}, baseline=False)
    positives = make_log().filter((pl.col("time") < 600 * 10**6) & (pl.col("buy") == 1))
    assert seen[0] == {"buy": (int((positives["click"] == 0).sum()), len(positives))}
    assert len(seen) == 2 and seen[1]["buy"][0] == 0 < seen[1]["buy"][1]
    with pytest.raises(JobError, match="not with these"):
        train(run, tables={"log": clean_log()}, baseline=False)


# ------------------------------------------------------------------------------------------------------------ end to end
def test_the_papers_form_trains_and_predicts_conditional_probabilities(tmp_path):
    log = clean_log()
    result = train(two_tasks(), tmp_path / "run", tables={"log": log}, baseline=False)
    test = log.filter(pl.col("time") >= 800 * 10**6)
    assert result.metrics["test"]["buy"]["rows"] == int(test["buy"].is_not_null().sum())  # measured where clicked
    assert result.metrics["test"]["click"]["rows"] == len(test)
    predicted = Predictor(tmp_path / "run").predict(test, tables={"log": log})
    joint = predicted.select(pl.col("click") * pl.col("buy")).to_series()
    assert len(joint) == len(test) and ((joint > 0) & (joint < predicted["click"])).all()
    plain = train(two_tasks(losses=(Supervised(),)), tables={"log": log}, baseline=False)
    weights, others = (r.bundle.model.state_dict() for r in (result, plain))
    assert weights.keys() == others.keys() and not all(torch.equal(v, others[k]) for k, v in weights.items())


# ----------------------------------------------------------------------------------------------------------- planted data
def planted(same: float, seed: int) -> pl.DataFrame:
    """18,000 training rows with about 1,000 clicks.  What drives clicks drives conversions with correlation ``same``, and
    labels of conversions are known after clicks alone: not missing at random."""
    random = np.random.default_rng(seed)
    rows, n = 30_000, 300
    user, item = random.integers(0, n, rows), random.integers(0, n, rows)
    users, items, own = random.normal(size=n), random.normal(size=n), random.normal(size=n)
    drive = 0.9 * (items[item] + users[user])
    rate = 1 / (1 + np.exp(1 - same * drive - 1.27 * math.sqrt(1 - same**2) * own[item]))
    click = random.random(rows) < 1 / (1 + np.exp(3.5 - drive))
    place = np.arange(rows) / rows
    split = np.where(place < 0.6, "train", np.where(place < 0.7, "valid", "test"))
    buy = click & (random.random(rows) < rate)
    return pl.DataFrame({"user": user, "item": item, "click": click * 1, "buy": buy * 1, "split": split, "rate": rate})


def distance(loss: Supervised | ESMM, log: pl.DataFrame, seed: int) -> float:
    """Mean KL divergence of the predicted conversion rate from the planted one, over *all* test rows."""
    tasks = (Task("click"), Task("buy", given="click"))
    data = Data("log", (Feature("user"), Feature("item")), tasks, split=Split(kind="column", column="split"))
    model = ModelChoice(tower=SharedBottom(bottom=(), tower=(32,)), tables=Views(width=8))
    training = Training(batch_size=256, epochs=30, patience=3, metric="logloss", checkpoint_seconds=0)
    run = Run(data, seed=seed, model=model, losses=(loss,), update=Joint(lr=2e-3), training=training)
    test = log.filter(pl.col("split") == "test")
    bundle = train(run, tables={"log": log}, baseline=False).bundle
    got = Predictor(bundle).predict(test.select("user", "item"), tables={"log": log})["buy"].to_numpy()
    true = test["rate"].to_numpy()
    return float(np.mean(true * np.log(true / got) + (1 - true) * np.log((1 - true) / (1 - got))))


@pytest.mark.slow
def test_planted_it_helps_where_clicks_and_conversions_have_one_cause_and_not_where_they_have_two():
    """Nearer to the true conversion rate of all rows than clicked rows alone are, or further from it (docs/methods)."""
    gains = {}
    for same in (1.0, 0.0):
        pairs = [
            [distance(loss, planted(same, seed), seed) for loss in (Supervised(), ESMM())] for seed in range(100, 104)
        ]
        gains[same] = [naive - entire for naive, entire in pairs]
    assert min(gains[1.0]) > 0
    assert np.mean(gains[0.0]) < 0
