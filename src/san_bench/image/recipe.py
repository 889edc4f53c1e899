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
from san_bench.config.strict import Strict, later, suggest

TASKS = ("digits", "folder", "datasets")
"""Tasks outside a suite."""

SUITES = ("mini-vision/", "vtab/", "fgvc/", "gic/", "folder/")
"""Prefixes of all other task names."""

OWN = ("folder", "datasets")
"""Tasks for your own data: images in any layout, or only tables. `folder/NAME` is the folder NAME inside `data`."""


class Input(Strict):
    """Image preprocessing.

    Attributes:
        size: Height and width in pixels; `null` for the setting of the checkpoint.
        resize: `squash` resizes to a square, ignoring the aspect ratio; `crop` resizes the shorter side to
            size / `crop_pct`, then center-crops.
        crop_pct: Fraction of the shorter side kept by the center crop; `null` for the setting of the checkpoint.
        interpolation: Interpolation for resizing.
        normalization: Mean and standard deviation: of the checkpoint, of ImageNet, 0.5 and 0.5 (`inception`), or `none`
            for the range 0 to 1.
    """

    size: int | None = Field(default=None, ge=1, le=4096)
    resize: Literal["squash", "crop"] = "crop"
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    interpolation: Literal["checkpoint", "bilinear", "bicubic"] = "checkpoint"
    normalization: Literal["checkpoint", "imagenet", "inception", "none"] = "checkpoint"


class Augmentation(Strict):
    """Training augmentation, with torchvision and timm.

    Attributes:
        crop: `none`: as in evaluation; `random`: random instead of center crop; `random-resized`: random size and
            aspect ratio.
        smallest_crop: Smallest area fraction of `random-resized`.
        flip: Random horizontal flip.
        randaugment: RandAugment configuration of timm, such as `rand-m9-mstd0.5-inc1`, or `null`.
        erasing: Probability of random erasing.
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of cutmix, 0 for none.
        smoothing: Label smoothing.
    """

    crop: Literal["none", "random", "random-resized"] = "none"
    smallest_crop: float = Field(default=0.08, gt=0, le=1)
    flip: bool = False
    randaugment: str | None = None
    erasing: float = Field(default=0.0, ge=0, le=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    smoothing: float = Field(default=0.0, ge=0, lt=1)


class Holdout(Strict):
    """Splits that are held out from your own images where the data has none, stratified by class.

    Attributes:
        val: Fraction of the training images that becomes `val`.
        test: Fraction of all images that becomes `test`.
        seed: Seed of the draw, apart from that of the training: runs with other seeds have the same splits.
    """

    val: float = Field(default=0.1, gt=0, lt=1)
    test: float = Field(default=0.2, gt=0, lt=1)
    seed: int = Field(default=2024, ge=0)


class ImageRecipe(Recipe):
    """Recipe of an image classification run; see `Recipe` for the common settings.

    Attributes:
        task: Task name; see `san_bench.image.tasks.load_task`.
        train_split: Training split.
        eval_split: Split for the evaluation after training.
        holdout: Splits to hold out from your own images; left out of the recipe and its fingerprint by default.
        model: `embedded` (the small ViT that ships with the package), `embedded/swin`, `embedded/convnext`,
            `real/dinov2-small` or `real/efficientnet-lite0` (see `san_bench.models.real`), a folder, or a name that
            transformers resolves, such as `timm/vit_base_patch16_224.augreg_in21k`. Weights are loaded in float32.
        method: Fine-tuning method; the classification head is always trained.
        input: Image preprocessing.
        augmentation: Training augmentation.
        drop_path: Stochastic depth rate, for models that support it.
        ema: Decay of the exponential moving average of the weights, which is then evaluated; or `null`.
        selection: Checkpoint selection. `last`: after the last step. `best-val`: best epoch on the validation split, or
            the best evaluation with `eval_steps`. `best-test`: best epoch on `eval_split`, as in older papers.
        channels_last: Uses the channels-last memory format.
    """

    train_split: Literal["train800", "train800val200", "train", "trainval"] = "train"
    eval_split: Literal["val200", "val", "test"] = "test"
    holdout: Holdout = later(Holdout(), unused=True)
    input: Input = Input()
    augmentation: Augmentation = Augmentation()
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    selection: Literal["last", "best-val", "best-test"] = "last"
    channels_last: bool = False

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in TASKS and not task.startswith(SUITES):
            raise ValueError(
                f"unknown task {task!r}.{suggest(task, [*TASKS, *(f'{name}...' for name in SUITES)])[:-1]}"
            )
        return task

    @model_validator(mode="after")
    def _holds_out_own_images(self) -> ImageRecipe:
        if self.holdout != Holdout() and self.task.partition("/")[0] not in OWN:
            raise ValueError(f"holdout|{self.task} has fixed splits; leave holdout out")
        return self

    @model_validator(mode="after")
    def _scored_on_unseen_images(self) -> ImageRecipe:
        check_splits(self.train_split, self.eval_split, self.selection)
        if self.ema is not None and self.selection != "last":
            raise ValueError(f"selection|ema needs last, not {self.selection}; set ema to null")
        if self.optimizer.batch_size % 2 and (self.augmentation.mixup or self.augmentation.cutmix):
            raise ValueError(
                f"optimizer|mixup and cutmix need an even batch_size, but it is {self.optimizer.batch_size}"
            )
        return self
