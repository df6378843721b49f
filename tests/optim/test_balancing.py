"""What every weighting and every aggregator must do, whatever it is."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from balancing_kit import AGGREGATORS, EPS, LR, NAMES, PATTERN, WEIGHTINGS, Trunk, batches, build, losses_of, step
from torch import Tensor
from toylog import make_data, make_log, make_run

from unbraid import config, store
from unbraid.config import Aggregated, Weighted
from unbraid.job import train
from unbraid.optim.joint import Joint
from unbraid.optim.rlw import RLW
from unbraid.types import Task

TORCHJD = {"pcgrad", "imtl_g", "upgrad", "dualproj", "aligned_mtl", "fairgrad", "random", "config", "graddrop"}


def case(method: Any, name: str = "") -> Any:
    missing = method.kind in TORCHJD and not importlib.util.find_spec("torchjd")
    marks = [pytest.mark.skipif(missing, reason="the extra `mtl` is not installed")]
    return pytest.param(method, id=name or method.kind, marks=marks)


METHODS = [
    *(case(member()) for member in (*WEIGHTINGS, *AGGREGATORS)),
    case(config.GradNorm(constraint="renormalise", initial="step"), "gradnorm-renormalise"),
    case(config.DWA(factor="one"), "dwa-one"),
    case(config.NashMTL(every=3), "nash_mtl-every"),
    case(config.CAGrad(rescale=True), "cagrad-rescale"),
    case(config.GCS(weighted=True), "gcs-weighted"),
]


def run(model: Trunk, update: Any, start: int, stop: int) -> None:
    for at, ids in list(enumerate(batches(stop)))[start:]:
        step(update, model, ids, PATTERN[at % len(PATTERN)])


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(same(a, b) for a, b in zip(found, expected, strict=True))
    return torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


def own_state(update: Any) -> Any:
    return copy.deepcopy((getattr(update, "weighting", None) or update.rule).state_dict())


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_one_task_is_the_joint_update(method: Any, lazy: bool) -> None:
    mine, plain = Trunk(lazy), Trunk(lazy)
    update = build(method, mine, {"a": 0.7}, weight_decay=0.1, table_weight_decay=0.1, clip_norm=0.5)
    known = Joint(lr=LR, eps=EPS, weight_decay=0.1, table_weight_decay=0.1, clip_norm=0.5)
    joint = known.build(plain, steps=100, weights={"a": 0.7})
    for ids in batches(12):
        step(update, mine, ids, ("a",))
        output = plain(ids)
        joint(losses_of(output, ids, ("a",)), output)
    update.settle()
    joint.settle()
    for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_lazy_and_dense_tables_have_the_same_weights_and_first_step(method: Any) -> None:
    """RowAdam and Adam put eps elsewhere: with next to none, the rows read move alike in the first step."""
    lazy, dense = Trunk(lazy=True), Trunk(lazy=False)
    told = []
    for model in (lazy, dense):
        update = build(method, model, eps=1e-300)
        step(update, model, batches(1)[0])
        told.append(update.told())
    assert told[0] == pytest.approx(told[1], rel=1e-7)
    for (name, p), q in zip(lazy.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_an_absent_task_keeps_its_weight_and_everything_of_its_own(method: Any, lazy: bool) -> None:
    model = Trunk(lazy)
    update = build(method, model, weight_decay=0.1, table_weight_decay=0.1)
    run(model, update, 0, 9)
    before, state, told = copy.deepcopy(model.state_dict()), own_state(update), dict(update.told())
    optimiser = copy.deepcopy(update.state_dict()["dense"])
    step(update, model, batches(1, 7)[0], ("a", "b"))
    heads = [name for name in before if name.startswith("heads.c")]
    assert len(heads) == 2 and all(torch.equal(model.state_dict()[name], before[name]) for name in heads)
    assert all(same(update.state_dict()["dense"][name], optimiser[name]) for name in heads)
    after = own_state(update)
    for key, value in state.items():  # by objective, or one level below
        if key == "c":
            assert same(after[key], value)
        elif isinstance(value, Mapping) and "c" in value and not (method.kind == "nash_mtl"):
            assert same(after[key]["c"], value["c"]), key
    if "c" in told and method.kind != "gradnorm":  # a softmax over all, of which only the others' numbers moved
        assert update.told().get("c", told["c"]) == told["c"]


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_resumption_is_bit_equal(method: Any, lazy: bool, tmp_path: Path) -> None:
    """From a file, mid-epoch."""
    whole = Trunk(lazy)
    update = build(method, whole, weight_decay=0.1, clip_norm=1.0, learning_rate="cosine")
    run(whole, update, 0, 10)
    first = Trunk(lazy)
    update_1 = build(method, first, weight_decay=0.1, clip_norm=1.0, learning_rate="cosine")
    run(first, update_1, 0, 6)
    store.save(tmp_path / "state", {"model": first.state_dict(), "update": update_1.state_dict()})
    state = store.load(tmp_path / "state")
    second = Trunk(lazy)
    update_2 = build(method, second, weight_decay=0.1, clip_norm=1.0, learning_rate="cosine")
    second.load_state_dict(state["model"])
    update_2.load_state_dict(state["update"])
    assert dict(update_2.told()) == dict(update_1.told())
    run(second, update_2, 6, 10)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))
    assert same(update_2.state_dict(), update.state_dict()) and dict(update_2.told()) == dict(update.told())


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_tasks_changes_nothing(method: Any) -> None:
    models = []
    for names in (NAMES, NAMES[::-1]):
        model = Trunk()
        update = build(method, model)
        for ids in batches(8):
            step(update, model, ids, names)
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_is_a_factor_of_the_loss_and_0_is_absence(method: Any) -> None:
    models = []
    for weights, factor, names in (({"b": 0.4, "c": 0.0}, 1.0, NAMES), ({}, 0.4, ("a", "b"))):
        model = Trunk()
        update = build(method, model, weights)
        for ids in batches(8):
            output = model(ids)
            losses = losses_of(output, ids, names)
            if method.kind == "auto_lambda":
                pytest.skip("its validation losses carry the run's weights, too")
            update({**losses, "b": losses["b"] * factor}, output)
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_moves_nothing(method: Any) -> None:
    model = Trunk()
    update = build(method, model)
    run(model, update, 0, 3)
    before, state, own = (
        copy.deepcopy(model.state_dict()),
        copy.deepcopy(update.state_dict()["dense"]),
        own_state(update),
    )
    (ids,) = batches(1, 3)
    output = model(ids)
    losses = losses_of(output, ids)
    with pytest.raises(FloatingPointError, match="Loss of `b` is nan at step 3"):
        update({**losses, "b": losses["b"] * float("nan")}, output)
    assert same(model.state_dict(), before) and same(update.state_dict()["dense"], state)
    assert same(own_state(update), own)


@pytest.mark.parametrize("method", METHODS)
def test_no_losses_move_nothing(method: Any) -> None:
    model = Trunk()
    update = build(method, model, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    update({}, model(batches(1)[0]))
    assert same(model.state_dict(), before) and update.step == 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: Any) -> None:
    """All losses fall when each task is judged by the best that a shared trunk did for it."""
    model = Trunk()
    update = build(method, model)
    (ids,) = batches(1)
    first = {name: float(loss.detach()) for name, loss in losses_of(model(ids), ids).items()}
    for _ in range(80):
        step(update, model, ids)
    last = {name: float(loss.detach()) for name, loss in losses_of(model(ids), ids).items()}
    fell = {name for name in NAMES if last[name] < 0.9 * first[name]}
    assert "a" in fell and len(fell) >= (1 if method.kind in ("gcs", "ol_aux", "arml") else 2), (first, last)
    assert update.told() == {} or all(abs(v) < 1e6 for v in update.told().values())


def test_a_state_of_another_method_is_refused() -> None:
    model = Trunk()
    with pytest.raises(ValueError, match="should be that of weighting `rlw`. Found `uw`"):
        build(RLW(), model).load_state_dict(build(config.UW(), model).state_dict())
    with pytest.raises(ValueError, match="should be that of aggregator `gcs`. Found `cagrad`"):
        build(config.GCS(), model).load_state_dict(build(config.CAGrad(), model).state_dict())
    with pytest.raises(ValueError, match="should be that of update `aggregated`. Found `weighted`"):
        build(config.GCS(), model).load_state_dict(build(RLW(), model).state_dict())


# ------------------------------------------------------------------------------------------------------------ whole runs
@pytest.mark.parametrize("method", METHODS)
def test_run_files_hold_it(method: Any) -> None:
    update: Any = Weighted(weighting=method) if isinstance(method, WEIGHTINGS) else Aggregated(aggregator=method)
    run = make_run(update=update)
    assert config.from_dict(tomllib.loads(config.dumps(run))) == run
    slot = "weighting" if isinstance(method, WEIGHTINGS) else "aggregator"
    text = [f"update.kind={update.kind}", f"update.{slot}.kind={method.kind}"]
    assert getattr(config.override(make_run(), text).update, slot) == type(method)()


def test_a_misspelt_key_names_its_place() -> None:
    with pytest.raises(config.RunError, match="unknown key `update.weighting.temprature`. Did you mean `temperature`"):
        config.override(
            make_run(), ["update.kind=weighted", "update.weighting.kind=dwa", "update.weighting.temprature=1"]
        )
    with pytest.raises(config.RunError, match="`update.aggregator` has no kind `pcgard`. Did you mean `pcgrad`"):
        config.override(make_run(), ["update.kind=aggregated", "update.aggregator.kind=pcgard"])


WHOLE = [config.DWA(), config.AutoLambda(), config.GradNorm(lr=0.05), config.GCS()]


@pytest.mark.parametrize("method", WHOLE, ids=lambda method: method.kind)
def test_a_run_logs_and_reports_its_weights_and_resumes(method: Any, tmp_path: Path) -> None:
    update: Any = Weighted(weighting=method) if isinstance(method, WEIGHTINGS) else Aggregated(aggregator=method)
    tasks = (Task("click"), Task("buy", role="auxiliary"))
    plain = make_run(update=update, data=make_data(tasks=tasks, cache=str(tmp_path / "cache")))
    training = dataclasses.replace(plain.training, steps=12, evaluate_every=4, batch_size=64, checkpoint_steps=5)
    run = dataclasses.replace(plain, training=training)
    tables = {"log": make_log()}
    whole = train(run, tmp_path / "whole", tables=tables, baseline=False)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(set(line["update"]) == {"click", "buy"} for line in lines)
    assert whole.metrics["weights"] == lines[-1]["update"]
    assert "Weights of the update" in (tmp_path / "whole" / "report.md").read_text()

    from unbraid.train import Watcher

    class Dies(Watcher):
        def evaluated(self, step: int, *rest: Any) -> None:
            if step == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "parts", tables=tables, baseline=False, watcher=Dies())
    parts = train(run, tmp_path / "parts", tables=tables, baseline=False, resume=True)
    for p, q in zip(whole.bundle.model.parameters(), parts.bundle.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert parts.metrics["weights"] == whole.metrics["weights"]
