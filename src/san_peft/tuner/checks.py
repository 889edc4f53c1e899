"""What is looked at before an adapter is added: its name, and whether the model is compiled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from san_peft.errors import AdapterError, SanError
from san_peft.tuner.layer import SanLayer
from san_peft.tuner.resolve import layers_by_name

TAKEN = frozenset({"__base__", "base_layer", "original_module", "modules_to_save"})
"""Names that PEFT gives a meaning of its own."""
CONTAINERS = (nn.ModuleDict(), nn.ParameterDict())
"""What adapters are kept in, by their names: torch takes no name that is an attribute of these."""
BANKS = SanLayer.adapter_layer_names


def check_adapter(model: nn.Module, adapter_name: str, known: Iterable[str]) -> None:
    """Raises where an adapter of this name cannot be added to a model.

    Args:
        model: The model without `PeftModel`.
        adapter_name: Name of the adapter.
        known: Names of all adapters, with this one.

    Raises:
        SanError: If the model, or a part of it, is compiled.
        AdapterError: If the name is empty, contains a dot, is an attribute of torch's containers, or if one of several
            adapters has the name of a part of the model, so that PEFT could not tell its tensors from others.
    """
    compiled = [name or "the model" for name, module in model.named_modules() if "_orig_mod" in module._modules]
    if compiled:
        raise SanError(
            f"{compiled[0]} is compiled already, and what torch.compile has wrapped cannot be traced. Call "
            "get_peft_model on the plain model, and torch.compile on its result."
        )
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise AdapterError(
            f"An adapter's name is a string that is not empty and has no dot, got {adapter_name!r}: it becomes part of "
            "the names of tensors."
        )
    names = _tensor_names(model)
    taken = TAKEN | {parts[-1] for parts in names if parts}
    if adapter_name in taken or any(hasattr(container, adapter_name) for container in CONTAINERS):
        raise AdapterError(f"An adapter cannot be named {adapter_name!r}, which PEFT or torch uses itself.")
    parts = {"base_model", "model"}.union(*names)
    if len({*known, adapter_name}) > 1 and (clash := sorted(parts & {*known, adapter_name})):
        raise AdapterError(
            f"One of several adapters cannot be named {clash[0]!r}, which is a part of names of the model's tensors: "
            "PEFT would leave out all of these when it saves another adapter. Rename it."
        )


def saved_modules(model: nn.Module, adapter_name: str, saved: Sequence[str] | None) -> Sequence[str] | None:
    """Returns `modules_to_save` such that none of it names a part of the adapter itself.

    PEFT compares these with the ends of all names, so `gate`, as the router of a mixture of experts is called, would
    mean `san_gate` as well. Such a name is replaced by the full names of the modules that it means.

    Raises:
        AdapterError: If the adapter has the name of one of these modules, or another adapter has layers inside it.
    """
    if not saved:
        return saved
    layers = layers_by_name(model)
    for fqn in (fqn for fqn, module in layers.items() if isinstance(module, BaseTunerLayer)):
        if whole := [name for name in saved if any(head.endswith(name) for head in _prefixes(fqn))]:
            raise AdapterError(
                f"modules_to_save cannot be applied to {whole[0]!r}: {fqn} is a layer of another adapter already."
            )
    inside = (*(f".{bank}" for bank in BANKS), f".{adapter_name}")
    found: dict[str, None] = {}
    for name in saved:
        clear = not any(part.endswith(name) for part in inside)
        found.update(dict.fromkeys([name] if clear else [n for n in layers if n.endswith(name)]))
    if clash := [name for name in found if any(part.endswith(name) for part in inside)]:
        raise AdapterError(f"An adapter cannot be named {adapter_name!r} beside modules_to_save={clash!r}. Rename it.")
    return list(found)


def _prefixes(fqn: str) -> list[str]:
    parts = fqn.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _tensor_names(model: nn.Module) -> list[list[str]]:
    """The names of a model's tensors, cut at the dots, without the names of adapters."""
    banks = {"modules_to_save", "trainable_tokens_delta", "trainable_tokens_original"}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            banks.update(module.adapter_layer_names, module.other_param_names)
    found = []
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        parts = name.split(".")
        found.append([part for before, part in zip(["", *parts], parts, strict=False) if before not in banks])
    return found
