"""The scale vectors of a run, kept in a small file of their own so that reports need no model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Float64

from san_bench.run.provenance import write_atomically

if TYPE_CHECKING:
    from torch import nn

FILE = "scales.safetensors"
"""File of the scales inside the folder of a run."""

CARRIERS = {"SAN", "LORA"}
"""PEFT's types of adapter with a scale: SAN's own or out of its host, and the one inside LoRA or DoRA."""


@dataclass(frozen=True)
class Scales:
    r"""Trained scales of one run, and what propagation makes of them.

    Attributes:
        vectors: Scale by layer, in the order of the model.
        propagated: Layers whose scale is propagated to another one.
        exponent: Exponent $k$ of a propagated scale.
        bound: Largest distance of a propagated scale from one, or `None`.

    Example:
        >>> scales = Scales({"fc1": np.float32([2, 3]), "fc2": np.float32([4])}, frozenset({"fc1"}))
        >>> scales.acting("fc1").tolist(), scales.acting("fc2").tolist()
        ([4.0, 9.0], [4.0])
    """

    vectors: dict[str, Float32[np.ndarray, " channels"]]
    propagated: frozenset[str] = frozenset()
    exponent: float = 1.0
    bound: float | None = None

    @property
    def propagates(self) -> bool:
        """Whether any scale acts a second time."""
        return bool(self.propagated) and self.exponent != 0

    def acting(self, layer: str) -> Float64[np.ndarray, " channels"]:
        r"""Returns what a channel is multiplied by on its whole way: $\gamma^{1+k}$, or $\gamma$ without propagation.

        That is where nothing but an exact edge lies between the layer and its posterior; elsewhere it is the product
        of the two factors all the same.
        """
        scale = self.vectors[layer].astype(np.float64)
        if layer not in self.propagated:
            return scale
        import torch

        from san_peft.functional import propagate

        return scale * propagate(torch.from_numpy(scale), None, self.exponent, self.bound).numpy()


def scale_vectors(module: nn.Module) -> dict[str, Float32[np.ndarray, " channels"]]:
    """Returns the scale of every layer of SAN by its name in a module; of a sharded one, all processes have to ask."""
    from san_peft import SanLayer

    return {
        name: scale.detach().float().cpu().numpy()
        for name, layer in module.named_modules()
        if isinstance(layer, SanLayer) and (scale := layer.get_scale()) is not None
    }


def scales_of(model: Any) -> Scales:
    """Reads the scales out of a model with an adapter of SAN, LoRA or DoRA, which may be changed by it.

    The scale of LoRA and DoRA without SAN is taken out of the adapter as SAN would, by the norms of rows; nothing is
    propagated.

    Args:
        model: A `PeftModel`.
    """
    from san_peft import propagate

    if model.peft_type != "SAN":
        model = propagate(model, propagation="none")
    config, tuner = model.peft_config["default"], model.base_model
    anteriors = frozenset(edge.anterior for edge in tuner.propagation_graph.edges)
    return Scales(scale_vectors(model.get_base_model()), anteriors, float(config.exponent), config.bound)


def save_scales(run: Path, scales: Scales) -> None:
    """Writes the scales into the folder of a run, with the hash of the adapter that they come from."""
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


def load_scales(run: Path) -> Scales | None:
    """Reads the scales of a run that has finished: from its file, or from its adapter, and then the file is written.

    Args:
        run: Folder of the run.

    Returns:
        The scales; `None` where the run has no adapter, or one that carries no scale.

    Raises:
        SanError: If the file is damaged, or the adapter cannot be loaded.
    """
    if (run / FILE).is_file():
        scales, origin = _read(run / FILE)
        if _adapter_hash(run) in (None, origin):  # without the adapter, the file is all there is
            return scales
    config = run / "adapter" / "adapter_config.json"
    if not config.is_file() or json.loads(config.read_text(encoding="utf-8")).get("peft_type") not in CARRIERS:
        return None
    from san_bench.run.evaluate import load_model

    scales = scales_of(load_model(run)[0])
    save_scales(run, scales)
    return scales


def _read(file: Path) -> tuple[Scales, str | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as tensors:
            facts = json.loads((tensors.metadata() or {})["scales"])
            vectors = {layer: tensors.get_tensor(layer) for layer in facts["layers"]}
    except (SafetensorError, KeyError, ValueError) as error:
        from san_peft.errors import SanError

        raise SanError(f"{file} is damaged ({error}). Remove it; it is made again from the run's adapter.") from error
    return Scales(vectors, frozenset(facts["propagated"]), facts["exponent"], facts["bound"]), facts["adapter"]


def _adapter_hash(run: Path) -> str | None:
    file = run / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
