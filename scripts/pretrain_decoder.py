"""Pretrains the small LLaMA of san_bench on texts about a small world: `python scripts/pretrain_decoder.py`.

The texts are those of `generators.world_text`; no text of the tasks of mini-language is among them. A byte-level
tokenizer is trained on the first of them, so any text can be encoded; `<unk>`, which no text needs, pads. The decoder
has grouped-query attention: two query heads share one key and value head. Sequences are packed: texts in a row, `</s>`
after each, cut at their length.

Texts of lists end in the number of the thing that was asked for. One such number among some forty tokens teaches too
little: with all tokens weighing the same, a decoder that knows every fact still guesses at numbers after eighty million
tokens. So for half of the steps these numbers weigh more (`--marks`).

The folder is written next to its final place and moved there when complete.

`--probe` trains nothing: it measures how often the shipped model finds the right answer of each task's validation split
the likeliest, without having been trained on any, and beside it what guessing gives.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from generators.world_text import choice, text
from pretrain import ASSETS, VALIDATION_SEED, circumstances, earlier_stage, fit, save
from san_bench.language.likelihood import log_likelihoods
from san_bench.language.mini import tasks as world
from san_bench.language.mini.words import RandomChoices
from san_bench.language.tokenizer import prepare_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]


def new_tokenizer(seed: int, texts: int, vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE: every byte is a token, digits stand alone, `<s>` begins a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((text(seed, index) for index in range(texts)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        model_max_length=512, clean_up_tokenization_spaces=False, padding_side="left",
    )  # fmt: skip


def new_decoder(vocabulary: int, layers: int, width: int) -> LlamaForCausalLM:
    """Builds a LLaMA of about 1.7 million values, with one key and value head for two query heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 96 * 32, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
            tie_word_embeddings=True, bos_token_id=SPECIAL.index("<s>"), eos_token_id=SPECIAL.index("</s>"),
            pad_token_id=SPECIAL.index("<unk>"),
        )
    )  # fmt: skip


class Packed(Dataset[torch.Tensor]):
    """Sequences of tokens without end: sequence `i` begins with text `64 i`, whoever reads it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, length: int, count: int) -> None:
        self.tokenizer, self.seed, self.length, self.count = tokenizer, seed, length, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        tokens: list[int] = []
        for place in range(index * 64, index * 64 + 64):
            tokens += [*self.tokenizer(text(self.seed, place))["input_ids"], self.tokenizer.eos_token_id]
            if len(tokens) >= self.length:
                break
        return torch.tensor(tokens[: self.length])


class Marked:
    """Finds the numbers that answer: those that end a sentence, unless they begin a line."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: str) -> None:
        self.numbers = torch.tensor(tokenizer.convert_tokens_to_ids(list("1234")), device=device)
        self.stop, self.line = tokenizer.convert_tokens_to_ids([".", "Ċ"])

    def among(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens are such numbers, but for the first and the last of each sequence."""
        numbers = torch.isin(tokens, self.numbers)
        found = torch.zeros_like(numbers)
        found[:, 1:-1] = numbers[:, 1:-1] & (tokens[:, 2:] == self.stop) & (tokens[:, :-2] != self.line)
        return found

    def loss(self, model: LlamaForCausalLM, tokens: torch.Tensor, weight: float) -> torch.Tensor:
        """Mean of what the next token costs in nats, over the tokens of sequences; these numbers weigh as given."""
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        weights = torch.where(self.among(tokens)[:, 1:].flatten(), weight, 1.0)
        return (losses * weights).sum() / weights.sum()


def choices(tokenizer: PreTrainedTokenizerFast, count: int) -> list[torch.Tensor]:
    """Texts of another seed whose last words are the number of the right one of two, three or four."""
    found, index = [], 0
    while len(found) < count:
        told = choice(RandomChoices(VALIDATION_SEED, index))
        if re.search(r"[1-4]\.$", told):
            found.append(torch.tensor(tokenizer(told)["input_ids"]))
        index += 1
    return found


@torch.no_grad()
def validate(
    model: LlamaForCausalLM, held_out: list[torch.Tensor], asked: list[torch.Tensor], marked: Marked
) -> dict[str, float]:
    """Loss in nats per token; the share of tokens, of numbers that answer, and of `choices` that are guessed right."""
    model.eval()
    losses, right, found = [], [], []
    ends = torch.tensor([len(one) - 2 for one in asked])
    told = pad_sequence(asked, batch_first=True).to(model.device)
    named = model(input_ids=told, use_cache=False).logits[torch.arange(len(asked)), ends - 1].argmax(-1)
    chosen = named == told[torch.arange(len(asked)), ends]
    for tokens in held_out:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        hits = logits.argmax(-1) == tokens[:, 1:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item())
        right.append(hits.float().mean().item())
        found.append(hits[marked.among(tokens)[:, 1:]])
    model.train()
    mean = sum(losses) / len(losses)
    return {
        "loss": round(mean, 4), "perplexity": round(math.exp(mean), 3), "accuracy": round(sum(right) / len(right), 4),
        "numbers": round(torch.cat(found).float().mean().item(), 4), "choices": round(chosen.float().mean().item(), 4),
    }  # fmt: skip


def probe(folder: Path) -> dict[str, dict[str, float]]:
    """How often the right output is the likeliest of the allowed ones on each task's validation split, untrained."""
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    found: dict[str, dict[str, float]] = {}
    for name, task in world.TASKS.items():
        records, right = world.load(name)["val"], 0
        for record in records:
            outputs = [record.output.removesuffix(record.answer) + answer for answer in task.answers]
            pairs = [(f"{record.instruction}\n", output) for output in outputs]
            scores = log_likelihoods(model, tokenizer, pairs, len(pairs))
            right += task.answers[scores.index(max(scores))] == record.answer
        found[name] = {"accuracy": round(right / len(records), 3), "chance": round(1 / len(task.answers), 3)}
    return found


def main() -> None:
    """Trains for a fixed number of steps and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=128, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=1536, help="tokens, among them 256 bytes and 3 special ones")
    parser.add_argument("--tokenizer-texts", type=int, default=20000, help="texts that the tokenizer is trained on")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the texts")
    parser.add_argument("--marks", type=float, default=200.0, help="how much a number that answers weighs in the loss")
    parser.add_argument("--marks-from", type=float, default=0.33, help="when it begins to, as a share of the steps")
    parser.add_argument("--marks-to", type=float, default=0.85, help="when it ends to")
    parser.add_argument("--asked", type=int, default=128, help="choices that a validation asks for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes that write the texts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ASSETS / "decoder-tiny-procedural")
    parser.add_argument("--continue-from", type=Path, metavar="FOLDER", help="start from these weights")
    parser.add_argument("--probe", action="store_true", help="score the model in --out on the tasks, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.probe:
        print(json.dumps(probe(args.out)))
        return

    set_seed(args.seed)
    began, busy = time.monotonic(), time.process_time()
    earlier, log = earlier_stage(args.continue_from)
    if args.continue_from:
        tokenizer = AutoTokenizer.from_pretrained(args.continue_from)
        model = LlamaForCausalLM.from_pretrained(args.continue_from).train()
    else:
        tokenizer = new_tokenizer(args.seed, args.tokenizer_texts, args.vocabulary)
        model = new_decoder(len(tokenizer), args.layers, args.width)
    model.to(args.device)
    held_out = [one.to(args.device) for one in DataLoader(Packed(tokenizer, VALIDATION_SEED, args.length, 128), 16)]
    asked = choices(tokenizer, args.asked)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    marked = Marked(tokenizer, args.device)
    first, last = round(args.marks_from * args.steps), round(args.marks_to * args.steps)
    stream = iter(
        DataLoader(
            Packed(tokenizer, args.seed, args.length, args.steps * args.batch_size), args.batch_size,
            num_workers=args.workers, prefetch_factor=8 if args.workers else None,
        )
    )  # fmt: skip

    def loss_of(step: int) -> torch.Tensor:
        return marked.loss(model, next(stream).to(args.device), args.marks if first <= step < last else 1.0)

    log += fit(
        model.parameters(), optimizer, args.steps, loss_of,
        lambda: validate(model, held_out, asked, marked), began, len(log) and log[-1]["step"],
    )  # fmt: skip
    provenance = {
        "command": f"python scripts/pretrain_decoder.py{' --continue-from' if earlier else ''}",
        "tokens": args.steps * args.batch_size * args.length + (earlier["tokens"] if earlier else 0),
        "data": "generators.world_text.text, drawn by rule; no person's text and no task of mini-language",
        "validation": f"{len(held_out) * 16} sequences and {len(asked)} choices of texts of seed {VALIDATION_SEED}",
        **circumstances(args, began, busy, "torch", "transformers", "tokenizers"),
        "final": log[-1],
        "continued_from": earlier,
    }
    save(model, tokenizer, args.out, log, provenance)


if __name__ == "__main__":
    main()
