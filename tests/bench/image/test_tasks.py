"""The digits' splits, and what is said of a name that no task, split or model has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from generators.procedural import enlarge
from san_bench.image.preprocess import for_checkpoint
from san_bench.image.splits import ArraySplit, VisionTask
from san_bench.image.tasks import load_task
from san_bench.models.embedded import embedded_path
from san_peft.errors import SanError


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


def test_sizes_and_fingerprint(digits):
    assert {n: len(s) for n, s in digits.splits.items()} == {
        "train800": 800,
        "val200": 200,
        "train800val200": 1000,
        "test": 797,
    }
    assert digits.fingerprint == "8e23c3c474e78151d1e124492154460b534822aaa00c1ee9da024fee21a25abc"


def test_splits_are_disjoint_and_complete(digits):
    rows = {n: sorted(image.tobytes() for image in split.images) for n, split in digits.splits.items()}
    assert sorted(rows["train800"] + rows["val200"]) == rows["train800val200"]
    assert not set(rows["train800"]) & set(rows["val200"])
    assert not set(rows["train800val200"]) & set(rows["test"])
    assert len(rows["train800val200"] + rows["test"]) == 1797


def test_splits_are_stratified(digits):
    every = np.bincount(np.concatenate([digits["train800val200"].labels, digits["test"].labels]))
    for split in digits.splits.values():
        expected = every * len(split) / every.sum()
        assert np.abs(np.bincount(split.labels, minlength=10) - expected).max() < 1.5


def test_items_are_what_the_trainer_takes(digits):
    test = for_checkpoint(digits["test"], embedded_path())
    item = test[3]
    assert item["pixel_values"].shape == (3, 32, 32)
    assert item["pixel_values"].dtype == torch.float32
    assert item["labels"].dtype == torch.int64
    assert test.batch(797).amin() == -1
    assert test.batch(797).amax() == 1


def test_normalisation_is_that_of_the_checkpoint(digits):
    processor = AutoImageProcessor.from_pretrained(embedded_path())
    theirs = processor(list(digits["val200"].images[:8]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(theirs, for_checkpoint(digits["val200"], embedded_path()).batch(8), atol=1e-6, rtol=0)


def test_enlarging_is_bilinear_interpolation():
    images = np.random.default_rng(0).random((2, 8, 8, 1), dtype=np.float32)
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(channels_first, scale_factor=4, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(enlarge(images, 4), theirs.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_unknown_names_are_answered_with_known_ones(digits):
    with pytest.raises(SanError, match=r"no task 'digit'. Did you mean 'digits'\? Choose from digits"):
        load_task("digit")
    with pytest.raises(SanError, match=r"'digits' has no split 'val'. Did you mean 'val200'\?"):
        digits["val"]
    with pytest.raises(SanError, match="2 images and 3 labels"):
        ArraySplit(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(SanError, match=r"'x', split test: 1 of 2 labels .* 3 at index 1. It has 3"):
        VisionTask("x", 3, {"test": ArraySplit(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 3]))})
    with pytest.raises(SanError, match=r"No model 'vot' ships .* Did you mean 'vit'\?"):
        embedded_path("vot")
    with pytest.raises(SanError, match="vtab/cifar"):
        load_task("vtab/cifar")
