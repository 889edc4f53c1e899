"""The published evaluation of commonsense reasoning: a model writes, and the first answer in what it writes counts.

Published are four beams, no sampling, at most 32 new tokens, and batches of one without an attention mask. Here batches
are filled up at the left, with a mask, so that a text does not depend on what it is generated with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from san_bench.language.instructions import Questions
from san_bench.language.prompts import RESPONSE, Collator, Template, prompt
from san_bench.language.tokenizer import PreparedTokenizer
from san_bench.run.processes import mine, together
from san_peft.errors import SanError

BEAMS = 4
"""Beams of the published search."""

NEW_TOKENS = 32
"""The most tokens that the published evaluation generates."""


@dataclass(frozen=True)
class TaskAnswers:
    """What a model answered to the questions of a task.

    Attributes:
        task: Name of the task.
        correct: Answers that are right.
        unanswered: Texts without an answer. They count as wrong.
        rows: Every question with the right answer, the generated text, the answer in it, and whether it is right.
    """

    task: str
    correct: int
    unanswered: int
    rows: tuple[dict[str, Any], ...]

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.rows)

    @property
    def accuracy(self) -> float:
        """Share of the questions that are answered right."""
        return self.correct / self.n


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
    """Lets a model answer the questions of a task, and scores it as published.

    Args:
        model: A causal language model of transformers, with or without an adapter.
        tokenizer: Its tokenizer, made ready.
        task: Name of the task.
        questions: Its questions.
        template: How a prompt looks.
        batch_size: Questions at a time; the texts do not depend on it.
        beams: Beams of the search; 1 is greedy.
        max_new_tokens: The most tokens of an answer.
        exact: Seeks no answer: the whole text must be the record's output, but for outer blanks.

    Returns:
        The answers, in the order of the questions.

    Raises:
        SanError: If there is no question, or a number is below 1.
    """
    records = questions.records
    if not records:
        raise SanError(f"There are no questions of {task} to answer.")
    prompts = [prompt(record, template, "evaluation") for record in records]
    texts = generate_texts(model, tokenizer, prompts, batch_size, beams, max_new_tokens)
    rows: list[dict[str, Any]] = []
    for index, (record, text) in enumerate(zip(records, texts, strict=True)):
        answer, right = questions.read_answer(response(text)), record.answer
        if exact:
            answer, right = response(text) or None, record.output.strip()
        rows.append(
            {
                "index": index,
                "instruction": record.instruction,
                "answer": right,
                "generated": text,
                "predicted": answer,
                "correct": answer == right,
            }
        )
    correct = sum(row["correct"] for row in rows)
    return TaskAnswers(task, correct, sum(row["predicted"] is None for row in rows), tuple(rows))


def response(text: str) -> str:
    """Returns what stands after the last header of a response, or all where there is none, without outer blanks.

    Example:
        >>> response(" false. ### Response: the correct answer is true ")
        'the correct answer is true'
    """
    return text.rpartition(RESPONSE)[2].strip()


def generate_texts(
    model: Any,
    tokenizer: PreparedTokenizer,
    prompts: Sequence[str],
    batch_size: int,
    beams: int = BEAMS,
    max_new_tokens: int = NEW_TOKENS,
) -> list[str]:
    """Lets a model go on from prompts, without sampling; the longest prompts come first. Processes share them.

    Args:
        model: A causal language model of transformers, with or without an adapter.
        tokenizer: Its tokenizer, made ready.
        prompts: The texts to go on from.
        batch_size: Prompts at a time.
        beams: Beams of the search; 1 is greedy.
        max_new_tokens: The most tokens of a text.

    Returns:
        The new text of each prompt, in the order of the prompts, without special tokens.

    Raises:
        SanError: If a number is below 1.
    """
    for what, number in (("batch_size", batch_size), ("beams", beams), ("max_new_tokens", max_new_tokens)):
        if number < 1:
            raise SanError(f"{what} is {number}, but must be 1 or more.")
    settings = decoding(tokenizer.pad, tokenizer.bos, tokenizer.stops, beams, max_new_tokens)
    collate = Collator(tokenizer.pad, "left")
    device = next(model.parameters()).device
    own, texts = mine(len(prompts)), {}
    with scoring(model):
        for places, tokens in batches([tokenizer.encode(prompts[place]) for place in own], batch_size):
            batch = {name: rows.to(device) for name, rows in collate([{"input_ids": t} for t in tokens]).items()}
            written = model.generate(**batch, generation_config=settings)
            start = batch["input_ids"].shape[1]
            for place, row in zip(places, written[:, start:].tolist(), strict=True):
                texts[own[place]] = tokenizer.decode(row)
    return together(texts, len(prompts))


def decoding(pad: int, bos: int | None, stops: Sequence[int], beams: int, max_new_tokens: int) -> Any:
    """Returns transformers' settings of generation without sampling; a checkpoint's own do not count.

    Args:
        pad: The token that fills up a batch.
        bos: What begins a text, if anything does.
        stops: What ends a text.
        beams: Beams of the search; 1 is greedy.
        max_new_tokens: The most tokens of a text.
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
    """Yields batches of rows of like length, the longest first, each with the places of its rows."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield places, [rows[place] for place in places]


@contextmanager
def scoring(model: Any) -> Iterator[None]:
    """Puts a model into eval mode without gradients, and back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: what a model keeps from here may be trained with later
            yield
    finally:
        model.train(training)
