"""Validates image data: lists, sizes, classes, every image, duplicates, checksums.

Checksum files have the format of `sha256sum`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path

from san_bench.config.strict import suggest
from san_bench.datacheck.found import CheckOptions, Found, Problem
from san_bench.datacheck.manifest import SUITES, Manifest, load_manifest
from san_bench.image import fgvc, folders, vtab
from san_bench.image.decode import remark
from san_bench.image.recipe import OWN
from san_bench.image.splits import ArraySplit, FileSplit, Split, TableSplit
from san_bench.image.survey import Decoded, Looks, encoded_reader, in_chunks, thread_count, unique_parts
from san_bench.run.provenance import file_sha256, write_atomically
from san_peft.errors import SanError

TOLERATED_OVERLAP = 0.01
"""Fraction of a split that may also occur in another split before that is an error.

Genuine datasets have some overlap: the 40 orientations of dSprites include both 0 and 360 degrees. A split that was
replaced by a copy of another one is far above it.
"""


def examine(suite: str, folder: Path, options: CheckOptions) -> list[Found]:
    """Validates the data of a suite and collects all problems.

    Args:
        suite: `vtab`, `fgvc` or `gic`; one of their datasets, such as `vtab/cifar`; `folder` for your own images in
            any layout, or `datasets` for tables only.
        folder: Data folder.
        options: All of them apply.

    Returns:
        Report for each dataset, in the order of the tasks.

    Raises:
        SanError: If the suite or folder does not exist, or checksums are requested without images.
    """
    from rich.progress import Progress

    checksums, write_checksums = options.checksums, options.write_checksums
    if not options.images and (write_checksums or checksums):
        raise SanError("Checksums cover the images: leave out --no-images.")
    expected = _parse(checksums) if checksums else {}
    found = _read(suite, folder, options.manifest)
    if not options.images:
        for one in found:
            _look_for_files(one)
        return found
    sums: dict[str, str] = {}
    folder = folder.parent if folder.is_file() else folder  # what the names of checksums are relative to
    total = sum(len(split) for one in found for split in unique_parts(one.splits).values())
    with Progress(disable=not options.progress) as bar, ThreadPoolExecutor(thread_count(options.workers)) as pool:
        line = bar.add_task("reading images", total=total)
        for one in found:
            parts = unique_parts(one.splits).items()
            columns = {name: _digests(one, name, split, pool, partial(bar.advance, line)) for name, split in parts}
            _find_repeated(one, columns)
            sums.update(_checksums(one, columns, folder))
    if checksums:
        found.append(Found(suite, problems=_compare(suite, expected, sums, found, folder, checksums)))
    if write_checksums:
        write_atomically(write_checksums, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    return found


def _read(suite: str, folder: Path, manifest: Manifest | None) -> list[Found]:
    kind, _, task = suite.partition("/")
    if kind in OWN:
        return [folders.read_photos(suite, folder)]
    if kind not in SUITES:
        raise SanError(f"Unknown image data {suite!r}.{suggest(kind, [*SUITES, *OWN])}")
    if not folder.is_dir():
        raise SanError(f"There is no folder {folder}.")
    manifest = manifest or load_manifest(kind)
    read = {"vtab": vtab.read, "fgvc": fgvc.read, "gic": folders.read}[kind]
    if task:
        manifest[task]  # raises for an unknown task
    found = []
    for name in [task] if task else manifest.tasks:
        try:
            found.append(read(name, folder, manifest))
        except SanError as error:
            found.append(Found(f"{kind}/{name}", problems=[Problem(f"{kind}/{name}", str(error))]))
    if len(found) > 1 and not any(one.folder for one in found):
        raise SanError(f"{folder} contains none of the {len(found)} datasets of {kind}. {found[0].problems[0].text}")
    return found


def _look_for_files(found: Found) -> None:
    for name, split in unique_parts(found.splits).items():
        if isinstance(split, FileSplit):
            missing = [file for file in split.files if not (split.root / file).is_file()]
            if missing:
                found.add(f"{name}: {len(missing):,} images are missing", missing)


def _digests(
    found: Found, name: str, split: Split, pool: ThreadPoolExecutor, advance: Callable[[int], None]
) -> list[str | None]:
    """Decodes every image of a split, adds what is wrong with it, and returns the sha256 of each.

    What was fine is remembered, so that a run need not decode it again.
    """
    digests: list[str | None] = []
    looks = Looks(found.name)
    memory = Decoded(split) if isinstance(split, FileSplit | TableSplit) else None
    chunks = in_chunks(len(split))
    for chunk, results in zip(chunks, pool.map(partial(_digest, split), chunks), strict=True):
        for index, (digest, look) in zip(chunk, results, strict=True):
            digests.append(digest)
            looks.add(name, split.item_name(index), look)
            if memory:
                memory.add(index, look)
        advance(len(chunk))
    found.problems += looks.problems()
    if memory:
        memory.save()
    return digests


def _digest(split: Split, indices: list[int]) -> list[tuple[str | None, str | Exception]]:
    pixels = split.images if isinstance(split, ArraySplit) else None
    read = encoded_reader(split) if pixels is None else lambda index: pixels[index].tobytes()
    results: list[tuple[str | None, str | Exception]] = []
    for index in indices:
        try:
            content = read(index)
            look = remark(content) if pixels is None else ""
            results.append((hashlib.sha256(content).hexdigest(), look))
        except Exception as error:  # any decoding error is a finding
            results.append((None, error))
    return results


def _find_repeated(found: Found, columns: dict[str, list[str | None]]) -> None:
    where: dict[str, dict[str, list[int]]] = {}
    for name, column in columns.items():
        places: dict[str, list[int]] = defaultdict(list)
        for index, digest in enumerate(column):
            if digest is not None:
                places[digest].append(index)
        where[name] = places
        twins = [indices for indices in places.values() if len(indices) > 1]
        if twins:
            items = [" = ".join(found.splits[name].item_name(i) for i in indices) for indices in twins]
            found.add(f"{name}: {len(twins):,} images occur more than once", items, "warning")
    for one, other in combinations(where, 2):
        if other == "train800val200" or (one == "train800val200" and other != "test"):
            continue
        common = [digest for digest in where[one] if digest in where[other]]
        if common:
            items = [
                " = ".join(found.splits[name].item_name(where[name][digest][0]) for name in (one, other))
                for digest in common
            ]
            share = max(sum(len(where[n][digest]) for digest in common) / len(columns[n]) for n in (one, other))
            found.add(
                f"{one} and {other} have {len(common):,} images in common, {share:.1%} of the smaller",
                items,
                "error" if share > TOLERATED_OVERLAP else "warning",
            )
    if {"train800", "val200", "train800val200"} <= set(columns):
        content = {n: Counter(zip(columns[n], found.splits[n].labels.tolist(), strict=True)) for n in columns}
        other = content["train800val200"] - (content["train800"] + content["val200"])
        if other:
            text = (
                f"train800val200: {other.total():,} images are not those of train800 and val200, or have other labels"
            )
            found.add(text, level="warning")


def _checksums(found: Found, columns: dict[str, list[str | None]], folder: Path) -> Iterator[tuple[str, str]]:
    for path in found.files:
        yield path.relative_to(folder).as_posix(), file_sha256(path)
    for name, column in columns.items():
        split = found.splits[name]
        if isinstance(split, FileSplit):
            for file, digest in zip(split.files, column, strict=True):
                if digest is not None:
                    yield (split.root / file).relative_to(folder).as_posix(), digest


def _parse(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise SanError(f"There is no checksum file {path}. Create one with --write-checksums.")
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if not match:
            raise SanError(f"{path}, line {number}: {line[:80]!r} is not a sha256, two spaces and a path.")
        sums[match[2]] = match[1]
    return sums


def _compare(
    suite: str, expected: dict[str, str], sums: dict[str, str], found: list[Found], folder: Path, path: Path
) -> list[Problem]:
    """Compares checksums; for a single dataset, only those of its files."""
    below = [one.folder.relative_to(folder).as_posix() for one in found if one.folder]
    if "/" in suite:
        expected = {name: s for name, s in expected.items() if any(b == "." or name.startswith(f"{b}/") for b in below)}
    differences = {
        "have changed": sorted(name for name in set(expected) & set(sums) if expected[name] != sums[name]),
        "are missing or unreadable": sorted(set(expected) - set(sums)),
        "are new": sorted(set(sums) - set(expected)),
    }
    return [
        Problem(suite, f"{len(names):,} files {what}, says {path.name}", tuple(names))
        for what, names in differences.items()
        if names
    ]
