"""A search for hyper-parameters (`unbraid.tune`) as Markdown, as a table for the terminal and as one HTML page.

All read what ``tune.json`` holds and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unbraid import render
from unbraid.diagnosis.plots import Bars, Lines, Plot
from unbraid.report.page import _page, _Plots
from unbraid.tune.space import short, text

SHOWN = 15  # trials in the terminal
BINS = 10  # of a number's slice, each with as many trials
Cells = tuple[list[str], list[list[str]]]

BASELINE = "target_encoding"
LUCK = (
    "It is the best of several values on the validation split, and partly the luckiest: on other rows expect less. The paired "
    "difference on the test split is the honest one."
)
HOW = "Importance (PED-ANOVA, Optuna's) is a key's share in telling the best tenth of the complete trials from the others."


def headline(found: Mapping[str, Any]) -> str:
    """One sentence: what was found, beside what the run has as it is."""
    best, own = found["best"], found["as_it_is"]
    said = f"Trial {best['number']} is the best: {found['objective']} {_number(best['value'])} on the validation split"
    return said + (f"; the run as it is has {_number(own)}." if own is not None else ".")


def counts(found: Mapping[str, Any]) -> str:
    """One sentence: how many trials ended how, and what they took."""
    states = [line["state"] for line in found["trials"]]
    each = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed") if state in states)
    seconds = sum(line["seconds"] for line in found["trials"])
    trained = f"{found['seeds']} trainings" if found["seeds"] > 1 else "one training"
    side = "lower" if found["lower_is_better"] else "higher"
    said = f"{len(states)} trials of {trained} each ({each}), {seconds:,.0f} s; {found['objective']}: {side} is better."
    return said + (" It reads labels of the target: a bound and no result." if found["oracle"] else "")


def best_cells(found: Mapping[str, Any]) -> Cells:
    """What varies: the run's own value, the best one, its importance."""
    known = found["importances"]
    lines = [
        [key, "-" if found["own"][key] is None else text(found["own"][key]), text(value), _share(known.get(key))]
        for key, value in found["best"]["params"].items()
    ]  # fmt: skip
    return ["key", "present", "best", "importance"], lines


def trial_cells(found: Mapping[str, Any], most: int = 0) -> Cells:
    """The trials by their value, best first, then those without; ``most`` of them, 0 is all."""
    sign = 1 if found["lower_is_better"] else -1
    order = sorted(found["trials"], key=lambda t: (t["value"] is None, sign * (t["value"] or 0.0), t["number"]))
    keys = list(found["space"])
    names = short(keys)
    lines = [
        [str(t["number"]), t["state"], _number(t["value"]), str(len(t["looks"])), f"{t['seconds']:,.1f}",
         *(text(t["params"][key]) for key in keys)]
        for t in (order[:most] if most else order)
    ]  # fmt: skip
    return ["trial", "ended", found["objective"], "looks", "seconds", *(names[key] for key in keys)], lines


def failures(found: Mapping[str, Any]) -> list[str]:
    """What went wrong, one sentence per failed trial."""
    return [
        f"Trial {line['number']}: {line['error'].splitlines()[0]}"
        for line in found["trials"]
        if line["state"] == "failed"
    ]


def importances(found: Mapping[str, Any]) -> str:
    """One sentence on the importances."""
    return HOW if found["importances"] else "Importances need ten complete trials that differ in their values."


def tested(found: Mapping[str, Any]) -> tuple[str, Cells | None]:
    """What was seen on the test split: a sentence, and the table of differences if there is one."""
    test = found["test"]
    if test is None:
        return (
            "The test split was not looked at. `--resume --test 3` compares the best with the run as it is, three seeds each.",
            None,
        )
    ours = [d for d in test["differences"] if not d["domain"] and d["run"] != BASELINE and d["value"] is not None]
    each = ", ".join(
        f"{d['task']} {render.metric_name(d['metric'])} {d['value']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}] ({d['verdict']})"
        for d in ours
        if d["low"] is not None
    )
    said = f"Differences of the best from the run as it is, {test['seeds']} seeds each that no trial had"
    budget = render.budget(test).replace("**", "")
    return f"{said}: {each or 'none is known'}. {budget}", render.comparison_cells(test)[0]


def markdown(found: Mapping[str, Any]) -> str:
    """The search as a Markdown page."""
    said, table = tested(found)
    parts = [f"# Search of `{found['run']}`", "", headline(found), "", counts(found), ""]
    parts += [
        "## Best",
        "",
        "`best.toml` is this run. " + LUCK,
        "",
        render.markdown(*best_cells(found), left=1),
        importances(found),
        "",
    ]
    parts += ["## Test split", "", said, ""]
    parts += [render.markdown(*table, left=2)] if table else []
    parts += [f"- {line}" for line in render.remarks(found["test"], False)] + [""] if table else []
    parts += ["## Trials", "", render.markdown(*trial_cells(found), left=2)]
    parts += [f"- {line}" for line in failures(found)]
    return "\n".join(parts).rstrip() + "\n"


def html(found: Mapping[str, Any]) -> str:
    """The search as a page that opens without a network.  Raises ImportError without the extra `report`."""
    drawn = _Plots()
    said, table = tested(found)
    sections = [
        ("summary", "Summary"),
        ("test", "Test split"),
        ("plots", "Plots"),
        ("trials", "Trials"),
        ("glossary", "Words"),
    ]
    return _page(
        "tuning.html.jinja", drawn, found=found, headline=headline(found), counts=counts(found), luck=LUCK,
        best=best_cells(found),
        importances=importances(found), tested=said, test=table, figures=[drawn.add(plot) for plot in plots(found)],
        trials=trial_cells(found), failures=failures(found), sections=sections,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- plots
def plots(found: Mapping[str, Any]) -> list[Plot]:
    """How the search went, the looks of its trials, importances, and the objective over each key."""
    done = [line for line in found["trials"] if line["state"] == "complete"]
    names = short(list(found["space"]))
    made: list[Plot] = [_history(found, done)]
    if looks := [line for line in found["trials"] if line["looks"]]:
        ranked = sorted(looks, key=lambda line: line["number"] != found["best"]["number"])
        series = {f"trial {t['number']}": (range(1, len(t["looks"]) + 1), t["looks"]) for t in ranked}
        made.append(Lines("Looks of trials at the validation split", "look", found["objective"], series,  # type: ignore[arg-type]
                          note="A line that ends early was pruned, or stopped by training.patience."))  # fmt: skip
    if known := found["importances"]:
        made.append(
            Bars("Importance", "share", tuple(names[key] for key in known), tuple(known.values()), x="key", note=HOW)
        )
    return made + [_slice(found, done, key, names[key]) for key in found["space"]]


def _history(found: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> Plot:
    numbers = [float(line["number"]) for line in done]
    values = [line["value"] for line in done]
    best = (np.minimum if found["lower_is_better"] else np.maximum).accumulate(values).tolist()
    series = {"trial": (numbers, values), "best so far": (numbers, best)}
    return Lines("How the search went", "trial", found["objective"], series, note="Complete trials alone.",  # type: ignore[arg-type]
                 reference=found["as_it_is"])  # fmt: skip


def _slice(found: Mapping[str, Any], done: Sequence[Mapping[str, Any]], key: str, name: str) -> Plot:
    """The objective over one key, whatever the others were: means, from the least to the greatest value."""
    pairs = [(line["params"][key], line["value"]) for line in done]
    ranged = isinstance(found["space"][key], Mapping)
    if ranged:
        pairs.sort()
        blocks = np.array_split(range(len(pairs)), min(BINS, len(pairs)))
        groups = _joined([[pairs[i] for i in block] for block in blocks])
    else:
        groups = [[p for p in pairs if p[0] == choice] for choice in found["space"][key]]
    values = [[value for _, value in group] for group in groups]
    means, low, high = ([float(of(v)) if v else None for v in values] for of in (np.mean, min, max))
    note = "Means, and the range from the lowest to the highest, of complete trials; other keys varied, too."
    title = f"{found['objective']} over {name}"
    if not ranged:
        labels = tuple(text(choice) for choice in found["space"][key])
        middle = float(np.mean([value for _, value in pairs]))
        return Bars(title, found["objective"], labels, tuple(means), tuple(low), tuple(high), middle, x=name, note=note)
    places = [float(np.median([x for x, _ in group])) for group in groups]
    series = {found["objective"]: (places, means)}
    bands = {found["objective"]: low}, {found["objective"]: high}
    return Lines(title, name, found["objective"], series, *bands, log_x=bool(found["space"][key].get("log")), note=note)  # type: ignore[arg-type]


def _joined(groups: list[list[tuple[Any, float]]]) -> list[list[tuple[Any, float]]]:
    """Groups with equal values joined, so that a value of a grid is one place."""
    found: list[list[tuple[Any, float]]] = []
    for group in groups:
        if found and found[-1][-1][0] == group[0][0]:
            found[-1] += group
        else:
            found.append(list(group))
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
