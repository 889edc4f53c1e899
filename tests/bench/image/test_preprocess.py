"""How images become inputs: the checkpoint's settings, resizing, normalising, augmenting, mixing."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ConvNextImageProcessor

from san_bench.config.recipe import load_recipe
from san_bench.image.domain import Collate
from san_bench.image.preprocess import InputSettings, Prepared, checkpoint_input, input_settings, mixing
from san_bench.image.recipe import Input
from san_bench.image.splits import ArraySplit, FileSplit, JoinedSplit
from san_bench.models.embedded import embedded_path
from san_peft.errors import SanError

HALF = (0.5, 0.5, 0.5)
NOTHING = load_recipe("demo/san").augmentation


def split(size=(8, 12), n=6):
    images = np.random.default_rng(0).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    return ArraySplit(images, np.arange(n) % 3)


def asked(**changes):
    base = {
        "size": None,
        "resize": "squash",
        "crop_pct": None,
        "interpolation": "checkpoint",
        "normalization": "checkpoint",
    }
    return Input(**{**base, **changes})


def test_what_a_checkpoint_says():
    assert checkpoint_input(embedded_path()) == InputSettings(32, HALF, HALF, "bilinear")


def test_a_crop_of_transformers_is_read(tmp_path):
    ConvNextImageProcessor(
        size={"shortest_edge": 24}, crop_pct=0.75, resample=3, image_mean=[0.1, 0.2, 0.3]
    ).save_pretrained(tmp_path)
    found = checkpoint_input(tmp_path)
    assert (found.size, found.crop_pct, found.interpolation) == (24, 0.75, "bicubic")
    assert found.mean == (0.1, 0.2, 0.3)


def test_a_recipe_goes_before_the_checkpoint(tmp_path):
    chosen = input_settings(asked(size=64, normalization="imagenet", resize="crop", crop_pct=0.875), embedded_path())
    assert chosen == InputSettings(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875, squash=False)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    with pytest.raises(SanError, match=r"size.* Set input.size"):
        input_settings(asked(), tmp_path)
    assert input_settings(asked(size=8), embedded_path()).std == HALF


def test_squashing_keeps_no_shape_and_cropping_does():
    image = Image.new("RGB", (12, 8), "black")
    image.paste((255, 255, 255), (8, 0, 12, 8))  # the right third is white
    pixels = ArraySplit(np.array(image)[None], np.zeros(1, np.int64))
    squashed = Prepared(pixels, InputSettings(6, *ZERO_ONE, "nearest"))[0]["pixel_values"]
    assert squashed[0, 0].tolist() == [0, 0, 0, 0, 1, 1]
    cropped = Prepared(pixels, InputSettings(8, *ZERO_ONE, "nearest", 1.0, squash=False))[0]["pixel_values"]
    assert cropped[0, 0].tolist() == [0] * 6 + [1] * 2


ZERO_ONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_what_is_in_memory_is_what_is_read_from_files(tmp_path):
    arrays = split((8, 8))
    for index, image in enumerate(arrays.images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    files = FileSplit(tmp_path, [f"{i}.png" for i in range(6)], arrays.labels)
    settings = InputSettings(8, HALF, HALF)
    assert torch.equal(Prepared(files, settings).batch(9), Prepared(arrays, settings).batch(9))
    joined = JoinedSplit(arrays, files)
    assert torch.equal(Prepared(joined, settings).batch(3, start=5)[1:], Prepared(arrays, settings).batch(2))
    before = files.fingerprint
    Image.fromarray(arrays.images[0]).resize((16, 16)).save(tmp_path / "0.png")
    assert files.fingerprint != before
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(SanError, match=r"1\.png cannot be read: .*san data check"):
        files.image(1)


@pytest.mark.parametrize(
    "change",
    [
        {"flip": True},
        {"crop": "random-resized", "smallest_crop": 0.2},
        {"crop": "random"},
        {"randaugment": "rand-m9-mstd0.5-inc1"},
        {"erasing": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_augmentation_changes_training_images_by_the_seed(change):
    settings = InputSettings(8, HALF, HALF, "bilinear", 0.5, squash=False)
    train = Prepared(split(), settings, NOTHING.model_copy(update=change))

    def once(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - timm draws from numpy's and Python's global states
        __import__("random").seed(seed)
        return train.batch(6)

    assert once(0).shape == (6, 3, 8, 8)
    assert torch.equal(once(0), once(0))
    assert not torch.equal(once(0), once(1))
    plain = Prepared(split(), settings).batch(6)
    assert not torch.equal(once(0), plain)
    assert torch.equal(Prepared(split(), settings, NOTHING).batch(6), plain)


def test_workers_of_any_start_method_can_be_sent_it():
    """Data loaders pickle their data set and collate function where processes are not forked."""
    settings = InputSettings(8, HALF, HALF, "bilinear", 0.5, squash=False)
    heavy = NOTHING.model_copy(update={"crop": "random-resized", "flip": True, "mixup": 0.8, "erasing": 0.25})
    for augmentation in (None, heavy, NOTHING.model_copy(update={"flip": True})):
        train = Prepared(split(), settings, augmentation)
        assert pickle.loads(pickle.dumps(train)).batch(2).shape == (2, 3, 8, 8)
    collate = pickle.loads(pickle.dumps(Collate(mixing(heavy, 3), 3, channels_last=True)))
    batch = collate([train[index] for index in range(4)])
    assert batch["labels"].shape == (4, 3)
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)


def test_mixing_gives_shares_of_classes():
    assert mixing(NOTHING, 3) is None
    mix = mixing(NOTHING.model_copy(update={"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}), 3)
    images, shares = mix(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
    assert images.shape == (4, 3, 8, 8)
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    assert (shares > 0.03).all()
