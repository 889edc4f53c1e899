"""Checks the tensors of a saved adapter before a model takes them.

Every way to load an adapter ends in `check_tensors`: `from_pretrained` and `load_adapter` of PEFT and transformers
(`loaders.py`), `set_peft_model_state_dict` (by a method of the tuner), and `hotswap`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AuxiliaryTrainingWrapper, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from san_peft.errors import AdapterError, SanError
from san_peft.tuner.sharded import is_sharded
from san_peft.tuner.snapshot import Snapshot

PREFIX = "base_model.model."
"""Prefix of all names in a saved adapter."""
INVALID = (TypeError, ValueError, LookupError, AttributeError)
"""Errors that an invalid config of a host or of PEFT causes."""
HUB = frozenset(inspect.signature(hf_hub_download).parameters)
"""Names of download options."""


@dataclass(frozen=True)
class AdapterSource:
    """Where the tensors of an adapter come from: a folder, a Hub repository, or a state dict.

    Attributes:
        path: The folder, or the name of the repository; `None` for a state dict.
        tensors: The state dict, if it was passed.
        options: Download options, such as `subfolder`, `revision` and `token`.
        key_mapping: PEFT's mapping of names.
        safetensors: Whether the caller reads safetensors if there are both kinds of files.
    """

    path: str | None = None
    tensors: Mapping[str, Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    key_mapping: Mapping[str, str] | None = None
    safetensors: bool = True

    def __str__(self) -> str:
        if self.path is None:
            return "the state dict"
        return str(Path(self.path, self.options.get("subfolder") or ""))

    def config(self) -> Any:
        """Reads the config.

        Raises:
            AdapterError: If it is not valid JSON.
        """
        try:
            return PeftConfig.from_pretrained(str(self.path), **self.options)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise damaged_config(self, error) from error

    def read(self, device: str | None = "cpu") -> Mapping[str, Tensor]:
        """Reads the tensors.

        Raises:
            AdapterError: If there is no safetensors file, or it is damaged. Pickle files are refused.
        """
        if self.tensors is not None:
            return self.tensors
        file = self._file()
        try:
            return load_peft_weights(str(file.parent), device=device, key_mapping=self.key_mapping)  # type: ignore
        except SafetensorError as error:
            raise AdapterError(f"{file} is damaged ({error}). Download or save the adapter again.") from error

    def _file(self) -> Path:
        folder = Path(str(self))
        file, pickled = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
        if self.safetensors and file.is_file():
            return file
        if pickled.is_file():
            raise AdapterError(
                f"{pickled} is a pickle file, which can run code when it is read, so it is not loaded. Save the "
                f"adapter as {SAFETENSORS_WEIGHTS_NAME}, which is the default of save_pretrained."
            )
        if not Path(str(self.path)).is_dir():
            try:
                return Path(hf_hub_download(str(self.path), SAFETENSORS_WEIGHTS_NAME, **self.options))
            except EntryNotFoundError as error:
                raise AdapterError(
                    f"{self} has no {SAFETENSORS_WEIGHTS_NAME} on the Hub or in the cache ({error}). Adapters are "
                    "loaded from safetensors only, never from pickle files."
                ) from error
        raise AdapterError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}. Save or download the adapter again.")


def damaged_config(source: AdapterSource, error: ValueError) -> AdapterError:
    """Returns the error for a config that is not valid JSON."""
    return AdapterError(f"{CONFIG_NAME} in {source} is damaged ({error}). Download or save the adapter again.")


# ---------------------------------------------------------------------- the check


def check_values(tensors: Mapping[str, Tensor], where: Any) -> None:
    """Checks what can be checked without a model.

    Raises:
        AdapterError: If a name does not stand for a tensor, or a tensor is complex or has non-finite entries.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise AdapterError(f"{name} is a {type(tensor).__name__} in {where}, not a tensor.")
        if tensor.is_complex():
            raise AdapterError(f"{name} is {tensor.dtype} in {where}, but tensors of an adapter are real.")
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        values: Any = tensor.detach()
        values = values.to_local() if is_sharded(values) else values
        bad = int((~torch.isfinite(values.float())).sum())
        if bad:
            raise AdapterError(
                f"{bad} of {values.numel()} entries of {name} are not finite in {where}. Save or download the adapter "
                "again; if they are in the saved model, its training has diverged."
            )


def check_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor], where: Any) -> None:
    """Checks that tensors fit an adapter of a model, one by one, before they are loaded.

    Args:
        model: The model with the adapter: a `PeftModel`, a tuner, or a model into which PEFT has injected layers.
        adapter_name: The name of the adapter.
        tensors: The tensors, by their names in a checkpoint.
        where: What to call their origin in a message.

    Raises:
        AdapterError: If tensors are missing or belong to no part of the adapter, or have another shape, another kind of
            dtype or non-finite entries.
    """
    check_values(tensors, where)
    wanted, embeddings = _wanted(model, adapter_name)
    found = {name.removeprefix(PREFIX): name for name in tensors}
    missing = sorted(wanted.keys() - found)
    extra = sorted(found.keys() - wanted - embeddings.keys())
    if missing or extra:
        parts = [f"lacks {len(missing)} of its {len(wanted)} tensors, such as {PREFIX}{missing[0]}"] if missing else []
        if extra:
            parts.append(f"has {len(extra)} tensors that do not belong to it, such as {found[extra[0]]}")
        raise AdapterError(
            f"Adapter {adapter_name!r} cannot be loaded: {where} {' and '.join(parts)}. Save or download the adapter "
            "again, with the adapter_config.json of the same training."
        )
    for name, key in found.items():
        target, tensor = wanted.get(name, embeddings.get(name)), tensors[key]
        shape = getattr(target, "ds_shape", target.shape)  # type: ignore[union-attr]
        if tensor.shape != shape:
            raise AdapterError(
                f"{key} has shape {tuple(tensor.shape)} in {where}, but {tuple(shape)} here. Load the adapter onto the "
                "model, and with the configuration, that it was trained with."
            )
        kind = _kind(target)
        if _kind(tensor) != kind and kind != "quantized":
            raise AdapterError(
                f"{key} is {tensor.dtype} in {where}, but {target.dtype} here; it needs a {kind} dtype. "  # type: ignore
                "Save the adapter again without quantizing or casting it."
            )


def _kind(tensor: Any) -> str:
    if tensor.dtype.is_floating_point:
        return "floating-point" if tensor.dtype.itemsize > 1 else "quantized"
    return "quantized" if tensor.is_quantized else "integer"


def _wanted(model: nn.Module, adapter_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the tensors of an adapter in a model, and those of the embeddings, which PEFT may save with it."""
    prefix = PREFIX if isinstance(model, PeftModel) else "model." if isinstance(model, BaseTuner) else ""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    saved = get_peft_model_state_dict(model, state, adapter_name, save_embedding_layers=False)
    base: Any = model.get_submodule(prefix.removesuffix("."))
    layers = [_embedding(base, way) for way in ("get_input_embeddings", "get_output_embeddings")]
    inside = tuple(f"{prefix}{name}." for name, m in base.named_modules() if any(m is layer for layer in layers))
    embeddings = {name: tensor for name, tensor in state.items() if name.startswith(inside)}
    return (
        {name.removeprefix(prefix).removeprefix(PREFIX): tensor for name, tensor in saved.items()},
        {name.removeprefix(prefix).removeprefix(PREFIX): tensor for name, tensor in embeddings.items()},
    )


def _embedding(base: Any, way: str) -> nn.Module | None:
    try:
        return getattr(base, way)()
    except (AttributeError, NotImplementedError):  # not every model has them
        return None


def saved_names(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors by their names in a checkpoint, after PEFT has renamed those of saved modules."""
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, stored in module.adapter_state_dict_load_map(adapter_name).items():
                names[f"{name}.{stored}"] = f"{name}.{saved}"
    return {names.get(key, key): tensor for key, tensor in tensors.items()}


# ---------------------------------------------------------------------- while a library loads an adapter

_current: ContextVar[AdapterSource | None] = ContextVar("source of the adapter that is being loaded", default=None)


@contextmanager
def reading(source: AdapterSource) -> Iterator[None]:
    """Tells `adding` where the adapter comes from that is loaded in this context, and in this thread."""
    token = _current.set(_current.get() or source)  # `from_pretrained` calls `load_adapter`
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def adding(tuner: Any, model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Restores a model if an adapter cannot be added to it; an adapter that is being loaded has to fit its tensors."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, tuner.tuner_layer_cls)]
    scales = {id(layer.san_scales): layer.san_scales for layer in layers if hasattr(layer, "san_scales")}
    known = any(layer.has_part(adapter_name) for layer in layers)
    snapshot = Snapshot(model, tuner, *tuner.hosts.values(), *scales.values())
    source = _current.get()
    try:
        tensors = {} if source is None else source.read()
        check_values(tensors, source)
        yield
        if source is not None:
            check_tensors(tuner, adapter_name, tensors, source)
    except BaseException as error:
        snapshot.restore()
        if not known:  # PEFT registers the name before it adds the layers
            tuner.peft_config.pop(adapter_name, None)
        if source is None or isinstance(error, SanError) or not isinstance(error, INVALID):
            raise
        raise AdapterError(
            f"Adapter {adapter_name!r} cannot be loaded: its {CONFIG_NAME} in {source} does not fit this model "
            f"({type(error).__name__}: {error}). Save or download the adapter again."
        ) from error
