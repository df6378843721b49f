"""JSON, Markdown and the terminal: round trip, every fact there, lines that fit, names that do no harm."""

from __future__ import annotations

import io
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reportkit import HOSTILE, hostile, make_report
from rich.console import Console

from unbraid import config
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, Proof, Report, Spent
from unbraid.report import dump, load, markdown, terminal
from unbraid.report.text import findings
from unbraid.report.words import change, curves, headline, number, replies, sure, worth

GOLDEN = Path(__file__).parent / "golden.md"


def printed(report: Report, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(terminal(report, width))
    return out.getvalue()


# ----------------------------------------------------------------------------------------------------------------- JSON
@pytest.mark.parametrize("report", [make_report(), hostile()])
def test_json_there_and_back(report: Report) -> None:
    text = dump(report)
    found = load(text)
    assert dump(found) == text
    bare = [
        replace(d, remedies=tuple(replace(r, toml=config.dumps(r.run) if r.run else "", run=None) for r in d.remedies))
        for d in report.diagnoses
    ]
    assert found == replace(report, diagnoses=tuple(bare)), "all but the runs, whose files are there"


def test_a_remedy_read_from_json_still_trains() -> None:
    remedy = make_report().diagnoses[0].remedies[0]
    found = load(dump(make_report())).diagnoses[0].remedies[0]
    assert config.from_dict(tomllib.loads(found.toml)) == remedy.run


def test_arrays_and_what_is_not_finite() -> None:
    odd = replace(
        make_report().diagnoses[0], evidence={"a": np.array([1.0, np.nan]), "n": np.int64(3), "t": (1, "x", None, True)}
    )
    found = load(dump(make_report(diagnoses=(odd,)))).diagnoses[0].evidence
    assert found == {"a": [1.0, None], "n": 3, "t": [1, "x", None, True]}
    with pytest.raises(TypeError, match="Found object"):
        dump(make_report(diagnoses=(replace(odd, evidence={"a": object()}),)))


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "title": "x", "diagnoses": [{}]}']
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="report"):
        load(text)


# ---------------------------------------------------------------------------------------------------------------- words
def test_headlines() -> None:
    report = make_report()
    assert headline(report) == "3 findings: 1 severe, 2 mild."
    fine = tuple(d for d in report.diagnoses if d.grade == "none")
    assert headline(make_report(diagnoses=fine)).startswith("Nothing was found")
    assert headline(make_report(diagnoses=())).startswith("Nothing was measured")


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (5, None, None, "without an interval"), (5, 4.5, 5.5, "is severe"), (5, 2, 8, "above what is usual"),
        (2, 0.5, 3, "Not sure"), (0.5, 0.1, 0.9, "interval 0.1 to 0.9"),
    ],
)  # fmt: skip
def test_how_sure(value: float, low: float | None, high: float | None, said: str) -> None:
    assert said in sure(Diagnosis("x", "", value, 1, 4, "r", low=low, high=high))


def test_what_a_remedy_was_worth() -> None:
    measure, spent = Measure("like", "auc", "mail"), Spent(200.0, 11.2)
    proof = Proof(
        "x", "y", "uw", measure, 0.6, 0.61, 0.01, 0.002, 0.018, 0.0002, 3, True, True, spent, Spent(200.0, 12.0)
    )
    assert worth(proof) == (
        "Tried (uw, 3 seeds): AUC of like, domain mail went from 0.6 to 0.61, +0.01 [+0.002, +0.018], p < .001: it helps "
        "(equal budgets: 200 steps; 11.2 s as it is, 12 s with it)."
    )
    assert "p = 0.200: better, but not more than chance (" in worth(replace(proof, held=False, p=0.2))
    assert ": it does not help (" in worth(replace(proof, held=False, better=False))
    assert "1 seed)" in worth(replace(proof, seeds=1, low=None, p=None))
    longer = worth(replace(proof, spent_after=Spent(1400.5, 61.0)))
    assert longer.endswith("it helps (unequal budgets: 200 steps in 11.2 s as it is, 1,400 steps in 61 s with it).")
    none = replace(
        proof, before=None, after=None, difference=None, low=None, high=None, p=None, better=False, held=False
    )
    assert "went from - to -, -: it could not be measured (" in worth(none)


def test_every_rendering_says_that_budgets_are_unequal() -> None:
    said = "unequal budgets: 200 steps in 11.2 s as it is, 600 steps in 35.1 s with it"
    report = make_report()
    assert said in " ".join(printed(report, 118).split()) and said in markdown(report)
    (proof,) = json.loads(dump(report))["proofs"]
    assert proof["spent_before"] == {"steps": 200, "seconds": 11.2} and proof["spent_after"]["steps"] == 600
    assert load(dump(report)).proofs == report.proofs


def test_a_finding_answers_four_questions() -> None:
    first, second, third = replies(make_report())
    assert (
        "point apart" in first.wrong and "is severe" in first.sure and "Weigh" in first.do and "it helps" in first.worth
    )
    assert second.do.startswith("Mend conflict: click and like first") and second.worth == ""
    assert third.do == "No remedy is known."


def test_a_proof_stands_with_the_finding_whose_remedy_it_tried() -> None:
    report = make_report()
    twin = replace(report.diagnoses[0], where="another place")
    assert [bool(r.worth) for r in replies(make_report(diagnoses=(report.diagnoses[0], twin)))] == [True, False]
    other = replace(report.diagnoses[0], where="elsewhere", remedies=report.diagnoses[1].remedies)
    assert [bool(r.worth) for r in replies(make_report(diagnoses=(report.diagnoses[0], other)))] == [True, False]


def test_numbers() -> None:
    found = [number(v) for v in (0.43214, 12.344, 1234.5, 2.3e-5, -0.5, 0, None, float("nan"))]
    assert found == ["0.4321", "12.34", "1,234", "2.30e-05", "-0.5", "0", "-", "-"]


def test_the_change_of_a_run_file_names_its_tables() -> None:
    before = 'name = "a"\nseed = 1\n\n[update]\nlr = 0.1\nkind = "joint"\n\n[[losses]]\nkind = "supervised"\n'
    after = 'name = "b"\nseed = 1\n\n[update]\nlr = 0.2\nkind = "joint"\n\n[[losses]]\nkind = "focal"\n'
    after += '\n[[losses]]\nkind = "mcc"\n'
    assert change(before, after) == [
        (" ", "[update]"), ("-", "lr = 0.1"), ("+", "lr = 0.2"), (" ", "[[losses]]"), ("-", 'kind = "supervised"'),
        ("+", 'kind = "focal"'), ("+", "[[losses]]"), ("+", 'kind = "mcc"'),
    ]  # fmt: skip
    assert change(before, before) == [] and change("", after) == []


def test_curves_of_a_log_in_several_trainings_count_on() -> None:
    line = {"losses": {"click": 0.5}, "update": {"click": 1.5}, "valid": {"click": {"auc": {"value": None}, "rows": 3}}}
    curve = tuple({"call": call, "step": step, **line} for call in (0, 1) for step in (10, 20))
    loss, auc, weights = curves(make_report(curve=curve))
    assert loss.series["click"] == ((10.0, 20.0, 30.0, 40.0), (0.5,) * 4)  # type: ignore[union-attr]
    assert auc.title == "AUC on validation rows" and auc.series["click"][1] == (None,) * 4  # type: ignore[union-attr]
    assert weights.steps and curves(make_report(curve=())) == []  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------- what is written
def test_markdown_is_the_golden_page() -> None:
    """`python tests/report/test_text.py` writes it anew."""
    assert markdown(make_report()) == GOLDEN.read_text()


def test_markdown_of_hostile_names_has_no_tag() -> None:
    prose = re.sub(r"^```.*?^```", "", markdown(hostile()), flags=re.M | re.S)
    assert HOSTILE not in prose and "\\<script\\>" in prose


@pytest.mark.parametrize("width", [40, 80, 118, 200])
def test_the_terminal_keeps_its_width_and_its_words(width: int) -> None:
    report = make_report()
    text = printed(report, width)
    metrics = text.partition("leak: KeyError")[2] if width < 80 else ""  # forty letters hold no table of metrics
    lines = text.replace(metrics, "").splitlines()
    assert max(map(len, lines)) <= width
    words = set(" ".join(lines).split())
    for found in report.found:
        assert set(found.reading.split()) <= words and found.grade in words
    assert "$ unbraid train uw.toml --out runs/uw" in " ".join(" ".join(lines).split())


def test_the_terminal_says_grades_in_words_and_obeys_no_control_letters() -> None:
    text = printed(make_report(title="a\x1b[31mred"), 80)
    assert "\x1b" not in text
    loud = printed(make_report(facts={}, failed={"x": "died\x1b[2J\nof it"}), 80)
    assert "\x1b" not in loud and "x: died [2J of it" in loud


def test_a_fact_of_several_lines_is_a_section_and_intervals_are_as_the_facts_say() -> None:
    facts = {
        "rows": "train 9",
        "schedule": "## Rounds\n\n| a |\n",
        "intervals": "95 %, by a bootstrap over rows",
        "deeper": "Dig.",
    }
    report = make_report(facts=facts)
    text = markdown(report)
    assert "- rows: train 9" in text and "## Schedule\n\n```text\n## Rounds\n\n| a |\n```" in text
    assert "intervals: 95 %, by a bootstrap over rows." in text and "over users" not in text
    assert "(leak). Dig." in text and "(leak). Dig." in " ".join(printed(report, 118).split())


def test_findings_are_the_same_page_without_its_metrics() -> None:
    report = make_report()
    said, whole = findings(report), markdown(report)
    assert "## Metrics" not in said and "## Facts" not in said
    assert (
        all(line in whole for line in said.splitlines())
        and said.startswith("**3 findings")
        and "leak: KeyError" in said
    )


def test_nothing_found_is_said_with_what_was_looked_at() -> None:
    report = make_report(diagnoses=make_report().diagnoses[3:], proofs=())
    for text in (printed(report, 118), markdown(report)):
        flat = " ".join(text.split())
        assert "Nothing was found" in flat and "overfit" in flat and "1 check had nothing to look at" in flat


if __name__ == "__main__":
    GOLDEN.write_text(markdown(make_report()))
