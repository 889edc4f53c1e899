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
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from pretrain import ASSETS, VALIDATION_SEED, save
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup, set_seed

from san_bench.data.embedded import asset, joined, processor_of
from san_bench.data.mini_pictures import draw
from san_bench.data.mini_talk import caption
from san_bench.data.prompts import IGNORED

LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def batches(processor, seed: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of an image with its caption after it, padded on the right, without end."""
    tokenizer, index = processor.tokenizer, 0
    patches = (32 // processor.patch_size) ** 2
    start = [tokenizer.bos_token_id, *[processor.image_token_id] * patches]
    while True:
        drawn = [(caption(seed, index + n), index + n) for n in range(size)]
        index += size
        texts = tokenizer([words for (_, words), _ in drawn], add_special_tokens=False)["input_ids"]
        texts = [[*ids, tokenizer.eos_token_id] for ids in texts]
        width = max(map(len, texts))
        ids = [[*start, *text, *[tokenizer.pad_token_id] * (width - len(text))] for text in texts]
        labels = [[*[IGNORED] * len(start), *text, *[IGNORED] * (width - len(text))] for text in texts]
        images = [torch.from_numpy(draw(scene, seed, place)) for (scene, _), place in drawn]
        yield {
            "input_ids": torch.tensor(ids),
            "attention_mask": (torch.arange(len(start) + width) < len(start) + torch.tensor([[len(t)] for t in texts])),
            "labels": torch.tensor(labels),
            "pixel_values": torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1,
        }


@torch.no_grad()
def validate(model, held_out: list[dict[str, Tensor]]) -> dict[str, float]:
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
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    log: list[dict] = []
    for step, batch in zip(range(args.steps), batches(processor, args.seed, args.batch_size), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            row = {"step": step + 1, "loss": round(loss.item(), 4), "seconds": round(time.monotonic() - began, 1)}
            if (step + 1) % 250 == 0 or step + 1 == args.steps:
                row["validation"] = validate(model, held_out)
            log.append(row)
            print(json.dumps(row), flush=True)
    provenance = {
        "command": "python scripts/pretrain_llava.py",
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, int | float)},
        "images": args.steps * args.batch_size,
        "data": "san_bench.data.mini_talk.caption, drawn and worded by rule; no photograph and no person's text",
        "validation": f"{len(held_out) * 64} pictures of seed {VALIDATION_SEED}, which no training picture shares",
        "precision": "bfloat16 autocast in training, saved in float16",
        "machine": f"{platform.machine()} processor, {args.threads} threads, no accelerator",
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "numpy")}
        | {"python": platform.python_version()},
        "parts": {
            name: json.loads((asset(name) / "PROVENANCE.json").read_text(encoding="utf-8"))["sha256"]
            for name in ("vit", "decoder")
        },
        "final": log[-1],
    }
    save(model, None, args.out, log, provenance)


if __name__ == "__main__":
    main()
