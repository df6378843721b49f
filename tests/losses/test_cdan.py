"""CDAN: what the classifier reads, who gets which gradient, weights by certainty, projection, sides, and the refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toylog import make_data, make_log, make_run

from unbraid import bundle, config
from unbraid.config import ModelChoice
from unbraid.job import JobError, train
from unbraid.losses.cdan import CDAN, LARGEST, Conditional
from unbraid.losses.domain_adversary import DomainAdversary, DomainClassifier
from unbraid.losses.supervised import Supervised
from unbraid.towers.mlp import SharedBottom
from unbraid.types import Batch, Output, Schema, Task

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
DOMAINS = ("(unknown)", "(missing)", "feed", "search", "mail")
SCHEMA = Schema((), (Task("click"),), domains=DOMAINS)
SIZES = Schema((), (Task("size", kind="multiclass"),), domains=DOMAINS, classes={"size": ("L", "M", "S")})
B, H = 14, 6


def a_batch(weight: Tensor | None = None) -> Batch:
    codes = torch.tensor([2, 3, 4, 0, 1, 2, 3, 3, 4, 2, 0, 2, 4, 3])
    known = {"any": torch.arange(B) % 3 == 0}
    view = torch.zeros(B, dtype=torch.int8)
    view[13] = 1
    return Batch({}, {"any": torch.zeros(B)}, known, codes, weight, torch.arange(B), view, torch.full((B,), -1))


class Parts:
    """Inputs, a trunk of one layer, a head of one task, and the extra head, all in float64."""

    def __init__(self, schema: Schema, **config: Any) -> None:
        torch.manual_seed(0)
        (task,) = schema.tasks
        outputs = 3 if task.kind == "multiclass" else 1
        self.task, self.x = task.name, torch.randn(B, 4, dtype=torch.float64)
        self.below, self.head = nn.Linear(4, H).double(), nn.Linear(H, outputs).double()
        self.extra: Any = Conditional(**config).build(schema, H, {}).double()

    def output(self) -> Output:
        trunk = self.below(self.x)
        z = self.head(trunk)
        output = Output({self.task: z if z.shape[1] > 1 else z[:, 0]}, {}, trunk)
        return replace(output, extras=self.extra(output))

    def parameters(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return tuple(list(m.parameters()) for m in (self.extra, self.below, self.head))  # type: ignore[return-value]


def entropy(parts: Parts, batch: Batch, of: str, sure: bool) -> Tensor:
    """The cross-entropy row by row, from products pair by pair."""
    linears = [m for m in parts.extra.modules() if isinstance(m, nn.Linear)]
    trunk = parts.below(parts.x)
    z = parts.head(trunk).detach()
    z = torch.cat([0 * z, z], 1) if z.shape[1] == 1 else z
    g = z.exp() / z.exp().sum(1, keepdim=True)
    h = -(g * g.log()).sum(1)
    sides: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for i in range(B):
        w = torch.ones((), dtype=torch.float64) if batch.weight is None else batch.weight[i].double()
        w = w * (1 + torch.exp(-h[i])) if sure else w
        labelled = bool(batch.observed["any"][i])
        side = int(batch.domain[i]) - 2 if of == "domains" else int(not labelled)
        if side < 0 or w == 0 or batch.view[i]:
            continue
        x = torch.stack([g[i, c] * trunk[i, a] for c in range(g.shape[1]) for a in range(H)])
        for n, layer in enumerate(linears):
            x = layer.weight @ x + layer.bias
            x = x if n == len(linears) - 1 else x * (x > 0)
        sides.setdefault(side, []).append((w, x.logsumexp(0) - x[side]))
    if of == "labelled":
        means = [sum(w * loss for w, loss in rows) / sum(w for w, _ in rows) for rows in sides.values()]
        return sum(means) / len(means)  # type: ignore[return-value]
    rows = [row for each in sides.values() for row in each]
    return sum(w * loss for w, loss in rows) / sum(w for w, _ in rows)  # type: ignore[return-value]


@pytest.mark.parametrize("schema", [SCHEMA, SIZES], ids=["binary", "multiclass"])
@pytest.mark.parametrize("of", ["domains", "labelled"])
@pytest.mark.parametrize(("sure", "hidden", "weighted"), [(True, (5,), False), (False, (), True), (True, (), True)])
def test_value_and_gradients(schema: Schema, of: Any, sure: bool, hidden: tuple[int, ...], weighted: bool) -> None:
    """The classifier descends, the trunk ascends by mu, and predictions are constants."""
    parts = Parts(schema, hidden=hidden, of=of)
    batch = a_batch(torch.arange(B).remainder(4).float() if weighted else None)
    term = CDAN(mu=0.3, ramp=False, of=of, entropy=sure).bind(schema)
    (loss,) = term(parts.output(), batch, 0).values()
    want = entropy(parts, batch, of, sure)
    torch.testing.assert_close(loss, want, **EXACT)
    own, lower, head = parts.parameters()
    mine = torch.autograd.grad(loss, [*own, *lower, *head], allow_unused=True)
    theirs = torch.autograd.grad(want, [*own, *lower])
    for k, full in enumerate(theirs):
        assert full.any()
        torch.testing.assert_close(mine[k], full if k < len(own) else -0.3 * full, **EXACT)
    assert all(grad is None for grad in mine[len(theirs) :]), "the head of the task is left alone"


def test_many_products_are_projected() -> None:
    """Inner products of projections are on average products of inner products."""
    schema = replace(SIZES, classes={"size": tuple(map(str, range(800)))})
    torch.manual_seed(0)
    extra: Any = Conditional(projected=20_000).build(schema, H, {}).double()
    assert H * 800 > LARGEST and not extra.flat and extra.of_trunk.shape == (H, 20_000)
    assert not any(name.startswith("of_") for name, _ in extra.named_parameters()), "drawn once, never trained"
    assert {"of_trunk", "of_classes"} <= set(extra.state_dict())
    trunk, z = torch.randn(5, H).double().requires_grad_(), 3 * torch.randn(5, 800).double()
    read = extra.read(Output({"size": z}, {}, trunk))
    g = z.softmax(1)
    want = (trunk @ trunk.T) * (g @ g.T)
    scale = trunk.norm(dim=1)[:, None] * trunk.norm(dim=1) * g.norm(dim=1)[:, None] * g.norm(dim=1)
    assert ((read @ read.T - want) / scale).abs().max() < 0.1
    (grad,) = torch.autograd.grad(read.sum(), trunk)
    torch.testing.assert_close(grad, (extra.of_trunk @ (g @ extra.of_classes).T).T / 20_000**0.5, **EXACT)
    small: Any = Conditional().build(SIZES, H, {})
    assert (
        small.flat and small.layers[0][0].in_features == 18
        if isinstance(small.layers[0], nn.Sequential)
        else small.flat
    )


def a_run(**changes: Any) -> config.Run:
    head = Conditional(hidden=(5,), of="labelled", task="click")
    model = ModelChoice(tower=SharedBottom(bottom=(8,), tower=()), extra_heads=(head,))
    run = make_run(data=make_data(withhold="site = 'mail'"), model=model, losses=(Supervised(), CDAN(of="labelled")))
    return replace(run, training=replace(run.training, steps=6, evaluate_every=6), **changes)


@pytest.mark.parametrize("of", ["labelled", "domains"])
def test_trains_and_comes_back(of: Any, tmp_path: Any) -> None:
    run = a_run()
    head = replace(run.model.extra_heads[0], of=of)
    run = replace(run, model=replace(run.model, extra_heads=(head,)), losses=(Supervised(), CDAN(of=of)))
    result = train(run, tmp_path / "run", tables={"log": make_log()}, baseline=False)
    state, fresh = result.bundle.model.state_dict(), bundle.build(run, result.bundle.model.schema).state_dict()
    assert all(not torch.equal(state[n], fresh[n]) for n in fresh if n.startswith("extra_heads."))
    loaded = bundle.Bundle.load(tmp_path / "run")
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in state.items())


def test_dann_of_labelled_and_unlabelled_rows_needs_no_domains() -> None:
    run = a_run(
        data=make_data(domain="", withhold="site = 'mail'"), losses=(Supervised(), DomainAdversary(of="labelled"))
    )
    run = replace(run, model=replace(run.model, extra_heads=(DomainClassifier((4,), of="labelled"),)))
    train(run, tables={"log": make_log()}, baseline=False)


def test_dann_of_sides_counts_each_side_alike() -> None:
    """The plain mean over the rows of each side, by hand."""
    torch.manual_seed(0)
    classifier: Any = DomainClassifier((), of="labelled").build(SCHEMA, H, {}).double()
    trunk, batch = torch.randn(B, H, dtype=torch.float64, requires_grad=True), a_batch()
    output = Output({}, {}, trunk)
    (loss,) = (
        DomainAdversary(of="labelled", mu=2.0, ramp=False)
        .bind(SCHEMA)(replace(output, extras=classifier(output)), batch, 0)
        .values()
    )
    log_p = classifier.layers(trunk).log_softmax(1)
    labelled, plain = batch.observed["any"], batch.view == 0
    want = -(log_p[labelled & plain, 0].mean() + log_p[~labelled & plain, 1].mean()) / 2
    torch.testing.assert_close(loss, want, **EXACT)
    (mine,), (full,) = torch.autograd.grad(loss, trunk), torch.autograd.grad(want, trunk)
    torch.testing.assert_close(mine, -2.0 * full, **EXACT)
    assert not mine[13].any(), "a strong view takes no part"


def test_errors() -> None:
    with pytest.raises(JobError, match="Loss `cdan` needs the extra head `conditional`: add"):
        train(
            replace(a_run(), model=replace(a_run().model, extra_heads=())), tables={"log": make_log()}, baseline=False
        )
    with pytest.raises(
        JobError, match="Loss `cdan` and the extra head `conditional` should have the same `of`. Found two."
    ):
        train(a_run(losses=(Supervised(), CDAN())), tables={"log": make_log()}, baseline=False)
    with pytest.raises(JobError, match="No loss reads the extra head `conditional`"):
        train(a_run(losses=(Supervised(),)), tables={"log": make_log()}, baseline=False)
    run = a_run()
    several = replace(
        SIZES, tasks=(Task("spend", kind="real"), Task("aside", role="auxiliary"), *SIZES.tasks, *SCHEMA.tasks)
    )
    assert Conditional().build(several, H, {}).task == "size", "the first target with classes"
    with pytest.raises(
        ValueError, match=r"reads a binary or multiclass task: set `task` to one of \['aside'\]. Found ``"
    ):
        Conditional().build(replace(several, tasks=several.tasks[:2]), H, {})
    with pytest.raises(ValueError, match="Found `spend`"):
        Conditional(task="spend").build(SCHEMA, H, {})
    with pytest.raises(ValueError, match="Parameter `projected` should be positive"):
        Conditional(projected=0)
    with pytest.raises(ValueError, match="Parameter `mu` should be finite and not negative"):
        CDAN(mu=-1.0)
    with pytest.raises(ValueError, match="tells domains apart and needs at least two"):
        CDAN().bind(replace(SCHEMA, domains=DOMAINS[:3]))
    assert config.from_dict(config.to_dict(run)) == run
