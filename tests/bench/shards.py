"""Training in shards on the CPU, where Accelerate would not prepare a model for FSDP2 and takes DDP in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
from torch.distributed.fsdp import fully_shard

from san_bench.run import train
from san_bench.run.sharded import ShardedModel


def launch(settings: Path, recipe: Path, *words: str, timeout: int, **environment: str) -> None:
    """Trains a recipe by `accelerate launch` with settings of Accelerate, and sees that it ends well."""
    place = ["--config_file", str(settings), *words, "--module", "san_bench.cli", "train", str(recipe)]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *place],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@contextmanager
def in_shards(wanted: bool) -> Iterator[None]:
    """Makes `train` shard its model, each decoder layer by itself, and Accelerate leave it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        if wanted:

            class Sharding(ShardedModel):
                def __init__(self, trainer: Any) -> None:
                    super().__init__(trainer)
                    for module in [m for m in trainer.model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
                        fully_shard(module)
                    fully_shard(trainer.model)

            patch.setattr(train, "ShardedModel", Sharding)
            patch.setattr(accelerate.Accelerator, "prepare_model", lambda _self, model, **_: model)
        yield
