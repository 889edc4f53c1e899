"""Training of one recipe with transformers' Trainer, which can be killed and started again."""

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
    loaded_commit,
    saved_activation_bytes,
    with_method,
)
from san_bench.models.weights import place
from san_bench.run.comparison import comparison
from san_bench.run.domain import Domain, domain_of
from san_bench.run.evaluate import trained_model
from san_bench.run.folder import claim
from san_bench.run.model_card import write_card
from san_bench.run.provenance import Energy, provenance, write_atomically, write_rows
from san_bench.run.scales import CARRIERS, save_scales, scales_of
from san_bench.run.sharded import ShardedModel
from san_bench.run.trainer import COMPLETE, make_trainer
from san_peft.errors import SanError


def train(recipe: Recipe, track: Sequence[str] = ()) -> dict[str, Any]:
    """Trains a recipe, or finishes the training that was interrupted, and scores it once.

    The folder `recipe.output` gets `recipe.yaml`, `log.jsonl` (loss of every step), `adapter/` (`save_pretrained`: an
    adapter, or the whole model for methods without one), what was predicted, `scales.safetensors` where there are
    scales, `images.json` where conversations' images lie in a folder, and `result.json`. A finished run is not
    repeated: its result is returned. Of several processes, as `accelerate launch` or `torchrun` start them, each trains
    on its part of every batch, and the first one writes. A model that was trained in shards is saved from whole tensors
    and scored as it was saved, whole on every device.

    Args:
        recipe: What to run.
        track: Names of trackers that also get the log; see `san_bench.run.tracking`.

    Returns:
        The result: accuracy with n, and of several tasks those of each; trained parameters, seconds, memory, and where
        all that comes from; the same once more in the blocks of PEFT's method comparison.

    Raises:
        SanError: If the folder holds another recipe's run, the data is not as it must be, the loss or a prediction is
            not finite, or memory is not enough; checkpoints stay.
    """
    folder = Path(recipe.output)
    result_file = folder / "result.json"
    processes = PartialState(cpu=not torch.cuda.is_available())
    with processes.main_process_first():
        claim(folder, recipe)
    if result_file.exists():
        return json.loads(result_file.read_text(encoding="utf-8"))
    created, began = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    domain = domain_of(recipe)
    _inspect(domain, folder, processes.is_main_process)
    count = domain.n_train  # loads the data: what is wrong with it is better known before a model is loaded
    plain = domain.base_model()
    pretrained = checkpoint_sha256(plain)
    model = with_method(plain, recipe)
    del plain
    trained = check_trainable(model, recipe)
    if processes.is_main_process:
        head = f" and {trained['head']:,} of the head" if trained["head"] else ""
        print(f"{recipe.method.kind}: trains {trained['rest']:,} parameters{head}.")
    trainer, journal = make_trainer(model, domain, folder, track)
    engine = ShardedModel(trainer)
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
    joules = energy.joules()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    shards = engine.finish()
    if processes.is_main_process:
        _save(model, folder / "adapter", shards)
        write_rows(folder / "log.jsonl", trainer.state.log_history)
    if shards is not None:
        model = trainer.model = trainer.model_wrapped = None  # else both would be in memory
        trainer.accelerator.free_memory()
        processes.wait_for_everyone()
        model = trained_model(domain, folder / "adapter", trainable=True)
        place(model)
    activations = saved_activation_bytes(model, _batch(trainer, trainer.args.per_device_train_batch_size))
    scores = domain.score(model, domain.recipe.eval_split)
    result = {
        "run": folder.name,
        "method": recipe.method.kind,
        "kind": recipe.method.kind,
        "task": recipe.task,
        "model": recipe.model,
        "model_revision": loaded_commit(recipe),
        "backbone": Path(split_revision(recipe.model)[0]).name,
        "protocol": recipe.protocol,
        "selection": domain.recipe.selection,
        "split": domain.recipe.eval_split,
        **scores.numbers,
        "train_split": domain.recipe.train_split,
        "n_train": count,
        **domain.facts(),
        "trainable_parameters": sum(trained.values()),
        "trainable_head": trained["head"],
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "train_seconds": round(seconds, 3),
        "step_seconds": step and round(step, 4),
        "resumed_from_step": int(checkpoint.name.split("-")[-1]) if checkpoint else 0,
        "steps": trainer.state.global_step,
        "final_loss": losses[-1],
        "saved_activation_mib": round(activations / 2**20, 2),
        "peak_rss_mib": round(peak, 1),
        "peak_rss_growth_mib": round(peak - before, 1),
        "energy_joules": joules,
        "seed": recipe.seed,
        "lr": recipe.optimizer.lr,
        "recipe_fingerprint": recipe.fingerprint,
        "task_fingerprint": domain.fingerprint,
        "checkpoint_sha256": pretrained,
        "processes": processes.num_processes,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **provenance(),
    }
    if processes.is_main_process:
        result |= comparison(recipe, result, model, created, time.perf_counter() - began, journal.memory)
        scores.save(folder)
        write_card(folder / "adapter", recipe, result, model)
        if getattr(model, "peft_type", None) in CARRIERS:
            save_scales(folder, scales_of(model))  # may change the model
        write_atomically(result_file, json.dumps(result, indent=2) + "\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    processes.wait_for_everyone()
    return result


def _inspect(domain: Domain, folder: Path, writes: bool) -> None:
    """Keeps and tells what was found of the data, and raises `SanError` where it stops the run."""
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
    goes_on = (
        f"The same command goes on from step {kept.name.split('-')[-1]}."
        if kept
        else "There is no checkpoint to go on from; checkpoint_steps makes some."
    )
    said = str(error).strip().splitlines() or ["out of memory"]
    return SanError(
        f"Memory is not enough in step {step + 1} of {folder}: {said[0].rstrip('.')}. {goes_on} A larger "
        "optimizer.accumulation needs less, and so do gradient_checkpointing and quantised weights of language models; "
        "that is another recipe, which needs another output."
    )


def _last_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint that was written to its end; what a kill left half-written is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    for path in found:
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if path.exists()), None)


def _save(model: Any, folder: Path, tensors: dict[str, torch.Tensor] | None) -> None:
    """Saves what `from_pretrained` loads, in a folder that appears only when it is complete.

    Args:
        model: The model.
        folder: Where to.
        tensors: The state to save in place of the model's own.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    for stale in (temporary, folder):
        if stale.exists():
            shutil.rmtree(stale)
    model.save_pretrained(temporary, state_dict=tensors)
    temporary.rename(folder)


def _batch(trainer: Any, size: int) -> dict[str, torch.Tensor]:
    """The first items to train with, as they are scored."""
    items = [trainer.train_dataset[i] for i in range(min(size, len(trainer.train_dataset)))]
    return {key: tensor.to(trainer.args.device) for key, tensor in trainer.training.plain(items).items()}


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
