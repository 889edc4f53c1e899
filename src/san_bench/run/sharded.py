"""What engines of training make of a model, FSDP2 and DeepSpeed, and how it becomes whole and exact again."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from san_bench.models.weights import train_in_float32
from san_peft.tuner import sharded


class ShardedModel:
    """The types and the places of parameters before a training and after it.

    What is trained is in float32 meanwhile. DeepSpeed keeps such copies itself, and rounds all of the model to the
    type that it computes in; elsewhere `train_in_float32` sees to it, and FSDP2 is kept from rounding what it gathers.
    FSDP2, and DeepSpeed's ZeRO-3, cut the model up.

    Args:
        trainer: The Trainer, before it trains.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.types = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
        self._back = None if trainer.is_deepspeed_enabled else train_in_float32(trainer.model)
        plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 2:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            plugin.mixed_precision_policy = MixedPrecisionPolicy()  # autocast decides, as without shards

    def finish(self) -> dict[str, Tensor] | None:
        """Brings the trained parameters back to their types; to be called on all processes.

        Returns:
            The state of a model that is in shards, in whole tensors and in the memory of the first process; elsewhere
            nothing. `None` of a model that is whole everywhere.
        """
        model, cut = self.trainer.model, is_sharded(self.trainer.model)
        exact = self._float32_of_deepspeed() if self._back is None else {}
        if cut:
            return {
                name: exact.get(name, tensor).to("cpu", self.types.get(name, tensor.dtype))
                for name, tensor in self._gathered().items()
            }
        if self._back is not None:
            self._back()
        parameters = dict(model.named_parameters())
        for name, tensor in exact.items():
            parameters[name].data = tensor.to(self.types[name])
        return None

    def _float32_of_deepspeed(self) -> dict[str, Tensor]:
        """What DeepSpeed's optimiser has trained, in whole tensors; the models to come are not to be cut up."""
        unset_hf_deepspeed_config()
        whole = import_module("deepspeed.utils").safe_get_full_fp32_param
        found = {name: whole(parameter) for name, parameter in self.trainer.model.named_parameters()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _gathered(self) -> dict[str, Tensor]:
        if self._back is None:
            return self.trainer.accelerator.get_state_dict(self.trainer.model_wrapped) or {}
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole: Any = get_model_state_dict(self.trainer.model, options=options)
        return whole


def is_sharded(model: Any) -> bool:
    """Says whether any parameter of a model lies in shards on several processes."""
    return any(sharded.is_sharded(parameter) or hasattr(parameter, "ds_id") for parameter in model.parameters())
