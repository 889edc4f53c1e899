r"""Records of instructions, as `commonsense_170k.json` has them, from the files that people keep them in.

A record is four texts: what to do, an input to do it on (often empty), what a model should write, and the answer in it.

Example:
    >>> import json
    >>> from pathlib import Path
    >>> record = Record("Is water wet?\n\nAnswer format: true/false", "", "the correct answer is true", "true")
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
"""Fields of a record. A file may have others, which are not read."""

LISTED = 20
"""Bad records that a message lists."""


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction with its answer.

    Attributes:
        instruction: What to do, with the question and the possible answers.
        input: What to do it on; empty if the instruction holds everything.
        output: What a model should write.
        answer: The part of the output that is scored.
    """

    instruction: str
    input: str
    output: str
    answer: str

    def fields(self) -> dict[str, str]:
        """Returns the fields by name, as a file has them."""
        return dict(zip(FIELDS, astuple(self), strict=True))


@dataclass(frozen=True)
class Questions:
    """Questions of one task.

    Attributes:
        records: The questions with their answers.
        answers: What may be answered.
        sought: Patterns of what counts as an answer in a text; the first one that is found counts. Where answers are
            free there are none, and of `answers` neither.
        lm_eval: The task's name in lm-eval, or `None`.
    """

    records: tuple[Record, ...]
    answers: tuple[str, ...]
    sought: tuple[str, ...]
    lm_eval: str | None = None

    def read_answer(self, text: str) -> str | None:
        """Returns the first answer in a text, or `None`; case counts."""
        match = re.search("|".join(self.sought), text)
        return match[0] if match else None


def load_records(
    source: str | Path, split: str | None = None, answers: Collection[str] | None = None
) -> tuple[Record, ...]:
    """Loads records, and checks every one.

    Args:
        source: A file: a JSON list, JSON lines or parquet. Or a folder: what `save_to_disk` of the `datasets` library
            wrote, or such files named after their splits. Or, where nothing of that name is here, the name of a data
            set on the Hugging Face hub.
        split: `train`, `val` or `test`, under any of their usual names; `None` where there is only one. A file is
            one split, whatever it is called.
        answers: The answers that there may be; any by default.

    Returns:
        The records, in the order of the source.

    Raises:
        SanError: If there is no such source or split, or records are not as they must be; the message lists them.
    """
    path = Path(source)
    if path.is_file():
        rows = file_rows(path, FIELDS)
    elif path.is_dir():
        rows = _folder_rows(path, split)
    elif path.suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise SanError(f"There is no file or folder {source}, and it is no name of a data set on the Hugging Face hub.")
    else:
        rows = _hub_rows(str(source), split)
    return check_records(rows, str(source), answers)


def splits_of(source: str | Path) -> tuple[str, ...]:
    """Returns the splits that a source of `load_records` has, under their usual names; a file has none.

    Raises:
        SanError: If there is no such source.
    """
    path = Path(source)
    if not path.is_dir():
        names = [] if path.is_file() else _hub_tables(str(source))
    elif (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    else:
        names = by_split(_files(path))
    return tuple(NAMES.get(str(name).lower(), str(name)) for name in names)


def check_records(rows: Iterable[Row], source: str, answers: Collection[str] | None = None) -> tuple[Record, ...]:
    """Makes records of what a file holds.

    Args:
        rows: Where each stands, and what stands there.
        source: What to call all of it in a message.
        answers: The answers that there may be; any by default.

    Raises:
        SanError: If there is none, or any is not as it must be; the message gives their number and lists the first.
    """
    records: list[Record] = []
    problems: list[str] = []
    count = 0
    for count, (place, row) in enumerate(rows, 1):  # noqa: B007 - the last count is the number of records
        wrong = _problems(row, answers)
        if wrong:
            problems.append(f"{place}: {'; '.join(wrong)}")
        else:
            records.append(Record(**{name: row[name] for name in FIELDS}))
    if problems:
        more = f"\n  and {len(problems) - LISTED:,} more" if len(problems) > LISTED else ""
        raise SanError(
            f"{source}: {len(problems):,} of {count:,} records are not as they must be. Each needs the texts "
            f"{', '.join(FIELDS)}.\n  " + "\n  ".join(problems[:LISTED]) + more
        )
    if not records:
        raise SanError(f"{source} holds no records.")
    return tuple(records)


def fingerprint(records: Sequence[Record]) -> str:
    """Returns the sha256 over all records in their order. Where they lie, and in what kind of file, is no part."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(astuple(record)).encode() + b"\n")
    return digest.hexdigest()


def _problems(row: Any, answers: Collection[str] | None) -> list[str]:
    if isinstance(row, Exception):
        return [f"not JSON ({row})"]
    if not isinstance(row, dict):
        return [f"a {type(row).__name__}, no record"]
    wrong = [f"{name} is missing" for name in FIELDS if name not in row]
    wrong += [
        f"{name} is {row[name]!r:.40}, no text" for name in FIELDS if name in row and not isinstance(row[name], str)
    ]
    if isinstance(row.get("instruction"), str) and not row["instruction"].strip():
        wrong.append("instruction is empty")
    answer = row.get("answer")
    if answers is not None and isinstance(answer, str) and answer not in answers:
        wrong.append(f"answer {answer!r:.40} is none of {', '.join(answers)}")
    return wrong


def _folder_rows(folder: Path, split: str | None) -> Iterator[Row]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_rows(folder, split)
    chosen = _choose(by_split(_files(folder)), split, str(folder))
    named = [(path, path.name if len(chosen) > 1 else "") for path in chosen]
    return (row for path, name in named for row in _named(file_rows(path, FIELDS), name))


def _files(folder: Path) -> list[Path]:
    """Files of records, of the first kind that there are some of."""
    for suffix in SUFFIXES:
        files = sorted(path for path in folder.rglob(f"*{suffix}") if not path.name.startswith("."))
        if files:
            return files
    raise SanError(f"{folder} holds no records: no {', '.join(SUFFIXES)} file, and nothing that save_to_disk wrote.")


def _named(rows: Iterable[Row], file: str) -> Iterator[Row]:
    """The rows, with their file's name before each place where there are several files."""
    return ((f"{file}, {place}" if file else place, row) for place, row in rows)


def _saved_rows(folder: Path, split: str | None) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise SanError(f"{folder} holds no data set that can be read: {error}.") from error
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
            f"{name} is no file or folder here, and is not to be had from the Hugging Face hub: "
            f"{str(error).rstrip('.')}. Where there is a network, `hf download {name} --repo-type dataset --local-dir "
            "DIR` fetches it; then name that folder."
        ) from error
    return {str(part): table for part, table in tables.items()}


def _table_rows(table: Any) -> Iterator[Row]:
    """Rows of a table of the `datasets` library."""
    wanted = table.select_columns([name for name in FIELDS if name in table.column_names])
    return ((f"index {i}", row) for i, row in enumerate(wanted))


def _choose(parts: dict[str, Any], split: str | None, source: str) -> Any:
    """The part that is a split, by any of its usual names, or the only one."""
    named = {NAMES.get(name.lower(), name): part for name, part in parts.items()}
    if split is None and len(named) == 1:
        return next(iter(named.values()))
    wanted = None if split is None else NAMES.get(split.lower(), split)
    if wanted not in named:
        what = "several splits; choose one of them" if split is None else f"no split {split!r}; it has"
        raise SanError(f"{source} has {what}: {', '.join(named)}.")
    return named[wanted]
