"""The page as a text: well-formed, sealed, small, every plot in words and numbers, no name that could run."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from reportkit import HOSTILE, TASKS, comparison, gaps, hostile, make_report, metrics, plots
from toylog import make_run

from unbraid import config
from unbraid.diagnosis.diagnosis import Diagnosis, Report
from unbraid.diagnosis.plots import MOST, Bars, Heat, Lines, histogram
from unbraid.job import train
from unbraid.report import compare_html, dump, html, load
from unbraid.report.charts import CELL, NARROW, caption, chart, numbers, spec, text
from unbraid.report.page import _coded
from unbraid.report.words import reading
from unbraid.train import Training

pytest.importorskip("altair")

VOID = {"meta", "link", "input", "br", "img", "hr"}
LOADS = {"src", "srcset", "data-src", "poster", "action", "formaction", "background", "xlink:href"}


class Page(HTMLParser):
    """Elements in their order, whether they close as they open, and texts."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"{tag} closes what it did not open"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    reports = {"toy": make_report(), "uw": make_report(diagnoses=make_report().diagnoses[1:], proofs=())}
    return {
        "report": html(make_report()), "hostile": html(hostile()), "linked": html(make_report(), docs="https://docs.example"),
        "healthy": html(make_report(diagnoses=make_report().diagnoses[3:], proofs=(), failed={})),
        "empty": html(replace(make_report(), diagnoses=(), metrics={}, baseline={}, curve=(), skipped={}, failed={}, proofs=())),
        "comparison": compare_html(comparison(), reports), "bare comparison": compare_html(comparison()),
        "hostile comparison": compare_html(comparison((HOSTILE, "like"), (HOSTILE, "uw", "x")), {HOSTILE: hostile()}),
    }  # fmt: skip


NAMES = ["report", "hostile", "linked", "healthy", "empty", "comparison", "bare comparison", "hostile comparison"]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_well_formed_and_its_links_lead_somewhere(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {attrs["href"][1:] for attrs in page.all("a") if attrs["href"].startswith("#")}
    labels = {
        part for _, attrs in page.tags for key in ("aria-labelledby", "aria-describedby", "data-spec") if key in attrs
        for part in attrs[key].split()
    }  # fmt: skip
    assert targets | labels <= set(ids)
    assert [len(page.all(tag)) for tag in ("main", "h1", "header", "footer", "nav")] == [1] * 5
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False)), "a heading's level is left out"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_loaded(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    for tag, attrs in page.tags:
        assert not LOADS & set(attrs), (tag, attrs)
        assert not any(key.startswith("on") for key in attrs), "code in an attribute"
        if tag != "a":
            assert attrs.get("href", "data:,") == "data:,"
        elif not attrs["href"].startswith(("#", "https://arxiv.org/abs/", "https://docs.example/")):
            assert attrs["href"].startswith("data:text/plain") and "download" in attrs
    styles = "".join(data for tag, data in page.texts if tag == "style")
    assert "url(" not in styles and "@import" not in styles
    (policy,) = [attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "connect-src" not in rules
    assert "unsafe" not in rules["script-src"] and len(page.all("script")) >= len(rules["script-src"].split())


@pytest.mark.parametrize("name", ["hostile", "hostile comparison"])
def test_no_name_becomes_an_element(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    scripts = [attrs for attrs in page.all("script") if attrs.get("type") != "application/json"]
    assert len(scripts) == 2 and all(attrs == {} for attrs in scripts), "the bundle and the page's own"
    assert any(HOSTILE in data for tag, data in page.texts if tag in ("h3", "th", "td", "p", "a")), (
        "it stands there as a text"
    )
    inline = [data for tag, data in page.texts if tag == "script" and data.lstrip().startswith("{")]
    assert (
        inline and all("<" not in data for data in inline) and any(HOSTILE in json.dumps(json.loads(d)) for d in inline)
    )


def test_sizes(pages: dict[str, str]) -> None:
    assert len(pages["empty"]) < 40_000, "without plots there is no library"
    assert len(pages["report"]) < 1_200_000


def test_every_plot_has_its_words_and_its_numbers(pages: dict[str, str]) -> None:
    page = Page(pages["report"])
    drawn = [attrs["id"] for _, attrs in page.tags if attrs.get("class") == "plot"]
    specs = {attrs["id"] for attrs in page.all("script") if "id" in attrs}
    assert len(drawn) == 7 and specs == {f"{id}-spec" for id in drawn}
    described = {attrs["aria-describedby"] for attrs in page.all("figure")}
    assert described == {attrs["id"] for attrs in page.all("figcaption")} == {f"{id}-text" for id in drawn}
    source = pages["report"]
    for figure in re.findall(r"<figure.*?</figure>", source, re.S):
        assert "<details><summary>Numbers of this plot" in figure and "<caption>" in figure and "<td" in figure


def test_tables_have_captions_scopes_and_orders(pages: dict[str, str]) -> None:
    page = Page(pages["comparison"])
    assert len(page.all("table")) == len(page.all("caption"))
    assert {attrs["scope"] for attrs in page.all("th")} == {"col", "row"}
    sortable = re.search(r'<table class="left-2 sortable">.*?</thead>', pages["report"], re.S)
    assert sortable and sortable[0].count('aria-sort="none"') == sortable[0].count('<button type="button">') == 11


def test_the_summary_answers_and_says_when_there_is_nothing(pages: dict[str, str]) -> None:
    text = " ".join(data for _, data in Page(pages["report"]).texts)
    for said in (
        "3 findings: 1 severe, 2 mild.",
        "What is wrong",
        "is severe",
        "What to do",
        "it helps (unequal budgets: 200 steps in 11.2 s as it is, 600 steps in 35.1 s with it).",
        "Not tried yet.",
    ):
        assert said in text
    healthy = " ".join(data for _, data in Page(pages["healthy"]).texts)
    assert "Nothing was found" in healthy and "overfit" in healthy and "no history encoder scores events" in healthy
    assert 'id="findings"' not in pages["healthy"]


def test_titles_link_to_their_words(pages: dict[str, str]) -> None:
    head = re.search(r'<table class="left-2 sortable">.*?</thead>', pages["report"], re.S)
    assert head
    assert {"AUC", "GAUC", "log-loss", "calibration", "ECE", "rows", "positives", "baseline", "difference"} <= set(
        re.findall(r'aria-label="(.*?): what it means"', head[0])
    )


def test_pages_are_linked_where_the_docs_have_an_address(pages: dict[str, str]) -> None:
    assert '<a href="https://docs.example/methods/uw.md">' in pages["linked"]
    assert "<code>docs/methods/uw.md</code>" in pages["report"]


def test_a_page_of_many_full_plots_and_a_million_ids_stays_small() -> None:
    rng = np.random.default_rng(0)
    seen = np.sort(rng.pareto(1.0, 1_000_000))[::-1]
    ids, wide = np.arange(1, 1_000_001), tuple(map(str, range(500)))
    many = (
        Lines("Rows per id", "rank of the id", "rows", {"all": (ids, seen)}, log_x=True, log_y=True),
        histogram("Rows per id", "rows", {"all": seen}, log_y=True),
        Bars("Ids", "rows", tuple(map(str, range(100_000))), seen[:100_000]),
        Heat("Map", "id", "id", "v", wide, wide, tuple(map(tuple, rng.normal(size=(500, 500))))),
    )  # fmt: skip
    for plot in many:
        made = spec(plot)
        rows = [row for part in (made, *made["layer"]) for row in part.get("data", {}).get("values", [])]
        assert 0 < len(rows) <= MOST + 2
    found = [Diagnosis("ids", str(i), 2.0, 0.0, 1.0, "r", evidence={"plots": many}) for i in range(6)]
    sites = {str(i): metrics(1.0)["click"]["domains"]["home"] for i in range(5000)}
    many_sites = {"click": {**metrics(1.0)["click"], "domains": sites}}
    page = html(make_report(diagnoses=tuple(found), metrics=many_sites, baseline=many_sites))
    assert len(page) < 5_000_000
    assert "The 1000 of 5001 lines with most rows" in page


def test_the_example_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    (text,) = re.findall(r"^```python\n(.*?)^```", source, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "report.md", "exec"), {})
    assert "What training together did" in (tmp_path / "report.html").read_text()
    assert "transfer: like (severe)" in capsys.readouterr().out


def test_a_plot_of_several_findings_is_drawn_once_and_linked() -> None:
    report = make_report()
    one, other, *rest = report.diagnoses
    shown = plots()
    both = [
        replace(each, evidence={"plots": (shown["heat"], shown[kind])})
        for each, kind in ((one, "bars"), (other, "lines"))
    ]
    made = html(replace(report, diagnoses=(*both, *(replace(each, evidence={}) for each in rest)), curve=()))
    assert len(re.findall(r'class="plot"', made)) == 3
    assert len(set(re.findall(r'class="plot" id="(.*?)"', made))) == 3
    (link,) = re.findall(r'Shown above: <a href="#(.*?)-title">(.*?)</a>', made)
    assert link[1].replace("&#39;", "'") == plots()["heat"].title and f'id="{link[0]}-title"' in made


def test_plots_of_what_is_no_finding_are_folded_away() -> None:
    made = html(make_report())
    fine = made[made.index("Without a finding") : made.index('id="facts"')]
    assert fine.count('<details class="plots"><summary>1 plot</summary>') == 1 and fine.count('class="plot"') == 1
    assert made.count('<details class="plots">') == 1


def test_names_between_back_quotes_are_code_and_readings_are_whole_sentences() -> None:
    found = replace(make_report().diagnoses[0], reading="Table `a<b` is odd", remedies=())
    made = html(make_report(diagnoses=(found,)))
    assert made.count("Table <code>a&lt;b</code> is odd.") == 2  # in the summary and on the card
    assert "Not tried yet." not in made
    assert reading(found) == "Table `a<b` is odd." and reading(replace(found, reading="So?")) == "So?"
    assert str(_coded("a ` b")) == "a ` b" and str(_coded("`x` and `y")) == "<code>x</code> and `y"


def test_a_telephone_has_shorter_names_and_no_number_that_does_not_fit_its_cell() -> None:
    names = tuple(f"profile_enter/onehot_feat{i}" for i in range(9))
    made = json.dumps(spec(Lines("t", "x", "y", {name: ([0, 1], [0, 1]) for name in names})))
    assert json.dumps({"expr": f"{NARROW} ? 1 : 2"}) in made and json.dumps({"expr": f"{NARROW} ? 260 : 320"}) in made
    assert '"columns": 2' in json.dumps(spec(Lines("t", "x", "y", {name: ([0, 1], [0, 1]) for name in "ab"})))
    heat = json.dumps(spec(Heat("t", "x", "y", "v", ("a",), names, (tuple(range(9)),))))
    assert f'"test": "width >= {9 * CELL}"' in heat


def test_a_column_of_a_map_without_any_value_keeps_its_place() -> None:
    made = spec(Heat("t", "x", "y", "v", ("a", "b"), ("1", "2", "3"), ((1, None, 2), (None, None, None))))
    across, down = (made["layer"][0]["encoding"][axis]["scale"]["domain"] for axis in "xy")
    assert list(across) == ["1", "2", "3"] and list(down) == ["a", "b"]


def test_a_trained_run_has_its_numbers_and_its_curves(log: pl.DataFrame, tmp_path: Path) -> None:
    run = make_run(update=config.Weighted(lr=0.01), training=Training(batch_size=64, steps=4, evaluate_every=2))
    made = train(run, tmp_path / "run", tables={"log": log})
    curve = tuple(json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    report = Report("toy", {}, {}, made.metrics["test"], made.metrics["baseline"] or {}, curve, toml=config.dumps(run))
    assert load(dump(report)) == report
    text = " ".join(data for _, data in Page(html(report)).texts)
    for title in (
        "Training loss",
        "AUC on validation rows",
        "Weights of the losses",
        "baseline AUC",
        "Nothing was measured",
    ):
        assert title in text
    assert f"{made.metrics['test']['click']['auc']['value']:.4f}" in text


# ---------------------------------------------------------------------------------------------------------------- charts
@pytest.mark.parametrize("kind", list(plots()))
def test_a_chart_has_its_words_axes_and_tips(kind: str) -> None:
    plot = plots()[kind]
    made = chart(plot).to_dict()  # held against Vega-Lite's schema
    assert made == spec(plot)
    assert made["description"] == text(plot) == f"{plot.title}. {caption(plot)}" and made["width"] == "container"
    titles = re.findall(r'"title": "(.*?)"', json.dumps(made))
    for axis in ("x", "y", "value"):
        if shown := getattr(plot, axis, ""):
            assert shown in titles
    assert '"tooltip"' in json.dumps(made)
    names, lines = numbers(plot)
    assert lines and all(len(line) == len(names) for line in lines)


def test_what_plots_say_in_words() -> None:
    shown = plots()
    assert "after: from 1 at 1 to 0.003906 at 16" in caption(shown["lines"])
    assert (
        caption(shown["bars"])
        == "Difference in AUC of 3: lowest like (-0.024), highest click (0.011). Of like it took."
    )
    assert "lowest -0.42 (click, like), highest 1 (long_view, long_view)" in caption(shown["heat"])
    assert "widest gap where 0.45 is predicted and 0.327 happened" in caption(shown["reliability"])
    assert "limit" in json.dumps(spec(shown["histogram"]))
    assert caption(Bars("t", "gain", ("a",), (None,))) == "Gain. No values."
    assert all(caption(plot).endswith("No values.") for plot in gaps() if plot.kind != "histogram")
    many = Lines("t", "x", "y", {f"line {i}": ([0, 1], [i, i]) for i in range(9)})
    assert "line 2" in caption(many) and "line 3" not in caption(many) and "6 more in the table" in caption(many)


def test_a_diverging_map_reaches_equally_far_to_both_sides() -> None:
    layers = spec(plots()["heat"])["layer"]
    scale = layers[0]["encoding"]["color"]["scale"]
    assert scale["domain"] == [-1.0, 1.0] and scale["domainMid"] == 0
    assert numbers(plots()["heat"]) == (["other task / task", *TASKS], [
        ["click", "1", "-0.42", "0.1"], ["like", "-0.42", "1", "0.31"], ["long_view", "0.1", "0.31", "1"],
    ])  # fmt: skip


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ImportError, match=r'pip install "unbraid\[report\]"'):
        html(make_report())


# ----------------------------------------------------------------------------------------------------------- comparisons
def test_a_comparison_says_what_differs(pages: dict[str, str]) -> None:
    text = " ".join(" ".join(data for _, data in Page(pages["comparison"]).texts).split())
    assert "beyond chance" in text and "Equal budget: batch_size 64, steps 200." in text
    found = [d for d in comparison()["differences"] if d["verdict"] in ("better", "worse") and not d["domain"]]
    assert found, "the kit's runs differ"
    for d in found:
        assert f"{d['run']} is {d['verdict']} than the reference in {d['task']}: AUC" in text
    assert "severe, 0.42" in text and "Grade and value of what checks found" in text
    assert "Findings of each run" not in pages["bare comparison"]


def test_a_report_of_another_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"toy, uw, worse\)\. Found other"):
        compare_html(comparison(), {"other": make_report()})
