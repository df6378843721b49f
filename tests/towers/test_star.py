"""STAR: each row by its own domain's network in plain arithmetic; what a domain has of its own, and when it moves."""

from __future__ import annotations

import copy
import dataclasses

import domain_kit
import pytest
import torch
from domain_kit import KNOWN, TASKS, absences, some, without
from tower_kit import EXACT, biased, relu_layers
from toylog import make_data, make_log, make_run

from unbraid import bundle, config
from unbraid.config import ModelChoice
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.job import train
from unbraid.layers import task_key
from unbraid.optim.adatask import AdaTask
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.schedules.d_train import DTrain
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.star import STAR

SMALL = {"bottom": (6, 5), "tower": (4,)}
MEMBERS = [
    pytest.param(STAR(**SMALL, auxiliary=(3,)), id="default"),
    pytest.param(STAR(**SMALL, auxiliary=(4, 3), auxiliary_reads="all"), id="all"),
    pytest.param(STAR(**SMALL, norm="none", auxiliary=()), id="plain"),
    pytest.param(STAR(bottom=(6,), tower=(), auxiliary=(3,)), id="no-towers"),
]


def scattered(member, width=7, domains=3):
    """A tower whose domains differ in everything that they may, statistics included."""
    tower = biased(member.build(TASKS, ("shared",), [width], domains=domains))
    with torch.no_grad():
        for part in tower.own:
            for p in part.parameters():
                p.add_(torch.randn_like(p) * 0.3)
            if tower.normalised:
                part.mean.normal_()
                part.var.uniform_(0.5, 2)
        if tower.normalised:
            tower.gamma.uniform_(0.5, 1.5)
            tower.beta.normal_()
    return tower


# --------------------------------------------------------------------------------------------------------- the reference
def averaged(tower, name):
    """Mean over domains of one of their tensors, detached."""
    return sum(dict([*p.named_parameters(), *p.named_buffers()])[name].detach() for p in tower.own) / len(tower.own)


def of_row(tower, code, name):
    part = tower.own[code - 2]
    return dict([*part.named_parameters(), *part.named_buffers()])[name] if code in KNOWN else averaged(tower, name)


def statistics(tower, x, domain, i, batch):
    """Mean and variance that row i is normalised by."""
    code = int(domain[i])
    rows = x[domain == code]
    if code in KNOWN:
        if batch and len(rows) > 1:
            return rows.mean(0), ((rows - rows.mean(0)) ** 2).mean(0)
        return of_row(tower, code, "mean"), of_row(tower, code, "var")
    mean = averaged(tower, "mean")
    second = sum(p.var + p.mean**2 for p in tower.own) / len(tower.own)  # of equal parts of all domains together
    return mean, second - mean**2


def reference(tower, member, x, domain, batch):
    """(trunk, task -> hidden) row by row."""
    before = copy.deepcopy(tower)  # running statistics as they were
    trunks, hidden = [], {task: [] for task in TASKS}
    for i, code in enumerate(domain.tolist()):
        h = x[i]
        if tower.normalised:
            mean, var = statistics(before, x, domain, i, batch)
            scale = tower.gamma * (1 + of_row(tower, code, "gamma"))
            h = scale * (h - mean) / (var + 1e-5) ** 0.5 + tower.beta + of_row(tower, code, "beta")
        for n, layer in enumerate(tower.layers):
            weight = layer.weight * (1 + of_row(tower, code, f"factors.{n}"))
            h = weight @ h + layer.bias + of_row(tower, code, f"biases.{n}")
            h = h * (h > 0)
        trunks.append(h)
        a = x[i, :0]
        if member.auxiliary:
            a = of_row(tower, code, "indicator")
            if member.auxiliary_reads == "all":
                a = a + tower.features.weight @ x[i] + tower.features.bias
            a = relu_layers(tower.auxiliary, (a * (a > 0))[None])[0]
        for task in TASKS:
            hidden[task].append(torch.cat([relu_layers(tower.towers[task_key(task)], h[None])[0], a]))
    return torch.stack(trunks), {task: torch.stack(rows) for task, rows in hidden.items()}


# ----------------------------------------------------------------------------------------------------------------- value
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("member", MEMBERS)
def test_rows_and_gradients_are_those_of_plain_arithmetic(member, training):
    """Unknown, missing, a domain of one row and others; value and the gradient of every leaf."""
    tower = scattered(member).train(training)
    x, domain = torch.randn(15, 7, requires_grad=True), torch.tensor([2, 4, 2, 0, 4, 1, 3, 2, 4, 2, 0, 4, 1, 4, 2])
    leaves = [x, *tower.parameters()]
    trunk, want = reference(tower, member, x, domain, training)
    scales = torch.randn(15, trunk.shape[1]), {task: torch.randn(15, tower.widths[task]) for task in TASKS}

    def gradients(trunk, hidden):
        loss = (trunk.sin() * scales[0]).sum() + sum((hidden[t].sin() * scales[1][t]).sum() for t in TASKS)
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    theirs = gradients(trunk, want)
    out = tower([x], domain, torch.ones(15).bool())
    torch.testing.assert_close(out.trunk, trunk, **EXACT)
    torch.testing.assert_close(out.tasks, want, **EXACT)
    assert out.extras == {}
    names = ["x", *(name for name, _ in tower.named_parameters())]
    for name, mine, their in zip(names, gradients(out.trunk, out.tasks), theirs, strict=True):
        assert their is not None, name
        torch.testing.assert_close(mine, their, **EXACT, msg=name)


@pytest.mark.usefixtures("float64")
def test_the_gradient_through_batch_statistics_is_that_of_finite_differences():
    tower = scattered(MEMBERS[0].values[0]).train()
    x, domain = torch.randn(6, 7, requires_grad=True), torch.tensor([2, 4, 2, 4, 2, 4])
    assert torch.autograd.gradcheck(lambda x: tower([x], domain, torch.ones(6).bool()).tasks["click"], (x,))


# ---------------------------------------------------------------------------------------------------------------- limits
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("training", [True, False])
def test_it_begins_as_a_shared_bottom(training):
    tower = biased(STAR(**SMALL, norm="none", auxiliary=()).build(TASKS, ("a", "b"), [4, 3], domains=3)).train(training)
    same = SharedBottom(**SMALL).build(TASKS, ("a", "b"), [4, 3])
    linears = [m for m in same.bottom if isinstance(m, torch.nn.Linear)]
    for mine, layer in zip(linears, tower.layers, strict=True):
        mine.load_state_dict(layer.state_dict())
    same.towers.load_state_dict(tower.towers.state_dict())
    views, domain = [torch.randn(20, 4), torch.randn(20, 3)], torch.arange(20) % 5
    got, want = tower(views, domain, torch.ones(20).bool()), same(views)
    torch.testing.assert_close(got.tasks, want.tasks, **EXACT)
    torch.testing.assert_close(got.trunk, want.trunk, **EXACT)
    assert tower.widths == same.widths


@pytest.mark.usefixtures("float64")
def test_with_one_domain_the_normalisation_is_torchs():
    tower = scattered(STAR(bottom=(), tower=(), auxiliary=()), domains=1).train()
    norm = torch.nn.BatchNorm1d(7)
    with torch.no_grad():
        norm.weight.copy_(tower.gamma * (1 + tower.own[0].gamma))
        norm.bias.copy_(tower.beta + tower.own[0].beta)
        norm.running_mean.copy_(tower.own[0].mean)
        norm.running_var.copy_(tower.own[0].var)
    domain, counted = torch.full((12,), 2), torch.ones(12).bool()
    for _ in range(3):
        x = torch.randn(12, 7) * 2 + 1
        torch.testing.assert_close(tower([x], domain, counted).trunk, norm(x), **EXACT)
    torch.testing.assert_close(tower.own[0].mean, norm.running_mean, **EXACT)
    torch.testing.assert_close(tower.own[0].var, norm.running_var, **EXACT)
    x = torch.randn(12, 7)
    torch.testing.assert_close(tower.eval()([x], domain, counted).trunk, norm.eval()(x), **EXACT)
    for code in (0, 1):  # of one domain the mean over domains is that domain
        unknown = torch.full((12,), code)
        torch.testing.assert_close(tower([x], unknown, counted).trunk, norm(x), **EXACT)


# ------------------------------------------------------------------------------------------------------------ statistics
@pytest.mark.usefixtures("float64")
def test_statistics_are_those_of_each_domains_rows():
    tower = scattered(MEMBERS[0].values[0]).train()
    before = copy.deepcopy(tower.own)
    x, domain = torch.randn(13, 7), torch.tensor([2] * 6 + [4] * 5 + [3] + [0])
    counted = domain != 4  # a domain that no loss reads
    tower([x], domain, counted)
    torch.testing.assert_close(tower.own[0].mean, 0.9 * before[0].mean + 0.1 * x[:6].mean(0), **EXACT)
    torch.testing.assert_close(tower.own[0].var, 0.9 * before[0].var + 0.1 * x[:6].var(0), **EXACT)
    for still in (1, 2):  # one row alone; not counted
        assert torch.equal(tower.own[still].mean, before[still].mean)
        assert torch.equal(tower.own[still].var, before[still].var)
    moved = copy.deepcopy(tower.own)
    tower.eval()([x], domain, counted)
    assert all(torch.equal(a, b) for a, b in zip(tower.own.buffers(), moved.buffers(), strict=True))


@pytest.mark.usefixtures("float64")
def test_rows_without_a_known_domain_train_what_is_shared_alone():
    tower = scattered(MEMBERS[1].values[0]).train()
    before = copy.deepcopy(dict(tower.named_buffers()))
    out = tower([torch.randn(8, 7)], torch.tensor([0, 1] * 4), torch.ones(8).bool())
    sum(h.sin().sum() for h in out.tasks.values()).backward()
    assert all(p.grad is None for p in tower.own.parameters())
    shared = [*tower.layers.parameters(), *tower.features.parameters(), *tower.auxiliary.parameters(), tower.gamma]
    assert all(p.grad is not None and p.grad.any() for p in shared)
    assert all(torch.equal(value, before[name]) for name, value in tower.named_buffers())


# --------------------------------------------------------------------------------------------------------------- absence
def model_of(encoded, tower, lazy_rows=-1, **choice):
    views = Views(width=3, std=1.0, lazy_rows=lazy_rows)
    return bundle.build(make_run(model=ModelChoice(tower=tower, tables=views, **choice)), encoded.schema)


def kept(model, update, at):
    """Bits of all that one domain has of its own: weights, statistics, optimiser state."""
    mark = f"tower.own.{at}."
    weights = {n: v.clone() for n, v in model.state_dict().items() if n.startswith(mark)}
    state = update.state_dict()
    parts = [part for part in ("dense", "shared", "tasks", "own") if part in state]
    found = {}

    def walk(value, path):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, (*path, str(key)))
        elif any(key.startswith(mark) for key in path):
            found[path] = copy.deepcopy(value)

    walk(state, ())
    assert parts and len(found) >= 2 * len([n for n in weights if not n.endswith((".mean", ".var"))])
    return {**weights, **found}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


@absences
@pytest.mark.parametrize("update", [Joint, AdaTask])
@pytest.mark.parametrize("member", MEMBERS[:3])
def test_an_absent_domain_moves_nothing_of_its_own(encoded, member, update, how):
    model = model_of(encoded, member)
    step = update(weight_decay=0.1, table_weight_decay=0.1).build(model, steps=100, weights={})
    (term,) = bound_terms(make_run(), encoded.schema, model)

    def go(batch):
        output = model(batch)
        step(term(output, batch, 0), output)

    for at in range(10):
        go(some(encoded, start=10 * at))
    for at, code in enumerate(KNOWN):
        before, other = kept(model, step, at), kept(model, step, (at + 1) % 3)
        shared = model.tower.layers[0].weight.clone()
        go(without(some(encoded), code, how))
        assert equal(before, kept(model, step, at)), f"domain {code} moved"
        assert not equal(other, kept(model, step, (at + 1) % 3)), "another domain should have moved"
        assert not torch.equal(shared, model.tower.layers[0].weight)


def test_weight_decay_pulls_a_domain_to_what_is_shared():
    tower = scattered(STAR(**SMALL))
    tower.tables = {}
    step = Joint(lr=0.1, weight_decay=0.5).build(tower, steps=100, weights={})
    before = {n: p.detach().clone() for n, p in tower.own[0].named_parameters() if n.startswith("factors")}
    for p in tower.own[0].parameters():
        p.grad = torch.zeros_like(p)
    step.dense.step()
    for name, was in before.items():  # W_t - 1 shrinks, and so W_t goes to 1
        torch.testing.assert_close(dict(tower.own[0].named_parameters())[name], was * 0.95)


# ------------------------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("choice", [{}, {"heads": Heads(by="domain", hidden=(4,))}, {"heads": Heads(two=True)}])
def test_rows_do_not_see_each_other(encoded, choice):
    domain_kit.rows_do_not_see_each_other(model_of(encoded, STAR(), **choice), encoded)


def test_the_auxiliary_logit_is_added(encoded):
    """With a linear head the logit is the main network's and, added to it, a number of the domain alone."""
    model = model_of(encoded, STAR(auxiliary=(5,)))
    with torch.no_grad():
        for part in model.tower.own:
            part.indicator.uniform_(0.1, 1)
    model.eval()
    batch = some(encoded)
    logits = model(batch).logits["click"]
    head = model.heads["task/click"].linears[0]
    added = torch.stack([torch.relu(part.indicator) for part in model.tower.own]) @ head.weight[0, -5:]
    with torch.no_grad():
        head.weight[0, -5:] = 0
    torch.testing.assert_close(logits - model(batch).logits["click"], added[batch.domain - 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(encoded, training):
    assert model_of(encoded, STAR()).train(training)(some(encoded, n=0)).logits["click"].shape == (0,)


@pytest.mark.parametrize("member", MEMBERS)
def test_trains_and_comes_back(member, tmp_path):
    state = domain_kit.trains_and_comes_back(member, Views(width=3), tmp_path).model.state_dict()
    assert (f"tower.own.0.{'mean' if member.norm == 'partitioned' else 'factors.0'}") in state


def test_d_train_freezes_it_with_its_statistics():
    run = make_run(schedule=DTrain(), training=dataclasses.replace(make_run().training, steps=20))
    run = dataclasses.replace(run, model=ModelChoice(tower=STAR(**SMALL), heads=Heads(by="domain")))
    result = train(run, tables={"log": make_log()}, baseline=False)
    assert result.metrics["test"]["click"]["auc"]["value"] > 0


# ---------------------------------------------------------------------------------------------------------- planted data
@pytest.mark.slow
def test_domains_that_disagree_are_told_apart():
    """Labels of two domains have opposite signs: one shared bottom without the domain learns nothing, STAR does."""
    found = {"star": [], "shared": []}
    for seed in range(3):
        torch.manual_seed(seed)
        x, domain = torch.randn(4000, 6), torch.randint(2, 4, (4000,))
        y = ((x[:, :3].sum(1) * (2 * (domain == 2) - 1)) > 0).float()
        for name in found:
            member = STAR(bottom=(16,), tower=()) if name == "star" else SharedBottom(bottom=(16,), tower=())
            keys = {"domains": 2} if name == "star" else {}
            tower = member.build(("click",), ("shared",), [6], **keys)
            head = torch.nn.Linear(tower.widths["click"], 1)
            update = torch.optim.Adam([*tower.parameters(), *head.parameters()], lr=0.01)
            for at in range(400):
                rows = torch.arange(250) + 250 * (at % 8)
                given = (domain[rows], torch.ones(250).bool()) if name == "star" else ()
                z = head(tower([x[rows]], *given).tasks["click"]).squeeze(1)
                update.zero_grad()
                torch.nn.functional.binary_cross_entropy_with_logits(z, y[rows]).backward()
                update.step()
            tower.eval()
            given = (domain[2000:], torch.ones(2000).bool()) if name == "star" else ()
            right = (head(tower([x[2000:]], *given).tasks["click"]).squeeze(1) > 0) == (y[2000:] > 0)
            found[name].append(float(right.float().mean()))
    assert min(found["star"]) > 0.9 and max(found["shared"]) < 0.56, found


# ---------------------------------------------------------------------------------------------------------------- errors
def test_errors(encoded):
    with pytest.raises(ValueError, match=r"Parameter `auxiliary` should be positive. Found \(0,\)."):
        STAR(auxiliary=(0,))
    with pytest.raises(ValueError, match="Tower `star` has weights per domain and needs a known one"):
        STAR().build(TASKS, ("shared",), [4], domains=0)
    with pytest.raises(ValueError, match="Tower `star` reads one view"):
        model_of(encoded, STAR()).tower and bundle.build(
            make_run(model=ModelChoice(tower=STAR(), tables=Views(kind="per_task", width=3))), encoded.schema
        )
    several = Views(kind="several", by="domain", widths=(2, 3))
    with pytest.raises(ValueError, match="Tower `star` has no gate per task"):
        bundle.build(make_run(model=ModelChoice(tower=STAR(), tables=several)), encoded.schema)
    with pytest.raises(ValueError, match="`model.tower` needs domains, and the data declare none: set `data.domain`"):
        make_run(model=ModelChoice(tower=STAR()), data=make_data(domain=""))
    text = config.dumps(make_run(model=ModelChoice(tower=STAR(auxiliary_reads="all"))))
    assert 'auxiliary_reads = "all"' in text
