"""The model of the frozen adapters: a small LLaMA, whose weights are kept since an initialisation may change."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "base.safetensors"
IDS = torch.arange(12).view(2, 6)


def new_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 30}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()


def base() -> LlamaForCausalLM:
    model = new_base()
    model.load_state_dict(load_file(WEIGHTS))
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits
