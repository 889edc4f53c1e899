"""Specialised tasks of mini-vision: blood cells under a microscope, land from above, calls in a spectrogram.

Every function draws the images of a batch from its dice and their labels, and returns the numbers that it drew them by.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from san_bench.image.mini.canvas import (
    PIXELS,
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

FINDINGS = ("normal", "sickles", "parasites", "spurs", "targets", "leucocyte")
"""The classes of `cells`."""

LAND = ("fields", "pivots", "orchard", "forest", "houses", "factory", "river", "motorway")
"""The classes of `land`."""

CALLS = ("tone", "rise", "fall", "hump", "trill", "pulses", "harmonics", "burst")
"""The classes of `calls`."""


def cells(dice: Dice, label: Int64[np.ndarray, " n"]) -> Drawing:
    """Draws a smear of red blood cells; in all classes of `FINDINGS` but the first, some show the finding."""
    plasma = dice.unit("plasma", 185, 245, 3)
    stain = dice.unit("stain", 0.45, 0.8)[:, None] * np.array([1.0, 0.62, 0.72], _f) * plasma
    purple = stain * np.array([0.5, 0.3, 0.75], _f)
    image = blend(plasma, plasma * _f(0.92), clouds(dice.unit("haze", 0, 1, 5, 5)))
    place = np.argsort(dice.unit("order", 0, 1, 4), axis=1, kind="stable")
    total, ill = 3 + dice.pick("total", 2), 2 + dice.pick("ill", 2)
    ill = np.where(label == 0, 0, np.where(label == 5, 1, np.minimum(ill, total - 1)))
    jitter, radius = dice.unit("jitter", -1.2, 1.2, 4, 2), dice.unit("radius", 5.5, 7, 4)
    turn, depth = dice.pick("turn", TURN, 4), dice.unit("depth", 0.85, 1.1, 4)
    for k in range(4):
        who = np.flatnonzero(total > k)
        x, y = (_f(8) + _f(16) * part[who, k].astype(_f) for part in (place % 2, place // 2))
        u, v = rotated(turn[who, k], x + jitter[who, k, 0], y + jitter[who, k, 1])
        r = radius[who, k, None, None]
        kind = np.where(ill[who] > k, label[who], 0)[:, None, None]
        body, pale, dark = _cell(kind, u, v, r)
        colour = (stain[who] * depth[who, k, None])[:, None, None, :]
        lit = colour + (plasma[who][:, None, None, :] - colour) * (_f(0.55) * pale)[..., None]
        image[who] = over(over(image[who], lit, body), purple[who][:, None, None, :], dark)
    return finish(dice, image, {"ill": ill, "total": total})


def _cell(kind: NDArray[Any], u: Plane, v: Plane, r: NDArray[Any]) -> tuple[Plane, Plane, Plane]:
    """How much of each pixel is inside a cell, how pale it is there, and how dark."""
    away = np.sqrt(u * u + v * v)
    round_ = away - r
    sickle = np.maximum(disc(u, v, r * _f(1.15)), -disc(u - _f(0.75) * r, v, r * _f(1.05)))
    spurs = np.minimum(
        np.minimum(box(u, v, r, r * _f(0.28)), box(u, v, r * _f(0.28), r)),
        np.minimum(
            np.maximum(np.abs(u + v) - r * _f(1.414), np.abs(u - v) - r * _f(0.4)) * _f(0.7071),
            np.maximum(np.abs(u - v) - r * _f(1.414), np.abs(u + v) - r * _f(0.4)) * _f(0.7071),
        ),
    )
    spurs = np.minimum(spurs, away - _f(0.6) * r)
    body = cover(np.where(kind == 1, sickle, np.where(kind == 3, spurs, round_)))
    hollow = np.clip(_f(1) - away / (_f(0.6) * r), 0, 1)
    target = np.clip(_f(1) - np.abs(away / r - _f(0.55)) * _f(4.5), 0, 1) * _f(1.6)
    pale = np.where((kind == 1) | (kind == 3), 0, np.where(kind == 4, target, hollow))
    parasite = disc(u - _f(0.42) * r, v, _f(0.24) * r)
    nucleus = np.minimum(disc(u - _f(0.3) * r, v, _f(0.5) * r), disc(u + _f(0.35) * r, v, _f(0.45) * r))
    none = np.full_like(u, 9)
    return body, pale, cover(np.where(kind == 2, parasite, np.where(kind == 5, nucleus, none)))


def land(dice: Dice, label: Int64[np.ndarray, " n"]) -> Drawing:
    """Draws a plot of land from above in one of the uses of `LAND`, amid another; false colours tell nothing."""
    soil, green, water = dice.unit("soil", 100, 200, 3), dice.unit("green", 20, 110, 3), dice.unit("water", 0, 60, 3)
    grey = dice.unit("grey", 150, 250, 1) * np.ones(3, _f) + dice.unit("tint", -18, 18, 3)
    image = blend(soil, green, clouds(dice.unit("patches", 0, 0.6, 5, 5)))
    image *= clouds(dice.unit("rough", 0.85, 1.15, 17, 17))[..., None]
    turn = dice.pick("turn", TURN)
    x, y = dice.unit("x", 11, 21), dice.unit("y", 11, 21)
    u, v = rotated(turn, x, y)
    bent = v + _f(4) * clouds(dice.unit("bend", -1, 1, 5, 5))
    colours = {"soil": soil, "green": green, "grey": grey, "water": water}
    around = (label + 1 + dice.pick("around", len(LAND) - 1)) % len(LAND)
    layers = []
    for use in (around, label):
        layer = image.copy()
        for number, name in enumerate(LAND):
            who = np.flatnonzero(use == number)
            chosen = {part: colour[who] for part, colour in colours.items()}
            layer[who] = _use(name, dice, who, image[who], u[who], v[who], bent[who], chosen)
        layers.append(layer)
    a, b = rotated(dice.pick("plot turn", TURN), dice.unit("plot x", 15, 17), dice.unit("plot y", 15, 17))
    plot = cover(box(a, b, *(dice.unit(f"plot {side}", 11.5, 13.5)[:, None, None] for side in ("width", "height"))))
    return finish(dice, over(layers[0], layers[1], plot), {"water": water, "plot": plot})


def _use(
    name: str, dice: Dice, who: NDArray[Any], image: Paint, u: Plane, v: Plane, bent: Plane, colours: dict[str, Any]
) -> Paint:
    """Lays a use of the land over its ground."""
    size = dice.unit("size", 0, 1)[who, None, None]
    green, grey, water = (colours[part][:, None, None, :] for part in ("green", "grey", "water"))
    if name == "fields":
        wide, high = _f(7) + _f(4) * size, _f(9) - _f(3) * size
        column, row = np.floor(u / wide), np.floor(v / high)
        tone = _lottery(dice, who, column, row)
        furrow = np.where(tone > 0.5, _tooth(u / _f(2.6)), _tooth(v / _f(2.6)))
        mixed = colours["soil"][:, None, None, :] * (1 - tone[..., None]) + green * tone[..., None]
        return mixed * (_f(0.9) + _f(0.35) * furrow)[..., None]
    if name == "pivots":
        step = _f(11) + _f(4) * size
        a, b = _within(u, step), _within(v, step)
        tone = _lottery(dice, who, np.floor(u / step), np.floor(v / step))[..., None]
        return over(image, green * (_f(0.6) + _f(1.2) * tone), cover(disc(a, b, _f(0.43) * step)))
    if name == "orchard":
        step = _f(4) + _f(1.5) * size
        return over(image, green * _f(0.55), cover(disc(_within(u, step), _within(v, step), _f(0.33) * step)))
    if name == "forest":
        crowns = clouds(dice.unit("crowns", 0.35, 1.25, 17, 17)[who])
        return green * crowns[..., None] * _f(0.8)
    if name in ("houses", "factory"):
        step = (_f(6) if name == "houses" else _f(16)) + _f(2) * size
        a, b = _within(u, step), _within(v, step)
        column, row = np.floor(u / step), np.floor(v / step)
        tone = _lottery(dice, who, column, row)
        built = box(a, b, step * (_f(0.22) + _f(0.12) * tone), step * (_f(0.36) - _f(0.12) * tone))
        roof = np.where(
            _lottery(dice, who, row + _f(3), column)[..., None] > 0.5, grey, grey * np.array([0.8, 0.5, 0.42], _f)
        )
        shadow = box(a - _f(0.9), b - _f(0.9), step * (_f(0.22) + _f(0.12) * tone), step * (_f(0.36) - _f(0.12) * tone))
        image = over(
            over(image, image * _f(0.5), cover(shadow)), roof * (_f(0.8) + _f(0.25) * (a > 0))[..., None], cover(built)
        )
        return image
    if name == "river":
        shore = np.abs(bent) - (_f(2) + _f(3) * size)
        return over(over(image, green * _f(0.6), cover(shore - _f(1.5))), water, cover(shore))
    lane = np.abs(v) - (_f(2.2) + _f(1.2) * size)
    dashes = cover(np.maximum(np.abs(v) - _f(0.1), np.abs(_within(u, _f(5))) - _f(1.3)))
    image = over(image, grey * _f(0.55), cover(lane))
    return over(image, np.broadcast_to(_f(240), image.shape), dashes)


def calls(dice: Dice, label: Int64[np.ndarray, " n"]) -> Drawing:
    """Draws the spectrogram of one of `CALLS`, time to the right and pitch upwards, with hum and hiss."""
    time = np.broadcast_to(PIXELS[None, None, :], (dice.n, SIZE, SIZE))
    pitch = np.broadcast_to(_f(SIZE) - PIXELS[None, :, None], (dice.n, SIZE, SIZE))
    begin, long = dice.unit("begin", 2, 9), dice.unit("long", 16, 21)
    base, span = dice.unit("base", 5, 13), dice.unit("span", 8, 14)
    width = dice.unit("width", 0.9, 1.7)
    begin, long, base, span, width = (part[:, None, None] for part in (begin, long, base, span, width))
    share = np.clip((time - begin) / long, 0, 1)
    steps = _f(3) + dice.pick("steps", 3)[:, None, None].astype(_f)
    middle = base + _f(0.5) * span
    track = np.select(
        [label[:, None, None] == n for n in (0, 1, 2, 3, 4)],
        [middle, base + span * share, base + span * (1 - share), base + span * (1 - np.abs(2 * share - 1)),
         base + span * _tooth(share * steps)],
        middle,
    )  # fmt: skip
    thickness = width * np.where(label[:, None, None] == 4, _f(1.7), _f(1))
    loud = np.clip(_f(1) - np.abs(pitch - track) / (_f(2) * thickness), 0, 1)
    band = np.clip((span * _f(0.6) - np.abs(pitch - middle)) / _f(2), 0, 1)
    pulses = band * (_tooth(share * (steps + 1)) > 0.5)
    ladder = np.clip(_f(1) - _f(3) * np.abs(_within(pitch - base, _f(4.5))) / _f(4.5), 0, 1) * band
    burst = band * clouds(dice.unit("burst", 0.1, 1.1, 17, 17))
    for number, sound in ((5, pulses), (6, ladder), (7, burst)):
        loud = np.where(label[:, None, None] == number, sound, loud)
    sounding = np.clip(np.minimum(time - begin, begin + long - time) + _f(0.5), 0, 1)
    hum = dice.unit("hum", 2, 30)[:, None, None]
    hum = _f(0.5) * np.clip(_f(1) - np.abs(pitch - hum), 0, 1)
    hiss = clouds(dice.unit("hiss", 0, 0.4, 17, 17))
    power = np.clip(np.maximum(loud * sounding * dice.unit("loud", 0.5, 1)[:, None, None], hum) + hiss, 0, 1)
    low, high = dice.unit("low", 0, 90, 3), dice.unit("high", 150, 255, 3)
    return finish(dice, blend(low, high, power), {"loud": loud * sounding})


def _lottery(dice: Dice, who: NDArray[Any], column: Plane, row: Plane) -> Plane:
    """A number from 0 to 1 for each field of a grid, the same in all its pixels."""
    tickets = dice.unit("tickets", 0, 1, 61)[who]
    number = (column * _f(7) + row * _f(3)).astype(np.int64) % 61
    return np.take_along_axis(tickets, number.reshape(len(who), SIZE * SIZE), axis=1).reshape(number.shape)


def _within(value: Plane, step: Any) -> Plane:
    """How far a pixel is from the middle of the step that it is in."""
    return value - (np.floor(value / step) + _f(0.5)) * step


def _tooth(value: Plane) -> Plane:
    """A line that falls from 1 at whole numbers to 0 between them, and rises again."""
    return np.abs(value - np.floor(value) - _f(0.5)) * _f(2)
