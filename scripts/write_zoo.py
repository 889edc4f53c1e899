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
from tests.zoo.table import Architecture, architectures  # noqa: E402
from write_results import insert  # noqa: E402

from san_bench.run.provenance import provenance, write_atomically  # noqa: E402
from san_peft import PropagationGraph  # noqa: E402
from san_peft.errors import SanError  # noqa: E402
from san_peft.tuner.decompose import KINDS  # noqa: E402

PAGE = ROOT / "docs" / "guides" / "models.md"
EDGES = ("exact", "activation", "norm", "residual")
HEAD = ("architecture", *EDGES, "barriers", "left out", "hosts")


def row_of(architecture: Architecture, reasons: dict[tuple[str, str], int]) -> list[str]:
    """Returns the cells of one architecture, and counts the reasons of its barriers."""
    subject = Subject(architecture)
    try:
        graph = subject.graph
    except SanError as error:
        return [architecture.name, *[""] * len(EDGES), f"cannot be traced: {error}".partition(". ")[0], "", ""]
    kinds = Counter(edge.kind for edge in graph.select("all").edges)
    return [
        architecture.name,
        *(str(kinds[kind]) for kind in EDGES),
        barriers(graph, reasons),
        left_out(graph),
        hosts(graph, subject.model),
    ]


def barriers(graph: PropagationGraph, reasons: dict[tuple[str, str], int]) -> str:
    """Returns the numbers of the reasons of a graph's barriers, with how often each stands there."""
    found = Counter((b.operation, b.reason) for b in graph.barriers if "never called" not in b.reason)
    for key in found:
        reasons.setdefault(key, len(reasons) + 1)
    cells = [f"{count} {key[0]} [{reasons[key]}]" for key, count in found.items()]
    return ", ".join(cells)


def left_out(graph: PropagationGraph) -> str:
    """Returns how many layers the default targets leave out: heads, and layers that never ran."""
    idle = [b.layer for b in graph.barriers if "never called" in b.reason]
    parts = [f"{'head' if len(graph.heads) == 1 else 'heads'} {shown(graph.heads)}"] if graph.heads else []
    return "; ".join([*parts, *([f"never called: {shown(idle)}"] if idle else [])])


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


def main() -> None:
    words = sys.argv[1:]
    torch.set_num_threads(2)
    families: dict[str, list[list[str]]] = {}
    reasons: dict[tuple[str, str], int] = {}
    missing = set()
    for name, architecture in architectures().items():
        if words and not any(word in name or word in architecture.family for word in words):
            continue
        if not architecture.available:
            missing.add(architecture.library)
            continue
        print(name, file=sys.stderr, flush=True)
        families.setdefault(architecture.family, []).append(row_of(architecture, reasons))
    parts = [table(family, rows) for family, rows in families.items()]
    notes = [f"{number}. `{operation}`: {reason}" for (operation, reason), number in reasons.items()]
    origin = provenance()
    libraries = ("timm", "torchvision", "diffusers")
    versions = {**origin["versions"], **{name: version(name) for name in libraries if name not in missing}}
    count = sum(map(len, families.values()))
    line = (
        f"{count} architectures. Traced {datetime.date.today()} by `python scripts/write_zoo.py`; commit "
        f"{origin['commit'] or 'unknown'}; {', '.join(f'{n} {v}' for n, v in versions.items())}, "
        f"Python {origin['python']}; {origin['cpu']}."
    )
    text = "\n\n".join([*parts, "### Reasons of the barriers", "\n".join(notes), line])
    if words:
        print(text)
        return
    if missing:
        raise SystemExit(f"The page is of all architectures: pip install {' '.join(sorted(missing))}")
    write_atomically(PAGE, insert(PAGE.read_text(encoding="utf-8"), text))


if __name__ == "__main__":
    main()
