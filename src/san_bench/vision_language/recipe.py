"""Recipes of models that see and speak, which are fine-tuned on conversations about images.

Example:
    >>> from san_bench.config.recipe import load_recipe
    >>> recipe = load_recipe("vision-language/llava-1.5-7b-san-lora")
    >>> recipe.tower, recipe.projector_lr, recipe.conversation.max_length
    ('frozen', 2e-05, 2048)
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from san_bench.config.recipe import Recipe, check_splits, check_weights
from san_bench.config.strict import Strict, suggest

TASKS = ("llava", "conversations", "mini-vl")
"""What there is to train on."""

BENCHMARKS = ("vqav2", "gqa", "vizwiz", "sqa", "textvqa", "pope", "mmbench")
"""The seven benchmarks of LLaVA-1.5, in the order of the papers' tables."""


class Talk(Strict):
    """How a conversation becomes what the model reads; see `san_bench.vision_language.encoding`.

    Attributes:
        max_length: The most tokens of a conversation, those of its image included.
        pad_to_square: Pads images to squares with the processor's mean colour, as LLaVA-1.5 does; false for models that
            cut images into tiles, LLaVA-NeXT and LLaVA-OneVision.
        drop_bad_images: Leaves out the conversations whose images are missing or cannot be read; otherwise such images
            stop the run before it begins.
    """

    max_length: int = Field(ge=2)
    pad_to_square: bool
    drop_bad_images: bool


class Answering(Strict):
    """What is asked after the training.

    Attributes:
        benchmarks: Some of `BENCHMARKS` for `llava`; none elsewhere, where there are questions of one's own.
        batch_size: Questions at a time.
        max_new_tokens: The most tokens of an answer, which is decoded greedily.
    """

    benchmarks: Annotated[tuple[str, ...], Field(strict=False)]
    batch_size: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)

    @field_validator("benchmarks")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in BENCHMARKS:
                raise ValueError(f"there is no benchmark {name!r}.{suggest(name, BENCHMARKS)[:-1]}")
        if len(set(names)) < len(names):
            raise ValueError(f"{', '.join(names)} names one of them twice")
        return names


class ConversationRecipe(Recipe):
    """One run of a model that sees and speaks; what is not said here says `Recipe`.

    Attributes:
        task: What is trained on; see `san_bench.vision_language.tasks.load_conversation_task`.
        data: Folder of the records, the images and the benchmarks; `null` for `mini-vl`.
        train_split: `train`: all records; of `mini-vl` also `trainval`: with what is held out as well.
        eval_split: `test`: what can be scored without a server; of `mini-vl` also `val`.
        model: `embedded/llava` (the small LLaVA of the package), a folder, or a name that transformers resolves, of
            LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision, with its processor. For the last two it must have a chat template.
        weights: In what the pretrained weights are kept: a type of numbers, or quantised by bitsandbytes to `nf4` or
            `int8`. What is trained is in float32 until it is saved.
        tower: Whether the vision tower stays `frozen` or is `adapted` by the method as the language model is.
        projector_lr: Learning rate of the projector between the two, which is trained whole; `null` freezes it.
        conversation: How a conversation becomes what the model reads.
        answering: What is asked after the training.
        gradient_checkpointing: Computes activations anew in the backward pass, which saves memory and costs time.
        selection: The weights after the last step.
    """

    train_split: Literal["train", "trainval"]
    eval_split: Literal["val", "test"]
    weights: Literal["fp32", "bf16", "fp16", "nf4", "int8"]
    tower: Literal["frozen", "adapted"]
    projector_lr: float | None = Field(gt=0)
    conversation: Talk
    answering: Answering
    gradient_checkpointing: bool
    selection: Literal["last"]

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}.{suggest(task, TASKS)[:-1]}")
        return task

    @model_validator(mode="after")
    def _fits(self) -> ConversationRecipe:
        if self.data is None and self.task != "mini-vl":
            raise ValueError(f"data|{self.task} needs the folder of its records and images")
        check_splits(self.train_split, self.eval_split, self.selection)
        for key, split in (("train_split", self.train_split), ("eval_split", self.eval_split)):
            if self.task != "mini-vl" and split in ("val", "trainval"):
                raise ValueError(f"{key}|{self.task} holds nothing out, so it has no {split}; only mini-vl has")
        check_weights(self.method.kind, self.weights)
        if bool(self.answering.benchmarks) != (self.task == "llava"):
            what = "names none of them" if self.task == "llava" else "has questions of its own in place of benchmarks"
            raise ValueError(f"answering|{self.task} {what}; benchmarks are {', '.join(BENCHMARKS)}")
        return self
