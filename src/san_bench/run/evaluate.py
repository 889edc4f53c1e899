"""Load, evaluate and export a finished run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from san_bench.config.errors import loading
from san_bench.config.recipe import Recipe, load_recipe
from san_bench.models.adapt import PLAIN, SAN, calm
from san_bench.run.domain import Domain, domain_of
from san_bench.run.folder import EXPORT, weights_sha256
from san_bench.run.provenance import write_atomically
from san_peft.errors import SanError


def run_recipe(run: str | Path) -> Any:
    """Reads the recipe of a finished run.

    Raises:
        SanError: If the folder holds no finished run.
    """
    folder = Path(run)
    if not (folder / "recipe.yaml").is_file():
        raise SanError(f"{folder} is not a run folder: it has no recipe.yaml. `san train RECIPE` creates one.")
    if not (folder / "result.json").is_file():
        raise SanError(f"The run {folder} has not finished. `san train {folder / 'recipe.yaml'}` resumes it.")
    return load_recipe(folder / "recipe.yaml")


def load_model(run: str | Path) -> tuple[Any, Any]:
    """Loads the trained model of a run with `from_pretrained`.

    Returns:
        The model in eval mode (a `PeftModel` for an adapter), and the run's recipe with its data.
    """
    domain = domain_of(run_recipe(run))
    return trained_model(domain, Path(run) / "adapter"), domain


def trained_model(domain: Domain, saved: Path, trainable: bool = False) -> Any:
    """Loads the adapter or model that a run has saved.

    Args:
        domain: The recipe with its data.
        saved: Folder of the adapter or of the full model.
        trainable: Whether the adapter's parameters require gradients, as in training.

    Returns:
        The model in eval mode, a `PeftModel` for an adapter.

    Raises:
        SanError: If the adapter's shapes do not match the model.
    """
    if not saved.is_dir():
        raise SanError(
            f"{saved.parent} has no {saved.name}/ with the trained weights (`san bench` keeps full models only with "
            "--keep-models). Train the run again, with another output."
        )
    if domain.recipe.method.kind in PLAIN:
        return domain.trained_model(saved).eval()
    import peft

    if domain.recipe.method.kind in SAN:
        import san_peft  # noqa: F401 - registers SAN with PEFT
    model = domain.base_model()
    try:
        with calm(), loading(f"The adapter in {saved}", "Train the run again, with another output."):
            return peft.PeftModel.from_pretrained(model, saved, is_trainable=trainable).eval()  # type: ignore[arg-type]
    except SanError as error:
        lines = str(error.__cause__).splitlines()
        said = next((line.strip() for line in lines if "size mismatch" in line), None)
        if said is None:
            raise
        raise SanError(
            f"The adapter in {saved} was trained on a model with other shapes than {domain.recipe.model}: {said}"
        ) from error


def evaluate(run: str | Path, split: str | None = None, mode: str = "both") -> dict[str, Any]:
    """Loads a run and evaluates it.

    Args:
        run: Folder of the run.
        split: Name of a split; the recipe's `eval_split` by default.
        mode: Which scales of a SAN adapter are active; see `san_peft.SanModel.set_mode`.

    Returns:
        Accuracy, n, and the hash of the predictions.

    Raises:
        SanError: If the run has not finished, the split does not exist, or a mode other than `both` is chosen for a
            run without a SAN adapter.
    """
    kind = run_recipe(run).method.kind
    if mode != "both" and kind not in SAN:
        raise SanError(f"Mode {mode!r} needs a SAN adapter, but the method of {run} is {kind!r}.")
    model, domain = load_model(run)
    if mode != "both":
        model.base_model.set_mode(mode)
    name = split or domain.recipe.eval_split
    result = {"run": str(run), "split": name, "mode": mode, **domain.score(model, name).numbers}
    write_atomically(eval_file(Path(run), name, mode), json.dumps(result, indent=2) + "\n")
    return result


def eval_file(run: Path, split: str, mode: str = "both") -> Path:
    """Returns the path of the scores that `evaluate` writes."""
    return run / f"eval-{split}{'' if mode == 'both' else f'-{mode}'}.json"


def export(run: str | Path, out: str | Path) -> dict[str, Any]:
    """Merges a run's adapter into its model and saves a plain transformers checkpoint.

    The folder also gets `export.json`: the run, its recipe's fingerprint, the difference below, and hashes of its
    weights.

    Args:
        run: Folder of the run.
        out: Folder to write; it must be new or empty.

    Returns:
        The maximum absolute difference of the outputs before and after merging, and the folder.

    Raises:
        SanError: If the folder is not empty, or merging changes the outputs.
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
        out: Folder to write; it must be new or empty.
        rank: Rank of the LoRA adapter.

    Returns:
        The approximation error of the weight update, the agreement of the predictions, and the folder.

    Raises:
        SanError: If the folder is not empty, or the run has no SAN adapter.
    """
    from peft import PeftModel

    from san_peft import save_as_lora

    folder = _free(Path(out))
    kind = run_recipe(run).method.kind
    if kind not in SAN:
        raise SanError(f"The method of {run} is {kind!r}; only SAN adapters can be converted to LoRA.")
    model, domain = load_model(run)
    probe = domain.probe(256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        complete = Path(scratch) / "adapter"
        report = save_as_lora(model, complete, rank)
        domain.save_labels(complete)
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


def export_host(run: str | Path, out: str | Path) -> dict[str, Any]:
    """Detaches SAN from a run's adapter, and writes its host: an ordinary LoRA or DoRA adapter.

    Args:
        run: Folder of the run.
        out: Folder to write; it must be new or empty.

    Returns:
        The folder, its kind, and the maximum absolute difference of the logits without propagation.

    Raises:
        SanError: If the folder is not empty, or the run's method has no host.
    """
    from san_peft import detach_san

    folder = _free(Path(out))
    kind = run_recipe(run).method.kind
    if kind not in ("san-lora", "san-dora"):
        raise SanError(f"The method of {run} is {kind!r}; only san-lora and san-dora have a host to detach from.")
    model, domain = load_model(run)
    probe = domain.probe(32)
    with torch.no_grad():
        before = model(**probe).logits
        model = detach_san(model)
        difference = float((model(**probe).logits - before).abs().max())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        complete = Path(scratch) / "adapter"
        model.save_pretrained(str(complete))
        complete.replace(folder)
    return {"folder": str(folder), "kind": kind.removeprefix("san-"), "max_abs_difference": difference}


def _free(folder: Path) -> Path:
    """Returns the folder if it is new or empty.

    Raises:
        SanError: If it is a file, or a folder that is not empty.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SanError(f"{folder} is {'a file' if folder.is_file() else 'not empty'}. Choose another with --out.")
    return folder


def merged(model: Any, recipe: Recipe, probe: dict[str, Tensor]) -> tuple[Any, float]:
    """Merges an adapter and compares the logits before and after.

    Returns:
        The plain model, and the maximum absolute difference of the logits on the probe batch.

    Raises:
        SanError: If it exceeds `san_peft.export.TOLERANCE` times the largest absolute logit.
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
        raise SanError(f"Merging changes the logits by {difference:.3g}, above the tolerance of {accepted:.3g}.")
    return plain, difference
