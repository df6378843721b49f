"""The adversary of domains: who gets which gradient, the ramp over a training, absence, and what the trunk forgets."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from toylog import make_data, make_log, make_run

from unbraid import bundle, config
from unbraid.config import Aggregated, ModelChoice, Weighted
from unbraid.data.declaration import Data, Split
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.job import JobError, train
from unbraid.losses.domain_adversary import BoundDomainAdversary, DomainAdversary, DomainClassifier
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.optim.adatask import AdaTask
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.schedules.d_train import DTrain
from unbraid.schedules.fork_merge import Branch, ForkMerge
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.star import STAR
from unbraid.towers.stem import STEM
from unbraid.types import Batch, Feature, Output, Schema, Task
from unbraid.warm_start import warm_start

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
SCHEMA = Schema((), (Task("click"),), domains=("(unknown)", "(missing)", "feed", "search", "mail"))
B, H = 14, 6


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    data = make_data(cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data, tables={"log": make_log(rows=400)}))


def make_batch(domain: list[int] | None = None, weight: torch.Tensor | None = None) -> Batch:
    codes = torch.tensor(domain or [2, 3, 4, 0, 1, 2, 3, 3, 4, 2, 0, 2, 4, 3])
    none = {"click": torch.zeros(B, dtype=torch.bool)}  # no label is read
    places = torch.arange(B), torch.zeros(B, dtype=torch.int8), torch.full((B,), -1)
    return Batch({}, {"click": torch.zeros(B)}, none, codes, weight, *places)


def make_parts(hidden: tuple[int, ...] = (5,)) -> tuple[nn.Linear, Any, torch.Tensor]:
    """A trunk of one layer, a classifier, and the input, all in float64."""
    torch.manual_seed(0)
    below, classifier = nn.Linear(4, H).double(), DomainClassifier(hidden).build(SCHEMA, H, {}).double()
    return below, classifier, torch.randn(B, 4, dtype=torch.float64)


def say(classifier: Any, trunk: torch.Tensor) -> Output:
    output = Output({}, {}, trunk)
    return replace(output, extras=classifier(output))


def entropy(classifier: Any, trunk: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The cross-entropy row by row, over rows of known domains."""
    linears = [m for m in classifier.modules() if isinstance(m, nn.Linear)]
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for i, code in enumerate(batch.domain.tolist()):
        w = 1.0 if batch.weight is None else float(batch.weight[i])
        if code < 2 or w == 0:
            continue
        z = trunk[i]
        for n, layer in enumerate(linears):
            z = layer.weight @ z + layer.bias
            z = z if n == len(linears) - 1 else z * (z > 0)
        total, mass = total + w * (z.exp().sum().log() - z[code - 2]), mass + w
    return total / mass


# ------------------------------------------------------------------------------------------------------ gradient routing
@pytest.mark.parametrize("hidden", [(5,), (), (6, 5)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("mu", "before", "step", "total"),
    [(1.0, 0, 0, 0), (0.3, 0, 40, 100), (2.0, 50, 5, 60), (0.0, 0, 9, 10), (1.0, 0, 0, 9)],
)
def test_the_classifier_descends_and_the_trunk_ascends(
    hidden: tuple[int, ...], weighted: bool, mu: float, before: int, step: int, total: int
) -> None:
    """Value: the cross-entropy.  Gradient: once to the classifier, -mu(p) times to the trunk, to the last digits."""
    below, classifier, x = make_parts(hidden)
    weight = torch.arange(B).remainder(3).float() if weighted else None
    batch = make_batch(weight=weight)
    term = DomainAdversary(mu=mu).bind(SCHEMA).over(before, total)
    (loss,) = term(say(classifier, below(x)), batch, step).values()
    want = entropy(classifier, below(x), batch)
    torch.testing.assert_close(loss, want, **EXACT)
    own, lower = list(classifier.parameters()), list(below.parameters())
    mine = torch.autograd.grad(loss, [*own, *lower], allow_unused=True)
    theirs = torch.autograd.grad(want, [*own, *lower])
    p = min((before + step) / total, 1.0) if total else None
    factor = mu if p is None else mu * (2 / (1 + math.exp(-10 * p)) - 1)
    assert term.factor(step) == factor
    for k, (got, full) in enumerate(zip(mine, theirs, strict=True)):
        assert full.any()
        if k >= len(own) and factor == 0:
            assert got is None, "nothing is read back into the trunk, not even zeros"
        else:
            torch.testing.assert_close(got, full if k < len(own) else -factor * full, **EXACT)


def test_the_two_extras_are_one_number_and_two_gradients() -> None:
    below, classifier, x = make_parts()
    extras = classifier(Output({}, {}, below(x)))
    assert set(extras) == set(classifier.gives) == {"extra_heads.domain.own", "extra_heads.domain.trunk"}
    assert torch.equal(extras["extra_heads.domain.own"], extras["extra_heads.domain.trunk"])
    assert extras["extra_heads.domain.own"].shape == (B, 3)
    own, lower = list(classifier.parameters()), list(below.parameters())
    for name, parts in (("extra_heads.domain.own", own), ("extra_heads.domain.trunk", lower)):
        grads = torch.autograd.grad(extras[name].square().sum(), [*own, *lower], allow_unused=True, retain_graph=True)
        reached = [p for p, g in zip([*own, *lower], grads, strict=True) if g is not None]
        assert len(reached) == len(parts) and all(a is b for a, b in zip(reached, parts, strict=True))


# ------------------------------------------------------------------------------------------------------------------ ramp
def test_the_ramp() -> None:
    term = DomainAdversary(mu=0.5).bind(SCHEMA)
    assert term.factor(0) == term.factor(10**6) == 0.5, "without a length, as at the end"
    timed = term.over(0, 1000)
    assert timed.factor(0) == 0
    assert timed.factor(100) == pytest.approx(0.5 * math.tanh(0.5), abs=1e-15)  # 2 / (1 + e^-x) - 1 = tanh(x / 2)
    assert timed.factor(1000) == timed.factor(2000) == pytest.approx(0.5 * math.tanh(5), abs=1e-15)
    factors = [timed.factor(step) for step in range(0, 1001, 50)]
    assert all(a < b for a, b in zip(factors, factors[1:], strict=False))
    assert term.over(300, 1000).factor(200) == timed.factor(500)
    assert DomainAdversary(mu=0.5, ramp=False).bind(SCHEMA).over(0, 1000).factor(0) == 0.5


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(before, total, step) of every call of a term while a run trains."""
    seen: list[tuple[int, int, int]] = []
    plain = BoundDomainAdversary.factor

    def watched(self: BoundDomainAdversary, step: int) -> float:
        seen.append((self.before, self.total, step))
        return plain(self, step)

    monkeypatch.setattr(BoundDomainAdversary, "factor", watched)
    return seen


def run_of(**changes: Any) -> config.Run:
    model = ModelChoice(
        tower=SharedBottom(bottom=(8,), tower=()), tables=Views(width=4), extra_heads=(DomainClassifier((5,)),)
    )
    run = make_run(model=model, losses=(Supervised(), DomainAdversary()))
    run = replace(run, training=replace(run.training, steps=10, evaluate_every=5))
    return replace(run, **changes)


def test_a_training_tells_the_term_its_length(spans: list[Any]) -> None:
    train(run_of(), tables={"log": make_log()}, baseline=False)
    assert spans == [(0, 10, step) for step in range(10)]


def test_phases_begin_anew_and_a_frozen_trunk_has_no_adversary(spans: list[Any]) -> None:
    run = run_of(schedule=DTrain())
    run = replace(run, model=replace(run.model, heads=Heads(by="domain")))
    train(run, tables={"log": make_log()}, baseline=False)
    assert spans == [(0, 4, step) for step in range(4)] * 2, "phases 1 and 2; phase 3 reads no trunk"


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_rounds_of_one_training_go_on(spans: list[Any], state: Any) -> None:
    both = Branch("all", {"click": 1.0, "buy": 1.0, "domain_adversary": 1.0})
    schedule = ForkMerge(
        targets=("click",), own=(Branch("target", {"click": 1.0}), both), interval=4, optimiser_state=state
    )
    train(run_of(schedule=schedule), tables={"log": make_log()}, baseline=False)
    assert {total for _, total, _ in spans} == {10}
    assert [before + step for before, _, step in spans] == [*range(4)] * 2 + [*range(4, 8)] * 2 + [8, 9] * 2


def test_a_run_resumes_at_its_place(spans: list[Any], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    run = run_of()
    run = replace(run, training=replace(run.training, checkpoint_steps=4))
    whole = train(run, tables={"log": make_log()}, baseline=False)
    plain, count = BoundDomainAdversary.__call__, iter(range(100))

    def dies(self: Any, *args: Any) -> Any:
        if next(count) == 7:
            raise Stop
        return plain(self, *args)

    BoundDomainAdversary.__call__ = dies  # type: ignore[method-assign]
    try:
        with pytest.raises(Stop):
            train(run, tmp_path / "run", tables={"log": make_log()}, baseline=False)
    finally:
        BoundDomainAdversary.__call__ = plain  # type: ignore[method-assign]
    spans.clear()
    again = train(run, tmp_path / "run", tables={"log": make_log()}, baseline=False, resume=True)
    assert spans == [(0, 10, step) for step in range(4, 10)]
    for name, value in whole.bundle.model.state_dict().items():
        assert torch.equal(value, again.bundle.model.state_dict()[name]), name


# --------------------------------------------------------------------------------------------------------------- absence
def test_rows_without_a_known_domain_take_no_part() -> None:
    below, classifier, x = make_parts()
    term, batch = DomainAdversary().bind(SCHEMA), make_batch()
    trunk = below(x).detach().requires_grad_()
    (loss,) = term(say(classifier, trunk), batch, 0).values()
    (grad,) = torch.autograd.grad(loss, trunk)
    known = batch.domain >= 2
    assert not grad[~known].any() and grad[known].any(1).all()
    (alone,) = term(say(classifier, trunk[known]), batch.select(known), 0).values()
    torch.testing.assert_close(loss, alone, **EXACT)
    assert term(say(classifier, trunk), make_batch([0, 1] * 7), 0) == {}
    assert term(say(classifier, trunk), make_batch(weight=(batch.domain < 2).float()), 0) == {}
    assert set(term(say(classifier, trunk), make_batch([3] * B), 0)) == {"domain_adversary"}, "one domain is enough"


def model_of(encoded: Encoded, **choice: Any) -> tuple[config.Run, Model]:
    run = run_of()
    run = replace(run, model=replace(run.model, **choice))
    return run, bundle.build(run, encoded.schema)


def test_a_batch_without_known_domains_leaves_the_classifier_alone(encoded: Encoded) -> None:
    run, model = model_of(encoded)
    step = Joint(weight_decay=0.1).build(model, steps=100, weights={})
    terms = bound_terms(run, encoded.schema, model)

    def go(batch: Batch) -> None:
        output = model(batch)
        step({k: v for term in terms for k, v in term(output, batch, 0).items()}, output)

    for at in range(5):
        go(encoded.batch(np.arange(20 * at, 20 * at + 20)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = encoded.batch(np.arange(100, 140))
    go(replace(batch, domain=torch.zeros_like(batch.domain)))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not any(n.startswith("extra_heads.") for n in moved)


# ------------------------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("tower", [SharedBottom(bottom=(9, 7)), SharedBottom(bottom=()), STAR(bottom=(7,)), STEM()])
def test_the_classifier_is_as_wide_as_the_trunk_and_there_while_training(encoded: Encoded, tower: Any) -> None:
    views = Views(kind="per_task" if tower.kind == "stem" else "shared", width=4)
    run, model = model_of(encoded, tower=tower, tables=views)
    assert model.training and {"extra_heads.domain.own", "extra_heads.domain.trunk"} <= model.gives
    batch = encoded.batch(np.arange(30))
    output = model(batch)
    assert output.extras["extra_heads.domain.own"].shape == (30, 3)
    tables = [x.vectors for x in output.lookups] or list(model.embeddings.tables.parameters())
    grads = torch.autograd.grad(output.extras["extra_heads.domain.trunk"].square().sum(), tables, allow_unused=True)
    assert any(grad is not None and grad.any() for grad in grads), "it reaches the tables below the trunk"
    assert not any(name.startswith("extra_heads.") for name in model.eval()(batch).extras), "serving pays nothing"


def test_all_else_begins_and_predicts_as_without_it(encoded: Encoded) -> None:
    _, one = model_of(encoded)
    _, other = model_of(encoded, extra_heads=())
    state, plain = one.state_dict(), other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.items())
    assert set(state) - set(plain) == {n for n in state if n.startswith("extra_heads.")} != set()
    batch = encoded.batch(np.arange(30))
    for mode in (True, False):
        found, want = one.train(mode)(batch), other.train(mode)(batch)
        assert all(torch.equal(found.logits[name], value) for name, value in want.logits.items())


@pytest.mark.parametrize("update", [Joint(), AdaTask(), Weighted(), Aggregated(), Aggregated(aggregator=config.MGDA())])
def test_every_update_takes_the_objective(update: Any) -> None:
    run = run_of(update=update)
    result = train(run, tables={"log": make_log()}, baseline=False)
    state = result.bundle.model.state_dict()
    fresh = bundle.build(run, result.bundle.model.schema).state_dict()
    assert all(not torch.equal(state[n], fresh[n]) for n in fresh if n.startswith("extra_heads."))


def test_trains_and_comes_back(tmp_path: Path) -> None:
    result = train(run_of(), tables={"log": make_log()}, baseline=False)
    result.bundle.save(tmp_path / "saved")
    loaded = bundle.Bundle.load(tmp_path / "saved")
    for name, value in result.bundle.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name])
    counts = warm_start(loaded.model, loaded.fitted, result.bundle)  # type: ignore[arg-type]
    assert counts["tensors new"] == counts["rows new"] == 0
    schema = replace(loaded.fitted.schema, domains=("(unknown)", "(missing)", "mail", "home", "x"))
    with pytest.raises(bundle.BundleError, match="same domains in the same order"):
        warm_start(loaded.model, replace(loaded.fitted, schema=schema), result.bundle)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- planted data
def planted(seed: int, rows: int = 3000) -> pl.DataFrame:
    """Two domains whose inputs differ in x2, which says nothing of the label; x0 and x1 do."""
    rng = np.random.default_rng(seed)
    site, x = rng.integers(0, 2, rows), rng.normal(size=(rows, 3))
    x[:, 2] = x[:, 2] * 0.5 + np.where(site == 1, 1.5, -1.5)
    y = (x[:, 0] + x[:, 1] + rng.normal(size=rows) * 0.5 > 0).astype(int)
    columns = {f"x{n}": x[:, n] for n in range(3)}
    return pl.DataFrame({"user": np.arange(rows), "site": np.where(site, "b", "a"), **columns, "click": y})


def leak(run: config.Run, log: pl.DataFrame) -> tuple[float, float]:
    """How well a logistic regression on the trained trunk tells the domains of other rows (AUC), and the task's AUC."""
    from sklearn.metrics import roc_auc_score

    result = train(run, tables={"log": log}, baseline=False)
    encoded = Encoded(encode(run.data, tables={"log": log}))
    model = result.bundle.model.eval()

    def trunk(split: str) -> tuple[np.ndarray, np.ndarray]:
        batch = encoded.batch(encoded.split(split))
        with torch.no_grad():
            return model(batch).trunk.numpy(), (batch.domain == 2).numpy()

    x, d = trunk("train")
    scale = x.std(0) + 1e-9
    probe = LogisticRegression(max_iter=2000).fit(x / scale, d)
    x, d = trunk("test")
    return roc_auc_score(d, probe.predict_proba(x / scale)[:, 1]), result.metrics["test"]["click"]["auc"]["value"]


def planted_run(mu: float | None) -> config.Run:
    """``mu`` None: without the term."""
    data = Data(
        rows="log", user="user", domain="site", features=tuple(Feature(f"x{n}", kind="number") for n in range(3)),
        tasks=(Task("click"),), split=Split(kind="user", valid=0.1, test=0.3),
    )  # fmt: skip
    against = () if mu is None else (DomainClassifier((64,)),)
    losses: tuple[Any, ...] = (Supervised(), *([] if mu is None else [DomainAdversary(mu=mu)]))
    run = make_run(data=data, losses=losses, update=Joint(lr=0.003))
    run = replace(run, model=ModelChoice(tower=SharedBottom(bottom=(16, 8), tower=()), extra_heads=against))
    return replace(run, training=replace(run.training, batch_size=256, steps=1000, evaluate_every=1000))


@pytest.mark.slow
def test_the_trunk_forgets_the_domain_with_the_term_and_not_without() -> None:
    found: dict[Any, list[tuple[float, float]]] = {None: [], 0.0: [], 1.0: []}
    for seed in range(3):
        for mu in found:
            found[mu].append(leak(replace(planted_run(mu), seed=seed), planted(seed)))
    domain = {mu: [one for one, _ in values] for mu, values in found.items()}
    task = {mu: [other for _, other in values] for mu, values in found.items()}
    assert min(domain[None]) > 0.9 and min(domain[0.0]) > 0.9, found
    assert max(domain[1.0]) < 0.85 and np.mean(domain[1.0]) < np.mean(domain[None]) - 0.25, found
    assert min(task[1.0]) > min(task[None]) - 0.03, found


# ---------------------------------------------------------------------------------------------------------------- errors
def test_either_without_the_other_is_refused() -> None:
    run = run_of()
    with pytest.raises(JobError, match="^Loss `domain_adversary` needs the extra head `domain`: add"):
        train(replace(run, model=replace(run.model, extra_heads=())), tables={"log": make_log()}, baseline=False)
    with pytest.raises(JobError, match=r"^No loss reads the extra head `domain`.* kind `domain_adversary`, or leave"):
        train(replace(run, losses=(Supervised(),)), tables={"log": make_log()}, baseline=False)
    with pytest.raises(JobError, match="No loss trains the logits of task click, buy"):
        train(replace(run, losses=(DomainAdversary(),)), tables={"log": make_log()}, baseline=False)


def test_errors() -> None:
    for mu in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="Parameter `mu` should be finite and not negative. Found"):
            DomainAdversary(mu=mu)
    with pytest.raises(ValueError, match=r"Parameter `hidden` should be positive. Found \(0,\)."):
        DomainClassifier((0,))
    with pytest.raises(ValueError, match=r"tells domains apart and needs at least two. Found \['feed'\]."):
        DomainAdversary().bind(replace(SCHEMA, domains=SCHEMA.domains[:3]))
    with pytest.raises(ValueError, match="`domain_adversary` is the objective of a loss. Rename the task or domain"):
        DomainAdversary().bind(replace(SCHEMA, tasks=(Task("domain_adversary"),)))
    with pytest.raises(
        ValueError, match="`model.extra_heads.0` needs domains, and the data declare none: set `data.domain`."
    ):
        run_of(data=make_data(domain=""))
    assert config.from_dict(config.to_dict(run_of())) == run_of()
    changed = config.override(run_of(), ["model.extra_heads.0.hidden=[3]"])
    assert changed.model.extra_heads == (DomainClassifier((3,)),)
    with pytest.raises(config.RunError, match="unknown key `model.extra_heads.0.widths`. Allowed: kind, hidden"):
        config.override(run_of(), ["model.extra_heads.0.widths=[3]"])
