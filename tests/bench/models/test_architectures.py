"""Models by name on the meta device: which class a name means, and what is said where it means none."""

from __future__ import annotations

import json

import pytest
import transformers
from tests.golden.models import IMAGE, TEXT

from san_bench.models import architectures as models
from san_bench.models.architectures import empty_model, quietly
from san_peft import SanError, trace


def all_on_meta(model) -> bool:
    return all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedded", "ViTModel"),
        ("embedded/vit", "ViTModel"),
        ("embedded/swin", "SwinModel"),
        ("embedded/convnext", "ConvNextModel"),
        ("llama", "LlamaForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("bert", "BertForMaskedLM"),
        ("vit", "ViTForImageClassification"),
        ("t5", "T5ForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("llava_next", "LlavaNextForConditionalGeneration"),
        ("clip", "CLIPModel"),
        ("clip_vision_model", "CLIPVisionModel"),
    ],
)
def test_a_model_type_means_its_task(name, expected):
    model = empty_model(name)
    assert type(model).__name__ == expected
    assert all_on_meta(model)


def test_a_folder_means_the_class_that_its_configuration_names(tmp_path):
    config = transformers.LlamaConfig(**TEXT, architectures=["LlamaForSequenceClassification"], num_labels=3)
    config.save_pretrained(tmp_path)
    model = empty_model(str(tmp_path))
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.hidden_size == TEXT["hidden_size"]
    assert all_on_meta(model)


@pytest.mark.parametrize("architectures", [None, ["ModelThatIsNotThere"]])
def test_a_folder_that_names_no_known_class_gets_the_one_of_its_type(tmp_path, architectures):
    transformers.LlamaConfig(**TEXT, architectures=architectures).save_pretrained(tmp_path)
    assert type(empty_model(str(tmp_path))).__name__ == "LlamaForCausalLM"


# ------------------------------------------------------------------ timm


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("vit_tiny_patch16_224", 1000),
        ("timm/vit_tiny_patch16_224", 1000),
        ("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k", 21843),
        ("vit_tiny_patch16_224.augreg_in21k", 21843),
    ],
)
def test_timm_with_and_without_prefix_and_tag(name, classes):
    pytest.importorskip("timm")
    model = empty_model(name)
    assert type(model).__name__ == "VisionTransformer"
    assert model.num_classes == classes
    assert all_on_meta(model)


def test_a_folder_of_timm(tmp_path):
    pytest.importorskip("timm")
    facts = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "model_args": {"img_size": 32, "depth": 2},
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    (tmp_path / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    model = empty_model(str(tmp_path))
    assert (model.num_classes, len(model.blocks), model.patch_embed.img_size) == (7, 2, (32, 32))


def test_a_folder_that_timm_wrote(tmp_path):
    timm = pytest.importorskip("timm")
    args = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8), "num_classes": 5}
    timm.models.save_for_hf(timm.create_model("resnet26", **args), tmp_path, model_args=args, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["global_pool"] == "avg"
    model = empty_model(str(tmp_path))
    assert (model.num_classes, len(model.layer1)) == (5, 1)


def test_a_tag_that_timm_does_not_have():
    pytest.importorskip("timm")
    with pytest.raises(SanError, match=r"'nope' for vit_tiny_patch16_224\. .*augreg_in21k"):
        empty_model("vit_tiny_patch16_224.nope")


def test_a_name_with_timms_prefix_that_timm_does_not_have():
    pytest.importorskip("timm")
    with pytest.raises(SanError, match=r"timm has no model 'vit_tny_patch16_224'. Did you mean vit_tiny_patch16_224"):
        empty_model("timm/vit_tny_patch16_224")


@pytest.mark.parametrize("name", ["timm/resnet50", "resnet50"])
def test_without_timm_its_names_ask_for_it(name, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    with pytest.raises(SanError, match=r'pip install "san-peft\[vision\]"'):
        empty_model(name)


def test_without_timm_its_folders_ask_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}', encoding="utf-8")
    with pytest.raises(SanError, match=r'timm.*pip install "san-peft\[vision\]"'):
        empty_model(str(tmp_path))


# ------------------------------------------------------------------ names that mean nothing


@pytest.mark.parametrize(
    ("name", "close"),
    [("lama", "llama"), ("resnt50", "resnet50"), ("embeded", "embedded"), ("vit_bse_patch16_224", "vit_base_patch16")],
)
def test_unknown_names_are_answered_with_close_ones(name, close):
    with pytest.raises(SanError, match=rf"'{name}'.*Did you mean .*{close}"):
        empty_model(name)


@pytest.mark.parametrize("name", ["qqqqqqqq", "./nowhere", "/nowhere/at/all", "a/b/c", ""])
def test_names_that_resemble_nothing_say_what_was_looked_for(name):
    with pytest.raises(SanError, match=r"config\.json.*timm.*transformers"):
        empty_model(name)


def test_a_model_on_the_hub_without_a_connection_names_the_ways_out():
    with pytest.raises(SanError) as caught:
        empty_model("nobody/llama")
    text = str(caught.value)
    for part in ("nobody/llama", "HF_HUB_OFFLINE", "config.json"):
        assert part in text
    assert "Did you mean llama" in text


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(SanError, match=r"has no config.json"):
        empty_model(str(tmp_path))


def test_a_folder_of_another_name_does_not_hide_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert type(empty_model("gpt2")).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config.json cannot be read"),
        ("[]", r"config\.json"),
        ('{"model_type": "nothing-known"}', r"config\.json .*nothing-known"),
        ('{"hidden_size": 4}', r"config\.json"),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"config\.json|cannot be built"),
    ],
)
def test_a_configuration_that_is_broken(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(SanError, match=message):
        empty_model(str(tmp_path))


def test_a_model_that_cannot_be_built(tmp_path):
    config = transformers.LlamaConfig(**TEXT)
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    facts = json.loads(file.read_text(encoding="utf-8")) | {"hidden_act": "no-such-function"}
    file.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(SanError, match=r"llama cannot be built: KeyError.*no-such-function"):
        empty_model(str(tmp_path))


# ------------------------------------------------------------------ quiet, and small where it may be


def test_building_and_tracing_print_nothing(tmp_path, capfd):
    config = transformers.BertConfig(**TEXT, architectures=["BertLMHeadModel"])  # which warns that it is no decoder
    config.save_pretrained(tmp_path)
    model = empty_model(str(tmp_path))
    with quietly():
        trace(model)
    assert capfd.readouterr() == ("", "")


def test_quiet_ends():
    from transformers.utils import logging

    before = logging.get_verbosity()
    with quietly():
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before


def test_a_small_image_changes_nothing_in_the_graph(tmp_path):
    """A tower built for 4x4 patches, and for the 2x2 that the command uses."""
    vision = transformers.CLIPVisionConfig(**{**IMAGE, "image_size": 32, "num_hidden_layers": 3})
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_id=49
    )
    config.save_pretrained(tmp_path)
    small = empty_model(str(tmp_path))
    assert (small.config.vision_config.image_size, vision.image_size) == (16, 32)
    assert trace(small) == trace(transformers.LlavaForConditionalGeneration(config))


def test_small_images_have_as_many_tiles(tmp_path):
    vision = transformers.CLIPVisionConfig(**{**IMAGE, "image_size": 32, "num_hidden_layers": 3})
    config = transformers.LlavaNextConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_id=49,
        image_grid_pinpoints=[[32, 64], [96, 32]],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    small = empty_model(str(tmp_path))
    assert small.config.image_grid_pinpoints == [[16, 32], [48, 16]]
    assert trace(small) == trace(transformers.LlavaNextForConditionalGeneration(config))


def test_a_model_of_images_alone_keeps_its_size(tmp_path):
    transformers.SwinConfig(image_size=32, patch_size=4, window_size=4).save_pretrained(tmp_path)
    assert empty_model(str(tmp_path)).config.image_size == 32


def test_a_long_reason_is_cut_after_a_whole_word():
    def fail():
        raise ValueError("reason " * 100)

    with pytest.raises(SanError) as caught:
        models._build("x", fail)
    assert str(caught.value).endswith("reason ...")
