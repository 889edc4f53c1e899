"""Parameters that are not where the forward pass wants them: in shards on several devices, or offloaded by accelerate.

A posterior layer reads parameters of its anterior, which may lie in another unit of FSDP2, or outside of the forward
pass for which accelerate loads them. This is the one place that knows of either.
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
    """Whether a tensor is distributed over several devices."""
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def is_distributed() -> bool:
    """Whether this process is one of a group, in which FSDP2 may write parameters past their version counter."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor that may be sharded; its gradient is averaged over the devices, as FSDP does with its own."""
    if not is_sharded(tensor):
        return tensor
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    gathered = tensor.full_tensor(grad_placements=[distributed.Partial()] * mesh.ndim)  # type: ignore[attr-defined]
    if gathered.requires_grad:
        # a sum of parts, since not every backend of torch.distributed can average
        gathered.register_hook(lambda grad: grad / mesh.size())
    return gathered


def whole_product(weight: Tensor, rows: Tensor) -> Tensor:
    """Returns `weight_product` of a weight that may be sharded: every device multiplies its part, the weight stays."""
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
    """Brings what accelerate has offloaded of a layer to where it computes, for as long as it is read.

    Args:
        layer: The layer with all its children.
        weight: Its frozen weight: nothing happens unless that is on the meta device.
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
