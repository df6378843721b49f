"""D-Train: the ten checks of its definition, its cache, its options, resumption, and towers of every kind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy.optimize import minimize
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.bundle import Bundle, build
from unbraid.compare import budget_of, check
from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.dare import DARE
from unbraid.encoders.din import DIN
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.job import JobError, train
from unbraid.losses.history import HistoryLoss
from unbraid.losses.ranking import Ranking
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.predictor import Predictor
from unbraid.preflight import bound_terms
from unbraid.schedules import d_train
from unbraid.schedules.d_train import DTrain, FrozenHead, Tuning, hidden_of
from unbraid.schedules.domains import Domains, head_and_tail, table, values
from unbraid.schedules.one_stage import OneStage
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Local, Training
from unbraid.types import FIRST_VALUE, UNKNOWN, Batch, Task

LOG = make_log(rows=500)
TRAINING = Training(batch_size=64, steps=15, checkpoint_steps=1, checkpoint_seconds=0, metric="logloss")
HEADS = Heads(by="domain")
TOWERS = Heads(by="domain", hidden=(6,))
CHOICE = ModelChoice(tower=SharedBottom((16,), (8,)), tables=Views(width=4, lazy_rows=0), heads=HEADS)
DECAY = Joint(lr=0.01, weight_decay=0.05, table_weight_decay=0.05)
LAST = DTrain(keep="last", tune="each")
Weights = dict[str, torch.Tensor]


def toy(schedule: Any = LAST, **changes: Any) -> config.Run:
    return make_run(**{"training": TRAINING, "update": DECAY, "model": CHOICE, "schedule": schedule, **changes})


def encoded(log: pl.DataFrame = LOG, **changes: Any) -> Encoded:
    return Encoded(encode(make_data(**changes), tables={"log": log}))


class Death(RuntimeError):
    """What a test kills a training with."""


class Trial:
    """A run's model and session; it can die at a training step, and writes down what `fit` was asked."""

    def __init__(
        self, data: Encoded, run: config.Run, folder: Path | None = None, resume: bool = False, die: int = -1
    ) -> None:
        self.run, self.model = run, build(run, data.schema)
        self.terms, self.die, self.steps = bound_terms(run, data.schema, self.model), die, 0
        weights = {task.name: task.weight for task in data.schema.tasks}
        terms = [Dying(term, self) for term in self.terms]
        self.local = Local(data, terms, run.update, run.training, weights, run.seed, folder, resume)
        self.fits: list[tuple[Any, Weights, dict[str, Any]]] = []
        fit = self.local.fit

        def spied(model: Any, steps: int, **rest: Any) -> Any:
            found = fit(model, steps, **rest)
            self.fits.append((model, copies(self.model), {"steps": steps, **rest}))
            return found

        self.local.fit = spied  # type: ignore[method-assign]

    def go(self) -> Model:
        trained = self.run.schedule(self.local, self.model, self.run.training.steps)
        assert trained is self.model
        return self.model

    @property
    def record(self) -> dict[str, Any]:
        assert self.local.record is not None
        return dict(self.local.record)


class Dying:
    """A term that counts its calls, and kills the training at one of them."""

    def __init__(self, term: Any, trial: Trial) -> None:
        self.term, self.trial, self.needs = term, trial, term.needs
        self.by = getattr(term, "by", "task")

    def __call__(self, *args: Any) -> Any:
        if self.trial.steps == self.trial.die:
            raise Death
        self.trial.steps += 1
        return self.term(*args)


def copies(model: torch.nn.Module) -> Weights:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a: Weights, b: Weights, but: str = "nothing") -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items() if but not in k)


def heads(weights: Weights, code: int) -> Weights:
    return {k: v for k, v in weights.items() if f"linears.{code}." in k or f"towers.{code}." in k and "heads" in k}


def logits(model: Any, data: Encoded, rows: Any, domain: int | None = None) -> dict[str, torch.Tensor]:
    model.eval()
    batch = data.batch(np.asarray(rows))
    if domain is not None:
        batch = dataclasses.replace(batch, domain=torch.full_like(batch.domain, domain))
    with torch.no_grad():
        return dict(model(batch).logits)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return encoded(cache=str(tmp_path_factory.mktemp("cache")))


# ------------------------------------------------------------------------------------------------------- 1: continuity
@pytest.mark.parametrize("head", [HEADS, TOWERS, dataclasses.replace(HEADS, two=True)])
def test_the_split_changes_no_prediction_of_any_domain_bit_for_bit(head: Heads, data: Encoded) -> None:
    run = toy(
        model=dataclasses.replace(CHOICE, heads=head),
        losses=(Supervised(), Ranking(form="jrc")) if head.two else (Supervised(),),
    )
    trial = Trial(data, run)
    trial.model.tie_heads()
    trial.local.fit(trial.model, 6)
    rows, codes = np.arange(60), range(len(data.schema.domains))
    before = [logits(trial.model, data, rows, code) for code in codes]
    whole = logits(trial.model, data, rows)
    shared = sum(p.numel() for p in trial.model.parameters())
    trial.model.untie_heads()
    assert sum(p.numel() for p in trial.model.parameters()) > shared, "now every domain has its own"
    assert all(equal(logits(trial.model, data, rows, code), before[code]) for code in codes)
    assert equal(logits(trial.model, data, rows), whole)
    for code in codes[1:]:  # in phase 1 all domains are predicted alike
        torch.testing.assert_close(before[code]["click"], before[UNKNOWN]["click"])
    params = [p for h in trial.model.heads.values() for p in h.parameters()]
    assert len({id(p) for p in params}) == len(params)


def test_every_row_trains_the_one_head_of_phase_1(data: Encoded) -> None:
    """Its gradient is the sum of those that heads of their own would get."""
    run = toy()
    tied, apart = (Trial(data, run).model for _ in range(2))
    tied.tie_heads()
    apart.tie_heads()
    apart.untie_heads()
    (term,) = bound_terms(run, data.schema, tied)
    batch = data.batch(np.arange(64))
    for model in (tied, apart):
        sum(term(model(batch), batch, 0).values()).backward()
    for task in ("click", "buy"):
        one = tied.heads[f"task/{task}"].linears[0].weight.grad
        each = [linear.weight.grad for linear in apart.heads[f"task/{task}"].linears]
        torch.testing.assert_close(one, sum(g for g in each if g is not None))


# ------------------------------------------------------------------------------------- 2: one domain, no later phases
def test_one_domain_and_no_later_phase_is_plain_training_and_all_phases_are_three_restarts() -> None:
    data = encoded(domain="")
    assert len(data.schema.domains) == FIRST_VALUE + 1
    rows = data.split("test")
    plain = Trial(data, toy(OneStage()))
    plain.go()
    for schedule in (
        DTrain(shares=(1.0, 0.0, 0.0)),
        DTrain(phases=(1,)),
        DTrain(phases=(2,)),
        DTrain(shares=(0.0, 1.0, 0.0)),
    ):
        short = Trial(data, toy(schedule))
        assert equal(logits(short.go(), data, rows), logits(plain.model, data, rows)), schedule
    whole, by_hand = Trial(data, toy(LAST)), Trial(data, toy(OneStage()))
    whole.go()
    model = by_hand.model
    by_hand.local.fit(model, 6)
    by_hand.local.fit(model, 6)
    by_hand.local.fit(model, 3, trainable=lambda n: n.startswith("heads"), stream=True, seed=[3, FIRST_VALUE])
    for task, found in logits(whole.model, data, rows).items():
        torch.testing.assert_close(found, logits(model, data, rows)[task], rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------- 3: the trunk is frozen
FROZEN = [
    pytest.param(CHOICE, id="lazy"),
    pytest.param(dataclasses.replace(CHOICE, tables=Views(width=4, lazy_rows=-1, unknown_rate=0.2), history=DIN(hidden=(4,)),
                                     tower=SharedBottom((16,), (8,), dropout=0.3), heads=TOWERS), id="dense-dice-dropout"),
]  # fmt: skip


@pytest.mark.parametrize("cache", ["memory", "disk", "off"])
@pytest.mark.parametrize("choice", FROZEN)
def test_phase_3_leaves_all_below_the_heads_as_it_is(choice: ModelChoice, cache: Any, data: Encoded) -> None:
    trial = Trial(data, toy(dataclasses.replace(LAST, cache=cache), model=choice))
    trial.go()
    _, before, _ = trial.fits[1]
    after = copies(trial.model)
    assert same(before, after, but="heads."), "parameters, buffers and tables, weight decay on"
    assert any("before" not in k and not torch.equal(v, after[k]) for k, v in before.items() if "heads" in k)
    assert all(p.requires_grad for p in trial.model.parameters()), "whoever trains it further can"
    buffers = [name for name, _ in trial.model.named_buffers() if name.endswith("variance")]
    assert bool(buffers) == (choice.history != CHOICE.history)


# ------------------------------------------------------------------------------------- 4 and 5: domains know not of others
def flipped(site: str) -> pl.DataFrame:
    """The log with the other labels of buying in one domain, nothing else changed (clicks are in histories)."""
    return LOG.with_columns(buy=pl.when(pl.col("site") == site).then(1 - pl.col("buy")).otherwise(pl.col("buy")))


def tuned(data: Encoded, begun: Weights, schedule: DTrain = LAST, order: Any = list, leave_out: str = "") -> Weights:
    """The weights after phase 3 alone."""
    trial = Trial(data, toy(schedule))
    trial.model.load_state_dict(begun)
    found = Domains.of(trial.local)
    if leave_out:
        code = data.schema.domains.index(leave_out)
        found = dataclasses.replace(found, codes=tuple(c for c in found.codes if c != code))
    record: dict[str, Any] = {"tuned": {}, "cache": {"rows": 0, "bytes": 0}}
    Tuning(schedule, trial.local, trial.model, found, 5, record).run(order)
    return copies(trial.model)


@pytest.mark.parametrize(
    "schedule",
    [LAST, dataclasses.replace(LAST, looks=2, keep="better"), dataclasses.replace(LAST, solver="lbfgs", l2=0.1)],
)
def test_a_domains_data_change_its_own_head_alone_and_order_does_not_matter(schedule: DTrain, data: Encoded) -> None:
    begun = copies(Trial(data, toy(DTrain(phases=(1, 2)))).go())
    plain = tuned(data, begun, schedule)
    other = encoded(flipped("search"))
    assert other.schema.domains == data.schema.domains
    changed, removed = tuned(other, begun, schedule), tuned(data, begun, schedule, leave_out="search")
    for code, name in list(enumerate(data.schema.domains))[FIRST_VALUE:]:
        mine = heads(plain, code)
        moved = schedule.keep == "last" or not same(mine, heads(begun, code))
        assert same(mine, heads(changed, code)) == (name != "search" or not moved)
        assert same(mine, heads(removed, code)) == (name != "search" or not moved)
    for order in (lambda codes: codes[::-1], lambda codes: [codes[i] for i in (1, 2, 0)]):
        assert same(plain, tuned(data, begun, schedule, order))


def test_in_phase_2_a_domains_data_do_change_other_heads(data: Encoded) -> None:
    ends = []
    for one in (data, encoded(flipped("search"))):
        trial = Trial(one, toy(DTrain(phases=(2,))))
        ends.append(copies(trial.go()))
    for code in range(FIRST_VALUE, len(data.schema.domains)):
        assert not same(heads(ends[0], code), heads(ends[1], code))


# ------------------------------------------------------------------------------------------------------ 6: the optimum
def test_lbfgs_reaches_the_optimum_that_scipy_finds(data: Encoded) -> None:
    schedule = dataclasses.replace(LAST, solver="lbfgs", l2=0.05)
    trial = Trial(data, toy(schedule))
    trial.go()
    _, before, _ = trial.fits[1]
    for name, found in trial.record["tuned"].items():
        assert found["gradient"] < 1e-6 and found["loss after"] <= found["loss before"]
        code = data.schema.domains.index(name)
        rows = trial.local.rows("train")
        batch = data.batch(rows[data.columns["domain"][rows] == code])
        x = hidden_of(trial.model, batch)["click"].double().numpy()
        y, seen = batch.labels["click"].double().numpy(), batch.observed["click"].numpy()
        start = np.append(
            before[f"heads.task/click.linears.{code}.weight"][0], before[f"heads.task/click.linears.{code}.bias"]
        ).astype(float)

        def loss(w: Any, x: Any = x[seen], y: Any = y[seen], start: Any = start) -> Any:
            z = x @ w[:-1] + w[-1]
            gap = (1 / (1 + np.exp(-z)) - y) / len(y)
            value = (np.logaddexp(0, z) - y * z).mean() + 0.025 * ((w - start) ** 2).sum()
            return value, np.append(x.T @ gap, gap.sum()) + 0.05 * (w - start)

        best = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x
        linear = trial.model.heads["task/click"].linears[code]
        np.testing.assert_allclose([*linear.weight[0].tolist(), linear.bias.item()], best, atol=2e-6)


def test_a_penalty_pulls_to_the_head_of_phase_2(data: Encoded) -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    parameter.register_hook(d_train._pull(parameter, 0.3))
    with torch.no_grad():
        parameter += torch.tensor([0.5, 1.0])
    (parameter**2).sum().backward()
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, torch.tensor([3.0 + 0.15, -2.0 + 0.3], dtype=torch.float64))
    far = []
    for l2 in (0.0, 1.0, 100.0):
        trial = Trial(data, toy(dataclasses.replace(LAST, l2=l2), update=Joint(lr=0.01)))
        after = copies(trial.go())
        far.append(sum(float((after[k] - v).square().sum()) for k, v in trial.fits[1][1].items()))
        assert not any(p._backward_hooks for p in trial.model.parameters() if p._backward_hooks), "hooks are gone"
    assert far[0] > far[1] > far[2] > 0


# ------------------------------------------------------------------------------------------------ 7: gradient routing
@pytest.mark.parametrize("head", [HEADS, TOWERS])
def test_in_phase_2_the_head_of_an_absent_domain_rests(head: Heads, data: Encoded) -> None:
    run = toy(model=dataclasses.replace(CHOICE, heads=head))
    trial = Trial(data, run)
    update = run.update.build(trial.model, steps=50, weights={})
    (term,) = bound_terms(run, data.schema, trial.model)

    def go(batch: Batch) -> Weights:
        output = trial.model(batch)
        update(term(output, batch, 0), output)
        return copies(trial.model)

    codes = data.columns["domain"]
    for at in range(5):
        before = go(data.batch(np.arange(40 * at, 40 * at + 40)))
    moments = {k: {n: v.clone() for n, v in s.items()} for k, s in update.state_dict()["dense"].items()}
    after = go(data.batch(np.flatnonzero(codes == 2)[:30]))
    later = update.state_dict()["dense"]
    for code in range(FIRST_VALUE, len(data.schema.domains)):
        assert same(heads(before, code), heads(after, code)) == (code != 2)
        own = [k for k in moments if k in heads(before, code)]
        assert len(own) == (4 if head.hidden else 2) * 2
        assert all(torch.equal(v, later[k][n]) for k in own for n, v in moments[k].items()) == (code != 2)


# -------------------------------------------------------------------------------------------------- 8: parameters
def test_there_are_as_many_parameters_as_in_shared_bottom(data: Encoded) -> None:
    counts = []
    for schedule in (LAST, DTrain(phases=(1,)), OneStage()):
        trial = Trial(data, toy(schedule))
        counts.append(sum(p.numel() for p in (trial.go() if schedule is not None else trial.model).parameters()))
    assert len(set(counts)) == 1


# --------------------------------------------------------------------------------------------------- 9: unknown domains
@pytest.mark.parametrize("hidden", [(), (5,)])
def test_a_domain_that_training_did_not_know(hidden: tuple[int, ...], data: Encoded) -> None:
    rows, schedule = np.arange(40), DTrain(keep="last", shares=(0.4, 0.4, 0.2))
    found = {}
    for unknown in ("mean", "root", "error"):
        choice = dataclasses.replace(CHOICE, heads=dataclasses.replace(HEADS, hidden=hidden, unknown=unknown))
        trial = Trial(data, toy(schedule, model=choice))
        model = trial.go()
        if unknown == "error":
            with pytest.raises(ValueError, match=r"40 rows are of domains that training did not know.*mean, or root"):
                logits(model, data, rows, UNKNOWN)
            logits(model, data, rows)
            continue
        found[unknown] = logits(model, data, rows, UNKNOWN)
        each = [logits(model, data, rows, code)["click"] for code in range(FIRST_VALUE, len(data.schema.domains))]
        _, root, _ = trial.fits[0]
        mean = torch.stack(each).mean(0)
        assert torch.allclose(found[unknown]["click"], mean, atol=1e-6) == (unknown == "mean")
        assert same({k: v for k, v in heads(copies(model), UNKNOWN).items()}, heads(root, UNKNOWN)), "h_0 stays"
    assert not equal(found["mean"], found["root"])
    for schedule in (DTrain(phases=(2, 3)), OneStage()):  # type: ignore[assignment]
        with pytest.raises(ValueError, match="keeps no head from before"):
            toy(schedule, model=dataclasses.replace(CHOICE, heads=Heads(by="domain", unknown="root")))


# ---------------------------------------------------------------------------------------------------------- 10: resume
RESUMED = [
    pytest.param(dataclasses.replace(LAST, looks=2, keep="better"), {}, id="update"),
    pytest.param(DTrain(solver="lbfgs", l2=0.1, head_init="random", weighting="uniform"), {}, id="lbfgs"),
    pytest.param(DTrain(freeze=False), {}, id="unfrozen"),
]


@pytest.mark.parametrize(("schedule", "changes"), RESUMED)
def test_resumed_in_every_phase_it_is_the_same_bit_for_bit(
    schedule: DTrain, changes: Any, data: Encoded, tmp_path: Path
) -> None:
    dropout = dataclasses.replace(
        CHOICE, tower=SharedBottom((16,), (8,), dropout=0.3), heads=dataclasses.replace(TOWERS, dropout=0.2)
    )
    choice = dropout if schedule.solver == "update" else CHOICE
    run = toy(schedule, model=choice, **changes)
    whole = Trial(data, run)
    whole.go()
    phases = set()
    for die in sorted({3, 8, 13, whole.steps - 2}):  # in phases 1, 2 and 3, of these 6, 6 and more steps
        folder = tmp_path / str(die)
        folder.mkdir()
        with pytest.raises(Death):
            Trial(data, run, folder, die=die).go()
        kept = [path.name for path in folder.glob("schedule-d_train*.safetensors")]
        phases.add(len(kept))
        again = Trial(data, run, folder, resume=True)
        assert same(copies(again.go()), copies(whole.model)), die
        again_at_most = 20 if schedule.solver == "lbfgs" else 1  # a solution begins again
        assert again.steps <= whole.steps - die + again_at_most, "what was done is not done again"
        rest = [{k: v for k, v in trial.record.items() if k != "seconds"} for trial in (again, whole)]
        assert rest[0] == rest[1] and again.local.steps == whole.local.steps
        (folder / "end").write_text("")
    assert phases >= {0, 1}, "it died before and after the first checkpoint of the schedule"


def test_the_job_resumes_a_run_in_phase_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tables = toy(dataclasses.replace(LAST, keep="better")), {"log": LOG}
    whole = train(run, tmp_path / "whole", tables=tables, baseline=False)
    judged = d_train.domains.judge
    calls = iter(range(100))

    def dying(*args: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return judged(*args)

    monkeypatch.setattr(d_train.domains, "judge", dying)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "out", tables=tables, baseline=False)
    assert (tmp_path / "out" / "schedule-d_train-heads.safetensors").exists()
    monkeypatch.setattr(d_train.domains, "judge", judged)
    again = train(run, tmp_path / "out", tables=tables, baseline=False, resume=True)
    assert same(copies(whole.bundle.model), copies(again.bundle.model))
    assert not list((tmp_path / "out").glob("*-*.safetensors")), "a finished run needs no checkpoints"
    text = (tmp_path / "out" / "report.md").read_text()
    assert (
        "| domain | rows | after phase 1 | after phase 2 | after phase 3 | its head |" in text and "| *worst* |" in text
    )
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())["schedule"]
    assert set(record["seconds"]) == {"1", "2", "3"} and record["weighting"] == "proportional"
    loaded = Predictor(Bundle.load(tmp_path / "out"))
    shown = loaded.predict(LOG.head(20), tables=tables)
    np.testing.assert_array_equal(shown["click"], Predictor(whole.bundle).predict(LOG.head(20), tables=tables)["click"])


# ----------------------------------------------------------------------------------------------------------- the cache
@pytest.mark.parametrize("head", [HEADS, TOWERS])
def test_a_cached_trunk_gives_the_same_bits(head: Heads, data: Encoded) -> None:
    """Here on the CPU; `unbraid.schedules.d_train.FEW` says what it takes."""
    ends, rows = [], []
    for cache in ("memory", "disk", "off"):
        schedule = dataclasses.replace(LAST, cache=cache, looks=2, keep="better")  # type: ignore[arg-type]
        trial = Trial(data, toy(schedule, model=dataclasses.replace(CHOICE, heads=head, history=DIN(hidden=(4,)))))
        ends.append(copies(trial.go()))
        rows.append(trial.record["cache"]["rows"])
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])
    train_and_valid = len(data.split("train")) + len(data.split("valid"))
    assert 0 < rows[0] <= train_and_valid and rows == [rows[0], rows[0], 0]


def test_the_trunk_of_a_row_is_the_same_in_any_batch(data: Encoded) -> None:
    model = Trial(data, toy(model=FROZEN[1].values[0])).model  # type: ignore[arg-type]
    whole = hidden_of(model, data.batch(np.arange(100)))
    for rows in ([5], [7, 3], [99, 1, 50], list(range(0, 100, 7)), list(range(40))):
        for task, found in hidden_of(model, data.batch(np.array(rows))).items():
            assert torch.equal(found, whole[task][rows])
    assert model.training, "it is handed back in its mode"


def test_only_rows_that_will_be_read_are_cached_and_no_feature_is_read_later(
    data: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy(DTrain(tune="divided", shares=(0.4, 0.4, 0.2)), training=dataclasses.replace(TRAINING, batch_size=16))
    trial = Trial(data, run)
    asked: list[np.ndarray] = []
    batches, features = trial.local.batches, Encoded.inputs
    monkeypatch.setattr(trial.local, "batches", lambda rows: (asked.append(rows), batches(rows))[1])
    inside = []

    def counting(self: Encoded, rows: np.ndarray) -> Any:
        inside.append(len(rows))
        return features(self, rows)

    monkeypatch.setattr(Encoded, "inputs", counting)
    monkeypatch.setattr(d_train._Phases, "_finish", lambda *args: inside.clear() if args[1] < 3 else None)
    trial.go()
    train_rows = trial.local.rows("train")
    for part, (code, steps) in zip(
        asked, Tuning(run.schedule, trial.local, trial.model, Domains.of(trial.local), 3, {}).steps.items(), strict=True
    ):  # type: ignore[arg-type]
        mine = train_rows[data.columns["domain"][train_rows] == code]
        assert np.isin(part, train_rows).sum() <= 16 * steps < len(mine) or len(mine) <= 16 * steps
    assert sum(inside) == sum(map(len, asked)), "each cached row's features are read once, and no other's"


def test_the_trunk_is_of_no_use_to_losses_in_phase_3_and_those_of_second_heads_are_left_out(data: Encoded) -> None:
    choice = dataclasses.replace(CHOICE, history=DARE(auxiliary=(4,)))
    run = toy(model=choice, losses=(Supervised(), HistoryLoss()))
    trial = Trial(data, run)
    trial.go()
    head = FrozenHead(trial.model, FIRST_VALUE)
    out = head(data.batch(np.arange(20)))
    with pytest.raises(ValueError, match="trunk is frozen"):
        _ = out.trunk
    assert head.gives == frozenset() and not list(head.named_buffers())
    assert all("heads." in name for name, _ in head.named_parameters())


def test_heads_of_two_numbers_and_ranking_losses(data: Encoded) -> None:
    run = toy(
        model=dataclasses.replace(CHOICE, heads=Heads(by="domain", two=True)),
        losses=(Supervised(), Ranking(form="jrc")),
    )
    trial = Trial(data, run)
    before = copies(trial.model)
    assert not same(before, copies(trial.go()))
    head, batch = FrozenHead(trial.model, 3), data.batch(np.flatnonzero(data.columns["domain"] == 3)[:20])
    trial.model.eval()
    head.eval()
    for task, found in head(batch).logits.items():
        torch.testing.assert_close(found, trial.model(batch).logits[task])


# ------------------------------------------------------------------------------------------------ which heads are kept
def test_a_domain_keeps_the_head_of_phase_2_unless_validation_is_better(data: Encoded) -> None:
    """With labels of one domain's training rows turned round, its tuned head is bad, and is not kept."""
    log = LOG.with_columns(
        click=pl.when((pl.col("site") == "search") & (pl.col("time") < 600 * 10**6))
        .then(1 - pl.col("click"))
        .otherwise(pl.col("click"))
    )
    other = encoded(log)
    begun = copies(Trial(data, toy(DTrain(phases=(1, 2)), training=dataclasses.replace(TRAINING, steps=40))).go())
    for keep, kept in (("better", True), ("last", False)):
        schedule = dataclasses.replace(LAST, keep=keep, solver="lbfgs", l2=1e-3)  # type: ignore[arg-type]
        trial = Trial(other, toy(schedule))
        trial.model.load_state_dict(begun)
        record: dict[str, Any] = {"tuned": {}, "cache": {"rows": 0, "bytes": 0}}
        Tuning(schedule, trial.local, trial.model, Domains.of(trial.local), 5, record).run()
        found = record["tuned"]["search"]
        assert found["after"] > found["before"], "log-loss rose"
        assert (found["head"], found["why"]) == (("phase 2", "not better") if kept else ("phase 3", ""))
        assert (
            same(
                heads(copies(trial.model), other.schema.domains.index("search")),
                heads(begun, other.schema.domains.index("search")),
            )
            == kept
        )
        shown = values(trial.local, trial.model)
        for name, each in record["tuned"].items():  # what was judged is what the whole model now does
            want = each["after"] if each["head"] == "phase 3" else each["before"]
            assert shown[name] == pytest.approx(want, abs=1e-6)


def test_the_best_of_several_looks_is_kept(data: Encoded) -> None:
    run = toy(
        dataclasses.replace(LAST, keep="better", looks=5),
        update=Joint(lr=0.3),
        training=dataclasses.replace(TRAINING, steps=50),
    )
    trial = Trial(data, run)
    trial.go()
    for _, _, asked in trial.fits[2:]:
        assert asked["look"].every == 2 and asked["look"].keep_best and asked["stream"]
    for found in trial.record["tuned"].values():
        if found["before"] is not None:
            assert (found["head"] == "phase 3") == (found["after"] < found["before"])


def test_domains_without_rows_or_labels_keep_their_heads_and_are_listed() -> None:
    late = pl.when(pl.col("time") > 600 * 10**6).then(pl.lit("home")).otherwise(pl.col("site"))
    log = LOG.with_columns(site=late, click=pl.when(pl.col("site") == "mail").then(None).otherwise(pl.col("click")),
                           buy=pl.when(pl.col("site") == "mail").then(None).otherwise(pl.col("buy")))  # fmt: skip
    data = encoded(log)
    for init in ("copy", "random"):
        trial = Trial(data, toy(DTrain(head_init=init)))  # type: ignore[arg-type]
        trial.go()
        assert trial.record["without"] == {"mail": "no label"} and set(trial.record["rows"]) == {"home", "search"}
        mail = data.schema.domains.index("mail")
        assert same(heads(trial.fits[0][1], mail), heads(copies(trial.model), mail)), "as phase 1 left it"
        assert trial.record["tuned"]["search"]["why"] == "no validation row"
        assert trial.record["tuned"]["search"]["steps"] == 0
        assert "Nothing to learn from: mail (no label)." in trial.run.schedule.report(trial.record)  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize("phases", d_train.ORDERS)
def test_every_choice_of_phases_uses_all_steps(phases: tuple[int, ...], data: Encoded) -> None:
    schedule = DTrain(phases=phases, keep="last")
    trial = Trial(data, toy(schedule))
    model = trial.go()
    assert trial.local.steps == 15 == sum(schedule.split(15).values())
    assert list(trial.record["validation"]) == [str(p) for p in phases]
    assert len(trial.fits) == len([p for p in phases if p < 3]) + (3 if 3 in phases else 0)
    each = [heads(copies(model), code) for code in range(FIRST_VALUE, len(data.schema.domains))]
    alike = all(torch.equal(a, b) for a, b in zip(each[0].values(), each[1].values(), strict=True))
    assert alike == (phases == (1,)), "without a split all domains have one head"


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 12_345])
@pytest.mark.parametrize("shares", [(0.4, 0.4, 0.2), (1.0, 0.0, 0.0), (0.1, 0.7, 3.0), (1 / 3, 1 / 3, 1 / 3)])
def test_steps_are_split_and_none_is_lost(steps: int, shares: Any) -> None:
    found = DTrain(shares=shares).split(steps)
    assert sum(found.values()) == steps and min(found.values()) >= 0
    for phase, share in zip((1, 2, 3), shares, strict=True):
        assert abs(found[phase] - steps * share / sum(shares)) <= 1
    parts = [d_train._part(steps, i, 7) for i in range(7)]
    assert sum(parts) == steps and max(parts) - min(parts) <= 1


@pytest.mark.parametrize("by", ["task", "domain", "task@domain"])
@pytest.mark.parametrize("weighting", ["proportional", "uniform"])
def test_weights_of_domains_are_by_rows_or_equal_whatever_the_objectives(
    by: Any, weighting: Any, data: Encoded
) -> None:
    """The gradient of one batch with all training rows, against that of the formula."""
    tasks = (Task("click", weight=2.0), Task("buy"))
    data = encoded(tasks=tasks)
    rows = data.split("train")
    run = toy(DTrain(weighting=weighting, phases=(2,)), losses=(Supervised(by=by),), data=make_data(tasks=tasks),
              update=Joint(lr=1e-3), training=dataclasses.replace(TRAINING, batch_size=len(rows), steps=1))  # fmt: skip
    trial = Trial(data, run)
    start, want = copies(trial.model), build(run, data.schema)
    trial.go()
    batch = data.batch(rows)
    output = want(batch)
    total = torch.zeros(())
    counts = np.bincount(batch.domain.numpy(), minlength=5)
    for task in tasks:
        seen = batch.observed[task.name]
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            output.logits[task.name], batch.labels[task.name], reduction="none"
        )
        share = {c: counts[c] / len(rows) if weighting == "proportional" else 1 / 3 for c in (2, 3, 4)}
        if by == "task":  # means over the task's own labelled rows
            weight = torch.tensor([share.get(int(d), 0.0) / counts[int(d)] for d in batch.domain])
            total = total + task.weight * (each * weight * seen).sum() / (weight * seen).sum()
        else:
            for c, w in share.items():
                mine = seen & (batch.domain == c)
                total = total + task.weight * w * each[mine].mean()
    total.backward()
    assert trial.record["weighting"] == weighting and sum(trial.record["weights"].values()) == pytest.approx(1)
    for name, parameter in want.named_parameters():  # Adam's first step goes by the sign
        moved = trial.model.state_dict()[name] - start[name]
        if parameter.grad is not None and "embeddings" not in name:
            clear = parameter.grad.abs() > 1e-6
            torch.testing.assert_close(moved[clear], -1e-3 * parameter.grad[clear].sign(), rtol=0.05, atol=0)
    read = trial.fits[0][2]["read"]
    assert (read is not None) == (weighting == "uniform") and trial.fits[0][2].get("look") is None


def test_random_heads_begin_apart_and_do_not_depend_on_other_domains(data: Encoded) -> None:
    ends = []
    for fresh in ((2, 3, 4), (3,)):
        model = Trial(data, toy()).model
        model.tie_heads()
        model.untie_heads(fresh, seed=7)
        ends.append(copies(model))
    assert same(heads(ends[0], 3), heads(ends[1], 3)) and not same(heads(ends[0], 2), heads(ends[1], 2))
    a, b = heads(ends[0], 3).values(), heads(ends[0], 4).values()
    assert all(not torch.equal(x, y) for x, y in zip(a, b, strict=True) if x.dim() == 2)
    assert same(heads(ends[0], 0), heads(ends[1], 0)) and torch.equal(
        *(e["heads.task/buy.linears.1.bias"] for e in ends)
    )
    root = heads(copies(Trial(data, toy()).model), FIRST_VALUE)
    assert [*map(torch.Tensor.tolist, heads(ends[0], 0).values())] == [*map(torch.Tensor.tolist, root.values())]
    other = Trial(data, toy()).model
    other.tie_heads()
    other.untie_heads((3,), seed=8)
    assert not same(heads(copies(other), 3), heads(ends[1], 3))


def test_an_unfrozen_third_phase_trains_everything(data: Encoded) -> None:
    trial = Trial(data, toy(DTrain(freeze=False)))
    trial.go()
    assert len(trial.fits) == 3 and not same(trial.fits[1][1], copies(trial.model), but="heads.")
    assert trial.record["tuned"] == {} and trial.record["steps"] == {"1": 6, "2": 6, "3": 3}


def test_what_cannot_be_is_refused(data: Encoded) -> None:
    for wrong, what in (({"phases": (3,)}, "phases"), ({"phases": (2, 1)}, "phases"), ({"shares": (0.5, -0.1, 0.6)}, "shares"),
                        ({"shares": (0.0, 0.0, 1.0), "phases": (1, 2)}, "shares"), ({"l2": -1.0}, "l2"), ({"looks": 0}, "looks"),
                        ({"solver": "lbfgs"}, "l2"), ({"solver": "lbfgs", "l2": 0.1, "phases": (1, 2)}, "phase 3"),
                        ({"solver": "lbfgs", "l2": 0.1, "freeze": False}, "frozen")):  # fmt: skip
        with pytest.raises(ValueError, match=what):
            DTrain(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='Set `model.heads.by` to "domain"'):
        Trial(data, toy(model=dataclasses.replace(CHOICE, heads=Heads()))).go()
    with pytest.raises(ValueError, match="linear heads"):
        Trial(data, toy(DTrain(solver="lbfgs", l2=0.1), model=dataclasses.replace(CHOICE, heads=TOWERS))).go()
    with pytest.raises(ValueError, match="hidden"):
        Heads(hidden=(0,))
    with pytest.raises(ValueError, match="dropout"):
        Heads(dropout=1.0)
    for setting, what in (
        ("schedule.phases=[3]", "phases"),
        ("schedule.keep=best", "better"),
        ("schedule.fases=[1]", "unknown key"),
    ):
        with pytest.raises(config.RunError, match=what):
            config.override(toy(), [setting])


def test_the_run_file_holds_it(tmp_path: Path) -> None:
    choice = dataclasses.replace(CHOICE, heads=Heads(by="domain", unknown="root"))
    schedule = DTrain(phases=(1, 3), shares=(0.5, 0.0, 0.5), l2=0.1, solver="lbfgs", keep="last", looks=3)
    run = toy(schedule, model=choice)
    (tmp_path / "run.toml").write_text(config.dumps(run))
    assert config.load(tmp_path / "run.toml").schedule == run.schedule


def test_a_comparison_knows_when_it_has_more_steps() -> None:
    plain = dataclasses.replace(toy(OneStage()), name="plain")
    equal_, more = (dataclasses.replace(toy(s), name="d") for s in (DTrain(), LAST))
    check([plain, equal_], 1, "", "", False)
    assert budget_of(plain) == budget_of(equal_)
    with pytest.raises(JobError, match="schedule.tune: not read / each"):
        check([plain, more], 1, "", "", False)
    assert DTrain(tune="each", phases=(1, 2)).budget == () == DTrain(tune="each", freeze=False).budget


# ------------------------------------------------------------------------------------------------------- every tower
def towers() -> Iterator[Any]:
    import typing

    for tower in typing.get_args(typing.get_args(config.TowerChoice)[0]):
        for kind in ("shared", "per_task", "separate"):
            views = Views(kind=kind, width=4, lazy_rows=0)  # type: ignore[arg-type]
            names = views.names(["a", "b"])
            try:
                tower().build(["a", "b"], names, [8] * len(names))
            except ValueError:
                continue
            for head in (HEADS, TOWERS) if kind == "per_task" else (HEADS,):
                choice = ModelChoice(tower=tower(), tables=views, heads=head)
                yield pytest.param(choice, id=f"{tower.__name__}-{kind}-{len(head.hidden)}")
            break
    views = Views(kind="per_task", by="domain", width=4)
    yield pytest.param(ModelChoice(tower=config.STEM(), tables=views, heads=HEADS), id="STEM-domains")


@pytest.mark.parametrize("choice", [*towers()])
def test_with_every_tower_the_split_is_continuous_and_the_trunk_rests(choice: ModelChoice, data: Encoded) -> None:
    trial = Trial(data, toy(training=dataclasses.replace(TRAINING, steps=9), model=choice))
    rows = np.arange(40)
    split: list[dict[str, torch.Tensor]] = []
    untie = trial.model.untie_heads

    def spied(*args: Any) -> None:
        split.append(logits(trial.model, data, rows))
        untie(*args)
        split.append(logits(trial.model, data, rows))

    trial.model.untie_heads = spied  # type: ignore[method-assign]
    trial.go()
    assert equal(*split)
    _, before, _ = trial.fits[1]
    assert same(before, copies(trial.model), but="heads.")
    codes = range(FIRST_VALUE, len(data.schema.domains))
    assert all(not same(heads(before, code), heads(copies(trial.model), code)) for code in codes)
    assert all(torch.isfinite(found).all() for found in logits(trial.model, data, rows).values())


# -------------------------------------------------------------------------------------------------------------- reports
def test_head_tail_worst_and_average() -> None:
    rows = {"b": 30, "a": 50, "d": 5, "c": 20}
    assert head_and_tail(rows) == (["a", "b"], ["c", "d"])
    assert head_and_tail({"x": 9, "y": 1}) == (["x"], ["y"])
    column = {"a": 0.9, "b": 0.7, "c": 0.5, "d": None}
    text = table(rows, {"AUC": column}, lower=False)
    lines = [line.split(" | ") for line in text.splitlines()[2:]]
    found = {line[0].strip("| *"): line[2].strip(" |") for line in lines}
    assert found == {"a": "0.9000", "b": "0.7000", "c": "0.5000", "d": "-", "average": "0.7000", "worst": "0.5000",
                     "head": "0.8000", "tail": "0.5000"}  # fmt: skip
    assert "| *worst* | 3 domains | 0.9000 |" in table(rows, {"log-loss": column}, lower=True)
