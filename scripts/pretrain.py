"""Pretrains a small model that ships with san_bench, on procedural images alone: `python scripts/pretrain.py`.

`--backbone vit|swin|convnext` chooses which. Every label of `generators.procedural` is a task on the pooled output (the
class token of the ViT), and every cell of the last feature map predicts the foreground of its own pixels. The ViT sees
half of the patches in the first steps, which nearly doubles the images seen in the same time, and all in the last. The
folder is written next to its final place and moved there when complete.

`--probe` trains nothing: it measures how well a linear classifier on the pooled output of the shipped model reads
handwritten digits (fit on train800, scored on val200). `--contact-sheet PNG` draws examples of the images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from generators import procedural
from san_bench.run.provenance import provenance

ASSETS = Path(__file__).parents[1] / "src/san_bench/models/assets"
VALIDATION_SEED = 1_000_003
LEARNING_RATES = {"vit": 1.5e-3, "swin": 1.5e-3, "convnext": 2e-3}
CELL = {"vit": 4, "swin": 8, "convnext": 8}  # pixels along the side of one cell of the last feature map


def batch_of(
    count: int, seed: int, start: int, cell: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Pixels in [-1, 1], labels, and the mask of each cell, in [0, 1]."""
    drawn = procedural.draw(count, seed=seed, start=start)
    pixels = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    masks = F.unfold(torch.from_numpy(drawn.mask)[:, None].float() / 255, cell, stride=cell).transpose(1, 2)
    return pixels, {name: torch.from_numpy(label) for name, label in drawn.labels.items()}, masks


def new_backbone(name: str) -> PreTrainedModel:
    """Builds a ViT, Swin or ConvNeXt of about 1.2 million values for images of 32x32."""
    if name == "vit":
        config = ViTConfig(
            image_size=procedural.SIZE, patch_size=CELL["vit"], hidden_size=160, num_hidden_layers=4,
            num_attention_heads=5, intermediate_size=640, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return ViTModel(config, add_pooling_layer=False)
    if name == "swin":
        return SwinModel(
            SwinConfig(
                image_size=procedural.SIZE, patch_size=4, embed_dim=96, depths=[2, 2], num_heads=[3, 6], window_size=4,
                drop_path_rate=0.0, use_absolute_embeddings=True,
            )
        )  # fmt: skip
    return ConvNextModel(
        ConvNextConfig(
            image_size=procedural.SIZE, patch_size=4, num_stages=2, hidden_sizes=[96, 192], depths=[2, 3],
            layer_scale_init_value=1.0,
        )
    )  # fmt: skip


def features(backbone: PreTrainedModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pooled output, and the cells of the last feature map from left to right and top to bottom."""
    output = backbone(pixel_values=pixels)
    last = output.last_hidden_state
    if isinstance(backbone, ViTModel):
        return last[:, 0], last[:, 1:]
    return output.pooler_output, last if last.ndim == 3 else last.flatten(2).transpose(1, 2)


class Pretraining(torch.nn.Module):
    """The backbone that is kept, and the heads that are not."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone, self.cell = new_backbone(name), CELL[name]
        width = features(self.backbone, torch.zeros(1, 3, procedural.SIZE, procedural.SIZE))[0].shape[1]
        self.heads = torch.nn.ModuleDict({n: torch.nn.Linear(width, len(c)) for n, c in procedural.FACTORS.items()})
        self.mask_head = torch.nn.Linear(width, self.cell**2)
        self.kept: torch.Tensor | None = None
        self.drop_patches()

    def drop_patches(self) -> None:
        """Makes a ViT see the patches of `self.kept` alone, where that is set."""
        if isinstance(self.backbone, ViTModel):
            self.backbone.embeddings.register_forward_hook(
                lambda _module, _inputs, tokens: tokens if self.kept is None else tokens[:, self.kept]
            )

    def forward(self, pixels: torch.Tensor, keep: int | None = None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Logits of each label, and of the mask of each cell seen; `keep` random ones are (ViT alone), or all."""
        cells = (procedural.SIZE // self.cell) ** 2
        self.kept = None if keep is None else F.pad(torch.randperm(cells)[:keep].sort().values + 1, (1, 0))
        pooled, seen = features(self.backbone, pixels)
        return {name: head(pooled).float() for name, head in self.heads.items()}, self.mask_head(seen).float()

    def loss(
        self, pixels: torch.Tensor, labels: dict[str, torch.Tensor], masks: torch.Tensor, keep: int | None
    ) -> torch.Tensor:
        """Mean over the labels, glyphs counting twice, and a share of the masks' loss; `keep` cells are seen."""
        logits, mask_logits = self(pixels, keep)
        if self.kept is not None:
            masks = masks[:, self.kept[1:] - 1]
        losses = {n: F.cross_entropy(logits[n], labels[n], ignore_index=-1) for n in logits if (labels[n] >= 0).any()}
        named = sum(loss * (2 if name == "glyph" else 1) for name, loss in losses.items()) / len(losses)
        return named + 0.3 * F.binary_cross_entropy_with_logits(mask_logits, masks)

    @torch.no_grad()
    def accuracies(self, count: int = 1024) -> dict[str, float]:
        """Share of right answers per label, and per pixel of the mask, on images that training never sees."""
        pixels, labels, masks = batch_of(count, VALIDATION_SEED, 0, self.cell)
        self.eval()
        logits, mask_logits = self(pixels)
        self.train()
        right = {n: (logits[n].argmax(1) == labels[n])[labels[n] >= 0].float().mean().item() for n in logits}
        return {
            n: round(a, 4)
            for n, a in (right | {"mask": ((mask_logits > 0) == (masks > 0.5)).float().mean().item()}).items()
        }


def load(name: str, folder: Path) -> PreTrainedModel:
    """Loads what `save` wrote, without a head."""
    if name == "vit":
        return ViTModel.from_pretrained(folder, add_pooling_layer=False)
    return (SwinModel if name == "swin" else ConvNextModel).from_pretrained(folder)


def save(model: Any, reader: Any, folder: Path, log: list[dict], papers: dict) -> None:
    """Writes a model or adapter in half precision, its processor or tokenizer, log and provenance, then moves them."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.half().save_pretrained(part)
    (part / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    if (part / "config.json").is_file():
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = "float32"  # what `from_pretrained` computes in; the file stays small
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if reader is not None:
        reader.save_pretrained(part)
    (part / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
    (weights,) = part.glob("*.safetensors")
    papers["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    papers["parameters"] = sum(p.numel() for p in model.parameters())
    (part / "PROVENANCE.json").write_text(json.dumps(papers, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def fit(
    parameters: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    loss_of: Callable[[int], Tensor],
    validate: Callable[[], dict[str, float]],
    began: float,
    done: int = 0,
) -> list[dict]:
    """Trains in bfloat16 with a cosine schedule, and returns the log: a row in 50 steps, a validation in 250.

    Args:
        parameters: What is trained; its gradients are clipped at the norm 1.
        optimizer: Its optimiser.
        steps: How many steps.
        loss_of: Loss of a step, counted from 0.
        validate: What a validation finds.
        began: When the clock was started, by `time.monotonic`.
        done: Steps of an earlier training, which the log counts on from.
    """
    parameters, log = list(parameters), []
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for step in range(steps):
        with torch.autocast(parameters[0].device.type, torch.bfloat16):
            loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        last = step + 1 == steps
        if (step + 1) % 50 == 0 or last:
            row: dict[str, Any] = {
                "step": done + step + 1,
                "loss": round(loss.item(), 4),
                "seconds": round(time.monotonic() - began, 1),
            }
            if (step + 1) % 250 == 0 or last:
                row["validation"] = validate()
            log.append(row)
            print(json.dumps(row), flush=True)
    return log


def earlier_stage(folder: Path | None) -> tuple[dict[str, Any] | None, list[dict]]:
    """Returns the papers and the log of what a training goes on from; `None` and an empty one where it starts anew."""
    if folder is None:
        return None, []
    log = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "PROVENANCE.json").read_text(encoding="utf-8")), [json.loads(row) for row in log]


def circumstances(args: argparse.Namespace, began: float, busy: float, *packages: str) -> dict[str, Any]:
    """What the papers of every model say: settings, precision, machine, seconds, commit and versions.

    Args:
        args: Of the command, `threads` among them, and `device` where it takes one.
        began: When the clock was started, by `time.monotonic`.
        busy: The same by `time.process_time`.
        packages: Whose versions to note.
    """
    return {
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, int | float) and k != "probe"},
        "precision": "bfloat16 autocast in training, saved in float16",
        "machine": torch.cuda.get_device_name()
        if getattr(args, "device", "cpu") == "cuda"
        else f"{platform.machine()} processor, {args.threads} threads, no accelerator",
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "commit": provenance()["commit"],
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }


def probe(name: str, folder: Path) -> dict[str, float]:
    """Validation accuracy on digits of logistic regression on the standardised pooled output, per inverse penalty C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from san_bench.image.preprocess import for_checkpoint
    from san_bench.image.tasks import load_task

    backbone, task, read = load(name, folder).eval(), load_task("digits"), []
    for split in (task["train800"], task["val200"]):
        with torch.no_grad():
            read.append(features(backbone, for_checkpoint(split, folder).batch(len(split)))[0].numpy())
    classifiers = {c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)) for c in (0.01, 0.1, 1.0)}
    return {
        f"C={c:g}": model.fit(read[0], task["train800"].labels).score(read[1], task["val200"].labels)
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
    parser.add_argument("--backbone", choices=list(CELL), default="vit")
    parser.add_argument("--steps", type=int, default=1100, help="optimiser steps")
    parser.add_argument("--full-steps", type=int, default=200, help="last steps, in which the ViT sees every patch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, help=f"{LEARNING_RATES} where not given")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of the shipped model where not given")
    parser.add_argument("--continue-from", type=Path, metavar="FOLDER", help="start from these weights, on new images")
    parser.add_argument("--probe", action="store_true", help="score the shipped model on digits instead of training")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="draw examples instead of training")
    args = parser.parse_args()
    args.learning_rate = args.learning_rate or LEARNING_RATES[args.backbone]
    out = args.out or ASSETS / f"{args.backbone}-tiny-procedural"
    if args.probe:
        print(json.dumps(probe(args.backbone, out)))
    if args.contact_sheet:
        contact_sheet(args.contact_sheet)
    if args.probe or args.contact_sheet:
        return

    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    model = Pretraining(args.backbone)
    earlier, log = earlier_stage(args.continue_from)
    if args.continue_from:
        model.backbone = load(args.backbone, args.continue_from).train()
        model.drop_patches()
    seen = earlier["images"] if earlier else 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    dropping = args.steps - args.full_steps if args.backbone == "vit" else 0
    began, busy, done = time.monotonic(), time.process_time(), len(log) and log[-1]["step"]

    def loss_of(step: int) -> Tensor:
        batch = batch_of(args.batch_size, args.seed, seen + step * args.batch_size, model.cell)
        return model.loss(*batch, keep=32 if step < dropping else None)

    log += fit(model.parameters(), optimizer, args.steps, loss_of, model.accuracies, began, done)
    papers = {
        "command": f"python scripts/pretrain.py --backbone {args.backbone}{' --continue-from' if earlier else ''}",
        "images": seen + args.steps * args.batch_size,
        "data": "generators.procedural.draw, kind mixed; no photograph and no handwriting",
        "validation": f"1024 images of seed {VALIDATION_SEED}, which no training image shares",
        **circumstances(args, began, busy, "torch", "transformers", "numpy"),
        "final": log[-1],
        "continued_from": earlier,
    }
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    save(model.backbone, processor, out, log, papers)


if __name__ == "__main__":
    main()
