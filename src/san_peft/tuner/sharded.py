"""Parameters that lie in shards on several devices (FSDP2): the one place that knows of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from san_peft.decomposition import weight_product

distributed: Any = None
if torch.distributed.is_available():
    from torch.distributed import tensor as distributed


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is distributed over several devices."""
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor that may be sharded; its gradient is averaged over the devices, as FSDP does with its own."""
    if not is_sharded(tensor):
        return tensor
    average = [distributed.Partial("avg")] * tensor.device_mesh.ndim  # type: ignore[attr-defined]
    return tensor.full_tensor(grad_placements=average)  # type: ignore[attr-defined]


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
