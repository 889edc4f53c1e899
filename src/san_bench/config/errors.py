"""Turn failures of files, models, data and signals into one clear message and an exit code; imports no torch.

Example:
    >>> with loading("The adapter in runs/a", "Train the run again."):
    ...     raise KeyError("weight")
    Traceback (most recent call last):
    san_peft.errors.SanError: The adapter in runs/a cannot be loaded: KeyError: 'weight'. Train the run again.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

MESSAGE_BYTES = 3_600
"""Maximum size of an error message in bytes of UTF-8."""

LINE_CHARACTERS = 1_200
"""Maximum length of one line of an error message."""

WAYS_OUT = {
    errno.EACCES: "Check its permissions, or choose another path.",
    errno.EPERM: "Check its permissions, or choose another path.",
    errno.EROFS: "Choose a path on a file system that is not read-only.",
    errno.ENOENT: "Check the path, and that its folder exists.",
    errno.ENOTDIR: "A part of the path is a file; choose another path.",
    errno.EISDIR: "Give a file instead of a folder.",
    errno.EEXIST: "Choose another path.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Remove the loop of symbolic links.",
    errno.EMFILE: "Raise the limit of open files with `ulimit -n`, or set data_workers to 0.",
    errno.EIO: "Check the disk.",
}
"""What to do about an error number of the operating system."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of a full disk, quota or file size limit."""

READERS = ("json", "PIL", "pyarrow", "safetensors", "safetensors_rust", "yaml", "zipfile", "huggingface_hub", "httpx")
"""Modules whose exceptions mean that a file, or an answer of a server, is invalid."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM has stopped the command.

    Args:
        number: Number of the signal.
        text: What was kept, and how to go on.
    """

    def __init__(self, number: int, text: str = "Run the same command again to resume.") -> None:
        super().__init__(text)
        self.number = number


@contextmanager
def loading(thing: str, way_out: str) -> Iterator[None]:
    """Turns every failure to load something into a `SanError` with the thing, the cause and the way out.

    `SanError` and full disks pass unchanged.

    Args:
        thing: What is loaded; the subject of a sentence.
        way_out: What to do about a failure, as a sentence.
    """
    try:
        yield
    except Exception as error:
        from san_peft.errors import SanError

        if isinstance(error, SanError) or is_disk_full(error):
            raise
        raise SanError(f"{thing} cannot be loaded: {cause_of(error)} {way_out}") from error


@contextmanager
def reported(extras: Mapping[str, str]) -> Iterator[None]:
    """Exits with one message on standard error if the body fails, or is stopped by SIGINT or SIGTERM.

    Exit codes: 2 for an error, 130 for SIGINT, 143 for SIGTERM, 1 if the reader of the output has gone. Errors of the
    program itself keep their traceback.

    Args:
        extras: The extra of this distribution that installs an optional module, by the name of the module.
    """
    with _sigterm_raises():
        try:
            yield
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(1)
        except KeyboardInterrupt as stop:
            number = getattr(stop, "number", signal.SIGINT)
            say(str(stop) or str(Stopped(number)), f"san: {signal.Signals(number).name}: ")
            sys.exit(128 + number)
        except ModuleNotFoundError as error:
            extra = extras.get(str(error.name).partition(".")[0])
            if extra is None:
                raise
            say(f'{error.name} is missing: pip install "san-peft[{extra}]"')
            sys.exit(2)
        except Exception as error:
            text = explain(error)
            if text is None:
                raise
            say(text)
            sys.exit(2)


def say(text: str, prefix: str = "san: ") -> None:
    """Prints a message on standard error, shortened to `MESSAGE_BYTES`."""
    plain = (prefix + shorten(text)).encode("utf-8", "backslashreplace").decode()
    print(plain, file=sys.stderr)


def explain(error: BaseException) -> str | None:
    """Returns the message for a user, or `None` if the error is one of the program.

    Messages for a user are those of `SanError`, of the operating system, and of invalid files.
    """
    errors: Any = sys.modules.get("san_peft.errors")  # importing it would import torch, which takes seconds
    if is_disk_full(error):
        return f"No space left on device: {error}. Free some space, and run the same command again to resume."
    if errors is not None and isinstance(error, errors.SanError):
        return without_frames(str(error))
    if isinstance(error, OSError):
        return str(error) if type(error) is FileExistsError and error.errno is None else _of_system(error)
    if isinstance(error, MemoryError):
        return f"Out of memory. {error}".strip()
    if isinstance(error, UnicodeError):
        return f"Text that is not UTF-8: {cause_of(error)} Convert the file, or choose another name."
    if type(error).__module__.partition(".")[0] in READERS:
        return f"A file is invalid: {cause_of(error)} Replace it, or create it again."
    return None


def cause_of(error: BaseException) -> str:
    """Returns type and first line of an error as a sentence; of an error of the system, its path and reason."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fspath(error.filename)!s}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
        text = f"{where}{error.strerror}"
    else:
        lines = [line.strip() for line in without_frames(str(error)).splitlines() if line.strip()]
        said = _cut(lines[0], 500) if lines else ""
        alone = said and isinstance(error, OSError | ValueError | ImportError)  # of others, the text says too little
        text = said if alone else f"{type(error).__name__}{f': {said}' if said else ''}"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def without_frames(text: str) -> str:
    """Returns the message without the traceback that data loader workers put into it."""
    if "Original Traceback" not in text:
        return text
    return re.split(r"^(?:\w+\.)*\w*(?:Error|Exception|Warning|Bomb): ", text, flags=re.MULTILINE)[-1].strip()


def is_disk_full(error: BaseException) -> bool:
    """Checks for a full disk, quota or file size limit; safetensors (Rust) reports the number only in its message."""
    return getattr(error, "errno", None) in FULL or any(f"(os error {number})" in str(error) for number in FULL)


def shown(value: Any, most: int = 120) -> str:
    """Returns the `repr` of a value, shortened to a number of characters."""
    try:
        return _cut(repr(value), most)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a value of type {type(value).__name__} that is too large to print"


def shorten(text: str) -> str:
    """Shortens long lines, and keeps as many lines as fit into `MESSAGE_BYTES`; says how much is left out."""
    lines, kept, size = [_cut(line, LINE_CHARACTERS) for line in text.splitlines()], [], 0
    for line in lines:
        size += len(line.encode("utf-8", "backslashreplace")) + 1
        if size > MESSAGE_BYTES - 60:
            break
        kept.append(line)
    rest = len(lines) - len(kept)
    return "\n".join([*kept, *([f"... and {rest:,} more line{'s' if rest > 1 else ''}."] if rest else [])])


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} more characters)"


def _of_system(error: OSError) -> str:
    """Returns the message for an error of the operating system: path, reason, number and way out."""
    if error.errno is None or not error.strerror:  # libraries put whole texts into an OSError
        return f"{_cut(without_frames(str(error)), LINE_CHARACTERS) or type(error).__name__}"
    paths = [str(os.fsdecode(p)) for p in (error.filename, error.filename2) if isinstance(p, str | bytes | os.PathLike)]
    where = f"{' -> '.join(paths)}: " if paths else ""
    way_out = WAYS_OUT.get(error.errno, "Choose another path, or try again.")
    return f"{where}{error.strerror} ({errno.errorcode.get(error.errno, error.errno)}). {way_out}"


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raises `Stopped` on SIGTERM, as Python raises `KeyboardInterrupt` on SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
