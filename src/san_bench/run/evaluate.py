"""Scoring: of a model in memory, and of a run that was saved."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from san_bench.config.recipe import Recipe, load_recipe
from san_bench.models.adapt import PLAIN, SAN, calm
from san_bench.run.domain import Domain, domain_of
from san_bench.run.folder import EXPORT, weights_sha256
from san_bench.run.provenance import write_atomically
from san_peft.errors import SanError


def run_recipe(run: str | Path) -> Any:
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


def load_model(run: str | Path) -> tuple[Any, Any]:
    """Loads the trained model of a run, through nothing but `from_pretrained`.

    Returns:
        The model in eval mode (a `PeftModel` for an adapter), and the run's recipe with its data.
    """
    domain = domain_of(run_recipe(run))
    return trained_model(domain, Path(run) / "adapter"), domain


def trained_model(domain: Domain, saved: Path, trainable: bool = False) -> Any:
    """Loads what a run of a recipe has saved.

    Args:
        domain: The recipe with its data.
        saved: Folder of the adapter or of the whole model.
        trainable: Whether an adapter asks for gradients, as in training.

    Returns:
        The model in eval mode, a `PeftModel` for an adapter.

    Raises:
        SanError: If the adapter was made for a model of another size.
    """
    if domain.recipe.method.kind in PLAIN:
        return domain.trained_model(saved).eval()
    import peft

    if domain.recipe.method.kind in SAN:
        import san_peft  # noqa: F401 - registers SAN with PEFT
    model = domain.base_model()
    try:
        with calm():
            return peft.PeftModel.from_pretrained(model, saved, is_trainable=trainable).eval()  # type: ignore[arg-type]
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        said = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
        raise SanError(
            f"The adapter in {saved} does not fit {domain.recipe.model}, which is of another size than what it was "
            f"trained on: {said}"
        ) from error


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
    model, domain = load_model(run)
    if mode != "both":
        model.base_model.set_mode(mode)
    name = split or domain.recipe.eval_split
    result = {"run": str(run), "split": name, "mode": mode, **domain.score(model, name).numbers}
    write_atomically(eval_file(Path(run), name, mode), json.dumps(result, indent=2) + "\n")
    return result


def eval_file(run: Path, split: str, mode: str = "both") -> Path:
    """Returns where `evaluate` writes."""
    return run / f"eval-{split}{'' if mode == 'both' else f'-{mode}'}.json"


def export(run: str | Path, out: str | Path) -> dict[str, Any]:
    """Merges a run's adapter into its model and writes a plain transformers folder.

    The folder also gets `export.json`: the run, its recipe's fingerprint, the difference below, and hashes of its
    weights.

    Args:
        run: Folder of the run.
        out: Folder to write; it must not exist, or be empty.

    Returns:
        The largest difference of the outputs before and after, and the folder.

    Raises:
        SanError: If the folder is in use, or merging changes the outputs.
    """
    folder = _free(Path(out))
    model, domain = load_model(run)
    plain, difference = merged(model, domain.recipe, domain.probe(32))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        complete = Path(scratch) / "model"
        plain.save_pretrained(complete)
        domain.save_companions(complete)
        facts = {
            "run": Path(run).absolute().name,
            "method": domain.recipe.method.kind,
            "recipe_fingerprint": domain.recipe.fingerprint,
            "max_abs_difference": difference,
            "weights_sha256": weights_sha256(complete),
        }
        write_atomically(complete / EXPORT, json.dumps(facts, indent=2) + "\n")
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
    kind = run_recipe(run).method.kind
    if kind not in SAN:
        raise SanError(f"{run} is a run of {kind}, not of SAN: there is nothing to turn into LoRA.")
    model, domain = load_model(run)
    probe = domain.probe(256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        complete = Path(scratch) / "adapter"
        report = save_as_lora(model, complete, rank)
        lora = PeftModel.from_pretrained(domain.base_model(), complete).eval()  # type: ignore[arg-type]
        with torch.no_grad():
            before, after = model(**probe).logits, lora(**probe).logits
        complete.replace(folder)
    return {
        "folder": str(folder),
        "rank": rank,
        "lost_share_of_the_change": report.error,
        "worst_layer": f"{report.where} ({report.worst:.3f})",
        "max_abs_difference": float((after - before).abs().max()),
        "same_predictions": f"{int((after.argmax(-1) == before.argmax(-1)).sum())} of {before.argmax(-1).numel()}",
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
