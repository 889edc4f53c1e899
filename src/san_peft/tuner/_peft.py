"""Registration with PEFT, and the only module that uses private names of PEFT."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    check_target_module_exists,
)
from peft.utils import AuxiliaryTrainingWrapper, transformers_weight_conversion
from torch import nn

from san_peft.errors import AdapterError, MergeError
from san_peft.propagation.trace import parameter_names
from san_peft.tuner.frozen import stored_weight
from san_peft.tuner.mixed import check_samples
from san_peft.tuner.sharded import is_sharded

AS_GIVEN = "_san_names_as_given"
"""Attribute of the config of a host, whose target names PEFT must not convert."""
PREFIX = "san_"
"""Prefix of all parameter names of the method, by which PEFT finds them in a state dict."""


class SanPeftType(str, Enum):  # noqa: UP042 - PEFT splits str() of the type at a dot, which StrEnum lacks
    """Extends PEFT's closed enum `PeftType` by the type of this method."""

    SAN = "SAN"


SAN: Any = PeftType["SAN"] if "SAN" in PeftType.__members__ else SanPeftType.SAN
"""Key of the method in PEFT's mappings: PEFT's own member if it ever gets one."""


def register(config_cls: type, model_cls: type) -> None:
    """Registers the method in PEFT's mappings; can be called more than once.

    Raises:
        RuntimeError: If another package has registered a method with the same name.
    """
    entries: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_cls),
        (PEFT_TYPE_TO_TUNER_MAPPING, model_cls),
        (PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
    ]
    for mapping, value in entries:
        if mapping.setdefault(SAN, value) != value:
            raise RuntimeError(
                f"Another method named SAN is already registered with PEFT: {mapping[SAN]!r}. Uninstall one of the two."
            )
    names = transformers_weight_conversion
    if not hasattr(names.convert_peft_config_for_transformers, "__wrapped__"):
        names.convert_peft_config_for_transformers = _unless_as_given(names.convert_peft_config_for_transformers)


def matches(tuner: BaseTuner, config: Any, name: str) -> bool:
    """Returns whether a config selects a module name, by PEFT's rules for targets, exclusions and layer indices."""
    return bool(tuner._check_target_module_exists(config, name))


def in_blocks(config: Any, name: str) -> bool:
    """Returns whether a module is in one of the blocks of `layers_to_transform`, by PEFT's rules."""
    numbers = config.layers_to_transform
    if numbers is None or numbers == []:
        return True
    _, block, last = name.rpartition(".")
    one = SimpleNamespace(
        target_modules=[last], layers_to_transform=numbers, layers_pattern=config.layers_pattern, exclude_modules=None
    )
    return bool(block) and bool(check_target_module_exists(one, name))


def is_excluded(config: Any, name: str) -> bool:
    """Returns whether `exclude_modules` matches a module name."""
    return not check_target_module_exists(
        SimpleNamespace(target_modules=[name], exclude_modules=config.exclude_modules), name
    )


def replace(tuner: BaseTuner, parent: Any, name: str, new: Any, old: Any) -> None:
    """Replaces a module by a tuner layer, on the same device."""
    tuner._replace_module(parent, name, new, old)


def share_layers(model: nn.Module, kind: type, taken_off: bool = False) -> None:
    """Replaces a frozen layer by its tuner layer everywhere the model refers to it.

    PEFT replaces only the first name. A layer may have several, and may also be in plain lists, tuples and dicts, from
    which the forward pass of Mask2Former takes its layers.

    Args:
        model: The model after PEFT has injected or unloaded the tuner layers.
        kind: The class of the tuner layers.
        taken_off: Whether to put the frozen layers back instead.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, kind)]
    new = {id(module): layer for layer in layers for module in (layer.base_layer, layer.get_base_layer())}

    def exchanged(module: Any) -> Any:
        if taken_off:
            return module.get_base_layer() if isinstance(module, kind) else module
        return new.get(id(module), module)

    for parent in list(model.modules()):
        if isinstance(parent, BaseTunerLayer):
            continue
        for name, child in list(parent._modules.items()):
            parent._modules[name] = exchanged(child)
        for name, value in list(vars(parent).items()):
            if not name.startswith("_") and isinstance(value, list | tuple | dict):
                vars(parent)[name] = _within(value, exchanged)


def _within(value: Any, exchanged: Callable[[Any], Any]) -> Any:
    """Replaces the modules in a nested container, in place except for tuples."""
    if isinstance(value, nn.Module):
        return exchanged(value)
    if type(value) is tuple:
        return tuple(_within(item, exchanged) for item in value)
    if type(value) in (list, dict):
        for key in range(len(value)) if isinstance(value, list) else list(value):
            value[key] = _within(value[key], exchanged)
    return value


def refusal(config: Any, model: nn.Module, name: str) -> str | None:
    """Returns why PEFT refuses to adapt a layer of this architecture, or `None` if it does not."""
    try:
        _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
    except ValueError:
        return f"which PEFT refuses in a {model.config.model_type}: fused kernels read its weight"  # type: ignore
    return None


def _unless_as_given(convert: Callable[..., None]) -> Callable[..., None]:
    """Wraps PEFT's conversion of target names to those of transformers 5, so that it leaves out hosts of SAN.

    PEFT converts the names that experts had in transformers 4 to those of the fused tensors of transformers 5, even if
    they name a dense layer, such as the shared expert of Qwen3-Next.
    """

    @wraps(convert)
    def converted(peft_config: Any, *args: Any, **kwargs: Any) -> None:
        if AS_GIVEN not in vars(peft_config):
            convert(peft_config, *args, **kwargs)

    return converted


def inject_host(
    tuner: BaseTuner | None, model: nn.Module, config: Any, adapter_name: str, active: list[str], **options: Any
) -> BaseTuner:
    """Injects an adapter of another PEFT method into a model, and returns its tuner.

    PEFT stores the config of the last injection as `model.peft_config`; this restores the previous one.

    Args:
        tuner: The existing tuner of that method, or `None`.
        model: The model, with SAN's layers removed.
        config: The config of the host.
        adapter_name: The name of the adapter.
        active: The names of the active adapters.
        options: `low_cpu_mem_usage`.
    """
    kept = model.__dict__.pop("peft_config", None)
    try:
        vars(config)[AS_GIVEN] = True
        if tuner is None:
            kind = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
            tuner = kind(model, {adapter_name: config}, adapter_name, **options)
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
    """Replaces the quantised layer of a host by a dense one, and changes the host's class accordingly."""
    host.base_layer = dense
    package = type(host).__module__.rpartition(".")[0]
    host.__class__ = importlib.import_module(f"{package}.layer").Linear
    host.fan_in_fan_out = host.is_target_conv_1d_layer = False
    if hasattr(host, "quantization_backend"):
        host.quantization_backend = None


def set_disabled(module: Any, disabled: bool) -> None:
    """Disables or enables a tuner layer or wrapper without changing `requires_grad`."""
    module._disable_adapters = disabled


def put_names(target: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> tuple[Any, Any]:
    """Passes `adapter_names` to a layer as a forward pre-hook, repeated for the beams of each sample."""
    size = len(args[0]) if args and isinstance(args[0], torch.Tensor) else 0
    if adapter_names and size > len(adapter_names) and size % len(adapter_names) == 0:
        adapter_names = [name for name in adapter_names for _ in range(size // len(adapter_names))]
    return args, {**kwargs, "adapter_names": adapter_names}


def batch_size(args: Any, kwargs: dict[str, Any]) -> int | None:
    """Returns the batch size of a model's arguments, or `None` if it cannot be determined."""
    named = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "inputs", "x")
    for value in (*args[:1], *(kwargs.get(name) for name in named)):
        if isinstance(value, torch.Tensor) and value.dim():
            return len(value)
    return None


class TunerLayer(BaseTunerLayer):
    """Extends `BaseTunerLayer` so that adapters keep their dtype when they move to the device of the base layer.

    PEFT's version casts them to the base layer's dtype and back, which would round float32 vectors to bfloat16.
    """

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = stored_weight(self.get_base_layer())
        self.move_adapter(adapter_name, weight.device if device is None else device)

    def move_adapter(self, adapter_name: str, device: torch.device) -> None:
        """Moves an adapter's vectors to a device, unless either device is the meta device."""
        for bank in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in bank and device.type != "meta":
                if not any(parameter.is_meta for parameter in bank[adapter_name].parameters()):
                    bank[adapter_name].to(device)


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Prevents PEFT from unloading other modules with an attribute `base_layer`, as in timm's DLA."""
    foreign = [m for m in model.modules() if hasattr(m, "base_layer") and not isinstance(m, BaseTunerLayer)]
    for module in foreign:
        vars(module)["unload_and_optionally_merge_module"] = partial(_itself, module)
    try:
        yield
    finally:
        for module in foreign:
            del vars(module)["unload_and_optionally_merge_module"]


def _itself(module: nn.Module, **_: Any) -> nn.Module:
    return module


class Tuner(BaseTuner):
    """Extends `BaseTuner`, exposing its private hooks under public names for `SanModel`."""

    check_loaded: ClassVar[Callable[[Any, str, dict[str, torch.Tensor]], None]]

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        # PEFT ignores layers_to_transform if target_modules is a string or contains the full name
        found = BaseTuner._check_target_module_exists(peft_config, key)
        return found and in_blocks(peft_config, key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        cls.check_loaded(model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

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
        with _left_alone(self.model):
            model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        self.unloaded()
        return model

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        layers: dict[str, Any] = {n: m for n, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)}
        names = parameter_names(self.model)
        for name, layer in layers.items():
            base: Any = layer.get_base_layer()
            layer.check_dense()
            weight: Any = stored_weight(base)
            shared = names.get(id(weight), [])
            if len(shared) > 1:
                raise MergeError(
                    f"{name} cannot be merged: its weight is tied ({', '.join(shared)}), so merging would change every "
                    "layer that uses it. Leave it out of target_modules, or serve the adapter unmerged."
                )
            if is_sharded(weight):
                raise MergeError(
                    f"{name} cannot be merged: its weight is sharded across {weight.device_mesh.size()} devices. "
                    "Save the adapter, load it on an unsharded model, and merge there."
                )
            if getattr(getattr(base, "_hf_hook", None), "offload", False):
                raise MergeError(f"{name} cannot be merged: its weight is offloaded. Load the model onto one device.")

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the strength of an adapter in all layers and hosts; see `SanLayer.set_scale`.

        Raises:
            SanError: If the adapter does not exist, or does not support that strength. No layer is changed then.
        """
        if adapter not in self.peft_config:
            raise AdapterError(f"Adapter {adapter!r} does not exist; there are {', '.join(self.peft_config)}.")
        layers: list[Any] = [m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls)]
        layers = [layer for layer in layers if layer.has_part(adapter)]
        for layer in layers:
            layer.check_strength(adapter, scale)
        for layer in layers:
            layer.set_scale(adapter, scale)

    def check_mixed(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Checks once per model that `adapter_names` would be applied to the right samples."""
        own, scales = vars(self), self.scales
        if (
            "_samples" not in own
            or own.get("_checked") == scales.wiring
            or any(x.merged for x in scales.layers.values())
        ):
            return
        mixed, scales.mixed = scales.mixed, ()
        samples = own.pop("_samples")  # check_samples calls the model
        try:
            check_samples(self.model, scales.layers, args, kwargs, samples)
        finally:
            own["_samples"], scales.mixed = samples, mixed
        own["_checked"] = scales.wiring

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        size = batch_size(args, kwargs)  # in generation the number of prompts, before beams are expanded
        if size is not None and size != len(adapter_names):
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {size} respectively."
            )
        unknown = set(adapter_names) - {"__base__", *self.peft_config}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        hook = partial(put_names, adapter_names=adapter_names)
        with ExitStack() as stack:

            def hand_names_to(module: nn.Module) -> None:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

            for module in self.modules():  # wrappers pass them on to hosts and trained tokens
                if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper)):
                    hand_names_to(module)

            def check(module: Any, args: Any, kwargs: Any) -> None:
                self.check_mixed(args, kwargs)

            stack.callback(self.model.register_forward_pre_hook(check, with_kwargs=True).remove)
            self.set_mixed(adapter_names, hand_names_to)
            stack.callback(self.set_mixed, None)
            vars(self)["_samples"] = len(adapter_names)
            stack.callback(vars(self).pop, "_samples")
            yield
