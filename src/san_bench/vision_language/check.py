"""Validates vision-language data: conversations, their images, and benchmarks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from san_bench.config.strict import suggest
from san_bench.datacheck.found import CheckOptions, Found
from san_bench.vision_language.images import problems_of_images, survey
from san_bench.vision_language.recipe import BENCHMARKS
from san_bench.vision_language.records import read_conversations
from san_bench.vision_language.tasks import MIX, TEST, TRAIN, benchmark_folder, load_benchmark
from san_peft.errors import SanError


def examine(suite: str, folder: Path, options: CheckOptions) -> list[Found]:
    """Validates records and questions and collects all problems.

    Args:
        suite: `llava`, one of its benchmarks, such as `llava/gqa`, or `conversations`.
        folder: Data folder; see `san_bench.vision_language.tasks`.
        options: Of these, `images` (else only missing images are found) and `workers`.

    Returns:
        Reports: for `llava` of the training mix and the benchmarks, where absent benchmarks are not a problem unless
        requested; for `conversations` of the training and test records.

    Raises:
        SanError: If the folder or benchmark does not exist, or checksums are requested.
    """
    if options.write_checksums or options.checksums:
        raise SanError(f"Checksums are not supported for {suite}. Compare the task_fingerprint of runs instead.")
    if not folder.is_dir():
        raise SanError(f"There is no folder {folder}.")
    images, workers = options.images, options.workers
    kind, _, part = suite.partition("/")
    if kind == "conversations":
        if part:
            raise SanError(f"Unknown data {suite!r}; use {kind}, which checks both of its files.")
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
        found.add(f"{len(bad):,} of {len(records) + len(bad):,} records are invalid", map(str, bad))
    uses = Counter(record.image for record in records if record.image is not None)
    found.layout = f"{len(records):,} records, {uses.total():,} of them about {len(uses):,} images"
    found.problems += problems_of_images(name, survey(uses, path.parent, workers, images), uses)
    return found


def _benchmark(name: str, data: Path, images: bool, workers: int | None, needed: bool = False) -> Found:
    folder = benchmark_folder(name, data)
    found = Found(f"llava/{name}", folder)
    if not folder.is_dir():
        found.layout = f"missing, no folder {folder}"
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
