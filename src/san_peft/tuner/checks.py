"""Checks before an adapter is added: its name, `modules_to_save`, and whether the model is compiled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from san_peft.errors import AdapterError, SanError
from san_peft.tuner.layer import SanLayer
from san_peft.tuner.resolve import layers_by_name

TAKEN = frozenset({"__base__", "base_layer", "original_module", "modules_to_save"})
"""Adapter names that PEFT reserves."""
CONTAINERS = (nn.ModuleDict(), nn.ParameterDict())
"""Containers of adapters. torch rejects keys that are attributes of these classes."""
BANKS = SanLayer.adapter_layer_names
"""Attributes of `SanLayer` that hold the adapters' parameters."""


def check_adapter(model: nn.Module, adapter_name: str, known: Iterable[str]) -> None:
    """Checks that an adapter with this name can be added to a model.

    Args:
        model: The base model, without the `PeftModel` around it.
        adapter_name: The name of the new adapter.
        known: The names of all adapters, including the new one.

    Raises:
        SanError: If the model or one of its submodules is compiled.
        AdapterError: If the name is empty, contains a dot or is reserved, or if one of several adapters is named like a
            submodule, so that PEFT could not tell their tensors apart.
    """
    compiled = [name or "the model" for name, module in model.named_modules() if "_orig_mod" in module._modules]
    if compiled:
        raise SanError(
            f"{compiled[0]} is already compiled, and compiled modules cannot be traced. Call get_peft_model on the "
            "original model, then torch.compile on the result."
        )
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise AdapterError(
            f"adapter_name must be a non-empty string without dots, got {adapter_name!r}: it becomes part of the names "
            "of tensors."
        )
    names = _tensor_names(model)
    taken = TAKEN | {parts[-1] for parts in names if parts}
    if adapter_name in taken or any(hasattr(container, adapter_name) for container in CONTAINERS):
        raise AdapterError(f"An adapter cannot be named {adapter_name!r}: PEFT or torch reserves this name. Rename it.")
    parts = {"base_model", "model"}.union(*names)
    if len({*known, adapter_name}) > 1 and (clash := sorted(parts & {*known, adapter_name})):
        raise AdapterError(
            f"One of several adapters cannot be named {clash[0]!r}, which occurs in the names of the model's tensors: "
            "PEFT would drop these tensors when it saves another adapter. Rename it."
        )


def saved_modules(model: nn.Module, adapter_name: str, saved: Sequence[str] | None) -> Sequence[str] | None:
    """Returns `modules_to_save` without names that would also match modules of the adapter itself.

    PEFT matches these names at the end of all module names, so `gate` (the router of a mixture of experts) would also
    match `san_gate`. Such a name is replaced by the full names of the modules it stands for.

    Raises:
        AdapterError: If the adapter is named like one of these modules, or another adapter has layers inside one.
    """
    if not saved:
        return saved
    layers = layers_by_name(model)
    for fqn in (fqn for fqn, module in layers.items() if isinstance(module, BaseTunerLayer)):
        if whole := [name for name in saved if any(head.endswith(name) for head in _prefixes(fqn))]:
            raise AdapterError(
                f"modules_to_save cannot include {whole[0]!r}: {fqn} is already a layer of another adapter."
            )
    inside = (*(f".{bank}" for bank in BANKS), f".{adapter_name}")
    found: dict[str, None] = {}
    for name in saved:
        clear = not any(part.endswith(name) for part in inside)
        found.update(dict.fromkeys([name] if clear else [n for n in layers if n.endswith(name)]))
    if clash := [name for name in found if any(part.endswith(name) for part in inside)]:
        raise AdapterError(f"An adapter cannot be named {adapter_name!r} with modules_to_save={clash!r}. Rename it.")
    return list(found)


def _prefixes(fqn: str) -> list[str]:
    parts = fqn.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _tensor_names(model: nn.Module) -> list[list[str]]:
    """Returns the names of a model's tensors, split at the dots, without adapter names."""
    banks = {"modules_to_save", "trainable_tokens_delta", "trainable_tokens_original"}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            banks.update(module.adapter_layer_names, module.other_param_names)
    found = []
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        parts = name.split(".")
        found.append([part for before, part in zip(["", *parts], parts, strict=False) if before not in banks])
    return found
