"""Tokenizers made ready: one beginning, the right end, and padding that is no word.

LLaMA 1 and 2 have no token to pad with; what is published pads with the unknown token, whose id is 0. In LLaMA 3 the id
0 is an ordinary token, so padding takes a reserved one. A beginning is put before every text once, whether or not the
tokenizer adds one by itself.

Only masks say what is padding, so a padding token that also ends texts does no harm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from san_peft.errors import SanError

Family = Literal["llama", "llama-3", "other"]
"""LLaMA 1 and 2 share their tokens."""

RESERVED = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
"""What LLaMA 3 pads with: the token for it (since 3.1), or else one that was kept free."""

ENDS = ("<|end_of_text|>", "<|eot_id|>")
"""What ends a text, and a turn, in LLaMA 3."""


@dataclass(frozen=True)
class PreparedTokenizer:
    """A tokenizer that is ready.

    Attributes:
        tokenizer: The tokenizer of transformers; it now has the padding token.
        family: Whose tokens it has.
        bos: What begins a text, or `None` where nothing does.
        eos: What ends a text in training.
        stops: What ends a text in generation: `eos`, and the other ends that the family has.
        pad: What fills up a batch.
    """

    tokenizer: Any
    family: Family
    bos: int | None
    eos: int
    stops: tuple[int, ...]
    pad: int

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, with the beginning once and no end."""
        return self._begin(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_after(self, prompt: str, continuation: str) -> tuple[list[int], int]:
        """Returns the tokens of a prompt and its continuation, and where the continuation begins.

        The two are tokenised as one text. Where a token holds the end of the one and the beginning of the other, it
        belongs to the continuation.

        Args:
            prompt: The first text.
            continuation: The second.

        Raises:
            SanError: If the texts share a token, and the tokenizer cannot say which characters its tokens stand for.
        """
        alone, whole = self.encode(prompt), self.encode(prompt + continuation)
        if whole[: len(alone)] == alone:
            return whole, len(alone)
        if not getattr(self.tokenizer, "is_fast", False):
            raise SanError(
                f"{type(self.tokenizer).__name__} cannot say where an answer begins in its tokens. Load the tokenizer "
                "with AutoTokenizer and the tokenizers library, or train on the full text (loss_on 'full')."
            )
        read = self.tokenizer(prompt + continuation, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in read["offset_mapping"]]
        first = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ends))
        return whole, first + len(whole) - len(ends)

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens, without the special ones."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _begin(self, tokens: list[int]) -> list[int]:
        return tokens if self.bos is None or tokens[:1] == [self.bos] else [self.bos, *tokens]


def prepare_tokenizer(tokenizer: Any, pad: str = "auto", rows: int | None = None) -> PreparedTokenizer:
    """Makes a tokenizer ready, and gives it the padding token.

    Args:
        tokenizer: A tokenizer of transformers.
        pad: `unk` or `eos`, or a token by its text. With `auto`, LLaMA 1 and 2 take `<unk>`, LLaMA 3 the first of
            `RESERVED` that it has, and others the token that they bring, else the unknown one, else the end.
        rows: Rows of the model's embedding, if they are to be compared with the ids.

    Returns:
        The tokenizer with its beginning, its ends and its padding.

    Raises:
        SanError: If a token is missing that the family needs, or the model has no row for one.
    """
    vocabulary = tokenizer.get_vocab()
    family = _family(vocabulary)
    name = f"The tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
    eos = tokenizer.eos_token_id
    if eos is None:
        raise SanError(f"{name} has no end of text, so no answer would end. Set its eos_token.")
    bos = _beginning(tokenizer, family)
    if bos is None and family != "other":
        raise SanError(f"{name} is one of LLaMA, but has no beginning of text. Set its bos_token.")
    token = _padding(tokenizer, family, vocabulary, pad, name)
    tokenizer.pad_token = token
    stops = [eos, *(vocabulary[end] for end in ENDS if family == "llama-3" and end in vocabulary)]
    prepared = PreparedTokenizer(tokenizer, family, bos, eos, tuple(dict.fromkeys(stops)), vocabulary[token])
    beyond = {what: i for what, i in (("padding", prepared.pad), ("end", eos), ("beginning", bos)) if _beyond(i, rows)}
    if beyond:
        what = ", ".join(f"{key} {i}" for key, i in beyond.items())
        raise SanError(
            f"{name} has tokens for which the model's {rows} embeddings have no row: {what}. Choose another padding "
            "with pad, or enlarge the model with resize_token_embeddings."
        )
    return prepared


def _beyond(token: int | None, rows: int | None) -> bool:
    return token is not None and rows is not None and token >= rows


def _family(vocabulary: dict[str, int]) -> Family:
    if "<|begin_of_text|>" in vocabulary and "<|end_of_text|>" in vocabulary:
        return "llama-3"
    return "llama" if [vocabulary.get(t) for t in ("<unk>", "<s>", "</s>")] == [0, 1, 2] else "other"


def _beginning(tokenizer: Any, family: Family) -> int | None:
    """The beginning: that of LLaMA always, that of others where they put it before a text themselves."""
    bos = tokenizer.bos_token_id
    if family != "other" or bos is None:
        return bos
    return bos if tokenizer("a")["input_ids"][:1] == [bos] else None


def _padding(tokenizer: Any, family: Family, vocabulary: dict[str, int], pad: str, name: str) -> str:
    wanted = {"unk": tokenizer.unk_token, "eos": tokenizer.eos_token}.get(pad, pad)
    if pad != "auto":
        if wanted not in vocabulary:
            raise SanError(f"{name} has no token {pad!r} to pad with. Choose auto, unk, eos or a token that it has.")
        return wanted
    if family == "llama":
        return "<unk>"
    present = tokenizer.pad_token
    if family == "llama-3":
        if present in vocabulary and re.fullmatch(r"<\|.+\|>", present):
            return present
        kept = next((token for token in RESERVED if token in vocabulary), None)
        if kept is None:
            raise SanError(
                f"{name} is one of LLaMA 3, but has no reserved token to pad with: none of {', '.join(RESERVED)}. Its "
                "id 0 is a word. Choose 'eos' or another token with pad."
            )
        return kept
    choices = (present, tokenizer.unk_token, tokenizer.eos_token)
    return next(token for token in choices if token is not None and token in vocabulary)
