"""AdaTask against torch's optimisers, a NumPy reference, its invariants, and the phenomenon it is for."""

from __future__ import annotations

import copy
import itertools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optim_kit import EXACT, TASKS, Small, V, assert_equal, batches, losses_of, train, weights_of
from published import seeds
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from toylog import make_data, make_log, make_run

from unbraid import config, job, store
from unbraid.encoders.table import Table, Views
from unbraid.losses.supervised import Supervised
from unbraid.optim.adatask import AdaTask, AdaTaskUpdate
from unbraid.optim.joint import Joint
from unbraid.optim.per_task import Gradients, PerTask
from unbraid.types import Output

BASES = ("adam", "rmsprop", "adagrad")
OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}


class Given(nn.Module):
    """Parameters whose gradients the test gives: the loss of a task is <gradient, parameter>."""

    tables: Mapping[str, Table] = {}

    def __init__(self, *names: str, n: int = 4, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        for number, name in enumerate(names):
            value = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def losses(self, given: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            task: torch.stack([(grad * self.get_parameter(name)).sum() for name, grad in grads.items()]).sum()
            for task, grads in given.items()
        }

    def step(self, update: Any, given: Mapping[str, Mapping[str, Tensor]]) -> None:
        update(self.losses(given), Output({}, {}, torch.empty(0)))


def build(model: nn.Module, config: AdaTask | None = None, **weights: float) -> AdaTaskUpdate:
    return (config or AdaTask()).build(model, steps=100, weights=weights)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def follow(config: AdaTask, steps: list[dict[str, Tensor]], **weights: float) -> Tensor:
    """Where a shared vector ends that is given these gradients, by task."""
    model = Given("shared")
    update = build(model, config, **weights)
    for step in steps:
        model.step(update, {task: {"shared": grad} for task, grad in step.items()})
    return model.get_parameter("shared").detach()


# ------------------------------------------------------------------------------------------------ one task is torch's own
@pytest.mark.parametrize("base", BASES)
def test_one_task_is_torchs_optimiser_over_200_steps(base: Any) -> None:
    settings: dict[str, Any] = {"lr": 0.03, "eps": 1e-4}
    more = {"adam": {"betas": (0.8, 0.9)}, "rmsprop": {"alpha": 0.9}, "adagrad": {}}[base]
    mine, theirs = Small(lazy=False), Small(lazy=False)
    update = build(mine, AdaTask(base=base, **settings, **more))  # type: ignore[arg-type]
    optimizer = OPTIMIZERS[base](theirs.parameters(), **settings, **more)
    for ids in batches(200):
        train(mine, update, [ids], ("click",))
        optimizer.zero_grad()
        losses_of(theirs(ids), ("click",))["click"].backward()
        optimizer.step()
    for name, value in weights_of(theirs).items():
        torch.testing.assert_close(mine.get_parameter(name).detach(), value, **EXACT)


@pytest.mark.parametrize("decay", ["catch_up", "touched"])
@pytest.mark.parametrize("lazy", [True, False])
def test_one_task_is_the_joint_update(lazy: bool, decay: Any) -> None:
    """Lazy tables, decay, clipping and learning rate included; without decay and clipping bit for bit."""
    plain: dict[str, Any] = {"lr": 0.03, "table_lr": 0.01, "learning_rate": "cosine", "warmup_steps": 3}
    for more in ({}, {"weight_decay": 0.1, "table_weight_decay": 0.2, "decay": decay, "clip_norm": 0.5}):
        models = Small(lazy), Small(lazy)
        for model, cls in zip(models, (AdaTask, Joint), strict=True):
            update = cls(**plain, **more).build(model, steps=60, weights={})  # type: ignore[arg-type]
            train(model, update, batches(60), ("like",))
            update.settle()
        for name, value in weights_of(models[1]).items():
            found = models[0].get_parameter(name).detach()
            torch.testing.assert_close(found, value, **EXACT)
            assert more or torch.equal(found, value), name


def test_heads_take_adams_step_on_their_weighted_loss() -> None:
    """A large eps, so that the weight before Adam shows."""
    model = Given("shared", "a_head", "b_head")
    update = build(model, AdaTask(lr=0.1, eps=0.5), a=3.0)
    heads = [nn.Parameter(model.get_parameter(name).detach().clone()) for name in ("a_head", "b_head")]
    optimizer = torch.optim.Adam(heads, lr=0.1, eps=0.5)
    for step in range(50):
        grads = {name: normal(step * 3 + n, 4) for n, name in enumerate(("shared", "a_head", "b_head"))}
        tasks = {"a": {"shared": grads["shared"], "a_head": grads["a_head"]}}
        tasks |= {"b": {"shared": -grads["shared"], "b_head": grads["b_head"]}}
        model.step(update, tasks)
        heads[0].grad, heads[1].grad = 3 * grads["a_head"], grads["b_head"]
        optimizer.step()
    torch.testing.assert_close(model.get_parameter("a_head").detach(), heads[0].detach(), **EXACT)
    torch.testing.assert_close(model.get_parameter("b_head").detach(), heads[1].detach(), **EXACT)


# -------------------------------------------------------------------------------------------------------------- invariants
def two_tasks(steps: int = 50) -> list[dict[str, Tensor]]:
    return [{"a": normal(2 * s, 4), "b": normal(2 * s + 1, 4)} for s in range(steps)]


@pytest.mark.parametrize("base", BASES)
def test_identical_tasks_with_mean_are_one_task_and_with_sum_its_multiple(base: Any) -> None:
    steps = [normal(s, 4) for s in range(50)]
    config = AdaTask(base=base, lr=0.03)
    alone = follow(config, [{"a": g} for g in steps])
    three = [{"a": g, "b": g, "c": g} for g in steps]
    torch.testing.assert_close(follow(replace(config, scale="mean"), three), alone, **EXACT)
    tripled = follow(replace(config, lr=0.09), [{"a": g} for g in steps])
    torch.testing.assert_close(follow(config, three), tripled, **EXACT)


@pytest.mark.parametrize("base", BASES)
def test_order_of_tasks_does_not_matter(base: Any) -> None:
    steps = [{name: normal(3 * s + n, 4) for n, name in enumerate("abc")} for s in range(50)]
    config = AdaTask(base=base, lr=0.03, scale="mean", clip_norm=1.0)
    found = [
        follow(config, [{name: g[name] for name in order} for g in steps], b=2.0) for order in ("abc", "cab", "bca")
    ]
    torch.testing.assert_close(found[0], found[1], **EXACT)
    torch.testing.assert_close(found[0], found[2], **EXACT)


@pytest.mark.parametrize("base", BASES)
def test_the_scale_of_a_loss_does_not_matter_and_a_weight_does(base: Any) -> None:
    config = AdaTask(base=base, lr=0.03, eps=1e-30)
    plain = follow(config, two_tasks())
    scaled = follow(config, [{"a": 1000 * g["a"], "b": g["b"]} for g in two_tasks()])
    torch.testing.assert_close(scaled, plain, rtol=0.0, atol=1e-10)
    assert not torch.allclose(follow(config, two_tasks(), a=2.0), plain, atol=1e-3)


def test_a_weight_multiplies_the_step_behind_the_accumulators() -> None:
    config, start = AdaTask(lr=0.03), Given("shared").get_parameter("shared").detach()
    parts = [follow(config, [{"c": g[task]} for g in two_tasks()]) - start for task in "ab"]
    both = follow(config, two_tasks(), a=0.25, b=3.0) - start
    torch.testing.assert_close(both, 0.25 * parts[0] + 3 * parts[1], **EXACT)


def test_a_sign_flip_of_one_task_flips_its_changes_alone() -> None:
    seen: list[dict[str, Tensor]] = []
    for sign in (1, -1):
        model, changes = Given("shared"), dict[str, Tensor]()
        update = build(model, AdaTask(lr=0.03))
        for step in two_tasks():
            update.observe = lambda task, leaf, ids, change, found=changes: found.update({task: change})
            model.step(update, {"a": {"shared": sign * step["a"]}, "b": {"shared": step["b"]}})
        seen.append(changes)
    torch.testing.assert_close(seen[0]["a"], -seen[1]["a"], **EXACT)
    torch.testing.assert_close(seen[0]["b"], seen[1]["b"], **EXACT)


@pytest.mark.parametrize("base", BASES)
def test_disjoint_supports_are_one_optimiser_on_the_sum(base: Any) -> None:
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    config = AdaTask(base=base, lr=0.03, missing="zero")
    steps = [normal(s, 4) for s in range(50)]
    split = follow(config, [{"a": g * mask, "b": g * (1 - mask)} for g in steps])
    torch.testing.assert_close(split, follow(config, [{"a": g} for g in steps]), **EXACT)


def test_the_first_step_of_adam_is_the_sum_of_signs_even_against_descent() -> None:
    config, start = AdaTask(lr=0.1, eps=0.0), Given("shared").get_parameter("shared").detach()
    ones = torch.ones(4, dtype=torch.float64)
    moved = follow(config, [dict(zip("abcd", (ones, ones, ones, -4 * ones), strict=True))]) - start
    torch.testing.assert_close(moved, -0.2 * ones, **EXACT)  # descent of the sum, -1, would go up


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("lazy", [True, False])
def test_changes_of_the_tasks_add_up_to_what_happened(lazy: bool, base: Any, scale: Any) -> None:
    """With absent tasks, weights, decay (of all rows at each step) and clipping."""
    model = Small(lazy)
    config = AdaTask(base=base, scale=scale, lr=0.02, weight_decay=0.1, table_weight_decay=0.2, clip_norm=1.0)
    update = build(model, config, like=2.0)
    names = {table: f"views.tables.{table}.weight" for table in model.tables}
    for number, ids in enumerate(batches(12)):
        update.settle()
        before, total, moved = weights_of(model), dict[str, Tensor](), set[str]()

        def add(
            task: str, leaf: str, ids: Tensor | None, change: Tensor, total: Any = total, old: Any = before
        ) -> None:
            name = names.get(leaf, leaf)
            place = slice(None) if ids is None else ids
            total.setdefault(name, torch.zeros_like(old[name]))[place] += change

        update.observe = add
        train(model, update, [ids], (TASKS, ("click",), ("like",))[number % 3])
        update.settle()
        for name, value in weights_of(model).items():
            decay = config.table_weight_decay if name.startswith("views") else config.weight_decay
            expected = before[name] * (1 - 0.02 * decay) + total[name] if name in total else before[name]
            torch.testing.assert_close(value, expected, **EXACT)
            moved |= {name} if name in total else set()
        assert moved


@pytest.mark.parametrize("lazy", [True, False])
def test_decay_is_applied_once_whatever_the_number_of_tasks(lazy: bool) -> None:
    model = Small(lazy)
    config = AdaTask(lr=0.5, weight_decay=0.1, table_weight_decay=0.2)
    update, before = build(model, config), weights_of(model)
    for ids in batches(2):
        output = model(ids)
        update({task: 0 * loss for task, loss in losses_of(output).items()}, output)
    update.settle()
    for name, value in weights_of(model).items():
        rate = 0.9 if name.startswith("views") else 0.95
        torch.testing.assert_close(value, before[name] * rate**2, **EXACT)


@pytest.mark.parametrize("lazy", [True, False])
def test_adagrads_accumulators_only_grow(lazy: bool) -> None:
    model = Small(lazy)
    update = build(model, AdaTask(base="adagrad"))
    before: dict[str, Tensor] = {}
    for ids in batches(10):
        train(model, update, [ids])
        state = update.state_dict()["tasks"]
        now = {
            f"{task}/{leaf}": value["sum" if kind == "dense" else "square"].clone()
            for task, part in state.items() for kind in ("dense", "rows") for leaf, value in part[kind].items()
        }  # fmt: skip
        assert all(bool((now[name] >= value).all()) for name, value in before.items())
        before = now
    assert len(before) == 2 * (1 + 1 + 2 + 2), "shared and own table, own layer, own head of two tasks"


# ------------------------------------------------------------------------------------------------------ a NumPy reference
class Linear(nn.Module):
    """Logit of task k: <row of the item + shift, head of k>."""

    def __init__(self, lazy: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.views = Views(width=3, std=1.0, lazy_rows=0 if lazy else -1).build((), {"item": V})
        self.shift = nn.Parameter(torch.randn(3))
        self.heads = nn.ParameterDict({task: nn.Parameter(torch.randn(3)) for task in "abc"})
        self.double()

    @property
    def tables(self) -> dict[str, Table]:
        return dict(self.views.tables.items())  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Output:
        read, lookups = self.views({"item": [ids]})
        hidden = read["shared", "item", "value"][0].gather() + self.shift
        return Output({task: hidden @ head for task, head in self.heads.items()}, {}, hidden, {}, lookups)


class Reference:
    """The same in NumPy, with loops over tasks and no code of the library."""

    def __init__(
        self, config: AdaTask, weights: Mapping[str, float], values: Mapping[str, np.ndarray], lazy: bool
    ) -> None:
        self.config, self.weights, self.values, self.lazy = (
            config,
            weights,
            {k: v.copy() for k, v in values.items()},
            lazy,
        )
        self.moments: dict[tuple[str, str], list[Any]] = {}
        self.reached: dict[str, set[str]] = {}

    def gradients(self, ids: np.ndarray, labels: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        table, shift, found = self.values["table"], self.values["shift"], {}
        hidden = table[ids] + shift
        for task, y in labels.items():
            head = self.values[task]
            slope = 2 * (hidden @ head - y) / len(y)
            rows = np.zeros_like(table)
            np.add.at(rows, ids, slope[:, None] * head)
            found[task] = {"table": rows, "shift": slope.sum() * head, task: hidden.T @ slope}
        return found

    def direction(self, task: str, leaf: str, grad: np.ndarray, rows: Any) -> np.ndarray:
        m, v, t = self.moments.setdefault((task, leaf), [np.zeros_like(self.values[leaf]), np.zeros_like(grad), 0])
        t, config, sparse = t + 1, self.config, leaf == "table" and self.lazy
        b1, b2 = config.betas
        if config.base == "adam":
            m[rows] = b1 * m[rows] + (1 - b1) * grad[rows]
            v[rows] = b2 * v[rows] + (1 - b2) * grad[rows] ** 2
        elif config.base == "rmsprop":
            v[rows] = config.alpha * v[rows] + (1 - config.alpha) * grad[rows] ** 2
        else:
            v[rows] += grad[rows] ** 2
        self.moments[task, leaf] = [m, v, t]
        if config.base != "adam":
            return grad[rows] / (np.sqrt(v[rows]) + config.eps)
        if sparse:
            return m[rows] / (1 - b1**t) * math.sqrt(1 - b2**t) / (np.sqrt(v[rows]) + config.eps)
        return m[rows] / (1 - b1**t) / (np.sqrt(v[rows] / (1 - b2**t)) + config.eps)

    def step(self, ids: np.ndarray, labels: Mapping[str, np.ndarray]) -> None:
        config, found = self.config, self.gradients(ids, labels)
        if config.clip_norm:
            found = self.clipped(found)
        for leaf in {leaf for grads in found.values() for leaf in grads}:
            new = self.reached.setdefault(leaf, set())
            alone = set(new) if len(new) == 1 else set()
            new |= {task for task in found if leaf in found[task]}
            if alone and len(new) > 1:
                self.unweight(alone.pop(), leaf)
            rows = np.unique(ids) if leaf == "table" and self.lazy else slice(None)
            everyone = (
                sorted(new) if config.missing == "zero" and len(new) > 1 else [t for t in found if leaf in found[t]]
            )
            if config.missing == "zero":
                self.same_clocks(everyone, leaf)
            lr = config.lr if leaf != "table" or config.table_lr is None else config.table_lr
            decay = config.table_weight_decay if leaf == "table" else config.weight_decay
            change = np.zeros_like(self.values[leaf])
            for task in everyone:
                grad = found.get(task, {}).get(leaf, np.zeros_like(change))
                weight = self.weights.get(task, 1.0)
                if len(new) == 1:
                    grad, weight = grad * weight, 1.0
                count = len(everyone) if config.scale == "mean" else 1
                change[rows] -= lr * weight / count * self.direction(task, leaf, grad, rows)
            self.values[leaf] = self.values[leaf] * (1 - lr * decay) + change

    def same_clocks(self, tasks: list[str], leaf: str) -> None:
        steps = [self.moments[task, leaf][2] for task in tasks if (task, leaf) in self.moments]
        for task in tasks:
            like = self.values[leaf]
            self.moments.setdefault((task, leaf), [np.zeros_like(like), np.zeros_like(like), max(steps, default=0)])

    def unweight(self, task: str, leaf: str) -> None:
        m, v, t = self.moments[task, leaf]
        self.moments[task, leaf] = [m / self.weights.get(task, 1.0), v / self.weights.get(task, 1.0) ** 2, t]

    def clipped(self, found: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
        def norm(grads: list[np.ndarray]) -> float:
            return math.sqrt(sum(float((g**2).sum()) for g in grads))

        if self.config.clip == "sum":
            leaves = {leaf for grads in found.values() for leaf in grads}
            total = [sum(self.weights.get(t, 1.0) * g[leaf] for t, g in found.items() if leaf in g) for leaf in leaves]
            norms = dict.fromkeys(found, norm(total))  # type: ignore[arg-type]
        else:
            norms = {task: norm(list(grads.values())) for task, grads in found.items()}
        scale = {task: min(1.0, self.config.clip_norm / (n + 1e-6)) for task, n in norms.items()}
        return {task: {leaf: g * scale[task] for leaf, g in grads.items()} for task, grads in found.items()}


VARIANTS = [
    {}, {"missing": "zero"}, {"scale": "mean"}, {"missing": "zero", "scale": "mean"}, {"clip_norm": 0.5},
    {"clip_norm": 0.5, "clip": "sum"}, {"table_lr": 0.01, "weight_decay": 0.1, "table_weight_decay": 0.3},
]  # fmt: skip
PRESENT = ("a", "ab", "abc", "bc", "", "c", "abc")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("lazy", [True, False])
def test_three_tasks_some_absent_are_the_numpy_reference(lazy: bool, base: Any, variant: dict[str, Any]) -> None:
    config = AdaTask(base=base, lr=0.03, eps=1e-3, **variant)
    weights = {"a": 0.5, "c": 2.0}
    model = Linear(lazy)
    update = build(model, config, **weights)
    (table,) = model.tables.values()
    values = {"table": table.weight, "shift": model.shift, **dict(model.heads.items())}
    reference = Reference(config, weights, {k: v.detach().numpy() for k, v in values.items()}, lazy)
    rng = np.random.default_rng(0)
    for step, present in enumerate(itertools.islice(itertools.cycle(PRESENT), 42)):
        ids = rng.integers(0, V, 6)
        labels = {task: rng.normal(size=6) for task in present}
        if step == 3:
            labels = {}
        output = model(torch.from_numpy(ids))
        update({t: (output.logits[t] - torch.from_numpy(y)).square().mean() for t, y in labels.items()}, output)
        reference.step(ids, labels)
    update.settle()
    for name, value in values.items():
        np.testing.assert_allclose(value.detach().numpy(), reference.values[name], rtol=0, atol=1e-12, err_msg=name)
    assert update.step == 42


# -------------------------------------------------------------------------------------------------------- what stays still
@pytest.mark.parametrize("missing", ["skip", "zero"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("lazy", [True, False])
def test_an_absent_task_keeps_its_own_parameters_and_state(lazy: bool, base: Any, missing: Any) -> None:
    """Decay on.  With ``skip`` its accumulators on shared parameters stay, too; with ``zero`` they fade and move them."""
    model = Small(lazy)
    update = build(model, AdaTask(base=base, missing=missing, weight_decay=0.1, table_weight_decay=0.1, lr=0.05))
    train(model, update, batches(20))
    update.settle()
    before, state = weights_of(model), copy.deepcopy(update.state_dict())
    train(model, update, batches(5, seed=1), ("click",))
    update.settle()
    for name, value in weights_of(model).items():
        assert torch.equal(before[name], value) == ("like" in name), name
    kept, now = state["tasks"]["like"], update.state_dict()["tasks"]["like"]
    shared = "rows" if lazy else "dense"
    for kind in ("dense", "rows"):
        for leaf in kept[kind]:
            if "like" in leaf or missing == "skip":
                assert_equal(now[kind][leaf], kept[kind][leaf])
            else:
                assert kind == shared and int(now[kind][leaf]["step"]) == int(kept[kind][leaf]["step"]) + 5
    decays = update.state_dict()["decay"]
    assert not lazy or decays["like/item/value"]["clock"] == state["decay"]["like/item/value"]["clock"]


def test_rows_that_no_batch_read_do_not_move() -> None:
    model = Small(True)
    update = build(model, AdaTask(missing="zero"))
    train(model, update, batches(5))
    before, ids = weights_of(model), torch.tensor([1, 5, 9])
    train(model, update, [ids])
    rest = torch.tensor([r for r in range(V) if r not in ids.tolist()])
    for name, table in model.tables.items():
        assert torch.equal(table.weight[rest], before[f"views.tables.{name}.weight"][rest])
        assert bool((table.weight[ids] != before[f"views.tables.{name}.weight"][ids]).all())


def test_a_leaf_that_becomes_shared_is_weighted_behind_its_accumulators() -> None:
    """As if it had been shared from the start, apart from the steps that it made before (there the weight cancels)."""
    config, steps = AdaTask(lr=0.03, eps=1e-30), two_tasks()
    late = [*({"a": s["a"]} for s in steps[:20]), *steps[20:]]
    model = Given("shared")
    update = build(model, config, a=8.0)
    for step in late:
        model.step(update, {task: {"shared": grad} for task, grad in step.items()})
    state = update.state_dict()["tasks"]["a"]["dense"]["shared"]
    plain = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.Adam([plain], lr=1.0)
    for step in late:
        plain.grad = step["a"]
        optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], optimizer.state[plain][name], **EXACT)


# ------------------------------------------------------------------------------------------------------- mixed precision
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_half_precision_are_float32(dtype: torch.dtype, base: Any) -> None:
    """Small gradients, whose squares are 0 in float16, move weights as in float32; three steps are rounded once."""
    models = [Given("shared", dtype=d) for d in (dtype, torch.float32)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        update = build(model, AdaTask(base=base, lr=0.5, eps=1e-12))
        model.step(update, {task: {"shared": torch.tensor([1e-4, -1e-4, 3e-4, 1e-5])} for task in "abc"})
        state = update.state_dict()["tasks"]["b"]["dense"]["shared"]
        assert all(value.dtype == torch.float32 for value in state.values())
    found, expected = (model.get_parameter("shared").detach() for model in models)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-2)


@pytest.mark.parametrize("lazy", [True, False])
def test_training_under_autocast(lazy: bool) -> None:
    model = Small(lazy).float()
    update = build(model, AdaTask(lr=0.02, loss_scale=128.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = sum(float(loss.detach()) for loss in losses_of(model(batches(1)[0])).values())
    for ids in batches(60):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(ids)
            assert output.logits["click"].dtype == torch.bfloat16
            losses = losses_of(output)
        update(losses, output)
    last = sum(float(loss.detach()) for loss in losses_of(model(batches(1)[0])).values())
    assert last < first / 2
    for task in TASKS:
        part = update.state_dict()["tasks"][task]
        values = [v for kind in ("dense", "rows") for leaf in part[kind].values() for v in leaf.values()]
        assert all(v.dtype == torch.float32 for v in values if isinstance(v, Tensor))


def test_gradients_are_unscaled_before_the_moments_and_overflow_moves_nothing() -> None:
    ids = batches(1)[0]
    states = []
    for scale in (1.0, 4096.0):
        model = Small(True)
        update = build(model, AdaTask(loss_scale=scale, clip_norm=0.1))
        train(model, update, [ids])
        states.append({"tasks": update.state_dict()["tasks"], "weights": weights_of(model)})
    assert_equal(states[1], states[0])
    update = build(model := Small(True).float(), AdaTask(loss_scale=1e38))
    before, output = weights_of(model), model(ids)
    with pytest.raises(FloatingPointError, match="gradient of `click` is not finite at step 0.*`loss_scale`"):
        update({task: 1000 * loss for task, loss in losses_of(output).items()}, output)
    assert_equal(weights_of(model), before)
    assert not update.tasks and not update.reached


# ------------------------------------------------------------------------------------------------------------- the step size
def test_the_learning_rate_moves_the_steps_of_all_tasks() -> None:
    config = AdaTask(lr=0.2, eps=0.0, betas=(0.0, 0.0), learning_rate="linear", scale="mean")
    model = Given("shared")
    update = config.build(model, steps=10, weights={})
    for step in range(10):
        before = model.get_parameter("shared").detach().clone()
        model.step(update, {task: {"shared": torch.ones(4, dtype=torch.float64)} for task in "ab"})
        torch.testing.assert_close(
            before - model.get_parameter("shared").detach(), torch.full((4,), 0.2 * (1 - step / 10)).double()
        )


@pytest.mark.parametrize("clip", ["task", "sum"])
def test_norms_before_clipping_are_told(clip: Any) -> None:
    model = Given("shared")
    update = build(model, AdaTask(clip_norm=1e9, clip=clip), b=2.0)
    grads = two_tasks(1)[0]
    model.step(update, {task: {"shared": grad} for task, grad in grads.items()})
    if clip == "task":
        assert {k: float(v) for k, v in update.grad_norms.items()} == pytest.approx(
            {k: float(g.norm()) for k, g in grads.items()}
        )
    else:
        assert float(update.grad_norm) == pytest.approx(float((grads["a"] + 2 * grads["b"]).norm()))  # type: ignore[arg-type]


def test_no_losses_move_nothing_but_the_learning_rate(recwarn: pytest.WarningsRecorder) -> None:
    model = Small(True)
    update = AdaTask(weight_decay=0.1, table_weight_decay=0.1, learning_rate="linear", clip_norm=1.0).build(
        model, steps=10, weights={}
    )
    before = weights_of(model)
    update({}, model(batches(1)[0]))
    assert_equal(weights_of(model), before)
    assert update.state_dict() == {
        "kind": "adatask",
        "base": "adam",
        "step": 1,
        "reached": {},
        "decay": {},
        "tasks": {},
    }
    assert [group["lr"] for group in update.dense.param_groups] == [pytest.approx(9e-4, rel=1e-12)] * 2
    assert not recwarn.list


# ------------------------------------------------------------------------------------------------------------------- states
@pytest.mark.parametrize("missing", ["skip", "zero"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("lazy", [True, False])
def test_resume_is_bit_equal(lazy: bool, base: Any, missing: Any, tmp_path: Path) -> None:
    """In the middle, before `like` was ever seen, and with rows that owe decay."""
    config = AdaTask(
        base=base, missing=missing, lr=0.05, weight_decay=0.1, table_weight_decay=0.1, clip_norm=0.5,
        learning_rate="cosine", warmup_steps=5,
    )  # fmt: skip
    present = [("click",) if n < 8 else (TASKS, ("click",), ("like",))[n % 3] for n in range(40)]
    whole = Small(lazy)
    straight = build(whole, config, like=2.0, click=3.0)
    states = {}
    for number, ids in enumerate(batches(40)):
        if number in (5, 23):
            store.save(tmp_path / str(number), {"model": whole.state_dict(), "update": straight.state_dict()})
            states[number] = store.load(tmp_path / str(number))
        train(whole, straight, [ids], present[number])
    straight.settle()
    for number, state in states.items():
        resumed = Small(lazy)
        again = build(resumed, config, like=2.0, click=3.0)
        again.load_state_dict(state["update"])
        resumed.load_state_dict(state["model"])
        assert set(again.tasks) == ({"click"} if number == 5 else {"click", "like"})
        for ids, tasks in zip(batches(40)[number:], present[number:], strict=True):
            train(resumed, again, [ids], tasks)
        again.settle()
        assert_equal(weights_of(resumed), weights_of(whole))
        assert_equal(again.state_dict(), straight.state_dict())


def test_a_loaded_state_is_a_copy_and_that_of_frozen_parameters_is_dropped() -> None:
    model = Small(True)
    update = build(model)
    train(model, update, batches(2))
    state, kept = update.state_dict(), copy.deepcopy(update.state_dict())
    model.layers.requires_grad_(False)
    model.tables["like/item/value"].weight.requires_grad_(False)
    later = build(model)
    later.load_state_dict(state)
    found = later.state_dict()
    assert set(found["tasks"]["like"]["dense"]) == {"heads.like.weight", "heads.like.bias"}
    assert set(found["tasks"]["like"]["rows"]) == {"shared/item/value"}
    assert set(found["reached"]) == {"heads.like.weight", "heads.like.bias", "heads.click.weight", "heads.click.bias",
                                     "click/item/value", "shared/item/value"}  # fmt: skip
    train(model, later, batches(2))
    assert_equal(state, kept)


def test_state_errors() -> None:
    model = Small(True)
    update = build(model)
    train(model, update, batches(2))
    state = update.state_dict()
    with pytest.raises(ValueError, match="that of update `adatask`. Found `joint`"):
        update.load_state_dict(Joint().build(model, steps=1, weights={}).state_dict())
    with pytest.raises(ValueError, match="that of base `adagrad`. Found `adam`"):
        build(model, AdaTask(base="adagrad")).load_state_dict(state)
    other = copy.deepcopy(state)
    other["tasks"]["like"]["dense"]["tower"] = other["tasks"]["like"]["dense"]["heads.like.bias"]
    with pytest.raises(ValueError, match=r"parameters that this model does not have: \['tower'\]"):
        update.load_state_dict(other)
    other = copy.deepcopy(state)
    other["tasks"]["like"]["dense"]["heads.like.bias"]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"State of `heads.like.bias` should have shape \(1,\). Found \(2,\)"):
        update.load_state_dict(other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base": "sgd"}, "Parameter `base` should be one of ('adam', 'rmsprop', 'adagrad'). Found `sgd`."),
        ({"scale": "max"}, "Parameter `scale` should be one of ('sum', 'mean'). Found `max`."),
        ({"missing": "hold"}, "Parameter `missing` should be one of ('skip', 'zero'). Found `hold`."),
        ({"alpha": 1.0, "base": "rmsprop"}, "Parameter `alpha` should be in [0, 1). Found 1.0."),
        ({"loss_scale": 0.0}, "Parameter `loss_scale` should be positive and finite. Found 0.0."),
        ({"alpha": 0.9}, "Parameter `alpha` belongs to base `rmsprop`. Found base `adam`: leave it out."),
        ({"base": "adagrad", "betas": (0.5, 0.9)}, "Parameter `betas` belongs to base `adam`. Found base `adagrad`: leave "
         "it out."),
        ({"lr": -1.0}, "Parameter `lr` should be finite and not negative. Found -1.0."),
    ],
)  # fmt: skip
def test_config_errors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        AdaTask(**wrong)
    assert str(error.value) == message


def test_a_misspelt_key_of_a_run_file_is_an_error() -> None:
    adapter = TypeAdapter(AdaTask)
    assert adapter.validate_python({"lr": 0.1, "base": "rmsprop"}) == AdaTask(lr=0.1, base="rmsprop")
    with pytest.raises(ValidationError, match="extra_forbidden|Unexpected keyword"):
        adapter.validate_python({"scales": "mean"})


@pytest.mark.parametrize("by", ["domain", "task@domain"])
def test_a_run_file_trains_and_its_resumed_run_is_equal(
    by: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objectives are domains, or tasks in domains; the process dies in the second half."""
    update = AdaTask(lr=0.01, scale="mean", missing="zero", weight_decay=0.1)
    data, tables = make_data(cache=str(tmp_path / "cache")), {"log": make_log()}
    run = make_run(data=data, update=update, losses=(Supervised(by=by),))
    run = replace(run, training=replace(run.training, checkpoint_steps=5))
    assert config.from_dict(tomllib.loads(config.dumps(run))) == run
    whole = job.train(run, tables=tables, baseline=False)
    seen = []

    def dies(self: AdaTaskUpdate, grads: Any, act: Any = AdaTaskUpdate.act) -> None:
        seen.append(set(grads.of))
        if len(seen) == 14:
            raise KeyboardInterrupt
        act(self, grads)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(AdaTaskUpdate, "act", dies)
        job.train(run, tmp_path / "out", tables=tables, baseline=False)
    again = job.train(run, tmp_path / "out", tables=tables, baseline=False, resume=True)
    assert_equal(dict(again.bundle.model.state_dict()), dict(whole.bundle.model.state_dict()))
    names = {name.partition("@") for found in seen for name in found}
    assert {bool(at) for _, at, _ in names} == {by == "task@domain"} and len(names) >= 3


# ---------------------------------------------------------------------------------------------------------- the phenomenon
class Toy(nn.Module):
    """One shared layer and a linear head for each of two regressions of five outputs."""

    tables: Mapping[str, Table] = {}

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 24)
        self.heads = nn.ModuleList(nn.Linear(24, 5) for _ in range(2))
        for linear, gain in ((self.layer, 2.0), *((head, 1.0) for head in self.heads)):
            nn.init.normal_(linear.weight, 0.0, math.sqrt(gain / linear.in_features))  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.layer(x))
        return {str(k): head(hidden) for k, head in enumerate(self.heads)}


class Usage:
    """Exponential averages of the squares of each task's changes of the shared weights."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}

    def __call__(self, task: str, leaf: str, ids: Tensor | None, change: Tensor) -> None:
        if leaf == "layer.weight":
            self.of[task] = 0.9 * self.of.get(task, torch.zeros_like(change)) + 0.1 * change.square()

    def median(self) -> float:
        """Of task 0's share among the roots."""
        roots = {task: value.sqrt() for task, value in self.of.items()}
        return float((roots["0"] / (roots["0"] + roots["1"])).median())


class Attributed(PerTask):
    """Adam on the sum of the losses, which tells `Usage` what each task's momentum did."""

    usage: Usage

    def act(self, grads: Gradients) -> None:
        super().act(grads)
        weight, lr, t = self.parameters["layer.weight"], 3e-3, self.step
        root = (self.dense.state[weight]["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8
        for task, found in grads.of.items():
            mean = 0.9 * self.means.get(task, torch.zeros_like(weight)) + 0.1 * found["layer.weight"]
            self.means[task] = mean.detach()
            self.usage(task, "layer.weight", None, -lr * (mean / (1 - 0.9**t) / root).detach())

    means: dict[str, Tensor]


def toy(config: Joint, sigma: tuple[float, float], seed: int) -> tuple[float, float, float]:
    """Test error of both tasks over the square of sigma after 2,000 steps, and task 0's median share of the usage."""
    torch.manual_seed(seed)
    both, own = torch.randn(5, 20) * math.sqrt(10), [torch.randn(5, 20) * math.sqrt(3.5) for _ in range(2)]
    model, usage = Toy(), Usage()
    if isinstance(config, AdaTask):
        update: Any = config.build(model, steps=2000, weights={})
        update.observe = usage
    else:
        update = Attributed(config, model, 2000, {})
        update.usage, update.means = usage, {}

    def data(n: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.randn(n, 20) / math.sqrt(20)
        return x, {str(k): sigma[k] * torch.tanh(x @ (both + own[k]).t()) for k in range(2)}

    for _ in range(2000):
        x, y = data(64)
        update({k: (out - y[k]).square().mean() for k, out in model(x).items()}, Output({}, {}, x))
    x, y = data(4000)
    with torch.no_grad():
        errors = [float((out - y[k]).square().mean()) / sigma[int(k)] ** 2 for k, out in model(x).items()]
    return errors[0], errors[1], usage.median()


def toys(config: Joint, sigma: tuple[float, float]) -> np.ndarray:
    """Means over seeds."""
    return np.mean([toy(config, sigma, seed) for seed in seeds(2, 5)], axis=0)


@pytest.mark.slow
def test_tasks_of_one_scale_are_learned_as_by_adam() -> None:
    adam, adatask = toys(Joint(lr=3e-3), (1, 1)), toys(AdaTask(lr=3e-3), (1, 1))
    print(adam, adatask)
    assert np.abs(adatask - adam)[:2].max() < 0.01


@pytest.mark.slow
def test_a_dominated_task_gains_and_the_dominant_one_pays_a_little() -> None:
    """Labels of task 1 are ten times as large, so that its gradients are a hundred times as large."""
    adam = toys(Joint(lr=3e-3), (1, 10))
    added, averaged = (toys(AdaTask(lr=3e-3, scale=scale), (1, 10)) for scale in ("sum", "mean"))  # type: ignore[arg-type]
    print(adam, added, averaged)
    assert added[0] <= 0.75 * adam[0]
    assert added[1] <= 1.15 * adam[1]
    assert averaged[0] <= 0.8 * adam[0], "so it is not only the longer step"
    assert adam[2] < 0.15 and 0.35 < added[2] < 0.65
