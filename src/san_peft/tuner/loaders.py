"""Wraps the methods of PEFT and transformers that load an adapter, so that its tensors are checked in time.

They add the adapter to the model first and read its tensors afterwards. For adapters of other methods nothing changes.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.peft_utils import find_adapter_config_file

from san_peft.tuner._peft import SAN
from san_peft.tuner.loading import HUB, AdapterSource, check_tensors, damaged_config, reading

_FINDS = frozenset(inspect.signature(find_adapter_config_file).parameters)


def wrap_loaders() -> None:
    """Wraps `PeftModel.from_pretrained`, `PeftModel.load_adapter`, and transformers' `load_adapter`, once."""
    if hasattr(PeftModel.load_adapter, "__wrapped__"):
        return
    from_pretrained: Any = PeftModel.from_pretrained
    PeftModel.from_pretrained = classmethod(_known(from_pretrained.__func__, _of_new_model))  # type: ignore
    PeftModel.load_adapter = _known(PeftModel.load_adapter, _of_model)  # type: ignore[method-assign]
    mixin: Any = PeftAdapterMixin
    mixin.load_adapter = _checked(mixin.load_adapter)


def _known(load: Callable[..., Any], source_of: Callable[[dict[str, Any]], AdapterSource]) -> Callable[..., Any]:
    """Wraps a method of PEFT, so that the tuner knows where the adapter comes from."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def known(*args: Any, **kwargs: Any) -> Any:
        source = source_of(signature.bind(*args, **kwargs).arguments)
        try:
            with reading(source):
                return load(*args, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise damaged_config(source, error) from error

    return known


def _of_new_model(given: dict[str, Any]) -> AdapterSource:
    mapping = given.get("key_mapping")
    if mapping is None:  # as PEFT does
        mapping = getattr(given["model"], "_checkpoint_conversion_mapping", {})
    return _source(given["model_id"], given.get("kwargs", {}), mapping)


def _of_model(given: dict[str, Any]) -> AdapterSource:
    source = _source(given["model_id"], given.get("kwargs", {}), given.get("key_mapping"))
    model, name = given["self"], given["adapter_name"]
    if model.peft_type == SAN and name in model.peft_config:  # no adapter will be added
        check_tensors(model, name, source.read(), source)
    return source


def _checked(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps transformers' method, so that it loads the tensors that were checked."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        source = _of_transformers(given)
        config = given.get("peft_config") or _san_config(source)
        if getattr(config, "peft_type", None) != SAN or (source.path is None and source.tensors is None):
            return load(*args, **kwargs)
        tensors = source.read()
        given["peft_config"] = config
        given["kwargs"] = {**given.get("kwargs", {}), "download_kwargs": source.options}
        given["adapter_state_dict"] = _with_adapter_name(tensors, config, given.get("adapter_name") or "default")
        with reading(source):
            return load(*bound.args, **bound.kwargs)

    return checked


def _of_transformers(given: dict[str, Any]) -> AdapterSource:
    if given.get("adapter_state_dict") is not None:
        return AdapterSource(tensors=given["adapter_state_dict"])
    config: Any = given.get("load_config")
    path = given.get("peft_model_id") or getattr(config, "pretrained_model_name_or_path", None)
    kwargs = {**given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})}
    options = {**getattr(config, "download_kwargs", {}), **kwargs.pop("download_kwargs", {}), **kwargs}
    if given.get("local_files_only"):
        options["local_files_only"] = True
    safetensors = kwargs.get("use_safetensors", getattr(config, "use_safetensors", None)) is not False
    return _source(path, options, None, safetensors)


def _san_config(source: AdapterSource) -> Any:
    """Returns the config of a SAN adapter, or `None` for any other adapter."""
    if source.path is None:
        return None
    file = find_adapter_config_file(source.path, **{k: v for k, v in source.options.items() if k in _FINDS})
    if file is None:
        return None
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise damaged_config(source, error) from error
    return source.config() if isinstance(found, dict) and found.get("peft_type") == SAN.value else None


def _with_adapter_name(tensors: Mapping[str, Tensor], config: Any, adapter_name: str) -> dict[str, Tensor]:
    """Inserts the adapter's name into the names of a host's tensors; transformers does so for those of SAN."""
    prefix = None if config.inner is None else PEFT_TYPE_TO_PREFIX_MAPPING[config.inner["peft_type"]]
    named = {}
    for name, tensor in tensors.items():
        layer, nested, rest = name.rpartition(".base_layer.")
        if prefix is not None and nested and rest.startswith(prefix):
            bank, dot, last = rest.partition(".")
            name = f"{layer}{nested}{bank}.{adapter_name}{dot}{last}"
        named[name] = tensor
    return named


def _source(path: Any, options: Mapping[str, Any], mapping: Any, safetensors: bool = True) -> AdapterSource:
    kept = {name: value for name, value in options.items() if name in HUB and value is not None}
    return AdapterSource(None if path is None else os.fspath(path), None, kept, mapping, safetensors)
