"""Verify the saved adapter of a run: it predicts what the run predicted when it is loaded, and when it is merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from san_bench.run.folder import weights_sha256
from san_bench.run.provenance import write_atomically
from san_peft.errors import SanError

VERIFIED = "verified.json"
"""File of the checks inside the folder of a run."""


def verify(run: str | Path) -> dict[str, Any]:
    """Loads the adapter of a finished run, merges it, scores both, and writes the differences to `verified.json`.

    Args:
        run: Folder of a run whose method has an adapter.

    Returns:
        The largest absolute differences of logits (or log-likelihoods) from those of the run, as
        `reload_max_abs_difference` and `merge_max_abs_difference` (`None` where only texts are scored), and
        `merge_changed_predictions`, the number of predictions that the merged model changes.

    Raises:
        SanError: If the loaded adapter predicts something else than the run did, or merging changes the outputs.
    """
    from san_bench.run.evaluate import load_model, merged

    folder = Path(run)
    model, domain = load_model(folder)
    split = domain.recipe.eval_split
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    loaded = domain.score(model, split)
    before = {name: (folder / name).read_bytes() for name in loaded.files}
    changed, difference = _changes(before, loaded.files)
    if changed or loaded.numbers["accuracy"] != result["accuracy"]:
        raise SanError(
            f"The adapter in {folder} gives another prediction for {changed} of {result['n_test']} {domain.items} than "
            f"the run did (accuracy {loaded.numbers['accuracy']:.4f}, {result['accuracy']:.4f} in the run). If it was "
            "changed since, remove the folder to train it again."
        )
    plain, probed = merged(model, domain.recipe, domain.probe(64))
    merge_changed, merge_difference = _changes(before, domain.score(plain, split).files)
    checks = {
        "reload_max_abs_difference": difference,
        "merge_max_abs_difference": max(probed, merge_difference or 0.0),
        "merge_changed_predictions": merge_changed,
    }
    facts = {**checks, "weights_sha256": weights_sha256(folder / "adapter")}
    write_atomically(folder / VERIFIED, json.dumps(facts, indent=2) + "\n")
    return checks


def read_checks(run: Path) -> dict[str, Any] | None:
    """Reads what `verify` found for the adapter that a run now has; `None` if it has not verified this adapter."""
    file = run / VERIFIED
    if not file.is_file():
        return None
    checks = json.loads(file.read_text(encoding="utf-8"))
    return checks if checks.pop("weights_sha256") == weights_sha256(run / "adapter") else None


def _changes(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> tuple[int, float | None]:
    """Compares files of predictions: counts those that differ, and finds the largest difference of their numbers."""
    pairs = [(_parts(name, content), _parts(name, after[name])) for name, content in before.items()]
    changed = sum(one != other for (x, _), (y, _) in pairs for one, other in zip(x, y, strict=True))
    gaps = [float((p - q).abs().max()) for (_, p), (_, q) in pairs if len(p)]
    return changed, max(gaps, default=None)


def _parts(name: str, content: bytes) -> tuple[list[Any], Any]:
    """Splits a file into predictions, and the logits or log-likelihoods that they follow from."""
    import torch
    from safetensors.torch import load

    if name.endswith(".safetensors"):
        logits = load(content)["logits"]
        return logits.argmax(-1).tolist(), logits.flatten()
    rows = [json.loads(line) for line in content.decode("utf-8").split("\n") if line]
    return rows, torch.tensor([value for row in rows for value in row.pop("log_likelihoods", {}).values()])
