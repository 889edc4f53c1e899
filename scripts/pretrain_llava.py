"""Pretrains what makes a small LLaVA of the shipped ViT and the shipped decoder: `python scripts/pretrain_llava.py`.

The pictures and what is said of them are those of `generators.mini_captions.caption`; no picture and no question of
mini-vl is among them. A projector is trained whole, and the tower and the decoder by a low-rank adapter: the ViT has
seen no words, and few figures at once. It learns first, alone, what stands where, and stays so. Then sentences follow
their image at once, with nothing asked, as in the first stage of LLaVA. An image is read once for several of them, each
of which sees the image and itself alone, so none can be told from another. What nobody knows without the picture weighs
more in the loss than how a sentence begins. `--continue-from` trains on, and `--asked` makes most batches conversations
in the template that tasks have, with other questions.

The folder holds a PEFT adapter; `san_bench.models.embedded` merges it. It is written next to its final place and moved
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
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForImageTextToText, set_seed

from generators.mini_captions import ABOUT_WORDS, KINDS, Fact, caption, closed
from pretrain import ASSETS, VALIDATION_SEED, circumstances, earlier_stage, fit, save
from san_bench.language.mini.words import RandomChoices
from san_bench.language.prompts import IGNORED
from san_bench.models.embedded import asset, embedded_path, joined, processor_of
from san_bench.vision_language.encoding import image_tokens
from san_bench.vision_language.mini.pictures import COLOURS, FONT, SHAPES, Scene, draw_scene, word_place
from san_bench.vision_language.records import MARKER, Conversation, Turn
from san_bench.vision_language.template import write

ADAPTED = r".*vision_tower\.layers\.[0-2]\..*(_proj|fc1|fc2)|.*language_model.*_proj"
"""Layers with an adapter; the last one of the tower is not read."""


def pixels_of(scene: Scene, seed: int, index: int) -> Tensor:
    """Draws a scene for the tower, in [-1, 1]."""
    return torch.from_numpy(draw_scene(scene, seed, index)).permute(2, 0, 1).float() / 127.5 - 1


class Captioned(Dataset[dict[str, Tensor]]):
    """Images with sentences after them; with `batch_size`, two of three batches have requests and answers instead."""

    def __init__(self, processor: Any, seed: int, count: int, first: int = 0, batch_size: int | None = None) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.seed, self.count, self.first, self.batch_size = seed, count, first, batch_size
        self.image = [processor.image_token_id] * image_tokens(processor)

    def __len__(self) -> int:
        return self.count

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        asked = self.batch_size is not None and index // self.batch_size % 3 > 0
        return self.example(*caption(self.seed, self.first + index), self.first + index, asked)

    def _words(self, fact: Fact, asked: bool) -> tuple[str, str, str]:
        """What is before the image, what is after it, and what is seen then."""
        if not asked:
            return "", fact.said, f" {fact.seen}."
        turns = (Turn("human", f"{MARKER}\n{fact.request}"), Turn("gpt", fact.seen))
        before, _, after = write(Conversation(0, turns, "image"), self.processor, ask=True).text.partition(MARKER)
        return before, after, f" {fact.seen}"

    def example(self, scene: Scene, facts: Sequence[Fact], index: int, asked: bool = False) -> dict[str, Tensor]:
        """Tokens, their places after the image, which sentence they are in (0 for the image), and what is seen."""
        words = [self._words(fact, asked) for fact in facts]
        start = [self.tokenizer.bos_token_id, *self._ids(words[0][0]), *self.image]
        rows = [(token, place, 0, False) for place, token in enumerate(start)]
        for number, (_, after, told) in enumerate(words, 1):
            said, seen = self._ids(after), [*self._ids(told), self.tokenizer.eos_token_id]
            rows += [(token, len(start) + place, number, place >= len(said)) for place, token in enumerate(said + seen)]
        names = ("input_ids", "position_ids", "sentence", "seen")
        return {
            "pixel_values": pixels_of(scene, self.seed, index),
            **dict(zip(names, map(torch.tensor, zip(*rows, strict=True)), strict=True)),
        }


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Makes a batch. Its mask lets a token see the image, and what is before it in its own sentence."""
    pixels = torch.stack([one.pop("pixel_values") for one in examples])
    batch = {key: torch.nn.utils.rnn.pad_sequence([one[key] for one in examples], True) for key in examples[0]}
    sentence = batch["sentence"]
    # what is padded counts as image too, but has no token after it
    sees = (sentence[:, :, None] == sentence[:, None]) | (sentence[:, None] == 0)
    mask = (sees & torch.ones(sees.shape[1:], dtype=torch.bool).tril())[:, None]
    least = torch.finfo(torch.float32).min
    return {**batch, "pixel_values": pixels, "attention_mask": torch.zeros(mask.shape).masked_fill(~mask, least)}


def fold(model: Any) -> None:
    """Makes every layer add its update to its weight, not to its output: the same function, in fewer operations."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight + layer.get_delta_weight("default"), layer.bias)

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = partial(forward, module)


class Tower(torch.nn.Module):
    """What the projector will read of a tower, and a linear classifier on it, which is not kept.

    For every patch it tells the shape and the colour of the figure in whose cell the patch is, and its letter.
    """

    LABELS = (tuple(SHAPES), tuple(COLOURS), tuple(FONT))

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.head = torch.nn.Linear(tower.config.hidden_size, sum(map(len, self.LABELS)))

    def example(self, seed: int, index: int) -> tuple[Tensor, Tensor]:
        """Pixels, and a label of each kind for every patch."""
        scene, _ = caption(seed, index)
        shapes, colours, letters = self.LABELS
        labels = torch.full((3, 8, 8), IGNORED)
        for figure in scene.figures:
            top, left = 4 * (figure.cell // 2), 4 * (figure.cell % 2)
            labels[0, top : top + 4, left : left + 4] = shapes.index(figure.shape)
            labels[1, top : top + 4, left : left + 4] = colours.index(figure.colour)
        if scene.word:
            row, column = word_place(scene, seed, index)
            for place, letter in enumerate(scene.word, column):
                labels[2, 2 * row : 2 * row + 2, 2 * place : 2 * place + 2] = letters.index(letter)
        return pixels_of(scene, seed, index), labels.flatten(1)

    def read(self, seed: int, indices: range, device: str) -> list[tuple[Tensor, Tensor]]:
        """Logits of each kind for the patches that have one, and what is right there."""
        drawn = [self.example(seed, index) for index in indices]
        pixels, labels = (torch.stack(part).to(device) for part in zip(*drawn, strict=True))
        seen = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        logits = self.head(seen).float().split([len(names) for names in self.LABELS], -1)
        known = labels != IGNORED
        return [(one[known[:, kind]], labels[:, kind][known[:, kind]]) for kind, one in enumerate(logits)]


def teach(tower: Any, args: argparse.Namespace, began: float) -> dict[str, Any]:
    """Adapts a tower to these pictures, and returns the last row of the log."""
    model = Tower(tower).to(args.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.95))

    def loss_of(step: int) -> Tensor:
        start = step * args.tower_batch_size
        found = model.read(args.seed, range(start, start + args.tower_batch_size), args.device)
        return torch.stack([F.cross_entropy(logits, labels) for logits, labels in found]).mean()

    @torch.no_grad()
    def validate() -> dict[str, float]:
        found = model.read(VALIDATION_SEED, range(256), args.device)
        return {
            name: round((logits.argmax(-1) == labels).float().mean().item(), 4)
            for name, (logits, labels) in zip(("shape", "colour", "letter"), found, strict=True)
        }

    return fit(trained, optimizer, args.tower_steps, loss_of, validate, began)[-1]


def read_captions(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss of each token in nats, whether it is the likeliest, and whether it is to be seen.

    The first token of a sentence is left out: what it is about is free.
    """
    sentence = batch["sentence"]
    told = (sentence[:, 1:] > 0) & (sentence[:, 1:] == sentence[:, :-1])
    given = ("input_ids", "position_ids", "attention_mask", "pixel_values")
    logits = model(**{key: batch[key] for key in given}).logits[:, :-1][told].float()
    labels = batch["input_ids"][:, 1:][told]
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


@torch.no_grad()
def probe(args: argparse.Namespace) -> dict[str, list[float]]:
    """Share of facts whose words to be seen are all the likeliest, on pictures of another seed.

    For each kind there are two: where a sentence is to go on, and where the same fact is asked.
    """
    model = AutoModelForImageTextToText.from_pretrained(embedded_path("llava"), attn_implementation="eager").eval()
    captioned, found = Captioned(processor_of(asset("vit"), asset("decoder")), VALIDATION_SEED, 0), {}
    for kind, told in KINDS.items():
        right, count, index = [0, 0], 0, 0
        while count < args.probe:
            dice, (scene, _), index = RandomChoices(VALIDATION_SEED, index), caption(VALIDATION_SEED, index), index + 1
            if scene.word if kind in ABOUT_WORDS else scene.figures:
                fact, count = closed(dice, told(dice, scene)), count + 1
                for asked in (False, True):
                    batch = collate([captioned.example(scene, [fact], index - 1, asked)])
                    _, likeliest, seen = read_captions(model, batch)
                    right[asked] += bool(likeliest[seen].all())
        found[kind] = [round(one / count, 3) for one in right]
    return found


def main() -> None:
    """Trains for a fixed number of steps and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=1300, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures")
    parser.add_argument("--tower-steps", type=int, default=800, help="of the tower alone, before")
    parser.add_argument("--tower-batch-size", type=int, default=64, help="pictures")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=32, help="of the adapter")
    parser.add_argument("--weight", type=float, default=8.0, help="of what is seen, where others have 1")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the pictures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw the pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--continue-from", type=Path, metavar="FOLDER", help="an adapter to train on new pictures")
    parser.add_argument("--out", type=Path, default=ASSETS / "llava-tiny-procedural")
    parser.add_argument("--asked", action="store_true", help="ask in two of three batches")
    parser.add_argument("--probe", type=int, metavar="N", help="ask the shipped model for N facts of each kind instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.probe:
        print(json.dumps(probe(args)))
        return
    set_seed(args.seed)
    began, busy = time.monotonic(), time.process_time()
    processor = processor_of(asset("vit"), asset("decoder"))
    plain = joined(asset("vit"), asset("decoder"))
    earlier, log = earlier_stage(args.continue_from)
    if args.continue_from:
        model = PeftModel.from_pretrained(plain, args.continue_from, is_trainable=True).float()
    else:
        kept = ["multi_modal_projector"]
        adapter = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=ADAPTED, modules_to_save=kept)
        model = get_peft_model(plain, adapter)
    model.to(args.device)
    fold(model)
    tower = model.base_model.model.model.vision_tower
    taught = earlier["tower"] if earlier else teach(tower, args, began)
    tower.requires_grad_(False)
    asks = args.batch_size if args.asked else None
    shown = DataLoader(Captioned(processor, VALIDATION_SEED, 512, 0, asks), args.batch_size, collate_fn=collate)
    held_out = [{key: one.to(args.device) for key, one in batch.items()} for batch in shown]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    seen = earlier["images"] if earlier else args.tower_steps * args.tower_batch_size
    new = args.steps * args.batch_size
    stream = iter(
        DataLoader(
            Captioned(processor, args.seed, new, seen, asks), args.batch_size, collate_fn=collate,
            num_workers=args.workers, prefetch_factor=8 if args.workers else None,
        )
    )  # fmt: skip

    def loss_of(_: int) -> Tensor:
        losses, _, seen = read_captions(model, {key: one.to(args.device) for key, one in next(stream).items()})
        weights = 1 + (args.weight - 1) * seen.float()
        return (weights * losses).sum() / weights.sum()

    done = log[-1]["step"] if log else 0
    log += fit(trained, optimizer, args.steps, loss_of, lambda: validate(model, held_out), began, done)
    provenance = {
        "command": f"python scripts/pretrain_llava.py{' --continue-from' * bool(earlier)}{' --asked' * args.asked}",
        "images": seen + new,
        "data": "generators.mini_captions.caption, drawn by rule; no photograph and no person's text",
        "validation": f"{len(shown.dataset)} pictures of seed {VALIDATION_SEED}, which no training picture shares",
        **circumstances(args, began, busy, "torch", "transformers", "peft", "numpy"),
        "parts": {
            name: json.loads((asset(name) / "PROVENANCE.json").read_text(encoding="utf-8"))["sha256"]
            for name in ("vit", "decoder")
        },
        "tower": taught,
        "final": log[-1],
        "continued_from": earlier,
    }
    save(model, None, args.out, log, provenance)


if __name__ == "__main__":
    main()
