"""Derived example inputs: what a model takes, as small as it takes it, the same every time, and nothing left behind."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers as tf
from tests.golden.models import IMAGE, TEXT, TIMM_RESNET, TIMM_VIT
from torch import Tensor, nn

from san_peft import SanConfig, TraceError, trace
from san_peft.propagation.inputs import derive_inputs

LARGE = {**IMAGE, "image_size": 224}
DINO = {k: v for k, v in IMAGE.items() if k != "intermediate_size"}


# ------------------------------------------------------------------ images


def side(inputs) -> tuple[int, ...]:
    image = inputs["pixel_values"] if isinstance(inputs, dict) else inputs[0]
    return tuple(image.shape[-2:])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)), 16),
        (lambda: tf.ViTForImageClassification(tf.ViTConfig(**LARGE)), 96),
        (lambda: tf.Dinov2Model(tf.Dinov2Config(**{**DINO, "image_size": 518, "patch_size": 14})), 98),
        (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**LARGE)), 96),
        (lambda: tf.SwinModel(tf.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1])), 96),
        (lambda: timm.create_model("resnet26", **TIMM_RESNET), 96),
        (lambda: timm.create_model("vit_tiny_patch16_224", **{**TIMM_VIT, "img_size": 112}), 112),
        (lambda: timm.create_model("vit_tiny_patch16_224", **{**TIMM_VIT, "img_size": 112}, dynamic_img_size=True), 96),
    ],
    ids=["small", "interpolated", "dinov2", "clip", "swin", "convolutions", "fixed", "dynamic"],
)
def test_an_image_has_the_smallest_size_that_the_model_takes(make, expected):
    model = make()
    inputs = derive_inputs(model)
    assert side(inputs) == (expected, expected)
    model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def test_an_image_is_noise_and_the_same_every_time():
    model = tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)).bfloat16()
    first, second = derive_inputs(model)["pixel_values"], derive_inputs(model)["pixel_values"]
    assert torch.equal(first, second)
    assert first.dtype == torch.bfloat16
    assert 0.9 < first.float().std() < 1.1


def test_the_graph_does_not_depend_on_the_size():
    model = tf.ViTForImageClassification(tf.ViTConfig(**LARGE))
    assert trace(model) == trace(model, {"pixel_values": torch.randn(1, 3, 224, 224)})


def test_a_model_of_ones_own_that_begins_with_a_convolution():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    assert derive_inputs(net)[0].shape == (1, 4, 96, 96)
    assert [edge.posterior for edge in trace(net)] == ["4"]


# ------------------------------------------------------------------ text


def test_token_ids_are_spread_over_the_vocabulary():
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, "vocab_size": 700}))
    assert derive_inputs(model)["input_ids"].tolist() == [[100, 200, 300, 400, 500, 600]]


def test_token_ids_with_a_meaning_of_their_own_are_left_out():
    special = {"pad_token_id": 100, "bos_token_id": 101, "eos_token_id": [300, 301]}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, "vocab_size": 700}, **special))
    assert derive_inputs(model)["input_ids"].tolist() == [[102, 200, 302, 400, 500, 600]]


def test_a_sentence_of_an_encoder_decoder_ends():
    config = tf.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=70, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    model = tf.BartForSequenceClassification(config)
    assert derive_inputs(model)["input_ids"][0, -1] == 2
    assert trace(model).edges


def test_the_places_of_an_image_in_a_text():
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    tokens = {"image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}
    model = tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))
    inputs = derive_inputs(model)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert inputs["pixel_values"].shape == (16, 3 * 2 * 4 * 4)
    assert (inputs["input_ids"] == 40).sum() == 4, "four patches are merged into one token"
    assert not set(inputs["input_ids"].flatten().tolist()) & {41, 42, 43}
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == 40).long())


# ------------------------------------------------------------------ what is left behind, and what cannot be


def test_nothing_of_the_model_changes():
    model = timm.create_model("resnet26", **TIMM_RESNET).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    derive_inputs(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Odd(nn.Module):
    """A model with a configuration that says little, or nonsense."""

    main_input_name = "pixel_values"

    def __init__(self, **said: object) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.config = type("Config", (), {"model_type": "odd", **said})()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layer(pixel_values)


class Unnamed(Odd):
    """A model whose input has a name of its own."""

    dummy_inputs: dict[str, Tensor] = {}  # noqa: RUF012

    def forward(self, anything: Tensor) -> Tensor:
        return self.layer(anything)


@pytest.mark.parametrize(
    "model",
    [
        Odd(image_size="large"),
        Odd(image_size=8, num_channels=-1),
        Odd(image_size=8),
        Unnamed(),
        nn.Sequential(nn.Linear(4, 4)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(5, 5)),
        nn.Identity(),
        nn.Bilinear(3, 4, 5),
    ],
    ids=["nonsense", "negative", "refused", "unnamed", "linear", "wrong", "empty", "two"],
)
def test_what_cannot_be_derived_is_a_trace_error_with_the_ways_out(model):
    with pytest.raises(TraceError, match=r"cannot be derived.*trace\(model, example_inputs\).*propagation='none'"):
        derive_inputs(model)


def test_what_a_model_calls_its_dummy_inputs_is_the_last_resort():
    model = Unnamed()
    model.dummy_inputs = {"anything": torch.ones(1, 4)}
    assert derive_inputs(model)["anything"].shape == (1, 4)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = tf.ViTForImageClassification(tf.ViTConfig(**LARGE))
    inputs = derive_inputs(model)
    assert side(inputs) == (96, 96)
    assert not inputs["pixel_values"].is_meta


def test_a_configuration_needs_no_inputs():
    from peft import get_peft_model

    model = get_peft_model(tf.CLIPVisionModel(tf.CLIPVisionConfig(**LARGE)), SanConfig())
    assert model.base_model.propagation_graph.edges
