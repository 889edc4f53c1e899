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
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from san_bench.data.vision import VisionTask, load_task
from san_bench.recipe import Recipe
from san_bench.run.build import build_model, check_trainable, saved_activation_bytes
from san_bench.run.evaluate import predict, save_predictions, score
from san_bench.run.folder import claim
from san_bench.run.provenance import provenance, write_atomically, write_rows
from san_peft.errors import SanError

COMPLETE = "complete"
"""Marker inside a checkpoint that was written to its end; it holds the seconds of training so far."""


class _Bar(ProgressCallback):
    """Trainer's progress bar with the loss beside it in place of a line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


class _Trainer(Trainer):
    """Trainer that resumes whole models too: transformers saves a ViT under older names, which its resuming skips."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        whole = model or self.model
        if isinstance(whole, PreTrainedModel):
            whole.load_state_dict(type(whole).from_pretrained(resume_from_checkpoint, dtype=torch.float32).state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class _Journal(TrainerCallback):
    """Writes `log.jsonl`, marks checkpoints as complete, and stops a training whose loss is not finite."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.earlier, self.start = folder, 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.earlier + time.perf_counter() - self.start

    def begin(self, checkpoint: Path | None) -> None:
        """Starts the clock, at the seconds that a checkpoint was written after."""
        self.earlier = float((checkpoint / COMPLETE).read_text(encoding="utf-8")) if checkpoint else 0.0
        self.start = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and not math.isfinite(float(logs.get("loss", 0))):
            raise SanError(
                f"The loss of {self.folder} is not finite in step {state.global_step}. "
                f"Try a smaller optimizer.lr than {args.learning_rate:g}, with another output."
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_rows(self.folder / "log.jsonl", state.log_history)
        marker = Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE
        write_atomically(marker, f"{self.seconds:.3f}\n")


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
        SanError: If the folder holds another recipe's run, or the loss or a prediction is not finite.
    """
    folder = Path(recipe.output)
    result_file = folder / "result.json"
    claim(folder, recipe)
    if result_file.exists():
        return json.loads(result_file.read_text(encoding="utf-8"))
    task = load_task(recipe.task)
    model = build_model(recipe, task)
    trained = check_trainable(model, recipe)
    print(f"{recipe.method.kind}: trains {trained['rest']:,} parameters and {trained['head']:,} of the head.")
    split = task[recipe.train_split]
    trainer, journal = make_trainer(model, recipe, task, folder)
    checkpoint = _last_checkpoint(folder / "checkpoints")
    before = _rss()
    journal.begin(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, peak = journal.seconds, _peak_rss()
    activations = saved_activation_bytes(model, _batch(split, recipe.optimizer.batch_size, trainer.args.device))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    _save(model, folder / "adapter")
    write_rows(folder / "log.jsonl", trainer.state.log_history)
    logits = predict(model, task[recipe.eval_split], recipe)
    if not logits.isfinite().all():
        raise SanError(
            f"{folder} predicts values that are not finite. Try a smaller optimizer.lr, with another output."
        )
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
        "peak_rss_mib": round(peak, 1),
        "peak_rss_growth_mib": round(peak - before, 1),
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


def make_trainer(model: Any, recipe: Recipe, task: VisionTask, folder: Path) -> tuple[Trainer, _Journal]:
    """Builds the Trainer of a recipe, and its journal; the order of the data follows from the recipe's seed alone."""
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
    journal = _Journal(folder)
    trainer = _Trainer(model=model, args=arguments, train_dataset=split, callbacks=[journal])
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar())
    return trainer, journal


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


def _batch(split: Any, size: int, device: torch.device) -> dict[str, torch.Tensor]:
    items = [split[i] for i in range(min(size, len(split)))]
    return {key: torch.stack([item[key] for item in items]).to(device) for key in items[0]}


def _rss() -> float:
    """Resident memory of this process in MiB; where only the peak is known, that."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return _peak_rss()
    return int(statm.read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 2**20


def _peak_rss() -> float:
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
