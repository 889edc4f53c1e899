"""Quantised bases and compiled code on a GPU: what runs on the CPU too, with the kernels that only a GPU has."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.contract.nets import disturb
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from san_peft import SanConfig, SanLayer, dequantize, merge_and_verify, trace

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
QUANTIZED = {
    "4bit": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
}
INNER = {"own": None, "lora": LoraConfig(r=4), "dora": LoraConfig(r=4, use_dora=True)}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.cuda()).logits


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("host", INNER)
def test_a_quantised_base(bits, host, tmp_path):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QUANTIZED[bits](), dtype=torch.bfloat16, device_map="cuda"
    ).eval()
    assert trace(base).edges == trace(llama()).edges
    before = logits(base)
    model = get_peft_model(base, SanConfig(target_modules=TARGETS, inner=INNER[host])).eval()
    assert torch.equal(logits(model), before)
    mine = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(mine.values(), lr=0.02)
    losses, reached = [], set()
    for _ in range(8):
        loss = model.train()(input_ids=IDS.cuda(), labels=IDS.cuda()).loss
        loss.backward()
        reached |= {n for n, p in mine.items() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert reached == mine.keys()
    before = logits(model.eval())
    assert dequantize(model) == 14
    torch.testing.assert_close(logits(model), before, rtol=0.1, atol=0.1)
    assert all(type(m) is nn.Linear for m in merge_and_verify(model).model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("host", INNER)
def test_compiled_after_a_move_to_the_gpu(host):
    """Row norms, which were taken on the CPU, follow."""
    model = get_peft_model(llama(), SanConfig(target_modules=TARGETS, inner=INNER[host]))
    disturb(model)
    model.cuda().train()
    assert any(isinstance(m, SanLayer) for m in model.modules())
    plain = model(input_ids=IDS.cuda(), labels=IDS.cuda(), use_cache=False).loss
    compiled = torch.compile(model, fullgraph=True)
    loss = compiled(input_ids=IDS.cuda(), labels=IDS.cuda(), use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=1e-3)
