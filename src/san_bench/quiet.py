"""Hides, when it is imported, warnings about the inside of other libraries that they emit when they are imported.

The command `san` imports it, and the server that forks its worker processes. The library never does.
"""

from __future__ import annotations

import logging

NOISY = ("torch.utils._pytree", "bitsandbytes.cextension", "torchao")
"""Loggers of such warnings."""


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


for _name in NOISY:
    logging.getLogger(_name).addFilter(_only_errors)
