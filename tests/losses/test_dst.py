"""DST: the worked example, who gets which gradient, the schedule, what stays as it was, and what a killed run remembers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_labels_kit import (
    HIDDEN,
    KNOWN,
    ROWS,
    SCHEMA,
    Dies,
    few_labels_run,
    make_batch,
    make_logits,
    same,
    say,
    weights_of,
)
from test_self_training import reference as pseudo_reference
from torch import Tensor, nn
from torch.nn import functional as F
from toylog import make_data, make_log, make_run

from unbraid import bundle, config
from unbraid.citations import citations
from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.job import JobError
from unbraid.losses.dst import DST, PARTS, DSTHeads, shunned
from unbraid.losses.flexmatch import PerClass
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.towers.mlp import SharedBottom
from unbraid.types import Batch, Output, Schema, Task

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
ONE = Schema((), (Task("size", kind="multiclass"),), classes={"size": ("S", "M", "L")})
TASKS = ("click", "buy", "size")


def extra(part: str, task: str = "size") -> str:
    return f"extra_heads.dst.{part}.{task}"


# ----------------------------------------------------------------------------------------------------- the worked example
def test_the_worked_example() -> None:
    z = torch.tensor([[2, 0.5, 0], [0.2, 1.5, 0.1], [3, 0, 0]], dtype=torch.float64)
    w = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    known = {"size": torch.tensor([True, False, False])}
    places = torch.arange(3), torch.zeros(3, dtype=torch.int8), torch.full((3,), -1)
    batch = Batch({}, {"size": torch.tensor([2, 0, 0])}, known, torch.full((3,), 2), None, *places)
    output = Output({"size": z}, {}, z, {extra(part): w for part in PARTS})
    term = DST(eta=1.0, eta_prime=2.0, mu=0.0).bind(ONE)
    assert f"{float(term(output, batch, 0)['dst']):.6f}" == "2.078818"
    assert f"{float(term(output, batch, 10**6)['dst']):.6f}" == "2.078818", "the reversed part is 0 in value"
    assert f"{float(F.cross_entropy(w[:1], torch.tensor([0]))):.6f}" == "0.551445", (
        "the answer of the main head, not the label"
    )
    parts = shunned(w[1:], torch.tensor([1, 0]))
    assert [f"{float(x):.6f}" for x in (*parts, parts.mean())] == ["1.546393", "0.405464", "0.975928"]
    p = w[1:].softmax(1)
    assert [f"{float(x):.6f}" for x in (p[0, 1], p[1, 0])] == ["0.786986", "0.333333"]
    alone = DST(eta=1.0, eta_prime=0.0, mu=0.0).bind(ONE)(output, batch, 0)["dst"]
    assert f"{float(alone):.6f}" == "0.975928"


@pytest.mark.parametrize(("classes", "value"), [(2, 0.6931), (3, 0.4055), (10, 0.1054), (100, 0.01005)])
def test_at_a_uniform_worst_head(classes: int, value: float) -> None:
    logits = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    (loss,) = shunned(logits, torch.tensor([0]))
    assert float(loss.detach()) == pytest.approx(value, rel=5e-4, abs=2e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    assert float(grad[0, 0]) == pytest.approx(1 / classes, rel=1e-4), "p: many classes begin with a weak game"


def test_it_is_bounded_and_done_where_p_is_small() -> None:
    logits = torch.tensor([[80.0, 0], [-20.0, 0], [-10.0, 0]], dtype=torch.float64, requires_grad=True)
    losses = shunned(logits, torch.zeros(3, dtype=torch.int64))
    assert f"{float(losses[0].detach()):.4f}" == "13.8155" and float(losses[1].detach()) == 0
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.isfinite(grad).all() and not grad[1].any() and grad[2].any()


# --------------------------------------------------------------------------------------------------------------- schedule
def test_lambda() -> None:
    term = DST(hi=0.1, time=1000).bind(ONE)
    table = {0: 0, 100: 0.004996, 500: 0.024492, 1000: 0.046212, 2000: 0.076159, 5000: 0.098661, 10000: 0.099991}
    assert {i: round(term.factor(i), 6) for i in table} == table
    assert term.factor(0) == 0
    assert term.over(700, 10**4).factor(300) == term.factor(1000), "a training that goes on"
    assert term.over(0, 10).factor(9) == term.factor(9), "a time constant and not a length"
    assert term.over(700, 10**4).fresh(np.arange(2), {}, {}).factor(300) == term.factor(1000)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- gradient routing
class Net(nn.Module):
    """Features, main heads of three tasks, and DST's heads, in float64."""

    def __init__(self, hidden: tuple[int, ...] = (5,), dropout: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.psi = nn.Linear(4, 6)
        self.h = nn.ModuleDict({task: nn.Linear(6, 3 if task == "size" else 1) for task in TASKS})
        self.extra = DSTHeads(hidden, dropout).build(SCHEMA, 6, dict.fromkeys(("click", "buy", "spend", "size"), 6))
        self.double()

    def forward(self, x: Tensor) -> Output:
        f = self.psi(x).tanh()
        found = {task: 3 * head(f) for task, head in self.h.items()}
        logits = {task: z if task == "size" else z.squeeze(1) for task, z in found.items()}
        output = Output(logits, dict.fromkeys((*TASKS, "spend"), f), f)
        return replace(output, extras=self.extra(output))

    def grads(self, loss: Tensor) -> dict[str, dict[str, Tensor]]:
        """part -> parameter -> its gradient, where there is one."""
        named = dict(self.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
        parts: dict[str, dict[str, Tensor]] = {"psi": {}, "h": {}, "extra.pseudo": {}, "extra.worst": {}}
        for name, grad in zip(named, found, strict=True):
            if grad is not None:
                parts[next(part for part in parts if name.startswith(part))][name] = grad
        return parts


X = torch.randn(ROWS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
REST: dict[str, Any] = {"time": 1}  # at step 10**6 lambda is hi


def test_pseudo_labels_reach_their_head_and_the_features_alone() -> None:
    net, batch = Net(), make_batch()
    loss = DST(eta=0.0, threshold=0.4).bind(SCHEMA)(net(X), batch, 10**6)["dst"]
    grads = net.grads(loss)
    assert not grads["h"] and not grads["extra.worst"], "not even zeros"
    assert all(
        grad.any() for part in ("psi", "extra.pseudo") for name, grad in grads[part].items() if "buy" not in name
    )
    assert len(grads["psi"]) == 2 and len(grads["extra.pseudo"]) == 2 * 4  # `buy` has no row


def test_the_worst_head_descends_and_the_features_ascend() -> None:
    net, batch = Net(), make_batch()
    term = DST(mu=0.0, hi=0.3, eta=0.7, **REST).bind(SCHEMA)
    torch.manual_seed(3)
    output = net(X)
    grads = net.grads(term(output, batch, 10**6)["dst"])
    assert not grads["h"] and not grads["extra.pseudo"]
    plain = {extra("worst.own", task): output.extras[extra("worst.features", task)] for task in TASKS}
    through = DST(mu=0.0, hi=0.0, eta=0.7).bind(SCHEMA)(replace(output, extras={**output.extras, **plain}), batch, 0)[
        "dst"
    ]
    upwards = net.grads(through)  # what the features would get from a layer that does not turn it round
    assert len(grads["psi"]) == 2 and not upwards["extra.worst"]
    for name, grad in grads["psi"].items():
        assert grad.any()
        torch.testing.assert_close(grad, -0.3 * upwards["psi"][name], **EXACT)
    start = net.grads(term(output, batch, 0)["dst"])
    assert not start["psi"], "at the first step lambda is 0, and nothing is read back"
    assert start["extra.worst"].keys() == grads["extra.worst"].keys()
    for name, grad in start["extra.worst"].items():
        torch.testing.assert_close(grad, grads["extra.worst"][name], **EXACT)


def test_the_supervised_loss_reaches_features_and_main_head_alone() -> None:
    net, batch = Net(), make_batch()
    loss = torch.stack(list(Supervised().bind(Schema((), (SCHEMA.task("click"), SCHEMA.task("size")), classes=SCHEMA.classes))(
        net(X), batch, 0).values())).sum()  # fmt: skip
    grads = net.grads(loss)
    assert grads["psi"] and grads["h"] and not grads["extra.pseudo"] and not grads["extra.worst"]


class Reversed(torch.autograd.Function):
    """One pass through a layer that turns the gradient round: what the paper's code has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return -ctx.factor * grad, None


def classes(z: Tensor) -> Tensor:
    return z if z.shape[1] == 3 else torch.cat([torch.zeros_like(z), z], 1)


def reference(net: Net, batch: Batch, config: DST, factor: float, masks: dict[str, list[Tensor]]) -> Tensor:
    """Row by row, one pass through `Reversed`, log-probabilities written out."""
    f = net.psi(X).tanh()
    weight = torch.ones(ROWS) if batch.weight is None else batch.weight
    total = f.new_zeros(())
    for task, share in (("click", 0.5), ("size", 2.0)):
        z, key = classes(3 * net.h[task](f)), f"task/{task}"
        worst = net.extra.worst[key]
        low = Reversed.apply(f, factor)
        for layer, mask in zip(worst.layers, masks[task], strict=True):
            low = torch.relu(low @ layer.weight.T + layer.bias) * mask
        w = classes(low @ worst.last.weight.T + worst.last.bias)
        mean: dict[str, list[Tensor]] = {"agree": [], "differ": [], "taught": []}
        mass = {"agree": 0.0, "differ": 0.0, "taught": 0.0}
        for i in range(KNOWN + HIDDEN):
            if weight[i] == 0:
                continue
            answer, q = int(z[i].argmax()), float(z[i].detach().exp().max() / z[i].detach().exp().sum())
            p = w[i].exp()[answer] / w[i].exp().sum()
            part = "agree" if i < KNOWN else "differ"
            mean[part].append(weight[i] * (-p.log() if i < KNOWN else -(1 - p + 1e-6).log()))
            mass[part] += float(weight[i])
            if i >= KNOWN:
                mass["taught"] += float(weight[i])
                if q > config.threshold:
                    taught = classes(net.extra.pseudo[key](f[batch.pair[i]][None]))[0]
                    mean["taught"].append(weight[i] * (taught.exp().sum().log() - taught[answer]))
        found = {part: torch.stack(terms).sum() / mass[part] for part, terms in mean.items()}
        total = total + share * (
            config.mu * found["taught"] + config.eta * (config.eta_prime * found["agree"] + found["differ"])
        )
    return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("hidden", "dropout"), [((5,), 0.0), ((), 0.0), ((7, 5), 0.5)])
def test_value_and_gradient_are_those_of_a_reversal_layer(
    hidden: tuple[int, ...], dropout: float, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, batch = Net(hidden, dropout), make_batch(weighted=weighted)
    net.extra.pseudo.eval()  # its dropout is torch's own
    masks: dict[str, list[Tensor]] = {}
    for task in TASKS:
        worst = net.extra.worst[f"task/{task}"]
        masks[task] = worst.masks(X.new_zeros(ROWS, 6))
        assert all(
            (m == 0).any() == (dropout > 0) and set(m.unique().tolist()) <= {0, 1 / (1 - dropout)} for m in masks[task]
        )
        monkeypatch.setattr(worst, "masks", lambda features, task=task: masks[task])
    settings = DST(threshold=0.6, mu=0.4, eta=0.7, eta_prime=3.0, hi=0.2, time=50)
    for step in (0, 30):
        got = settings.bind(SCHEMA)(net(X), batch, step)["dst"]
        factor = 0.4 / (1 + math.exp(-step / 50)) - 0.2
        want = reference(net, batch, settings, factor, masks)
        torch.testing.assert_close(got, want, **EXACT)
        named = [(n, p) for n, p in net.named_parameters() if "buy" not in n and not n.startswith("h.")]
        one, other = (torch.autograd.grad(loss, [p for _, p in named], allow_unused=True) for loss in (got, want))
        for (name, _), a, b in zip(named, one, other, strict=True):
            assert a is not None and b is not None and b.any(), name
            torch.testing.assert_close(a, b, **EXACT, msg=name)


def test_what_is_believed_is_the_rules() -> None:
    """The head that learns takes the place of the main one in the value; targets stay the main head's."""
    batch = make_batch()
    logits = make_logits(batch)
    same_head = {extra("pseudo", task): logits[task] for task in TASKS}
    for rule in ("fixmatch", "pseudo_label", "flexmatch"):
        term = DST(rule=rule, eta=0.0, threshold=0.7).bind(SCHEMA)  # type: ignore[arg-type]
        value, _ = pseudo_reference(logits, batch, 0.7, 1.0, rule != "pseudo_label")
        assert float(term(say(logits, same_head), batch, 0)["dst"].detach()) == pytest.approx(value, rel=1e-10)
    none = DST(eta=0.0, threshold=1.0).bind(SCHEMA)
    assert none(say(logits, same_head), batch, 0) == {}
    everything = DST(eta=0.0, threshold=0.3, tasks=("size",)).bind(SCHEMA)
    lesson = everything.rule.lesson(SCHEMA.task("size"), say(logits), batch)
    assert lesson is not None and len(lesson.at) == HIDDEN


@pytest.mark.parametrize("weighted", [False, True])
def test_strong_views_of_labelled_rows(weighted: bool) -> None:
    batch = make_batch(weighted=weighted, of_all=True)
    logits = make_logits(batch)
    term = DST(mu=0.0, eta=0.0, strong=0.1).bind(SCHEMA)
    loss = term(say(logits), batch, 0)["dst"]
    want, slopes = torch.zeros((), dtype=torch.float64), {n: torch.zeros_like(v) for n, v in logits.items()}
    weight = torch.ones(len(batch)).double() if batch.weight is None else batch.weight.double()
    for task, share in (("click", 0.5), ("buy", 1.0), ("size", 2.0)):
        rows = [i for i in range(KNOWN) if batch.observed[task][i] and weight[i] > 0]
        for i in rows:
            z, at = logits[task].detach(), int(batch.pair[i])
            row = z[at] if task == "size" else torch.stack([z.new_zeros(()), z[at]])
            p, y = row.exp() / row.exp().sum(), int(batch.labels[task][i])
            w = 0.1 * share * float(weight[i] / weight[rows].sum())
            want = want - w * p[y].log()
            slope = w * (p - F.one_hot(torch.tensor(y), len(p)))
            slopes[task][at] += slope if task == "size" else slope[1]
    torch.testing.assert_close(loss, want, **EXACT)
    grads = torch.autograd.grad(loss, [logits[n] for n in TASKS], allow_unused=True)
    for name, grad in zip(TASKS, grads, strict=True):
        if grad is None:
            assert not slopes[name].any(), name
        else:
            torch.testing.assert_close(grad, slopes[name], **EXACT)
            assert not grad[: KNOWN + HIDDEN].any(), "the weak view's loss is the supervised one"


# ---------------------------------------------------------------------------------------------------------------- absence
def test_a_game_needs_both_sides() -> None:
    net, batch = Net(), make_batch()
    output, term = net(X), DST(mu=0.0).bind(SCHEMA)
    nobody = dict.fromkeys(batch.observed, torch.zeros(ROWS, dtype=torch.bool))
    assert term(output, replace(batch, observed=nobody), 5) == {}
    everybody = dict.fromkeys(batch.observed, torch.ones(ROWS, dtype=torch.bool))
    assert term(output, replace(batch, observed=everybody), 5) == {}
    assert set(term(output, batch, 5)) == {"dst"} == set(term.objectives)
    light = replace(batch, weight=(torch.arange(ROWS) >= KNOWN).float())
    assert term(output, light, 5) == {}, "rows of weight 0 are no side"
    assert DST(mu=0.0, eta=0.0).bind(SCHEMA)(output, batch, 5) == {}


def test_an_absent_task_leaves_its_heads_alone() -> None:
    data = make_data(tasks=(Task("click"), Task("size", kind="multiclass")))
    encoded = Encoded(encode(data, tables={"log": make_log(rows=300)}))
    run = make_run(
        data=data, model=with_heads(), losses=(Supervised(), DST(threshold=0.3)), augment=few_labels_run().augment
    )
    model = bundle.build(run, encoded.schema)
    step, terms = Joint(weight_decay=0.1).build(model, steps=9, weights={}), bound_terms(run, encoded.schema, model)

    def go(hidden: dict[str, int]) -> None:
        batch = encoded.batch(np.arange(40))
        batch = replace(batch, observed={t: torch.arange(40) >= n for t, n in hidden.items()})
        strong = replace(batch.select(torch.arange(20)).unlabelled(), view=torch.ones(20, dtype=torch.int8))
        whole = Batch.join([batch, strong])
        whole.pair[:20], whole.pair[40:] = torch.arange(40, 60), torch.arange(20)
        output = model(whole)
        step({k: v for term in terms for k, v in term(output, whole, 500).items()}, output)

    for _ in range(5):
        go({"click": 20, "size": 20})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    go({"click": 20, "size": 0})
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("extra_heads.dst.pseudo.task/click" in n for n in moved)
    assert any("extra_heads.dst.worst.task/click" in n for n in moved)
    assert not any(n.startswith("extra_heads.") and "task/size" in n for n in moved)


# --------------------------------------------------------------------------------------------------------------- the model
def with_heads(**changes: Any) -> ModelChoice:
    parts: dict[str, Any] = {"tower": SharedBottom(bottom=(16,), tower=(8,)), "extra_heads": (DSTHeads((12,)),)}
    return ModelChoice(**parts | changes)


def test_the_extra_heads_are_there_while_training_and_change_nothing_else() -> None:
    tasks = (Task("click"), Task("spend", kind="real"), Task("size", kind="multiclass"))
    encoded = Encoded(encode(make_data(tasks=tasks), tables={"log": make_log(rows=300)}))
    one, other = (
        bundle.build(make_run(model=model), encoded.schema) for model in (with_heads(), with_heads(extra_heads=()))
    )
    batch = encoded.batch(np.arange(30))
    extras = one(batch).extras
    assert set(extras) == set(one.gives) == {extra(part, task) for part in PARTS for task in ("click", "size")}
    assert {name: value.shape for name, value in extras.items() if "pseudo" in name} == {
        extra("pseudo", "click"): (30,), extra("pseudo", "size"): (30, 3)
    }  # fmt: skip
    assert all(
        torch.equal(extras[extra("worst.own", t)], extras[extra("worst.features", t)]) for t in ("click", "size")
    )
    assert not one.eval()(batch).extras
    state = one.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert all(torch.equal(a, one(batch).logits[t]) for t, a in other.eval()(batch).logits.items())


def test_without_its_factors_it_is_the_supervised_run() -> None:
    plain = few_labels_run()
    want = weights_of(replace(plain, model=with_heads(extra_heads=())))
    got = weights_of(few_labels_run(DST(mu=0.0, eta=0.0), model=with_heads()))
    assert same(want, {name: value for name, value in got.items() if not name.startswith("extra_heads.")})
    assert not same(
        want, {n: v for n, v in weights_of(few_labels_run(DST(threshold=0.4), model=with_heads())).items() if n in want}
    )


@pytest.mark.parametrize("rule", ["fixmatch", "flexmatch"])
def test_it_goes_on_where_it_was_killed(rule: Any, tmp_path: Path) -> None:
    run = few_labels_run(DST(rule=rule, threshold=0.5, time=5), model=with_heads())
    run = replace(run, training=replace(run.training, checkpoint_steps=5))
    want = weights_of(run)
    with pytest.raises(KeyboardInterrupt):
        weights_of(run, tmp_path / "run", watcher=Dies())
    assert (tmp_path / "run" / "fit-0.safetensors").exists()
    remembered = []
    plain = PerClass.load_state_dict

    def watched(self: PerClass, state: Any) -> None:
        plain(self, state)
        remembered.append(self)

    PerClass.load_state_dict = watched  # type: ignore[method-assign]
    try:
        assert same(weights_of(run, tmp_path / "run", resume=True), want)
    finally:
        PerClass.load_state_dict = plain  # type: ignore[method-assign]
    assert len(remembered) == (rule == "flexmatch")


# ----------------------------------------------------------------------------------------------------------------- errors
def test_wrong_parameters() -> None:
    bad: dict[str, Any]
    for bad in ({"mu": -1.0}, {"eta": math.inf}, {"eta_prime": -0.1}, {"hi": math.nan}, {"strong": -1.0}, {"time": 0},
                {"threshold": 2.0}, {"temperature": 0.0}):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` should be"):
            DST(**bad)
    with pytest.raises(ValueError, match="`hidden` should be positive"):
        DSTHeads(hidden=(0,))
    with pytest.raises(ValueError, match=r"`dropout` should be in \[0, 1\)"):
        DSTHeads(dropout=1.0)
    with pytest.raises(ValueError, match="Loss `dst` is of binary and multiclass tasks"):
        DST(tasks=("spend",)).bind(SCHEMA)


def test_heads_and_loss_need_each_other_and_views() -> None:
    with pytest.raises(JobError, match="Loss `dst` needs the extra head `dst`"):
        weights_of(few_labels_run(DST()))
    with pytest.raises(JobError, match="No loss reads the extra head `dst`: .* kind `dst`"):
        weights_of(few_labels_run(model=with_heads()))
    with pytest.raises(ValueError, match="Loss `dst` compares two views of a row"):
        few_labels_run(DST(), augment=None)
    assert few_labels_run(DST(rule="pseudo_label"), augment=None)
    with pytest.raises(ValueError, match='of rows with a label: set `augment.of` to "all". Found "unlabelled"'):
        few_labels_run(DST(strong=0.1))


def test_it_cites_itself_and_its_rule() -> None:
    keys = ("chen2022dst", "sohn2020fixmatch", "zhang2021flexmatch", "lee2013pseudolabel")
    for rule, used in (("fixmatch", 1), ("flexmatch", 2), ("pseudo_label", 3)):
        text = citations(few_labels_run(DST(rule=rule), model=with_heads()))  # type: ignore[arg-type]
        assert [key in text for key in keys] == [n in (0, used) for n in range(4)]
    run = few_labels_run(DST(), model=with_heads())
    assert config.from_dict(config.to_dict(run)) == run
