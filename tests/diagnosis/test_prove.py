"""Are remedies trained once, compared in the right direction, adjusted over all that was tried?  Does a proof survive a kill?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from healthkit import make_run, make_table
from typer.testing import CliRunner

from unbraid import compare as comparing
from unbraid import recipes, report, store
from unbraid.cli.main import app
from unbraid.config import Run, dumps
from unbraid.data.planted import sick_log
from unbraid.diagnosis import prove as proving
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, Remedy, Report, Spent
from unbraid.diagnosis.prove import ASIS, adjusted, prove, remedies, trainings
from unbraid.job import train
from unbraid.train import Watcher

TABLES = {"log": make_table(rows=1500)}


def remedy(name: str, run: Run | None, task: str = "click", metric: str = "auc", **where: str) -> Remedy:
    return Remedy(name, f"Try {name}.", "update", run, measure=Measure(task, metric, **where))


def diagnosis(where: str, *able: Remedy, value: float = 2.0, **more: Any) -> Diagnosis:
    return Diagnosis("ill", where, value, 0.0, 1.0, f"{where} is ill.", remedies=able, **more)


def a_report(*found: Diagnosis) -> Report:
    return Report("toy", {}, {}, {}, {}, diagnoses=found)


def faster(lr: float = 0.1) -> Run:
    run = make_run()
    return replace(run, name="faster", update=replace(run.update, lr=lr))


class Notes(Watcher):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# ----------------------------------------------------------------------------------------------------------------- what is tried
def test_what_is_tried_is_of_the_worst_that_nothing_explains_and_can_be_trained_and_measured() -> None:
    run = faster()
    unmeasured = Remedy("unmeasured", "No measure.", run=run)
    found = a_report(
        diagnosis("explained", remedy("a", run), because="ill: other"),
        diagnosis("untrainable", remedy("b", None), unmeasured),
        diagnosis("first", unmeasured, remedy("c", run), remedy("d", run)), diagnosis("second", remedy("e", run)),
        diagnosis("third", remedy("f", run)), diagnosis("fourth", remedy("g", run)),
        diagnosis("healthy", remedy("h", run), value=-1.0),
    )  # fmt: skip
    assert [r.name for _, r, _ in remedies(found)] == ["c", "e", "f"]
    assert [r.name for _, r, _ in remedies(found, most=1, each=2)] == ["c", "d"]


def test_without_a_remedy_there_is_nothing_to_train(tmp_path: Path) -> None:
    for found in (a_report(), a_report(diagnosis("a", remedy("x", None)))):
        with pytest.raises(ValueError, match="No finding has a remedy that can be trained"):
            prove(found, make_run(), tmp_path / "out", tables=TABLES)
    assert not (tmp_path / "out").exists()


def test_equal_runs_are_trained_once_and_others_of_one_name_are_told_apart() -> None:
    one, other = faster(), faster(0.5)
    chosen = remedies(
        a_report(
            diagnosis("a", remedy("faster", one)), diagnosis("b", remedy("quick", replace(one, name="quick"))),
            diagnosis("c", remedy("faster", other)), diagnosis("d", remedy("faster", faster(0.7))),
        ), most=9,
    )  # fmt: skip
    runs, names = trainings(make_run(), chosen)
    assert names == ["faster", "faster", "faster-2", "faster-3"] and list(runs) == [
        ASIS,
        "faster",
        "faster-2",
        "faster-3",
    ]
    assert [run.update.lr for run in runs.values()] == [0.01, 0.1, 0.5, 0.7]  # type: ignore[union-attr]
    assert all(run.name == name for name, run in runs.items())


# ------------------------------------------------------------------------------------------------------------------ the numbers
def test_p_values_are_adjusted_over_everything_tried_and_not_per_metric() -> None:
    auc, loss, real = Measure("click", "auc"), Measure("click", "logloss"), Measure("stay", "rmse")
    p = {("a", auc): 0.03, ("b", auc): 0.01, ("a", loss): 0.04, ("c", real): None, ("d", real): 0.02}
    found = adjusted({key: {"p": value} for key, value in p.items()})
    # by hand, four known: .01 x 4 = .04; .02 x 3 = .06; .03 x 2 = .06; .04 x 1, but not below those before it
    assert {key: each["holm"] for key, each in found.items()} == pytest.approx(
        {("b", auc): 0.04, ("d", real): 0.06, ("a", auc): 0.06, ("a", loss): 0.06, ("c", real): None}, abs=1e-12
    )


def made_up(differences: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """What `compare` returns of a reference at .6 and runs at .5."""
    cell = {name: {metric: {"mean": 0.6 if name == ASIS else 0.5}} for name in (ASIS, *(d["run"] for d in differences))}
    spent = {ASIS: {"steps": 10.0, "seconds": 1.0}} | {d["run"]: {"steps": 40.0, "seconds": 5.0} for d in differences}
    return {"values": {"click": {"": {"runs": cell}}}, "cost": spent, "differences": differences}


def test_lower_is_better_where_it_is_and_budgets_are_those_that_were_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compared(runs: list[Run], out: Path, *, metric: str, resume: bool, **_: Any) -> dict[str, Any]:
        calls.append(([run.name for run in runs], metric, resume))
        for kind in ("json", "md"):
            store.write_text(Path(out) / f"compare.{kind}", metric)
        common = {"task": "click", "domain": "", "value": -0.1, "low": -0.15, "high": -0.05}
        return made_up([{**common, "run": "a", "p": 0.02}, {**common, "run": "b", "p": 0.03}], metric)

    monkeypatch.setattr(proving, "compare", compared)
    one, two = faster(), faster(0.2)
    found = a_report(
        diagnosis("x", remedy("a", one, metric="logloss")), diagnosis("y", remedy("a", one, metric="auc")),
        diagnosis("z", remedy("b", two, metric="logloss", domain="nowhere")),
    )  # fmt: skip
    lower, higher, nowhere = prove(found, make_run(), tmp_path).proofs
    assert calls == [([ASIS, "a", "b"], "logloss", False), ([ASIS, "a", "b"], "auc", True)], "each run is trained once"
    assert (tmp_path / "compare-auc.md").read_text() == "auc" and (tmp_path / "compare-logloss.json").exists()
    assert (lower.of, lower.where, lower.difference, lower.better, lower.held) == ("ill", "x", -0.1, True, True)
    assert (higher.where, higher.better, higher.held) == ("y", False, False)
    assert lower.p == higher.p == 0.04, "two hypotheses: run a by log-loss and by AUC"
    assert lower.spent_before == Spent(10.0, 1.0) and lower.spent_after == Spent(40.0, 5.0)
    assert nowhere.difference is nowhere.before is nowhere.p is None and not nowhere.better


def test_a_proof_is_the_paired_difference_and_resuming_trains_nothing_again(tmp_path: Path) -> None:
    run, better = make_run(), faster(0.05)
    found = a_report(
        diagnosis("x", remedy("faster", better, metric="logloss")),
        diagnosis("y", remedy("faster", better, "buy"), remedy("slow", faster(1e-5))),
    )
    made = prove(found, run, tmp_path / "out", seeds=1, tables=TABLES)
    first, second = made.proofs
    alone = {name: train(replace(each, baseline=()), tables=TABLES, baseline=False).metrics["test"]
             for name, each in ((ASIS, run), ("faster", better))}  # fmt: skip
    assert first.before == pytest.approx(alone[ASIS]["click"]["logloss"]["value"], abs=1e-10)
    assert first.after == pytest.approx(alone["faster"]["click"]["logloss"]["value"], abs=1e-10)
    assert first.difference is not None and first.before is not None and first.after is not None
    assert first.difference == pytest.approx(first.after - first.before) and first.better == (first.difference < 0)
    assert second.after == pytest.approx(alone["faster"]["buy"]["auc"]["value"], abs=1e-10)
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == [ASIS, "faster"]
    assert first.spent_after.steps == 4 and report.load(report.dump(made)).proofs == made.proofs
    watcher = Notes()
    again = prove(found, run, tmp_path / "out", seeds=1, tables=TABLES, resume=True, watcher=watcher)
    assert again.proofs == made.proofs and sum("nothing to resume" in note for note in watcher.notes) == 4


# -------------------------------------------------------------------------------------------------------------------- the claim
@pytest.mark.slow
def test_a_leak_is_found_left_out_and_proved_through_the_command_and_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("altair")
    tables, data = sick_log(0, leak=1.0)
    tables = {**tables, "rows": tables["rows"].sample(15_000, seed=0).sort("time")}
    for name, frame in tables.items():
        frame.write_parquet(tmp_path / f"{name}.parquet")
    events = tuple(replace(each, table=f"{each.table}.parquet") for each in data.events)
    run = recipes.planted(replace(data, folder=str(tmp_path), rows="rows.parquet", events=events))
    run = replace(run, training=replace(run.training, steps=120, evaluate_every=0, patience=0))
    store.write_text(tmp_path / "run.toml", dumps(run))

    def ask(*words: str | Path) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    done = ask("train", tmp_path / "run.toml", "--out", tmp_path / "b", "--no-baseline")
    assert done.exit_code == 0, done.output
    asked = ("diagnose", tmp_path / "b", "--only", "leak", "--prove", tmp_path / "p", "--seeds", "2")
    files = ("--html", tmp_path / "r.html", "--json-file", tmp_path / "r.json", "--markdown", tmp_path / "r.md")

    whole = comparing.train
    trained: list[str] = []

    def killed_at_third(one: Run, *args: Any, **options: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(f"{one.name} {one.seed}")
        return whole(one, *args, **options)

    monkeypatch.setattr(comparing, "train", killed_at_third)
    killed = ask(*asked, *files)
    assert killed.exit_code == 2 and "--resume" in killed.stderr
    assert report.load((tmp_path / "r.json").read_text()).found[0].name == "leak", "what was found is not lost"
    monkeypatch.undo()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "p").rglob("weights.safetensors")}
    assert len(before) == 2 == len(trained)

    proved = ask(*asked, "--resume", *files, "--docs", "https://docs.example.org")
    assert proved.exit_code == 0, proved.output
    assert 'href="https://docs.example.org/diagnosis.md#' in (tmp_path / "r.html").read_text()
    assert all(path.stat().st_mtime_ns == at for path, at in before.items()), "finished runs are not trained again"
    assert len(list((tmp_path / "p").rglob("weights.safetensors"))) == 4
    found = report.load((tmp_path / "r.json").read_text())
    (proof,) = found.proofs
    assert (proof.of, proof.where, proof.remedy) == ("leak", "late", found.found[0].remedies[0].name)
    assert proof.better and (proof.difference or 0) > 0.05 and proof.seeds == 2 and proof.spent_before.steps == 120
    said = "equal budgets: 120 steps"
    assert said in (tmp_path / "r.html").read_text() and said in (tmp_path / "r.md").read_text()
    assert (
        said in " ".join(proved.stdout.split())
        and json.loads((tmp_path / "r.json").read_text())["proofs"][0]["held"] == proof.held
    )


@pytest.mark.slow
def test_a_log_without_a_trainable_remedy_is_no_error(tmp_path: Path) -> None:
    make_table(rows=1500).write_parquet(tmp_path / "log.parquet")
    store.write_text(tmp_path / "run.toml", dumps(make_run()).replace('rows = "log"', 'rows = "log.parquet"'))
    train_, look = (
        CliRunner().invoke(app, [*map(str, words)])
        for words in (
            ("train", tmp_path / "run.toml", "--out", tmp_path / "b", "--no-report", "--no-baseline"),
            ("diagnose", tmp_path / "b", "--only", "small", "--prove", tmp_path / "p"),
        )
    )
    assert train_.exit_code == look.exit_code == 0, look.output
    assert "nothing to prove" in " ".join(look.stderr.split()) and not (tmp_path / "p").exists()
