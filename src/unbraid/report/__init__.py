"""Renderings of a `unbraid.diagnosis.diagnosis.Report`: JSON, Markdown, the terminal, one HTML page."""

from unbraid.report.as_json import dump as dump
from unbraid.report.as_json import load as load
from unbraid.report.page import compare_html as compare_html
from unbraid.report.page import html as html
from unbraid.report.text import markdown as markdown
from unbraid.report.text import terminal as terminal
