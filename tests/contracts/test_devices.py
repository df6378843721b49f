"""Every recipe trains, looks and predicts on a device that is not the CPU: nothing is made or left on the wrong one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_members as members
import torch
from devicekit import DEVICE, Apart, Mixed, There
from test_label_blind import LOGS, base_run, known_in_validation, setting, updates, versions
from test_members import VECTORS, choices, model_of, some
from toylog import make_data, make_run

from unbraid import config, parallel, recipes, store
from unbraid.bundle import Bundle, build
from unbraid.class_head import write_vectors
from unbraid.config import ModelChoice, Run
from unbraid.data.encode import encode
from unbraid.data.features import attach
from unbraid.data.table import Encoded
from unbraid.heads import Heads
from unbraid.job import train
from unbraid.predictor import Predictor
from unbraid.preflight import bound_terms
from unbraid.train import Local, Training, Watcher, losses_of, predict
from unbraid.types import Task

LOG = {"log": LOGS[0]}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*copying from a non-meta parameter"
)  # torch knows `meta` without numbers
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("devices"))


class Dies(Watcher):
    """Ends the process's training after its checkpoint of step 2."""

    def trained(self, step: int, losses: Mapping[str, Any]) -> None:
        if step == 3:
            raise KeyboardInterrupt


def fit_on(
    name: str, device: str, folder: Path | None = None, **training: Any
) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:  # fmt: skip
    """Logits of some validation rows after three steps, and the weights; with ``folder``, interrupted and resumed."""
    run = recipes.get(name)
    data = Encoded(encode(run.data))
    short = replace(run.training, batch_size=64, steps=3, evaluate_every=0, patience=0, checkpoint_steps=2, **training)
    for watcher in (Watcher(),) if folder is None else (Dies(), Watcher()):
        model = build(run, data.schema).to(device)
        terms = bound_terms(run, data.schema, model)
        session = Local(
            data, terms, run.update, short, {}, run.seed, folder, True, device, watcher, augment=run.augment,
            average=run.average,
        )  # fmt: skip
        attach(data, model, augment=run.augment, device=device)
        rows = session.rows("valid")[:50]
        with contextlib.suppress(KeyboardInterrupt):
            session.fit(model, 3, rows=session.rows("train")[:512], stream=short.mix is None)
    assert session.steps == 3
    scores = session.score(model, rows=rows)
    return dict(scores.logits), {name: value.cpu() for name, value in model.state_dict().items()}


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch or a state refuse ``meta``, whose tensors have no numbers, let those of the other device pass."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda of, **rest: autocast("cpu" if of == DEVICE else of, **rest))
    put = store._put
    monkeypatch.setattr(
        store, "_put", lambda value, *rest: put(value.cpu() if isinstance(value, There) else value, *rest)
    )


def near(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], **tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for task, logits in found.items():
        np.testing.assert_allclose(logits, wanted[task], **tolerance)


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_a_recipe_on_another_device_is_that_on_the_cpu(
    name: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNBRAID_CACHE", cache)
    pretend(monkeypatch)
    with Apart() as device:
        logits, weights = fit_on(name, DEVICE, tmp_path)
    assert device.operations > 100
    plain, kept = fit_on(name, "cpu")
    near(logits, plain, rtol=1e-3, atol=1e-4)
    assert weights.keys() == kept.keys()


@on_cuda
@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_a_recipe_trains_on_cuda(name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBRAID_CACHE", cache)
    plain, _ = fit_on(name, "cpu")
    near(fit_on(name, "cuda")[0], plain, rtol=0.02, atol=0.02)
    if torch.cuda.is_bf16_supported(False):
        near(fit_on(name, "cuda", precision="bfloat16")[0], plain, rtol=0.1, atol=0.1)


# -------------------------------------------------------------------------------------------------------------- members
@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with encoded logs and vectors of the classes of `size`."""
    folder = tmp_path_factory.mktemp("shared")
    write_vectors(folder / "sizes.npz", ["S", "M", "L"], torch.eye(3, 8))
    return folder


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    tasks = (Task("click"), Task("buy"), Task("spend", kind="real"), Task("size", kind="multiclass"))
    data = make_data(tasks=tasks, features=VECTORS, cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data, tables={"log": members.LOG}))


@pytest.mark.parametrize("choice", choices(crossed=False))
def test_every_model_steps_and_predicts_on_another_device(choice: ModelChoice, encoded: Encoded) -> None:
    found = []
    for device, where in (("cpu", contextlib.nullcontext()), (DEVICE, Apart())):
        with where:
            run, model = model_of(choice, encoded)
            model = model.to(device)
            # gradients that are 0 but for rounding (biases below a normalisation) stay small with this eps
            update = replace(run.update, eps=1e-3).build(model, steps=2, weights={})
            terms, batch = bound_terms(run, encoded.schema, model), some(encoded).to(device)
            torch.manual_seed(0)
            for step in range(2):
                update(*losses_of(model, batch, terms, step))
            scores = predict(model, [some(encoded)], encoded.schema, hidden=True, device=device)
            found.append({**scores.logits, **{f"hidden {name}": x for name, x in scores.hidden.items()}})
    near(found[1], found[0], rtol=1e-3, atol=1e-4)


SCHEDULES: dict[str, dict[str, Any]] = {
    "one_stage": {"training": Training(batch_size=64, steps=6, evaluate_every=3, patience=2, checkpoint_steps=2)},
    "online": {"schedule": config.Online(first=2)},
    "fork_merge": {"schedule": config.ForkMerge(rounds=2, targets=("click",))},
    "d_train": {"schedule": config.DTrain(), "model": ModelChoice(heads=Heads(by="domain"))},
    "individual": {"schedule": config.Individual()},
    "post_train": {"schedule": config.PostTrain()},
}


def run_on(device: str, run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Logits of the test rows after a whole run, as the run measured them; its bundle predicts the same on the device."""
    pretend(monkeypatch)
    monkeypatch.setattr(parallel, "together", lambda kind: contextlib.nullcontext(device))
    train(run, out, tables=LOG, keep_scores=True, baseline=False)
    kept: dict[str, np.ndarray] = store.load(out / "scores.safetensors")["logits"]
    again = Predictor(Bundle.load(out), device=device).split_scores("test", LOG)
    near(again.logits, kept, rtol=1e-4, atol=1e-5)
    return kept


def assert_alike(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the other device is that on the CPU."""
    with Apart() as device:
        found = run_on(DEVICE, run, folder / "there", monkeypatch)
    assert device.operations > 100
    near(found, run_on("cpu", run, folder / "here", monkeypatch), rtol=1e-3, atol=1e-3)


def of_schedule(name: str) -> Run:
    training = {"training": Training(batch_size=64, steps=6, evaluate_every=3, checkpoint_steps=2)}
    return make_run(**{**training, **SCHEDULES[name]})


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_alike(of_schedule(name), tmp_path, monkeypatch)


@on_cuda
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_on_cuda(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run_on("cpu", of_schedule(name), tmp_path / "here", monkeypatch)
    near(run_on("cuda", of_schedule(name), tmp_path / "there", monkeypatch), plain, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("loss", versions(config.TermChoice))
def test_losses(loss: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(loss, "threshold"):  # so low that something is believed, and learnt
        loss = replace(loss, threshold=0.5)
    assert_alike(base_run(shared, **setting(loss, shared)), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("update", updates())
def test_updates(update: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(update, "aggregator"):
        pytest.importorskip("torchjd", reason="the extra `mtl` is not installed")
    assert_alike(base_run(shared, update=update), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("average", versions(config.AverageChoice))
def test_averages(average: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_alike(base_run(shared, average=average), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("selection", versions(config.SelectionChoice))
def test_selections(selection: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_alike(known_in_validation(shared, selection), tmp_path, monkeypatch)


def test_what_the_other_device_is() -> None:
    """It fails where a GPU would: operations on two devices, NumPy without a copy, an index from the CPU's side."""
    with Apart():
        x = torch.arange(4, device=DEVICE)
        assert (x + 1).tolist() == [1, 2, 3, 4] and (x * torch.tensor(2)).cpu().tolist() == [0, 2, 4, 6]
        for wrong in (lambda: x + torch.ones(4), lambda: torch.zeros(4)[x], lambda: torch.cat([x, torch.ones(4)])):
            with pytest.raises(Mixed):
                wrong()
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()
