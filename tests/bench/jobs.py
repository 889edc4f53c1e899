"""Jobs for the engines, in a module of their own that another process can import."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def double(value: int) -> int:
    return 2 * value


def double_or_raise(value: int) -> int:
    if value < 0:
        raise ArithmeticError(f"{value} is negative")
    return 2 * value


def refuse(what: str) -> None:
    from san_peft.errors import SanError

    raise SanError(f"{what} does not fit.")


def double_or_die(value: int) -> int:
    """Is killed for -1, and ends itself for -2."""
    if value == -1:
        os.kill(os.getpid(), signal.SIGKILL)
    if value == -2:
        os._exit(7)
    return 2 * value


def die_once(marker: str | None) -> str:
    """Is killed on the first attempt; on the second the marker is there."""
    if marker and not Path(marker).exists():
        Path(marker).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return f"after {Path(marker).name}" if marker else "at once"


def meet(place: tuple[str, int]) -> str | None:
    """Leaves a file, waits until there are as many as are to meet, and tells the CUDA devices it sees."""
    folder, number = Path(place[0]), place[1]
    (folder / str(os.getpid())).touch()
    until = time.monotonic() + 60
    while len(list(folder.iterdir())) < number:
        if time.monotonic() > until:
            raise TimeoutError(f"{len(list(folder.iterdir()))} of {number} came")
        time.sleep(0.02)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def facts(_: Any) -> dict[str, Any]:
    """Who carries out the job."""
    torch = sys.modules.get("torch")
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "threads": torch.get_num_threads() if torch else None,
    }


def sleep_after(pid_file: str | None) -> int:
    """Returns at once without a file; with one it says who it is, and sleeps."""
    if pid_file:
        Path(pid_file).write_text(str(os.getpid()))
        time.sleep(600)
    return os.getpid()


def imported(name: str) -> bool:
    """Whether a module was imported before the job began."""
    return name in sys.modules


def unsendable(_: Any) -> Any:
    return lambda: None


def lose_machine_once(marker: str | None) -> str:
    """Kills Ray's own process of its machine on the first attempt, and itself."""
    if marker and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return "again" if marker else "at once"
