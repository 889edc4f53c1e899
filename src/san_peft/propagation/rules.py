"""What an operation does to a channel's scale: names of operations on a path, and the kind that follows from them."""

from __future__ import annotations

from collections.abc import Iterable

KINDS = ("exact", "activation", "norm", "residual")

RESIDUAL = "residual"
OFFSET = "offset"
ATTENTION = "attention"
MIX = "mix"
POOL = "pool"
GATED = "gated"
SELF_GATE = "self_gate"

_RESIDUAL = frozenset({RESIDUAL, OFFSET})
_EXACT = frozenset({ATTENTION, MIX, POOL, GATED})
_NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "norm"})


def kind_of(via: Iterable[str]) -> str:
    """Returns the kind of an edge from the operations it passed, the strongest of them.

    `residual` (a sum with another stream, or with a constant) is stronger than `norm`, that than `activation`.
    A name that is neither a norm, a sum nor a linear operation counts as an activation, ReLU included: ReLU commutes
    with a positive scale only, and a trained scale may turn negative.

    Args:
        via: Names of the operations on the path.

    Returns:
        One of exact, activation, norm, residual.
    """
    kind = 0
    for name in via:
        if name in _RESIDUAL:
            return KINDS[3]
        kind = max(kind, 2 if name in _NORMS else 0 if name in _EXACT else 1)
    return KINDS[kind]


def join(path: tuple[str, ...], *names: str) -> tuple[str, ...]:
    """Returns a path with further operations at its end, every operation named once."""
    return tuple(dict.fromkeys((*path, *names)))
