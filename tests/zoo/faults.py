"""Laws that do not hold of an architecture yet, with the reason; a test fails as soon as one holds."""

from __future__ import annotations

FAULTS: dict[str, dict[str, str]] = {}
