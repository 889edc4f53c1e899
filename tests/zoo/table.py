"""One table of small random models: its rows name an architecture and what makes it as small as possible."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Architecture:
    """A way to make a small random model.

    Args:
        name: Name of its class, or of timm's or torchvision's model.
        library: Package that it is of.
        family: What it reads, such as `text`.
        make: Returns the model.
        inputs: Returns example inputs, for a model whose inputs cannot be derived.
    """

    name: str
    library: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any] | None = None

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return importlib.util.find_spec(self.library) is not None

    def build(self) -> nn.Module:
        """Returns the model in eval mode; the same weights in every call."""
        torch.manual_seed(0)
        return self.make().eval()


FAST = (
    "BertForSequenceClassification",
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "CLIPModel",
    "resnet18",
    "swin_tiny_patch4_window7_224",
)
"""A sample over the families that runs with every test; the others are slow together."""


def architectures() -> dict[str, Architecture]:
    """Returns all rows by name."""
    from tests.zoo import audio, diffusion, multimodal, text, timm_models, torchvision_models, vision

    rooms = (text, vision, multimodal, audio, timm_models, torchvision_models, diffusion)
    found = [row for room in rooms for row in room.ARCHITECTURES]
    assert len({row.name for row in found}) == len(found), "a name stands twice"
    return {row.name: row for row in found}


def of_transformers(family: str, rows: dict[str, dict[str, Any]]) -> list[Architecture]:
    """Returns the rows of classes of transformers, each with the arguments of its configuration."""

    def maker(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            import transformers

            kind = getattr(transformers, name)
            return kind(kind.config_class(**options))

        return make

    return [Architecture(name, "transformers", family, maker(name, options)) for name, options in rows.items()]
