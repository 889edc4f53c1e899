"""Writes a table of results into a page, between its two marks.

    san demo && python scripts/write_results.py                # runs/demo/table.md into docs/index.md
    python scripts/write_results.py runs/another/table.md
    python benchmarks/step.py && python scripts/write_results.py runs/benchmarks/step.md docs/guides/speed.md
    san table results/order --format markdown --out runs/order.md
    python scripts/write_results.py runs/order.md docs/guides/evidence.md order      # a page with several tables

The table is copied as it is, with the lines that say where its numbers come from.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from san_bench.run.provenance import write_atomically

ROOT = Path(__file__).parents[1]


def insert(page: str, table: str, name: str = "results") -> str:
    start, end = f"<!-- {name}:start -->\n", f"<!-- {name}:end -->"
    parts = re.fullmatch(f"(.*{start}).*({end}.*)", page, re.S)
    if not parts:
        raise SystemExit(f"The page lacks {start.strip()} or {end}")
    return f"{parts[1]}{table.strip()}\n{parts[2]}"


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "demo" / "table.md"
    if not source.is_file():
        raise SystemExit(f"There is no {source}; the commands above make one.")
    page = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "index.md"
    table = source.read_text(encoding="utf-8")
    if "+changes" in table or "commit unknown" in table:
        print("Note: these numbers come from code that no commit holds.", file=sys.stderr)
    write_atomically(page, insert(page.read_text(encoding="utf-8"), table, *sys.argv[3:4]))


if __name__ == "__main__":
    main()
