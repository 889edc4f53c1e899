r"""Instruction records in the format of `commonsense_170k.json`, from files, folders or the hub.

A record has four strings: the instruction, an input (often empty), the expected output, and the answer within it.

Example:
    >>> import json
    >>> from pathlib import Path
    >>> record = Instruction("Is water wet?\n\nAnswer format: true/false", "", "the correct answer is true", "true")
    >>> _ = Path("test.json").write_text(json.dumps([record.fields()]), encoding="utf-8")
    >>> load_records("test.json", answers=("true", "false")) == (record,)
    True
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from san_bench.language.records import Row
from san_bench.language.sources import source_rows
from san_peft.errors import SanError

FIELDS = ("instruction", "input", "output", "answer")
"""Fields of a record; other fields are ignored."""

LISTED = 20
"""Maximum number of invalid records in a message."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction with its answer.

    Attributes:
        instruction: Instruction with the question and the possible answers.
        input: Additional input; often empty.
        output: Expected output.
        answer: The part of the output that is scored.
    """

    instruction: str
    input: str
    output: str
    answer: str

    def fields(self) -> dict[str, str]:
        """Returns the fields by name, as in a file."""
        return dict(zip(FIELDS, astuple(self), strict=True))


@dataclass(frozen=True)
class Questions:
    """Questions of one task.

    Attributes:
        records: The questions with their answers; in your own data, records of any format.
        answers: Valid answers; empty for free-form answers.
        sought: Patterns of an answer in a text; the first match counts. Empty for free-form answers.
        lm_eval: Task name in lm-eval, or `None`.
    """

    records: tuple[Any, ...]
    answers: tuple[str, ...]
    sought: tuple[str, ...]
    lm_eval: str | None = None

    def read_answer(self, text: str) -> str | None:
        """Returns the first answer in a text, or `None`; case-sensitive."""
        match = re.search("|".join(self.sought), text)
        return match[0] if match else None


def load_records(
    source: str | Path, split: str | None = None, answers: Collection[str] | None = None
) -> tuple[Instruction, ...]:
    """Loads and validates records.

    Args:
        source: A file, a folder of files named after their splits, a folder saved by `datasets`, or the name of a
            dataset on the Hugging Face hub; see `san_bench.language.sources.source_rows`.
        split: `train`, `val` or `test`, under any common name; `None` if there is only one. Ignored for a file.
        answers: Valid answers; any by default.

    Returns:
        The records, in the order of the source.

    Raises:
        SanError: If the source or split does not exist, or records are invalid; the message lists them.
    """
    return check_records(source_rows(source, split, FIELDS), str(source), answers)


def check_records(rows: Iterable[Row], source: str, answers: Collection[str] | None = None) -> tuple[Instruction, ...]:
    """Validates rows and converts them to records.

    Args:
        rows: Rows with their locations.
        source: Name of the source for messages.
        answers: Valid answers; any by default.

    Raises:
        SanError: If there are no records, or any is invalid; the message counts them and lists the first.
    """
    records: list[Instruction] = []
    problems: list[str] = []
    count = 0
    for count, (place, row) in enumerate(rows, 1):  # noqa: B007 - the last count is the number of records
        wrong = _problems(row, answers)
        if wrong:
            problems.append(f"{place}: {'; '.join(wrong)}")
        else:
            records.append(Instruction(**{name: row[name] for name in FIELDS}))
    if problems:
        more = f"\n  and {len(problems) - LISTED:,} more" if len(problems) > LISTED else ""
        raise SanError(
            f"{source}: {len(problems):,} of {count:,} records are invalid. Each needs the strings "
            f"{', '.join(FIELDS)}.\n  " + "\n  ".join(problems[:LISTED]) + more
        )
    if not records:
        raise SanError(f"{source} contains no records.")
    return tuple(records)


def fingerprint(records: Sequence[Any]) -> str:
    """Returns the sha256 over all records in order, independent of location and file format."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(astuple(record), default=str).encode() + b"\n")
    return digest.hexdigest()


def _problems(row: Any, answers: Collection[str] | None) -> list[str]:
    if isinstance(row, Exception):
        return [f"not JSON ({row})"]
    if not isinstance(row, dict):
        return [f"a {type(row).__name__}, not a record"]
    wrong = [f"{name} is missing" for name in FIELDS if name not in row]
    wrong += [
        f"{name} is {row[name]!r:.40}, not a string"
        for name in FIELDS
        if name in row and not isinstance(row[name], str)
    ]
    if isinstance(row.get("instruction"), str) and not row["instruction"].strip():
        wrong.append("instruction is empty")
    answer = row.get("answer")
    if answers is not None and isinstance(answer, str) and answer not in answers:
        wrong.append(f"answer {answer!r:.40} is not one of {', '.join(answers)}")
    return wrong
