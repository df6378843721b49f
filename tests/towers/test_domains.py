"""Views that belong to domains: each row takes its own domain's state, and an absent domain does not move."""

from __future__ import annotations

import copy
import dataclasses

import domain_kit
import pytest
import torch
from domain_kit import KNOWN, TASKS, absences, some, without
from tower_kit import EXACT, biased, gate_of, relu_layers
from toylog import make_run

from unbraid import bundle
from unbraid.config import Expert, ModelChoice
from unbraid.encoders.dare import DARE
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.interactions.cross import Cross
from unbraid.interactions.flat import Flat
from unbraid.layers import task_key
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.towers.aitm import AITM
from unbraid.towers.ame import AME
from unbraid.towers.domains import DomainTower, domain_names
from unbraid.towers.experts import MMoE, OMoE
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.multi_embedding import MultiEmbedding
from unbraid.towers.ple import PLE
from unbraid.towers.single_task import SingleTask
from unbraid.towers.stem import STEM
from unbraid.towers.stem_al import STEMAL
from unbraid.types import Schema

LAYERED = {"expert": (9, 6), "tower": (5,)}
TOWERS = [
    pytest.param(STEM(**LAYERED), "per_task", id="stem"),
    pytest.param(STEM(layers=2, task_experts=2, gate=(4,), **LAYERED), "per_task", id="stem-deep"),
    pytest.param(PLE(layers=2, **LAYERED), "per_task", id="ple"),
    pytest.param(SingleTask(bottom=(9, 6), tower=(5,)), "separate", id="single_task"),
    pytest.param(STEMAL(main=("domain1",), **LAYERED), "separate", id="stem_al"),
    pytest.param(AME(**LAYERED), "several", id="ame"),
    pytest.param(AME(norm="layer", gate=(4,), **LAYERED), "several", id="ame-deep"),
    pytest.param(MMoE(experts=4, **LAYERED), "several", id="mmoe"),
]


def views_of(kind, **keys):
    """Tables by domain; those that belong to nobody have different widths."""
    return Views(kind=kind, by="domain", widths=(2, 3, 4) if kind == "several" else (), **keys)


def model_of(encoded, tower, kind, lazy_rows=-1, **choice):
    views = views_of(kind, width=3, std=1.0, lazy_rows=lazy_rows)
    return bundle.build(make_run(model=ModelChoice(tower=tower, tables=views, **choice)), encoded.schema)


def hidden_of(n, views, width=4):
    return [torch.randn(n, width, requires_grad=True) for _ in range(views)]


def domain_tower(tower, kind, domains=("domain0", "domain1", "domain2"), tasks=TASKS):
    names = views_of(kind).names(domains)
    return biased(DomainTower(tower, tasks, domains, names, [4] * len(names))), len(names)


# ----------------------------------------------------------------------------------------------------------------- value
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("config", "kind"), TOWERS)
def test_a_row_has_the_state_that_its_domain_has_as_a_task(config, kind, training):
    tower, count = domain_tower(config, kind)
    tower.train(training)
    views, domain = hidden_of(30, count), torch.tensor([2, 4, 3, 0, 4, 1] * 5)
    got = tower(views, domain, torch.ones(30).bool())
    names = views_of(kind).names(tower.domains)
    whole = dataclasses.replace(config, tower=()).build(tower.domains, names, [4] * count)
    whole.load_state_dict(tower.inner.state_dict())
    out = whole(views)
    states = [out.tasks[name] for name in tower.domains]
    rest = out.trunk if kind == "per_task" else sum(states) / 3
    want = torch.stack([states[d - 2][i] if d >= 2 else rest[i] for i, d in enumerate(domain.tolist())])
    torch.testing.assert_close(got.trunk, want, **EXACT)
    for task in TASKS:
        torch.testing.assert_close(got.tasks[task], tower.towers[task_key(task)](want), **EXACT)
    assert tower.widths == dict.fromkeys(TASKS, 5)
    for name in tower.gives:
        gates = {d: out.extras.get(f"{name}.domain{d - 2}") for d in domain.tolist()}
        rows = torch.stack([
            torch.zeros_like(got.extras[name][0]) if gates[d] is None else gates[d][i] for i, d in enumerate(domain.tolist())
        ])  # fmt: skip
        torch.testing.assert_close(got.extras[name], rows, **EXACT)
    assert set(got.extras) == set(tower.gives) and len(tower.gives) == (0 if config.kind == "single_task" else 1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("config", "kind"), TOWERS)
def test_gradients_are_those_of_the_domains_as_tasks(config, kind):
    tower, count = domain_tower(config, kind)
    views, domain = hidden_of(30, count), torch.tensor([2, 4, 3] * 10)
    leaves = [*views, *tower.inner.parameters()]
    out = tower(views, domain, torch.ones(30).bool())
    scale = torch.randn(30, 6)
    got = torch.autograd.grad((out.trunk.sin() * scale).sum(), leaves, allow_unused=True)
    tasks = tower.inner(views).tasks
    loss = sum((tasks[f"domain{d - 2}"][domain == d].sin() * scale[domain == d]).sum() for d in KNOWN)
    for mine, theirs in zip(got, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    if kind == "separate":
        for d, view in zip(KNOWN, got[:3], strict=True):
            assert not view[domain != d].any() and view[domain == d].any(), "rows of other domains"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("config", "kind"), TOWERS)
def test_rows_without_a_known_domain_do_not_write_domains(config, kind):
    tower, count = domain_tower(config, kind)
    views = hidden_of(8, count)
    out = tower(views, torch.tensor([0, 1] * 4), torch.ones(8).bool())
    out.tasks["click"].sum().backward()
    assert all(x.grad is None or not x.grad.any() for x in views[:3])
    assert (kind == "per_task") == (views[-1].grad is not None and bool(views[-1].grad.any()))
    own = [p for n, p in tower.inner.named_parameters() if "task/domain" in n]
    assert len(own) >= 6 and all(p.grad is None for p in own)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("config", "kind"), TOWERS)
@pytest.mark.parametrize("codes", [(0, 1, 0), (4, 4), ()])
def test_gates_have_their_shape_and_type_in_any_batch(config, kind, codes):
    tower, count = domain_tower(config, kind)
    n = len(codes)
    out = tower(hidden_of(n, count), torch.tensor(codes, dtype=torch.int64), torch.ones(n).bool())
    pool = (
        {"stem": 4, "ple": 4, "stem_al": 3, "ame": 3, "mmoe": 4}.get(config.kind, 0)
        + getattr(config, "task_experts", 1)
        - 1
    )
    assert out.trunk.shape == (n, 6) and all(out.tasks[task].shape == (n, 5) for task in TASKS)
    for name in tower.gives:
        whole = tower(hidden_of(3, count), torch.tensor(KNOWN), torch.ones(3).bool()).extras[name]
        assert out.extras[name].shape == (n, whole.shape[1]) and out.extras[name].dtype == torch.float64
        assert whole.shape[1] > 2 or not pool
        assert (4 in codes and config.kind != "stem_al") == bool(out.extras[name].any())


@pytest.mark.parametrize(("config", "kind"), TOWERS)
def test_an_empty_batch(encoded, config, kind):
    model = model_of(encoded, config, kind)
    for training in (True, False):
        assert model.train(training)(some(encoded, n=0)).logits["click"].shape == (0,)


# ------------------------------------------------------------------------------------------------------- tables of nobody
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("training", [True, False])
def test_every_domain_weighs_the_shared_experts_by_its_own_gate(training):
    """AME row by row in plain arithmetic, value and gradient; rows without a known domain write nothing below the towers."""
    config = AME(gate=(4,), **LAYERED)
    names = ("domain0", "domain1", "domain2")
    tower = biased(DomainTower(config, TASKS, names, ("view0", "view1"), [7, 4])).train(training)
    hidden = [torch.randn(12, width, requires_grad=True) for width in (7, 4)]
    domain = torch.tensor([2, 4, 3, 0, 4, 1] * 2)
    leaves = [*hidden, *tower.parameters()]

    def gradient(states):
        loss = sum((states[task].sin() * (k + 1)).sum() for k, task in enumerate(TASKS))
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    out = tower(hidden, domain, torch.ones(12).bool())
    pool = [relu_layers(expert, x) for expert, x in zip(tower.inner.experts, hidden, strict=True)]
    rows, gates = [], []
    for i, code in enumerate(domain.tolist()):
        x = torch.cat([one[i] for one in hidden])[None]
        mixed, weights = [], []
        for name in names:
            gate = gate_of(tower.inner.gates[task_key(name)], x)[0]
            weights.append(gate)
            mixed.append(gate[0] * pool[0][i] + gate[1] * pool[1][i])
        rows.append(mixed[code - 2] if code >= 2 else (sum(mixed) / 3).detach())
        gates.append(weights[code - 2] if code >= 2 else torch.zeros(2))
    z = torch.stack(rows)
    want = {task: relu_layers(tower.towers[task_key(task)], z) for task in TASKS}
    torch.testing.assert_close(out.tasks, want, **EXACT)
    torch.testing.assert_close(out.trunk, z, **EXACT)
    torch.testing.assert_close(out.extras, {"ame.gate": torch.stack(gates)}, **EXACT)
    for mine, theirs in zip(gradient(out.tasks), gradient(want), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.usefixtures("float64")
def test_a_domain_reaches_every_table_and_no_other_domains_gate():
    tower, count = domain_tower(AME(**LAYERED), "several")
    for code in KNOWN:
        views = hidden_of(9, count)
        tower.zero_grad()
        tower(views, torch.full((9,), code), torch.ones(9).bool()).tasks["click"].sin().sum().backward()
        assert all(view.grad.any() for view in views)
        assert all(p.grad.any() for p in tower.inner.experts.parameters())
        for name, gate in zip(tower.domains, KNOWN, strict=True):
            own = list(tower.inner.gates[task_key(name)].parameters())
            assert all((p.grad is not None) == (gate == code) for p in own)


@pytest.mark.usefixtures("float64")
def test_normalisation_over_a_batch_sees_rows_of_all_domains():
    config = AME(norm="batch", **LAYERED)
    tower, count = domain_tower(config, "several")
    views, domain = hidden_of(30, count), torch.tensor([2, 4, 3, 0, 4, 1] * 5)
    tower.train()(views, domain, torch.ones(30).bool())
    for expert, x in zip(tower.inner.experts, views, strict=True):
        first, norm = expert[0], expert[1]
        torch.testing.assert_close(norm.running_mean, 0.1 * first(x).mean(0), **EXACT)
        assert int(norm.num_batches_tracked) == 1


def test_experts_over_tables_of_nobody(encoded):
    experts = (Expert(0, Flat()), Expert(1, Cross()), Expert(2, Flat()), Expert(2, Cross()))
    model = model_of(encoded, AME(), "several", experts=experts, heads=Heads(by="domain"))
    assert list(model.embeddings.widths.values()) == [2, 3, 4]
    gate = model(some(encoded)).extras["ame.gate"]
    assert gate.shape == (40, 4) and torch.allclose(gate.sum(1), torch.ones(40))


# --------------------------------------------------------------------------------------------------------------- absence
def of_domain(model, at):
    """Names of what belongs to one domain: tables, encoders, interaction, experts, gate."""
    marks = (f"tables.domain{at}/", f"/domain{at}", f"histories.domain{at}/", f"bags.domain{at}/")
    return {n for n, _ in model.named_parameters() if any(mark in n for mark in marks)}


def state_of(model, update, names):
    """Weights and optimiser state of some parameters, cloned."""
    short = names | {n.removeprefix("embeddings.tables.").removesuffix(".weight") for n in names}
    state = update.state_dict()
    parts = {k: v for part in ("dense", "rows") for k, v in state[part].items() if k in short}
    assert len(parts) >= len(names) // 2 > 0
    return copy.deepcopy(({n: p.detach().clone() for n, p in model.named_parameters() if n in names}, parts))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@absences
@pytest.mark.parametrize("lazy_rows", [-1, 0])
@pytest.mark.parametrize(("config", "kind"), TOWERS)
def test_an_absent_domain_does_not_move(encoded, config, kind, lazy_rows, how):
    model = model_of(encoded, config, kind, lazy_rows)
    update = Joint(weight_decay=0.1, table_weight_decay=0.1, decay="touched").build(model, steps=100, weights={})
    (term,) = bound_terms(make_run(), encoded.schema, model)

    def go(batch):
        output = model(batch)
        update(term(output, batch, 0), output)

    for at in range(10):
        go(some(encoded, start=10 * at))
    for at, code in enumerate(KNOWN):
        names = of_domain(model, at)
        assert any("tables" in n for n in names) == (kind != "several")
        assert any(n.startswith("tower.inner") for n in names)
        rest = {n: p.detach().clone() for n, p in model.named_parameters() if n not in names}
        before = state_of(model, update, names)
        go(without(some(encoded), code, how))
        assert equal(before, state_of(model, update, names)), f"domain{at} moved"
        still = {n for n, p in model.named_parameters() if n in rest and torch.equal(p, rest[n])}
        assert not any("tables" in n and "/gap/" not in n for n in still), (
            "those of the other domains should have moved"
        )


@pytest.mark.parametrize(("config", "kind"), TOWERS)
def test_rows_do_not_see_each_other(encoded, config, kind):
    domain_kit.rows_do_not_see_each_other(model_of(encoded, config, kind), encoded)


# ------------------------------------------------------------------------------------------------------------- the model
def test_views_are_named_by_known_domains(encoded):
    assert sorted(encoded.schema.domains[2:]) == ["home", "mail", "search"]
    model = model_of(encoded, STEM(), "per_task", heads=Heads(by="domain"))
    assert list(model.embeddings.widths) == ["domain0", "domain1", "domain2", "shared"]
    assert list(model_of(encoded, SingleTask(), "separate").embeddings.widths) == ["domain0", "domain1", "domain2"]
    assert model.gives == {"stem.gate"}
    gate = model(some(encoded)).extras["stem.gate"]
    assert gate.shape == (40, 3 + 2) and torch.allclose(gate.sum(1), torch.ones(40))


@pytest.mark.parametrize(("config", "kind"), TOWERS)
def test_trains_and_comes_back(config, kind, tmp_path):
    domain_kit.trains_and_comes_back(config, views_of(kind, width=3), tmp_path)


# ---------------------------------------------------------------------------------------------------------------- errors
def test_by_domain_needs_several_views():
    with pytest.raises(ValueError) as error:
        Views(by="domain")
    assert str(error.value) == (
        "Parameter `by` should be `task`, or `domain` with kind `per_task`, `separate` or `several`. "
        "Found `domain` with kind `shared`."
    )


NO_GATES = [SharedBottom(), OMoE(), AITM(), MultiEmbedding(), MultiEmbedding(combine="scalar")]


@pytest.mark.parametrize("tower", NO_GATES, ids=lambda tower: f"{tower.kind}-{getattr(tower, 'combine', '')}")
def test_tables_of_nobody_need_a_gate_per_domain(encoded, tower):
    with pytest.raises(ValueError) as error:
        model_of(encoded, tower, "several")
    assert str(error.value) == (
        f"Tower `{tower.kind}` has no gate per task, and tables of kind `several` belong to no domain: all domains would be one. "
        f"Take a tower with a gate per task, or model.tables.kind `per_task` or `separate`."
    )
    assert model_of(encoded, MultiEmbedding(combine="gate"), "several").gives == {"multi_embedding.gate"}


@pytest.mark.parametrize("tower", [SharedBottom(), AME(), SingleTask()])
def test_towers_that_have_no_state_per_owner_are_refused(encoded, tower):
    with pytest.raises(ValueError, match=f"Tower `{tower.kind}` reads"):
        model_of(encoded, tower, "per_task")


def test_main_names_domains(encoded):
    home, other = "home", STEMAL(main=("search", "home"), **LAYERED)
    names = {f"domain{n}": name for n, name in enumerate(encoded.schema.domains[2:])}
    model = model_of(encoded, other, "separate")
    assert [names[name] for name in model.tower.inner.auxiliary] == ["mail"]
    view = next(view for view, name in names.items() if name == home)
    one, same = (model_of(encoded, STEMAL(main=(name,)), "separate").tower.inner.auxiliary for name in (home, view))
    assert one == same and view not in one and len(one) == 2
    with pytest.raises(ValueError) as error:
        model_of(encoded, STEMAL(main=("home", "post")), "separate")
    domains = list(encoded.schema.domains[2:])
    assert str(error.value) == f"Parameter `main` should name domains, among {domains}. Found ['post']."


def test_second_heads_are_refused(encoded):
    with pytest.raises(ValueError) as error:
        model_of(encoded, STEM(), "per_task", history=DARE(auxiliary=(4,)))
    assert str(error.value) == "Second heads of tasks would write the tables of all domains. Leave `auxiliary` empty."


def test_a_log_without_known_domains_is_refused():
    with pytest.raises(ValueError) as error:
        domain_names(Schema((), ()))
    assert str(error.value) == "Tables per domain need a known domain. Found none in the training split."
