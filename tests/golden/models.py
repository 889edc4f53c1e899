"""Tiny random models, one per architecture whose graph is reviewed; each is made from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable

import timm
import transformers as tf
from torch import nn

WIDTH, HEADS, HIDDEN, VOCAB = 16, 2, 32, 50
TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "vocab_size": VOCAB,
}
IMAGE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "image_size": 16,
    "patch_size": 8,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
TIMM_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 5}
TIMM_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2), "num_classes": 5}
TIMM_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": 5}
TIMM_MIXER = {"img_size": 16, "patch_size": 8, "num_blocks": 2, "embed_dim": WIDTH, "num_classes": 5}
TIMM_RESNET = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8), "num_classes": 5}


def llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(**{**IMAGE, "num_hidden_layers": 3})
    text = tf.LlamaConfig(**{**TEXT, "hidden_size": 24, "num_hidden_layers": 1})
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=49))


def gemma() -> nn.Module:
    return tf.GemmaForCausalLM(tf.GemmaConfig(**TEXT, num_key_value_heads=1, head_dim=8, pad_token_id=0))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm-vit": lambda: timm.create_model("vit_tiny_patch16_224", **TIMM_VIT),
    "timm-deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TIMM_VIT),
    "timm-swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", **TIMM_SWIN),
    "timm-swinv2": lambda: timm.create_model("swinv2_tiny_window8_256", **TIMM_SWIN),
    "timm-convnext": lambda: timm.create_model("convnext_atto", **TIMM_CONVNEXT),
    "timm-convnextv2": lambda: timm.create_model("convnextv2_atto", **TIMM_CONVNEXT),
    "timm-mixer": lambda: timm.models.MlpMixer(**TIMM_MIXER),
    "timm-resnet": lambda: timm.create_model("resnet26", **TIMM_RESNET),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)),
    "dinov2": lambda: tf.Dinov2ForImageClassification(
        tf.Dinov2Config(**{k: v for k, v in IMAGE.items() if k != "intermediate_size"}, mlp_ratio=2)
    ),
    "swin": lambda: tf.SwinForImageClassification(
        tf.SwinConfig(image_size=32, patch_size=4, window_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2])
    ),
    "convnext": lambda: tf.ConvNextForImageClassification(
        tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
    ),
    "clip": lambda: tf.CLIPModel(
        tf.CLIPConfig(
            text_config={**TEXT, "num_hidden_layers": 1, "eos_token_id": 2},
            vision_config={**IMAGE, "num_hidden_layers": 1},
            projection_dim=12,
        )
    ),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**TEXT)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=HEADS, vocab_size=VOCAB)),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
    "llama-grouped": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, **GROUPED})),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**{**TEXT, **GROUPED})),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**{**TEXT, **GROUPED})),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**{**TEXT, **GROUPED}, head_dim=8)),
    "gemma": gemma,
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**{**TEXT, **GROUPED}, pad_token_id=0)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**{**TEXT, **GROUPED}, num_local_experts=4, num_experts_per_tok=2)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=WIDTH, d_kv=8, d_ff=HIDDEN, num_layers=1, num_heads=HEADS, vocab_size=VOCAB)
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            d_model=WIDTH,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=HIDDEN,
            decoder_ffn_dim=HIDDEN,
            vocab_size=VOCAB,
            num_mel_bins=4,
            max_source_positions=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        )
    ),
    "llava": llava,
}
