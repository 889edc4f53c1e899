"""Freezes the running statistics of the base model while an adapter is trained."""

from __future__ import annotations

from typing import Any

from torch import nn

STATISTICS = ("running_mean", "running_var", "_u", "weight_u")
"""Buffers that a forward pass in training mode updates, in batch, instance and spectral norms."""


def freeze_statistics(model: nn.Module) -> None:
    """Keeps frozen layers in eval mode, so that they use and do not update their running statistics.

    An adapter is saved without them, so a newly loaded base model has the statistics from before training. Saved
    modules (`train_norms`, `modules_to_save`) have their own statistics, which are saved with the adapter.

    Args:
        model: The model with the adapter injected.
    """
    for name, module in model.named_modules():
        if not any(key in STATISTICS for key, buffer in module.named_buffers(recurse=False) if buffer is not None):
            continue
        if ".modules_to_save." in f".{name}.":
            if _release(module):  # copied with the hook of the frozen module
                module.training = model.training
        elif _as_in_evaluation not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_as_in_evaluation, prepend=True)
            module.training = False


def release_statistics(model: nn.Module) -> None:
    """Removes the hooks of `freeze_statistics`, and sets these layers to the mode of the model."""
    for module in model.modules():
        if _release(module):
            module.training = model.training


def _release(module: nn.Module) -> bool:
    found = [number for number, hook in module._forward_pre_hooks.items() if hook is _as_in_evaluation]
    for number in found:
        del module._forward_pre_hooks[number]
    return bool(found)


def _as_in_evaluation(module: nn.Module, args: Any) -> None:
    # a pre-hook, since `model.train()` would undo a single call of `module.eval()`
    module.training = False
