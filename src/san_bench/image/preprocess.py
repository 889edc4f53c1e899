"""Image preprocessing: resizing and normalization by recipe and checkpoint, and training augmentation.

Example:
    >>> from san_bench.models.embedded import embedded_path
    >>> from san_bench.image.tasks import load_task
    >>> images = for_checkpoint(load_task("digits")["val200"], embedded_path())
    >>> tuple(images[0]["pixel_values"].shape), float(images[0]["pixel_values"].min())
    ((3, 32, 32), -1.0)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from san_bench.image.recipe import Augmentation, Input
from san_bench.image.splits import ArraySplit, Split
from san_peft.errors import SanError

STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Channel means and standard deviations, for pixel values from 0 to 1."""


@dataclass(frozen=True)
class InputSettings:
    """Preprocessing settings for evaluation and, except for augmentation, for training.

    Attributes:
        size: Height and width in pixels.
        mean: Channel means for normalization, for pixel values from 0 to 1.
        std: Channel standard deviations.
        interpolation: `bilinear`, `bicubic`, or another of Pillow's filters.
        crop_pct: Fraction of the shorter side kept by the center crop.
        squash: Resizes to a square, ignoring the aspect ratio, without a crop.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    squash: bool = True

    @property
    def filter(self) -> Image.Resampling:
        """The Pillow filter for the interpolation."""
        return Image.Resampling[self.interpolation.upper()]


def checkpoint_input(model: str | Path, revision: str = "main") -> InputSettings:
    """Reads the preprocessing settings of a checkpoint, from `preprocessor_config.json` or timm's configuration.

    Args:
        model: A folder, or a name that transformers resolves.
        revision: Commit, branch or tag of a model on the hub.

    Raises:
        SanError: If it has no size or normalization, or cannot be loaded.
    """
    try:
        return InputSettings(**_facts(model, revision))
    except Exception as error:  # of many types, for damaged files
        if isinstance(error, OSError) and not Path(model).is_dir():
            raise SanError(f"The configuration of {model} cannot be loaded: {error}") from error
        raise SanError(
            f"{model} has no preprocessing settings: {_reason(error, model)}. Set input.size, "
            "input.normalization and input.interpolation in the recipe, or add a preprocessor_config.json to the "
            "folder."
        ) from error


def input_settings(recipe_input: Input, model: str | Path, revision: str = "main") -> InputSettings:
    """Returns the preprocessing settings of a recipe, completed by those of the checkpoint."""
    chosen: dict[str, Any] = {"squash": recipe_input.resize == "squash"}
    if recipe_input.size is not None:
        chosen["size"] = recipe_input.size
    if recipe_input.crop_pct is not None:
        chosen["crop_pct"] = recipe_input.crop_pct
    if recipe_input.interpolation != "checkpoint":
        chosen["interpolation"] = recipe_input.interpolation
    if recipe_input.normalization != "checkpoint":
        chosen["mean"], chosen["std"] = STATISTICS[recipe_input.normalization]
    if {"size", "mean", "interpolation"} <= set(chosen):
        return InputSettings(**chosen)
    return replace(checkpoint_input(model, revision), **chosen)


def for_checkpoint(split: Split, model: str | Path) -> Prepared:
    """Returns a split with the preprocessing of a checkpoint."""
    return Prepared(split, checkpoint_input(model))


class Prepared(Dataset):
    """A split as model inputs, for the transformers `Trainer`.

    Args:
        split: The images.
        settings: Preprocessing settings.
        augmentation: Training augmentation; `None` for evaluation.
    """

    def __init__(self, split: Split, settings: InputSettings, augmentation: Augmentation | None = None) -> None:
        self.split, self.settings = split, settings
        self._shift, self._scale = (torch.tensor(v)[:, None, None] for v in (settings.mean, settings.std))
        self._targets = torch.from_numpy(np.ascontiguousarray(split.labels))
        self._before, self._after = _transforms(settings, augmentation)
        self._ready: Float32[Tensor, "n 3 size size"] | None = None
        plain = settings.squash and (augmentation is None or _changes_nothing(augmentation))
        if plain and isinstance(split, ArraySplit) and split.images.shape[1:3] == (settings.size, settings.size):
            self._ready = self._normalise(torch.from_numpy(split.images).permute(0, 3, 1, 2)).contiguous()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns `pixel_values` of shape (3, size, size) in float32, and `labels`, a scalar."""
        if self._ready is not None:
            return {"pixel_values": self._ready[index], "labels": self._targets[index]}
        image = self._before(self.split.image(index))
        pixels = self._normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return {"pixel_values": self._after(pixels), "labels": self._targets[index]}

    def batch(self, count: int, start: int = 0) -> Float32[Tensor, "count 3 size size"]:
        """Returns `pixel_values` of up to `count` images, beginning at `start`."""
        end = min(start + count, len(self))
        return torch.stack([self[index]["pixel_values"] for index in range(start, end)])

    def _normalise(self, pixels: Tensor) -> Float32[Tensor, "... 3 height width"]:
        return (pixels.float() / 255 - self._shift) / self._scale


def mixing(augmentation: Augmentation, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Returns timm's mixup and cutmix, which also apply label smoothing; `None` if both are off."""
    if not (augmentation.mixup or augmentation.cutmix):
        return None
    from timm.data.mixup import Mixup

    return Mixup(
        augmentation.mixup, augmentation.cutmix, label_smoothing=augmentation.smoothing, num_classes=num_classes
    )


def _changes_nothing(augmentation: Augmentation) -> bool:
    alone = augmentation.crop == "none" and not augmentation.flip and augmentation.randaugment is None
    return alone and not augmentation.erasing


def _transforms(
    settings: InputSettings, augmentation: Augmentation | None
) -> tuple[Callable[[Image.Image], Image.Image], Callable[[Tensor], Tensor]]:
    """Returns transforms before and after normalization; both can be pickled for data loader workers."""
    if augmentation is None or _changes_nothing(augmentation):
        return partial(_resize_and_crop, settings=settings), _same
    from torchvision import transforms

    size, way = settings.size, transforms.InterpolationMode(settings.interpolation)
    steps: list[Callable[[Any], Any]] = []
    if augmentation.crop == "random-resized":
        steps.append(transforms.RandomResizedCrop(size, (augmentation.smallest_crop, 1.0), interpolation=way))
    elif augmentation.crop == "random":
        steps += [transforms.Resize(round(size / settings.crop_pct), way), transforms.RandomCrop(size)]
    else:
        steps.append(partial(_resize_and_crop, settings=settings))
    if augmentation.flip:
        steps.append(transforms.RandomHorizontalFlip())
    if augmentation.randaugment is not None:
        from timm.data.auto_augment import rand_augment_transform

        grey = tuple(min(255, round(255 * x)) for x in settings.mean)
        options = {"translate_const": int(size * 0.45), "img_mean": grey}
        steps.append(rand_augment_transform(augmentation.randaugment, options))
    after: Callable[[Tensor], Tensor] = _same
    if augmentation.erasing:
        from timm.data.random_erasing import RandomErasing

        after = RandomErasing(augmentation.erasing, mode="pixel", device="cpu")
    return transforms.Compose(steps), after


def _same(pixels: Tensor) -> Tensor:
    return pixels


def _resize_and_crop(image: Image.Image, settings: InputSettings) -> Image.Image:
    size = settings.size
    if settings.squash:
        return image if image.size == (size, size) else image.resize((size, size), settings.filter)
    shorter = round(size / settings.crop_pct)
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(side * scale)) for side in image.size)
    image = image.resize((width, height), settings.filter)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _facts(model: str | Path, revision: str) -> dict[str, Any]:
    """Returns the settings of a checkpoint as fields of `InputSettings`."""
    file = Path(model) / "preprocessor_config.json"
    if file.is_file():
        return _from_transformers(json.loads(file.read_text(encoding="utf-8")))
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, revision=revision)
    timm = getattr(config, "pretrained_cfg", None)
    if isinstance(timm, dict):
        found = {key: timm[key] for key in ("mean", "std", "interpolation", "crop_pct") if timm.get(key) is not None}
        found.update({key: tuple(found[key]) for key in ("mean", "std") if key in found})
        built_for = (getattr(config, "model_args", None) or {}).get("img_size", timm.get("input_size"))
        if built_for is not None:
            found["size"] = built_for if isinstance(built_for, int) else built_for[-1]
        return found
    from transformers import AutoImageProcessor

    return _from_transformers(AutoImageProcessor.from_pretrained(model, revision=revision).to_dict())


def _reason(error: Exception, model: str | Path) -> str:
    """Returns why there are no settings, in short if a folder has no configuration file."""
    for name in ("config.json", "preprocessor_config.json"):
        if not isinstance(error, TypeError) and Path(model).is_dir() and not (Path(model) / name).is_file():
            return f"it has no {name}"
    return shorten(str(error), 200, placeholder=" ...").rstrip(".")


def _from_transformers(facts: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    size = facts.get("crop_size") if facts.get("do_center_crop") else facts.get("size")
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    if size is not None:
        found["size"] = int(size)
    if facts.get("do_normalize", True):
        found.update({n: tuple(facts[f"image_{n}"]) for n in ("mean", "std") if facts.get(f"image_{n}")})
    else:
        found["mean"], found["std"] = STATISTICS["none"]
    if facts.get("crop_pct") is not None:
        found["crop_pct"] = float(facts["crop_pct"])
    if isinstance(facts.get("resample"), int):
        found["interpolation"] = Image.Resampling(facts["resample"]).name.lower()
    return found
