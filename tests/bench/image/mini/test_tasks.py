"""The tasks of mini-vision: the same bytes everywhere, balanced, apart, and labels that say what is there."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from san_bench.image.digits import load_digits_task
from san_bench.image.mini import tasks as mini
from san_bench.image.mini.natural import FLOWERS, TEXTURES
from san_bench.image.mini.specialised import CALLS, FINDINGS, LAND
from san_bench.image.mini.structured import NEAR
from san_bench.image.mini.tasks import TASKS, draw_images, load
from san_bench.image.tasks import load_task
from san_peft.errors import SanError

FINGERPRINTS: dict[str, str] = {
    "digits": "d9d28167fc7cc0d86179b981711a455b775e37a5ed21d3216626fb833b53498f",
    "textures": "588b00c7906b87f0bb3b52edda48a849ff63206798ddc4255fb3f13aa64cc000",
    "flowers": "fc34d11bb89350f059fadbe61821f52304e6c74782fed7de7b404cca4d554bbc",
    "cells": "13e59206a611ff940239db102909c8781336a65e3208fb85b5eb8fbcc1019afd",
    "land": "954207e8c0d427d1b3cb2610d29669b381e2c97d32c75e15eb32662ecafe909d",
    "calls": "6d9fbeaa24a145d8bbf325935b1e3622ab7430004f8e472e317b657562f993e0",
    "count": "eaf3a59b3b3b78cf4ddb9b34d2ce92de5190847477009d3df17f594f4dec20bd",
    "distance": "6bb27d54d6336fe97a9db972e91e91c72bf23217009bc520eb31688d280d1915",
    "location": "d04e865ca0c5ff2499b9375b24cf476db38693a6168b789277642a3c4dc80ec4",
    "orientation": "96d372a8b268ecc139210767176c725129fbe33ce33e8beef2304a9bf26c4949",
    "azimuth": "88166e6cdc4a03e5a12a915710a6c53075f0834a82cc2068438cc66c8921f227",
}
INDEX = np.arange(480)


@pytest.fixture(params=TASKS)
def name(request):
    return request.param


def test_the_same_bytes_on_every_platform(name):
    assert load(name).fingerprint == FINGERPRINTS[name]


def test_an_image_does_not_depend_on_its_batch(name):
    few, many = draw_images(name, np.array([250, 3, 131]))[0], draw_images(name, np.arange(260))[0]
    assert np.array_equal(few.images, many.images[[250, 3, 131]])
    assert all(np.array_equal(few.facts[key], many.facts[key][[250, 3, 131]]) for key in few.facts)


def test_splits_have_their_sizes_and_no_image_twice(name):
    task = load(name)
    sizes = {split: len(task[split]) for split in task.splits}
    assert sizes == {"train800": 800, "val200": 200, "train800val200": 1000, "test": 797 if name == "digits" else 1000}
    both = [image.tobytes() for split in ("train800", "val200") for image in task[split].images]
    assert [image.tobytes() for image in task["train800val200"].images] == both
    test = [image.tobytes() for image in task["test"].images]
    assert len(set(both + test)) == len(both) + len(test)


def test_classes_are_balanced_and_all_there(name):
    task = load(name)
    assert 4 <= task.num_classes == len(TASKS[name].classes) <= 16
    for split in task.splits.values():
        sizes = np.bincount(split.labels, minlength=task.num_classes)
        assert sizes.max() - sizes.min() <= (1 if name != "digits" else 5)


def test_images_use_the_range_and_differ_in_brightness(name):
    images = load(name)["train800"].images
    assert images.dtype == np.uint8
    assert images.shape[1:] == (32, 32, 3)
    assert images.min() < 20
    assert images.max() > 235
    assert images.std(axis=(1, 2, 3)).min() > 4


def test_the_three_groups_of_vtab_are_there():
    groups = [task.group for task in TASKS.values()]
    assert {group: groups.count(group) >= 2 for group in groups} == dict.fromkeys(
        ("natural", "specialised", "structured"), True
    )
    assert len({task.seed for task in TASKS.values()}) == len(TASKS)


def test_tasks_load_by_their_full_name_and_once():
    assert load_task("mini-vision/count") is load("count")
    assert load("count").name == "mini-vision/count"
    with pytest.raises(SanError, match=r"no task 'cuont'\. Did you mean 'mini-vision/count'"):
        load_task("mini-vision/cuont")


def test_digits_are_the_scans_in_the_order_of_their_splits():
    plain = load_digits_task()
    for split in ("train800", "val200", "test"):
        assert np.array_equal(load("digits")[split].labels, plain[split].labels)
    ink = draw_images("digits", np.arange(200))[0].facts["ink"].mean(axis=(1, 2))
    scans = plain["train800"].images[:200, ..., 0].mean(axis=(1, 2))
    assert np.corrcoef(ink, scans)[0, 1] > 0.4  # a scan with more ink gives a drawing with more


def test_textures_with_a_direction_have_one():
    drawing, labels = draw_images("textures", INDEX)
    down, across = np.gradient(drawing.facts["amount"], axis=(1, 2))
    xx, yy, xy = ((a * b).mean(axis=(1, 2)) for a, b in ((across, across), (down, down), (across, down)))
    coherence = np.hypot(xx - yy, 2 * xy) / (xx + yy)
    median = {texture: np.median(coherence[labels == n]) for n, texture in enumerate(TEXTURES)}
    assert min(median["bricks"], median["zigzag"], median["marble"]) > max(median["net"], median["pebbles"])


def test_flowers_have_as_many_petals_as_their_species():
    drawing, labels = draw_images("flowers", INDEX)
    bloom, centre, radius = (drawing.facts[key] for key in ("bloom", "centre", "radius"))
    angle = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    around = centre[:, None, :] + 0.75 * radius[:, None, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    column, row = np.clip(around, 0, 31).astype(int).transpose(2, 0, 1)
    petal = bloom[np.arange(len(labels))[:, None], row, column] > 0.5
    entered = (petal & ~np.roll(petal, 1, axis=1)).sum(axis=1)  # how often a walk around the flower meets a petal
    for species, (petals, *_) in enumerate(FLOWERS.values()):
        assert np.median(entered[labels == species]) == petals


def test_cells_are_ill_in_all_classes_but_the_first_and_dark_where_something_is_in_them():
    drawing, labels = draw_images("cells", INDEX)
    ill, total = drawing.facts["ill"], drawing.facts["total"]
    assert np.array_equal(ill == 0, labels == FINDINGS.index("normal"))
    assert (ill[labels == FINDINGS.index("leucocyte")] == 1).all()
    assert (ill < total).all()
    grey = drawing.images.mean(axis=3).reshape(len(labels), -1)
    dark = np.median(grey, axis=1) - np.quantile(grey, 0.01, axis=1)
    inside = np.isin(labels, [FINDINGS.index("parasites"), FINDINGS.index("leucocyte")])
    assert np.median(dark[inside]) > 1.1 * np.median(dark[~inside])


def test_only_a_plot_with_a_river_is_of_water():
    drawing, labels = draw_images("land", INDEX)
    away = np.abs(drawing.images - drawing.facts["water"][:, None, None, :]).max(axis=3)
    plot = drawing.facts["plot"] > 0.5
    share = ((away < 30) & plot).sum(axis=(1, 2)) / plot.sum(axis=(1, 2))
    assert np.median(share[labels == LAND.index("river")]) > 0.3
    assert np.median(share[labels != LAND.index("river")]) < 0.05


def test_calls_rise_and_fall_as_they_are_named():
    drawing, labels = draw_images("calls", INDEX)
    power = drawing.facts["loud"]
    pitch = 32 - np.arange(32)[None, :, None]
    heard = power.sum(axis=1) > 0.5
    track = (power * pitch).sum(axis=1) / np.maximum(power.sum(axis=1), 1e-6)
    slope = np.array([np.polyfit(np.flatnonzero(h), t[h], 1)[0] for h, t in zip(heard, track, strict=True)])
    assert (slope[labels == CALLS.index("rise")] > 0.2).all()
    assert (slope[labels == CALLS.index("fall")] < -0.2).all()
    assert np.abs(slope[labels == CALLS.index("tone")]).max() < 0.1
    silent = np.array([(~h[np.flatnonzero(h)[0] : np.flatnonzero(h)[-1]]).any() for h in heard])
    assert silent[labels == CALLS.index("pulses")].all()
    assert not silent[labels == CALLS.index("hump")].any()


def test_count_is_the_number_of_separate_pills():
    drawing, labels = draw_images("count", INDEX)
    found = [ndimage.label(mask > 0.5)[1] for mask in drawing.facts["mask"]]
    assert np.array_equal(found, labels + 2)


def test_distance_is_the_depth_of_the_boulder_whose_foot_is_lowest():
    drawing, labels = draw_images("distance", INDEX)
    gap = drawing.facts["foot"] - drawing.facts["horizon"][:, None]
    assert np.array_equal(np.digitize(16 / gap.max(axis=1), NEAR) - 1, labels)
    assert drawing.facts["foot"].max() < 32


def test_location_is_where_the_middle_is_empty():
    drawing, labels = draw_images("location", INDEX)
    mask = drawing.facts["mask"]
    found = [
        [c for c in range(9) if mask[i, *at(centre[c])] < 0.5 < mask[i].max() and filled(mask[i], centre[c])]
        for i, centre in enumerate(drawing.facts["centre"])
    ]
    assert found == [[label] for label in labels]


def at(centre):
    return int(centre[1]), int(centre[0])


def filled(mask, centre):
    """Whether there is anything in a cell."""
    row, column = at(centre)
    return mask[row - 3 : row + 4, column - 3 : column + 4].max() > 0.5


def test_orientation_is_where_the_farthest_point_of_the_pin_lies():
    drawing, labels = draw_images("orientation", INDEX)
    mask = drawing.facts["mask"] > 0.5
    assert np.array_equal((drawing.facts["turn"] + 16) // 32 % 8, labels)
    angle = []
    for plane in mask:
        points = np.argwhere(plane) - np.argwhere(plane).mean(axis=0)
        down, across = points[np.hypot(*points.T).argmax()]
        angle.append(np.arctan2(down, across) * 8 / (2 * np.pi))
    assert (np.round(angle) % 8 == labels).mean() > 0.95


def test_azimuth_is_where_the_lamps_are():
    drawing, labels = draw_images("azimuth", INDEX)
    assert np.array_equal((drawing.facts["turn"] + 16) // 32 % 8, labels)
    lamps = drawing.facts["lamps"]
    shown = (lamps > 0.5).sum(axis=(1, 2))
    assert (shown[np.isin(labels, [1, 2, 3])] > 0).all()  # the front is towards the viewer
    assert (shown[np.isin(labels, [5, 6, 7])] == 0).all()
    columns = (lamps.sum(axis=1) * np.arange(32)).sum(axis=1) / np.maximum(lamps.sum(axis=(1, 2)), 1e-6)
    assert columns[labels == 1].mean() > columns[labels == 2].mean() > columns[labels == 3].mean()


def test_a_process_draws_a_task_once():
    assert mini.load("land") is mini.load("mini-vision/land")
