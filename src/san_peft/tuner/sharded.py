"""Gathers sharded parameters (FSDP2), and loads parameters offloaded by accelerate.

A posterior layer reads parameters of its anterior layer, which may be in another FSDP2 unit, or not loaded by
accelerate at that time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from san_peft.products import weight_product

distributed: Any = None
if torch.distributed.is_available():
    from torch.distributed import tensor as distributed


def is_sharded(tensor: Any) -> bool:
    """Returns whether a tensor is sharded across devices."""
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor if it is sharded. Its gradient is averaged over the devices, as in FSDP."""
    if not is_sharded(tensor):
        return tensor
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    gathered = tensor.full_tensor(grad_placements=[distributed.Partial()] * mesh.ndim)  # type: ignore[attr-defined]
    if gathered.requires_grad:
        # sum, then divide, since not every backend of torch.distributed supports averaging
        gathered.register_hook(lambda grad: grad / mesh.size())
    return gathered


def whole_product(weight: Tensor, rows: Tensor) -> Tensor:
    """Computes `weight_product` of a weight that may be sharded, without gathering the weight."""
    if not is_sharded(weight):
        return weight_product(weight, rows)
    wide = torch.promote_types(torch.promote_types(weight.dtype, rows.dtype), torch.float32)
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    everywhere = distributed.DTensor.from_local(
        rows.to(wide), mesh, [distributed.Replicate()] * mesh.ndim, run_check=False
    )
    return whole(torch.mm(weight.detach().to(wide), everywhere.t()))


@contextmanager
def onloaded(layer: nn.Module, weight: Tensor) -> Iterator[None]:
    """Loads the parameters of a layer that accelerate has offloaded, for the duration of the context.

    Args:
        layer: The layer with all its submodules.
        weight: Its frozen weight. Does nothing unless this is on the meta device.
    """
    hooks: list[tuple[nn.Module, Any]] = []
    if weight.is_meta:
        for module in layer.modules():
            hook = getattr(module, "_hf_hook", None)
            if hook is not None and any(tensor.is_meta for tensor in module.parameters(recurse=False)):
                hooks.append((module, hook))
    try:
        for module, hook in hooks:
            hook.pre_forward(module)
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)
