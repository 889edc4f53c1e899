"""Measure what a recipe needs, on a few steps, without writing to its output folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from san_bench.config.recipe import Recipe
from san_bench.models.adapt import check_trainable, saved_activation_bytes, with_method
from san_bench.run.domain import domain_of
from san_bench.run.sharded import ShardedModel
from san_bench.run.trainer import make_trainer, planned_steps
from san_peft.errors import SanError

STEPS = 3
"""Optimizer steps that a dry run measures; the first one, which also warms up, is left out of the time."""


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """Loads data and model, trains a few steps on this device, and discards the result.

    Args:
        recipe: Recipe of the run.

    Returns:
        Sample counts, trained parameters and their share, steps, seconds per step, and memory in MiB by part: weights,
        gradients, optimizer states, and the activations that one micro-batch saves for the backward pass.

    Raises:
        SanError: As `san_bench.run.train.train` does before and while it trains.
    """
    domain = domain_of(recipe)
    if errors := domain.inspect().errors:
        raise SanError("\n".join(errors))
    steps, n_train = planned_steps(recipe, domain.n_train), domain.n_train
    model: Any = with_method(domain.base_model(), recipe)
    trained = check_trainable(model, recipe)
    weights = _bytes(*model.parameters(), *model.buffers())
    every = sum(parameter.numel() for parameter in model.parameters())
    few = {"optimizer": recipe.optimizer.model_copy(update={"max_steps": min(STEPS, steps)})}
    off = {"checkpoint_steps": 0, "eval_steps": 0, "patience": None, "selection": "last"}
    domain.recipe = recipe.model_copy(update=few | off)
    with tempfile.TemporaryDirectory() as scratch:
        trainer, journal = make_trainer(model, domain, Path(scratch))
        engine = ShardedModel(trainer)
        journal.begin(None)
        trainer.train()
        engine.finish()
    size = trainer.args.per_device_train_batch_size
    items = [trainer.train_dataset[place] for place in range(min(size, n_train))]  # type: ignore[index, arg-type]
    batch = {key: tensor.to(trainer.args.device) for key, tensor in trainer.training.plain(items).items()}  # type: ignore[attr-defined]
    seconds = journal.step_seconds
    parts = {
        "weights": weights,
        "gradients": 4 * sum(trained.values()),  # trained parameters and their gradients are in float32
        "optimizer states": _bytes(*_states(trainer.optimizer)),
        f"activations of {len(items)} {domain.items}": saved_activation_bytes(model, batch),
    }
    return {
        "train": f"{n_train:,} {domain.items} ({recipe.task}, {domain.recipe.train_split})",
        "trained parameters": f"{sum(trained.values()):,} of {every:,} ({sum(trained.values()) / every:.2%})",
        "of these in the head": f"{trained['head']:,}",
        "steps": f"{steps:,} of {recipe.optimizer.batch_size} {domain.items}, in {recipe.optimizer.epochs} epochs",
        "seconds per step": "unknown" if seconds is None else f"{seconds:.3f}, measured on {len(journal.ends)} steps",
        "training time": "unknown" if seconds is None else _duration(seconds * steps),
        **{f"memory: {part}": f"{size / 2**20:,.1f} MiB" for part, size in parts.items()},
        "memory: sum": f"{sum(parts.values()) / 2**20:,.1f} MiB",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "output": f"{recipe.output} (nothing was written)",
    }


def _states(optimizer: Any) -> list[torch.Tensor]:
    inside = getattr(optimizer, "optimizer", optimizer)
    return [value for state in inside.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def _bytes(*tensors: torch.Tensor) -> int:
    """Returns the bytes of the storages of tensors; shared storages count once."""
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
