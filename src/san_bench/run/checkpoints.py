"""Complete, verify and find checkpoints, and stop a training after a signal with a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed
from transformers import TrainerCallback

from san_bench.config.errors import Stopped
from san_bench.run.folder import COMPLETE, step_of
from san_bench.run.provenance import file_sha256, write_atomically

STATE = "trainer_state.json"
"""File of a checkpoint in which transformers' Trainer names the best one so far."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Defers SIGTERM and SIGINT, so that the training can save a checkpoint first; a second signal stops at once.

    Attributes:
        number: Number of the signal that has come, or `None`.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Installs the handlers, in the main thread; a signal that is ignored stays so."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Restores the handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # data loader workers inherit the handler, and end with this process
            return
        if self.number is not None:
            raise Stopped(number)
        self.number = number
        name = signal.Signals(number).name
        with suppress(OSError):  # print is not reentrant
            os.write(2, f"\n{name}: saving a checkpoint after this step. Another signal stops at once.\n".encode())


class CompleteCheckpoints(TrainerCallback):
    """Marks checkpoints as complete, and ends the training after a signal.

    It must be the last callback, since others write to the checkpoint.

    Args:
        folder: Folder of the run.
        seconds: Returns the seconds of training so far.
    """

    def __init__(self, folder: Path, seconds: Callable[[], float]) -> None:
        self.folder, self.seconds = folder, seconds
        self.request = StopRequest()
        self._stops: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Requests a checkpoint if any process got a signal."""
        self._stops = _largest(self.request.number or 0, args.device) or None
        control.should_save = control.should_save or self._stops is not None

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops an evaluation during the training after a signal."""
        if self.request.number is not None:
            raise Stopped(self.request.number, f"{self.folder} is stopped. Run the same command again to resume.")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Marks the checkpoint as complete once every process has written its part, and stops after a signal."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.seconds())
        if self._stops is not None:
            raise Stopped(
                self._stops,
                f"{self.folder} is stopped after step {state.global_step} of {state.max_steps}, and its checkpoint is "
                f"saved. Run the same command again to resume from there.",
            )


def _largest(number: int, device: torch.device) -> int:
    """Returns the largest number of all processes; a collective call."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return number
    shared = torch.tensor(number, device=device)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return int(shared)


def complete(checkpoint: Path, seconds: float) -> None:
    """Marks a checkpoint as complete, with the seconds of training so far and the hash of each of its files."""
    marker = {"seconds": round(seconds, 3), "files": _hashes(checkpoint)}
    write_atomically(checkpoint / COMPLETE, json.dumps(marker) + "\n")


def seconds_of(checkpoint: Path) -> float:
    """Returns the seconds of training that a complete checkpoint records."""
    return _marker(checkpoint)[0]


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint that is whole, and removes incomplete and damaged ones.

    Damaged ones are named on standard error. A checkpoint whose best one (see `selection`) is damaged is so too.

    Args:
        folder: Folder of the checkpoints.
    """
    whole: list[Path] = []
    for path in sorted(folder.glob("checkpoint-*"), key=step_of):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
        elif damage := _damage(path, {other.name for other in whole}):
            print(f"warning: {path} is damaged and is not used: {damage}.", file=sys.stderr)
            shutil.rmtree(path)
        else:
            whole.append(path)
    return whole[-1] if whole else None


def _damage(checkpoint: Path, earlier: set[str]) -> str | None:
    """Returns what is wrong with a complete checkpoint, or `None`."""
    try:
        _, files = _marker(checkpoint)
        found = _hashes(checkpoint) if files else {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{COMPLETE} is not readable ({error})"
    wrong = [name for name, digest in files.items() if found.get(name) != digest]
    if wrong:
        missing = [name for name in wrong if name not in found]
        return f"{', '.join(missing)} missing" if missing else f"{', '.join(wrong)} changed since it was saved"
    best = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["best_model_checkpoint"] if files else None
    if best and Path(best).name not in earlier | {checkpoint.name}:
        return f"the best checkpoint so far, {Path(best).name}, is missing or damaged"
    return None


def _marker(checkpoint: Path) -> tuple[float, dict[str, str]]:
    """Reads the marker; earlier versions wrote the seconds alone."""
    content = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    return (float(content["seconds"]), dict(content["files"])) if isinstance(content, dict) else (float(content), {})


def _hashes(folder: Path) -> dict[str, str]:
    """Returns the sha256 of each file in a folder by its relative path, without the marker."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != COMPLETE and not path.name.endswith(".tmp"):
            found[name] = file_sha256(path)
    return found
