"""Questions shared out among processes, each of which holds the whole model."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import distributed

Found = TypeVar("Found")


def mine(count: int) -> range:
    """Returns which of so many questions this process answers: all of them where it is the only one."""
    rank, processes = _place()
    return range(rank, count, processes)


def together(found: dict[int, Found], count: int) -> list[Found]:
    """Returns what all processes found, in the order of the questions; every one of them has to ask.

    Args:
        found: What this process found, by the place of the question.
        count: How many questions there are.
    """
    _, processes = _place()
    if processes > 1:
        parts: list[Any] = [None] * processes
        distributed.all_gather_object(parts, found)
        found = {place: one for part in parts for place, one in part.items()}
    return [found[place] for place in range(count)]


def _place() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
