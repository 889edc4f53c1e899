"""Train one recipe with transformers' Trainer, resumable after an interruption."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from san_bench.config.recipe import Recipe, split_revision
from san_bench.models.adapt import (
    check_trainable,
    checkpoint_sha256,
    saved_activation_bytes,
    with_method,
)
from san_bench.models.checkpoint import checkpoint_of
from san_bench.models.start import start_of
from san_bench.models.weights import move_to_gpu
from san_bench.run.domain import Domain, domain_of
from san_bench.run.evaluate import trained_model
from san_bench.run.folder import claim, weights_sha256
from san_bench.run.model_card import write_card
from san_bench.run.provenance import Energy, provenance, write_atomically, write_rows
from san_bench.run.scales import CARRIERS, save_scales, scales_of
from san_bench.run.sharded import ShardedModel
from san_bench.run.trainer import COMPLETE, Journal, make_trainer
from san_peft.errors import SanError

RESULT = "result.json"
"""File of a finished run's result."""


def train(recipe: Recipe, track: Sequence[str] = ()) -> dict[str, Any]:
    """Trains a recipe, or resumes an interrupted run, and scores it once.

    The folder `recipe.output` gets `recipe.yaml`, `log.jsonl` (the loss of every step), `adapter/` (what
    `save_pretrained` writes: an adapter, or the whole model for methods without one), the predictions,
    `scales.safetensors` if the adapter has scales, `classes.json` if the classes have names, `images.json` if the
    images of conversations lie in a folder, and `result.json`. A finished run is not repeated: its result is returned.
    Under `accelerate launch` or `torchrun` each process trains on its shard of every batch, and rank 0 writes. A model
    trained with sharded parameters is saved from full tensors, loaded again on every device and scored.

    Args:
        recipe: Recipe of the run.
        track: Names of trackers that also get the log; see `san_bench.run.tracking`.

    Returns:
        The result: accuracy with n (and per task, if there are several), trained parameters, seconds, memory,
        fingerprints and provenance.

    Raises:
        SanError: If the folder holds the run of another recipe, the data is invalid, the loss or a prediction is not
            finite, or memory runs out (checkpoints are kept).
    """
    began, folder = time.perf_counter(), Path(recipe.output)
    processes = PartialState(cpu=not torch.cuda.is_available())
    with processes.main_process_first():
        claim(folder, recipe)
    if (folder / RESULT).exists():
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))
    domain = domain_of(recipe)
    _inspect(domain, folder, processes.is_main_process)
    facts = {"n_train": domain.n_train}  # loads the data: its errors should come before the model is loaded
    model, described = _adapted(domain, processes.is_main_process)
    trainer, journal = make_trainer(model, domain, folder, track)
    engine = ShardedModel(trainer)
    measured = _fit(trainer, journal, folder, processes)
    shards = engine.finish()
    if processes.is_main_process:
        _save(model, folder / "adapter", shards)
        write_rows(folder / "log.jsonl", trainer.state.log_history)
    if shards is not None:
        del model  # else both models would be in memory
        model = _reloaded(domain, trainer, processes)
    activations = saved_activation_bytes(model, _batch(trainer, trainer.args.per_device_train_batch_size))
    scores = domain.score(model, domain.recipe.eval_split)
    result = {
        **_identity(domain),
        **scores.numbers,
        **facts,
        **domain.facts(),
        **described,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        **measured,
        "saved_activation_mib": round(activations / 2**20, 2),
        "saved_bytes": sum(file.stat().st_size for file in (folder / "adapter").glob("*.safetensors")),
        "processes": processes.num_processes,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "total_seconds": round(time.perf_counter() - began, 3),
        **provenance(),
    }
    if processes.is_main_process:
        scores.save(folder)
        domain.save_labels(folder / "adapter")
        write_card(folder / "adapter", recipe, result, model)
        if getattr(model, "peft_type", None) in CARRIERS:
            save_scales(folder, scales_of(model))  # may change the model
        write_atomically(folder / RESULT, json.dumps(result, indent=2) + "\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    processes.wait_for_everyone()
    return result


def _identity(domain: Domain) -> dict[str, Any]:
    """Names what a result is of: method, task, model, splits and settings, with their fingerprints."""
    recipe = domain.recipe
    return {
        "run": Path(recipe.output).name,
        "method": recipe.method.kind,
        "kind": recipe.method.kind,
        "task": recipe.task,
        "model": recipe.model,
        "model_revision": checkpoint_of(recipe).commit,
        "backbone": Path(split_revision(recipe.model)[0]).name,
        "protocol": recipe.protocol,
        "selection": recipe.selection,
        "split": recipe.eval_split,
        "train_split": recipe.train_split,
        "seed": recipe.seed,
        "lr": recipe.optimizer.lr,
        "recipe_fingerprint": recipe.fingerprint,
        "task_fingerprint": domain.fingerprint,
        **({} if (start := start_of(recipe.method)) is None else {"start_sha256": weights_sha256(start)}),
    }


def _adapted(domain: Domain, prints: bool) -> tuple[Any, dict[str, Any]]:
    """Loads the pretrained model, applies the method, and counts the trained parameters."""
    model = domain.base_model()
    pretrained = checkpoint_sha256(model)
    model = with_method(model, domain.recipe)
    trained = check_trainable(model, domain.recipe)
    if prints:
        head = f" and {trained['head']:,} of the head" if trained["head"] else ""
        print(f"{domain.recipe.method.kind}: trains {trained['rest']:,} parameters{head}.")
    return model, {
        "checkpoint_sha256": pretrained,
        "trainable_parameters": sum(trained.values()),
        "trainable_head": trained["head"],
    }


def _fit(trainer: Any, journal: Journal, folder: Path, processes: PartialState) -> dict[str, Any]:
    """Trains from the last checkpoint, if there is one, and measures time, memory and energy."""
    with processes.main_process_first():
        checkpoint = _last_checkpoint(folder / "checkpoints")
    before = _rss()
    journal.begin(checkpoint)
    energy = Energy()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(folder, trainer.state.global_step, error) from error
    seconds, step, peak = journal.seconds, journal.step_seconds, _peak_rss()
    return {
        "train_seconds": round(seconds, 3),
        "step_seconds": step and round(step, 4),
        "resumed_from_step": _step(checkpoint) if checkpoint else 0,
        "steps": trainer.state.global_step,
        "final_loss": [row["loss"] for row in trainer.state.log_history if "loss" in row][-1],
        "peak_rss_mib": round(peak, 1),
        "peak_rss_growth_mib": round(peak - before, 1),
        "peak_gpu_reserved_mib": round(max(journal.memory, default=0) / 2**20, 1),
        "energy_joules": energy.joules(),
    }


def _reloaded(domain: Domain, trainer: Any, processes: PartialState) -> Any:
    """Frees a model with sharded parameters and loads what was saved, whole on every device."""
    trainer.model = trainer.model_wrapped = None
    trainer.accelerator.free_memory()
    processes.wait_for_everyone()
    model = trained_model(domain, Path(domain.recipe.output) / "adapter", trainable=True)
    move_to_gpu(model)
    return model


def _inspect(domain: Domain, folder: Path, writes: bool) -> None:
    """Validates the data: saves and prints the findings, and raises `SanError` if any of them stops the run."""
    found = domain.inspect()
    if writes:
        for name, content in found.files.items():
            write_atomically(folder / name, content)
        for remark in found.remarks:
            print(remark)
    if found.errors:
        raise SanError("\n".join(found.errors))


def _out_of_memory(folder: Path, step: int, error: BaseException) -> SanError:
    kept = _last_checkpoint(folder / "checkpoints")
    resumes = (
        f"The same command resumes from step {_step(kept)}."
        if kept
        else "There is no checkpoint to resume from; set checkpoint_steps to save some."
    )
    said = str(error).strip().splitlines() or ["out of memory"]
    return SanError(
        f"Out of memory in step {step + 1} of {folder}: {said[0].rstrip('.')}. {resumes} To use less memory, increase "
        "optimizer.accumulation, enable gradient_checkpointing or quantise the weights of a language model. That is "
        "another recipe, so give it another output."
    )


def _last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint, and removes incomplete ones."""
    found = sorted(folder.glob("checkpoint-*"), key=_step)
    for path in found:
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if path.exists()), None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def _save(model: Any, folder: Path, tensors: dict[str, torch.Tensor] | None) -> None:
    """Saves a model for `from_pretrained`, into a folder that appears only once it is complete.

    Args:
        model: The model.
        folder: Folder to write.
        tensors: State dict to save instead of the model's own.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    for stale in (temporary, folder):
        if stale.exists():
            shutil.rmtree(stale)
    model.save_pretrained(temporary, state_dict=tensors)
    temporary.rename(folder)


def _batch(trainer: Any, size: int) -> dict[str, torch.Tensor]:
    """Returns the first training items as an evaluation batch."""
    items = [trainer.train_dataset[i] for i in range(min(size, len(trainer.train_dataset)))]
    return {key: tensor.to(trainer.args.device) for key, tensor in trainer.training.plain(items).items()}


def _rss() -> float:
    """Returns the resident memory of this process in MiB, or its peak if only that is known."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return _peak_rss()
    return int(statm.read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 2**20


def _peak_rss() -> float:
    """Returns the peak resident memory of this process in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
