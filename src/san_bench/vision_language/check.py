"""Checks the data of conversations about images: records, their images, and the benchmarks that lie beside them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from san_bench.config.strict import suggest
from san_bench.datacheck.found import Found
from san_bench.vision_language.images import problems_of_images, survey
from san_bench.vision_language.recipe import BENCHMARKS
from san_bench.vision_language.records import read_conversations
from san_bench.vision_language.tasks import MIX, TEST, TRAIN, benchmark_folder, load_benchmark
from san_peft.errors import SanError


def examine(
    suite: str,
    folder: Path,
    images: bool = True,
    workers: int | None = None,
    manifest: None = None,
    write_checksums: Path | None = None,
    checksums: Path | None = None,
    progress: bool = False,
) -> list[Found]:
    """Checks records and questions, and notes every problem at once.

    Args:
        suite: `llava`, one of its benchmarks such as `llava/gqa`, or `conversations`.
        folder: Its folder; see `san_bench.vision_language.tasks`.
        images: Decodes every image; otherwise those that are missing are found alone.
        workers: Threads that read images; by default as many as there are processors, up to eight.
        manifest: There is none.
        write_checksums: Refused.
        checksums: Refused.
        progress: Not used.

    Returns:
        What was found: of `llava` the training mix and the benchmarks, of which absent ones are no problem unless they
        were asked for; of `conversations` the records to train with and to ask.

    Raises:
        SanError: If there is no such folder or benchmark, or checksums are asked for.
    """
    if write_checksums or checksums:
        raise SanError(f"There are no checksums of {suite}. A run's task_fingerprint tells whether data is the same.")
    if not folder.is_dir():
        raise SanError(f"There is no folder {folder}.")
    kind, _, part = suite.partition("/")
    if kind == "conversations":
        if part:
            raise SanError(f"There is no data called {suite!r} to check; {kind} checks both of its files.")
        return [_records(f"{kind}/{file.partition('.')[0]}", folder / file, images, workers) for file in (TRAIN, TEST)]
    if part and part not in BENCHMARKS:
        raise SanError(f"{kind} has no benchmark {part!r}.{suggest(part, BENCHMARKS)}")
    if part:
        return [_benchmark(part, folder, images, workers, needed=True)]
    mix = _records(f"{kind}/train", folder / MIX, images, workers)
    return [mix, *(_benchmark(name, folder, images, workers) for name in BENCHMARKS)]


def _records(name: str, path: Path, images: bool, workers: int | None) -> Found:
    found = Found(name, path.parent, files=[path])
    try:
        records, bad = read_conversations(path)
    except SanError as error:
        found.add(str(error))
        return found
    if bad:
        found.add(f"{len(bad):,} of {len(records) + len(bad):,} records are not as they must be", map(str, bad))
    uses = Counter(record.image for record in records if record.image is not None)
    found.layout = f"{len(records):,} records, {uses.total():,} of them about {len(uses):,} images"
    found.problems += problems_of_images(name, survey(uses, path.parent, workers, images), uses)
    return found


def _benchmark(name: str, data: Path, images: bool, workers: int | None, needed: bool = False) -> Found:
    folder = benchmark_folder(name, data)
    found = Found(f"llava/{name}", folder)
    if not folder.is_dir():
        found.layout = f"not there, no folder {folder}"
        if needed:
            found.add(f"there is no folder {folder}")
        return found
    try:
        asked = load_benchmark(name, data)
    except SanError as error:
        found.add(str(error))
        return found
    seen = {question.image for question in asked.questions if question.image is not None}
    found.layout = f"{len(asked.questions):,} questions about {len(seen):,} images"
    found.problems += asked.problems(found.name, images, workers)
    return found
