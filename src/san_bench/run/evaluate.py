"""Scoring: of a model in memory, and of a run that was saved."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from san_bench.data.preprocess import Prepared, input_settings
from san_bench.data.vision import Split, VisionTask, load_task
from san_bench.recipe import Recipe, load_recipe
from san_bench.run.build import PLAIN, SAN, base_model, calm, model_path
from san_bench.run.provenance import write_atomically
from san_peft.errors import SanError


def task_of(recipe: Recipe) -> VisionTask:
    """Loads the task of a recipe."""
    return load_task(recipe.task, Path(recipe.data) if recipe.data else None)


def prepared(split: Split, recipe: Recipe) -> Prepared:
    """Returns a split as the model of a recipe reads it in scoring."""
    return Prepared(split, input_settings(recipe.input, model_path(recipe)))


def predict(model: Any, split: Split, recipe: Recipe) -> Float[Tensor, "n classes"]:
    """Returns the logits of a split, on the CPU in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_eval_batch_size=64,
            bf16_full_eval=False,
            bf16=recipe.precision == "bf16",
            fp16=recipe.precision == "fp16" and torch.cuda.is_available(),
            dataloader_num_workers=recipe.data_workers,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            label_names=["labels"],
            report_to=[],
        )
        output = Trainer(model=model, args=arguments).predict(prepared(split, recipe))  # type: ignore[arg-type]
    return torch.as_tensor(output.predictions).float()


def score(logits: Float[Tensor, "n classes"], split: Split) -> dict[str, Any]:
    """Returns accuracy, how many were right of how many, and a hash of the predicted classes."""
    predicted = logits.argmax(-1)
    correct = int((predicted == torch.from_numpy(split.labels)).sum())
    digest = hashlib.sha256(predicted.numpy().astype("<i8").tobytes()).hexdigest()
    return {"accuracy": correct / len(split), "correct": correct, "n_test": len(split), "predictions_sha256": digest}


def save_predictions(path: Path, logits: Float[Tensor, "n classes"]) -> None:
    """Writes logits as safetensors, atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({"logits": logits.contiguous()}, temporary)
    temporary.replace(path)


def load_predictions(run: Path) -> Float[Tensor, "n classes"]:
    """Reads the logits that a run saved."""
    return load_file(Path(run) / "predictions.safetensors")["logits"]


def run_recipe(run: str | Path) -> Recipe:
    """Reads the recipe of a run that has finished.

    Raises:
        SanError: If the folder holds no finished run.
    """
    folder = Path(run)
    if not (folder / "recipe.yaml").is_file():
        raise SanError(f"{folder} is no run: it has no recipe.yaml. `san train RECIPE` makes one.")
    if not (folder / "result.json").is_file():
        raise SanError(f"The run {folder} has not finished. `san train {folder / 'recipe.yaml'}` resumes it.")
    return load_recipe(folder / "recipe.yaml")


def load_model(run: str | Path) -> tuple[Any, Recipe]:
    """Loads the trained model of a run, through nothing but `from_pretrained`.

    Returns:
        The model in eval mode (a `PeftModel` for an adapter), and the run's recipe.
    """
    recipe = run_recipe(run)
    saved = Path(run) / "adapter"
    if recipe.method.kind in PLAIN:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification.from_pretrained(saved).eval(), recipe
    import peft

    if recipe.method.kind in SAN:
        import san_peft  # noqa: F401 - registers SAN with PEFT
    model = base_model(recipe, task_of(recipe))
    with calm():
        return peft.PeftModel.from_pretrained(model, saved).eval(), recipe  # type: ignore[arg-type]


def evaluate(run: str | Path, split: str | None = None, mode: str = "both") -> dict[str, Any]:
    """Loads a run and scores it.

    Args:
        run: Folder of the run.
        split: Name of a split; the recipe's `eval_split` by default.
        mode: What of an adapter of SAN acts; see `san_peft.SanModel.set_mode`.

    Returns:
        Accuracy, n, and the hash of the predictions.

    Raises:
        SanError: If the run has not finished, or lacks the split, or has no adapter of SAN for another mode than
            `both`.
    """
    kind = run_recipe(run).method.kind
    if mode != "both" and kind not in SAN:
        raise SanError(f"Mode {mode!r} needs an adapter of SAN, but {run} has method {kind!r}.")
    model, recipe = load_model(run)
    if mode != "both":
        model.base_model.set_mode(mode)
    name = split or recipe.eval_split
    chosen = task_of(recipe)[name]
    result = {"run": str(run), "split": name, "mode": mode, **score(predict(model, chosen, recipe), chosen)}
    write_atomically(eval_file(Path(run), name, mode), json.dumps(result, indent=2) + "\n")
    return result


def eval_file(run: Path, split: str, mode: str = "both") -> Path:
    """Returns where `evaluate` writes."""
    return run / f"eval-{split}{'' if mode == 'both' else f'-{mode}'}.json"


def export(run: str | Path, out: str | Path) -> dict[str, Any]:
    """Merges a run's adapter into its model and writes a plain transformers folder.

    Args:
        run: Folder of the run.
        out: Folder to write; it must not exist, or be empty.

    Returns:
        The largest difference of the outputs before and after, and the folder.

    Raises:
        SanError: If the folder is in use, or merging changes the outputs.
    """
    folder = _free(Path(out))
    model, recipe = load_model(run)
    split = task_of(recipe)[recipe.eval_split]
    plain, difference = merged(model, recipe, {"pixel_values": prepared(split, recipe).batch(32)})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        complete = Path(scratch) / "model"
        plain.save_pretrained(complete)
        settings = Path(model_path(recipe)) / "preprocessor_config.json"
        if settings.is_file():
            shutil.copyfile(settings, complete / settings.name)
        complete.replace(folder)
    return {"folder": str(folder), "max_abs_difference": difference}


def export_lora(run: str | Path, out: str | Path, rank: int) -> dict[str, Any]:
    """Writes the LoRA adapter of a rank that is closest to a run's adapter; see `san_peft.save_as_lora`.

    Args:
        run: Folder of the run.
        out: Folder to write; it must not exist, or be empty.
        rank: Rank of the LoRA adapter.

    Returns:
        What was lost: of the weights' change, and of the run's predictions; and the folder.

    Raises:
        SanError: If the folder is in use, or the run has no adapter of SAN.
    """
    from peft import PeftModel

    from san_peft import save_as_lora

    folder = _free(Path(out))
    model, recipe = load_model(run)
    if recipe.method.kind not in SAN:
        raise SanError(f"{run} is a run of {recipe.method.kind}, not of SAN: there is nothing to turn into LoRA.")
    task = task_of(recipe)
    images = prepared(task[recipe.eval_split], recipe).batch(256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        complete = Path(scratch) / "adapter"
        report = save_as_lora(model, complete, rank)
        lora = PeftModel.from_pretrained(base_model(recipe, task), complete).eval()
        with torch.no_grad():
            before, after = model(pixel_values=images).logits, lora(pixel_values=images).logits
        complete.replace(folder)
    return {
        "folder": str(folder),
        "rank": rank,
        "lost_share_of_the_change": report.error,
        "worst_layer": f"{report.where} ({report.worst:.3f})",
        "max_abs_difference": float((after - before).abs().max()),
        "same_predictions": f"{int((after.argmax(-1) == before.argmax(-1)).sum())} of {len(images)}",
    }


def _free(folder: Path) -> Path:
    """Returns a folder that may be written.

    Raises:
        SanError: If there is a file, or a folder that is not empty.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SanError(f"{folder} is {'a file' if folder.is_file() else 'not empty'}. Choose another with --out.")
    return folder


def merged(model: Any, recipe: Recipe, probe: dict[str, Tensor]) -> tuple[Any, float]:
    """Merges an adapter and compares the outputs before and after.

    Returns:
        The plain model, and the largest difference of its logits on the probe.

    Raises:
        SanError: If they differ by more than `san_peft.export.TOLERANCE` times the largest of them.
    """
    if recipe.method.kind in PLAIN:
        return model, 0.0
    if recipe.method.kind in SAN:
        from san_peft import merge_and_verify

        report = merge_and_verify(model, probe)
        return report.model, float(report.max_abs_difference)
    from san_peft.export import TOLERANCE

    with torch.no_grad():
        before = model(**probe).logits
        plain = model.merge_and_unload(safe_merge=True).eval()
        difference = float((plain(**probe).logits - before).abs().max())
    accepted = TOLERANCE[before.dtype] * max(1.0, float(before.abs().max()))
    if not difference <= accepted:
        raise SanError(f"Merging changes the logits by {difference:.3g}, more than the tolerance of {accepted:.3g}.")
    return plain, difference
