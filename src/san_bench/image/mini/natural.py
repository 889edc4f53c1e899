"""Natural tasks of mini-vision: digits that people wrote, textures, flowers.

Every function draws the images of a batch from its dice and their labels, and returns the numbers that it drew them by.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from san_bench.image.mini.canvas import (
    COS,
    SIN,
    SIZE,
    TURN,
    Dice,
    Drawing,
    Paint,
    Plane,
    blend,
    box,
    clouds,
    cover,
    disc,
    finish,
    over,
    rotated,
)  # fmt: skip

_f = np.float32

TEXTURES = ("bricks", "zigzag", "weave", "scales", "rings", "pebbles", "net", "marble")
"""The classes of `textures`."""

FLOWERS: dict[str, tuple[int, float, float, float, float]] = {
    "trillium": (3, 0.52, 0.48, 0.36, 0.16),
    "poppy": (4, 0.5, 0.5, 0.42, 0.34),
    "buttercup": (5, 0.6, 0.38, 0.32, 0.18),
    "borage": (5, 0.45, 0.6, 0.13, 0.2),
    "anemone": (6, 0.58, 0.42, 0.27, 0.38),
    "clematis": (8, 0.55, 0.5, 0.14, 0.14),
    "primula": (6, 0.72, 0.24, 0.24, 0.26),
    "sunflower": (12, 0.78, 0.26, 0.11, 0.58),
}
"""The classes of `flowers`: number of petals; where their middle is, half their length and half their width, and the
radius of the heart, in radii of the flower."""


def digits(dice: Dice, scans: Float[np.ndarray, "n 32 32"]) -> Drawing:
    """Draws scanned digits turned, shrunk and moved, in a colour on clouds, among scraps of other strokes.

    Args:
        dice: The dice of the images.
        scans: How much ink is where, 0 to 1.
    """
    turn = (dice.pick("turn", 25) - 12) % TURN
    u, v = rotated(turn, dice.unit("x", 14, 18), dice.unit("y", 14, 18))
    scale = dice.unit("scale", 1.0, 1.3)[:, None, None]
    ink = np.clip(_sampled(scans, v * scale + _f(16), u * scale + _f(16)) * _f(1.4) - _f(0.1), 0, 1)
    image, colour = _scenery(dice)
    for k in range(3):
        a, b = rotated(dice.pick(f"scrap turn {k}", TURN), *_rim(dice, k))
        scrap = cover(box(a, b, dice.unit(f"scrap {k}", 2, 5)[:, None, None], _f(1)))
        image = over(image, dice.unit(f"scrap colour {k}", 30, 225, 3)[:, None, None, :], scrap)
    return finish(dice, over(image, colour[:, None, None, :], ink), {"ink": ink})


def textures(dice: Dice, label: Int64[np.ndarray, " n"]) -> Drawing:
    """Draws one of `TEXTURES` in two colours, a little turned and scaled, in uneven light."""
    turn = (dice.pick("turn", 33) - 16) % TURN
    x, y = dice.unit("x", 0, 32), dice.unit("y", 0, 32)
    period = dice.unit("period", 7, 10)
    u, v = (part / period[:, None, None] for part in rotated(turn, x, y))
    amount = np.empty_like(u)
    for number, name in enumerate(TEXTURES):
        who = np.flatnonzero(label == number)
        amount[who] = _pattern(name, dice, who, u[who], v[who])
    first = dice.unit("first", 20, 235, 3)
    second = first + np.where(first < 128, _f(1), _f(-1)) * dice.unit("contrast", 60, 150, 3)
    light = _f(1) + dice.unit("uneven", 0, 0.02)[:, None, None] * rotated(dice.pick("light", TURN))[0]
    return finish(dice, blend(first, second, amount) * light[..., None], {"amount": amount})


def flowers(dice: Dice, label: Int64[np.ndarray, " n"]) -> Drawing:
    """Draws one of `FLOWERS` from above on foliage; colours and size tell nothing."""
    form = np.array(list(FLOWERS.values()), _f)[label]
    turn = dice.pick("turn", TURN)
    radius = dice.unit("radius", 11, 14.5)
    x, y = dice.unit("x", 14, 18), dice.unit("y", 14, 18)
    green = dice.unit("green", 10, 110, 3) * np.array([0.7, 1.2, 0.6], _f)
    image = blend(green, green * _f(1.6) + _f(15), clouds(dice.unit("foliage", 0, 1, 9, 9)))
    petal, heart = dice.unit("petal", 90, 255, 3), dice.unit("heart", 20, 235, 3)
    bloom = np.zeros((dice.n, SIZE, SIZE), _f)
    bend = dice.pick("bend", 7, 12) - 3
    length = dice.unit("length", 0.9, 1.1, 12)
    for k in range(12):
        who = np.flatnonzero(form[:, 0] > k)
        r = radius[who, None, None]
        angle = turn[who] + (k * TURN / form[who, 0]).astype(np.int64) + bend[who, k]
        u, v = rotated(angle, x[who], y[who])
        middle, half, width = (form[who, n, None, None] * r for n in (1, 2, 3))
        a, b = (u - middle) / (half * length[who, k, None, None]), v / width
        edge = (np.sqrt(a * a + b * b) - _f(1)) * width
        shade = _f(0.72) + _f(0.38) * np.clip(u / r, 0, 1)
        inside = cover(edge)
        bloom[who] = np.maximum(bloom[who], inside)
        image[who] = over(image[who], petal[who][:, None, None, :] * shade[..., None], inside)
    u, v = rotated(turn, x, y)
    facts = {"bloom": bloom, "centre": np.stack([x, y], axis=1), "radius": radius}
    core = cover(disc(u, v, (form[:, 4] * radius)[:, None, None]))
    return finish(dice, over(image, heart[:, None, None, :], core), facts)


def _pattern(name: str, dice: Dice, who: NDArray[Any], u: Plane, v: Plane) -> Plane:
    """How much of the second colour each pixel takes, 0 to 1; `u` and `v` count periods."""
    if name == "bricks":
        row = np.floor(v * _f(1.4))
        along = u * _f(0.7) + _f(0.5) * (row - _f(2) * np.floor(row / 2))
        return _soft(np.maximum(_saw(along) - _f(0.4), _saw(v * _f(1.4)) - _f(0.36)) * _f(12))
    if name == "zigzag":
        return _soft((_saw(v * _f(1.2) + _f(0.9) * _saw(u * _f(0.6))) - _f(0.25)) * _f(8))
    if name == "weave":
        across = np.floor(u) + np.floor(v)
        odd = across - _f(2) * np.floor(across / 2) > 0.5
        return _soft((_saw(np.where(odd, u, v) * _f(2)) - _f(0.25)) * _f(6))
    if name == "scales":
        best = np.full_like(u, np.inf)
        for shift in (0.0, 0.5):
            a, b = u + _f(shift), v * _f(1.2) + _f(shift)
            a, b = a - np.floor(a) - _f(0.5), b - np.floor(b)
            best = np.minimum(best, np.abs(np.sqrt(a * a + b * b * _f(0.35)) - _f(0.48)))
        return _soft((_f(0.1) - best) * _f(14))
    if name == "rings":
        oval = np.sqrt(u * u + v * v * dice.unit("oval", 0.5, 1)[who, None, None])
        return _soft((_saw(oval * _f(1.3)) - _f(0.25)) * _f(8))
    if name == "pebbles":
        return _soft((_pebbles(dice, who) - _f(0.16)) * _f(14))
    if name == "net":
        lines = [_saw(u), _saw(u * _f(0.5) + v * _f(0.8660254)), _saw(u * _f(0.5) - v * _f(0.8660254))]
        return _soft((_f(0.1) - np.minimum(np.minimum(lines[0], lines[1]), lines[2])) * _f(14))
    bent = v * _f(0.8) + clouds(dice.unit("marble", -0.9, 0.9, 5, 5)[who])
    return _soft((_saw(bent) - _f(0.28)) * _f(4))


def _pebbles(dice: Dice, who: NDArray[Any]) -> Plane:
    """Gap between the distances to the nearest and the second nearest of scattered points, in their spacing."""
    spacing = dice.unit("pebble", 6, 8)[who, None, None]
    jitter = dice.unit("pebbles", 0.1, 0.9, 49, 2)[who]
    still = np.zeros(len(who), np.int64)
    first = np.full((len(who), SIZE, SIZE), np.inf, _f)
    second = first.copy()
    for k in range(49):
        u, v = rotated(
            still, (k % 7 - 1 + jitter[:, k, 0]) * spacing[:, 0, 0], (k // 7 - 1 + jitter[:, k, 1]) * spacing[:, 0, 0]
        )
        away = (u * u + v * v) / (spacing * spacing)
        second = np.minimum(second, np.maximum(first, away))
        first = np.minimum(first, away)
    return np.sqrt(second) - np.sqrt(first)


def _saw(value: Plane) -> Plane:
    """Distance to the nearest whole number, 0 to 0.5."""
    return np.abs(value - np.floor(value + _f(0.5)))


def _soft(value: Plane) -> Plane:
    return np.clip(value + _f(0.5), 0, 1)


def _sampled(planes: Plane, row: Plane, column: Plane) -> Plane:
    """Values of planes between pixels, linearly; 0 outside."""
    row, column = row - _f(0.5), column - _f(0.5)
    top, left = np.floor(row), np.floor(column)
    down, right = row - top, column - left
    top, left = np.clip(top, -2, SIZE).astype(np.int64) + 2, np.clip(left, -2, SIZE).astype(np.int64) + 2
    padded = np.pad(planes, ((0, 0), (2, 2), (2, 2)))
    image = np.arange(len(planes))[:, None, None]
    limit = SIZE + 3
    corners = [[padded[image, np.minimum(top + i, limit), np.minimum(left + j, limit)] for j in (0, 1)] for i in (0, 1)]
    upper = corners[0][0] * (1 - right) + corners[0][1] * right
    lower = corners[1][0] * (1 - right) + corners[1][1] * right
    return upper * (1 - down) + lower * down


def _rim(dice: Dice, k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """A place near the border of the image, in the `k`th quarter of its circumference."""
    turn = k * 64 + dice.pick(f"rim {k}", 64)
    away = dice.unit(f"rim away {k}", 13, 18)
    return _f(16) + COS[turn] * away, _f(16) + SIN[turn] * away


def _scenery(dice: Dice) -> tuple[Paint, Float[np.ndarray, "n 3"]]:
    """Clouds between two dark colours, and a bright one that stands out from them."""
    dark = dice.unit("dark", 10, 110, 2, 3)
    return blend(dark[:, 0], dark[:, 1], clouds(dice.unit("clouds", -0.3, 1.3, 9, 9))), dice.unit("bright", 140, 255, 3)
