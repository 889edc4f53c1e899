"""Language models: a pretrained decoder, tokenized records, and evaluation by generation or likelihood."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, set_seed

from san_bench.config.errors import cause_of
from san_bench.language.generation import answer_task
from san_bench.language.instructions import Questions
from san_bench.language.likelihood import choose, harness_scores, load_harness
from san_bench.language.prompts import Collator, Tokenised, prompt, tokenise
from san_bench.language.recipe import TextRecipe
from san_bench.language.tasks import MOST_ANSWERS, TextTask, load_text_task
from san_bench.language.tokenizer import PreparedTokenizer, prepare_tokenizer
from san_bench.models.checkpoint import Checkpoint, checkpoint_of
from san_bench.models.weights import load_pretrained, place
from san_bench.run.domain import Batch, Domain, Findings, Scores, Training
from san_peft.errors import SanError


class Texts(Domain):
    """Language model domain of a recipe.

    Args:
        recipe: The recipe.
        task: Its task; loaded by default.
    """

    items = "records"

    def __init__(self, recipe: TextRecipe, task: TextTask | None = None) -> None:
        self.recipe: TextRecipe = recipe
        self.task = task or load_text_task(recipe.task, recipe.data)
        self.task.asked(recipe.eval_split)  # fail before training, not after
        _check_answers(self.task, recipe)
        self._tokens: dict[str, Tokenised] = {}

    @property
    def n_train(self) -> int:
        """Number of training records."""
        return len(self.task.splits[self.recipe.train_split])

    def inspect(self) -> Findings:
        """Checks that the tokenizer, and lm-eval if it is used, can be loaded."""
        errors = []
        for look in (lambda: self.tokenizer, *([load_harness] if "lm-eval" in self.recipe.scoring.ways else [])):
            try:
                look()
            except SanError as error:
                errors.append(str(error))
        return Findings(errors=tuple(errors))

    def facts(self) -> dict[str, Any]:
        """Returns settings that affect scores, and the number of training tokens."""
        examples, text = self.tokens(self.recipe.train_split), self.recipe.text
        once = sum(len(example["input_ids"]) for example in examples.examples)
        return {
            "trained_on": self.recipe.task,
            "loss_on": text.loss_on,
            "template": text.template,
            "weights": self.recipe.weights,
            "cut_records": len(examples.cut),
            "train_tokens": once * self.recipe.optimizer.epochs,
        }

    @cached_property
    def tokenizer(self) -> PreparedTokenizer:
        """The prepared tokenizer; see `companions`."""
        return self.companions(self.recipe)

    @classmethod
    def companions(cls, recipe: TextRecipe) -> PreparedTokenizer:
        """Loads and prepares the tokenizer of the model.

        Raises:
            SanError: If the checkpoint has no tokenizer, or the tokenizer lacks a token.
        """
        checkpoint = checkpoint_of(recipe)
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, **checkpoint.options)
        except Exception as error:  # of many types, for damaged files
            raise SanError(
                f"{checkpoint.path} has no tokenizer that transformers can load: {cause_of(error)} Add the model's "
                "tokenizer.json and tokenizer_config.json."
            ) from error
        return prepare_tokenizer(tokenizer, recipe.text.pad)

    def base_model(self) -> nn.Module:
        """Loads the pretrained model in the dtype or quantization of the recipe.

        Raises:
            SanError: If weights are missing or mismatched, the embedding is too small for the tokenizer, or
                bitsandbytes is required and not installed.
        """
        set_seed(self.recipe.seed)
        model = load_pretrained(AutoModelForCausalLM, checkpoint_of(self.recipe), self.recipe)
        rows = model.get_input_embeddings().num_embeddings
        prepare_tokenizer(self.tokenizer.tokenizer, self.recipe.text.pad, rows)  # raises if the embedding is too small
        return model

    def trained_model(self, folder: Path) -> nn.Module:
        """Loads a fully trained model."""
        return load_pretrained(AutoModelForCausalLM, Checkpoint(folder), self.recipe)

    def training(self, model: Any) -> Training:
        """Returns the training setup.

        Raises:
            SanError: If truncation removes all answers, or the model does not support packing.
        """
        text, selects = self.recipe.text, self.recipe.selection != "last"
        plain = Collator(self.tokenizer.pad, "right")
        if self.recipe.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # checkpointing needs an input with gradient
        return Training(
            dataset=self.tokens(self.recipe.train_split),
            collate=_packing(model) if text.packing else plain,
            plain=plain,
            chosen_by=self.tokens("val") if selects else None,
            metric="loss",
            loss=None,
            mean_of_parts=False,
            gradient_checkpointing=self.recipe.gradient_checkpointing,
        )

    def tokens(self, split: str) -> Tokenised:
        """Returns the records of a split as training examples."""
        if split not in self._tokens:
            text, records = self.recipe.text, self.task.splits[split]
            self._tokens[split] = tokenise(records, self.tokenizer, text.template, text.loss_on, text.cutoff)
        return self._tokens[split]

    def probe(self, size: int) -> Batch:
        """Returns the first evaluation prompts, equally many per task."""
        asked = self.task.asked(self.recipe.eval_split)
        each = -(-size // len(asked))
        records = [record for questions in asked.values() for record in questions.records[:each]][:size]
        rows = [self.tokenizer.encode(prompt(one, self.recipe.text.template, "evaluation")) for one in records]
        return Collator(self.tokenizer.pad, "left")([{"input_ids": row} for row in rows])

    def score(self, model: Any, split: str) -> Scores:
        """Evaluates all questions of a split with every scoring method of the recipe.

        Returns:
            For the first method, the unweighted mean accuracy over tasks, the sums of `correct` and `n_test`, and under
            `tasks` the numbers per task. Under `ways`, the numbers per task of the other methods. The files contain
            every question and answer.
        """
        scoring = self.recipe.scoring
        place(model)
        ways = [way for way in scoring.ways if way != "lm-eval" or split == "test"]  # lm-eval has no other split
        found = {way: WAYS[way](self, model, self.task.asked(split)) for way in ways}
        first = found[ways[0]]
        numbers = {
            "accuracy": fmean(one["accuracy"] for one in first.tasks.values()),
            "correct": sum(one["correct"] for one in first.tasks.values()),
            "n_test": sum(one["n_test"] for one in first.tasks.values()),
            "way": ways[0],
            "tasks": first.tasks,
            "ways": {way: result.tasks for way, result in list(found.items())[1:]},
        }
        return Scores(numbers, {name: text for result in found.values() for name, text in result.files.items()})

    def save_companions(self, folder: Path) -> None:
        """Saves the tokenizer."""
        self.tokenizer.tokenizer.save_pretrained(folder)


def _check_answers(task: TextTask, recipe: TextRecipe) -> None:
    """Raises `SanError` if a scoring method needs a closed set of answers and a task has none."""
    free = [name for name, questions in task.asked(recipe.eval_split).items() if not questions.answers]
    ways = [way for way in recipe.scoring.ways if way in ("generation", "likelihood")]
    if free and ways:
        raise SanError(
            f"scoring.ways: {', '.join(ways)} needs a closed set of answers, but the records of {', '.join(free)} in "
            f"{recipe.data} have more than {MOST_ANSWERS} different answers, or empty ones. Use scoring.ways=[exact], "
            "which compares the generated text with the output of the record."
        )


def _packing(model: Any) -> Callable[[list[Any]], Any]:
    """Returns a collator that packs a batch into one row, with positions and attention per record."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inside.config._attn_implementation == "eager":
        raise SanError("Packing needs sdpa or flash attention, but the model uses eager attention.")
    return DataCollatorWithFlattening(return_position_ids=True)


@dataclass(frozen=True)
class _Found:
    """Scores by task, and files by name."""

    tasks: dict[str, dict[str, Any]]
    files: dict[str, bytes]


def _generate(domain: Texts, model: Any, asked: dict[str, Questions], exact: bool = False) -> _Found:
    text, scoring = domain.recipe.text, domain.recipe.scoring
    tasks, files = {}, {}
    for task, questions in asked.items():
        found = answer_task(
            model,
            domain.tokenizer,
            task,
            questions,
            text.template,
            scoring.batch_size,
            scoring.beams,
            scoring.max_new_tokens,
            exact,
        )
        tasks[task] = {
            "accuracy": found.accuracy, "correct": found.correct, "n_test": found.n, "unanswered": found.unanswered
        }  # fmt: skip
        files[_file("outputs" if exact else "answers", task)] = _lines(found.rows)
    return _Found(tasks, files)


def _likeliest(domain: Texts, model: Any, asked: dict[str, Questions]) -> _Found:
    tasks, files = {}, {}
    for task, questions in asked.items():
        found = choose(
            model, domain.tokenizer, questions, domain.recipe.text.template, domain.recipe.scoring.batch_size
        )
        tasks[task] = {"accuracy": found.accuracy, "correct": found.correct, "n_test": found.n}
        files[_file("likelihoods", task)] = _lines(found.rows)
    return _Found(tasks, files)


def _harness(domain: Texts, model: Any, asked: dict[str, Questions]) -> _Found:
    scores = harness_scores(model, domain.tokenizer, tuple(asked), domain.recipe.scoring.batch_size)
    names = {name.partition("/")[2]: name for name in asked}
    tasks = {}
    for name, own in scores.items():
        n = int(own.pop("n"))  # lm-eval uses its own data, which may differ from ours
        tasks[names[name]] = {"accuracy": own["acc"], "correct": round(own["acc"] * n), "n_test": n, **own}
    return _Found(tasks, {})


WAYS: dict[str, Callable[[Texts, Any, dict[str, Questions]], _Found]] = {
    "generation": _generate,
    "exact": partial(_generate, exact=True),
    "likelihood": _likeliest,
    "lm-eval": _harness,
}
"""Scoring methods by their name in recipes."""


def _file(kind: str, task: str) -> str:
    return f"{kind}-{task.rpartition('/')[2]}.jsonl"


def _lines(rows: tuple[dict[str, Any], ...]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
