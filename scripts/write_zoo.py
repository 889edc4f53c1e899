"""Writes what SAN makes of every architecture of tests/zoo into docs/guides/models.md.

    python scripts/write_zoo.py             # traces all of them: some minutes
    python scripts/write_zoo.py Bert timm   # prints the rows whose name or family holds a word, writes nothing

The page keeps its text; the tables between its two marks are made anew.
"""

from __future__ import annotations

import datetime
import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tests.zoo.laws import Subject  # noqa: E402
from tests.zoo.table import architectures  # noqa: E402

from san_bench.run.provenance import provenance, write_atomically  # noqa: E402
from san_peft import PropagationGraph  # noqa: E402
from san_peft.errors import SanError  # noqa: E402
from san_peft.tuner.decompose import KINDS  # noqa: E402
from write_results import insert  # noqa: E402

PAGE = ROOT / "docs" / "guides" / "models.md"
EDGES = ("exact", "activation", "norm", "residual")
HEAD = ("architecture", *EDGES, "barriers", "left out", "hosts")


def record_of(subject: Subject) -> dict[str, Any]:
    """Returns what a row of the page says of a model, as plain data."""
    try:
        graph = subject.graph
    except SanError as error:
        return {"error": str(error).partition(". ")[0]}
    kinds = Counter(edge.kind for edge in graph.select("all").edges)
    idle = [b.layer for b in graph.barriers if "never called" in b.reason]
    found = Counter((b.operation, b.reason) for b in graph.barriers if b.layer not in idle)
    return {
        "edges": [kinds[kind] for kind in EDGES],
        "barriers": [[operation, reason, count] for (operation, reason), count in found.items()],
        "heads": shown(graph.heads),
        "idle": shown(idle),
        "hosts": hosts(graph, subject.model),
    }


def cells(name: str, record: dict[str, Any], reasons: dict[tuple[str, str], int]) -> list[str]:
    """Returns the cells of a row, and numbers the reasons of its barriers."""
    if "error" in record:
        return [name, *[""] * len(EDGES), f"cannot be traced: {record['error']}", "", ""]
    barriers = []
    for operation, reason, count in record["barriers"]:
        number = reasons.setdefault((operation, reason), len(reasons) + 1)
        barriers.append(f"{count} {operation} [{number}]")
    left = [record["heads"], *([f"never called: {record['idle']}"] if record["idle"] else [])]
    return [name, *map(str, record["edges"]), ", ".join(barriers), "; ".join(filter(None, left)), record["hosts"]]


def shown(names: Any) -> str:
    """Returns names of layers without the numbers of their blocks."""
    folded = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in names))
    return ", ".join(f"`{name}`" for name in folded[:3]) + (f" and {len(folded) - 3} more" if len(folded) > 3 else "")


def hosts(graph: PropagationGraph, model: torch.nn.Module) -> str:
    """Returns which hosts take every layer that carries a scale by default, or how many layers the others leave out."""
    targets = [model.get_submodule(layer.fqn) for layer in graph.layers if layer.fqn not in graph.heads]
    refused = {name: sum(kind.unfit(m) is not None for m in targets) for name, kind in KINDS.items()}
    if not any(refused.values()):
        return "all"
    fit = [name for name, count in refused.items() if not count]
    some = {name: count for name, count in refused.items() if count}
    numbers = sorted(set(some.values()))
    others = f"others without {' or '.join(map(str, numbers))} of {len(targets)} layers"
    return f"{', '.join(fit) or 'none whole'}; {others}"


def table(family: str, rows: list[list[str]]) -> str:
    """Returns one family's table."""
    lines = [f"### {family}", "", f"| {' | '.join(HEAD)} |", f"|---|{'---:|' * len(EDGES)}---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def page(records: dict[str, dict[str, Any]], families: dict[str, str], packages: set[str]) -> str:
    """Returns the tables of all families, the reasons of the barriers, and where the numbers come from.

    Args:
        records: By name of an architecture, its record.
        families: By name of an architecture, its family.
        packages: Names of the packages that they are of.
    """
    reasons: dict[tuple[str, str], int] = {}
    tables: dict[str, list[list[str]]] = {}
    for name, record in records.items():
        tables.setdefault(families[name], []).append(cells(name, record, reasons))
    notes = [f"{number}. `{operation}`: {reason}" for (operation, reason), number in reasons.items()]
    origin = provenance()
    known = {**origin["versions"], **{name: version(name) for name in sorted(packages)}}
    versions = ", ".join(f"{name} {number}" for name, number in known.items())
    line = (
        f"{len(records)} architectures. Traced {datetime.date.today()} by `python scripts/write_zoo.py`; commit "
        f"{origin['commit'] or 'unknown'}; {versions}, Python {origin['python']}; {origin['cpu']}."
    )
    parts = [table(family, rows) for family, rows in tables.items()]
    return "\n\n".join([*parts, "### Reasons of the barriers", "\n".join(notes), line])


def main() -> None:
    words = sys.argv[1:]
    torch.set_num_threads(2)
    rows = architectures()
    if words:
        rows = {n: row for n, row in rows.items() if any(word in n or word in row.family for word in words)}
    missing = {row.library for row in rows.values() if not row.available}
    if missing and not words:
        raise SystemExit(f"The page is of all architectures: pip install {' '.join(sorted(missing))}")
    records = {}
    for name, row in rows.items():
        if row.available:
            print(name, file=sys.stderr, flush=True)
            records[name] = record_of(Subject(row))
    packages = {rows[name].library for name in records}
    text = page(records, {name: row.family for name, row in rows.items()}, packages)
    if words:
        print(text)
    else:
        write_atomically(PAGE, insert(PAGE.read_text(encoding="utf-8"), text))


if __name__ == "__main__":
    main()
