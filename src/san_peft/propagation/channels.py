"""Maps the output channels of one layer to the input channels of another, in a compact form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from san_peft.errors import GraphError

CHANNEL_MAP_KINDS = ("identity", "slice", "repeat", "tile", "explicit")
_FIELDS = {
    "identity": (),
    "slice": ("start",),
    "repeat": ("block", "times"),
    "tile": ("times",),
    "explicit": ("runs",),
}


@dataclass(frozen=True, slots=True)
class ChannelMap:
    """A compact index vector from a posterior's input channels to an anterior's output channels.

    | kind | `index` |
    |---|---|
    | identity | `0, 1, ..., size-1` |
    | slice | `start, ..., start+size-1` |
    | repeat | each block of `block` source channels, `times` times in a row (grouped heads, flattened pixels) |
    | tile | all source channels, repeated `times` times (patch merging) |
    | explicit | `runs` of `(first source channel, length)`; a run that starts at -1 has no source |

    `from_index` always picks the shortest form, so maps that it creates from equal index vectors are equal.

    Args:
        kind: One of the five kinds above.
        size: Number of input channels of the posterior.
        source_size: Number of output channels of the anterior.
        start: First source channel of a slice.
        block: Number of source channels per repeated block.
        times: Number of repetitions of each block, or of all channels.
        runs: Runs of an explicit map.

    Raises:
        GraphError: If the numbers are inconsistent.

    Example:
        >>> ChannelMap.from_index([0, 1, 0, 1, 2, 3, 2, 3], source_size=4)
        ChannelMap(kind='repeat', size=8, source_size=4, start=0, block=2, times=2, runs=())
        >>> ChannelMap.from_index([4, 5, -1], source_size=6).index.tolist()
        [4, 5, -1]
    """

    kind: str
    size: int
    source_size: int
    start: int = 0
    block: int = 0
    times: int = 1
    runs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in CHANNEL_MAP_KINDS:
            raise GraphError(f"unknown kind of channel map {self.kind!r}; known are {', '.join(CHANNEL_MAP_KINDS)}.")
        if isinstance(self.runs, list):
            object.__setattr__(self, "runs", tuple(tuple(run) for run in self.runs))
        for name in ("size", "source_size", "start", "block", "times"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise GraphError(f"channel map: {name} must be a non-negative integer, got {value!r}.")
        if self.size < 1 or self.source_size < 1:
            raise GraphError(f"channel map: sizes must be positive, got {self.size} and {self.source_size}.")
        self._check_numbers()

    def _check_numbers(self) -> None:
        what = f"channel map {self.kind} of {self.source_size} source channels onto {self.size}"
        if self.kind == "identity" and self.size != self.source_size:
            raise GraphError(f"{what}: an identity needs equal sizes; use a slice or an explicit map.")
        if self.kind == "slice" and self.start + self.size > self.source_size:
            raise GraphError(f"{what}: channels {self.start}:{self.start + self.size} are out of range.")
        if self.kind == "tile" and self.times * self.source_size != self.size:
            raise GraphError(f"{what}: {self.times} times {self.source_size} is not {self.size}.")
        if self.kind == "repeat":
            if self.block < 1 or self.source_size % self.block or self.times * self.source_size != self.size:
                raise GraphError(f"{what}: blocks of {self.block}, {self.times} times, do not give {self.size}.")
        if self.kind == "explicit":
            for run in self.runs:
                if len(run) != 2 or not all(isinstance(n, int) for n in run) or run[0] < -1 or run[1] < 1:
                    raise GraphError(f"{what}: a run must be (first source channel or -1, length), got {run!r}.")
                if run[0] >= 0 and run[0] + run[1] > self.source_size:
                    raise GraphError(f"{what}: channels {run[0]}:{run[0] + run[1]} are out of range.")
            if sum(length for _, length in self.runs) != self.size:
                total = sum(length for _, length in self.runs)
                raise GraphError(f"{what}: the runs cover {total} channels instead of {self.size}.")

    @classmethod
    def identity(cls, size: int) -> ChannelMap:
        """Creates the map of each channel to itself."""
        return cls("identity", size, size)

    @classmethod
    def from_index(cls, index: Iterable[int] | Int[Tensor, " size"], source_size: int) -> ChannelMap:
        """Creates the shortest map with the given index vector.

        Args:
            index: Source channel of each input channel of the posterior, or -1 for none.
            source_size: Number of output channels of the anterior.

        Returns:
            The map.

        Raises:
            GraphError: If the vector is empty or an entry is outside `-1 .. source_size-1`.
        """
        vector = torch.as_tensor(index if isinstance(index, Tensor) else list(index), dtype=torch.int64).flatten().cpu()
        size = vector.numel()
        if size == 0:
            raise GraphError("channel map: the index vector is empty.")
        low, high = int(vector.min()), int(vector.max())
        if low < -1 or high >= source_size:
            raise GraphError(f"channel map: entries {low}..{high} are outside -1..{source_size - 1}.")
        if low >= 0:
            first = int(vector[0])
            if torch.equal(vector, torch.arange(first, first + size)):
                return cls.identity(size) if size == source_size else cls("slice", size, source_size, start=first)
            if size % source_size == 0:
                times, every = size // source_size, torch.arange(source_size)
                if torch.equal(vector, every.repeat(times)):
                    return cls("tile", size, source_size, times=times)
                block = _block_length(vector)
                if source_size % block == 0 and torch.equal(
                    vector, every.reshape(-1, 1, block).expand(-1, times, block).reshape(-1)
                ):
                    return cls("repeat", size, source_size, block=block, times=times)
        return cls("explicit", size, source_size, runs=_runs(vector))

    @property
    def index(self) -> Int[Tensor, " size"]:
        """Source channel of each input channel of the posterior; -1 for none."""
        if self.kind in ("identity", "slice"):
            return torch.arange(self.start, self.start + self.size)
        every = torch.arange(self.source_size)
        if self.kind == "tile":
            return every.repeat(self.times)
        if self.kind == "repeat":
            return every.reshape(-1, 1, self.block).expand(-1, self.times, self.block).reshape(-1)
        pieces = [
            torch.arange(start, start + length) if start >= 0 else torch.full((length,), -1)
            for start, length in self.runs
        ]
        return torch.cat(pieces)

    def to_json(self) -> dict[str, Any]:
        """Returns the map as a JSON-compatible dict with the fields of its kind."""
        data: dict[str, Any] = {"kind": self.kind, "size": self.size, "source_size": self.source_size}
        for name in _FIELDS[self.kind]:
            value = getattr(self, name)
            data[name] = [list(run) for run in value] if name == "runs" else value
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChannelMap:
        """Creates a map from the output of `to_json`.

        Raises:
            GraphError: If a field is missing, unknown or invalid.
        """
        if not isinstance(data, Mapping):
            raise GraphError(f"a channel map must be a JSON object with kind, size and source_size, got {data!r}.")
        kind = data.get("kind")
        if kind not in _FIELDS:
            raise GraphError(f"unknown kind of channel map {kind!r}; known are {', '.join(CHANNEL_MAP_KINDS)}.")
        needed = ("kind", "size", "source_size", *_FIELDS[kind])
        missing, unknown = [n for n in needed if n not in data], sorted(set(data) - set(needed))
        if missing or unknown:
            raise GraphError(f"channel map {kind}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}.")
        fields = dict(data)
        if kind == "explicit":
            runs = fields["runs"]
            if not isinstance(runs, list | tuple) or not all(isinstance(run, list | tuple) for run in runs):
                raise GraphError(f"channel map explicit: runs must be a list of pairs, got {runs!r}.")
            fields["runs"] = tuple(tuple(run) for run in runs)
        return cls(**fields)

    def __str__(self) -> str:
        if self.kind == "identity":
            return "identity"
        if self.kind == "slice":
            return f"slice {self.start}:{self.start + self.size} of {self.source_size}"
        if self.kind == "tile":
            return f"tile x{self.times}"
        if self.kind == "repeat":
            return f"repeat x{self.times} in blocks of {self.block}"
        shown = [f"{a}:{a + n}" if a >= 0 else f"none x{n}" for a, n in self.runs[:4]]
        more = f", ... ({len(self.runs)} runs)" if len(self.runs) > 4 else ""
        return f"explicit {', '.join(shown)}{more} of {self.source_size}"


def _block_length(vector: Int[Tensor, " size"]) -> int:
    breaks = torch.nonzero(vector[1:] != vector[:-1] + 1).flatten()
    return int(breaks[0]) + 1 if breaks.numel() else vector.numel()


def _runs(vector: Int[Tensor, " size"]) -> tuple[tuple[int, int], ...]:
    follows = torch.where(vector[:-1] < 0, vector[1:] < 0, vector[1:] == vector[:-1] + 1)
    starts = [0, *(torch.nonzero(~follows).flatten() + 1).tolist()]
    ends = [*starts[1:], vector.numel()]
    return tuple((int(vector[a]), b - a) for a, b in zip(starts, ends, strict=True))
