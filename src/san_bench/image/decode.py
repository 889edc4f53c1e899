"""Decode images of any mode to 8-bit RGB, the right way up.

Example:
    >>> dark, bright = (Image.new("I;16", (1, 1), value) for value in (257, 65535))
    >>> to_rgb(dark).getpixel((0, 0)), to_rgb(bright).getpixel((0, 0))
    ((1, 1, 1), (255, 255, 255))
    >>> to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".gif", ".avif", ".jfif", ".jp2", ".pbm", ".pnm"),
)
"""File name extensions of images, in lower case: those of torchvision's `ImageFolder`, and others that Pillow reads."""

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Errors of Pillow for an image that cannot be decoded; they differ by format."""

TOP = 65535
"""Largest value of a 16-bit image, which becomes 255."""

FAINT = 4096
"""A 16-bit image whose values all lie below this one holds 12 bits or fewer, and is almost black after scaling."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to 8-bit RGB.

    The EXIF orientation is applied. 16-bit grayscale is scaled from 0–65,535 to 0–255, and floating-point grayscale
    from 0–1; Pillow's own conversion clips both at 255. Transparent pixels are composited on white, as browsers and
    viewers show them; Pillow's own conversion shows the colour that lies below. Animations are read as their first
    frame. All other modes are converted by Pillow.

    Args:
        image: An image of any mode.

    Raises:
        ValueError: If grayscale values lie outside the range of the mode, or Pillow cannot convert the mode.
    """
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns width and height of an image after `to_rgb`, without decoding it."""
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def read_rgb(source: Path | bytes) -> Image.Image:
    """Reads and decodes an image file, or its content; see `to_rgb`.

    Raises:
        OSError: If it cannot be read; any error of `UNREADABLE` if it cannot be decoded.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return to_rgb(image)


def remark(content: bytes) -> str:
    """Decodes the content of an image file as `read_rgb` does, and says what may be wrong with its pixels.

    Returns:
        An empty string, or a remark for users.

    Raises:
        OSError: If it cannot be decoded, or another error of `UNREADABLE`.
    """
    with Image.open(io.BytesIO(content)) as image:
        to_rgb(image)
        if image.mode.startswith("I") and (top := int(np.asarray(image).max())) < FAINT:
            return f"has values up to {top:,} of {TOP:,}"
    return ""


def why(error: Exception) -> str:
    """Describes why an image cannot be decoded, and what to do about images of too many pixels."""
    text = str(error).rstrip(".") or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return f"{text}. Make the image smaller"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which the message already has
    return "cannot identify image file" if "cannot identify image file" in text else text


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return 1  # the metadata is damaged, not the pixels


def _scaled(image: Image.Image) -> Image.Image:
    """Returns 16-bit or floating-point grayscale as RGB, in which the largest possible value is 255."""
    values = np.asarray(image)
    top, kind = (1, "a floating-point") if image.mode == "F" else (TOP, "a 16-bit")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise ValueError(f"values from {low:,} to {high:,}, but {kind} image has 0 to {top:,}; convert it to 8 bits")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8)).convert("RGB")
