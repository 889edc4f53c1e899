"""Recipes for instruction tuning of language models.

Example:
    >>> from san_bench.config.recipe import load_recipe
    >>> recipe = load_recipe("language/llama-7b-lora", {"output": "runs/llama"})
    >>> recipe.text.loss_on, recipe.method.rank, recipe.optimizer.lr
    ('full', 32, 0.0003)
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from san_bench.config.recipe import Recipe, check_splits, check_weights
from san_bench.config.strict import Strict, later, suggest

TASKS = ("mini-language", "commonsense", "instructions")
"""Training tasks; the first two also have single tasks, such as `mini-language/easy`."""


class Text(Strict):
    """Text preprocessing; see `san_bench.language.prompts`.

    Attributes:
        template: Prompt template: `clean`, or `legacy` with the exact whitespace of the published code.
        loss_on: `full` for all tokens, or `answer` for the output only: in conversations, the turns of the assistant. A
            `text` without a prompt has loss on all tokens.
        cutoff: Maximum number of tokens per record.
        pad: Padding token; see `san_bench.language.tokenizer.prepare_tokenizer`.
        packing: Packs a batch into one row without padding; attention stays within each record.
        chat_template: Chat template of conversations: a file, or one of
            `san_bench.language.chat.CHAT_TEMPLATES`; by default the tokenizer's own.
    """

    template: Literal["legacy", "clean"] = "clean"
    loss_on: Literal["full", "answer"] = "answer"
    cutoff: int = Field(1024, ge=2, le=2**24)
    pad: str = Field("auto", min_length=1)
    packing: bool = False
    chat_template: str | None = later(None, unused=True, min_length=1)


class Source(Strict):
    """Where records come from.

    Attributes:
        path: A file, a folder, or a dataset on the Hugging Face hub; see `san_bench.language.sources.source_rows`.
        split: Name of the split in a folder or dataset.
        config: Configuration of a dataset on the hub.
        weight: Share of this source among several, relative to the others; by default every record is used once.
    """

    path: str = Field(min_length=1)
    split: str | None = None
    config: str | None = None
    weight: float | None = Field(default=None, gt=0)


class OwnData(Strict):
    """Your own records for the task `instructions`, and how they are split.

    Without `eval` and `held_out`, a `test` split of the source is the test split. `val` is the `val` split of the
    source, or else a part of the training records.

    Attributes:
        train: Source of the training records, or a list of sources. Sources with weights are mixed until the first one
            has no more records.
        eval: Source of the test split.
        held_out: Fraction of the training records that becomes the test split instead. Equal records stay together.
        seed: Seed of the split, of mixing, and of shuffling a stream.
        format: Format of the records; by default recognised from the columns, see `san_bench.language.formats`.
        streaming: Reads and tokenizes records while training, for data that does not fit into memory. Needs
            `max_steps` and `eval`.
        max_steps: Number of optimizer steps of a stream.
    """

    train: Annotated[tuple[Source, ...], BeforeValidator(lambda value: _sources(value)), Field(min_length=1)]
    eval: Annotated[Source, BeforeValidator(lambda value: _source(value))] | None = None
    held_out: float | None = Field(default=None, gt=0, lt=1)
    seed: int = Field(default=2024, ge=0, lt=2**32)
    format: Literal["auto", "messages", "sharegpt", "completion", "alpaca", "text"] = "auto"
    streaming: bool = False
    max_steps: int | None = Field(default=None, ge=1)

    @property
    def weights(self) -> list[float] | None:
        """Probability of each source, or `None` if every record is used once."""
        weights = [source.weight for source in self.train if source.weight is not None]
        return [weight / sum(weights) for weight in weights] or None

    @property
    def options(self) -> dict[str, Any]:
        """All settings but the locations, which are not part of a fingerprint."""
        return {**self.model_dump(mode="json", exclude={"train", "eval"}), "weights": self.weights}

    @model_validator(mode="after")
    def _fits(self) -> OwnData:
        weighted = sum(source.weight is not None for source in self.train)
        if weighted not in (0, len(self.train)):
            raise ValueError(
                f"train|{weighted} of {len(self.train)} sources have a weight; give all of them one, or none"
            )
        if self.eval is not None and self.held_out is not None:
            raise ValueError("held_out|eval is the test split already; remove one of the two")
        if self.eval is not None and self.eval.weight is not None:
            raise ValueError("eval|a weight is for sources of train; remove it")
        if self.streaming != (self.max_steps is not None):
            raise ValueError(
                "max_steps|a stream has no known length; set max_steps"
                if self.streaming
                else "max_steps|only a stream needs it; set streaming: true, or use optimizer.epochs"
            )
        if self.streaming and self.eval is None:
            raise ValueError("eval|a stream has no held-out records; give a source to score on")
        if self.streaming and len(self.train) > 1 and not weighted:
            raise ValueError("train|streams are mixed by weight; give each source one")
        return self


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _sources(value: Any) -> Any:
    return tuple(map(_source, value)) if isinstance(value, list | tuple) else (_source(value),)


def _own(value: Any) -> Any:
    if value is not None and not isinstance(value, str | dict | OwnData):
        raise ValueError(f"{value!r:.40} is neither a path or name nor a mapping with train")
    return OwnData.model_validate(value) if isinstance(value, dict) else value


class Scoring(Strict):
    """Evaluation settings; see `san_bench.language.generation` and `san_bench.language.likelihood`.

    Attributes:
        ways: Scoring methods; the first gives the accuracy of the run. `generation`: the first answer in the generated
            text counts. `likelihood`: the most likely answer counts. `exact`: the generated text must equal the output
            of the record. `loss`: loss and perplexity of the output; the accuracy is that of the next token. `lm-eval`:
            the tasks of lm-eval, which downloads its own data and only scores the test split.
        batch_size: Evaluation batch size.
        beams: Number of beams; 1 is greedy decoding.
        max_new_tokens: Maximum number of new tokens.
    """

    ways: Annotated[
        tuple[Literal["generation", "likelihood", "exact", "loss", "lm-eval"], ...], Field(min_length=1, strict=False)
    ]
    batch_size: int = Field(16, ge=1, le=2**20)
    beams: int = Field(1, ge=1, le=1024)
    max_new_tokens: int = Field(64, ge=1, le=2**20)

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
        data: Data folder or file, or a dataset on the Hugging Face hub; `null` for mini-language. For `instructions`
            also a mapping, see `OwnData`.
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
            loss, or the evaluation with `eval_steps`.
    """

    data: Annotated[str | OwnData | None, BeforeValidator(_own)] = (  # pyright: ignore[reportIncompatibleVariableOverride]
        None
    )
    train_split: Literal["train", "trainval"] = "train"
    eval_split: Literal["val", "test"] = "test"
    weights: Literal["fp32", "bf16", "fp16", "nf4", "int8"] = "fp32"
    text: Text
    scoring: Scoring
    gradient_checkpointing: bool = False
    selection: Literal["last", "best-val"] = "last"

    @property
    def fingerprint(self) -> str:
        """The sha256 of the recipe without `output` and the locations of `data`."""
        own = super().fingerprint
        if not isinstance(self.data, OwnData):
            return own
        return hashlib.sha256(f"{own} {json.dumps(self.data.options, sort_keys=True)}".encode()).hexdigest()

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
        if isinstance(self.data, OwnData):
            if self.task != "instructions":
                raise ValueError(f"data|{self.task} has its own layout; give its folder, or set task to instructions")
            wanted = {"train_split": "train", "eval_split": "test", "selection": "last", "data_workers": 0}
            wanted |= {"optimizer.epochs": 1, "eval_steps": 0}
            has = {**self.model_dump(include=set(wanted)), "optimizer.epochs": self.optimizer.epochs}
            wrong = [f"{key} {value}" for key, value in wanted.items() if has[key] != value]
            if self.data.streaming and wrong:
                raise ValueError(
                    f"data|a stream is read once, in order, without held-out records; set {', '.join(wrong)}"
                )
        return self
