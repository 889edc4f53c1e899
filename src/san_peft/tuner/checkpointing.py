"""Detects regions of activation checkpointing, from private state of torch."""

from __future__ import annotations

import weakref
from typing import Any

import torch

_saved_hooks: Any = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)


def knows_regions() -> bool:
    """Returns whether this version of torch allows to detect regions."""
    return _saved_hooks is not None


def region() -> Any:
    """Returns an identifier of the current region, or `None` outside of all regions."""
    top = _saved_hooks(False)
    return None if top is None else tuple(id(hook) for hook in top[:2])


def checkpointed() -> Any:
    """Returns torch's frame of the current or recomputed non-reentrant region, or `None`."""
    top = None if _saved_hooks is None else _saved_hooks(False)
    pack = None if top is None else getattr(top[0], "_torchdynamo_orig_callable", top[0])
    for cell in getattr(pack, "__closure__", None) or ():
        held = cell.cell_contents
        held = held() if isinstance(held, weakref.ref) else held
        if type(held).__name__ == "_CheckpointFrame":
            return held
    return None
