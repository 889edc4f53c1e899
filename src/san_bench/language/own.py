r"""Your own training data: sources read into records, a held-out test split, and mixing by weight.

Example:
    >>> from pathlib import Path
    >>> _ = Path("train.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n{"text": "Three."}\n')
    >>> data = OwnData(train="train.jsonl", held_out=0.3)
    >>> loaded = load_own(data, hold_out=lambda rest: (rest[1:], rest[:1]))
    >>> {split: len(records) for split, records in loaded.items()}
    {'train': 1, 'val': 1, 'trainval': 2, 'test': 1}
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from san_bench.language.formats import Item, content_key, problems_of_row, read_record, recognise_format
from san_bench.language.instructions import LISTED
from san_bench.language.recipe import OwnData, Source
from san_bench.language.records import Row
from san_bench.language.sources import source_rows, splits_of
from san_peft.errors import SanError


@dataclass(frozen=True)
class Located:
    """A record with its origin.

    Attributes:
        place: Source and location in it, such as `chats.jsonl, line 3`.
        item: The record.
        part: Index of its source among the sources of the training data.
    """

    place: str
    item: Item
    part: int = 0


@dataclass(frozen=True)
class Reading:
    """What was read from rows.

    Attributes:
        source: Name of the source.
        form: Their format.
        records: The valid records.
        problems: Locations of the invalid ones, with what is wrong.
    """

    source: str
    form: str
    records: list[Located]
    problems: list[str]

    def check(self) -> list[Located]:
        """Returns the records.

        Raises:
            SanError: If there are none, or any is invalid; the message counts them and lists the first.
        """
        count = len(self.records) + len(self.problems)
        if self.problems:
            more = f"\n  and {len(self.problems) - LISTED:,} more" if len(self.problems) > LISTED else ""
            raise SanError(
                f"{self.source}: {len(self.problems):,} of {count:,} records are invalid in the format {self.form}, "
                "which data.format can change.\n  " + "\n  ".join(self.problems[:LISTED]) + more
            )
        if not self.records:
            raise SanError(f"{self.source} contains no records.")
        return self.records


def read_rows_of(rows: Iterable[Row], source: str, form: str = "auto", part: int = 0) -> Reading:
    """Converts rows to records, and describes those that are none.

    Args:
        rows: Rows with their locations.
        source: Name of the source.
        form: Format; `auto` recognises it from the columns of the first row.
        part: Index of the source.

    Raises:
        SanError: If the columns belong to no format.
    """
    records: list[Located] = []
    problems: list[str] = []
    for place, row in rows:
        if form == "auto" and isinstance(row, Mapping):
            try:
                form = recognise_format(row)
            except SanError as error:
                raise SanError(f"{source}, {place}: {error}") from error
        wrong = problems_of_row(row, form)
        if wrong:
            problems.append(f"{place}: {'; '.join(wrong)}")
        else:
            records.append(Located(f"{source}, {place}", read_record(row, form), part))
    return Reading(source, form, records, problems)


def read_source(source: Source, split: str | None, form: str = "auto", part: int = 0) -> Reading:
    """Reads a source.

    Args:
        source: The source.
        split: Split to read, if the source does not name one.
        form: Format; `auto` recognises it.
        part: Index of the source.

    Raises:
        SanError: If the source or split does not exist, or its columns belong to no format.
    """
    rows = source_rows(source.path, source.split or split, config=source.config)
    return read_rows_of(rows, source.path, form, part)


def read_eval(source: Source, form: str = "auto") -> Reading:
    """Reads the test split of a source, or its only split; see `read_source`."""
    return read_source(source, "test" if "test" in splits_of(source.path, source.config) else None, form)


def read_splits(data: OwnData) -> dict[str, list[Reading]]:
    """Reads all sources: `train`, and those of `val` and `test` that exist."""
    found = {"train": [read_source(one, "train", data.format, part) for part, one in enumerate(data.train)]}
    if data.eval is not None:
        found["test"] = [read_eval(data.eval, data.format)]
    if len(data.train) == 1 and data.train[0].split is None:
        for split in {"val", "test"} & set(splits_of(data.train[0].path, data.train[0].config)):
            if split not in found and not (split == "test" and data.held_out is not None):
                found[split] = [read_source(data.train[0], split, data.format)]
    return found


def load_own(
    data: OwnData, hold_out: Callable[[list[Located]], tuple[Sequence[Located], Sequence[Located]]]
) -> dict[str, list[Located]]:
    """Loads and splits your own data.

    Args:
        data: Sources and settings.
        hold_out: Splits training records into those to train with and those of `val`, if the source has no `val`.

    Returns:
        `train`, `val`, `trainval` and, if there is one, `test`. Splits to train with are mixed by weight.

    Raises:
        SanError: If a source does not exist or has invalid records, or too few are left to train with.
    """
    read = {split: [record for one in parts for record in one.check()] for split, parts in read_splits(data).items()}
    train = read["train"]
    if data.held_out is not None:
        train, read["test"] = hold_out_by_content(train, data.held_out, data.seed)
    if len(train) < 2:
        names = ", ".join(source.path for source in data.train)
        raise SanError(f"{names}: {len(train)} training record; at least 2 are needed, since one is held out.")
    if "val" in read:
        rest, val, whole = train, read["val"], [*train, *read["val"]]
    else:
        rest, val = map(list, hold_out(train))
        whole = train
    splits = {"train": mix_parts(rest, data), "val": list(val), "trainval": mix_parts(whole, data)}
    return splits | ({"test": read["test"]} if "test" in read else {})


def hold_out_by_content(records: Sequence[Located], fraction: float, seed: int) -> tuple[list[Located], list[Located]]:
    """Splits records by a hash of their content, so that the split depends neither on their order nor on their files.

    Args:
        records: The records.
        fraction: Fraction to hold out; equal records stay together, so it may be exceeded.
        seed: Seed.

    Returns:
        The records left to train with, and those held out, both in order.
    """
    keys = [hashlib.sha256(f"{seed}:{content_key(record.item)}".encode()).digest() for record in records]
    count = max(1, round(fraction * len(records)))
    last = sorted(keys)[count - 1] if keys else b""
    held = [key <= last for key in keys]
    return (
        [record for record, out in zip(records, held, strict=True) if not out],
        [record for record, out in zip(records, held, strict=True) if out],
    )


def mix_parts(records: Sequence[Located], data: OwnData) -> list[Located]:
    """Mixes records of several sources by their weights, until the first source has no more; without weights, none.

    Raises:
        SanError: If a source has no records left.
    """
    if data.weights is None:
        return list(records)
    import datasets

    parts = [[record for record in records if record.part == part] for part in range(len(data.train))]
    empty = [source.path for source, part in zip(data.train, parts, strict=True) if not part]
    if empty:
        raise SanError(f"No record of {', '.join(empty)} is left to train with; it has a weight, but too few records.")
    tables = [
        datasets.Dataset.from_dict({"part": [part] * len(rows), "row": list(range(len(rows)))})
        for part, rows in enumerate(parts)
    ]
    order: Any = datasets.interleave_datasets(tables, probabilities=data.weights, seed=data.seed)
    return [parts[one["part"]][one["row"]] for one in order]
