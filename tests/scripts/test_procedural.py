"""The drawn images: the same bytes everywhere, and labels that say what is there."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from generators.procedural import _PROTOTYPES, FACTORS, GLYPHS, MAX_OBJECTS, draw
from san_peft.errors import SanError


def test_the_same_bytes_on_every_platform():
    batch = draw(200, seed=3)
    digest = hashlib.sha256(batch.images.tobytes() + batch.mask.tobytes())
    for name in sorted(batch.labels):
        digest.update(batch.labels[name].astype("<i8").tobytes())
    assert digest.hexdigest() == "20bf6f12f16b39eb1f906d1ae8bf8d9f495f44c398357d9995fa9af3c48a2c48"


def test_an_image_does_not_depend_on_its_batch():
    whole, part = draw(300, seed=5), draw(20, seed=5, start=120)
    assert np.array_equal(whole.images[120:140], part.images)
    assert np.array_equal(whole.objects[120:140], part.objects)
    assert all(np.array_equal(whole.labels[name][120:140], part.labels[name]) for name in FACTORS)


def test_seeds_differ():
    assert not np.array_equal(draw(2, seed=0).images, draw(2, seed=1).images)


def test_every_class_of_every_label_occurs_and_none_besides():
    labels = draw(3000, seed=0).labels
    for name, classes in FACTORS.items():
        seen = set(labels[name].tolist()) - {-1}
        assert seen == set(range(len(classes))), name


def test_count_is_the_number_of_objects_and_position_the_cell_of_the_largest():
    batch = draw(400, seed=1, kind="scene")
    present = batch.objects[..., 2] > 0
    assert np.array_equal(present.sum(1), batch.labels["count"] + 1)
    assert (batch.objects[:, :1, 2] > batch.objects[:, 1:, 2]).all()
    for axis, name in enumerate("xy"):
        assert np.array_equal((batch.objects[:, 0, axis] - 7) // 4.5, batch.labels[name])


def test_objects_are_apart_so_that_they_can_be_counted():
    objects = draw(300, seed=2, kind="scene", objects=MAX_OBJECTS).objects
    for k in range(1, MAX_OBJECTS):
        distance = np.hypot(*(objects[:, k, :2] - objects[:, 0, :2]).T)
        assert (distance > objects[:, 0, 2] + 2).all()


def test_the_mask_covers_the_object_and_has_its_colour():
    batch = draw(60, seed=0, kind="scene", shape=0, colour=0, texture=0, objects=1, resolution=0)
    for image, mask, (x, y, _) in zip(batch.images, batch.mask, batch.objects[:, 0], strict=True):
        assert mask[int(y), int(x)] == 255
        red, green, blue = image[mask == 255].mean(0)
        assert red > 1.5 * max(green, blue)


def test_what_does_not_apply_is_minus_one():
    scene, glyph = draw(100, seed=0, kind="scene").labels, draw(100, seed=0, kind="glyph").labels
    assert (scene["glyph"] == -1).all()
    assert (scene["shape"] >= 0).all()
    assert all((glyph[name] == -1).all() for name in ("shape", "texture", "count", "x", "y", "size", "orientation"))
    disc = draw(20, seed=0, kind="scene", shape=0).labels
    assert (disc["orientation"] == -1).all()


def test_glyph_prototypes_differ():
    flat = _PROTOTYPES.reshape(GLYPHS, -1)
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + 9 * np.eye(GLYPHS)
    assert distance.min() > 0.5


def test_an_object_is_never_the_colour_of_its_background():
    labels = draw(500, seed=0).labels
    assert (labels["colour"] != labels["background_colour"]).all()


def test_an_empty_batch_has_the_right_shapes():
    batch = draw(0, seed=0)
    assert batch.images.shape == (0, 32, 32, 3)
    assert batch.labels["count"].shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": -1, "seed": 0}, "count, seed and start must be 0 or more, but they are -1, 0 and 0"),
        ({"count": 1, "seed": 0, "kind": "photo"}, "kind 'photo' does not exist. Choose from mixed, scene, glyph"),
        ({"count": 1, "seed": 0, "shap": 1}, "Factor 'shap' does not exist. Choose from background"),
        ({"count": 1, "seed": 0, "shape": 10}, "Factor 'shape' has 10 classes, so class 10 does not exist"),
        ({"count": 1, "seed": 0, "objects": 6}, "objects must be 1 to 5, but it is 6"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(SanError, match=words):
        draw(**arguments)
