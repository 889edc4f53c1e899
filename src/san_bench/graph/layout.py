"""Compute the layout of a drawn graph: positions of boxes and lines in SVG units, with y pointing down.

Layers are placed in rows in execution order, side by side if they have the same inputs. An edge to the next row is a
curve. Edges that skip rows run down a lane on the right; edges that lead back up, such as to the next of several folded
blocks, run up a lane on the left.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from san_bench.graph.fold import Folded, FoldedBlock, FoldedEdge, FoldedLayer
from san_bench.graph.wording import path_words

MARGIN, BOX_HEIGHT, BOX_GAP, ROW_WIDTH, IN_ROW = 10.0, 50.0, 8.0, 376.0, 3
LANE, TRACK, ENTRY, ARROW, HEADER, SPREAD = 9.0, 18.0, 9.0, 24.0, 26.0, 14.0


@dataclass
class Box:
    """Box of a folded layer: row, corner, width and centre."""

    layer: FoldedLayer
    label: str
    row: int
    x: float
    width: float
    y: float = 0.0

    @property
    def centre(self) -> float:
        """Horizontal centre."""
        return self.x + self.width / 2


@dataclass
class Frame:
    """Frame around the rows `first` to `last` of a block."""

    block: FoldedBlock
    first: int
    last: int
    top: float = 0.0
    bottom: float = 0.0


@dataclass
class Bundle:
    """Edges from one layer with the same properties, drawn as one branching line.

    Attributes:
        edges: The folded edges.
        source: Box of their anterior.
        targets: Boxes of their posteriors.
        start: Horizontal position where the line leaves the source.
        ends: Horizontal positions where it reaches the targets.
        track: Height of its turn and its label.
        entries: Height at which it leaves its lane, by row.
        lane: Position of its lane; `None` if all targets are in the next row.
    """

    edges: list[FoldedEdge]
    source: Box
    targets: list[Box]
    start: float = 0.0
    ends: list[float] = field(default_factory=list)
    track: float = 0.0
    entries: dict[int, float] = field(default_factory=dict)
    lane: float | None = None

    @property
    def back(self) -> bool:
        """Whether the line leads back up, on the left."""
        return self.edges[0].leaves_block or any(box.row <= self.source.row for box in self.targets)

    def direct(self, target: Box) -> bool:
        """Returns whether a target is in the next row."""
        return not self.back and target.row == self.source.row + 1

    def turns(self) -> Iterator[tuple[float, list[tuple[float, float]]]]:
        """Yields, for every row entered from the lane, the height and the points reached, the farthest last."""
        for row, height in self.entries.items():
            points = [(x, box.y) for box, x in zip(self.targets, self.ends, strict=True) if box.row == row]
            yield height, sorted(points, key=lambda point: abs(point[0] - (self.lane or 0.0)))


@dataclass
class Layout:
    """Positions of everything that is drawn; the space above `top` is for the title."""

    boxes: list[Box]
    frames: list[Frame]
    bundles: list[Bundle]
    width: float
    bottom: float

    def bend(self, bundle: Bundle, target: Box) -> float:
        """Returns the height below which a line to the next row may bend: below its label and a frame's heading."""
        headings = [frame.top + HEADER - 6 for frame in self.frames if frame.first == target.row]
        return max([bundle.track, *headings])


def lay_out(folded: Folded, top: float) -> Layout:
    """Places the boxes, frames and lines of a folded graph below `top`."""
    rows, frames = _rows(folded)
    boxes = {box.layer.name: box for row in rows for box in row}
    bundles = _bundles(folded, boxes)
    left = _lanes([b for b in bundles if b.back])
    right = _lanes([b for b in bundles if not b.back and not all(map(b.direct, b.targets))])
    shift = MARGIN + max(16.0, (left + 1) * LANE)
    for box in boxes.values():
        box.x += shift
    width = shift + ROW_WIDTH + max(16.0, (right + 1) * LANE) + MARGIN
    for bundle in bundles:
        if bundle.lane is not None:
            offset = (bundle.lane + 1) * LANE
            bundle.lane = shift - offset if bundle.back else shift + ROW_WIDTH + offset
    bottom = _heights(rows, frames, bundles, top)
    _ports(bundles)
    return Layout(list(boxes.values()), frames, bundles, width, bottom)


def _rows(folded: Folded) -> tuple[list[list[Box]], list[Frame]]:
    reads: dict[str, set[Hashable]] = {}
    for edge in folded.edges:
        reads.setdefault(edge.posterior.name, set()).add((edge.anterior.name, edge.channels, edge.step))
    rows: list[list[Box]] = []
    frames: list[Frame] = []
    for block in folded.blocks:
        first = len(rows)
        for members in _side_by_side(block, reads):
            width = min(ROW_WIDTH / 2, (ROW_WIDTH - (len(members) - 1) * BOX_GAP) / len(members))
            start = (ROW_WIDTH - len(members) * width - (len(members) - 1) * BOX_GAP) / 2
            rows.append(
                [
                    Box(layer, block.label(layer), len(rows), start + place * (width + BOX_GAP), width)
                    for place, layer in enumerate(members)
                ]
            )
        if block.name:
            frames.append(Frame(block, first, len(rows) - 1))
    return rows, frames


def _side_by_side(block: FoldedBlock, reads: dict[str, set[Hashable]]) -> Iterator[list[FoldedLayer]]:
    """Groups consecutive layers into one row if they are in the same module and have the same inputs."""
    row: list[FoldedLayer] = []
    last: Hashable = None
    for layer in block.layers:
        key = (layer.name.rpartition(".")[0], layer.layer.in_channels, frozenset(reads.get(layer.name, ())))
        if row and (key != last or len(row) == IN_ROW or not block.name):
            yield row
            row = []
        row.append(layer)
        last = key
    yield row


def _bundles(folded: Folded, boxes: dict[str, Box]) -> list[Bundle]:
    groups: dict[Hashable, list[FoldedEdge]] = {}
    for edge in folded.edges:
        key = (edge.anterior.name, edge.channels, edge.kind, edge.step, edge.note, path_words(edge))
        groups.setdefault(key, []).append(edge)
    return [
        Bundle(edges, boxes[edges[0].anterior.name], [boxes[edge.posterior.name] for edge in edges])
        for edges in groups.values()
    ]


def _lanes(bundles: list[Bundle]) -> int:
    """Assigns each bundle the innermost free lane along its rows; returns the number of lanes."""
    taken: list[list[tuple[int, int]]] = []

    def span(bundle: Bundle) -> tuple[int, int]:
        rows = [bundle.source.row, *(box.row for box in bundle.targets)]
        return min(rows), max(rows)

    for bundle in sorted(bundles, key=lambda b: span(b)[1] - span(b)[0]):
        low, high = span(bundle)
        number = 0
        while number < len(taken) and any(a <= high and low <= b for a, b in taken[number]):
            number += 1
        taken += [[]] if number == len(taken) else []
        taken[number].append((low, high))
        bundle.lane = float(number)
    return len(taken)


def _heights(rows: list[list[Box]], frames: list[Frame], bundles: list[Bundle], y: float) -> float:
    """Stacks the rows with enough space for the lines that turn between them; returns the bottom."""
    opens, closes = {f.first: f for f in frames}, {f.last: f for f in frames}
    for number, row in enumerate(rows):
        if number in opens:
            opens[number].top = y + 4
            y += HEADER + 4
        for bundle in bundles:
            if any(box.row == number and not bundle.direct(box) for box in bundle.targets):
                bundle.entries[number] = y + ENTRY / 2
                y += ENTRY
        y += ARROW
        for box in row:
            box.y = y
        y += BOX_HEIGHT + 4
        leaving = [bundle for bundle in bundles if bundle.source.row == number]
        for bundle in leaving:
            if bundle.back:
                bundle.track = y + TRACK / 2
                y += TRACK
        if number in closes:
            y += 6
            closes[number].bottom = y
            y += 4
        for bundle in leaving:
            if not bundle.back:
                bundle.track = y + TRACK / 2
                y += TRACK
    return y


def _ports(bundles: list[Bundle]) -> None:
    """Spreads the lines that leave or reach a box along its edge."""
    leaving: dict[str, list[Bundle]] = {}
    reaching: dict[str, list[Bundle]] = {}
    for bundle in bundles:
        leaving.setdefault(bundle.source.layer.name, []).append(bundle)
        for target in bundle.targets:
            reaching.setdefault(target.layer.name, []).append(bundle)
        bundle.ends = [0.0] * len(bundle.targets)

    def place(box: Box, bundle: Bundle, others: list[Bundle]) -> float:
        ordered = sorted(others, key=lambda b: (b.back and -1) or (b.lane is not None))
        step = min(SPREAD, (box.width - 12) / max(len(ordered), 1))
        return box.centre + (ordered.index(bundle) - (len(ordered) - 1) / 2) * step

    for bundle in bundles:
        bundle.start = place(bundle.source, bundle, leaving[bundle.source.layer.name])
        for number, target in enumerate(bundle.targets):
            bundle.ends[number] = place(target, bundle, reaching[target.layer.name])
