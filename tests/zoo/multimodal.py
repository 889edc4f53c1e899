"""Models of transformers that read images and text."""

from __future__ import annotations

from typing import Any

from tests.zoo.table import of_transformers
from tests.zoo.text import GROUPED, SPECIAL, T5, TEXT
from tests.zoo.vision import VIT

IMAGE, START, END = 90, 91, 92
"""Token ids of an image, and of what stands around it."""
SMALL = {**TEXT, "num_hidden_layers": 1}
LLAMA = {**GROUPED, "model_type": "llama", "num_hidden_layers": 1}
CLIP = {"model_type": "clip_vision_model", **VIT, "num_hidden_layers": 3}
SIGLIP = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
PAIR = {"text_config": SMALL, "vision_config": {**VIT, "num_hidden_layers": 1}}
QWEN = {**GROUPED, "num_hidden_layers": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0],
                                                               "rope_theta": 10000.0}}  # fmt: skip
SEEN = {"image_token_id": IMAGE, "video_token_id": 93, "vision_start_token_id": START, "vision_end_token_id": END}
QFORMER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 99,
    "encoder_hidden_size": 16,
}  # fmt: skip
OPT = {k: v for k, v in {**TEXT, "model_type": "opt", "ffn_dim": 24}.items() if k != "intermediate_size"}

CONTRASTIVE: dict[str, dict[str, Any]] = {
    "AlignModel": {
        "text_config": SMALL,
        "vision_config": {
            "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 16, "image_size": 64,
            "in_channels": [32, 16], "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2],
            "num_block_repeats": [1, 1], "expand_ratios": [1, 6],
        },
        "projection_dim": 8,
    },
    "AltCLIPModel": {
        "text_config": {**SMALL, "project_dim": 12, "pad_token_id": 1},
        "vision_config": {**VIT, "num_hidden_layers": 1}, "projection_dim": 12,
    },
    "BlipForImageTextRetrieval": {**PAIR, "text_config": {**SMALL, "encoder_hidden_size": 16, "sep_token_id": 3},
                                  "image_text_hidden_size": 12},
    "BridgeTowerModel": {
        "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24,
        "text_config": {**TEXT, "pad_token_id": 1},
        "vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32},
    },
    "ChineseCLIPModel": {**PAIR, "projection_dim": 12},
    "CLIPModel": {**PAIR, "projection_dim": 12},
    "CLIPSegForImageSegmentation": {
        "text_config": SMALL, "vision_config": {**VIT, "num_hidden_layers": 2}, "projection_dim": 12,
        "extract_layers": [0, 1], "reduce_dim": 8, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 12,
    },
    "FlavaModel": {
        "image_config": {**VIT, "num_hidden_layers": 1}, "text_config": SMALL, "hidden_size": 16, "projection_dim": 12,
        "multimodal_config": {k: v for k, v in SMALL.items() if k[:5] != "vocab"}, "init_codebook": False,
    },
    "GroupViTModel": {
        "text_config": SMALL, "projection_dim": 12, "projection_intermediate_dim": 16,
        "vision_config": {**VIT, "depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 4]},
    },
    "OwlViTForObjectDetection": {**PAIR, "projection_dim": 16},
    "SiglipModel": PAIR,
    "Siglip2Model": {
        "text_config": SMALL,
        "vision_config": {
            **{k: v for k, v in VIT.items() if k != "image_size"}, "num_patches": 16, "num_hidden_layers": 1,
        },
    },
    "XCLIPModel": {
        "text_config": SMALL, "projection_dim": 12, "prompt_num_attention_heads": 2,
        "vision_config": {**VIT, "num_frames": 2, "mit_hidden_size": 12, "mit_intermediate_size": 16,
                          "mit_num_attention_heads": 2},
    },
}  # fmt: skip

JOINT: dict[str, dict[str, Any]] = {
    "BlipForConditionalGeneration": {**PAIR, "text_config": {**SMALL, "encoder_hidden_size": 16, "sep_token_id": 3}},
    "GitForCausalLM": {**SMALL, "vision_config": {**VIT, "num_hidden_layers": 1}},
    "LayoutLMv3ForTokenClassification": {
        **TEXT, "coordinate_size": 3, "shape_size": 2, "input_size": 32, "patch_size": 8, "rel_pos_bins": 4,
        "max_rel_pos": 8, "rel_2d_pos_bins": 4, "max_rel_2d_pos": 8, "pad_token_id": 1,
    },
    "LxmertModel": {
        **{k: v for k, v in TEXT.items() if k != "num_hidden_layers"}, "l_layers": 1, "x_layers": 1, "r_layers": 1,
        "visual_feat_dim": 12,
    },
    "Pix2StructForConditionalGeneration": {
        "text_config": {**T5, "hidden_size": 16, "num_heads": 2},
        "vision_config": {"hidden_size": 16, "patch_embed_hidden_size": 12, "d_ff": 24, "d_kv": 8,
                          "num_hidden_layers": 1, "num_attention_heads": 2, "seq_len": 64},
    },
    "UdopForConditionalGeneration": {**T5, "image_size": 32, "patch_size": 8, "max_2d_position_embeddings": 1024},
    "ViltForQuestionAnswering": {**TEXT, "image_size": 32, "patch_size": 8},
    "VisionEncoderDecoderModel": {
        "encoder": {"model_type": "vit", **VIT, "num_hidden_layers": 1},
        "decoder": {"model_type": "bert", **SMALL, "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 1, "pad_token_id": 0,
    },
    "VisualBertForQuestionAnswering": {**TEXT, "visual_embedding_dim": 12},
}  # fmt: skip

CHATS: dict[str, dict[str, Any]] = {
    "AyaVisionForConditionalGeneration": {
        "vision_config": SIGLIP, "text_config": {**LLAMA, "model_type": "cohere2", "head_dim": 4},
        "image_token_index": IMAGE, "downsample_factor": 2, "adapter_layer_norm_eps": 1e-6,
    },
    "Blip2ForConditionalGeneration": {
        "vision_config": {**VIT, "num_hidden_layers": 1}, "qformer_config": QFORMER, "text_config": OPT,
        "num_query_tokens": 3, "image_token_index": IMAGE,
    },
    "ChameleonForConditionalGeneration": {
        **GROUPED, "swin_norm": False, "vq_config": {
            "embed_dim": 8, "num_embeddings": 6, "latent_channels": 8, "resolution": 16, "base_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_type": "vanilla",
        },
        "vocabulary_map": {"<image>": IMAGE, **{f"IMGIMGA{chr(65 + i)}Z": 20 + i for i in range(6)}},
    },
    "Florence2ForConditionalGeneration": {
        "text_config": {"model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
                        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
                        "decoder_ffn_dim": 24, "vocab_size": 99, **SPECIAL},
        "vision_config": {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
                          "patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 2],
                          "num_groups": [2, 2], "window_size": 4, "projection_dim": 16},
        "image_token_id": IMAGE,
    },
    "Gemma3ForConditionalGeneration": {
        "vision_config": SIGLIP, "text_config": {**LLAMA, "model_type": "gemma3_text", "head_dim": 8},
        "mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END,
    },
    "GotOcr2ForConditionalGeneration": {
        "vision_config": {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1],
                          "mlp_dim": 24},
        "text_config": {**LLAMA, "model_type": "qwen2"}, "image_token_index": IMAGE,
    },
    "Idefics2ForConditionalGeneration": {
        "vision_config": VIT, "text_config": {**LLAMA, "model_type": "mistral"}, "image_token_id": IMAGE,
        "perceiver_config": {"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
                             "resampler_head_dim": 8, "num_key_value_heads": 1, "hidden_size": 16},
    },
    "Idefics3ForConditionalGeneration": {"vision_config": VIT, "text_config": LLAMA, "image_token_id": IMAGE},
    "InstructBlipForConditionalGeneration": {
        "vision_config": {**VIT, "num_hidden_layers": 1}, "qformer_config": QFORMER, "text_config": OPT,
        "num_query_tokens": 3, "image_token_index": IMAGE,
    },
    "InternVLForConditionalGeneration": {
        "vision_config": {**VIT, "image_size": [32, 32], "patch_size": [8, 8]},
        "text_config": {**LLAMA, "model_type": "qwen2"}, "image_token_id": IMAGE, "image_seq_length": 4,
    },
    "LlavaForConditionalGeneration": {"vision_config": CLIP, "text_config": LLAMA, "image_token_index": IMAGE},
    "LlavaNextForConditionalGeneration": {
        "vision_config": CLIP, "text_config": LLAMA, "image_token_index": IMAGE,
        "image_grid_pinpoints": [[32, 64], [64, 32]],
    },
    "LlavaOnevisionForConditionalGeneration": {
        "vision_config": SIGLIP, "text_config": {**LLAMA, "model_type": "qwen2"}, "image_token_index": IMAGE,
        "image_grid_pinpoints": [[32, 64], [64, 32]], "video_token_index": 93,
    },
    "Mistral3ForConditionalGeneration": {
        "vision_config": {"model_type": "pixtral", **VIT, "image_size": 64},
        "text_config": {**LLAMA, "model_type": "mistral"}, "image_token_index": IMAGE,
    },
    "MllamaForConditionalGeneration": {
        "vision_config": {
            "hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
            "intermediate_size": 24, "vision_output_dim": 32, "image_size": 32, "patch_size": 8, "max_num_tiles": 2,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        "text_config": {**GROUPED, "num_hidden_layers": 2, "cross_attention_layers": [1],
                        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "image_token_index": IMAGE,
    },
    "PaliGemmaForConditionalGeneration": {
        "vision_config": {**SIGLIP, "projection_dim": 16}, "projection_dim": 16, "image_token_index": IMAGE,
        "text_config": {**LLAMA, "model_type": "gemma", "head_dim": 8}, "hidden_size": 16,
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": QWEN, **SEEN,
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
                          "patch_size": 4},
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": QWEN, **SEEN,
        "vision_config": {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4,
                          "out_hidden_size": 16, "fullatt_block_indexes": [1], "window_size": 16},
    },
    "Qwen3VLForConditionalGeneration": {
        "text_config": {**QWEN, "head_dim": 8}, **SEEN,
        "vision_config": {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4,
                          "out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "SmolVLMForConditionalGeneration": {"vision_config": VIT, "text_config": LLAMA, "image_token_id": IMAGE},
    "VipLlavaForConditionalGeneration": {
        "vision_config": CLIP, "text_config": LLAMA, "image_token_index": IMAGE, "vision_feature_layers": [-2, -1],
    },
}  # fmt: skip

ARCHITECTURES = [
    *of_transformers("Contrastive image and text", CONTRASTIVE),
    *of_transformers("Documents, captions, questions", JOINT),
    *of_transformers("Vision-language decoders", CHATS),
]
