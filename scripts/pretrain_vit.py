"""Pretrains the small ViT that ships with san_bench, on procedural images alone: `python scripts/pretrain_vit.py`.

Every label of `san_bench.data.procedural` is a task on the class token, and every patch predicts its own foreground.
In the first steps half of the patches are dropped, which nearly doubles the images seen in the same time; the
last steps see all. The folder is written next to its final place and moved there when complete.

`--probe` trains nothing: it measures how well a linear classifier on the class token of the shipped ViT reads
handwritten digits (fit on train800, scored on val200). `--contact-sheet PNG` draws examples of the images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTImageProcessor, ViTModel, get_cosine_schedule_with_warmup, set_seed

from san_bench.data import procedural

ASSET = Path(__file__).parents[1] / "src/san_bench/data/assets/vit-tiny-procedural"
VALIDATION_SEED = 1_000_003
PATCH, WIDTH, DEPTH = 4, 160, 4


def batch_of(count: int, seed: int, start: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Pixels in [-1, 1], labels, and the mask of each patch, in [0, 1]."""
    drawn = procedural.draw(count, seed=seed, start=start)
    pixels = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    masks = F.unfold(torch.from_numpy(drawn.mask)[:, None].float() / 255, PATCH, stride=PATCH).transpose(1, 2)
    return pixels, {name: torch.from_numpy(label) for name, label in drawn.labels.items()}, masks


class Pretraining(torch.nn.Module):
    """The ViT that is kept, and the heads that are not."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=procedural.SIZE, patch_size=PATCH, hidden_size=WIDTH, num_hidden_layers=DEPTH,
            num_attention_heads=WIDTH // 32, intermediate_size=4 * WIDTH, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.heads = torch.nn.ModuleDict({n: torch.nn.Linear(WIDTH, len(c)) for n, c in procedural.FACTORS.items()})
        self.mask_head = torch.nn.Linear(WIDTH, PATCH * PATCH)
        self.kept: torch.Tensor | None = None
        self.drop_patches()

    def drop_patches(self) -> None:
        """Makes the ViT see the patches of `self.kept` alone, where that is set."""
        self.vit.embeddings.register_forward_hook(
            lambda _module, _inputs, tokens: tokens if self.kept is None else tokens[:, self.kept]
        )

    def forward(self, pixels: torch.Tensor, keep: int | None = None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Logits of each label, and of the mask of each patch seen; `keep` random patches are, or all."""
        patches = (procedural.SIZE // PATCH) ** 2
        self.kept = None if keep is None else F.pad(torch.randperm(patches)[:keep].sort().values + 1, (1, 0))
        tokens = self.vit(pixel_values=pixels).last_hidden_state
        logits = {name: head(tokens[:, 0]).float() for name, head in self.heads.items()}
        return logits, self.mask_head(tokens[:, 1:]).float()

    def loss(
        self, pixels: torch.Tensor, labels: dict[str, torch.Tensor], masks: torch.Tensor, keep: int | None
    ) -> torch.Tensor:
        """Mean over the labels, glyphs counting twice, and a share of the masks' loss; `keep` patches are seen."""
        logits, mask_logits = self(pixels, keep)
        if self.kept is not None:
            masks = masks[:, self.kept[1:] - 1]
        losses = {n: F.cross_entropy(logits[n], labels[n], ignore_index=-1) for n in logits if (labels[n] >= 0).any()}
        named = sum(loss * (2 if name == "glyph" else 1) for name, loss in losses.items()) / len(losses)
        return named + 0.3 * F.binary_cross_entropy_with_logits(mask_logits, masks)

    @torch.no_grad()
    def accuracies(self, count: int = 1024) -> dict[str, float]:
        """Share of right answers per label, and per pixel of the mask, on images that training never sees."""
        pixels, labels, masks = batch_of(count, VALIDATION_SEED, 0)
        self.eval()
        logits, mask_logits = self(pixels)
        self.train()
        right = {n: (logits[n].argmax(1) == labels[n])[labels[n] >= 0].float().mean().item() for n in logits}
        return {
            n: round(a, 4)
            for n, a in (right | {"mask": ((mask_logits > 0) == (masks > 0.5)).float().mean().item()}).items()
        }


def save(model: Pretraining, folder: Path, log: list[dict], provenance: dict) -> None:
    """Writes the ViT in half precision, its processor, log and provenance, then moves them into place at once."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.vit.half().save_pretrained(part)
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"  # what `from_pretrained` computes in; the file stays small
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(part)
    (part / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
    provenance["sha256"] = hashlib.sha256((part / "model.safetensors").read_bytes()).hexdigest()
    provenance["parameters"] = sum(p.numel() for p in model.vit.parameters())
    (part / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def probe(folder: Path) -> dict[str, float]:
    """Validation accuracy on digits of logistic regression on the standardised class token, per inverse penalty C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from san_bench.data.preprocess import for_checkpoint
    from san_bench.data.vision import load_task

    vit, task = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval(), load_task("digits")
    with torch.no_grad():
        train, val = (
            vit(pixel_values=for_checkpoint(task[name], folder).batch(800)).last_hidden_state[:, 0].numpy()
            for name in ("train800", "val200")
        )
    classifiers = {c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)) for c in (0.01, 0.1, 1.0)}
    return {
        f"C={c:g}": model.fit(train, task["train800"].labels).score(val, task["val200"].labels)
        for c, model in classifiers.items()
    }


def contact_sheet(file: Path) -> None:
    """Draws 4 rows of 12 scenes and glyphs, twice enlarged."""
    from PIL import Image

    images = procedural.draw(48, seed=0).images.reshape(4, 12, 32, 32, 3)
    sheet = Image.fromarray(images.transpose(0, 2, 1, 3, 4).reshape(4 * 32, 12 * 32, 3))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(file, optimize=True)


def main() -> None:
    """Trains for a fixed number of steps and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=1100, help="optimiser steps")
    parser.add_argument("--full-steps", type=int, default=200, help="last steps, which see every patch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ASSET)
    parser.add_argument("--continue-from", type=Path, metavar="FOLDER", help="start from these weights, on new images")
    parser.add_argument("--probe", action="store_true", help="score the shipped ViT on digits instead of training")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="draw examples instead of training")
    args = parser.parse_args()
    if args.probe:
        print(json.dumps(probe(args.out)))
    if args.contact_sheet:
        contact_sheet(args.contact_sheet)
    if args.probe or args.contact_sheet:
        return

    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    model = Pretraining()
    earlier, log = None, []
    if args.continue_from:
        model.vit = ViTModel.from_pretrained(args.continue_from, add_pooling_layer=False).train()
        model.drop_patches()
        earlier = json.loads((args.continue_from / "PROVENANCE.json").read_text(encoding="utf-8"))
        log = [json.loads(row) for row in (args.continue_from / "training_log.jsonl").read_text().splitlines()]
    seen = earlier["images"] if earlier else 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    began, done = time.monotonic(), len(log) and log[-1]["step"]
    for step in range(args.steps):
        batch = batch_of(args.batch_size, args.seed, seen + step * args.batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(*batch, keep=32 if step < args.steps - args.full_steps else None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            row = {
                "step": done + step + 1,
                "loss": round(loss.item(), 4),
                "seconds": round(time.monotonic() - began, 1),
            }
            if (step + 1) % 250 == 0 or step + 1 == args.steps:
                row["validation"] = model.accuracies()
            log.append(row)
            print(json.dumps(row), flush=True)
    provenance = {
        "command": f"python scripts/pretrain_vit.py{' --continue-from' if earlier else ''}",
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, int | float) and k != "probe"},
        "images": seen + args.steps * args.batch_size,
        "data": "san_bench.data.procedural.draw, kind mixed; no photograph and no handwriting",
        "validation": f"1024 images of seed {VALIDATION_SEED}, which no training image shares",
        "precision": "bfloat16 autocast in training, saved in float16",
        "machine": f"{platform.machine()} processor, {args.threads} threads, no accelerator",
        "seconds": round(time.monotonic() - began, 1),
        "versions": {n: version(n) for n in ("torch", "transformers", "numpy")} | {"python": platform.python_version()},
        "final": log[-1],
        "continued_from": earlier,
    }
    save(model, args.out, log, provenance)


if __name__ == "__main__":
    main()
