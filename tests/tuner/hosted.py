"""Models with every kind of host, small enough for a test, and what tests ask of them."""

from __future__ import annotations

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import KINDS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from san_peft import SanConfig, SanLayer

HOSTS = {
    "lora": LoraConfig(r=2),
    "rslora": LoraConfig(r=2, use_rslora=True, lora_dropout=0.3),
    "lora-bias": LoraConfig(r=2, lora_bias=True),
    "patterns": LoraConfig(r=2, rank_pattern={"fc1": 3}, alpha_pattern={"stem": 5}),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa"),
    "olora": LoraConfig(r=2, init_lora_weights="olora"),
    "dora": LoraConfig(r=2, use_dora=True),
    "ia3": peft.IA3Config(feedforward_modules=[]),
    "loha": peft.LoHaConfig(r=2),
    "lokr": peft.LoKrConfig(r=2),
    "vera": peft.VeraConfig(r=4),
    "randlora": peft.RandLoraConfig(r=2),
    "oft": peft.OFTConfig(r=0, oft_block_size=2, use_cayley_neumann=False),
    "hra": peft.HRAConfig(r=2),
}
ROTATIONS = ("oft", "hra")
ON_CONVOLUTIONS = ("lora", "rslora", "lora-bias", "dora", "ia3", "loha", "lokr", "hra")
CASES = [("dense", h) for h in HOSTS] + [("conv2d-lora", h) for h in ON_CONVOLUTIONS]


def config(kind: str, host: str, **options) -> SanConfig:
    biased = host == "lora-bias"
    targets = [t for t in KINDS[kind].targets if not (biased and t == "fc2")]
    targets = [t for t in targets if not (host in ROTATIONS and kind != "dense" and t == "flat")]
    if host in ROTATIONS:
        options = {"decomposition": "projection", **options}
    options = {"propagation": KINDS[kind].graph(), **options}
    return SanConfig(inner=HOSTS[host], target_modules=targets, **options)


def host_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def trained(kind: str, host: str, **options) -> PeftModel:
    """A model whose host has moved, as training would move it."""
    torch.manual_seed(0)
    model = get_peft_model(KINDS[kind].net(), config(kind, host, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in host_parameters(model).values():
            parameter.add_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * 0.2)
    return model


def run(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        return model(KINDS[kind].input())


def layers_of(model: PeftModel) -> dict[str, SanLayer]:
    return {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, SanLayer)}


def rows(layer: SanLayer) -> Tensor:
    return layer.get_base_layer().weight.detach().clone().flatten(1)


def small_llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 30}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **options)).eval()


LLAMA = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
"""The target list of most recipes for LLaMA."""
IDS = torch.arange(12).view(2, 6)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits
