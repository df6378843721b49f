"""A run's BibTeX holds what it uses and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from unbraid import recipes
from unbraid.citations import citations
from unbraid.config import UW, Aggregated, PCGrad, Weighted, with_base
from unbraid.data.source import bundled


def keys(text: str) -> list[str]:
    return re.findall(r"^@\w+\{([^,]+),$", text, re.M)


def test_only_the_parts_in_use() -> None:
    assert keys(citations(recipes.stem())) == ["unbraid", "gao2022kuairand", "su2024stem", "kingma2015adam"]
    assert keys(citations(recipes.mmoe())) == ["unbraid", "gao2022kuairand", "ma2018mmoe", "kingma2015adam"]
    assert keys(citations(recipes.shared_bottom())) == ["unbraid", "gao2022kuairand", "kingma2015adam"]


def test_the_bundled_log_is_cited_by_path_too() -> None:
    run = recipes.stem()
    folder = bundled("kuairand")
    assert folder is not None
    moved = replace(run, data=replace(run.data, folder=str(folder)))
    assert citations(moved) == citations(run)


def test_other_data_bring_their_own_citation_or_none(tmp_path: Path) -> None:
    run = recipes.shared_bottom()
    run = with_base(replace(run, data=replace(run.data, folder="log")), tmp_path)
    assert keys(citations(run)) == ["unbraid", "kingma2015adam"]
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "CITATION.bib").write_text("@misc{ours,\n  title = {Our log},\n}\n")
    assert keys(citations(run)) == ["unbraid", "ours", "kingma2015adam"]


def test_is_bibtex() -> None:
    text = citations(recipes.stem())
    assert text.count("{") == text.count("}") and text.endswith("}\n") and "\n\n\n" not in text
    for wanted in ("10.1145/3511808.3557624", "2308.13537", "1412.6980"):
        assert wanted in text


def test_a_class_may_bring_its_own_entry_and_a_derived_one_that_of_its_base() -> None:
    run = replace(recipes.shared_bottom(), update=Aggregated(aggregator=PCGrad()))
    assert keys(citations(run)) == [
        "unbraid",
        "gao2022kuairand",
        "kingma2015adam",
        "quinton2024jacobian",
        "yu2020pcgrad",
    ]
    run = replace(run, update=Weighted(weighting=UW()))
    assert keys(citations(run)) == ["unbraid", "gao2022kuairand", "kingma2015adam", "kendall2018multi"]
