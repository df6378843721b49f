"""What looks at a trained model works where the model is: analyses, checks, selections, calibrators, uncertainty, export.

Each says the same on the CPU and on the simulated device of `devicekit`, whose operations fail on tensors of two devices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devicekit import DEVICE, Apart, There
from test_devices import pretend
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.analysis.collapse import Collapse
from unbraid.analysis.conflict import Conflict, OneStep
from unbraid.analysis.correlation import Correlation
from unbraid.analysis.discriminability import Discriminability
from unbraid.analysis.dominance import Dominance
from unbraid.analysis.entanglement import Entanglement
from unbraid.analysis.feedback import Partition
from unbraid.analysis.gradients import GradientProbe
from unbraid.analysis.retrieval import Retrieval
from unbraid.analysis.worst_head import WorstHead
from unbraid.bundle import Bundle, build
from unbraid.calibrate import calibrate, method_of
from unbraid.config import ModelChoice, Run
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.diagnosis.diagnose import CHECKS, THOROUGH, diagnose
from unbraid.encoders.table import Views
from unbraid.evaluate import evaluate
from unbraid.export import export
from unbraid.job import train
from unbraid.mc_dropout import McDropout
from unbraid.predictor import Predictor, with_uncertainty
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training, predict
from unbraid.types import Batch, Task
from unbraid.uncertainty.ensemble import Ensemble
from unbraid.uncertainty.explore import Thompson

pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
LOG = {"log": make_log()}
TASKS = (Task("click"), Task("buy"), Task("spend", kind="real"), Task("size", kind="multiclass"))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return Encoded(encode(make_data(tasks=TASKS, cache=str(tmp_path_factory.mktemp("cache"))), tables=LOG))


def run_of(**model: Any) -> Run:
    tower = SharedBottom(bottom=(16,), tower=(8,), dropout=0.2)
    short = Training(batch_size=64, steps=3, evaluate_every=0, patience=0, checkpoint_seconds=0)
    choice = ModelChoice(**{"tower": tower, "tables": Views(width=4), "history": config.DARE(), **model})
    return make_run(data=make_data(tasks=TASKS), model=choice, training=short)


def single() -> Run:
    """A model that has tables of each task."""
    return run_of(tower=config.SingleTask(), tables=Views(kind="separate", width=4), history=config.Mean())


def batches(encoded: Encoded, device: str, split: str = "train", most: int = 256) -> list[Batch]:
    """Rows of a split, where the model is: analyses take batches from either side."""
    return [batch.to(device) for batch in encoded.in_order(encoded.split(split)[:most], 128)]


Look = Callable[[Encoded, str], Any]


def of_model(analysis: Any, run: Run | None = None) -> Look:
    """An analysis of one model and batches; batches lie on the CPU first, then beside the model."""

    def look(encoded: Encoded, device: str) -> Any:
        chosen = run or run_of()
        model = build(chosen, encoded.schema).to(device)
        made = analysis(chosen) if callable(analysis) and not hasattr(analysis, "__dataclass_fields__") else analysis
        found = []
        for place in dict.fromkeys(("cpu", device)):
            torch.manual_seed(0)  # of dropout
            found.append(made(model, encoded.schema, batches(encoded, place)).values)
        return [found[0], found[-1]]

    return look


def one_step(encoded: Encoded, device: str) -> Any:
    run = run_of()
    probe = OneStep(run, "click", ("buy",), weights=(0.5, 1.0), steps=2)
    model = build(run, encoded.schema).to(device)
    return probe(model, encoded.schema, batches(encoded, "cpu"), batches(encoded, device, "valid")).values


def correlation(encoded: Encoded, device: str) -> Any:
    counts = Correlation("click", "seen", "item", feature="item", least=1, behaviours=3, newest=3)
    truth = counts.count(encoded.schema, batches(encoded, device))
    model = build(run_of(), encoded.schema).to(device)
    retrieval = Retrieval(truth, rows=1, support=1, unsupported=6, at=4, replicates=5)
    found = counts(model, encoded.schema, batches(encoded, device))
    return [found.values, retrieval(model, encoded.schema, batches(encoded, device, "valid")).values]


def entanglement(encoded: Encoded, device: str) -> Any:
    probe = Entanglement("click", "buy", user="shop", item="item", frequent=0.1, replicates=5)
    frequent = probe.count(encoded.schema, batches(encoded, device))
    models = {"alone": build(single(), encoded.schema), "shared": build(replace(run_of(), seed=1), encoded.schema)}
    there = {name: model.to(device) for name, model in models.items()}
    return probe(frequent, there, encoded.schema, batches(encoded, device, "valid"), against="alone").values


def feedback(encoded: Encoded, device: str) -> Any:
    probe = Partition("click", "buy", by="item", replicates=5)
    found = probe.count(encoded.schema, batches(encoded, device))
    return [found.groups, found.positives, found.ratio]


def scores(encoded: Encoded, device: str) -> Any:
    """Predictions of rows of both sides, with dropout on and off, and what is measured of them."""
    model = build(run_of(), encoded.schema).to(device)
    plain = predict(model, batches(encoded, device, "valid"), encoded.schema, hidden=True)
    again = predict(model, batches(encoded, "cpu", "valid"), encoded.schema, hidden=True)
    assert all(np.array_equal(plain.logits[task], again.logits[task]) for task in plain.logits)
    noisy = predict(McDropout(model, encoded.schema, 3), batches(encoded, device, "valid"), encoded.schema)
    return [plain.logits, plain.hidden, evaluate(plain, encoded.schema, replicates=5), noisy.logits]


LOOKS: dict[str, Look] = {
    "collapse": of_model(Collapse(seeds=(0,)), run_of(interaction=config.Cross())),
    "conflict": of_model(lambda run: Conflict(run, steps=2)),
    "correlation and retrieval": correlation,
    "discriminability": of_model(Discriminability("click", clusters=(2, 5), seeds=(0,))),
    "dominance": of_model(lambda run: Dominance(run, steps=1, every=1)),
    "entanglement": entanglement,
    "feedback": feedback,
    "gradients": of_model(lambda run: GradientProbe(run, "item", steps=2)),
    "one step": one_step,
    "scores": scores,
    "worst head": of_model(WorstHead("buy", hidden=(8,), steps=3)),
}


def alike(found: Any, wanted: Any, place: str = "", rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """Values of nested findings, apart from rounding."""
    if isinstance(wanted, Mapping):
        assert found.keys() == wanted.keys(), place
        for key in wanted:
            alike(found[key], wanted[key], f"{place}/{key}", rtol, atol)
    elif isinstance(wanted, list | tuple) and any(not isinstance(each, int | float) for each in wanted):
        assert len(found) == len(wanted), place
        for at, (one, other) in enumerate(zip(found, wanted, strict=True)):
            alike(one, other, f"{place}/{at}", rtol, atol)
    elif isinstance(wanted, float | np.floating | list | tuple) or (
        isinstance(wanted, np.ndarray) and wanted.dtype.kind == "f"
    ):
        np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol, err_msg=place)
    elif isinstance(wanted, torch.Tensor):
        assert not isinstance(found, There), f"{place}: a finding lies on the CPU"
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
    elif isinstance(wanted, np.ndarray):
        assert np.array_equal(found, wanted), place
    elif not isinstance(wanted, str):  # sentences have rounded numbers in them
        assert found == wanted, place


@pytest.mark.parametrize("name", list(LOOKS))
def test_analyses(name: str, encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with Apart() as device:
        found = LOOKS[name](encoded, DEVICE)
    assert device.operations > 20 or name == "feedback"
    alike(found, LOOKS[name](encoded, "cpu"))


@on_cuda
@pytest.mark.parametrize("name", list(LOOKS))
def test_analyses_on_cuda(name: str, encoded: Encoded) -> None:
    alike(LOOKS[name](encoded, "cuda"), LOOKS[name](encoded, "cpu"), rtol=0.05, atol=0.02)


# ------------------------------------------------------------------------------------------------------------ whole bundles
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Two bundles with the uncertainty of their last layer.  Tests take copies: what predicts moves the model."""
    found = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("trained") / "b"
        train(replace(run_of(), seed=seed), folder, tables=LOG, baseline=False)
        found.append(with_uncertainty(Bundle.load(folder), tables=LOG))
    return found


def moved(bundle: Bundle, device: str) -> Bundle:
    """A copy whose model is elsewhere."""
    return replace(bundle, model=copy.deepcopy(bundle.model).to(device))


def on(device: str, work: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What work gives where a device exists."""
    if device != DEVICE:
        return work(device)
    with monkeypatch.context() as patch, Apart() as there:
        pretend(patch)
        found = work(device)
    assert there.operations > 20
    return found


def columns(table: Any) -> dict[str, list[Any]]:
    return {name: table[name].to_list() for name in table.columns}


def test_predictions_with_uncertainty_of_bundles(trained: list[Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: str) -> Any:
        one, two = (Predictor(moved(each, "cpu"), device=device) for each in trained)
        rows = LOG["log"][:50]
        sure = one.predict(rows, LOG, uncertainty=True)
        explored = one.predict(rows, LOG, explore=Thompson(seed=0))
        noisy = Predictor(moved(trained[0], "cpu"), device=device, mc_dropout=3).predict(rows, LOG)
        return [columns(t) for t in (sure, explored, noisy, Ensemble([one, two]).predict(rows, LOG, uncertainty=True))]

    alike(on(DEVICE, work, monkeypatch), work("cpu"))


def test_uncertainty_is_fitted_where_the_model_is(trained: list[Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: str) -> Any:
        return with_uncertainty(moved(trained[0], device), tables=LOG).uncertainty.state_dict()["tasks"]  # type: ignore[union-attr]

    alike(on(DEVICE, work, monkeypatch), work("cpu"), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["temperature", "transcal"])
def test_calibration_of_a_model_elsewhere(kind: str, trained: list[Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """All calibrators read NumPy's numbers; one reads logits, the other hidden vectors, too."""

    def work(device: str) -> Any:
        found, changes, _ = calibrate(moved(trained[0], device), method_of(kind), tasks=("click",), tables=LOG)
        Predictor(found, device=device).predict(LOG["log"][:20], LOG)
        return [[change.before, change.after] for change in changes]

    alike(on(DEVICE, work, monkeypatch), work("cpu"), rtol=1e-2, atol=1e-3)


@on_cuda
def test_a_model_on_cuda_is_exported(trained: list[Bundle], tmp_path: Path) -> None:
    """A graph is traced on the CPU, to which the model is brought."""
    bundle = replace(moved(trained[0], "cuda"), uncertainty=None)
    assert export(bundle, tmp_path / "out", to="torch", tables=LOG).difference < 1e-5


CHECKED = [
    pytest.param(check, id=check.name, marks=[pytest.mark.slow] if check.name == "interference" else [])  # trains most
    for check in (*CHECKS, replace(THOROUGH[0], steps=2))  # type: ignore[type-var]
]


@pytest.mark.parametrize("check", CHECKED)
def test_checks(check: Any, trained: list[Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    def work(device: str) -> Any:
        report = diagnose(moved(trained[0], device), rows=200, steps=2, checks=(check,), tables=LOG)
        assert not report.failed, report.failed
        return {f"{d.name} {d.where}": d.value for d in report.diagnoses}, list(report.skipped)

    alike(on(DEVICE, work, monkeypatch), work("cpu"), rtol=0.02, atol=0.02)
