"""Training of one recipe with transformers' Trainer, which can be killed and started again."""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from san_bench.data.vision import VisionTask, load_task
from san_bench.recipe import Recipe, load_recipe
from san_bench.run.build import build_model, check_trainable, saved_activation_bytes
from san_bench.run.evaluate import predict, save_predictions, score
from san_bench.run.provenance import provenance, write_atomically, write_rows
from san_peft.errors import SanError

COMPLETE = "complete"
"""Marker inside a checkpoint that was written to its end."""


class _Bar(ProgressCallback):
    """Trainer's progress bar with the loss beside it in place of a line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


class _Journal(TrainerCallback):
    """Writes `log.jsonl` and marks checkpoints as complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_rows(self.folder / "log.jsonl", state.log_history)
        write_atomically(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, "")


def train(recipe: Recipe) -> dict[str, Any]:
    """Trains a recipe, or finishes the training that was interrupted, and scores it once.

    The folder `recipe.output` gets `recipe.yaml`, `log.jsonl` (loss of every step), `adapter/` (`save_pretrained`: an
    adapter, or the whole model for a linear probe and full fine-tuning), `predictions.safetensors` and `result.json`. A
    finished run is not repeated: its result is returned.

    Args:
        recipe: What to run.

    Returns:
        The result: accuracy with n, trained parameters, seconds, memory, and where all that comes from.

    Raises:
        SanError: If the folder holds another recipe's run, or the loss is not finite.
    """
    folder = Path(recipe.output)
    result_file = folder / "result.json"
    _claim(folder, recipe)
    if result_file.exists():
        return json.loads(result_file.read_text(encoding="utf-8"))
    task = load_task(recipe.task)
    model = build_model(recipe, task)
    trained = check_trainable(model, recipe)
    print(f"{recipe.method.kind}: trains {trained['rest']:,} parameters and {trained['head']:,} of the head.")
    split = task[recipe.train_split]
    activations = saved_activation_bytes(model, _batch(split, recipe.optimizer.batch_size))
    trainer = make_trainer(model, recipe, task, folder)
    checkpoint = _last_checkpoint(folder / "checkpoints")
    before, start = _peak_rss(), time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, after = time.perf_counter() - start, _peak_rss()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if not all(math.isfinite(float(loss)) for loss in losses):
        raise SanError(
            f"The loss of {recipe.output} is not finite. Try a smaller optimizer.lr than {recipe.optimizer.lr}."
        )
    _save(model, folder / "adapter")
    write_rows(folder / "log.jsonl", trainer.state.log_history)
    logits = predict(model, task[recipe.eval_split], recipe)
    save_predictions(folder / "predictions.safetensors", logits)
    result = {
        "run": folder.name,
        "method": recipe.method.kind,
        "task": recipe.task,
        "split": recipe.eval_split,
        **score(logits, task[recipe.eval_split]),
        "train_split": recipe.train_split,
        "n_train": len(split),
        "trainable_parameters": sum(trained.values()),
        "trainable_head": trained["head"],
        "train_seconds": round(seconds, 3),
        "resumed_from_step": int(checkpoint.name.split("-")[-1]) if checkpoint else 0,
        "steps": trainer.state.global_step,
        "final_loss": losses[-1],
        "saved_activation_mib": round(activations / 2**20, 2),
        "peak_rss_mib": round(after, 1),
        "peak_rss_growth_mib": round(after - before, 1),
        "seed": recipe.seed,
        "lr": recipe.optimizer.lr,
        "recipe_fingerprint": recipe.fingerprint,
        "task_fingerprint": task.fingerprint,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **provenance(),
    }
    write_atomically(result_file, json.dumps(result, indent=2) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def make_trainer(model: Any, recipe: Recipe, task: VisionTask, folder: Path) -> Trainer:
    """Builds the Trainer of a recipe; the order of the data follows from its seed alone."""
    optimizer, split = recipe.optimizer, task[recipe.train_split]
    steps = math.ceil(len(split) / optimizer.batch_size) * optimizer.epochs
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=optimizer.batch_size,
        num_train_epochs=optimizer.epochs,
        learning_rate=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        warmup_steps=round(optimizer.warmup * steps),
        lr_scheduler_type=optimizer.schedule,
        max_grad_norm=optimizer.max_grad_norm,
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=recipe.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.checkpoint_steps else "no",
        save_steps=recipe.checkpoint_steps or 500,
        save_total_limit=2,
        label_names=["labels"],
        report_to=[],
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=split, callbacks=[_Journal(folder)])
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar())
    return trainer


def _claim(folder: Path, recipe: Recipe) -> None:
    """Takes the folder for this recipe, or refuses it where it belongs to another."""
    file = folder / "recipe.yaml"
    if file.exists() and load_recipe(file).fingerprint != recipe.fingerprint:
        raise SanError(
            f"{folder} holds a run of another recipe ({load_recipe(file).fingerprint[:12]}, "
            f"this one is {recipe.fingerprint[:12]}). Choose another output, or remove the folder."
        )
    if not file.exists():
        write_atomically(file, recipe.to_yaml())


def _last_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint that was written to its end; what a kill left half-written is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    for path in found:
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if path.exists()), None)


def _save(model: Any, folder: Path) -> None:
    """Saves what `from_pretrained` loads, in a folder that appears only when it is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    for stale in (temporary, folder):
        if stale.exists():
            shutil.rmtree(stale)
    model.save_pretrained(temporary)
    temporary.rename(folder)


def _batch(split: Any, size: int) -> dict[str, torch.Tensor]:
    items = [split[i] for i in range(min(size, len(split)))]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def _peak_rss() -> float:
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
