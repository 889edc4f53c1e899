"""Draws the pictures of the README from results that the repository keeps: `python scripts/draw_readme.py`.

Writes light and dark SVGs into docs/img: `san` (the method), `accuracy` (from results/mini-vision/rows.jsonl) and
`cost` (from the tables of docs/guides/speed.md). Texts stay texts, and sizes are chosen for a screen of 390 pixels.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from san_bench.report.tables.estimate import bootstrap_interval
from san_bench.run.provenance import write_atomically
from san_bench.run.results import read_rows

ROOT = Path(__file__).parents[1]
WIDTH = 420
LIGHT = {
    "paper": "#ffffff",
    "ink": "#111827",
    "soft": "#4b5563",
    "line": "#d1d5db",
    "san": "#047857",
    "other": "#b45309",
    "third": "#1d4ed8",
    "cells": ("#059669", "#a7f3d0", "#34d399", "#d1d5db"),
}
DARK = {
    "paper": "#0d1117",
    "ink": "#f0f6fc",
    "soft": "#b1bac4",
    "line": "#3d444d",
    "san": "#34d399",
    "other": "#fbbf24",
    "third": "#79b8ff",
    "cells": ("#059669", "#a7f3d0", "#34d399", "#6e7681"),
}
METHODS = {
    "san": ("SAN", "circle", "san"),
    "san-lora-r8": ("SAN over LoRA, r = 8", "ring", "san"),
    "ssf": ("SSF", "square", "third"),
    "lora-r1": ("LoRA, r = 1", "diamond", "other"),
    "lora-r8": ("LoRA, r = 8", "open diamond", "other"),
    "full": ("full fine-tuning", "triangle", "soft"),
}
"""Methods of the picture of accuracy: name, mark, colour."""

SHIFTS = {"san-lora-r8": -9, "lora-r8": 9}
"""Marks that would lie on one another, moved to the left or to the right, in pixels."""

BACKBONES = {"vit": "ViT", "swin": "Swin", "convnext": "ConvNeXt"}
STEPS = {
    "floor": "no adapter",
    "san": "SAN",
    "ssf": "SSF",
    "ia3": "(IA)³",
    "lora": "LoRA",
    "dora": "DoRA",
    "full": "full",
}
"""Methods of the picture of costs, by their names in the table."""


COST_PANELS = (("time, LoRA = 1", (0.75, 1, 1.5, 2)), ("saved activations, LoRA = 1", (0.75, 1, 2, 4, 6)))
"""Titles and ticks of the panels of the picture of costs."""


class Canvas:
    """An SVG in the making.

    Args:
        height: Its height; all are `WIDTH` wide.
        colours: `LIGHT` or `DARK`.
        title: What it shows.
    """

    def __init__(self, height: float, colours: dict[str, Any], title: str) -> None:
        self.colours = colours
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" role="img" aria-label="{escape(title)}" font-family="Helvetica, Arial, sans-serif">',
            f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="{colours["paper"]}"/>',
        ]

    def text(self, x: float, y: float, text: str, colour: str = "ink", size: int = 14, **more: str) -> None:
        rest = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{self.colours[colour]}"{rest}>{escape(text)}</text>'
        )

    def line(self, points: list[tuple[float, float]], colour: str, width: float = 1.5, **more: str) -> None:
        rest = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{self.colours[colour]}" stroke-width="{width:g}"{rest}/>'
        )

    def arrow(self, points: list[tuple[float, float]], colour: str, width: float = 1.5, **more: str) -> None:
        """Draws a line with a head at its end."""
        self.line(points, colour, width, **more)
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        back = x1 - 7 * dx, y1 - 7 * dy
        head = [(back[0] - 4 * dy, back[1] + 4 * dx), (x1 + dx, y1 + dy), (back[0] + 4 * dy, back[1] - 4 * dx)]
        path = " ".join(f"{x:g},{y:g}" for x, y in head)
        self.parts.append(f'<polygon points="{path}" fill="{self.colours[colour]}"/>')

    def cell(self, x: float, y: float, wide: float, high: float, shade: int) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}" rx="3" '
            f'fill="{self.colours["cells"][shade]}" stroke="{self.colours["paper"]}" stroke-width="2"/>'
        )

    def mark(self, shape: str, x: float, y: float, colour: str) -> None:
        tone, paper = self.colours[colour], self.colours["paper"]
        fill = paper if shape in ("ring", "open diamond", "open square") else tone
        style = f'fill="{fill}" stroke="{tone}" stroke-width="2"'
        if shape in ("circle", "ring"):
            self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" {style}/>')
            return
        corners = {
            "square": [(-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)],
            "diamond": [(0, -6), (6, 0), (0, 6), (-6, 0)],
            "triangle": [(0, -6), (5.5, 4.5), (-5.5, 4.5)],
        }[shape.removeprefix("open ")]
        path = " ".join(f"{x + dx:g},{y + dy:g}" for dx, dy in corners)
        self.parts.append(f'<polygon points="{path}" {style}/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def draw_method(colours: dict[str, Any]) -> str:
    """Draws one scale that acts on two layers."""
    canvas = Canvas(
        320,
        colours,
        "One trained vector scales the output rows of the anterior layer and, propagated, the input columns of the "
        "posterior layer; both weights are frozen.",
    )
    for place, value in enumerate(("1.6", "0.7", "1.3", "1.0")):
        canvas.cell(118 + 46 * place, 38, 46, 34, place)
        dark_text = place in (1, 2) or (place == 3 and colours is LIGHT)
        canvas.parts.append(
            f'<text x="{141 + 46 * place}" y="60" font-size="15" text-anchor="middle" '
            f'fill="{"#111827" if dark_text else "#ffffff"}">{value}</text>'
        )
    canvas.text(210, 24, "one trained vector, the scale γ", "san", 17, text_anchor="middle", font_weight="bold")
    canvas.text(8, 210, "x", size=18, font_style="italic")
    canvas.arrow([(20, 204), (34, 204)], "soft")
    for row in range(4):
        for column in range(3):
            canvas.cell(38 + 31 * column, 142 + 31 * row, 31, 31, row)
    canvas.arrow([(135, 204), (156, 204)], "soft")
    for place, words in enumerate(("activation,", "norm,", "residual")):
        canvas.text(200, 191 + 19 * place, words, "soft", 15, text_anchor="middle")
    canvas.arrow([(243, 204), (264, 204)], "soft")
    for row in range(3):
        for column in range(4):
            canvas.cell(268 + 31 * column, 157.5 + 31 * row, 31, 31, column)
    canvas.arrow([(394, 204), (405, 204)], "soft")
    canvas.text(408, 210, "y", size=18, font_style="italic")
    canvas.arrow([(112, 55), (84, 55), (84, 136)], "san", 2.5)
    canvas.arrow([(308, 55), (330, 55), (330, 151)], "san", 2.5, stroke_dasharray="7 4")
    canvas.text(92, 112, "scales", "san", 15)
    canvas.text(322, 112, "is propagated", "san", 15, text_anchor="end")
    for x, name, what in ((92, "anterior layer", "its output rows"), (324, "posterior layer", "its input columns")):
        canvas.text(x, 288, name + ", frozen", size=15, text_anchor="middle", font_weight="bold")
        canvas.text(x, 308, what, "soft", 15, text_anchor="middle")
    return canvas.svg()


def accuracies() -> dict[tuple[str, str], tuple[list[float], int]]:
    """Returns accuracy in % of each seed over all tasks, and trained parameters, by backbone and method."""
    seeds: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    trained: dict[tuple[str, str], int] = {}
    for row in read_rows([ROOT / "results" / "mini-vision"]):
        key = row["backbone"], row["method"]
        seeds[key][row["seed"]].append(100 * row["accuracy"])
        trained[key] = row["trainable_parameters"] - row["trainable_head"]
    tasks = max(len(values) for found in seeds.values() for values in found.values())
    return {
        key: ([statistics.fmean(values) for values in found.values() if len(values) == tasks], trained[key])
        for key, found in seeds.items()
    }


def draw_accuracy(colours: dict[str, Any]) -> str:
    """Draws mean accuracy over trained parameters, a panel for each backbone."""
    found = accuracies()
    canvas = Canvas(640, colours, "Accuracy on mini-vision over trained parameters, for three backbones")
    canvas.text(14, 26, "Accuracy over trained parameters", size=17, font_weight="bold")
    for place, (name, mark, colour) in enumerate(METHODS.values()):
        x, y = 22 + 196 * (place % 2), 50 + 22 * (place // 2)
        canvas.mark(mark, x, y, colour)
        canvas.text(x + 13, y + 5, name)
    low, high = math.log10(0.005), math.log10(2.5)

    def across(trained: float) -> float:
        return 48 + 358 * (math.log10(trained / 1e6) - low) / (high - low)

    for panel, (backbone, title) in enumerate(BACKBONES.items()):
        top, tall = 130 + 164 * panel, 132
        canvas.text(406, top + tall - 10, title, "ink", 15, text_anchor="end", font_weight="bold")
        shown = {method: found[backbone, method] for method in METHODS}
        means = [statistics.fmean(values) for values, _ in shown.values()]
        bottom = 2.5 * math.floor((min(means) - 1.5) / 2.5)
        span = 2.5 * math.ceil((max(means) + 1.5) / 2.5) - bottom
        for tick in range(math.ceil(bottom / 5) * 5, int(bottom + span) + 1, 5):
            y = top + tall * (1 - (tick - bottom) / span)
            canvas.line([(44, y), (408, y)], "line", 1)
            canvas.text(40, y + 5, f"{tick}%", "soft", 13, text_anchor="end")
        for method, (values, trained) in shown.items():
            _, mark, colour = METHODS[method]
            x, (y, *ends) = (
                across(trained) + SHIFTS.get(method, 0),
                [
                    top + tall * (1 - (value - bottom) / span)
                    for value in (statistics.fmean(values), *(bootstrap_interval([values]) or ()))
                ],
            )
            if ends:
                canvas.line([(x, ends[0]), (x, ends[1])], colour, 2)
                for end in ends:
                    canvas.line([(x - 4, end), (x + 4, end)], colour, 2)
            canvas.mark(mark, x, y, colour)
    for tick, label in ((0.01, "10k"), (0.1, "100k"), (1.0, "1M")):
        canvas.text(across(tick * 1e6), 608, label, "soft", 13, text_anchor="middle")
    canvas.text(227, 630, "trained parameters without the head", "soft", 14, text_anchor="middle")
    return canvas.svg()


def costs() -> dict[str, dict[str, tuple[float, float, float, float]]]:
    """Returns the step's ratio to LoRA with its quartiles, and that of saved activations, by shape and method."""
    page = (ROOT / "docs" / "guides" / "speed.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- results:start -->\n(.*?)<!-- results:end -->", page, re.S)
    found: dict[str, dict[str, tuple[float, float, float, float]]] = {}
    columns: list[str] = []
    for line in block.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| method"):
            columns = cells
            saved = columns.index("saved activations, MiB") + 1
        elif line.startswith("| "):
            step = re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", cells[columns.index("step / its (quartiles)")])
            assert step, line
            row = tuple(map(float, (*step.groups(), cells[saved])))
            found[shape][cells[0]] = row  # type: ignore[assignment]
        elif "float32" in line and not line.startswith("Measured"):
            shape = "ViT-B/16" if line.startswith("ViT-B/16") else "LLaMA-3.2-1B, 4 layers"
            found[shape] = {}
    return found


def draw_cost(colours: dict[str, Any]) -> str:
    """Draws time of a step and saved activations against LoRA's."""
    found = costs()
    canvas = Canvas(640, colours, "Time of a training step and saved activations, relative to LoRA")
    canvas.text(14, 26, "A training step against LoRA", size=17, font_weight="bold")
    marks = dict(zip(found, (("circle", "third"), ("open square", "other")), strict=True))
    for place, (shape, (mark, colour)) in enumerate(marks.items()):
        canvas.mark(mark, 22 + 140 * place, 50, colour)
        canvas.text(35 + 140 * place, 55, shape)
    for panel, (title, ticks) in enumerate(COST_PANELS):
        top = 92 + 276 * panel
        canvas.text(14, top, title, size=15, font_weight="bold")
        low, high = math.log(0.6), math.log(ticks[-1] * 1.05)

        def across(ratio: float, low: float = low, high: float = high) -> float:
            return 110 + 296 * (math.log(ratio) - low) / (high - low)

        for tick in ticks:
            canvas.line([(across(tick), top + 12), (across(tick), top + 222)], "soft" if tick == 1 else "line", 1)
            canvas.text(across(tick), top + 240, f"{tick:g}", "soft", 13, text_anchor="middle")
        for place, (method, name) in enumerate(STEPS.items()):
            y = top + 30 + 29 * place
            colour, weight = ("san", "bold") if method == "san" else ("ink", "normal")
            canvas.text(100, y + 5, name, colour, 14, text_anchor="end", font_weight=weight)
            for shift, (shape, (mark, colour)) in zip((-5, 5), marks.items(), strict=True):
                middle, first, third, saved = found[shape][method]
                if panel == 0:
                    canvas.line([(across(first), y + shift), (across(third), y + shift)], colour, 2)
                canvas.mark(mark, across(saved if panel else middle), y + shift, colour)
    canvas.text(14, 630, "Lines: quartiles over rounds. 1 is LoRA in the same round.", "soft", 13)
    return canvas.svg()


PICTURES = {"san": draw_method, "accuracy": draw_accuracy, "cost": draw_cost}


def pictures() -> dict[str, str]:
    """Returns every picture by its file's name."""
    return {
        f"{name}{suffix}.svg": draw(colours)
        for name, draw in PICTURES.items()
        for suffix, colours in (("", LIGHT), ("-dark", DARK))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img", metavar="FOLDER")
    out = parser.parse_args().out
    for name, svg in pictures().items():
        write_atomically(out / name, svg)


if __name__ == "__main__":
    main()
