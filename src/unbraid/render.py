"""Tables of metrics for the terminal and for Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from unbraid.evaluate import Metrics, lead_metric, metric_names

_TITLES = {
    "auc": "AUC", "accuracy": "accuracy", "rmse": "RMSE", "mae": "MAE", "gauc": "GAUC", "logloss": "log-loss",
    "calibration": "calibration", "ece": "ECE",
}  # fmt: skip


def render_table(metrics: Metrics, baseline: Metrics | None = None, *, width: int = 120) -> Table:
    """A rich table, one line per task and domain; with ``baseline`` also its lead metric and ours minus it.

    On a terminal narrower than 118 columns (``width``) lead metrics and baseline are shown alone.  Of what is then still too
    wide go, in this order: the metrics of requests, all metrics but the lead ones, positives, rows, the ends of intervals; at
    last names are shortened.  The lead metrics, the baseline and the difference are always there, whole.

    The lead metric (AUC, else accuracy, else RMSE) carries its interval; nulls are dashes.  The difference has none:
    an interval for it needs paired draws of both models.
    """
    start = FITS.index("lead") if width < 118 else 0
    for level in FITS[start:]:
        made = _at(level, metrics, baseline)
        if _wide(made) <= width:
            return made
    names = max(column.min_width or 0 for column in made.columns[:2])
    while _wide(made) > width and names > 5:
        names -= 1
        made = _at(FITS[-1], metrics, baseline, names)
    return made


# what a table leaves out, by its level
FITS = ("all", "no requests", "lead", "no positives", "no rows", "no intervals")


def _at(level: str, metrics: Metrics, baseline: Metrics | None, names: int = 0) -> Table:
    """The table that leaves out what this level and those before it say; ``names``: the longest task and domain, if any."""
    out = FITS[: FITS.index(level) + 1]
    titles, lines = metric_cells(metrics, baseline, brief="lead" in out, requests="no requests" not in out)
    gone = [titles.index(name) for name in ("rows", "positives") if f"no {name}" in out]
    rows = [titles, *lines]
    if "no intervals" in out:
        rows = [[cell.partition(" [")[0] if i > 3 else cell for i, cell in enumerate(row)] for row in rows]
    if names:
        rows = [[shortened(cell, names) if i < 2 else cell for i, cell in enumerate(row)] for row in rows]
    titles, *lines = [[cell for i, cell in enumerate(row) if i not in gone] for row in rows]
    short = {"calibration": "calib.", "difference": "diff.", "positives": "pos."}
    return table([short.get(title, title) for title in titles], lines, left=2)


def _wide(made: Table) -> int:
    """Letters in a line of a table that `table` made: two between columns, and one at each edge."""
    return sum(2 + (column.min_width or 0) for column in made.columns)


def metric_name(name: str) -> str:
    """A metric as tables write it, such as ``AUC``."""
    return _TITLES.get(name, name)


def shortened(name: str, most: int = 28) -> str:
    """A name of at most so many letters: the middle of a longer one is left out."""
    return name if len(name) <= most else f"{name[: most - most // 2 - 1]}…{name[-(most // 2) :]}"


def render_markdown(metrics: Metrics, baseline: Metrics | None = None) -> str:
    """The same table in Markdown."""
    return markdown(*metric_cells(metrics, baseline), left=2)


def table(titles: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> Table:
    """A rich table whose first ``left`` columns are flush left; titles wrap, cells do not."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # without rules it fits 120 columns
    for i, title in enumerate(titles):
        wide = max([max(map(len, title.split(" "))), *(len(line[i]) for line in lines)])
        made.add_column(textwrap.fill(title, wide), justify="left" if i < left else "right", min_width=wide)
    for line in lines:
        made.add_row(*map(Text, line))  # Text: a domain's name may hold square brackets
    return made


def markdown(titles: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose first ``left`` columns are flush left."""
    rule = ["---" if i < left else "---:" for i in range(len(titles))]
    safe = [[cell.replace("|", "\\|") for cell in line] for line in (titles, rule, *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in safe) + "\n"


def metric_cells(
    metrics: Metrics, baseline: Metrics | None, brief: bool = False, requests: bool = True
) -> tuple[list[str], list[list[str]]]:  # fmt: skip
    """Titles and text of the tables.  A binary task's accuracy says little at 2 % positives and gets no column."""
    slices = [(t, d, found) for t, whole in metrics.items() for d, found in {"": whole, **whole["domains"]}.items()]
    leads = list(dict.fromkeys(lead_metric(found) for _, _, found in slices))
    shown = {name for _, _, found in slices for name in metric_names(found) if name != "accuracy"}
    named = [name for _, _, found in slices for name in metric_names(found)] if requests else []
    ranks = list(dict.fromkeys(name for name in named if "@" in name))
    rest = [] if brief else [name for name in (*_TITLES, *ranks) if name in shown and name not in leads]
    titles = ["task", "domain", "rows", "positives", *(_TITLES.get(name, name) for name in leads + rest)]
    if baseline is not None:
        titles += ["baseline " + "/".join(_TITLES[name] for name in leads), "difference"]
    lines = []
    for task, domain, found in slices:
        line = [task, domain or "all", _count(found["rows"]), _count(found["positives"])]
        line += [_value(found, name, interval=name == lead_metric(found)) for name in leads]
        line += [_value(found, name) for name in rest]
        if baseline is not None:
            line += _against(found, _other(baseline, task, domain))
        lines.append(line)
    return titles, lines


def _other(baseline: Metrics, task: str, domain: str) -> Metrics:
    whole = baseline.get(task, {})
    return whole.get("domains", {}).get(domain, {}) if domain else whole


def _against(found: Metrics, other: Metrics) -> list[str]:
    name = lead_metric(found)
    ours, theirs = found[name]["value"], other.get(name, {}).get("value")
    return [_number(theirs), "-" if ours is None or theirs is None else f"{ours - theirs:+.4f}"]


def _value(found: Metrics, name: str, interval: bool = False) -> str:
    value = found.get(name, {"value": None})
    if not interval or value.get("low") is None:
        return _number(value["value"])
    return f"{_number(value['value'])} [{_number(value['low'])}, {_number(value['high'])}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


# ---------------------------------------------------------------------------------------------------------- comparisons
READING = """\
- Value: mean over seeds; sd: standard deviation over seeds.
- Difference: from the reference, paired by user and seed, with a 95 % interval (not adjusted) from resampling users and
  seeds together.
- Test and training noise: standard errors of the difference from other users and from other seeds.
- p: adjusted by Holm over all lines of its table. A difference is called better or worse below .05. *None found* does
  not say that there is none: `compare.json` has, as `detectable`, the difference that would have been found four times
  in five.
"""


def render_comparison(found: Metrics) -> str:
    """`unbraid.compare.compare`'s numbers as a Markdown page: differences, cost, differences per domain, how to read."""
    main, cost, domains = comparison_cells(found)
    what = f"Test split, one configuration per run, {_seeds(found)}. {budget(found)}"
    parts = ["## Per domain", "", markdown(*domains, left=2)] if domains[1] else []
    notes = [f"- {line}" for line in remarks(found, True)]
    lines = [
        f"# Comparison with `{found['reference']}`",
        "",
        what,
        "",
        markdown(*main, left=2),
        "## Cost",
        "",
        markdown(*cost, left=2),
    ]
    return "\n".join([*lines, *parts, "## How to read it", "", READING.rstrip(), *notes]) + "\n"


def _seeds(found: Metrics) -> str:
    return f"{found['seeds']} seed{'s' * (found['seeds'] > 1)}"


def budget(found: Metrics) -> str:
    """One sentence on the training budgets."""
    each = list(found["budget"].values())
    keys = dict.fromkeys(key for one in each for key in one)
    differ = [key for key in keys if any(key not in one or one[key] != each[0].get(key) for one in each)]
    if not differ:
        shown = [key for key in keys if each[0][key] and not (key == "epochs" and each[0]["steps"])]
        if not shown:  # none was recorded, or what decides is not set
            return "Budget: the table of costs says what each run took."
        return "Equal budget: " + ", ".join(f"{key} {each[0][key]}" for key in shown) + "."
    unequal = {n: ", ".join(f"{k} {v.get(k, '(not read)')}" for k in differ) for n, v in found["budget"].items()}
    return "**Unequal budgets**: " + "; ".join(f"{name}: {text}" for name, text in unequal.items()) + "."


def remarks(found: Metrics, domains: bool) -> list[str]:
    """What a reader of the tables should know of this comparison, one sentence each."""
    lines = []
    if found.get("oracle"):
        lines.append(f"Oracle: {', '.join(found['oracle'])}: selected by labels of the target, a bound and no result.")
    if found["seeds"] == 1:
        lines.append("One seed: training noise is not known and not in the intervals.")
    cells = [(task, domain, at) for task, parts in found["values"].items() for domain, at in parts.items()]
    if other := [task for task, domain, at in cells if not domain and not at["metric"]]:
        lines.append(f"Without the metric that was asked for: {', '.join(other)}.")
    withheld = [(f"{t} / {d}" if d else t, at["why"]) for t, d, at in cells if at["why"] and (domains or not d)]
    if withheld:
        lines.append("Withheld: " + "; ".join(f"{label} ({why})" for label, why in withheld) + ".")
    return lines


Cells = tuple[list[str], list[list[str]]]


def comparison_cells(found: Metrics, brief: bool = False) -> tuple[Cells, Cells, Cells]:
    """Titles and lines of three tables: tasks, cost, domains (those with a value).

    ``brief``, for narrow terminals, leaves out the spread over seeds, the interval and the two kinds of noise.
    """
    cells = [(task, domain, at) for task, domains in found["values"].items() for domain, at in domains.items()]
    metrics = {at["metric"] for _, _, at in cells} - {""}
    one = _TITLES.get(*metrics, *metrics) if len(metrics) == 1 else ""
    titles = [
        "task",
        "run",
        one or "value",
        "sd",
        "difference",
        "95 % interval",
        "test noise",
        "training noise",
        "p (Holm)",
        "reading",
    ]
    tables: tuple[list[list[str]], list[list[str]]] = ([], [])
    for task, domain, at in cells:
        if at["metric"] and not (domain and at["why"]):
            tables[bool(domain)].extend(_compared(found, task, domain, named=not one))
    if brief:
        keep = [0, 1, 2, 4, 8, 9]
        titles, tables = [titles[i] for i in keep], tuple([[x[i] for i in keep] for x in t] for t in tables)  # type: ignore[assignment]
    return (titles, tables[0]), _cost_cells(found), (["task / domain", *titles[1:]], tables[1])


def _compared(found: Metrics, task: str, domain: str, named: bool) -> list[list[str]]:
    """One line per run.  ``named``: its label says of which metric."""
    at = found["values"][task][domain]
    differences = {d["run"]: d for d in found["differences"] if (d["task"], d["domain"]) == (task, domain)}
    label = (f"{task} / {domain}" if domain else task) + (
        f" ({_TITLES.get(at['metric'], at['metric'])})" if named else ""
    )
    lines = []
    for name, metrics in at["runs"].items():
        value = metrics[at["metric"]]
        shown = f"{name} (oracle)" if name in found.get("oracle", ()) else name
        line = [label, shown, _number(value["mean"]), _number(value["sd"])]
        if name in differences:
            lines.append([*line, *_difference(differences[name])])
        else:
            lines.append([*line, "reference" if name == found["reference"] else "-", *[""] * 5])
    return lines


def _difference(d: Metrics) -> list[str]:
    gap = "-" if d["value"] is None else f"{d['value']:+.4f}"
    interval = "-" if d["low"] is None else f"[{d['low']:+.4f}, {d['high']:+.4f}]"
    p = "-" if d["holm"] is None else "< .001" if d["holm"] < 0.001 else f"{d['holm']:.3f}"
    return [gap, interval, _number(d["test_noise"]), _number(d["training_noise"]), p, d["verdict"]]


def _cost_cells(found: Metrics) -> Cells:
    titles = ["run", "trials", "steps, mean", "training s, mean", "parameters in tables", "dense parameters"]
    lines = []
    for name, cost in found["cost"].items():
        line = ["no randomness", "-", "-", "-", "-"]
        if cost:
            sizes, trials = cost["parameters"], f"{cost['configurations']} x {_seeds(found)}"
            line = [
                trials,
                f"{cost['steps']:,.0f}",
                f"{cost['seconds']:,.1f}",
                f"{sizes['tables']:,}",
                f"{sizes['dense']:,}",
            ]
        lines.append([name, *line])
    return titles, lines
