"""Recipes of language models that are fine-tuned on instructions.

Example:
    >>> from san_bench.config.recipe import load_recipe
    >>> recipe = load_recipe("language/llama-7b-lora", {"output": "runs/llama"})
    >>> recipe.text.loss_on, recipe.method.rank, recipe.optimizer.lr
    ('full', 32, 0.0003)
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from san_bench.config.recipe import Recipe, check_splits, check_weights
from san_bench.config.strict import Strict, suggest

TASKS = ("mini-language", "commonsense", "instructions")
"""What there is to train on; the first two also have tasks of their own, such as `mini-language/easy`."""


class Text(Strict):
    """How a record becomes what the model reads; see `san_bench.language.prompts`.

    Attributes:
        template: `clean`, or `legacy`: as published, to the last blank.
        loss_on: `full` for all tokens, or `answer` for what the model should write.
        cutoff: The most tokens of a record.
        pad: What fills up a batch; see `san_bench.language.tokenizer.prepare_tokenizer`.
        packing: Joins the records of a batch into one row without padding, in which each sees itself alone.
    """

    template: Literal["legacy", "clean"]
    loss_on: Literal["full", "answer"]
    cutoff: int = Field(ge=2)
    pad: str = Field(min_length=1)
    packing: bool


class Scoring(Strict):
    """How answers are found; see `san_bench.language.generation` and `san_bench.language.likelihood`.

    Attributes:
        ways: `generation`: the model writes, and the first answer in what it writes counts. `likelihood`: the answer
            that it finds likeliest counts. `exact`: the model writes the record's output word for word. `lm-eval`: the
            tasks of lm-eval, which fetches its own data, and scores tests alone. The first one is the accuracy of the
            run.
        batch_size: Questions at a time.
        beams: Beams of the search; 1 is greedy.
        max_new_tokens: The most tokens that are written.
    """

    ways: Annotated[
        tuple[Literal["generation", "likelihood", "exact", "lm-eval"], ...], Field(min_length=1, strict=False)
    ]
    batch_size: int = Field(ge=1)
    beams: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)

    @field_validator("ways")
    @classmethod
    def _once(cls, ways: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(ways)) < len(ways):
            raise ValueError(f"{', '.join(ways)} names one of them twice")
        return ways


class TextRecipe(Recipe):
    """One run of a language model; what is not said here says `Recipe`.

    Attributes:
        task: What is trained on; see `san_bench.language.tasks.load_text_task`. One run is scored on all tasks that its
            data has questions of.
        data: Folder of the data, or a data set on the Hugging Face hub; `null` for mini-language.
        train_split: `train`, or `trainval`: with what is held out as well.
        eval_split: What is scored once, after training.
        model: `embedded/decoder` (the small LLaMA of the package), `real/smollm2` (see `san_bench.models.real`), a
            folder, or a name on the Hugging Face hub, which may end with `@` and a revision.
        weights: In what the pretrained weights are kept: a type of numbers, or quantised by bitsandbytes to `nf4` (as
            QLoRA has it, with double quantisation) or `int8`. What is trained is in float32 until it is saved.
        text: How a record becomes what the model reads.
        scoring: How answers are found.
        gradient_checkpointing: Computes activations anew in the backward pass, which saves memory and costs time.
        selection: `last`: the weights after the last step. `best-val`: those of the epoch with the smallest loss on
            the held-out records.
    """

    train_split: Literal["train", "trainval"]
    eval_split: Literal["val", "test"]
    weights: Literal["fp32", "bf16", "fp16", "nf4", "int8"]
    text: Text
    scoring: Scoring
    gradient_checkpointing: bool
    selection: Literal["last", "best-val"]

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in TASKS and not task.startswith(("mini-language/", "commonsense/")):
            raise ValueError(f"unknown task {task!r}.{suggest(task, TASKS)[:-1]}")
        return task

    @model_validator(mode="after")
    def _fits(self) -> TextRecipe:
        check_splits(self.train_split, self.eval_split, self.selection)
        check_weights(self.method.kind, self.weights)
        if "lm-eval" in self.scoring.ways and not self.task.startswith("commonsense"):
            raise ValueError(f"scoring|lm-eval has the tasks of commonsense, but none of {self.task}")
        if self.scoring.ways == ("lm-eval",) and self.eval_split != "test":
            raise ValueError("eval_split|lm-eval decides itself what it scores; only test goes with it")
        return self
