"""Models of timm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.zoo.table import Architecture
from torch import nn

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2)}
STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": VIT,
    "cait_xxs24_224": {**VIT, "depth_token_only": 1},
    "coat_tiny": {"img_size": 64, "embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 1), "num_heads": 8,
                  "parallel_depth": 1, "mlp_ratios": (2, 2, 2, 2)},
    "crossvit_9_240": {"img_size": 48, "embed_dim": (8, 16), "depth": ((1, 1, 0),), "num_heads": (2, 2),
                       "mlp_ratio": (2.0, 2.0, 1.0), "img_scale": (1.0, 1.0)},
    "davit_tiny": {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (2, 2), "window_size": 4},
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "edgenext_xx_small": {},
    "efficientformer_l1": {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_vit": 1},
    "efficientvit_b0": {"widths": (8, 8, 16, 16, 16), "depths": (1, 1, 1, 1, 1), "head_dim": 8,
                        "head_widths": (24, 32)},
    "efficientvit_m0": {"img_size": 64, "embed_dim": (16, 16, 16), "depth": (1, 1, 1), "num_heads": (2, 2, 2),
                        "key_dim": (4, 4, 4), "window_size": (4, 4, 4)},
    "eva02_tiny_patch14_224": {**VIT},
    "fastvit_t8": {"layers": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16)},
    "GlobalContextVit": {"img_size": 64, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "embed_dim": 8,
                         "window_ratio": (16, 16, 16, 32)},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 8, "num_heads": 1, "stages": (1, 1), "q_pool": 1,
                       "mask_unit_attn": (True, False)},
    "MetaNeXt": {"depths": (1, 1, 1, 1), "dims": (16, 16, 16, 16)},
    "levit_128s": {"img_size": 64, "embed_dim": (16, 16, 24), "num_heads": (2, 2, 2), "depth": (1, 1, 1),
                   "key_dim": 4},
    "maxvit_tiny_tf_224": {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1), "stem_width": 16,
                           "block_type": ("M", "M")},
    "MlpMixer": {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16},
    "mobilevit_xxs": {},
    "Nest": {"img_size": 32, "num_levels": 2, "embed_dims": (8, 16), "num_heads": (1, 2), "depths": (1, 1)},
    "pit_ti_224": {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": (8, 8), "depth": (1, 1), "heads": (1, 2)},
    "MetaFormer": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)},
    "sequencer2d_s": {"img_size": 32, "layers": (1, 1), "embed_dims": (8, 8), "hidden_sizes": (4, 4),
                      "patch_sizes": (8, 1), "mlp_ratios": (2, 2)},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "tiny_vit_5m_224": {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1),
                        "num_heads": (1, 1, 2, 2), "window_sizes": (4, 4, 4, 4)},
    "tnt_s_patch16_224": {"img_size": 32, "embed_dim": 16, "inner_dim": 8, "depth": 1, "num_heads_outer": 2,
                          "num_heads_inner": 2},
    "twins_pcpvt_small": {"img_size": 64, "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2),
                          "depths": (1, 1, 1, 1)},
    "visformer_tiny": {"img_size": 64, "init_channels": 8, "embed_dim": 16, "depth": (1, 1, 1), "num_heads": 2},
    "vit_base_patch16_clip_224": VIT,
    "vit_small_patch14_dinov2": {**VIT, "patch_size": 8},
    "vit_base_patch16_siglip_224": VIT,
    "vit_relpos_small_patch16_224": VIT,
    "vit_tiny_patch16_224": VIT,
    "VOLO": {"img_size": 64, "layers": (1, 1), "embed_dims": (16, 16), "num_heads": (2, 2),
             "downsamples": (True, False), "outlook_attention": (True, False)},
    "xcit_nano_12_p16_224": {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2},
}  # fmt: skip

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "convnext_atto": STAGES,
    "convnextv2_atto": STAGES,
    "densenet121": {"growth_rate": 4, "block_config": (1, 1)},
    "dla34": {"levels": (1, 1, 1, 1, 1, 1), "channels": (4, 4, 8, 8, 16, 16)},
    "FocalNet": {"depths": (1, 1), "embed_dim": 8, "focal_levels": (1, 1), "focal_windows": (3, 3)},
    "ghostnet_050": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "dm_nfnet_f0": {"width_factor": 0.25, "depths": (1, 1, 1, 1), "group_size": 8},
    "regnety_002": {},
    "repvit_m0_9": {"embed_dim": (8, 8, 16, 16), "depth": (1, 1, 1, 1)},
    "resnet18": RESNET,
    "resnet50": RESNET,
    "resnetv2_50": {"layers": (1, 1), "channels": (32, 32), "stem_chs": 32},
    "seresnet50": RESNET,
    "skresnet18": {"layers": (1, 1, 1, 1)},
    "starnet_s1": {"base_dim": 8, "depths": (1, 1, 1, 1)},
    "tresnet_m": {"layers": (1, 1, 1, 1), "width_factor": 0.25},
}  # fmt: skip


def _maker(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        kind = getattr(timm.models, name) if name[0].isupper() else partial(timm.create_model, name)
        return kind(**{"num_classes": 5, **options})

    return make


ARCHITECTURES = [
    Architecture(name, "timm", family, _maker(name, options))
    for family, rows in (("timm: attention and mixing", TRANSFORMERS), ("timm: convolutions", CONVOLUTIONS))
    for name, options in rows.items()
]
