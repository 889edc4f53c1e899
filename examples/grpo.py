"""Train a small LLaMA on a reward with TRL's GRPOTrainer; the reference policy is the model without its adapter."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

from san_peft import SanConfig

GOODS = ["apples", "bread", "butter", "cheese"]
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def pretrained() -> LlamaForCausalLM:
    set_seed(0)  # in place of a pretrained model
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**size, **special, vocab_size=16, initializer_range=0.2))


def says_here(completions: list[str], **_: Any) -> list[float]:
    return [float("here" in text.split()) for text in completions]


def main() -> None:
    words = [*SPECIAL.values(), "where", "are", "here", "gone", *GOODS]
    vocabulary = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    prompts = [f"where are {name}" for name in GOODS] * 4
    gpu = torch.cuda.is_available()
    options = {"report_to": [], "use_cpu": not gpu, "bf16": gpu, "logging_steps": 1, "disable_tqdm": True}
    options |= {"per_device_train_batch_size": 32, "num_generations": 8, "max_completion_length": 3, "beta": 0.02}
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            pretrained(),
            says_here,
            args=GRPOConfig(folder, max_steps=40, learning_rate=0.02, **options),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=vocabulary, padding_side="left", **SPECIAL),
            peft_config=SanConfig(inner=LoraConfig(r=4, target_modules="all-linear"), task_type="CAUSAL_LM"),
        )
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"mean reward: {rewards[0]:.2f} at the first step, {sum(rewards[-3:]) / 3:.2f} over the last three")


if __name__ == "__main__":
    main()
