"""Scoring by likelihood: the most likely answer counts.

An alternative to the published protocol in `san_bench.language.generation`, with different numbers: nothing is
generated, so no answer is ever missing. lm-eval uses its own prompts, with the passage in BoolQ and option texts
instead of option names; `choose` uses our own records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from san_bench.language.commonsense import TASKS, find_task
from san_bench.language.generation import ScoredAnswers, batches, scoring
from san_bench.language.instructions import Questions
from san_bench.language.prompts import Collator, Template, prompt
from san_bench.language.tokenizer import PreparedTokenizer
from san_bench.run.processes import gather_results, rank_indices
from san_peft.errors import SanError


def choose(
    model: Any,
    tokenizer: PreparedTokenizer,
    questions: Questions,
    template: Template,
    batch_size: int,
) -> ScoredAnswers:
    """Selects for each question the answer whose output is most likely after the prompt.

    The output for another answer is that of the record with the last occurrence of the correct answer replaced.

    Args:
        model: A causal language model of transformers, with or without an adapter.
        tokenizer: Its prepared tokenizer.
        questions: The questions with their valid answers; ties go to the first answer.
        template: Prompt template.
        batch_size: Batch size.

    Returns:
        The selected answers, in the order of the questions.

    Raises:
        SanError: If there are no questions, or an answer is not in the output of its record or not a valid answer.
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
    return ScoredAnswers(correct=sum(row["correct"] for row in rows), rows=tuple(rows))


def log_likelihoods(
    model: Any, tokenizer: PreparedTokenizer, pairs: Sequence[tuple[str, str]], batch_size: int
) -> list[float]:
    r"""Computes the log-likelihood of texts given their prompts.

    $$ \log p(y \mid x) = \sum_t \log p(y_t \mid x, y_{<t}) $$

    Args:
        model: A causal language model of transformers, with or without an adapter.
        tokenizer: Its prepared tokenizer.
        pairs: Prompts $x$ and continuations $y$.
        batch_size: Batch size.

    Returns:
        The natural log-likelihood of each pair, in order, computed in float32.

    Raises:
        SanError: If `batch_size` is below 1, or a prompt or text has no tokens.
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
    """Imports lm-eval and its transformers models.

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
    """Scores an in-memory model with lm-eval, which downloads its data from the Hugging Face hub.

    Args:
        model: A causal language model of transformers, with or without an adapter.
        tokenizer: Its prepared tokenizer.
        tasks: Tasks; see `san_bench.language.commonsense.find_task`.
        batch_size: Batch size.
        limit: Number of questions per task, for testing; all by default.

    Returns:
        See `read_harness`.

    Raises:
        SanError: If lm-eval is not installed, a task is unknown, or the data is not available.
    """
    names = {name: facts.lm_eval for name, facts in map(find_task, tasks)}
    lm_eval, models = load_harness()
    with scoring(model):
        wrapped = models.HFLM(
            pretrained=model,
            tokenizer=tokenizer.tokenizer,
            batch_size=batch_size,
            add_bos_token=tokenizer.bos is not None,  # the default differs between versions
        )
        try:
            output = lm_eval.simple_evaluate(model=wrapped, tasks=list(names.values()), num_fewshot=0, limit=limit)
        except (OSError, ValueError) as error:
            raise SanError(
                f"lm-eval could not score {', '.join(names)}: {error}. It needs its data from the hub."
            ) from error
    return read_harness(output or {}, tuple(names))


def read_harness(output: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Reads lm-eval results under our task names.

    Args:
        output: Return value of `lm_eval.simple_evaluate`.
        tasks: Task names.

    Returns:
        For each task `n`, the number of questions, `acc` and its standard error `acc_stderr`; if available, also the
        length-normalized `acc_norm` and `acc_norm_stderr`.

    Raises:
        SanError: If a task is unknown, or its accuracy or number of questions is missing.
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
            f"lm-eval returned no accuracy or number of questions for {', '.join(missing)}; it has results for "
            f"{', '.join(results) or 'none'}."
        )
    return scores
