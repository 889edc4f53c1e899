"""Train with FSDP2 and DeepSpeed: keep trained parameters in fp32, and gather full parameters afterwards."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from san_bench.models.weights import train_in_float32
from san_peft.tuner import sharded


class ShardedModel:
    """Tracks the dtypes and shards of parameters during training, and restores them afterwards.

    Trained parameters are kept in float32 meanwhile. DeepSpeed keeps its own fp32 copies and casts the model to its
    compute dtype; otherwise `train_in_float32` upcasts them, and FSDP2 gets a mixed-precision policy that casts nothing
    it gathers. FSDP2 and DeepSpeed ZeRO-3 shard the model.

    Args:
        trainer: The Trainer, before training starts.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.types = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
        self._back = None if trainer.is_deepspeed_enabled else train_in_float32(trainer.model)
        plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 2:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            plugin.mixed_precision_policy = MixedPrecisionPolicy()  # leave dtypes to autocast, as without FSDP

    def finish(self) -> dict[str, Tensor] | None:
        """Restores the dtypes of the trained parameters; a collective call.

        Returns:
            For a sharded model, the state dict of full tensors in the CPU memory of rank 0 (empty on other ranks);
            `None` for an unsharded model.
        """
        model, cut = self.trainer.model, has_sharded_parameters(self.trainer.model)
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
        """Gathers the full fp32 parameters of DeepSpeed's optimizer, and stops ZeRO-3 from sharding later models."""
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


def has_sharded_parameters(model: Any) -> bool:
    """Returns whether any parameter of a model is sharded across processes."""
    return any(sharded.is_sharded(parameter) or hasattr(parameter, "ds_id") for parameter in model.parameters())
