"""Build a model by name without weights, to trace it; downloads a configuration at most."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from san_bench.models import FAMILIES, local_model
from san_peft.errors import SanError

TASKS = (
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
)
"""Transformers tasks by priority, for configurations that name no model class."""

FEW_PATCHES = ("llava", "llava_next", "llava_onevision", "paligemma", "vipllava")
"""Vision-language models in which the number of patches changes only the number of image tokens."""

NO_TIMM = 'timm is not installed. To use its models: pip install "san-peft[vision]".'


def empty_model(name: str) -> nn.Module:
    """Builds a model by its name on the meta device, without allocating or loading weights.

    Args:
        name: `embedded` (the shipped ViT), `embedded/swin`, `embedded/convnext`, `embedded/decoder` or
            `embedded/llava` (the other shipped models), `real/NAME` (one of `san_bench.models.real`), a folder with a
            `config.json` of transformers or timm, a timm model (`vit_base_patch16_224`, `timm/...`, with or without a
            tag), a transformers model type (`llama`: its default configuration), or a model on the hub (`org/name`),
            whose configuration comes from the cache or the hub.

    Returns:
        The model. For `FEW_PATCHES`, the vision tower is built for 2 x 2 patches: this changes only its position
        embedding, and saves hundreds of image tokens in the language model.

    Raises:
        SanError: If the name is unknown (the message suggests similar ones), or the model cannot be built.

    Example:
        >>> type(empty_model("gpt2")).__name__
        'GPT2LMHeadModel'
    """
    if (folder := local_model(name)) is not None:
        return _from_folder(folder)
    if name and (Path(name) / "config.json").is_file():
        return _from_folder(Path(name))
    if name in _types():
        return _default_of_type(name)
    bare = name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")
    if bare.split(".")[0] in _timm_names():
        return _timm(bare)
    if bare != name:
        missing = NO_TIMM if not _timm_names() else f"timm has no model {bare!r}.{_close(bare)}"
        raise SanError(f"{name}: {missing}")
    if name and Path(name).is_dir():
        raise SanError(f"The folder {name} has no config.json. Pass the folder of a saved model.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise SanError(_unknown(name))
    return _from_hub(name)


@contextmanager
def quietly() -> Iterator[None]:
    """Suppresses warnings, and log messages of transformers below errors."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _timm_names() -> tuple[str, ...]:
    if find_spec("timm") is None:
        return ()
    import timm

    return tuple(timm.list_models())


def _types() -> tuple[str, ...]:
    from transformers import CONFIG_MAPPING

    return tuple(CONFIG_MAPPING.keys())


def _close(name: str) -> str:
    known = (*_types(), *_timm_names(), *FAMILIES)
    found = difflib.get_close_matches(name.rsplit("/", 1)[-1], known, n=3, cutoff=0.6)
    return f" Did you mean {', '.join(found)}?" if found else ""


def _unknown(name: str) -> str:
    timm = "" if _timm_names() else f" {NO_TIMM}"
    return (
        f"Unknown model {name!r}: not a folder with a config.json, a timm model or a transformers model "
        f"type.{_close(name)}{timm} A model on the hub is written org/name."
    )


def _from_folder(folder: Path) -> nn.Module:
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SanError(f"{folder / 'config.json'} cannot be read: {error}.") from error
    if isinstance(facts, dict) and "architecture" in facts and "model_type" not in facts:
        return _timm_folder(folder, facts)
    return _from_config(_load_config(str(folder), f"{folder / 'config.json'} is not a transformers configuration"))


def _timm_folder(folder: Path, facts: dict[str, Any]) -> nn.Module:
    if not _timm_names():
        raise SanError(f"{folder} contains a timm model. {NO_TIMM}")
    classes = {"num_classes": facts["num_classes"]} if "num_classes" in facts else {}
    cfg = {**facts.get("pretrained_cfg", {}), **classes}  # other keys do not affect the architecture
    return _timm(facts["architecture"], pretrained_cfg=cfg, **facts.get("model_args", {}))


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    base, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise SanError(
            f"timm has no pretrained tag {tag!r} for {base}. Choose from {', '.join(tags) or 'none'}, or omit the tag."
        )
    return _build(name, lambda: timm.create_model(name, pretrained=False, **options))


def _default_of_type(model_type: str) -> nn.Module:
    from transformers import AutoConfig

    try:
        with quietly():
            config = AutoConfig.for_model(model_type)
    except Exception as error:
        raise SanError(_no_default(model_type, error)) from error
    return _from_config(config)


def _no_default(model_type: str, error: Exception) -> str:
    return (
        f"The model type {model_type} has no default configuration ({type(error).__name__}: {_line(error)}). "
        "Pass a folder with a config.json, or a model on the hub."
    )


def _from_hub(name: str) -> nn.Module:
    return _from_config(
        _load_config(
            name,
            f"{name} is not a folder or a timm model, and its configuration is neither cached nor available from the "
            "hub",
            f" Check the name and the connection (and HF_HUB_OFFLINE), pass a folder that contains its config.json, or "
            f"pass a model type such as llama.{_close(name)}",
        )
    )


def _load_config(name: str, trouble: str, ways_out: str = "") -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:
        raise SanError(f"{trouble} ({_line(error)}).{ways_out}") from error


def _from_config(config: Any) -> nn.Module:
    import transformers

    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
    model_class = next((found for found in named if found is not None), None) or _fitting_class(config)
    _use_few_patches(config)
    return _build(config.model_type, lambda: model_class(config))


def _fitting_class(config: Any) -> Any:
    """Returns transformers' class for the first task in `TASKS` that has one, else the base model class."""
    import transformers
    from transformers.models.auto import modeling_auto

    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in TASKS]
    two_towers = hasattr(config, "vision_config") and hasattr(config, "text_config")
    for mapping in (mappings[0] if two_towers else {}, {} if two_towers else _merged(mappings), _base_classes()):
        found = mapping.get(config.model_type)
        if found is not None:
            return getattr(transformers, found if isinstance(found, str) else found[0])
    raise SanError(f"transformers has no model class for the model type {config.model_type} that can be traced.")


def _merged(mappings: list[Any]) -> dict[str, Any]:
    return {key: value for mapping in reversed(mappings) for key, value in dict(mapping).items()}


def _base_classes() -> dict[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return dict(MODEL_MAPPING_NAMES)


def _use_few_patches(config: Any) -> None:
    if config.model_type in FEW_PATCHES:
        before, config.vision_config.image_size = config.vision_config.image_size, 2 * config.vision_config.patch_size
        if sizes := getattr(config, "image_grid_pinpoints", None):  # the same number of tiles, with fewer patches
            few = config.vision_config.image_size
            config.image_grid_pinpoints = [[side // before * few for side in size] for size in sizes]


def _build(name: str, build: Any) -> nn.Module:
    try:
        with quietly(), torch.device("meta"):
            return build()
    except Exception as error:
        raise SanError(f"{name} cannot be built: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return shorten(str(error), 200, placeholder=" ...")
