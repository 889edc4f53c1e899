"""Build the command that trains a recipe in several processes; imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

SETTINGS = Path(__file__).parent / "distributed"
"""Folder of Accelerate's settings, one YAML file per way of sharding."""

PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Accelerate's names of the precisions of recipes."""


def launch_command(
    words: Sequence[str], processes: int, shard: str | None = None, precision: str = "fp32", cpu: bool = False
) -> list[str]:
    """Returns the command line that runs `san` in several processes of this machine.

    Args:
        words: Words of the command after `san`.
        processes: Number of processes, one per GPU.
        shard: `fsdp2`, `zero2` or `zero3`; `None` replicates the model on every device (DDP).
        precision: `precision` of the recipe.
        cpu: Starts the processes on the CPU, where Accelerate's own launcher needs MPI.
    """
    python, program = [sys.executable, "-m"], ["--module", "san_bench", *words]
    if cpu:
        local = ["--nproc-per-node", str(processes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        return [*python, "torch.distributed.run", *local, *program]
    settings = ["--config_file", str(SETTINGS / f"{shard}.yaml")] if shard else ["--num_machines", "1", "--multi_gpu"]
    if processes == 1 and not shard:
        settings.remove("--multi_gpu")
    return [
        *python,
        "accelerate.commands.launch",
        *settings,
        *("--num_processes", str(processes), "--mixed_precision", PRECISION[precision]),
        *("--main_process_port", "0", "--dynamo_backend", "no"),
        *program,
    ]
