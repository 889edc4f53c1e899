"""Pretrains what makes a small LLaVA of the shipped ViT and the shipped decoder: `python scripts/pretrain_llava.py`.

The pictures and what is said of them are those of `san_bench.data.mini_talk.caption`; no picture and no question of
mini-vl is among them. The tower stays as it is. A projector is trained whole, and the decoder by a low-rank adapter.
A caption follows its image at once, with nothing asked, as in the first stage of LLaVA.

The folder holds a PEFT adapter; `san_bench.data.embedded` merges it. It is written next to its final place and moved
there when complete.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pretrain import ASSETS, VALIDATION_SEED, circumstances, fit, save
from torch import Tensor
from transformers import set_seed

from san_bench.data.conversation_prompts import ConversationCollator, image_tokens
from san_bench.data.embedded import asset, joined, processor_of
from san_bench.data.mini_pictures import draw
from san_bench.data.mini_talk import caption
from san_bench.data.prompts import IGNORED

LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def batches(processor: Any, seed: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of an image with its caption after it, without end."""
    tokenizer, collate, index = processor.tokenizer, ConversationCollator(processor.tokenizer.pad_token_id), 0
    start = [tokenizer.bos_token_id, *[processor.image_token_id] * image_tokens(processor)]
    while True:
        examples = []
        for place in range(index, index + size):
            scene, words = caption(seed, place)
            ids = [*tokenizer(words, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            pixels = torch.from_numpy(draw(scene, seed, place)).permute(2, 0, 1).float() / 127.5 - 1
            examples.append(
                {
                    "input_ids": torch.tensor([*start, *ids]),
                    "labels": torch.tensor([*[IGNORED] * len(start), *ids]),
                    "pixel_values": pixels,
                }
            )
        index += size
        yield collate(examples)


@torch.no_grad()
def validate(model: Any, held_out: list[dict[str, Tensor]]) -> dict[str, float]:
    """Loss in nats per token of captions of another seed, with their pictures and with those of other captions."""
    model.eval()
    own = [model(**batch).loss.item() for batch in held_out]
    others = [model(**batch | {"pixel_values": batch["pixel_values"].roll(1, 0)}).loss.item() for batch in held_out]
    model.train()
    return {
        "loss": round(sum(own) / len(own), 4), "loss_with_other_pictures": round(sum(others) / len(others), 4)
    }  # fmt: skip


def main() -> None:
    """Trains for a fixed number of steps and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=900, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=32, help="of the decoder's adapter")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the pictures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ASSETS / "llava-tiny-procedural")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    began, busy = time.monotonic(), time.process_time()
    processor = processor_of(asset("vit"), asset("decoder"))
    adapter = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=LANGUAGE, modules_to_save=["multi_modal_projector"]
    )
    model = get_peft_model(joined(asset("vit"), asset("decoder")), adapter)
    held_out = [batch for batch, _ in zip(batches(processor, VALIDATION_SEED, 64), range(8), strict=False)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    stream = batches(processor, args.seed, args.batch_size)
    log = fit(
        trained, optimizer, args.steps, lambda _: model(**next(stream)).loss, lambda: validate(model, held_out), began
    )
    provenance = {
        "command": "python scripts/pretrain_llava.py",
        "images": args.steps * args.batch_size,
        "data": "san_bench.data.mini_talk.caption, drawn and worded by rule; no photograph and no person's text",
        "validation": f"{len(held_out) * 64} pictures of seed {VALIDATION_SEED}, which no training picture shares",
        **circumstances(args, began, busy, "torch", "transformers", "peft", "numpy"),
        "parts": {
            name: json.loads((asset(name) / "PROVENANCE.json").read_text(encoding="utf-8"))["sha256"]
            for name in ("vit", "decoder")
        },
        "final": log[-1],
    }
    save(model, None, args.out, log, provenance)


if __name__ == "__main__":
    main()
