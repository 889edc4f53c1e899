"""Pretrains what makes a small LLaVA of the shipped ViT and the shipped decoder: `python scripts/pretrain_llava.py`.

The pictures and what is said of them are those of `san_bench.data.mini_captions.caption`; no picture and no question of
mini-vl is among them. The tower stays as it is. A projector is trained whole, and the decoder by a low-rank adapter.
A caption follows its image at once, with nothing asked, as in the first stage of LLaVA.

The folder holds a PEFT adapter; `san_bench.data.embedded` merges it. It is written next to its final place and moved
there when complete.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pretrain import ASSETS, VALIDATION_SEED, circumstances, fit, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import set_seed

from san_bench.data.conversation_prompts import ConversationCollator, image_tokens
from san_bench.data.embedded import asset, joined, processor_of
from san_bench.data.mini_captions import caption
from san_bench.data.mini_pictures import draw
from san_bench.data.prompts import IGNORED

LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class Captioned(Dataset[dict[str, Tensor]]):
    """Images with their captions after them."""

    def __init__(self, processor: Any, seed: int, count: int) -> None:
        self.tokenizer, self.seed, self.count = processor.tokenizer, seed, count
        self.start = [self.tokenizer.bos_token_id, *[processor.image_token_id] * image_tokens(processor)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene, words = caption(self.seed, index)
        ids = [*self.tokenizer(words, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        pixels = torch.from_numpy(draw(scene, self.seed, index)).permute(2, 0, 1).float() / 127.5 - 1
        return {
            "input_ids": torch.tensor([*self.start, *ids]),
            "labels": torch.tensor([*[IGNORED] * len(self.start), *ids]),
            "pixel_values": pixels,
        }


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
    parser.add_argument("--steps", type=int, default=1800, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=32, help="of the decoder's adapter")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the pictures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw the pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ASSETS / "llava-tiny-procedural")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    began, busy = time.monotonic(), time.process_time()
    processor = processor_of(asset("vit"), asset("decoder"))
    adapter = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=LANGUAGE, modules_to_save=["multi_modal_projector"]
    )
    plain = joined(asset("vit"), asset("decoder"))
    plain.model.language_model.set_attn_implementation("eager")  # faster on a processor: captions are short
    model = get_peft_model(plain, adapter)
    model.to(args.device)
    collate = ConversationCollator(processor.tokenizer.pad_token_id)
    shown = DataLoader(Captioned(processor, VALIDATION_SEED, 512), 64, collate_fn=collate)
    held_out = [{key: one.to(args.device) for key, one in batch.items()} for batch in shown]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    stream = iter(
        DataLoader(
            Captioned(processor, args.seed, args.steps * args.batch_size), args.batch_size, collate_fn=collate,
            num_workers=args.workers, prefetch_factor=8 if args.workers else None,
        )
    )  # fmt: skip

    def loss_of(_: int) -> Tensor:
        return model(**{key: one.to(args.device) for key, one in next(stream).items()}).loss

    log = fit(trained, optimizer, args.steps, loss_of, lambda: validate(model, held_out), began)
    provenance = {
        "command": "python scripts/pretrain_llava.py",
        "images": args.steps * args.batch_size,
        "data": "san_bench.data.mini_captions.caption, drawn and worded by rule; no photograph and no person's text",
        "validation": f"{len(shown.dataset)} pictures of seed {VALIDATION_SEED}, which no training picture shares",
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
