"""The drawing and the page: well-formed, complete, and legible as far as numbers tell."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.bench.graphs import DRAWN, HOSTILE, traced

from san_bench.graph.drawing import to_svg
from san_bench.graph.fold import fold_blocks
from san_bench.graph.layout import BOX_HEIGHT, lay_out
from san_bench.graph.page import graph_to_html
from san_bench.graph.wording import summary
from san_bench.models.architectures import empty_model
from san_peft import PropagationGraph, trace
from san_peft.propagation.graph import Layer

SVG = "{http://www.w3.org/2000/svg}"


def drawing(graph: PropagationGraph) -> ET.Element:
    return ET.fromstring(to_svg(graph, "a title"))


@pytest.mark.parametrize("name", DRAWN)
def test_the_drawing_shows_every_layer_and_edge(name):
    graph = traced(name)
    folded, root = fold_blocks(graph), drawing(graph)
    titles = "\n".join(title.text or "" for title in root.iter(f"{SVG}title"))
    assert all(f"{layer.name}: {layer.size}" in titles for layer in folded.layers)
    assert all(str(edge) in titles for edge in folded.edges)
    text = "\n".join(part.text or "" for part in root.iter(f"{SVG}text"))
    assert all(block.run is None or f"(x{block.run.count})" in text for block in folded.blocks)
    squeezed = re.sub(r"\s", "", text)
    assert all(re.sub(r"\s", "", f"{b.operation}: {b.reason}") in squeezed for b in graph.barriers)
    assert re.sub(r"\s", "", summary(graph)) in squeezed


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_overlaps_and_nothing_leaves_the_paper(name):
    layout = lay_out(fold_blocks(traced(name)), 50.0)
    for box in layout.boxes:
        assert 0 < box.x < box.x + box.width < layout.width
        assert 50 < box.y < box.y + BOX_HEIGHT < layout.bottom
        for other in layout.boxes:
            apart = box.x + box.width <= other.x or box.y + BOX_HEIGHT <= other.y
            assert box is other or apart or other.x + other.width <= box.x or other.y + BOX_HEIGHT <= box.y
    tracks = [bundle.track for bundle in layout.bundles]
    assert len(set(tracks)) == len(tracks), "two labels at one height would cover each other"
    for bundle in layout.bundles:
        assert bundle.source.y + BOX_HEIGHT < bundle.track
        assert bundle.lane is None or 0 < bundle.lane < layout.width
        for target, end in zip(bundle.targets, bundle.ends, strict=True):
            assert target.x < end < target.x + target.width
            assert bundle.direct(target) or bundle.entries[target.row] < target.y
    for frame, after in zip(layout.frames, layout.frames[1:], strict=False):
        assert frame.top < frame.bottom < after.top


def test_lines_that_run_side_by_side_have_lanes_of_their_own():
    layout = lay_out(fold_blocks(traced("timm-resnet")), 0.0)
    taken = [
        (b.lane, b.source.row, max(t.row for t in b.targets))
        for b in layout.bundles
        if b.lane is not None and not b.back
    ]
    for lane, first, last in taken:
        for other, start, end in taken:
            assert (lane, first, last) == (other, start, end) or lane != other or last < start or end < first


def test_queries_keys_and_values_stand_side_by_side():
    layout = lay_out(fold_blocks(traced("llama")), 0.0)
    rows: dict[int, list[str]] = {}
    for box in layout.boxes:
        rows.setdefault(box.row, []).append(box.label.split(".")[-1])
    assert list(rows.values()) == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
        ["lm_head"],
    ]


def test_the_edge_to_the_next_block_is_dashed_and_drawn_once():
    root = drawing(traced("llama"))
    dashed = [path for path in root.iter(f"{SVG}path") if "next" in path.get("class", "").split()]
    assert len(dashed) == 1
    assert dashed[0].get("class") == "edge residual next"


def test_the_drawing_needs_nothing_from_outside_and_is_made_for_dark_too():
    text = to_svg(traced("timm-vit"), "title")
    assert "prefers-color-scheme:dark" in text
    assert re.findall(r"https?://[^\"\s]+", text) == ["http://www.w3.org/2000/svg"]
    assert "<script" not in text


def test_the_drawing_in_the_guide_is_what_its_command_draws():
    file = Path(__file__).parents[3] / "docs/img/propagation-graph.svg"
    graph = trace(empty_model("embedded")).select("all")
    assert file.read_text(encoding="utf-8") == to_svg(graph, "embedded (ViTModel), scheme all") + "\n", (
        "draw it anew: san trace embedded --svg --out docs/img/propagation-graph.svg"
    )


def test_the_drawing_escapes_names():
    root = drawing(HOSTILE)
    assert not list(root.iter(f"{SVG}script"))
    assert any('a<b>&"c\\' in (title.text or "") for title in root.iter(f"{SVG}title"))


def test_long_names_are_shortened_at_the_front_and_whole_in_the_tooltip():
    long = ".".join(["a_very_long_name_of_a_module"] * 4)
    graph = PropagationGraph((), (), (Layer(f"{long}.fc", "Linear", 4, 4),))
    root = drawing(graph)
    texts = [part.text or "" for part in root.iter(f"{SVG}text")]
    assert max(map(len, texts)) < 80
    assert any(text.startswith("…") and text.endswith("module") for text in texts)
    assert any(f"{long}.fc" in (title.text or "") for title in root.iter(f"{SVG}title"))


# ------------------------------------------------------------------ the page


class Page(HTMLParser):
    """Checks that tags match, and collects rows, links and text."""

    VOID = frozenset({"meta", "input", "wbr", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.sources += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("name", DRAWN)
def test_the_page_lists_every_edge_and_barrier_unfolded(name):
    graph = traced(name)
    text = graph_to_html(graph, "a title")
    page = Page(text)
    assert not page.sources, "it loads nothing"
    assert "@import" not in text
    body = [row for row in page.rows if row[0] not in ("anterior", "layer")]
    edges = [[e.anterior, e.posterior, e.kind, str(e.channels), ", ".join(e.via)] for e in graph.edges]
    assert body == edges + [[b.layer, b.operation, b.reason] for b in graph.barriers]
    assert summary(graph) in text
    svg = re.search(r"<svg.*</svg>", text, re.S)
    assert svg
    ET.fromstring(svg[0])


def test_the_page_escapes_names():
    text = graph_to_html(HOSTILE, "<title> & more")
    Page(text)
    assert "<script>alert" not in text
    assert "<h1>&lt;title&gt; &amp; more</h1>" in text
