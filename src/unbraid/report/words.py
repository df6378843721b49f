"""What every rendering of a report says in the same words: the headline, how sure, what it was worth, what changes."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from unbraid.diagnosis.diagnosis import GRADES, Diagnosis, Measure, Proof, Remedy, Report
from unbraid.diagnosis.plots import Lines, Plot
from unbraid.evaluate import lead_metric
from unbraid.render import metric_name

Points = list[tuple[float, float | None]]  # steps and values of one line

GLOSSARY: dict[str, str] = {
    "task": "A label column: what the model predicts.",
    "domain": "A value of the domain column: a scenario, site, country or camera. *all* is every row.",
    "check": "One question asked of a trained run, answered with a number of which larger is worse.",
    "value": "The number that a check measured, in the unit beside it. Larger is worse.",
    "interval": "The 95 % interval: what range of values other users or draws would plausibly have given.",
    "usual": "Up to here a value is no reason for concern. Fixed on logs that are known to be healthy or sick.",
    "severe": "From here on a value is severe. Between usual and severe it is mild in the lower half, moderate in the upper.",
    "grade": "How far the lower end of the interval (without one, the value) lies from usual towards severe: none, mild, "
    "moderate, severe. So a finding is one that holds even at the low end.",
    "explained by": "Another finding that accounts for this one: mend that first.",
    "remedy": "One change of the run file, or a command, that should help.",
    "proof": "What a remedy was worth when it was trained beside the diagnosed run, with the same seeds. Budgets are unequal "
    "where one took more steps: its schedule trains longer, or early stopping ended the other.",
    "held": "A gain that is more than chance: in the good direction, and p below .05 after adjustment.",
    "seeds": "How many times a run was trained, each with other random numbers.",
    "p": "How often chance alone would give a difference as large as this or larger; adjusted by Holm's method for the "
    "number of differences looked at (of proofs: of everything tried together).",
    "rows": "Rows of the test split with a label of the task.",
    "positives": "Of these, rows whose label is 1. With fewer than 10 positives or negatives metrics are withheld (-).",
    "AUC": "The share of pairs of a positive and a negative row in which the positive one has the higher score: .5 is "
    "chance, 1 is perfect.",
    "GAUC": "The mean of the AUCs within each user, weighted by the user's rows: order among the rows of one user alone.",
    "log-loss": "The mean of -log of the probability given to what happened, in nats. Lower is better.",
    "calibration": "The sum of predictions over the sum of labels: 1 is right on average, above it too high.",
    "ECE": "Expected calibration error: how far predicted probabilities lie from what happened, on average over 15 bins. "
    "Lower is better.",
    "accuracy": "The share of rows whose most probable class is the right one.",
    "RMSE": "Root of the mean squared error, in the label's unit. Lower is better.",
    "MAE": "Mean absolute error, in the label's unit. Lower is better.",
    "NDCG": "Of each request's first rows (as many as stand after @): how high the positives are ranked; 1 is perfect.",
    "recall": "Of each request's positives: the share among the first rows (as many as stand after @).",
    "baseline": "Target encoding with logistic regression, which a model has to beat.",
    "difference": "The first minus the second: here the model minus the baseline, in a comparison the run minus the "
    "reference. Positive is better for AUC and accuracy, worse for losses and errors.",
    "sd": "Standard deviation over seeds.",
    "test noise": "Standard error of a difference from other users who might have come.",
    "training noise": "Standard error of a difference from other seeds that might have been drawn.",
    "step": "One batch and one change of the parameters.",
}  # fmt: skip

# titles of tables' columns, as `unbraid.render` writes them, whose term has another name
TERMS = {
    "95 % interval": "interval", "p (Holm)": "p", "ndcg": "NDCG", "recall": "recall", "task / domain": "task",
    "training s, mean": "", "reading": "held", "steps, mean": "step",
}  # fmt: skip


def term(title: str) -> str:
    """The glossary's term for a table's title, "" if it needs none."""
    if title in TERMS:
        return TERMS[title]
    first = title.partition("@")[0]
    names = (title, TERMS.get(first, first), title.partition(" ")[0])
    return next((name for name in names if name in GLOSSARY), "")


# --------------------------------------------------------------------------------------------------------------- summary
@dataclass(frozen=True)
class Reply:
    """A finding in four answers: what is wrong, how sure, what to do, what it was worth when it was tried ("" if not)."""

    diagnosis: Diagnosis
    wrong: str
    sure: str
    do: str
    worth: str


def headline(report: Report) -> str:
    """One sentence: how many findings of which grade, or that there is none."""
    if not report.diagnoses:
        return "Nothing was measured: no check had anything to look at."
    counts = {grade: sum(d.grade == grade for d in report.found) for grade, _ in GRADES}
    if not report.found:
        return "Nothing was found: no value that was measured is surely above what is usual."
    parts = ", ".join(f"{n} {grade}" for grade, n in counts.items() if n)
    return f"{plural(len(report.found), 'finding')}: {parts}."


def looked_at(report: Report) -> str:
    """What was measured, skipped, what failed, and how to look deeper."""
    checks = dict.fromkeys(d.name for d in report.diagnoses)
    said = f"{plural(len(report.diagnoses), 'value')} of {plural(len(checks), 'check')} measured"
    if checks:
        said += f" ({', '.join(checks)})"
    said += f"; {plural(len(report.skipped), 'check')} had nothing to look at"
    if report.failed:
        said += f"; {plural(len(report.failed), 'check')} failed and may hide something ({', '.join(report.failed)})"
    return f"{said}. {report.facts.get('deeper', '')}".rstrip()


def intervals(report: Report) -> str:
    """How intervals of metrics were made."""
    return report.facts.get("intervals", "95 %, by a bootstrap over users")


def replies(report: Report) -> list[Reply]:
    """One per finding, worst first."""
    return [_reply(report, found) for found in report.found]


def _reply(report: Report, found: Diagnosis) -> Reply:
    own = proofs_of(report, found)
    do = found.remedies[0].text if found.remedies else "No remedy is known."
    if found.because:
        do = f"Mend {found.because} first, which explains it. Then: {do}"
    return Reply(found, reading(found), sure(found), do, " ".join(worth(each) for each in own))


def proofs_of(report: Report, found: Diagnosis) -> list[Proof]:
    """What was tried of a finding's remedies."""
    names = {remedy.name for remedy in found.remedies}
    return [
        proof for proof in report.proofs if (proof.of, proof.where) == (found.name, found.where) and proof.remedy in names
    ]  # fmt: skip


def reading(found: Diagnosis) -> str:
    """What a diagnosis says, a whole sentence: another may follow."""
    said = found.reading.rstrip()
    return said if not said or said[-1] in ".!?" else f"{said}."


def sure(found: Diagnosis) -> str:
    """How sure a diagnosis is, one sentence."""
    if found.low is None or found.high is None:
        return "Measured once, without an interval."
    ends = f"{number(found.low)} to {number(found.high)}"
    if found.low >= found.severe:
        return f"Sure: all of the 95 % interval, {ends}, is severe."
    if found.low > found.usual:
        return f"Sure: all of the 95 % interval, {ends}, lies above what is usual."
    if found.value > found.usual:
        return f"Not sure: the 95 % interval, {ends}, reaches down to what is usual."
    return f"95 % interval {ends}."


def worth(proof: Proof) -> str:
    """What a remedy was worth, one sentence."""
    said = f"Tried ({proof.remedy}, {plural(proof.seeds, 'seed')}): {measured(proof.measure)} went from "
    said += f"{number(proof.before)} to {number(proof.after)}, {signed(proof.difference)}"
    if proof.low is not None and proof.high is not None:
        said += f" [{signed(proof.low)}, {signed(proof.high)}]"
    if proof.p is not None:
        said += f", p {'< .001' if proof.p < 0.001 else f'= {proof.p:.3f}'}"
    return f"{said}: {verdict(proof)} ({budgets(proof)})."


def budgets(proof: Proof) -> str:
    """Whether the run as it is and the remedy took as many steps, and what they took."""
    before, after = proof.spent_before, proof.spent_after
    if before.steps == after.steps:
        return f"equal budgets: {before.steps:,.0f} steps; {number(before.seconds)} s as it is, {number(after.seconds)} s with it"
    each = (f"{spent.steps:,.0f} steps in {number(spent.seconds)} s" for spent in (before, after))
    return f"unequal budgets: {next(each)} as it is, {next(each)} with it"


def verdict(proof: Proof) -> str:
    """Four outcomes, in words."""
    if proof.difference is None:
        return "it could not be measured"
    if proof.held:
        return "it helps"
    return "better, but not more than chance" if proof.better else "it does not help"


def measured(measure: Measure) -> str:
    """``AUC of click, domain 3``."""
    where = f", domain {measure.domain}" if measure.domain else ""
    return f"{metric_name(measure.metric)} of {measure.task}{where}"


# --------------------------------------------------------------------------------------------------------------- numbers
def number(value: float | None) -> str:
    """Four digits that count: 0.4321, 12.34, 1,234, 2.3e-05; a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < size < 5e-4 else f"{value:.4g}"


def signed(value: float | None) -> str:
    """The same with its sign."""
    return number(value) if value is None or value <= 0 or not math.isfinite(value) else "+" + number(value)


def reach(found: Diagnosis) -> str:
    """``0.43 nats [0.40, 0.47]; usual up to 0.1, severe from 0.3``."""
    said = number(found.value) + (f" {found.unit}" if found.unit else "")
    if found.low is not None and found.high is not None:
        said += f" [{number(found.low)}, {number(found.high)}]"
    return f"{said}; usual up to {number(found.usual)}, severe from {number(found.severe)}"


def plural(count: int, noun: str) -> str:
    """``1 finding``, ``2 findings``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def name_of(found: Diagnosis) -> str:
    """Name and place of a diagnosis."""
    return f"{found.name}: {found.where}" if found.where else found.name


# -------------------------------------------------------------------------------------------------------------- run file
def run_file(remedy: Remedy) -> str:
    """The remedy's run as a file's text, "" if it asks for no training."""
    if remedy.run is None:
        return remedy.toml
    from unbraid import config  # late, as `unbraid.diagnosis` does: a report that was read from JSON needs no model

    return config.dumps(remedy.run)


def change(before: str, after: str) -> list[tuple[str, str]]:
    """What changes in a run file: (" ", "-" or "+", line), each change below the header of its table.

    The run's own name, which every remedy changes, is left out.
    """
    old, new = before.splitlines(), after.splitlines()
    if not old or not new:
        return []
    shown: list[tuple[str, str]] = []
    header = ""
    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        lines = [] if kind == "equal" else [("-", x) for x in old[i:j]] + [("+", x) for x in new[k:m]]
        above = next((x for x in reversed(new[:k]) if x.startswith("[")), "")
        lines = [(sign, x) for sign, x in lines if x.strip() and not (not above and x.startswith("name = "))]
        if lines and above != header and not lines[0][1].startswith("["):
            shown.append((" ", above))
        shown += lines
        header = next((x for _, x in reversed(lines) if x.startswith("[")), above if lines else header)
    return shown


def to_type(remedy: Remedy) -> str:
    """The command that tries a remedy, "" if there is none."""
    if remedy.command or not run_file(remedy):
        return remedy.command
    return f"unbraid train {shlex.quote(remedy.name + '.toml')} --out {shlex.quote('runs/' + remedy.name)}"


# ---------------------------------------------------------------------------------------------------------------- curves
def curves(report: Report) -> list[Plot]:
    """Losses, the lead metric of each task on validation rows, the update's own weights over steps, a schedule's over rounds."""
    looks = tuple(line for line in report.curve if line.get("call") != "schedule")
    losses: dict[str, Points] = {}
    metrics: dict[str, dict[str, Points]] = {}
    weights: dict[str, Points] = {}
    for step, line in zip(_steps(looks), looks, strict=True):
        for name, value in line.get("losses", {}).items():
            losses.setdefault(name, []).append((step, value))
        for name, value in line.get("update", {}).items():
            weights.setdefault(name, []).append((step, value))
        for task, found in line.get("valid", {}).items():
            lead = lead_metric(found)
            metrics.setdefault(lead, {}).setdefault(task, []).append((step, found[lead]["value"]))
    merged: dict[str, Points] = {}
    for line in report.curve:
        for name, value in line.get("weights", {}).items():
            merged.setdefault(name, []).append((float(line["step"]), value))
    made: list[Plot] = []
    if losses:
        made.append(Lines("Training loss", "step", "loss", _lines(losses)))
    for lead, tasks in metrics.items():
        title = metric_name(lead)
        made.append(Lines(f"{title} on validation rows", "step", title, _lines(tasks)))
    if weights:
        made.append(Lines("Weights of the losses", "step", "weight", _lines(weights), steps=True))
    if merged:
        note = "One point per round; a branch that was dropped ends."
        made.append(Lines("Weights of the schedule", "step", "weight", _lines(merged), note=note))
    return made


def _lines(found: Mapping[str, Points]) -> dict[str, Any]:
    return {name: ([x for x, _ in points], [y for _, y in points]) for name, points in found.items()}


def _steps(curve: tuple[Mapping[str, Any], ...]) -> list[float]:
    """The step of each line; of a schedule with several trainings, counted on from one to the next."""
    steps, done, last, call = [], 0.0, 0.0, None
    for i, line in enumerate(curve):
        step = float(line.get("step", i))
        if call is not None and line.get("call") != call:
            done += last
        call, last = line.get("call"), step
        steps.append(done + step)
    return steps
