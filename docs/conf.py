"""How Sphinx builds these pages: `make docs`."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "san-peft"
author = "The san-peft contributors"
copyright = "2026, the san-peft contributors; Apache-2.0"
release = version = version_of("san-peft")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

default_role = "code"  # docstrings write `None`, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Example", "Examples")]

html_theme = "furo"
html_title = "san-peft"
html_math_renderer = (
    "mathml"  # browsers render it themselves: no script, nothing from a CDN
)


def markdown_to_rst(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Converts the equations and tables of docstrings from Markdown."""

    def block(match: re.Match[str]) -> str:
        indent = match["indent"]
        body = "\n".join(
            f"{indent}   {line.strip()}" for line in match["body"].strip().splitlines()
        )
        return f"\n{indent}.. math::\n\n{body}\n{indent}"

    def table(match: re.Match[str]) -> str:
        indent, (head, _, *rows) = match["indent"], match[0].strip().splitlines()
        lines = [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
        for row in (head, *rows):
            cells = [cell.strip() for cell in row.strip().strip("|").split(" | ")]
            lines += [
                f"{indent}   {' ' if place else '*'} - {cell}"
                for place, cell in enumerate(cells)
            ]
        return "\n".join([*lines, "", ""])

    text = re.sub(
        r"^(?P<indent> *)\$\$(?P<body>.+?)\$\$",
        block,
        "\n".join(lines),
        flags=re.M | re.S,
    )
    text = re.sub(r"(?<![\\$`\w])\$([^$\n`]+)\$(?![\w$])", r":math:`\1`", text)
    text = re.sub(r"(?<=, )\*(?=\w)", r"\\*", text)  # shapes such as (out, in, *kernel)
    text = re.sub(
        r"(?m)^(?P<indent> *)\|.*\|\n(?P=indent)\|[-:| ]+\|\n"
        r"(?:(?P=indent)\|.*\|(?:\n|$))+",
        table,
        text,
    )
    lines[:] = text.split("\n")


def inline_math(writer: Any, node: nodes.math) -> None:
    """Writes an inline equation as MathML."""
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def display_math(writer: Any, node: nodes.math_block) -> None:
    """Writes a display equation as MathML."""
    # the padding keeps limits and accents from causing a vertical scroll bar
    style = "margin: 1rem 0; padding: 0.4rem 0; overflow-x: auto"
    writer.body.append(
        f'<div style="{style}">{tex2mathml(node.astext(), as_block=True)}</div>'
    )
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)
