"""Draw a propagation graph as SVG, light and dark, without Graphviz, fonts or scripts."""

from __future__ import annotations

import textwrap
from html import escape

from san_bench.graph.fold import Folded, FoldedEdge, fold_blocks
from san_bench.graph.layout import BOX_HEIGHT, MARGIN, Box, Bundle, Frame, Layout, lay_out
from san_bench.graph.wording import path_words, summary
from san_peft.propagation.graph import PropagationGraph

CHARACTER = 5.9
"""Upper bound of the character width of the small text, for any font of a browser."""

NOTES = 8
"""Maximum number of layers listed below the drawing for one barrier reason."""

LIGHT = {"paper": "#ffffff", "panel": "#f3f4f6", "box": "#ffffff", "rim": "#9ca3af", "ink": "#111827", "dim": "#4b5563"}
DARK = {"paper": "#0f172a", "panel": "#1e293b", "box": "#0f172a", "rim": "#64748b", "ink": "#f1f5f9", "dim": "#b6c2d2"}
COLOURS = {
    "exact": ("#047857", "#34d399"),
    "activation": ("#b45309", "#fbbf24"),
    "norm": ("#1d4ed8", "#7dabff"),
    "residual": ("#86198f", "#e879f9"),
    "barrier": ("#b91c1c", "#f87171"),
}
"""Colours of edge kinds and barriers, in light and dark mode."""


def to_svg(graph: PropagationGraph, title: str, heading: bool = True) -> str:
    """Draws the folded graph as SVG.

    Layers are boxes in execution order, folded blocks are frames with their count, and edges are lines in the colour of
    their kind, labelled with the operations on their path. Tooltips contain the full names of shortened ones.

    Args:
        graph: The graph.
        title: Title of the drawing.
        heading: Whether to write the title and the summary above the legend.

    Returns:
        The contents of an SVG file.
    """
    folded = fold_blocks(graph)
    trial = lay_out(folded, 0.0)
    columns = int((trial.width - 2 * MARGIN) / CHARACTER)
    lines = [("heading", words) for words in textwrap.wrap(title, int(columns * 0.68))] if heading else []
    lines += [("small", words) for words in textwrap.wrap(summary(graph), columns)] if heading else []
    top = 18.0 * len(lines) + 56
    layout = lay_out(folded, top)
    notes = _barrier_notes(folded, columns)
    height = layout.bottom + 14 + 15 * len(notes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="san-graph" viewBox="0 0 {layout.width:g} {height:g}" '
        f'width="{layout.width:g}" height="{height:g}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_style()}</style>",
        f'<rect class="paper" width="{layout.width:g}" height="{height:g}" rx="8"/>',
        *(_text(MARGIN, 22 + 18 * line, words, css) for line, (css, words) in enumerate(lines)),
        *_legend(18.0 * len(lines) + 20),
        *(_frame(frame, layout.width) for frame in layout.frames),
        *(_lines(bundle, layout) for bundle in layout.bundles),
        *(_frame_title(frame, layout.width) for frame in layout.frames),
        *(_box(box) for box in layout.boxes),
        *_barrier_bars(folded, layout),
        *(_label(bundle, layout) for bundle in layout.bundles),
        *(
            _text(MARGIN * (1 + deep), layout.bottom + 14 + 15 * line, words, "small" if deep else "barrier-text")
            for line, (deep, words) in enumerate(notes)
        ),
        "</svg>",
    ]
    return "\n".join(parts)


def _style() -> str:
    base = (
        ".san-graph{font-family:system-ui,'Helvetica Neue',Arial,sans-serif}"
        ".san-graph .edge{fill:none;stroke-width:1.8}.san-graph .next{stroke-dasharray:5 3}"
        ".san-graph .box,.san-graph .panel{stroke-width:1}.san-graph .head{stroke-width:2.5}"
        ".san-graph .heading{font-size:15px;font-weight:700}.san-graph .small{font-size:11px}"
        ".san-graph .name{font-size:12.5px;font-weight:600}.san-graph .block{font-size:12px;font-weight:700}"
        ".san-graph .tag{font-size:11px}"
        ".san-graph .barrier-text{font-size:11px}.san-graph .bar{stroke-width:4}"
    )
    dark = _palette(DARK, 1)
    return f"{base}{_palette(LIGHT, 0)}@media (prefers-color-scheme:dark){{{dark}}}"


def _palette(paint: dict[str, str], side: int) -> str:
    g = ".san-graph "
    rules = [
        f"{g}.paper{{fill:{paint['paper']}}}{g}.panel{{fill:{paint['panel']};stroke:{paint['rim']}}}",
        f"{g}.box{{fill:{paint['box']};stroke:{paint['rim']}}}{g}.head{{stroke:{paint['ink']}}}",
        f"{g}text{{fill:{paint['ink']}}}{g}.small{{fill:{paint['dim']}}}{g}.under{{fill:{paint['panel']}}}",
        f"{g}.sample{{stroke:{paint['dim']}}}",
    ]
    for name, pair in COLOURS.items():
        rules.append(f"{g}.{name}{{stroke:{pair[side]}}}{g}.{name}-fill{{fill:{pair[side]}}}")
    rules.append(f"{g}.barrier-text{{fill:{COLOURS['barrier'][side]}}}")
    return "".join(rules)


def _text(x: float, y: float, words: str, css: str, anchor: str = "start", full: str = "") -> str:
    title = f"<title>{escape(full)}</title>" if full else ""
    return f'<text x="{x:g}" y="{y:g}" class="{css}" text-anchor="{anchor}">{escape(words)}{title}</text>'


def _legend(y: float) -> list[str]:
    parts = []
    x = MARGIN
    for kind in ("exact", "activation", "norm", "residual"):
        parts.append(f'<line class="edge {kind}" x1="{x:g}" y1="{y:g}" x2="{x + 22:g}" y2="{y:g}"/>')
        parts.append(_text(x + 27, y + 4, kind, "small"))
        x += 100
    y, x = y + 18, MARGIN
    parts.append(f'<line class="edge next sample" x1="{x:g}" y1="{y:g}" x2="{x + 22:g}" y2="{y:g}"/>')
    parts.append(_text(x + 27, y + 4, "to another block", "small"))
    x += 200
    parts.append(f'<line class="bar barrier" x1="{x:g}" y1="{y:g}" x2="{x + 22:g}" y2="{y:g}"/>')
    parts.append(_text(x + 27, y + 4, "barrier", "small"))
    x += 100
    parts.append(f'<rect class="box head" x="{x:g}" y="{y - 6:g}" width="22" height="12" rx="4"/>')
    parts.append(_text(x + 27, y + 4, "head", "small"))
    return parts


def _frame(frame: Frame, width: float) -> str:
    return (
        f'<rect class="panel" x="{MARGIN / 2:g}" y="{frame.top:g}" width="{width - MARGIN:g}" '
        f'height="{frame.bottom - frame.top:g}" rx="8"/>'
    )


def _frame_title(frame: Frame, width: float) -> str:
    shown = _tail(frame.block.title, int((width - 6 * MARGIN) / 7))
    ground = f'<rect class="under" x="{MARGIN:g}" y="{frame.top + 6:g}" width="{len(shown) * 7 + 8:g}" height="16"/>'
    return ground + _text(MARGIN + 4, frame.top + 18, shown, "block", full=frame.block.title)


def _box(box: Box) -> str:
    layer, room = box.layer, int((box.width - 8) / CHARACTER)
    parent, _, name = box.label.rpartition(".")
    copies = layer.count // (layer.runs[0].count if layer.runs else 1)
    size = layer.size.replace("->", "→") + (f" x{copies}" if copies > 1 else "")
    css = "box head" if layer.head else "box"
    if len(size) > room:
        numbers = f" {layer.layer.in_channels} → {layer.layer.out_channels}"
        size = _head(layer.layer.type, room - len(numbers)) + numbers
    lines = [(_tail(parent, room), "small"), (_tail(name, int((box.width - 8) / 8)), "name"), (size, "small")]
    lines = [line for line in lines if line[0]]
    first = box.y + BOX_HEIGHT / 2 + 4 - (len(lines) - 1) * 7.5
    texts = [_text(box.centre, first + 15 * n, words, css, "middle") for n, (words, css) in enumerate(lines)]
    words = f"{layer.name}: {layer.size}{', head' if layer.head else ''}"
    return (
        f'<g><title>{escape(words)}</title><rect class="{css}" x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" '
        f'height="{BOX_HEIGHT:g}" rx="6"/>{"".join(texts)}</g>'
    )


def _lines(bundle: Bundle, layout: Layout) -> str:
    x, y, start, r = bundle.start, bundle.track, bundle.source.y + BOX_HEIGHT, 5.0
    ways, heads = [], []
    for target, end in zip(bundle.targets, bundle.ends, strict=True):
        top = target.y - 7
        heads.append(f"M{end - 4.5:g} {top - 1:g}h9l-4.5 8z")
        if bundle.direct(target):
            turn = layout.bend(bundle, target)
            bend = (top - turn) * 0.55
            ways.append(f"M{x:g} {start:g}V{turn:g}C{x:g} {turn + bend:g} {end:g} {top - bend:g} {end:g} {top:g}")
    for entry, points in bundle.turns():
        lane = bundle.lane or 0.0
        out, down, back = (1 if lane > x else -1), (1 if entry > y else -1), (-1 if lane > x else 1)
        *nearer, (end, end_y) = points
        ways.append(
            f"M{x:g} {start:g}V{y - r:g}Q{x:g} {y:g} {x + out * r:g} {y:g}H{lane - out * r:g}"
            f"Q{lane:g} {y:g} {lane:g} {y + down * r:g}V{entry - down * r:g}"
            f"Q{lane:g} {entry:g} {lane + back * r:g} {entry:g}H{end - back * r:g}"
            f"Q{end:g} {entry:g} {end:g} {entry + r:g}V{end_y - 7:g}"
        )
        ways += [f"M{end:g} {entry:g}V{end_y - 7:g}" for end, end_y in nearer]
    edge = bundle.edges[0]
    css = f"edge {edge.kind}{' next' if edge.leaves_block else ''}"
    return (
        f'<g><title>{escape(_full(bundle))}</title><path class="{css}" d="{"".join(ways)}"/>'
        f'<path class="{edge.kind}-fill" d="{"".join(heads)}"/></g>'
    )


def _label(bundle: Bundle, layout: Layout) -> str:
    edge, width = bundle.edges[0], layout.width
    shown = _head(_words(edge), int((width - 4 * MARGIN) / CHARACTER))
    half = len(shown) * CHARACTER / 2 + 3
    x = min(max(bundle.start, 2 * MARGIN + half), width - 2 * MARGIN - half)
    framed = any(frame.top < bundle.track < frame.bottom for frame in layout.frames)
    return (
        f'<rect class="{"under" if framed else "paper"}" x="{x - half:g}" y="{bundle.track - 7:g}" '
        f'width="{2 * half:g}" height="14"/>'
        + _text(x, bundle.track + 4, shown, f"tag {edge.kind}-fill", "middle", full=_full(bundle))
    )


def _words(edge: FoldedEdge) -> str:
    channels = "" if edge.channels.kind == "identity" else f"[{edge.channels}]"
    return " · ".join(part for part in (channels, path_words(edge, "") or edge.kind, edge.note) if part)


def _full(bundle: Bundle) -> str:
    lines = [str(edge) for edge in bundle.edges]
    return "\n".join([*lines, " ".join(filter(None, [bundle.edges[0].kind, path_words(bundle.edges[0])]))])


def _reasons(folded: Folded) -> dict[tuple[str, str], int]:
    keys = dict.fromkeys((barrier.operation, barrier.reason) for barrier in folded.barriers)
    return {key: number for number, key in enumerate(keys, 1)}


def _barrier_bars(folded: Folded, layout: Layout) -> list[str]:
    boxes, reasons = {box.layer.name: box for box in layout.boxes}, _reasons(folded)
    parts = []
    for barrier in folded.barriers:
        if box := boxes.get(barrier.name):
            number, y = reasons[barrier.operation, barrier.reason], box.y - 4
            words = f"{barrier.operation}: {barrier.reason} {barrier.note}".strip()
            parts.append(
                f'<g><title>{escape(words)}</title><line class="bar barrier" x1="{box.x + 6:g}" y1="{y:g}" '
                f'x2="{box.x + 34:g}" y2="{y:g}"/>{_text(box.x + 38, y + 3, str(number), "barrier-text")}</g>'
            )
    return parts


def _barrier_notes(folded: Folded, columns: int) -> list[tuple[bool, str]]:
    """Returns the lines below the drawing: every barrier reason, followed by its indented layers."""
    lines: list[tuple[bool, str]] = []
    for (operation, reason), number in _reasons(folded).items():
        lines += [(False, words) for words in textwrap.wrap(f"{number} {operation}: {reason}", columns)]
        found = [b for b in folded.barriers if (b.operation, b.reason) == (operation, reason)]
        for barrier in found[:NOTES]:
            more = "; ".join(filter(None, [f"x{barrier.count}" if barrier.count > 1 else "", barrier.note]))
            lines.append((True, f"at {_tail(barrier.name, columns - len(more) - 8)}{f' ({more})' if more else ''}"))
        if len(found) > NOTES:
            lines.append((True, f"and at {len(found) - NOTES} more layers; `san trace` without --svg lists all"))
    return lines


def _tail(words: str, room: int) -> str:
    """Shortens a name at its start, which is the least informative part."""
    return words if len(words) <= room else f"…{words[len(words) - max(room - 1, 1) :]}"


def _head(words: str, room: int) -> str:
    return words if len(words) <= room else f"{words[: max(room - 1, 1)]}…"
