"""Implement `san trace`: show a model's propagation graph as a tree, JSON, Graphviz DOT, SVG or an HTML page."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text
from rich.tree import Tree

from san_bench.graph.drawing import COLOURS, to_svg
from san_bench.graph.fold import Folded, FoldedBlock, FoldedEdge, fold_blocks
from san_bench.graph.page import graph_to_html
from san_bench.graph.wording import path_words, summary
from san_peft.errors import SanError
from san_peft.propagation import describe_placement
from san_peft.propagation.graph import PropagationGraph

TERMINAL_STYLES = {"exact": "green", "activation": "yellow", "norm": "cyan", "residual": "magenta"}
RED = COLOURS["barrier"][0]


def trace_command(name: str, scheme: str, form: str, out: Path | None) -> None:
    """Traces a model by name, and prints its graph or writes it to a file.

    Args:
        name: Name of the model, as for `empty_model`.
        scheme: Propagation scheme of the edges to show.
        form: `tree`, `json`, `dot`, `svg`, `html` or `placement`.
        out: File to write, whose path is printed; `None` prints the graph.

    Raises:
        SanError: If the name is unknown, the model cannot be traced, or the scheme does not fit it.
    """
    from san_bench.models.architectures import empty_model, quietly
    from san_bench.run.provenance import write_atomically
    from san_peft import trace

    if out is not None and out.is_dir():
        raise SanError(f"{out} is a folder. Pass the name of a file with --out.")
    model = empty_model(name)
    with quietly():
        graph = trace(model).select(scheme)
    shown = Path(name).resolve().name if (Path(name) / "config.json").is_file() else name
    title = f"{shown} ({type(model).__name__}), scheme {scheme}"
    if form == "tree" and out is None:
        _print_tree(graph, title)
        return
    text = FORMS[form](graph, title)
    if out is None:
        print(text)
        return
    try:
        write_atomically(out, text + "\n")
    except OSError as error:
        raise SanError(f"{out} cannot be written: {error.strerror}. Choose another file with --out.") from error
    print(out)


def to_json(graph: PropagationGraph, title: str = "") -> str:
    """Renders the graph as JSON, for `PropagationGraph.from_json`."""
    return graph.to_json(indent=2)


def to_placement(graph: PropagationGraph, title: str) -> str:
    """Renders one line per edge with the place where its scale is applied."""
    return f"{title}\n{describe_placement(graph)}"


def to_text(graph: PropagationGraph, title: str) -> str:
    """Renders the tree as plain text, without colour and line wrapping."""
    plain = Console(file=StringIO(), width=10_000, color_system=None, highlight=False)
    with plain.capture() as capture:
        plain.print(to_tree(graph, title))
    return capture.get().rstrip("\n")


def to_tree(graph: PropagationGraph, title: str) -> Group:
    """Renders the graph as a tree for the terminal: every layer, with the layers that its scale propagates to.

    Repeated blocks are folded. A number such as `x11` counts the edges that a line represents.
    """
    folded = fold_blocks(graph)
    parts: list[Text | Tree] = [Text(title, style="bold"), Text(summary(graph)), Text()]
    outgoing: dict[str, list[FoldedEdge]] = {}
    for edge in folded.edges:
        outgoing.setdefault(edge.anterior.name, []).append(edge)
    for block in folded.blocks:
        if not block.name:
            parts.append(_layer_tree(block, 0, outgoing))
            continue
        tree = Tree(Text(block.title, style="bold"), guide_style="dim")
        for position in range(len(block.layers)):
            tree.children.append(_layer_tree(block, position, outgoing))
        parts.append(tree)
    if folded.barriers:
        parts.append(_barrier_tree(folded))
    return Group(*parts)


def _layer_tree(block: FoldedBlock, position: int, outgoing: dict[str, list[FoldedEdge]]) -> Tree:
    layer = block.layers[position]
    inner = layer.count // (block.run.count if block.run else 1)
    label = Text.assemble(
        (block.label(layer), "" if block.name else "bold"),
        (f"  {layer.size}", "dim"),
        f"  x{inner}" if inner > 1 else "",
        ("  head", "bold") if layer.head else "",
        (f"  left out: {layer.layer.left_out}", "italic") if layer.layer.left_out else "",
    )
    tree = Tree(label, guide_style="dim")
    for edge in outgoing.get(layer.name, []):
        tree.add(_edge_line(edge, block))
    return tree


def _edge_line(edge: FoldedEdge, block: FoldedBlock) -> Text:
    inside = block.name and edge.posterior.name.startswith(f"{block.name}.")
    posterior = edge.posterior.name.removeprefix(f"{block.name}.") if inside else edge.target
    line = Text.assemble(
        "-> ", posterior, f"  [{edge.channels}]  ", (edge.kind, TERMINAL_STYLES[edge.kind]), f"  {path_words(edge)}"
    )
    line.append(f"  x{edge.count}" if edge.count > 1 else "")
    line.append(f"  {edge.note}" if edge.note else "", style="italic")
    return line


def _barrier_tree(folded: Folded) -> Tree:
    tree = Tree(Text("barriers", style="bold red"), guide_style="dim")
    reasons: dict[tuple[str, str], Tree] = {}
    for barrier in folded.barriers:
        key = (barrier.operation, barrier.reason)
        if key not in reasons:
            reasons[key] = tree.add(Text.assemble((barrier.operation, "red"), f": {barrier.reason}"))
        count = f"  x{barrier.count}" if barrier.count > 1 else ""
        reasons[key].add(Text.assemble(barrier.name, count, (f"  {barrier.note}" if barrier.note else "", "italic")))
    return tree


def _print_tree(graph: PropagationGraph, title: str) -> None:
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(to_tree(graph, title))
    else:
        console.file.write(to_text(graph, title) + "\n")


def to_dot(graph: PropagationGraph, title: str) -> str:
    """Renders the folded graph in Graphviz' DOT language: a cluster per block, an edge per folded edge."""
    folded = fold_blocks(graph)
    heading = _quoted(f"{title}\n{summary(graph)}")
    lines = [
        "digraph propagation {",
        f"  label={heading}; labelloc=t; rankdir=TB; newrank=true;",
        '  node [shape=box, style=rounded, fontname="Helvetica"]; edge [fontname="Helvetica", fontsize=10];',
    ]
    for number, block in enumerate(folded.blocks):
        inset = "  "
        if block.name:
            lines.append(f"  subgraph cluster_{number} {{ label={_quoted(block.title)};")
            inset = "    "
        for layer in block.layers:
            extra = ", peripheries=2" if layer.head else ""
            words = _quoted(f"{block.label(layer)}\n{layer.size}")
            lines.append(f"{inset}{_quoted(layer.name)} [label={words}{extra}];")
        lines += ["  }"] if block.name else []
    for edge in folded.edges:
        colour = COLOURS[edge.kind][0]
        words = _quoted("\n".join(filter(None, [*_facts(edge), f"x{edge.count}" if edge.count > 1 else ""])))
        style = ", style=dashed, constraint=false" if edge.leaves_block else ""
        lines.append(
            f"  {_quoted(edge.anterior.name)} -> {_quoted(edge.posterior.name)} "
            f'[label={words}, color="{colour}", fontcolor="{colour}"{style}];'
        )
    known = {layer.name for layer in folded.layers}
    for number, barrier in enumerate(folded.barriers):
        where = [f"at {barrier.name}", f"x{barrier.count}" if barrier.count > 1 else "", barrier.note]
        words = _quoted(f"{barrier.operation}: {barrier.reason}\n{', '.join(filter(None, where))}")
        lines.append(f'  barrier_{number} [label={words}, shape=note, color="{RED}", fontsize=10];')
        if barrier.name in known:
            lines.append(f'  barrier_{number} -> {_quoted(barrier.name)} [color="{RED}", arrowhead=tee];')
    return "\n".join([*lines, "}"])


def _facts(edge: FoldedEdge) -> list[str]:
    channels = "" if edge.channels.kind == "identity" else str(edge.channels)
    return [f"{edge.kind} {path_words(edge)}".strip(), channels, edge.note]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


FORMS: dict[str, Callable[[PropagationGraph, str], str]] = {
    "tree": to_text,
    "json": to_json,
    "dot": to_dot,
    "svg": to_svg,
    "html": graph_to_html,
    "placement": to_placement,
}
"""Output formats of `san trace`: pure functions of a graph and a title."""
