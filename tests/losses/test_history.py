"""The loss of second heads: parity with the supervised loss on their logits, weights, absence, and what a run needs for it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.dare import DARE
from unbraid.encoders.din import DIN
from unbraid.encoders.table import Views
from unbraid.encoders.twin import TWIN
from unbraid.job import JobError, train
from unbraid.losses.focal import Focal
from unbraid.losses.history import HistoryLoss
from unbraid.losses.ranking import Ranking
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.stem import STEM
from unbraid.types import Batch, Output, Schema, Task

TASKS = (Task("click", weight=3.0), Task("dwell", kind="real", weight=0.5), Task("stars", kind="multiclass"))
SCHEMA = Schema((), TASKS, domains=("(unknown)", "(missing)", "feed", "search"), classes={"stars": ("1", "3", "5")})
B = 12


def make_batch(seed: int = 0, rate: bool = True, weighted: bool = True) -> Batch:
    g = torch.Generator().manual_seed(seed)
    labels = {
        "click": torch.randint(0, 2, (B,), generator=g).float(),
        "dwell": torch.randn(B, generator=g),
        "stars": torch.randint(0, 3, (B,), generator=g),
    }
    observed = {name: torch.rand(B, generator=g) < 0.7 for name in labels}
    weight = torch.rand(B, generator=g) + 0.5 if weighted else None
    meta = {"sampling_rate.click": torch.rand(B, generator=g) * 0.9 + 0.1} if rate else {}
    domain = torch.randint(2, 4, (B,), generator=g)
    places = torch.arange(B), torch.zeros(B, dtype=torch.int8), torch.full((B,), -1)
    return Batch({}, labels, observed, domain, weight, *places, meta)


def make_output(seed: int = 1) -> Output:
    torch.manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"click": (B,), "dwell": (B,), "stars": (B, 3)}
    second = {f"history.{n}": torch.randn(*s, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
    logits = {n: torch.randn(*s, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
    return Output(logits, {}, torch.zeros(B, 1), second)


def row_loss(task: str, output: Output, batch: Batch, i: int) -> torch.Tensor:
    s, y = output.extras[f"history.{task}"][i], batch.labels[task][i]
    if task == "stars":
        return torch.logsumexp(s, 0) - s[y]
    if task == "dwell":
        return (s - y.double()) ** 2
    s = s - math.log(batch.meta["sampling_rate.click"][i].item()) if batch.meta else s
    return torch.log(1 + torch.exp(s)) - y * s


def mean(task: str, output: Output, batch: Batch, domain: int | None = None) -> torch.Tensor:
    rows = [i for i in range(B) if batch.observed[task][i] and domain in (None, batch.domain[i].item())]
    w = [1.0 if batch.weight is None else batch.weight[i].item() for i in rows]
    return sum(w * row_loss(task, output, batch, i) for w, i in zip(w, rows, strict=True)) / sum(w)  # type: ignore[return-value]


def written_out(by: str, output: Output, batch: Batch) -> dict[str, torch.Tensor]:
    names = [task.name for task in TASKS]
    codes = {code: name for code, name in enumerate(SCHEMA.domains) if code in batch.domain.tolist()}
    if by == "task":
        return {t: mean(t, output, batch) for t in names}
    pairs = {f"{t}@{name}": mean(t, output, batch, code) for t in names for code, name in codes.items()}
    if by == "task@domain":
        return pairs
    return {d: sum(t.weight * pairs[f"{t.name}@{d}"] for t in TASKS) for d in codes.values()}  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------ the formulas
@pytest.mark.parametrize("by", ["task", "domain", "task@domain"])
@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("plain", [True, False])
def test_it_is_the_supervised_loss_of_the_second_heads(by: Any, weight: float, plain: bool) -> None:
    batch, output = make_batch(rate=not plain, weighted=not plain), make_output()
    got = HistoryLoss(weight=weight, by=by).bind(SCHEMA)(output, batch, 0)
    want = written_out(by, output, batch)
    assert set(got) == set(want)
    leaves = list(output.extras.values())
    for name, loss in want.items():
        torch.testing.assert_close(got[name], weight * loss, rtol=1e-7, atol=1e-9)  # weights and rates are float32
        mine, theirs = (
            torch.autograd.grad(x, leaves, retain_graph=True, allow_unused=True) for x in (got[name], weight * loss)
        )
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert b.any()
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert torch.autograd.grad(sum(got.values()), list(output.logits.values()), allow_unused=True) == (None,) * 3  # type: ignore[arg-type]


def test_an_absent_task_has_no_objective() -> None:
    batch, output = make_batch(), make_output()
    hidden = replace(batch, observed={**batch.observed, "dwell": torch.zeros(B, dtype=torch.bool)})
    losses = HistoryLoss().bind(SCHEMA)(output, hidden, 0)
    assert set(losses) == {"click", "stars"}
    grads = torch.autograd.grad(sum(losses.values()), list(output.extras.values()), allow_unused=True)  # type: ignore[arg-type]
    assert [g is None for g in grads] == [False, True, False]


def test_it_names_what_it_reads() -> None:
    assert HistoryLoss().bind(SCHEMA).needs == ("history.click", "history.dwell", "history.stars")


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
def test_a_weight_that_is_none(weight: float) -> None:
    with pytest.raises(ValueError, match="Parameter `weight` should be positive. Found "):
        HistoryLoss(weight=weight)


# --------------------------------------------------------------------------------------------------------------- in a model
@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    tasks = (Task("click"), Task("buy"), Task("spend", kind="real"), Task("size", kind="multiclass"))
    data = make_data(tasks=tasks, cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data, tables={"log": make_log()}))


def hide(batch: Batch, task: str) -> Batch:
    return replace(batch, observed={**batch.observed, task: torch.zeros(len(batch), dtype=torch.bool)})


@pytest.mark.parametrize("kind", ["shared", "per_task"])
def test_an_absent_task_moves_nothing_of_its_second_head(encoded: Encoded, kind: Any) -> None:
    """Neither weights nor the optimiser's moments, nor tables that only it reads."""
    torch.manual_seed(0)
    tower = SharedBottom() if kind == "shared" else STEM()
    model = Model(
        encoded.schema, tower, Views(kind=kind, width=4), history=DARE(keep=2, auxiliary=(5,), attention="per_view")
    )
    term = HistoryLoss().bind(encoded.schema)
    step = Joint(weight_decay=0.1, table_weight_decay=0.1).build(model, steps=100, weights={})

    def go(batch: Batch) -> None:
        output = model(batch)
        step(term(output, batch, 0), output)

    for at in range(10):
        go(encoded.batch(np.arange(20 * at, 20 * at + 40)))
    for task in ("click", "buy", "spend", "size"):
        own = [n for n, _ in model.named_parameters() if n.startswith(f"second.task/{task}.")]
        own += [n for n, _ in model.named_parameters() if f"embeddings.tables.{task}/" in n]
        assert len(own) >= 4 and (kind == "shared") == (not any("tables" in n for n in own))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        go(hide(encoded.batch(np.arange(100, 140)), task))
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert not moved & set(own)
        assert {n.split(".")[1] for n in moved if n.startswith("second.")} == {
            f"task/{t.name}" for t in encoded.schema.tasks if t.name != task
        }


@pytest.mark.parametrize("kind", ["per_task", "separate"])
def test_a_tasks_second_head_reads_its_own_and_common_views_only(encoded: Encoded, kind: Any) -> None:
    from unbraid.towers.single_task import SingleTask

    tower = STEM() if kind == "per_task" else SingleTask()
    model = Model(encoded.schema, tower, Views(kind=kind, width=4), history=TWIN(keep=2, auxiliary=(5,)))
    batch = encoded.batch(np.arange(100, 160))
    output = model(batch)
    for task in encoded.schema.tasks:
        extra = output.extras[f"history.{task.name}"]
        assert extra.shape == ((len(batch), 3) if task.kind == "multiclass" else (len(batch),))
        found = torch.autograd.grad(
            extra.square().sum(), [x.vectors for x in output.lookups], retain_graph=True, allow_unused=True
        )
        views = {x.table.split("/")[0] for x, g in zip(output.lookups, found, strict=True) if g is not None and g.any()}
        assert views == ({task.name, "shared"} if kind == "per_task" else {task.name})


# ----------------------------------------------------------------------------------------------------------------- in a run
def run_of(history: Any, *losses: Any) -> config.Run:
    return make_run(model=ModelChoice(history=history, tables=Views(width=4)), losses=losses)


def test_a_run_without_second_heads_is_refused() -> None:
    for history, why in (
        (DARE(), r"needs second heads: set `model.history.auxiliary`, such as \[64\].$"),
        (TWIN(), r"needs second heads: set `model.history.auxiliary`, such as \[64\].$"),
        (DIN(), "needs second heads, and history encoder `din` has none.$"),
    ):
        with pytest.raises(JobError, match="^Loss `history` " + why):
            train(run_of(history, Supervised(), HistoryLoss()), tables={"log": make_log()}, baseline=False)


def test_a_task_without_a_loss_of_its_own_is_refused() -> None:
    history = DARE(keep=2, auxiliary=(4,))
    only_click = Ranking(tasks=("click",))
    for losses, bare in (((HistoryLoss(),), "click, buy"), ((only_click, HistoryLoss()), "buy")):
        with pytest.raises(JobError, match=f"No loss trains the logits of task {bare}, .* kind `supervised`"):
            train(run_of(history, *losses), tables={"log": make_log()}, baseline=False)
    with pytest.raises(JobError, match="Task click, buy has the loss `ranking` alone"):
        train(run_of(history, Ranking(), HistoryLoss()), tables={"log": make_log()}, baseline=False)
    train(run_of(history, Focal(), Ranking(), HistoryLoss()), tables={"log": make_log()}, baseline=False)


@pytest.mark.parametrize("history", [DARE(auxiliary=(4,)), TWIN(auxiliary=(4,))])
def test_second_heads_without_a_loss_are_refused(history: Any) -> None:
    with pytest.raises(
        JobError,
        match=r"give \['history.buy', 'history.click'\], which no loss reads.* Add a loss of kind `history`, or set `auxiliary`",
    ):
        train(run_of(history, Supervised()), tables={"log": make_log()}, baseline=False)


def test_a_run_with_both_trains_second_heads_and_adds_to_the_tasks_own_loss(encoded: Encoded) -> None:
    run = run_of(DARE(keep=2, auxiliary=(4,)), Supervised(), HistoryLoss(weight=0.5))
    result = train(run, tables={"log": make_log()}, baseline=False)
    assert result.metrics["test"]["click"]["auc"]["value"] > 0
    state = result.bundle.model.state_dict()
    assert any(n.startswith("second.task/click") for n in state), "they stay with the model, for a warm start"
    terms = bound_terms(run, result.bundle.model.schema, result.bundle.model)
    assert [type(term).__name__ for term in terms] == ["Bound", "BoundHistoryLoss"]
    first, second = (set(term(make_output_of(result.bundle.model), make_pair(), 0)) for term in terms)
    assert first == second == {"click", "buy"}


def make_pair() -> Batch:
    batch = make_batch()
    ones = torch.ones(B, dtype=torch.bool)
    return replace(
        batch, labels=dict.fromkeys(("click", "buy"), batch.labels["click"]), observed={"click": ones, "buy": ones}
    )


def make_output_of(model: Model) -> Output:
    logits = {task.name: torch.zeros(B) for task in model.schema.tasks}
    return Output(logits, {}, torch.zeros(B, 1), {f"history.{name}": x for name, x in logits.items()})
