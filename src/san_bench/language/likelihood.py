"""Scoring by likelihood: which of the possible answers does a model find most likely?

A second look at the same questions, beside the published protocol of `san_bench.language.generation`, with other
numbers: nothing is generated, so an answer is never missed. lm-eval does it in its own words, with a passage in BoolQ,
and the texts of the options in place of their names; `choose` does it on our own records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from san_bench.language.commonsense import TASKS, find_task
from san_bench.language.generation import batches, scoring
from san_bench.language.instructions import Questions
from san_bench.language.prompts import Collator, Template, prompt
from san_bench.language.tokenizer import PreparedTokenizer
from san_bench.run.processes import gather_results, rank_indices
from san_peft.errors import SanError


@dataclass(frozen=True)
class Choices:
    """Which answers a model finds most likely.

    Attributes:
        correct: Choices that are right.
        rows: Every question with the right answer, the choice, and the log-likelihood of each answer.
    """

    correct: int
    rows: tuple[dict[str, Any], ...]

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.rows)

    @property
    def accuracy(self) -> float:
        """Share of the questions with the right choice."""
        return self.correct / self.n


def choose(
    model: Any,
    tokenizer: PreparedTokenizer,
    questions: Questions,
    template: Template,
    batch_size: int,
) -> Choices:
    """Chooses for each question the answer whose output is most likely after the prompt.

    The output of another answer is the record's own with that answer in place of the right one, at its last occurrence.

    Args:
        model: A causal language model of transformers, with or without an adapter.
        tokenizer: Its tokenizer, made ready.
        questions: The questions, with the answers to choose from. Of several that are equally likely, the first is
            chosen.
        template: How a prompt looks.
        batch_size: Texts at a time.

    Returns:
        The choices, in the order of the questions.

    Raises:
        SanError: If there is no question, or a record's output does not contain its answer, or its answer is no choice.
    """
    records, answers = questions.records, questions.answers
    bad = [i for i, r in enumerate(records) if r.answer not in answers or not r.answer or r.answer not in r.output]
    if bad or not records:
        raise SanError(
            f"{len(bad):,} of {len(records):,} records have no answer to choose from, such as index "
            f"{', '.join(map(str, bad[:5]))}: the output has to contain the answer, one of {', '.join(answers)}."
            if bad
            else "There are no questions to answer."
        )
    pairs = []
    for record in records:
        text, (before, _, after) = prompt(record, template, "evaluation"), record.output.rpartition(record.answer)
        pairs += [(text, f"{before}{answer}{after}") for answer in answers]
    scores = log_likelihoods(model, tokenizer, pairs, batch_size)
    rows: list[dict[str, Any]] = []
    for index, record in enumerate(records):
        own = scores[index * len(answers) : (index + 1) * len(answers)]
        chosen = answers[own.index(max(own))]
        rows.append(
            {
                "index": index,
                "instruction": record.instruction,
                "answer": record.answer,
                "predicted": chosen,
                "correct": chosen == record.answer,
                "log_likelihoods": dict(zip(answers, own, strict=True)),
            }
        )
    return Choices(sum(row["correct"] for row in rows), tuple(rows))


def log_likelihoods(
    model: Any, tokenizer: PreparedTokenizer, pairs: Sequence[tuple[str, str]], batch_size: int
) -> list[float]:
    r"""Returns how likely a model finds texts to go on.

    $$ \log p(y \mid x) = \sum_t \log p(y_t \mid x, y_{<t}) $$

    Args:
        model: A causal language model of transformers, with or without an adapter.
        tokenizer: Its tokenizer, made ready.
        pairs: Prompts $x$, each with a text $y$ that follows it.
        batch_size: Pairs at a time.

    Returns:
        The natural logarithm for each pair, in the order of the pairs, computed in float32.

    Raises:
        SanError: If `batch_size` is below 1, or a text has nothing before it or no tokens.
    """
    if batch_size < 1:
        raise SanError(f"batch_size is {batch_size}, but must be 1 or more.")
    own = rank_indices(len(pairs))
    encoded = [tokenizer.encode_after(*pairs[place]) for place in own]
    for (tokens, start), pair in zip(encoded, (pairs[place] for place in own), strict=True):
        if not 0 < start < len(tokens):
            raise SanError(f"The text {pair[1]!r:.60} after {pair[0][-20:]!r} has no tokens, or none before it.")
    collate = Collator(tokenizer.pad, "right")
    device = next(model.parameters()).device
    scores: dict[int, float] = {}
    with scoring(model):
        for places, rows in batches([tokens for tokens, _ in encoded], batch_size):
            batch = {name: ids.to(device) for name, ids in collate([{"input_ids": row} for row in rows]).items()}
            logits = model(**batch).logits
            for line, (place, row) in enumerate(zip(places, rows, strict=True)):
                start, end = encoded[place][1], len(row)
                chances = torch.log_softmax(logits[line, start - 1 : end - 1].float(), -1)
                chosen = batch["input_ids"][line, start:end, None]
                scores[own[place]] = float(chances.gather(-1, chosen).sum())
    return gather_results(scores, len(pairs))


def load_harness() -> tuple[Any, Any]:
    """Imports lm-eval and its models of transformers.

    Raises:
        SanError: If it is not installed.
    """
    try:
        return import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    except ModuleNotFoundError as error:
        raise SanError(f'lm-eval needs {error.name}, which is missing: pip install "san-peft[language]"') from error


def harness_scores(
    model: Any,
    tokenizer: PreparedTokenizer,
    tasks: Sequence[str] = TASKS,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Scores a model in memory by lm-eval, which fetches its data from the Hugging Face hub.

    Args:
        model: A causal language model of transformers, with or without an adapter.
        tokenizer: Its tokenizer, made ready.
        tasks: The tasks; see `san_bench.language.commonsense.find_task`.
        batch_size: Texts at a time.
        limit: Questions of each task, to try it out; all by default.

    Returns:
        See `read_harness`.

    Raises:
        SanError: If lm-eval is not installed, there is no such task, or the data is not to be had.
    """
    names = {name: facts.lm_eval for name, facts in map(find_task, tasks)}
    lm_eval, models = load_harness()
    with scoring(model):
        wrapped = models.HFLM(
            pretrained=model,
            tokenizer=tokenizer.tokenizer,
            batch_size=batch_size,
            add_bos_token=tokenizer.bos is not None,  # versions differ in what they do by default
        )
        try:
            output = lm_eval.simple_evaluate(model=wrapped, tasks=list(names.values()), num_fewshot=0, limit=limit)
        except (OSError, ValueError) as error:
            raise SanError(
                f"lm-eval could not score {', '.join(names)}: {error}. It needs its data, from the hub."
            ) from error
    return read_harness(output or {}, tuple(names))


def read_harness(output: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Reads lm-eval's results under our names of the tasks.

    Args:
        output: What `lm_eval.simple_evaluate` returns.
        tasks: The tasks.

    Returns:
        For each task `n`, its number of questions, `acc`, the share of right choices, and `acc_stderr`, its standard
        error; and where lm-eval has them, the same with the likelihood divided by the length of the option, `acc_norm`
        and `acc_norm_stderr`.

    Raises:
        SanError: If there is no such task, or lm-eval has no accuracy of one, or no number of questions.
    """
    results, counts = output.get("results", {}), output.get("n-samples", {})
    scores: dict[str, dict[str, float]] = {}
    for name, facts in map(find_task, tasks):
        found = results.get(facts.lm_eval, {})
        keys = {key: f"{key},none" for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")}
        scores[name] = {
            key: float(found[full]) for key, full in keys.items() if isinstance(found.get(full), int | float)
        }
        if facts.lm_eval in counts:
            scores[name]["n"] = int(counts[facts.lm_eval]["effective"])
    missing = [name for name, own in scores.items() if not {"acc", "n"} <= set(own)]
    if missing:
        raise SanError(
            f"lm-eval gave no accuracy, or no number of questions, of {', '.join(missing)}; it has results of "
            f"{', '.join(results) or 'none'}."
        )
    return scores
