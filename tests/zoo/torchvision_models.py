"""Models of torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.zoo.table import Architecture
from torch import nn

ROWS: dict[str, dict[str, Any]] = {
    "DenseNet": {"growth_rate": 4, "block_config": (1, 1), "num_init_features": 8},
    "MobileNetV2": {"width_mult": 0.25},
    "mobilenet_v3_small": {"width_mult": 0.25},
    "resnet18": {"width_per_group": 64},
    "shufflenet_v2_x0_5": {},
    "SqueezeNet": {"version": "1_1"},
    "SwinTransformer": {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2],
                        "window_size": [4, 4]},
    "VisionTransformer": {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16,
                          "mlp_dim": 24},
}  # fmt: skip


def _maker(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        return getattr(models, name)(**options, num_classes=5)

    return make


ARCHITECTURES = [
    Architecture(f"torchvision.{name}", "torchvision", "torchvision", _maker(name, options))
    for name, options in ROWS.items()
]
