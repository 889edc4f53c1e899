"""Example inputs for a model, derived from what it says of itself: transformers' configuration or timm's."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from san_peft.errors import TraceError

TOKENS = 6


def derive_inputs(model: nn.Module) -> dict[str, Any] | tuple[Tensor, ...]:
    """Returns one small example input: keyword arguments, or a tuple of arguments.

    It is on the model's device, or on the CPU for a model on the meta device. A sequence has `TOKENS` tokens; an image
    has the size that the model was made for.

    Args:
        model: A model of transformers or timm.

    Raises:
        TraceError: If the model says nothing of its inputs.
    """
    config = getattr(model, "config", None)
    if hasattr(config, "model_type") and hasattr(model, "main_input_name"):
        return _transformers(model, config)
    image = _timm_size(model)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if image is not None and first is not None:
        return (_image(model, first.in_channels, image),)
    raise TraceError(
        f"The inputs of a {type(model).__name__} cannot be derived. Two ways out: "
        "SanConfig(propagation=san_peft.trace(model, example_inputs)), or SanConfig(propagation='none')."
    )


def _timm_size(model: nn.Module) -> Any:
    """Size of the images that a timm model reads: of its patch embedding, else as its configuration says."""
    timm = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = timm.get("input_size") if isinstance(timm, dict) else getattr(timm, "input_size", None)
    return next((m.img_size for m in model.modules() if getattr(m, "img_size", None)), size[-2:] if size else None)


def _device(model: nn.Module) -> torch.device:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _image(model: nn.Module, channels: int, size: Any) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.zeros(1, channels, height, width, device=_device(model), dtype=dtype)


def _tile(inputs: dict[str, Any], sizes: Any, tile: int, side: int) -> int:
    """Makes the image one of LLaVA-NeXT's kind: itself, and the tiles of the smallest size that it may have.

    Returns:
        Tokens of the tiles: their patches, and a new line after each row.
    """
    height, width = min(sizes, key=lambda size: size[0] * size[1])
    rows, columns = height // tile, width // tile
    whole = inputs["pixel_values"]
    inputs["pixel_values"] = whole[:, None].repeat(1, 1 + rows * columns, 1, 1, 1)
    inputs["image_sizes"] = torch.tensor([[height, width]], device=whole.device)
    return rows * side * (columns * side + 1)


def _transformers(model: nn.Module, config: Any) -> dict[str, Any]:
    accepted = inspect.signature(model.forward).parameters
    device = _device(model)
    vision = getattr(config, "vision_config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    inputs: dict[str, Any] = {}
    ids = torch.arange(1, TOKENS + 1)[None] % max(getattr(text, "vocab_size", None) or 2, 2)
    if "pixel_values" in accepted:
        source = vision or config
        inside = getattr(model, "timm_model", None)  # of transformers' wrapper around models of timm
        size = getattr(source, "image_size", None) or (_timm_size(inside) if inside is not None else None) or 224
        inputs["pixel_values"] = _image(model, getattr(source, "num_channels", 3), size)
        token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if vision is not None and token is not None:
            patches = (size // vision.patch_size) ** 2
            if "image_sizes" in accepted and getattr(config, "image_grid_pinpoints", None):
                patches += _tile(inputs, config.image_grid_pinpoints, size, size // vision.patch_size)
            else:
                patches += getattr(config, "vision_feature_select_strategy", "default") == "full"
            first, *rest = (word for word in range(1, 5) if word != token)
            ids = torch.tensor([[first, *[token] * patches, *rest[:2]]])
    if "input_features" in accepted and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions
        inputs["input_features"] = _image(model, 1, (config.num_mel_bins, frames))[:, 0]
    if "input_ids" in accepted:
        inputs["input_ids"] = ids.to(device)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = torch.arange(2, TOKENS + 1)[None].to(device)
    if not inputs:
        raise TraceError(
            f"{type(model).__name__} takes {model.main_input_name}, for which no example can be derived. Two ways out: "
            "SanConfig(propagation=san_peft.trace(model, example_inputs)), or SanConfig(propagation='none')."
        )
    if any(getattr(c, "use_cache", False) for c in (config, text)) and (
        "use_cache" in accepted or "kwargs" in accepted
    ):
        inputs["use_cache"] = False
    return inputs
