"""Traces the batch of the first forward pass, for models whose example inputs cannot be derived."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from san_peft.errors import SanError, TraceError
from san_peft.propagation.graph import PropagationGraph
from san_peft.propagation.trace import tensors_within
from san_peft.tuner.resolve import trace_plain
from san_peft.tuner.sharded import is_sharded

WAYS_OUT = (
    "Run one forward pass before, pass SanConfig(propagation=san_peft.trace(model, example_inputs)), or disable "
    "propagation with propagation='none'."
)
"""How to avoid tracing in the first forward pass, for error messages."""


def trace_first_pass(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], tables: Iterable[str] = ()
) -> PropagationGraph | None:
    """Traces a model on a copy of the batch that it was called with.

    Args:
        model: The model; its adapters are disabled while it is traced.
        args: The arguments of the call.
        kwargs: The keyword arguments of the call.
        tables: The names of embeddings that are targets.

    Returns:
        The graph, or `None` if the model fails on the batch, in which case the call itself raises the error.

    Raises:
        SanError: If the model is sharded, or inside `torch.jit.trace`.
        TraceError: If the model runs on the batch but cannot be traced.
    """
    if any(is_sharded(p) or hasattr(p, "ds_id") for p in model.parameters()):
        raise SanError(
            "The edges of an adapter are traced in the first forward pass, since example inputs could not be derived, "
            f"but a sharded model cannot be traced. {WAYS_OUT}"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise SanError(
            "The edges of an adapter are traced in the first forward pass, since example inputs could not be derived, "
            f"but this one runs inside torch.jit.trace. {WAYS_OUT}"
        )
    try:
        return trace_plain(model, copied_call(model, args, kwargs), tables)
    except TraceError:
        if not _runs(model, args, kwargs):
            return None
        raise
    except TypeError:  # the arguments do not fit the signature
        return None


def copied_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Returns a copy of a call's arguments, with detached tensors and caches, that the model may modify."""
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in tensors_within(args, kwargs)}
    args, kwargs = copy.deepcopy((args, dict(kwargs)), memo)
    return inspect.signature(model.forward).bind(*args, **kwargs)


@torch.no_grad()
def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    again = copied_call(model, args, kwargs)
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        try:
            model(*again.args, **again.kwargs)
        except Exception:
            return False
    return True
