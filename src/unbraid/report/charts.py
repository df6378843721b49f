"""The plots of `unbraid.diagnosis.plots` as Altair charts (Vega-Lite), each with a text alternative and its numbers.

Colours are those of the page's theme (`page.js`), so that a chart is readable in the light and in the dark: a chart names
roles (category, ramp, diverging), never a colour.  Nothing is told by colour alone: lines differ in their dashes too, maps have
their numbers in the cells where there is room, and every number stands in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from unbraid.diagnosis.plots import Bars, Heat, Histogram, Lines, Numbers, Plot, Reliability
from unbraid.report.words import number, plural

if TYPE_CHECKING:
    import altair as alt

HINT = 'A report as a page needs Altair, vl-convert-python and Jinja2: pip install "unbraid[report]"'
HEIGHT = 260  # of a chart with two axes, in pixels
ROW = 24  # of a bar or of a row of a map
WRITTEN = 150  # cells of a map with their number in them,
CELL = 44  # each at least so wide, in pixels
NARROW = "containerSize()[0] < 480"  # a telephone: names are cut short, and stand one below the other
SHORT = 12  # letters of names of which two stand side by side there

Table = tuple[list[str], list[list[str]]]


def spec(plot: Plot) -> dict[str, Any]:
    """The chart as a Vega-Lite specification, as wide as where it stands, its text alternative as description.

    It is not held against Vega-Lite's schema, which takes longer than all else; tests do that.
    """
    try:
        from altair.utils.schemapi import debug_mode
    except ImportError as error:
        raise ImportError(HINT) from error
    with debug_mode(False):
        return chart(plot).to_dict(validate=False)


def chart(plot: Plot) -> alt.LayerChart:
    """The chart.  Raises ImportError that says what to install."""
    try:
        import altair as alt
    except ImportError as error:
        raise ImportError(HINT) from error
    makers: dict[str, Callable[..., Any]] = {
        "lines": _lines, "bars": _bars, "heat": _heat, "histogram": _histogram, "reliability": _reliability,
    }  # fmt: skip
    return makers[plot.kind](alt, plot).properties(width="container", description=text(plot))


# ------------------------------------------------------------------------------------------------------------ the charts
def _lines(alt: Any, plot: Lines) -> Any:
    rows = [
        {"x": x, "y": _short(y), "s": name}
        for name, (xs, ys) in plot.series.items()
        for x, y in zip(xs, ys, strict=True)
    ]
    bands = [
        {"x": x, "low": _short(low), "high": _short(high), "s": name}
        for name in plot.low
        for x, low, high in zip(plot.series[name][0], plot.low[name], plot.high[name], strict=True)
        if low is not None and high is not None
    ]
    whole = all(x is not None and x.is_integer() for xs, _ in plot.series.values() for x in xs)
    across = alt.Scale(type="log") if plot.log_x else alt.Scale(zero=False, nice=False, padding=10)
    x = alt.X("x:Q", title=plot.x, scale=across, axis=alt.Axis(**({"tickMinStep": 1, "format": ",d"} if whole else {})))
    axis = alt.Y("y:Q", title=plot.y, scale=_scale(alt, plot.log_y))
    order = list(plot.series)
    colour, dash = _series(alt, order), _dashes(alt, order)
    chosen, zoom = _chosen(alt), alt.selection_interval(bind="scales", zoom="wheel![event.shiftKey]", name="zoom")
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=axis, color=colour)
    fade = alt.condition(chosen, alt.value(1), alt.value(0.12))
    how = "step-after" if plot.steps else "linear"
    # one point per value, invisible in long lines, to hover and to read out
    points = base.mark_point(filled=True, size=30 if len(rows) <= 100 else 12, aria=False).encode(
        opacity=fade if len(rows) <= 200 else alt.value(0), tooltip=_tips(alt, ("s:N", "line"), ("x:Q", plot.x), ("y:Q", plot.y))
    )  # fmt: skip
    parts = [base.mark_line(interpolate=how, aria=False).encode(strokeDash=dash, opacity=fade), points]
    if bands:
        band = alt.Chart(alt.Data(values=bands)).mark_area(opacity=0.2, interpolate=how, aria=False)
        parts.insert(0, band.encode(x=x, y=alt.Y("low:Q", title=plot.y), y2="high:Q", color=colour))
    if plot.reference is not None:
        parts.append(_rule(alt, y=plot.reference))
    parts[0] = parts[0].add_params(chosen, zoom)  # a legend listens for the first layer that it stands for
    return alt.layer(*parts).properties(height=HEIGHT)


def _bars(alt: Any, plot: Bars) -> Any:
    ends = zip(plot.low or [None] * len(plot.names), plot.high or [None] * len(plot.names), strict=True)
    rows = [
        {"n": name, "v": _short(value), "low": _short(low), "high": _short(high), "from": plot.reference}
        for name, value, (low, high) in zip(plot.names, plot.values, ends, strict=True)
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("n:N", sort=None, title=plot.x or None, axis=_names(alt), scale=alt.Scale(domain=plot.names))
    )
    tips = _tips(
        alt, ("n:N", plot.x or "name"), ("v:Q", plot.y), *((("low:Q", "low"), ("high:Q", "high")) if plot.low else ())
    )
    x = alt.X("v:Q", title=plot.y, scale=alt.Scale(zero=False))
    parts = [
        base.mark_bar(height={"band": 0.6}, aria=any(value is not None for value in plot.values)).encode(
            x=x, x2="from:Q", tooltip=tips
        )
    ]
    if plot.low:
        whisker = base.transform_filter("isValid(datum.low) && isValid(datum.high)")
        parts.append(whisker.mark_rule(strokeWidth=2, aria=False).encode(x="low:Q", x2="high:Q", tooltip=tips))
        parts += [whisker.mark_tick(thickness=2, height=9, aria=False).encode(x=f"{end}:Q") for end in ("low", "high")]
    parts.append(_rule(alt, x=plot.reference))
    return alt.layer(*parts).properties(height=ROW * len(plot.names))


def _heat(alt: Any, plot: Heat) -> Any:
    known = [value for row in plot.values for value in row if value is not None]
    middle = plot.centre if plot.centre is not None else min(known, default=0.0)
    most = max((abs(value - middle) for value in known), default=0.0) or 1.0
    written = len(known) <= WRITTEN and len(plot.columns) <= 10
    rows = [
        {"r": row, "c": column, "v": _short(value)}
        | ({"t": f"{value:.2g}", "far": abs(value - middle) > most * 0.75} if written else {})
        for row, values in zip(plot.rows, plot.values, strict=True)
        for column, value in zip(plot.columns, values, strict=True)
        if value is not None
    ]
    if plot.scale == "diverging":  # equal colours are equally far from the centre
        scale = alt.Scale(domain=[middle - most, middle + most], domainMid=middle, interpolate="rgb")
    else:
        scale = alt.Scale(domain=[middle, max(known, default=1.0)], interpolate="rgb")
    turned = _names(alt, labelAngle=0 if _narrow(plot.columns) else -40, labelLimit=110)
    # domains: what has no value keeps its place
    across = alt.X("c:N", sort=None, title=plot.x, axis=turned, scale=alt.Scale(domain=plot.columns))
    down = alt.Y("r:N", sort=None, title=plot.y, axis=_names(alt), scale=alt.Scale(domain=plot.rows))
    base = alt.Chart(alt.Data(values=rows)).encode(x=across, y=down)
    legend = alt.Legend(title=plot.value, gradientLength=160, orient="bottom", titleLimit=260)
    colour = alt.Color("v:Q", scale=scale, legend=legend)
    said = 0 < len(rows) <= 60  # above, a screen reader is better served by the table
    tips = _tips(alt, ("r:N", plot.y), ("c:N", plot.x), ("v:Q", plot.value))
    parts = [base.mark_rect(aria=said).encode(color=colour, tooltip=tips)]
    if written:
        room = alt.condition(f"width >= {CELL * len(plot.columns)}", alt.value(1), alt.value(0))
        for style, far in (("far", "datum.far"), ("near", "!datum.far")):
            marked = base.transform_filter(far).mark_text(style=style, aria=False)
            parts.append(marked.encode(text="t:N", tooltip=tips, opacity=room))
    return alt.layer(*parts).properties(height=(ROW if len(plot.rows) <= 60 else 9) * len(plot.rows))


def _histogram(alt: Any, plot: Histogram) -> Any:
    several = len(plot.counts) > 1
    floor = min((c for each in plot.counts.values() for c in each if c), default=1.0) / 2 if plot.log_y else 0.0
    rows = [
        {"a": _short(a), "b": _short(b), "y": _short(count), "s": name, "from": floor}
        for name, counts in plot.counts.items()
        for a, b, count in zip(plot.edges, plot.edges[1:], counts, strict=False)
        if count or not plot.log_y
    ]
    order = list(plot.counts)
    scale = alt.Scale(type="log", domainMin=floor, nice=False) if plot.log_y else alt.Scale(zero=True)
    tips = _tips(alt, *((("s:N", "of"),) if several else ()), ("a:Q", "from"), ("b:Q", "to"), ("y:Q", plot.y))
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("a:Q", title=plot.x, scale=alt.Scale(zero=False)), x2="b:Q", tooltip=tips,
        y=alt.Y("y:Q", title=plot.y, scale=scale), y2="from:Q",
    )  # fmt: skip
    bars = base.mark_bar(binSpacing=0 if several else 1, aria=False)
    if several:
        chosen = _chosen(alt)
        bars = bars.encode(
            color=_series(alt, order, "square"), opacity=alt.condition(chosen, alt.value(0.6), alt.value(0.05))
        )
        bars = bars.add_params(chosen)
    marks = [{"x": x, "n": name} for name, x in plot.marks.items()]
    lines = alt.Chart(alt.Data(values=marks)).encode(x="x:Q", tooltip=_tips(alt, ("n:N", "mark"), ("x:Q", plot.x)))
    label = lines.mark_text(align="left", dx=4, dy=-4, style="mark", aria=False).encode(text="n:N", y=alt.value(0))
    return alt.layer(bars, *((lines.mark_rule(style="reference", aria=False), label) if marks else ())).properties(
        height=HEIGHT
    )


def _reliability(alt: Any, plot: Reliability) -> Any:
    rows: list[dict[str, Any]] = []
    for name in plot.predicted:
        gaps: Numbers = (None,) * len(plot.predicted[name])
        parts = (
            plot.predicted[name],
            plot.happened[name],
            plot.counts[name],
            plot.low.get(name, gaps),
            plot.high.get(name, gaps),
        )
        rows += [{"s": name, **dict(zip("xynlh", map(_short, each), strict=True))} for each in zip(*parts, strict=True)]
    rows = [row for row in rows if row["x"] is not None and row["y"] is not None]
    chosen = _chosen(alt)
    most = max([1e-3, *(row[key] for row in rows for key in "xyh" if row[key] is not None)])
    scale = alt.Scale(domain=[0, min(1.0, most * 1.05)], nice=False)
    tips = _tips(alt, ("s:N", "of"), ("x:Q", plot.x), ("y:Q", plot.y), ("n:Q", "rows"))
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("x:Q", title=plot.x, scale=scale), color=_series(alt, list(plot.predicted)),
        opacity=alt.condition(chosen, alt.value(1), alt.value(0.12)), tooltip=tips,
    )  # fmt: skip
    y = alt.Y("y:Q", title=plot.y, scale=scale)
    end = min(1.0, most * 1.05)
    diagonal = alt.Chart(alt.Data(values=[{"x": 0, "y": 0}, {"x": end, "y": end}])).mark_line(
        style="reference", aria=False
    )
    whisker = base.transform_filter("isValid(datum.l)").mark_rule(aria=False)
    order = list(plot.predicted)
    line = base.mark_line(aria=False).encode(y=y, strokeDash=_dashes(alt, order))
    shape = alt.Shape("s:N", scale=alt.Scale(domain=order), legend=None)
    return alt.layer(
        diagonal.encode(x="x:Q", y="y:Q"), whisker.encode(y="l:Q", y2="h:Q").add_params(chosen), line,
        base.mark_point(filled=True, size=60, aria=bool(rows)).encode(y=y, shape=shape),
    ).properties(height=HEIGHT)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- their parts
def _scale(alt: Any, log: bool) -> Any:
    return alt.Scale(type="log") if log else alt.Scale(zero=False)


def _series(alt: Any, order: list[str], symbol: str = "stroke") -> Any:
    """Colour by series, whose legend turns series on and off; without a legend where there is one series."""
    return alt.Color("s:N", scale=alt.Scale(domain=order), legend=_legend(alt, order, symbol))


def _dashes(alt: Any, order: list[str]) -> Any:
    """Dashes by series, in the legend of the colours."""
    return alt.StrokeDash("s:N", scale=alt.Scale(domain=order), legend=_legend(alt, order, "stroke"))


def _legend(alt: Any, order: list[str], symbol: str) -> Any:
    longest = max(map(len, order), default=0)
    columns = 2 if longest <= SHORT else alt.ExprRef(f"{NARROW} ? 1 : 2")
    limit = alt.ExprRef(f"{NARROW} ? {'130' if longest <= SHORT else '260'} : 320")
    shown = {"orient": "bottom", "columns": columns, "labelLimit": limit, "symbolType": symbol, "symbolOpacity": 1}
    return alt.Legend(title=None, symbolSize=400 if symbol == "stroke" else 100, **shown) if len(order) > 1 else None


def _chosen(alt: Any) -> Any:
    return alt.selection_point(fields=["s"], bind="legend", name="chosen")


def _rule(alt: Any, **where: float) -> Any:
    (axis, value), *_ = where.items()
    data = alt.Chart(alt.Data(values=[{axis: value}]))
    return data.mark_rule(style="reference", aria=False).encode(**{axis: f"{axis}:Q"})


def _names(alt: Any, **more: Any) -> Any:
    limit = alt.ExprRef(f"{NARROW} ? 150 : 300")
    return alt.Axis(**{"labelLimit": limit, "labelPadding": 6, "ticks": False, "domain": False, **more})


def _tips(alt: Any, *parts: tuple[str, str]) -> list[Any]:
    return [
        alt.Tooltip(field, title=title, **({"format": ",.4~g"} if field.endswith("Q") else {}))
        for field, title in parts
    ]


def _narrow(names: tuple[str, ...]) -> bool:
    return len(names) * max(map(len, names)) <= 40


def _short(value: float | None) -> float | None:
    """Six digits that count: what can be seen, and a third of the letters."""
    return None if value is None else float(f"{value:.6g}")


# ------------------------------------------------------------------------------------------------- the text alternative
def text(plot: Plot) -> str:
    """Title, and what the plot shows."""
    return f"{plot.title}. {caption(plot)}"


def caption(plot: Plot) -> str:
    """What the plot shows, in words and with its most telling numbers."""
    said = {
        "lines": _lines_text, "bars": _bars_text, "heat": _heat_text, "histogram": _histogram_text,
        "reliability": _reliability_text,
    }[plot.kind](plot)  # type: ignore[operator]  # fmt: skip
    return said[0].upper() + said[1:] + (f" {plot.note}" if plot.note else "")


def _lines_text(plot: Lines) -> str:
    parts = []
    for name, (xs, ys) in plot.series.items():
        known = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]
        if known:
            (a, first), (b, last) = known[0], known[-1]
            values = [y for _, y in known]
            parts.append(
                f"{name}: from {number(first)} at {number(a)} to {number(last)} at {number(b)}, "
                f"between {number(min(values))} and {number(max(values))}"
            )
    return f"{plural(len(plot.series), 'line')} of {plot.y} over {plot.x}. " + _listed(parts)


def _bars_text(plot: Bars) -> str:
    known = sorted((v, n) for n, v in zip(plot.names, plot.values, strict=True) if v is not None)
    if not known:
        return f"{plot.y}. No values."
    (least, low), (most, high) = known[0], known[-1]
    return f"{plot.y} of {len(plot.names)}: lowest {low} ({number(least)}), highest {high} ({number(most)})."


def _heat_text(plot: Heat) -> str:
    known = [
        (value, row, column)
        for row, values in zip(plot.rows, plot.values, strict=True)
        for column, value in zip(plot.columns, values, strict=True)
        if value is not None
    ]
    if not known:
        return f"A map of {plot.value}. No values."
    low, high = min(known), max(known)
    return (
        f"A map of {plot.value}, {len(plot.rows)} x {len(plot.columns)}: lowest {number(low[0])} ({low[1]}, {low[2]}), "
        f"highest {number(high[0])} ({high[1]}, {high[2]})."
    )


def _histogram_text(plot: Histogram) -> str:
    parts = []
    for name, counts in plot.counts.items():
        top = max(range(len(counts)), key=lambda i: counts[i] or 0.0)
        parts.append(f"{name}: most from {number(plot.edges[top])} to {number(plot.edges[top + 1])}")
    ends = f"{number(plot.edges[0])} to {number(plot.edges[-1])}"
    return f"{plot.y} of {plot.x}, from {ends}. " + _listed(parts)


def _reliability_text(plot: Reliability) -> str:
    parts = []
    for name, predicted in plot.predicted.items():
        gaps = [
            (abs(p - h), p, h)
            for p, h in zip(predicted, plot.happened[name], strict=True)
            if p is not None and h is not None
        ]  # fmt: skip
        if gaps:
            _, p, h = max(gaps)
            parts.append(f"{name}: widest gap where {number(p)} is predicted and {number(h)} happened")
    return f"{plot.y} against {plot.x}; the diagonal is right. " + _listed(parts)


def _listed(parts: list[str], most: int = 3) -> str:
    """The first parts as a sentence."""
    more = [f"{len(parts) - most} more in the table"] * (len(parts) > most)
    return "; ".join(parts[:most] + more) + "." if parts else "No values."


# ------------------------------------------------------------------------------------------------------------- the numbers
def numbers(plot: Plot) -> Table:
    """Titles and lines of the plot's numbers."""
    if isinstance(plot, Lines):
        return _lines_numbers(plot)
    if isinstance(plot, Bars):
        titles = [plot.x or "name", plot.y, *(("low", "high") if plot.low else ())]
        columns = (plot.values, *((plot.low, plot.high) if plot.low else ()))
        return titles, [[n, *map(number, each)] for n, *each in zip(plot.names, *columns, strict=True)]
    if isinstance(plot, Heat):
        lines = [[row, *map(number, values)] for row, values in zip(plot.rows, plot.values, strict=True)]
        return [f"{plot.y} / {plot.x}", *plot.columns], lines
    if isinstance(plot, Histogram):
        ends = list(zip(plot.edges, plot.edges[1:], strict=False))
        parts = zip(ends, *plot.counts.values(), strict=True)
        return ["from", "to", *plot.counts], [[number(a), number(b), *map(number, each)] for (a, b), *each in parts]
    titles = ["of", plot.x, plot.y, "rows"]
    lines = [
        [name, *map(number, each)]
        for name in plot.predicted
        for each in zip(plot.predicted[name], plot.happened[name], plot.counts[name], strict=True)
    ]
    return titles, lines


def _lines_numbers(plot: Lines) -> Table:
    """One column per line where all have the same abscissas, else one row per point."""
    across = {xs for xs, _ in plot.series.values()}
    if len(across) == 1:
        columns = [plot.series[name][1] for name in plot.series]
        return [plot.x, *plot.series], [list(map(number, each)) for each in zip(*across, *columns, strict=True)]
    points = [(name, x, y) for name, (xs, ys) in plot.series.items() for x, y in zip(xs, ys, strict=True)]
    return ["line", plot.x, plot.y], [[name, number(x), number(y)] for name, x, y in points]
