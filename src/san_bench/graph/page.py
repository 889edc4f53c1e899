"""Render a propagation graph as an HTML page: the drawing, and sortable, filterable tables of edges and barriers."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from string import Template

from san_bench.graph.drawing import COLOURS, to_svg
from san_bench.graph.wording import summary
from san_peft.propagation.graph import PropagationGraph

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #111827; --dim: #4b5563; --paper: #ffffff; --rim: #d1d5db; $light }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f1f5f9; --dim: #b6c2d2; --paper: #0f172a; --rim: #475569; $dark }
}
body { margin: 0 auto; max-width: 75rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.5rem 0 0.5rem; }
p { color: var(--dim); margin: 0.25rem 0 1rem; }
svg { display: block; width: 100%; max-width: 36rem; height: auto; }
main { display: grid; gap: 0 2rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 70rem) { main { grid-template-columns: minmax(0, 30rem) minmax(0, 1fr); } }
label { display: block; margin-top: 1rem; }
input { font: inherit; width: 100%; box-sizing: border-box; padding: 0.4rem; border: 1px solid var(--rim);
  border-radius: 0.4rem; color: inherit; background: var(--paper); }
table { border-collapse: collapse; width: 100%; font-size: 0.85rem; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.5rem 0.3rem 0; border-bottom: 1px solid var(--rim);
  overflow-wrap: break-word; }
th button { font: inherit; font-weight: 700; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; text-align: left; }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
$kinds
@media (max-width: 40rem) {
  table, thead, tbody, tr, td { display: block; }
  thead tr { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; }
  tbody tr { border-bottom: 1px solid var(--rim); padding: 0.4rem 0; }
  th, td { border: 0; padding: 0; }
  td { overflow-wrap: anywhere; }
  td::before { content: attr(data-label) " "; color: var(--dim); font-weight: 400; }
}
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
<main>
<div>
$svg
</div>
<div>
<label>Filter rows <input type="search" id="filter" autocomplete="off"></label>
$tables
</div>
</main>
<script>
const filter = document.getElementById("filter");
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const table of document.querySelectorAll("table")) {
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      row.style.display = row.hidden ? "none" : "";
      shown += row.hidden ? 0 : 1;
    }
    table.previousElementSibling.querySelector("span").textContent = shown + " of " + table.tBodies[0].rows.length;
  }
});
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = (row) => row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => sign * key(a).localeCompare(key(b), undefined, { numeric: true }));
    table.tBodies[0].append(...rows);
  }));
}
</script>
</body>
</html>""")


def graph_to_html(graph: PropagationGraph, title: str) -> str:
    """Renders a self-contained HTML page of a graph.

    Args:
        graph: The graph.
        title: Heading of the page.

    Returns:
        The contents of an HTML file: summary, drawing, and tables of all unfolded edges and all barriers.
    """
    edges = [(e.anterior, e.posterior, e.kind, str(e.channels), ", ".join(e.via)) for e in graph.edges]
    barriers = [(b.layer, b.operation, b.reason) for b in graph.barriers]
    tables = [_table("Edges", ("anterior", "posterior", "kind", "channel map", "through"), edges)]
    if barriers:
        tables.append(_table("Barriers", ("layer", "operation", "reason"), barriers))
    light, dark = (" ".join(f"--{kind}: {pair[side]};" for kind, pair in COLOURS.items()) for side in (0, 1))
    return PAGE.substitute(
        title=escape(title),
        summary=escape(summary(graph)),
        svg=to_svg(graph, title, heading=False),
        tables="\n".join(tables),
        light=light,
        dark=dark,
        kinds="\n".join(
            f"td.{kind} {{ color: var(--{kind}); font-weight: 600; white-space: nowrap; }}" for kind in COLOURS
        ),
    )


def _table(name: str, heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    cells = "".join(f'<th scope="col"><button type="button">{escape(head)}</button></th>' for head in heads)
    lines = [f"<h2>{name} (<span>{len(rows)}</span>)</h2>", f"<table><thead><tr>{cells}</tr></thead><tbody>"]
    for row in rows:
        lines.append(f"<tr>{''.join(map(_cell, heads, row))}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _cell(head: str, text: str) -> str:
    kind = f' class="{escape(text)}"' if head == "kind" else ""
    return f'<td data-label="{escape(head)}"{kind}>{escape(text).replace(".", ".<wbr>")}</td>'
