"""Runs of a timm model in a local folder: trained, and exported as a folder that timm and transformers both load."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm
import torch
from tests.bench.small import short_recipe, small_scale, small_task
from transformers import AutoModelForImageClassification

from san_bench.image.domain import base_model, load_predictions
from san_bench.image.preprocess import for_checkpoint
from san_bench.run.evaluate import evaluate, export
from san_bench.run.train import train

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
GREY = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **ARGS)
    timm.models.save_for_hf(model, path, model_args={**ARGS, "num_classes": 7}, safe_serialization=True)
    return path


@pytest.mark.parametrize("size", [32, [40, 32]])
def test_images_get_the_size_that_the_model_was_built_for(size, tmp_path):
    """Older versions of timm save the size of the architecture's weights beside it."""
    facts = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 224, 224], **GREY}}
    (tmp_path / "config.json").write_text(json.dumps({**facts, "num_classes": 7, "model_args": {"img_size": size}}))
    assert for_checkpoint(small_task()["test"], tmp_path).settings.size == 32
    (tmp_path / "config.json").write_text(json.dumps({**facts, "num_classes": 7}))
    assert for_checkpoint(small_task()["test"], tmp_path).settings.size == 224


def test_names_of_classes_are_saved_in_timms_way(folder, tmp_path):
    names = tuple("abcdefghij")
    recipe = short_recipe("linear", tmp_path / "run", model=str(folder))
    base_model(recipe, replace(small_task(), names=names)).save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["label_names"] == list(names)
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").config
    assert (config.id2label[9], config.label2id["j"]) == ("j", 9)


@pytest.mark.parametrize("name", ["san", "linear", "full"])
def test_train_score_export(folder, name, tmp_path):
    with small_scale():
        recipe = short_recipe(name, tmp_path / name, model=str(folder))
        result = train(recipe)
        assert result["trainable_head"] == 24 * 10 + 10
        if name == "san":
            vectors = 24 + 2 * (72 + 24 + 96 + 24)
            norms = 2 * 24 * (2 * 2 + 1)
            assert result["trainable_parameters"] - result["trainable_head"] == vectors + norms
        assert evaluate(recipe.output)["predictions_sha256"] == result["predictions_sha256"]
        export(recipe.output, tmp_path / "plain")
        images, expected = for_checkpoint(small_task()["test"], folder).batch(40), load_predictions(tmp_path / name)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").eval()
    own = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(images).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own(images), expected, rtol=1e-4, atol=1e-5)
