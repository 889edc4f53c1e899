"""Models of diffusers, whose inputs are given: they are no models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.zoo.table import Architecture
from torch import Tensor, nn

UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}


def noise(*shape: int) -> Tensor:
    """Returns normally distributed numbers, the same in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def step(*shape: int, **others: Any) -> dict[str, Any]:
    """Returns a noisy image and the time of a step, with other arguments."""
    return {"sample": noise(*shape), "timestep": torch.tensor([3]), **others}


ROWS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "AutoencoderKL": (
        {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
         "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4},
        lambda: {"sample": noise(1, 3, 16, 16)},
    ),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
         "num_decoder_blocks": (1, 1)},
        lambda: {"sample": noise(1, 3, 16, 16)},
    ),
    "DiTTransformer2DModel": (
        {**DIT, "in_channels": 4, "num_embeds_ada_norm": 10},
        lambda: {"hidden_states": noise(1, 4, 8, 8), "timestep": torch.tensor([3]), "class_labels": torch.tensor([1])},
    ),
    "FluxTransformer2DModel": (
        {"patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 12, "axes_dims_rope": (4, 4, 8)},
        lambda: {"hidden_states": noise(1, 9, 8), "encoder_hidden_states": noise(1, 5, 16),
                 "pooled_projections": noise(1, 12), "timestep": torch.tensor([0.3]), "img_ids": torch.zeros(9, 3),
                 "txt_ids": torch.zeros(5, 3), "guidance": None},
    ),
    "PixArtTransformer2DModel": (
        {**DIT, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 12,
         "use_additional_conditions": False},
        lambda: {"hidden_states": noise(1, 4, 8, 8), "encoder_hidden_states": noise(1, 5, 12),
                 "timestep": torch.tensor([3])},
    ),
    "SD3Transformer2DModel": (
        {**DIT, "in_channels": 4, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 12,
         "out_channels": 4, "pos_embed_max_size": 8},
        lambda: {"hidden_states": noise(1, 4, 8, 8), "encoder_hidden_states": noise(1, 5, 16),
                 "pooled_projections": noise(1, 12), "timestep": torch.tensor([3])},
    ),
    "UNet2DModel": (
        {**UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 8,
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda: step(1, 3, 8, 8),
    ),
    "UNet2DConditionModel": (
        {**UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16,
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8},
        lambda: step(1, 4, 8, 8, encoder_hidden_states=noise(1, 5, 16)),
    ),
}  # fmt: skip


def _maker(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**options)

    return make


ARCHITECTURES = [
    Architecture(name, "diffusers", "diffusers", _maker(name, options), inputs)
    for name, (options, inputs) in ROWS.items()
]
