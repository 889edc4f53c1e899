"""The one door to PEFT's internals: the method's type, its registration, and all names with an underscore."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from san_peft.errors import MergeError
from san_peft.tuner.sharded import is_sharded

PREFIX = "san_"


class SanPeftType(str, Enum):  # noqa: UP042 - PEFT's reports cut str() at the point, which StrEnum has not
    """The type of the method, standing beside PEFT's own closed enumeration."""

    SAN = "SAN"


SAN: Any = PeftType["SAN"] if "SAN" in PeftType.__members__ else SanPeftType.SAN
"""What stands for the method in PEFT's mappings: PEFT's own member, should it ever have one."""


def register(config_cls: type, model_cls: type) -> None:
    """Enters the method into PEFT's mappings; doing it again changes nothing.

    Raises:
        RuntimeError: If another package has registered a method of that name.
    """
    entries: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_cls),
        (PEFT_TYPE_TO_TUNER_MAPPING, model_cls),
        (PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
    ]
    for mapping, value in entries:
        if mapping.setdefault(SAN, value) != value:
            raise RuntimeError(f"Another method named SAN is registered with PEFT: {mapping[SAN]!r}. Uninstall one.")


def matches(tuner: BaseTuner, config: Any, name: str) -> bool:
    """Whether the configuration's targets, exclusions and layer numbers select a module name, as PEFT decides it."""
    return bool(tuner._check_target_module_exists(config, name))


def replace(tuner: BaseTuner, parent: Any, name: str, new: Any, old: Any) -> None:
    """Puts a tuner layer in the place of a module, on its device."""
    tuner._replace_module(parent, name, new, old)


def inject_host(
    tuner: BaseTuner | None, model: nn.Module, config: Any, adapter_name: str, active: list[str], **options: Any
) -> BaseTuner:
    """Puts an adapter of another PEFT method into a model, and returns the tuner that holds it.

    PEFT keeps the configuration of whatever was injected last on the model; here it stays the one that was there.

    Args:
        tuner: The tuner that holds the adapters of that method so far, or `None`.
        model: The model, without SAN's layers.
        config: Configuration of the host.
        adapter_name: Name of the adapter.
        active: Names of the adapters that are active.
        options: `low_cpu_mem_usage`.
    """
    kept = model.__dict__.pop("peft_config", None)
    try:
        if tuner is None:
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, {adapter_name: config}, adapter_name, **options)
        else:
            tuner.peft_config[adapter_name] = config
            tuner.active_adapter = active
            tuner.inject_adapter(model, adapter_name, **options)
    finally:
        model.__dict__.pop("peft_config", None)
        if kept is not None:
            model.peft_config = kept  # type: ignore[assignment]
    return tuner


def make_dense(host: Any, dense: nn.Linear) -> None:
    """Gives a host of a quantised layer a dense one, and makes it the host that PEFT puts on dense layers."""
    host.base_layer = dense
    package = type(host).__module__.rpartition(".")[0]
    host.__class__ = importlib.import_module(f"{package}.layer").Linear
    host.fan_in_fan_out = host.is_target_conv_1d_layer = False
    if hasattr(host, "quantization_backend"):
        host.quantization_backend = None


def set_disabled(module: Any, disabled: bool) -> None:
    """Switches one tuner layer or wrapper without touching what requires gradients."""
    module._disable_adapters = disabled


def put_names(target: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> tuple[Any, Any]:
    """Forward pre-hook that hands the adapter of every sample to a layer; beams of a sample follow each other."""
    size = len(args[0]) if args and isinstance(args[0], torch.Tensor) else 0
    if size > len(adapter_names) and size % len(adapter_names) == 0:
        adapter_names = [name for name in adapter_names for _ in range(size // len(adapter_names))]
    return args, {**kwargs, "adapter_names": adapter_names}


def batch_size(args: Any, kwargs: dict[str, Any]) -> int | None:
    """Returns how many samples a model is given, or `None` where its arguments do not tell."""
    named = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "inputs", "x")
    for value in (*args[:1], *(kwargs.get(name) for name in named)):
        if isinstance(value, torch.Tensor) and value.dim():
            return len(value)
    return None


class TunerLayer(BaseTunerLayer):
    """`BaseTunerLayer` whose adapters keep their own floating type when they follow the frozen layer to a device.

    PEFT's version casts them to the frozen layer's type and back, which would round saved float32 vectors to bfloat16.
    """

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight: Any = self.get_base_layer().weight
        self.move_adapter(adapter_name, weight.device if device is None else device)

    def move_adapter(self, adapter_name: str, device: torch.device) -> None:
        """Moves an adapter's vectors to a device; what is or would be on the meta device stays."""
        for bank in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in bank and device.type != "meta":
                if not any(parameter.is_meta for parameter in bank[adapter_name].parameters()):
                    bank[adapter_name].to(device)


class Tuner(BaseTuner):
    """`BaseTuner` with its private hooks under public names, for `SanModel` to fill in."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return self.prepare_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **optional_kwargs: Any,
    ) -> None:
        self.create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        self.unloaded()
        return model

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        layers: dict[str, Any] = {n: m for n, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)}
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        for name, layer in layers.items():
            base: Any = layer.get_base_layer()
            layer.check_dense()
            shared = owners.get(id(base.weight), [])
            if len(shared) > 1:
                raise MergeError(
                    f"{name} cannot be merged: its weight is shared under the names {', '.join(shared)}, so folding "
                    "it once would change both. Leave it out of target_modules, or serve the adapter unmerged."
                )
            if is_sharded(base.weight):
                raise MergeError(
                    f"{name} cannot be merged: its weight is in shards on {base.weight.device_mesh.size()} devices. "
                    "Save the adapter, load it on a model that is not sharded, and merge that."
                )
            if getattr(getattr(base, "_hf_hook", None), "offload", False):
                raise MergeError(f"{name} cannot be merged: its weight is offloaded. Load the model onto one device.")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        size = batch_size(args, kwargs)
        if size is not None and size != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {size} respectively."
            )
        unknown = set(adapter_names) - {"__base__", *self.peft_config}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        hook = partial(put_names, adapter_names=adapter_names)
        handles = [  # hosts and trained tokens are given them by what wraps them
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper))
        ]
        self.set_mixed(adapter_names)
        try:
            yield
        finally:
            self.set_mixed(None)
            for handle in handles:
                handle.remove()
