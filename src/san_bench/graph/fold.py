"""Fold repeated blocks, so that the graph of a deep model fits on a page.

Blocks are consecutively numbered modules with the same prefix, such as `model.layers.0`, `model.layers.1`, ... They are
folded if they have the same layers, the same edges inside, and the same edges to the next block. Every edge of the
graph is in exactly one folded edge, and differences are noted, so no information is lost.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from san_peft.propagation.channels import ChannelMap
from san_peft.propagation.graph import Barrier, Edge, Layer, PropagationGraph


@dataclass(frozen=True)
class Repeat:
    """A run of blocks with the same prefix that are identical up to their numbers, `first` to `last`."""

    prefix: str
    first: int
    last: int

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.prefix}{'.' if self.prefix else ''}{self.first} .. {self.last}"


@dataclass(frozen=True)
class Place:
    """A folded name such as `layers.{0-11}.fc1`, with its runs of blocks and its number in each."""

    name: str
    runs: tuple[Repeat, ...] = ()
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class FoldedLayer:
    """Layers that are identical up to their block numbers; `layer` is the first of them."""

    name: str
    layer: Layer
    runs: tuple[Repeat, ...]
    head: bool = False

    @property
    def count(self) -> int:
        """Number of layers."""
        return math.prod(run.count for run in self.runs)

    @property
    def block(self) -> str:
        """Folded name of its block; empty for a layer outside any block."""
        parts = self.name.split(".")
        folded = [position for position, part in enumerate(parts) if part.startswith("{")]
        numbered = folded or [position for position, part in enumerate(parts) if part.isdecimal()]
        return ".".join(parts[: numbered[0] + 1]) if numbered and numbered[0] < len(parts) - bool(not folded) else ""

    @property
    def size(self) -> str:
        """Its class and, if known, its input and output channels, as text."""
        sizes = f" {self.layer.in_channels} -> {self.layer.out_channels}" if self.layer.out_channels else ""
        return f"{self.layer.type}{sizes}"


@dataclass(frozen=True)
class FoldedBlock:
    """Layers that are drawn together: a run of blocks, one block, or a single layer."""

    name: str
    layers: tuple[FoldedLayer, ...]

    @property
    def run(self) -> Repeat | None:
        """The run of blocks that it represents; `None` for a single block or layer."""
        runs = self.layers[0].runs
        return runs[0] if runs and self.name else None

    @property
    def title(self) -> str:
        """Displayed name, such as `vit.layers.0 .. 11 (x12)`."""
        return f"{self.run} (x{self.run.count})" if self.run else self.name or self.layers[0].name

    def label(self, layer: FoldedLayer) -> str:
        """Returns the name of a layer relative to the block."""
        return layer.name.removeprefix(self.name).removeprefix(".") or layer.name


@dataclass(frozen=True)
class FoldedEdge:
    """Edges with the same folded ends, channel map, kind and distance in blocks.

    Attributes:
        anterior: Place of the first edge's anterior.
        posterior: Place of the first edge's posterior.
        step: Number of blocks from anterior to posterior, for every run that both share.
        edges: The edges of the graph that it represents.
        places: Places of both ends of every edge.
    """

    anterior: Place
    posterior: Place
    step: tuple[int, ...]
    edges: tuple[Edge, ...]
    places: tuple[tuple[Place, Place], ...]

    @property
    def count(self) -> int:
        """Number of edges."""
        return len(self.edges)

    @property
    def channels(self) -> ChannelMap:
        """The common channel map."""
        return self.edges[0].channels

    @property
    def kind(self) -> str:
        """The common kind."""
        return self.edges[0].kind

    @property
    def leaves_block(self) -> bool:
        """Whether it leads from one block of a run to another."""
        return any(self.step)

    @cached_property
    def target(self) -> str:
        """Folded name of the posteriors, or the plain name if all edges lead to one layer."""
        names = {edge.posterior for edge in self.edges}
        return names.pop() if len(names) == 1 else self.posterior.name

    @cached_property
    def paths(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """Operations on the path, the most frequent first; the others with a note on their blocks."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for edge, (anterior, posterior) in zip(self.edges, self.places, strict=True):
            groups.setdefault(edge.via, []).append((anterior.numbers or posterior.numbers or (0,))[0])
        ranked = sorted(groups, key=lambda via: -len(groups[via]))
        return tuple((via, "" if via is ranked[0] else _blocks(groups[via])) for via in ranked)

    @cached_property
    def note(self) -> str:
        """Description of its blocks; empty if it is inside every block."""
        shared, words, combinations = len(self.step), [], 1
        if self.leaves_block:
            far = next(step for step in self.step if step)
            words.append("to the next block" if far == 1 else f"{abs(far)} blocks {'on' if far > 0 else 'back'}")
        for level, (run, step) in enumerate(zip(self.anterior.runs, self.step, strict=False)):
            seen = {anterior.numbers[level] for anterior, _ in self.places}
            possible = set(range(max(run.first, run.first - step), min(run.last, run.last - step) + 1))
            combinations *= len(seen)
            if seen != possible:
                words.append(f"{'from' if self.leaves_block else 'in'} {_blocks(seen)}")
        for word, end in (("from", 0), ("to", 1)):
            for level, run in enumerate(self.places[0][end].runs[shared:], shared):
                seen = {place[end].numbers[level] for place in self.places}
                combinations *= len(seen)
                words.append(f"{word} every block" if len(seen) == run.count else f"{word} {_blocks(seen)}")
        if combinations != self.count:
            words.append(f"{self.count} of {combinations} pairs")
        return ", ".join(words)

    def __str__(self) -> str:
        more = f"x{self.count}" if self.count > 1 else ""
        notes = "; ".join(text for text in (more, self.note) if text)
        return f"{self.anterior.name} -> {self.posterior.name} [{self.channels}]{f' ({notes})' if notes else ''}"


@dataclass(frozen=True)
class FoldedBarrier:
    """Barriers with the same operation and reason, at layers that are identical up to their block numbers."""

    name: str
    barriers: tuple[Barrier, ...]
    note: str

    @property
    def count(self) -> int:
        """Number of barriers."""
        return len(self.barriers)

    @property
    def operation(self) -> str:
        """The common operation."""
        return self.barriers[0].operation

    @property
    def reason(self) -> str:
        """The common reason."""
        return self.barriers[0].reason


@dataclass(frozen=True)
class Folded:
    """A folded graph: blocks in execution order, edges and barriers."""

    blocks: tuple[FoldedBlock, ...]
    edges: tuple[FoldedEdge, ...]
    barriers: tuple[FoldedBarrier, ...]

    @property
    def layers(self) -> tuple[FoldedLayer, ...]:
        """All folded layers, ordered by block."""
        return tuple(layer for block in self.blocks for layer in block.layers)


def fold_blocks(graph: PropagationGraph) -> Folded:
    """Folds the repeated blocks of a graph.

    Blocks that differ only in the operations on the path of an edge are folded too, if the kind of the edge is the
    same; `FoldedEdge.paths` lists the deviating blocks. An example is the first block of a language model, which adds
    to the embeddings instead of the residual stream.

    Args:
        graph: The graph.

    Returns:
        The folded graph. The counts of its edges sum to `len(graph.edges)`, and likewise for barriers and layers.

    Example:
        >>> from san_peft import Edge
        >>> identity = ChannelMap.identity(4)
        >>> pairs = [(f"blocks.{i}.fc", f"blocks.{i + 1}.fc") for i in range(5)]
        >>> folded = fold_blocks(PropagationGraph([Edge(a, b, identity) for a, b in pairs]))
        >>> folded.blocks[0].title
        'blocks.0 .. 5 (x6)'
        >>> print(*folded.edges)
        blocks.{0-5}.fc -> blocks.{0-5}.fc [identity] (x5; to the next block)
    """
    records = _records(graph)
    runs: dict[str, list[Repeat]] = {}
    _find_runs(graph, records, list(records), 0, runs)
    layers: dict[str, FoldedLayer] = {}
    for name, record in records.items():
        place = _place(name, runs)
        layers.setdefault(place.name, FoldedLayer(place.name, record, place.runs, name in graph.heads))
    blocks: dict[str, list[FoldedLayer]] = {}
    for layer in layers.values():
        blocks.setdefault(layer.block or f"{layer.name} alone", []).append(layer)
    return Folded(
        tuple(
            FoldedBlock(members[0].block if len(members) > 1 or members[0].runs else "", tuple(members))
            for members in blocks.values()
        ),
        _fold_edges(graph.edges, runs),
        _fold_barriers(graph.barriers, runs),
    )


def _records(graph: PropagationGraph) -> dict[str, Layer]:
    """Returns the traced layers, and layers without sizes for names that only occur in edges."""
    known = {layer.fqn: layer for layer in graph.layers}
    return {name: known.get(name) or Layer(name, "layer", 0, 0) for name in graph.names()}


def _place(name: str, runs: dict[str, list[Repeat]]) -> Place:
    folded: list[str] = []
    passed: list[tuple[Repeat, int]] = []
    for part in name.split("."):
        found = runs.get(".".join(folded), []) if part.isdecimal() else []
        run = next((run for run in found if run.first <= int(part) <= run.last), None)
        folded.append(f"{{{run.first}-{run.last}}}" if run else part)
        if run:
            passed.append((run, int(part)))
    return Place(".".join(folded), tuple(run for run, _ in passed), tuple(number for _, number in passed))


def _find_runs(
    graph: PropagationGraph, records: dict[str, Layer], names: list[str], depth: int, runs: dict[str, list[Repeat]]
) -> None:
    """Finds runs of blocks numbered at part `depth` of their names, then inside the first block of each run."""
    heads, numbered = set(graph.heads), dict[str, dict[int, list[str]]]()
    deeper: list[str] = []
    for name in names:
        parts = name.split(".")
        if depth < len(parts) and parts[depth].isdecimal():
            blocks = numbered.setdefault(".".join(parts[:depth]), {})
            blocks.setdefault(int(parts[depth]), []).append(name)
        elif depth < len(parts):
            deeper.append(name)
    for prefix, blocks in numbered.items():
        where = {
            name: (number, name.split(".", depth + 1)[depth + 1 :]) for number in blocks for name in blocks[number]
        }
        between: dict[tuple[int, int], set[Hashable]] = {}
        for e in graph.edges:
            if e.anterior in where and e.posterior in where:
                (a, anterior), (b, posterior) = where[e.anterior], where[e.posterior]
                between.setdefault((a, b), set()).add((*anterior, "->", *posterior, e.channels, e.kind))
        contents = {
            number: (
                between.get((number, number)),
                [
                    (where[n][1], r.type, r.in_channels, r.out_channels, r.left_out, n in heads)
                    for n, r in ((n, records[n]) for n in members)
                ],
            )
            for number, members in blocks.items()
        }
        onward = {number: between.get((number, number + 1)) for number in blocks}
        for first, last in _longest(sorted(blocks), contents, onward):
            if last > first:
                template = _place(prefix, runs).name if prefix else ""
                runs.setdefault(template, []).append(Repeat(template, first, last))
            deeper += blocks[first]
    if deeper:
        _find_runs(graph, records, deeper, depth + 1, runs)


def _longest(numbers: Sequence[int], contents: Mapping[int, Any], onward: Mapping[int, Any]) -> list[tuple[int, int]]:
    """Splits numbers into runs of equal blocks with equal edges to the next block, the longest first."""
    if not numbers:
        return []
    start = end = 0
    for first in range(len(numbers)):
        last = first
        while (
            last + 1 < len(numbers)
            and numbers[last + 1] == numbers[last] + 1
            and contents[numbers[last + 1]] == contents[numbers[first]]
            and onward[numbers[last]] == onward[numbers[first]]
        ):
            last += 1
        if last - first > end - start:
            start, end = first, last
    left, right = _longest(numbers[:start], contents, onward), _longest(numbers[end + 1 :], contents, onward)
    return [*left, (numbers[start], numbers[end]), *right]


def _fold_edges(edges: Iterable[Edge], runs: dict[str, list[Repeat]]) -> tuple[FoldedEdge, ...]:
    groups: dict[Hashable, list[tuple[Edge, Place, Place, tuple[int, ...]]]] = {}
    for edge in edges:
        anterior, posterior = _place(edge.anterior, runs), _place(edge.posterior, runs)
        shared = 0
        for a, b in zip(anterior.runs, posterior.runs, strict=False):
            if a != b:
                break
            shared += 1
        step = tuple(b - a for a, b in zip(anterior.numbers[:shared], posterior.numbers[:shared], strict=True))
        key = (anterior.name, posterior.name, edge.channels, edge.kind, step)
        groups.setdefault(key, []).append((edge, anterior, posterior, step))
    return tuple(
        FoldedEdge(
            anterior, posterior, step, tuple(item[0] for item in group), tuple((item[1], item[2]) for item in group)
        )
        for group in groups.values()
        for _, anterior, posterior, step in group[:1]
    )


def _fold_barriers(barriers: Iterable[Barrier], runs: dict[str, list[Repeat]]) -> tuple[FoldedBarrier, ...]:
    groups: dict[Hashable, list[tuple[Barrier, Place]]] = {}
    for barrier in barriers:
        place = _place(barrier.layer, runs)
        groups.setdefault((place.name, barrier.operation, barrier.reason), []).append((barrier, place))
    folded = []
    for group in groups.values():
        place = group[0][1]
        words = []
        for level, run in enumerate(place.runs):
            seen = {other.numbers[level] for _, other in group}
            words += ["every block"] if len(seen) == run.count else [_blocks(seen)]
        folded.append(FoldedBarrier(place.name, tuple(barrier for barrier, _ in group), ", ".join(words)))
    return tuple(folded)


def _blocks(numbers: Iterable[int]) -> str:
    """Lists block numbers: `block 3`, `blocks 0 .. 2, 5`."""
    ordered = sorted(set(numbers))
    starts = [n for n in ordered if n - 1 not in ordered]
    ends = [n for n in ordered if n + 1 not in ordered]
    ranges = [str(a) if a == b else f"{a} .. {b}" for a, b in zip(starts, ends, strict=True)]
    return f"block{'s' if len(ordered) > 1 else ''} {', '.join(ranges)}"
