"""Tracing the batch of the first forward pass, where no example inputs could be derived."""

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
    "Ways out: make one forward pass before, give SanConfig(propagation=san_peft.trace(model, example_inputs)), or "
    "switch propagation off with propagation='none'."
)


def trace_first_pass(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], tables: Iterable[str] = ()
) -> PropagationGraph | None:
    """Traces a copy of the batch that a model was called with; the batch and the model stay as they are.

    Args:
        model: The model, with adapters on it that do not act while it is traced.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.
        tables: Names of embeddings that are targets.

    Returns:
        The graph, or `None` where the model does not run on the batch: the call itself will say why.

    Raises:
        SanError: If the model is sharded, or is being recorded by `torch.jit.trace`.
        TraceError: If the model runs on the batch and cannot be traced on it.
    """
    if any(is_sharded(p) or hasattr(p, "ds_id") for p in model.parameters()):
        raise SanError(
            "The edges of an adapter are traced in the first forward pass, since no example inputs could be derived, "
            f"and by now the model is sharded, which cannot be traced. {WAYS_OUT}"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise SanError(
            "The edges of an adapter are traced in the first forward pass, since no example inputs could be derived, "
            f"and this one is recorded by torch.jit.trace. {WAYS_OUT}"
        )
    try:
        return trace_plain(model, _bound(model, args, kwargs), tables)
    except TraceError:
        if not _runs(model, args, kwargs):
            return None
        raise
    except TypeError:  # the arguments are none of the model's
        return None


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Returns a copy of a call's arguments that the model may write into: tensors without gradients, caches too."""
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in tensors_within(args, kwargs)}
    args, kwargs = copy.deepcopy((args, dict(kwargs)), memo)
    return inspect.signature(model.forward).bind(*args, **kwargs)


@torch.no_grad()
def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    again = _bound(model, args, kwargs)
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        try:
            model(*again.args, **again.kwargs)
        except Exception:
            return False
    return True
