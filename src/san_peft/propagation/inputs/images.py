"""Drafts of images and videos: seeded noise, the smallest size first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from san_peft.propagation.inputs.spec import Draft, ModelSpec

SMALL = (96, 128)
"""Heights in pixels to try before the native size of a model."""
TINY = (64, 48, 32)
"""Heights to try last, for a model of unknown native size that is smaller than `SMALL`."""
USUAL = (224, 512, 640)
"""Heights to try additionally if the native size is unknown."""
ARGUMENTS = ("pixel_values", "pixel_values_videos", "flattened_patches")


def sizes(full: Any, patch: int = 1) -> Iterator[tuple[int, int]]:
    """Yields heights and widths of images to try, smallest first.

    Args:
        full: Native image size of the model: side length, height and width, or `None` if unknown.
        patch: Patch size; smaller sizes are rounded up to a multiple of it.
    """
    whole = None if full is None else pair(full)
    for side in SMALL if whole else SMALL + USUAL:
        side = -(-side // patch) * patch
        if whole is None or side < min(whole):
            yield side, side
    if whole is not None:
        yield whole


def pair(size: Any) -> tuple[int, int]:
    """Returns height and width from a number, a sequence or a dictionary."""
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def timm_size(model: Any) -> Any:
    """Returns the native image size of a timm model, from its patch embedding or else its config."""
    size = _timm_input(model)
    return next((m.img_size for m in model.modules() if getattr(m, "img_size", None)), size[-2:] if size else None)


def timm_channels(model: Any) -> int | None:
    """Returns the number of image channels in the config of a timm model."""
    size = _timm_input(model)
    return size[0] if size else None


def _timm_input(model: Any) -> Any:
    timm = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return timm.get("input_size") if isinstance(timm, dict) else getattr(timm, "input_size", None)


def drafts(spec: ModelSpec) -> Iterator[Draft]:
    """Yields drafts of the image arguments; none for a model without image input."""
    name = next((name for name in ARGUMENTS if name in spec.accepted), None)
    if name is None:
        return
    if name == "flattened_patches":
        yield _numbered_patches(spec)
    elif "image_grid_thw" in spec.accepted:
        yield _patches_of_grid(spec)
    elif "spatial_shapes" in spec.accepted:
        yield _padded_patches(spec)
    else:
        full = _full(spec)
        for size in sizes(full, _patch(spec)):
            for pixels in _layouts(spec, name, size):
                yield from _with_companions(spec, {name: pixels}, size, full is not None and size != pair(full))


def _full(spec: ModelSpec) -> Any:
    inside = getattr(spec.model, "timm_model", None)  # transformers' wrapper of timm models
    if inside is not None:
        return timm_size(inside)
    return spec.find("image_size", "crop_size", "input_size", "resolution", section="vision_config")


def _patch(spec: ModelSpec) -> int:
    """Returns the side length of a patch in pixels, including the merging of patches."""
    patch = spec.find("patch_size", section="vision_config", default=1)
    merged = spec.find("scale_factor", "spatial_merge_size", section="vision_config", default=1)
    return max(pair(patch)) * (merged if isinstance(merged, int) else 1)


def _channels(spec: ModelSpec) -> int:
    return spec.find("num_channels", "in_channels", "in_chans", section="vision_config", default=3)


def _layouts(spec: ModelSpec, name: str, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yields images of one size: as tiles for a model with tiling, else as an image, a video, and a batch of images."""
    one = spec.noise(1, _channels(spec), *size)
    tiles = spec.find("max_num_tiles", default=1)
    if "aspect_ratio_ids" in spec.accepted:
        yield one.expand(1, 1, tiles, *one.shape[1:]).clone()
        return
    if _pinpoints(spec):
        height, width = _smallest(spec)
        count = (height // size[0]) * (width // size[1])
        yield one.expand(1, 1 + max(count, 1), *one.shape[1:]).clone()
        return
    if name == "pixel_values":
        yield one
    for frames in _frames(spec):
        yield spec.noise(1, frames, _channels(spec), *size)
    yield one[None]


def _frames(spec: ModelSpec) -> list[int]:
    """Returns the numbers of video frames to try: two tubelets, and the native number of the model."""
    longest = spec.find("num_frames", "frames_per_clip", section="vision_config")
    tubelet = spec.find("tubelet_size", default=1)
    if not isinstance(longest, int):
        return []
    return sorted({min(longest, 2 * (tubelet if isinstance(tubelet, int) else tubelet[0])), longest})


def _pinpoints(spec: ModelSpec) -> Any:
    return getattr(spec.config, "image_grid_pinpoints", None) if "image_sizes" in spec.accepted else None


def _smallest(spec: ModelSpec) -> tuple[int, int]:
    """Returns the smallest supported size of a tiled image."""
    return pair(min(_pinpoints(spec), key=lambda size: size[0] * size[1]))


def _with_companions(spec: ModelSpec, draft: Draft, size: tuple[int, int], small: bool) -> Iterator[Draft]:
    """Yields a draft with the companion arguments of images that the model accepts."""
    if "aspect_ratio_ids" in spec.accepted:
        draft["aspect_ratio_ids"] = spec.ones(1, 1)
        draft["aspect_ratio_mask"] = spec.ones(1, 1, draft["pixel_values"].shape[2])
    if "input_points" in spec.accepted:
        draft["input_points"] = torch.full((1, 1, 1, 2), size[0] / 2, device=spec.device, dtype=spec.dtype)
    if _pinpoints(spec):
        yield {**draft, "image_sizes": spec.numbers([_smallest(spec)])}
        return
    yield draft
    if "image_sizes" in spec.accepted:
        yield {**draft, "image_sizes": spec.numbers([size])}
    if "interpolate_pos_encoding" in spec.accepted and small:
        yield {**draft, "interpolate_pos_encoding": True}


def _patches_of_grid(spec: ModelSpec) -> Draft:
    """Returns an image as flattened patches with a grid, as in Qwen-VL."""
    merge = spec.find("spatial_merge_size", section="vision_config", default=1)
    patch, frames = (spec.find(n, section="vision_config", default=1) for n in ("patch_size", "temporal_patch_size"))
    side, (height, width) = 2 * merge, pair(patch)
    size = _channels(spec) * (frames if isinstance(frames, int) else frames[0]) * height * width
    return {"pixel_values": spec.noise(side * side, size), "image_grid_thw": spec.numbers([[1, side, side]])}


def _padded_patches(spec: ModelSpec) -> Draft:
    """Returns an image as flattened patches with a mask, as in SigLIP 2."""
    side = 2 * spec.find("downsample_factor", default=1)
    draft = {"pixel_values": spec.noise(1, side * side, _channels(spec) * _patch(spec) ** 2)}
    draft["spatial_shapes"] = spec.numbers([[side, side]])
    return {**draft, "pixel_attention_mask": spec.ones(1, side * side)}


def _numbered_patches(spec: ModelSpec) -> Draft:
    """Returns patches prefixed with their row and column, as in Pix2Struct."""
    size = spec.find("patch_embed_hidden_size", section="vision_config")
    places = spec.numbers([[[1, 1], [1, 2], [2, 1], [2, 2]]]).to(spec.dtype)
    patches = torch.cat([places, spec.noise(1, 4, size)], -1)
    return {"flattened_patches": patches, "attention_mask": spec.ones(1, 4)}
