"""Recipes for vision-language models, fine-tuned on conversations about images.

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
"""Training tasks."""

BENCHMARKS = ("vqav2", "gqa", "vizwiz", "sqa", "textvqa", "pope", "mmbench")
"""The seven benchmarks of LLaVA-1.5, in the order of the papers' tables."""


class Talk(Strict):
    """Conversation preprocessing; see `san_bench.vision_language.encoding`.

    Attributes:
        max_length: Maximum number of tokens of a conversation, including image tokens.
        pad_to_square: Pads images to squares with the processor's mean colour, as LLaVA-1.5 does; false for models with
            tiles, LLaVA-NeXT and LLaVA-OneVision.
        drop_bad_images: Drops conversations whose image is missing or unreadable; otherwise such images stop the run
            before training.
    """

    max_length: int = Field(default=2048, ge=2, le=2**24)
    pad_to_square: bool = False
    drop_bad_images: bool = False


class Answering(Strict):
    """Evaluation settings.

    Attributes:
        benchmarks: A subset of `BENCHMARKS` for `llava`; empty for other tasks, which have their own questions.
        batch_size: Evaluation batch size.
        max_new_tokens: Maximum number of new tokens; decoding is greedy.
    """

    benchmarks: Annotated[tuple[str, ...], Field(strict=False)] = ()
    batch_size: int = Field(default=16, ge=1, le=2**20)
    max_new_tokens: int = Field(default=64, ge=1, le=2**20)

    @field_validator("benchmarks")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in BENCHMARKS:
                raise ValueError(f"there is no benchmark {name!r}.{suggest(name, BENCHMARKS)[:-1]}")
        if len(set(names)) < len(names):
            raise ValueError(f"{', '.join(names)} has a duplicate")
        return names


class ConversationRecipe(Recipe):
    """Recipe of a vision-language run; see `Recipe` for the common settings.

    Attributes:
        task: Training task; see `san_bench.vision_language.tasks.load_conversation_task`.
        data: Folder of records, images and benchmarks; `null` for `mini-vl`.
        train_split: `train`; for `mini-vl` also `trainval`, which includes the held-out records.
        eval_split: `test`: splits that can be scored without a server; for `mini-vl` also `val`.
        model: `embedded/llava` (the small LLaVA that ships with the package), a folder, or a name that transformers
            resolves, of LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision, with its processor. The last two need a chat
            template.
        weights: Dtype of the pretrained weights, or quantization by bitsandbytes to `nf4` or `int8`. Trainable
            parameters are in float32.
        tower: Whether the vision tower is `frozen`, or `adapted` by the method like the language model.
        projector_lr: Learning rate of the fully trained projector; `null` freezes it.
        conversation: Conversation preprocessing.
        answering: Evaluation settings.
        gradient_checkpointing: Recomputes activations in the backward pass to save memory.
        selection: Checkpoint selection: after the last step.
    """

    train_split: Literal["train", "trainval"] = "train"
    eval_split: Literal["val", "test"] = "test"
    weights: Literal["fp32", "bf16", "fp16", "nf4", "int8"] = "fp32"
    tower: Literal["frozen", "adapted"] = "frozen"
    projector_lr: float | None = Field(default=None, gt=0)
    conversation: Talk
    answering: Answering = Answering()
    gradient_checkpointing: bool = False
    selection: Literal["last"] = "last"

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}.{suggest(task, TASKS)[:-1]}")
        return task

    @model_validator(mode="after")
    def _fits(self) -> ConversationRecipe:
        if self.data is None and self.task != "mini-vl":
            raise ValueError(f"data|{self.task} needs a data folder with records and images")
        check_splits(self.train_split, self.eval_split, self.selection)
        for key, split in (("train_split", self.train_split), ("eval_split", self.eval_split)):
            if self.task != "mini-vl" and split in ("val", "trainval"):
                raise ValueError(f"{key}|{self.task} has no held-out records, so no {split}; only mini-vl has")
        if self.eval_steps:
            raise ValueError("eval_steps|vision-language runs have no evaluation during training; set it to 0")
        check_weights(self.method.kind, self.weights)
        if bool(self.answering.benchmarks) != (self.task == "llava"):
            what = (
                "needs at least one benchmark"
                if self.task == "llava"
                else "has its own questions instead of benchmarks"
            )
            raise ValueError(f"answering|{self.task} {what}; benchmarks are {', '.join(BENCHMARKS)}")
        return self
