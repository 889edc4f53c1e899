"""Claim, lock and identify the folder of a run, a suite or an export; imports no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from san_bench.config.recipe import Recipe, load_recipe
from san_bench.config.strict import san_error
from san_bench.run.provenance import file_sha256, write_atomically

RECIPE, RESULT, TRAINED = "recipe.yaml", "result.json", "trained.json"
"""Files of a run: its recipe, the result of a finished run, and what is known of a run between training and scoring."""

COMPLETE = "complete"
"""Marker file of a complete checkpoint."""

LOCK = ".lock"
"""File that a command locks while it writes to a folder."""

EXPORT = "export.json"
"""File of a merged export: its run, the output difference after merging, and hashes of its weights."""


def export_facts(folder: Path) -> dict[str, Any]:
    """Reads the `export.json` of a merged export and verifies the hashes of its weights.

    Raises:
        SanError: If the folder is not a merged export that `san export` has verified, or its weights have changed.
    """
    try:
        facts = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
        float(facts["max_abs_difference"])
        exported = dict(facts["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise san_error(
            f"{folder} is not a verified merged export: {EXPORT} is missing or incomplete. "
            f"`san export RUN --merged --out FOLDER` writes one."
        ) from error
    found = weights_sha256(folder)
    if found != exported:
        other = ", ".join(sorted({name for name, _ in found.items() ^ exported.items()}))
        raise san_error(
            f"The weights in {folder} have changed since `san export` verified them: {other} differ, are missing or "
            "are new. Export the run again, to another folder."
        )
    return facts


def weights_sha256(folder: Path) -> dict[str, str]:
    """Returns the sha256 of each safetensors file in a folder, by file name."""
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def step_of(checkpoint: Path) -> int:
    """Returns the optimizer step of a checkpoint."""
    return int(checkpoint.name.split("-")[-1])


def check_free(folder: Path, recipe: Recipe) -> None:
    """Checks that a folder can become the run of a recipe, or is one.

    Raises:
        SanError: If it holds what another recipe has trained, another command writes to it, or it cannot be created.
    """
    _check_recipe(folder, recipe)
    check_unlocked(folder)
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise san_error(f"{folder} cannot be a folder: {above} is a file. Choose another output.")
    if not os.access(above, os.W_OK | os.X_OK) and not (folder / RESULT).exists():
        raise san_error(f"{folder} cannot be written: {above} is read-only. Choose another output.")


def _check_recipe(folder: Path, recipe: Recipe) -> None:
    file = folder / RECIPE
    if not file.exists() or not has_progress(folder):
        return
    try:
        other, reason = load_recipe(file).fingerprint, ""
    except ValueError as error:  # written by an earlier version
        other, reason = "", f" Its recipe does not load: {str(error).splitlines()[0]}"
    if other != recipe.fingerprint:
        raise san_error(
            f"{folder} holds a run of another recipe ({other[:12] or 'unknown'}, this one is "
            f"{recipe.fingerprint[:12]}). Choose another output, or remove the folder.{reason}"
        )


def has_progress(folder: Path) -> bool:
    """Returns whether a run folder holds anything that training has made: a checkpoint, weights or a result."""
    files = (RESULT, TRAINED, "adapter")
    return any((folder / name).exists() for name in files) or any(folder.glob(f"checkpoints/*/{COMPLETE}"))


@contextmanager
def claimed(folder: Path, recipe: Recipe, begun: Callable[[], bool]) -> Iterator[None]:
    """Claims and locks the folder of a run; a run that fails before its first step leaves no folder.

    Args:
        folder: The folder.
        recipe: Recipe of the run.
        begun: Returns whether a step has been trained.

    Raises:
        SanError: If the folder holds what another recipe has trained, or another command writes to it.
    """
    with held(folder, lambda: begun() or has_progress(folder)):
        _check_recipe(folder, recipe)
        if not (folder / RECIPE).exists() or not has_progress(folder):
            write_atomically(folder / RECIPE, recipe.to_yaml())
        yield


@contextmanager
def held(folder: Path, keeps: Callable[[], bool]) -> Iterator[None]:
    """Creates a folder if it is not there, and holds its lock.

    The lock is one of the operating system (POSIX), which ends with the process. On network file systems it holds
    between machines where the server supports POSIX locks: NFS 4, NFS 3 with lockd, Lustre with `flock`. Where the
    file system has no locks, a warning is printed and the body runs without one.

    Args:
        folder: The folder.
        keeps: Returns whether files stay if the body fails; otherwise all that it has made here is removed.

    Raises:
        SanError: If another process holds the lock; the message names it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder):
            before = {path.name for path in folder.iterdir()}
            try:
                yield
            except BaseException:
                if not keeps():
                    for path in folder.iterdir():
                        if path.name not in before:
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
                raise
    finally:
        for path in made:
            if any(path.iterdir()):
                break
            path.rmdir()


def check_unlocked(folder: Path) -> None:
    """Raises `SanError` if another process holds the lock of a folder."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:  # no lock, or none of this user: `held` reports the latter
        return
    try:
        _acquire(handle, folder)
    finally:
        os.close(handle)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path, handle = folder / LOCK, -1
    try:
        while handle < 0 or not _is_same(handle, path):  # its last owner may have removed the file meanwhile
            if handle >= 0:
                os.close(handle)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if not _acquire(handle, folder):
                print(f"warning: the file system of {folder} has no locks; run one command at a time.", file=sys.stderr)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(" ", "seconds")}
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        if handle >= 0:
            os.close(handle)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _acquire(handle: int, folder: Path) -> bool:
    """Locks an open file; returns whether the file system has locks."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return False
        try:
            owner = json.loads(os.pread(handle, 4096, 0))
            who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        raise san_error(f"{folder} is in use by {who}. Wait until it has ended, or choose another folder.") from error
    return True
