"""Record versions, commit and machine, and write files atomically."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Returns package versions, git commit (`None` outside a checkout), CPU, threads and device."""
    import torch

    names = ("san-peft", "torch", "transformers", "peft", "accelerate", "numpy")
    return {
        "python": platform.python_version(),
        "versions": {name: torch.__version__ if name == "torch" else version(name) for name in names},
        "commit": _commit(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


class Energy:
    """Measures the energy of the CPUs since its construction, if Linux' RAPL counters are readable."""

    def __init__(self) -> None:
        self._files = sorted(Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj"))
        self._start = self._read()

    def joules(self) -> float | None:
        """Returns the joules so far; `None` without counters, or if one has wrapped around."""
        now = self._read()
        if self._start is None or now is None or any(b < a for a, b in zip(self._start, now, strict=True)):
            return None
        return round((sum(now) - sum(self._start)) / 1e6, 1)

    def _read(self) -> list[int] | None:
        try:
            return [int(file.read_text(encoding="utf-8")) for file in self._files] or None
        except OSError:  # readable only by root on many machines
            return None


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: readers see the old or the new content, never a part. Text is UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # of no use to a reader: the temporary name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as JSON lines, atomically."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _git(*words: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        run = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _commit() -> str | None:
    """Returns the commit of the checkout that tracks this file, marked if `src/` has uncommitted changes."""
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):
        return None
    head = _git("rev-parse", "HEAD")
    sources = Path(__file__).resolve().parents[2]  # both packages affect a result
    return f"{head}+changes" if head and _git("status", "--porcelain", "--", str(sources)) else head


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
