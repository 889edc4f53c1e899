"""Models in float64 whose scales are computed in a pass, or by every layer for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import disturb
from tests.golden.models import MODELS
from tests.tuner.hosted import IDS
from torch import Tensor, nn

from san_peft import SanConfig
from san_peft.tuner import fill

torch.set_num_threads(1)

LORA, DORA = LoraConfig(r=2), LoraConfig(r=2, use_dora=True)
CASES: dict[str, dict[str, Any]] = {
    "own": {},
    "shift": {"shift": True},
    "lora": {"inner": LORA},
    "projection": {"inner": LORA, "decomposition": "projection"},
    "feature": {"inner": LORA, "decomposition": "feature"},
    "dora": {"inner": DORA},
    "all": {"inner": LORA, "own_scale": True, "shift": True},
    "dora-own": {"inner": DORA, "own_scale": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "exponent": {"exponent": 2.0},
    "bound": {"bound": 0.2},
    "detach": {"detach": True},
    "gate": {"gate": True},
    "dropout": {"inner": LoraConfig(r=2, lora_dropout=0.3)},
    "dora-dropout": {"inner": LoraConfig(r=2, use_dora=True, lora_dropout=0.3)},
}
TARGETS = {"convnext": ["pwconv1", "pwconv2"]}
SIZES = {"vit": 16, "convnext": 32, "timm-vit": 16}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def larger(net: nn.Module) -> nn.Module:
    """Moves the frozen weights away from their start, where many layers do next to nothing and norms are one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return net


def adapted(name: str = "llama-grouped", **options: Any) -> PeftModel:
    """A model in float64 whose frozen weights and adapter are random."""
    torch.manual_seed(0)
    net = larger(MODELS[name]().double())
    model = get_peft_model(net, SanConfig(target_modules=TARGETS.get(name), **options)).double().eval()
    disturb(model)
    with torch.no_grad():  # a calibrated adapter
        for name, moments in model.named_buffers():
            if name.endswith(".moments"):
                moments.copy_(0.5 + torch.rand(moments.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def batch(name: str) -> dict[str, Tensor]:
    if name not in SIZES:
        return {"input_ids": IDS}
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, SIZES[name], SIZES[name], generator=generator, dtype=torch.float64)
    return {"x" if name.startswith("timm") else "pixel_values": images}


def output(model: nn.Module, name: str = "llama-grouped", **kwargs: Any) -> Tensor:
    found = model(**batch(name), **kwargs)
    return found if isinstance(found, Tensor) else found.logits


def total(out: Tensor) -> Tensor:
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)).sum()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def step(model: nn.Module, name: str = "llama-grouped") -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    out = output(model, name)
    total(out).backward()
    return out.detach(), gradients(model)


@contextmanager
def alone(model: PeftModel) -> Iterator[None]:
    """Without passes: every layer computes its scales by itself, and every edge acts at an input."""
    held = model.base_model.scales
    held._recall, held._pass = None, lambda cache: None
    try:
        yield
    finally:
        del held._pass


def check_law(model: PeftModel, name: str = "llama-grouped") -> None:
    out, grads = step(model, name)
    with alone(model):
        expected, expected_grads = step(model, name)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(grads, expected_grads, **CLOSE)
    assert all(g is not None for g in grads.values())


def counted(monkeypatch) -> list[int]:
    """Counts how often scales of LoRA hosts are computed, by the number of hosts."""
    found: list[int] = []
    plain = fill.low_rank_scales
    monkeypatch.setattr(fill, "low_rank_scales", lambda w, *args: found.append(len(w)) or plain(w, *args))
    return found
