"""Training in shards on the CPU, where Accelerate would not prepare a model for FSDP2 and takes DDP in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import pytest
from torch.distributed.fsdp import fully_shard

from san_bench.run import train
from san_bench.run.shards import Engine


@contextmanager
def in_shards(wanted: bool) -> Iterator[None]:
    """Makes `train` shard its model, each decoder layer by itself, and Accelerate leave it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        if wanted:

            class Sharding(Engine):
                def __init__(self, trainer: Any) -> None:
                    super().__init__(trainer)
                    for module in [m for m in trainer.model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
                        fully_shard(module)
                    fully_shard(trainer.model)

            patch.setattr(train, "Engine", Sharding)
            patch.setattr(accelerate.Accelerator, "prepare_model", lambda _self, model, **_: model)
        yield
