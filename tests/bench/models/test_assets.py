"""The models that ship: small, true to their papers, loadable, of use, and wired and trained as the method says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

import san_bench
from generators.procedural import FACTORS, draw
from san_bench.config.recipe import load_recipe
from san_bench.models.embedded import EMBEDDED, MODELS, embedded_path
from san_bench.run.train import train
from san_peft import SanConfig, merge_and_verify, trace

MIB = 2**20


@pytest.fixture(params=EMBEDDED)
def name(request):
    return request.param


def papers_of(name: str) -> dict:
    return json.loads((embedded_path(name) / "PROVENANCE.json").read_text(encoding="utf-8"))


def classifier(name: str, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_pretrained(
        embedded_path(name), num_labels=classes, local_files_only=True
    ).eval()


def pixels_of(images) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------- size and papers


def test_each_is_small(name):
    assert sum(f.stat().st_size for f in embedded_path(name).iterdir()) < 2.5 * MIB


def test_all_that_ships_beside_the_code_is_small():
    files = [f for f in Path(san_bench.__file__).parent.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")]
    assert len([f for f in files if f.suffix == ".safetensors"]) == len(MODELS)
    assert sum(f.stat().st_size for f in files) < 15 * MIB


def test_the_papers_are_true(name):
    folder, papers = embedded_path(name), papers_of(name)
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training_log.jsonl",
        "PROVENANCE.json",
    }
    assert papers["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    body = classifier(name).base_model
    own = sum(p.numel() for p in body.parameters())
    assert papers["parameters"] == own
    assert 1_000_000 <= own <= 1_300_000
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1] == papers["final"]
    assert rows[-1]["step"] == papers["settings"]["steps"]
    assert papers["images"] == papers["settings"]["steps"] * papers["settings"]["batch_size"]
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("label", ["colour", "background_colour", "count", "x", "y", "size", "glyph", "resolution"])
def test_pretraining_learned_what_the_guide_says(name, label):
    assert papers_of(name)["final"]["validation"][label] > 1.5 / len(FACTORS[label])


# ---------------------------------------------------------------------------------------------- loading and features


def test_only_the_head_is_new(name):
    model, report = AutoModelForImageClassification.from_pretrained(
        embedded_path(name), num_labels=7, output_loading_info=True, local_files_only=True
    )
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.dtype == torch.float32
    assert model(pixel_values=torch.zeros(2, 3, 32, 32)).logits.shape == (2, 7)


def test_the_processor_gives_what_pretraining_saw(name):
    images = draw(4, seed=5).images
    theirs = AutoImageProcessor.from_pretrained(embedded_path(name))(list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(theirs, pixels_of(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("label", ["background_colour", "x", "resolution"])
def test_a_linear_probe_on_new_images_beats_chance_clearly(name, label):
    drawn = draw(500, seed=77, kind="scene")
    model = classifier(name)
    model.classifier = nn.Identity()
    with torch.no_grad():
        read = model(pixel_values=pixels_of(drawn.images)).logits
    assert read.isfinite().all()
    read = (read - read.mean(0)) / read.std(0)
    truth = drawn.labels[label]
    probe = LogisticRegression(C=0.01, max_iter=500).fit(read[:400].numpy(), truth[:400])
    assert probe.score(read[400:].numpy(), truth[400:]) > 1.8 / len(FACTORS[label])


# ---------------------------------------------------------------------------------------------- the method on them

RESIDUAL, NORM, GELU = "(through residual, layer_norm)", "(through layer_norm)", "(through gelu)"
STAGE = "swin.encoder.layers"
NEXT = "convnext.encoder.stages"
EXPECTED = {
    "vit": (
        "vit.layers.0.attention.v_proj -> vit.layers.0.attention.o_proj [identity] (through attention)",
        f"vit.layers.0.attention.o_proj -> vit.layers.0.mlp.fc1 [identity] {RESIDUAL}",
        f"vit.layers.0.mlp.fc1 -> vit.layers.0.mlp.fc2 [identity] {GELU}",
        f"vit.layers.2.mlp.fc2 -> vit.layers.3.attention.v_proj [identity] {RESIDUAL}",
    ),
    "swin": (
        f"{STAGE}.0.blocks.0.attention.v_proj -> {STAGE}.0.blocks.0.attention.o_proj [identity] (through attention)",
        f"{STAGE}.0.blocks.0.attention.o_proj -> {STAGE}.0.blocks.0.mlp.fc1 [identity] {RESIDUAL}",
        f"{STAGE}.0.blocks.1.mlp.fc1 -> {STAGE}.0.blocks.1.mlp.fc2 [identity] {GELU}",
        f"{STAGE}.0.blocks.1.mlp.fc2 -> {STAGE}.0.downsample.reduction [tile x4] {RESIDUAL}",
        f"{STAGE}.0.downsample.reduction -> {STAGE}.1.blocks.0.attention.v_proj [identity] {NORM}",
    ),
    "convnext": (
        f"convnext.embeddings.patch_embeddings -> {NEXT}.0.layers.0.dwconv [identity] {NORM}",
        f"{NEXT}.0.layers.0.dwconv -> {NEXT}.0.layers.0.pwconv1 [identity] {NORM}",
        f"{NEXT}.0.layers.0.pwconv1 -> {NEXT}.0.layers.0.pwconv2 [identity] {GELU}",
        f"{NEXT}.0.layers.0.pwconv2 -> {NEXT}.0.layers.1.dwconv [identity] (through residual)",
        f"{NEXT}.0.layers.1.pwconv2 -> {NEXT}.1.downsampling_layer.1 [identity] {RESIDUAL}",
        f"{NEXT}.1.downsampling_layer.1 -> {NEXT}.1.layers.0.dwconv [identity]",
    ),
}


def test_the_graph_has_the_edges_of_its_architecture(name):
    graph = trace(classifier(name))
    assert not graph.barriers
    assert set(EXPECTED[name]) <= {str(edge) for edge in graph.edges}


def test_a_merged_model_computes_the_same(name):
    model = get_peft_model(classifier(name), SanConfig(modules_to_save=["classifier"])).eval()
    pixels = pixels_of(draw(8, seed=9).images)
    with torch.no_grad():
        before = model(pixel_values=pixels).logits
        for parameter_name, parameter in model.named_parameters():
            if "san_scale" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        assert not torch.allclose(model(pixel_values=pixels).logits, before, atol=1e-2)
    report = merge_and_verify(model, {"pixel_values": pixels})
    assert not any("san_" in key for key in report.model.state_dict())


@pytest.mark.slow
def test_a_short_fine_tuning_beats_the_linear_probe(name, tmp_path):
    model = "embedded" if name == "vit" else f"embedded/{name}"
    common = {"model": model, "train_split": "train800", "eval_split": "val200"}
    results = {
        kind: train(load_recipe(f"demo/{kind}", {**common, "output": str(tmp_path / kind)}))["accuracy"]
        for kind in ("linear", "san")
    }
    assert results["san"] > results["linear"]
