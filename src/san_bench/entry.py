"""Entry point of the `san` command. The base install of san-peft lacks the runner's dependencies."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

MODULES = ("accelerate", "PIL", "pydantic", "rich", "tyro", "yaml")
"""Top-level modules of the extra `bench`."""


NOISY = ("torch.utils._pytree", "bitsandbytes.cextension", "torchao")
"""Loggers of warnings about the inside of other libraries, which they emit when they are imported."""


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def main() -> None:
    """Runs `san`, or exits with code 1 and says what to install if a dependency of the runner is missing."""
    if not all(map(find_spec, MODULES)):
        print('san needs: pip install "san-peft[bench]"', file=sys.stderr)
        sys.exit(1)
    for name in NOISY:
        logging.getLogger(name).addFilter(_only_errors)
    from san_bench import cli

    cli.main()
