"""Cosines and one-step gains: against autograd of a whole loss, a full re-evaluation of a moved copy, planted conflict."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid.analysis import conflict
from unbraid.analysis.conflict import Conflict, OneStep, cosine, cubic
from unbraid.bundle import build
from unbraid.config import ModelChoice, Run
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.evaluate import evaluate
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.single_task import SingleTask
from unbraid.train import predict
from unbraid.types import Batch, Task

LAZY = {"dense": -1, "lazy": 0}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    data = make_data(cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data, tables={"log": make_log(rows=900)}))


def run_of(tables: Views | None = None, tower: Any = None, **changes: Any) -> Run:
    choice = ModelChoice(tower=tower or SharedBottom(bottom=(8,), tower=(4,)), tables=tables or Views(width=4, std=0.3))
    return make_run(model=choice, **changes)


def model_of(run: Run, encoded: Encoded) -> Model:
    torch.manual_seed(3)
    return build(run, encoded.schema).double()


def batches_of(encoded: Encoded, split: str = "train", size: int = 64) -> list[Batch]:
    def wide(batch: Batch) -> Batch:  # the reference is in float64
        features = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in batch.features.items()
        }
        return replace(batch, features=features, labels={k: v.double() for k, v in batch.labels.items()})

    return [wide(batch) for batch in encoded.in_order(encoded.split(split), size)]


def whole(model: Model, batch: Batch, task: str) -> dict[str, torch.Tensor]:
    """Gradient of one task's mean cross-entropy in every parameter, by plain autograd; lazy rows are put into their table."""
    model.train()
    model.zero_grad()
    output = model(batch)
    known = batch.observed[task]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(output.logits[task][known], batch.labels[task][known])
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    names = {id(table.weight): name for name, table in model.tables.items()}
    for name, p in model.named_parameters():
        for lookup in output.lookups:
            if lookup.table == names.get(id(p)) and lookup.vectors.is_leaf and lookup.vectors.grad is not None:
                found[name] = torch.zeros_like(p).index_add_(0, lookup.ids, lookup.vectors.grad)
    return found


@pytest.mark.parametrize("kind", LAZY)
def test_cosines_are_over_what_both_reach(encoded: Encoded, kind: str) -> None:
    run = run_of(Views(width=4, std=0.3, lazy_rows=LAZY[kind]))
    model, batches = model_of(run, encoded), batches_of(encoded)[:3]
    before = copy.deepcopy(model.state_dict())
    values = Conflict(run)(model, encoded.schema, batches).values
    assert values["objectives"] == ["click", "buy"] and values["cosine"].shape == (3, 2, 2)
    for step, batch in enumerate(batches):
        click, buy = (whole(copy.deepcopy(model), batch, task) for task in ("click", "buy"))
        shared = sorted(set(click) & set(buy))
        assert set(click) - set(shared) and set(buy) - set(shared), "heads are not shared"
        a, b = (torch.cat([grads[name].flatten() for name in shared]) for grads in (click, buy))
        want = float(a @ b / a.norm() / b.norm())
        assert values["cosine"][step, 0, 1] == pytest.approx(want, abs=1e-10)
        assert values["cosine"][step, 1, 0] == pytest.approx(want, abs=1e-10)
        assert values["cosine"][step, 0, 0] == pytest.approx(1)
    assert values["mean"] == pytest.approx(values["cosine"].mean(0)) and (values["conflicting"].diagonal() == 0).all()
    assert all(torch.equal(before[name], part) for name, part in model.state_dict().items()), "the model is as it was"


@pytest.mark.parametrize("kind", LAZY)
def test_cosines_by_leaf_are_those_of_each_leaf_alone(encoded: Encoded, kind: str) -> None:
    run = run_of(Views(width=4, std=0.3, lazy_rows=LAZY[kind]))
    model, batches = model_of(run, encoded), batches_of(encoded)[:3]
    values = Conflict(run)(model, encoded.schema, batches).values
    tables = {id(table.weight): name for name, table in model.tables.items()}
    label = {name: tables.get(id(p), name) for name, p in model.named_parameters()}
    want: dict[str, list[float]] = {}
    for batch in batches:
        click, buy = (whole(copy.deepcopy(model), batch, task) for task in ("click", "buy"))
        for name in label:
            if name in click and name in buy:
                a, b = click[name].flatten(), buy[name].flatten()
                want.setdefault(label[name], []).append(float(a @ b / a.norm() / b.norm()))
    assert values["leaves"] == list(want), "from the bottom of the model up, heads and towers left out"
    assert values["parameters"].tolist() == [p.numel() for n, p in model.named_parameters() if label[n] in want]
    assert any(name in model.tables for name in want) and any("weight" in name for name in want)
    assert values["by_leaf"].shape == (len(want), 2, 2)
    for found, each in zip(values["by_leaf"], want.values(), strict=True):
        assert found[0, 1] == found[1, 0] == pytest.approx(np.mean(each), abs=1e-10)
        assert found.diagonal() == pytest.approx(1)


def test_cosines_of_inner_products_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    reach = rng.random((4, 3, 5)) < 0.7  # batch, objective, leaf
    reach[0, 1], reach[1, :, 2] = False, [True, False, False]  # an objective is not in a batch; a leaf is one's own
    of = [
        {f"t{k}": {f"p{n}": torch.from_numpy(rng.normal(size=n + 1)) for n in range(5) if each[k, n]} for k in range(3)}
        for each in reach
    ]
    names, leaves = [f"t{k}" for k in range(3)], [f"p{n}" for n in range(5)]
    table = np.stack([conflict._laid_out(*conflict.inner(grads), names, leaves) for grads in of])
    found = conflict.cosines(table)
    for s, grads in enumerate(of):
        for i, a in enumerate(names):
            for j, b in enumerate(names):
                assert found[s, i, j] == pytest.approx(cosine(grads[a], grads[b]), abs=1e-10, nan_ok=True)
    assert np.isnan(found[0, 1]).all() and np.isfinite(found).sum() > 20


def test_opposite_labels_conflict_and_equal_ones_do_not(tmp_path: Path) -> None:
    data = make_data(
        cache=str(tmp_path), tasks=(Task("click"), Task("again", column="click"), Task("not", column="1 - click"))
    )
    table = Encoded(encode(data, tables={"log": make_log(rows=900)}))
    run = run_of(tower=SharedBottom(bottom=(8,), tower=()), data=data)
    model = model_of(run, table)
    heads = [p for name, p in model.named_parameters() if name.startswith("heads")]
    for first, other in ((0, 2), (1, 3)):  # head of `again` as that of `click`, of `not` its mirror image
        heads[other].data.copy_(heads[first].data)
        heads[other + 2].data.copy_(-heads[first].data)
    values = Conflict(run)(model, table.schema, batches_of(table)[:4]).values
    assert values["mean"] == pytest.approx(np.ones((3, 3)), abs=1e-9), (
        "the mirrored head turns the opposite label around"
    )
    for first, other in ((0, 4), (1, 5)):
        heads[other].data.copy_(heads[first].data)
    values = Conflict(run)(model, table.schema, batches_of(table)[:4]).values
    assert (
        values["mean"][0, 1] == pytest.approx(1, abs=1e-9)
        and values["mean"][0, 2] < 0
        and values["conflicting"][0, 2] == 1
    )


def test_nothing_shared_has_no_cosine(encoded: Encoded) -> None:
    run = run_of(Views(kind="separate", width=4), SingleTask(bottom=(8,), tower=(4,)))
    found = Conflict(run, steps=2)(model_of(run, encoded), encoded.schema, batches_of(encoded))
    off = found.values["cosine"][:, 0, 1]
    assert len(off) == 2 and np.isnan(off).all() and np.isnan(found.values["mean"][0, 1])
    assert found.values["leaves"] == [] and found.values["by_leaf"].shape == (0, 2, 2)
    assert "no two objectives had gradients for the same parameters" in found.reading


def test_domains_are_objectives_too(encoded: Encoded) -> None:
    run = run_of(losses=(Supervised(by="domain"),))
    values = Conflict(run)(model_of(run, encoded), encoded.schema, batches_of(encoded)[:3]).values
    assert set(values["objectives"]) == {"home", "search", "mail"}


def test_cosine_of_gradients() -> None:
    a = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0]), "own": torch.tensor([9.0])}
    assert cosine(a, a) == pytest.approx(1) and cosine(a, {k: -v for k, v in a.items()}) == pytest.approx(-1)
    assert cosine(a, {"x": torch.tensor([0.0, 1.0]), "y": torch.tensor([0.0])}) == 0
    assert np.isnan(cosine(a, {"z": torch.ones(1)})) and np.isnan(cosine(a, {"x": torch.zeros(2)}))


# -------------------------------------------------------------------------------------------------------------- one step
@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize("metric", ["auc", "logloss"])
def test_one_step_is_that_of_a_moved_copy(encoded: Encoded, kind: str, metric: str) -> None:
    run = run_of(Views(width=4, std=0.3, lazy_rows=LAZY[kind]))
    model, batches, valid = model_of(run, encoded), batches_of(encoded)[:4], batches_of(encoded, "valid")
    before = copy.deepcopy(model.state_dict())
    probe = OneStep(run, "click", ("buy",), lr=0.5, weights=(0.5, 1.0), metric=metric)
    values = probe(model, encoded.schema, batches, valid).values
    sign = -1 if metric == "logloss" else 1
    for step, batch in enumerate(batches):
        found = []
        for weight in (0.0, 0.5, 1.0):
            moved = copy.deepcopy(model)
            click, buy = (whole(copy.deepcopy(model), batch, task) for task in ("click", "buy"))
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    p -= 0.5 * (click.get(name, 0 * p) + weight * buy.get(name, 0 * p))
            value = evaluate(predict(moved, valid, encoded.schema), encoded.schema, replicates=0)["click"][metric][
                "value"
            ]
            found.append(sign * value)
        assert values["score"][step] == pytest.approx(found[0], abs=1e-6)
        assert values["gain"][step] == pytest.approx([found[1] - found[0], found[2] - found[0]], abs=1e-6)
        assert np.abs(values["gain"][step]).max() > 1e-5, "a step that can be seen"
    assert all(torch.equal(before[name], part) for name, part in model.state_dict().items()), "the model is as it was"
    conflicting = Conflict(run)(model, encoded.schema, batches).values["cosine"][:, 0, 1]
    assert values["cosine"] == pytest.approx(conflicting)


def test_the_copy_returns_bit_for_bit(encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    run = run_of()

    class Kept(conflict.Probed):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            kept.append(self)

    monkeypatch.setattr(conflict, "Probed", Kept)
    model = model_of(run, encoded)
    OneStep(run, "click", ("buy",), lr=0.3)(
        model, encoded.schema, batches_of(encoded)[:3], batches_of(encoded, "valid")
    )
    (probed,) = kept
    assert all(torch.equal(probed.model.state_dict()[name], part) for name, part in model.state_dict().items())


def test_an_objective_in_a_domain_and_several_others(encoded: Encoded) -> None:
    run = run_of(losses=(Supervised(by="task_domain"),))
    model, valid = model_of(run, encoded), batches_of(encoded, "valid")
    probe = OneStep(run, "click@home", ("buy@home", "click@search"), lr=0.1, weights=(1.0,))
    values = probe(model, encoded.schema, batches_of(encoded)[:5], valid).values
    assert values["gain"].shape == (5, 1) and values["metric"] == "auc"
    domains = run_of(losses=(Supervised(by="domain"),))
    both = OneStep(domains, "home", ("search",), lr=0.1)(model, encoded.schema, batches_of(encoded)[:2], valid).values
    assert both["gain"].shape == (2, 5)


def test_batches_without_an_objective_are_left_out(encoded: Encoded) -> None:
    run, batches = run_of(), batches_of(encoded)[:3]
    none = replace(batches[1], observed={**batches[1].observed, "buy": torch.zeros(len(batches[1]), dtype=torch.bool)})
    probe = OneStep(run, "click", ("buy",), weights=(1.0,))
    values = probe(
        model_of(run, encoded), encoded.schema, [batches[0], none, batches[2]], batches_of(encoded, "valid")
    ).values
    assert values["left_out"] == 1 and len(values["cosine"]) == 2 and values["fit"] is None
    with pytest.raises(ValueError, match="No batch has a loss of `click` and of one of .'buy'."):
        probe(model_of(run, encoded), encoded.schema, [none], batches_of(encoded, "valid"))


def test_the_cubic_is_found_again() -> None:
    rng = np.random.default_rng(0)
    x, powers = rng.uniform(-1, 1, 30), np.array([2.0, -1.0, 0.5, 0.1])
    y = np.polyval(powers, x)
    assert cubic(x, np.stack([y, y], 1)) == pytest.approx(powers, abs=1e-8)
    assert cubic(x, np.stack([y + 1, y - 1], 1)) == pytest.approx(powers, abs=1e-8), "one fit through all weights"
    assert cubic(np.where(np.arange(30) > 2, np.nan, x), y[:, None]) is None


def test_mistakes(encoded: Encoded) -> None:
    run = run_of()
    for change, words in (
        ({"lr": 0.0}, "`lr` should be positive"),
        ({"weights": ()}, "`weights` should be positive"),
        ({"weights": (0.0, 1.0)}, "`weights` should be positive"),
        ({"auxiliary": ()}, "`auxiliary` should name objectives other than `click`"),
        ({"auxiliary": ("click",)}, "other than `click`"),
        ({"steps": 0}, "`steps` should be"),
    ):
        with pytest.raises(ValueError, match=words):
            OneStep(**{"run": run, "target": "click", "auxiliary": ("buy",), **change})  # type: ignore[arg-type]
    model, batches, valid = model_of(run, encoded), batches_of(encoded)[:2], batches_of(encoded, "valid")
    with pytest.raises(ValueError, match="No batch has a loss of `clik`"):
        OneStep(run, "clik", ("buy",))(model, encoded.schema, batches, valid)
    with pytest.raises(ValueError, match="`rmse` of `click` cannot be had on the validation rows"):
        OneStep(run, "click", ("buy",), metric="rmse")(model, encoded.schema, batches, valid)
    with pytest.raises(ValueError, match="at least one batch and two objectives"):
        Conflict(run)(model, encoded.schema, [])


def test_the_figures(encoded: Encoded, tmp_path: Path) -> None:
    run = run_of()
    model, batches, valid = model_of(run, encoded), batches_of(encoded)[:6], batches_of(encoded, "valid")
    found = Conflict(run)(model, encoded.schema, batches)
    drawn = conflict.plot(found, tmp_path / "conflict.png")
    assert (tmp_path / "conflict.png").stat().st_size > 5_000
    assert np.asarray(drawn.axes[0].images[0].get_array()) == pytest.approx(found.values["mean"])
    step = OneStep(run, "click", ("buy",), lr=0.3, weights=(0.5, 1.0))(model, encoded.schema, batches, valid)
    (axis,) = conflict.plot_step(step, tmp_path / "step.png").axes
    points = [line for line in axis.lines if line.get_label().startswith("weight")]
    assert [line.get_ydata() == pytest.approx(step.values["gain"][:, n]) for n, line in enumerate(points)] == [
        True,
        True,
    ]
    assert "helps in" in step.reading and "points" in step.reading
