"""The trainers people use: transformers' Trainer and TRL's SFTTrainer, checkpointing, accumulation, and resuming."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from san_peft import SanConfig, SanLayer, merge_and_verify

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "own": lambda: SanConfig(),
    "lora": lambda: SanConfig(inner=LoraConfig(r=2, target_modules=TARGETS)),
    "dora": lambda: SanConfig(inner=LoraConfig(r=2, use_dora=True, target_modules=TARGETS)),
    "dropout": lambda: SanConfig(inner=LoraConfig(r=2, lora_dropout=0.2, target_modules=TARGETS)),
}
CLOSE = {"rtol": 1e-6, "atol": 1e-9}
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "plus", "is", "."]


def llama() -> tf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=50,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.LlamaForCausalLM(config)


def tokens(rows: int = 32) -> list[dict[str, Tensor]]:
    """Rows of tokens of one length, so that a mean over a batch is a mean over its rows."""
    ids = torch.randint(3, 50, (rows, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def fit(
    host: str, folder: Path, *callbacks: tf.TrainerCallback, resume: bool = False, **options: Any
) -> tuple[PeftModel, list[float]]:
    """Trains in float64, where rounding is no excuse, and returns the model and the losses of its steps."""
    tf.set_seed(0)
    model = get_peft_model(llama().double(), CONFIGS[host]())
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "save_strategy": "no",
        **options,
    }
    arguments = tf.TrainingArguments(
        str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        lr_scheduler_type="constant",
        **options,
    )
    trainer = tf.Trainer(model, arguments, train_dataset=tokens(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def assert_same_training(one: PeftModel, other: PeftModel, **close: float) -> None:
    first, second = trained(one), trained(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, **(close or CLOSE), msg=lambda t, name=name: f"{name}: {t}")


@pytest.fixture(scope="module")
def plainly(tmp_path_factory) -> dict[str, tuple[PeftModel, list[float]]]:
    return {host: fit(host, tmp_path_factory.mktemp(host)) for host in ("own", "lora", "dora")}


@pytest.mark.parametrize("host", ["own", "lora", "dora"])
def test_trainer_learns_saves_and_loads(host, plainly, tmp_path):
    model, losses = plainly[host]
    start = trained(get_peft_model(llama().double(), CONFIGS[host]()))
    assert any(not torch.allclose(value, start[name]) for name, value in trained(model).items())
    assert len(set(losses)) == 4
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().double(), tmp_path).eval()
    ids = tokens(2)[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, **CLOSE)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("host", ["own", "lora", "dora"])
def test_checkpointing_changes_no_step(host, reentrant, plainly, tmp_path):
    seen = []

    class Watch(tf.TrainerCallback):
        def on_train_begin(self, arguments, state, control, model, **kwargs):
            block = model.base_model.model.model.layers[0]
            block.self_attn.v_proj.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))

    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model, losses = fit(host, tmp_path, Watch(), **options)
    assert len(seen) == 8, "every block runs twice in each of the 4 steps"
    assert losses == pytest.approx(plainly[host][1], rel=1e-4)
    assert_same_training(plainly[host][0], model)


@pytest.mark.parametrize("host", ["own", "lora", "dora"])
def test_one_row_eight_times_is_eight_rows_once(host, tmp_path):
    whole, _ = fit(host, tmp_path / "whole", per_device_train_batch_size=8, gradient_accumulation_steps=1)
    parts, _ = fit(host, tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert_same_training(whole, parts)


KILLED = """
import os, signal, sys
from pathlib import Path
import transformers as tf
from tests.integrations.test_training import fit

class Kill(tf.TrainerCallback):
    def on_step_end(self, arguments, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

fit("dropout", Path(sys.argv[1]), Kill(), max_steps=5, save_strategy="steps", save_steps=2)
"""


@pytest.mark.slow
def test_a_killed_process_resumes_on_its_trajectory(tmp_path):
    """The host has dropout, so the state of the random generator must come back as well."""
    whole, losses = fit("dropout", tmp_path / "whole", max_steps=5)
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "cut")], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == -signal.SIGKILL, run.stderr[-3000:]
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-2"]
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    resumed, later = fit("dropout", tmp_path / "cut", resume=True, **options)
    assert later == losses
    assert_same_training(whole, resumed)


# ------------------------------------------------------------------ TRL


def tokenizer() -> tf.PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def sums() -> Dataset:
    numbers = WORDS[:8]
    pairs = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    return Dataset.from_dict(
        {
            "prompt": [f"{numbers[a - 1]} plus {numbers[b - 1]} is" for a, b in pairs],
            "completion": [f" {numbers[a + b - 1]} ." for a, b in pairs],
        }
    )


@pytest.mark.parametrize("host", ["own", "lora", "dora"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sft(host, tmp_path):
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        str(tmp_path),
        num_train_epochs=6,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        max_length=16,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        logging_steps=1,
        save_steps=6,
    )
    trainer = SFTTrainer(
        llama(), arguments, train_dataset=sums(), processing_class=tokenizer(), peft_config=CONFIGS[host]()
    )
    model: Any = trainer.model
    layers = [m for m in model.modules() if isinstance(m, SanLayer)]
    assert layers
    assert model.base_model.propagation_graph.edges
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.tensor([tokenizer()("one plus two is")["input_ids"]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        for folder in ("saved", "checkpoint-12"):
            again = PeftModel.from_pretrained(llama(), tmp_path / folder).eval()
            torch.testing.assert_close(again(input_ids=ids).logits, expected)
        merged = merge_and_verify(again, {"input_ids": ids}).model
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
