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
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from san_bench.datacheck.names import NAMES, by_split
from san_bench.language.records import SUFFIXES, Row, file_rows
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
        records: The questions with their answers.
        answers: Valid answers; empty for free-form answers.
        sought: Patterns of an answer in a text; the first match counts. Empty for free-form answers.
        lm_eval: Task name in lm-eval, or `None`.
    """

    records: tuple[Instruction, ...]
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
        source: A file (JSON list, JSON lines or parquet); a folder of such files named after their splits, or saved by
            `datasets` with `save_to_disk`; or the name of a dataset on the Hugging Face hub.
        split: `train`, `val` or `test`, under any common name; `None` if there is only one. Ignored for a file.
        answers: Valid answers; any by default.

    Returns:
        The records, in the order of the source.

    Raises:
        SanError: If the source or split does not exist, or records are invalid; the message lists them.
    """
    path = Path(source)
    if path.is_file():
        rows = file_rows(path, FIELDS)
    elif path.is_dir():
        rows = _folder_rows(path, split)
    elif path.suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise SanError(
            f"There is no file or folder {source}, and it is not a valid dataset name on the Hugging Face hub."
        )
    else:
        rows = _hub_rows(str(source), split)
    return check_records(rows, str(source), answers)


def splits_of(source: str | Path) -> tuple[str, ...]:
    """Returns the standard names of the splits of a source, see `load_records`; a file has none.

    Raises:
        SanError: If the source does not exist.
    """
    path = Path(source)
    if not path.is_dir():
        names = [] if path.is_file() else _hub_tables(str(source))
    elif (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    else:
        names = by_split(_files(path))
    return tuple(NAMES.get(str(name).lower(), str(name)) for name in names)


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


def fingerprint(records: Sequence[Instruction]) -> str:
    """Returns the sha256 over all records in order, independent of location and file format."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(astuple(record)).encode() + b"\n")
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


def _folder_rows(folder: Path, split: str | None) -> Iterator[Row]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_rows(folder, split)
    chosen = _choose(by_split(_files(folder)), split, str(folder))
    named = [(path, path.name if len(chosen) > 1 else "") for path in chosen]
    return (row for path, name in named for row in _named(file_rows(path, FIELDS), name))


def _files(folder: Path) -> list[Path]:
    """Returns the record files with the first suffix that occurs."""
    for suffix in SUFFIXES:
        files = sorted(path for path in folder.rglob(f"*{suffix}") if not path.name.startswith("."))
        if files:
            return files
    raise SanError(
        f"{folder} contains no records: no {', '.join(SUFFIXES)} file, and no dataset saved with save_to_disk."
    )


def _named(rows: Iterable[Row], file: str) -> Iterator[Row]:
    """Prefixes the locations of rows with the file name, if there is one."""
    return ((f"{file}, {place}" if file else place, row) for place, row in rows)


def _saved_rows(folder: Path, split: str | None) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise SanError(f"{folder} contains no readable dataset: {error}.") from error
    parts = {str(name): table for name, table in saved.items()} if isinstance(saved, datasets.DatasetDict) else None
    return _table_rows(saved if parts is None else _choose(parts, split, str(folder)))


def _hub_rows(name: str, split: str | None) -> Iterator[Row]:
    return _table_rows(_choose(_hub_tables(name), split, name))


def _hub_tables(name: str) -> dict[str, Any]:
    import datasets
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        tables = datasets.load_dataset(name)
    except (DatasetsError, OSError, ValueError, httpx.HTTPError) as error:
        raise SanError(
            f"{name} is neither a local file or folder nor available on the Hugging Face hub: "
            f"{str(error).rstrip('.')}. With a network, `hf download {name} --repo-type dataset --local-dir DIR` "
            "downloads it; then use that folder."
        ) from error
    return {str(part): table for part, table in tables.items()}


def _table_rows(table: Any) -> Iterator[Row]:
    """Returns the rows of a table of the `datasets` library."""
    wanted = table.select_columns([name for name in FIELDS if name in table.column_names])
    return ((f"index {i}", row) for i, row in enumerate(wanted))


def _choose(parts: dict[str, Any], split: str | None, source: str) -> Any:
    """Returns a split by any common name, or the only one."""
    named = {NAMES.get(name.lower(), name): part for name, part in parts.items()}
    if split is None and len(named) == 1:
        return next(iter(named.values()))
    wanted = None if split is None else NAMES.get(split.lower(), split)
    if wanted not in named:
        what = "several splits; choose one of them" if split is None else f"no split {split!r}; it has"
        raise SanError(f"{source} has {what}: {', '.join(named)}.")
    return named[wanted]
