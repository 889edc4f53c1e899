"""Attaches SAN to a model that already has an adapter, and detaches it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner

from san_peft.errors import AdapterError, SanError
from san_peft.tuner._peft import SAN
from san_peft.tuner.config import SanConfig
from san_peft.tuner.decompose import has_adapter, moves_weight
from san_peft.tuner.layer import SanLayer
from san_peft.tuner.model import SanModel
from san_peft.tuner.resolve import layers_by_name
from san_peft.tuner.statistics import release_statistics


def propagate(model: PeftModel, **options: Any) -> PeftModel:
    """Attaches SAN to a PEFT model in place, so that the scales of its adapters are propagated.

    No parameter is added or trained. A newly initialised adapter has scales of one, so attaching SAN leaves the output
    unchanged; a trained adapter has other scales, so it changes the output. `save_pretrained` writes the host's tensors
    and a `SanConfig` to one folder, which `PeftModel.from_pretrained` loads.

    Args:
        model: A `PeftModel` whose adapters can host SAN, such as LoRA.
        options: Fields of `SanConfig`: `propagation`, `decomposition`, `exponent`, `detach`, `gate`, `own_scale`,
            `train_norms`. The targets are those of the existing adapters.

    Returns:
        The same model.

    Raises:
        SanError: If an adapter cannot host SAN, is merged, or was initialised by moving part of the frozen weight into
            it. The model is left unchanged.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from san_peft import trace
        >>> dense = [torch.nn.Linear(4, 4) for _ in range(3)]
        >>> net = torch.nn.Sequential(dense[0], torch.nn.ReLU(), dense[1], torch.nn.ReLU(), dense[2])
        >>> graph = trace(net, torch.zeros(1, 4))
        >>> model = propagate(get_peft_model(net, LoraConfig(r=2, target_modules=["0"])), propagation=graph)
        >>> [edge.posterior for edge in model.base_model.propagation_graph.edges]
        ['2']
    """
    tuner: Any = model.base_model
    if isinstance(tuner, SanModel):
        raise SanError("SAN is already attached. To attach it with other options, call detach_san(model) first.")
    if not isinstance(tuner, BaseTuner):
        raise AdapterError(f"A {type(tuner).__name__} has no adapter layers that could host SAN.")
    net = tuner.model
    layers = {n: m for n, m in layers_by_name(net).items() if isinstance(m, tuner.tuner_layer_cls)}
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise AdapterError(f"{len(merged)} layers are merged, such as {merged[0]}; unmerge the adapter first.")
    configs = {name: _config_over(name, inner, layers, options) for name, inner in tuner.peft_config.items()}
    flags = {p: p.requires_grad for p in net.parameters()}
    first, *others = configs
    try:
        net.__dict__.pop("peft_config", None)
        san = SanModel(net, {first: configs[first]}, first)
        for name in others:
            san.peft_config[name] = configs[name]
            san.inject_adapter(net, name)
        san.hosts[str(configs[first].inner["peft_type"])] = tuner
        san.set_adapter(tuner.active_adapters)
    except BaseException:
        _take_off(net)
        net.peft_config = tuner.peft_config
        raise
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    model.base_model = san
    model.peft_type = SAN
    return model


def _config_over(name: str, inner: Any, layers: dict[str, Any], options: dict[str, Any]) -> SanConfig:
    if moves_weight(inner):
        raise AdapterError(
            f"Adapter {name!r} was initialised with {inner.init_lora_weights!r}, which moved part of the frozen weight "
            "into it, so the original row norms are lost. Pass SanConfig(inner=...) to get_peft_model instead, or "
            "convert the adapter first (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    plain = copy.deepcopy(inner)
    targets = {fqn for fqn, layer in layers.items() if has_adapter(layer, name)}
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(plain, field):
            setattr(plain, field, None)
    return SanConfig(
        inner=plain,
        target_modules=sorted(targets),
        inference_mode=inner.inference_mode,
        base_model_name_or_path=inner.base_model_name_or_path,
        **options,
    )


def detach_san(model: PeftModel) -> PeftModel:
    """Detaches SAN from a model in place, keeping the hosts as ordinary PEFT adapters.

    The result is saved as a PEFT adapter that loads without `san_peft`. Propagation and trainable scales (`own_scale`)
    are lost.

    Args:
        model: A `PeftModel` whose SAN adapters all have a host of the same type.

    Returns:
        The same model.

    Raises:
        AdapterError: If SAN is not attached, an adapter has no host or is merged, or the hosts differ in type.
    """
    san: Any = model.base_model
    if not isinstance(san, SanModel):
        raise AdapterError("SAN is not attached to this model.")
    configs: dict[str, Any] = san.peft_config
    bare = [name for name, config in configs.items() if config.inner is None]
    if bare:
        raise AdapterError(f"Adapters without a host would be lost: {', '.join(bare)}. Delete them first.")
    kinds = {config.inner["peft_type"] for config in configs.values()}
    if len(kinds) > 1:
        raise AdapterError(
            f"The hosts have types {', '.join(sorted(kinds))}, but a PEFT model supports one. Delete the others."
        )
    if any(layer.merged for layer in san.modules() if isinstance(layer, SanLayer)):
        raise AdapterError("The model is merged; unmerge it first.")
    own = [name for name, config in configs.items() if config.own_scale]
    if own:
        warnings.warn(f"The trainable scales (own_scale) of adapters {', '.join(own)} are dropped.", stacklevel=2)
    host = san.hosts[kinds.pop()]
    for name, config in configs.items():
        for field in ("modules_to_save", "task_type", "base_model_name_or_path", "inference_mode"):
            setattr(host.peft_config[name], field, getattr(config, field))
        if config.trainable_token_indices is not None:
            host.peft_config[name].trainable_token_indices = config.trainable_token_indices
    _take_off(san.model)
    host.active_adapter = san.active_adapter
    san.model.peft_config = host.peft_config
    model.base_model = host
    model.peft_type = next(iter(host.peft_config.values())).peft_type
    return model


def _take_off(net: Any) -> None:
    """Replaces SAN layers by their frozen layers or hosts, and removes hooks."""
    layers = [(n, m) for n, m in net.named_modules() if isinstance(m, SanLayer)]
    for scales in {id(s): s for s in (getattr(m, "san_scales", None) for _, m in layers) if s is not None}.values():
        scales.release()
    for name, layer in layers:
        net.set_submodule(name, layer.base_layer)
    release_statistics(net)
