"""Checks the subject of a commit message: one line of at most 72 characters, then a blank line.

    python scripts/check_subject.py .git/COMMIT_EDITMSG

pre-commit runs it as a commit-msg hook: `pre-commit install` sets it up.
"""

from __future__ import annotations

import sys
from pathlib import Path

MOST = 72
SCISSORS = "# ------------------------ >8 ------------------------"


def problem(message: str) -> str | None:
    """Returns what is wrong with a commit message, or `None`."""
    lines = message.partition(SCISSORS)[0].splitlines()
    while lines and (lines[0].startswith("#") or not lines[0].strip()):
        lines.pop(0)
    if not lines:
        return None  # git itself refuses an empty message
    subject = lines[0].rstrip()
    if len(subject) > MOST:
        return f"The subject has {len(subject)} characters, {MOST} at most: {subject[:MOST]}|{subject[MOST:]}"
    if len(lines) > 1 and lines[1].strip() and not lines[1].startswith("#"):
        return f"The line after the subject must be blank, but is {lines[1].strip()!r}."
    return None


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    found = problem(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if found:
        raise SystemExit(found)


if __name__ == "__main__":
    main()
