"""Nobody reads a label that is hidden: not a loss, an update, an average, a selection, a schedule, a calibrator.

Two logs differ in the labels of one domain alone, in all splits, and these are withheld.  On top, what a batch holds in the place
of an unknown label, which is anything, is other noise for each.  Then all that a run makes must be equal to the last bit:
weights, what was seen at every look, the chosen step, learned loss weights, the schedule's record, predictions.  The metrics of
the target's test rows must not be, or nothing was different.  What is called an oracle must see a difference, too.  Members come
from the unions, so that a new one is tested here without a line of its own; one that `setting` cannot build fails by its name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from picturekit import array, as_bytes
from torch import Tensor
from toylog import make_data, make_log

from unbraid import config, store
from unbraid.augmentations.tabular import Change, Tabular
from unbraid.bundle import Bundle
from unbraid.calibrate import calibrate
from unbraid.calibration.maps import Affine, Calibration
from unbraid.calibration.oracle import Oracle as OracleCalibrator
from unbraid.class_head import ClassFile, write_vectors
from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Split
from unbraid.data.encode import encode
from unbraid.data.mix import Mix
from unbraid.data.table import Encoded
from unbraid.heads import Heads
from unbraid.job import Result, baseline_scores, train
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.schedules.one_stage import OneStage
from unbraid.selection.rows import OnTarget
from unbraid.slots import Judged, Session
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Batch, Feature, Losses, Output, Schema, Scores, Task

TASKS = (
    Task("click"), Task("buy", given="click"), Task("spend", kind="real", role="auxiliary"), Task("size", kind="multiclass"),
)  # fmt: skip
TARGET = "mail"
STEPS, LOOK = 6, 3
Noisy = Callable[[int], None]  # see the fixture
Logs = tuple[pl.DataFrame, pl.DataFrame]


def members(choice: Any) -> list[Any]:
    """The classes of a slot's union."""
    return list(typing.get_args(typing.get_args(choice)[0]))


def versions(choice: Any, *keys: str) -> list[Any]:
    """Every member of a slot as it is and, slow unless it says which rows are read, with each other word for a key of it."""
    found = []
    for member in members(choice):
        found.append(pytest.param(member(), id=member().kind))
        hints = typing.get_type_hints(member)
        for part in dataclasses.fields(member):
            words = typing.get_args(hints[part.name]) if typing.get_origin(hints[part.name]) is typing.Literal else ()
            for word in words if part.name in keys else ():
                if word not in (part.default, "error"):  # a schedule that refuses rows of the target
                    marks = () if part.name in ("of", "rule") else pytest.mark.slow
                    found.append(pytest.param(member(**{part.name: word}), id=f"{member().kind}-{word}", marks=marks))
    return found


# ------------------------------------------------------------------------------------------------------------- the two logs
def make_logs() -> Logs:
    """A log, and one with other labels of every kind on the site `mail`, in all splits."""
    log, rng = make_log(), np.random.default_rng(11)
    n = len(log)
    log = log.with_columns(
        site=pl.Series(rng.choice(["home", "search", TARGET], n, p=[0.4, 0.3, 0.3])),
        part=pl.Series(rng.choice(["train", "valid", "test"], n, p=[0.5, 0.3, 0.2])),
        buy=pl.when(pl.col("click") == 1).then("buy").otherwise(0),
    )
    noise = {
        "click": pl.Series(rng.integers(0, 2, n)),
        "buy": pl.Series(rng.integers(0, 2, n)),
        "spend": pl.Series(rng.normal(3, 2, n)),
        "size": pl.Series(rng.choice(["S", "M", "L"], n)),
    }
    noise["buy"] = noise["buy"] * noise["click"]
    hidden = pl.col("site") == TARGET
    return log, log.with_columns(pl.when(hidden).then(new).otherwise(pl.col(k)).alias(k) for k, new in noise.items())


LOGS = make_logs()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with encoded logs and vectors of the classes of `size`."""
    folder = tmp_path_factory.mktemp("blind")
    names = ["S", "M", "L"]
    write_vectors(folder / "sizes.npz", names, torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
    return folder


def noise_of(schema: Schema, task: Task, rows: int, seed: int) -> Tensor:
    """(rows,) labels that nobody should read."""
    rng = np.random.default_rng([seed, len(task.name)])
    if task.kind == "real":
        return torch.from_numpy(rng.normal(size=rows).astype(np.float32))
    drawn = torch.from_numpy(rng.integers(0, max(schema.outputs(task), 2), rows))
    return drawn if task.kind == "multiclass" else drawn.float()


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> Noisy:
    """Where a label is unknown, every table from now on gives noise of this seed."""
    plain = Encoded.labels

    def use(seed: int) -> None:
        def labels(self: Encoded, rows: np.ndarray) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            found, observed = plain(self, rows)
            for task in self.schema.tasks:
                other = noise_of(self.schema, task, self.rows, seed)[torch.from_numpy(np.asarray(rows))]
                found[task.name] = torch.where(observed[task.name], found[task.name], other)
            return found, observed

        monkeypatch.setattr(Encoded, "labels", labels)

    return use


def data_of(folder: Path, **changes: Any) -> Data:
    data = make_data(
        tasks=TASKS, split=Split(kind="column", column="part"), withhold=f"site = '{TARGET}'", cache=str(folder / "cache"),
        request="shop",
    )  # fmt: skip
    return replace(data, **changes)


def base_run(folder: Path, **changes: Any) -> Run:
    """A tiny run with rows of the target in every batch."""
    run = Run(
        data=data_of(folder),
        name="blind",
        model=ModelChoice(tower=SharedBottom(bottom=(8,), tower=(6,))),
        update=Joint(lr=0.02),
        training=Training(
            batch_size=32,
            steps=STEPS,
            evaluate_every=LOOK,
            metric="logloss",
            checkpoint_seconds=0,
            mix=Mix(unlabelled=24),
        ),
    )
    return replace(run, **changes)


def setting(loss: Any, folder: Path) -> dict[str, Any]:
    """What else a run with this loss needs: views, extra heads, second heads, vectors of classes, by what it declares."""
    schema = Schema(
        (), TASKS, domains=("(unknown)", "(missing)", "home", TARGET, "search"), classes={"size": ("L", "M", "S")}
    )
    needs = loss.bind(schema).needs
    model: dict[str, Any] = {"tower": SharedBottom(bottom=(8,), tower=(6,))}
    heads = [head for head in members(config.ExtraHeadChoice) if head.loss == loss.kind]
    model["extra_heads"] = tuple(head(**({"of": loss.of} if hasattr(loss, "of") else {})) for head in heads)
    if any(name.startswith("history.") for name in needs):
        able = [
            m for m in members(config.HistoryChoice) if "auxiliary" in {part.name for part in dataclasses.fields(m)}
        ]
        model["history"] = able[0](auxiliary=(4,))
    if any(name.startswith("heads.vectors.") for name in needs):
        model["classes"] = {"size": ClassFile(file=str(folder / "sizes.npz"))}
    if any(name.startswith("heads.two.") for name in needs):
        model["heads"] = Heads(two=True)
    found: dict[str, Any] = {"model": ModelChoice(**model), "losses": (Supervised(), loss)}
    if (views := getattr(loss, "views", "none")) != "none":
        found["augment"] = Tabular(of=views, weak=Change(noise=0.05), strong=Change(features=0.3, noise=0.2))
    return found


# --------------------------------------------------------------------------------------------------------------- what it made
class Made(NamedTuple):
    """What a run left: weights and predictions are arrays, the rest is plain."""

    result: Result
    weights: dict[str, Tensor]
    looks: str
    scores: Any
    record: Any


def make(run: Run, log: int, out: Path, noisy: Noisy, logs: Logs = LOGS) -> Made:
    """Train on one of the logs."""
    noisy(log)
    result = train(run, out, tables={"log": logs[log]}, keep_scores=True, baseline=False)
    seen = {name: value for name, value in result.metrics.items() if name not in ("test", "seconds", "data")}
    scores = store.load(out / "scores.safetensors")
    log_file = out / "log.jsonl"
    looks = log_file.read_text() if log_file.exists() else ""  # some schedules look in their own way
    return Made(result, dict(result.bundle.model.state_dict()), looks, scores, _untimed(seen))


def _untimed(value: Any) -> Any:
    """Without what the clock says."""
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if "second" not in k}
    return [_untimed(v) for v in value] if isinstance(value, list | tuple) else value


def differences(one: Made, two: Made) -> list[str]:
    """Names of what differs between two runs, other than what the test split's labels measure."""
    parts = {name: (getattr(one, name), getattr(two, name)) for name in ("weights", "looks", "record")}
    parts["predictions"] = (one.scores["logits"], two.scores["logits"])
    return [name for name, (before, after) in parts.items() if not same(before, after)]


def same(one: Any, two: Any) -> bool:
    """Are they equal to the last bit?  A NaN equals itself."""
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(v, two[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, Tensor | np.ndarray):
        return np.array_equal(np.asarray(one), np.asarray(two), equal_nan=np.asarray(one).dtype.kind == "f")
    return type(one) is type(two) and repr(one) == repr(two)


def both(run: Run, folder: Path, noisy: Noisy, logs: Logs = LOGS) -> tuple[Made, Made]:
    """The run on both logs, of which the target's test rows have other labels."""
    one, two = (make(run, log, folder / f"run{log}", noisy, logs) for log in range(2))
    target = one.scores["domain"] == one.result.bundle.fitted.schema.domains.index(TARGET)
    for task in ("click", "size", "spend"):
        before, after = (made.scores["labels"][task] for made in (one, two))
        assert (before[target] != after[target]).any() and one.scores["observed"][task][target].any(), (
            "the test split measures"
        )
        assert np.array_equal(before[~target], after[~target])
    assert one.result.metrics["test"] != two.result.metrics["test"]
    assert all(bool(torch.isfinite(value).all()) for value in one.weights.values() if value.is_floating_point())
    return one, two


def assert_blind(run: Run, folder: Path, noisy: Noisy, logs: Logs = LOGS) -> None:
    found = differences(*both(run, folder, noisy, logs))
    assert not found, f"hidden labels were read: they change {found}"


# ------------------------------------------------------------------------------------------------------------------- members
@pytest.mark.parametrize("loss", versions(config.TermChoice, "of", "rule", "by", "within", "form"))
def test_losses(loss: Any, shared: Path, tmp_path: Path, noisy: Noisy) -> None:
    if hasattr(loss, "threshold"):  # so low that something is believed, and learnt
        loss = replace(loss, threshold=0.5)
    one, two = both(base_run(shared, **setting(loss, shared)), tmp_path, noisy)
    assert not (found := differences(one, two)), f"hidden labels were read: they change {found}"
    bound = loss.bind(one.result.bundle.fitted.schema)
    shown = {name for line in one.looks.splitlines() for name in json.loads(line)["losses"]}
    assert set(getattr(bound, "objectives", ())) <= shown, "it should have had a value"


def updates() -> list[Any]:
    """Every update with every weighting and aggregator; of those that count some objectives alone, with one that counts."""
    found = []
    for member in members(config.UpdateChoice):
        parts = {part.name for part in dataclasses.fields(member)}
        if not parts & {"weighting", "aggregator"}:
            found.append(pytest.param(member(), id=member().kind))
        for name, choice in (("weighting", config.WeightingChoice), ("aggregator", config.AggregatorChoice)):
            for inner in members(choice) if name in parts else ():
                targets = (
                    {"targets": ("click",)} if "targets" in {part.name for part in dataclasses.fields(inner)} else {}
                )
                found.append(pytest.param(member(**{name: inner(**targets)}), id=inner().kind, marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize("update", updates())
def test_updates(update: Any, shared: Path, tmp_path: Path, noisy: Noisy) -> None:
    """Beside a loss of the target's rows; some look at validation batches, too."""
    if hasattr(update, "aggregator"):
        pytest.importorskip("torchjd", reason="the extra `mtl` is not installed")
    assert_blind(base_run(shared, update=update, losses=(Supervised(), config.MCC(weight=0.5))), tmp_path, noisy)


@pytest.mark.parametrize("average", versions(config.AverageChoice))
def test_averages(average: Any, shared: Path, tmp_path: Path, noisy: Noisy) -> None:
    assert_blind(base_run(shared, average=average, losses=(Supervised(), config.MCC(weight=0.5))), tmp_path, noisy)


SCHEDULES = [
    *versions(config.ScheduleChoice, "by", "unknown", "branches", "search", "sampling", "keep"),
    pytest.param(config.DTrain(solver="lbfgs", l2=0.1), id="d_train-lbfgs", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: Any, shared: Path, tmp_path: Path, noisy: Noisy) -> None:
    """A domain without labels among those that they fork, tune or stream."""
    run = base_run(shared)
    heads = Heads(by="domain", unknown="mean") if getattr(schedule, "keeps_root", False) else Heads()
    run = replace(run, model=replace(run.model, heads=heads), training=replace(run.training, mix=None, steps=12))
    assert_blind(replace(run, schedule=schedule), tmp_path, noisy)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="the extra `images` is not installed")
@pytest.mark.parametrize("augment", versions(config.AugmentChoice))
def test_views_of_rows_with_pictures(augment: Any, shared: Path, tmp_path: Path, noisy: Noisy) -> None:
    pictures = pl.Series("picture", [as_bytes(array(i, i % 3, (12, 12))) for i in range(len(LOGS[0]))])
    run = base_run(shared, augment=augment, losses=(Supervised(), config.FixMatch(threshold=0.3)))
    data = replace(run.data, features=(*run.data.features, Feature("picture", kind="image")))
    model = replace(run.model, images=config.SmallConv(channels=(8,), width=6, size=8))
    logs = (LOGS[0].with_columns(pictures), LOGS[1].with_columns(pictures))
    assert_blind(replace(run, data=data, model=model), tmp_path, noisy, logs)


def test_the_baseline(shared: Path, noisy: Noisy) -> None:
    run, found = base_run(shared), []
    for log in range(2):
        noisy(log)
        encoded = Encoded(encode(run.data, tables={"log": LOGS[log]}))
        rows = encoded.split("test")
        found.append(baseline_scores(run, encoded, Scores({}, {}, {}, {}, None, None, rows, rows)).logits)
    assert same(*found)


# ---------------------------------------------------------------------------------------------------------------- selections
def known_in_validation(folder: Path, selection: Any) -> Run:
    """The target's labels are withheld from training alone, and validation rows know them; no history does."""
    data = data_of(folder, withhold=f"site = '{TARGET}' and part = 'train'", histories=(), events=(), fields=())
    selection = replace(selection, domains=(TARGET,))
    return base_run(folder, data=data, selection=selection, losses=(Supervised(), config.MCC(weight=0.5)))


def looks(made: Made) -> list[Any]:
    return [json.loads(line)["selection"] for line in made.looks.splitlines()]


@pytest.mark.parametrize("selection", versions(config.SelectionChoice, "loss"))
def test_selections(selection: Any, shared: Path, tmp_path: Path, noisy: Noisy) -> None:
    """Even where the target's validation labels are in the table, none is read but by an oracle, which sees nothing but them."""
    one, two = both(known_in_validation(shared, selection), tmp_path, noisy)
    assert len(looks(one)) == STEPS // LOOK and all(each["value"] is not None for each in looks(one))
    assert one.record["selection"]["oracle"] is selection.oracle
    if selection.oracle:
        assert [each["value"] for each in looks(one)] != [each["value"] for each in looks(two)]
        return
    assert same(looks(one), looks(two)) and same(one.record, two.record) and same(one.weights, two.weights)
    assert_blind(
        base_run(shared, selection=selection, losses=(Supervised(), config.MCC(weight=0.5))), tmp_path / "h", noisy
    )


# --------------------------------------------------------------------------------------------------------------- calibrators
@pytest.fixture(scope="module")
def bundle(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return train(base_run(shared), tmp_path_factory.mktemp("calibrated") / "run", tables={"log": LOGS[0]}).bundle


def calibrated(bundle: Bundle, method: Any, log: int, noisy: Noisy) -> dict[str, Any]:
    """Task -> the state of what was fitted to rows of the target, and its probabilities of them."""
    noisy(log)
    found = {}
    for train_features in (False, True) if method.needs_target else (False,):
        domain = TARGET if method.needs_target else ""
        fitted, changes, _ = calibrate(
            bundle, method, domain=domain, train_features=train_features, tables={"log": LOGS[log]}
        )
        assert fitted.calibrators is not None and len(changes) >= 1
        for kept, change in zip(fitted.calibrators.kept, changes, strict=True):
            found[f"{kept.task}-{train_features}"] = (
                kept.calibration.state_dict(), change.numbers, change.warnings, change.before, change.after
            )  # fmt: skip
    return found


@pytest.mark.parametrize(
    "method", [*versions(config.CalibratorChoice, "solver"), pytest.param(OracleCalibrator(), id="oracle")]
)
def test_calibrators(method: Any, bundle: Bundle, noisy: Noisy) -> None:
    """Labels of the target's test rows are in the table, and only the oracle reads them."""
    one, two = (calibrated(bundle, method, log, noisy) for log in range(2))
    assert same(one, two) is (method.kind != "oracle")


# ------------------------------------------------------------------------------------------------------ what peeks is caught
def hidden_mean(labels: Any, observed: Any, task: str) -> Any:
    """The mean label of rows whose label is not known."""
    return labels[task][~observed[task]].float().mean()


@dataclass(frozen=True)
class PeekingLoss:
    """Pulls logits towards labels that are hidden."""

    kind: str = "peeking"
    trains: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    objectives: ClassVar[tuple[str, ...]] = ("peeking",)

    def bind(self, schema: Schema) -> PeekingLoss:
        return self

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        return {"peeking": (output.logits["click"].mean() - hidden_mean(batch.labels, batch.observed, "click")) ** 2}


@dataclass(frozen=True)
class PeekingSelection(OnTarget):
    """The mean of labels that are hidden, whatever the model."""

    kind: str = "peeking"

    def __call__(self, scores: Scores, schema: Schema) -> Judged:
        return Judged(float(np.mean(scores.labels["click"][self.target(schema.task("click"), scores)])))


@dataclass(frozen=True)
class PeekingSchedule(OneStage):
    """Ends with a record of the mean label of hidden rows."""

    def __call__(self, session: Session, model: Any, steps: int) -> Any:
        batch = session.batch(session.rows("valid"))
        session.keep({"mean": float(hidden_mean(batch.labels, batch.observed, "click"))})
        return super().__call__(session, model, steps)


@dataclass(frozen=True)
class PeekingCalibrator:
    """A slope that is the mean label of the target."""

    kind: str = "peeking"
    keeps_argmax: ClassVar[bool] = True
    needs_target: ClassVar[bool] = True

    def fit(
        self, task: Task, held_out: Scores, target: Scores | None = None, train: Scores | None = None
    ) -> Calibration:
        assert target is not None
        return Calibration(Affine(1 + float(np.mean(target.labels[task.name]))))


def test_a_peeking_loss_is_caught(shared: Path, tmp_path: Path, noisy: Noisy) -> None:
    found = differences(*both(base_run(shared, losses=(Supervised(), PeekingLoss())), tmp_path, noisy))
    assert {"weights", "looks", "predictions"} <= set(found)


def test_a_peeking_selection_is_caught(shared: Path, tmp_path: Path, noisy: Noisy) -> None:
    for name, run in (
        ("hidden", base_run(shared, selection=PeekingSelection())),
        ("known", known_in_validation(shared, PeekingSelection())),
    ):
        one, two = both(run, tmp_path / name, noisy)
        assert not same(looks(one), looks(two)) and "record" in differences(one, two)


def test_a_peeking_schedule_is_caught(shared: Path, tmp_path: Path, noisy: Noisy) -> None:
    assert differences(*both(base_run(shared, schedule=PeekingSchedule()), tmp_path, noisy)) == ["record"]


def test_a_peeking_calibrator_is_caught(bundle: Bundle, noisy: Noisy) -> None:
    one, two = (calibrated(bundle, PeekingCalibrator(), log, noisy) for log in range(2))
    assert not same(one, two)


def test_labels_that_are_not_withheld_are_read(shared: Path, tmp_path: Path, noisy: Noisy) -> None:
    run = base_run(shared, data=data_of(shared, withhold=""))
    found = differences(*both(replace(run, training=replace(run.training, mix=None)), tmp_path, noisy))
    assert {"weights", "looks", "predictions"} <= set(found)
