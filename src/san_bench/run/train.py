"""Train one recipe with transformers' Trainer, resumable after an interruption."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from san_bench.config.errors import Stopped, cause_of, loading
from san_bench.config.recipe import Recipe, split_revision
from san_bench.models.adapt import (
    PLAIN,
    check_trainable,
    checkpoint_sha256,
    saved_activation_bytes,
    with_method,
)
from san_bench.models.checkpoint import checkpoint_of
from san_bench.models.start import start_of
from san_bench.models.weights import move_to_gpu
from san_bench.run.checkpoints import last_checkpoint
from san_bench.run.domain import Domain, Findings, domain_of
from san_bench.run.evaluate import trained_model
from san_bench.run.folder import RESULT, TRAINED, check_free, claimed, step_of, weights_sha256
from san_bench.run.model_card import write_card
from san_bench.run.provenance import Energy, provenance, write_atomically, write_rows
from san_bench.run.scales import CARRIERS, save_scales, scales_of
from san_bench.run.sharded import ShardedModel
from san_bench.run.trainer import Journal, make_trainer
from san_peft.errors import SanError


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
    check_free(folder, recipe)
    if (folder / RESULT).exists():
        return read_result(folder)
    domain = domain_of(recipe)
    findings = _inspected(domain, folder, processes.is_main_process)
    facts = {"n_train": domain.n_train}  # loads the data: its errors should come before the model is loaded
    trained = _trained(folder)
    if trained is None:
        model, described = _adapted(domain, processes.is_main_process)
    else:
        model, described = _again(domain, folder), trained["described"]
    with ExitStack() as stack:
        journals: list[Journal] = []
        if processes.is_main_process:
            stack.enter_context(claimed(folder, recipe, lambda: any(journal.ends for journal in journals)))
            _write(findings, folder)
        processes.wait_for_everyone()
        trainer, journal = make_trainer(model, domain, folder, track if trained is None else ())
        journals.append(journal)
        if trained is not None:
            measured = trained["measured"]
            move_to_gpu(model)
        else:
            measured, sharded = _train(trainer, journal, model, described, processes)
            if sharded:
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
            (folder / TRAINED).unlink(missing_ok=True)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        processes.wait_for_everyone()
    return result


def read_result(folder: Path) -> dict[str, Any]:
    """Reads the result of a finished run.

    Raises:
        SanError: If the file is damaged.
    """
    file = folder / RESULT
    with loading(f"{file}", "Remove it, and the same command trains the run again."):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def _train(
    trainer: Any, journal: Journal, model: Any, described: dict[str, Any], processes: PartialState
) -> tuple[dict[str, Any], bool]:
    """Trains and saves a model; a signal stops after the next save.

    Returns:
        What was measured, and whether the model has sharded parameters.
    """
    folder = journal.folder
    with journal.completion.request as request:
        engine = ShardedModel(trainer)
        measured = _fit(trainer, journal, folder, processes)
        shards = engine.finish()
        if processes.is_main_process:
            _save(model, folder / "adapter", shards)
            write_rows(folder / "log.jsonl", trainer.state.log_history)
            facts = {"measured": measured, "described": described, "weights": weights_sha256(folder / "adapter")}
            write_atomically(folder / TRAINED, json.dumps(facts, indent=2) + "\n")
    if request.number is not None:
        raise Stopped(request.number, f"{folder} is trained and saved. Run the same command again to score it.")
    return measured, shards is not None


def _trained(folder: Path) -> dict[str, Any] | None:
    """Returns what is known of a run that was trained and saved, but not scored; `None` if it has to be trained."""
    file = folder / TRAINED
    if not file.exists():
        return None
    try:
        facts = dict(json.loads(file.read_text(encoding="utf-8")))
        if facts["weights"] == weights_sha256(folder / "adapter") and {"measured", "described"} <= facts.keys():
            return facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"warning: {file} is damaged: {cause_of(error)}", file=sys.stderr)
    print(f"warning: the weights in {folder / 'adapter'} are damaged; the run is trained again.", file=sys.stderr)
    return None


def _again(domain: Domain, folder: Path) -> Any:
    """Loads a trained model for scoring, with the parameters of its method trainable as in training."""
    model = trained_model(domain, folder / "adapter", trainable=True)
    return with_method(model, domain.recipe) if domain.recipe.method.kind in PLAIN else model


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
        checkpoint = last_checkpoint(folder / "checkpoints")
    before = _rss()
    journal.begin(checkpoint)
    energy = Energy()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        step = trainer.state.global_step
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error):
            raise _out_of_memory(folder, step, error) from error
        if isinstance(error, SanError | OSError) or step > (step_of(checkpoint) if checkpoint else 0):
            raise
        raise SanError(
            f"The first step of {folder} fails: {cause_of(error)} Its model, input and method may not fit together: "
            "check model, input, text or conversation, and method in the recipe."
        ) from error
    seconds, step, peak = journal.seconds, journal.step_seconds, _peak_rss()
    return {
        "train_seconds": round(seconds, 3),
        "step_seconds": step and round(step, 4),
        "resumed_from_step": step_of(checkpoint) if checkpoint else 0,
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


def _inspected(domain: Domain, folder: Path, writes: bool) -> Findings:
    """Validates the data and prints the findings.

    Raises:
        SanError: If any of them stops the run; its folder then gets the files of the findings alone.
    """
    found = domain.inspect()
    if writes:
        for remark in found.remarks:
            print(remark)
    if found.errors:
        if writes:
            _write(found, folder)
        raise SanError("\n".join(found.errors))
    return found


def _write(found: Findings, folder: Path) -> None:
    for name, content in found.files.items():
        write_atomically(folder / name, content)


def _out_of_memory(folder: Path, step: int, error: BaseException) -> SanError:
    kept = last_checkpoint(folder / "checkpoints")
    resumes = (
        f"The same command resumes from step {step_of(kept)}."
        if kept
        else "There is no checkpoint to resume from; set checkpoint_steps to save some."
    )
    said = str(error).strip().splitlines() or ["out of memory"]
    return SanError(
        f"Out of memory in step {step + 1} of {folder}: {said[0].rstrip('.')}. {resumes} To use less memory, increase "
        "optimizer.accumulation, enable gradient_checkpointing or quantise the weights of a language model. That is "
        "another recipe, so give it another output."
    )


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
