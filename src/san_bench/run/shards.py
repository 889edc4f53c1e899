"""Models whose parameters lie in shards, as FSDP2 and DeepSpeed's ZeRO-3 cut them up in training."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from san_peft.tuner import sharded


def is_sharded(model: Any) -> bool:
    """Says whether any parameter of a model lies in shards on several processes."""
    return any(sharded.is_sharded(parameter) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def gathered(trainer: Any) -> dict[str, Tensor]:
    """Returns the state of a sharded model in whole tensors, in the memory of the first process; elsewhere nothing.

    Args:
        trainer: The Trainer that has trained it, on all processes.
    """
    if any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()):
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole: Any = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return whole
