"""Shard evaluation across ranks, each of which holds the full model."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import distributed

Found = TypeVar("Found")


def rank_indices(count: int) -> range:
    """Returns the indices of the samples that this rank evaluates, out of `count`."""
    rank, processes = _place()
    return range(rank, count, processes)


def gather_results(found: dict[int, Found], count: int) -> list[Found]:
    """Gathers the results of all ranks in the order of the samples; a collective call.

    Args:
        found: Results of this rank, by the index of the sample.
        count: Number of samples.
    """
    _, processes = _place()
    if processes > 1:
        parts: list[Any] = [None] * processes
        distributed.all_gather_object(parts, found)
        found = {place: one for part in parts for place, one in part.items()}
    return [found[place] for place in range(count)]


def _place() -> tuple[int, int]:
    """Returns the rank of this process and the world size."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
