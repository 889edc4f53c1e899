"""Recipe files, written by tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def write(tmp_path):
    """Writes a file below the folder of the test, and returns its path."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write
