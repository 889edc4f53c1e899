"""Recipes of image classification.

Example:
    >>> from san_bench.config.recipe import load_recipe
    >>> load_recipe("demo/san").input.resize
    'squash'
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from san_bench.config.recipe import Recipe, check_splits
from san_bench.config.strict import Strict, suggest

TASKS = ("digits", "folder", "datasets")
"""Tasks that are of no suite."""

SUITES = ("mini-vision/", "vtab/", "fgvc/", "gic/")
"""What the names of the other tasks start with."""


class Input(Strict):
    """How an image becomes what the model reads.

    Attributes:
        size: Height and width in pixels; `null` for the checkpoint's.
        resize: `squash` to the size whatever the shape, or `crop`: the shorter side to size / `crop_pct`, then the
            centre.
        crop_pct: Share of the shorter side that is kept; `null` for the checkpoint's.
        interpolation: Of the resizing.
        normalization: Mean and standard deviation: the checkpoint's, ImageNet's, 0.5 and 0.5 (`inception`), or none,
            which leaves 0 to 1.
    """

    size: int | None = Field(ge=1)
    resize: Literal["squash", "crop"]
    crop_pct: float | None = Field(gt=0, le=1)
    interpolation: Literal["checkpoint", "bilinear", "bicubic"]
    normalization: Literal["checkpoint", "imagenet", "inception", "none"]


class Augmentation(Strict):
    """What is done to images in training alone, by torchvision and timm.

    Attributes:
        crop: `none`: as in scoring; `random`: a random in place of the centre crop; `random-resized`: of random size
            and shape.
        smallest_crop: Smallest share of the area that `random-resized` takes.
        flip: Mirrors half of the images.
        randaugment: timm's description, such as `rand-m9-mstd0.5-inc1`, or `null`.
        erasing: Probability that a rectangle is replaced by noise.
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of cutmix, 0 for none.
        smoothing: Label smoothing.
    """

    crop: Literal["none", "random", "random-resized"]
    smallest_crop: float = Field(gt=0, le=1)
    flip: bool
    randaugment: str | None
    erasing: float = Field(ge=0, le=1)
    mixup: float = Field(ge=0)
    cutmix: float = Field(ge=0)
    smoothing: float = Field(ge=0, lt=1)


class ImageRecipe(Recipe):
    """One run of image classification; what is not said here says `Recipe`.

    Attributes:
        task: Name of a task; see `san_bench.image.tasks.load_task`.
        train_split: Split to train with.
        eval_split: Split to score once, after training.
        model: `embedded` (the small ViT of the package), `embedded/swin`, `embedded/convnext`,
            `real/dinov2-small` or `real/efficientnet-lite0` (see `san_bench.models.real`), a folder, or a name that
            transformers resolves, such as `timm/vit_base_patch16_224.augreg_in21k`. Its weights are in float32.
        method: What is trained; the task's head always is.
        input: How an image becomes what the model reads.
        augmentation: What is done to images in training alone.
        drop_path: Rate of stochastic depth, for models that have it.
        ema: Decay of the exponential moving average of the trained weights, which is then what is scored; or `null`.
        selection: `last`: the weights after the last step. `best-val`: those of the epoch that is best on the task's
            validation split. `best-test`: of the epoch that is best on `eval_split`, as older papers do.
        channels_last: Keeps images and kernels channels-last in memory.
    """

    train_split: Literal["train800", "train800val200", "train", "trainval"]
    eval_split: Literal["val200", "val", "test"]
    input: Input
    augmentation: Augmentation
    drop_path: float = Field(ge=0, lt=1)
    ema: float | None = Field(gt=0, lt=1)
    selection: Literal["last", "best-val", "best-test"]
    channels_last: bool

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in TASKS and not task.startswith(SUITES):
            raise ValueError(
                f"unknown task {task!r}.{suggest(task, [*TASKS, *(f'{name}...' for name in SUITES)])[:-1]}"
            )
        return task

    @model_validator(mode="after")
    def _scored_on_unseen_images(self) -> ImageRecipe:
        check_splits(self.train_split, self.eval_split, self.selection)
        if self.ema is not None and self.selection != "last":
            raise ValueError(
                f"selection|an average over steps goes with last, not with {self.selection}; set ema to null"
            )
        if self.optimizer.batch_size % 2 and (self.augmentation.mixup or self.augmentation.cutmix):
            raise ValueError(f"optimizer|mixup and cutmix pair images, but batch_size is {self.optimizer.batch_size}")
        return self
