"""Forks, searches and merges: exact limits, searches against brute force, what is handed on, resumption, the toy benchmark."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toylog import make_data, make_log, make_run

from unbraid import compare, config
from unbraid.bundle import Bundle, build
from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded, order
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.job import JobError, train
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.schedules.fork_merge import Branch, ForkMerge, plan
from unbraid.schedules.mixtures import greedy_search, grid_search, simplex
from unbraid.schedules.one_stage import OneStage
from unbraid.schedules.rounds import plot
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.multi_embedding import MultiEmbedding
from unbraid.towers.stem import STEM
from unbraid.train import Local, Training, Watcher
from unbraid.types import Feature, Schema, Scores, State, Task

TABLES = {"log": make_log(rows=500)}
TASKS = (Task("click"), Task("buy", role="auxiliary"), Task("spend", kind="real", role="auxiliary"))
TRAINING = Training(batch_size=32, steps=20, checkpoint_steps=1, checkpoint_seconds=0)
GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
TWO = ForkMerge(branches="two", rounds=4, final="last")
Weights = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------------------------- plain descent
@dataclass(frozen=True)
class Descent:
    """Config of `_Descent`."""

    lr: float = 0.1

    def build(self, model: nn.Module, *, weights: Mapping[str, float], **rest: Any) -> _Descent:
        return _Descent(self, model, weights)


class _Descent:
    """theta - lr times the gradient of the weighted sum of the losses.  Tables are dense here."""

    def __init__(self, config: Descent, model: nn.Module, weights: Mapping[str, float]) -> None:
        self.config, self.weights, self.step = config, weights, 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, losses: Any, output: Any) -> None:
        parts = [loss * self.weights[name] for name, loss in losses.items() if self.weights[name]]
        if parts:
            grads = torch.autograd.grad(torch.stack(parts).sum(), self.parameters, allow_unused=True)
            for p, grad in zip(self.parameters, grads, strict=True):
                p.data -= 0 if grad is None else self.config.lr * grad
        self.step += 1

    def settle(self) -> None: ...

    def seek(self, step: int) -> None:
        self.step = step

    def state_dict(self) -> State:
        return {"kind": "descent", "step": self.step}

    def load_state_dict(self, state: State) -> None:
        self.step = state["step"]


# --------------------------------------------------------------------------------------------------------- real sessions
class Told(Watcher):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Spy:
    """A session in double precision that writes down its calls, and that can die at a step or at a scoring."""

    def __init__(
        self, data: Encoded, run: Any, folder: Path | None = None, resume: bool = False, die: tuple = ()
    ) -> None:
        self.model = build(run, data.schema).double()
        self.die, self.rows_read, self.counts = die, set[int](), {"step": 0, "score": 0}
        self.calls: list[dict[str, Any]] = []
        self.terms = bound_terms(run, data.schema, self.model)
        weights = {t.name: t.weight for t in data.schema.tasks}
        self.local = Local(
            data, [Dying(term, self) for term in self.terms], run.update, run.training, weights, run.seed, folder, resume,
            watcher=Told(),
        )  # fmt: skip
        fit, score = self.local.fit, self.local.score

        def spied_fit(model: Any, steps: int, **rest: Any) -> Any:
            self.calls.append({"steps": steps, "begin": copies(model), **copy.deepcopy(rest)})
            trained, state = fit(model, steps, **rest)
            self.calls[-1] |= {"end": copies(model), "state": copy.deepcopy(state)}
            return trained, state

        def spied_score(*args: Any) -> Any:
            self.perhaps_die("score")
            scores = score(*args)
            self.rows_read |= set(scores.row.tolist())
            return scores

        self.local.fit, self.local.score = spied_fit, spied_score  # type: ignore[assignment, method-assign]

    def perhaps_die(self, what: str) -> None:
        self.counts[what] += 1
        if self.die == (what, self.counts[what]):
            raise RuntimeError("killed")

    def go(self, schedule: ForkMerge) -> Weights:
        steps = self.local.training.total_steps(len(self.local.rows("train")))
        return copies(schedule(self.local, self.model, steps))

    @property
    def record(self) -> dict[str, Any]:
        assert self.local.record is not None
        return dict(self.local.record)


@dataclass(frozen=True)
class Dying:
    """A term whose rows are noted."""

    term: Any
    spy: Any
    needs: tuple[str, ...] = ()

    @property
    def by(self) -> str:
        return self.term.by

    def __call__(self, output: Any, batch: Any, step: int) -> Any:
        self.spy.perhaps_die("step")
        self.spy.rows_read |= set(batch.row.tolist())
        return self.term(output, batch, step)


def copies(model: nn.Module) -> Weights:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def encoded(cache: Path, **changes: Any) -> Encoded:
    """Id features only, so that the model can be double."""
    ids = {
        "features": (Feature("item"), Feature("shop")),
        "histories": (),
        "events": (),
        "fields": (),
        "cache": str(cache),
    }
    return Encoded(encode(make_data(**{**ids, "tasks": TASKS, **changes}), tables=TABLES))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return encoded(tmp_path_factory.mktemp("cache"))


def toy(**changes: Any) -> Any:
    dense = ModelChoice(tower=SharedBottom(bottom=(8,), tower=(4,)), tables=Views(width=4, lazy_rows=-1))
    return make_run(
        data=make_data(tasks=TASKS), **{"model": dense, "training": TRAINING, "update": Descent(), **changes}
    )


LAZY = ModelChoice(
    tower=STEM(expert=(8,), tower=(4,), dropout=0.2),
    tables=Views(kind="per_task", width=4, lazy_rows=0, unknown_rate=0.1),
)
ADAM = Joint(lr=0.01, weight_decay=0.01, table_weight_decay=0.05, learning_rate="cosine", clip_norm=1.0)


def alone(spy: Spy, schedule: ForkMerge, weights: dict[str, float], place: int, carry: bool = True) -> list[Weights]:
    """One branch as a training of its own, round by round; the weights after each."""
    steps, state, found = spy.local.training.steps, None, []
    interval = -(-steps // schedule.rounds)
    for n, done in enumerate(range(0, steps, interval)):
        seed = (n,) if schedule.batches == "shared" else (n, place)
        _, state = spy.local.fit(
            spy.model, min(interval, steps - done), weights=weights, seed=seed, update_state=state if carry else None,
            total=steps, start=done,
        )  # fmt: skip
        found.append(copies(spy.model))
    return found


STL = {"click": 1.0, "buy": 0.0, "spend": 0.0}
EW = {"click": 1.0, "buy": 1.0, "spend": 1.0}


# --------------------------------------------------------------------------------------------------------- exact limits
@pytest.mark.parametrize(("update", "model"), [(Descent(), None), (ADAM, None), (ADAM, LAZY)])
@pytest.mark.parametrize("batches", ["own", "shared"])
def test_with_weight_zero_alone_it_is_training_on_the_target(
    data: Encoded, update: Any, model: Any, batches: Any
) -> None:
    run = toy(update=update, **({"model": model} if model else {}))
    schedule = dataclasses.replace(TWO, grid=(0.0,), batches=batches, heads="all")
    spy, stl = Spy(data, run), Spy(data, run)
    found = spy.go(schedule)
    path = alone(stl, schedule, STL, 0)
    assert equal(found, path[-1])
    begins = [call["begin"] for call in spy.calls]
    assert len(begins) == 8 and all(
        equal(begins[2 * n], path[n - 1]) and equal(begins[2 * n + 1], path[n - 1]) for n in (1, 2, 3)
    )
    default = Spy(data, run)
    assert equal(default.go(dataclasses.replace(schedule, heads="trained")), found), (
        "branch 0 to the bit, heads and all"
    )


def test_auxiliaries_without_a_loss_change_nothing(tmp_path: Path) -> None:
    tasks = (TASKS[0], *(dataclasses.replace(task, weight=0.0) for task in TASKS[1:]))
    nothing = encoded(tmp_path, tasks=tasks)
    for branches in ("two", "each"):
        schedule = dataclasses.replace(TWO, branches=branches, batches="shared")  # type: ignore[arg-type]
        spy, stl = Spy(nothing, toy(update=ADAM)), Spy(nothing, toy(update=ADAM))
        assert equal(spy.go(schedule), alone(stl, schedule, STL, 0)[-1])
        assert all(line["weights"]["target"] == 1.0 for line in spy.record["rounds"]), "of equals the smallest weight"


@pytest.mark.parametrize("update", [Descent(), ADAM])
def test_with_weight_one_alone_it_is_training_on_all_tasks(data: Encoded, update: Any) -> None:
    schedule = dataclasses.replace(TWO, grid=(1.0,))
    spy, joint = Spy(data, toy(update=update)), Spy(data, toy(update=update))
    assert equal(spy.go(schedule), alone(joint, schedule, EW, 1)[-1])
    assert not equal(copies(joint.model), alone(Spy(data, toy(update=update)), schedule, EW, 0)[-1]), "other batches"


@pytest.mark.parametrize(("update", "exact"), [(Descent(), True), (Joint(lr=0.01), False)])
def test_one_step_apart_is_one_step_on_the_weighted_sum(data: Encoded, update: Any, exact: bool) -> None:
    run = toy(update=update, training=dataclasses.replace(TRAINING, steps=1))
    for weight in GRID:
        spy, step = Spy(data, run), Spy(data, run)
        found = spy.go(dataclasses.replace(TWO, grid=(weight,), rounds=1, batches="shared"))
        seed = step.local._seed((0,), 0)
        batch = data.batch(next(order(step.local.rows("train"), TRAINING.batch_size, seed)))
        losses = step.terms[0](step.model(batch), batch, 0)
        total = losses["click"] + weight * (losses["buy"] + losses["spend"])
        names = [name for name, _ in step.model.named_parameters()]
        grads = torch.autograd.grad(total, list(step.model.parameters()), allow_unused=True)
        want = copies(step.model)
        for name, grad in zip(names, grads, strict=True):
            own = (
                weight if "buy" in name or "spend" in name else 1.0
            )  # such a head is not averaged with the untrained one
            if grad is not None and own:
                want[name] -= 0.1 * grad / own
        worst = max(float((found[n] - want[n]).abs().max()) for n in names)
        if exact:
            assert worst < 1e-12
        elif 0 < weight < 1:
            assert worst > 1e-4, "Adam's step is not linear in the gradient"


def test_equal_branches_give_the_same_whatever_their_weights(data: Encoded) -> None:
    own = tuple(Branch(name, {"click": 1.0}) for name in ("a", "b", "c"))
    found = []
    for grid in ((0.0,), (0.25, 0.1), (0.0, 0.5, 1.0)):
        for search in ("grid", "greedy"):
            schedule = ForkMerge(own=own, rounds=2, grid=grid, search=search, batches="shared", final="last")  # type: ignore[arg-type]
            spy = Spy(data, toy(update=ADAM, model=LAZY))
            found.append(spy.go(schedule))
            if 1.0 in grid:
                assert all(line["weights"] == {"a": 1.0, "b": 0.0, "c": 0.0} for line in spy.record["rounds"])
    assert all(equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("search", "metric"), [("grid", "auc"), ("greedy", "logloss"), ("grid", "logloss"), ("greedy", "click.ece")]
)
def test_a_merge_is_no_worse_than_any_branch_on_the_searched_rows(data: Encoded, search: Any, metric: str) -> None:
    spy = Spy(data, toy(update=ADAM, model=LAZY))
    spy.go(ForkMerge(rounds=4, search=search, metric=metric))
    sign = 1 if metric == "auc" else -1
    rounds = spy.record["rounds"]
    if metric == "logloss":  # the value of a branch is that of its own weights
        for place, name in enumerate(rounds[-1]["branches"]):
            spy.model.load_state_dict(spy.calls[-3:][place]["end"])
            scores = spy.local.score(spy.model, "valid", None)
            known, z, y = scores.observed["click"], scores.logits["click"].astype(float), scores.labels["click"]
            want = float((np.logaddexp(0, z) - y * z)[known].mean())
            assert rounds[-1]["branches"][name] == pytest.approx(want, abs=1e-12)
    assert len(rounds) == 4
    for line in rounds:
        assert sign * line["value"] >= max(sign * value for value in line["branches"].values())
        assert len(line["branches"]) == 3
        assert sum(line["weights"].values()) == pytest.approx(1, abs=1e-15) and min(line["weights"].values()) >= 0
    best = max(rounds, key=lambda line: sign * line["value"])
    assert spy.record["final"] == {"round": 1 + rounds.index(best), "step": best["step"], "value": best["value"]}


def test_the_model_keeps_its_keys_types_and_shapes_and_counts_stay_whole(data: Encoded) -> None:
    normed = ModelChoice(
        tower=MultiEmbedding(expert=(8,), norm="batch"), tables=Views(kind="several", widths=(4, 4), lazy_rows=-1)
    )
    spy = Spy(data, toy(model=normed))
    before = copies(spy.model)
    after = spy.go(dataclasses.replace(TWO, grid=(0.4,)))
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}
    counts = [name for name in after if name.endswith("num_batches_tracked")]
    assert counts and all(after[name].dtype == torch.int64 and int(after[name]) == 20 for name in counts)
    (target, both) = (call["end"] for call in spy.calls[-2:])
    means = [name for name in after if name.endswith("running_mean")]
    for name in means:
        torch.testing.assert_close(after[name], 0.6 * target[name] + 0.4 * both[name], rtol=0, atol=1e-12)
        assert not torch.equal(target[name], both[name])


def test_no_test_row_is_ever_read_and_the_search_reads_validation_rows(data: Encoded) -> None:
    spy = Spy(data, toy())
    spy.go(ForkMerge(rounds=3, branch_select="best_in_round"))
    assert spy.rows_read and not spy.rows_read & set(data.split("test").tolist())
    assert set(data.split("valid").tolist()) <= spy.rows_read
    assert all(not set(np.asarray(call["rows"] if call["rows"] is not None else [])) for call in spy.calls)


@pytest.mark.parametrize(
    ("options", "want"),
    [({"rounds": 3}, [7, 7, 6]), ({"interval": 8}, [8, 8, 4]), ({"rounds": 1}, [20]), ({"interval": 50}, [20]),
     ({"rounds": 50}, [1] * 20)],
)  # fmt: skip
def test_every_branch_takes_the_steps_of_the_run(data: Encoded, options: Any, want: list[int]) -> None:
    spy = Spy(data, toy())
    spy.go(ForkMerge(branches="two", **options))
    assert [call["steps"] for call in spy.calls[::2]] == [call["steps"] for call in spy.calls[1::2]] == want
    assert spy.record["total_steps"] == spy.local.steps == 40 and spy.record["steps"] == 20
    assert [line["step"] for line in spy.record["rounds"]] == np.cumsum(want).tolist()
    assert all(call["total"] == 20 for call in spy.calls)
    half = Spy(data, toy())
    half.go(ForkMerge(branches="two", equal_cost=True, **options))
    assert half.local.steps == 20 and half.record["steps"] == 10


# ------------------------------------------------------------------------------------------------------------ the search
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("grid", [GRID, (0.0, 0.1, 0.7, 0.3), (0.0, 0.25, 1.0), (0.0, 1 / 3)])
def test_the_grid_holds_all_weights_that_fit_once_and_exactly(count: int, grid: tuple[float, ...]) -> None:
    found = simplex(count, grid)
    values = [Fraction(repr(a)) for a in grid]
    want = {(1 - sum(rest), *rest) for rest in itertools.product(values, repeat=count - 1) if sum(rest) <= 1}
    assert len(found) == len(set(found)) == len(want)
    assert set(found) == {tuple(map(float, shares)) for shares in want}
    assert found[0] == (1.0, *[0.0] * (count - 1)) and [s[0] for s in found] == sorted(
        (s[0] for s in found), reverse=True
    )
    if grid == GRID:
        assert len(found) == {2: 6, 3: 21, 4: 56}[count]
    assert (0.0, 0.3, 0.7) in found if count == 3 and 0.7 in grid else True


def test_a_grid_that_is_too_large_or_empty_is_refused() -> None:
    with pytest.raises(ValueError, match='more than 1,000 combinations in each round. Set `search = "greedy"`'):
        simplex(9, GRID)
    with pytest.raises(ValueError, match="add up to 1 or less. Add 0"):
        simplex(3, (1.0,))


def landscape(seed: int, count: int) -> Any:
    """A concave function of the shares, rounded so that there are ties, and a dict of what was asked."""
    rng = np.random.default_rng(seed)
    best, scale, asked = rng.dirichlet(np.ones(count)), rng.random(count) + 0.1, {}

    def value(shares: tuple[float, ...]) -> float:
        asked[shares] = round(-float((scale * (np.array(shares) - best) ** 2).sum()), 2)
        return asked[shares]

    return value, asked


def greedy_by_hand(count: int, grid: Sequence[float], value: Any) -> tuple[tuple[float, ...], list[float]]:
    """The paper's algorithm 3 in plain loops, and the value after each branch."""

    def of(w: dict[int, float]) -> tuple[float, ...]:
        return tuple(w.get(b, 0.0) / sum(w.values()) for b in range(count))

    ranked = sorted(range(count), key=lambda b: (-value(of({b: 1.0})), b))
    w, path = {ranked[0]: 1.0}, [value(of({ranked[0]: 1.0}))]
    for b in ranked[1:]:
        mean, best, chosen = float(np.mean(list(w.values()))), -np.inf, 0.0
        for a in sorted(grid):
            if (found := value(of({**w, b: a * mean}))) > best:
                best, chosen = found, a * mean
        w[b] = chosen
        path.append(best)
    return of(w), path


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_searches_find_what_a_plain_loop_finds(seed: int, count: int) -> None:
    value, asked = landscape(seed, count)
    found = greedy_search(count, GRID, value)
    want, path = greedy_by_hand(count, GRID, value)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-15)
    assert path == sorted(path), "a branch more is never worse"
    assert sum(found) == pytest.approx(1, abs=1e-15) and len({s for s in asked}) <= count + (count - 1) * len(GRID)
    if count == 2:
        assert min(found) <= 0.5, "the worse branch gets at most half"
        assert {round(min(s), 3) for s in asked if min(s) > 0} <= {0.167, 0.286, 0.375, 0.444, 0.5}
    if count < 5:
        points = simplex(count, GRID)
        assert grid_search(count, GRID, value) == points[int(np.argmax([value(p) for p in points]))]


def test_greedy_with_weight_zero_alone_is_the_best_branch() -> None:
    value, _ = landscape(3, 4)
    pure = [tuple(float(a == b) for a in range(4)) for b in range(4)]
    assert greedy_search(4, (0.0,), value) == max(pure, key=value)


def test_automatic_search_is_the_grid_of_two_and_greedy_of_more(data: Encoded) -> None:
    for branches, method, count in (("two", "grid", 6), ("each", "greedy", 3 + 2 * 5)):
        spy = Spy(data, toy())
        spy.go(ForkMerge(branches=branches, rounds=2))  # type: ignore[arg-type]
        assert spy.record["search"] == method
        assert [line["evaluations"] for line in spy.record["rounds"]] == [count, count]
        assert spy.record["evaluations"] == spy.counts["score"] == 2 * count, "nothing is tried twice"


def test_the_line_between_two_branches_is_recorded_with_its_barrier(data: Encoded) -> None:
    spy = Spy(data, toy())
    spy.go(ForkMerge(branches="two", rounds=2, metric="logloss"))
    for line in spy.record["rounds"]:
        assert [at for at, _ in line["line"]] == list(GRID)
        values = [value for _, value in line["line"]]
        assert line["value"] == min(values) and line["weights"]["all"] == GRID[int(np.argmin(values))]
        assert line["barrier"] == pytest.approx(max(0.0, max(values[1:-1]) - max(values[0], values[-1])), abs=1e-15)
    spy.record["rounds"][0]["barrier"] = 0.5
    assert "After 1 of the rounds some mixture was worse than both branches" in ForkMerge().report(spy.record)


def test_the_search_reads_a_part_of_the_validation_rows_by_whole_users(data: Encoded) -> None:
    plans = [plan(ForkMerge(search_rows=60, search_seed=seed), Spy(data, toy()).local) for seed in (0, 0, 1)]
    valid, users = data.split("valid"), data.columns["user"]
    for found in plans:
        assert 60 <= len(found.valid) < len(valid) and set(found.valid) <= set(valid)
        chosen = set(users[found.valid].tolist())
        assert set(found.valid) == {row for row in valid if users[row] in chosen}, (
            "all validation rows of a user, or none"
        )
    assert np.array_equal(plans[0].valid, plans[1].valid) and not np.array_equal(plans[0].valid, plans[2].valid)
    assert len(plan(ForkMerge(search_rows=10**6), Spy(data, toy()).local).valid) == len(valid)


def test_without_users_the_rows_are_drawn_one_by_one(tmp_path: Path) -> None:
    nobody = encoded(tmp_path, user="")
    spy = Spy(nobody, toy())
    spy.go(ForkMerge(branches="two", rounds=2, search_rows=60))
    assert spy.record["rows"] == 60


# ---------------------------------------------------------------------------------------------------- what is handed on
def test_optimisers_state_is_kept_reset_or_averaged(data: Encoded) -> None:
    spies = {}
    for option in ("keep", "reset", "average"):
        spy = Spy(data, toy(update=ADAM, model=LAZY))
        spy.go(dataclasses.replace(TWO, optimiser_state=option, grid=(0.4,)))  # type: ignore[arg-type]
        spies[option] = [[call for call in spy.calls[b::2]] for b in (0, 1)]
    for branch in spies["keep"]:
        assert branch[0]["update_state"] is None
        for before, after in itertools.pairwise(branch):
            assert config_equal(before["state"], after["update_state"])
        assert [call["state"]["step"] for call in branch] == [5, 10, 15, 20]
    for branch in spies["reset"]:
        assert all(call["update_state"] is None for call in branch)
        assert [call["start"] for call in branch] == [0, 5, 10, 15]
        assert [call["state"]["step"] for call in branch] == [5, 10, 15, 20], "step sizes go by the steps of the run"
    one, two = spies["average"]
    for n in range(1, 4):
        handed = one[n]["update_state"]
        assert config_equal(handed, two[n]["update_state"])
        a, b = one[n - 1]["state"], two[n - 1]["state"]
        name = next(name for name in a["dense"] if name.startswith("heads.task/click"))
        want = 0.6 * a["dense"][name]["exp_avg"] + 0.4 * b["dense"][name]["exp_avg"]
        torch.testing.assert_close(handed["dense"][name]["exp_avg"], want, rtol=0, atol=1e-12)
        other = next(name for name in b["dense"] if name.startswith("heads.task/buy"))
        assert torch.equal(handed["dense"][other]["exp_avg"], b["dense"][other]["exp_avg"]), (
            "the one branch that trains it"
        )
        assert handed["step"] == 5 * n and all(
            v["step"] == 5 * n for k, v in handed["rows"].items() if k.startswith("shared")
        )


def config_equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(config_equal(v, other[k]) for k, v in one.items())
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


def test_averaged_state_of_adatask_is_that_of_each_task(data: Encoded) -> None:
    adatask = pytest.importorskip("unbraid.optim.adatask").AdaTask
    spy = Spy(data, toy(update=adatask(lr=0.01), model=LAZY))
    spy.go(dataclasses.replace(TWO, optimiser_state="average", grid=(0.4,)))
    (one, two), handed = spy.calls[-4:-2], spy.calls[-2]["update_state"]
    assert set(handed["tasks"]) == {"click", "buy", "spend"}

    def walk(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, torch.Tensor]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, (*path, key))
        elif torch.is_tensor(value) and value.ndim and value.is_floating_point():
            yield path, value

    first = dict(walk(one["state"]["tasks"]["click"]))
    second = dict(walk(two["state"]["tasks"]["click"]))
    assert first
    for path, value in walk(handed["tasks"]["click"]):
        torch.testing.assert_close(value, 0.6 * first[path] + 0.4 * second[path], rtol=0, atol=1e-12)
    assert config_equal(handed["tasks"]["buy"], two["state"]["tasks"]["buy"])


def test_a_table_row_moves_only_where_some_branch_moved_it(data: Encoded) -> None:
    own = (Branch("target", {"click": 1.0}), Branch("both", {"click": 1.0, "buy": 1.0}))
    model = ModelChoice(tower=SharedBottom(bottom=(8,), tower=(4,)), tables=Views(width=4, lazy_rows=0))
    training = dataclasses.replace(TRAINING, steps=2, batch_size=4)
    spy = Spy(data, toy(update=Joint(lr=0.05), model=model, training=training))
    found = spy.go(ForkMerge(own=own, rounds=1, grid=(0.4,), final="last"))
    one, two = spy.calls
    fork = one["begin"]
    kinds = {"none": 0, "one": 0, "both": 0}
    for name in (n for n in found if n.startswith("embeddings")):
        moved = [(call["end"][name] != fork[name]).any(1) for call in (one, two)]
        for row in range(len(found[name])):
            a, b, old, new = one["end"][name][row], two["end"][name][row], fork[name][row], found[name][row]
            if not (moved[0][row] or moved[1][row]):
                kinds["none"] += 1
                assert torch.equal(new, old)
                continue
            kinds["both" if moved[0][row] and moved[1][row] else "one"] += 1
            torch.testing.assert_close(new, 0.6 * a + 0.4 * b, rtol=0, atol=1e-12)
    assert all(kinds.values()), kinds


def test_pruning_keeps_the_largest_and_always_the_targets_branch(
    data: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unbraid.schedules import fork_merge

    weights = {3: (0.1, 0.2, 0.7), 2: (0.9, 0.1), 1: (1.0,)}
    monkeypatch.setitem(fork_merge.SEARCHES, "greedy", lambda count, grid, value: weights[count])
    monkeypatch.setitem(fork_merge.SEARCHES, "grid", lambda count, grid, value: weights[count])
    spy = Spy(data, toy(update=ADAM))
    spy.go(ForkMerge(rounds=3, prune=2))
    assert [line["pruned"] for line in spy.record["rounds"]] == [["target + buy"], [], []]
    assert [list(line["weights"]) for line in spy.record["rounds"]] == [
        ["target", "target + buy", "target + spend"], *[["target", "target + spend"]] * 2,
    ]  # fmt: skip
    assert spy.record["total_steps"] == spy.local.steps == 7 * 3 + 7 * 2 + 6 * 2
    assert spy.calls[4]["seed"] == (1, 2), "a branch keeps its seeds"
    assert config_equal(spy.calls[4]["update_state"], spy.calls[2]["state"]), "and its optimiser's state"
    one = Spy(data, toy())
    one.go(ForkMerge(rounds=3, prune=1))
    assert [list(line["weights"]) for line in one.record["rounds"]][1:] == [["target"]] * 2
    every = Spy(data, toy())
    monkeypatch.setitem(fork_merge.SEARCHES, "greedy", lambda count, grid, value: (0.0, 0.5, 0.5))
    every.go(ForkMerge(rounds=3, prune=2, prune_at="every"))
    assert list(every.record["rounds"][1]["weights"]) == ["target", "target + buy"], "of equals the first"
    assert "pruned" in ForkMerge().report(every.record)


def test_the_best_weights_of_a_round_are_merged_if_asked(data: Encoded) -> None:
    training = dataclasses.replace(TRAINING, evaluate_every=1, patience=1)
    found = {}
    for option in ("last", "best_in_round"):
        spy = Spy(data, toy(update=Joint(lr=0.3), training=training))
        spy.go(ForkMerge(branches="two", rounds=2, metric="logloss", branch_select=option))  # type: ignore[arg-type]
        assert [call["steps"] for call in spy.calls] == [10] * 4 and spy.local.steps == 40, "no branch stops early"
        found[option] = spy
    logloss = {}
    for option, spy in found.items():
        logloss[option] = list(spy.record["rounds"][0]["branches"].values())
    assert all(best <= last for best, last in zip(logloss["best_in_round"], logloss["last"], strict=True))
    assert logloss["best_in_round"] != logloss["last"]
    assert found["last"].counts["score"] == 12 and found["best_in_round"].counts["score"] == 12 + 40


def test_the_last_merge_or_the_best_one_is_kept(data: Encoded) -> None:
    spies = {}
    for final in ("best", "last"):
        spy = Spy(data, toy(update=Joint(lr=0.3)))
        found = spy.go(ForkMerge(branches="two", rounds=5, final=final))  # type: ignore[arg-type]
        spies[final] = found, spy
    values = [line["value"] for line in spies["best"][1].record["rounds"]]
    best = int(np.argmax(values))
    assert best < 4, "else this says nothing"
    assert equal(spies["best"][0], spies["last"][1].calls[2 * best + 2]["begin"])
    assert spies["last"][1].record["final"]["round"] == 5 and spies["best"][1].record["final"]["round"] == best + 1


# -------------------------------------------------------------------------------------------------------------- domains
@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return encoded(tmp_path_factory.mktemp("cache"), tasks=(Task("click"), Task("buy", weight=0.5)))


def test_domains_train_on_their_own_rows_and_the_targets_are_searched(sites: Encoded) -> None:
    run = toy(losses=(Supervised(by="domain"),), update=ADAM)
    spy = Spy(sites, run)
    schedule = ForkMerge(targets=("home",), rounds=2)
    found = plan(schedule, spy.local)
    codes = {name: sites.schema.domains.index(name) for name in ("home", "search", "mail")}
    assert set(found.branches) == {"target", "target + search", "target + mail"}
    domain = sites.columns["domain"]
    for name, wanted in (("target", ["home"]), ("target + mail", ["home", "mail"])):
        rows = found.rows[name]
        train_rows = sites.split("train")
        assert rows is not None
        assert np.array_equal(rows, train_rows[np.isin(domain[train_rows], [codes[w] for w in wanted])])
        assert found.weights[name] == {other: float(other in wanted) for other in codes}
    assert set(domain[found.valid]) == {codes["home"]} and found.tasks == ()
    spy.go(schedule)
    assert spy.record["metric"] == "auc" and len(spy.record["rounds"]) == 2
    for call in spy.calls[::3]:
        assert set(domain[np.asarray(call["rows"])]) == {codes["home"]}


def test_objectives_of_a_task_in_a_domain_go_by_their_task(sites: Encoded) -> None:
    run = toy(losses=(Supervised(by="task@domain"),), update=ADAM)
    spy = Spy(sites, run)
    spy.go(ForkMerge(targets=("click",), rounds=2))
    assert spy.record["branches"] == {"target": {"click": 1.0, "buy": 0.0}, "target + buy": {"click": 1.0, "buy": 1.0}}
    own = (Branch("home", {"click@home": 1.0}), Branch("more", {"click": 1.0, "buy@mail": 2.0}))
    other = Spy(sites, run)
    other.go(ForkMerge(own=own, targets=("click",), rounds=2))
    assert other.calls[1]["weights"] == {"click": 1.0, "buy": 0.0, "buy@mail": 1.0}, (
        "beside the task's own weight of 0.5"
    )


def test_tasks_own_weights_count(sites: Encoded) -> None:
    found = plan(ForkMerge(targets=("click",)), Spy(sites, toy()).local)
    assert found.weights["target + buy"] == {"click": 1.0, "buy": 0.5}
    assert found.branches["target + buy"] == {"click": 1.0, "buy": 1.0}


# ------------------------------------------------------------------------------------------------------------- sampling
def test_one_objective_is_drawn_for_each_step_if_asked(sites: Encoded) -> None:
    run = toy(
        losses=(Supervised(by="domain"),),
        update=ADAM,
        training=dataclasses.replace(TRAINING, steps=120, checkpoint_steps=0),
    )
    shares = {}
    for sampling in ("half", "uniform"):
        spy = Spy(sites, run)
        seen: list[set[int]] = []
        read = sites.batch

        def noting(rows: np.ndarray, seen: Any = seen, read: Any = read) -> Any:
            seen.append(set(sites.columns["domain"][rows].tolist()))
            return read(rows)

        sites.batch = noting  # type: ignore[method-assign]
        try:
            own = (Branch("home", {"home": 1.0}), Branch("all", {"home": 1.0, "search": 1.0, "mail": 1.0}))
            spy.go(ForkMerge(targets=("home",), own=own, rounds=1, sampling=sampling))  # type: ignore[arg-type]
        finally:
            del sites.batch
        assert spy.calls[0]["sample"] == {"home": 1.0}
        joint = seen[120:240]
        assert len(joint) == 120 and all(len(part) == 1 for part in joint), "a batch holds rows of one domain"
        shares[sampling] = np.mean([part == {sites.schema.domains.index("home")} for part in joint])
        assert spy.record["sampling"] == sampling
    assert 0.4 < shares["half"] < 0.6 and 0.23 < shares["uniform"] < 0.43


def test_a_drawn_tasks_loss_counts_alone_and_resumes(data: Encoded, tmp_path: Path) -> None:
    schedule = ForkMerge(branches="two", rounds=2, sampling="uniform", final="last")
    run = toy(update=Descent(0.1))
    spy = Spy(data, run)
    found = spy.go(schedule)
    assert spy.calls[1]["sample"] == {"click": 1.0, "buy": 1.0, "spend": 1.0}
    killed = Spy(data, run, tmp_path, die=("step", 17))
    with pytest.raises(RuntimeError, match="killed"):
        killed.go(schedule)
    assert equal(found, Spy(data, run, tmp_path, True).go(schedule))


# ------------------------------------------------------------------------------------------------------------ resumption
RESUMED = ForkMerge(rounds=3, optimiser_state="keep", prune=2)
DEATHS = [("step", n) for n in (1, 4, 7, 8, 15, 21, 22, 30, 40, 47)] + [("score", n) for n in (1, 6, 13, 14, 20, 25)]
FAST = [("keep", ("step", 4)), ("keep", ("step", 22)), ("average", ("score", 14)), ("average", ("step", 40))]


@pytest.mark.parametrize(
    ("option", "die"),
    [pytest.param(option, die, marks=() if (option, die) in FAST else pytest.mark.slow)
     for option, die in itertools.product(("keep", "average"), DEATHS)],
)  # fmt: skip
def test_a_resumed_run_is_bit_equal(data: Encoded, tmp_path: Path, die: tuple[str, int], option: Any) -> None:
    schedule = dataclasses.replace(RESUMED, optimiser_state=option)
    run = toy(update=ADAM, model=LAZY)
    whole = whole_run(data, option)
    killed = Spy(data, run, tmp_path, False, die)
    with pytest.raises(RuntimeError, match="killed"):
        killed.go(schedule)
    again = Spy(data, run, tmp_path, True)
    assert equal(whole[0], again.go(schedule))
    one, two = whole[1], again.record
    timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in r["rounds"]] for r in (one, two)]
    assert timeless[0] == timeless[1] and one["final"] == two["final"] and one["total_steps"] == two["total_steps"]
    assert again.local.steps == whole[2].steps and again.local.calls == whole[2].calls
    assert again.counts["step"] <= whole[3] - (die[1] if die[0] == "step" else 0) + 1, "nothing finished is done again"
    assert not list(tmp_path.glob("fit-*"))


_WHOLE: dict[str, Any] = {}


def whole_run(data: Encoded, option: str) -> Any:
    if option not in _WHOLE:
        spy = Spy(data, toy(update=ADAM, model=LAZY))
        found = spy.go(dataclasses.replace(RESUMED, optimiser_state=option))  # type: ignore[arg-type]
        _WHOLE[option] = found, spy.record, spy.local, spy.counts["step"]
    return _WHOLE[option]


def test_a_run_that_died_after_its_last_merge_does_nothing_again(data: Encoded, tmp_path: Path) -> None:
    run = toy(update=ADAM)
    first = Spy(data, run, tmp_path).go(RESUMED)
    again = Spy(data, run, tmp_path, True)
    assert equal(first, again.go(RESUMED)) and again.counts == {"step": 0, "score": 0}


# ------------------------------------------------------------------------------------------------------ the toy benchmark
class Lines:
    """A session of two linear regressions with one weight vector: full-batch gradient descent in double precision."""

    metric, objectives = "rmse", ("target", "auxiliary")
    schema = Schema((), (Task("target", kind="real"), Task("auxiliary", kind="real", role="auxiliary")))

    def __init__(self, seed: int, kind: str) -> None:
        rng, d = np.random.default_rng(seed), 50
        w, u = rng.normal(size=d) / np.sqrt(d), rng.normal(size=d) / np.sqrt(d)
        other = {"same": w, "near": w + 0.5 * u, "independent": u, "opposite": -w}[kind]

        def rows(n: int, w: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            x = rng.normal(size=(n, d))
            return torch.from_numpy(x), torch.from_numpy(x @ w + 0.5 * rng.normal(size=n))

        self.data = {"target": rows(40, w), "auxiliary": rows(2000, other)}
        self.valid, self.test = rows(300, w), rows(5000, w)
        self.products = {name: (2 * x.T @ x / len(y), 2 * x.T @ y / len(y)) for name, (x, y) in self.data.items()}
        self.record: Any = None

    def rows(self, split: str) -> np.ndarray:
        assert split == "valid"
        return np.arange(len(self.valid[1]))

    def column(self, name: str, rows: np.ndarray) -> None:
        return None

    def fit(self, model: Any, steps: int, *, weights: Mapping[str, float], **rest: Any) -> tuple[Any, State]:
        live = [(weights[name], *part) for name, part in self.products.items() if weights[name]]
        with torch.no_grad():
            for _ in range(steps):
                grads = [w * (xx @ model.weight[0] - xy) for w, xx, xy in live]
                model.weight[0] -= 0.01 * torch.stack(grads).sum(0)
        return model, {"kind": "plain"}

    def fit_apart(
        self, model: Any, steps: int, calls: Any, jobs: int = 1, **common: Any
    ) -> Iterator[tuple[State, State]]:
        begun = copies(model)
        for call in calls:
            model.load_state_dict(begun)
            state = self.fit(model, steps, **common, **call)[1]
            yield copies(model), state
        model.load_state_dict(begun)

    def score(self, model: Any, split: str, rows: np.ndarray) -> Scores:
        x, y = self.valid
        known = np.ones(len(y), bool)
        return Scores(
            {"target": (x @ model.weight[0]).detach().numpy()}, {}, {"target": y.numpy()}, {"target": known},
            np.full(len(y), 2), None, np.arange(len(y)), rows, ("", "", "all"),
        )  # fmt: skip

    def checkpoint(self, *args: Any, **rest: Any) -> None: ...
    def restore(self, tag: str) -> None: ...
    def tell(self, text: str) -> None: ...
    def keep(self, record: Any) -> None:
        self.record = record

    def error(self, model: Any, part: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float(((part[0] @ model.weight[0] - part[1]) ** 2).mean().detach())


def line() -> nn.Linear:
    model = nn.Linear(50, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def best_of_rounds(session: Lines, weight: float) -> float:
    """Test error of one training with a fixed weight, at its best validation round."""
    model, found = line(), []
    for _ in range(10):
        session.fit(model, 60, weights={"target": 1.0, "auxiliary": weight})
        found.append((session.error(model, session.valid), session.error(model, session.test)))
    return min(found)[1]


@pytest.mark.parametrize(
    ("kind", "stl", "joint", "merged", "weight"),
    [("same", 0.771, 0.303, 0.303, 1.00), ("near", 0.771, 0.390, 0.389, 0.95), ("independent", 0.771, 1.054, 0.748, 0.17),
     ("opposite", 0.771, 1.927, 0.771, 0.02)],
)  # fmt: skip
def test_the_toy_benchmark(kind: str, stl: float, joint: float, merged: float, weight: float) -> None:
    found: dict[str, list[float]] = {"stl": [], "joint": [], "merged": [], "weight": []}
    for seed in range(10):
        session = Lines(seed, kind)
        found["stl"].append(best_of_rounds(session, 0.0))
        found["joint"].append(best_of_rounds(session, 1.0))
        model = ForkMerge()(session, line(), 600)  # type: ignore[arg-type]
        found["merged"].append(session.error(model, session.test))
        found["weight"].append(float(np.mean([r["weights"]["target + auxiliary"] for r in session.record["rounds"]])))
    assert all(ours <= 1.01 * theirs for ours, theirs in zip(found["merged"], found["stl"], strict=True)), (
        "in every seed"
    )
    if kind in ("same", "near"):
        assert np.mean(found["merged"]) <= 1.03 * np.mean(found["joint"])
    if kind == "opposite":
        assert np.mean(found["weight"]) < 0.1
    for name, want in (("stl", stl), ("joint", joint), ("merged", merged), ("weight", weight)):
        assert np.mean(found[name]) == pytest.approx(want, abs=0.006 if name == "weight" else 0.001), name


def test_in_the_toy_gradient_descent_the_path_is_exactly_single_or_joint_training() -> None:
    for grid, weight in (((0.0,), 0.0), ((1.0,), 1.0)):
        session, model = Lines(0, "near"), line()
        session.fit(model, 600, weights={"target": 1.0, "auxiliary": weight})
        found = ForkMerge(grid=grid, final="last")(session, line(), 600)  # type: ignore[arg-type]
        assert torch.equal(found.weight, model.weight)
    one = Lines(1, "near")
    merged = ForkMerge(grid=(0.4,), interval=1, final="last")(one, line(), 50)  # type: ignore[arg-type]
    model = line()
    one.fit(model, 50, weights={"target": 1.0, "auxiliary": 0.4})
    assert (merged.weight - model.weight).abs().max() < 1e-12, (
        "one step apart is one step on the weighted sum, again and again"
    )


# ---------------------------------------------------------------------------------------------------- errors and the rest
def test_what_does_not_fit_is_said(data: Encoded, sites: Encoded) -> None:
    for wrong in ({"rounds": 0}, {"interval": -1}, {"search_rows": -1}, {"prune": -1}, {"jobs": 0}, {"grid": ()},
                  {"grid": (0.0, 1.2)}, {"own": (Branch("a", {"click": 1.0}),)}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ForkMerge(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="different names"):
        ForkMerge(own=(Branch("a", {"click": 1.0}), Branch("a", {"buy": 1.0})))
    with pytest.raises(ValueError, match="Branch `a` trains nothing"):
        Branch("a", {"click": 0.0})
    with pytest.raises(ValueError, match="Weight of `click` should be finite and not negative. Found -1.0"):
        Branch("a", {"click": -1.0})
    own = (Branch("a", {"click": 1.0}), Branch("b", {"clack": 1.0}))
    mixed = (Branch("a", {"click": 1.0, "buy": 1.0}), Branch("b", {"buy": 1.0}))
    local = Spy(data, toy()).local
    for schedule, message in [
        (ForkMerge(targets=("clack",)), r"`targets` should name objectives that matter, among .*Found \['clack'\]"),
        (ForkMerge(targets=("click", "buy", "spend")), "All objectives are targets"),
        (ForkMerge(own=own), r"Branch `b` weighs \['clack'\], which are no objectives. Permitted"),
        (ForkMerge(own=mixed), r"The first branch, `a`, should train targets alone.* Found \['buy'\], too"),
        (ForkMerge(search="grid", grid=tuple(np.linspace(0, 1, 101).tolist())), "more than 1,000 combinations"),
    ]:
        spy = Spy(data, toy())
        with pytest.raises(ValueError, match=message):
            spy.go(schedule)
        assert not spy.calls, "before anything trains"
    assert plan(ForkMerge(), local).targets == ("click",)
    by_domain = Spy(sites, toy(losses=(Supervised(by="domain"),))).local
    with pytest.raises(ValueError, match=r"`targets` should name objectives that matter, among \['home'.*Found \[\]"):
        plan(ForkMerge(), by_domain)
    two = Spy(sites, toy(losses=(Supervised(by="domain"), Supervised()))).local
    with pytest.raises(ValueError, match="Objectives are of tasks and of domains"):
        plan(ForkMerge(targets=("click",)), two)


def test_a_metric_that_has_no_value_or_no_task_is_said(data: Encoded) -> None:
    with pytest.raises(ValueError, match="has no value on the .* validation rows that are searched: too few"):
        Spy(data, toy()).go(ForkMerge(search_rows=1))
    with pytest.raises(ValueError, match="`schedule.metric` is `accurracy`, which no task has"):
        Spy(data, toy()).go(ForkMerge(metric="accurracy"))
    mail = data.schema.domains.index("mail")
    spy = Spy(data, toy(losses=(Supervised(by="domain"),)))
    rows = spy.local.rows("valid")
    spy.local._cache["valid"] = rows[data.columns["domain"][rows] != mail]
    with pytest.raises(ValueError, match="The search needs validation rows of mail"):
        plan(ForkMerge(targets=("mail",)), spy.local)


def test_compare_sees_the_budget() -> None:
    plain = dataclasses.replace(make_run(name="plain"), schedule=OneStage())
    merge = dataclasses.replace(make_run(name="merge"), schedule=ForkMerge())
    fair = dataclasses.replace(make_run(name="fair"), schedule=ForkMerge(equal_cost=True))
    compare.check([plain, fair], 1, "", "", False)
    for other in (plain, fair):
        with pytest.raises(JobError, match="other training budgets: schedule.branches"):
            compare.check([merge, other], 1, "", "", False)
    same = dataclasses.replace(make_run(name="same"), schedule=ForkMerge(rounds=3, jobs=2, search="grid"))
    compare.check([merge, same], 1, "", "", False)
    with pytest.raises(JobError, match="schedule.prune: 0 / 2"):
        compare.check([merge, dataclasses.replace(same, schedule=ForkMerge(prune=2))], 1, "", "", False)


def test_a_run_file_comes_back_and_mistakes_name_their_place() -> None:
    schedule = ForkMerge(
        targets=("click",), own=(Branch("a", {"click": 1.0}), Branch("b", {"click": 1.0, "buy": 0.5})), interval=7,
        grid=(0.0, 0.5), search="greedy", metric="click.logloss", jobs=3,
    )  # fmt: skip
    run = dataclasses.replace(make_run(), schedule=schedule)
    import tomllib

    assert config.from_dict(tomllib.loads(config.dumps(run))) == run
    assert config.override(run, ["schedule.grid=[0.0, 1.0]"]).schedule == dataclasses.replace(schedule, grid=(0.0, 1.0))
    with pytest.raises(config.RunError, match="unknown key `schedule.prun`. Did you mean `prune`"):
        config.override(run, ["schedule.prun=2"])
    with pytest.raises(config.RunError, match="`grid` should be weights"):
        config.override(run, ["schedule.grid=[2.0]"])


def full_run(**changes: Any) -> Any:
    tasks = (Task("click"), Task("buy", role="auxiliary"), Task("spend", kind="real", role="auxiliary"))
    training = Training(batch_size=64, steps=12, checkpoint_steps=2, checkpoint_seconds=0)
    made = make_run(data=make_data(tasks=tasks), training=training, update=ADAM, model=LAZY)
    return dataclasses.replace(made, schedule=ForkMerge(rounds=3, **changes))


def test_metrics_report_and_figure(tmp_path: Path) -> None:
    result = train(full_run(), tmp_path / "out", tables=TABLES, baseline=False)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    record = found["schedule"]
    assert found["steps"] == record["total_steps"] == 36 and record["kind"] == "fork_merge"
    assert not list((tmp_path / "out").glob("*-*.safetensors"))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "ForkMerge: 3 branches, 3 rounds of 4 steps, 36 steps over all branches. Search: greedy, " in text
    line = record["rounds"][1]
    row = next(row for row in text.splitlines() if row.startswith("| 8 |"))
    assert f"{line['weights']['target']:.3f}" in row and f"{line['value']:.4f}" in row
    bundle = Bundle.load(tmp_path / "out")
    assert equal(copies(bundle.model), copies(result.bundle.model))
    plot(record, tmp_path / "merge.png")
    assert (tmp_path / "merge.png").stat().st_size > 5_000
    left, right = plot(record).axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), [r["weights"]["target"] for r in record["rounds"]])
    np.testing.assert_array_equal(right.lines[3].get_ydata(), [r["value"] for r in record["rounds"]])
    assert right.lines[4].get_label() == "the final model's step" and right.get_ylabel() == record["metric"]


@pytest.mark.slow
def test_a_killed_run_is_resumed_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(full_run(), tables=TABLES, baseline=False)
    count = itertools.count()
    step = Local.score

    def dies(*args: Any, **rest: Any) -> Any:
        if next(count) == 15:
            raise RuntimeError("killed")
        return step(*args, **rest)

    monkeypatch.setattr(Local, "score", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train(full_run(), tmp_path / "out", tables=TABLES, baseline=False)
    with pytest.raises(JobError, match="schedule.interval: 0 / 2"):
        train(full_run(interval=2), tmp_path / "out", tables=TABLES, baseline=False, resume=True)
    again = train(full_run(jobs=2, interval=0), tmp_path / "out", tables=TABLES, baseline=False, resume=True)
    assert equal(copies(whole.bundle.model), copies(again.bundle.model)), "more jobs are the same run"


def test_the_command_trains_and_explains(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from unbraid.cli.main import app

    make_log(rows=500).write_parquet(tmp_path / "log.parquet")
    text = config.dumps(full_run(metric="logloss")).replace('rows = "log"', 'rows = "log.parquet"')
    (tmp_path / "run.toml").write_text(text)
    words = ["train", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "merge at step 4 of 12: target " in done.stderr and "; logloss 0." in done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["schedule"]["evaluations"] > 0
    refused = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "other"), "--set", 'schedule.targets=["clack"]'])
    assert (
        refused.exit_code == 2
        and "`targets` should name objectives" in refused.stderr
        and "Traceback" not in refused.output
    )
    cited = CliRunner().invoke(app, ["cite", str(tmp_path / "run.toml")])
    assert "jiang2023forkmerge" in cited.stdout


def test_heads_per_domain_and_histories_train_in_branches(tmp_path: Path) -> None:
    run = full_run()
    run = dataclasses.replace(run, model=ModelChoice(heads=Heads(by="domain"), tables=Views(width=4, lazy_rows=0)))
    metrics = train(run, tables=TABLES, baseline=False).metrics
    assert metrics["schedule"]["evaluations"] > 0 and metrics["test"]["click"]["rows"] > 0
