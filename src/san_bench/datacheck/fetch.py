"""Downloads datasets where license and source allow it, and says where to get the others.

A download stays in the folder `.fetching` until it is complete and valid; then it is renamed into place. The same
command resumes an interrupted download.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from san_bench.config.strict import suggest
from san_bench.datacheck.check import examine
from san_bench.datacheck.found import Problem
from san_bench.datacheck.manifest import SUITES, Facts, Manifest, find_folder, load_manifest
from san_peft.errors import SanError

STAGE = ".fetching"
"""Folder of incomplete downloads."""


def fetch(what: str, folder: Path, manifest: Manifest | None = None) -> list[Problem]:
    """Downloads a suite, one of its datasets, or any dataset on the Hugging Face hub.

    Args:
        what: `fgvc`, `gic`, `vtab` or `commonsense`; one of their datasets, such as `gic/cifar100`; or the name of a
            dataset on the hub, such as `timm/eurosat-rgb`, to be used as the task `datasets`.
        folder: Folder of the suite, or the parent of the dataset's folder.
        manifest: Expected data; by default the manifest of the suite.

    Returns:
        Datasets that are still missing, each with the way to get it; empty if complete.

    Raises:
        SanError: If the dataset is unknown, disk space is insufficient, or the download fails or is invalid.
    """
    kind, _, task = what.partition("/")
    if kind not in SUITES:
        if not task:
            raise SanError(f"Unknown dataset {what!r}.{suggest(kind, SUITES)}")
        _fetch_from_hub(what, what, folder, task, None)
        return []
    manifest = manifest or load_manifest(kind)
    if task:
        manifest[task]  # raises for an unknown task
    problems = []
    for name in [task] if task else manifest.tasks:
        facts, full = manifest[name], f"{kind}/{name}"
        if _is_there(folder, facts):
            found = examine(full, folder, images=False, manifest=manifest)
            problems += [problem for one in found for problem in one.problems if problem.level == "error"]
        elif facts.hub:
            _fetch_from_hub(full, facts.hub, folder, facts.folders[0], manifest)
        elif facts.torchvision:
            _fetch_by_torchvision(full, facts, folder, manifest)
        else:
            where = facts.get or "see below"
            problems.append(Problem(full, f"download {facts.title} manually ({where}); license: {facts.licence}"))
    return problems


def fetch_command(what: str, folder: Path) -> None:
    """Downloads data, prints what must be downloaded manually, and exits with code 1 if anything is missing."""
    problems = fetch(what, folder)
    for problem in problems:
        print(problem)
    if problems:
        kind = what.partition("/")[0]
        print(f"{load_manifest(kind).get}\nThen: san data check {what} {folder}")
        sys.exit(1)
    print(f"{what} is in {folder} and valid.")


def _is_there(folder: Path, facts: Facts) -> bool:
    if not folder.is_dir():
        return False
    try:
        find_folder(folder, facts)
    except SanError:
        return False
    return True


def _fetch_from_hub(full: str, repository: str, folder: Path, name: str, manifest: Manifest | None) -> None:
    import httpx
    from huggingface_hub import HfApi, snapshot_download

    if (folder / name).exists():
        raise SanError(f"{folder / name} already exists. Move it, or check it: san data check datasets {folder / name}")
    target = folder / STAGE / name
    try:
        info = HfApi().dataset_info(repository, files_metadata=True)
        size = sum(file.size or 0 for file in info.siblings or [])
        licence = getattr(info.card_data, "license", None) or "not stated"
        print(f"{full}: {size / 1e6:,.0f} MB from huggingface.co/datasets/{repository}, license: {licence}", flush=True)
        _expect_room(folder, size)
        snapshot_download(repository, repo_type="dataset", revision=info.sha, local_dir=target)
    except (OSError, ValueError, httpx.HTTPError) as error:
        if isinstance(error, SanError):
            raise
        raise SanError(
            f"{repository} could not be downloaded from the Hugging Face hub: {str(error).rstrip('.')}. "
            f"The same command resumes the download in {target}."
        ) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)
    _put_in_place(full, folder, name, manifest)


def _fetch_by_torchvision(full: str, facts: Facts, folder: Path, manifest: Manifest) -> None:
    from torchvision import datasets

    name, stage = facts.folders[0], folder / STAGE
    print(f"{full}: {facts.title} with torchvision from {facts.get}, license: {facts.licence}", flush=True)
    _expect_room(folder, facts.megabytes * 1_000_000)
    stage.mkdir(parents=True, exist_ok=True)
    try:
        getattr(datasets, str(facts.torchvision))(str(stage), download=True)
    except (OSError, RuntimeError) as error:
        raise SanError(
            f"{facts.title} could not be downloaded from {facts.get}: {str(error).rstrip('.')}. Run the same command "
            f"again; complete files in {stage} are kept."
        ) from error
    for archive in (stage / name).glob("*.tgz"):
        archive.unlink()
    _put_in_place(full, folder, name, manifest)


def _expect_room(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise SanError(f"{folder} has {free / 1e6:,.0f} MB of free disk space, but {size / 1e6:,.0f} MB are needed.")


def _put_in_place(full: str, folder: Path, name: str, manifest: Manifest | None) -> None:
    stage = folder / STAGE
    found = examine(full, stage, manifest=manifest) if manifest else examine("datasets", stage / name)
    errors = [str(problem) for one in found for problem in one.problems if problem.level == "error"]
    if errors:
        raise SanError(
            f"The downloaded {full} is invalid. It is in {stage / name}; delete it to start over.\n  "
            + "\n  ".join(errors)
        )
    (stage / name).rename(folder / name)
    if not any(stage.iterdir()):
        stage.rmdir()
