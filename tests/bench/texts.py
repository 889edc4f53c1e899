"""Records in the format of the published files, tokenizers in the style of LLaMA 2 and 3, and models that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from san_bench.config.recipe import load_recipe
from san_bench.language.instructions import Instruction
from san_bench.language.recipe import TextRecipe

QUESTIONS = {
    "boolq": ("Please answer the following question with true or false, question: is rain wet?", "", "true"),
    "piqa": (
        "Please choose the correct solution to the question: how to dry a cup",
        "Solution1: wipe it with a cloth\n\nSolution2: hold it under the tap",
        "solution1",
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Kim gave Bo a map. Why?",
        "Answer1: to lose him Answer2: to show the way Answer3: to fly",
        "answer2",
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Rowing: A man in a boat",
        "Ending1: sings. Ending2: pulls the oars. Ending3: flies. Ending4: melts.",
        "ending2",
    ),
    "ARC-Easy": (
        "Please choose the correct answer to the question: What do plants need?",
        "Answer1: iron Answer2: noise Answer3: sand Answer4: wind Answer5: light",
        "answer5",
    ),
    "ARC-Challenge": (
        "Please choose the correct answer to the question: Which is a solid?",
        "Answer1: ice Answer2: steam Answer3: air Answer4: rain",
        "answer1",
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: A magnet pulls",
        "Answer1: wood Answer2: glass Answer3: nails Answer4: soap",
        "answer3",
    ),
}
"""Question, options and answer of each task; in WinoGrande the format stands on the line of the options."""

FORMATS = {
    "boolq": "true/false",
    "piqa": "solution1/solution2",
    "social_i_qa": "answer1/answer2/answer3",
    "hellaswag": "ending1/ending2/ending3/ending4",
    "ARC-Easy": "answer1/answer2/answer3/answer4/answer5",
}

WINOGRANDE = (
    "Please choose the correct answer to fill in the blank to complete the given sentence: The cup did not fit the box "
    "because the _ was too small.\n\nOption1: cup Option2: box Answer format: option1/option2"
)


def record(task: str) -> Instruction:
    """A record of a task as its published file has them."""
    if task == "winogrande":
        return Instruction(WINOGRANDE, "", "the correct answer is option2", "option2")
    question, options, answer = QUESTIONS[task]
    form = FORMATS.get(task, "answer1/answer2/answer3/answer4")
    text = "\n\n".join(part for part in (question, options, f"Answer format: {form}") if part)
    return Instruction(text, "", f"the correct answer is {answer}", answer)


def write(path: Path, records: list[Any]) -> Path:
    """Writes records as the published files are written: a list, indented by four."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [one.fields() if isinstance(one, Instruction) else one for one in records]
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return path


TASKS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")


def corpus() -> list[str]:
    words = [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    ]
    words += ["### Instruction:\n### Response:\n" + " " * 16 + "the correct answer is answer4 " + " " * 15]
    return [*words, *(record(task).instruction + record(task).output for task in TASKS)] * 3


def llama2() -> PreTrainedTokenizerFast:
    """BPE over sentencepiece's blanks, with bytes for what is unknown, as LLaMA 1 and 2 have it."""
    before = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    split = pre_tokenizers.Split(Regex(r"▁+(?=▁[^▁])|▁?[^▁]+|▁+"), behavior="isolated")
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer, learner.pre_tokenizer = before, split
    learner.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    ids = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = before, split
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def llama3(*kept: str, bos: bool = True) -> PreTrainedTokenizerFast:
    """BPE over bytes with the special tokens behind the words, as LLaMA 3 has it; id 0 is an exclamation mark.

    Args:
        kept: Tokens that are kept free.
        bos: Puts the beginning before every text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    )
    special = ["<|begin_of_text|>", "<|end_of_text|>", *kept, "<|eot_id|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    if bos:
        start = [("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=start)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )


PAD = "<|finetune_right_pad_id|>"


def llama(vocabulary: int) -> LlamaForCausalLM:
    """A small model with weights drawn from seed 0, large enough that its choices are not close."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(vocabulary: int) -> GPT2LMHeadModel:
    """The same with positions that are counted from the beginning, so that padding at the left must not count."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "all-linear"}
OVER = {**LORA, "propagation": "all", "decomposition": "norm", "exponent": 1.0, "bound": None, "detach": False}
PLAIN = {"detach": False, "gate": False}
METHODS = {
    "san": {"kind": "san", "propagation": "all", "exponent": 1.0, "shift": False, "train_norms": True, **PLAIN},
    "lora": {"kind": "lora", **LORA},
    "san-lora": {"kind": "san-lora", **OVER},
    "dora": {"kind": "dora", **LORA},
    "san-dora": {"kind": "san-dora", **OVER},
    "full": {"kind": "full"},
}


def question(number: int) -> Instruction:
    answer = "true" if number % 2 else "false"
    return Instruction(f"Is {number} odd?\n\nAnswer format: true/false", "", f"the correct answer is {answer}", answer)


def small_language(folder: Path) -> Path:
    """A small LLaMA with its tokenizer, and records in the published format."""
    tokenizer = llama2()
    llama(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write(folder / "data" / "train.json", [question(n) for n in range(20)])
    write(folder / "data" / "test.json", [question(n) for n in range(20, 26)])
    return folder


def recipe_of(place: Path, output: Path, kind: str = "san", **changes: object) -> TextRecipe:
    values = {
        "task": "instructions", "data": str(place / "data"), "model": str(place / "model"), "method": METHODS[kind],
        "train_split": "train", "selection": "last", "protocol": None, "weights": "fp32", "precision": "fp32",
        "text.template": "clean", "text.loss_on": "answer", "scoring.ways": ["generation", "likelihood"],
        "scoring.beams": 1, "optimizer.lr": 0.01, "optimizer.warmup": 0.1, "checkpoint_steps": 0, "optimizer.epochs": 2,
        "optimizer.batch_size": 6, "scoring.batch_size": 4,
        "scoring.max_new_tokens": 6, "output": str(output),
    }  # fmt: skip
    return load_recipe(
        "language/llama-3-8b-san-lora", {**values, **{key.replace("__", "."): value for key, value in changes.items()}}
    )
