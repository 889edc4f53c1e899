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
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from san_bench.config.methods import Method
from san_bench.config.strict import Strict, check_file, did_you_mean, read_file, san_error
from san_bench.kinds import recipe_class


class Optimizer(Strict):
    """The optimiser and its schedule, which changes the learning rate at every step.

    Attributes:
        kind: AdamW, or SGD with momentum 0.9.
        lr: Largest learning rate, after the warm-up.
        weight_decay: Of matrices and kernels.
        decay_vectors: Decays vectors as well, apart from biases and norms: scales, which are stored as their offset
            from one, are then pulled towards one.
        epochs: Passes over the data.
        batch_size: Images, or records, in a step, over all devices and accumulated parts.
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


def split_revision(model: str) -> tuple[str, str | None]:
    """Divides a model's name into that of its repository and its revision; a folder has none.

    Example:
        >>> split_revision("huggyllama/llama-7b@4782ad2")
        ('huggyllama/llama-7b', '4782ad2')
        >>> split_revision("huggyllama/llama-7b")
        ('huggyllama/llama-7b', None)
    """
    name, at, revision = model.rpartition("@")
    return (name, revision) if at and not Path(model).exists() else (model, None)


class Recipe(Strict):
    """What every run has: what is trained, on what, how, and where the result goes.

    Attributes:
        task: Name of what is trained on.
        data: Folder of the data; `null` for tasks that come with the package. No part of the fingerprint: a result
            carries the fingerprint of the data itself.
        model: What is fine-tuned. A name on the hub may end with `@` and a revision: a commit, a branch or a tag.
        method: What is trained.
        optimizer: The optimiser and its schedule.
        protocol: Name of the protocol that the settings come from, or `null`.
        seed: Seeds what is new in the model, the adapter, the augmentation and the order of the data.
        precision: Of the arithmetic.
        compile: Uses `torch.compile`.
        data_workers: Processes that prepare data; with 0 the training process does.
        checkpoint_steps: Steps between checkpoints, 0 for none; resuming continues from the last one.
        output: Folder of the run; no part of the fingerprint.
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
    data_workers: int = Field(ge=0)
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
        """Writes the recipe as YAML, keys in the order of the class."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


VALIDATION = {"train800val200": "train800+val200", "trainval": "train+val"}
"""Splits that join a training and a validation split, with the names of both."""


def check_splits(train_split: str, eval_split: str, selection: str) -> None:
    """Raises `ValueError` where a model would be scored, or chosen, by what it was trained with."""
    train = VALIDATION.get(train_split, train_split)
    if eval_split in train.split("+"):
        apart = train.split("+")[0]
        raise ValueError(f"eval_split|{eval_split} is part of {train_split}; train with {apart}, or score on test")
    if selection == "best-val" and train_split in VALIDATION:
        raise ValueError(
            f"selection|{train_split} contains the validation split, so best-val would choose by what was "
            f"trained with; train with {VALIDATION[train_split].split('+')[0]}"
        )


def check_weights(kind: str, weights: str) -> None:
    """Raises `ValueError` where a method cannot train a model of language whose weights are kept so."""
    if kind == "linear":
        raise ValueError("method|linear trains a new head alone, and a language model has none; take another")
    if kind in ("full", "norm", "bitfit") and weights in ("nf4", "int8", "fp16"):
        raise ValueError(f"weights|{kind} trains the weights, and {weights} cannot be trained")


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


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Any:
    """Reads and checks a recipe.

    Args:
        name: Path of a YAML file, or the name of a shipped recipe.
        overrides: Values by dotted key, or as `key=value` texts whose values are read as YAML.

    Returns:
        The recipe, frozen: an `ImageRecipe` or a `TextRecipe`, as its keys say.

    Raises:
        SanError: If anything is wrong with it; the message lists every problem with its place.
    """
    file = read_file(find(name), overrides)
    return check_file(recipe_class(file.data), file)
