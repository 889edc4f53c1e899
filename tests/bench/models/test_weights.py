"""Pretrained weights of runs of texts and conversations: which revision, of which size, in which type; and resuming."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from tests.bench.run.test_resume import losses, memory_ends_after_step_5
from tests.bench.texts import llama, llama2, recipe_of, small_language
from tests.bench.vision_language import test_domain as conversations
from transformers import LlamaConfig, LlamaForCausalLM

from san_bench.models.weights import train_in_float32
from san_bench.run import trainer
from san_bench.run.domain import domain_of
from san_bench.run.evaluate import evaluate, load_model
from san_bench.run.train import train
from san_peft.errors import SanError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SHA = {"first": "1" * 40, "second": "2" * 40}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_language(tmp_path_factory.mktemp("language"))


place_of_pictures = conversations.place


@pytest.fixture
def hub(place, tmp_path, monkeypatch):
    """A cache of the hub with two revisions of one model, and no way to the hub itself."""
    folder = tmp_path / "hub" / "models--people--small"
    for number, sha in enumerate(SHA.values()):
        shutil.copytree(place / "model", folder / "snapshots" / sha)
        model = llama(len(llama2()))
        model.lm_head.weight.data += number
        model.save_pretrained(folder / "snapshots" / sha)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(SHA["second"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# Which revision


def test_a_model_of_the_hub_is_of_the_revision_that_is_named(hub, place, tmp_path):
    found = {}
    for name, model in {"first": f"people/small@{SHA['first']}", "main": "people/small"}.items():
        recipe = recipe_of(place, tmp_path / name, "lora", model=model, optimizer__epochs=1)
        found[name] = train(recipe)
        card = ModelCard.load(tmp_path / name / "adapter" / "README.md")
        sha = found[name]["model_revision"]
        assert f"`people/small`, revision `{sha}`, weights with sha256" in card.text
        assert evaluate(tmp_path / name)["accuracy"] == found[name]["accuracy"]
    assert [found[name]["model_revision"] for name in ("first", "main")] == [SHA["first"], SHA["second"]]
    assert found["first"]["checkpoint_sha256"] != found["main"]["checkpoint_sha256"]
    assert {one["backbone"] for one in found.values()} == {"small"}
    config = json.loads((tmp_path / "first" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("people/small", SHA["first"])


def test_a_revision_or_a_name_that_is_missing_is_named(hub, place, tmp_path):
    for model, lacks in (("people/small@", "revision"), ("@main", "name")):
        with pytest.raises(SanError, match=f"model: '{model}' lacks the {lacks}; a model is NAME or NAME@REVISION"):
            recipe_of(place, tmp_path, model=model)
    with pytest.raises(SanError, match=r"people/small has no tokenizer|people/small@none cannot be loaded"):
        domain_of(recipe_of(place, tmp_path, model="people/small@none")).base_model()
    (tmp_path / "in@folder").symlink_to(place / "model")
    assert domain_of(recipe_of(place, tmp_path, model=str(tmp_path / "in@folder"))).base_model().config.vocab_size


# Of which size


def test_weights_of_another_size_than_the_config_says_are_named_with_both_sizes(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(SanError) as error:
        domain_of(recipe_of(place, tmp_path / "run", model=str(tmp_path / "model"))).base_model()
    assert "6 parameters of LlamaForCausalLM" in str(error.value)
    assert "down_proj.weight ((32, 64), not (32, 48))" in str(error.value)


@pytest.mark.parametrize("kind", ["san", "lora", "san-lora"])
def test_an_adapter_on_a_model_of_another_size_is_named(kind, place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    train(recipe_of(place, tmp_path / "run", kind, model=str(tmp_path / "model"), optimizer__epochs=1))
    config = llama(len(llama2())).config
    config.intermediate_size = 48
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(SanError, match=r"other shapes|from 64 to 64") as error:
        load_model(tmp_path / "run")
    assert "48" in str(error.value)
    assert "64" in str(error.value)


# In which type


@pytest.fixture(scope="module")
def wide(place):
    """A model that bitsandbytes can quantise in blocks of 64."""
    tokenizer = llama2()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes))
    model.save_pretrained(place / "wide")
    tokenizer.save_pretrained(place / "wide")
    return str(place / "wide")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("weights", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("kind", ["lora", "san", "san-lora"])
def test_weights_are_kept_as_the_recipe_says_and_a_run_answers_again(kind, weights, wide, place, tmp_path):
    recipe = recipe_of(
        place, tmp_path / "run", kind, weights=weights, precision="bf16", optimizer__epochs=4, optimizer__lr=0.03,
        gradient_checkpointing=weights != "bf16", model=wide,
    )  # fmt: skip
    layer = domain_of(recipe).base_model().model.layers[0].mlp.down_proj.weight
    assert layer.dtype == {"bf16": torch.bfloat16, "nf4": torch.uint8, "int8": torch.int8}[weights]
    result = train(recipe)
    found = [loss for _, loss, *_ in losses(tmp_path / "run")]
    assert found[-1] < found[0]
    assert result["weights"] == weights
    assert evaluate(tmp_path / "run")["tasks"] == result["tasks"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["san", "full"])
def test_steps_too_small_for_half_precision_are_taken_all_the_same(kind, precision, place, tmp_path):
    """A norm's weights of one and steps of 0.001: bfloat16 has nothing between 1 and 0.996."""
    settings = {"weights": "bf16", "precision": precision, "optimizer__schedule": "constant", "optimizer__warmup": 0.0}
    recipe = recipe_of(place, tmp_path / "run", kind, **settings, optimizer__lr=0.001, optimizer__epochs=4)
    result = train(recipe)
    (file,) = (tmp_path / "run" / "adapter").glob("*model.safetensors")
    saved = load_file(file)
    norms = [tensor for name, tensor in saved.items() if "layernorm" in name]
    assert {tensor.dtype for tensor in norms} == {torch.bfloat16}
    moved = torch.cat(norms).float() - 1
    assert (moved.abs() > 0.002).float().mean() > 0.5
    assert evaluate(tmp_path / "run")["tasks"] == result["tasks"]


def test_what_is_trained_is_in_float32_and_goes_back_tied_or_not():
    config = llama(40).config
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    back = train_in_float32(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    inside = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(inside.logits.to(torch.bfloat16), before, atol=0.05, rtol=0.05)
    inside.loss.backward()
    assert model.model.norm.weight.grad.dtype == torch.float32
    back()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(input_ids=ids).logits, before)


# Resuming


def goes_on(make, tmp_path, monkeypatch):
    """Trains with a stop after step 5 and a checkpoint of step 4, and without; the two must be one."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Journal, "on_step_end", memory_ends_after_step_5)
        with pytest.raises(SanError, match=r"step 6 .* step 4"):
            train(make(tmp_path / "run"))
    resumed, whole = train(make(tmp_path / "run")), train(make(tmp_path / "whole"))
    assert resumed["resumed_from_step"] == 4
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    left, right = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "whole"))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert resumed["tasks"] == whole["tasks"]


@pytest.mark.parametrize("selection", ["last", "best-val"])
def test_a_training_on_texts_goes_on_as_if_nothing_had_happened(selection, place, tmp_path, monkeypatch):
    def make(output):
        return recipe_of(place, output, "san-lora", checkpoint_steps=2, selection=selection, optimizer__epochs=3)

    goes_on(make, tmp_path, monkeypatch)


def test_a_training_on_conversations_goes_on_with_the_same_batches(place_of_pictures, tmp_path, monkeypatch):
    def make(output):
        return conversations.recipe_of(place_of_pictures, output, "san-lora", checkpoint_steps=2)

    goes_on(make, tmp_path, monkeypatch)


def test_gradient_checkpointing_changes_no_loss_of_conversations(place_of_pictures, tmp_path):
    for kind in ("san", "lora"):
        folders = [tmp_path / f"{kind}-{on}" for on in (False, True)]
        for folder, on in zip(folders, (False, True), strict=True):
            train(conversations.recipe_of(place_of_pictures, folder, kind, gradient_checkpointing=on))
        first, second = (losses(folder)[-1][1] for folder in folders)
        assert first == pytest.approx(second, rel=1e-4)
