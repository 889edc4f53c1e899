"""Align a small LLaMA with TRL's DPOTrainer and GRPOTrainer; the reference policy is the model without its adapter."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from san_peft import SanConfig

GOODS = ["apples", "bread", "butter", "cheese"]
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def pretrained() -> LlamaForCausalLM:
    set_seed(0)  # in place of a pretrained model
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(**size, vocab_size=16, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.2)
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL.values(), "where", "are", "here", "gone", *GOODS]
    vocabulary = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, padding_side="left", **SPECIAL)


def polite(completions: list[str], **_: Any) -> list[float]:
    """Rewards the word `here`."""
    return [float("here" in text.split()) for text in completions]


def main() -> None:
    prompts = [f"where are {name}" for name in GOODS] * 4
    pairs = {"prompt": prompts, "chosen": [" here"] * len(prompts), "rejected": [" gone"] * len(prompts)}
    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"report_to": [], "use_cpu": not gpu, "bf16": gpu, "logging_steps": 1}
    options |= {"disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 32}
    config = SanConfig(inner=LoraConfig(r=4, target_modules="all-linear"), task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        dpo = DPOTrainer(
            pretrained(),
            args=DPOConfig(folder, max_steps=20, learning_rate=0.01, beta=0.1, **options),
            train_dataset=Dataset.from_dict(pairs),
            processing_class=tokenizer(),
            peft_config=config,
        )
        dpo.train()
        grpo = GRPOTrainer(
            pretrained(),
            reward_funcs=polite,
            args=GRPOConfig(
                folder,
                max_steps=40,
                learning_rate=0.02,
                num_generations=8,
                max_completion_length=3,
                beta=0.02,
                **options,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer(),
            peft_config=config,
        )
        grpo.train()
    margins = [entry["rewards/margins"] for entry in dpo.state.log_history if "rewards/margins" in entry]
    rewards = [entry["reward"] for entry in grpo.state.log_history if "reward" in entry]
    print(f"DPO: margin between chosen and rejected {margins[0]:.2f} at the first step, {margins[-1]:.2f} at the last")
    print(f"GRPO: mean reward {rewards[0]:.2f} at the first step, {sum(rewards[-3:]) / 3:.2f} over the last three")


if __name__ == "__main__":
    main()
