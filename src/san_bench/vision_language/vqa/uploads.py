"""Reads model answers, and writes submission files for benchmark servers.

The formats are those of LLaVA (scripts/convert_vqav2_for_submission.py and others there).
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from san_bench.config.strict import san_error
from san_bench.run.provenance import write_atomically
from san_bench.vision_language.vqa.benchmarks import Question
from san_bench.vision_language.vqa.normalize import normalise_for_upload
from san_bench.vision_language.vqa.rows import read_lines, read_table, require_keys

LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")
"""Columns of the MMBench table that are not uploaded."""


def read_answers(path: str | Path, questions: Sequence[Question]) -> list[str | None]:
    """Reads answers in LLaVA's format: JSON lines with `question_id`, `text`, and optionally `prompt`.

    Args:
        path: The file.
        questions: The questions; those with the same ID are told apart by the prompt.

    Returns:
        The answer to each question, or `None`.

    Raises:
        SanError: If the file cannot be read, or has duplicate or unknown questions.
    """
    rows = read_lines(Path(path))
    require_keys(path, rows, ("question_id", "text"))
    ids = [question.id for question in questions]
    shared = len(set(ids)) < len(ids)
    if shared:
        require_keys(path, rows, ("prompt",))
    given: dict[Any, str] = {}
    for row in rows:
        key = (row["question_id"], row["prompt"]) if shared else row["question_id"]
        if key in given:
            raise san_error(f"{path} answers the question {key!r} twice.")
        given[key] = row["text"]
    keys = [(question.id, question.text) if shared else question.id for question in questions]
    if strange := list(set(given) - set(keys)):
        raise san_error(f"{path} answers {len(strange):,} unknown questions, such as {strange[0]!r}.")
    return [given.get(key) for key in keys]


def write_vqav2(path: str | Path, questions: Sequence[Question], answers: Sequence[str | None]) -> None:
    """Writes a VQAv2 submission: a list of `question_id` and `answer`, normalized as in LLaVA."""
    pairs = zip(questions, answers, strict=True)
    rows = [{"question_id": q.id, "answer": normalise_for_upload(answer or "")} for q, answer in pairs]
    write_atomically(Path(path), json.dumps(rows))


def write_mmbench(
    path: str | Path, table: str | Path, questions: Sequence[Question], answers: Sequence[str | None]
) -> Path:
    """Writes an MMBench submission: the table without images, with a column `prediction`.

    Args:
        path: An `.xlsx` file, which needs openpyxl; without it, writes a `.tsv` instead, with a warning.
        table: The MMBench table.
        questions: Its questions.
        answers: The answers.

    Returns:
        Path of the written file.
    """
    path = Path(path)
    header, rows = read_table(Path(table))
    columns = [name for name in header if name not in LEFT_OUT]
    said = {str(question.id): answer or "" for question, answer in zip(questions, answers, strict=True)}
    columns.insert(min(6, len(columns)), "prediction")
    cells = [columns, *([{**row, "prediction": said.get(row["index"], "")}[c] for c in columns] for row in rows)]
    try:
        workbook = import_module("openpyxl").Workbook()
    except ImportError:
        path = path.with_suffix(".tsv")
        warnings.warn(f"openpyxl is not installed, so {path} is a table, not a spreadsheet.", stacklevel=2)
        text = io.StringIO()
        csv.writer(text, delimiter="\t", lineterminator="\n").writerows(cells)
        write_atomically(path, text.getvalue())
        return path
    for row in cells:
        workbook.active.append(
            [int(c) if name == "index" and c.isdecimal() else c for name, c in zip(columns, row, strict=True)]
        )
    content = io.BytesIO()
    workbook.save(content)
    write_atomically(path, content.getvalue())
    return path
