"""The eight commonsense reasoning tasks of the language model benchmark.

Models are trained on `commonsense_170k.json`, a mix of all eight tasks, and tested on each. The usual layout is a
folder `dataset/` with `NAME/test.json` per task. Questions are instructions; see `san_bench.language.instructions`.

Example:
    >>> name, facts = find_task("SIQA")
    >>> name, facts.splits["test"], facts.answers
    ('social_i_qa', 1954, ('answer1', 'answer2', 'answer3'))
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from san_bench.config.strict import did_you_mean
from san_bench.datacheck.found import Found
from san_bench.datacheck.manifest import Facts, Manifest, find_folder, load_manifest, plain
from san_bench.language.instructions import Instruction, Questions, load_records
from san_bench.language.records import SUFFIXES
from san_peft.errors import SanError

SUITE = "commonsense"

TASKS = tuple(load_manifest(SUITE).tasks)
"""Task names, in the order of the published tables."""

MIX = "commonsense_170k"
"""Name of the training mix: the stem of its file, or a folder with a downloaded copy."""


def find_task(name: str) -> tuple[str, Facts]:
    """Finds a task by its name or folder name, ignoring case and punctuation.

    Args:
        name: Such as `social_i_qa`, `SIQA` or `commonsense/siqa`.

    Returns:
        The name in `TASKS`, and the properties of the task.

    Raises:
        SanError: If the task is unknown.
    """
    short = name.removeprefix(f"{SUITE}/")
    known = load_manifest(SUITE).tasks
    for task, facts in known.items():
        if plain(short) in {plain(other) for other in (task, facts.title, *facts.folders)}:
            return task, facts
    raise SanError(f"{SUITE} has no task {short!r}.{did_you_mean(short, known)} Choose from {', '.join(known)}.")


def load_test(name: str, data: Path) -> Questions:
    """Loads the test questions of a task, with the answer patterns of the published protocol.

    Args:
        name: The task; see `find_task`.
        data: Folder with one folder per task.

    Returns:
        The questions, in the order of the file.

    Raises:
        SanError: If the task or folder does not exist, or records are invalid.
    """
    facts = find_task(name)[1]
    records = load_records(find_folder(data, facts), "test", facts.answers)
    return Questions(records, facts.answers, facts.sought, facts.lm_eval)


def find_mix(data: Path) -> Path:
    """Finds the training mix: `commonsense_170k.json`, `.jsonl` or `.parquet`, or a folder of that name.

    Args:
        data: Folder with one folder per task.

    Raises:
        SanError: If it does not exist.
    """
    found = _mix(data)
    if found is None:
        names = ", ".join(f"{MIX}{suffix}" for suffix in SUFFIXES)
        raise SanError(f"{data} contains no training mix: neither {names} nor a folder {MIX}.")
    return found


def _mix(data: Path) -> Path | None:
    return next((path for suffix in (*SUFFIXES, "") if (path := data / f"{MIX}{suffix}").exists()), None)


def load_mix(source: str | Path) -> tuple[Instruction, ...]:
    """Loads the training mix; every answer must belong to some task.

    Args:
        source: `commonsense_170k.json`, or any other source of `san_bench.language.instructions.load_records`.

    Returns:
        The records, in the order of the file.

    Raises:
        SanError: If the source does not exist, or records are invalid.
    """
    answers = dict.fromkeys(answer for facts in load_manifest(SUITE).tasks.values() for answer in facts.answers)
    return load_records(source, "train", tuple(answers))


def examine(data: Path, task: str = "", manifest: Manifest | None = None) -> list[Found]:
    """Validates test files, and training files and the training mix if they exist.

    Args:
        data: Folder with one folder per task.
        task: One task; all by default.
        manifest: Expected data; by default the manifest of the suite.

    Returns:
        Report for each task. A test file of unexpected size is an error; a training file of unexpected size is a
        warning, since several versions are in circulation.

    Raises:
        SanError: If the folder or task does not exist.
    """
    if not data.is_dir():
        raise SanError(f"There is no folder {data}.")
    manifest = manifest or load_manifest(SUITE)
    name = find_task(task)[0] if task else ""
    found = [_read(one, data, manifest[one]) for one in ([name] if name else manifest.tasks)]
    mix = None if name else _mix(data)
    if mix is not None:
        files = [mix] if mix.is_file() else sorted(path for path in mix.rglob("*") if path.suffix in SUFFIXES)
        one = Found(f"{SUITE}/{mix.name}", data, files=files)
        size = sum(facts.splits["train"] for facts in manifest.tasks.values())
        _count(one, "train", mix, size, tuple(dict.fromkeys(a for f in manifest.tasks.values() for a in f.answers)))
        found.append(one)
    if len(found) > 1 and not any(one.folder for one in found):
        raise SanError(f"{data} contains none of the {len(found)} tasks of {SUITE}. {found[0].problems[0].text}")
    return found


def _read(name: str, data: Path, facts: Facts) -> Found:
    found = Found(f"{SUITE}/{name}", classes=facts.classes)
    try:
        found.folder = find_folder(data, facts)
    except SanError as error:
        found.add(str(error))
        return found
    found.files = sorted(path for suffix in SUFFIXES for path in found.folder.glob(f"*{suffix}"))
    _count(found, "test", found.folder, facts.splits["test"], facts.answers)
    if any(path.stem == "train" for path in found.files):
        _count(found, "train", found.folder, facts.splits["train"], facts.answers)
    return found


def _count(found: Found, split: str, source: Path, size: int, answers: tuple[str, ...]) -> None:
    """Adds the number of records and the answer distribution of a split to the report, and its problems."""
    try:
        records = load_records(source, split, answers)
    except SanError as error:
        found.add(f"{split}: {error}")
        return
    counts = Counter(record.answer for record in records)
    shares = ", ".join(f"{answer} {counts[answer]:,}" for answer in answers)
    found.layout += f"{'; ' if found.layout else ''}{split} {len(records):,} ({shares})"
    if len(records) != size:
        level = "error" if split == "test" else "warning"
        found.add(f"{split} has {len(records):,} records, not {size:,}", level=level)
