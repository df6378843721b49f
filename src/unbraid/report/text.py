"""A report for the terminal and as Markdown: both say the same in the same order."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.text import Text

from unbraid import render
from unbraid.diagnosis.diagnosis import Report
from unbraid.render import metric_cells, render_table
from unbraid.report.words import (
    Reply,
    change,
    headline,
    intervals,
    looked_at,
    name_of,
    proofs_of,
    reach,
    reading,
    replies,
    run_file,
    sure,
    to_type,
    worth,
)

STYLES = {"severe": "bold red", "moderate": "bold yellow", "mild": "bold cyan"}  # beside the word, never in its place
LEAST = 40  # letters: below that lines are cut by the terminal itself


# ------------------------------------------------------------------------------------------------------------- terminal
def terminal(report: Report, width: int = 118) -> Group:
    """What `rich` prints: the headline, findings with remedies, what was looked at, the table of metrics.

    Args:
        width: letters of a line; words are kept whole, a word longer than a line is broken.
    """
    width = max(width, LEAST)
    parts: list[RenderableType] = [Text(_one_line(report.title), style="bold"), *_wrapped(headline(report), width)]
    parts += _wrapped(looked_at(report), width)
    for i, reply in enumerate(replies(report), 1):
        parts += [Text(""), *_finding(report, reply, i, width)]
    for title, lines in _aside(report):
        if lines:
            parts += [
                Text(""),
                Text(title, style="bold"),
                *(text for line in lines for text in _wrapped(line, width, 2)),
            ]
    if report.metrics:
        parts += [Text(""), render_table(dict(report.metrics), dict(report.baseline) or None, width=width)]
    return Group(*parts)


def _finding(report: Report, reply: Reply, place: int, width: int) -> Iterator[Text]:
    found = reply.diagnosis
    first, *rest = _wrapped(f"{place}. {found.grade}  {name_of(found)}", width, hang=3)
    first.stylize(STYLES[found.grade], len(f"{place}. "), len(f"{place}. {found.grade}"))
    yield from (first, *rest)
    yield from _wrapped(reach(found), width, 3)
    yield from _wrapped(f"{reading(found)} {sure(found)}", width, 3)
    if found.because:
        yield from _wrapped(f"Explained by {found.because}: mend that first.", width, 3)
    for remedy in found.remedies:
        yield from _wrapped(f"> {remedy.name}: {remedy.text}", width, 3, hang=2)
        if command := to_type(remedy):
            yield from _wrapped(f"$ {command}", width, 5, hang=2)
        for proof in (each for each in proofs_of(report, found) if each.remedy == remedy.name):
            yield from _wrapped(worth(proof), width, 5)


def _wrapped(said: str, width: int, indent: int = 0, hang: int = 0) -> list[Text]:
    """Lines of whole words, flush with ``indent``; all but the first ``hang`` letters further in."""
    lines = textwrap.wrap(
        _one_line(said), width, initial_indent=" " * indent, subsequent_indent=" " * (indent + hang), break_on_hyphens=False
    )  # fmt: skip
    return [Text(line) for line in lines]


def _one_line(said: str) -> str:
    """The text without line breaks and without control letters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in said)


def _said(found: Mapping[str, str]) -> list[str]:
    return [f"{name}: {why}" for name, why in found.items()]


# ------------------------------------------------------------------------------------------------------------- Markdown
def markdown(report: Report) -> str:
    """The report as Markdown: summary, findings, metrics, what was looked at, facts."""
    parts = [f"# {_safe(report.title)}", *_summary(report)]
    if report.metrics:
        titles, cells = metric_cells(dict(report.metrics), dict(report.baseline) or None)
        table = render.markdown(titles, [[*map(_safe, cell[:2]), *cell[2:]] for cell in cells], left=2)
        parts += ["## Metrics", f"Test split; intervals: {intervals(report)}.", table.rstrip()]
    short = {name: text for name, text in report.facts.items() if "\n" not in text.strip()}
    parts += _lists(*_aside(report), ("Tasks", _said(report.tasks)), ("Facts", _said(short)))
    for name, text in report.facts.items():
        parts += [] if name in short else [f"## {_safe(name).capitalize()}", _fenced("text", text.strip())]
    return "\n\n".join(parts) + "\n"


def findings(report: Report) -> str:
    """Of the same page what checks say: summary, findings, what was looked at."""
    return "\n\n".join([*_summary(report), *_lists(*_aside(report))]) + "\n"


def _summary(report: Report) -> list[str]:
    cards = [part for i, reply in enumerate(replies(report), 1) for part in _card(report, reply, i)]
    return [f"**{_safe(headline(report))}** {_safe(looked_at(report))}", *(["## Findings", *cards] if cards else [])]


def _aside(report: Report) -> list[tuple[str, list[str]]]:
    fine = [f"{name_of(d)}: {reach(d)}" for d in report.diagnoses if d.grade == "none"]
    return [("Without a finding", fine), ("Not looked at", _said(report.skipped)), ("Failed", _said(report.failed))]


def _lists(*lists: tuple[str, list[str]]) -> list[str]:
    """A heading and a list each, of those that have lines."""
    made = ((f"## {title}", "\n".join(f"- {_safe(line)}" for line in lines)) for title, lines in lists if lines)
    return [part for pair in made for part in pair]


def _card(report: Report, reply: Reply, place: int) -> list[str]:
    found = reply.diagnosis
    parts = [f"### {place}. {_safe(name_of(found))} ({found.grade})", f"{_safe(reading(found))} {_safe(sure(found))}"]
    facts = [reach(found)]
    facts += [f"explained by {found.because}"] if found.because else []
    facts += [f"see docs/{found.page}"] if found.page else []
    facts += [f"after {found.paper}"] if found.paper else []
    parts.append("\n".join(f"- {_safe(fact)}" for fact in facts))
    for remedy in found.remedies:
        parts.append(f"**Remedy {_safe(remedy.name)}.** {_safe(remedy.text)}")
        if report.toml and (lines := change(report.toml, run_file(remedy))):
            parts.append(_fenced("diff", "\n".join(f"{sign}{line}" for sign, line in lines)))
        if command := to_type(remedy):
            parts.append(_fenced("console", f"$ {command}"))
        parts += [_safe(worth(proof)) for proof in proofs_of(report, found) if proof.remedy == remedy.name]
    return parts


def _fenced(language: str, text: str) -> str:
    fence = "`" * max(
        3, 1 + max((len(run) for run in re.findall("`+", text)), default=0)
    )  # a name may hold back-quotes
    return f"{fence}{language}\n{text}\n{fence}"


def _safe(said: str) -> str:
    """Text that Markdown takes for text: names of tasks and columns may be anything."""
    return re.sub(r"([\\`*<>#]|\](?=[(\[:])|(?<!\w)_|_(?!\w))", r"\\\1", _one_line(said))
