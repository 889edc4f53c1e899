"""Writes the table of a demo into the README, between its two marks.

    san demo && python scripts/write_results.py                # from runs/demo/table.md
    python scripts/write_results.py runs/another/table.md

The table is copied as it is, with the lines that say where its numbers come from.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from san_bench.run.provenance import write_atomically

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
START, END = "<!-- results:start -->\n", "<!-- results:end -->"


def insert(readme: str, table: str) -> str:
    parts = re.fullmatch(f"(.*{START}).*({END}.*)", readme, re.S)
    if not parts:
        raise SystemExit(f"{README.name} lacks {START.strip()} or {END}")
    return f"{parts[1]}{table.strip()}\n{parts[2]}"


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "demo" / "table.md"
    if not source.is_file():
        raise SystemExit(f"There is no {source}; `san demo` makes one.")
    table = source.read_text(encoding="utf-8")
    if "+changes" in table or "commit unknown" in table:
        print("Note: these numbers come from code that no commit holds.", file=sys.stderr)
    write_atomically(README, insert(README.read_text(encoding="utf-8"), table))


if __name__ == "__main__":
    main()
