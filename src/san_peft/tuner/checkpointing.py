"""What torch tells of activation checkpointing: which region of it runs, or is being recomputed."""

from __future__ import annotations

import weakref
from typing import Any

import torch

_saved_hooks: Any = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)


def knows_regions() -> bool:
    """Whether this torch tells one region from another."""
    return _saved_hooks is not None


def region() -> Any:
    """Returns what identifies the region that is running, or `None` outside of all."""
    top = _saved_hooks(False)
    return None if top is None else tuple(id(hook) for hook in top[:2])


def checkpointed() -> Any:
    """Returns what torch holds of the region (not reentrant) that runs, or that is being recomputed."""
    top = None if _saved_hooks is None else _saved_hooks(False)
    pack = None if top is None else getattr(top[0], "_torchdynamo_orig_callable", top[0])
    for cell in getattr(pack, "__closure__", None) or ():
        held = cell.cell_contents
        held = held() if isinstance(held, weakref.ref) else held
        if type(held).__name__ == "_CheckpointFrame":
            return held
    return None
