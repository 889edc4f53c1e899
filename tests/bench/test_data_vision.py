"""The digits' splits, and the embedded ViT with its papers."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from san_bench.data.preprocess import for_checkpoint
from san_bench.data.procedural import FACTORS, enlarge
from san_bench.data.vision import ArraySplit, VisionTask, embedded_path, load_task
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
    with pytest.raises(SanError, match=r"'x', split test: 1 of 2 labels are no class, such as 3 at index 1. It has 3"):
        VisionTask("x", 3, {"test": ArraySplit(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 3]))})
    with pytest.raises(SanError, match=r"No model 'vot' ships .* Did you mean 'vit'\?"):
        embedded_path("vot")
    with pytest.raises(SanError, match="needs its data"):
        load_task("vtab/cifar")


def test_the_asset_loads_as_a_classifier_in_float32():
    model = AutoModelForImageClassification.from_pretrained(
        embedded_path(), num_labels=10, ignore_mismatched_sizes=True, local_files_only=True
    )
    assert model.dtype == torch.float32
    assert model(pixel_values=torch.zeros(2, 3, 32, 32)).logits.shape == (2, 10)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_asset_is_small_and_its_papers_are_true():
    folder = embedded_path()
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training_log.jsonl",
        "PROVENANCE.json",
    }
    assert sum(f.stat().st_size for f in folder.iterdir()) < 3_000_000
    papers = json.loads((folder / "PROVENANCE.json").read_text())
    assert papers["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert 1_000_000 <= papers["parameters"] <= 1_500_000
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert rows[-1] == papers["final"]
    assert rows[-1]["step"] == papers["settings"]["steps"]
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("label", ["colour", "background_colour", "count", "x", "y", "size", "glyph", "resolution"])
def test_pretraining_learned_what_the_guide_says(label):
    papers = json.loads((embedded_path() / "PROVENANCE.json").read_text())
    assert papers["final"]["validation"][label] > 1.5 / len(FACTORS[label])
