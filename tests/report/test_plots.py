"""Plots as numbers: what is kept of too many, gaps, the plain form, and errors that say what is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from reportkit import plots

from unbraid.diagnosis.plots import (
    KINDS,
    MOST,
    MOST_BARS,
    MOST_LINES,
    Bars,
    Heat,
    Histogram,
    Lines,
    Reliability,
    from_plain,
    histogram,
    to_plain,
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_form_is_json_and_back(kind: str) -> None:
    plot = plots()[kind]
    assert plot.kind == kind
    assert from_plain(json.loads(json.dumps(to_plain(plot)))) == plot


def test_arrays_and_tensors_are_tuples_and_gaps_are_none() -> None:
    made = Lines("t", "x", "y", {"a": (np.arange(3), torch.tensor([1.0, math.nan, math.inf]))})
    assert made.series == {"a": ((0.0, 1.0, 2.0), (1.0, None, None))}
    logged = Lines("t", "x", "y", {"a": ([1, 2, 3], [0, -1, 5])}, log_y=True)
    assert logged.series["a"][1] == (None, None, 5.0)


def test_a_long_line_keeps_its_ends_its_peak_and_its_trough() -> None:
    y = np.sin(np.arange(1_000_000) / 1000)
    y[123_456], y[777_777] = 9.0, -9.0
    made = Lines("t", "x", "y", {"a": (np.arange(1_000_000), y), "b": ([0, 1], [0, 1])})
    xs, ys = made.series["a"]
    assert len(xs) <= MOST // 2 and made.series["b"] == ((0.0, 1.0), (0.0, 1.0))
    points = dict(zip(xs, ys, strict=True))
    assert points[123_456.0] == 9 and points[777_777.0] == -9 and xs[0] == 0 and xs[-1] == 999_999
    assert list(xs) == sorted(xs)
    assert all(y[int(at)] == value for at, value in points.items()), "what is kept is not moved"


def test_a_band_is_thinned_with_its_line() -> None:
    y = np.linspace(0, 1, 5000)
    made = Lines("t", "x", "y", {"a": (np.arange(5000), y)}, low={"a": y - 1}, high={"a": y + 1})
    ys = made.series["a"][1]
    assert [v - 1 for v in ys if v is not None] == list(made.low["a"])
    assert len(made.high["a"]) == len(ys) <= MOST


def test_many_lines_are_the_first_and_the_plot_says_so() -> None:
    made = Lines("t", "x", "y", {str(i): ([0], [i]) for i in range(100)})
    assert list(made.series) == [str(i) for i in range(MOST_LINES)] and "of 100 lines" in made.note


def test_a_large_map_is_the_means_of_its_blocks() -> None:
    values = np.arange(400 * 40, dtype=float).reshape(400, 40)
    made = Heat("t", "x", "y", "v", tuple(map(str, range(400))), tuple(map(str, range(40))), tuple(map(tuple, values)))
    assert len(made.rows) * len(made.columns) <= MOST and "400 x 40" in made.note
    down, right = 400 // len(made.rows), 40 // len(made.columns)
    expected = values.reshape(len(made.rows), down, len(made.columns), right).mean((1, 3))
    np.testing.assert_allclose(np.array(made.values, float), expected)
    assert made.rows[0] == f"0 … {down - 1}"


def test_of_many_bars_the_farthest_stay_in_their_order() -> None:
    values = np.r_[np.zeros(500), [5.0, -7.0], np.zeros(500)]
    made = Bars("t", "y", tuple(map(str, range(1002))), values, low=values - 1, high=values + 1)
    assert len(made.names) == len(made.low) == MOST_BARS and f"{MOST_BARS} of 1,002" in made.note
    at = made.names.index("500")
    assert made.values[at : at + 2] == (5.0, -7.0) and made.low[at : at + 2] == (4.0, -8.0)


def test_histograms_count_by_hand() -> None:
    made = histogram("t", "x", {"a": [0, 0.4, 0.6, 1, math.nan], "b": np.array([1.0, 1.0])}, bins=2)
    assert made.edges == (0.0, 0.5, 1.0) and made.counts == {"a": (2.0, 2.0), "b": (0.0, 2.0)}
    shares = histogram("t", "x", {"a": [0, 0.4, 0.6, 1], "b": [1.0, 1.0]}, bins=2, shares=True)
    assert shares.counts == {"a": (0.5, 0.5), "b": (0.0, 1.0)}


def test_a_million_values_are_forty_bins() -> None:
    made = histogram("t", "rows per id", {"ids": np.random.default_rng(0).pareto(1.0, 1_000_000)})
    assert len(made.counts["ids"]) == 40 and sum(c or 0 for c in made.counts["ids"]) == 1_000_000


MAP = {"x": "x", "y": "y", "value": "v", "rows": ("a",), "columns": ("b",), "values": ((1,),)}
WRONG: tuple[tuple[Any, dict[str, Any], str], ...] = (
    (Lines, {"x": "x", "y": "y", "series": {}}, "at least one line"),
    (Lines, {"x": "x", "y": "y", "series": {"a": ([1, 2], [1])}}, "line `a`"),
    (Lines, {"x": "x", "y": "y", "series": {"a": ([math.nan], [1])}}, "finite"),
    (Lines, {"x": "x", "y": "y", "series": {"a": ([1], [1])}, "low": {"a": [0]}}, "bands"),
    (Bars, {"y": "y", "names": ("a",), "values": (1, 2)}, "as many as `names`"),
    (Bars, {"y": "y", "names": ("a",), "values": (1,), "low": (1,)}, "`low` and `high`"),
    (Bars, {"y": "y", "names": ("a", "b", "a"), "values": (1, 2, 3)}, "Found twice: a"),
    (Heat, {**MAP, "rows": ("a", "a"), "values": ((1,), (2,))}, "Found twice: a"),
    (Heat, {**MAP, "columns": ("b", "b"), "values": ((1, 2),)}, "Found twice: b"),
    (Heat, {**MAP, "values": ((1, 2),)}, "1 rows of 1"),
    (Heat, {**MAP, "scale": "diverging"}, "centre"),
    (Heat, {**MAP, "scale": "rainbow"}, "rainbow"),
    (Histogram, {"x": "x", "edges": (1, 0), "counts": {"a": (1,)}}, "increase"),
    (Histogram, {"x": "x", "edges": (0, 1), "counts": {"a": (-1,)}}, "at least 0"),
    (Histogram, {"x": "x", "edges": (0, 1), "counts": {}}, "one or more names"),
    (Reliability, {"predicted": {"a": (1.2,)}, "happened": {"a": (1,)}, "counts": {"a": (1,)}}, "[0, 1]"),
    (Reliability, {"predicted": {"a": (0.2,)}, "happened": {"b": (1,)}, "counts": {"a": (1,)}}, "same names"),
    (Reliability, {"predicted": {"a": (0.2,)}, "happened": {"a": (1,)}, "counts": {"a": (1, 2)}}, "as many numbers"),
)  # fmt: skip


@pytest.mark.parametrize(("make", "parts", "said"), WRONG)
def test_what_is_wrong_is_said(make: Any, parts: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="the title") as error:
        make(title="the title", **parts)
    assert said in str(error.value)


def test_a_histogram_of_nothing_and_an_unknown_plot() -> None:
    with pytest.raises(ValueError, match="at least one finite value"):
        histogram("t", "x", {"a": [math.nan]})
    with pytest.raises(ValueError, match="lines, bars, heat, histogram, reliability. Found 'pie'"):
        from_plain({"kind": "pie"})
    with pytest.raises(ValueError, match="kind lines.*colour"):
        from_plain({"kind": "lines", "title": "t", "x": "x", "y": "y", "series": {}, "colour": "red"})
