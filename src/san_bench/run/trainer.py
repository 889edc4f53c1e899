"""Configure transformers' Trainer for a recipe: optimizer, schedule, mixup, EMA, model selection and logging."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from san_bench.config.recipe import Recipe
from san_bench.run.checkpoints import CompleteCheckpoints, seconds_of
from san_bench.run.domain import Domain, Training
from san_bench.run.provenance import write_rows
from san_bench.run.tracking import tracking
from san_peft.errors import SanError

AVERAGE = "average.safetensors"
"""File of the exponential moving average of the trained weights inside a checkpoint."""


class _Bar(ProgressCallback):
    """Progress bar with the loss as its postfix, instead of a line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


class _Trainer(Trainer):
    """Trainer with the losses, weight decay and parameter groups of a recipe.

    It also resumes full models: transformers saves a ViT under legacy names, which its own resuming skips.
    """

    def __init__(self, recipe: Recipe, training: Training, **options: Any) -> None:
        super().__init__(optimizer_cls_and_kwargs=_optimizer(recipe), **options)
        self.recipe, self.training = recipe, training
        if training.mean_of_parts:
            self.model_accepts_loss_kwargs = False  # mean over micro-batches instead of over tokens

    def get_train_dataloader(self) -> DataLoader:
        """Returns the training batches, which may use another collator than evaluation."""
        if self.training.batches is not None:
            return self.accelerator.prepare(self._own_batches())
        scoring, self.data_collator = self.data_collator, self.training.collate
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = scoring

    def _own_batches(self) -> DataLoader:
        processes = self.accelerator.num_processes
        batches = self.training.batches(self.args.train_batch_size, processes)  # type: ignore[misc]
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=self.training.collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Creates the optimizer, with parameter groups for parts that have their own learning rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        names = {parameter: name for name, parameter in model.named_parameters()}
        for part, rate in self.training.rates.items():
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if part in names.get(p, "")]
                if own:
                    group["params"] = [p for p in group["params"] if part not in names.get(p, "")]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the model's own loss, or in training the loss of the data, if it defines one."""
        if not model.training or self.training.loss is None:
            counted = None if self.training.mean_of_parts else num_items_in_batch
            return super().compute_loss(model, inputs, return_outputs, counted)
        loss, outputs = self.training.loss(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Returns the parameters with weight decay: matrices and conv kernels, vectors if the recipe says so."""
        if self.recipe.optimizer.decay_vectors:
            return super().get_decay_parameter_names(model)
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        self._load_from_checkpoint(str(self.state.best_model_checkpoint), self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        whole = model or self.model
        if isinstance(whole, PreTrainedModel):
            whole.load_state_dict(type(whole).from_pretrained(resume_from_checkpoint, dtype=torch.float32).state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class Journal(TrainerCallback):
    """Writes `log.jsonl`, and stops the training if the loss is not finite.

    Attributes:
        completion: Callback that marks checkpoints as complete, and stops the training after a signal.
        memory: Reserved GPU memory in bytes after each step; empty on the CPU.
        ends: End times of the steps since the last start, from `time.perf_counter`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.earlier, self.start = folder, 0.0, time.perf_counter()
        self.completion = CompleteCheckpoints(folder, lambda: self.seconds)
        self.memory: list[int] = []
        self.ends: list[float] = []

    @property
    def seconds(self) -> float:
        """Seconds of training, including those before an interruption."""
        return self.earlier + time.perf_counter() - self.start

    @property
    def step_seconds(self) -> float | None:
        """Median seconds per step; `None` for fewer than two steps."""
        between = [after - before for before, after in pairwise(self.ends)]
        return median(between) if between else None

    def begin(self, checkpoint: Path | None) -> None:
        """Starts the clock, from the training time that a checkpoint records."""
        self.earlier = seconds_of(checkpoint) if checkpoint else 0.0
        self.start = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Raises `SanError` if the loss is not finite."""
        if logs and not math.isfinite(float(logs.get("loss", 0))):
            raise SanError(
                f"The loss of {self.folder} is not finite in step {state.global_step}. "
                f"Try an optimizer.lr below {args.learning_rate:g}, with another output."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Records the time and the reserved GPU memory."""
        self.ends.append(time.perf_counter())
        if torch.cuda.is_available():
            self.memory.append(torch.cuda.memory_reserved())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the log."""
        if state.is_world_process_zero:
            write_rows(self.folder / "log.jsonl", state.log_history)


class Checkpoints(TrainerCallback):
    """Also saves checkpoints within epochs, where Trainer saves after each epoch to select the best one.

    Args:
        steps: Steps between two checkpoints.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Requests a checkpoint every `steps` steps."""
        control.should_save = control.should_save or state.global_step % self.steps == 0


class Average(TrainerCallback):
    """Maintains timm's exponential moving average (EMA) of the weights, which replaces the weights after training.

    Args:
        model: The model to train.
        decay: Decay of the moving average per step.
    """

    def __init__(self, model: Any, decay: float) -> None:
        from timm.utils.model_ema import ModelEmaV3

        self.average: Any = ModelEmaV3(model, decay=decay)
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Loads the EMA of the checkpoint that the training resumes from, if any."""
        if state.global_step:
            self.average.module.load_state_dict(load_file(self._file(args, state)), strict=False)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Updates the EMA."""
        self.average.update(model, step=state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves the EMA into the checkpoint."""
        if state.is_world_process_zero:
            save_file(self._trained(), self._file(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Replaces the weights with the EMA."""
        model.load_state_dict(self._trained(), strict=False)

    def _file(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / AVERAGE

    def _trained(self) -> dict[str, Tensor]:
        parameters = dict(self.average.module.named_parameters())
        return {name: parameters[name].detach().contiguous() for name in self.names}


def make_trainer(model: Any, domain: Domain, folder: Path, track: Sequence[str] = ()) -> tuple[Trainer, Journal]:
    """Builds the Trainer and journal of a recipe; the order of the data depends only on the recipe's seed.

    Args:
        model: The model to train.
        domain: The recipe with its data.
        folder: Folder of the run.
        track: Names of trackers.

    Raises:
        SanError: If the batch size is not divisible by the number of micro-batches, or fp16 is chosen without a GPU.
    """
    recipe: Any = domain.recipe
    optimizer, gpu = recipe.optimizer, torch.cuda.is_available()
    training = domain.training(model)
    steps = planned_steps(recipe, len(training.dataset))
    if recipe.precision == "fp16" and not gpu:
        raise SanError("precision fp16 needs a GPU. Choose bf16 or fp32.")
    processes = PartialState(cpu=not gpu).num_processes
    devices = processes if processes > 1 else max(1, torch.cuda.device_count())
    parts = optimizer.accumulation * devices
    if optimizer.batch_size % parts:
        raise SanError(
            f"A batch of {optimizer.batch_size} {domain.items} is not divisible by {parts}: {optimizer.accumulation} "
            f"gradient accumulation steps x {devices} devices. Change optimizer.batch_size or optimizer.accumulation."
        )
    tracked, trackers = tracking(track, recipe, folder)
    selects, saves = recipe.selection != "last", "steps" if recipe.checkpoint_steps else "no"
    evaluation = "steps" if recipe.eval_steps else "epoch" if selects else "no"
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=optimizer.batch_size // parts,
        per_device_eval_batch_size=64,
        **(_checkpointing() if training.gradient_checkpointing else {}),
        gradient_accumulation_steps=optimizer.accumulation,
        num_train_epochs=optimizer.epochs,
        max_steps=-1 if optimizer.max_steps is None else steps,
        learning_rate=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        warmup_steps=round(optimizer.warmup * steps),
        **_schedule(recipe),
        max_grad_norm=optimizer.max_grad_norm,
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        torch_compile=recipe.compile,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        dataloader_num_workers=recipe.data_workers,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy=evaluation,
        eval_steps=recipe.eval_steps or None,
        save_strategy=evaluation if selects else saves,
        save_steps=(recipe.eval_steps if selects else recipe.checkpoint_steps) or 500,
        save_total_limit=2,
        load_best_model_at_end=selects,
        metric_for_best_model=training.metric if selects else None,
        greater_is_better=training.metric != "loss" if selects else None,
        label_names=["labels"],
        **tracked,
    )
    journal = Journal(folder)
    controls: list[TrainerCallback] = []
    if selects and recipe.checkpoint_steps:
        controls.append(Checkpoints(recipe.checkpoint_steps))
    if recipe.patience is not None:
        controls.append(EarlyStoppingCallback(recipe.patience))
    trainer = _Trainer(
        recipe,
        training,
        model=model,
        args=arguments,
        data_collator=training.plain,
        train_dataset=training.dataset,
        eval_dataset=training.chosen_by,
        compute_metrics=_accuracy if training.metric == "accuracy" else None,
        callbacks=[*controls, journal, *trackers],
    )
    if training.average is not None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise SanError("An EMA of sharded weights is not supported. Set ema to null.")
        trainer.add_callback(Average(model, training.average))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar())
    trainer.add_callback(journal.completion)
    return trainer, journal


def planned_steps(recipe: Recipe, n_train: int) -> int:
    """Returns the number of optimizer steps of a recipe on so many training samples, without early stopping."""
    steps = math.ceil(n_train / recipe.optimizer.batch_size) * recipe.optimizer.epochs
    return min(steps, recipe.optimizer.max_steps or steps)


def _checkpointing() -> dict[str, Any]:
    """Returns the arguments for gradient checkpointing, which newer transformers calls activation checkpointing."""
    known = {field.name for field in fields(TrainingArguments)}
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _schedule(recipe: Recipe) -> dict[str, Any]:
    optimizer = recipe.optimizer
    if not (optimizer.min_lr or optimizer.warmup_lr):
        return {"lr_scheduler_type": optimizer.schedule}
    options = {"min_lr_rate": optimizer.min_lr, "warmup_lr_rate": optimizer.warmup_lr}
    return {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": options}


def _optimizer(recipe: Recipe) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if recipe.optimizer.kind == "sgd":
        return torch.optim.SGD, {"lr": recipe.optimizer.lr, "momentum": 0.9}
    return torch.optim.AdamW, {"lr": recipe.optimizer.lr}


def _accuracy(result: Any) -> dict[str, float]:
    """Computes the top-1 accuracy."""
    return {"accuracy": float((result[0].argmax(-1) == result[1]).mean())}
