"""Recipes: the complete configuration of a run, in one strict and frozen YAML file.

Every key is required, unknown keys are errors, and only the data, whose fingerprint is part of the result, comes from
outside the file. All errors are reported at once, each with its line, its key, and a suggestion for a mistyped word.

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
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from san_bench.config.methods import Method
from san_bench.config.strict import Strict, check_file, did_you_mean, read_file, san_error
from san_bench.kinds import recipe_class


class Optimizer(Strict):
    """Optimizer and learning rate schedule, which steps once per optimizer step.

    Attributes:
        kind: AdamW, or SGD with momentum 0.9.
        lr: Peak learning rate, reached after the warm-up.
        weight_decay: Weight decay for weight matrices and conv kernels.
        decay_vectors: Also decays vectors other than biases and norms. Scales are stored as their offset from one, so
            decay pulls them towards one.
        epochs: Number of epochs.
        batch_size: Effective batch size: examples per optimizer step, over all devices and accumulation steps.
        accumulation: Gradient accumulation steps.
        warmup: Fraction of the steps used for warm-up.
        warmup_lr: Learning rate at the first step, as a fraction of `lr`.
        schedule: Learning rate schedule after the warm-up.
        min_lr: Final learning rate, as a fraction of `lr`; only `cosine` can end above zero.
        max_grad_norm: Maximum gradient norm for clipping; 0 turns clipping off.
    """

    kind: Literal["adamw", "sgd"]
    lr: float = Field(gt=0, le=1e6)
    weight_decay: float = Field(ge=0)
    decay_vectors: bool
    epochs: int = Field(ge=1, le=2**20)
    batch_size: int = Field(ge=1, le=2**20)
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
            raise ValueError(f"schedule|min_lr and warmup_lr need cosine; with {self.schedule} they must be 0")
        return self


def split_revision(model: str) -> tuple[str, str | None]:
    """Splits `NAME@REVISION` into name and revision; a local folder has no revision.

    Example:
        >>> split_revision("huggyllama/llama-7b@4782ad2")
        ('huggyllama/llama-7b', '4782ad2')
        >>> split_revision("huggyllama/llama-7b")
        ('huggyllama/llama-7b', None)
    """
    name, at, revision = model.rpartition("@")
    return (name, revision) if at and not Path(model).exists() else (model, None)


class Recipe(Strict):
    """Settings common to all runs.

    Attributes:
        task: Name of the task.
        data: Data folder; `null` for tasks that ship with the package. Not part of the fingerprint: a result has a
            fingerprint of the data itself.
        model: Pretrained model. A name on the hub may end with `@` and a revision: a commit, branch or tag.
        method: Fine-tuning method.
        optimizer: Optimizer and schedule.
        protocol: Name of the protocol that the settings come from, or `null`.
        seed: Seed for new parameters, augmentation and data order.
        precision: Dtype for training and evaluation; 16-bit types use autocast.
        compile: Uses `torch.compile`.
        data_workers: Data loader worker processes; 0 loads in the training process.
        checkpoint_steps: Steps between checkpoints, 0 for none. A run resumes from the last one.
        output: Output folder; not part of the fingerprint.
    """

    task: str = Field(min_length=1)
    data: str | None
    model: str = Field(min_length=1)
    method: Method
    optimizer: Optimizer
    protocol: str | None
    seed: int = Field(ge=0, lt=2**32)
    precision: Literal["fp32", "bf16", "fp16"]
    compile: bool
    data_workers: int = Field(ge=0, le=256)
    checkpoint_steps: int = Field(ge=0)
    output: str = Field(min_length=1)

    @field_validator("model")
    @classmethod
    def _named(cls, model: str) -> str:
        name, revision = split_revision(model)
        if not name or revision == "":
            raise ValueError(f"{model!r} lacks the {'revision' if name else 'name'}; a model is NAME or NAME@REVISION")
        return model

    @property
    def fingerprint(self) -> str:
        """The sha256 of the recipe as canonical JSON, without `output` and `data`."""
        text = json.dumps(
            self.model_dump(mode="json", exclude={"output", "data"}), sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """Returns the recipe as YAML, with keys in the order of the class."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


VALIDATION = {"train800val200": "train800+val200", "trainval": "train+val"}
"""Splits that join a training and a validation split, and the names of both."""


def check_splits(train_split: str, eval_split: str, selection: str) -> None:
    """Raises `ValueError` if a model would be scored or selected on its training data."""
    train = VALIDATION.get(train_split, train_split)
    if eval_split in train.split("+"):
        apart = train.split("+")[0]
        raise ValueError(f"eval_split|{eval_split} is part of {train_split}; train on {apart}, or score on test")
    if selection == "best-val" and train_split in VALIDATION:
        raise ValueError(
            f"selection|{train_split} contains the validation split, so best-val would select on training data; "
            f"train on {VALIDATION[train_split].split('+')[0]}"
        )


def check_weights(kind: str, weights: str) -> None:
    """Raises `ValueError` if a method cannot train a language model with weights of this dtype."""
    if kind == "linear":
        raise ValueError("method|linear trains only a new head, and a language model has none; choose another method")
    if kind in ("full", "norm", "bitfit") and weights in ("nf4", "int8", "fp16"):
        raise ValueError(f"weights|{kind} trains the weights, and {weights} cannot be trained")


def shipped(kind: str | None = "recipes") -> dict[str, Path]:
    """Returns the shipped files of a kind by name, such as `demo/san`.

    Args:
        kind: `recipes`, `suites` or `protocols`; `None` for all, with the kind as prefix of the last two.
    """
    root = Path(str(resources.files("san_bench"))) / "recipes"
    folder = root if kind in (None, "recipes") else root / kind
    names = {str(p.relative_to(folder).with_suffix("").as_posix()): p for p in sorted(folder.rglob("*.yaml"))}
    others = () if kind is None else ("suites/", "protocols/")
    return {name: path for name, path in names.items() if not name.startswith(others)}


def find(name: str | Path, kind: str | None = "recipes") -> Path:
    """Finds a file by its path or its shipped name.

    Args:
        name: The path or the name.
        kind: Where to look; see `shipped`.

    Raises:
        SanError: If neither exists.
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


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Any:
    """Loads and validates a recipe.

    Args:
        name: Path of a YAML file, or name of a shipped recipe.
        overrides: Values by dotted key, or `key=value` strings whose values are parsed as YAML.

    Returns:
        The frozen recipe: an `ImageRecipe`, `TextRecipe` or `ConversationRecipe`, depending on its keys.

    Raises:
        SanError: If it is invalid; the message lists every problem and its location.
    """
    file = read_file(find(name), overrides)
    return check_file(recipe_class(file.data), file)
