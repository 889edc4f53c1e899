"""Batches of one modality and similar length, as `group_by_modality_length` of LLaVA-1.5.

Example:
    >>> batches = ModalityBatches([True, True, False, False], [9, 7, 3, 4], batch_size=2, seed=0)
    >>> sorted(sorted(batch) for batch in batches)
    [[0, 1], [2, 3]]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Sampler

from san_peft.errors import SanError


class ModalityBatches(Sampler[list[int]]):
    """Batch sampler in which all or none of the conversations of a batch have an image.

    Shuffles the conversations of each modality, cuts them into steps, sorts each step by length, deals it to the
    processes in turn, and shuffles the steps of both modalities. All processes thus get one modality and similar
    lengths in a step, and none waits for another.

    Every index occurs once per epoch. The remainder of a modality makes smaller batches. If it has fewer indices than
    there are processes, some indices are repeated; `repeated` counts them.

    There is no `batch_size` attribute, since batches differ in size; accelerate then deals whole batches to the
    processes. Pass it to a `DataLoader` as `batch_sampler`.

    Args:
        with_image: Whether each conversation has an image.
        lengths: Length of each conversation; see `san_bench.vision_language.encoding.measure`.
        batch_size: Batch size per process.
        seed: Seed for shuffling, combined with the epoch from `set_epoch`.
        world_size: Number of processes.

    Raises:
        SanError: If the sequences differ in length or are empty, or a number is below 1.
    """

    def __init__(
        self,
        with_image: Sequence[bool],
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        world_size: int = 1,
    ) -> None:
        if len(with_image) != len(lengths) or not lengths:
            raise SanError(
                f"with_image has {len(with_image)} entries and lengths {len(lengths)}; they must be equal and above 0."
            )
        for name, number in (("batch_size", batch_size), ("world_size", world_size)):
            if number < 1:
                raise SanError(f"{name} is {number}; it must be 1 or more.")
        pictured = np.asarray(with_image, bool)
        self._members = [np.flatnonzero(pictured), np.flatnonzero(~pictured)]
        self._lengths = np.asarray(lengths)
        self._size, self._processes, self._seed = batch_size, world_size, seed
        self._epoch = 0
        self._sizes = [_step_sizes(len(members), batch_size, world_size) for members in self._members]

    @property
    def repeated(self) -> int:
        """Number of repeated indices per epoch."""
        return sum(map(sum, self._sizes)) - len(self._lengths)

    @property
    def sampler(self) -> ModalityBatches:
        """The batch sampler itself; accelerate looks for `set_epoch` here."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch for shuffling; called by accelerate and the `Trainer`."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Returns the number of batches over all processes."""
        return sum(map(len, self._sizes)) * self._processes

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the batches of each step, one per process."""
        random = np.random.default_rng([self._seed, self._epoch])
        steps: list[list[list[int]]] = []
        for members, sizes in zip(self._members, self._sizes, strict=True):
            order = self._sorted_in_steps(random.permutation(members))
            order = np.resize(order, sum(sizes)) if sizes else order  # repeats the first if there are too few
            for step in np.split(order, np.cumsum(sizes)[:-1]) if sizes else ():
                steps.append([step[process :: self._processes].tolist() for process in range(self._processes)])
        for step in random.permutation(len(steps)):
            yield from steps[step]

    def _sorted_in_steps(self, order: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        width = self._size * self._processes
        parts = [order[start : start + width] for start in range(0, len(order), width)]
        return np.concatenate([part[np.argsort(-self._lengths[part], kind="stable")] for part in parts or [order]])


def _step_sizes(count: int, batch_size: int, processes: int) -> list[int]:
    """Returns the number of indices per step: full steps and the remainder, at least one per process."""
    full = batch_size * processes
    steps, rest = divmod(count, full)
    if 0 < rest < processes and steps and batch_size > 1:  # fewer than processes: split over the last two steps
        steps, rest = steps - 1, rest + full
        return [full] * steps + [rest - rest // 2, rest // 2]
    return [full] * steps + ([max(rest, processes)] if rest else [])
