"""Pretrains what makes a small LLaVA of the shipped ViT and the shipped decoder: `python scripts/pretrain_llava.py`.

The pictures and what is said of them are those of `san_bench.data.mini_captions.caption`; no picture and no question of
mini-vl is among them. A projector is trained whole, and the tower and the decoder by a low-rank adapter: the ViT has
seen no words, and few figures at once. A caption follows its image at once, with nothing asked, as in the first stage
of LLaVA. Words that nobody knows without the picture weigh more in the loss than the others.

The folder holds a PEFT adapter; `san_bench.data.embedded` merges it. It is written next to its final place and moved
there when complete.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from pretrain import ASSETS, VALIDATION_SEED, circumstances, fit, save
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import set_seed

from san_bench.data.conversation_prompts import ConversationCollator, image_tokens
from san_bench.data.embedded import asset, joined, processor_of
from san_bench.data.mini_captions import caption
from san_bench.data.mini_pictures import draw
from san_bench.data.prompts import IGNORED

ADAPTED = r".*vision_tower\.layers\.[0-2]\..*(_proj|fc1|fc2)|.*language_model.*_proj"
"""Layers with an adapter; the last one of the tower is not read."""


class Captioned(Dataset[dict[str, Tensor]]):
    """Images with their captions after them."""

    def __init__(self, processor: Any, seed: int, count: int) -> None:
        self.tokenizer, self.seed, self.count = processor.tokenizer, seed, count
        self.start = [self.tokenizer.bos_token_id, *[processor.image_token_id] * image_tokens(processor)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        told = caption(self.seed, index)
        read = self.tokenizer(told.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = [*read["input_ids"], self.tokenizer.eos_token_id]
        seen = [
            any(start < until and since < end for since, until in told.seen) for start, end in read["offset_mapping"]
        ]
        pixels = torch.from_numpy(draw(told.scene, self.seed, index)).permute(2, 0, 1).float() / 127.5 - 1
        return {
            "input_ids": torch.tensor([*self.start, *ids]),
            "labels": torch.tensor([*[IGNORED] * len(self.start), *ids]),
            "pixel_values": pixels,
            "seen": torch.tensor([*[False] * len(self.start), *seen, False]),
        }


class Collator(ConversationCollator):
    """Makes batches that also say which words nobody knows without the picture."""

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the batch, with `seen`."""
        seen = torch.nn.utils.rnn.pad_sequence([one["seen"] for one in examples], batch_first=True)
        return {**super().__call__(examples), "seen": seen}


def fold(model: Any) -> None:
    """Makes every layer add its update to its weight, not to its output: the same function, in fewer operations."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight + layer.get_delta_weight("default"), layer.bias)

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = partial(forward, module)


def read_captions(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss of each token in nats, whether it is the likeliest, and whether it is to be seen."""
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    told = batch["labels"][:, 1:] != IGNORED
    logits, labels = model(**given).logits[:, :-1][told].float(), batch["labels"][:, 1:][told]
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels, batch["seen"][:, 1:][told]


@torch.no_grad()
def validate(model: Any, held_out: list[dict[str, Tensor]]) -> dict[str, float]:
    """Nats per token of captions of another seed, and the share right of words to be seen.

    Both are found with the pictures of the captions and with those of others.
    """
    model.eval()
    found = {}
    for name, shift in (("", 0), ("_with_other_pictures", 1)):
        shown = [batch | {"pixel_values": batch["pixel_values"].roll(shift, 0)} for batch in held_out]
        read = [read_captions(model, batch) for batch in shown]
        losses, right, seen = (torch.cat([one[part] for one in read]) for part in range(3))
        found[f"loss{name}"] = round(losses.mean().item(), 4)
        found[f"seen{name}"] = round(right[seen].float().mean().item(), 4)
    model.train()
    return found


def main() -> None:
    """Trains for a fixed number of steps and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=32, help="of the adapter")
    parser.add_argument("--weight", type=float, default=8.0, help="of words to be seen, where others have 1")
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
        r=args.rank, lora_alpha=2 * args.rank, target_modules=ADAPTED, modules_to_save=["multi_modal_projector"]
    )
    plain = joined(asset("vit"), asset("decoder"))
    plain.model.language_model.set_attn_implementation("eager")  # faster on a processor: captions are short
    model = get_peft_model(plain, adapter)
    model.to(args.device)
    fold(model)
    collate = Collator(processor.tokenizer.pad_token_id)
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
        losses, _, seen = read_captions(model, {key: one.to(args.device) for key, one in next(stream).items()})
        weights = 1 + (args.weight - 1) * seen.float()
        return (weights * losses).sum() / weights.sum()

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
