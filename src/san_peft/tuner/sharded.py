"""Parameters that lie in shards on several devices (FSDP2): the one place that knows of them."""

from __future__ import annotations

import torch
from torch import Tensor

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial
else:  # pragma: no cover - a build of torch without distributed
    DTensor = Partial = None  # type: ignore[assignment, misc]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is distributed over several devices."""
    return DTensor is not None and isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor that may be sharded; its gradient is averaged over the devices, as FSDP does with its own."""
    if not is_sharded(tensor):
        return tensor
    average = [Partial("avg")] * tensor.device_mesh.ndim  # type: ignore[attr-defined]
    return tensor.full_tensor(grad_placements=average)  # type: ignore[attr-defined]
