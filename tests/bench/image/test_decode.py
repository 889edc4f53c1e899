"""Images of every mode become the RGB pixels that a viewer shows."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from san_bench.image.decode import read_rgb, remark, to_rgb, why
from san_bench.image.splits import FileSplit, TableSplit
from san_peft.errors import SanError

WIDE = np.array([[0, 257, 1000], [32768, 65278, 65535]], np.uint16)
"""Values of 16 bits, and what they are in 8."""
NARROW = np.array([[0, 1, 4], [128, 254, 255]], np.uint8)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


def palette(*colours, **options):
    image = Image.new("P", (len(colours), 1))
    image.putpalette([value for colour in colours for value in colour])
    image.putdata(range(len(colours)))
    image.info.update(options)
    return image


def half(mode, *values):
    """One pixel of a mode, as wide as there are values."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


RED = (255, 0, 0)
MODES = {
    "L": (Image.fromarray(NARROW), grey(NARROW)),
    "1": (half("1", 0, 255), grey([[0, 255]])),
    "RGB": (half("RGB", RED, (1, 2, 3)), [[RED, (1, 2, 3)]]),
    "RGBA": (half("RGBA", (*RED, 255), (*RED, 0), (*RED, 51)), [[RED, (255, 255, 255), (255, 204, 204)]]),
    "LA": (half("LA", (0, 255), (0, 0), (0, 51)), grey([[0, 255, 204]])),
    "P": (palette(RED, (1, 2, 3)), [[RED, (1, 2, 3)]]),
    "P with a transparent colour": (palette(RED, (1, 2, 3), transparency=0), [[(255, 255, 255), (1, 2, 3)]]),
    "CMYK": (half("CMYK", (0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)), [[(255, 255, 255), RED, (0, 0, 0)]]),
    "YCbCr": (half("YCbCr", (128, 128, 128)), grey([[128]])),
    "I;16": (Image.fromarray(WIDE), grey(NARROW)),
    "I": (Image.fromarray(WIDE.astype(np.int32)), grey(NARROW)),
    "F": (Image.fromarray((NARROW / 255).astype(np.float32)), grey(NARROW)),
}


@pytest.mark.parametrize("mode", MODES)
def test_pixels_of_every_mode(mode):
    image, expected = MODES[mode]
    assert image.mode == mode.partition(" ")[0]
    np.testing.assert_array_equal(pixels(to_rgb(image)), np.asarray(expected, np.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_sixteen_bits_survive_a_file(tmp_path, name):
    Image.fromarray(WIDE).save(tmp_path / name)
    np.testing.assert_array_equal(pixels(read_rgb(tmp_path / name)), grey(NARROW))


def test_sixteen_bits_in_the_other_order_of_bytes(tmp_path):
    Image.frombytes("I;16B", (3, 2), WIDE.astype(">u2").tobytes()).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(pixels(read_rgb(tmp_path / "a.tiff")), grey(NARROW))


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        (np.array([[-1, 5]], np.int32), ("-1", "5")),
        (np.array([[0, 70_000]], np.int32), ("70,000", "65,535")),
        (np.array([[0, 2.5]], np.float32), ("2.5", "1")),
        (np.array([[0, np.nan]], np.float32), ("nan",)),
    ],
)
def test_values_outside_the_range_are_refused_and_not_clipped(values, numbers):
    with pytest.raises(ValueError, match="values from") as caught:
        to_rgb(Image.fromarray(values))
    assert all(number in str(caught.value) for number in numbers)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((2, 3, 3), np.uint8)
    upright[0, 0], upright[1, 2] = RED, (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(pixels(read_rgb(tmp_path / "a.png")), upright)


def test_damaged_metadata_is_not_a_damaged_image(tmp_path):
    image = Image.new("RGB", (2, 2), RED)
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x05\xff\xff\xff\xff" * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_rgb(tmp_path / "a.jpg").size == (2, 2)


@pytest.mark.parametrize("format_", ["gif", "webp", "png", "tiff"])
def test_animations_are_their_first_frame(tmp_path, format_):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{format_}", save_all=True, append_images=frames[1:], **{"lossless": True})
    assert read_rgb(tmp_path / f"a.{format_}").getpixel((1, 1)) == RED


def test_a_decompression_bomb_is_a_clear_error(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SanError, match=r"big\.png .*1200 pixels.* smaller"):
        FileSplit(tmp_path, ["big.png"], np.zeros(1, np.int64)).image(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": (tmp_path / "big.png").read_bytes(), "path": None}], "label": [0]}
    table = datasets.Dataset.from_dict(rows, features=features)
    with pytest.raises(SanError, match=r"Row 0 .*1200 pixels"):
        TableSplit(table, "image", np.zeros(1, np.int64)).image(0)


def test_rows_of_tables_are_decoded_alike():
    image = io.BytesIO()
    Image.fromarray(WIDE).save(image, "png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": image.getvalue(), "path": None}], "label": [0]}
    split = TableSplit(datasets.Dataset.from_dict(rows, features=features), "image", np.zeros(1, np.int64))
    np.testing.assert_array_equal(pixels(split.image(0)), grey(NARROW))


def test_twelve_bits_in_a_file_of_sixteen_are_remarked_on():
    said = []
    for top in (4095, 65535):
        file = io.BytesIO()
        Image.fromarray(np.array([[0, top]], np.uint16)).save(file, "png")
        said.append(remark(file.getvalue()))
    assert "4,095" in said[0]
    assert said[1] == ""


def test_reasons_name_no_object_of_python(tmp_path):
    with pytest.raises(OSError, match="identify") as caught:
        remark(b"nothing")
    assert why(caught.value) == "cannot identify image file"
    with pytest.raises(OSError) as caught:  # noqa: PT011
        read_rgb(Path(tmp_path) / "nowhere.png")
    assert str(tmp_path) not in why(caught.value)
