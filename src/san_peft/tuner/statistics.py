"""Running statistics of frozen layers: they stay as they are while an adapter is trained."""

from __future__ import annotations

from typing import Any

from torch import nn

STATISTICS = ("running_mean", "running_var", "_u", "weight_u")
"""Buffers that a forward pass in training mode writes: those of batch and instance norms, and of spectral norms."""


def freeze_statistics(model: nn.Module) -> None:
    """Lets frozen layers use their running statistics in training mode as well, and write none.

    An adapter is saved without them, so a model that is loaded anew has those from before training. Modules that an
    adapter trains as a whole (`train_norms`, `modules_to_save`) keep statistics of their own, which are saved with it.

    Args:
        model: The model with the adapter's layers in it.
    """
    for name, module in model.named_modules():
        if not any(key in STATISTICS for key, buffer in module.named_buffers(recurse=False) if buffer is not None):
            continue
        if ".modules_to_save." in f".{name}.":
            if _release(module):  # copied from one that was frozen
                module.training = model.training
        elif _as_in_evaluation not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_as_in_evaluation, prepend=True)
            module.training = False


def release_statistics(model: nn.Module) -> None:
    """Lets all layers take statistics again as their mode says; they get the mode of the model."""
    for module in model.modules():
        if _release(module):
            module.training = model.training


def _release(module: nn.Module) -> bool:
    found = [number for number, hook in module._forward_pre_hooks.items() if hook is _as_in_evaluation]
    for number in found:
        del module._forward_pre_hooks[number]
    return bool(found)


def _as_in_evaluation(module: nn.Module, args: Any) -> None:
    module.training = False
