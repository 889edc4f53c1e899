"""Structured tasks of mini-vision: how many, how far, where, and which way an object faces.

Every function draws the images of a batch from its dice and their labels, and returns the numbers that it drew them by.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from san_bench.image.mini.canvas import (
    COS,
    PIXELS,
    SIN,
    SIZE,
    TURN,
    Dice,
    Drawing,
    Paint,
    Plane,
    blend,
    clouds,
    cover,
    disc,
    finish,
    over,
    rotated,
)  # fmt: skip

_f = np.float32

MOST = 7
"""Largest number of pills in an image of `count`; the classes are 2 to 7."""

NEAR = (0.8, 1.15, 1.65, 2.4, 3.5, 5.0)
"""Limits of the depths of the classes of `distance`: each is nearly half more than the one before. Depth 1 is 16
pixels below the horizon, depth 2 is 8."""


def count(dice: Dice, label: Int64[np.ndarray, " n"]) -> Drawing:
    """Draws 2 to 7 pills that do not touch, on clouds; the label is how many, from 2."""
    image, ink = _ground(dice)
    order = np.argsort(dice.unit("cell", 0, 1, 16), axis=1, kind="stable")[:, :MOST]
    x, y = (_f(4.5) + _f(7.7) * part.astype(_f) + dice.unit(f"jitter {n}", -0.6, 0.6, MOST)
            for n, part in (("x", order % 4), ("y", order // 4)))  # fmt: skip
    length, width = dice.unit("length", 0.5, 1.1, MOST), dice.unit("width", 1.2, 1.6, MOST)
    turn = dice.pick("turn", TURN, MOST)
    tint = dice.unit("tint", 0.6, 1.15, MOST, 3)
    mask = np.zeros((dice.n, SIZE, SIZE), _f)
    for k in range(MOST):
        who = np.flatnonzero(label + 2 > k)
        u, v = rotated(turn[who, k], x[who, k], y[who, k])
        inside = cover(_pill(u, v, length[who, k, None, None], width[who, k, None, None]))
        image[who] = over(image[who], (ink[who] * tint[who, k])[:, None, None, :], inside)
        mask[who] = np.maximum(mask[who], inside)
    return finish(dice, image, {"mask": mask})


def distance(dice: Dice, label: Int64[np.ndarray, " n"]) -> Drawing:
    """Draws a plain under a sky with three boulders; the label is the depth of the nearest, in five steps.

    The camera tilts, so the horizon moves, and boulders differ in size: only the gap between the horizon and the
    foot of the nearest boulder tells its depth.
    """
    horizon = dice.unit("horizon", 5, 9)
    edges = np.array(NEAR, _f)
    low, high = edges[label], edges[label + 1]
    nearest = low + (high - low) * dice.unit("depth", 0.15, 0.85)
    depth = np.stack([nearest, *(nearest * dice.unit(f"behind {k}", 1.5, 3.0) for k in (1, 2))], axis=1)
    foot = horizon[:, None] + _f(16) / depth
    radius = dice.unit("size", 2.2, 5.5, 3) / depth + _f(1.0)
    x = dice.unit("x", 5, 27, 3)
    sky, ground = dice.unit("sky", 140, 250, 3), dice.unit("ground", 20, 120, 3)
    image = blend(sky, ground, np.broadcast_to(cover(horizon[:, None, None] - PIXELS[None, :, None]), _shape(dice)))
    image *= clouds(dice.unit("clouds", 0.75, 1.15, 9, 9))[..., None]
    still = np.zeros(dice.n, np.int64)
    for k in (2, 1, 0):  # far ones first
        u, v = rotated(still, x[:, k], foot[:, k] - _f(0.8) * radius[:, k])
        r = radius[:, k, None, None]
        shade = _f(0.7) - _f(0.4) * np.clip((u + v) / r, -1, 1)
        paint = dice.unit(f"boulder {k}", 110, 255, 3)[:, None, None, :] * shade[..., None]
        image = over(image, paint, cover(np.maximum(disc(u, v, r), v - _f(0.8) * r)))
    return finish(dice, image, {"depth": depth, "foot": foot, "horizon": horizon})


def location(dice: Dice, label: Int64[np.ndarray, " n"]) -> Drawing:
    """Draws discs, and one ring among them, in the nine cells of a grid; the label is the ring's cell, row by row."""
    image, ink = _ground(dice)
    present = dice.unit("present", 0, 1, 9) < _f(0.5)
    radius = dice.unit("radius", 3.4, 4.2, 9)
    tint = dice.unit("tint", 0.75, 1.1, 9, 3)
    mask = np.zeros((dice.n, SIZE, SIZE), _f)
    still = np.zeros(dice.n, np.int64)
    grid = np.array([(5.5 + 10.5 * (c % 3), 5.5 + 10.5 * (c // 3)) for c in range(9)], _f)
    centre = grid + dice.unit("jitter", -0.9, 0.9, 9, 2)
    for c in range(9):
        u, v = rotated(still, centre[:, c, 0], centre[:, c, 1])
        inside = disc(u, v, radius[:, c, None, None])
        ring = np.maximum(inside, -disc(u, v, radius[:, c, None, None] - _f(1.6)))
        shape = np.where((label == c)[:, None, None], ring, inside)
        seen = cover(shape) * (present[:, c] | (label == c))[:, None, None]
        image = over(image, (ink * tint[:, c])[:, None, None, :], seen)
        mask = np.maximum(mask, seen)
    return finish(dice, image, {"centre": centre, "mask": mask})


def orientation(dice: Dice, label: Int64[np.ndarray, " n"]) -> Drawing:
    """Draws a pin among chips; the label is which eighth of the circle its tip points to, clockwise."""
    image, ink = _ground(dice)
    turn = (label * 32 + dice.pick("turn", 21) - 10) % TURN
    x, y = dice.unit("x", 11, 21), dice.unit("y", 11, 21)
    size = dice.unit("size", 6.5, 10)[:, None, None]
    for k in range(5):  # chips of the pin's colour that point anywhere
        a, b = rotated(
            dice.pick(f"chip turn {k}", TURN), dice.unit(f"chip x {k}", 0, 32), dice.unit(f"chip y {k}", 0, 32)
        )
        chip = cover(_pill(a, b, dice.unit(f"chip length {k}", 1, 3)[:, None, None], _f(0.8)))
        image = over(image, (ink * dice.unit(f"chip tint {k}", 0.6, 1, 3))[:, None, None, :], chip)
    u, v = rotated(turn, x, y)
    head = disc(u + _f(0.5) * size, v, dice.unit("head", 0.34, 0.5)[:, None, None] * size)
    taper = np.abs(v) * _f(0.94) + (u - size) * dice.unit("taper", 0.12, 0.24)[:, None, None]
    body = np.maximum(taper, -u - _f(0.5) * size)
    mask = cover(np.minimum(head, body))
    image = over(image, ink[:, None, None, :], mask)
    return finish(dice, image, {"turn": turn, "mask": mask})


def azimuth(dice: Dice, label: Int64[np.ndarray, " n"]) -> Drawing:
    """Draws a car seen from above at an angle; the label is which eighth of the circle its front points to."""
    image, ink = _ground(dice)
    turn = (label * 32 + dice.pick("turn", 21) - 10) % TURN
    view = _View(dice, turn)
    paint, glass = ink * dice.unit("tint", 0.7, 1.1, 3), dice.unit("glass", 20, 80, 3)
    long, wide = dice.unit("long", 0.92, 1.08), dice.unit("wide", 0.42, 0.55)
    image = view.block(image, paint, paint, (-long, long), (-wide, wide), (0.0, 0.42))
    lamps = np.zeros((dice.n, SIZE, SIZE), _f)
    for y in (-wide * _f(0.68), wide * _f(0.68)):
        seen, _ = view.wall((1, 0), (long, long), (y - _f(0.13), y + _f(0.13)), (0.14, 0.36))
        lamps = np.maximum(lamps, seen)
    image = over(image, np.array([255, 245, 190], _f), lamps)
    cabin = (-long * _f(0.8), long * _f(0.25)), (-wide * _f(0.9), wide * _f(0.9)), (0.42, 0.86)
    return finish(dice, view.block(image, paint, glass, *cabin), {"turn": turn, "lamps": lamps})


class _View:
    """Parallel projection, from above at an angle, of things that stand on the ground and are turned there."""

    def __init__(self, dice: Dice, turn: NDArray[Any]) -> None:
        self.cos, self.sin = COS[turn], SIN[turn]
        lift = 20 + dice.pick("lift", 17)  # 28 to 51 degrees above the ground
        self.low, self.high = SIN[lift], COS[lift]
        self.scale = dice.unit("scale", 10.5, 13)
        self.x, self.y = dice.unit("x", 14, 18), dice.unit("y", 16, 20)
        self.light = dice.unit("light", -0.35, 0.35)

    def block(self, image: Paint, roof: Any, walls: Any, x: Any, y: Any, z: Any) -> Paint:
        """Lays a block over an image, in one colour above and one around."""
        west, east, north, south = (x[0], x[0]), (x[1], x[1]), (y[0], y[0]), (y[1], y[1])
        sides = [((-1, 0), west, y), ((1, 0), east, y), ((0, -1), x, north), ((0, 1), x, south)]
        for away, across, along in sides:
            seen, light = self.wall(away, across, along, z)
            image = over(image, (walls * light[:, None])[:, None, None, :], seen)
        corners = [self.project(x[i], y[j], z[1]) for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
        return over(image, roof[:, None, None, :], cover(_quadrilateral(corners)))

    def wall(self, away: tuple[int, int], x: Any, y: Any, z: Any) -> tuple[Plane, NDArray[Any]]:
        """How much of each pixel an upright rectangle covers, nothing where its face is turned away, and its light."""
        across, towards = self.cos * away[0] - self.sin * away[1], self.sin * away[0] + self.cos * away[1]
        corners = [self.project(x[i], y[i], z[j]) for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
        return cover(_quadrilateral(corners)) * (towards > _f(0.02))[:, None, None], _f(0.68) + self.light * across

    def project(self, x: Any, y: Any, z: Any) -> tuple[Any, Any]:
        """Where a point is on the screen."""
        across, towards = self.cos * x - self.sin * y, self.sin * x + self.cos * y
        return self.x + self.scale * across, self.y + self.scale * (towards * self.low - z * self.high)


def _quadrilateral(corners: list[tuple[NDArray[Any], NDArray[Any]]]) -> Plane:
    """Signed distance to the edge of a convex figure, whichever way its corners go round; a little widened."""
    (ax, ay), (bx, by), (cx, cy), _ = corners
    way = np.where((bx - ax) * (cy - ay) - (by - ay) * (cx - ax) > 0, _f(1), _f(-1))
    x, y = np.stack([x for x, _ in corners]), np.stack([y for _, y in corners])
    beside, above = (  # the box around it cuts off what widening adds to sharp corners
        np.maximum(low[:, None] - PIXELS, PIXELS - high[:, None])
        for low, high in ((x.min(axis=0), x.max(axis=0)), (y.min(axis=0), y.max(axis=0)))
    )
    distance = np.maximum(beside[:, None, :], above[:, :, None])
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        dx, dy = bx - ax, by - ay
        norm = way / np.maximum(np.sqrt(dx * dx + dy * dy), _f(1e-3))
        nx, ny = dy * norm, -dx * norm
        across, down = (PIXELS - ax[:, None]) * nx[:, None], (PIXELS - ay[:, None]) * ny[:, None]
        np.maximum(distance, across[:, None, :] + down[:, :, None], out=distance)
    return distance - _f(0.3)


def _pill(u: Plane, v: Plane, length: Any, width: Any) -> Plane:
    """Signed distance to the edge of a bar with round ends."""
    return disc(np.maximum(np.abs(u) - length, 0), v, width)


def _ground(dice: Dice) -> tuple[Paint, Float[np.ndarray, "n 3"]]:
    """Clouds between two near dark colours, and a bright one."""
    dark = dice.unit("dark", 15, 90, 3)
    return blend(dark * _f(0.8), dark * _f(1.2) + _f(8), clouds(dice.unit("ground", 0, 1, 9, 9))), dice.unit(
        "bright", 150, 255, 3
    )


def _shape(dice: Dice) -> tuple[int, int, int]:
    return dice.n, SIZE, SIZE
