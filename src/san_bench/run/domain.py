"""What a kind of data brings to a run: the model, what it reads, and how it is scored. Training is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from san_bench.config.recipe import Recipe
from san_bench.kinds import domain_class
from san_bench.run.provenance import write_atomically

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """What transformers' Trainer reads.

    Attributes:
        dataset: The items to train with.
        collate: Makes a batch to train with out of items.
        plain: Makes a batch to score with out of items.
        chosen_by: The items that the best epoch is chosen by, or `None`.
        metric: What the best epoch is chosen by: `accuracy`, which should be large, or `loss`, which should be small.
        loss: Computes loss and outputs of the model in training, or `None` for the model's own loss.
        mean_of_parts: Whether the loss of a batch is the mean over its parts, else over all that is predicted in it.
        average: Decay of a moving average of the weights, or `None`.
        gradient_checkpointing: Whether activations are computed anew in the backward pass.
        rates: Learning rates of parts of the model, by what the names of their parameters contain.
        batches: Makes a batch sampler of a batch's size on one device, and the number of devices; by default batches
            are drawn from all of the data.
    """

    dataset: Any
    collate: Callable[[list[Any]], Batch]
    plain: Callable[[list[Any]], Batch]
    chosen_by: Any | None
    metric: str
    loss: Callable[[Any, Batch], tuple[Tensor, Any]] | None
    mean_of_parts: bool
    average: float | None = None
    gradient_checkpointing: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    batches: Callable[[int, int], Any] | None = None


@dataclass(frozen=True)
class Scores:
    """How a model did.

    Attributes:
        numbers: For the result: accuracy, how many were right, `n_test`; where several tasks were scored also `tasks`
            with these of each.
        files: What is kept beside it, by name.
    """

    numbers: dict[str, Any]
    files: dict[str, bytes]

    def save(self, folder: Path) -> None:
        """Writes the files into a folder, each of them whole or not at all."""
        for name, content in self.files.items():
            write_atomically(folder / name, content)


@dataclass(frozen=True)
class Findings:
    """What was found of the data before a run.

    Attributes:
        remarks: What a user should know, in lines.
        errors: What stops the run.
        files: What is kept of it in the folder of the run, by name.
    """

    remarks: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


class Domain(ABC):
    """A recipe with its data.

    Attributes:
        recipe: The recipe.
        task: Its data: what is trained with and what is scored.
        items: What a batch is counted in, such as images.
    """

    recipe: Any
    task: Any
    items: str

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data."""
        return self.task.fingerprint

    @property
    @abstractmethod
    def n_train(self) -> int:
        """How many items are trained with."""

    def inspect(self) -> Findings:
        """Looks at what a run will read: what is wrong with it is better known before the training than after it."""
        return Findings()

    @classmethod
    @abstractmethod
    def companions(cls, recipe: Any) -> Any:
        """Loads what a model needs beside its weights: how it wants images, a tokenizer, or a processor.

        Raises:
            SanError: If it is missing, or cannot be used.
        """

    def facts(self) -> dict[str, Any]:
        """Returns what a result says beside what all results say."""
        return {}

    @abstractmethod
    def base_model(self) -> nn.Module:
        """Loads the pretrained model; what is new in it comes from the recipe's seed."""

    @abstractmethod
    def trained_model(self, folder: Path) -> nn.Module:
        """Loads a whole model that a run has saved."""

    @abstractmethod
    def training(self, model: Any) -> Training:
        """Makes the model ready to be trained, and returns what it is trained with."""

    @abstractmethod
    def probe(self, size: int) -> Batch:
        """Returns a batch of what is scored, to compare outputs of two models by."""

    @abstractmethod
    def score(self, model: Any, split: str) -> Scores:
        """Scores a model.

        Raises:
            SanError: If there is no such split, or the model predicts values that are not finite.
        """

    @abstractmethod
    def save_companions(self, folder: Path) -> None:
        """Writes what a model needs beside its weights to be used: settings of images, or a tokenizer."""


def domain_of(recipe: Recipe) -> Domain:
    """Loads the data of a recipe.

    Raises:
        SanError: If it is missing, or not as it must be.
    """
    return domain_class(recipe)(recipe)  # type: ignore[call-arg]  # each takes its recipe


def check_companions(recipe: Recipe) -> None:
    """Looks at what lies beside the model of a recipe, as a run does before it trains; reads neither data nor weights.

    Raises:
        SanError: If something that a run needs is missing, or cannot be used.
    """
    domain_class(recipe).companions(recipe)
