"""Train SAN over LoRA on a 4-bit LLaMA, dequantize it, and merge. Runs on the CPU with a small random model."""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, set_seed

from san_peft import SanConfig, dequantize, merge_and_verify

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def quantized_base(folder: str) -> torch.nn.Module:
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=100)).save_pretrained(folder)  # in place of a pretrained model
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,  # bfloat16 on a GPU
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, dtype=torch.float32)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = prepare_model_for_kbit_training(
            quantized_base(folder), gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    config = SanConfig(inner=LoraConfig(r=8, target_modules=TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    print(f"{len(model.base_model.propagation_graph.edges)} edges, traced on the quantized model")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ids = torch.randint(0, 100, (4, 16))
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(f"{dequantize(model)} layers dequantized")
    report = merge_and_verify(model)
    print(f"merging changed the logits by {report.max_abs_difference:.0e}; the tolerance is {report.tolerance:.0e}")


if __name__ == "__main__":
    main()
