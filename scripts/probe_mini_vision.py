"""How hard the tasks of mini-vision are: `python scripts/probe_mini_vision.py`.

For each task and seed, two accuracies on val200 after training with train800: a linear probe (logistic regression on
the standardised class token of the shipped ViT, the best of several penalties, which favours it) and full fine-tuning
(AdamW with one learning rate for all tasks, the last step). `test` is not touched. `--contact-sheet PNG` draws
examples of all tasks instead.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ViTModel, get_cosine_schedule_with_warmup, set_seed

from san_bench.data import mini
from san_bench.data.vision import VisionTask, embedded_path

PENALTIES = (0.001, 0.01, 0.1, 1.0)
"""Inverse penalties that the probe chooses from."""


def pixels(task: VisionTask, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as the ViT takes them, and labels."""
    images = np.stack([np.asarray(task[split].image(i)) for i in range(len(task[split]))])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(task[split].labels)


def probe(task: VisionTask) -> float:
    """Best validation accuracy of a linear classifier on the frozen class token."""
    vit = ViTModel.from_pretrained(embedded_path(), add_pooling_layer=False).eval()
    data = {split: pixels(task, split) for split in ("train800", "val200")}
    with torch.no_grad():
        token = {n: vit(pixel_values=x).last_hidden_state[:, 0].numpy() for n, (x, _) in data.items()}
    fits = (
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500)).fit(
            token["train800"], data["train800"][1]
        )
        for c in PENALTIES
    )
    return max(fit.score(token["val200"], data["val200"][1]) for fit in fits)


def full(task: VisionTask, seed: int, epochs: int, lr: float, batch: int = 32) -> float:
    """Validation accuracy after training every parameter."""
    set_seed(seed)
    model = AutoModelForImageClassification.from_pretrained(embedded_path(), num_labels=task.num_classes)
    (x, y), (val_x, val_y) = pixels(task, "train800"), pixels(task, "val200")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(batch):
            F.cross_entropy(model(pixel_values=x[part]).logits, y[part]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return (model(pixel_values=val_x).logits.argmax(1) == val_y).float().mean().item()


def contact_sheet(file: Path, columns: int = 16) -> None:
    """Draws a row of the first images of each task that cover its classes."""
    from PIL import Image

    rows = [np.concatenate(list(mini.draw(name, np.arange(columns))[0].images), axis=1) for name in mini.TASKS]
    Image.fromarray(np.concatenate(rows)).quantize(128).save(file, optimize=True)


def main() -> None:
    """Prints a row per task, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(mini.TASKS), default=list(mini.TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="draw examples instead of training")
    args = parser.parse_args()
    if args.contact_sheet:
        contact_sheet(args.contact_sheet)
        return
    torch.set_num_threads(args.threads)
    print("| task | group | classes | linear probe | full fine-tuning | seconds of one |\n|---|---|---|---|---|---|")
    for name in args.tasks:
        task, linear = mini.load(name), probe(mini.load(name))
        began = time.monotonic()
        scores = [full(task, seed, args.epochs, args.learning_rate) for seed in range(args.seeds)]
        seconds = (time.monotonic() - began) / args.seeds
        spread = f" ± {np.std(scores, ddof=1):.1%}" if args.seeds > 1 else ""
        print(
            f"| {name} | {mini.TASKS[name].group} | {task.num_classes} | {linear:.1%} | {np.mean(scores):.1%}{spread}"
            f" | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
