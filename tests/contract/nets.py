"""Small nets, one per kind of layer, each a chain with edges of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


class Volume(nn.Module):
    """Three-dimensional convolutions, one of them grouped and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv3d(2, 8, 2, padding=1), nn.Conv3d(8, 4, 2, groups=2, bias=False)
        self.last, self.head = nn.Conv3d(4, 4, (2, 1, 3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(torch.relu(self.grouped(self.stem(x)))).flatten(2).mean(-1))


class Decoder(nn.Module):
    """Transposed convolutions: one-dimensional, grouped, with stride and output padding, without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose1d(3, 8, 3, stride=2, output_padding=1)
        self.up2 = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=4)
        self.up3 = nn.ConvTranspose2d(8, 6, 2, groups=2, bias=False)
        self.up4, self.head = nn.ConvTranspose3d(6, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up1(x).unsqueeze(-2).expand(-1, -1, 2, -1)
        x = self.up4(torch.relu(self.up3(self.up2(x))).unsqueeze(2))
        return self.head(torch.tanh(x).flatten(2).mean(-1))


class Attention(nn.Module):
    """Torch's attention to itself and, of other sizes, to another stream."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.stem, self.other = nn.Linear(6, 8), nn.Linear(6, 4)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.norm = nn.LayerNorm(8)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, bias=False, batch_first=True)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.requires_grad_(False)  # torch multiplies otherwise where a weight requires a gradient

    def forward(self, x: Tensor) -> Tensor:
        other, x = self.other(x), self.stem(x)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = x + self.cross(self.norm(x), other, other)[0]
        return self.head(torch.tanh(self.fc(x)).mean(1))


class Tokens(nn.Module):
    """An embedding that is read by a dense layer and by a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1 = nn.Embedding(10, 8, padding_idx=0), nn.Linear(8, 8)
        self.norm, self.fc2, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((torch.tanh(self.fc1(x)) + self.fc2(self.norm(x))).mean(1))


CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2}}
"""Accepted differences by type."""


@dataclass(frozen=True)
class Kind:
    """A net, its input, its targets, and the adapter that hosts SAN if there is one."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    inner: Callable[[], PeftConfig] | None = None
    tokens: int = 0
    embeddings: tuple[str, ...] = ()

    def net(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(dtype).eval()

    def input(self, dtype: torch.dtype = torch.float32, batch: int = 4) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.tokens:
            return torch.randint(self.tokens, (batch, *self.shape), generator=generator)
        return torch.randn(batch, *self.shape, generator=generator).to(dtype)

    def graph(self) -> PropagationGraph:
        return trace(self.net(), self.input(), self.embeddings)

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
    "conv3d": Kind(Volume, (2, 3, 3, 3), ("stem", "grouped", "last")),
    "transposed": Kind(Decoder, (3, 3), ("up1", "up2", "up3", "up4")),
    "attention": Kind(Attention, (5, 6), ("stem", "other", "attn", "cross", "fc")),
    "embedding": Kind(Tokens, (5,), ("embed", "fc1", "fc2"), tokens=10, embeddings=("embed",)),
    "dense-lora": Kind(Dense, (6,), ("stem", "fc1", "fc2"), lambda: LoraConfig(r=2)),
    "dense-dora": Kind(Dense, (6,), ("stem", "fc1", "fc2"), lambda: LoraConfig(r=2, use_dora=True)),
    "conv2d-lora": Kind(Image, (3, 4, 4), ("stem", "last", "flat"), lambda: LoraConfig(r=2)),
    "conv3d-lora": Kind(Volume, (2, 3, 3, 3), ("stem", "last"), lambda: LoraConfig(r=2)),
    "conv3d-dora": Kind(Volume, (2, 3, 3, 3), ("stem", "last"), lambda: LoraConfig(r=2, use_dora=True)),
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
