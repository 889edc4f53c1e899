"""TRL's trainers for preferences and rewards: the reference policy is the model with its adapter off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from san_peft import SanConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

WORDS = ["<pad>", "</s>", "<unk>", "where", "are", "here", "gone", "apples", "bread", "butter", "cheese"]
PROMPTS = [f"where are {name}" for name in WORDS[-4:]] * 4
CONFIGS = {
    "own": lambda: SanConfig(task_type="CAUSAL_LM"),
    "lora": lambda: SanConfig(inner=LoraConfig(r=4, target_modules="all-linear"), task_type="CAUSAL_LM"),
}
OPTIONS: dict[str, Any] = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 8,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**size, **special, vocab_size=16, initializer_range=0.2))


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, padding_side="left", **special)


def logged(trainer: Any, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def assert_trained_beside_its_reference(trainer: Any) -> None:
    """The adapter has moved; without it, the model is still the one that it started from."""
    model, ids = trainer.model.eval(), torch.tensor([[3, 4, 7]])
    assert getattr(trainer, "ref_model", None) is None
    frozen = llama().eval()
    with torch.no_grad():
        expected = frozen(ids).logits
        assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("host", CONFIGS)
def test_dpo(host, tmp_path):
    from trl import DPOConfig, DPOTrainer

    pairs = {"prompt": PROMPTS, "chosen": [" here"] * len(PROMPTS), "rejected": [" gone"] * len(PROMPTS)}
    trainer = DPOTrainer(
        llama(),
        args=DPOConfig(str(tmp_path), max_steps=12, **OPTIONS),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(),
        peft_config=CONFIGS[host](),
    )
    trainer.train()
    margins = logged(trainer, "rewards/margins")
    assert len(margins) == 12
    assert margins[0] == pytest.approx(0, abs=1e-6)  # policy and reference are the same function
    assert margins[-1] > 0.1
    assert_trained_beside_its_reference(trainer)


@pytest.mark.parametrize("host", CONFIGS)
def test_grpo(host, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float("here" in text.split()) for text in completions]

    options = {**OPTIONS, "learning_rate": 0.02, "per_device_train_batch_size": 32, "num_generations": 8}
    options |= {"max_completion_length": 2, "beta": 0.05}
    trainer = GRPOTrainer(
        llama(),
        reward_funcs=reward,
        args=GRPOConfig(str(tmp_path), max_steps=40, **options),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer(),
        peft_config=CONFIGS[host](),
    )
    trainer.train()
    distances, rewards = logged(trainer, "kl"), logged(trainer, "reward")
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert max(distances) > 0.01
    assert sum(rewards[-10:]) > sum(rewards[:10]) + 1
    assert_trained_beside_its_reference(trainer)
