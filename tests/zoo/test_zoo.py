"""The same laws on small random models of many architectures; a sample of them runs with every test."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from tests.zoo.faults import FAULTS
from tests.zoo.laws import LAWS, Subject, VacuousLaw
from tests.zoo.table import FAST, architectures

TABLE = architectures()


def _cases() -> list:
    cases = []
    for name, row in TABLE.items():
        for law in LAWS:
            marks = [] if name in FAST else [pytest.mark.slow]
            if not row.available:
                marks.append(pytest.mark.skip(reason=f"needs {row.library}: pip install san-peft[zoo]"))
            if reason := FAULTS.get(name, {}).get(law):
                marks.append(pytest.mark.xfail(reason=reason, strict=True))
            cases.append(pytest.param(name, law, marks=marks, id=f"{name}-{law}"))
    return cases


@lru_cache(maxsize=1)
def subject_of(name: str) -> Subject:
    torch.set_num_threads(2)
    return Subject(TABLE[name])


@pytest.mark.parametrize(("name", "law"), _cases())
def test_law(name, law):
    try:
        LAWS[law](subject_of(name))
    except VacuousLaw as reason:
        pytest.skip(str(reason))


def test_the_table_is_large_and_its_sample_is_of_it():
    assert len(TABLE) >= 120
    assert set(FAST) <= set(TABLE)
    assert set(FAULTS) <= set(TABLE)
    assert all(set(faults) <= set(LAWS) for faults in FAULTS.values())


def test_the_page_of_models_names_every_architecture():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "models.md").read_text(encoding="utf-8")
    missing = [name for name in TABLE if f"| {name} |" not in page]
    assert not missing, f"python scripts/write_zoo.py writes the page anew; it lacks {missing[:5]}"
