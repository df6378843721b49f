"""A report, or a comparison of runs, as one HTML page that opens without a network.

The page holds its style, its script, the drawing library and all numbers.  A content security policy forbids every request, and
allows the page's own two scripts by their digests alone, so that no name in the data can run as code even if it were not escaped.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from unbraid import render
from unbraid.diagnosis.diagnosis import Diagnosis, Remedy, Report
from unbraid.diagnosis.plots import Bars, Plot, to_plain
from unbraid.evaluate import lower_is_better
from unbraid.report import charts, words

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
MOST_LINES = 1000  # of the table of metrics
MOST_NUMBERS = 200  # lines of a plot's table


def html(report: Report, *, docs: str = "") -> str:
    """The report as a page.

    Args:
        docs: address of the documentation's folder, to which pages link; without it they are named and not linked.

    Raises:
        ImportError: Altair, vl-convert-python or Jinja2 is missing; the message says what to install.
    """
    plots = _Plots()
    cards = [_card(report, found, plots) for found in report.found]
    fine = [_card(report, found, plots) for found in report.diagnoses if found.grade == "none"]
    curves = [plots.add(each) for each in words.curves(report)]
    metrics = _metrics(report)
    shown = (("findings", "Findings", cards), ("results", "Results", metrics), ("training", "Training", curves))
    sections = [("summary", "Summary"), *((id, name) for id, name, there in shown if there)]
    sections += [("looked", "What was looked at"), ("facts", "Facts"), ("glossary", "Words")]
    return _page(
        "report.html.jinja", plots, report=report, cards=cards, fine=fine, curves=curves, metrics=metrics, sections=sections,
        intervals=words.intervals(report),
        headline=words.headline(report), looked_at=words.looked_at(report), replies=words.replies(report),
        docs=docs.rstrip("/") + "/" if docs else "", scale=_scale, plural=words.plural,
        reach=words.reach, reading=words.reading, sure=words.sure, unsure=_unsure,
        place={words.name_of(d): i for i, d in enumerate(report.found, 1)},
    )  # fmt: skip


def compare_html(comparison: Mapping[str, Any], reports: Mapping[str, Report] | None = None) -> str:
    """Several runs as a page: differences with intervals, tables, and what was found in each run.

    Args:
        comparison: of `unbraid.compare.compare`, or its ``compare.json``.
        reports: run -> its report, of some of the runs or of none.

    Raises:
        ValueError: a report of a run that is not compared; ImportError: as `html`.
    """
    found, reports = dict(comparison), dict(reports or {})
    if unknown := [name for name in reports if name not in found["cost"]]:
        raise ValueError(
            f"Reports should be of runs that are compared ({', '.join(found['cost'])}). Found {', '.join(unknown)}."
        )
    plots = _Plots()
    drawn = [plots.add(each) for each in _differences(found)]
    main, cost, domains = render.comparison_cells(found)
    tables = [("Tasks", *main), ("Domains", *domains), ("Cost", *cost)]
    said = [
        _difference_text(d) for d in found["differences"] if not d["domain"] and d["verdict"] in ("better", "worse")
    ]
    shown = (("differences", "Differences", drawn), ("tables", "Tables", tables), ("findings", "Findings", reports))
    sections = [("summary", "Summary"), *((id, name) for id, name, there in shown if there), ("glossary", "Words")]
    return _page(
        "compare.html.jinja", plots, found=found, names=list(found["cost"]), differences=drawn, tables=tables, sections=sections,
        headline=_compared(found), sentences=said, budget=render.budget(found).replace("**", ""),
        remarks=render.remarks(found, True), matrix=_matrix(reports), plural=words.plural,
        verdicts={
            name: {
                "headline": words.headline(each), "looked_at": words.looked_at(each),
                "readings": [f"{d.grade}: {words.name_of(d)}. {words.reading(d)}" for d in each.found],
            }
            for name, each in reports.items()
        },
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- parts of a page
@dataclass(frozen=True)
class Drawn:
    """A plot as the template wants it: specification, text alternative, numbers."""

    id: str
    title: str
    text: str
    spec: Markup
    titles: list[str]
    lines: list[list[str]]
    of: int
    every: int
    zooms: bool
    series: bool

    @property
    def left_out(self) -> bool:
        """Whether the table has fewer lines than the plot has numbers."""
        return self.every > 1


class _Plots:
    """Gives plots of one page their ids, and knows which are there already."""

    def __init__(self) -> None:
        self.count = 0
        self.known: dict[str, Drawn] = {}

    def add(self, plot: Plot) -> Drawn:
        """The plot, drawn here."""
        made = self._made(plot)
        self.known.setdefault(_content(plot), made)
        return made

    def once(self, found: Sequence[Plot]) -> tuple[list[Drawn], list[Drawn]]:
        """Of several plots those that the page has not yet, and those that it has: checks show one plot with many findings."""
        repeated = [self.known[key] for key in map(_content, found) if key in self.known]
        return [self.add(plot) for plot in found if _content(plot) not in self.known], repeated

    def _made(self, plot: Plot) -> Drawn:
        self.count += 1
        titles, lines = charts.numbers(plot)
        every = -(-len(lines) // MOST_NUMBERS)
        return Drawn(
            f"plot-{self.count}", plot.title, charts.caption(plot), _script_json(charts.spec(plot)), titles,
            lines[:: max(1, every)], len(lines), every, plot.kind == "lines", len(getattr(plot, "series", ())) > 1,
        )  # fmt: skip


def _content(plot: Plot) -> str:
    return json.dumps(to_plain(plot))


def _script_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no tag can begin in it."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _card(report: Report, found: Diagnosis, plots: _Plots) -> dict[str, Any]:
    remedies = [_remedy(report, found, remedy) for remedy in found.remedies]
    drawn, repeated = plots.once(found.evidence.get("plots", ()))
    return {"diagnosis": found, "remedies": remedies, "plots": drawn, "repeated": repeated}


def _remedy(report: Report, found: Diagnosis, remedy: Remedy) -> dict[str, Any]:
    file = words.run_file(remedy)
    proofs = [proof for proof in words.proofs_of(report, found) if proof.remedy == remedy.name]
    return {
        "name": remedy.name, "text": remedy.text, "slot": remedy.slot, "page": remedy.page, "file": file,
        "change": words.change(report.toml, file) if report.toml else [], "command": words.to_type(remedy),
        "download": "data:text/plain;charset=utf-8," + quote(file),
        "measure": words.measured(remedy.measure) if remedy.measure else "",
        "metric": words.term(render.metric_name(remedy.measure.metric)) if remedy.measure else "",
        "proofs": [{"text": words.worth(proof), "held": proof.held} for proof in proofs],
    }  # fmt: skip


def _metrics(report: Report) -> dict[str, Any] | None:
    """The table of tasks and domains; of very many domains those with most rows, every task's own line first of all."""
    if not report.metrics:
        return None
    titles, lines = render.metric_cells(dict(report.metrics), dict(report.baseline) or None)
    rows = [found["rows"] + (10**18 if whole else 0) for whole, found in _slices(report)]
    keep = sorted(sorted(range(len(lines)), key=lambda i: -rows[i])[:MOST_LINES])
    return {"titles": titles, "lines": [lines[i] for i in keep], "of": len(lines), "left_out": len(keep) < len(lines)}


def _slices(report: Report) -> list[tuple[bool, Mapping[str, Any]]]:
    """(is it the whole task?, its numbers), in the order of the table's lines."""
    return [
        (d == "", found) for whole in report.metrics.values() for d, found in {"": whole, **whole["domains"]}.items()
    ]


def _scale(found: Diagnosis) -> dict[str, Any]:
    """Where things stand on the drawn scale, in per cent; what lies far beyond stands at its end."""
    gap = found.severe - found.usual
    known = [v for v in (found.value, found.low, found.high) if v is not None]
    left = max(min([*(v - 0.15 * gap for v in known), found.usual - 0.8 * gap]), found.usual - 2 * gap)
    right = min(max([*(v + 0.15 * gap for v in known), found.severe + 0.6 * gap]), found.severe + 3 * gap)

    def at(value: float | None) -> float | None:
        return None if value is None else round(100 * min(1.0, max(0.0, (value - left) / (right - left))), 2)

    places = {part: at(getattr(found, part)) for part in ("value", "low", "high", "usual", "severe")}
    if places["low"] is None or places["high"] is None:
        places["low"] = places["high"] = None
    return {**places, "beyond": found.value > right}


def _unsure(found: Diagnosis) -> str:
    """Why a value above the usual is no finding, else ""."""
    return words.sure(found) if found.value > found.usual else ""


# --------------------------------------------------------------------------------------------------------- comparisons
def _compared(found: Mapping[str, Any]) -> str:
    """One sentence: how many of the differences of tasks are more than chance."""
    whole = [d for d in found["differences"] if not d["domain"]]
    counts = {verdict: sum(d["verdict"] == verdict for d in whole) for verdict in ("better", "worse")}
    if not any(counts.values()):
        return f"No difference from {found['reference']} is more than chance, of {len(whole)} that were looked at."
    parts = " and ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
    return f"Of {words.plural(len(whole), 'difference')} from {found['reference']}, {parts} beyond chance."


def _difference_text(d: Mapping[str, Any]) -> str:
    ends = f" [{words.signed(d['low'])}, {words.signed(d['high'])}]" if d["low"] is not None else ""
    metric = render.metric_name(d["metric"])
    return f"{d['run']} is {d['verdict']} than the reference in {d['task']}: {metric} {words.signed(d['value'])}{ends}."


def _differences(found: Mapping[str, Any]) -> list[Plot]:
    """One plot of bars per metric: each run and task with its interval."""
    whole = [d for d in found["differences"] if not d["domain"] and d["value"] is not None]
    made: list[Plot] = []
    tasks = list(dict.fromkeys(d["task"] for d in whole))
    for metric in dict.fromkeys(d["metric"] for d in whole):
        each = sorted((d for d in whole if d["metric"] == metric), key=lambda d: tasks.index(d["task"]))
        side = "left" if lower_is_better(metric) else "right"
        made.append(
            Bars(
                f"Differences from {found['reference']}", f"difference in {render.metric_name(metric)}",
                tuple(f"{d['task']}: {d['run']}" for d in each), tuple(d["value"] for d in each),
                tuple(d["low"] for d in each), tuple(d["high"] for d in each), x="task and run",
                note=f"Better lies on the {side}. Intervals of 95 %, not adjusted.",
            )
        )  # fmt: skip
    return made


def _matrix(reports: Mapping[str, Report]) -> dict[str, Any] | None:
    """One line per name and place of a diagnosis, one column per run; what some run has a finding in stands first."""
    every = {name: {words.name_of(d): d for d in report.diagnoses} for name, report in reports.items()}
    worst: dict[str, float] = {}
    for found in every.values():
        for name, d in found.items():
            worst[name] = max(worst.get(name, 0.0), d.severity)
    order = sorted(worst, key=lambda name: -worst[name])[:MOST_LINES]
    if not order:
        return None
    cell = {
        run: {name: f"{d.grade}, {words.number(d.value)}" for name, d in found.items()} for run, found in every.items()
    }
    return {
        "titles": ["finding", *reports],
        "lines": [[name, *(cell[run].get(name, "-") for run in reports)] for name in order],
    }


# --------------------------------------------------------------------------------------------------------------- the page
def _page(template: str, plots: _Plots, **parts: Any) -> str:
    from markupsafe import Markup

    script = _asset("page.js")
    bundle = _bundle() if plots.count else ""
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in (script, bundle) if text)
    common = {
        "css": Markup(_asset("page.css")), "script": Markup(script), "bundle": Markup(bundle), "drawn": plots.count > 0,
        "hashes": Markup(hashes), "terms": words.GLOSSARY, "term": words.term,
        "anchor": _anchor, "number": words.number, "name_of": words.name_of,
        "linked": _linked, "starred": _starred, "coded": _coded,
    }  # fmt: skip
    return _environment().get_template(template).render(**common, **parts)


@functools.cache
def _environment() -> jinja2.Environment:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(charts.HINT) from error
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    try:
        import vl_convert
    except ImportError as error:
        raise ImportError(charts.HINT) from error
    made = str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # the stub's mistake: all that is needed, if nothing is asked
    return made.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _anchor(name: str) -> str:
    return "word-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _linked(paper: str) -> Markup:
    """A reference whose arXiv number, DOI or address is a link."""
    from markupsafe import Markup, escape

    pattern = r"(?P<url>https?://[^\s<>\"')]+)|arXiv[: ]*(?P<arxiv>\d{4}\.\d{4,5})|(?P<doi>10\.\d{4,9}/[^\s<>\"',;)]+)"
    said, last = Markup(""), 0
    for hit in re.finditer(pattern, paper):
        known = {"arxiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
        target = known.get(hit.lastgroup or "", "") + hit.group(hit.lastgroup or 0)
        said += escape(paper[last : hit.start()]) + Markup('<a rel="noopener noreferrer" href="{}">{}</a>').format(
            target, hit.group()
        )
        last = hit.end()
    return said + escape(paper[last:])


def _coded(text: str) -> Markup:
    """Names between back-quotes as code; a back-quote without a partner stays."""
    from markupsafe import Markup, escape

    parts = re.split(r"`([^`]+)`", text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _starred(text: str) -> Markup:
    """Emphasis of *words* between stars."""
    from markupsafe import Markup, escape

    parts: Sequence[str] = text.split("*")
    return Markup("").join(
        Markup("<em>{}</em>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts)
    )
