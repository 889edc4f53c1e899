"""Fine-tune a small LLaMA with TRL's SFTTrainer and SAN over LoRA on sums in words, then save, load and merge."""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from san_peft import SanConfig, merge_and_verify

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def pretrained() -> LlamaForCausalLM:
    set_seed(0)  # in place of a pretrained model
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**size, vocab_size=16, pad_token_id=0, eos_token_id=1, bos_token_id=None))


def main() -> None:
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*SPECIAL.values(), "plus", "is", *NUMBERS])}, "<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pairs = [(a, b) for a in range(4) for b in range(4)]
    rows = {
        "prompt": [f"{NUMBERS[a]} plus {NUMBERS[b]} is" for a, b in pairs],
        "completion": [f" {NUMBERS[a + b + 1]}" for a, b in pairs],
    }
    config = SanConfig(inner=LoraConfig(r=4, target_modules="all-linear"), task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        gpu = torch.cuda.is_available()
        options = {"report_to": [], "use_cpu": not gpu, "bf16": gpu, "logging_steps": 10, "disable_tqdm": True}
        trainer = SFTTrainer(
            pretrained(),
            SFTConfig(folder, max_steps=40, learning_rate=0.01, per_device_train_batch_size=8, **options),
            train_dataset=Dataset.from_dict(rows),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL),
            peft_config=config,
        )
        trainer.train()
        trainer.save_model(folder)
        loaded = PeftModel.from_pretrained(pretrained(), folder)
    report = merge_and_verify(loaded)
    print(f"merged {report.layers} layers; the logits changed by at most {report.max_abs_difference:.1e}")


if __name__ == "__main__":
    main()
