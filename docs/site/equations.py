"""The pages' LaTeX as MathML, which a browser draws by itself: no script, no font, nothing from a network.

The pages hold it as GitHub reads it: a fence ``math``, or ``$...$`` in a sentence.  latex2mathml lets through what it does not
know; here that is an error.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert

CHILDREN = {"mfrac": 2, "msub": 2, "msup": 2, "mover": 2, "munder": 2, "mroot": 2, "msubsup": 3, "munderover": 3}
ENVIRONMENTS = {"aligned", "cases", "array", "pmatrix"}
FOUND = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.S)  # what arithmatex leaves
CLOSING = frozenset(")]}⟩⌉⌋")
PUNCTUATION = re.compile(r"\\[^A-Za-z\s]")
NAME = re.compile(r"\\mathrm\{([A-Za-z]{2,})\}")  # of a function
SPACE = "0.167em"


class EquationError(ValueError):
    """LaTeX that is no equation, or none that latex2mathml knows."""


def mathml(latex: str, display: bool) -> str:
    """One equation as an element ``math``; EquationError where it cannot be converted whole."""
    braces = re.sub(r"\\\\|\\[{}]", "", latex)
    if braces.count("{") != braces.count("}"):
        raise EquationError("braces do not match")
    if unknown := set(re.findall(r"\\begin\{(.*?)\}", latex)) - ENVIRONMENTS:
        raise EquationError(
            f"unknown environment {', '.join(sorted(unknown))}; known: {', '.join(sorted(ENVIRONMENTS))}"
        )
    if "\\operatorname" in latex:
        raise EquationError(r"GitHub does not allow \operatorname: write \mathrm{name}")
    if not display and (marks := PUNCTUATION.search(latex)):
        raise EquationError(
            f"GitHub's Markdown takes the backslash from {marks[0]} in $...$: use a fence `math`, or a word"
        )
    try:
        # to latex2mathml mathrm is letter by letter
        known = NAME.sub(r"\\operatorname{\1}", latex.strip().replace("{aligned}", "{align*}"))
        text = convert(known, display="block" if display else "inline")
        root = ElementTree.fromstring(re.sub(r' xmlns="[^"]*"', "", text))  # in HTML the element's name says it
    except Exception as error:  # its own kinds, and what its parser runs into
        raise EquationError(f"{type(error).__name__} {error}".strip()) from error
    for element in root.iter():
        _check(element)
    for element in list(root.iter()):
        _polish(element)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<div class="equation">{text}</div>' if display else text


def _check(element: Element) -> None:
    said = element.text or ""
    if len(element) != CHILDREN.get(element.tag, len(element)):
        raise EquationError(f"a part is missing ({element.tag})")
    if said.startswith("\\") or (element.tag == "mo" and not said):
        raise EquationError(f"unknown command {said}".strip())
    if element.get("linebreak"):
        raise EquationError(r"\\ outside of aligned, cases or array")


def _polish(element: Element) -> None:
    """What TeX's spacing and alignment are in MathML Core, which has no columnalign and takes names for letters."""
    if "columnalign" in element.attrib:
        element.set("class", element.attrib.pop("columnalign"))
    if element.tag == "mtable" and element.get("displaystyle"):
        element.set("class", "aligned")
    for at in range(len(element) - 1, -1, -1):
        one, before, after = (
            element[at],
            element[at - 1] if at else None,
            element[at + 1] if at + 1 < len(element) else None,
        )
        if one.tag == "mo" and one.text == "−" and (before is None or not _spaced(before, CLOSING)):
            one.set("form", "prefix")
        if element.tag in ("mrow", "mtd", "msqrt") and _named(one):
            if after is not None and _spaced(after):
                element.insert(at + 1, Element("mspace", width=SPACE))
            if before is not None and _spaced(before, CLOSING):
                element.insert(at, Element("mspace", width=SPACE))
    for one in element:
        if one.tag == "mo" and (one.text or "").isalpha():  # an operator has wide spaces on both sides
            one.tag = "mi"


def _named(element: Element) -> bool:
    """Whether it is log, softmax ..., with or without a subscript."""
    if element.tag in ("msub", "msup", "munder", "msubsup"):
        return _named(element[0])
    return element.tag in ("mi", "mo") and len(element.text or "") > 1 and (element.text or "").isalpha()


def _spaced(element: Element, operators: frozenset[str] = frozenset()) -> bool:
    """Whether TeX sets a thin space between it and a name: letters, other names, and these operators."""
    if element.tag == "mspace":
        return False
    return element.tag != "mo" or _named(element) or element.text in operators


def typeset(page: str, failed: Callable[[str], None]) -> str:
    """A page's HTML with its equations as MathML; ``failed`` hears of each that is none."""

    def one(match: re.Match[str]) -> str:
        latex = html.unescape(match[2])
        try:
            return mathml(latex, display=match[1] == "div")
        except EquationError as error:
            failed(f"no equation: {error}: {latex.strip()}")
            return match[0]

    return FOUND.sub(one, page)
