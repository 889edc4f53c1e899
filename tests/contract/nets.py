"""Small nets, one per kind of layer, each a chain with edges of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from san_peft import PropagationGraph, SanConfig, trace


class Dense(nn.Module):
    """A feed-forward block with a residual, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.fc2(torch.relu(self.fc1(self.norm(x)))))


class Transposed(nn.Module):
    """GPT-2's layer, whose weight is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = Conv1D(12, 6), Conv1D(8, 12), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc2(torch.nn.functional.gelu(self.fc1(x)))))


class Image(nn.Module):
    """Convolutions: full, depthwise, grouped, and one without bias; then pixels flattened into a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2, bias=False)
        self.last = nn.Conv2d(8, 4, 2, stride=2)
        self.flat, self.head = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(torch.relu(self.depthwise(self.stem(x))))
        return self.head(torch.relu(self.flat(self.last(x).flatten(1))))


class Sequence(nn.Module):
    """One-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 3, groups=4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(torch.relu(self.conv1(x))).mean(-1))


CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2}}
"""Accepted differences by type."""


@dataclass(frozen=True)
class Kind:
    """A net, its input, its targets, and the adapter that hosts SAN if there is one."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    inner: Callable[[], PeftConfig] | None = None

    def net(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(dtype).eval()

    def input(self, dtype: torch.dtype = torch.float32, batch: int = 4) -> Tensor:
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def graph(self) -> PropagationGraph:
        return trace(self.net(), self.input())

    def config(self, **options: object) -> SanConfig:
        options = {"propagation": self.graph(), "modules_to_save": ["head"], **options}
        if self.inner is not None:
            options = {"inner": self.inner(), "own_scale": bool(options.get("shift")), **options}
        return SanConfig(target_modules=list(self.targets), **options)


KINDS = {
    "dense": Kind(Dense, (6,), ("stem", "fc1", "fc2")),
    "conv1d": Kind(Sequence, (3, 9), ("conv1", "conv2")),
    "conv2d": Kind(Image, (3, 4, 4), ("stem", "depthwise", "grouped", "last", "flat")),
    "gpt2": Kind(Transposed, (6,), ("fc1", "fc2")),
    "dense-lora": Kind(Dense, (6,), ("stem", "fc1", "fc2"), lambda: LoraConfig(r=2)),
    "dense-dora": Kind(Dense, (6,), ("stem", "fc1", "fc2"), lambda: LoraConfig(r=2, use_dora=True)),
    "conv2d-lora": Kind(Image, (3, 4, 4), ("stem", "last", "flat"), lambda: LoraConfig(r=2)),
    "conv2d-dora": Kind(Image, (3, 4, 4), ("stem", "last", "flat"), lambda: LoraConfig(r=2, use_dora=True)),
}


def ours(name: str) -> bool:
    """Whether a parameter is one of an adapter: of SAN, or of what hosts it."""
    return "san_" in name or "lora_" in name


def disturb(model: nn.Module, adapter_name: str = "default", seed: int = 0, size: float = 0.2) -> None:
    """Gives an adapter's vectors random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ours(name) and f".{adapter_name}." in name:
                parameter.add_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * size)


def adapted(kind: Kind, dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    """A net of a kind with an adapter whose vectors are random."""
    model = get_peft_model(kind.net(dtype), kind.config(**options)).eval()
    disturb(model)
    return model


def outputs(model: nn.Module, kind: Kind, dtype: torch.dtype, **kwargs) -> Tensor:
    """What a net of a kind gives on its input."""
    with torch.no_grad():
        return model(kind.input(dtype), **kwargs)
