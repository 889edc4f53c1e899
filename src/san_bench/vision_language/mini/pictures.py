"""The pictures of mini-vl: up to four coloured figures in a grid of two by two, or a figure above a written word.

Shapes have the names of things that the tokenizer of the embedded decoder keeps whole. A picture is a function of its
scene and of (seed, index) alone, the same bytes on every platform.

Example:
    >>> scene = Scene((Figure(0, "tyre", "red"), Figure(3, "ball", "green")))
    >>> draw_scene(scene, seed=1, index=5).shape
    (32, 32, 3)
    >>> scene.find(shape="ball")[0].colour
    'green'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from san_bench.image.mini.canvas import SIZE, Dice, Plane, blend, box, clouds, cover, disc, finish, over, rotated

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40), "brown": (165, 105, 55), "yellow": (240, 230, 60), "green": (45, 190, 70),
    "purple": (170, 70, 215), "white": (245, 245, 245),
}  # fmt: skip
"""Colours of figures; each is the colour of some food of the small world."""

CELLS = ("top left", "top right", "bottom left", "bottom right")
"""Where figures stand, by their cell."""

FONT = {
    "a": "01110 10001 11111 10001 10001", "b": "11110 10001 11110 10001 11110", "c": "01111 10000 10000 10000 01111",
    "d": "11110 10001 10001 10001 11110", "e": "11111 10000 11110 10000 11111", "f": "11111 10000 11110 10000 10000",
    "g": "01111 10000 10011 10001 01111", "h": "10001 10001 11111 10001 10001", "i": "01110 00100 00100 00100 01110",
    "j": "00111 00010 00010 10010 01100", "k": "10010 10100 11000 10100 10010", "l": "10000 10000 10000 10000 11111",
    "m": "10001 11011 10101 10001 10001", "n": "10001 11001 10101 10011 10001", "o": "01110 10001 10001 10001 01110",
    "p": "11110 10001 11110 10000 10000", "r": "11110 10001 11110 10010 10001", "s": "01111 10000 01110 00001 11110",
    "t": "11111 00100 00100 00100 00100", "u": "10001 10001 10001 10001 01110", "w": "10001 10001 10101 11011 10001",
    "x": "10001 01010 00100 01010 10001", "y": "10001 01010 00100 00100 00100",
}  # fmt: skip
"""Letters, five pixels wide and high, row by row."""

LETTER = 8
"""Pixels from one letter of a word to the next: two patches of the tower, so a letter looks the same in every place."""

_f = np.float32


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        cell: Its place in `CELLS`.
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
    """

    cell: int
    shape: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        figures: The figures, at most one in a cell.
        word: Up to four letters in the lower half, where there are then no figures; empty for none.
    """

    figures: tuple[Figure, ...]
    word: str = ""

    def find(self, shape: str | None = None, colour: str | None = None) -> list[Figure]:
        """Returns the figures of a shape, a colour, or both."""
        return [f for f in self.figures if shape in (None, f.shape) and colour in (None, f.colour)]


def _triangle(u: Plane, v: Plane, r: Any) -> Plane:
    return np.maximum(v - _f(0.5) * r, _f(0.866) * np.abs(u) - _f(0.5) * (v + r))


SHAPES: dict[str, Callable[[Plane, Plane, Any], Plane]] = {
    "ball": disc,
    "tyre": lambda u, v, r: np.maximum(disc(u, v, r), -disc(u, v, _f(0.6) * r)),
    "box": lambda u, v, r: box(u, v, _f(0.82) * r, _f(0.82) * r),
    "kite": lambda u, v, r: _f(0.707) * (np.abs(u) + np.abs(v) - _f(1.1) * r),
    "hill": _triangle,
    "bar": lambda u, v, r: box(u, v, r, _f(0.36) * r),
}
"""Signed distance to the edge of each shape, by its radius in pixels."""


def draw_scene(scene: Scene, seed: int, index: int) -> UInt8[np.ndarray, "32 32 3"]:
    """Draws a scene on dark clouds.

    Args:
        scene: What it shows.
        seed: Names the sequence of pictures, 0 or more.
        index: Which picture of the sequence; it decides all that the scene leaves open.
    """
    dice = Dice(seed, np.array([index], np.uint64))
    dark = dice.unit("dark", 15, 80, 3)
    image = blend(dark * _f(0.8), dark * _f(1.2), clouds(dice.unit("ground", 0, 1, 9, 9)))
    still = np.zeros(1, np.int64)
    for figure in scene.figures:
        name = f"figure {figure.cell}"
        x, y = (_f(8 + 16 * part) + dice.unit(f"{name} {axis}", -1, 1)
                for axis, part in (("x", figure.cell % 2), ("y", figure.cell // 2)))  # fmt: skip
        u, v = rotated(still, x, y)
        inside = cover(SHAPES[figure.shape](u, v, dice.unit(f"{name} size", 4.8, 6.4)[:, None, None]))
        paint = np.array(COLOURS[figure.colour], _f) * dice.unit(f"{name} tint", 0.88, 1.04, 3)
        image = over(image, paint[:, None, None, :], inside)
    if scene.word:
        ink = dice.unit("ink", 190, 255, 3)
        row, column = word_place(scene, seed, index)
        inside = _written(scene.word, LETTER * column + 1, LETTER * row + 1)
        image = over(image, ink[:, None, None, :], inside[None])
    return finish(dice, image, {}).images[0]


def word_place(scene: Scene, seed: int, index: int) -> tuple[int, int]:
    """Returns the row and the column of the first letter of a scene's word in `draw`, in steps of `LETTER` pixels."""
    dice = Dice(seed, np.array([index], np.uint64))
    return 2 + int(dice.pick("word y", 2)[0]), int(dice.pick("word x", SIZE // LETTER + 1 - len(scene.word))[0])


def _written(word: str, left: int, top: int) -> Plane:
    """Which pixels a word covers."""
    plane = np.zeros((SIZE, SIZE), _f)
    for place, letter in enumerate(word):
        rows = np.array([[int(dot) for dot in row] for row in FONT[letter].split()], _f)
        x = left + LETTER * place
        plane[top : top + 5, x : x + 5] = rows
    return plane
