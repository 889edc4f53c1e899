"""Decode every image of a data set once, before a run, and remember which ones were fine.

What was decoded is kept in the assets cache of huggingface_hub (`HF_ASSETS_CACHE`): a JSON file for each data folder,
with the size and modification time of every file. An image is decoded again only if one of them has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import PIL

from san_bench.datacheck.found import Problem
from san_bench.image.decode import remark, why
from san_bench.image.splits import FileSplit, JoinedSplit, Split, TableSplit, VisionTask
from san_bench.run.provenance import write_atomically

CHUNK = 64
"""Images per task of a worker thread."""

RULES = f"1, Pillow {PIL.__version__}"
"""Version of the rules of decoding; images that were fine by other rules are decoded again."""

Reader = Callable[[int], bytes]


def unique_parts(splits: Mapping[str, Split]) -> dict[str, Split]:
    """Returns the splits with images of their own, without those that join others."""
    return {n: s for n, s in splits.items() if n != "trainval" and not isinstance(s, JoinedSplit)}


def decode_all(task: VisionTask, workers: int | None = None, progress: bool = False) -> list[Problem]:
    """Decodes every image file and every image of a table, unless that was done before.

    Args:
        task: The task.
        workers: Threads; by default one per CPU core, up to eight.
        progress: Shows a progress bar on standard error.

    Returns:
        Missing and unreadable images as errors, and images with suspicious pixels as warnings.
    """
    parts = {name: s for name, s in unique_parts(task.splits).items() if isinstance(s, FileSplit | TableSplit)}
    memories = {name: Decoded(split) for name, split in parts.items()}
    todo = {name: [i for i in range(len(split)) if memories[name].remark(i) is None] for name, split in parts.items()}
    found = Looks(task.name)
    try:
        for name, looks in _looks(parts, todo, workers, progress):
            for index, look in looks:
                found.add(name, parts[name].item_name(index), look)
                memories[name].add(index, look)
    finally:  # what an interrupted survey has decoded need not be decoded again
        for memory in memories.values():
            memory.save()
    for name, split in parts.items():
        again = set(todo[name])
        for index in range(len(split)):
            if index not in again:
                found.add(name, split.item_name(index), memories[name].remark(index) or "")
    return found.problems()


def encoded_reader(split: Split) -> Reader:
    """Returns a function that reads the encoded image at an index.

    Raises:
        TypeError: If the images of the split are not encoded.
    """
    if isinstance(split, FileSplit):
        return lambda index: (split.root / split.files[index]).read_bytes()
    if isinstance(split, TableSplit):
        import datasets

        table = split.table.cast_column(split.column, datasets.Image(decode=False))

        def read(index: int) -> bytes:
            cell = table[index][split.column]
            return Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]

        return read
    raise TypeError(f"The images of a {type(split).__name__} are not encoded.")


def in_chunks(size: int | list[int]) -> list[list[int]]:
    """Divides indices, or the numbers below a size, into lists of up to `CHUNK`."""
    indices = list(range(size)) if isinstance(size, int) else size
    return [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]


def thread_count(workers: int | None) -> int:
    """Returns the number of threads: by default one per CPU core, up to eight."""
    return workers or min(8, os.cpu_count() or 1)


class Looks:
    """Problems of images, one per kind with all its images.

    Args:
        task: Task name of the problems.
    """

    def __init__(self, task: str) -> None:
        self._task = task
        self._items: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, split: str, item: str, look: str | Exception) -> None:
        """Adds what decoding an image led to: an error, or what `san_bench.image.decode.remark` returned."""
        if isinstance(look, FileNotFoundError):
            self._items[split, "are missing"].append(item)
        elif isinstance(look, Exception):
            self._items[split, "cannot be read"].append(f"{item} ({why(look)})")
        elif look:
            self._items[split, "are 16-bit, but almost black; rescale them"].append(f"{item} ({look})")

    def problems(self) -> list[Problem]:
        """Returns the problems."""
        return [
            Problem(
                self._task,
                f"{split}: {len(items):,} images {what}",
                tuple(items),
                "error" if what in ("are missing", "cannot be read") else "warning",
            )
            for (split, what), items in self._items.items()
        ]


class Decoded:
    """The images of a split that were decoded before, in a file of the cache.

    Args:
        split: Image files or a table.
    """

    def __init__(self, split: FileSplit | TableSplit) -> None:
        self._split = split
        source = str(split.root.resolve()) if isinstance(split, FileSplit) else _table_key(split)
        self._file = _cache_file(source)
        self._known: dict[str, list[Any]] = self._read()
        self._new: dict[str, list[Any]] = {}

    def remark(self, index: int) -> str | None:
        """Returns the remark on an image, which is empty if it was fine; `None` if it must be decoded."""
        size, time, text = self._known.get(self._key(index), (None, None, None))
        return text if text is not None and [size, time] == self._state(index) else None

    def add(self, index: int, look: str | Exception) -> None:
        """Remembers an image, unless it could not be decoded."""
        state = self._state(index)
        if isinstance(look, str) and state is not None:
            self._new[self._key(index)] = [*state, look]

    def save(self) -> None:
        """Writes the file, together with what others have added to it meanwhile; needs no cache that is writable."""
        if not self._new or self._file is None:
            return
        self._known = {**self._read(), **self._new}
        self._new = {}
        try:
            write_atomically(self._file, json.dumps({"rules": RULES, "images": self._known}, separators=(",", ":")))
        except OSError:
            self._file = None

    def _read(self) -> dict[str, list[Any]]:
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8")) if self._file else {}
            return stored["images"] if stored.get("rules") == RULES else {}
        except (OSError, ValueError, KeyError, AttributeError):
            return {}

    def _key(self, index: int) -> str:
        return self._split.files[index] if isinstance(self._split, FileSplit) else str(index)

    def _state(self, index: int) -> list[int] | None:
        """Returns size and modification time of a file, zeros for a row of a table, or `None` if it is missing."""
        if isinstance(self._split, TableSplit):
            return [0, 0]
        try:
            facts = (self._split.root / self._split.files[index]).stat()
        except OSError:
            return None
        return [facts.st_size, facts.st_mtime_ns]


def _looks(
    parts: Mapping[str, Split], todo: Mapping[str, list[int]], workers: int | None, progress: bool
) -> Iterator[tuple[str, Iterator[tuple[int, str | Exception]]]]:
    """Decodes images in threads; yields the name of the split, and indices with what decoding them led to."""
    total = sum(map(len, todo.values()))
    if not total:
        return
    from rich.console import Console
    from rich.progress import Progress

    with (
        Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar,
        ThreadPoolExecutor(thread_count(workers)) as pool,
    ):
        line = bar.add_task("decoding images", total=total)
        for name, indices in todo.items():
            if indices:
                chunks = in_chunks(indices)
                for chunk, looks in zip(
                    chunks, pool.map(partial(_look, encoded_reader(parts[name])), chunks), strict=True
                ):
                    yield name, zip(chunk, looks, strict=True)
                    bar.advance(line, len(chunk))


def _look(read: Reader, indices: list[int]) -> list[str | Exception]:
    looks: list[str | Exception] = []
    for index in indices:
        try:
            looks.append(remark(read(index)))
        except Exception as error:  # any decoding error is a finding
            looks.append(error)
    return looks


def _table_key(split: TableSplit) -> str:
    """Returns an identity of a table: its rows with their sizes, and the state of its files."""
    files = [Path(file["filename"]) for file in split.table.cache_files]
    states = [(str(file), (facts := file.stat()).st_size, facts.st_mtime_ns) for file in files if file.is_file()]
    return json.dumps([split.fingerprint, split.column, states])


def _cache_file(source: str) -> Path | None:
    from huggingface_hub import cached_assets_path, constants

    name = hashlib.sha256(source.encode()).hexdigest()[:24]
    try:
        return (
            cached_assets_path("san-peft", "images", "decoded", assets_dir=constants.HF_ASSETS_CACHE) / f"{name}.json"
        )
    except (OSError, ValueError):
        return None
