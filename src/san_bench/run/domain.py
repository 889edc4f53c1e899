"""The interface of a data modality: loading the model and data, and scoring. The training loop is shared by all."""

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
    """Data, collators and losses for transformers' Trainer.

    Attributes:
        dataset: Training set.
        collate: Training collator, with augmentation if there is any.
        plain: Evaluation collator.
        chosen_by: Validation set for selecting the best epoch, or `None`.
        metric: Metric for selecting the best epoch: `accuracy` (maximised) or `loss` (minimised).
        loss: Computes the training loss and outputs, or `None` for the model's own loss.
        mean_of_parts: Whether the loss of a batch is the mean over micro-batches, instead of over all predicted tokens
            of the batch.
        average: Decay of an exponential moving average of the weights, or `None`.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        rates: Learning rates of parameter groups, by a substring of the parameters' names.
        batches: Makes a batch sampler from the batch size per device and the number of devices; by default batches are
            sampled from the whole dataset.
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
    """Scores of a model on a split.

    Attributes:
        numbers: Entries of the result: accuracy, number of correct predictions and `n_test`; with several tasks also
            `tasks`, with the same numbers per task.
        files: Contents of the files to save beside the result, such as predictions, by file name.
    """

    numbers: dict[str, Any]
    files: dict[str, bytes]

    def save(self, folder: Path) -> None:
        """Writes the files into a folder, each atomically."""
        for name, content in self.files.items():
            write_atomically(folder / name, content)


@dataclass(frozen=True)
class Findings:
    """Findings of the data validation before a run.

    Attributes:
        remarks: Lines to print.
        errors: Problems that stop the run.
        files: Contents of the files to save in the folder of the run, by file name.
    """

    remarks: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


class Domain(ABC):
    """A recipe with its data.

    Attributes:
        recipe: The recipe.
        task: Its training and evaluation data.
        items: Plural noun for the samples of a batch, such as images.
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
        """Number of training samples."""

    def inspect(self) -> Findings:
        """Validates the data that a run will read, before the training rather than after it."""
        return Findings()

    @classmethod
    @abstractmethod
    def companions(cls, recipe: Any) -> Any:
        """Loads the preprocessing of a model: an image processor, a tokenizer or a multimodal processor.

        Raises:
            SanError: If it is missing or invalid.
        """

    def facts(self) -> dict[str, Any]:
        """Returns the entries of a result that are specific to this modality."""
        return {}

    @abstractmethod
    def base_model(self) -> nn.Module:
        """Loads the pretrained model; new parameters are initialised from the recipe's seed."""

    @abstractmethod
    def trained_model(self, folder: Path) -> nn.Module:
        """Loads a full model that a run has saved."""

    @abstractmethod
    def training(self, model: Any) -> Training:
        """Prepares the model for training, and returns the data, collators and losses."""

    @abstractmethod
    def probe(self, size: int) -> Batch:
        """Returns a batch of evaluation data, to compare the outputs of two models."""

    @abstractmethod
    def score(self, model: Any, split: str) -> Scores:
        """Evaluates a model on a split.

        Raises:
            SanError: If the split does not exist, or the model predicts values that are not finite.
        """

    @abstractmethod
    def save_companions(self, folder: Path) -> None:
        """Saves the preprocessing of the model: an image processor or a tokenizer."""

    def save_labels(self, folder: Path) -> None:  # noqa: B027 - most modalities have no classes
        """Saves the names of the classes beside an adapter, whose configuration has no place for them."""


def domain_of(recipe: Recipe) -> Domain:
    """Loads the data of a recipe.

    Raises:
        SanError: If it is missing or invalid.
    """
    return domain_class(recipe)(recipe)  # type: ignore[call-arg]  # each subclass takes its recipe


def check_companions(recipe: Recipe) -> None:
    """Checks the preprocessing files of a recipe's model, as a run does before training; reads no data or weights.

    Raises:
        SanError: If a file that a run needs is missing or invalid.
    """
    domain_class(recipe).companions(recipe)
