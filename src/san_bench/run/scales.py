"""Save the scale vectors of a run in a file of their own, so that reports need no model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Float64

from san_bench.config.errors import loading
from san_bench.run.provenance import write_atomically

if TYPE_CHECKING:
    from torch import nn

FILE = "scales.safetensors"
"""File of the scales inside the folder of a run."""

CARRIERS = {"SAN", "LORA"}
"""PEFT types of adapters with a scale: SAN's own, or the one decomposed from LoRA or DoRA."""


@dataclass(frozen=True)
class RunScales:
    r"""Trained scales of one run, and how they propagate.

    Attributes:
        vectors: Scale of each layer, in the order of the model.
        propagated: Layers whose scale propagates to another layer.
        exponent: Exponent $k$ of the propagated scale.
        bound: Maximum distance of a propagated scale from one, or `None`.

    Example:
        >>> scales = RunScales({"fc1": np.float32([2, 3]), "fc2": np.float32([4])}, frozenset({"fc1"}))
        >>> scales.acting("fc1").tolist(), scales.acting("fc2").tolist()
        ([4.0, 9.0], [4.0])
    """

    vectors: dict[str, Float32[np.ndarray, " channels"]]
    propagated: frozenset[str] = frozenset()
    exponent: float = 1.0
    bound: float | None = None

    @property
    def propagates(self) -> bool:
        """Whether any scale propagates with a non-zero exponent."""
        return bool(self.propagated) and self.exponent != 0

    def acting(self, layer: str) -> Float64[np.ndarray, " channels"]:
        r"""Returns the effective factor of each channel: $\gamma^{1+k}$, or $\gamma$ without propagation.

        The factor is effective on exact edges; on other edges it is the product of both factors all the same.
        """
        scale = self.vectors[layer].astype(np.float64)
        if layer not in self.propagated:
            return scale
        import torch

        from san_peft.functional import propagate

        return scale * propagate(torch.from_numpy(scale), None, self.exponent, self.bound).numpy()


def scale_vectors(module: nn.Module) -> dict[str, Float32[np.ndarray, " channels"]]:
    """Returns the scale of every SAN layer by its name in a module; collective if the parameters are sharded."""
    from san_peft import SanLayer

    return {
        name: scale.detach().float().cpu().numpy()
        for name, layer in module.named_modules()
        if isinstance(layer, SanLayer) and (scale := layer.get_scale()) is not None
    }


def scales_of(model: Any) -> RunScales:
    """Returns the scales of a model with a SAN, LoRA or DoRA adapter; may modify the model.

    A LoRA or DoRA adapter without SAN is decomposed as SAN does it, by the norms of rows; nothing propagates.

    Args:
        model: A `PeftModel`.
    """
    from san_peft import propagate

    if model.peft_type != "SAN":
        model = propagate(model, propagation="none")
    config, tuner = model.peft_config["default"], model.base_model
    anteriors = frozenset(edge.anterior for edge in tuner.propagation_graph.edges)
    return RunScales(scale_vectors(model.get_base_model()), anteriors, float(config.exponent), config.bound)


def save_scales(run: Path, scales: RunScales) -> None:
    """Saves the scales into the folder of a run, with the hash of the adapter that they belong to."""
    from safetensors.numpy import save

    facts = {
        "layers": list(scales.vectors),
        "propagated": sorted(scales.propagated),
        "exponent": scales.exponent,
        "bound": scales.bound,
        "adapter": _adapter_hash(run),
    }
    tensors = {layer: np.ascontiguousarray(vector) for layer, vector in scales.vectors.items()}
    write_atomically(run / FILE, save(tensors, metadata={"scales": json.dumps(facts)}))


def load_scales(run: Path) -> RunScales | None:
    """Loads the scales of a finished run from its file, or from its adapter, in which case the file is written.

    Args:
        run: Folder of the run.

    Returns:
        The scales, or `None` if the run has no adapter with scales.

    Raises:
        SanError: If the file is damaged, or the adapter cannot be loaded.
    """
    if (run / FILE).is_file():
        scales, origin = _read(run / FILE)
        if _adapter_hash(run) in (None, origin):  # without an adapter there is nothing to compare with
            return scales
    config = run / "adapter" / "adapter_config.json"
    if not config.is_file():
        return None
    with loading(f"{config}", "Train the run again, with another output."):
        if json.loads(config.read_text(encoding="utf-8")).get("peft_type") not in CARRIERS:
            return None
    from san_bench.run.evaluate import load_model

    scales = scales_of(load_model(run)[0])
    save_scales(run, scales)
    return scales


def _read(file: Path) -> tuple[RunScales, str | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as tensors:
            facts = json.loads((tensors.metadata() or {})["scales"])
            vectors = {layer: tensors.get_tensor(layer) for layer in facts["layers"]}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        from san_peft.errors import SanError

        raise SanError(f"{file} is corrupt ({error}). Remove it; the run's adapter recreates it.") from error
    return RunScales(vectors, frozenset(facts["propagated"]), facts["exponent"], facts["bound"]), facts["adapter"]


def _adapter_hash(run: Path) -> str | None:
    file = run / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
