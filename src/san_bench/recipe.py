"""Recipes: everything that decides a run, in one strict and frozen YAML file.

Every key must be there, no other key may be, and nothing outside the file decides the result but the data, whose
fingerprint a result carries. All errors of a file come at once, each with its line, the place in the recipe, and the
likely word where one was mistyped.

Example:
    >>> recipe = load_recipe("demo/san")
    >>> recipe.method.kind, recipe.seed, len(recipe.fingerprint)
    ('san', 0, 64)
    >>> load_recipe("demo/san", {"seed": 1}).fingerprint == recipe.fingerprint
    False
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, field_validator, model_validator

from san_bench.strict import Strict, did_you_mean, read_model, san_error, suggest

Propagation = Literal[
    "all", "exact", "feedforward", "reference", "none", "reversed", "skip-one", "permuted", "shuffled"
]
"""A scheme, or one of the ways to break the order of propagation, drawn with the recipe's seed."""

Targets = Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | Literal["all-linear"]


class San(Strict):
    """SAN with its own scale vectors."""

    kind: Literal["san"]
    propagation: Propagation
    exponent: float
    shift: bool
    train_norms: bool
    detach: bool
    gate: bool


class Ssf(Strict):
    """Scale and shift without propagation."""

    kind: Literal["ssf"]
    train_norms: bool


class Lora(Strict):
    """LoRA, or DoRA.

    Attributes:
        targets: Endings of the names of the layers, or `all-linear`: every dense layer but the head.
    """

    kind: Literal["lora", "dora"]
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: Targets


class SanOver(Strict):
    """SAN over LoRA or DoRA: the scale is taken out of the host and propagated."""

    kind: Literal["san-lora", "san-dora"]
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: Targets
    propagation: Propagation
    decomposition: Literal["norm", "projection"]
    exponent: float
    bound: float | None
    detach: bool


class Ia3(Strict):
    """(IA)^3: learned scales on outputs, and on the inputs of `feedforward`, which is part of `targets`."""

    kind: Literal["ia3"]
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    feedforward: Annotated[tuple[str, ...], Field(strict=False)]


class Plain(Strict):
    """No adapter: `linear` trains the head alone, `norm` the normalisations too, `bitfit` the biases, `full` all."""

    kind: Literal["linear", "norm", "bitfit", "full"]


Method = Annotated[San | Ssf | Lora | SanOver | Ia3 | Plain, Discriminator("kind")]


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


class Optimizer(Strict):
    """The optimiser and its schedule, which changes the learning rate at every step.

    Attributes:
        kind: AdamW, or SGD with momentum 0.9.
        lr: Largest learning rate, after the warm-up.
        weight_decay: Of matrices and kernels.
        decay_vectors: Decays vectors as well, apart from biases and norms: scales, which are stored as their offset
            from one, are then pulled towards one.
        epochs: Passes over the images.
        batch_size: Images in a step, over all devices and accumulated parts.
        accumulation: Into how many parts a batch is divided.
        warmup: Share of the steps in which the learning rate rises from `warmup_lr`.
        warmup_lr: Where it rises from, as a share of `lr`.
        schedule: How it falls.
        min_lr: What it falls to, as a share of `lr`; `cosine` alone can end above zero.
        max_grad_norm: Where gradients are clipped; 0 for no clipping.
    """

    kind: Literal["adamw", "sgd"]
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    decay_vectors: bool
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    accumulation: int = Field(ge=1)
    warmup: float = Field(ge=0, lt=1)
    warmup_lr: float = Field(ge=0, lt=1)
    schedule: Literal["constant", "linear", "cosine"]
    min_lr: float = Field(ge=0, lt=1)
    max_grad_norm: float = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Optimizer:
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation|{self.accumulation} parts do not divide a batch of {self.batch_size}")
        if self.schedule != "cosine" and (self.min_lr or self.warmup_lr):
            raise ValueError(f"schedule|min_lr and warmup_lr are for cosine; with {self.schedule} they must be 0")
        return self


class Recipe(Strict):
    """One run: what is trained, on what, how, and where the result goes.

    Attributes:
        task: Name of a task; see `san_bench.data.vision.load_task`.
        data: Folder of the data; `null` for tasks that come with the package. No part of the fingerprint: a result
            carries the fingerprint of the data itself.
        train_split: Split to train with.
        eval_split: Split to score once, after training.
        model: `embedded` (the small ViT of the package), `embedded/swin`, `embedded/convnext`, a folder, or a name that
            transformers resolves, such as `timm/vit_base_patch16_224.augreg_in21k`.
        method: What is trained; the task's head always is.
        input: How an image becomes what the model reads.
        augmentation: What is done to images in training alone.
        optimizer: The optimiser and its schedule.
        drop_path: Rate of stochastic depth, for models that have it.
        ema: Decay of the exponential moving average of the trained weights, which is then what is scored; or `null`.
        selection: `last`: the weights after the last step. `best-val`: those of the epoch that is best on the task's
            validation split. `best-test`: of the epoch that is best on `eval_split`, as older papers do.
        protocol: Name of the protocol that the settings come from, or `null`.
        seed: Seeds the head, the adapter, the augmentation and the order of the data.
        precision: Of the arithmetic; weights stay in float32.
        compile: Uses `torch.compile`.
        channels_last: Keeps images and kernels channels-last in memory.
        data_workers: Processes that decode and augment; with 0 the training process does.
        checkpoint_steps: Steps between checkpoints, 0 for none; resuming continues from the last one.
        output: Folder of the run; no part of the fingerprint.
    """

    task: str = Field(min_length=1)
    data: str | None
    train_split: Literal["train800", "train800val200", "train", "trainval"]
    eval_split: Literal["val200", "val", "test"]
    model: str = Field(min_length=1)
    method: Method
    input: Input
    augmentation: Augmentation
    optimizer: Optimizer
    drop_path: float = Field(ge=0, lt=1)
    ema: float | None = Field(gt=0, lt=1)
    selection: Literal["last", "best-val", "best-test"]
    protocol: str | None
    seed: int = Field(ge=0, lt=2**32)
    precision: Literal["fp32", "bf16", "fp16"]
    compile: bool
    channels_last: bool
    data_workers: int = Field(ge=0)
    checkpoint_steps: int = Field(ge=0)
    output: str = Field(min_length=1)

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in TASKS and not task.startswith(SUITES):
            raise ValueError(
                f"unknown task {task!r}.{suggest(task, [*TASKS, *(f'{name}...' for name in SUITES)])[:-1]}"
            )
        return task

    @model_validator(mode="after")
    def _scored_on_unseen_images(self) -> Recipe:
        train = VALIDATION.get(self.train_split, self.train_split)
        if self.eval_split in train.split("+"):
            apart = train.split("+")[0]
            raise ValueError(
                f"eval_split|{self.eval_split} is part of {self.train_split}; train with {apart}, or score on test"
            )
        if self.selection == "best-val" and self.train_split in VALIDATION:
            raise ValueError(
                f"selection|{self.train_split} contains the validation images, so best-val would choose by what was "
                f"trained with; train with {VALIDATION[self.train_split].split('+')[0]}"
            )
        if self.ema is not None and self.selection != "last":
            raise ValueError(
                f"selection|an average over steps goes with last, not with {self.selection}; set ema to null"
            )
        if self.optimizer.batch_size % 2 and (self.augmentation.mixup or self.augmentation.cutmix):
            raise ValueError(f"optimizer|mixup and cutmix pair images, but batch_size is {self.optimizer.batch_size}")
        return self

    @property
    def fingerprint(self) -> str:
        """The sha256 of the recipe as canonical JSON, without `output` and `data`."""
        text = json.dumps(
            self.model_dump(mode="json", exclude={"output", "data"}), sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """Writes the recipe as YAML, keys in the order of the class."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


TASKS = ("digits", "folder", "datasets")
"""Tasks that are of no suite."""

SUITES = ("mini-vision/", "vtab/", "fgvc/", "gic/")
"""What the names of the other tasks start with."""

VALIDATION = {"train800val200": "train800+val200", "trainval": "train+val"}
"""Splits that join a training and a validation split, with the names of both."""


def shipped(kind: str | None = "recipes") -> dict[str, Path]:
    """Returns the files of a kind that come with the package, by name, such as `demo/san`.

    Args:
        kind: `recipes`, `suites` or `protocols`; `None` for all, with the kind in the names of the last two.
    """
    root = Path(str(resources.files("san_bench"))) / "recipes"
    folder = root if kind in (None, "recipes") else root / kind
    names = {str(p.relative_to(folder).with_suffix("").as_posix()): p for p in sorted(folder.rglob("*.yaml"))}
    others = () if kind is None else ("suites/", "protocols/")
    return {name: path for name, path in names.items() if not name.startswith(others)}


def find(name: str | Path, kind: str | None = "recipes") -> Path:
    """Finds a file by its path, or by the name under which it ships.

    Args:
        name: The path or the name.
        kind: Where to look; see `shipped`.

    Raises:
        SanError: If there is neither.
    """
    known = shipped(kind)
    if Path(name).is_file():
        return Path(name)
    if str(name) in known:
        return known[str(name)]
    hint = did_you_mean(str(name), known)
    raise san_error(
        f"There is no {(kind or 'recipes')[:-1]} {str(name)!r}.{hint} Give a file, or one of {', '.join(known)}."
    )


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        name: Path of a YAML file, or the name of a shipped recipe.
        overrides: Values by dotted key, or as `key=value` texts whose values are read as YAML.

    Returns:
        The recipe, frozen.

    Raises:
        SanError: If anything is wrong with it; the message lists every problem with its place.
    """
    return read_model(Recipe, find(name), overrides)
