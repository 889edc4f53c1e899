"""Image classification: a pretrained model with a new head, training data, and evaluation from logits."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from san_bench.config.errors import cause_of, loading
from san_bench.config.recipe import VALIDATION
from san_bench.image.preprocess import InputSettings, Prepared, input_settings, mixing
from san_bench.image.recipe import ImageRecipe
from san_bench.image.splits import Split, VisionTask
from san_bench.image.survey import decode_all
from san_bench.image.tasks import load_task
from san_bench.models.adapt import head_of
from san_bench.models.checkpoint import checkpoint_of
from san_bench.models.weights import misfits
from san_bench.run.domain import Batch, Domain, Findings, Scores, Training
from san_bench.run.provenance import write_atomically
from san_peft.errors import SanError


def recipe_task(recipe: ImageRecipe) -> VisionTask:
    """Loads the task of a recipe."""
    return load_task(recipe.task, Path(recipe.data) if recipe.data else None, recipe.holdout)


def prepared(split: Split, recipe: ImageRecipe) -> Prepared:
    """Returns a split with the evaluation preprocessing of a recipe."""
    return Prepared(split, Images.companions(recipe))


def predict(model: Any, split: Split, recipe: ImageRecipe) -> Float[Tensor, "n classes"]:
    """Returns the logits of a split, on the CPU in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_eval_batch_size=64,
            bf16_full_eval=False,
            bf16=recipe.precision == "bf16",
            fp16=recipe.precision == "fp16" and torch.cuda.is_available(),
            dataloader_num_workers=recipe.data_workers,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            label_names=["labels"],
            report_to=[],
        )
        output = Trainer(model=model, args=arguments).predict(prepared(split, recipe))  # type: ignore[arg-type]
    return torch.as_tensor(output.predictions).float()


def score_logits(logits: Float[Tensor, "n classes"], split: Split) -> dict[str, Any]:
    """Returns accuracy, number correct, number of images, and a hash of the predicted classes."""
    predicted = logits.argmax(-1)
    correct = int((predicted == torch.from_numpy(split.labels)).sum())
    digest = hashlib.sha256(predicted.numpy().astype("<i8").tobytes()).hexdigest()
    return {"accuracy": correct / len(split), "correct": correct, "n_test": len(split), "predictions_sha256": digest}


def load_predictions(run: Path) -> Float[Tensor, "n classes"]:
    """Loads the saved logits of a run.

    Raises:
        SanError: If they are missing or damaged.
    """
    file = Path(run) / "predictions.safetensors"
    with loading(f"{file}", f"`san eval {run}` predicts again."):
        return load_file(file)["logits"]


def base_model(recipe: ImageRecipe, task: VisionTask) -> nn.Module:
    """Loads the pretrained model in float32 with a new head, initialized with the seed of the recipe.

    timm models load as `TimmWrapperForImageClassification` of transformers.
    """
    set_seed(recipe.seed)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a new head is expected
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    checkpoint = checkpoint_of(recipe)
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, num_labels=task.num_classes, **checkpoint.options)
        if isinstance(options := getattr(config, "model_args", None), dict):
            options.pop("num_classes", None)  # the size of timm's old head would be given twice
        _set_drop_path(config, recipe)
        if task.names:
            config.id2label = dict(enumerate(task.names))
            config.label2id = {name: index for index, name in config.id2label.items()}
        model, report = AutoModelForImageClassification.from_pretrained(
            checkpoint.path,
            **checkpoint.options,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # only for the head, checked below
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises errors of many types for another kind of model and damaged files
        raise SanError(
            f"{recipe.model} cannot be loaded as an image classification model: {cause_of(error)} Set model to a "
            "folder, a name on the hub, or embedded."
        ) from error
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
    strange = [key for key in misfits(report) if not key.startswith(f"{head_of(model)}.")]
    if strange:
        raise SanError(
            f"{recipe.model} holds no fitting weights for {len(strange)} parameters of its {type(model).__name__}, "
            f"such as {strange[0]}. Only the head may be new."
        )
    return model


def _set_drop_path(config: Any, recipe: ImageRecipe) -> None:
    """Sets the stochastic depth rate of a model configuration.

    Raises:
        SanError: If the model does not support it.
    """
    if hasattr(config, "pretrained_cfg"):  # timm wrapper of transformers
        if recipe.drop_path:
            config.model_args = {**(config.model_args or {}), "drop_path_rate": recipe.drop_path}
    elif hasattr(config, "drop_path_rate"):
        config.drop_path_rate = recipe.drop_path
    elif recipe.drop_path:
        raise SanError(
            f"drop_path is {recipe.drop_path:g}, but {config.model_type} of transformers has no stochastic depth. Set "
            "it to 0, or use the timm model."
        )


@dataclass(frozen=True)
class Collate:
    """Collates a training batch.

    Attributes:
        mix: Mixup and cutmix of timm, for batches of even size, or `None`.
        num_classes: Number of classes.
        channels_last: Uses the channels-last memory format.
    """

    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    num_classes: int
    channels_last: bool

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns `pixel_values` and `labels`: class indices, or soft labels with mixup or cutmix."""
        batch = default_collate(items)
        if self.mix is not None and len(items) % 2 == 0:
            batch["pixel_values"], batch["labels"] = self.mix(batch["pixel_values"], batch["labels"])
        elif self.mix is not None:  # the last batch of an epoch may be odd
            batch["labels"] = F.one_hot(batch["labels"], self.num_classes).float()
        if self.channels_last:
            batch["pixel_values"] = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        return batch


class Images(Domain):
    """Image classification domain of a recipe.

    Args:
        recipe: The recipe.
        task: Its task; loaded by default.
    """

    items = "images"

    def __init__(self, recipe: ImageRecipe, task: VisionTask | None = None) -> None:
        self.recipe: ImageRecipe = recipe
        self.task = task or recipe_task(recipe)

    @property
    def n_train(self) -> int:
        """Number of training images."""
        return len(self.task[self.recipe.train_split])

    def inspect(self) -> Findings:
        """Checks that preprocessing settings are available, and decodes every image that was not decoded before."""
        try:
            self.companions(self.recipe)
        except SanError as error:
            return Findings(errors=(str(error),))
        problems = decode_all(self.task, progress=sys.stderr.isatty())
        warnings = [f"warning: {problem}" for problem in problems if problem.level == "warning"]
        errors = [str(problem) for problem in problems if problem.level == "error"]
        return Findings((*self.task.remarks, *warnings), tuple(errors))

    def facts(self) -> dict[str, Any]:
        """Returns the names of the classes, if they are known."""
        return {"class_names": list(self.task.names)} if self.task.names else {}

    @classmethod
    def companions(cls, recipe: ImageRecipe) -> InputSettings:
        """Returns the preprocessing settings.

        Raises:
            SanError: If neither recipe nor checkpoint has them.
        """
        checkpoint = checkpoint_of(recipe)
        return input_settings(recipe.input, checkpoint.path, **checkpoint.options)

    def base_model(self) -> nn.Module:
        """Loads the pretrained model with a new head; see `base_model`."""
        return base_model(self.recipe, self.task)

    def trained_model(self, folder: Path) -> nn.Module:
        """Loads a fully trained model with its head."""
        with loading(f"The model in {folder}", "Train the run again, with another output."):
            return AutoModelForImageClassification.from_pretrained(folder)

    def training(self, model: Any) -> Training:
        """Returns the training setup; with `channels_last`, also converts the memory format of the model."""
        recipe, evaluates = self.recipe, self.recipe.evaluates
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        settings = self.companions(recipe)
        collate = Collate(
            mixing(recipe.augmentation, self.task.num_classes), self.task.num_classes, recipe.channels_last
        )
        chosen_by = Prepared(self.task[_chosen_by(recipe, self.task)], settings) if evaluates else None
        return Training(
            dataset=Prepared(self.task[recipe.train_split], settings, recipe.augmentation),
            collate=collate,
            plain=default_collate,
            chosen_by=chosen_by,
            metric="accuracy",
            loss=Loss(collate.mix is not None, recipe.augmentation.smoothing).of,
            mean_of_parts=True,
            average=recipe.ema,
        )

    def probe(self, size: int) -> Batch:
        """Returns the first evaluation images."""
        return {"pixel_values": prepared(self.task[self.recipe.eval_split], self.recipe).batch(size)}

    def score(self, model: Any, split: str) -> Scores:
        """Returns accuracy, n, a hash of the predictions, and the logits as `predictions.safetensors`.

        If the classes have names, `classes.json` counts the images and the correct predictions of each.
        """
        chosen = self.task[split]
        logits = predict(model, chosen, self.recipe)
        if not logits.isfinite().all():
            raise SanError(
                f"{self.recipe.output} predicts values that are not finite. Try a smaller optimizer.lr, with another "
                "output."
            )
        files = {"predictions.safetensors": save({"logits": logits.contiguous()})}
        if self.task.names:
            files["classes.json"] = _by_class(logits, chosen, self.task.names)
        return Scores(score_logits(logits, chosen), files)

    def save_companions(self, folder: Path) -> None:
        """Copies the `preprocessor_config.json` of the pretrained model."""
        settings = Path(checkpoint_of(self.recipe).path) / "preprocessor_config.json"
        if settings.is_file():
            shutil.copyfile(settings, folder / settings.name)

    def save_labels(self, folder: Path) -> None:
        """Writes `labels.json`: the name of each class by its index, as `id2label` in a configuration."""
        if self.task.names:
            text = json.dumps(dict(enumerate(self.task.names)), indent=2, ensure_ascii=False)
            write_atomically(folder / "labels.json", text + "\n")


@dataclass(frozen=True)
class Loss:
    """Training loss: cross-entropy.

    Attributes:
        mixed: Whether mixup or cutmix is on; labels are then already smoothed.
        smoothing: Label smoothing.
    """

    mixed: bool
    smoothing: float

    @property
    def of(self) -> Callable[[Any, Batch], tuple[Tensor, Any]] | None:
        """Function that computes loss and outputs; `None` to use the loss of the model."""
        return self._of if self.mixed or self.smoothing else None

    def _of(self, model: Any, batch: Batch) -> tuple[Tensor, Any]:
        outputs = model(pixel_values=batch["pixel_values"])
        smoothing = 0.0 if self.mixed else self.smoothing
        return F.cross_entropy(outputs.logits, batch["labels"], label_smoothing=smoothing), outputs


def _by_class(logits: Float[Tensor, "n classes"], split: Split, names: tuple[str, ...]) -> bytes:
    correct = (logits.argmax(-1) == torch.from_numpy(split.labels)).numpy()
    rows = []
    for index, name in enumerate(names):
        of = split.labels == index
        rows.append({"class": name, "n": int(of.sum()), "correct": int(correct[of].sum())})
    return (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode()


def _chosen_by(recipe: ImageRecipe, task: VisionTask) -> str:
    """Returns the split for selecting the best epoch."""
    if recipe.selection == "best-test":
        return recipe.eval_split
    names = [joined.split("+")[1] for joined in VALIDATION.values()]
    return next((name for name in names if name in task.splits), names[0])
