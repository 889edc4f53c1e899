"""Draws labelled images: scenes of coloured, textured shapes, and glyphs of curved strokes.

Image `i` of seed `s` is a function of `(s, i)` alone. Randomness is a hash of (seed, index, factor name), so neither
the batch it is drawn in, nor the numpy version, nor a factor added later changes an image. Geometry uses only
element-wise IEEE float32 arithmetic on a rounded table of angles: the same bytes on every platform.

Example:
    >>> batch = draw(4, seed=0)
    >>> batch.images.shape, batch.images.dtype.name
    ((4, 32, 32, 3), 'uint8')
    >>> [FACTORS["shape"][i] for i in draw(2, seed=0, kind="scene", shape=4).labels["shape"]]
    ['triangle', 'triangle']
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray

from san_bench.image.mini.canvas import (
    COS,
    PIXELS,
    SIN,
    SIZE,
    TURN,
    Dice,
    Plane,
    blend,
    box,
    clouds,
    enlarge,
    grain,
    over,
    rotated,
    to_bytes,
)  # fmt: skip
from san_peft.errors import SanError

MAX_OBJECTS = 5
GLYPHS = 128
"""Number of glyph prototypes; each glyph image is a deformed drawing of one."""

_STROKES, _POINTS = 3, 12
_PALETTE = np.array(
    [(230, 40, 40), (240, 140, 30), (235, 225, 50), (50, 200, 60),
     (50, 210, 220), (60, 80, 235), (200, 60, 210), (235, 235, 235)],
    dtype=np.float32,
)  # fmt: skip
_TEXTURES = ("plain", "stripes", "checker", "dots", "gradient", "clouds")
_CELLS = ("first", "second", "third", "fourth")

FACTORS: dict[str, tuple[str, ...]] = {
    "shape": ("disc", "ring", "square", "bar", "triangle", "cross", "diamond", "half-disc", "crescent", "corner"),
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "magenta", "white"),
    "texture": _TEXTURES,
    "background": _TEXTURES,
    "background_colour": ("red", "orange", "yellow", "green", "cyan", "blue", "magenta", "white"),
    "count": tuple(str(n) for n in range(1, MAX_OBJECTS + 1)),
    "x": _CELLS,
    "y": _CELLS,
    "size": ("small", "medium", "large"),
    "orientation": tuple(f"{22.5 * n:g}-{22.5 * (n + 1):g} degrees" for n in range(8)),
    "glyph": tuple(f"glyph-{n}" for n in range(GLYPHS)),
    "resolution": ("32", "16", "8"),
}
"""Every label with the names of its classes. A label is -1 where the factor does not apply to the image."""

_GLYPH_ONLY = ("glyph",)
_SCENE_ONLY = ("shape", "texture", "count", "x", "y", "size", "orientation")
_ORIENTED = np.isin(FACTORS["shape"], ("bar", "diamond", "half-disc", "crescent", "corner"))


@dataclass(frozen=True)
class Batch:
    """Images with all their labels.

    Attributes:
        images: RGB images.
        labels: For every name in `FACTORS`, the class of each image; -1 where it does not apply. In a scene they
            describe the largest object.
        mask: How much of each pixel the foreground covers, 0 to 255, before blur and noise.
        objects: Centre x, centre y and radius in pixels of each object, the largest first; radius 0 where none is.
    """

    images: UInt8[np.ndarray, "n 32 32 3"]
    labels: dict[str, Int64[np.ndarray, " n"]]
    mask: UInt8[np.ndarray, "n 32 32"]
    objects: Float[np.ndarray, "n 5 3"]


def draw(
    count: int, *, seed: int, start: int = 0, kind: Literal["mixed", "scene", "glyph"] = "mixed", **fixed: int
) -> Batch:
    """Draws images `start` to `start + count` of the endless sequence that belongs to a seed.

    Args:
        count: Number of images.
        seed: Names the sequence, 0 or more.
        start: Index of the first image.
        kind: Scenes of shapes, glyphs of strokes, or `mixed`, where the index's hash decides between the two.
        **fixed: Factors of `FACTORS` held at one class, for example `shape=4`; labels follow. `count` cannot be
            fixed here since it is the number of images: fix `objects` (1 to 5) instead.

    Returns:
        The images, all their labels, foreground masks and object positions.

    Raises:
        SanError: If a number is negative, or a fixed factor or its class does not exist.
    """
    if count < 0 or seed < 0 or start < 0:
        raise SanError(f"count, seed and start must be 0 or more, but they are {count}, {seed} and {start}.")
    if kind not in ("mixed", "scene", "glyph"):
        raise SanError(f"kind {kind!r} does not exist. Choose from mixed, scene, glyph.")
    if "objects" in fixed:
        if not 1 <= fixed["objects"] <= MAX_OBJECTS:
            raise SanError(f"objects must be 1 to {MAX_OBJECTS}, but it is {fixed['objects']}.")
        fixed["count"] = fixed.pop("objects") - 1
    for name, value in fixed.items():
        if name not in FACTORS:
            raise SanError(f"Factor {name!r} does not exist. Choose from {', '.join(sorted(FACTORS))}.")
        if not 0 <= value < len(FACTORS[name]):
            raise SanError(f"Factor {name!r} has {len(FACTORS[name])} classes, so class {value} does not exist.")
    chunks = [
        _draw_chunk(Dice(seed, np.arange(i, min(i + 128, start + count), dtype=np.uint64), fixed), kind)
        for i in range(start, start + max(count, 1), 128)
    ]
    return Batch(
        np.concatenate([chunk.images for chunk in chunks]),
        {name: np.concatenate([chunk.labels[name] for chunk in chunks]) for name in FACTORS},
        np.concatenate([chunk.mask for chunk in chunks]),
        np.concatenate([chunk.objects for chunk in chunks]),
    )


def _draw_chunk(dice: Dice, kind: str) -> Batch:
    labels = {name: dice.pick(name, len(classes)) for name, classes in FACTORS.items()}
    is_glyph = {"mixed": dice.bits("kind") % np.uint64(2) == 1}.get(kind, np.full(dice.n, kind == "glyph"))
    for names, off in ((_GLYPH_ONLY, ~is_glyph), (_SCENE_ONLY, is_glyph)):
        for name in names:
            labels[name] = np.where(off, -1, labels[name])
    if "background_colour" not in dice.fixed:  # never the colour of the object
        offset = 1 + dice.pick("other colour", len(_PALETTE) - 1)
        labels["background_colour"] = (labels["colour"] + offset) % len(_PALETTE)

    backdrop = _textured(dice, "background", labels["background"], *rotated(dice.pick("background angle", TURN)))
    contrast = dice.unit("contrast", 0.0, 1.0)
    dark = _PALETTE[labels["background_colour"]] * dice.unit("dark", 0.0, 0.35)[:, None]
    darker = dark * (1 - 0.7 * contrast)[:, None]
    image = blend(dark, darker, backdrop)

    mask = np.zeros((dice.n, SIZE, SIZE), np.float32)
    objects = np.zeros((dice.n, MAX_OBJECTS, 3), np.float32)
    light = _PALETTE[labels["colour"]] * dice.unit("light", 0.75, 1.08)[:, None]
    glyphs, scenes = np.flatnonzero(is_glyph), np.flatnonzero(~is_glyph)
    if len(glyphs):
        cover = _glyph_cover(dice, labels["glyph"], glyphs)
        mask[glyphs] = cover
        image[glyphs] = over(image[glyphs], light[glyphs, None, None, :], cover)
    if len(scenes):
        _draw_objects(dice, labels, scenes, light, image, mask, objects)
    labels["orientation"][scenes[~_ORIENTED[labels["shape"][scenes]]]] = -1

    image = _reduced(np.clip(image, 0, 255).astype(np.uint8), labels["resolution"])
    image = grain(dice, image, np.maximum(dice.unit("noise level", -0.12, 0.25), np.float32(0)))
    return Batch(to_bytes(image), labels, to_bytes(mask * 255), objects)


def _draw_objects(
    dice: Dice, labels: dict[str, NDArray[Any]], scenes: NDArray[Any], light: NDArray[Any],
    image: NDArray[Any], mask: NDArray[Any], objects: NDArray[Any],
) -> None:  # fmt: skip
    """Draws the small companions, then the main object, in place."""
    main_radius = np.float32(4.5) + np.float32(1.7) * (labels["size"].astype(np.float32) + dice.unit("radius", 0, 0.8))
    main_x, main_y = (
        np.float32(7) + np.float32(4.5) * (labels[axis].astype(np.float32) + dice.unit(f"{axis} offset", 0.1, 0.9))
        for axis in "xy"
    )
    # Companions sit in the cells of a 4 x 4 grid that the main object does not reach, in hashed order.
    cell = np.arange(16)
    cell_x, cell_y = (np.float32(4) + np.float32(8) * part.astype(np.float32) for part in (cell % 4, cell // 4))
    gap = (cell_x - main_x[:, None]) ** 2 + (cell_y - main_y[:, None]) ** 2
    rank = dice.unit("cell", 0, 1, 16) + (gap < (main_radius[:, None] + 4) ** 2)
    order = np.argsort(rank, axis=1, kind="stable")
    jitter = dice.unit("companion jitter", -1, 1, MAX_OBJECTS, 2)
    small = dice.unit("companion radius", 2.2, 3.0, MAX_OBJECTS)
    shapes = dice.bits("companion shape", MAX_OBJECTS) % np.uint64(len(FACTORS["shape"]))
    turns = (dice.bits("companion turn", MAX_OBJECTS) % np.uint64(TURN)).astype(np.int64)
    tints = _PALETTE[(dice.bits("companion colour", MAX_OBJECTS) % np.uint64(len(_PALETTE))).astype(np.int64)]
    for k in range(1, MAX_OBJECTS):
        who = scenes[labels["count"][scenes] >= k]
        place = order[who, k - 1]
        x, y = cell_x[place] + jitter[who, k, 0], cell_y[place] + jitter[who, k, 1]
        objects[who, k] = np.stack([x, y, small[who, k]], axis=1)
        u, v = rotated(turns[who, k], x, y)
        cover = _shape_cover(shapes[who, k].astype(np.int64), u, v, small[who, k])
        mask[who] = np.maximum(mask[who], cover)
        image[who] = over(image[who], tints[who, k][:, None, None, :], cover)
    turn = labels["orientation"] * 16 + dice.pick("turn", 16) + 128 * dice.pick("flip", 2)
    u, v = rotated(turn[scenes], main_x[scenes], main_y[scenes])
    cover = _shape_cover(labels["shape"][scenes], u, v, main_radius[scenes])
    objects[scenes, 0] = np.stack([main_x, main_y, main_radius], axis=1)[scenes]
    paint = _textured(dice, "texture", labels["texture"], *rotated(turn, main_x, main_y), fine=True)
    painted = blend(light, light * dice.unit("paint", 0.3, 0.55)[:, None], paint)
    mask[scenes] = np.maximum(mask[scenes], cover)
    image[scenes] = over(image[scenes], painted[scenes], cover)


def _crescent(u: Plane, v: Plane, r: Plane) -> Plane:
    bite = np.sqrt((u - np.float32(0.6) * r) ** 2 + v * v) - np.float32(0.85) * r
    return np.maximum(np.sqrt(u * u + v * v) - r, -bite)


_f = np.float32
_DISTANCE: tuple[Callable[[Plane, Plane, Plane], Plane], ...] = (
    lambda u, v, r: np.sqrt(u * u + v * v) - _f(0.95) * r,
    lambda u, v, r: np.abs(np.sqrt(u * u + v * v) - _f(0.75) * r) - _f(0.25) * r,
    lambda u, v, r: box(u, v, _f(0.8) * r, _f(0.8) * r),
    lambda u, v, r: box(u, v, _f(1.05) * r, _f(0.32) * r),
    lambda u, v, r: np.maximum(-v, _f(0.8660254) * np.abs(u) + _f(0.5) * v) - _f(0.55) * r,
    lambda u, v, r: np.minimum(box(u, v, r, _f(0.3) * r), box(u, v, _f(0.3) * r, r)),
    lambda u, v, r: _f(0.45) * np.abs(u) + _f(0.89) * np.abs(v) - _f(0.5) * r,
    lambda u, v, r: np.maximum(np.sqrt(u * u + (v + _f(0.4) * r) ** 2) - r, -v - _f(0.4) * r),
    _crescent,
    lambda u, v, r: np.minimum(box(u + _f(0.6) * r, v, _f(0.3) * r, r), box(u, v - _f(0.7) * r, r, _f(0.3) * r)),
)
"""Signed distance to the edge in pixels, in the order of `FACTORS["shape"]`."""


def _shape_cover(shape: NDArray[Any], u: Plane, v: Plane, radius: NDArray[Any]) -> Plane:
    distance = np.empty_like(u)
    for number, function in enumerate(_DISTANCE):
        who = np.flatnonzero(shape == number)
        if len(who):
            distance[who] = function(u[who], v[who], radius[who, None, None])
    return np.clip(np.float32(0.5) - distance, 0, 1)


def _textured(dice: Dice, name: str, texture: NDArray[Any], u: Plane, v: Plane, *, fine: bool = False) -> Plane:
    """How much of the second colour each pixel takes, 0 to 1."""
    period = dice.unit(f"{name} period", *((3.5, 5.5) if fine else (5, 10)))[:, None, None]
    amount = np.zeros_like(u)
    who = np.flatnonzero(np.isin(texture, (1, 2, 3)))
    a, b = u[who] / period[who], v[who] / period[who]
    a, b = np.abs(a - np.floor(a) - _f(0.5)), np.abs(b - np.floor(b) - _f(0.5))
    sharp, kind = period[who], texture[who, None, None]
    stripe, other = (np.clip((c - _f(0.25)) * sharp + _f(0.5), 0, 1) for c in (a, b))
    dots = np.clip((_f(0.32) - np.sqrt(a * a + b * b)) * sharp + _f(0.5), 0, 1)
    checker = stripe + other - 2 * stripe * other
    amount[who] = np.where(kind == 1, stripe, np.where(kind == 2, checker, dots))
    who = np.flatnonzero(texture == 4)
    amount[who] = np.clip(u[who] / _f(16.0 if fine else 40.0) + _f(0.5), 0, 1)
    who = np.flatnonzero(texture == 5)
    amount[who] = np.clip(clouds(dice.unit(f"{name} clouds", -0.4, 1.4, 9, 9)[who]), 0, 1)
    return amount


def _prototypes() -> Float[np.ndarray, "glyph 3 3 2"]:
    """Control points of each glyph's quadratic curves, in [-1, 1]; most curves start where the last one ended."""
    dice = Dice(20_409, np.arange(GLYPHS, dtype=np.uint64), {})
    points = np.clip(dice.unit("points", -1.5, 1.5, _STROKES, 3, 2), _f(-1), _f(1))
    joined = dice.bits("joined", _STROKES) % np.uint64(4) > 0
    for k in range(1, _STROKES):
        points[:, k, 0] = np.where(joined[:, k, None], points[:, k - 1, 2], points[:, k, 0])
    return points


_PROTOTYPES = _prototypes()


def _glyph_cover(dice: Dice, glyph: NDArray[Any], who: NDArray[Any]) -> Plane:
    """Coverage of glyphs drawn as by hand: bent, slanted, stretched, turned, moved, thick or thin."""
    control = _PROTOTYPES[glyph[who]] + dice.unit("bend", -0.16, 0.16, _STROKES, 3, 2)[who]
    t = (np.arange(_POINTS, dtype=np.float32) / _f(_POINTS - 1))[:, None]
    first, second, third = (control[:, :, k, None, :] for k in range(3))
    curve = (1 - t) * ((1 - t) * first + t * second) + t * ((1 - t) * second + t * third)
    curve = curve.reshape(len(who), _STROKES * _POINTS, 2)
    slant, stretch, scale, x, y = (
        dice.unit(name, low, high)[who, None]
        for name, low, high in (
            ("slant", -0.3, 0.3), ("stretch", 0.6, 1.05), ("scale", 8.5, 13), ("glyph x", 14, 18), ("glyph y", 14, 18),
        )
    )  # fmt: skip
    turn = (dice.pick("glyph turn", 25) - 12)[who] % TURN
    across = (curve[..., 0] + slant * curve[..., 1]) * stretch * scale
    down = curve[..., 1] * scale
    cos, sin = COS[turn][:, None], SIN[turn][:, None]
    dx2 = (PIXELS - (cos * across - sin * down + x)[..., None]) ** 2
    dy2 = (PIXELS - (sin * across + cos * down + y)[..., None]) ** 2
    nearest = np.full((len(who), SIZE, SIZE), np.inf, np.float32)
    for k in range(_STROKES * _POINTS):
        np.minimum(nearest, dx2[:, k, None, :] + dy2[:, k, :, None], out=nearest)
    return np.clip(dice.unit("thickness", 0.9, 2.2)[who, None, None] + _f(0.5) - np.sqrt(nearest), 0, 1)


def _reduced(image: UInt8[np.ndarray, "n 32 32 3"], resolution: NDArray[Any]) -> Float[np.ndarray, "n 32 32 3"]:
    """Averages blocks of 2 or 4 pixels and enlarges again, linearly, for images of low resolution."""
    result = image.astype(np.float32)
    for label, factor in ((1, 2), (2, 4)):
        who = np.flatnonzero(resolution == label)
        small = image[who].reshape(len(who), SIZE // factor, factor, SIZE // factor, factor, 3).astype(np.int32)
        mean = small.sum(axis=(2, 4)).astype(np.float32) / _f(factor * factor)
        result[who] = enlarge(mean, factor)
    return result
