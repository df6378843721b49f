"""What every calibrator must do.  A new member of the union is tested here without a line of its own."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from scipy.special import expit, softmax

from unbraid import config, store
from unbraid.calibration.maps import Calibration, Curves
from unbraid.calibration.oracle import Oracle, Vanilla
from unbraid.types import Scores, Task

MEMBERS = list(typing.get_args(typing.get_args(config.CalibratorChoice)[0]))
TASKS = {"multiclass": Task("t", kind="multiclass"), "binary": Task("t")}


def rows(kind: str, seed: int, shift: float = 0.0, n: int = 400) -> Scores:
    """Labels follow the logits, scaled; hidden vectors are shifted."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)) + [shift, 0, 0]
    if kind == "multiclass":
        logits: Any = 2.0 * x @ np.array([[1.0, 0, -1, 0.5], [0, 1, 0, -1], [0.3, 0, 1, 0]])
        labels = (softmax(logits / 2, axis=1).cumsum(1) > rng.random((n, 1))).argmax(1)
    else:
        logits = 1.5 * x[:, 0] + x[:, 1] - 0.5
        labels = (rng.random(n) < expit(0.6 * logits)) + 0.0
    known = rng.random(n) < 0.9
    return Scores({"t": logits}, {"t": x}, {"t": labels}, {"t": known}, np.full(n, 2), None, np.arange(n), np.arange(n))


def fitted(method: Any, kind: str, **changes: Scores) -> Calibration:
    parts = {"held_out": rows(kind, 0), "target": rows(kind, 1, 0.5), "train": rows(kind, 2)} | changes
    return method.fit(TASKS[kind], **parts)


def cases() -> list[Any]:
    """Every member (with its switches), and the two ends of a table, by each kind of task that it takes."""
    methods = [member() for member in MEMBERS] + [Vanilla(), Oracle()]
    for member in MEMBERS:
        for part in dataclasses.fields(member):
            if part.name in ("intercept", "slope"):
                methods.append(member(**{part.name: not part.default}))
            if part.name == "solver":
                methods += [member(solver=solver) for solver in ("bounded", "official")]
    found = []
    for method in methods:
        for kind in TASKS:
            try:
                fitted(method, kind)
            except ValueError as error:  # a kind that it refuses, by name
                assert "binary" in str(error)
                continue
            found.append(pytest.param(method, kind, id=f"{method}-{kind}"))
    return found


CASES = pytest.mark.parametrize(("method", "kind"), cases())


@CASES
def test_a_fit_gives_probabilities_of_the_same_shape(method: Any, kind: str) -> None:
    new = rows(kind, 5, 1.0, 50).logits["t"]
    found = fitted(method, kind)(new)
    assert found.shape == new.shape and found.dtype == np.float64 and np.isfinite(found).all()
    p = softmax(found, axis=1) if kind == "multiclass" else expit(found)
    assert ((p >= 0) & (p <= 1)).all() and (kind == "binary" or np.allclose(p.sum(1), 1))


@CASES
def test_order_is_kept(method: Any, kind: str) -> None:
    """Of classes by those that say so; of a binary task's rows by all, but for ties; bins have one value each."""
    new = rows(kind, 5, 1.0, 200).logits["t"]
    fit = fitted(method, kind)
    found = fit(new)
    if isinstance(fit.map, Curves) and not fit.map.smooth:
        assert kind == "multiclass" or len(np.unique(found)) <= len(fit.map.scores[0])
    elif kind == "binary":
        steps = np.diff(found[np.argsort(new)])
        assert (steps > 0).all() if method.keeps_argmax else (steps >= 0).all()
    elif method.keeps_argmax:
        assert (found.argmax(1) == new.argmax(1)).all()


@CASES
def test_order_of_rows_does_not_matter(method: Any, kind: str) -> None:
    def shuffled(given: Scores, seed: int) -> Scores:
        at = np.random.default_rng(seed).permutation(len(given.row))
        parts = {n: {"t": np.asarray(getattr(given, n)["t"])[at]} for n in ("logits", "hidden", "labels", "observed")}
        return dataclasses.replace(given, **parts)

    new = rows(kind, 5).logits["t"]
    other = fitted(method, kind, held_out=shuffled(rows(kind, 0), 1), target=shuffled(rows(kind, 1, 0.5), 2))
    exact = getattr(method, "solver", "nested") == "nested"  # SLSQP follows rounding of numerical gradients
    np.testing.assert_allclose(other(new), fitted(method, kind)(new), rtol=1e-5 if exact else 0.2, atol=1e-6)


@CASES
def test_labels_of_the_target_are_not_read(method: Any, kind: str) -> None:
    """Random labels, or none, in their place change nothing; only the oracle reads them."""
    target = rows(kind, 1, 0.5)
    noise = np.random.default_rng(0).permutation(target.labels["t"])
    new = rows(kind, 5).logits["t"]
    before = fitted(method, kind)(new)
    wrong = fitted(method, kind, target=dataclasses.replace(target, labels={"t": noise}))(new)
    if isinstance(method, Oracle):
        assert not np.array_equal(wrong, before)
        return
    assert np.array_equal(wrong, before)
    blank = dataclasses.replace(target, labels={"t": np.zeros(400)}, observed={"t": np.zeros(400, bool)})
    assert np.array_equal(fitted(method, kind, target=blank)(new), before)


@CASES
def test_what_reads_no_target_says_so(method: Any, kind: str) -> None:
    parts = {"held_out": rows(kind, 0), "target": None, "train": None}
    if not method.needs_target:
        assert method.fit(TASKS[kind], **parts) is not None
        return
    with pytest.raises(ValueError, match="target"):
        method.fit(TASKS[kind], **parts)


@CASES
def test_a_fit_survives_the_disk(method: Any, kind: str, tmp_path: Path) -> None:
    found = fitted(method, kind)
    store.save(tmp_path / "state.safetensors", found.state_dict())
    back = Calibration.load(store.load(tmp_path / "state.safetensors"))
    new = rows(kind, 5).logits["t"]
    assert np.array_equal(back(new), found(new)) and back.numbers == found.numbers and back.warnings == found.warnings


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.__name__)
def test_members_are_frozen_and_strict_and_no_calibrator_before_their_fit(member: Any) -> None:
    kind = member().kind
    adapter: Any = TypeAdapter(config.CalibratorChoice)
    assert adapter.validate_python({"kind": kind}) == member()
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": kind, "mispelt": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        member().kind = "other"
    with pytest.raises(TypeError, match="not callable"):
        member()(np.zeros(3))
    with pytest.raises(ValueError, match="Task `t` is real"):
        member().fit(Task("t", kind="real"), *[rows("binary", seed) for seed in range(3)])


def test_no_run_or_command_can_choose_what_reads_the_targets_labels() -> None:
    kinds = {member().kind for member in MEMBERS}
    assert not kinds & {Oracle().kind, Vanilla().kind}
    with pytest.raises(ValidationError, match="oracle"):
        TypeAdapter(config.CalibratorChoice).validate_python({"kind": "oracle"})


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.__name__)
def test_every_key_is_on_the_page(member: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()
    section = page.partition(f"#### Keys of `{member().kind}`\n")[2].partition("\n#")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|", section, re.M))
    plain = {None: "none", True: "true", False: "false"}

    def written(value: Any) -> str:
        if value is None or isinstance(value, bool):
            return plain[value]
        return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"

    assert shown == {part.name: written(part.default) for part in dataclasses.fields(member)}
