"""Weighted combination of adapters: scales, hosts, saved modules and trained tokens."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from san_peft.errors import AdapterError
from san_peft.tuner.calibrate import moments_of
from san_peft.tuner.decompose import moves_weight
from san_peft.tuner.layer import SanLayer

FIELDS = (
    "target_modules",
    "edges",
    "exponent",
    "exponent_pattern",
    "bound",
    "shift",
    "gate",
    "decomposition",
    "own_scale",
    "trainable_token_indices",
)
"""Fields of `SanConfig` that adapters must share to be combined."""
HOST_FIELDS = ("use_dora", "lora_bias", "feedforward_modules")
"""Fields of the host's config that adapters must share to be combined."""
WEIGHTED = ("linear", "cat", "svd")
"""PEFT's combination types that are weighted sums of updates, so that magnitudes and biases can be summed as well."""
VECTORS = ("san_scale", "san_shift", "san_gate")
"""Attributes of `SanLayer` that hold trainable vectors."""


def combine(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    options: dict[str, Any],
) -> None:
    """Combines adapters into a new one; see `SanModel.add_weighted_adapter`.

    Args:
        tuner: The `SanModel`.
        adapters: The names of the adapters.
        weights: The weight of each adapter.
        adapter_name: The name of the new adapter.
        combination_type: How to combine scales or hosts.
        options: Further options that PEFT takes when it combines hosts.

    Raises:
        AdapterError: If an adapter does not exist, or the adapters cannot be combined that way. The model is left
            unchanged.
    """
    _check(tuner, adapters, weights, adapter_name)
    configs: Any = tuner.peft_config
    kind = (configs[adapters[0]].inner or {}).get("peft_type")
    layers = [m for m in tuner.modules() if isinstance(m, SanLayer)]
    if kind is None and (combination_type not in ("linear", "product") or options):
        raise AdapterError(
            f"Invalid combination_type: {combination_type}, with options {', '.join(options) or 'none'}. Adapters "
            "without a host support 'linear' and 'product', without options."
        )
    if kind is not None:
        _check_hosts(tuner, layers, adapters, combination_type)
    if combination_type == "product":
        _check_positive(tuner, adapters)
    vectors = _vectors(layers, adapters, weights, combination_type == "product")
    modules = {
        name: _whole(name, wrapper, adapters, weights)
        for name, wrapper in _wrappers(tuner.model).items()
        if any(adapter in _copies(wrapper) for adapter in adapters)
    }
    flags = {parameter: parameter.requires_grad for parameter in tuner.model.parameters()}
    try:
        configs[adapter_name] = _config(configs, adapters)
        if kind is not None:
            _combine_hosts(tuner, layers, adapters, weights, adapter_name, combination_type, options)
        tuner.inject_adapter(tuner.model, adapter_name)
        with torch.no_grad():
            for bank, value in vectors:
                bank[adapter_name].weight.copy_(value)
            for layer in layers:
                if (moments := moments_of(layer, adapter_name)) is not None:
                    moments.copy_(torch.stack([moments_of(layer, name) for name in adapters]).mean(0))  # type: ignore[misc]
            for name, state in modules.items():
                _write(tuner.model.get_submodule(name), adapter_name, state)
    except BaseException:
        _discard(tuner, layers, adapter_name)
        raise
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    for parameter in tuner.model.parameters():
        if parameter not in flags:
            parameter.requires_grad_(False)


def _check(tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    configs = tuner.peft_config
    if adapter_name in configs:
        raise AdapterError(f"Adapter with name {adapter_name!r} already exists.")
    if isinstance(adapters, str) or len(adapters) != len(weights) or not adapters:
        raise AdapterError(f"adapters and weights must have the same length, got {len(adapters)} and {len(weights)}.")
    for name in adapters:
        if name not in configs:
            raise AdapterError(f"Adapter {name} does not exist; there are {', '.join(configs)}.")
    if not all(math.isfinite(weight) for weight in weights):
        raise AdapterError(f"weights must be finite, got {list(weights)}.")
    first = configs[adapters[0]]
    for name in adapters[1:]:
        for field in FIELDS:
            if getattr(configs[name], field, None) != getattr(first, field, None):
                raise AdapterError(f"Adapters {adapters[0]!r} and {name!r} differ in {field}.")
        kinds = [(config.inner or {}).get("peft_type") for config in (first, configs[name])]
        if kinds[0] != kinds[1]:
            raise AdapterError(
                f"Adapters {adapters[0]!r} and {name!r} differ in inner: the hosts are {kinds[0]} and {kinds[1]}."
            )
        for field in HOST_FIELDS:
            theirs, ours = ((config.inner or {}).get(field) for config in (configs[name], first))
            if (theirs or None) != (ours or None):
                raise AdapterError(f"Adapters {adapters[0]!r} and {name!r} differ in inner: {field} is not the same.")


def _check_hosts(tuner: Any, layers: list[SanLayer], adapters: Sequence[str], combination_type: str) -> None:
    config = tuner.peft_config[adapters[0]]
    kind = config.inner["peft_type"]
    if not hasattr(tuner.hosts.get(kind), "add_weighted_adapter"):
        raise AdapterError(f"PEFT cannot combine {kind} hosts. Combine adapters whose hosts are LORA or IA3.")
    if any(layer.merged for layer in layers):
        raise AdapterError("The model is merged; unmerge it before you combine adapters with hosts.")
    for name in adapters:
        if moves_weight(tuner.peft_config[name].inner_config()):
            raise AdapterError(
                f"Adapter {name!r} has inner with init_lora_weights={config.inner.get('init_lora_weights')!r}, which "
                "moved part of the frozen weight into the adapter, so the result would not fit a newly loaded model."
            )
    if kind == "IA3" and combination_type != "linear":
        raise AdapterError(f"IA3 hosts support only combination_type='linear', got {combination_type!r}.")
    if combination_type == "product":
        raise AdapterError("combination_type='product' supports only adapters without a host; use 'linear'.")
    if len(adapters) > 1 and combination_type not in WEIGHTED:
        for field in ("use_dora", "lora_bias"):
            if config.inner.get(field):
                raise AdapterError(
                    f"combination_type={combination_type!r} does not support inner with {field}=True; use one of "
                    f"{', '.join(WEIGHTED)}."
                )


def _check_positive(tuner: Any, adapters: Sequence[str]) -> None:
    for fqn, layer in tuner.model.named_modules():
        if not isinstance(layer, SanLayer):
            continue
        for kind in ("san_scale", "san_gate"):
            for name in (name for name in adapters if name in getattr(layer, kind)):
                value = getattr(layer, kind)[name]()
                if not bool((value > 0).all()):
                    raise AdapterError(
                        f"{int((~(value > 0)).sum())} of {value.numel()} entries of the {kind.removeprefix('san_')} of "
                        f"adapter {name!r} in {fqn} are not positive; use combination_type='linear'."
                    )


def _config(configs: Any, adapters: Sequence[str]) -> Any:
    """Returns the config of the first adapter, extended by the saved modules and norms of all of them."""
    config = copy.deepcopy(configs[adapters[0]])
    saved = dict.fromkeys(module for name in adapters for module in configs[name].modules_to_save or ())
    config.modules_to_save = list(saved) or None
    config.train_norms = any(configs[name].train_norms for name in adapters)
    config.init_weights = True
    return config


# ---------------------------------------------------------------------- vectors and saved modules


@torch.no_grad()
def _vectors(
    layers: list[SanLayer], adapters: Sequence[str], weights: Sequence[float], product: bool
) -> list[tuple[Any, Tensor]]:
    """Combines the offsets of scales, gates and shifts; returns each with the container it belongs to."""
    found = []
    for layer in layers:
        for kind in VECTORS:
            bank: Any = getattr(layer, kind)
            if any(name not in bank for name in adapters):
                continue
            offsets = [bank[name].weight for name in adapters]
            if product and kind != "san_shift":
                logs = [torch.log1p(offset.to(torch.promote_types(offset.dtype, torch.float32))) for offset in offsets]
                found.append((bank, torch.expm1(weighted(logs, weights))))
            else:
                found.append((bank, weighted(offsets, weights)))
    return found


def weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns the weighted sum of tensors in at least float32, unrounded."""
    wide = torch.promote_types(values[0].dtype, torch.float32)
    total = weights[0] * values[0].to(wide)
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + weight * value.to(total.device, wide)
    return total


def _around(frozen: Tensor, values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns a frozen tensor plus the weighted differences of other tensors from it."""
    total, rest = weighted(values, weights), 1.0 - math.fsum(weights)
    return total if abs(rest) < 1e-12 else total + rest * frozen.to(total.device, total.dtype)


def _wrappers(model: nn.Module) -> dict[str, Any]:
    """Returns the outermost wrappers of saved modules and trained tokens, by name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not name.startswith(tuple(f"{n}." for n in found)):
            found[name] = module
    return found


def _copies(wrapper: Any) -> Any:
    """Returns the trainable copies in a wrapper, by adapter name."""
    if isinstance(wrapper, ModulesToSaveWrapper):
        return wrapper.modules_to_save
    return wrapper.token_adapter.trainable_tokens_delta


@torch.no_grad()
def _whole(name: str, wrapper: Any, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """Combines the tensors of a saved module; adapters that do not train it contribute the frozen tensors.

    Raises:
        AdapterError: If the copies do not have the same tensors, or a running variance would become negative.
    """
    copies = _copies(wrapper)
    if not isinstance(wrapper, ModulesToSaveWrapper):
        frozen = wrapper.token_adapter.trainable_tokens_original[adapters[0]]
        return {"": _around(frozen, [copies[adapter] for adapter in adapters], weights)}
    frozen = wrapper.original_module.state_dict()
    states = [copies[adapter].state_dict() if adapter in copies else frozen for adapter in adapters]
    found = {}
    for key, value in next(copies[adapter] for adapter in adapters if adapter in copies).state_dict().items():
        if any(key not in state or state[key].shape != value.shape for state in (frozen, *states)):
            raise AdapterError(
                f"{name} is in modules_to_save, but the shape of its {key} differs between the adapters."
            )
        if not value.is_floating_point():
            found[key] = states[0][key].clone()
            continue
        found[key] = _around(frozen[key], [state[key] for state in states], weights)
        if key.endswith("running_var") and bool((found[key] < 0).any()):
            raise AdapterError(f"weights {list(weights)} make {name}.{key} negative; use weights that sum to 1.")
    return found


def _write(wrapper: Any, adapter_name: str, state: dict[str, Tensor]) -> None:
    target = _copies(wrapper)[adapter_name]
    if isinstance(target, nn.Parameter):
        target.copy_(state[""])
        return
    for key, tensor in target.state_dict().items():
        tensor.copy_(state[key])


# ---------------------------------------------------------------------- hosts


def _combine_hosts(
    tuner: Any,
    layers: list[SanLayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    options: dict[str, Any],
) -> None:
    """Combines the hosts with PEFT, and adds what PEFT leaves out: DoRA magnitudes, biases, and ranks per layer."""
    config: Any = tuner.peft_config[adapter_name]
    kind = config.inner["peft_type"]
    host = tuner.hosts[kind]
    first = host.peft_config[adapters[0]]
    changes: dict[str, Any] = {"modules_to_save": None}
    if kind == "LORA":
        # PEFT folds each scaling into the matrices; other initialisations would move frozen weights or need data
        changes |= {"use_rslora": False, "init_lora_weights": True, "trainable_token_indices": None}
        options = {"combination_type": combination_type, **options}
    with tuner.without_layers(tuner.model), _hidden(tuner.model):
        host.peft_config[adapters[0]] = dataclasses.replace(first, **changes)
        try:
            host.active_adapter = tuner.active_adapter
            host.add_weighted_adapter(list(adapters), list(weights), adapter_name, **options)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            raise AdapterError(f"PEFT cannot combine the hosts of {', '.join(adapters)}: {error}") from error
        finally:
            host.peft_config[adapters[0]] = first
    if kind == "LORA":
        for layer in layers:
            if layer.host is not None and adapter_name in layer.host.lora_A:
                _complete(layer.host, adapters, weights, adapter_name)
    inner = copy.deepcopy(host.peft_config[adapter_name])
    inner.target_modules = None
    tuner.peft_config[adapter_name] = dataclasses.replace(config, inner=inner)


@torch.no_grad()
def _complete(host: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Pads a combined LoRA layer to its rank, and combines its bias and magnitude."""
    down, up = host.lora_A[adapter_name], host.lora_B[adapter_name]
    rank = host.r[adapter_name]
    missing = rank - down.weight.shape[0]
    if missing > 0:  # a layer with its own rank from rank_pattern, or with a smaller one
        rows, columns = down.weight.data, up.weight.data
        down.weight.data = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        up.weight.data = torch.cat([columns, columns.new_zeros(columns.shape[0], missing, *columns.shape[2:])], 1)
    there = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in host.lora_A]
    if up.bias is not None:
        biases = [host.lora_B[name].bias * host.scaling[name] for name, _ in there]
        up.bias.copy_(weighted(biases, [weight for _, weight in there]))
    if adapter_name in host.lora_magnitude_vector:
        magnitude = host.lora_magnitude_vector[adapter_name].weight  # initialised to the norms of the frozen rows
        others = [host.lora_magnitude_vector[name].weight for name, _ in there]
        magnitude.copy_(_around(magnitude, others, [weight for _, weight in there]))


@contextmanager
def _hidden(model: nn.Module) -> Iterator[None]:
    """Replaces wrappers by their frozen modules temporarily, since PEFT refuses to combine wrapped modules."""
    wrappers = _wrappers(model)
    for name, wrapper in wrappers.items():
        model.set_submodule(name, wrapper.original_module)
    try:
        yield
    finally:
        for name, wrapper in wrappers.items():
            model.set_submodule(name, wrapper)


def _discard(tuner: Any, layers: list[SanLayer], adapter_name: str) -> None:
    """Removes a new adapter after its creation failed."""
    tuner.peft_config.pop(adapter_name, None)
    for host in tuner.hosts.values():
        host.peft_config.pop(adapter_name, None)
    for layer in layers:
        layer.delete_adapter(adapter_name)
    for wrapper in _wrappers(tuner.model).values():
        wrapper.delete_adapter(adapter_name, wrapper.active_adapters[:1])
    tuner.scales.unwire(adapter_name)
