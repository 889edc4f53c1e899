"""Scoring by generation, the published commonsense protocol: the first answer in the generated text counts.

The published code uses four beams, no sampling, at most 32 new tokens, and batch size 1 without an attention mask. Here
batches are left-padded with a mask, so that the output does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from san_bench.language.formats import Chat, Item
from san_bench.language.instructions import Instruction, Questions
from san_bench.language.prompts import RESPONSE, Collator, Template, question_of
from san_bench.language.tokenizer import PreparedTokenizer
from san_bench.run.processes import gather_results, rank_indices
from san_peft.errors import SanError

BEAMS = 4
"""Number of beams in the published protocol."""

NEW_TOKENS = 32
"""Maximum number of new tokens in the published protocol."""


@dataclass(frozen=True, kw_only=True)
class ScoredAnswers:
    """Predicted answers to the questions of a task.

    Attributes:
        correct: Number of correct answers.
        rows: Every question with reference answer, predicted answer, and what led to the prediction.
    """

    correct: int
    rows: tuple[dict[str, Any], ...]

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.rows)

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers."""
        return self.correct / self.n


@dataclass(frozen=True, kw_only=True)
class TaskAnswers(ScoredAnswers):
    """Generated answers to the questions of a task; the rows have the generated text.

    Attributes:
        task: Name of the task.
        unanswered: Number of texts without an answer; they count as wrong.
    """

    task: str
    unanswered: int


def answer_task(
    model: Any,
    tokenizer: PreparedTokenizer,
    task: str,
    questions: Questions,
    template: Template,
    batch_size: int,
    beams: int = BEAMS,
    max_new_tokens: int = NEW_TOKENS,
    exact: bool = False,
) -> TaskAnswers:
    """Generates answers to the questions of a task and scores them as published.

    Args:
        model: A causal language model of transformers, with or without an adapter.
        tokenizer: Its prepared tokenizer.
        task: Name of the task.
        questions: Its questions.
        template: Prompt template.
        batch_size: Batch size; does not affect the texts.
        beams: Number of beams; 1 is greedy decoding.
        max_new_tokens: Maximum number of new tokens.
        exact: Compares the whole stripped text with the output of the record, instead of searching for an answer.

    Returns:
        The answers, in the order of the questions.

    Raises:
        SanError: If there are no questions, or a number is below 1.
    """
    records = questions.records
    if not records:
        raise SanError(f"There are no questions of {task} to answer.")
    prompts = [question_of(record, tokenizer, template) for record in records]
    texts = generate_texts(model, tokenizer, prompts, batch_size, beams, max_new_tokens)
    rows: list[dict[str, Any]] = []
    for index, (record, text) in enumerate(zip(records, texts, strict=True)):
        said = response(text) if isinstance(record, Instruction) else text.strip()
        if exact:
            answer, right = said or None, record.output.strip()
        else:
            answer, right = questions.read_answer(said), record.answer
        rows.append(
            {
                "index": index,
                "instruction": _question(record),
                "answer": right,
                "generated": text,
                "predicted": answer,
                "correct": answer == right,
            }
        )
    correct = sum(row["correct"] for row in rows)
    unanswered = sum(row["predicted"] is None for row in rows)
    return TaskAnswers(task=task, correct=correct, unanswered=unanswered, rows=tuple(rows))


def _question(record: Item) -> str:
    """Returns the question of a record as a text for people."""
    if isinstance(record, Chat):
        return str(record.asked[-1].get("content")) if record.asked else ""
    return record.instruction if isinstance(record, Instruction) else record.prompt  # type: ignore[union-attr]


def response(text: str) -> str:
    """Returns the stripped text after the last response header, or all of it if there is none.

    Example:
        >>> response(" false. ### Response: the correct answer is true ")
        'the correct answer is true'
    """
    return text.rpartition(RESPONSE)[2].strip()


def generate_texts(
    model: Any,
    tokenizer: PreparedTokenizer,
    prompts: Sequence[str | list[int]],
    batch_size: int,
    beams: int = BEAMS,
    max_new_tokens: int = NEW_TOKENS,
) -> list[str]:
    """Generates continuations of prompts without sampling, longest prompts first, sharded across ranks.

    Args:
        model: A causal language model of transformers, with or without an adapter.
        tokenizer: Its prepared tokenizer.
        prompts: The prompts, as texts or as token IDs.
        batch_size: Batch size.
        beams: Number of beams; 1 is greedy decoding.
        max_new_tokens: Maximum number of new tokens.

    Returns:
        The generated texts, in the order of the prompts, without special tokens.

    Raises:
        SanError: If a number is below 1.
    """
    for what, number in (("batch_size", batch_size), ("beams", beams), ("max_new_tokens", max_new_tokens)):
        if number < 1:
            raise SanError(f"{what} is {number}, but must be 1 or more.")
    settings = decoding(tokenizer.pad, tokenizer.bos, tokenizer.stops, beams, max_new_tokens)
    collate = Collator(tokenizer.pad, "left")
    device = next(model.parameters()).device
    own, texts = rank_indices(len(prompts)), {}
    asked = [tokenizer.encode(one) if isinstance(one, str) else one for one in (prompts[place] for place in own)]
    with scoring(model):
        for places, tokens in batches(asked, batch_size):
            batch = {name: rows.to(device) for name, rows in collate([{"input_ids": t} for t in tokens]).items()}
            written = model.generate(**batch, generation_config=settings)
            start = batch["input_ids"].shape[1]
            for place, row in zip(places, written[:, start:].tolist(), strict=True):
                texts[own[place]] = tokenizer.decode(row)
    return gather_results(texts, len(prompts))


def decoding(pad: int, bos: int | None, stops: Sequence[int], beams: int, max_new_tokens: int) -> Any:
    """Returns a generation config without sampling; the generation config of the checkpoint is ignored.

    Args:
        pad: ID of the padding token.
        bos: ID of the BOS token, if any.
        stops: IDs of the stop tokens.
        beams: Number of beams; 1 is greedy decoding.
        max_new_tokens: Maximum number of new tokens.
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        num_beams=beams,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        length_penalty=1.0,
        early_stopping=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=list(stops),
    )


def batches(rows: Sequence[list[int]], size: int) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yields batches of rows of similar length, longest first, each with the indices of its rows."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield places, [rows[place] for place in places]


@contextmanager
def scoring(model: Any) -> Iterator[None]:
    """Sets eval mode without gradients, and restores the mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: cached tensors may be used in training later
            yield
    finally:
        model.train(training)
