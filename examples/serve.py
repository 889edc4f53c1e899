"""Generate with several adapters in one batch, hotswap one in a compiled model, and export LoRA and merged weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from san_peft import SanConfig, hotswap, merge_and_verify, save_as_lora

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def adapted(seed: int, **options) -> PeftModel:
    """Returns the same base model each time, with a randomly initialized adapter in place of a trained one."""
    set_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=100)).eval()  # in place of a pretrained model
    set_seed(seed)
    return get_peft_model(base, SanConfig(task_type="CAUSAL_LM", init_weights=False, **options)).eval()


def main() -> None:
    ids = torch.randint(0, 100, (3, 8), generator=torch.Generator().manual_seed(0))
    model = adapted(1)
    model.add_adapter("hosted", SanConfig(inner=LoraConfig(r=4, init_lora_weights=False), task_type="CAUSAL_LM"))
    names = ["default", "hosted", "__base__"]
    for name, tokens in zip(names, model.generate(input_ids=ids, adapter_names=names, **OPTIONS), strict=True):
        print(f"{name:8s} {tokens[8:].tolist()}")

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        other = adapted(2)
        other.save_pretrained(f"{folder}/other")
        model = adapted(1)
        compiled = torch.compile(model, backend="aot_eager")  # the default backend generates code
        compiled(input_ids=ids, use_cache=False)
        hotswap(model, f"{folder}/other")
        swapped = compiled(input_ids=ids, use_cache=False).logits
        print("swapped:", torch.allclose(swapped, other(input_ids=ids).logits, atol=1e-4))

        lora = save_as_lora(model, f"{folder}/lora", rank=16)
        print(f"closest LoRA of rank {lora.rank}: relative error {lora.error:.0%}")
        merge_and_verify(model).model.save_pretrained(f"{folder}/merged")
        print("merged folder:", *sorted(p.name for p in Path(folder, "merged").iterdir()))
        plain = AutoModelForCausalLM.from_pretrained(f"{folder}/merged")
        print("merged equals adapted:", torch.allclose(plain(ids).logits, swapped, atol=1e-4))


if __name__ == "__main__":
    main()
