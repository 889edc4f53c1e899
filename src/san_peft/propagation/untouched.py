"""Runs a model without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

REPACKS = "support_avx512bf16_for_cpu"
"""Flag of the 4-bit layer of bitsandbytes: on CPUs with AVX512-BF16, its eval mode repacks the weight permanently."""


@contextmanager
def untouched(model: nn.Module, threads: int | None = None) -> Iterator[None]:
    """Puts a model into eval mode and restores modes, buffers, random state and thread count at exit.

    Args:
        model: The model.
        threads: Number of threads; `None` keeps it.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    values = {b: b.clone() for held in buffers for b in held.values() if b is not None and not b.is_meta}
    repacking = [module for module in modules if getattr(module, REPACKS, False)]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    fastpath, before = torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads()
    with torch.random.fork_rng(sorted(devices)):
        try:
            torch.set_num_threads(before if threads is None else threads)
            torch.backends.mha.set_fastpath_enabled(False)
            for module in modules:
                module.training = False
            for module in repacking:
                setattr(module, REPACKS, False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_num_threads(before)
            for module in repacking:
                setattr(module, REPACKS, True)
            for module, state, held in zip(modules, training, buffers, strict=True):
                module.training = state
                module._buffers.clear()
                module._buffers.update(held)
            with torch.no_grad():
                for buffer, value in values.items():
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
