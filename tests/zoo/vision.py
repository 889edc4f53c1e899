"""Models of transformers that read images or videos alone."""

from __future__ import annotations

from typing import Any

from tests.zoo.table import of_transformers

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2]}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1],
          "layer_type": "basic"}  # fmt: skip
DETR = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 5,
}  # fmt: skip
BACKBONE = {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}
PYRAMID = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3],
    "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
}  # fmt: skip

IMAGES: dict[str, dict[str, Any]] = {
    "BeitForImageClassification": {**VIT, "use_relative_position_bias": True},
    "BitForImageClassification": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
                                  "num_groups": 2},
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    "ConvNextV2ForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    "CvtForImageClassification": {"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3]},
    "Data2VecVisionForImageClassification": VIT,
    "DeiTForImageClassificationWithTeacher": VIT,
    "Dinov2ForImageClassification": {**{k: v for k, v in VIT.items() if k != "intermediate_size"}, "mlp_ratio": 2},
    "Dinov2WithRegistersForImageClassification": {
        **{k: v for k, v in VIT.items() if k != "intermediate_size"}, "mlp_ratio": 2, "num_register_tokens": 2,
    },
    "DINOv3ViTModel": {**VIT, "num_register_tokens": 2},
    "EfficientNetForImageClassification": {
        "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "image_size": 64,
        "in_channels": [32, 16, 24], "out_channels": [16, 24, 40], "kernel_sizes": [3, 3, 5], "strides": [1, 2, 2],
        "num_block_repeats": [1, 1, 1], "expand_ratios": [1, 6, 6],
    },
    "FocalNetForImageClassification": {
        "image_size": 32, "patch_size": 4, "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
        "focal_levels": [1, 1], "focal_windows": [3, 3],
    },
    "HieraForImageClassification": {
        "embed_dim": 8, "image_size": [64, 64], "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1,
        "masked_unit_attention": [True, False],
    },
    "IJepaForImageClassification": VIT,
    "LevitForImageClassification": {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
        "key_dim": [4, 4, 4],
    },
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.25, "image_size": 32},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.25, "image_size": 32},
    "MobileViTForImageClassification": {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 16, 20, 24],
        "num_attention_heads": 2,
    },
    "MobileViTV2ForImageClassification": {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]},
    "PoolFormerForImageClassification": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]},
    "PvtForImageClassification": {
        "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1],
        "hidden_sizes": [8, 16], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    },
    "PvtV2ForImageClassification": {k: v for k, v in {**PYRAMID, "image_size": 32}.items() if k[:7] != "decoder"},
    "RegNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
                                     "groups_width": 4},
    "ResNetForImageClassification": {k: v for k, v in RESNET.items() if k != "model_type"},
    "SegformerForImageClassification": PYRAMID,
    "SwiftFormerForImageClassification": {"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16], "image_size": 64},
    "SwinForImageClassification": SWIN,
    "Swinv2ForImageClassification": SWIN,
    "ViTForImageClassification": VIT,
    "ViTMAEForPreTraining": {
        **VIT, "decoder_num_attention_heads": 2, "decoder_hidden_size": 12, "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 20,
    },
    "ViTMSNForImageClassification": VIT,
    "VitDetModel": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
        "pretrain_image_size": 32,
    },
}  # fmt: skip

DENSE: dict[str, dict[str, Any]] = {
    "BeitForSemanticSegmentation": {
        **VIT, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 8, "pool_scales": [1, 2],
    },
    "ConditionalDetrForObjectDetection": {**DETR, "backbone_config": BACKBONE},
    "DepthAnythingForDepthEstimation": {
        "backbone_config": {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 4, "mlp_ratio": 2,
                            "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
                            "out_features": ["stage1", "stage2", "stage3", "stage4"], "reshape_hidden_states": False},
        "reassemble_hidden_size": 16, "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 12,
        "head_hidden_size": 8,
    },
    "DetrForObjectDetection": {**DETR, "backbone_config": {**RESNET, "out_features": ["stage4"]}},
    "DPTForDepthEstimation": {
        **VIT, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 12,
    },
    "GLPNForDepthEstimation": {**PYRAMID, "num_encoder_blocks": 4, "depths": [1] * 4, "sr_ratios": [4, 2, 1, 1],
                               "hidden_sizes": [8, 8, 16, 16], "patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2],
                               "num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [2] * 4},
    "Mask2FormerForUniversalSegmentation": {
        "backbone_config": {"model_type": "swin", **SWIN, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2],
                            "image_size": 64, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 24,
        "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 24, "num_queries": 5,
    },
    "RTDetrForObjectDetection": {
        "backbone_config": {"model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16],
                            "depths": [1, 1, 1, 1], "layer_type": "basic",
                            "out_features": ["stage2", "stage3", "stage4"]},
        "encoder_hidden_dim": 16, "encoder_in_channels": [8, 16, 16], "encoder_ffn_dim": 24,
        "encoder_attention_heads": 2, "d_model": 16, "num_queries": 5, "decoder_in_channels": [16, 16, 16],
        "decoder_ffn_dim": 24, "decoder_layers": 1, "decoder_attention_heads": 2,
    },
    "SamModel": {
        "vision_config": {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1],
                          "num_pos_feats": 8, "mlp_dim": 24},
        "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                                "iou_head_hidden_dim": 16},
    },
    "SegformerForSemanticSegmentation": PYRAMID,
    "Swin2SRForImageSuperResolution": {"image_size": 16, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
                                       "window_size": 4},
    "UperNetForSemanticSegmentation": {
        "backbone_config": {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
                            "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        "hidden_size": 16, "pool_scales": [1, 2], "auxiliary_in_channels": 16, "auxiliary_channels": 8,
    },
    "VitPoseForPoseEstimation": {
        "backbone_config": {"model_type": "vitpose_backbone", "hidden_size": 16, "num_hidden_layers": 2,
                            "num_attention_heads": 2, "image_size": [32, 32], "patch_size": [8, 8], "mlp_ratio": 2,
                            "out_indices": [2]},
    },
    "YolosForObjectDetection": {**VIT, "image_size": [32, 32], "num_detection_tokens": 3},
}  # fmt: skip

VIDEOS: dict[str, dict[str, Any]] = {
    "TimesformerForVideoClassification": {**VIT, "num_frames": 4},
    "VideoMAEForVideoClassification": {**VIT, "num_frames": 4},
    "VivitForVideoClassification": {**{k: v for k, v in VIT.items() if k != "patch_size"}, "num_frames": 4,
                                    "tubelet_size": [2, 8, 8]},
    "VJEPA2ForVideoClassification": {
        "patch_size": 8, "crop_size": 32, "frames_per_clip": 4, "hidden_size": 24, "num_attention_heads": 2,
        "num_hidden_layers": 1, "mlp_ratio": 2, "pred_hidden_size": 24, "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1, "num_pooler_layers": 1,
    },
}  # fmt: skip

ARCHITECTURES = [
    *of_transformers("Image classification", IMAGES),
    *of_transformers("Detection, segmentation, depth", DENSE),
    *of_transformers("Video", VIDEOS),
]
