"""Recipes for instruction tuning of language models.

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
"""Training tasks; the first two also have single tasks, such as `mini-language/easy`."""


class Text(Strict):
    """Text preprocessing; see `san_bench.language.prompts`.

    Attributes:
        template: Prompt template: `clean`, or `legacy` with the exact whitespace of the published code.
        loss_on: `full` for all tokens, or `answer` for the output only.
        cutoff: Maximum number of tokens per record.
        pad: Padding token; see `san_bench.language.tokenizer.prepare_tokenizer`.
        packing: Packs a batch into one row without padding; attention stays within each record.
    """

    template: Literal["legacy", "clean"]
    loss_on: Literal["full", "answer"]
    cutoff: int = Field(ge=2, le=2**24)
    pad: str = Field(min_length=1)
    packing: bool


class Scoring(Strict):
    """Evaluation settings; see `san_bench.language.generation` and `san_bench.language.likelihood`.

    Attributes:
        ways: Scoring methods; the first gives the accuracy of the run. `generation`: the first answer in the generated
            text counts. `likelihood`: the most likely answer counts. `exact`: the generated text must equal the output
            of the record. `lm-eval`: the tasks of lm-eval, which downloads its own data and only scores the test split.
        batch_size: Evaluation batch size.
        beams: Number of beams; 1 is greedy decoding.
        max_new_tokens: Maximum number of new tokens.
    """

    ways: Annotated[
        tuple[Literal["generation", "likelihood", "exact", "lm-eval"], ...], Field(min_length=1, strict=False)
    ]
    batch_size: int = Field(ge=1, le=2**20)
    beams: int = Field(ge=1, le=1024)
    max_new_tokens: int = Field(ge=1, le=2**20)

    @field_validator("ways")
    @classmethod
    def _once(cls, ways: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(ways)) < len(ways):
            raise ValueError(f"{', '.join(ways)} has a duplicate")
        return ways


class TextRecipe(Recipe):
    """Recipe of a language model run; see `Recipe` for the common settings.

    Attributes:
        task: Training task; see `san_bench.language.tasks.load_text_task`. A run is evaluated on all tasks of its data.
        data: Data folder, or a dataset on the Hugging Face hub; `null` for mini-language.
        train_split: `train`, or `trainval`, which includes the held-out records.
        eval_split: Split for the evaluation after training.
        model: `embedded/decoder` (the small LLaMA that ships with the package), `real/smollm2` (see
            `san_bench.models.real`), a folder, or a name on the Hugging Face hub, which may end with `@` and a
            revision.
        weights: Dtype of the pretrained weights, or quantization by bitsandbytes: `nf4` (QLoRA, with double
            quantization) or `int8`. Trainable parameters are in float32.
        text: Text preprocessing.
        scoring: Evaluation settings.
        gradient_checkpointing: Recomputes activations in the backward pass to save memory.
        selection: Checkpoint selection. `last`: after the last step. `best-val`: the epoch with the smallest validation
            loss.
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
            raise ValueError(f"scoring|lm-eval supports the commonsense tasks, but not {self.task}")
        if self.scoring.ways == ("lm-eval",) and self.eval_split != "test":
            raise ValueError("eval_split|lm-eval uses its own evaluation data; set eval_split to test")
        return self
