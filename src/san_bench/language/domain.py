"""Language models: a pretrained decoder, tokenized records, and evaluation by generation or likelihood."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, set_seed

from san_bench.config.errors import cause_of
from san_bench.language.chat import check_chat_template, ends_of_turn, set_chat_template
from san_bench.language.formats import Chat, Passage
from san_bench.language.generation import answer_task
from san_bench.language.instructions import Questions
from san_bench.language.likelihood import choose, harness_scores, load_harness
from san_bench.language.own import Located
from san_bench.language.perplexity import token_losses
from san_bench.language.prompts import Collator, Tokenised, make_example, question_of, tokenise
from san_bench.language.recipe import OwnData, TextRecipe
from san_bench.language.stream import StreamedExamples, sequential_batches
from san_bench.language.survey import remarks_on
from san_bench.language.tasks import MOST_ANSWERS, TextTask, load_text_task
from san_bench.language.tokenizer import PreparedTokenizer, prepare_tokenizer
from san_bench.models.checkpoint import Checkpoint, checkpoint_of
from san_bench.models.weights import load_pretrained, move_to_gpu
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
        """Number of training records; of a stream, those that are read, which may repeat."""
        if self.task.stream is not None:
            return self._streamed
        return len(self.task.splits[self.recipe.train_split])

    @property
    def _streamed(self) -> int:
        data = self.recipe.data
        return (data.max_steps or 0) * self.recipe.optimizer.batch_size if isinstance(data, OwnData) else 0

    def inspect(self) -> Findings:
        """Checks that the tokenizer, and lm-eval if it is used, can be loaded, and that your own records fit them."""
        recipe, errors, remarks = self.recipe, [], []
        splits = {recipe.train_split, recipe.eval_split, *(["val"] if recipe.selection != "last" else [])}
        for look in (
            lambda: self.tokenizer,
            *([load_harness] if "lm-eval" in recipe.scoring.ways else []),
            *(partial(self._look_over, split, remarks) for split in sorted(splits) if recipe.task == "instructions"),
        ):
            try:
                look()
            except SanError as error:
                errors.append(str(error))
        return Findings(remarks=tuple(remarks), errors=tuple(dict.fromkeys(errors)))

    def _look_over(self, split: str, remarks: list[str]) -> None:
        """Tokenizes a split, and adds what stands out in it."""
        chat = split == self.recipe.train_split and self._chats
        if chat and not ends_of_turn(self.tokenizer.tokenizer):
            remarks.append("The chat template ends no answer with a special token, so models do not learn to stop.")
        records, trained = self.task.records(split), self.recipe.train_split
        against = self.task.records(trained) if split != trained else ()
        cuts = split != self.recipe.eval_split or "loss" in self.recipe.scoring.ways  # prompts are never truncated
        tokens = self.tokens(split) if cuts else self._tokenise(split, sys.maxsize)
        remarks += remarks_on(split, records, self.task.places.get(split, ()), tokens, against)

    def facts(self) -> dict[str, Any]:
        """Returns settings that affect scores, and the number of training tokens."""
        examples, text = self.tokens(self.recipe.train_split), self.recipe.text
        once = sum(len(example["input_ids"]) for example in examples.examples)
        streamed = self.task.stream is not None  # then these are the first records only
        return {
            "trained_on": self.recipe.task,
            "loss_on": text.loss_on,
            "template": text.template,
            "weights": self.recipe.weights,
            "cut_records": None if streamed else len(examples.cut),
            "train_tokens": None if streamed else once * self.recipe.optimizer.epochs,
        }

    @cached_property
    def tokenizer(self) -> PreparedTokenizer:
        """The prepared tokenizer, see `companions`; for conversations, generation also stops at the end of a turn."""
        prepared = self.companions(self.recipe)
        if not self._chats:
            return prepared
        check_chat_template(prepared.tokenizer)
        ends = ends_of_turn(prepared.tokenizer)
        return replace(prepared, stops=(*prepared.stops, *(end for end in ends if end not in prepared.stops)))

    @cached_property
    def _chats(self) -> bool:
        """Whether there are conversations."""
        asked = (self.task.records(split) for split in self.task.questions)
        return any(isinstance(record, Chat) for records in (*self.task.splits.values(), *asked) for record in records)

    @classmethod
    def companions(cls, recipe: TextRecipe) -> PreparedTokenizer:
        """Loads and prepares the tokenizer of the model.

        Raises:
            SanError: If the checkpoint has no tokenizer, the tokenizer lacks a token, or the chat template does not
                exist.
        """
        checkpoint = checkpoint_of(recipe)
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, **checkpoint.options)
        except Exception as error:  # of many types, for damaged files
            raise SanError(
                f"{checkpoint.path} has no tokenizer that transformers can load: {cause_of(error)} Add the model's "
                "tokenizer.json and tokenizer_config.json."
            ) from error
        prepared = prepare_tokenizer(tokenizer, recipe.text.pad)
        set_chat_template(tokenizer, recipe.text.chat_template, begins=prepared.bos is not None)
        return prepared

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
        text, stream = self.recipe.text, self._stream()
        plain = Collator(self.tokenizer.pad, "right")
        if self.recipe.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # checkpointing needs an input with gradient
        return Training(
            dataset=self.tokens(self.recipe.train_split) if stream is None else stream,
            collate=_packing(model) if text.packing else plain,
            plain=plain,
            chosen_by=self.tokens("val") if self.recipe.evaluates else None,
            metric="loss",
            loss=None,
            mean_of_parts=False,
            gradient_checkpointing=self.recipe.gradient_checkpointing,
            batches=None if stream is None else sequential_batches(stream),
        )

    def _stream(self) -> StreamedExamples | None:
        text = self.recipe.text

        def encode(record: Located) -> dict[str, list[int]] | None:
            try:
                example = make_example(record.item, self.tokenizer, text.template, text.cutoff)
            except SanError as error:
                raise SanError(f"{record.place}: {error}") from error
            return example.features(text.loss_on) if any(example.learnt) or text.loss_on == "full" else None

        return None if self.task.stream is None else StreamedExamples(self.task.stream, encode, self._streamed)

    def tokens(self, split: str) -> Tokenised:
        """Returns the records of a split as training examples; of a stream, the first ones."""
        if split not in self._tokens:
            self._tokens[split] = self._tokenise(split, self.recipe.text.cutoff)
        return self._tokens[split]

    def _tokenise(self, split: str, cutoff: int) -> Tokenised:
        text, places = self.recipe.text, self.task.places.get(split, ())
        return tokenise(self.task.records(split), self.tokenizer, text.template, text.loss_on, cutoff, places)

    def probe(self, size: int) -> Batch:
        """Returns the first evaluation prompts, equally many per task."""
        asked = self.task.asked(self.recipe.eval_split)
        each = -(-size // len(asked))
        records = [record for questions in asked.values() for record in questions.records[:each]][:size]
        asked = [question_of(one, self.tokenizer, self.recipe.text.template) for one in records]
        rows = [self.tokenizer.encode(one) if isinstance(one, str) else one for one in asked]
        if self.recipe.task == "instructions":  # a text without a prompt may be longer than the model can read
            rows = [row[: self.recipe.text.cutoff] for row in rows]
        return Collator(self.tokenizer.pad, "left")([{"input_ids": row} for row in rows])

    def score(self, model: Any, split: str) -> Scores:
        """Evaluates all questions of a split with every scoring method of the recipe.

        Returns:
            For the first method, the unweighted mean accuracy over tasks, the sums of `correct` and `n_test`, and under
            `tasks` the numbers per task; for `loss` instead of `correct` the loss and perplexity. Under `ways`, the
            numbers per task of the other methods. The files contain every question and answer.
        """
        scoring = self.recipe.scoring
        move_to_gpu(model)
        ways = [way for way in scoring.ways if way != "lm-eval" or split == "test"]  # lm-eval has no other split
        found = {way: WAYS[way](self, model, self.task.asked(split)) for way in ways}
        first = found[ways[0]]
        numbers = {
            "accuracy": fmean(one["accuracy"] for one in first.tasks.values()),
            **_of_all(first.tasks),
            "n_test": sum(one["n_test"] for one in first.tasks.values()),
            "way": ways[0],
            "tasks": first.tasks,
            "ways": {way: result.tasks for way, result in list(found.items())[1:]},
        }
        return Scores(numbers, {name: text for result in found.values() for name, text in result.files.items()})

    def save_companions(self, folder: Path) -> None:
        """Saves the tokenizer."""
        self.tokenizer.tokenizer.save_pretrained(folder)


def _of_all(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the number of correct answers of all tasks; without answers, the loss and perplexity of a single task."""
    if all("correct" in one for one in tasks.values()):
        return {"correct": sum(one["correct"] for one in tasks.values())}
    (only, *others) = tasks.values()
    return {} if others else {key: only[key] for key in ("loss", "perplexity")}


def _check_answers(task: TextTask, recipe: TextRecipe) -> None:
    """Raises `SanError` if a scoring method needs a closed set of answers and a task has none."""
    free = [name for name, questions in task.asked(recipe.eval_split).items() if not questions.answers]
    ways = [way for way in recipe.scoring.ways if way in ("generation", "likelihood")]
    if free and ways:
        raise SanError(
            f"scoring.ways: {', '.join(ways)} needs a closed set of answers, but the records of {', '.join(free)} in "
            f"{recipe.task} have more than {MOST_ANSWERS} different answers, or empty ones. Use scoring.ways=[exact], "
            "which compares the generated text with the output of the record, or scoring.ways=[loss]."
        )
    texts = [
        record for asked in task.asked(recipe.eval_split).values() for record in asked.records
        if isinstance(record, Passage)
    ]  # fmt: skip
    if texts and "exact" in recipe.scoring.ways:
        raise SanError(
            f"scoring.ways: exact needs prompts, but {len(texts):,} records of {recipe.eval_split} are texts without "
            "one. Use scoring.ways=[loss]."
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


def _losses(domain: Texts, model: Any, asked: dict[str, Questions]) -> _Found:
    text, scoring = domain.recipe.text, domain.recipe.scoring
    tasks, files = {}, {}
    for task, questions in asked.items():
        examples = tokenise(questions.records, domain.tokenizer, text.template, text.loss_on, text.cutoff)
        found = token_losses(model, examples, domain.tokenizer.pad, scoring.batch_size)
        tasks[task] = {
            "accuracy": found.accuracy, "n_test": len(examples), "loss": found.loss, "perplexity": found.perplexity,
            "n_tokens": found.tokens,
        }  # fmt: skip
        files[_file("losses", task)] = _lines(tuple({"index": i, **row} for i, row in enumerate(found.rows)))
    return _Found(tasks, files)


WAYS: dict[str, Callable[[Texts, Any, dict[str, Questions]], _Found]] = {
    "generation": _generate,
    "exact": partial(_generate, exact=True),
    "likelihood": _likeliest,
    "loss": _losses,
    "lm-eval": _harness,
}
"""Scoring methods by their name in recipes."""


def _file(kind: str, task: str) -> str:
    return f"{kind}-{task.rpartition('/')[2]}.jsonl"


def _lines(rows: tuple[dict[str, Any], ...]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
