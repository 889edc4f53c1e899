"""Drawing primitives for synthetic images: random numbers by (seed, index, name), pixel planes, paint.

Random numbers are a hash of (seed, index, factor name), so they do not depend on the batch, the numpy version, or
factors added later. Geometry uses only element-wise IEEE float32 arithmetic on a rounded table of angles, which gives
the same bytes on every platform. Reductions, `sin`, `exp` and the like would not.

Example:
    >>> dice = Dice(seed=7, index=np.arange(3, dtype=np.uint64))
    >>> dice.pick("colour", 4).tolist(), Dice(seed=7, index=np.array([2], np.uint64)).pick("colour", 4).tolist()
    ([1, 2, 1], [1])
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8, UInt64
from numpy.typing import NDArray

SIZE = 32
"""Height and width of an image in pixels."""

TURN = 256
"""Number of angles in a circle; angles are integers, clockwise on the screen."""

_ANGLES = np.arange(TURN) * (2 * np.pi / TURN)
COS = (np.round(np.cos(_ANGLES) * 2**14) / 2**14).astype(np.float32)
"""Cosine of every angle."""
SIN = (np.round(np.sin(_ANGLES) * 2**14) / 2**14).astype(np.float32)
"""Sine of every angle."""
PIXELS = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
"""Pixel centers along an axis."""

Plane = Float[np.ndarray, "n 32 32"]
Paint = Float[np.ndarray, "n 32 32 3"]

_f = np.float32


def _mix(z: UInt64[np.ndarray, ...]) -> UInt64[np.ndarray, ...]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Dice:
    """Random numbers for a batch of images, from (seed, index, name) only.

    Args:
        seed: Seed of the images, 0 or more.
        index: Index of each image.
        fixed: Factors for which `pick` always returns the given class.
    """

    def __init__(self, seed: int, index: UInt64[np.ndarray, " n"], fixed: Mapping[str, int] | None = None) -> None:
        golden = np.uint64(0x9E3779B97F4A7C15)
        self.n, self.fixed = len(index), fixed or {}
        self.state = _mix(_mix(np.full(1, seed, dtype=np.uint64) * golden + np.uint64(1)) + index * golden)

    def bits(self, name: str, *shape: int) -> UInt64[np.ndarray, "n ..."]:
        """Returns 64 random bits per image and element of `shape`."""
        stream = np.arange(int(np.prod(shape)), dtype=np.uint64) + (
            np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
        )
        return _mix(self.state[:, None] ^ _mix(stream)).reshape(self.n, *shape)

    def pick(self, name: str, classes: int, *shape: int) -> Int64[np.ndarray, "n ..."]:
        """Returns a random class per image and element of `shape`, or the fixed one."""
        if name in self.fixed:
            return np.full((self.n, *shape), self.fixed[name], dtype=np.int64)
        return (((self.bits(name, *shape) >> np.uint64(32)) * np.uint64(classes)) >> np.uint64(32)).astype(np.int64)

    def unit(self, name: str, low: float, high: float, *shape: int) -> Float[np.ndarray, "n ..."]:
        """Returns uniform random numbers from `low` to `high` per image and element of `shape`."""
        value = (self.bits(name, *shape) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
        return np.float32(low) + np.float32(high - low) * value


def rotated(turn: NDArray[Any], x: Any = SIZE / 2, y: Any = SIZE / 2) -> tuple[Plane, Plane]:
    """Returns the pixel coordinates in a rotated frame with origin (x, y).

    Args:
        turn: Angle of each frame.
        x: Horizontal origin in pixels, one for all images or one each.
        y: Vertical origin in pixels, downwards.

    Returns:
        Both coordinates of each pixel.
    """
    cos, sin = COS[turn % TURN][:, None, None], SIN[turn % TURN][:, None, None]
    across = (PIXELS[None, :] - np.broadcast_to(_f(x), turn.shape)[:, None])[:, None, :]
    down = (PIXELS[None, :] - np.broadcast_to(_f(y), turn.shape)[:, None])[:, :, None]
    return cos * across + sin * down, cos * down - sin * across


def box(u: Plane, v: Plane, width: Any, height: Any) -> Plane:
    """Returns the signed distance to the edge of a box of half `width` and half `height` around the origin."""
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


def disc(u: Plane, v: Plane, radius: Any) -> Plane:
    """Returns the signed distance to the edge of a disc around the origin."""
    return np.sqrt(u * u + v * v) - radius


def cover(distance: Plane) -> Plane:
    """Returns the coverage of each pixel, 0 to 1, from the signed distance to an edge in pixels."""
    return np.clip(_f(0.5) - distance, 0, 1)


def clouds(grid: Float[np.ndarray, "n rows rows"]) -> Plane:
    """Interpolates a grid bilinearly to planes; the number of cells is a power of two."""
    cells = grid.shape[1] - 1
    place = np.arange(SIZE) * cells // SIZE
    share = (np.arange(SIZE) * cells % SIZE).astype(np.float32) / _f(SIZE)
    rows = grid[:, place] * (1 - share)[None, :, None] + grid[:, place + 1] * share[None, :, None]
    return rows[:, :, place] * (1 - share) + rows[:, :, place + 1] * share


def blend(one: NDArray[Any], other: NDArray[Any], amount: Plane) -> Paint:
    """Blends colour `one`, where `amount` is 0, into colour `other`, where it is 1."""
    return one[:, None, None, :] + (other - one)[:, None, None, :] * amount[..., None]


def over(image: NDArray[Any], colour: NDArray[Any], covered: Plane) -> Paint:
    """Composites paint, or a colour of shape (n, 1, 1, 3), over an image where `covered` is 1."""
    return image + (colour - image) * covered[..., None]


def grain(dice: Dice, image: NDArray[Any], level: Float[np.ndarray, " n"]) -> Paint:
    """Adds noise of up to `level` times 127.5 to every channel."""
    noise = dice.bits("noise", SIZE * SIZE).astype("<u8").view(np.uint8).reshape(dice.n, SIZE, SIZE, 8)[..., :3]
    return image + (noise.astype(np.float32) - _f(127.5)) * level[:, None, None, None]


def to_bytes(image: NDArray[Any]) -> UInt8[np.ndarray, ...]:
    """Converts an image to uint8."""
    return np.floor(np.clip(image, 0, 255) + _f(0.5)).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Drawing:
    """Finished images with their ground truth.

    Attributes:
        images: RGB images.
        facts: Parameters of the drawing by name, one row per image.
    """

    images: UInt8[np.ndarray, "n 32 32 3"]
    facts: dict[str, NDArray[Any]]


def finish(dice: Dice, image: Paint, facts: dict[str, NDArray[Any]]) -> Drawing:
    """Adds light noise and returns the drawing."""
    return Drawing(to_bytes(grain(dice, image, dice.unit("noise level", 0.02, 0.16))), facts)


def enlarge(image: Float[np.ndarray, "n h w c"], factor: int) -> Float[np.ndarray, "n H W c"]:
    """Upsamples images by an integer factor, bilinearly, with the border repeated.

    Args:
        image: Images, channels last.
        factor: Power of two, so that all weights are exact in float32.

    Returns:
        The upsampled images.
    """
    for axis in (1, 2):
        size = image.shape[axis]
        centre = (np.arange(size * factor, dtype=np.float32) + _f(0.5)) / _f(factor) - _f(0.5)
        low = np.floor(centre)
        share = (centre - low).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        low = low.astype(np.int64)
        one, other = (image.take(np.clip(low + k, 0, size - 1), axis=axis) for k in (0, 1))
        image = one * (1 - share) + other * share
    return image
