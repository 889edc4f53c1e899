"""Entry point of the `san` command. The base install of san-peft lacks the runner's dependencies."""

from __future__ import annotations

import sys
from importlib.util import find_spec

MODULES = ("accelerate", "PIL", "pydantic", "rich", "tyro", "yaml")
"""Top-level modules of the extra `bench`."""


def main() -> None:
    """Runs `san`, or exits with code 1 and says what to install if a dependency of the runner is missing."""
    if not all(map(find_spec, MODULES)):
        print('san needs: pip install "san-peft[bench]"', file=sys.stderr)
        sys.exit(1)
    from san_bench import cli, quiet  # noqa: F401 (importing quiet hides warnings)

    cli.main()
