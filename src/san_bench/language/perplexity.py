"""Scoring by loss: how well a model predicts the next token, where there is no answer to choose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from san_bench.language.generation import batches, scoring
from san_bench.language.prompts import IGNORED, Collator, Tokenised
from san_bench.run.processes import gather_results, rank_indices
from san_peft.errors import SanError


@dataclass(frozen=True)
class TokenLosses:
    r"""Losses of records.

    Attributes:
        rows: For each record its `loss`, the mean over its `tokens`, and the number of tokens predicted as `correct`.
    """

    rows: tuple[dict[str, float], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens with loss."""
        return int(sum(row["tokens"] for row in self.rows))

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return sum(row["loss"] * row["tokens"] for row in self.rows) / self.tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def accuracy(self) -> float:
        """Fraction of tokens that are the most likely next token."""
        return sum(row["correct"] for row in self.rows) / self.tokens


def token_losses(model: Any, examples: Tokenised, pad: int, batch_size: int) -> TokenLosses:
    """Computes the loss of each record over its labels, sharded across ranks.

    Args:
        model: A causal language model of transformers, with or without an adapter.
        examples: The tokenized records.
        pad: ID of the padding token.
        batch_size: Batch size.

    Raises:
        SanError: If a loss is not finite.
    """
    own = rank_indices(len(examples))
    collate, device = Collator(pad, "right"), next(model.parameters()).device
    found: dict[int, dict[str, float]] = {}
    with scoring(model):
        for places, _ in batches([examples[place]["input_ids"] for place in own], batch_size):
            batch = collate([examples[own[place]] for place in places])
            labels = batch.pop("labels")[:, 1:].to(device)
            logits = model(**{name: rows.to(device) for name, rows in batch.items()}).logits[:, :-1]
            with_loss = labels != IGNORED
            chosen, wanted = logits[with_loss].float(), labels[with_loss]
            losses = cross_entropy(chosen, wanted, reduction="none").double().cpu()
            correct = (chosen.argmax(-1) == wanted).double().cpu()
            line = with_loss.nonzero()[:, 0].cpu()
            tokens = torch.bincount(line, minlength=len(places))
            sums = torch.zeros(2, len(places), dtype=torch.float64)
            sums.index_add_(1, line, torch.stack([losses, correct]))
            for place, count, (loss, right) in zip(places, tokens.tolist(), sums.T.tolist(), strict=True):
                found[own[place]] = {"loss": loss / max(count, 1), "tokens": count, "correct": right}
    result = TokenLosses(tuple(gather_results(found, len(examples))))
    bad = [place for place, row in enumerate(result.rows) if not math.isfinite(row["loss"])]
    if bad:
        raise SanError(
            f"The loss of {len(bad):,} of {len(examples):,} records is not finite, first of record {bad[0]}."
        )
    if not result.tokens:
        raise SanError(f"The {len(examples):,} records have no tokens to score.")
    return result
