"""Pretrains the small LLaMA of san_bench on texts about a small world: `python scripts/pretrain_decoder.py`.

The texts are those of `san_bench.data.world_text`; no text of the tasks of mini-language is among them. A byte-level
tokenizer is trained on the first of them, so any text can be encoded; `<unk>`, which no text needs, pads. The decoder
has grouped-query attention: three query heads share one key and value head. Sequences are packed: texts in a row,
`</s>` after each, cut at their length.

The folder is written next to its final place and moved there when complete.

`--probe` trains nothing: it measures how often the shipped model finds the right answer of each task's validation split
the likeliest, without having been trained on any, and beside it what guessing gives.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from pretrain import ASSETS, VALIDATION_SEED, circumstances, fit, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from san_bench.data import world
from san_bench.data.tokens import prepare_tokenizer
from san_bench.data.world_text import text
from san_bench.run.likelihood import log_likelihoods

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


def new_decoder(vocabulary: int, layers: int) -> LlamaForCausalLM:
    """Builds a LLaMA of about 1.9 million values, with one key and value head for three query heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=layers,
            num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
            tie_word_embeddings=True, bos_token_id=SPECIAL.index("<s>"), eos_token_id=SPECIAL.index("</s>"),
            pad_token_id=SPECIAL.index("<unk>"),
        )
    )  # fmt: skip


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, batch: int, length: int) -> Iterator[torch.Tensor]:
    """Packed sequences of tokens without end; what is cut off at the end of one begins the next."""
    rest: list[int] = []
    index, need = 0, batch * length
    while True:
        while len(rest) < need:
            texts = [text(seed, index + n) for n in range(256)]
            index += len(texts)
            for tokens in tokenizer(texts)["input_ids"]:
                rest += [*tokens, tokenizer.eos_token_id]
        yield torch.tensor(rest[:need]).view(batch, length)
        rest = rest[need:]


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens but the first of each sequence, of what the next one costs in nats."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def validate(model: LlamaForCausalLM, held_out: list[torch.Tensor]) -> dict[str, float]:
    """Loss in nats per token, and the share of tokens that are guessed right, on texts of another seed."""
    model.eval()
    losses, right = [], []
    for tokens in held_out:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item())
        right.append((logits.argmax(-1) == tokens[:, 1:]).float().mean().item())
    model.train()
    mean = sum(losses) / len(losses)
    return {
        "loss": round(mean, 4), "perplexity": round(math.exp(mean), 3), "accuracy": round(sum(right) / len(right), 4)
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
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences")
    parser.add_argument("--length", type=int, default=192, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1536, help="tokens, among them 256 bytes and 3 special ones")
    parser.add_argument("--tokenizer-texts", type=int, default=20000, help="texts that the tokenizer is trained on")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the texts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ASSETS / "decoder-tiny-procedural")
    parser.add_argument("--probe", action="store_true", help="score the model in --out on the tasks, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.probe:
        print(json.dumps(probe(args.out)))
        return

    set_seed(args.seed)
    began, busy = time.monotonic(), time.process_time()
    tokenizer = new_tokenizer(args.seed, args.tokenizer_texts, args.vocabulary)
    model = new_decoder(len(tokenizer), args.layers)
    held_out = [batch for batch, _ in zip(batches(tokenizer, VALIDATION_SEED, 16, args.length), range(8), strict=False)]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    stream = batches(tokenizer, args.seed, args.batch_size, args.length)
    log = fit(
        model.parameters(), optimizer, args.steps, lambda _: loss_of(model, next(stream)),
        lambda: validate(model, held_out), began,
    )  # fmt: skip
    provenance = {
        "command": "python scripts/pretrain_decoder.py",
        "tokens": args.steps * args.batch_size * args.length,
        "data": "san_bench.data.world_text.text, drawn by rule; no person's text and no task of mini-language",
        "validation": f"{len(held_out) * 16} sequences of texts of seed {VALIDATION_SEED}",
        **circumstances(args, began, busy, "torch", "transformers", "tokenizers"),
        "final": log[-1],
    }
    save(model, tokenizer, args.out, log, provenance)


if __name__ == "__main__":
    main()
